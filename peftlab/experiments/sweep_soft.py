"""Soft prompts measured: which start and step size train, which length, and on which model.

    python -m peftlab.experiments.sweep_soft --workers 14            # every part: one GPU
    python -m peftlab.experiments.sweep_soft --part lab --smoke      # a try on a CPU

Writes one file for each part, `data/results/soft_<part>.json`, one row a run:

    lab       tiny-gpt: initialisation × learning rate × length × reparameterisation, for prompts
              and prefixes, on a known skill in a form that is new (sorting letters)
    lengths   tiny-bert: 1 to 100 virtual tokens, prompt tuning and P-tuning v2, on both taggings
    families  every method on every base, beside the untrained base, LoRA and, under a head, the
              head alone
    spread    tiny-gpt: a prompt with and without an encoder, over many seeds

In `lab` every setting runs on every seed. In the other parts each entry has the same number of
tries: three learning rates, each run once with a seed that is not used again and scored on dev;
the best one is run on the seeds and scored on test. A chosen rate at the end of its grid is marked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import current_process, get_context
from pathlib import Path

import pandas as pd
import torch

from peftlab import tasks
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.methods import (
    DeepPromptTuning,
    FullFineTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptAndPrefix,
    PromptTuning,
    PTuning,
    PTuningV2,
)
from peftlab.training import train
from peftlab.tuned import attach

SEEDS = (0, 1, 2)
TUNING_SEED = 100
TABLE, NETWORK = (0.03, 0.1, 0.3), (1e-3, 3e-3, 1e-2)  # what trains: the vectors, or their maker
ADAPTER = (1e-3, 3e-3, 1e-2)
FULL = (3e-4, 1e-3, 3e-3)
BASES = ("tiny-gpt", "tiny-llama", "tiny-bert", "tiny-t5")
TAGGINGS = ("entities", "speech")
HEADED = (*TAGGINGS, "reading")
LENGTHS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Entry:
    """One thing to be measured; `label` names it in tables, `method` None is the head alone."""

    label: str
    base: str
    task: str
    method: Method | None
    steps: int
    rates: tuple[float, ...]
    skill: str = ""
    seeds: tuple[int, ...] = field(default=SEEDS)
    head_lr: float | None = None  # of a head under a method; None is the usual one

    def facts(self) -> dict:
        method = self.method.to_dict() if self.method else {"method": "head"}
        return {
            "label": self.label,
            "base": self.base,
            "task": f"{self.task}:{self.skill}" if self.skill else self.task,
            **method,
            "steps": self.steps,
        }


def rates_of(method: Method) -> tuple[float, ...]:
    """The three learning rates that an entry may try, by what it trains."""
    if isinstance(method, LoRA):
        return ADAPTER
    if isinstance(method, FullFineTuning):
        return FULL
    return TABLE if method.learning_rate >= 0.03 else NETWORK


# -- the parts --------------------------------------------------------------------------------


def lab() -> list[Entry]:
    """Every combination that the lab's heat maps show; each rate is an entry of its own."""
    wide, narrow = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    words = " a b c d e f"
    starts = {
        "vocabulary": {"init": "vocabulary"},
        "text": {"init": "text", "init_text": words},
        "random": {"init": "random"},
        "normal": {"init": "normal"},
        "zero": {"init": "zero"},
    }
    made: list[tuple[str, Method, tuple[float, ...]]] = []
    for start, options in starts.items():
        made.append((f"prompt, {start}", PromptTuning(20, **options), wide))
        if start != "normal":
            made.append((f"prefix, {start}", PrefixTuning(20, **options), wide))
    for encoder in ("lstm", "mlp", "attention"):
        made.append((f"prompt, {encoder}", PTuning(20, encoder=encoder), narrow))
    made.append(("prefix, MLP", PrefixTuning(20, prefix_projection=True), narrow))
    for length in (1, 5, 50, 100):
        made.append((f"prompt, P = {length}", PromptTuning(length), wide[2:]))
        made.append((f"prefix, P = {length}", PrefixTuning(length), wide[2:]))
    return [
        Entry(label, "tiny-gpt", "letters", method, 150, (rate,), "sort")
        for label, method, rates in made
        for rate in rates
    ]


def lengths() -> list[Entry]:
    return [
        Entry(method.title, "tiny-bert", task, method, 300, rates_of(method))
        for task, length in itertools.product(TAGGINGS, LENGTHS)
        for method in (PromptTuning(length), PTuningV2(length))
    ] + [Entry("Head alone", "tiny-bert", task, None, 300, (2e-3, 5e-3, 2e-2)) for task in TAGGINGS]


def every_method() -> dict[str, Method]:
    """Every soft prompt in the form that lessons use, LoRA and full fine-tuning to compare."""
    return {
        "Prompt tuning": PromptTuning(20),
        "P-tuning, LSTM": PTuning(20),
        "P-tuning, MLP": PTuning(20, encoder="mlp"),
        "P-tuning, attention": PTuning(20, encoder="attention"),
        "Prefix tuning": PrefixTuning(20),
        "Prefix tuning, MLP": PrefixTuning(20, prefix_projection=True),
        "P-tuning v2": PTuningV2(20),
        "Deep prompt tuning": DeepPromptTuning(20),
        "Prompt and prefix, MLP": PromptAndPrefix(20),
        "LoRA": LoRA(r=8, alpha=16, target_modules="all-linear"),
        "Full fine-tuning": FullFineTuning(),
    }


def families() -> list[Entry]:
    entries = []
    for base in BASES:
        for task in ("sentiment", "entities", "reading") if base == "tiny-bert" else ("letters",):
            skill = "sort" if task == "letters" else ""
            for label, method in every_method().items():
                entries.append(Entry(label, base, task, method, 120, rates_of(method), skill))
            if task in HEADED:
                entries.append(Entry("Head alone", base, task, None, 120, (2e-3, 5e-3, 2e-2)))
    return entries


