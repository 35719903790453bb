"""Every kind of method on a real model and a real task: `python -m
peftlab.experiments.compare_real pharmacy --device cuda --workers 6`.

Writes `data/results/real_pharmacy.json` (or of another task), one row a run. Every method gets the
same number of tries: three learning rates, each run once with a seed that is not used again; the
one with the best main score on dev is run on three seeds and scored on test. A rate at the end of
its grid is marked, for a better one may lie outside.

A row has the scores, what trained, the bytes of a saved adapter, the peak of the allocated memory
(on a GPU, base included), seconds of training, and of a language model what it forgot: the loss on
16 plain English paragraphs (`data/texts/plain.txt`, written for this) above that of the untuned
base, in nats a token. Runs that go at the same time share the device, and take longer for it; where
there are several GPUs, they are spread over them, and each run is on one.

Rows are kept one by one beside the file until it is whole: the same command goes on where it was
stopped. With `--methods` these alone are run, and put beside the others' rows.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.bench.runs import plain_texts
from peftlab.methods import (
    IA3,
    BitFit,
    DoRA,
    FullFineTuning,
    HoulsbyAdapter,
    LayerNormTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    Prune,
    PTuning,
    PTuningV2,
    QLoRA,
)
from peftlab.tasks import Task
from peftlab.tasks import load as load_task
from peftlab.training import train
from peftlab.tuned import attach

SEEDS, TUNING_SEED = (0, 1, 2), 100
SMALL, MIDDLE = (3e-5, 1e-4, 3e-4), (3e-4, 1e-3, 3e-3)
LARGE, HUGE = (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
ADAPTER = dict(r=8, alpha=16, target_modules="all-linear")
METHODS: dict[str, tuple[list[Method], tuple[float, ...]]] = {
    "Full fine-tuning": ([FullFineTuning()], SMALL),
    "Prompt tuning": ([PromptTuning(20)], HUGE),
    "P-tuning": ([PTuning(20)], MIDDLE),
    "Prefix tuning": ([PrefixTuning(20, prefix_projection=True)], MIDDLE),
    "P-tuning v2": ([PTuningV2(20)], HUGE),
    "LoRA": ([LoRA(**ADAPTER)], MIDDLE),
    "DoRA": ([DoRA(**ADAPTER)], MIDDLE),
    "QLoRA": ([QLoRA(**ADAPTER)], MIDDLE),
    "Houlsby adapter": ([HoulsbyAdapter(64)], MIDDLE),
    "(IA)³": ([IA3()], LARGE),
    "LayerNorm tuning": ([LayerNormTuning()], LARGE),
    "BitFit": ([BitFit()], LARGE),
    "Half pruned + LoRA": ([Prune(0.5), LoRA(**ADAPTER)], MIDDLE),
}


@dataclass(frozen=True)
class Setting:
    """A task on a base, and how long it is trained."""

    task: str
    base: str
    steps: int
    batch_size: int
    options: dict = field(default_factory=dict)
    dev: int | None = None  # so many of dev, from the first on


SETTINGS = {
    "pharmacy": Setting("pharmacy", "smollm2-135m", 300, 16, dev=240),
    "sst2-minilm": Setting("sst2", "minilm", 800, 256, {"answer": "class"}),
    "sst2-smollm2": Setting("sst2", "smollm2-135m", 300, 64, dev=500),
    "wnut17": Setting("wnut17", "minilm", 400, 64),
    "e2e": Setting("e2e", "smollm2-135m", 250, 16, {"test": 400}),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    setting: str
    label: str
    lr: float
    seed: int
    split: str
    steps: int
    device: str


def task_of(setting: Setting) -> Task:
    task = load_task(setting.task, **setting.options)
    task.dev = task.dev[: setting.dev]
    return task


def scored(model, task: Task, split: str) -> dict[str, float]:
    return {k: round(v, 4) for k, v in task.score(model, getattr(task, split), 256).items()}


def run(job: Job) -> dict:
    """Train once; what it can do on the job's split, and what it cost."""
    torch.set_num_threads(1)
    setting, methods = SETTINGS[job.setting], METHODS[job.label][0]
    base, task = load(setting.base, job.device), task_of(setting)
    head, cuda = getattr(task, "head", None), job.device != "cpu"
    decoder = base.kind == "decoder"
    before = base.loss(plain_texts()) if decoder else 0.0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with attach(base, methods, seed=job.seed, head=head) as tuned:
        given = dict(steps=job.steps, batch_size=setting.batch_size, seed=job.seed)
        training = train(tuned, task, lr=job.lr, **given, progress=False, evaluate=False)
        peak = torch.cuda.max_memory_allocated() if cuda else None
        scores, count = scored(tuned, task, job.split), tuned.count()
        forgotten = round(tuned.loss(plain_texts()) - before, 4) if decoder and not head else None
    row = {
        "label": job.label,
        "methods": [method.to_dict() for method in methods],
        "lr": job.lr,
        "seed": job.seed,
        "split": job.split,
        "steps": job.steps,
        "trained": count.parameters,
        "file_bytes": count.file_bytes,
        "peak_bytes": peak,
        "seconds": round(training.seconds, 1),
        "precision": training.precision,
        "last_loss": round(sum(r["loss"] for r in training.records[-20:]) / 20, 4),
        "forgotten": forgotten,
        **scores,
    }
    print({k: v for k, v in row.items() if k != "methods"}, flush=True)
    return row


def compared(setting: Setting) -> list[str]:
    """The methods that this base takes: no biases, no BitFit."""
    family = load(setting.base).anatomy.shape.family
    return [label for label in METHODS if label != "BitFit" or family in ("gpt2", "bert")]


