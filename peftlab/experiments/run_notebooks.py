"""Execute lessons and store them with their outputs, ready for nbval and for GitHub.

    python -m peftlab.experiments.run_notebooks                    # every notebook, written back
    python -m peftlab.experiments.run_notebooks 06_lora --check    # run only, write nothing
    python -m peftlab.experiments.run_notebooks --stored           # run nothing, store again

A stored lesson shows its figures where no kernel runs. Chromium draws a PNG beside the data of
each Plotly figure, with the plotly.js that the plotly package carries, so nothing is fetched. A
panel offers a figure of itself in its output as `application/vnd.peftlab.still+json`; its PNG takes
the place of the widget view, whose model ends with the kernel. nbval compares both kinds of figure
by their data and passes over the PNG.

A figure's data is stored as `application/vnd.peftlab.figure+json`. Under Plotly's own type,
JupyterLab would hand the output to Plotly's extension, which shows the PNG at as many pixels as the
file has and cuts off what is wider than the page. JupyterLab's own image view gives it the width in
the output's metadata, or the page's where that is less.

The notebook's metadata say which version of peftlab ran it, and have a digest of the code that ran,
so that outputs of other code are found.
"""

import argparse
import base64
import copy
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import peftlab
from peftlab.figures import spoken

PLOTLY = "application/vnd.plotly.v1+json"
FIGURE = "application/vnd.peftlab.figure+json"  # what PLOTLY becomes when it is stored
STILL = "application/vnd.peftlab.still+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"
RAN = "peftlab"  # in a notebook's metadata: which version ran it, and the digest of what ran
CELL_METADATA = {"cellView", "jupyter", "reason", "tags"}
WIDTH, HEIGHT, SCALE = 800, 450, 1.5  # where a figure names no size; and its sharpness
CORNER = 10  # pixels of a page

Camera = Callable[[dict], str]


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome; PEFTLAB_CHROMIUM names another."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = (shutil.which(name) for name in names)
    return os.environ.get("PEFTLAB_CHROMIUM") or next(filter(None, found), None)


def chromium_arguments() -> list[str]:
    """Start-up flags: no sandbox (containers have none), no driver, no host but this one."""
    return [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]


@contextmanager
def camera() -> Iterator[Camera]:
    """A function that draws a Plotly figure's JSON and returns a base64 PNG."""
    import plotly
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    if chromium is None:
        raise RuntimeError("drawing the stored pictures needs Chromium; none was found on PATH")
    library = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    draw = """([figure, size]) => Plotly.toImage(
        {data: figure.data, layout: figure.layout}, {format: 'png', ...size})"""

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=chromium_arguments())
        page = browser.new_page()
        page.add_script_tag(path=library)

        def picture(figure: dict) -> str:
            height = figure.get("layout", {}).get("height", HEIGHT)
            size = {"width": width_of(figure), "height": height, "scale": SCALE}
            return small(page.evaluate(draw, [figure, size]).split(",", 1)[1])

        try:
            yield picture
        finally:
            browser.close()