def spread() -> list[Entry]:
    kinds = {
        "no encoder": PTuning(20, encoder="embedding"),
        "LSTM": PTuning(20),
        "MLP": PTuning(20, encoder="mlp"),
        "attention": PTuning(20, encoder="attention"),
    }
    return [
        Entry(label, "tiny-gpt", "letters", m, 150, rates_of(m), "sort", seeds=tuple(range(10)))
        for label, m in kinds.items()
    ]


PARTS = {
    "lab": lab,
    "lengths": lengths,
    "families": families,
    "spread": spread,
}


# -- running ----------------------------------------------------------------------------------

_bases = {}


def one(entry: Entry, lr: float, seed: int, split: str, device: str, steps: int | None) -> dict:
    """One run: train, and score on the split."""
    torch.set_num_threads(1)
    if device == "cuda":  # each worker stays on one of the GPUs
        device = f"cuda:{current_process()._identity[0] % torch.cuda.device_count()}"
    if (entry.base, device) not in _bases:
        _bases[entry.base, device] = load(entry.base, device=device)
    base = _bases[entry.base, device]
    task = tasks.load(entry.task, **({"skill": entry.skill} if entry.skill else {}))
    methods, head_lr = ([entry.method], entry.head_lr) if entry.method else ([], lr)
    with attach(base, methods, seed=seed, head=task.head) as tuned:
        run = train(
            tuned, task, steps=steps or entry.steps, lr=lr, seed=seed, precision="fp32",
            progress=False, evaluate=False, **({"head_lr": head_lr} if head_lr else {}),
        )  # fmt: skip
        examples = getattr(task, split)
        scores = task.score(tuned, examples[:20] if steps else examples)
        count = tuned.count()
    loss = run.history["loss"]
    found = dict(
        **scores,
        loss_first=loss.head(10).mean(),
        loss_last=loss.tail(10).mean(),
        seconds=run.seconds,
    )
    return {
        **entry.facts(),
        "metric": task.main,
        "trained": count.parameters,
        "stored": count.stored,
        "lr": lr,
        "seed": seed,
        **{key: float(f"{value:.4g}") for key, value in found.items()},
    }


def best(rows: list[dict]) -> float:
    """The rate with the best dev score; on a tie the lowest loss at the end."""
    return max(rows, key=lambda row: (row[row["metric"]], -row["loss_last"]))["lr"]


def measure(entries: list[Entry], device: str, workers: int, steps: int | None) -> dict:
    """Choose a rate for every entry that has several, then run its seeds; longest runs first."""
    entries = sorted(entries, key=lambda entry: -entry.steps)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:

        def submit(jobs: list[tuple[Entry, float, int, str]]) -> list[dict]:
            futures = [pool.submit(one, *job, device, steps) for job in jobs]
            return [future.result() for future in futures]

        tuning = [
            (e, lr, TUNING_SEED, "dev") for e in entries if len(e.rates) > 1 for lr in e.rates
        ]
        tried = submit(tuning)
        final = []
        for entry in entries:
            rows = [row for row, job in zip(tried, tuning, strict=True) if job[0] is entry]
            final += [
                (entry, best(rows) if rows else entry.rates[0], s, "test") for s in entry.seeds
            ]
        runs = submit(final)
    for row, (entry, lr, *_) in zip(runs, final, strict=True):
        if len(entry.rates) > 1:
            row["at the end of its grid"] = lr in (entry.rates[0], entry.rates[-1])
    return {"tried": tried, "runs": runs}


def untrained(entries: list[Entry], device: str) -> dict[str, dict]:
    """The scores of the bases as they are, where a task needs no head."""
    scores = {}
    for base, task, skill in sorted({(e.base, e.task, e.skill) for e in entries}):
        loaded = tasks.load(task, **({"skill": skill} if skill else {}))
        if loaded.head is None:
            name = f"{task}:{skill}" if skill else task
            scores[f"{base} {name}"] = loaded.score(load(base, device=device))
    return scores


def read(part: str, path: Path | None = None) -> tuple[dict, pd.DataFrame]:
    """A part as it was written: when and where it was made, and one row for each final run."""
    result = json.loads(
        (path or data_path("results", f"soft_{part}.json")).read_text(encoding="utf-8")
    )
    runs = pd.DataFrame(result.pop("runs"))
    return result, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--smoke", action="store_true", help="two steps a run, few runs")
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args()
    for part in options.part:
        begun = time.perf_counter()
        entries = PARTS[part]()
        if options.smoke:
            entries = entries[::9]
        result = measure(entries, options.device, options.workers, 2 if options.smoke else None)
        facts = {
            "command": "python -m peftlab.experiments.sweep_soft "
            f"--part {part} --workers {options.workers}",
            "bases": {name: load(name).digest for name in sorted({e.base for e in entries})},
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
            "precision": "float32",
            "batch size": 16,
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "tuning seed": TUNING_SEED,
            "untrained": untrained(entries, options.device),
            "seconds": round(time.perf_counter() - begun),
        }
        write(options.out / f"soft_{part}.json", facts, result)
        print(f"{part}: {len(result['runs'])} runs, {facts['seconds']} s", flush=True)


def write(path: Path, facts: dict, result: dict[str, list[dict]]) -> None:
    """One row a line, so that a new run changes few lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(facts, indent=1, ensure_ascii=False)[:-2]
    for name, rows in result.items():
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        head += f',\n "{name}": [\n{lines}\n ]'
    path.write_text(head + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
