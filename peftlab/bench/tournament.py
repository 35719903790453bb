"""A contest from beginning to end: rates searched on dev, then the seeds on the test.

Everything is kept run by run in one file, so a tournament goes on where it was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from peftlab.bench import search
from peftlab.bench.contest import HEAD_RATE, KEYS, SEEDS, TUNING_SEEDS, Contest, Entry, Try


class Rows:
    """Rows by the run that made them, in a file with one JSON object a line."""

    def __init__(self, path: Path):
        self.path, self.found = path, {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            row = json.loads(line)
            self.found[tuple(row[key] for key in KEYS)] = row

    def add(self, row: dict) -> None:
        self.found[tuple(row[key] for key in KEYS)] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@dataclass
class Progress:
    """How far an entry of a contest is: which runs it needs next, by the rows that are there."""

    contest: Contest
    entry: Entry
    rows: Rows
    main: str
    headed: bool
    seeds: tuple[int, ...] = SEEDS
    tuning: tuple[int, ...] = TUNING_SEEDS
    lr: float | None = None  # as found
    head_lr: float | None = None
    inside: dict[str, bool] = field(default_factory=dict)

    def job(self, lr: float, head_lr: float | None, seed: int, split: str) -> Try:
        contest, entry = self.contest, self.entry
        given = (contest.name, entry.label, lr, head_lr, seed, split)
        steps, size = entry.steps or contest.steps, entry.batch_size or contest.batch_size
        return Try(*given, steps, size)

    def _missing(self, jobs: list[Try]) -> list[Try]:
        return [job for job in jobs if job.key not in self.rows.found]

    def _merit(self, jobs: list[Try]) -> tuple[float, float]:
        """Mean score on dev, then a low loss; a run that broke off counts as it stands."""
        rows = [self.rows.found[job.key] for job in jobs]
        broken = any(row["problem"] for row in rows)
        score = sum(row[self.main] for row in rows) / len(rows)
        return (-1.0 if broken else round(score, 9), -sum(row["last_loss"] for row in rows))

    def _searched(self, guess: float, jobs_at: Callable[[float], list[Try]], what: str):
        """The best rate, or the runs that are still needed to know it."""
        rates = list(search.around(guess))
        while True:
            missing = [job for rate in rates for job in self._missing(jobs_at(rate))]
            if missing:
                return None, missing
            merits = {rate: self._merit(jobs_at(rate)) for rate in rates}
            if (rate := search.further(merits)) is None:
                self.inside[what] = search.inside(merits)
                return search.best(merits), []
            rates.append(rate)

    def needed(self) -> list[Try]:
        """The runs that can be made now; none if the entry is done."""
        head = HEAD_RATE if self.headed else None
        lr = 0.0
        if self.entry.methods:
            lr, missing = self._searched(
                self.entry.lr,
                lambda rate: [self.job(rate, head, seed, "dev") for seed in self.tuning],
                "lr",
            )
            if missing:
                return missing
        if self.headed:
            head, missing = self._searched(
                HEAD_RATE,
                lambda rate: [self.job(lr, rate, seed, "dev") for seed in self.tuning],
                "head_lr",
            )
            if missing:
                return missing
        self.lr, self.head_lr = lr, head
        return self._missing(self.final)

    @property
    def final(self) -> list[Try]:
        """The runs on the test, once the rates are known."""
        return [self.job(self.lr, self.head_lr, seed, "test") for seed in self.seeds]

    @property
    def tried(self) -> list[dict]:
        """The rows of the search."""
        mine = (self.contest.name, self.entry.label)
        rows = self.rows.found.values()
        return [r for r in rows if (r["contest"], r["label"]) == mine and r["split"] == "dev"]


LADDER_SEEDS = (100, 101, 102, 103, 104)


@dataclass
class Ladder(Progress):
    """As `Progress`, but every rate of a stretch of the ladder is tried, on five tuning seeds: so
    the best rate of each seed is known, and how much it varies. For tasks without a head."""

    tuning: tuple[int, ...] = LADDER_SEEDS

    def needed(self) -> list[Try]:
        """The runs that can be made now; none if the entry is done."""
        at = search.LADDER.index(search.around(self.entry.lr)[1])
        rates = search.LADDER[max(at - RUNGS, 0) : at + RUNGS + 1]
        jobs = {r: [self.job(r, None, seed, "dev") for seed in self.tuning] for r in rates}
        if missing := [job for several in jobs.values() for job in self._missing(several)]:
            return missing
        merits = {rate: self._merit(several) for rate, several in jobs.items()}
        self.lr, self.inside["lr"] = search.best(merits), search.inside(merits)
        return self._missing(self.final)


RUNGS = 3  # of the ladder to either side of the guess


def play(
    progress: list[Progress],
    run: Callable[[Contest, Entry, list[Try], str], list[dict]],
    pool: Executor,
    device: str,
    workers: int,
    together: Callable[[Contest, Entry], int],
    until: float = float("inf"),
    say: Callable[[str], None] = print,
) -> list[str]:
    """Make all runs that the entries need, on a pool; the problems that came up.

    The entries that come first are served first. `together` says how many runs of an entry one
    worker makes at the same time. After the moment `until`, by `time.monotonic`, nothing new is
    begun. A call that fails is tried once more, because a device may be full for a moment; then it
    costs its entry alone.
    """
    ready: list[tuple[int, int, list[Try]]] = []  # turn, failures so far, runs
    waiting: dict[Future, tuple[int, int, list[Try]]] = {}
    problems: list[str] = []

    def begin(turn: int) -> None:
        each = progress[turn]
        jobs, most = each.needed(), together(each.contest, each.entry)
        for start in range(0, len(jobs), most):
            ready.append((turn, 0, jobs[start : start + most]))

    for turn in range(len(progress)):
        begin(turn)
    while (ready or waiting) and time.monotonic() < until:
        ready.sort(key=lambda part: part[:2])
        while ready and len(waiting) < workers:
            turn, failures, jobs = ready.pop(0)
            each = progress[turn]
            future = pool.submit(run, each.contest, each.entry, jobs, device)
            waiting[future] = (turn, failures, jobs)
        left = max(0.0, until - time.monotonic())
        done, _ = wait(waiting, timeout=min(left, 3600.0), return_when=FIRST_COMPLETED)
        for future in done:
            turn, failures, jobs = waiting.pop(future)
            each = progress[turn]
            where = f"{each.contest.name}, {each.entry.label}"
            if error := future.exception():
                say(f"{where}: {type(error).__name__}: {error}")
                if failures:
                    problems.append(f"{where}: {type(error).__name__}: {error}")
                else:
                    ready.append((turn, 1, jobs))
                continue
            for row in future.result():
                each.rows.add(row)
                say(
                    f"{where}: lr {row['lr']:g} head {row['head_lr']} seed {row['seed']} "
                    f"{row['split']} {each.main} {row[each.main]:.4f} loss {row['last_loss']:.4f} "
                    f"{row['train seconds']:.1f}+{row['score seconds']:.1f} s {row['problem']}"
                )
            if not any(other[0] == turn for other in (*ready, *waiting.values())):
                begin(turn)
    for future in waiting:
        future.cancel()
    return problems
