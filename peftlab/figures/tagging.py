"""Tagging drawn: an encoder with a head and its keys and values, words that a prefix moves, what
stands in front of the text in every layer under several definitions; and a figure of results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from peftlab.bases.probes import InFront
from peftlab.figures.definitions import legend
from peftlab.figures.sheet import NORMAL, SMALL, Number, Sheet, width_of
from peftlab.figures.style import AXIS, COLOURS, GREY, figure, styles
from peftlab.tuned import Tuned

PREFIX = COLOURS["prefix_tuning"]
TEXT = 3  # tokens of text in each grid
LEGEND = (
    ("vector", "a vector that trains enters"),
    ("bars", "a key and a value that train"),
    ("state", "a state, computed"),
    ("text", "text, frozen"),
    ("", "rows are layers; “out” comes out"),
)


def tagger(
    tuned: Tuned, words: Sequence[str], tags: Sequence[str], dark: bool | None = None
) -> go.Figure:
    """An encoder that tags, from what is attached: a column is a word, a row a layer; each layer
    has virtual keys and values of its own, and a head makes a tag of each word's last state.

    Raises ValueError unless a prefix of 2 to 4 virtual tokens and a head are on one stack.
    """
    prefix = getattr(tuned, "prefix", None)
    P = 0 if prefix is None else prefix[0].shape[2]
    if not 2 <= P <= 4 or tuned.linear is None or len(tuned.anatomy.stacks) != 1:
        raise ValueError("draw 2 to 4 virtual tokens and a head on an encoder: PTuningV2(3)")
    layers, T = len(prefix[0]), len(words)
    classes, d = tuned.linear.weight.shape
    numbers, head = sum(t.numel() for t in prefix), (d + 1) * classes
    title = f"{numbers:,} numbers in {layers} layers train, and a head of {head:,}"
    tagged = ", ".join(f"{w} {t}" for w, t in zip(words, tags, strict=True))
    alt = (
        f"{title}. {T} words enter {layers} frozen layers as they are. In each layer {P} virtual "
        "keys and values that train stand beside the words. One word in layer 2 is shown to read "
        "all words of the layer below, those before it and those behind it, and all virtual keys. "
        f"On top a trained head, {classes} × {d}, makes a tag of each word: {tagged}."
    )
    row, high, left = 46, 22, 96
    slot, gap = 26, 22
    text = left + P * slot + gap
    w = min(104, (780 - text) / T)
    base = 104 + row * layers
    sheet = Sheet(title, base + high + 48, alt, dark)
    t = sheet.theme
    ink = t.line(PREFIX)

    def x(i: int) -> Number:
        return text + i * w

    def y(layer: int) -> Number:
        return base - row * layer

    for layer in range(layers + 1):
        words_ = f"layer {layer}" if layer else "enters"
        sheet.text(left - 14, y(layer) + high / 2, words_, SMALL, t.quiet, "right")
        for i in range(T):
            sheet.box(x(i), y(layer), w - 12, high)
        for i in range(P if layer else 0):
            for side in (0, 10):
                sheet.box(left + i * slot + side, y(layer) + high + 3, 7, row - high - 6,
                          t.fill(PREFIX), ink)  # fmt: skip
    asks, at = 2, min(T - 1, T // 2)
    rail, middle = y(asks) + high + (row - high) / 2, w / 2 - 6
    sheet.line([(left + P * slot + 2, rail), (x(T - 1) + middle, rail)], t.ink, 1.8)
    for i in range(T):
        sheet.line([(x(i) + middle, rail), (x(i) + middle, y(asks - 1))], t.ink, 1.8)
    sheet.arrow([(x(at) + middle, rail), (x(at) + middle, y(asks) + high)], t.ink, 1.8)
    sheet.box(x(at), y(asks), w - 12, high, t.frozen, t.ink, width=2.2)
    head_y = y(layers) - 48
    sheet.box(x(0), head_y, T * w - 12, 26, t.fill("#000000"), t.ink)
    sheet.text(x(0) + (T * w - 12) / 2, head_y + 13, f"<b>head</b> W {classes} × {d}, b {classes}",
               SMALL, t.on(t.fill("#000000")), "center")  # fmt: skip
    for i, (word, tag) in enumerate(zip(words, tags, strict=True)):
        sheet.arrow([(x(i) + middle, y(layers)), (x(i) + middle, head_y + 26)], t.edge)
        sheet.arrow([(x(i) + middle, head_y), (x(i) + middle, head_y - 16)], t.edge)
        sheet.text(x(i) + middle, head_y - 26, tag, NORMAL, align="center")
        sheet.text(x(i) + middle, base + high / 2, word, NORMAL, t.on(t.frozen), "center")
    foot = base + high + 20
    sheet.text(left, foot, "<b>P</b><sub>k</sub> <b>P</b><sub>v</sub>", SMALL, t.text(PREFIX))
    words_ = f"{P} keys and {P} values a layer, trained; no virtual token enters"
    sheet.text(left + 46, foot, words_, SMALL, t.text(PREFIX))
    sheet.text(left, foot + 18, f"“{words[at]}” in layer {asks} reads every word of the layer "
               "below and every virtual key", SMALL, t.quiet)  # fmt: skip
    return sheet.done()


def moved_words(
    words: Sequence[str], before: Any, after: Any, value: Any, dark: bool | None = None
) -> go.Figure:
    """Outputs of one head in the plane, without a prefix and with one virtual token: each word goes
    its share λ of the way to the prefix's value. `before`, `after` (words, 2); `value` (2,)."""
    old, new = (np.asarray(p, dtype=float) for p in (before, after))
    value = np.asarray(value, dtype=float)
    gates = np.linalg.norm(new - old, axis=1) / np.linalg.norm(value - old, axis=1)
    first = int(new[:, 1].argmax())
    rest = [i for i in range(len(words)) if i != first]
    room = [p[first, 1] - p[rest, 1].max() for p in (old, new)]
    title = f"The room for a line below {words[first]} grows from {room[0]:.2f} to {room[1]:.2f}"
    listed = "; ".join(
        f"{word} from ({a[0]:.2f}, {a[1]:.2f}) to ({b[0]:.2f}, {b[1]:.2f})"
        for word, a, b in zip(words, old, new, strict=True)
    )
    alt = (
        f"Words as points in a plane. The prefix's value lies at ({value[0]:g}, {value[1]:g}), and "
        f"each word moves towards it by its share: {listed}. The second number of {words[first]} "
        f"was {room[0]:.2f} above the next word's and is then {room[1]:.2f} above it."
    )
    sheet = Sheet(title, 356, alt, dark)
    t, left, top, wide, tall = sheet.theme, 70, 14, 400, 290
    across = max(1.0, float(np.ceil(max(old[:, 0].max(), new[:, 0].max(), value[0]))))
    up = float(np.ceil(max(old[:, 1].max(), new[:, 1].max(), value[1])))

    def at(point) -> tuple[Number, Number]:
        return left + point[0] / across * wide, top + tall - point[1] / up * tall

    for i in range(int(up) + 1):
        y = at((0, i))[1]
        sheet.line([(left, y), (left + wide, y)], t.faint, 1)
        sheet.text(left - 8, y, f"{i}", SMALL, t.quiet, "right")
    for number in np.linspace(0, across, 5):
        spot = at((number, 0))[0]
        sheet.text(spot, top + tall + 12, f"{number:g}", SMALL, t.quiet, "center")
    sheet.text(left + wide / 2, top + tall + 30, "number 1", SMALL, t.quiet, "center")
    sheet.text(18, top + tall / 2, "number 2", SMALL, t.quiet, "center", angle=-90)
    line = (new[first, 1] + new[rest, 1].max()) / 2
    ends = [at((0, line)), at((across, line))]
    sheet.line(ends, t.ink, 1.6, "dash")
    for a, b in zip(old, new, strict=True):
        sheet.line([at(b), at(value)], t.line(PREFIX), 1, "dot")
        sheet.arrow([at(a), at(b)], t.line(PREFIX), 2)
    for points in (old, new):
        for place in dict.fromkeys(map(tuple, points.round(6))):
            here = [i for i, p in enumerate(points) if tuple(p.round(6)) == place]
            names = " and ".join(f"“{words[i]}”" for i in here)
            x, y = at(place)
            sheet.dot(x, y, t.edge if points is old else t.fill(PREFIX))
            if points is old:
                sheet.text(x, y + 13, names, SMALL, t.quiet, "center")
            elif first in here:
                sheet.text(x + 9, y - 9, names, SMALL, t.text(PREFIX))
            else:
                sheet.text(x - 10, y + 4, names, SMALL, t.text(PREFIX), "right")
    x, y = at(value)
    sheet.box(x - 6, y - 6, 12, 12, t.fill(PREFIX), t.line(PREFIX))
    sheet.text(x + 24, y + 14, "the prefix's value", SMALL, t.text(PREFIX))
    side = left + wide + 24
    sheet.text(side, ends[1][1], f"a line of a head: {words[first]} above,<br>the others below",
               NORMAL)  # fmt: skip
    shares = "<br>".join(f"“{w}” λ = {g:.2f}" for w, g in zip(words, gates, strict=True))
    sheet.text(side, top + 34, f"how far each word goes:<br>{shares}", NORMAL, t.text(PREFIX))
    sheet.text(side, at((0, old[:, 1].mean()))[1] - 4, "grey: without the prefix", NORMAL, t.quiet)
    return sheet.done()


