"""Which test runs which line, by coverage.py's contexts: a data file for each test file.

The lessons run too, as they do under nbval: what they run counts as run, but they are no tests,
because a mutant would wait minutes for one.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

from coverage import Coverage, CoverageData

from mutants.workshop import Workshop

LIMIT = 1800  # seconds for one test file


CELLS = ["--noconftest", "tests/mutants/lessons.py"]  # without the checks of annotations


def stem(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".")


def cover(workshop: Workshop, only: list[str]) -> None:
    """Run the test files and lessons that have no data yet, or those in `only` again."""
    folder = workshop.folder / "coverage"
    folder.mkdir(exist_ok=True)
    for name in [*workshop.test_files(), *workshop.lessons()]:
        data, rows = folder / f"{stem(name)}.data", folder / f"{stem(name)}.json"
        if name not in only and (only or rows.exists()):
            continue
        data.unlink(missing_ok=True)
        lesson = name.endswith(".ipynb")
        options = ["--cov", "--cov-context=test", "--cov-report=", *(CELLS if lesson else [name])]
        environment = {"COVERAGE_FILE": str(data)} | ({"LESSON": name} if lesson else {})
        ended = workshop.pytest(options, LIMIT, environment=environment)
        tests = {} if lesson else ended.tests
        row = {"status": ended.status, "seconds": round(ended.seconds, 1), "tests": tests}
        rows.write_text(json.dumps(row, indent=1, ensure_ascii=False), encoding="utf-8")
        print(f"{name}: {len(ended.tests)} tests, {ended.seconds:.0f} s, status {ended.status}")
        if ended.failed or ended.status not in (0, 5):
            log = (workshop.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
            (folder / f"{stem(name)}.log").write_text(log, encoding="utf-8")
            print("  failed:", *ended.failed or log.splitlines()[-1:])


class Touched:
    """What the runs of `cover` found."""

    def __init__(self, workshop: Workshop):
        self.folder = workshop.folder / "coverage"
        self.tests: dict[str, dict] = {}
        self.ended: set[str] = set()  # stems of the files that pytest came to the end of
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for path in sorted(self.folder.glob("*.json")):
            row = json.loads(path.read_text(encoding="utf-8"))
            self.tests |= (found := row["tests"])
            self.ended |= {path.stem} if row["status"] in (0, 1, 5) else set()
            data = CoverageData(str(path.with_suffix(".data")))
            data.read()
            for name in data.measured_files():
                at = self.lines[Path(name).as_posix()]
                for line, contexts in data.contexts_by_lineno(name).items():
                    names = (context.rpartition("|")[0] for context in contexts)
                    at[line] |= {name for name in names if name in found}
        self.passed = {name for name, test in self.tests.items() if test["outcome"] == "passed"}

    def missed(self, workshop: Workshop) -> dict[str, tuple[list[int], list[int]]]:
        """For each file of peftlab its lines that hold statements, and those that no test runs."""
        os.chdir(workshop.tree)  # the names in the data are relative
        everything = Coverage(data_file=str(self.folder / "all"), config_file="pyproject.toml")
        everything.combine([str(path) for path in self.folder.glob("*.data")], keep=True)
        names = sorted(everything.get_data().measured_files())
        found = {name: everything.analysis2(name) for name in names}
        return {name: (statements, lost) for name, (_, statements, _, lost, _) in found.items()}

    def files(self, workshop: Workshop) -> dict[str, tuple[int, int]]:
        """The same, counted."""
        return {name: (len(a), len(b)) for name, (a, b) in self.missed(workshop).items()}
