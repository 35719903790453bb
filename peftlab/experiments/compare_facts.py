"""New facts, three methods, two budgets: `python -m peftlab.experiments.compare_facts`.

Writes `data/results/compare_facts.json`. Its parts:

- methods: LoRA, prompt tuning and full fine-tuning at a short and a long budget of steps;
- ranks: LoRA on every linear weight at the short budget, by rank, with alpha fixed;
- targets: LoRA at the short budget with as many parameters as r = 8 on every linear weight has,
  all spent on q and v.

Every entry gets the same number of tries: three learning rates, each run once with a seed that is
not used again, and the one with the most new facts right on dev is kept (on a tie, the best sum of
all four numbers). It is then run on three seeds and scored on test. A learning rate at the end of
its grid is marked, for a better one may lie outside.

Each final run of full fine-tuning at the short budget also reports its updates ΔW: the share of
‖ΔW‖² in the largest r singular values, averaged over the linear weights, the singular values of
one, and the scores that remain when every linear ΔW is cut to its best rank-r approximation.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pandas as pd
import torch

import peftlab
from peftlab.bases import Base
from peftlab.bases.data import data_path
from peftlab.bases.probes import energy
from peftlab.methods import FullFineTuning, LoRA, Method, PromptTuning
from peftlab.tasks import Task
from peftlab.tuned import Tuned

SEEDS = (0, 1, 2)
TUNING_SEED = 100
SHORT, LONG = 250, 500
CUTS = (1, 2, 4, 8, 16, 32, 64)
SHOWN = "layers.3.up"
GRIDS = {
    "lora": (1e-3, 2e-3, 4e-3),
    "prompt_tuning": (3e-2, 1e-1, 3e-1),
    "full_fine_tuning": (3e-4, 1e-3, 3e-3),
}


@dataclass(frozen=True)
class Entry:
    """One row of the comparison: a method and its budget."""

    part: str
    method: Method
    steps: int

    def facts(self) -> dict:
        return {"part": self.part, "steps": self.steps, **self.method.to_dict()}


@dataclass(frozen=True)
class Job:
    """One training run of an entry."""

    entry: Entry
    lr: float
    seed: int
    split: str
    base: str
    device: str


def entries() -> list[Entry]:
    """Everything that is compared, the longest first."""

    def lora(r, targets="all-linear"):
        return LoRA(r=r, alpha=128, target_modules=targets)

    methods = [lora(8), PromptTuning(), FullFineTuning()]
    return [
        *(Entry("methods", method, steps) for steps in (LONG, SHORT) for method in methods),
        *(Entry("ranks", lora(r), SHORT) for r in (1, 32)),
        Entry("targets", lora(36, ("q", "v")), SHORT),
    ]


def run(job: Job) -> dict:
    """Train once and score on the job's split."""
    base = peftlab.load(job.base, device=job.device)
    task = peftlab.tasks.load("facts")
    method, steps = job.entry.method, job.entry.steps
    looked_at = method.name == "full_fine_tuning" and steps == SHORT and job.split == "test"
    before = {name: linear.weight.clone() for name, linear in base.anatomy.linears.items()}
    with peftlab.attach(base, method, seed=job.seed) as tuned:
        training = peftlab.train(
            tuned,
            task,
            steps=steps,
            lr=job.lr,
            seed=job.seed,
            precision="fp32",
            progress=False,
            evaluate=False,
        )
        scores = task.score(tuned, getattr(task, job.split))
        trained = tuned.count().parameters
        update = {"update": look_at_update(base, tuned, task, before)} if looked_at else {}
    row = {
        **job.entry.facts(),
        "title": method.title,
        "trained": trained,
        "lr": job.lr,
        "seed": job.seed,
        "seconds": round(training.seconds, 2),
        **{name: round(score, 4) for name, score in scores.items()},
    }
    print(json.dumps(row), flush=True)
    return row | update


