"""What the course promises of every lesson: its counts, its section on PEFT, and where to go on."""

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

from peftlab.experiments.count_lessons import count

LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LIMITS = {  # of each count, the least and the most
    "drawings": (3, 6),
    "figures": (0, 6),
    "tables": (0, 3),
    "asserts": (0, 0),
    "in a row": (0, 0.15),
    "distance": (0, 5),
    "claim numbers": (0, 0),
    "minutes": (0, 90),
    "exercises": (2, 9),
}
# What a cell says that compared PEFT's or transformers' numbers with ours: the difference, rounded,
# the same numbers in two lines, or losses beside each other.
EQUAL = (
    r"apart by 0\.0+\b",
    r"\b0\.0+ between PEFT's logits and ours",
    r"at most 0\.0+ from PEFT's",
    r"\b0\.0+ from PEFT's",
    r"between PEFT's logits and ours: at most 0\.0+",
)

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@cache
def cells_of(path: Path) -> list:
    return nbformat.read(path, as_version=4).cells


def said(cell) -> str:
    outputs = cell.get("outputs", [])
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def in_peft(path: Path) -> list:
    """The cells of the section on Hugging Face."""
    cells, start = cells_of(path), None
    for at, cell in enumerate(cells):
        markdown = cell.cell_type == "markdown"
        headings = re.findall(r"(?m)^## .*", cell.source) if markdown else []
        if headings and "Hugging Face" in headings[-1]:
            start = at
        elif headings and start is not None:
            return cells[start:at]
    return cells[start:] if start is not None else []


@every_lesson
def test_its_counts_are_within_the_limits(path):
    found = count(path)
    outside = {
        name: found[name] for name, (least, most) in LIMITS.items()
        if not least <= found[name] <= most
    }  # fmt: skip
    assert not outside


@every_lesson
def test_it_has_peft_code_that_is_equal_to_ours(path):
    section = in_peft(path)
    code = [cell for cell in section if cell.cell_type == "code"]
    assert any(
        re.search(r"\bpeft\b|get_peft_model|\bTrainer\b|sound\.save", c.source) for c in code
    )
    told = "\n".join(map(said, code))
    losses = re.findall(r"(?m)^(?:Trainer|PEFT|ours|.* PEFT|.* here): +(.*)$", told)
    assert any(re.search(words, told) for words in EQUAL) or (
        len(losses) >= 2 and len(losses) != len(set(losses))
    ), told


@every_lesson
def test_it_says_where_to_go_on(path):
    text = "\n".join(cell.source for cell in cells_of(path) if cell.cell_type == "markdown")
    links = re.findall(r"\*\*Next:\*\*.*?\((\w+\.ipynb)\)", text, re.DOTALL)
    at = LESSONS.index(path)
    wanted = LESSONS[at + 1] if at + 1 < len(LESSONS) else LESSONS[0]
    assert links and links[-1] == wanted.name
    assert "## " in text and re.search(r"(?m)^## .*[Tt]hree lines to remember", text)


def test_the_course_has_sixty_exercises():
    assert sum(count(path)["exercises"] for path in LESSONS) >= 60