def definition_columns(
    seen: Mapping[str, Sequence[InFront]], numbers: Mapping[str, int], dark: bool | None = None
) -> go.Figure:
    """What stands in front of the text, layer by layer, as it was measured: one grid a definition.

    `seen` has `probes.in_front(tuned, ids)` by label, `numbers` how many train. A full cell is a
    vector that trains and enters there, two bars are a key and a value alone, an outline is a state
    that the frozen model computed. The uppermost row is what comes out.
    """
    depth = max(len(rows) for rows in seen.values())
    most = {label: max(max(row.states, row.keys) for row in rows) for label, rows in seen.items()}
    names = {label: max(width_of(label, NORMAL) + 14, 132) for label in seen}
    cell = 17.0
    widths = {label: max(names[label], (most[label] + TEXT) * cell + 14) for label in seen}
    free = (800 - 40 - sum(widths.values())) / max(1, len(seen) - 1)
    title = f"{len(seen)} things called P-tuning v2, in front of the same text"
    reading = "; ".join(_in_words(label, rows, numbers[label]) for label, rows in seen.items())
    row, top = 25.0, 58
    foot = top + row * depth
    sheet = Sheet(title, foot + 66, f"{title}. {reading}.", dark)
    t, x = sheet.theme, 40.0
    for layer in range(depth):
        y = top + row * (depth - 1 - layer) + row / 2
        sheet.text(34, y, "out" if layer == depth - 1 else str(layer + 1), SMALL, t.quiet, "right")
    for label, rows in seen.items():
        sheet.text(x, 14, f"<b>{label}</b>", NORMAL, t.text(PREFIX))
        sheet.text(x, 32, f"{numbers[label]:,} numbers train", SMALL, t.quiet)
        start = x + most[label] * cell + 4
        for layer, here in enumerate(rows):
            y = top + row * (depth - 1 - layer)
            _row(sheet, start, y, cell, row, here)
        sheet.text(start, foot + 10, "text", SMALL, t.quiet)
        x += widths[label] + free
    legend(sheet, foot + 40, PREFIX, LEGEND, 42)
    return sheet.done()


