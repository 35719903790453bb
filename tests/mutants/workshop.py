"""A copy of the checkout, and tests that run in it without importing torch each time.

`Workshop` forks a child for each run of pytest, from a process that has imported every library that
the tests need, but neither peftlab nor a test. The copy stays at one place, so what is compiled
is compiled once; it is a copy because a mutant is a changed file, which other processes that a test
starts must see too.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent.parent
# Without a screen, a second environment or minutes of a notebook.
LEFT_OUT = (
    "tests/browser/",
    "tests/notebooks/",
    "tests/test_colab.py",
    "tests/test_recipe.py",
    "tests/test_wheel.py",
)
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--durations=0")


@dataclass
class Ended:
    """How a run of pytest ended: its exit status (None if time was over), and each test's."""

    status: int | None
    seconds: float
    tests: dict[str, dict]

    @property
    def failed(self) -> list[str]:
        return [name for name, test in self.tests.items() if test["outcome"] == "failed"]


class Outcomes:
    """A plugin of pytest: one line of JSON for each test, as soon as it is known. Of what the files
    hold, the tests in `chosen` run, in that order; all if it is None."""

    def __init__(self, path: Path, chosen: list[str] | None):
        self.path, self.chosen, self.tests = path, chosen, {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        if self.chosen is not None:
            there = {item.nodeid: item for item in items}
            items[:] = [there[name] for name in self.chosen if name in there]

    def pytest_runtest_logreport(self, report):
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 4)
        if report.outcome != "passed":
            test["outcome"] = report.outcome
        if report.when == "teardown" or report.failed:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": report.nodeid} | test) + "\n")


class Workshop:
    """The copy lies in `folder/tree`; `refresh` makes it what the checkout is now."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.tree = self.folder / "tree"
        self.folder.mkdir(parents=True, exist_ok=True)

    def refresh(self) -> None:
        """Copy what is tracked and differs, times included; delete what is tracked no more."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=CHECKOUT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        names = [n for n in listed.stdout.split("\0") if n and (CHECKOUT / n).is_file()]
        for name in names:
            source, target = CHECKOUT / name, self.tree / name
            if not target.exists() or source.read_bytes() != target.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        for path in (*self.tree.glob("peftlab/**/*.py"), *self.tree.glob("tests/**/*.py")):
            if path.relative_to(self.tree).as_posix() not in names:
                path.unlink()

    def test_files(self) -> list[str]:
        """The test files that count, the shortest first."""
        paths = sorted(self.tree.glob("tests/**/test_*.py"), key=lambda path: path.stat().st_size)
        names = [path.relative_to(self.tree).as_posix() for path in paths]
        return [name for name in names if not name.startswith(LEFT_OUT)]

    def lessons(self) -> list[str]:
        paths = sorted(self.tree.glob("notebooks/*.ipynb"))
        return [path.relative_to(self.tree).as_posix() for path in paths]

    def settle(self) -> None:
        """What `tests/conftest.py` sets before it imports anything, and then the libraries."""
        here = {str(CHECKOUT), str(CHECKOUT / "tests"), ""}
        sys.path[:] = [str(self.tree), *(p for p in sys.path if p not in here)]
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(self.tree), *(p for p in others if p and p not in here)]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(self.folder / "hypothesis")
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(self.folder / "compiled")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False
        for name in self._libraries():
            try:
                importlib.import_module(name)
            except Exception:  # a part that is not there, or wants another part first
                pass
        gc.collect()
        gc.freeze()  # a child that collects would copy every page

    def _libraries(self) -> list[str]:
        """The modules that collecting every test imports, peftlab and the tests apart."""
        path = self.folder / "libraries.json"
        if not path.exists():
            program = (
                "import json, sys, pytest\n"
                "pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *sys.argv[2:]])\n"
                "place = lambda m: str(getattr(m, '__file__', None) or '')\n"
                "ours = {n for n, m in sys.modules.items() if place(m).startswith(sys.argv[1])}\n"
                "print('\\n' + json.dumps([n for n in sys.modules if n not in ours]))"
            )
            shown = subprocess.run(
                [sys.executable, "-c", program, str(self.tree), *self.test_files()],
                cwd=self.tree, capture_output=True, text=True, check=True,
            )  # fmt: skip
            path.write_text(shown.stdout.splitlines()[-1])
        names = json.loads(path.read_text())
        ours = (
            "peftlab",
            "tests",
            "offline",
            "conftest",
            "sitecustomize",
            "annotations",
            "workers",
        )
        return [name for name in names if name.split(".")[0] not in (*ours, "__main__")]

    def pytest(self, arguments: list[str], limit: float, chosen=None, environment=None) -> Ended:
        """One run of pytest in a child of its own, which is killed if no test ends for `limit`
        seconds. (Not by the time of all: other work on the machine would count as well.)"""
        outcomes, scratch = self.folder / "outcomes.jsonl", self.folder / "scratch"
        outcomes.unlink(missing_ok=True)
        start, child = time.monotonic(), os.fork()
        if child == 0:
            try:
                options = [*OPTIONS, f"--basetemp={scratch}", *arguments]
                self._child(options, Outcomes(outcomes, chosen), environment or {})
            finally:
                os._exit(70)
        status = self._wait(child, outcomes, limit)
        for path in (scratch, self.folder / "hypothesis"):
            shutil.rmtree(path, ignore_errors=True)
        lines = outcomes.read_text(encoding="utf-8").splitlines() if outcomes.exists() else []
        rows = [json.loads(line) for line in lines]
        tests = {row.pop("test"): row for row in rows}
        return Ended(status, time.monotonic() - start, tests)

    def _child(self, options: list[str], plugin: Outcomes, environment: dict) -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the background ignores Ctrl-C
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ |= environment
        os.chdir(self.tree)
        os._exit(int(pytest.main(options, plugins=[plugin])))

    def _wait(self, child: int, outcomes: Path, limit: float) -> int | None:
        pause, size, end = 0.01, 0, time.monotonic() + limit
        while True:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended or time.monotonic() > end:
                break
            if outcomes.exists() and outcomes.stat().st_size != size:
                size, end = outcomes.stat().st_size, time.monotonic() + limit
            time.sleep(pause)
            pause = min(0.2, 1.2 * pause)
        try:  # whatever the tests have left running
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if ended:
            return os.waitstatus_to_exitcode(code)
        os.waitpid(child, 0)
        return None
