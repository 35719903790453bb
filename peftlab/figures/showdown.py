"""A comparison explained: how rates were searched, what two methods differ by, who is beaten."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from peftlab.bench.results import Result
from peftlab.figures.sheet import NORMAL, SMALL, WIDTH, Sheet, number, width_of
from peftlab.figures.style import (
    BLACK,
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    VERMILLION,
    figure,
    method_key,
    styles,
)
from peftlab.figures.theme import theme

LEFT = 14
WORDS = {
    "stored": "numbers stored for a task",
    "trained": "numbers trained",
    "file_bytes": "bytes of a task's file",
    "peak": "peak memory of a step, bytes",
}


def colour_of(label: str) -> str:
    """The colour of the method that a label speaks of."""
    key = method_key(label)
    return COLOURS[key] if key else BLUE


def short(value: float) -> str:
    """A large number in few letters: 3,840 or 166k or 3.1M."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:,.0f}k" if value < 1e6 else f"{value / 1e6:,.1f}M"


# --- how a contest goes ------------------------------------------------------------------------


def contest_course(result: Result, dark: bool | None = None) -> go.Figure:
    """A contest from its first rates to its verdicts, with the number of runs at each station."""
    facts = result.facts
    entries, seeds = len(facts["entries"]), len(facts["seeds"])
    ends = len(result.tried), len(result.runs), entries * (entries - 1) // 2
    stations = (
        ("A guess", "three rates<br>around it", f"{entries} methods"),
        ("Search on dev", f"{len(facts['tuning seeds'])} seeds a rate", f"{ends[0]} runs"),
        ("New seeds", f"{seeds} at the rate<br>that was found", f"{ends[1]} runs"),
        ("The test", "read once<br>for each run", f"{facts['test examples']} examples"),
        ("Differences", "seed by seed,<br>corrected together", f"{ends[2]} pairs"),
    )
    wide, top, high = (WIDTH - 2 * LEFT) / len(stations), 48, 84
    told = "; ".join(f"{a}: {b.replace('<br>', ' ')}, {c}" for a, b, c in stations)
    title = "How a winner is found: most of the runs are spent on being fair"
    alt = f"{title}. {told}. If the best rate is at an end, one more is tried."
    s = Sheet(title, top + high + 44, alt, dark)
    for at, (name, words, count) in enumerate(stations):
        x = LEFT + at * wide
        s.box(x, top, wide - 30, high)
        s.text(x + (wide - 30) / 2, top + 18, f"<b>{name}</b>", NORMAL, align="center")
        s.text(x + (wide - 30) / 2, top + 52, words, SMALL, align="center")
        s.text(x + (wide - 30) / 2, top + high + 18, count, NORMAL, s.theme.text(BLUE), "center")
        if at < len(stations) - 1:
            s.arrow([(x + wide - 29, top + high / 2), (x + wide - 3, top + high / 2)])
    x = LEFT + wide
    loop = [(x + 90, top), (x + 90, top - 16), (x + 30, top - 16), (x + 30, top - 2)]
    s.arrow(loop, s.theme.line(GREEN))
    s.text(x + 60, top - 28, "best at an end? one rate more", SMALL, align="center")
    return s.done()


# --- how a rate was found ----------------------------------------------------------------------


def rate_search(
    result: Result, labels: Sequence[str], title: str, dark: bool | None = None
) -> go.Figure:
    """The rungs that each entry tried, with its mean score on dev, and the rate that it took."""
    tried = result.tried[result.tried.label.isin(labels)]
    table = tried.groupby(["label", "lr"])[result.main].mean().unstack()
    rates, start, row = sorted(table.columns), 196, 38
    wide = (WIDTH - start - LEFT) / len(rates)
    words, high = [], row * len(labels) + 62
    s = Sheet(title, high, "", dark)
    for at, label in enumerate(labels):
        y, chosen = at * row + 6, result.settled.lr[label]
        colour = colour_of(label)
        s.text(LEFT, y + 14, label, NORMAL)
        for i, rate in enumerate(rates):
            x, score = start + i * wide, table.loc[label, rate]
            if np.isnan(score):
                continue
            best = rate == chosen
            s.matrix(x, y, wide - 6, 28, colour=colour if best else "")
            fill = s.theme.fill(colour) if best else s.theme.frozen
            told = f"<b>{score:.0%}</b>" if best else f"{score:.0%}"
            s.text(x + (wide - 6) / 2, y + 14, told, SMALL, s.theme.on(fill), "center")
        tries = ", ".join(f"{r:g}: {v:.0%}" for r, v in table.loc[label].dropna().items())
        words.append(f"{label} tried {tries} and took {chosen:g}")
    y = row * len(labels) + 10
    for i, rate in enumerate(rates):
        s.text(start + i * wide + (wide - 6) / 2, y + 4, f"{rate:g}", SMALL, align="center")
    s.text(LEFT, y + 4, "learning rate", SMALL, s.theme.quiet)
    seeds = ("two", "three", "four", "five")[len(result.facts["tuning seeds"]) - 2]
    s.text(LEFT, y + 28, f"In each box: the score on dev, the mean of {seeds} tuning seeds. "
           "Coloured: the rate that is taken.", SMALL, s.theme.quiet)  # fmt: skip
    fig = s.done()
    fig.layout.meta["alt"] = f"{title}. {'; '.join(words)}."
    return fig


