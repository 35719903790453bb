"""What several contests say together: scores by size, differences at equal cost, best rates, bits.

Every function takes the facts of contests as they were written, by name, and gives a table with n
and a 95% interval in each row; where rows are judged, p is corrected (Holm) for all of the table.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from peftlab.bench import verdicts
from peftlab.bench.verdicts import LEVEL, Difference, by_label, difference, level

FULL = "Full fine-tuning"
SCORED = 2  # tokens of a random label with a loss: the label and the end of text


def recorded(study: str, folder: Path) -> dict[str, dict]:
    """The contests of a study that lie in a folder. Raises FileNotFoundError if there is none."""
    paths = sorted(folder.glob(f"study_{study}-*.json"))
    if not paths:
        raise FileNotFoundError(f"no study_{study}-*.json in {folder}: the study was not run")
    return {
        path.stem.removeprefix("study_"): json.loads(path.read_text(encoding="utf-8"))
        for path in paths
    }


def levels(contests: dict[str, dict]) -> pd.DataFrame:
    """The mean score of each entry at each size, and its difference from full fine-tuning."""
    rows = []
    for name, facts in contests.items():
        for label, runs in by_label(facts, facts["runs"]).items():
            mine = level(runs, facts["main"])
            rows.append(
                {
                    "contest": name,
                    "examples": facts["train examples"],
                    "label": label,
                    "score": mine.mean,
                    "low": mine.low,
                    "high": mine.high,
                    "n": mine.seeds,
                }
            )
    table = pd.DataFrame(rows).sort_values(["contest", "examples"], kind="stable")
    judged = against(contests)[["contest", "label", "verdict"]]
    return table.merge(judged, how="left", on=["contest", "label"])


def against(contests: dict[str, dict], reference: str = FULL) -> pd.DataFrame:
    """Every entry beside a reference of its contest, or beside LoRA where that has no such entry:
    mean, low and high of the difference, and a verdict corrected for all rows."""
    rows, found = [], []
    for name, facts in contests.items():
        runs = by_label(facts, facts["runs"])
        beside = reference if reference in runs else "LoRA"
        for label in runs:
            if label != beside:
                found.append(difference(runs[label], runs[beside], facts["main"]))
                first = runs[label][0]
                costs = {key: first.get(key) for key in ("trained", "steps", "batch_size")}
                rows.append({"contest": name, "label": label, "beside": beside, **costs})
    return _judged(rows, found)


def _judged(rows: list[dict], found: list[Difference], losses: bool = False) -> pd.DataFrame:
    """Rows with their differences and verdicts, corrected for their number; a lower loss is
    better."""
    p = multipletests([each.p for each in found], method="holm")[1] if found else []
    return pd.DataFrame(
        {**row, "mean": d.mean, "low": d.low, "high": d.high, "p": float(q), "n": d.seeds}
        | {"verdict": verdicts.word(-d.mean if losses else d.mean, q)}
        for row, d, q in zip(rows, found, p, strict=True)
    )


def spread(values: np.ndarray | list[float], level: float = LEVEL) -> Difference:
    """The mean of one number a seed with Student's interval. Raises ValueError for one seed."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError("an interval needs two seeds at least")
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    if error == 0:
        return Difference(mean, mean, mean, float(mean == 0), len(values))
    freedom = len(values) - 1
    reach = stats.t.ppf(1 - level / 2, freedom) * error
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return Difference(float(mean), float(mean - reach), float(mean + reach), float(p), len(values))


def growth(contests: dict[str, dict]) -> pd.DataFrame:
    """The score of each entry by the size of its base, and its distance from full fine-tuning.

    A last row of each task and entry, `sizes` in its column `base`, is how much that distance
    changes when the base has ten times the parameters: the slope of each seed over the logarithm of
    the size, with its interval.
    """
    rows, slopes = [], {}
    for name, facts in contests.items():
        runs, task = by_label(facts, facts["runs"]), name.rsplit("-", 1)[1]
        for label in runs:
            mine, size = level(runs[label], facts["main"]), facts["base parameters"]
            row = {"task": task, "label": label, "base": facts["base"], "parameters": size}
            row |= {"score": mine.mean, "low": mine.low, "high": mine.high, "n": mine.seeds}
            rows.append(row)
            if label != FULL:
                gaps = _paired(runs[label], runs[FULL], facts["main"])
                slopes.setdefault((task, label), []).append((math.log10(size), gaps))
    for (task, label), several in slopes.items():
        if len(several) > 2:
            x = [size for size, _ in several]
            each = zip(*(gaps for _, gaps in several), strict=True)
            found = spread([np.polyfit(x, seed, 1)[0] for seed in each])
            row = {"task": task, "label": label, "base": "sizes", "score": found.mean}
            rows.append(row | {"low": found.low, "high": found.high, "n": found.seeds})
    return pd.DataFrame(rows).sort_values(["task", "label", "parameters"], kind="stable")


# -- LoRA without regret ----------------------------------------------------------------------


