"""One JupyterLab for all browser tests, and a page for each."""

from collections.abc import Callable
from pathlib import Path

import pytest
from browser.fixtures import (
    Lesson,
    browser_page,
    chromium_or_skip,
    jupyterlab,
    stop_kernels,
    without_outputs,
)


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> tuple[str, Path]:
    """The address of a JupyterLab, and the folder it serves."""
    chromium_or_skip()
    folder = tmp_path_factory.mktemp("lab")
    with jupyterlab(folder, tmp_path_factory.mktemp("home")) as address:
        yield address, folder


@pytest.fixture
def open_lesson(lab) -> Callable[..., Lesson]:
    """Opens a copy of a notebook, or of the cells that the calls named after it need; `before` is
    handed the page first. When the test ends, no request may have left this machine.
    """
    address, folder = lab
    with browser_page() as (page, outside):

        def opened(path: Path, *calls: str, before: Callable = lambda page: None) -> Lesson:
            before(page)
            return Lesson(page, address, without_outputs(path, folder, calls))

        yield opened
        stop_kernels(address)
        assert not outside, f"the page asked other machines for {sorted(outside)}"
