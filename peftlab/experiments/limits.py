"""A prefix and rank-1 LoRA with as many parameters, on letter skills, in minutes on a CPU.

    python -m peftlab.experiments.limits             # writes data/results/limits.json
    python -m peftlab.experiments.limits --long      # further runs: data/results/limits_long.json

On tiny-gpt a prefix of 9 and LoRA of rank 1 on all linear weights train 20,736 numbers each. Each
skill has its budgets of steps; every budget is a run of its own, with its own cosine, on three
seeds. There is one learning rate for each. The prefix's is the middle of those that work in
`soft_lab.json`, and of 0.03, 0.1 and 0.3 the best on `permute` with seed 0; LoRA's is, of 0.003 and
0.01, the better there. `limits_first.json` is an earlier round with other settings. A row has the
test scores, the seconds of the training by the clock, and those of the processor for training and
scoring, in which no other program counts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from peftlab import tasks
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.experiments.sweep_soft import write
from peftlab.methods import LoRA, Method, PrefixTuning
from peftlab.training import train
from peftlab.tuned import attach

SEEDS = (0, 1, 2)
SKILLS = {"sort": (40,), "double_histogram": (240,)}
LONG = {"double_histogram": (360,), "permute": (360,)}
BATCH = 16
PAIR: dict[str, tuple[Method, float]] = {
    "Prefix tuning": (PrefixTuning(9), 0.1),
    "LoRA": (LoRA(r=1, alpha=16, target_modules="all-linear"), 3e-3),
}


def one(label: str, skill: str, steps: int, seed: int, device: str = "cpu") -> dict:
    """One run on one thread: train on a skill, and score on its test set."""
    torch.set_num_threads(1)
    begun = time.process_time()
    base, (method, lr) = load("tiny-gpt", device=device), PAIR[label]
    task = tasks.load("letters", skill=skill)
    with attach(base, method, seed=seed) as tuned:
        run = train(
            tuned, task, steps=steps, lr=lr, batch_size=BATCH, seed=seed, precision="fp32",
            progress=False, evaluate=False,
        )  # fmt: skip
        scores = task.score(tuned)
        count = tuned.count().parameters
    cpu = time.process_time() - begun
    loss = run.history["loss"].tail(10).mean()
    found = {**scores, "loss_last": loss, "seconds": run.seconds, "cpu seconds": cpu}
    return {
        "label": label,
        "skill": skill,
        "steps": steps,
        "seed": seed,
        "lr": lr,
        "trained": count,
        **{key: float(f"{value:.4g}") for key, value in found.items()},
    }


def read(name: str = "limits", path: Path | None = None) -> tuple[dict, pd.DataFrame]:
    """A result as it was written: when and where it was made, and one row for each run."""
    result = json.loads((path or data_path("results", f"{name}.json")).read_text(encoding="utf-8"))
    runs = pd.DataFrame(result.pop("runs"))
    return result, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--long", action="store_true", help="the further runs")
    parser.add_argument("--smoke", action="store_true", help="two steps a run, one seed")
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args()
    skills, name = (LONG, "limits_long") if options.long else (SKILLS, "limits")
    begun = time.perf_counter()
    jobs = [
        (label, skill, 2 if options.smoke else steps, seed, options.device)
        for skill, budgets in skills.items()
        for steps in budgets
        for label in PAIR
        for seed in (SEEDS[:1] if options.smoke else SEEDS)
    ]
    base = load("tiny-gpt", device=options.device)
    untrained = {skill: tasks.load("letters", skill=skill).score(base) for skill in skills}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(one, *zip(*jobs, strict=True)))
    processor = f"CPU, {options.workers} processes on {os.cpu_count()} cores"
    facts = {
        "command": "python -m peftlab.experiments.limits"
        + (" --long" if options.long else "")
        + f" --workers {options.workers}",
        "device": processor if options.device == "cpu" else torch.cuda.get_device_name(),
        "precision": "float32",
        "batch size": BATCH,
        "seeds": list(SEEDS),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "base": base.digest,
        "untrained": untrained,
        "seconds": round(time.perf_counter() - begun),
        "cpu seconds": round(sum(row["cpu seconds"] for row in rows)),
    }
    write(options.out / f"{name}.json", facts, {"runs": rows})
    print(f"{len(rows)} runs, {facts['seconds']} s, {facts['cpu seconds']} s of processor")


if __name__ == "__main__":
    main()
