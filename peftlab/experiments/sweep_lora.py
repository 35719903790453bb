"""LoRA's relatives, its matrices and its ranks on one small task, in minutes on a CPU:
`python -m peftlab.experiments.sweep_lora`.

Writes `data/results/sweep_lora.json`. The task is the new facts of lesson 06 for the first 6 of
their people: 72 examples, of which a run sees 16 in each of its 40 steps. Its parts:

- family: each method on every linear weight, and full fine-tuning. Of three learning rates the one
  with the lowest loss on dev is kept, tried with a seed that is not used again; a rate at the end
  of its grid is marked, for a better one may lie outside.
- matrices: LoRA with 46,080 numbers, spent on one matrix of a block or on several, α / r = 16, at
  the rate that LoRA has in the family. (r = 2 on every linear weight has 41,472.)
- ranks: LoRA by rank with α fixed, once with α / r and once with α / √r, at that rate. At
  r = 8 the two are the same, and a run of the family.

A row has, on test questions about those people, the loss of the answers and the share of answers
all of whose tokens come out right; and what was forgotten: nats per token, more than before, on
questions and answers of the old text, whose facts the base knows. Rows of the family have these
along the run as well.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from peftlab import tasks
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.experiments.sweep_soft import write
from peftlab.methods import AdaLoRA, DoRA, FullFineTuning, LoRA, Method, PiSSA, VeRA
from peftlab.tasks import Task
from peftlab.training import target_loss, train
from peftlab.tuned import Tuned, attach

SEEDS, TUNING_SEED = (0, 1, 2), 100
STEPS, BATCH, PEOPLE, LOOKS = 40, 16, 6, (10, 20, 30)
BUDGET, RANKS = 46_080, (2, 64)
SCALES = {"α / r": False, "α / √r": True}
ALL = {"target_modules": "all-linear"}
FAMILY: dict[str, tuple[Method, tuple[float, ...]]] = {
    "LoRA": (LoRA(r=8, alpha=128, **ALL), (2e-3, 4e-3, 8e-3)),
    "LoRA, one A": (LoRA(r=8, alpha=128, fused=True, **ALL), (2e-3, 4e-3, 8e-3)),
    "LoRA+": (LoRA(r=8, alpha=128, loraplus_lr_ratio=4, **ALL), (1e-3, 2e-3, 4e-3)),
    "PiSSA": (PiSSA(r=8, **ALL), (2e-3, 5e-3, 1.5e-2)),
    "DoRA": (DoRA(r=8, alpha=128, **ALL), (2e-3, 4e-3, 8e-3)),
    "VeRA": (VeRA(r=256, **ALL), (3e-2, 1e-1, 3e-1)),
    "AdaLoRA": (AdaLoRA(init_r=12, target_r=8, alpha=192, **ALL), (1e-2, 2e-2, 4e-2)),
    "Full fine-tuning": (FullFineTuning(), (5e-4, 1e-3, 2e-3)),
}
MATRICES = {
    **{name: ((name,), 20) for name in "qkvo"},
    **{name: ((name,), 8) for name in ("up", "down")},
    "q, v": (("q", "v"), 10),
    "all linear": ("all-linear", 2),
}


def facts() -> Task:
    """The new facts of a few people."""
    task = tasks.load("facts")
    world = json.loads(data_path("world", "world.json").read_text(encoding="utf-8"))
    names = [person["name"] for person in world["held_out"][:PEOPLE]]

    def about(examples):
        return [e for e in examples if any(name in e.prompt for name in names)]

    return replace(task, train=about(task.train), dev=about(task.dev), test=about(task.test))


def old_texts() -> list[str]:
    """Questions and answers as the base's own text had them, about people whom it knows."""
    known = [e for e in tasks.load("facts").test if e.group == "known facts"]
    return [f"Q: {e.prompt.splitlines()[0]}\nA: {e.target.split()[-1]}" for e in known]


