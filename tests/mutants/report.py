"""What was found, for `data/results/mutants.json`."""

from __future__ import annotations

import platform
import tomllib
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

from mutants.cover import Touched, stem
from mutants.draw import Mutant
from mutants.run import Trials
from mutants.workshop import LEFT_OUT, Workshop
from peftlab.experiments.sweep_soft import write as write_rows

LIBRARIES = "torch transformers peft pytest hypothesis cosmic-ray coverage".split()
HERE = Path(__file__).parent


def room(module: str) -> str:
    """The folder below peftlab, or the file."""
    return module.removeprefix("peftlab/").partition("/")[0]


def reasons() -> dict[str, str]:
    """Why a survivor changes nothing that a test could see, by the mutant's key."""
    found = tomllib.loads((HERE / "equivalent.toml").read_text(encoding="utf-8"))
    return {key: reason for reason, keys in found.items() for key in keys}


def write(workshop: Workshop, mutants: list[Mutant], options) -> None:
    touched, known, why = Touched(workshop), Trials(workshop).known(), reasons()
    rows = [(mutant, known[mutant.key]) for mutant in mutants if mutant.key in known]
    killed = [mutant for mutant, row in rows if row["outcome"].startswith("killed")]
    files = touched.files(workshop)
    statements, missed = (sum(counts) for counts in zip(*files.values(), strict=True))
    tests = touched.tests
    facts = {
        "command": f"python -m mutants write --number {options.number} --seed {options.seed}, "
        "in tests, after cover and run",
        "seed": options.seed,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "date": date.today().isoformat(),
        "tests": len(tests),
        "tests left out": list(LEFT_OUT),
        "test files not measured": [
            name for name in workshop.test_files() if stem(name) not in touched.ended
        ],
        "lessons whose own run counts": [
            Path(name).stem for name in workshop.lessons() if stem(name) in touched.ended
        ],
        "tests that failed without a mutant": sorted(
            name for name, test in tests.items() if test["outcome"] == "failed"
        ),
        "lines": statements,
        "lines that a test runs, percent": round(100 - 100 * missed / statements, 2),
        "mutants drawn": len(mutants),
        "mutants": len(rows),
        "killed": len(killed),
        "killed, percent": round(100 * len(killed) / len(rows), 1),
    }
    result = {
        "rooms": [
            {"room": name, "lines": counts[0], "lines that no test runs": counts[1]}
            for name, counts in by_room(files).items()
        ],
        "mutants by room": [
            {"room": name, "mutants": drawn, "killed": sum(room(m.module) == name for m in killed)}
            for name, drawn in sorted(Counter(room(m.module) for m, _ in rows).items())
        ],
        "survivors": [
            described(mutant)
            | {"tests": row["tests"], "touching": row["touching"], "reason": why.get(mutant.key)}
            for mutant, row in sorted(rows, key=lambda pair: (pair[0].module, pair[0].line))
            if not row["outcome"].startswith("killed")
        ],
        "killed mutants": [
            described(mutant) | {"how": row["outcome"], "test": row["test"]}
            for mutant, row in sorted(rows, key=lambda pair: (pair[0].module, pair[0].line))
            if row["outcome"].startswith("killed")
        ],
    }
    facts["killed mutants that no test failed on but time or a crash"] = sum(
        "::" not in row["test"] for row in result["killed mutants"]
    )
    write_rows(options.out, facts, result)
    print({key: facts[key] for key in facts if "percent" in key or "mutants" in key})


def described(mutant: Mutant) -> dict:
    return {
        "module": mutant.module,
        "line": mutant.line,
        "operator": mutant.operator.removeprefix("core/"),
        "before": mutant.before,
        "after": mutant.after,
    }


def by_room(files: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name, counts in sorted(files.items()):
        so_far = found.get(room(name), (0, 0))
        found[room(name)] = (so_far[0] + counts[0], so_far[1] + counts[1])
    return found
