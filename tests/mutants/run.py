"""Each mutant meets the tests that run its line, the quickest first, up to the first that fails."""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest

from mutants.cover import Touched
from mutants.draw import Mutant
from mutants.workshop import Ended, Workshop

FIRST, BUDGET = 60, 15  # tests and their seconds that a mutant meets at first
# What runs in a process of its own, unseen by coverage, and whose tests run it there.
ELSEWHERE = {"peftlab/sites/triton_codes.py": "tests/test_kernels.py::"}
SLACK = 240  # seconds without an end of a test, beyond ten times what the longest of them took


class Trials:
    """The trials of mutants in a workshop; each result is a line of `results.jsonl`."""

    def __init__(self, workshop: Workshop, more: float = 0):
        self.workshop, self.touched, self.more = workshop, Touched(workshop), more
        self.path = workshop.folder / "results.jsonl"
        self.unsteady: set[str] = set()
        self.stamp = 0

    def known(self) -> dict[str, dict]:
        """The last result of each mutant."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return {row["mutant"]: row for row in map(json.loads, lines)}

    def meets(self, mutant: Mutant) -> list[str]:
        """All tests that run the mutant's line, those first that `FIRST` counts."""
        lines = self.touched.lines.get(mutant.module, {})
        for first, last in mutant.lines:
            found = {test for line in range(first, last + 1) for test in lines.get(line, ())}
            if found := (found & self.touched.passed) - self.unsteady:
                return self.varied(found)
        if not (file := ELSEWHERE.get(mutant.module)):
            return []
        passed = self.touched.passed - self.unsteady
        return self.varied({test for test in passed if test.startswith(file)})

    def seconds(self, tests: Iterable[str]) -> float:
        return sum(self.touched.tests[test]["seconds"] for test in tests)

    def varied(self, tests: set[str]) -> list[str]:
        """One test of each file, then one of each function, then the others; quick before slow."""

        def one_of_each(names: list[str], group: re.Pattern) -> tuple[list[str], list[str]]:
            heads: dict[str, str] = {}
            for name in names:
                heads.setdefault(group.match(name)[0], name)
            return list(heads.values()), [n for n in names if n not in set(heads.values())]

        quick = sorted(tests, key=lambda name: (self.touched.tests[name]["seconds"], name))
        files, others = one_of_each(quick, re.compile("[^:]+"))
        functions, others = one_of_each(others, re.compile(r"[^\[]+"))
        rounds = defaultdict(list)
        for name in others:
            rounds[name.partition("[")[0]].append(name)
        turns = zip_longest(*rounds.values())
        return [*files, *functions, *(name for turn in turns for name in turn if name)]

    def some(self, tests: list[str], number: int, budget: float) -> list[str]:
        """The first of them whose seconds together are in the budget, the quickest first."""
        chosen: list[str] = []
        for name in tests:
            seconds = self.seconds([name])
            if len(chosen) < number and (not chosen or seconds <= budget):
                chosen.append(name)
                budget -= seconds
        return sorted(chosen, key=lambda name: (self.seconds([name]), name))

    def try_one(self, mutant: Mutant, more: bool) -> dict:
        tests = self.meets(mutant)
        row = {"mutant": mutant.key, "outcome": "no test", "tests": 0, "seconds": 0.0}
        if tests:
            chosen = self.some(tests, *((len(tests), self.more) if more else (FIRST, BUDGET)))
            outcome, killer, ran, seconds = self.against(mutant, chosen)
            row |= {"outcome": outcome, "tests": ran, "seconds": round(seconds, 1)}
            if killer:
                row["test"] = killer
        return row | {"touching": len(tests)}

    def against(self, mutant: Mutant, tests: list[str]) -> tuple[str, str | None, int, float]:
        """(outcome, the test that failed, how many tests began, seconds)."""
        path = self.workshop.tree / mutant.module
        text, times = path.read_text(encoding="utf-8"), path.stat()
        # What is compiled belongs to a source of this size and this time in whole seconds.
        self.stamp = max(self.stamp + 1, int(time.time()))
        try:
            path.write_text(mutant.source(text), encoding="utf-8")
            os.utime(path, (self.stamp, self.stamp))
            ended = self.only(tests, "-x")
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if ended.status in (0, 5):  # 5: none of them is there any more
            return "survived", None, len(ended.tests), ended.seconds
        outcome = "killed" if ended.status is not None else "killed by time"
        killer = (ended.failed or [None])[0] or ("import" if not ended.tests else "the process")
        return outcome, killer, len(ended.tests), ended.seconds

    def only(self, tests: list[str], *options: str) -> Ended:
        """A run of these tests. One that a mutant has under another name is left out."""
        files = dict.fromkeys(name.partition("::")[0] for name in tests)
        limit = SLACK + 10 * max(self.seconds([name]) for name in tests)
        return self.workshop.pytest([*options, *files], limit, tests)

    def run(self, mutants: list[Mutant], again: Iterable[str] = ()) -> None:
        """Try those that have no result, and those whose outcome is in `again`."""
        known = self.known()
        for number, mutant in enumerate(mutants, 1):
            if mutant.key in known and known[mutant.key]["outcome"] not in again:
                continue
            row = self.try_one(mutant, more=bool(again))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{number} {row['outcome']} {mutant.key} {row.get('test', '')} {row['seconds']}")
        self.check(mutants)

    def check(self, mutants: list[Mutant]) -> None:
        """A test that killed something must pass without it, in the company of the other killers
        alone. One that does not kills nothing, and its mutants are tried again without it."""
        known = self.known()
        killers = {row.get("test") for row in known.values()} & self.touched.passed
        steady = self.workshop.folder / "steady.json"
        passed = set(json.loads(steady.read_text("utf-8"))) if steady.exists() else set()
        if fresh := sorted(killers - passed):
            ended = self.only(fresh)
            good = {name for name, test in ended.tests.items() if test["outcome"] == "passed"}
            steady.write_text(json.dumps(sorted(passed | good)), encoding="utf-8")
            self.unsteady |= set(fresh) - good
        if self.unsteady:
            print("failed without a mutant:", *sorted(self.unsteady))
            kept = [row for row in known.values() if row.get("test") not in self.unsteady]
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            self.path.write_text("".join(lines), encoding="utf-8")
            if len(kept) < len(known):
                self.run(mutants)
