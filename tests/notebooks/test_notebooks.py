"""What every stored lesson must be for nbval to mean something, and for a learner to read it."""

import base64
import io
import json
import re
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

import peftlab
from peftlab.experiments.run_notebooks import PLOTLY, PNG, RAN, digest, figure_in, outputs, width_of

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SKIPPING = {"nbval-ignore-output", "nbval-skip", "raises-exception"}
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|content|mnt|var)/|[A-Z]:\\\\")
LARGEST = 300_000  # bytes of one cell's outputs, pictures apart

every_lesson = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@cache
def lesson(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list:
    return [cell for cell in lesson(path).cells if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def test_the_lessons_are_here():
    assert {"00_start_here", "02_prompt_tuning", "06_lora", "08_qlora"} <= {
        path.stem for path in NOTEBOOKS
    }


@every_lesson
def test_it_is_stored_as_one_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    errors = [o for cell in code_cells(path) for o in cell.outputs if o.output_type == "error"]
    assert not errors
    assert lesson(path).metadata.kernelspec.name == "python3"


@every_lesson
def test_its_outputs_are_those_of_the_code_that_it_has(path):
    """`python -m peftlab.experiments.run_notebooks` runs it, and notes what ran."""
    assert lesson(path).metadata[RAN]["sources"] == digest(lesson(path))


@every_lesson
def test_most_of_its_outputs_are_compared(path, record_property):
    shown = [cell for cell in code_cells(path) if cell.outputs]
    skipped = [cell for cell in shown if tags(cell) & SKIPPING]
    share = 1 - len(skipped) / len(shown)
    record_property("compared", f"{share:.0%}")
    print(f"{path.stem}: {len(shown) - len(skipped)} of {len(shown)} cells with output compared")
    assert share >= 0.8
    for cell in code_cells(path):
        if tags(cell) & SKIPPING:
            assert len(cell.metadata.get("reason", "")) > 10, cell.source
        assert "NBVAL_" not in cell.source  # tags only: they carry their reason


@every_lesson
def test_it_has_what_every_lesson_has(path):
    cells = lesson(path).cells
    assert [cell for cell in cells if "parameters" in tags(cell)]
    badge = (
        "https://colab.research.google.com/github/"
        f"{peftlab.REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/{path.name}"
    )
    assert badge in cells[0].source
    set_up = next(cell.source for cell in cells if cell.cell_type == "code")
    assert "pl.setup()" in set_up and f"git+{peftlab.REPOSITORY}" in set_up
    assert any("grade" in cell.source or "lesson_" in cell.source for cell in code_cells(path))


@every_lesson
def test_its_cells_are_short_and_name_no_machine(path):
    for cell in lesson(path).cells:
        assert not MACHINE.search(cell.source), cell.source
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 25, cell.source
            text = json.dumps([_without_pictures(output) for output in cell.outputs])
            assert not MACHINE.search(text), cell.source
            assert len(text) <= LARGEST, cell.source


def _without_pictures(output: dict) -> dict:
    data = {key: value for key, value in output.get("data", {}).items() if key != PNG}
    return {**output, "data": data} if data else dict(output)


@every_lesson
def test_its_figures_have_pictures_and_load_nothing(path):
    for output in outputs(lesson(path)):
        data = output["data"]
        assert "image/svg+xml" not in data  # compared byte for byte, and drawn by no two alike
        assert PLOTLY not in data  # JupyterLab would show the PNG wider than the page
        if figure := figure_in(data):
            assert PNG in data and output["metadata"][PNG]["width"] == width_of(figure)
        assert not re.search(r"<script[^>]+src=|@import|cdn\.", data.get("text/html", ""))


def full_marks(figure: dict) -> set[str]:
    """The colours of a figure's filled points; none where translucent points may lie on them."""
    found = set()
    if any(trace.get("marker", {}).get("opacity", 1) != 1 for trace in figure["data"]):
        return found
    for trace in figure["data"]:
        mark = trace.get("marker", {})
        colour, symbol = mark.get("color"), str(mark.get("symbol", "circle"))
        solid = trace.get("opacity", 1) == 1
        filled = "markers" in trace.get("mode", "") and not re.search("open|line", symbol)
        if solid and filled and isinstance(colour, str) and colour.startswith("#"):
            found.add(colour.lower())
    return found


@every_lesson
def test_its_pictures_have_the_colours_of_their_data(path):
    """A picture that was drawn from other data is found; `run_notebooks --redraw` mends it."""
    for output in outputs(lesson(path)):
        figure = figure_in(output["data"])
        if figure is not None and (wanted := full_marks(figure)):
            picture = Image.open(io.BytesIO(base64.b64decode(output["data"][PNG])))
            pixels = np.asarray(picture.convert("RGBA").convert("RGB")).reshape(-1, 3)
            colours = {f"#{bytes(pixel).hex()}" for pixel in np.unique(pixels, axis=0)}
            assert wanted <= colours, figure["layout"]["title"]["text"]


@every_lesson
def test_no_cell_stands_in_two_lessons(path):
    """What two lessons need is in the package; the first set-up cell is the one exception."""
    mine = {cell.source for cell in code_cells(path)[1:] if len(cell.source.splitlines()) >= 4}
    for other in NOTEBOOKS:
        if other != path:
            assert not mine & {cell.source for cell in code_cells(other)}


def test_nbval_collects_every_lesson(pytestconfig):
    assert "notebooks" in pytestconfig.getini("testpaths")
    assert "--nbval" in pytestconfig.getini("addopts")
    assert not [line for line in pytestconfig.getini("addopts") if "nbval-lax" in line]
