"""The command that executes and stores lessons, on tiny notebooks, and nbval's view of them."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from browser.fixtures import chromium_or_skip
from PIL import Image

import peftlab
from peftlab.experiments import run_notebooks
from peftlab.experiments.run_notebooks import FIGURE, PNG, RAN, STILL, WIDGET
from peftlab.figures.style import COLOURS

CONFTEST = Path(__file__).parents[1] / "conftest.py"

SQUARES = """
import plotly.graph_objects as go
import plotly.io as pio
pio.renderers.default = "plotly_mimetype"
go.Figure(go.Scatter(x=[0.1, 0.2, 0.3], y=[1.0, 4.0, 9.0]), layout={"title": "squares"})
"""
PANEL = """
import ipywidgets

class Panel(ipywidgets.VBox):
    def _repr_mimebundle_(self, **options):
        bundle = super()._repr_mimebundle_(**options)
        still = {"data": [{"type": "bar", "x": ["a", "b"], "y": [1, 2]}], "layout": {}}
        return {**bundle, "application/vnd.peftlab.still+json": still}

Panel([ipywidgets.IntSlider()])
"""


def write_notebook(path: Path, *sources: str) -> Path:
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"display_name": "Mine", "name": "mine"}, "colab": {}}
    )
    notebook.cells = [nbformat.v4.new_code_cell(source.strip()) for source in sources]
    for cell in notebook.cells:
        cell.metadata = {"tags": ["demo"], "reason": "because", "execution": {"shell": "now"}}
    nbformat.write(notebook, path)
    return path


def red_square(figure: dict) -> str:
    """A camera for where no browser is needed: as wide as the figure has traces."""
    Image.new("RGB", (40 * len(figure["data"]), 40), "red").save(out := io.BytesIO(), "PNG")
    return run_notebooks.small(base64.b64encode(out.getvalue()).decode())


def nbval(folder: Path) -> str:
    """nbval's strict verdict on the notebooks in a folder, under the suite's own conftest."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--nbval"]
    command += ["--nbval-current-env", f"--rootdir={folder}", f"--confcutdir={folder}"]
    return subprocess.run(
        [*command, "-p", "conftest", *sorted(map(str, folder.glob("*.ipynb")))],
        env={**os.environ, "PYTHONPATH": f"{CONFTEST.parent}:{os.environ['PYTHONPATH']}"},
        cwd=folder,
        capture_output=True,
        text=True,
    ).stdout


