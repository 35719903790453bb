"""Runs a lesson's cells twice, all of it twice, and in random orders, and compares the answers.

    python -m peftlab.experiments.shuffle_cells [LESSON ...] --orders 20 --steps 8

A learner goes back, runs a cell again, leaves one out. A cell may then refuse, that is, raise an
error; where it answers, the answer has to be the one that it gives from top to bottom. Texts and
figures are compared, with times and addresses blanked as nbval does; cells that nbval leaves out
are run and not compared. Each order has a namespace of its own. Training is cut to `--steps`, so
what a cell asserts of a whole training is not asserted here.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import json
import random
import re
import tempfile
import time
from datetime import date
from pathlib import Path

import nbformat
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import peftlab
from peftlab.bases.data import data_path
from peftlab.experiments.run_notebooks import PLOTLY
from peftlab.experiments.sweep_soft import write
from peftlab.panels import STILL

ROOT = Path(peftlab.__file__).parents[1]
LESSONS = ROOT / "notebooks"
SKIPPED = {"nbval-ignore-output", "nbval-skip"}
DRAWN = (PLOTLY, STILL)


class Run:
    """A namespace in which the cells of one lesson run."""

    def __init__(self, lesson: Path, steps: int):
        cells = nbformat.read(lesson, as_version=4).cells
        self.cells = [cell for cell in cells if cell.cell_type == "code"]
        self.sources = [cell.source for cell in self.cells]
        for at, cell in enumerate(self.cells):
            if "parameters" in cell.metadata.get("tags", []):
                self.sources[at] = re.sub(r"(?m)^(\w*steps) = \d+", rf"\1 = {steps}", cell.source)
        rules = configparser.RawConfigParser()
        rules.read(ROOT / "tests/notebooks/sanitize.cfg", encoding="utf-8")
        self.blanks = [
            (re.compile(rules[n]["regex"]), rules[n]["replace"]) for n in rules.sections()
        ]
        self.shell = InteractiveShell.instance()

    def compared(self, at: int) -> bool:
        """Whether nbval compares this cell."""
        return not SKIPPED & set(self.cells[at].metadata.get("tags", []))

    def start(self, seed: int) -> None:
        """An empty namespace, and random numbers from a seed."""
        self.shell.reset(new_session=True)
        torch.manual_seed(seed)

    def answer(self, at: int) -> str | None:
        """What a cell shows; None if it refuses."""
        with capture_output() as shown:
            done = self.shell.run_cell(self.sources[at], store_history=False)
        if not done.success:
            return None
        parts = [shown.stdout]
        for output in shown.outputs:
            drawn = [json.dumps(output.data[kind], sort_keys=True, default=str)
                     for kind in DRAWN if kind in output.data]  # fmt: skip
            parts += drawn or [output.data.get("text/html", output.data.get("text/plain", ""))]
        text = "\n".join(parts)
        for pattern, blank in self.blanks:
            text = pattern.sub(blank, text)
        return text


def orders(count: int, number: int, seed: int) -> dict[str, list[int]]:
    """Each cell twice, the whole twice, and `number` random orders of `count` cells."""
    straight, draw = list(range(count)), random.Random(seed)
    made = {
        "each cell twice": [at for at in straight for _ in range(2)],
        "all of it twice": straight * 2,
    }
    for n in range(number):
        # From a random place on, cells in a random order: with the first cells missing all refuse.
        first = draw.randrange(2, count)
        made[f"order {n + 1}"] = straight[:first] + draw.sample(straight, count)
    return made


def shuffle(lesson: Path, number: int, steps: int, seed: int) -> tuple[dict, list[dict]]:
    """What came of one lesson: counts, and each answer that was another one."""
    run, started = Run(lesson, steps), time.monotonic()
    run.start(seed)
    wanted = [run.answer(at) for at in range(len(run.cells))]
    refused = [at for at, text in enumerate(wanted) if text is None]
    row = {"lesson": lesson.stem, "cells": len(wanted), "ran": 0, "right": 0, "refused": 0}
    other = [{"lesson": lesson.stem, "order": "straight", "cell": at + 1} for at in refused]
    for name, order in orders(len(wanted), number, seed).items():
        run.start(seed)
        for at in order:
            answer = run.answer(at)
            row["ran"] += 1
            if answer is None:
                row["refused"] += 1
            elif answer == wanted[at] or not run.compared(at):
                row["right"] += 1
            else:
                other.append({"lesson": lesson.stem, "order": name, "cell": at + 1,
                              "answer": difference(wanted[at], answer)})  # fmt: skip
                print(other[-1], flush=True)
    return {**row, "other": len(other), "seconds": round(time.monotonic() - started)}, other


def difference(wanted: str | None, answer: str) -> list[str]:
    """The first line that differs, as it was wanted and as it came."""
    ours, theirs = (wanted or "").splitlines(), answer.splitlines()
    for first, second in zip(ours, theirs, strict=False):
        if first != second:
            at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
            return [line[max(0, at - 60) : at + 60] for line in (first, second)]
    return [f"{len(ours)} lines", f"{len(theirs)} lines"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "lessons", nargs="*", default=sorted(p.stem for p in LESSONS.glob("*.ipynb"))
    )
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, found = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for lesson in options.lessons:
            row, other = shuffle(
                LESSONS / f"{lesson}.ipynb", options.orders, options.steps, options.seed
            )
            print(row, flush=True)
            rows, found = [*rows, row], found + other
    facts = {
        "command": f"python -m peftlab.experiments.shuffle_cells --seed {options.seed}",
        "orders": options.orders,
        "steps": options.steps,
        "seed": options.seed,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    write(options.out / "cell_orders.json", facts, {"lessons": rows, "other": found})


if __name__ == "__main__":
    main()
