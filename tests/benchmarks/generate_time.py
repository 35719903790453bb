"""How long a batch of answers takes, ours against Hugging Face PEFT's.

    nice python tests/benchmarks/generate_time.py
    python tests/benchmarks/generate_time.py --base smollm2-135m --batch 16 --device cuda \\
        --dtype bfloat16

Not collected by pytest: a time is no test. The same prompts go through `Tuned.generate` and through
PEFT's `generate` with the adapter that ours saved, from text to text, greedily and always `--new`
tokens. The two take turns, the first of a pair changes from pair to pair, and the median of the
ratio of each pair is printed with its quartiles: of the time that passes, and of the processor's
time, which other processes disturb less. A merged LoRA is compared with its base, and the base with
transformers' own `generate`.

Before it is timed, each pair must write the same tokens, in float32 and for prompts of one length:
in 16 bits the two round sums differently, and a prompt of PEFT's reads padding otherwise. With
`--padded 1` the prompts that are timed have unequal lengths. Results go to
`data/results/generate_time_cpu.json`, `generate_time_cuda.json` or `--out`.
"""

import json
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from pairs import arguments, base_of, both_clocks, command

import peftlab
from peftlab.bases import Base
from peftlab.bases.data import data_path
from peftlab.methods import Method

SAME, BASE = "transformers", "base"  # who else is a peer, beside PEFT
CASES: dict[str, tuple[Method | None, str]] = {
    "no adapter": (None, SAME),
    "LoRA": (peftlab.LoRA(r=8, alpha=16), "PEFT"),
    "LoRA, merged": (peftlab.LoRA(r=8, alpha=16), BASE),
    "prompt tuning": (peftlab.PromptTuning(20), "PEFT"),
    "prefix tuning": (peftlab.PrefixTuning(20, shift_positions=True), "PEFT"),
}


class Numbers:
    """In the place of a tokenizer: a text is the numbers of its tokens."""

    pad_token_id, eos_token_id, pad_token = 0, None, "0"

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __call__(self, texts: str | list[str], padding_side: str = "right", **_) -> dict:
        if isinstance(texts, str):
            return {"input_ids": [int(word) for word in texts.split()]}
        rows = [torch.tensor([int(word) for word in text.split()]) for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_side=padding_side)
        ones = [torch.ones_like(row) for row in rows]
        mask = pad(ones, batch_first=True, padding_side=padding_side)
        return {"input_ids": ids, "attention_mask": mask}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def batch_decode(self, rows: torch.Tensor, **_) -> list[str]:
        return [" ".join(map(str, row)) for row in rows.tolist()]


def plain(name: str, dtype: str, device: str) -> Base:
    """The base in this type, with numbers for words and no token that ends a text.

    Random weights as a model begins with would write one token again and again: they are enlarged.
    """
    base = base_of(name, device)
    if not name.startswith("tiny-"):
        with torch.no_grad():
            for weight in base.model.parameters():
                weight *= 4 if weight.ndim == 2 else 1
    base.model.to(getattr(torch, dtype))
    base.tokenizer = Numbers(base.model.config.vocab_size)
    base.model.generation_config.eos_token_id = base.model.config.eos_token_id = None
    return base


def theirs(model: torch.nn.Module, base: Base, args) -> Callable[[list[str]], list[str]]:
    """The continuations by a model's own `generate`, from text to text like `Base.generate`."""
    options = dict(do_sample=False, pad_token_id=0)
    model.eval()

    @torch.no_grad()
    def generate(prompts: list[str]) -> list[str]:
        batch = base.tokenizer(prompts, padding_side="left")
        batch = {key: tensor.to(args.device) for key, tensor in batch.items()}
        out = model.generate(**batch, max_new_tokens=args.new, **options)
        return base.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])

    return generate