def penalties(contests: dict[str, dict]) -> pd.DataFrame:
    """How much higher the last training loss is than that of full fine-tuning, by batch size.

    With as many examples seen, a difference that grows with the batch is a penalty of the batch.
    """
    rows, found = [], []
    for name, facts in contests.items():
        runs = by_label(facts, facts["runs"])
        for label in runs:
            if label != FULL:
                gaps = _paired(runs[label], runs[FULL], "last_loss")
                rows.append({"contest": name, "batch": facts["batch size"], "label": label})
                found.append(spread(gaps))
    return _judged(rows, found, losses=True).sort_values(["label", "batch"], kind="stable")


def _paired(ours: list[dict], theirs: list[dict], metric: str) -> list[float]:
    """The difference of each seed that both have."""
    left, right = ({row["seed"]: row[metric] for row in rows} for rows in (ours, theirs))
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def optimum(losses: dict[float, float]) -> float:
    """The learning rate with the lowest loss: the vertex of the parabola through the best rate and
    its neighbours, over the logarithm of the rate. The best itself at an end, or where they lie on
    no such parabola."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if not 0 < at < len(rates) - 1:
        return rates[at]
    x = np.log([rates[i] for i in (at - 1, at, at + 1)])
    y = [losses[rates[i]] for i in (at - 1, at, at + 1)]
    curve, slope, _ = np.polyfit(x - x[1], y, 2)
    return float(np.exp(x[1] - slope / (2 * curve))) if curve > 1e-12 else rates[at]


def optima(facts: dict, label: str) -> dict[int, float]:
    """The best rate of each tuning seed, by the last training loss; a broken run is the worst."""
    losses: dict[int, dict[float, float]] = {}
    for row in facts["tried"]:
        if row["label"] == label:
            loss = math.log(row["last_loss"]) if not row["problem"] else math.inf
            losses.setdefault(row["seed"], {})[row["lr"]] = loss
    best = {}
    for seed, found in losses.items():
        most = max((loss for loss in found.values() if loss < math.inf), default=0.0)
        best[seed] = optimum({lr: min(loss, most + 1) for lr, loss in found.items()})
    return best


def ratio(facts: dict, label: str, beside: str = FULL) -> Difference:
    """How many times the best rate of one entry is that of another: the geometric mean over the
    tuning seeds, with its interval; p is that of a ratio of one."""
    ours, theirs = optima(facts, label), optima(facts, beside)
    logs = [math.log(ours[seed] / theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    found = spread(logs)
    mean, low, high = (math.exp(value) for value in (found.mean, found.low, found.high))
    return Difference(mean, low, high, found.p, found.seeds)


def by_rank(facts: dict) -> Difference:
    """The power of the rank that the best rate of LoRA goes with: 0 if the rank does not matter,
    −0.5 if four times the rank halve it. The slope of each seed over the entries 'LoRA, r = …'."""
    ranks = {label: int(label.rsplit(" ", 1)[1]) for label in facts["entries"] if " r = " in label}
    found = {label: optima(facts, label) for label in ranks}
    x = np.log(list(ranks.values()))
    seeds = sorted(set.intersection(*(set(each) for each in found.values())))
    slopes = [np.polyfit(x, np.log([found[label][s] for label in ranks]), 1)[0] for s in seeds]
    return spread(slopes)


def best_rates(contests: dict[str, dict]) -> pd.DataFrame:
    """For each entry the best rate, and its ratio to full fine-tuning's with an interval; in a last
    row of each contest the power of the rank."""
    rows = []
    for name, facts in contests.items():
        for label in facts["entries"]:
            logs = np.log(list(optima(facts, label).values()))
            row = {"contest": name, "label": label, "rate": math.exp(logs.mean())}
            if label != FULL:
                found = ratio(facts, label)
                row |= {"ratio": found.mean, "low": found.low, "high": found.high}
            rows.append(row | {"n": len(logs), "inside": facts["entries"][label]["inside"]["lr"]})
        power = by_rank(facts)
        rows.append(
            {"contest": name, "label": "power of the rank", "ratio": power.mean}
            | {"low": power.low, "high": power.high, "n": power.seeds}
        )
    return pd.DataFrame(rows)


def bits(loss: float, number: int, classes: int) -> float:
    """Bits that are stored of so many random labels, by the mean training loss in nats a token.

    The end of text behind a label is among the tokens and is counted as if its loss were the
    label's, so it is never too many. A model that knows only the classes has a loss of
    log(classes), and stores nothing.
    """
    return number * max(0.0, math.log2(classes) - SCORED * loss / math.log(2))


def capacity(contests: dict[str, dict]) -> pd.DataFrame:
    """Stored bits and bits for each trained number, by how many labels there were to learn."""
    rows = []
    for name, facts in contests.items():
        number, classes = (facts["options"][name] for name in ("number", "classes"))
        for label, runs in by_label(facts, facts["runs"]).items():
            found = spread([bits(row["last_loss"], number, classes) for row in runs])
            trained = runs[0]["trained"]
            rows.append(
                {"contest": name, "labels": number, "label": label, "trained": trained}
                | {"bits": found.mean, "low": found.low, "high": found.high, "n": found.seeds}
                | {"bits a number": found.mean / trained}
            )
    return pd.DataFrame(rows).sort_values(["label", "labels"], kind="stable")
