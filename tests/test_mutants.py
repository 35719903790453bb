"""What of a module is open to small faults, who meets them, and what was found."""

import pytest
from mutants.places import Source

TEXT = '''"""One two."""
from __future__ import annotations

import warnings

SIZE: int | None = 3


class Box(
    object
):
    """Is it 4?"""

    # A remark.
    width = 5

    def area(self, depth: int | float = 6) -> int | float:
        """7 or 8."""
        if depth > 9:
            raise ValueError(
                f"{depth - 10} ü too much", 11
            )
        try:
            warnings.warn(f"{12}", stacklevel=13)
        except (TypeError, ValueError):
            pass
        return [x * 14 for x in range(15)]


keys = sorted([16], key=lambda number: number - 17)
'''
SOURCE = Source(TEXT)


def span(text: str):
    """Where a piece of the text stands first."""
    line, column = next(
        (n, line.index(text)) for n, line in enumerate(SOURCE.lines, 1) if text in line
    )
    return (line, column), (line, column + len(text))


@pytest.mark.parametrize(
    "text, counts",
    [("4", False), ("|", False), ("7 or", False), ("10", False), ("11", False), ("12", False)]
    + [("13", False), ("3", True), ("5", True), ("6", True), ("9", True), ("14", True)]
    + [("17", True), ("> 9", True), ("TypeError", True)],
)
def test_a_fault_is_drawn_where_it_changes_what_the_code_does(text, counts):
    assert SOURCE.counts(span(text)) == counts


def test_the_lines_of_code_are_counted_without_docstrings_and_empty_lines():
    silent = ('"""', "# ")
    code = [line for line in SOURCE.lines if line and not line.strip().startswith(silent)]
    assert SOURCE.code_lines() == len(code)


def at(text: str) -> int:
    """The line of a piece of the text."""
    return span(text)[0][0]


def lines(text: str) -> list[list[int]]:
    return [[found.start, found.stop - 1] for found in SOURCE.around(span(text))]


def test_a_fault_is_met_by_the_tests_that_run_its_line_or_what_it_belongs_to():
    everything, last = [1, len(SOURCE.lines)], at("return [")
    body, method = [at("Is it 4"), last], [at("7 or 8"), last]
    assert lines("= 3") == [everything]
    assert lines("5") == [body, everything]  # a constant of the class
    assert lines("= 6") == [method, body, everything]  # a default, which runs at import
    assert lines("16") == [everything]
    for text, further in {
        "> 9": [method, body, everything],
        "TypeError": [method, body, everything],
        "14": [method, body, everything],
        "- 17": [everything],  # it runs when `sorted` calls it
    }.items():
        assert lines(text) == [[at(text)] * 2, [at(text)] * 2, *further]
