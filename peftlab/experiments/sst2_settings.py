"""Why MiniLM scores on SST-2 what it scores: one thing changed at a time.

    python -m peftlab.experiments.sst2_settings --device cuda --workers 12

`compare_real` gives full fine-tuning and LoRA the rate that was best on dev, and all else is set
once. Here the rate is lowered and raised. Then, at a third of the chosen rate, the training is
longer, its batches smaller, its arithmetic in 32 bits, its data whole sentences alone; the head
reads the first token; LoRA's rank is eight times as large; and full fine-tuning leaves alone the
embeddings, which LoRA never reaches. Every run is scored on dev and on the test.

Dev has phrases of sentences whose other phrases are in train. `split` therefore asks anew how the
rate looks if it is chosen honestly: 1,000 whole sentences are held out, and every phrase of theirs
is taken out of train. (A whole sentence is a row that is in no longer one.)

Writes `data/results/sst2_settings.json`, one row a run; rows are kept one by one beside the file
until it is whole, as in `compare_real`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch

from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.experiments.compare_real import METHODS, SEEDS, Rows, recorded, scored, task_of
from peftlab.experiments.compare_real import SETTINGS as COMPARED
from peftlab.methods import FullFineTuning, Method
from peftlab.methods.heads import Classification
from peftlab.sites import ExistingParameters
from peftlab.tasks import Example, Task
from peftlab.tasks.sst2 import CLASSES
from peftlab.training import train
from peftlab.tuned import attach

PATH = data_path("results", "sst2_settings.json")
SETTING = COMPARED["sst2-minilm"]
RATES = (0.1, 1 / 3, 1.0, 3.0)  # times the rate that was chosen on dev
HELD_OUT = 1000
FULL, LORA, FROZEN = "Full fine-tuning", "LoRA", "Full fine-tuning but the embeddings"
BOTH = (FULL, LORA)
# What is set otherwise than in `compare_real`, and for whom.
CHANGES: dict[str, tuple[tuple[str, ...], dict]] = {
    "ten epochs": ((LORA,), {"steps": 2600}),
    "rank 64": ((LORA,), {"r": 64}),
    "embeddings frozen": ((FROZEN,), {}),
    "five epochs, warm-up of 500 steps": (BOTH, {"steps": 1300, "warmup": 500}),
    "batches of 64, as many examples": (BOTH, {"steps": 3200, "batch_size": 64}),
    "the head reads the first token": (BOTH, {"pool": "first"}),
    "whole sentences alone, ten epochs": (
        BOTH,
        {"steps": 1075, "batch_size": 64, "data": "sentences"},
    ),
    "32 bits": (BOTH, {"precision": "fp32"}),
}


@dataclass(frozen=True)
class ButEmbeddings(FullFineTuning, listed=False):
    """Full fine-tuning of what LoRA could reach as well: all but the embeddings and their norm."""

    name: ClassVar[str] = "but_embeddings"

    def reach(self, base, attachment, generator):
        module = base.anatomy.backbone
        names = [
            name
            for name, _ in module.named_parameters()
            if not name.startswith(("pooler.", "embeddings."))
        ]
        attachment.enter(ExistingParameters(module, names))


@dataclass(frozen=True)
class Job:
    """One run; what is not set is as in `compare_real`."""

    change: str
    label: str
    lr: float
    seed: int
    steps: int
    device: str
    batch_size: int = SETTING.batch_size
    warmup: int = 10
    pool: str = "mean"
    data: str = "all"  # or "sentences", or "split"
    precision: str = "auto"
    r: int = 8


def spans(text: str) -> set[str]:
    """Every run of words of a text but the whole."""
    words = text.split()
    starts = range(len(words))
    found = {" ".join(words[i:j]) for i in starts for j in range(i + 1, len(words) + 1)}
    return found - {" ".join(words)}


def sentences(examples: list[Example]) -> list[Example]:
    """The examples that are part of no other one, in their order."""
    texts = {example.prompt for example in examples}
    parts: set[str] = set()
    for text in texts:
        parts |= spans(text) & texts
    return [example for example in examples if example.prompt not in parts]


def without(examples: list[Example], held: list[Example]) -> list[Example]:
    """The examples that are neither one of those held out nor a part of one."""
    taken = {example.prompt for example in held}.union(*(spans(e.prompt) for e in held))
    return [example for example in examples if example.prompt not in taken]


@cache
def prepared(data: str) -> Task:
    """The task; with "sentences" these alone are in train, with "split" dev is 1,000 of them."""
    task = task_of(SETTING)
    if data == "sentences":
        task.train = sentences(task.train)
    elif data == "split":
        every = [*task.train, *task.dev]
        whole = sentences(every)
        task.dev = random.Random(0).sample(whole, min(HELD_OUT, len(whole) // 5))
        task.train = without(every, task.dev)
    return task


def method_of(job: Job) -> Method:
    """The method as in `compare_real`; another rank keeps alpha / r."""
    if job.label == FROZEN:
        return ButEmbeddings()
    (method,) = METHODS[job.label][0]
    if job.label == LORA:
        return replace(method, r=job.r, alpha=job.r * method.alpha // method.r)
    return method


def one(job: Job) -> dict:
    """Train once, and score on dev and on the test."""
    torch.set_num_threads(1)
    task = prepared(job.data)
    head = Classification(CLASSES, pool=job.pool)
    with attach(load(SETTING.base, job.device), method_of(job), seed=job.seed, head=head) as tuned:
        run = train(
            tuned, task, steps=job.steps, lr=job.lr, batch_size=job.batch_size, seed=job.seed,
            warmup=job.warmup, precision=job.precision, progress=False, evaluate=False,
        )  # fmt: skip
        scores = {split: scored(tuned, task, split)["accuracy"] for split in ("dev", "test")}
        trained = sum(p.numel() for n, p in tuned.trainable.items() if not n.startswith("head."))
    loss = float(run.history["loss"].tail(20).mean())
    row = asdict(job) | {
        "train examples": len(task.train),
        "dev examples": len(task.dev),
        "trained": trained,
        "precision used": run.precision,
        "seconds": round(run.seconds, 1),
        "last_loss": round(loss, 4) if math.isfinite(loss) else None,  # of a run that diverged
        **scores,
    }
    print(row, flush=True)
    return row


def chosen() -> dict[str, float]:
    """The rates of `compare_real`: the best of three on dev."""
    best = recorded("sst2-minilm").best.set_index("label")["lr"]
    return {FULL: float(best[FULL]), LORA: float(best[LORA]), FROZEN: float(best[FULL])}


def jobs(device: str, seeds=SEEDS, steps: int | None = None) -> list[Job]:
    """All runs; those on which most depends come first."""
    made, rates = [], chosen()

    def add(change: str, label: str, factor: float, **given):
        lr = float(f"{rates[label] * factor:.1g}")
        given = {"steps": SETTING.steps, **given} | ({"steps": steps} if steps else {})
        made.extend(Job(change, label, lr, seed, device=device, **given) for seed in seeds)

    for label in BOTH:
        for factor in RATES:
            add("as compared", label, factor)
    for label in BOTH:
        for factor in RATES[:3]:
            add("dev of whole sentences", label, factor, data="split")
    for change, (labels, given) in CHANGES.items():
        for label in labels:
            add(change, label, RATES[1], **given)
    return made


def read(path: Path = PATH) -> tuple[dict, pd.DataFrame]:
    """When and where it was made, and one row for each run."""
    report = json.loads(path.read_text(encoding="utf-8"))
    return report, pd.DataFrame(report.pop("runs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--smoke", action="store_true", help="two steps a run, one seed")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    wanted = jobs(options.device, SEEDS[:1], 2) if options.smoke else jobs(options.device)
    rows = Rows(options.out.with_suffix(".jsonl"), one, tuple(asdict(wanted[0])))
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        found = rows.of(wanted, pool)
    cpu = f"CPU, {options.workers} of {os.cpu_count()} cores"
    report = {
        "command": "python -m peftlab.experiments.sst2_settings"
        f" --device {options.device} --workers {options.workers}",
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "base": SETTING.base,
        "base_digest": load(SETTING.base).digest,
        "chosen on dev": {label: chosen()[label] for label in BOTH},
        "test examples": len(prepared("all").test),
        "runs": found,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows.path.unlink()
    print(f"{options.out}: {len(found)} runs")


if __name__ == "__main__":
    main()
