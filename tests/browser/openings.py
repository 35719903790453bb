"""Opens panels again and again on a machine that is busy, and counts what is drawn.

    cd tests && PYTHONPATH=.. python -m browser.openings --openings 20 --load 16

At each opening a new page runs a notebook with the panels of seven lessons, at the learner's own
settings, beside `--load` processes that compute all the time. Every figure has to show all its
traces, and after a key on its slider the title of the new setting and all traces again. Results go
to `data/results/panels_under_load.json`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import ipywidgets
import nbformat
import plotly
from browser.fixtures import (
    Lesson,
    browser_page,
    jupyterlab,
    soon,
    stop_kernels,
    without_outputs,
)

from peftlab.bases.data import data_path
from peftlab.experiments.sweep_soft import write

SETUP = """import pandas as pd
import torch
import peftlab as pl
from peftlab import panels

pl.setup()
base = pl.load("tiny-gpt")
torch.manual_seed(0)
weights, texts = {"w": torch.randn(64, 64)}, ["Mina lives in Rome."] * 4
history = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.5]})
curves = {"LoRA": {0.0: 3.0, 0.5: 2.0, 1.0: 1.0}}"""
PANELS = {  # lesson: the cell, and the class of a slider
    "00": ("panels.live_trainer(base, history=history)", "peftlab-trainer-size"),
    "01": ("panels.memory_explorer()", "peftlab-memory-batch"),
    "02": ("panels.soft_prompt_lab()", None),
    "06": ("panels.rank_lab()", "peftlab-rank-r"),
    "07": ("panels.count_explorer()", "peftlab-size"),
    "08": ("panels.code_explorer(weights)", "peftlab-code-block"),
    "09": ("panels.strength_explorer(curves, 0.5)", "peftlab-strength"),
    "10": ("panels.pruning_lab(base, texts, texts)", "peftlab-pruning-share"),
}
# For each figure: how many traces it has, how many marks are in the page, its title.
DRAWN = """[...document.querySelectorAll('.js-plotly-plot')].map(plot => [
    plot.data?.length ?? 0,
    plot.querySelectorAll('.barlayer path, .scatterlayer path, .heatmaplayer image').length,
    plot.querySelector('.gtitle')?.textContent ?? '',
])"""
# What else the panel of a slider says.
BESIDE = """slider => {
    const panel = document.querySelector('.' + slider).closest('.widget-vbox');
    return {
        value: panel.querySelector(`.${slider} .widget-readout`)?.textContent ?? '',
        words: [...panel.querySelectorAll('.widget-html-content')].map(e => e.textContent),
        trouble: panel.querySelector('.peftlab-plot')?.previousElementSibling?.textContent ?? '',
        status: document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset?.status ?? '',
    };
}"""
FACTS = {
    "plotly": plotly.__version__,
    "ipywidgets": ipywidgets.__version__,
    "playwright": metadata.version("playwright"),
}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """That many processes which compute all the time."""
    work = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in work:
            process.kill()
            process.wait()


def whole(shown: list) -> bool:
    """Whether every panel has its figure, with traces, marks and a title."""
    return len(shown) == len(PANELS) and all(all(figure) for figure in shown)


def opening(address: str, notebook: Path, seconds: float) -> dict:
    """One page: how many figures came up whole, and how many followed their slider."""
    with browser_page() as (page, _):
        lesson = Lesson(page, address, notebook)
        drawn = partial(page.evaluate, DRAWN)
        lesson.run_all(seconds)
        first = soon(page, drawn, whole, seconds)
        moved, still, stuck = 0, [], []
        for at, (_, slider) in enumerate(PANELS.values()):
            if slider is None or at >= len(first):
                continue
            handle = page.locator(f".{slider} [role=slider]").first
            before = handle.get_attribute("aria-valuenow")
            handle.focus()
            handle.press("ArrowRight")
            if soon(page, lambda: handle.get_attribute("aria-valuenow"), before.__ne__) == before:  # noqa: B023
                still.append(slider)  # the key did not reach it
            if slider == "peftlab-trainer-size":  # its figure is of a training, not of a size
                continue
            other = soon(page, drawn, lambda now: now[at][2] != first[at][2], seconds)  # noqa: B023
            if other[at][2] != first[at][2] and other[at][0] == first[at][0]:
                moved += 1
            else:
                stuck.append(
                    {"slider": slider, "title": other[at][2], **page.evaluate(BESIDE, slider)}
                )
        last = drawn()
    stop_kernels(address)
    return {
        "figures": len(first),
        "whole": sum(all(figure) for figure in first),
        "whole after moves": sum(all(figure) for figure in last),
        "followed": moved,
        "sliders that no key reached": still,
        "sliders whose figure stood": stuck,
        "traces": [a for a, *_ in last],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openings", type=int, default=20)
    parser.add_argument("--load", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300, help="how long a figure may take")
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder, home = Path(place, "lab"), Path(place, "home")
        folder.mkdir()
        cells = [nbformat.v4.new_code_cell(c) for c in (SETUP, *(c for c, _ in PANELS.values()))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), Path(place, "panels.ipynb"))
        with jupyterlab(folder, home) as address:
            for n in range(options.openings):
                notebook = without_outputs(Path(place, "panels.ipynb"), folder)
                started = time.monotonic()
                with busy(options.load):
                    row = opening(address, notebook, options.seconds)
                rows.append({"opening": n + 1, **row, "seconds": round(time.monotonic() - started)})
                print(rows[-1], flush=True)
    facts = {
        "command": f"python -m browser.openings --load {options.load}",
        "openings": options.openings,
        "cores": os.cpu_count(),
        "processes beside": options.load,
        "panels": len(PANELS),
        "with a slider whose title follows": sum(s is not None for _, s in PANELS.values()) - 1,
        **FACTS,
        "date": date.today().isoformat(),
    }
    write(options.out / "panels_under_load.json", facts, {"openings": rows})


if __name__ == "__main__":
    main()