# --- what two entries differ by ----------------------------------------------------------------


def paired_seeds(
    pairs: Mapping[str, tuple[Result, str, str]], title: str, dark: bool | None = None
) -> go.Figure:
    """For each pair (result, a, b), titled: both scores seed by seed, and a − b with its interval.

    The interval is that of this pair, as it was recorded.
    """
    wide, top, high = (WIDTH - 2 * LEFT) / len(pairs), 40, 180
    s, words = Sheet(title, high + top + 62, "", dark), []
    for at, (name, (result, a, b)) in enumerate(pairs.items()):
        x0, main = LEFT + at * wide, result.main
        rows = {each: result.runs[result.runs.label == each].sort_values("seed") for each in (a, b)}
        found = result.difference(a, b)
        s.text(x0 + wide / 2 - 14, 12, f"<b>{name}</b>", NORMAL, align="center")
        left, right, own = x0 + 46, x0 + wide * 0.46, x0 + wide * 0.72

        def height(share):
            return top + high * (1 - share)

        for share in (0, 0.5, 1):
            s.line([(left - 8, height(share)), (right + 8, height(share))], s.theme.faint, 1)
            s.text(left - 12, height(share), f"{share:.0%}", SMALL, s.theme.quiet, "right")
        for x, each in ((left, a), (right, b)):
            s.text(x, top + high + 18, each.split(" (P-")[0], SMALL, align="center")
        values = [rows[each][main].to_numpy() for each in (a, b)]
        for one, other in zip(*values, strict=True):
            s.line([(left, height(one)), (right, height(other))], s.theme.edge, 1.2)
        for x, each, scores in zip((left, right), (a, b), values, strict=True):
            for seed, score in enumerate(scores):
                s.dot(x, height(score), s.theme.line(colour_of(each)),
                      f"{each}, seed {seed}: {score:.0%}")  # fmt: skip

        def apart(value):
            return top + high * (0.5 - value / 2)

        for value in (-1, 0, 1):
            ink = s.theme.ink if value == 0 else s.theme.faint
            s.line([(own - 34, apart(value)), (own + 44, apart(value))], ink, 1)
            told = f"{value:+.0%}".replace("-", "−") if value else "0"
            s.text(own + 48, apart(value), told, SMALL, s.theme.quiet)
        for seed, value in enumerate(values[0] - values[1]):
            s.dot(own - 14, apart(value), hover=f"seed {seed}: {value:+.0%}")
        low, up = max(found.low, -1.1), min(found.high, 1.1)
        ink = s.theme.line(GREEN)
        s.line([(own + 16, apart(low)), (own + 16, apart(up))], ink, 4)
        s.line([(own + 8, apart(found["mean"])), (own + 24, apart(found["mean"]))], ink, 4)
        s.text(own + 5, top + high + 18, "difference", SMALL, align="center")
        over = "touches 0" if found.low <= 0 <= found.high else "leaves out 0"
        s.text(x0 + wide / 2 - 14, top + high + 42, f"95% interval {number(100 * found.low, 0)} to "
               f"{number(100 * found.high, 0)} points: {over}", NORMAL, align="center")  # fmt: skip
        told = f"from {found.low:.0%} to {found.high:.0%}; the interval {over}"
        words.append(f"{name}: {a} minus {b} is {found['mean']:.0%} on average of {found.seeds} "
                     f"seeds, {told}")  # fmt: skip
    fig = s.done()
    fig.layout.meta["alt"] = f"{title}. {'. '.join(words)}."
    return fig


