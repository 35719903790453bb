"""A lesson that is read before it is run: JupyterLab shows its stored pictures whole."""

from pathlib import Path

import nbformat
import pytest
from browser.fixtures import Lesson, browser_page
from playwright.sync_api import expect

from peftlab.experiments.run_notebooks import FIGURE, PNG, STILL, WIDTH, figure_in, outputs

pytestmark = pytest.mark.browser

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

# The width of each picture, and of the room that its output has.
WIDTHS = """[...document.querySelectorAll('.jp-OutputArea-output img')].map(picture => [
    picture.clientWidth, picture.closest('.jp-OutputArea-output').clientWidth])"""


def is_drawing(output) -> bool:
    return "alt" in figure_in(output.data)["layout"].get("meta", {})


def test_stored_pictures_are_as_wide_as_drawn_or_as_the_page(lab):
    """A drawing, a figure and a panel of lesson 04, in windows that a learner has."""
    address, folder = lab
    stored = nbformat.read(NOTEBOOKS / "04_prefix_tuning.ipynb", as_version=4)
    pictures = [output for output in outputs(stored) if PNG in output.data]
    drawing = next(output for output in pictures if is_drawing(output))
    figure = next(o for o in pictures if FIGURE in o.data and not is_drawing(o))
    panel = next(output for output in pictures if STILL in output.data)
    stored.cells = [nbformat.v4.new_code_cell(outputs=[o]) for o in (drawing, figure, panel)]
    nbformat.write(stored, path := folder / "stored.ipynb")
    with browser_page() as (page, outside):
        page.set_viewport_size({"width": 1300, "height": 2200})
        Lesson(page, address, path)
        expect(page.locator(".jp-OutputArea-output img")).to_have_count(3)
        rooms = []
        for width, browser_open in ((1300, True), (1300, False), (900, False), (900, True)):
            page.set_viewport_size({"width": width, "height": 2200})
            if page.locator("#filebrowser").is_visible() != browser_open:
                page.keyboard.press("Control+b")
            expect(page.locator("#filebrowser")).to_be_visible(visible=browser_open)
            page.wait_for_timeout(500)
            widths = page.evaluate(WIDTHS)
            assert len(widths) == 3
            assert [shown for shown, _ in widths] == [min(WIDTH, room) for _, room in widths]
            rooms.append(widths[0][1])
    assert max(rooms) > WIDTH > min(rooms)  # both cases were seen
    assert not outside
