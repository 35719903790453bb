"""Runs that are made: trained side by side where there is a GPU, then scored one after another."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack

import torch

from peftlab.bases import Base, load
from peftlab.bases.data import data_path
from peftlab.bench.contest import Contest, Entry, Try
from peftlab.bench.replay import Replay
from peftlab.tasks import Example, Task
from peftlab.tuned import Tuned, attach

BLOCKS = 20  # of the test items: a verdict leaves one out at a time
SHOWN = 24  # outputs that are kept of a first seed's run
SCORED = {True: 256, False: 128}  # examples at a time, generated and not


def plain_texts() -> list[str]:
    """Paragraphs that have nothing to do with any task."""
    return data_path("texts", "plain.txt").read_text(encoding="utf-8").splitlines()


_TASKS: dict[str, Task] = {}
_BASES: dict[str, list[Base]] = {}


def bases(name: str, device: str, number: int) -> list[Base]:
    """So many copies of a base on the device; they are kept for the next call."""
    if name not in _BASES:
        _BASES.clear()
        _BASES[name] = [load(name)]
    while len(_BASES[name]) < number + 1:  # the first one stays behind, untouched
        _BASES[name].append(copy.deepcopy(_BASES[name][0]).to(device))
    return _BASES[name][1 : number + 1]


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
    """A row of each job, all of them jobs of one entry.

    On a GPU they are trained at the same time, each on a copy of the base: the seconds of a row are
    those of all of them.
    """
    torch.set_num_threads(1)
    task, begun = task_of(contest), time.perf_counter()
    head, methods = getattr(task, "head", None), list(entry.methods)
    torch.manual_seed(jobs[0].seed)  # dropout draws from it, for all of them together
    with ExitStack() as stack:
        tuned = [
            stack.enter_context(attach(base, methods, seed=job.seed, head=head))
            for base, job in zip(bases(contest.base, device, len(jobs)), jobs, strict=True)
        ]
        replays = [Replay(each, task, job) for each, job in zip(tuned, jobs, strict=True)]
        while not replays[0].done:
            for replay in replays:
                replay.step()
        for replay in replays:
            replay.finish()
        seconds = round(time.perf_counter() - begun, 2)
        rows = [row_of(*each, task, seconds) for each in zip(tuned, replays, jobs, strict=True)]
    del replays, tuned
    if device != "cpu":
        torch.cuda.empty_cache()
    return rows


def row_of(tuned: Tuned, replay: Replay, job: Try, task: Task, seconds: float) -> dict:
    """What a run was, what it cost and what it can do."""
    begun, count = time.perf_counter(), tuned.count()
    losses = replay.losses[replay.losses.isfinite()]
    row = {
        **vars(job),
        "trained": count.parameters,
        "stored": count.stored,
        "head": count.head,
        "file_bytes": count.file_bytes,
        "last_loss": round(losses[-20:].mean().item(), 5) if len(losses) else 1e9,
        "curve": [round(p.mean().item(), 4) for p in losses.tensor_split(25) if len(p)],
        "problem": replay.problem,
        **scores(tuned, task, job.split, shown=job.seed == 0),
    }
    if job.split == "test" and tuned.kind == "decoder" and tuned.head is None:
        row["plain_loss"] = round(tuned.loss(plain_texts()), 5)
    return row | {
        "train seconds": seconds,
        "score seconds": round(time.perf_counter() - begun, 2),
    }