# --- who is beaten -----------------------------------------------------------------------------


def means(result: Result, cost: str = "stored", score: str = ""):
    """The mean score and the cost of each entry, cheap ones first."""
    table = result.runs.groupby("label")[[score or result.main, cost]].mean()
    return table.rename(columns={score or result.main: "score", cost: "cost"}).sort_values("cost")


def front(table) -> list[str]:
    """The labels that no other is as good as for less, in the order of their cost.

    `table` has the columns "score" and "cost". Of equal ones all stand.
    """
    found = []
    for label, (score, cost) in table[["score", "cost"]].iterrows():
        others = table.drop(index=label)
        as_good = (others.score >= score) & (others.cost <= cost)
        better = (others.score > score) | (others.cost < cost)
        if not (as_good & better).any():
            found.append(label)
    return sorted(found, key=lambda label: (table.cost[label], -table.score[label]))


def domination(
    result: Result, label: str, title: str, cost: str = "stored", dark: bool | None = None
) -> go.Figure:
    """What stands above and to the left of one entry beats it; what no other beats is the front."""
    table, x0, x1, top, high = means(result, cost), 70, WIDTH - 30, 24, 270
    s = Sheet(title, high + 84, "", dark)
    logs = np.log10(table.cost)
    low, up = logs.min() - 0.3, logs.max() + 0.3

    def place(name):
        x = x0 + (logs[name] - low) / (up - low) * (x1 - x0)
        return x, top + high * (1.05 - table.score[name]) / 1.1

    x, y = place(label)
    s.area([(x0, top), (x, top), (x, y), (x0, y)], s.theme.tint(GREEN))
    s.area([(x, y), (x1, y), (x1, top + high), (x, top + high)], s.theme.faint)
    s.text(x0 + 8, top + 22, f"as good or better<br>for less: would<br>beat {label}", SMALL,
           s.theme.on(s.theme.tint(GREEN)))  # fmt: skip
    s.text(x1 - 8, top + high - 14, f"no better, and dearer: {label} beats it", SMALL,
           s.theme.on(s.theme.faint), "right")  # fmt: skip
    s.line([(x0, top), (x0, top + high), (x1, top + high)], s.theme.edge, 1.2)
    for share in (0, 0.5, 1):
        s.text(x0 - 8, top + high * (1.05 - share) / 1.1, f"{share:.0%}", SMALL, align="right")
    for power in range(int(np.ceil(low)), int(np.floor(up)) + 1):
        at = x0 + (power - low) / (up - low) * (x1 - x0)
        s.line([(at, top + high), (at, top + high + 5)], s.theme.edge, 1)
        s.text(at, top + high + 16, f"{10**power:,}", SMALL, align="center")
    s.text((x0 + x1) / 2, top + high + 40, WORDS[cost], NORMAL, align="center")
    best = front(table)
    points = [(x0, top + high)]
    for name in best:
        at, up_to = place(name)
        points += [(at, points[-1][1]), (at, up_to)]
    s.line([*points[1:], (x1, points[-1][1])], s.theme.line(GREEN), 2.5)
    for name in table.index:
        s.dot(*place(name), s.theme.line(colour_of(name)),
              f"{name}: {table.score[name]:.0%}, {short(table.cost[name])}")  # fmt: skip
    taken = [(x0, top, x, y), (x1 - 190, top + high - 22, x1, top + high)]
    for (xa, ya), (xb, yb) in pairwise(points[1:] + [(x1, points[-1][1])]):
        taken.append((min(xa, xb) - 2, min(ya, yb) - 2, max(xa, xb) + 2, max(ya, yb) + 2))
    within = (x0 + 2, 0, WIDTH, top + high - 2)
    _names(s, {name: place(name) for name in table.index}, taken, within)
    fig = s.done()
    told = "; ".join(f"{n}: {table.score[n]:.0%} for {short(table.cost[n])}" for n in best)
    fig.layout.meta["alt"] = f"{title}. On the front, by {WORDS[cost]}: {told}."
    return fig


