"""What recorded comparisons say about a choice.

Each is a dict: `task`, `base`, `label` (a method's name as in `calculator.KINDS`), `better_than`
and `worse_than` (labels), `n` (seeds) and `interval` (two numbers: 95% of the mean score), and
where it is known `parameters` (of the base) and `dev` (examples that the rates were chosen on).
They lie in `data/results/bench_*.json` under "comparisons".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from peftlab.bases.data import data_path
from peftlab.bases.shapes import Shape

FIELDS = {"task", "base", "label", "better_than", "worse_than", "n", "interval"}
KIND_OF_TASK = {  # a recorded task stands for its kind
    "classification": ("sst2", "sentiment", "sort"),
    "tagging": ("wnut17", "entities"),
    "generation": ("pharmacy", "e2e", "facts", "permute", "descend", "double_histogram"),
}
ENOUGH = 5  # seeds: with fewer there is no verdict
LEAST_DEV = 100  # examples: with fewer on dev chance chose the rates, and nothing is decided
FAR = (
    10  # times the parameters: a comparison on a model that far away is shown, and decides nothing
)


def comparisons(folder: Path | None = None) -> list[dict]:
    """All comparisons that are recorded; none where no file is. Raises ValueError for a bad row."""
    folder = folder or data_path("results")
    found = []
    for path in sorted(folder.glob("bench_*.json")):
        contest = json.loads(path.read_text(encoding="utf-8"))
        for row in contest.get("comparisons", []):
            if missing := FIELDS - row.keys():
                raise ValueError(f"{path.name}: a row without {', '.join(sorted(missing))}")
            known = {"parameters": "base parameters", "dev": "dev examples"}
            found.append(row | {k: contest[name] for k, name in known.items() if name in contest})
    return found


def about(rows: Iterable[dict], task: str, labels: Iterable[str]) -> list[dict]:
    """Those of a kind of task that are about these methods."""
    labels, names = set(labels), set(KIND_OF_TASK[task])
    return [
        row
        for row in rows
        if row["label"] in labels and names & {row["task"], row["task"].split("_")[0]}
    ]


def near(row: dict, model: str) -> bool:
    """Whether a comparison may decide for this model: seeds and dev examples enough, and a base of
    a like size."""
    sizes = [size(row), Shape.named(model).parameters()]
    enough = row["n"] >= ENOUGH and row.get("dev", LEAST_DEV) >= LEAST_DEV
    return enough and max(sizes) <= FAR * min(sizes)


def size(row: dict) -> int:
    """The parameters of the base of a comparison, which need not be a model that one can name."""
    return row.get("parameters") or Shape.named(row["base"]).parameters()


def unbeaten(rows: Iterable[dict], labels: list[str]) -> list[str]:
    """The methods that no other of them was better than."""
    beaten = {row["label"] for row in rows if set(row["worse_than"]) & set(labels)}
    beaten |= {label for row in rows if row["label"] in labels for label in row["better_than"]}
    return [label for label in labels if label not in beaten]
