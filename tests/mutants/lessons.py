"""A lesson's code cells, from top to bottom, in this process: so coverage sees what they run.

Its file has no name that pytest collects: `cover` hands it over, with the lesson in `LESSON`.
"""

import os
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(__file__).parent.parent.parent


def test_every_cell_runs(monkeypatch):
    path = ROOT / os.environ["LESSON"]
    monkeypatch.chdir(path.parent)
    shell = InteractiveShell.instance()
    formatter = shell.display_formatter
    formatter.active_types = formatter.format_types  # all that a notebook would ask for
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            done = shell.run_cell(cell.source)
            if "raises-exception" not in cell.metadata.get("tags", []):
                done.raise_error()