def _row(sheet: Sheet, text: Number, y: Number, cell: Number, high: Number, here: InFront) -> None:
    """One layer: virtual tokens to the left of `text`, and the text."""
    t = sheet.theme
    fill, edge = t.fill(PREFIX), t.line(PREFIX)
    for i in range(TEXT):
        sheet.box(text + i * cell + 1, y + 2, cell - 3, high - 5)
    kinds = ["keys"] * here.keys + ["enters"] * here.enter + ["computed"] * here.computed
    both = min(here.keys, here.states)  # keys and values of virtual tokens that have states too
    kinds = kinds[both:]
    for i, kind in enumerate(reversed(kinds)):
        x = text - 4 - (i + 1) * cell + 1
        w, h = cell - 3, high - 5
        if kind == "enters":
            sheet.box(x, y + 2, w, h, fill, edge)
        elif kind == "computed":
            sheet.box(x, y + 2, w, h, t.paper, t.edge, "dot")
        if kind == "keys" or i < both:
            bar = t.paper if kind == "enters" else fill
            for side in (2, 8):
                sheet.box(x + side, y + 5, 4, h - 6, bar, edge)


def _in_words(label: str, rows: Sequence[InFront], numbers: int) -> str:
    first, last, out = rows[0], rows[-2], rows[-1]
    return (
        f"{label}: {numbers:,} numbers train; in layer 1 stand {first.states} virtual states and "
        f"{first.keys} virtual keys beside them, in the last layer {last.states} and {last.keys}, "
        f"of whose states {last.enter} enter there; {out.states} come out"
    )


