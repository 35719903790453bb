"""Comparisons of recorded runs: who scores higher, over how many seeds, at which rates.

The words are narrow. A ranking is firm only with five seeds at least on each side, learning rates
that were searched and lie inside their grids, and a 95% interval that leaves out zero. With less,
if every seed of one side is above every seed of the other, it "leans"; else it is not told apart.

That something works at all is no ranking: one setting in which it works is enough, so three runs
that all clear a level decide it, whatever the rate.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import statistics

from peftlab.bases.data import data_path

SEEDS = 5  # fewer never decide a ranking
RUNS = 3  # fewer never show that something works
Number = int | float
AT_THE_END = ("at_the_end_of_its_grid", "at the end of its grid")


class Outcome(enum.Enum):
    """What a proposition gave."""

    YES = "yes"
    NO = "no"
    LEANS_YES = "leans yes"
    LEANS_NO = "leans no"
    NOT_TOLD_APART = "not told apart"

    @classmethod
    def of(cls, holds: bool) -> Outcome:
        return cls.YES if holds else cls.NO


@functools.cache
def read(file: str) -> dict:
    """One file of `data/results`, without its ending."""
    return json.loads(data_path("results", f"{file}.json").read_text(encoding="utf-8"))


def found(file: str, where: dict, rows: str = "runs") -> list[dict]:
    """The rows in which all these fields have these values. Raises LookupError if there are none.

    A field may lie deeper: `measured.peak`.
    """
    matching = [
        row
        for row in read(file)[rows]
        if all(_field(row, name) == value for name, value in where.items())
    ]
    if not matching:
        raise LookupError(f"{file}: no row of {rows} with {where}")
    return matching


def scores(file: str, where: dict, metric: str, rows: str = "runs") -> list[Number]:
    """The metric of these rows, those without it left out."""
    values = [_field(row, metric) for row in found(file, where, rows)]
    values = [value for value in values if value is not None]
    if not values:
        raise LookupError(f"{file}: no {metric!r} in the rows of {where}")
    return values


def entry(file: str, *path: str) -> Number:
    """One number of a file, by the names that lead to it."""
    value = read(file)
    for name in path:
        value = value[name]
    return value


def result(file: str, metric: str, rows: str = "runs", **where) -> Number:
    """The mean of a metric over the rows in which these fields have these values; an underscore in
    a value stands for a blank, and in the metric a colon."""
    where = {key: _blank(value) for key, value in where.items()}
    return statistics.fmean(scores(file, where, metric.replace(":", " "), rows))


def higher(
    file: str, metric: str, this: dict, that: dict, times: Number = 1.0, rows: str = "runs"
) -> tuple[Outcome, str]:
    """`this` scores above `times` the score of `that`."""
    ours, theirs = (scores(file, where, metric, rows) for where in (this, that))
    theirs = [times * score for score in theirs]
    return _ranked(file, metric, this, that, ours, theirs, rows, times)


def _ranked(
    file: str,
    what: str,
    this: dict,
    that: dict,
    ours: list[Number],
    theirs: list[Number],
    rows: str,
    times: Number = 1.0,
) -> tuple[Outcome, str]:
    n = min(len(ours), len(theirs))
    low, high = interval(ours, theirs)
    inside = _inside(file, this, rows) and _inside(file, that, rows)
    if n >= SEEDS and inside and (low > 0 or high < 0):
        outcome = Outcome.of(low > 0)
    elif min(ours) > max(theirs):
        outcome = Outcome.LEANS_YES
    elif max(ours) < min(theirs):
        outcome = Outcome.LEANS_NO
    else:
        outcome = Outcome.NOT_TOLD_APART
    share = "" if times == 1 else f"{times:g} × "
    rates = "rates inside their grids" if inside else "a rate at the end of its grid, or not tuned"
    return outcome, (
        f"{file}, {what}: {_named(this)} {statistics.fmean(ours):.3g} against {share}"
        f"{_named(that)} {statistics.fmean(theirs):.3g}, difference {low:+.3g} to {high:+.3g} "
        f"(95%, {n} seeds, {rates}): {outcome.value}."
    )


def reaches(
    file: str, metric: str, where: dict, at_least: Number, rows: str = "runs"
) -> tuple[Outcome, str]:
    """Every run clears a level: it works there."""
    values = scores(file, where, metric, rows)
    holds = len(values) >= RUNS and min(values) >= at_least
    outcome = Outcome.of(holds) if holds else Outcome.NOT_TOLD_APART
    return outcome, (
        f"{file}, {metric}: {_named(where)} reaches {min(values):.3f} at least in {len(values)} "
        f"runs; the level asked is {at_least:g}: {outcome.value}."
    )


def never_reaches(
    file: str, metric: str, where: dict, at_least: Number, rows: str = "runs"
) -> tuple[Outcome, str]:
    """It does not work there. Runs that all clear the level say no; others say nothing, because
    another setting might clear it."""
    outcome, sentence = reaches(file, metric, where, at_least, rows)
    if outcome is Outcome.YES:
        return Outcome.NO, sentence.replace(": yes.", ", a counterexample: no.")
    return outcome, sentence


def wider(
    file: str, metric: str, this: dict, that: dict, rows: str = "runs"
) -> tuple[Outcome, str]:
    """Seeds of `this` lie further from their median than those of `that` (Brown and Forsythe)."""
    far = []
    for where in (this, that):
        values = scores(file, where, metric, rows)
        far.append([abs(value - statistics.median(values)) for value in values])
    return _ranked(file, f"distance of {metric} from its median", this, that, *far, rows)


def sooner(
    file: str, metric: str, this: dict, that: dict, level: Number, looks: str = "looks"
) -> tuple[Outcome, str]:
    """`this` comes to a level of the metric in fewer steps than `that`; every run has its looks."""
    steps = []
    for where in (this, that):
        seen = [
            [look for look in row[looks] if look[metric] >= level] for row in found(file, where)
        ]
        if not all(seen):
            raise LookupError(f"{file}: not every run of {where} comes to {metric} = {level}")
        steps.append([float(reached[0]["step"]) for reached in seen])
    return _ranked(file, f"steps to {metric} of {level:g}", that, this, *steps[::-1], "runs")


def interval(ours: list[Number], theirs: list[Number]) -> tuple[Number, Number]:
    """The 95% interval of the difference of means, the seeds of both sides independent (Welch)."""
    a, b = (statistics.variance(s) / len(s) if len(s) > 1 else 0.0 for s in (ours, theirs))
    middle, width = statistics.fmean(ours) - statistics.fmean(theirs), 0.0
    if a + b:
        parts = [v**2 / (len(s) - 1) for v, s in ((a, ours), (b, theirs)) if len(s) > 1]
        freedom = int((a + b) ** 2 / sum(parts))
        width = student(max(freedom, 1)) * (a + b) ** 0.5
    return middle - width, middle + width


@functools.cache
def student(freedom: int, share: Number = 0.95, cells: int = 2000) -> Number:
    """The t with this share of Student's distribution between −t and t, by Simpson's rule.

    >>> round(student(1), 2), round(student(4), 3)
    (12.71, 2.776)
    """
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(log) / math.sqrt(freedom * math.pi)

    def inside(t: Number) -> Number:  # x = √n tan θ makes the density a power of a cosine
        end = math.atan(t / math.sqrt(freedom))
        heights = [math.cos(end * i / cells) ** (freedom - 1) for i in range(cells + 1)]
        summed = heights[0] + heights[-1] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2])
        return 2 * scale * math.sqrt(freedom) * summed * end / (3 * cells)

    low, high = 0.0, 1e3
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < share else (low, middle)
    return high


def _inside(file: str, where: dict, rows: str) -> bool:
    """Whether the rate of these runs was searched and is not at an end of what was tried."""
    marks = [row.get(mark) for row in found(file, where, rows) for mark in AT_THE_END]
    marks = [mark for mark in marks if mark is not None]
    return bool(marks) and not any(marks)


def _field(row: dict, name: str):
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _blank(value):
    return value.replace("_", " ") if isinstance(value, str) else value


def _named(where: dict) -> str:
    return ", ".join(str(value) for value in where.values())


def everywhere(this: str, that: str, times: Number = 1.0, only: list[str] | None = None) -> list:
    """`higher` of two methods on the main metric of every comparison on real data, or of some."""
    files = [f"real_{name}" for name in only or REAL]
    sides = {"this": {"label": this}, "that": {"label": that}, "times": times}
    return [{"higher": {"file": file, "metric": read(file)["main"], **sides}} for file in files]


REAL = ("pharmacy", "sst2_minilm", "sst2_smollm2", "wnut17", "e2e")
COMPARATORS = {
    "higher": higher,
    "reaches": reaches,
    "never_reaches": never_reaches,
    "wider": wider,
    "sooner": sooner,
}
RESULTS = frozenset(COMPARATORS)
