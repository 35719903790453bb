"""What two processes do at once for `test_devices.py`: trainings that one process repeats.

Everything is in float64, the loss too, where the package's is float32. Dropout is off, because
every process draws its own.
"""

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from models import config, put, tiny, tokenizer
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from peftlab import LoRA, QLoRA, Tuned, attach
from peftlab.bases import Base
from peftlab.experiments.train_distributed import train
from peftlab.tasks import IGNORED, Example, Task

STEPS, BATCH, LR = 4, 8, 1e-2
PAIRS = [  # one of every kind of method on a decoder, and on an encoder
    ("gpt2", "lora"),
    ("llama", "prompt"),
    ("gpt2", "prefix mlp"),
    ("llama", "houlsby"),
    ("gpt2", "full"),
    ("llama", "qlora"),
    ("gpt2", "p lama"),
    ("gpt2", "adalora"),
    ("bert", "lora"),
    ("bert", "prefix"),
    ("bert", "head v2"),
    ("t5", "lora"),
]
RESUMED = [("gpt2", "lora"), ("llama", "qlora")]
SHARDED = [("llama", "lora"), ("llama", "qlora"), ("gpt2", "qlora"), ("bert", "prefix")]


class Uneven(Task):
    """Rows with one to six labels, so that the mean of two means is not the mean of all."""

    name = "uneven"

    def batch(self, examples, tokenizer, device="cpu", context=None, kind="decoder"):
        if kind != "encoder":
            return super().batch(examples, tokenizer, device, context, kind)
        batch = tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        odd = (ids % 2 == 1) & mask.bool()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~odd, IGNORED)}


class Tags(Uneven):
    """The labels are classes of a head."""

    def batch(self, *args, **options):
        batch = super().batch(*args, **options)
        labels = batch["labels"]
        batch["labels"] = torch.where(labels == IGNORED, labels, labels % 3)
        return batch


def examples() -> list[Example]:
    texts = [f"{chr(97 + i)}{chr(99 + i)}" * (1 + i % 3) for i in range(20)]
    return [Example(f"{text}>", text[::-1][: i % 6]) for i, text in enumerate(texts)]


def uneven(kind: type[Uneven] = Uneven) -> Uneven:
    return kind(examples(), examples()[:3], examples()[:3])


def sharp(family: str, case: str):
    """A tiny base with this case attached, all in float64, the loss too, and without dropout."""
    tuned = put(case, tiny(family, torch.float64))
    for module in (*tuned.model.modules(), *tuned.modules.values()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0

    def label_loss(logits, labels):
        logits, labels = tuned._align(logits, labels)
        return cross_entropy(logits.double().flatten(0, -2), labels.flatten())

    tuned.label_loss = label_loss
    return tuned


def task_of(tuned) -> Uneven:
    return uneven(Uneven if tuned.head is None else Tags)


@dataclass
class Trained:
    losses: list[float]
    tensors: dict[str, torch.Tensor]


def trained(family: str, case: str, **options) -> Trained:
    tuned = sharp(family, case)
    options = dict(steps=STEPS, batch_size=BATCH, lr=LR, cpu=True) | options
    losses = train(tuned, task_of(tuned), **options)
    tensors = {name: p.detach().clone() for name, p in tuned.trainable.items()}
    return Trained(losses, tensors)


def name_of(family: str, case: str, kind: str) -> str:
    return f"{kind}-{family}-{case}".replace(" ", "_")


def together(out: Path) -> None:
    """What both processes run; each writes what it has at the end."""
    rank = PartialState(cpu=True).process_index

    def keep(name: str, ended: Trained) -> None:
        save_file(ended.tensors, out / f"{name}.{rank}.safetensors")
        (out / f"{name}.{rank}.json").write_text(json.dumps(ended.losses))

    for family, case in PAIRS:
        keep(name_of(family, case, "ddp"), trained(family, case, accumulate=2))
    keep("checkpointing", trained("llama", "lora", checkpointing=True))
    for family, case in SHARDED:
        ended = trained(family, case, sharded=True, checkpointing=family == "llama")
        keep(name_of(family, case, "shard"), ended)
    save = Tuned.save

    def noted(tuned, folder):
        with open(out / f"saved.{rank}", "a") as file:
            print(folder.name, file=file)
        return save(tuned, folder)

    Tuned.save = noted
    for family, case in RESUMED:
        folder, name = out / f"{family} run", name_of(family, case, "resumed")
        trained(family, case, steps=2, accumulate=2, save_every=1, out=folder)
        keep(name, trained(family, case, accumulate=2, resume=True, out=folder))
    refused(out / f"refused.{rank}.json", rank)


def refused(path: Path, rank: int) -> None:
    """The errors of what cannot be done."""

    def error(act) -> str:
        try:
            act()
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return ""

    base = tiny("gpt2", seed=rank)
    told = {
        "base": error(lambda: train(attach(base, LoRA(r=2)), uneven(), 1, BATCH, cpu=True)),
        "rank": error(
            lambda: train(attach(tiny("gpt2"), LoRA(r=2 + rank)), uneven(), 1, BATCH, cpu=True)
        ),
        "cut": error(lambda: trained("gpt2", "lora", batch_size=9)),
        "full": error(lambda: trained("gpt2", "full", sharded=True)),
        "resume": error(lambda: trained("gpt2", "lora", resume=True, out=path.parent / "none")),
        "idle": error(idle),
    }
    path.write_text(json.dumps(told))


def idle() -> None:
    """A tensor that trains and takes no part in the loss."""
    tuned = sharp("gpt2", "lora")
    tuned.deltas["layers.1.v"].forward = lambda x: torch.zeros_like(x)
    train(tuned, uneven(), STEPS, BATCH, cpu=True)


def large(layers: int, width: int, seed: int = 0):
    """A Llama of this size on the CPU, drawn alike in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = config("llama")
        made.num_hidden_layers, made.hidden_size, made.intermediate_size = layers, width, 4 * width
        model = transformers.LlamaForCausalLM(made)
    return Base("large", model, tokenizer())


def cards(out: Path, layers: int = 24, width: int = 1024) -> None:
    """A base whole in each process, and in shares: the losses, and the most memory of a GPU."""
    found, gpu = {}, torch.cuda.is_available()
    for case in (LoRA(r=2), QLoRA(r=2)):
        for sharded in (False, True):
            tuned = attach(large(layers, width), case)
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            losses = train(tuned, uneven(), 3, BATCH, sharded=sharded)
            most = torch.cuda.max_memory_allocated() if gpu else 0
            codes = sum(codes.bytes for codes in tuned.codes.values())
            found[f"{case.name} {sharded}"] = {"losses": losses, "most": most, "codes": codes}
            found["weights"] = 4 * tuned.facts["parameters"]
            del tuned
            gc.collect()
    (out / f"cards.{PartialState().process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    act = cards if sys.argv[2:] == ["cards"] else together
    act(Path(sys.argv[1]))