@torch.no_grad()
def answers(model, task: Task, split: str) -> dict[str, float]:
    """Loss of the answers, and the share that comes out right: every token is the likeliest."""
    batch = task.batch(getattr(task, split), model.tokenizer, model.device)
    with model._evaluating():
        logits = model(batch["input_ids"], batch["attention_mask"])
    labels = batch["labels"]
    hit = (logits[:, :-1].argmax(dim=-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
    return {
        "loss": target_loss(logits, labels).item(),
        "right": hit.all(dim=1).float().mean().item(),
    }


def one(
    part: str, label: str, method: Method, lr: float, seed: int, split: str, steps: int = STEPS
) -> dict:
    """One run on one thread, scored on a split, and for the family along the way."""
    torch.set_num_threads(1)
    begun = time.process_time()
    base, task, old = load("tiny-gpt"), facts(), old_texts()
    before = base.loss(old)

    def look(tuned: Tuned, step: int) -> dict:
        found = {"step": step, **answers(tuned, task, split)}
        found["forgotten"] = tuned.loss(old) - before
        return {key: float(f"{value:.4g}") for key, value in found.items()}

    with attach(base, method, seed=seed) as tuned:
        curve, along = [], part == "family"

        def on_step(record):
            if along and record["step"] in LOOKS:
                curve.append(look(tuned, record["step"]))
                tuned.train(True)

        run = train(
            tuned, task, steps=steps, lr=lr, batch_size=BATCH, seed=seed, precision="fp32",
            progress=False, evaluate=False, on_step=on_step,
        )  # fmt: skip
        last = look(tuned, steps)
        count = tuned.count()
    return {
        "part": part, "label": label, "r": getattr(method, "r", None), "lr": lr, "seed": seed,
        "split": split, "trained": count.parameters, "stored": count.stored,
        "seconds": round(run.seconds, 2), "cpu seconds": round(time.process_time() - begun, 2),
        **last, **({"curve": [*curve, last]} if along else {}),
    }  # fmt: skip


def rank(r: int, use_rslora: bool) -> LoRA:
    """LoRA of a rank with α fixed, so that both scales are 16 at r = 8."""
    return LoRA(r=r, alpha=16 * 8 ** (0.5 if use_rslora else 1), use_rslora=use_rslora, **ALL)


def read(path: Path | None = None) -> tuple[dict, pd.DataFrame]:
    """The result as it was written: when and where it was made, and one row for each run."""
    result = json.loads(
        (path or data_path("results", "sweep_lora.json")).read_text(encoding="utf-8")
    )
    return result, pd.DataFrame(result.pop("runs"))


def ranked() -> pd.DataFrame:
    """LoRA by rank and scale, labelled; at r = 8 both scales are the run of the family."""
    _, runs = read()
    eight = runs[(runs["part"] == "family") & (runs["label"] == "LoRA")]
    both = [eight.assign(label=scale) for scale in SCALES]
    rows = pd.concat([runs[runs["part"] == "ranks"], *both]).sort_values(["r", "label", "seed"])
    rank_of = rows["r"].astype(int).astype(str)
    return rows.assign(label="LoRA, r = " + rank_of + ", " + rows["label"])


def spent() -> pd.DataFrame:
    """LoRA by the matrices that one budget was spent on, the least loss first."""
    _, runs = read()
    rows = runs[runs["part"] == "matrices"]
    mean = rows.groupby("label")["loss"].transform("mean")
    rows = rows.assign(mean=mean).sort_values(["mean", "seed"])
    return rows.assign(label="LoRA, " + rows["label"])


def family() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The race: a row for each run, and what each method costs.

    Costs are trained and stored numbers, the learning rate and whether it is the first or last that
    was tried, and the range of what was forgotten, in nats per token.
    """
    _, runs = read()
    rows = runs[runs["part"] == "family"]
    methods = rows.groupby("label", sort=False)
    costs = methods[["trained", "stored", "lr"]].first()
    costs["end of grid"] = methods["at the end of its grid"].first().map({True: "yes", False: ""})
    low, high = (methods["forgotten"].agg(how) for how in ("min", "max"))
    costs["forgotten"] = low.map("{:.1f}".format) + " to " + high.map("{:.1f}".format)
    return rows, costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--smoke", action="store_true", help="two steps a run")
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args()
    begun, steps = time.perf_counter(), 2 if options.smoke else STEPS
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:

        def runs(jobs: list[tuple]) -> list[dict]:
            return list(pool.map(one, *zip(*((*job, steps) for job in jobs), strict=True)))

        tried = runs(
            [
                ("tuning", label, method, lr, TUNING_SEED, "dev")
                for label, (method, grid) in FAMILY.items()
                for lr in grid
            ]
        )
        chosen = {}
        for label in FAMILY:
            rows = [row for row in tried if row["label"] == label]
            chosen[label] = min(rows, key=lambda row: row["loss"])["lr"]
        lr, jobs = chosen["LoRA"], []
        for seed in SEEDS:
            for label, (method, _) in FAMILY.items():
                jobs.append(("family", label, method, chosen[label], seed, "test"))
            for label, (targets, r) in MATRICES.items():
                method = LoRA(r=r, alpha=16 * r, target_modules=targets)
                jobs.append(("matrices", label, method, lr, seed, "test"))
            for r in RANKS:
                for label, use_rslora in SCALES.items():
                    jobs.append(("ranks", label, rank(r, use_rslora), lr, seed, "test"))
        made = runs(jobs)
    for row in made:
        grid = FAMILY[row["label"]][1] if row["part"] == "family" else ()
        row["at the end of its grid"] = bool(grid) and row["lr"] in (grid[0], grid[-1])
    base = load("tiny-gpt")
    report = {
        "command": f"python -m peftlab.experiments.sweep_lora --workers {options.workers}",
        "device": f"CPU, {options.workers} processes on {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "base": base.digest,
        "steps": steps,
        "batch size": BATCH,
        "seeds": list(SEEDS),
        "tuning seed": TUNING_SEED,
        "grids": {label: list(grid) for label, (_, grid) in FAMILY.items()},
        "methods": {label: method.to_dict() for label, (method, _) in FAMILY.items()},
        "untrained": {**answers(base, facts(), "test"), "old text": base.loss(old_texts())},
        "seconds": round(time.perf_counter() - begun),
        "cpu seconds": round(sum(row["cpu seconds"] for row in tried + made)),
    }
    write(options.out / "sweep_lora.json", report, {"tried": tried, "runs": made})
    print(
        f"{len(tried + made)} runs, {report['seconds']} s, {report['cpu seconds']} s of processor"
    )


if __name__ == "__main__":
    main()