def _names(s: Sheet, places: Mapping[str, tuple], taken: list[tuple], within: tuple) -> None:
    """The name of each point beside it, where it covers no point, no name and nothing `taken`.

    Points that lie together share a line of text. What finds no room at its point is written a
    line or two further away, at the end of a thin line. Boxes are (left, top, right, bottom).
    """

    def free(box: tuple) -> bool:
        inside = all(a >= b for a, b in zip(box[:2], within[:2], strict=True))
        inside &= all(a <= b for a, b in zip(box[2:], within[2:], strict=True))
        return inside and not any(
            box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken
        )

    together: dict[tuple, list[str]] = {}
    for name, (x, y) in sorted(places.items(), key=lambda pair: pair[1]):
        near = [at for at in together if abs(at[0] - x) < 12 and abs(at[1] - y) < 6]
        together.setdefault(near[0] if near else (x, y), []).append(name)
    taken = taken + [(x - 6, y - 6, x + 6, y + 6) for x, y in places.values()]
    for (x, y), names in together.items():
        words = ", ".join(names)
        wide = width_of(words, SMALL)
        for up, left in product((0, 12, -12, 29, -29), (x + 8, x - 8 - wide)):
            box = (left, y + up - 6, left + wide, y + up + 6)
            low, high = sorted((y + up, y + (7 if up > 0 else -7)))
            thin = [(x - 1, low, x + 1, high)] if abs(up) > 15 else []
            if all(free(part) for part in [box, *thin]):
                break
        if thin:
            s.line([(x, y), (x, y + up), (x + (5 if left > x else -5), y + up)], s.theme.quiet, 0.8)
        s.text(left, y + up, words, SMALL)
        taken += [box, *thin]


def best_under(results: Mapping[str, Result], title: str, cost: str = "stored") -> go.Figure:
    """The highest mean score that a budget buys, a line for each task, and who reaches it."""
    fig = figure(title, f"budget: {WORDS[cost]}", "best mean test score", height=430)
    end = 2 * max(means(result, cost).cost.max() for result in results.values())
    for at, (name, result) in enumerate(results.items()):
        table = means(result, cost)
        steps, best = [], -1.0
        for label, (score, price) in table.iterrows():
            if score > best + 0.005:  # half a point, so that no winner is made of nothing
                best, steps = score, [*steps, (label, price, score)]
        names, x, y = zip(*steps, strict=True)
        fig.add_scatter(
            x=[*x, end], y=[*y, y[-1]], name=name, mode="lines+markers",
            line=dict(shape="hv", dash=DASHES[at], color=(BLUE, GREEN, GREY)[at]), marker_size=8,
            customdata=[*names, names[-1]], hovertemplate="%{customdata}: %{y:.0%}",
        )  # fmt: skip
        ink = theme().text((BLUE, GREEN, GREY)[at])
        for label, price, score in steps:
            high = at % 2 == 0
            fig.add_annotation(
                x=np.log10(price), y=score, text=label.split(" (P-")[0], showarrow=False,
                xanchor="left" if high else "right", yanchor="bottom" if high else "top",
                xshift=4 if high else -4, font=dict(size=12, color=ink),
                bgcolor=theme().paper, borderpad=0,
            )  # fmt: skip
    fig.update_xaxes(type="log", range=[3.1, np.log10(end)])
    fig.update_yaxes(range=[-0.08, 1.15], tickformat=".0%")
    return fig.update_layout(legend=dict(x=0.99, y=0.05, xanchor="right", yanchor="bottom"))


def turned(knobs: Mapping[str, Mapping[str, Result]], title: str, lowest: float = 0.0) -> go.Figure:
    """Every method's test score while one knob is turned; a panel for each knob.

    `knobs` has the settings of each knob in order, with the contest that was held there. A line
    joins the means, and a small point is one seed. Methods that are missing at a setting are left
    out there, and so are those whose rate is not inside what was searched. The axis begins a little
    under `lowest`, the score of a guess.
    """
    fig = make_subplots(1, len(knobs), shared_yaxes=True, horizontal_spacing=0.05)
    labels = dict.fromkeys(
        label for each in knobs.values() for r in each.values() for label in r.facts["entries"]
    )
    drawn = styles(labels)
    for column, (knob, contests) in enumerate(knobs.items(), 1):
        for at, label in enumerate(labels):
            style, aside = drawn[label], 0.03 * (at - (len(labels) - 1) / 2)
            scores = {
                place: r.runs[r.runs.label == label].sort_values("seed")[r.main].tolist()
                for place, r in enumerate(contests.values())
                if label in r.facts["entries"] and all(r.settled.inside[label].values())
            }
            x = [place + aside for place in scores]
            fig.add_scatter(
                x=x, y=[np.mean(several) for several in scores.values()], name=label,
                legendgroup=label, showlegend=column == 1, mode="lines+markers",
                line=dict(color=style["colour"], dash=style["dash"]),
                marker=dict(symbol=style["marker"], size=9), row=1, col=column,
                hovertemplate="mean %{y:.0%}",
            )  # fmt: skip
            seeds = [score for several in scores.values() for score in several]
            fig.add_scatter(
                x=[place for place, s in zip(x, scores.values(), strict=True) for _ in s], y=seeds,
                legendgroup=label, showlegend=False, mode="markers", name=f"{label}, one seed",
                marker=dict(color=style["colour"], size=5, opacity=0.45), row=1, col=column,
                hovertemplate="%{y:.0%}",
            )  # fmt: skip
        fig.update_xaxes(
            title_text=knob, tickvals=list(range(len(contests))), ticktext=list(contests),
            range=[-0.25, len(contests) - 0.75], row=1, col=column,
        )  # fmt: skip
    room = 0.04 * (1 - lowest)
    fig.update_yaxes(range=[lowest - room, 1 + room], tickformat=".0%")
    fig.update_yaxes(title_text="test score", col=1)
    return fig.update_layout(
        template=theme().template, title_text=title, height=470, margin_b=130,
        legend=dict(orientation="h", y=-0.22, yanchor="top", x=0),
    )  # fmt: skip