# Each change of a stored figure, as `old` to `new`, with nbval's verdict on it.
CHANGES = {
    "none": ("9.0", "9.0", "PASSED"),
    "rounded": ("9.0", "9.000001", "PASSED"),  # another library's rounding
    "moved": ("9.0", "9.1", "FAILED"),  # a point elsewhere
    "retitled": ("squares", "cubes", "FAILED"),  # another finding
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A lesson that was executed once: a print, a panel, and a figure for each of `CHANGES`."""
    folder = tmp_path_factory.mktemp("executed")
    path = write_notebook(folder / "tiny.ipynb", "print(6 * 7)", PANEL, *[SQUARES] * len(CHANGES))
    run_notebooks.run(path, red_square)
    return path


@pytest.fixture
def stored(executed, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copy(executed, tmp_path))


def test_outputs_are_stored_in_order_and_metadata_is_tidy(stored):
    notebook = nbformat.read(stored, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells]
    assert counts == list(range(1, 3 + len(CHANGES)))
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info", RAN}
    assert {frozenset(cell.metadata) for cell in notebook.cells} == {frozenset(["tags", "reason"])}
    assert notebook.cells[0].outputs[0].text == "42\n"


def test_a_notebook_says_which_version_ran_it_and_which_code(stored):
    """The set-up cell, which has a fork's address, is no part of that; text is not either."""
    notebook = nbformat.read(stored, as_version=4)
    told = {"version": peftlab.__version__, "sources": run_notebooks.digest(notebook)}
    assert notebook.metadata[RAN] == told
    notebook.cells[0].source = "print(7)"
    notebook.cells.append(nbformat.v4.new_markdown_cell("More."))
    assert run_notebooks.digest(notebook) == told["sources"]
    notebook.cells[1].source += "\n"
    assert run_notebooks.digest(notebook) != told["sources"]


def test_a_picture_is_a_card_with_round_corners_and_few_bytes():
    rng = np.random.default_rng(0)
    pixels = rng.integers(200, 255, (60, 90, 3), dtype=np.uint8)
    pixels[0] = pixels[:, 0] = 255
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
    drawn = base64.b64encode(out.getvalue()).decode()
    png = run_notebooks.small(drawn)
    assert len(png) < len(drawn) / 2 and run_notebooks.small(png) == png
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    opaque = np.asarray(image)[..., 3]
    corner = round(run_notebooks.CORNER * run_notebooks.SCALE)
    for square in (opaque, opaque[::-1], opaque[:, ::-1], opaque[::-1, ::-1]):
        assert square[0, 0] == 0 and square[corner, corner] == 255
        assert 0 < (square[:corner, :corner] < 255).mean() < 0.3
    assert (opaque[corner:-corner] == 255).all() and (opaque[:, corner:-corner] == 255).all()
    near = np.abs(np.asarray(image)[20:40, 20:70, :3].astype(int) - pixels[20:40, 20:70])
    assert near.mean() < 12


def test_figures_and_panels_get_a_picture_and_no_dead_widget(stored):
    _, panel, figure, *_ = nbformat.read(stored, as_version=4).cells
    assert set(figure.outputs[0].data) == {FIGURE, PNG}
    assert set(panel.outputs[0].data) == {STILL, PNG, "text/plain"}
    assert WIDGET not in stored.read_text()


def test_a_second_run_changes_nothing_and_draws_nothing(stored):
    def no_camera(figure):
        raise AssertionError("an unchanged figure was drawn again")

    before = stored.read_bytes()
    run_notebooks.run(stored, no_camera)
    assert stored.read_bytes() == before


def test_redraw_makes_the_picture_of_unchanged_data_again(stored):
    before, asked = stored.read_bytes(), []

    def other_camera(figure):
        asked.append(figure)
        return run_notebooks.small(red_square(figure))

    run_notebooks.run(stored, other_camera, again=False)
    assert not asked
    run_notebooks.run(stored, other_camera, again=False, redraw=True)
    assert len(asked) == len(set(map(json.dumps, asked))) > 1
    assert stored.read_bytes() == before


def test_small_keeps_the_colours_of_marks_among_a_thousand_shades():
    rng, marks = np.random.default_rng(0), ["#C07F00", "#D55E00", "#3D95C9", "#0072B2"]
    pixels = np.full((300, 300, 3), 255, dtype=np.uint8)
    pixels[200:] = rng.integers(0, 256, (100, 300, 3))
    pixels[190:200] = np.linspace(0, 255, 300, dtype=np.uint8)[:, None]
    for i, mark in enumerate(marks):  # each as large as one point of a figure
        pixels[20:30, 20 * i + 20 : 20 * i + 30] = [int(mark[k : k + 2], 16) for k in (1, 3, 5)]
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
    stored = base64.b64decode(run_notebooks.small(base64.b64encode(out.getvalue()).decode()))
    few = Image.open(io.BytesIO(stored))
    assert few.mode == "P" and few.getextrema()[1] < 64 + 4
    few = np.asarray(few.convert("RGBA").convert("RGB"))
    np.testing.assert_array_equal(few[20:30, 20:100], pixels[20:30, 20:100])
    assert np.abs(few[200:].astype(int) - pixels[200:]).mean() < 40


def test_what_is_stored_is_stored_again_without_a_run(stored):
    """Figures under Plotly's own type and PNGs that say no width come from older notebooks."""
    new, notebook = stored.read_bytes(), nbformat.read(stored, as_version=4)
    for output in run_notebooks.outputs(notebook):
        output.metadata = {}
        if FIGURE in output.data:
            output.data[run_notebooks.PLOTLY] = output.data.pop(FIGURE)
    notebook.cells[0].source = "raise SystemExit"  # what would run would fail
    nbformat.write(notebook, stored)
    assert run_notebooks.run(stored, red_square, again=False) == 0
    assert stored.read_bytes() == new.replace(b'"print(6 * 7)"', b'"raise SystemExit"')


def test_a_figure_is_one_line_of_the_file_and_nothing_else_changes(stored):
    text, notebook = stored.read_text(encoding="utf-8"), nbformat.read(stored, as_version=4)
    figures = [out.data[FIGURE] for out in run_notebooks.outputs(notebook) if FIGURE in out.data]
    wholes = [line for line in text.splitlines() if f'"{FIGURE}"' in line]
    assert len(wholes) == len(figures) > 1
    for line, figure in zip(wholes, figures, strict=True):
        assert json.loads(line.split(": ", 1)[1].rstrip(",")) == figure
    nbformat.write(notebook, stored)
    assert nbformat.read(stored, as_version=4) == notebook
    assert len(stored.read_text(encoding="utf-8")) > len(text)


def test_nbval_compares_figures_by_what_a_reader_sees(stored):
    notebook = nbformat.read(stored, as_version=4)
    for cell, (old, new, _) in zip(notebook.cells[2:], CHANGES.values(), strict=True):
        data = cell.outputs[0].data
        data[FIGURE] = json.loads(json.dumps(data[FIGURE]).replace(old, new))
    nbformat.write(notebook, stored)
    verdicts = re.findall(r"^(PASSED|FAILED) tiny\.ipynb::Cell (\d)", nbval(stored.parent), re.M)
    expected = ["PASSED", "PASSED", *(verdict for *_, verdict in CHANGES.values())]
    assert dict((int(cell), verdict) for verdict, cell in verdicts) == dict(enumerate(expected))


def test_check_writes_nothing(tmp_path, capsys):
    path = write_notebook(tmp_path / "tiny.ipynb", "print(1)")
    before = path.read_bytes()
    assert run_notebooks.main(["tiny", "--check", "--folder", str(tmp_path)]) == 0
    assert path.read_bytes() == before
    assert "tiny.ipynb: " in capsys.readouterr().out


def test_a_failing_notebook_is_not_written(tmp_path, capsys):
    path = write_notebook(tmp_path / "tiny.ipynb", "print(1)", "1 / 0")
    before = path.read_bytes()
    assert run_notebooks.run_all([path], red_square) == 1
    assert path.read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_unknown_notebook_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such"):
        run_notebooks.main(["no_such", "--folder", str(tmp_path)])


@pytest.mark.browser
def test_chromium_draws_the_picture(tmp_path):
    chromium_or_skip()
    # Playwright's synchronous interface wants a thread with no event loop: a process of its own.
    path = write_notebook(tmp_path / "tiny.ipynb", SQUARES)
    command = [sys.executable, "-m", "peftlab.experiments.run_notebooks", str(path)]
    subprocess.run(command, check=True)
    png = base64.b64decode(nbformat.read(path, as_version=4).cells[0].outputs[0].data[PNG])
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20]) == run_notebooks.WIDTH * run_notebooks.SCALE
    assert 2_000 < len(png) < 100_000


