"""Which differences are more than chance: better, worse, or not told apart.

Two entries are compared seed by seed: with one seed they saw the same batches in the same order. A
difference of means varies for two reasons, the seeds and the examples of the test, so its variance
is the sum of two: that of the paired differences over the seeds, divided by their number, and that
of a jackknife over the blocks of test examples, each left out in turn. The 95% interval takes
Student's t with the degrees of freedom of Welch and Satterthwaite. The p-values of all comparisons
that are made at a time are corrected by Holm's method, and the word follows the corrected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

LEVEL = 0.05
FEWEST = 5  # seeds that a verdict needs
WORDS = ("better", "worse", "not told apart")


@dataclass(frozen=True)
class Difference:
    """The mean of a − b with its 95% interval; `p` is not corrected for other comparisons."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def difference(a: list[dict], b: list[dict], metric: str) -> Difference:
    """The difference of two entries' test runs.

    A row has its seed, the metric, and `blocks`, the metric with one block of examples left out.
    Rows without a seed, of an answer that needs no training, stand beside each row of the other.
    Raises ValueError for fewer than five seeds in common, and for blocks of different numbers.
    """
    left, right = _by_seed(a), _by_seed(b)
    if None in left and None not in right:
        left = dict.fromkeys(right, left[None])
    if None in right and None not in left:
        right = dict.fromkeys(left, right[None])
    seeds = sorted(left.keys() & right.keys() - {None})
    if len(seeds) < FEWEST:
        raise ValueError(f"{len(seeds)} seeds in common: a verdict needs at least {FEWEST}")
    d = np.array([left[s][metric] - right[s][metric] for s in seeds])
    try:
        blocks = np.array([left[s]["blocks"] for s in seeds])
        blocks = blocks - np.array([right[s]["blocks"] for s in seeds])
    except ValueError as error:
        raise ValueError(f"blocks of different numbers: {error}") from error
    return _spread(d, blocks)


def level(rows: list[dict], metric: str) -> Difference:
    """The mean score of one entry's test runs with its interval, as a difference from nothing."""
    return _spread(np.array([r[metric] for r in rows]), np.array([r["blocks"] for r in rows]))


def _spread(values: np.ndarray, blocks: np.ndarray) -> Difference:
    """The mean of the values (seeds,) with its interval; blocks (seeds, number of blocks)."""
    left_out, number = blocks.mean(axis=0), blocks.shape[1]  # the mean without each block
    jackknife = (number - 1) / number * ((left_out - left_out.mean()) ** 2).sum()
    parts = np.array([values.var(ddof=1) / len(values), jackknife])
    variance, degrees = parts.sum(), np.array([len(values) - 1, number - 1])
    mean = float(values.mean())
    if variance == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, len(values))
    freedom = variance**2 / (parts**2 / degrees).sum()
    error = float(np.sqrt(variance))
    reach = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - reach, mean + reach, p, len(values))


def _by_seed(rows: list[dict]) -> dict[int | None, dict]:
    return {row["seed"]: row for row in rows}


def verdicts(runs: dict[str, list[dict]], metric: str, against: str | None = None) -> pd.DataFrame:
    """Every pair of entries, or every entry against one of them, as a table of verdicts.

    `runs` are the test rows by label. The columns are a, b, mean, low, high, p (corrected by
    Holm for all rows of the table), seeds and verdict, which says what a is beside b.
    """
    if against is None:
        pairs = list(combinations(runs, 2))
    else:
        pairs = [(label, against) for label in runs if label != against]
    found = [difference(runs[a], runs[b], metric) for a, b in pairs]
    corrected = multipletests([each.p for each in found], method="holm")[1] if found else []
    rows = [
        {"a": a, "b": b, **vars(each), "p": float(p), "verdict": word(each.mean, p)}
        for (a, b), each, p in zip(pairs, found, corrected, strict=True)
    ]
    return pd.DataFrame(rows)


def word(mean: float, p: float) -> str:
    """What a difference says, by its sign and its corrected p-value."""
    if p >= LEVEL:
        return WORDS[2]
    return WORDS[0] if mean > 0 else WORDS[1]


def by_label(facts: dict, runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each entry of a contest."""
    return {label: [row for row in runs if row["label"] == label] for label in facts["entries"]}


def pairs(facts: dict, runs: list[dict]) -> list[dict]:
    """The verdict on every pair of a contest's entries, ready for JSON."""
    table = verdicts(by_label(facts, runs), facts["main"])
    return table.round({"mean": 4, "low": 4, "high": 4, "p": 6}).to_dict("records")


def comparisons(facts: dict, runs: list[dict]) -> list[dict]:
    """What a contest says of each entry beside all others, ready for JSON.

    `better_than` and `worse_than` are labels, by the verdicts on all pairs; `interval` is the 95%
    interval of the mean score, `n` its seeds.
    """
    main, labels = facts["main"], list(facts["entries"])
    rows = by_label(facts, runs)
    table = verdicts(rows, main)
    found = []
    for label in labels:
        mine = level(rows[label], main)
        won = table[(table.a == label) & (table.verdict == "better")].b.tolist()
        won += table[(table.b == label) & (table.verdict == "worse")].a.tolist()
        lost = table[(table.a == label) & (table.verdict == "worse")].b.tolist()
        lost += table[(table.b == label) & (table.verdict == "better")].a.tolist()
        found.append(
            {
                "task": facts["options"].get("skill", facts["task"]),
                "base": facts["base"],
                "label": label,
                "better_than": [each for each in labels if each in won],
                "worse_than": [each for each in labels if each in lost],
                "n": mine.seeds,
                "mean": round(mine.mean, 4),
                "interval": [round(mine.low, 4), round(mine.high, 4)],
            }
        )
    return found