# --- several contests side by side -------------------------------------------------------------


def apart_from(results: Mapping[str, Result], label: str, title: str) -> go.Figure:
    """What every other entry differs by from one entry, in points of the score: a panel a contest.

    A bar is the 95% interval of the paired difference. Filled points are told apart once all pairs
    of the contest are corrected together; open ones are not. The entries are in the order of their
    mean place over the contests, the best on top.
    """
    tables = {}
    for name, result in results.items():
        others = [each for each in result.facts["entries"] if each != label]
        found = {each: result.difference(each, label) for each in others}
        tables[name] = {
            each: (100 * row["mean"], 100 * row.low, 100 * row.high, row.verdict)
            for each, row in found.items()
        }
    places: dict[str, list[float]] = {}
    for table in tables.values():
        for at, each in enumerate(sorted(table, key=lambda each: -table[each][0])):
            places.setdefault(each, []).append(at / len(table))
    order = sorted(places, key=lambda each: np.mean(places[each]))
    fig = make_subplots(
        1, len(tables), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=list(tables)
    )
    looks = {
        "better": (GREEN, "circle", "better"),
        "worse": (VERMILLION, "circle", "worse"),
        "not told apart": (GREY, "circle-open", "not told apart"),
    }
    for column, table in enumerate(tables.values(), 1):
        for word, (colour, symbol, told) in looks.items():
            mine = [each for each in order if each in table and table[each][3] == word]
            if not mine:
                continue
            mean, low, high = ([table[each][i] for each in mine] for i in range(3))
            ink = theme().line(colour)
            fig.add_scatter(
                x=mean, y=mine, mode="markers", name=told, legendgroup=told, showlegend=False,
                marker=dict(color=ink, symbol=symbol, size=10, line=dict(color=ink, width=1.5)),
                error_x=dict(
                    symmetric=False, color=ink, thickness=1.5, width=3,
                    array=np.subtract(high, mean), arrayminus=np.subtract(mean, low),
                ),
                hovertemplate="%{y}: %{x:+.1f} points", row=1, col=column,
            )  # fmt: skip
        fig.add_vline(x=0, line=dict(color=theme().line(BLACK), width=1), row=1, col=column)
    for word, (colour, symbol, told) in looks.items():  # the legend, whoever is in which panel
        if any(row[3] == word for table in tables.values() for row in table.values()):
            fig.add_scatter(
                x=[None], y=[order[0]], mode="markers", name=told, legendgroup=told,
                marker=dict(color=theme().line(colour), symbol=symbol, size=10),
            )  # fmt: skip
    fig.update_xaxes(title_text="points", zeroline=False, nticks=4, tickangle=0)
    fig.update_yaxes(
        categoryorder="array",
        categoryarray=order[::-1],
        automargin=True,
        range=[-0.6, len(order) - 0.4],
    )
    return fig.update_layout(
        template=theme().template, title_text=title, height=110 + 27 * len(order) + 60,
        margin=dict(t=96, b=92), legend=dict(orientation="h", y=-0.19, yanchor="top", x=0),
    )  # fmt: skip


# --- many tenants ------------------------------------------------------------------------------


