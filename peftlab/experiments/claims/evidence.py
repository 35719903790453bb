"""Comparisons of recorded runs: who scores higher, over how many seeds, at which rates.

The words are narrow. A ranking is firm only with five seeds at least on each side, learning rates
that were searched on enough examples and lie inside their grids, and a 95% interval that leaves
out zero. With less, if every seed of one side is above every seed of the other, it "leans"; else it
is not told apart. What leans is told and decides nothing.

Contests of `peftlab.bench` are ranked by `played`, pair by pair over seeds and test examples, and
corrected for all pairs of the contest; an older comparison is asked only where no contest is.

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
from peftlab.memory.adviser.evidence import LEAST_DEV

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


def played(contest: str, this: str, that: str, times: Number = 1.0) -> tuple[Outcome, str]:
    """In a contest of the bench `this` scores above `times` the score of `that`, by the runs.

    As they stand the pair has the verdict of all pairs of the contest (`bench.verdicts`, Holm).
    With a factor the p-value is multiplied by the number of those pairs. Needs the extra "sweep".
    """
    from peftlab.bench import verdicts

    facts = read(f"bench_{contest}")
    metric, runs = facts["main"], verdicts.by_label(facts, facts["runs"])
    scaled = [_times(row, metric, times) for row in runs[that]]
    found = verdicts.difference(runs[this], scaled, metric)
    chosen, rates = _chosen(facts, this, that)
    if times == 1:
        kept = {key: facts[key] for key in ("main", "entries", "runs")}
        word = _verdicts(json.dumps(kept))[this, that]
        holds = {"better": Outcome.YES, "worse": Outcome.NO}.get(word, Outcome.NOT_TOLD_APART)
    elif found.p * math.comb(len(runs), 2) < verdicts.LEVEL:
        holds = Outcome.of(found.mean > 0)
    else:
        holds = Outcome.NOT_TOLD_APART
    outcome = holds if chosen else Outcome.NOT_TOLD_APART
    share = "" if times == 1 else f"{times:g} × "
    ours, theirs = (statistics.fmean(row[metric] for row in side) for side in (runs[this], scaled))
    return outcome, (
        f"{contest}, {metric}: {this} {ours:.3g} against {share}{that} {theirs:.3g}, difference "
        f"{found.low:+.3g} to {found.high:+.3g} (95%, {found.seeds} seeds, {rates}, corrected for "
        f"{math.comb(len(runs), 2)} pairs): {outcome.value}."
    )


def _chosen(facts: dict, *labels: str) -> tuple[bool, str]:
    """Whether a contest's search could choose the rates of these entries, and in words."""
    if facts["dev examples"] < LEAST_DEV:
        return False, f"rates chosen on {facts['dev examples']} examples, too few"
    if all(all(facts["entries"][label]["inside"].values()) for label in labels):
        return True, "rates inside their grids"
    return False, "a rate at the end of its grid"


@functools.cache
def _verdicts(text: str) -> dict[tuple[str, str], str]:
    """The verdict on each ordered pair of a contest given as JSON, derived from its runs."""
    from peftlab.bench import verdicts

    turned = {"better": "worse", "worse": "better"}
    facts = json.loads(text)
    found = {(row["a"], row["b"]): row["verdict"] for row in verdicts.pairs(facts, facts["runs"])}
    return found | {(b, a): turned.get(word, word) for (a, b), word in found.items()}


def _times(row: dict, metric: str, factor: Number) -> dict:
    """A row with its score and the scores of its blocks multiplied."""
    return {**row, metric: factor * row[metric], "blocks": [factor * b for b in row["blocks"]]}


def learns_sooner(contest: str, this: str, that: str, level: Number) -> tuple[Outcome, str]:
    """In a contest of the bench the training loss of `this` falls below a level in fewer steps.

    The recorded curves have a mean loss for each of 25 parts of a run; the part in which a seed is
    first below is compared seed by seed. A run that never is counts as the part behind the last.
    """
    from peftlab.bench import verdicts

    facts = read(f"bench_{contest}")
    runs, parts = verdicts.by_label(facts, facts["runs"]), []
    for label in (this, that):
        firsts = [
            next((i for i, loss in enumerate(row["curve"]) if loss < level), len(row["curve"]))
            for row in runs[label]
        ]
        long = facts["steps"] / len(runs[label][0]["curve"])
        parts.append(
            [
                {"seed": row["seed"], "steps": long * (1 + at), "blocks": [long * (1 + at)] * 2}
                for row, at in zip(runs[label], firsts, strict=True)
            ]
        )
    found = verdicts.difference(parts[1], parts[0], "steps")
    chosen, rates = _chosen(facts, this, that)
    firm = chosen and (found.low > 0 or found.high < 0)
    outcome = Outcome.of(found.low > 0) if firm else Outcome.NOT_TOLD_APART
    ours, theirs = (statistics.fmean(row["steps"] for row in side) for side in parts)
    return outcome, (
        f"{contest}: the training loss of {this} is below {level:g} after {ours:.0f} steps, of "
        f"{that} after {theirs:.0f}, {found.low:+.0f} to {found.high:+.0f} steps between them "
        f"(95%, {found.seeds} seeds, {rates}): {outcome.value}."
    )


def everywhere(this: str, that: str, times: Number = 1.0, only: list[str] | None = None) -> list:
    """One comparison of two methods for each recorded task, or for some of them: `played` where
    there is a contest, else `higher` of an older comparison on real data."""
    found = []
    for name in only or TASKS:
        older = f"real_{name.replace('-', '_')}"
        if data_path("results", f"bench_{name}.json").exists():
            sides = {"this": LABELS.get(this, this), "that": LABELS.get(that, that)}
            found.append({"played": {"contest": name, **sides, "times": times}})
        elif data_path("results", f"{older}.json").exists():
            sides = {"this": {"label": this}, "that": {"label": that}, "times": times}
            found.append({"higher": {"file": older, "metric": read(older)["main"], **sides}})
    return found


def rate(contest: str, label: str) -> Number:
    """The learning rate that the search of a contest ended with; a blank is an underscore."""
    return read(f"bench_{contest}")["entries"][_blank(label)]["lr"]


REAL = ("pharmacy", "sst2_minilm", "sst2_smollm2", "wnut17", "e2e")  # older comparisons
TASKS = (*(name.replace("_", "-") for name in REAL), "facts", "permute", "sort")
LABELS = {"Prefix tuning": "Prefix tuning, MLP", "P-tuning v2": "Prefix tuning (P-tuning v2)"}
COMPARATORS = {
    "played": played,
    "learns_sooner": learns_sooner,
    "higher": higher,
    "reaches": reaches,
    "never_reaches": never_reaches,
    "wider": wider,
    "sooner": sooner,
}
RESULTS = frozenset(COMPARATORS)