def take_a_gpu(turn, gpus: int) -> None:
    """Before this process has touched a GPU: see one alone, the next in turn."""
    if gpus:
        with turn.get_lock():
            mine, turn.value = turn.value % gpus, turn.value + 1
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[mine]


class Rows:
    """The rows that are there, in a file with one JSON object a line.

    `run` makes the row of a job, and `fields` are those by which a row and its job are the same.
    """

    def __init__(self, path: Path, run=run, fields=("label", "lr", "seed", "steps")):
        self.path, self.run, self.fields = path, run, fields
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found = {self.key(row): row for row in map(json.loads, lines)}

    def key(self, row: dict) -> tuple:
        return tuple(row[field] for field in self.fields)

    def of(self, jobs: list, pool: Executor) -> list[dict]:
        """A row for every job; those that are missing are run and kept.

        If some fail, the first error is raised when the others are done.
        """
        keys = [self.key(asdict(job)) for job in jobs]
        todo = [job for job, key in zip(jobs, keys, strict=True) if key not in self.found]
        failed = None
        for future in as_completed([pool.submit(self.run, job) for job in todo]):
            if error := future.exception():
                failed = failed or error
                continue
            row = future.result()
            self.found[self.key(row)] = row
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if failed:
            raise failed
        return [self.found[key] for key in keys]


def compare(name: str, device: str, workers: int, steps: int, labels: list[str], rows: Rows):
    """Tune every method on dev, then run its best rate on all seeds: the tries and the runs."""
    main, tries, runs = task_of(SETTINGS[name]).main, [], []
    context, gpus = get_context("spawn"), torch.cuda.device_count() if device == "cuda" else 0
    with ProcessPoolExecutor(workers, context, take_a_gpu, (context.Value("i", 0), gpus)) as pool:
        given = {"setting": name, "steps": steps, "device": device}
        for label in labels:
            for lr in METHODS[label][1]:
                tries.append(Job(label=label, lr=lr, seed=TUNING_SEED, split="dev", **given))
        tried = rows.of(tries, pool)
        for label in labels:
            its = [row for row in tried if row["label"] == label]
            lr = max(its, key=lambda row: (row[main], -row["last_loss"]))["lr"]
            runs += [Job(label=label, lr=lr, seed=seed, split="test", **given) for seed in SEEDS]
        found = rows.of(runs, pool)
    for row in found:
        grid = METHODS[row["label"]][1]
        row["at_the_end_of_its_grid"] = row["lr"] in (grid[0], grid[-1])
    return {"main": main, "tried": tried, "runs": found}


@dataclass(frozen=True)
class Recorded:
    """A comparison in `data/results/`, a row a run: the tries on dev and the runs on the test."""

    main: str  # the headline metric
    tried: pd.DataFrame
    runs: pd.DataFrame
    report: dict  # what the file says besides; empty as long as it is not whole

    @property
    def whole(self) -> bool:
        """Whether every method has its tries and its seeds."""
        return bool(self.report)

    @property
    def best(self) -> pd.DataFrame:
        """Of every method the best of its tries."""
        ordered = self.tried.sort_values([self.main, "last_loss"], ascending=[False, True])
        return ordered.groupby("label", sort=False).head(1)

    @property
    def shown(self) -> pd.DataFrame:
        """The runs on the test, or the best tries while there are not all of the runs."""
        return self.runs if self.whole else self.best

    @property
    def where(self) -> str:
        """What `shown` is."""
        seeds = f"test, {len(SEEDS)} seeds"
        return seeds if self.whole else "dev, one seed, at the best of its rates"


def recorded(name: str) -> Recorded:
    """The comparison of this setting, or the rows that there are of it."""
    path = data_path("results", f"real_{name.replace('-', '_')}.json")
    main = import_module(f"peftlab.tasks.{SETTINGS[name].task}").TASK.main
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        tried, runs = report.pop("tried"), report.pop("runs")
    else:
        rows = [
            json.loads(line)
            for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        ]
        tried, runs = ([r for r in rows if r["split"] == split] for split in ("dev", "test"))
        report = {}
    return Recorded(main, pd.DataFrame(tried), pd.DataFrame(runs), report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="these alone")
    parser.add_argument("--smoke", action="store_true", help="two steps a run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name, setting = options.setting, SETTINGS[options.setting]
    steps = 2 if options.smoke else setting.steps
    labels, base, task = options.methods or compared(setting), load(setting.base), task_of(setting)
    base.to(options.device)
    untuned = {} if getattr(task, "head", None) else scored(base, task, "test")
    base.to("cpu")
    out = options.out or data_path("results", f"real_{name.replace('-', '_')}.json")
    rows = Rows(out.with_suffix(".jsonl"))
    found = compare(name, options.device, options.workers, steps, labels, rows)
    if options.methods and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        for part in ("tried", "runs"):
            others = [row for row in before[part] if row["label"] not in labels]
            found[part] = others + found[part]
    cpu = f"CPU, {options.workers} of {os.cpu_count()} cores"
    report = {
        "command": f"python -m peftlab.experiments.compare_real {name}"
        + f" --device {options.device} --workers {options.workers}",
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(),
        "devices": 1 if options.device == "cpu" else torch.cuda.device_count(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "task": setting.task,
        "options": setting.options,
        "base": setting.base,
        "base_digest": base.digest,
        "base_parameters": base.anatomy.shape.parameters(),
        "steps": steps,
        "batch size": setting.batch_size,
        "test examples": len(task.test),
        "seeds": SEEDS,
        "tuning seed": TUNING_SEED,
        "grids": {row["label"]: METHODS[row["label"]][1] for row in found["runs"]},
        "untuned": untuned,
        **found,
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows.path.unlink()
    print(f"{out}: {len(report['runs'])} runs")


if __name__ == "__main__":
    main()
