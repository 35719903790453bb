"""What a learner meets in each lesson, counted in the stored notebooks.

    python -m peftlab.experiments.count_lessons [LESSON ...]

- drawings: figures that explain, made by `peftlab.figures` with a text that says what is drawn;
  result figures: every other Plotly figure; panels; tables.
- asserts: `assert` statements and ticks in view.
- in a row: the share of code cells that stand directly behind another one.
- other code: the share of code lines in statements that print, draw, tabulate, read a file of
  results or check, and so are not the method's.
- distance: the cells from the last formula to each exercise. A formula is a displayed one, or an
  equation within a line of text.
- minutes: 200 words, 20 lines of code, or three pictures or tables a minute, and four minutes an
  exercise, one a question.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path

import nbformat
import pandas as pd

import peftlab
from peftlab.experiments.run_notebooks import STILL, figure_in

NOTEBOOKS = Path(peftlab.__file__).parents[1] / "notebooks"
FORMULA = re.compile(r"\$\$|\$[^$\n]*[=≈∝≤][^$\n]*\$|\\begin\{")
TICKS = re.compile(r"[✓✔✅]")
CLAIM = re.compile(r"\bS\d-\d\d\b")
OTHER = {"print", "pd", "px", "go", "figures", "panels", "json", "display", "finding"}
WORDS, LINES, PICTURES, EXERCISE, QUESTION = 200, 20, 3, 4, 1  # a minute, and minutes each


def is_other(statement: ast.stmt) -> bool:
    """Whether a statement prints, draws, tabulates, reads results or checks."""
    names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(statement) if isinstance(n, ast.Attribute)}
    within = isinstance(statement, ast.FunctionDef | ast.ClassDef)
    return isinstance(statement, ast.Assert) or (not within and bool(names & OTHER))


def lines_of(source: str) -> tuple[int, int]:
    """Lines of code, and those that are not the method's."""
    every = other = 0
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            lines = statement.end_lineno - statement.lineno + 1
            every, other = every + lines, other + lines * is_other(statement)
    return every, other


def shown(cells: list) -> dict[str, int]:
    """Drawings, result figures, panels and tables among the outputs."""
    found = dict(drawings=0, figures=0, panels=0, tables=0)
    for cell in cells:
        for data in (output["data"] for output in cell.outputs if "data" in output):
            if STILL in data:
                found["panels"] += 1
            elif figure := figure_in(data):
                drawn = figure.get("layout", {}).get("meta") or {}
                found["drawings" if "alt" in drawn else "figures"] += 1
            elif "<table" in data.get("text/html", "") and "dataframe" in data["text/html"]:
                found["tables"] += 1
    return found


def asked(source: str) -> str | None:
    """The exercise or question that a cell puts: `answer = ...` or a stub, graded in the cell."""
    if call := re.search(r"(?m)^lesson\.(\w+)\(", source):
        return (
            call[1]
            if re.search(r"= \.\.\.|^    \.\.\.|return \.\.\.|raise Not", source, re.M)
            else None
        )
    return None


def distances(cells: list) -> list[int]:
    """For each exercise, how many cells after the last formula it stands."""
    found, last = [], None
    for at, cell in enumerate(cells):
        if cell.cell_type == "markdown" and FORMULA.search(cell.source):
            last = at
        elif cell.cell_type == "code" and "def " in cell.source and asked(cell.source):
            found.append(at - last if last is not None else at)
    return found


def count(path: Path) -> dict:
    """One lesson in numbers."""
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    text = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    behind = sum(
        first.cell_type == second.cell_type == "code"
        for first, second in zip(cells, cells[1:], strict=False)
    )
    lines = [lines_of(cell.source) for cell in code]
    every, other = (sum(column) for column in zip(*lines, strict=True))
    found, far = shown(code), distances(cells)
    questions = sum(bool(asked(cell.source)) for cell in code) - len(far)
    pictures = sum(found.values())
    minutes = len(text.split()) / WORDS + every / LINES + pictures / PICTURES
    minutes += EXERCISE * len(far) + QUESTION * questions
    asserts = sum(
        isinstance(node, ast.Assert) for cell in code for node in ast.walk(ast.parse(cell.source))
    )
    ticks = sum(len(TICKS.findall(json.dumps(cell, ensure_ascii=False))) for cell in cells)
    return {
        "lesson": path.stem,
        "cells": len(cells),
        **found,
        "asserts": asserts + ticks,
        "in a row": round(behind / len(code), 2),
        "other code": round(other / every, 2),
        "questions": questions,
        "exercises": len(far),
        "distance": max(far, default=0),
        "claim numbers": len(CLAIM.findall(text)),
        "minutes": round(minutes),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
    rows = [count(path) for path in parser.parse_args(arguments).lessons]
    table = pd.DataFrame(rows).set_index("lesson")
    print(table.to_string())
    print(f"\nall: {table.drop(columns=['in a row', 'other code', 'distance']).sum().to_dict()}")


if __name__ == "__main__":
    main()
