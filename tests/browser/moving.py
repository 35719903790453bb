"""Makes the README's picture: the count explorer in JupyterLab, its slider moved by arrow keys.

cd tests && PYTHONPATH=.. python -m browser.moving ../data/results/count_explorer.gif
"""

import argparse
import io
import tempfile
from pathlib import Path

import nbformat
from browser.fixtures import Lesson, browser_page, jupyterlab, without_outputs
from PIL import Image
from playwright.sync_api import expect

SOURCE = "from peftlab import panels\n\npanels.count_explorer()"
SIZE = {"width": 900, "height": 720}
MILLISECONDS = 900  # a picture
COLOURS = 48


def pictures(folder: Path, home: Path) -> list[bytes]:
    """A PNG of the page at each rank, from 2 to 64."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    nbformat.write(notebook, home / "count.ipynb")
    with jupyterlab(folder, home) as address, browser_page() as (page, _):
        page.set_viewport_size(SIZE)
        lesson = Lesson(page, address, without_outputs(home / "count.ipynb", folder))
        page.keyboard.press("Control+b")
        lesson.run_all()
        title, slider = page.locator(".gtitle"), page.locator(".peftlab-size [role=slider]")
        expect(title).to_be_visible(timeout=60_000)
        for _ in range(2):
            slider.press("ArrowLeft")
        taken = []
        while not taken or slider.get_attribute("aria-valuetext") != "64":
            before = title.text_content()
            if taken:
                slider.press("ArrowRight")
                expect(title).not_to_have_text(before)
            page.wait_for_timeout(500)
            taken.append(page.screenshot())
    return taken


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder, home = Path(place, "lab"), Path(place, "home")
        folder.mkdir()
        home.mkdir()
        taken = pictures(folder, home)
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in taken]
    first, *others = [image.quantize(COLOURS, dither=Image.Dither.NONE) for image in images]
    first.save(
        options.out, save_all=True, append_images=others, duration=MILLISECONDS, loop=0,
        optimize=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