def tenants(
    base: str, base_bytes: int, kinds: Mapping[str, int], counts: Sequence[int],
    dark: bool | None = None,
) -> go.Figure:  # fmt: skip
    """What a server holds for several customers, every area to one scale.

    `kinds` are the bytes of one customer's own part; a whole model of their own has `base_bytes`,
    and then no base is shared.
    """
    totals = {
        (kind, n): n * size + (0 if size >= base_bytes else base_bytes)
        for kind, size in kinds.items() for n in counts
    }  # fmt: skip
    largest, row = max(totals.values()), 46
    scale = 150 / largest**0.5
    top = 34
    heights = [max(row, scale * max(totals[kind, n] for kind in kinds) ** 0.5 + 30) for n in counts]
    title = f"What a server of {base} holds: areas to one scale"
    s, words = Sheet(title, top + sum(heights) + 8, "", dark), []
    wide, y = (WIDTH - 130) / len(kinds), top
    for at, kind in enumerate(kinds):
        s.text(130 + at * wide, 14, f"<b>{kind}</b>", NORMAL)
    for n, high in zip(counts, heights, strict=True):
        s.text(LEFT, y + 14, f"{n} customer{'s' * (n > 1)}", NORMAL)
        for at, (kind, size) in enumerate(kinds.items()):
            x, colour = 130 + at * wide, colour_of(kind)
            shared = 0 if size >= base_bytes else scale * base_bytes**0.5
            if shared:
                s.matrix(x, y, shared, shared)
            side = scale * (n * size) ** 0.5
            s.matrix(x + shared + 6 * bool(shared), y, side, side, colour=colour)
            told = f"{totals[kind, n] / 1e9:,.1f} GB"
            end = x + shared + 6 * bool(shared) + max(side, 3) + 8
            s.text(end, y + 10, told, SMALL)
            words.append(f"{n} with {kind}: {told}")
        y += high
    s.key(LEFT, y - 4, [("", "the base, shared and frozen")])
    fig = s.done()
    fig.layout.meta["alt"] = f"{title}. {'; '.join(words)}."
    return fig


def pareto(
    result: Result, cost: str, score: str = "", costs: Mapping[str, int] | None = None
) -> tuple[list[go.Scatter], list[str]]:
    """The traces of a plot of score against cost, and who is on the front.

    One point a seed, a mean with its 95% interval for each entry, and the front of the means.
    `costs` gives the cost of each entry where no row has it.
    """
    score = score or result.main
    intervals = result.comparisons.set_index("label").interval
    runs = result.runs
    if costs:
        runs = runs.assign(**{cost: runs.label.map(costs)})
    table = runs.groupby("label")[[score, cost]].mean()
    table = table.rename(columns={score: "score", cost: "cost"}).sort_values("cost")
    looks, traces, taken = styles(table.index), [], set()
    for look in looks.values():  # two that look alike are told apart by an open marker
        if (look["colour"], look["marker"]) in taken:
            look["marker"] += "-open"
        taken.add((look["colour"], look["marker"]))
    best = front(table)
    line = table.loc[best]
    traces.append(go.Scatter(
        x=line.cost, y=line.score, mode="lines", name="not beaten", hoverinfo="skip",
        line=dict(color=GREEN, shape="hv", width=2),
    ))  # fmt: skip
    for label in table.index:
        mine, look = runs[runs.label == label], looks[label]
        seeds = mine[score].to_numpy()
        error = None
        if score == result.main:
            low, high = intervals[label]
            error = dict(symmetric=False, array=[high - seeds.mean()],
                         arrayminus=[seeds.mean() - low], thickness=1.2)  # fmt: skip
        price = table.cost[label]
        shared = dict(legendgroup=label, name=label, xaxis="x", yaxis="y")
        traces.append(go.Scatter(
            x=[price] * len(seeds), y=seeds, mode="markers", showlegend=False,
            customdata=[label] * len(seeds), **shared,
            marker=dict(color=look["colour"], symbol=look["marker"], size=6, opacity=0.45),
            hovertemplate=f"{label}, one seed: %{{y:.0%}}<extra></extra>",
        ))  # fmt: skip
        traces.append(go.Scatter(
            x=[price], y=[table.score[label]], mode="markers", customdata=[label], error_y=error,
            marker=dict(color=look["colour"], symbol=look["marker"], size=12), **shared,
            hovertemplate=f"{label}: %{{y:.0%}} on average, {short(price)}<extra></extra>",
        ))  # fmt: skip
    return traces, best