def pair(method: Method | None, peer: str, dtype: str, args) -> tuple[Callable, Callable]:
    """Two functions that write the continuations of prompts: ours, and the peer's."""
    base, other = (plain(args.name, dtype, args.device) for _ in range(2))
    if method is None:
        return lambda prompts: base.generate(prompts, args.new), theirs(other.model, other, args)
    tuned = peftlab.attach(base, method)
    if peer == BASE:  # an untrained LoRA changes nothing, so both must write the same
        tuned.merge()
        return (
            lambda prompts: tuned.generate(prompts, args.new),
            lambda prompts: other.generate(prompts, args.new),
        )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in tuned.trainable.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * noise.to(parameter)
    with tempfile.TemporaryDirectory() as folder:
        model = peft.PeftModel.from_pretrained(other.model, tuned.save(folder))
    return lambda prompts: tuned.generate(prompts, args.new), theirs(model, other, args)


def prompts_of(args, padded: bool) -> list[str]:
    """Random tokens, `--length` in a row; if padded, later rows are shorter, down to half of it."""
    vocabulary = plain(args.name, "float32", "cpu").model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(1, vocabulary, (args.batch, args.length), generator=generator).tolist()
    less = args.length // (2 * args.batch) if padded else 0
    return [" ".join(map(str, row[i * less :])) for i, row in enumerate(drawn)]


def summary(values: list[float], digits: int) -> dict[str, float]:
    """The median and the quartiles."""
    quartiles = statistics.quantiles(values, n=4)
    return dict(zip(("low", "median", "high"), (round(q, digits) for q in quartiles), strict=True))


def measured(case: str, args) -> dict:
    """Ratios and milliseconds of one case on one base."""
    method, peer = CASES[case]
    prompts, (ours, other) = prompts_of(args, False), pair(method, peer, "float32", args)
    said = ours(prompts)
    assert said == other(prompts), f"{case}: not the same tokens as {peer}'s"
    assert all(len(text.split()) == args.new for text in said)
    assert len({word for text in said for word in text.split()}) > args.batch, "they say nothing"
    if args.dtype != "float32":
        ours, other = pair(method, peer, args.dtype, args)
    prompts = prompts_of(args, bool(args.padded))
    ways = {"ours": lambda: ours(prompts), peer: lambda: other(prompts)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(2 + args.pairs):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            taken = both_clocks(ways[name], args.device)
            if turn >= 2:
                times[name].append(taken)
    found = {"base": args.name, "case": case, "peer": peer}
    for index, clock in enumerate(("wall", "processor")):
        mine, its = ([pair[index] for pair in times[name]] for name in ways)
        found[clock] = {
            "ratio": summary([a / b for a, b in zip(mine, its, strict=True)], 3),
            "ours ms": summary([1000 * t for t in mine], 1),
            "peer ms": summary([1000 * t for t in its], 1),
        }
    return found


def told(found: dict) -> None:
    ratios = [
        f"{clock} {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
        for clock, r in ((clock, found[clock]["ratio"]) for clock in ("wall", "processor"))
    ]
    mine, its = (found["processor"][who]["median"] for who in ("ours ms", "peer ms"))
    print(f"{found['base']}, {found['case']}: {', '.join(ratios)} of {found['peer']}'s; ", end="")
    print(f"{mine:.0f} and {its:.0f} ms", flush=True)


def main() -> None:
    bases = "tiny-gpt,tiny-llama,smollm2-135m"
    defaults = dict(pairs=12, base=bases, batch=4, length=24, new=24, padded=0, out="")
    args = arguments(__doc__.split("\n")[0], **defaults)
    warnings.filterwarnings("ignore")
    out = Path(args.out) if args.out else data_path("results", f"generate_time_{args.device}.json")
    gpu = args.device == "cuda"
    report = {
        "command": command("generate_time.py", sys.argv[1:]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} core",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        **{key: vars(args)[key] for key in ("dtype", "batch", "length", "new", "padded", "pairs")},
        "runs": [],
    }
    for name in args.base.split(","):
        args.name = name
        for case in CASES:
            if args.only in case:
                report["runs"].append(measured(case, args))
                told(report["runs"][-1])
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
