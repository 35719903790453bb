"""Adapters, scales, biases and LoRA at one count of parameters:
`python -m peftlab.experiments.sweep_adapters`.

Writes `data/results/adapters.json`, one row a run. The budget is (IA)³'s, about 7,000 numbers on
either base: the methods that have a size to choose are set as near to it as they come, BitFit and
LayerNorm tuning are as large as they are. On `tiny-gpt` a known skill in a new form, sorting
letters; on `tiny-bert` parts of speech under a head, whose own parameters are counted apart and
which is also trained alone.

Every entry has three learning rates, each run once with a seed that is not used again and scored
on dev; the best is run on the seeds and scored on test.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.experiments.sweep_soft import TUNING_SEED, Entry, measure, untrained, write
from peftlab.methods import (
    IA3,
    BitFit,
    HoulsbyAdapter,
    LayerNormTuning,
    LoRA,
    Method,
    ParallelAdapter,
    PfeifferAdapter,
)

PATH = data_path("results", "adapters.json")
TASKS = {"tiny-gpt": ("letters", "sort", 30), "tiny-bert": ("speech", "", 25)}  # and the steps
HEAD_RATE = 3e-2  # of the head under a method; alone it has three as well
MIDDLE, LARGE, HUGE = (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1), (3e-2, 1e-1, 3e-1)
METHODS: dict[str, tuple[Method | None, tuple[float, ...]]] = {
    "Houlsby adapter": (HoulsbyAdapter(1), LARGE),
    "Pfeiffer adapter": (PfeifferAdapter(3), LARGE),
    "Parallel adapter": (ParallelAdapter(3), MIDDLE),
    "(IA)³": (IA3(), HUGE),
    "BitFit": (BitFit(), LARGE),
    "LayerNorm tuning": (LayerNormTuning(), LARGE),
    "LoRA": (LoRA(r=1, alpha=16, target_modules=("k", "v", "o")), MIDDLE),
    "Head alone": (None, LARGE),
}


def entries() -> list[Entry]:
    """Every method on both bases; the head alone where there is one."""
    return [
        Entry(label, base, task, method, steps, rates, skill, head_lr=HEAD_RATE)
        for base, (task, skill, steps) in TASKS.items()
        for label, (method, rates) in METHODS.items()
        if method is not None or not skill
    ]


def read() -> tuple[dict, pd.DataFrame]:
    """What was measured: the facts of the file, and a row for each run with its main "score"."""
    made = json.loads(PATH.read_text(encoding="utf-8"))
    runs = pd.DataFrame(made.pop("runs"))
    runs["score"] = runs["exact"].fillna(runs["accuracy"])
    return made, runs


def with_sizes(runs: pd.DataFrame) -> pd.DataFrame:
    """The same runs; each "label" says how many parameters "trained"."""
    pairs = zip(runs["label"], runs["trained"], strict=True)
    return runs.assign(label=[f"{label}, {n:,}" if n else label for label, n in pairs])


def at_one_budget(base: str) -> pd.DataFrame:
    """The runs on one base, a "label" for each method and its size."""
    _, runs = read()
    runs["label"] = runs["label"].replace("Head alone", "Head alone, base frozen")
    return with_sizes(runs[runs["base"] == base])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--smoke", action="store_true", help="two steps a run, few runs")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    begun, compared = time.perf_counter(), entries()
    if options.smoke:
        compared = compared[::7]
    result = measure(compared, options.device, options.workers, 2 if options.smoke else None)
    cpu = f"CPU, {options.workers} of {os.cpu_count()} cores"
    facts = {
        "command": f"python -m peftlab.experiments.sweep_adapters --workers {options.workers}",
        "bases": {name: load(name).digest for name in TASKS},
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(options.device),
        "precision": "float32",
        "batch size": 16,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "tuning seed": TUNING_SEED,
        "head's rate under a method": HEAD_RATE,
        "untrained": untrained(compared, options.device),
        "seconds": round(time.perf_counter() - begun),
    }
    write(options.out, facts, result)
    print(f"{options.out}: {len(result['runs'])} runs, {facts['seconds']} s")


if __name__ == "__main__":
    main()