@torch.no_grad()
def look_at_update(base: Base, tuned: Tuned, task: Task, before: dict) -> dict:
    """The singular values of every linear ΔW, and what is left of the scores at a lower rank.

    Cutting touches the linear weights alone; embeddings, norms and biases stay as trained.
    """
    linears = base.anatomy.linears
    parts = {
        name: torch.linalg.svd(linear.weight - before[name], full_matrices=False)
        for name, linear in linears.items()
    }
    shares, cut = {}, {}
    for r in (0, *CUTS):
        for name, (U, S, V) in parts.items():
            linears[name].weight.copy_(before[name] + U[:, :r] * S[:r] @ V[:r])
        cut[r] = {name: round(score, 4) for name, score in task.score(tuned).items()}
        if r:
            kept = [energy(S.double().cpu(), r) for _, S, _ in parts.values()]
            shares[r] = round(sum(kept) / len(kept), 4)
    return {
        "energy": shares,
        "cut": cut,
        "site": SHOWN,
        "singular values": [float(f"{value:.4g}") for value in parts[SHOWN][1].tolist()],
    }


def best(tries: list[dict]) -> float:
    """The learning rate with the most new facts right, and on a tie the best sum of scores."""

    def merit(row: dict) -> tuple[float, float]:
        scores = [row[k] for k in ("new_facts", "new_wordings", "known_facts", "valid_format")]
        return row["new_facts"], sum(scores)

    return max(tries, key=merit)["lr"]


def compare(base: str, device: str, workers: int) -> dict:
    """Tune every entry on dev, then run the chosen rate on all seeds."""
    context = multiprocessing.get_context("spawn")
    compared = entries()

    def job(entry: Entry, lr: float, seed: int, split: str) -> Job:
        return Job(entry, lr, seed, split, base, device)

    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        tuning = [
            job(entry, lr, TUNING_SEED, "dev")
            for entry in compared
            for lr in GRIDS[entry.method.name]
        ]
        tried = list(pool.map(run, tuning))
        final = []
        for entry in compared:
            rows = [row for row, one in zip(tried, tuning, strict=True) if one.entry == entry]
            final += [job(entry, best(rows), seed, "test") for seed in SEEDS]
        runs = list(pool.map(run, final))
    for row in runs:
        grid = GRIDS[row["method"]]
        row["at_the_end_of_its_grid"] = row["lr"] in (grid[0], grid[-1])
    return {"tried": tried, "runs": runs}


def device_name(device: str) -> str:
    """The hardware in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores"


def read() -> tuple[dict, pd.DataFrame]:
    """The result as it was written: when and where it was made, and one row for each run."""
    result = json.loads(data_path("results", "compare_facts.json").read_text(encoding="utf-8"))
    return result, pd.DataFrame(result.pop("runs"))


def updates() -> tuple[dict[int, torch.Tensor], pd.DataFrame]:
    """What full fine-tuning at the short budget changed, as it was written.

    By seed, the singular values of the update of `SHOWN`; and for each seed and rank r, the share
    of the updates' energy in their r strongest directions and the new facts that are left when
    every update is cut to those.
    """
    _, runs = read()
    free = runs[(runs["method"] == "full_fine_tuning") & (runs["steps"] == SHORT)]
    rows, spectra = [], {}
    for seed, update in zip(free["seed"], free["update"], strict=True):
        spectra[seed] = torch.tensor(update["singular values"], dtype=torch.float64)
        for r, cut in update["cut"].items():
            share = update["energy"].get(r, 0.0)
            rows.append({"r": int(r), "seed": seed, "energy": share, "new facts": cut["new_facts"]})
    return spectra, pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="tiny-gpt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=data_path("results") / "compare_facts.json")
    options = parser.parse_args()

    start = time.perf_counter()
    task = peftlab.tasks.load("facts")
    before = task.score(peftlab.load(options.base, device=options.device))
    results = compare(options.base, options.device, options.workers)
    report = {
        "command": "python -m peftlab.experiments.compare_facts "
        f"--device {options.device} --workers {options.workers}",
        "date": date.today().isoformat(),
        "device": device_name(options.device),
        "precision": "float32",
        "batch size": 16,
        "seconds": round(time.perf_counter() - start),
        "base": options.base,
        "seeds": SEEDS,
        "tuning_seed": TUNING_SEED,
        "grids": GRIDS,
        "before": before,
        **results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(results['runs'])} runs in {report['seconds']} s")


if __name__ == "__main__":
    main()
