"""The command that counts what a learner meets, on a lesson whose numbers are known."""

import nbformat
import pytest

from peftlab.experiments.count_lessons import count, distances, lines_of
from peftlab.experiments.run_notebooks import FIGURE, STILL


def text(source):
    return nbformat.v4.new_markdown_cell(source)


def code(source, *shown):
    outputs = [nbformat.v4.new_output("display_data", data) for data in shown]
    return nbformat.v4.new_code_cell(source, outputs=outputs)


STUB = "def delta(A, B):\n    return ...\n\n\nlesson.delta(delta)"
DRAWING = {FIGURE: {"data": [], "layout": {"meta": {"alt": "a line"}}}}
CELLS = [
    text("You will read that (S1-02). " + "word " * 196),
    code("import torch\nx = torch.ones(3)", DRAWING),
    code("print(x)\nassert x.sum() == 3", {"text/html": "<table class='dataframe'>"}),
    text("$$y = W x$$"),
    text("Now you."),
    code(STUB),
    text("Predict: $r d$"),
    code('answer = ...\nlesson.guess(answer)', {STILL: {}}, {FIGURE: {"data": []}}),
]  # fmt: skip


def test_each_number_of_a_known_lesson(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=CELLS), path := tmp_path / "known.ipynb")
    assert count(path) == {
        "lesson": "known",
        "cells": 8,
        "drawings": 1,
        "figures": 1,
        "panels": 1,
        "tables": 1,
        "asserts": 1,
        "in a row": 0.25,
        "other code": 0.25,  # of eight lines two
        "questions": 1,
        "exercises": 1,
        "distance": 2,
        "claim numbers": 1,
        "minutes": 8,  # 203 words 1.0, eight lines 0.4, four pictures 1.3, exercise 4, question 1
    }


@pytest.mark.parametrize(
    "source, lines",
    [
        ("a = 1", (1, 0)),
        ("print(\n    1\n)", (3, 3)),
        ("import torch", (0, 0)),
        ("def f():\n    print(1)", (2, 0)),
        ("pl.figures.spectrum(s)", (1, 1)),
        ("assert f()", (1, 1)),
    ],
)
def test_the_methods_lines_and_the_others(source, lines):
    assert lines_of(source) == lines


def test_an_equation_within_a_line_is_a_formula():
    cells = [text("so $a = b$ holds"), code("1"), code("2"), code(STUB)]
    assert distances(cells) == [3]