def small(png: str) -> str:
    """A base64 PNG with at most 64 colours, a quarter of the bytes, as a card with round corners.

    Words stay sharp, and the colour of a mark stays what it is. The corners are transparent, so
    that on dark paper it lies as a card and does not end like a hole. What is small already stays
    as it is.
    """
    from PIL import Image, ImageDraw
    from PIL.Image import open as picture_in

    image = picture_in(io.BytesIO(base64.b64decode(png)))
    if "transparency" in image.info:
        return png
    colours, steps, fine, size = 64, 4, 4, image.size  # an edge has 4 shades, from clear on
    few = in_few_colours(image.convert("RGB"), colours)
    card = Image.new("L", (size[0] * fine, size[1] * fine))
    whole = (0, 0, card.width - 1, card.height - 1)
    ImageDraw.Draw(card).rounded_rectangle(whole, CORNER * SCALE * fine, fill=steps)
    card = card.resize(size, Image.Resampling.BOX)  # 0 outside, `steps` inside
    paper, palette = few.getpixel((size[0] // 2, 0)), few.getpalette()
    palette = (palette + [0] * 3 * colours)[: 3 * colours]
    few.putpalette(palette + palette[3 * paper : 3 * paper + 3] * steps)
    for step in range(steps):
        few.paste(colours + step, mask=card.point([255 * (i == step) for i in range(256)]))
    clear = bytes([255] * colours + [255 * step // steps for step in range(steps)])
    few.save(out := io.BytesIO(), "PNG", optimize=True, transparency=clear)
    return base64.b64encode(out.getvalue()).decode()


def in_few_colours(image, colours: int):
    """The picture with a palette, of its own colours: first the one that most pixels have, then
    always the one whose pixels are furthest off, each counted by the square of its distance. So a
    mark of few pixels keeps its colour, and shades that are nearly alike share one.
    """
    from PIL import Image

    pixels = np.asarray(image).reshape(-1, 3)
    every, where, count = np.unique(pixels, axis=0, return_inverse=True, return_counts=True)
    nearest, apart = np.zeros(len(every), dtype=np.uint8), np.full(len(every), np.inf)
    palette, worst = [], count.argmax()
    while len(palette) < colours and apart[worst] > 0:
        far = np.square(every.astype(int) - every[worst].astype(int)).sum(axis=1)
        nearest[far < apart] = len(palette)
        apart = np.minimum(apart, far)
        palette.append(every[worst])
        worst = (count * apart).argmax()
    few = Image.fromarray(nearest[where.reshape(-1)].reshape(image.size[::-1]), "P")
    few.putpalette(np.concatenate(palette).tolist())
    return few


def figure_in(data: dict) -> dict | None:
    """The Plotly figure that an output carries, shown or stored, its own or a panel's still."""
    return data.get(PLOTLY) or data.get(FIGURE) or data.get(STILL)


def width_of(figure: dict) -> int:
    """A figure's width in pixels of a page."""
    return figure.get("layout", {}).get("width", WIDTH)


def outputs(notebook) -> Iterator[dict]:
    """The outputs that have data."""
    for cell in notebook.cells:
        yield from (output for output in cell.get("outputs", []) if "data" in output)


def outputs_with_data(notebook) -> Iterator[dict]:
    yield from (output["data"] for output in outputs(notebook))


def execute(notebook, folder: Path, timeout: int = 600) -> float:
    """Run every cell in order, in `folder`, and return the seconds that took."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    start = time.perf_counter()
    client.execute()
    notebook.metadata[RAN] = {"version": peftlab.__version__, "sources": digest(notebook)}
    return time.perf_counter() - start


def digest(notebook) -> str:
    """Of the code that ran, without the set-up cell, which holds the address of a fork."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def tidy(notebook) -> None:
    """Keep what a reader or nbval uses, and drop what changes from run to run."""
    kept = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if RAN in notebook.metadata:
        kept[RAN] = notebook.metadata[RAN]
    notebook.metadata = nbformat.from_dict(kept)
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in CELL_METADATA}
    for data in outputs_with_data(notebook):
        data.pop(WIDGET, None)


def add_pictures(notebook, picture: Camera, drawn: dict[str, str]) -> None:
    """Put a PNG beside every figure; `drawn` holds those already made, by the figure's data. Its
    width on a page goes into the PNG's metadata, where JupyterLab and nbconvert look, and so do
    words for those who cannot see it.
    """
    for output in outputs(notebook):
        data = output["data"]
        figure = figure_in(data)
        if figure is not None:
            key = json.dumps(figure, sort_keys=True)
            drawn[key] = data[PNG] = drawn.get(key) or picture(figure)
            if PLOTLY in data:
                data[FIGURE] = data.pop(PLOTLY)
            about = {"width": width_of(figure)}
            if words := spoken(figure):
                about["alt"] = words
            output.setdefault("metadata", {})[PNG] = about


def run(path: Path, picture: Camera | None, again: bool = True, redraw: bool = False) -> float:
    """Execute one notebook; write it back only where a camera is given. Returns seconds.

    Without `again` nothing runs, and the outputs it has are what is stored. A figure whose data is
    what it was keeps its picture, unless all are to be drawn again.
    """
    notebook = nbformat.read(path, as_version=4)
    drawn = {
        json.dumps(figure_in(data), sort_keys=True): small(data[PNG])
        for data in outputs_with_data(notebook)
        if PNG in data and figure_in(data) and not redraw
    }
    seconds = execute(notebook, path.parent) if again else 0.0
    if picture is not None:
        tidy(notebook)
        add_pictures(notebook, picture, drawn)
        nbformat.validate(notebook)
        path.write_text(written(notebook), encoding="utf-8")
    return seconds


def written(notebook: nbformat.NotebookNode) -> str:
    """The notebook as text, the data of each figure in one line.

    With a line for every number, as nbformat writes them, a sixth of a lesson would be indentation.
    """
    lines, notebook = {}, copy.deepcopy(notebook)
    for data in outputs_with_data(notebook):
        for kind in {FIGURE, STILL} & data.keys():
            place = f"figure {len(lines)} of this notebook"
            lines[json.dumps(place)] = json.dumps(data[kind], ensure_ascii=False, sort_keys=True)
            data[kind] = place
    text = nbformat.writes(notebook)
    for place, line in lines.items():
        text = text.replace(place, line)
    return text + "\n"


def find_notebooks(names: list[str], folder: Path) -> list[Path]:
    """The notebooks called `names` (with or without suffix, or as paths); all of them for []."""
    if not names:
        return sorted(folder.glob("*.ipynb"))
    paths = [Path(n) if n.endswith(".ipynb") else folder / f"{n}.ipynb" for n in names]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no such notebook: {', '.join(missing)}")
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="such as 06_lora; all where none is given")
    parser.add_argument("--folder", type=Path, default=Path("notebooks"))
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="run, and write nothing")
    instead.add_argument("--stored", action="store_true", help="write the outputs, and run nothing")
    parser.add_argument("--redraw", action="store_true", help="draw every picture from its data")
    options = parser.parse_args(arguments)
    paths = find_notebooks(options.names, options.folder)
    if options.check:
        return run_all(paths, None)
    with camera() as picture:
        return run_all(paths, picture, not options.stored, options.redraw)


def run_all(
    paths: list[Path], picture: Camera | None, again: bool = True, redraw: bool = False
) -> int:
    """Run each notebook; one that fails keeps its stored text. Returns how many failed."""
    failed = 0
    for path in paths:
        try:
            print(f"{path}: {run(path, picture, again, redraw):.1f} s", flush=True)
        except CellExecutionError as error:
            failed += 1
            print(f"{path}: not written, a cell failed\n{error}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