def scores_by_size(
    table: pd.DataFrame, x: str, y: str, title: str, x_title: str, y_title: str,
    lines: Mapping[str, tuple[Number, str]], log: bool = False,
) -> go.Figure:  # fmt: skip
    """A score against a size: a plot for each value of "panel", side by side with one y axis; every
    run's point, and for each "label" a line through the means. `lines` has, by panel, a score to
    compare with and its name."""
    panels = list(dict.fromkeys(table["panel"]))
    looks = styles(dict.fromkeys(table["label"]))
    n = table.groupby(["panel", "label", x]).size().max()
    title += f"<br><sup>every run's point, n = {n} a size; lines are means</sup>"
    fig = figure(title, "", y_title, height=430, margin_t=104 if len(panels) > 1 else 84)
    sizes, width = sorted(table[x].unique()), 1 / len(panels)
    place = np.log10 if log else np.asarray
    ends = place(sizes[0]) - 0.15, place(sizes[-1]) + 0.15
    for i, name in enumerate(panels, 1):
        axis = "x" if i == 1 else f"x{i}"
        rows = table[table["panel"] == name]
        for label, style in looks.items():
            mine = rows[rows["label"] == label].sort_values(x)
            look = dict(color=style["colour"], symbol=style["marker"], size=8)
            points = dict(x=mine[x], y=mine[y], mode="markers", marker=look)
            fig.add_scatter(**points, xaxis=axis, name=label, showlegend=False)
            mean = mine.groupby(x)[y].mean()
            line = dict(x=mean.index, y=mean, mode="lines", line=dict(color=style["colour"]))
            fig.add_scatter(**line, xaxis=axis, name=label, showlegend=i == 1 and len(looks) > 1)
        across = dict(domain=[(i - 1) * width + 0.015, i * width - 0.015], anchor="y")
        across |= dict(tickvals=sizes, ticktext=[f"{size:g}" for size in sizes], range=list(ends))
        across |= dict(type="log" if log else "linear", title=dict(text=x_title))
        fig.update_layout({f"xaxis{'' if i == 1 else i}": {**AXIS, **across}})
        level, words = lines[name]
        at = dict(xref=f"{axis} domain", yref="y")
        fig.add_shape(type="line", x0=0, x1=1, y0=level, y1=level, **at,
                      line=dict(color=GREY, dash="dash", width=1.5))  # fmt: skip
        fig.add_annotation(text=words, x=0.99, xanchor="right", y=level, yshift=-10, **at,
                           showarrow=False, font_size=12)  # fmt: skip
        if len(panels) > 1:
            fig.add_annotation(text=f"<b>{name}</b>", x=(i - 0.5) * width, y=1, xref="paper",
                               yref="paper", yanchor="bottom", showarrow=False)  # fmt: skip
    return fig.update_layout(legend=dict(orientation="h", x=0, y=-0.3))
