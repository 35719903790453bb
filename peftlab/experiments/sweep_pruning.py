"""What pruning costs and saves: loss, recovery, bytes and time, on a CPU in some minutes.

    python -m peftlab.experiments.sweep_pruning            # writes data/results/pruning.json
    python -m peftlab.experiments.sweep_pruning --smoke --out /tmp/somewhere

The text is the bases' own: documents about the made-up world, none of them in the pre-training.
Loss is in nats a token, the next one for tiny-gpt, every seventh, masked, for tiny-bert. A seed
draws the calibration texts, the random masks, LoRA's start and the order of training.

    curves    one shot, no training: masks by magnitude, Wanda and chance; structures by magnitude,
              by the loss's gradient and by chance
    recovery  further training on the same kind of text: full fine-tuning with the mask, LoRA with
              and without it, then merged; gradual against one-shot; a smaller model with LoRA
    bytes     what a file of the 16-bit weights takes, as it is, zipped, as bits and values, as CSR
    times     one forward on one thread, of a GPT-2 of 4 layers and d_model 768 with random weights
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import zlib
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from peftlab.bases import Base, LanguageModel, load
from peftlab.bases.data import data_path
from peftlab.experiments.documents import Writer
from peftlab.experiments.sweep_soft import write
from peftlab.methods import (
    FullFineTuning,
    LoRA,
    Method,
    Prune,
    PruneStructures,
    calibration,
)
from peftlab.tasks import Example, Task
from peftlab.training import train
from peftlab.tuned import Tuned, attach

SEEDS = (0, 1, 2)
PATH = data_path("results", "pruning.json")
BASES = ("tiny-gpt", "tiny-bert")
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8)
FRACTIONS = (1 / 6, 1 / 3, 1 / 2)
LONGEST = 900  # characters of a text, so that each fits the context
LORA = LoRA(r=8, alpha=16, target_modules="all-linear")
ROUND = 4  # digits that are stored


def world_texts(count: int, seed: str) -> list[str]:
    """Documents as in pre-training, of another seed: at most 150 words each, at least 20."""
    writer, texts = Writer(f"pruning, {seed}"), []
    while len(texts) < count:
        text = writer.write()[1]
        if 20 <= len(text.split()) <= 100 and len(text) <= LONGEST:
            texts.append(text)
    return texts


class WorldText(Task):
    """Running text of the world; the score is the loss on the test texts, in nats a token."""

    name, title, main, max_new_tokens = "world", "Text of the world", "loss", 1

    @classmethod
    def load(cls, train: int = 1000, test: int = 32) -> WorldText:
        """Texts to train on, and others to score on."""
        splits = {"train": train, "dev": 0, "test": test}
        made = {
            split: [Example("", text) for text in world_texts(count, split)]
            for split, count in splits.items()
        }
        return cls(**made)

    def batch_for(self, model: LanguageModel, examples: list[Example]) -> dict[str, torch.Tensor]:
        return calibration.own_batch(model, [example.target for example in examples])

    @torch.no_grad()
    def score(self, model, examples=None, batch_size=24) -> dict[str, float]:
        texts = [example.target for example in (self.test if examples is None else examples)]
        total = tokens = 0
        with model._evaluating():
            for start in range(0, len(texts), batch_size):
                batch = calibration.own_batch(model, texts[start : start + batch_size])
                count = (model.aligned(batch)[1] != -100).sum().item()
                total, tokens = total + model.batch_loss(batch).item() * count, tokens + count
        return {"loss": total / tokens}


def number(value: float) -> float:
    """Four digits, for a file that is read by people too."""
    return float(f"{value:.{ROUND}g}")


def zeros(tuned: Tuned) -> float:
    """The share of zeros in the linear weights as they stand in the model."""
    weights = [linear.weight for linear in tuned.anatomy.linears.values()]
    return sum((W == 0).sum().item() for W in weights) / sum(W.numel() for W in weights)


# Curves ---------------------------------------------------------------------------------------


def one_shot(texts: tuple[str, ...], seed: int) -> list[tuple[str, str, float, Method]]:
    """(group, label, amount, method) of everything that is tried without training."""
    wanda = {"score": "wanda", "calibration": texts}
    ways = {
        "magnitude, layer": {},
        "magnitude, global": {"scope": "global"},
        "Wanda": wanda,
        "random": {"score": "random"},
    }
    drawn = ("Wanda", "random", "by gradient")  # the others are the same for every seed
    tried = [("mask", label, s, Prune(s, **way)) for label, way in ways.items() for s in SPARSITIES]
    tried += [
        ("2:4", "magnitude, layer", 0.5, Prune(pattern="2:4")),
        ("2:4", "Wanda", 0.5, Prune(pattern="2:4", **wanda)),
        ("2:4", "random", 0.5, Prune(pattern="2:4", score="random")),
    ]
    scores = {
        "by magnitude": {},
        "by gradient": {"score": "gradient", "calibration": texts},
        "random": {"score": "random"},
    }
    for kind in ("heads", "neurons", "layers"):
        tried += [
            (kind, label, fraction, PruneStructures(**{kind: fraction}, **options))
            for label, options in scores.items()
            for fraction in FRACTIONS
        ]
    return [row for row in tried if seed == 0 or row[1] in drawn]


def curves(base: Base, task: WorldText, seed: int, smoke: bool) -> list[dict]:
    """The loss of the base after each way of pruning it, nothing trained."""
    texts = tuple(world_texts(4 if smoke else 16, f"calibration {seed}"))
    tried, rows = one_shot(texts, seed), []
    for group, label, amount, method in tried[:: 9 if smoke else 1]:
        with attach(base, method, seed=seed) as tuned:
            left = tuned.anatomy.shape.parameters()
            loss = task.score(tuned)["loss"]
        rows.append(
            {
                "base": base.name,
                "group": group,
                "label": label,
                "amount": number(amount),
                "seed": seed,
                "parameters": left,
                "loss": number(loss),
            }
        )
    return rows


# Recovery -------------------------------------------------------------------------------------


def recoveries(texts: tuple[str, ...]) -> dict[str, tuple[list[Method], float]]:
    """The methods of each way back, and the learning rate."""
    cut = PruneStructures(neurons=1 / 3, score="gradient", calibration=texts)
    return {
        "70%, full, masked": ([Prune(0.7), FullFineTuning()], 3e-4),
        "70%, LoRA, masked": ([Prune(0.7), LORA], 3e-3),
        "70%, LoRA, dense": ([Prune(0.7, mask_deltas=False), LORA], 3e-3),
        "a third of the neurons, LoRA": ([cut, LORA], 3e-3),
        "80%, full, one-shot": ([Prune(0.8), FullFineTuning()], 3e-4),
        "80%, full, gradual": ([Prune(0.8, schedule="gradual", every=5), FullFineTuning()], 3e-4),
    }


def recovery(
    base: Base, task: WorldText, label: str, methods: list[Method], lr: float, seed: int, steps: int
) -> dict:
    """Loss after pruning, after training, after merging; zeros before and after that."""
    with attach(base, methods, seed=seed) as tuned:
        before = task.score(tuned)["loss"]
        run = train(
            tuned, task, steps=steps, lr=lr, batch_size=8, seed=seed, precision="fp32",
            progress=False, evaluate=False,
        )  # fmt: skip
        found = {
            "before": before,
            "loss": task.score(tuned)["loss"],
            "zeros": zeros(tuned),
            "seconds": run.seconds,
        }
        if tuned.deltas:
            tuned.merge()
            found |= {"merged": task.score(tuned)["loss"], "zeros merged": zeros(tuned)}
        sizes = {"trained": tuned.count().parameters, "left": tuned.anatomy.shape.parameters()}
    row = {"base": base.name, "label": label, "seed": seed, "steps": steps, "lr": lr}
    return row | sizes | {key: number(value) for key, value in found.items()}


# Bytes and time -------------------------------------------------------------------------------


def linear_bytes(base: Base, label: str, method: Method | None, seed: int = 0) -> dict:
    """What all linear weights take in 16 bits, in four forms.

    As they are; zipped by zlib at level 6; one bit an entry and the values that are not zero; and
    CSR with 32-bit indices, a row start for each output.
    """
    stack = [attach(base, method, seed=seed)] if method else []
    weights = [linear.weight.half() for linear in base.anatomy.linears.values()]
    raw = b"".join(W.contiguous().numpy().tobytes() for W in weights)
    n, filled = (
        sum(W.numel() for W in weights),
        sum(W.count_nonzero().item() for W in weights),
    )
    for tuned in stack:
        tuned.detach()
    return {
        "base": base.name,
        "label": label,
        "zeros": number(1 - filled / n),
        "dense": len(raw),
        "zipped": len(zlib.compress(raw, 6)),
        "bits and values": sum(-(-W.numel() // 8) for W in weights) + 2 * filled,
        "CSR": filled * (2 + 4) + 4 * sum(len(W) + 1 for W in weights),
    }


def wide_base() -> Base:
    """A GPT-2 wide enough for its products to take most of the time."""
    tokenizer = load("tiny-gpt").tokenizer
    sizes = dict(n_embd=768, n_head=12, n_layer=4, n_positions=64)
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Base("gpt2-wide", GPT2LMHeadModel(config), tokenizer)


def times(rounds: int) -> list[dict]:
    """Milliseconds of a forward: five of each way in turn, some rounds; and the products in it."""
    half, base = 1 / 2, wide_base()
    ways = {
        "dense": None,
        "dense again": None,
        "50% zeros": Prune(0.5),
        "2:4": Prune(pattern="2:4"),
        "90% zeros": Prune(0.9),
        "a quarter of heads and neurons gone": PruneStructures(heads=1 / 4, neurons=1 / 4),
        "half of heads and neurons gone": PruneStructures(heads=half, neurons=half),
        "half of the layers gone": PruneStructures(layers=half),
    }
    ids = torch.randint(0, 2000, (4, 64), generator=torch.Generator().manual_seed(0))
    taken, weights = {label: [] for label in ways}, {}
    for _ in range(rounds):
        for label, method in ways.items():
            stack = [attach(base, method)] if method else []
            linears = base.anatomy.linears.values()
            weights[label] = sum(linear.weight.numel() for linear in linears)
            with torch.no_grad():
                base(ids)  # the first one warms up
                for _ in range(5):
                    begun = time.process_time()
                    base(ids)
                    taken[label].append((time.process_time() - begun) * 1000)
            for tuned in stack:
                tuned.detach()
    return [
        {
            "label": label,
            "linear weights": weights[label],
            "ms": number(statistics.median(values)),
            "low": number(sorted(values)[len(values) // 4]),
            "high": number(sorted(values)[-1 - len(values) // 4]),
            "forwards": len(values),
        }
        for label, values in taken.items()
    ]


def read(path: Path = PATH) -> tuple[dict, dict[str, pd.DataFrame]]:
    """When and where it was made, and a table for each part."""
    result = json.loads(path.read_text(encoding="utf-8"))
    parts = ("curves", "recovery", "bytes", "times")
    tables = {part: pd.DataFrame(result.pop(part)) for part in parts}
    return result, tables


def untouched(base: str = "tiny-gpt") -> float:
    """The recorded loss of a base with nothing pruned, in nats per token."""
    return read()[0]["untouched"][base]


def by_sparsity(base: str = "tiny-gpt") -> pd.DataFrame:
    """Masks of single weights: "label", "amount", "seed" and "loss" of each run, none trained."""
    names = {
        "magnitude, layer": "magnitude",
        "magnitude, global": "magnitude, all matrices together",
        "Wanda": "Wanda",
        "random": "random",
    }
    rows = read()[1]["curves"].query("base == @base and group == 'mask'")
    return rows.assign(label=rows.label.map(names))[["label", "amount", "seed", "loss"]]


def by_structure(base: str = "tiny-gpt", amount: float = FRACTIONS[0]) -> pd.DataFrame:
    """This share of the heads, neurons or layers ("row") gone by each score ("label"), with "seed"
    and "loss" of each run, none trained."""
    kinds = ["heads", "neurons", "layers"]
    rows = read()[1]["curves"].query("base == @base and group in @kinds")
    rows = rows[(rows.amount - amount).abs() < 0.01]
    rows = rows.assign(row=rows.group, label=rows.label.str.removeprefix("by "))
    order = rows.row.map(kinds.index)
    return rows.loc[order.sort_values(kind="stable").index, ["row", "label", "seed", "loss"]]


def by_recovery(base: str = "tiny-gpt") -> pd.DataFrame:
    """What training brought back: "row" is what is gone, "label" how it was trained, with "seed",
    "before" and "loss" of each run."""
    ways = {
        "70%, LoRA, masked": ("70% of weights", "LoRA, under the mask"),
        "70%, LoRA, dense": ("70% of weights", "LoRA, dense"),
        "70%, full, masked": ("70% of weights", "full fine-tuning, under the mask"),
        "80%, full, one-shot": ("80% of weights", "full fine-tuning, under the mask"),
        "80%, full, gradual": ("80% of weights", "full fine-tuning, gradual"),
        "a third of the neurons, LoRA": ("1/3 of neurons", "LoRA, dense"),
    }
    rows = read()[1]["recovery"].query("base == @base")
    rows = rows.set_index("label").loc[list(ways)].reset_index()
    gone, how = zip(*rows.label.map(ways), strict=True)
    return rows.assign(row=gone, label=how)[["row", "label", "seed", "before", "loss"]]


def by_form() -> pd.DataFrame:
    """The bytes of tiny-gpt's linear weights in 16 bits, in four forms, in parts of the plain file
    of all of them."""
    stored = read()[1]["bytes"].set_index("label")
    forms = ["dense", "zipped", "bits and values", "CSR"]
    return (stored[forms] / stored.loc["as it is", "dense"]).rename_axis(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=25, help="of recovery")
    parser.add_argument("--smoke", action="store_true", help="a little of everything")
    parser.add_argument("--out", type=Path, default=PATH.parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, seeds = time.process_time(), SEEDS[:1] if options.smoke else SEEDS
    steps = 2 if options.smoke else options.steps
    task = WorldText.load(16, 4) if options.smoke else WorldText.load()
    rows = {"curves": [], "recovery": [], "bytes": [], "times": []}
    facts = {
        "command": "python -m peftlab.experiments.sweep_pruning",
        "device": "CPU, one thread",
        "seeds": list(seeds),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "bases": {},
        "untouched": {},
        "cpu seconds": 0,
    }

    def store() -> None:  # each stage when it is ready
        facts["cpu seconds"] = round(time.process_time() - begun)
        write(options.out / PATH.name, facts, rows)
        print(f"{sum(map(len, rows.values()))} rows, {facts['cpu seconds']} s of processor")

    gpt = load("tiny-gpt")
    stored = {"as it is": None} | {f"{s:.0%} zeros": Prune(s) for s in (0.5, 0.75, 0.9)}
    stored["half of heads and neurons gone"] = PruneStructures(heads=0.5, neurons=0.5)
    rows["bytes"] = [linear_bytes(gpt, label, method) for label, method in stored.items()]
    rows["times"] = times(1 if options.smoke else 3)
    for name in BASES:
        base = load(name)
        facts["bases"][name] = base.digest
        facts["untouched"][name] = number(task.score(base)["loss"])
        for seed in seeds:
            rows["curves"] += curves(base, task, seed, options.smoke)
            ways = recoveries(tuple(world_texts(16, f"calibration {seed}")))
            if base.kind == "encoder":  # as many as the time allows
                ways = {label: way for label, way in ways.items() if label.startswith("70%")}
            for label, (methods, lr) in ways.items():
                rows["recovery"].append(recovery(base, task, label, methods, lr, seed, steps))
            store()


if __name__ == "__main__":
    main()