def test_a_stored_picture_has_few_colours_and_looks_the_same():
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 8, (90, 120, 3)) * 3 + 200  # 512 colours that are close together
    noise[20:40] = (0, 114, 178)
    image = Image.fromarray(noise.astype(np.uint8))
    image.save(file := io.BytesIO(), "PNG")
    stored = run_notebooks.small(base64.b64encode(file.getvalue()).decode())
    few = Image.open(io.BytesIO(base64.b64decode(stored)))
    assert few.mode == "P" and few.size == (120, 90)
    moved = np.abs(np.asarray(few.convert("RGB")).astype(int) - noise)
    assert moved[:, 15:-15].max() <= 12  # beside the corners, which are clear
    assert len(base64.b64decode(stored)) < len(file.getvalue())


def test_a_colour_that_a_few_marks_have_is_kept():
    """A method's mark is 64 pixels of a plot, the edges of its letters are all greys."""
    pixels = np.full((200, 300, 3), 255, dtype=np.uint8)
    pixels[40:160:2, 40:260] = np.linspace(0, 250, 220).astype(np.uint8)[:, None]  # letters' edges
    marks = [tuple(bytes.fromhex(colour[1:])) for colour in dict.fromkeys(COLOURS.values())]
    for i, colour in enumerate(marks):
        pixels[20:28, 20 + 20 * i : 28 + 20 * i] = colour
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    stored = run_notebooks.small(base64.b64encode(file.getvalue()).decode())
    few = np.asarray(Image.open(io.BytesIO(base64.b64decode(stored))).convert("RGB")).astype(int)
    for i, colour in enumerate(marks):
        assert (few[20:28, 20 + 20 * i : 28 + 20 * i] == colour).all(), colour
