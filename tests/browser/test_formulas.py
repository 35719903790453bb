"""Every displayed formula of the lessons stands whole on a narrow page, its file list folded."""

import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from peftlab.experiments.run_notebooks import find_notebooks

pytestmark = pytest.mark.browser

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NARROW = 900  # pixels of the window
TOO_WIDE = "a + b + c + d + e + " * 12
WIDTHS = """() => [...document.querySelectorAll('mjx-container[display=true]')].map(formula =>
    [formula.querySelector('mjx-math').getBoundingClientRect().width,
     formula.closest('.jp-RenderedHTMLCommon').getBoundingClientRect().width])"""


def formulas() -> list[str]:
    """The displayed formulas of all lessons, each behind the name of its lesson."""
    found = []
    for path in find_notebooks([], NOTEBOOKS):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                inside = re.findall(r"\$\$.+?\$\$", cell.source, re.DOTALL)
                found += [f"{path.stem}\n\n{formula}" for formula in inside]
    return found


def test_no_formula_is_cut_on_a_narrow_page(open_lesson, tmp_path):
    shown = [*formulas(), f"too wide\n\n$${TOO_WIDE}$$"]
    cell = nbformat.v4.new_markdown_cell("\n\n".join(shown))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "formulas.ipynb")

    def narrow(page):
        page.set_viewport_size({"width": NARROW, "height": 1000})

    page = open_lesson(tmp_path / "formulas.ipynb", before=narrow).page
    page.keyboard.press("Control+B")
    expect(page.locator("#filebrowser")).not_to_be_visible()
    expect(page.locator("mjx-container[display=true]")).to_have_count(len(shown), timeout=60_000)
    cut = [
        text.split("\n")[0]
        for text, (width, room) in zip(shown, page.evaluate(WIDTHS), strict=True)
        if width > room
    ]
    assert len(shown) > 90 and cut == ["too wide"]
