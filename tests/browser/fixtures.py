"""A real JupyterLab on this machine and a headless Chromium that looks at it."""

import ast
import json
import os
import socket
import subprocess
import symtable
import sys
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from peftlab.experiments.run_notebooks import chromium_arguments, find_chromium

TOKEN = "peftlab"
SECONDS = 1000  # Playwright counts in milliseconds
# The one picture in a lesson that comes from elsewhere; without a network its place stays empty.
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def chromium_or_skip() -> str:
    """Chromium's path; without one it skips, or fails where PEFTLAB_REQUIRE_BROWSER is set."""
    chromium = find_chromium()
    if chromium is None:
        message = "no Chromium on PATH (PEFTLAB_CHROMIUM may name one)"
        if os.environ.get("PEFTLAB_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    return chromium


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until_up(server: subprocess.Popen, address: str, log: Path, seconds: float = 60) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            opener.open(f"{address}/api/status?token={TOKEN}", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not come up:\n{log.read_text()[-2000:]}")


def write_settings(folder: Path) -> None:
    """A learner's own settings, except that no question about news covers the page."""
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in settings.items():
        path = folder / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))


@contextmanager
def jupyterlab(folder: Path, home: Path) -> Iterator[str]:
    """A JupyterLab that serves `folder`, with settings of its own in `home`; yields its address."""
    write_settings(home / "settings/@jupyterlab")
    own_places = {
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
    }
    environment = {**os.environ, **{name: str(home / place) for name, place in own_places.items()}}
    port, log = free_port(), home / "jupyterlab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [
        f"--ServerApp.root_dir={folder}",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(server, address, log)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@contextmanager
def browser_page() -> Iterator[tuple[Page, set[str]]]:
    """A page in headless Chromium, and the set of requests for other machines (all refused)."""
    chromium = chromium_or_skip()
    outside: set[str] = set()

    def stay_here(route, request):
        if request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            route.continue_()
        else:
            if request.url != BADGE:
                outside.add(request.url)
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=chromium_arguments())
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.route("**/*", stay_here)
        try:
            yield page, outside
        finally:
            browser.close()


def stop_kernels(address: str) -> None:
    """End every kernel of a JupyterLab; one of a lesson holds half a gigabyte."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"token {TOKEN}"}

    def ask(path: str, method: str) -> bytes:
        request = urllib.request.Request(f"{address}/api/{path}", headers=headers, method=method)
        with opener.open(request, timeout=60) as answer:
            return answer.read()

    for kernel in json.loads(ask("kernels", "GET")):
        ask(f"kernels/{kernel['id']}", "DELETE")


def filled(source: str) -> set[str]:
    """The names of what a cell puts something into: `curves[name] = value`, `f.scaling = 2`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            while not isinstance(node, ast.Name | ast.Call):
                node = node.value
            names |= {node.id} if isinstance(node, ast.Name) else set()
    return names


def names_of(source: str) -> tuple[set[str], set[str]]:
    """The global names that a cell binds, and those it reads, in its functions too, before that."""
    bound, read = set(), set()
    for statement in ast.parse(source).body:
        tables = [top := symtable.symtable(ast.unparse(statement), "statement", "exec")]
        here = set()
        for table in tables:
            tables += table.get_children()
            symbols = [s for s in table.get_symbols() if table is top or s.is_global()]
            here |= {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
            read |= {s.get_name() for s in symbols if s.is_referenced()} - bound
        if isinstance(statement, ast.For | ast.With):  # what it binds is for its own body
            read -= here
        bound |= here
    return bound, read


def cells_for(cells: list, calls: Collection[str]) -> list:
    """The set-up cell, the cells with these calls, and the cells that make or fill what they read.

    The texts just before a kept cell stay with it. A call that no cell has is an error.
    """
    kept, needed, missing, text = [], set(), set(calls), False
    first = next(cell for cell in cells if cell.cell_type == "code")
    for cell in reversed(cells):
        if cell.cell_type != "code":
            keep = text
        else:
            bound, read = names_of(cell.source)
            here = {call for call in calls if f"{call}(" in cell.source}
            makes = bound | filled(cell.source)
            keep = text = bool(cell is first or here or makes & needed)
            missing -= here
            needed = (needed - bound) | read if keep else needed
        if keep:
            kept.insert(0, cell)
    assert not missing, f"no cell calls {', '.join(sorted(missing))}"
    return kept


def without_outputs(notebook: Path, folder: Path, calls: Collection[str] = ()) -> Path:
    """A copy of a notebook in `folder` as if it had never run: what appears later is new.

    With `calls` it has only the cells that these calls need.
    """
    copy = nbformat.read(notebook, as_version=4)
    copy.metadata["kernelspec"] = {"display_name": "Python 3", "name": "python3"}
    if calls:
        copy.cells = cells_for(copy.cells, calls)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(copy, folder / notebook.name)
    return folder / notebook.name


def soon(page: Page, read: Callable, right: Callable, seconds: float = 20):
    """What `read` gives, once that is `right` or the seconds are over: the parts of a page change
    one after the other."""
    end = time.monotonic() + seconds
    while not right(seen := read()) and time.monotonic() < end:
        page.wait_for_timeout(100)
    return seen


class Lesson:
    """A notebook open in JupyterLab."""

    def __init__(self, page: Page, address: str, notebook: Path):
        self.page = page
        self.sources = [
            cell.source
            for cell in nbformat.read(notebook, as_version=4).cells
            if cell.cell_type == "code" and cell.source.strip()
        ]
        page.goto(f"{address}/lab/tree/{notebook.name}?reset&token={TOKEN}")
        expect(page.locator(".jp-Notebook")).to_be_visible(timeout=60 * SECONDS)
        status = page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle")
        expect(status).to_be_visible(timeout=60 * SECONDS)

    def run_all(self, seconds: float = 420) -> None:
        """Run > Run All Cells, until the last cell has a count; fails with the text of an error."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        done = "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        done += ".filter(p => /\\[\\d+\\]/.test(p.textContent)).length"
        failure = "() => [...document.querySelectorAll('.jp-OutputArea-output')]"
        failure += ".map(o => o.textContent).find(t => t.includes('Traceback (most recent call'))"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            error = self.page.evaluate(failure)
            assert not error, error
            if self.page.evaluate(done) >= len(self.sources):
                self.page.wait_for_timeout(250)  # the last cell's output follows its count
                error = self.page.evaluate(failure)
                assert not error, error
                return
            self.page.wait_for_timeout(250)
        pytest.fail(f"the notebook was still running after {seconds} s")
