"""Runs that are made: trained side by side, then scored one after another."""

from __future__ import annotations

import os
import time

import torch
import transformers

from peftlab.bases import Base, load
from peftlab.bases.data import data_path
from peftlab.bench.contest import Contest, Entry, Try
from peftlab.bench.replay import Replay, started
from peftlab.tasks import Example, Task
from peftlab.training import precision_for
from peftlab.tuned import Tuned

BLOCKS = 20  # of the test items: a verdict leaves one out at a time
SHOWN = 24  # outputs that are kept of a first seed's run
SCORED = {True: 256, False: 128}  # examples at a time, generated and not


def plain_texts() -> list[str]:
    """Paragraphs that have nothing to do with any task."""
    return data_path("texts", "plain.txt").read_text(encoding="utf-8").splitlines()


def made_with(device: str) -> dict[str, str]:
    """What every run on this device has in common: the device, the precision, the versions."""
    cores = f"CPU, {os.cpu_count()} cores"
    return {
        "device": cores if device == "cpu" else torch.cuda.get_device_name(device),
        "precision": precision_for(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


_TASKS: dict[str, Task] = {}
_BASES: dict[tuple[str, str], Base] = {}


def base_of(contest: Contest, device: str) -> Base:
    """The base of a contest on the device. One is kept, for the next call."""
    if (key := (contest.base, device)) not in _BASES:
        _BASES.clear()
        _BASES[key] = load(contest.base, device)
    return _BASES[key]


def task_of(contest: Contest) -> Task:
    """The task of a contest, read once."""
    if contest.name not in _TASKS:
        _TASKS[contest.name] = contest.load_task()
    return _TASKS[contest.name]


def answers(model: Base | Tuned, task: Task, examples: list[Example]) -> list[str]:
    """What the model says to each example."""
    found, size = [], SCORED[task.max_new_tokens > 1]
    with torch.no_grad():
        for start in range(0, len(examples), size):
            found += task.answers(model, examples[start : start + size])
    return found


def blocks(task: Task, examples: list[Example], outputs: list[str]) -> list[float]:
    """The main metric with one of `BLOCKS` parts of the examples left out, in turn."""
    found = []
    for block in range(BLOCKS):
        left = [i for i in range(len(examples)) if i % BLOCKS != block]
        graded = task.grade([examples[i] for i in left], [outputs[i] for i in left])
        found.append(round(graded[task.main], 6))
    return found


def scores(model: Base | Tuned, task: Task, split: str, shown: bool) -> dict:
    """The metrics on a split; on the test also its blocks, and some outputs if they are shown."""
    examples = getattr(task, split)
    outputs = answers(model, task, examples)
    found = {name: round(value, 6) for name, value in task.grade(examples, outputs).items()}
    if split == "test":
        found["blocks"] = blocks(task, examples, outputs)
        if shown:
            found["outputs"] = outputs[:SHOWN]
    return found


def run_together(contest: Contest, entry: Entry, jobs: list[Try], device: str) -> list[dict]:
    """A row of each job, all of them jobs of one entry, trained together.

    The seconds of training in a row are those of all of them.
    """
    torch.set_num_threads(1)
    task, begun = task_of(contest), time.perf_counter()
    base, head = base_of(contest, device), getattr(task, "head", None)
    torch.manual_seed(jobs[0].seed)  # dropout draws from it, for all of them
    with started(base, list(entry.methods), head, task, jobs, contest.examples) as replay:
        while not replay.done:
            replay.step()
        replay.finish()
        seconds = round(time.perf_counter() - begun, 2)
        if device != "cpu":
            torch.cuda.empty_cache()
        kept = made_with(device)
        rows = [row_of(replay, i, task, seconds) | kept for i in range(len(jobs))]
    del replay
    if device != "cpu":
        torch.cuda.empty_cache()
    return rows


def row_of(replay: Replay, run: int, task: Task, seconds: float) -> dict:
    """What a run was, what it cost and what it can do."""
    replay.put(run)
    begun, tuned, job = time.perf_counter(), replay.tuned, replay.jobs[run]
    count, losses = tuned.count(), replay.losses[run]
    losses = losses[losses.isfinite()]
    row = {
        **vars(job),
        "trained": count.parameters,
        "stored": count.stored,
        "head": count.head,
        "file_bytes": count.file_bytes,
        "last_loss": round(losses[-20:].mean().item(), 5) if len(losses) else 1e9,
        "curve": [round(p.mean().item(), 4) for p in losses.tensor_split(25) if len(p)],
        "problem": replay.problems[run],
        **scores(tuned, task, job.split, shown=job.seed == 0),
    }
    if job.split == "test" and tuned.kind == "decoder" and tuned.head is None:
        row["plain_loss"] = round(tuned.loss(plain_texts()), 5)
    return row | {
        "train seconds": seconds,
        "score seconds": round(time.perf_counter() - begun, 2),
    }
