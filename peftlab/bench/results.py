"""The contests that are recorded, as tables. Reading them needs no statistics library."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from peftlab.bases.data import data_path
from peftlab.bench.contest import HEAD_RATE, KEYS

# columns of a run that are no score
BESIDE = {
    *KEYS, "trained", "stored", "head", "file_bytes", "last_loss", "curve", "problem", "blocks",
    "outputs", "plain_loss", "train seconds", "score seconds",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A contest as it was written.

    `facts` is what holds for all rows, with the chosen rates under "entries"; `tried` are the runs
    of the search on dev, `runs` those of the seeds on the test, one row each; `pairs` are the
    verdicts, and `comparisons` says of each entry which others it is better or worse than;
    `references` are scores that nobody was trained for.
    """

    facts: dict
    tried: pd.DataFrame
    runs: pd.DataFrame
    pairs: pd.DataFrame
    comparisons: pd.DataFrame
    references: pd.DataFrame

    @property
    def main(self) -> str:
        """The headline metric."""
        return self.facts["main"]

    @property
    def scores(self) -> tuple[str, ...]:
        """The metrics, the headline first."""
        others = (column for column in self.runs.columns if column not in BESIDE)
        return (self.main, *(each for each in others if each != self.main))

    def search(self, label: str) -> pd.DataFrame:
        """The runs that chose an entry's rate, with the rate as "rate": on a task with a head those
        with the head's first guess; of a head alone, all of them, with the head's rates."""
        tried = self.tried[self.tried.label == label]
        if self.facts["entries"][label]["methods"]:
            guessed = tried.head_lr.isna() | (tried.head_lr == HEAD_RATE)
            return tried[guessed].assign(rate=tried.lr[guessed]).sort_values("rate")
        return tried.assign(rate=tried.head_lr).sort_values("rate")

    def rate(self, label: str) -> float:
        """The rate that an entry took; of a head alone the head's."""
        entry = self.facts["entries"][label]
        return entry["lr"] if entry["methods"] else entry["head_lr"]

    def peaks(self, length: int = 32, labels: Collection[str] | None = None) -> dict[str, int]:
        """The peak memory in bytes of one training step of each entry, by `memory.predict`.

        In float32 on a CPU, with as many rows as the contest's batch and so many tokens a row; of
        all entries, or of those with `labels`.
        """
        from peftlab import memory
        from peftlab.bases.shapes import Shape
        from peftlab.methods import Method

        shape, size = Shape.named(self.facts["base"]), self.facts["batch size"]
        made = {
            label: [Method.from_dict(each) for each in entry["methods"]]
            for label, entry in self.facts["entries"].items()
            if labels is None or label in labels
        }
        return {
            label: memory.predict(methods, shape.name, batch=size, length=length).peak
            for label, methods in made.items()
        }

    def difference(self, a: str, b: str) -> pd.Series:
        """The verdict on a beside b: mean, low and high of a − b, p, and the word.

        The interval is that of this pair; p and the word are corrected for all pairs.
        """
        there = self.pairs[(self.pairs.a == a) & (self.pairs.b == b)]
        if len(there):
            return there.iloc[0]
        other = self.pairs[(self.pairs.a == b) & (self.pairs.b == a)]
        if not len(other):
            raise ValueError(f"no verdict on {a!r} and {b!r}")
        row = other.iloc[0].copy()
        words = {"better": "worse", "worse": "better"}
        row[["a", "b", "mean", "low", "high"]] = [a, b, -row["mean"], -row.high, -row.low]
        row["verdict"] = words.get(row.verdict, row.verdict)
        return row

    @property
    def settled(self) -> pd.DataFrame:
        """For each entry its rates, and whether each is inside the rates that were tried."""
        return pd.DataFrame(self.facts["entries"]).T[["lr", "head_lr", "inside"]]


def names() -> list[str]:
    """The contests that lie in `data/results/`."""
    found = data_path("results").glob("bench_*.json")
    return sorted(path.stem.removeprefix("bench_") for path in found)


def read(name: str, path: Path | None = None, kind: str = "bench") -> Result:
    """A contest that was written, by the tournament or as one of a study (kind "study"). Raises
    FileNotFoundError if it was not."""
    path = path or data_path("results", f"{kind}_{name}.json")
    facts = json.loads(path.read_text(encoding="utf-8"))
    parts = ("tried", "runs", "pairs", "comparisons")
    tables = [pd.DataFrame(facts.pop(part)) for part in parts]
    references = facts.pop("references") or {"label": [], "seed": []}  # a head has none
    return Result(facts, *tables, pd.DataFrame(references))


def trend(study: str, folder: Path | None = None) -> pd.DataFrame:
    """What the contests of a study say together, as `studies --read` wrote it: see `bench.trends`.
    Raises FileNotFoundError if it did not."""
    path = (folder or data_path("results")) / f"trend_{study}.json"
    return pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))["rows"])
