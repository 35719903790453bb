"""Prefix tuning drawn: the scores with the prefix's block, the gate in the plane, the network that
is thrown away, positions; and two figures of results."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from peftlab.figures.sheet import LARGE, NORMAL, SMALL, Number, Sheet
from peftlab.figures.style import AXIS, COLOURS, GREEN, GREY, figure, styles
from peftlab.figures.theme import theme
from peftlab.tuned import Tuned


def prefix_shares(
    weights: Any, queries: Sequence[str], keys: Sequence[str], dark: bool | None = None
) -> go.Figure:
    """The shares of one head: a row for each query, and beside each row the gate.

    `weights` (queries, keys); the keys in front of the text's are virtual: len(keys) − len(queries)
    of them. What a query may not see is empty.
    """
    shares = np.asarray(weights, dtype=float)
    T, virtual = len(queries), len(keys) - len(queries)
    gates = shares[:, :virtual].sum(axis=1)
    rows = "; ".join(f"{q.strip()} {gate:.0%}" for q, gate in zip(queries, gates, strict=True))
    sheet = Sheet(
        f"{virtual} columns that no token wrote: every query may read them",
        T * 40 + 136,
        f"A grid of {T} queries by {virtual} + {T} keys. The first {virtual} columns, the prefix, "
        "are green in every row. The columns of the text are grey up to the diagonal and empty "
        f"above it. The share of each row that goes to the prefix: {rows}.",
        dark,
    )
    t, left, top, cell, gap = sheet.theme, 112, 66, 40, 14
    text_x, bar_x, bar = left + virtual * cell + gap, left + (virtual + T) * cell + gap + 40, 150
    sheet.text(
        left + virtual * cell / 2, 14, "<b>prefix</b>: trained", SMALL, t.text(GREEN), "center"
    )
    sheet.text(text_x + T * cell / 2, 14, "<b>text</b>: W<sub>k</sub> times each token", SMALL,
               t.quiet, "center")  # fmt: skip
    sheet.text(bar_x, 14, "<b>λ</b>, the share of the prefix", SMALL, t.text(GREEN))
    for col, key in enumerate(keys):
        x = (left if col < virtual else text_x - virtual * cell) + (col + 0.5) * cell
        ink = t.text(GREEN) if col < virtual else t.ink
        sheet.text(x, top - 14, key.strip(), NORMAL, ink, "center")
    for row, query in enumerate(queries):
        y = top + row * cell
        sheet.text(left - 10, y + cell / 2, f"{query.strip()} asks", NORMAL, align="right")
        for col in range(virtual + T):
            mine = col < virtual
            x = (left if mine else text_x - virtual * cell) + col * cell
            seen = col - virtual <= row
            fill = t.tint(GREEN) if mine else t.frozen if seen else t.paper
            edge = t.line(GREEN) if mine else t.edge if seen else t.faint
            hover = f"query {query.strip()}, key {keys[col].strip()}: {shares[row, col]:.3f}"
            sheet.box(x + 1, y + 1, cell - 2, cell - 2, fill, edge, hover=hover)
            if seen:
                words = f"{100 * shares[row, col]:.0f}"
                sheet.text(x + cell / 2, y + cell / 2, words, SMALL, t.on(fill), "center")
        part = gates[row] * bar
        sheet.box(bar_x, y + 12, bar, 16, t.frozen)
        sheet.matrix(bar_x, y + 12, part, 16, colour=GREEN)
        sheet.text(bar_x + bar + 8, y + 20, f"{gates[row]:.0%}", SMALL, t.text(GREEN))
    foot = top + T * cell
    sheet.text(left, foot + 18, "no triangle: no query is too early to read the prefix", SMALL,
               t.text(GREEN))  # fmt: skip
    sheet.text(left, foot + 36, "empty: the future, which nobody may read", SMALL, t.quiet)
    sheet.text(left, foot + 54, "numbers: shares in percent, from one softmax over the whole row; "
               "a row adds up to 100", SMALL, t.quiet)  # fmt: skip
    return sheet.done()


def gate_plane(
    text_values: Any, text: Any, prefix: Any, output: Any, gate: int | float, title: str
) -> go.Figure:
    """Values in a plane: the text's, their mixture, the prefix's, and the output between the two.

    `text_values` (2, 2), the others (2,).
    """
    fig = figure(title, "first number of a value", "second number", height=430)
    traces, moving = gate_parts(text_values, text, prefix, output, gate, title)
    t, green = theme(), COLOURS["prefix_tuning"]
    looks = [
        dict(mode="lines+markers+text", line=dict(color=GREY, width=6),
             marker=dict(color=GREY, size=12), textposition="bottom left"),
        dict(mode="lines", line=dict(color=green, width=2, dash="dot"), hoverinfo="skip"),
        dict(mode="markers+text", marker=dict(color=t.ink, size=12, symbol="circle-open",
             line=dict(width=2)), textposition="bottom left"),
        dict(mode="markers+text", marker=dict(color=green, size=13, symbol="square"),
             textposition="middle right"),
        dict(mode="markers+text", marker=dict(color=green, size=17), textposition="middle right"),
    ]  # fmt: skip
    for trace, look in zip(traces, looks, strict=True):
        fig.add_scatter(**trace, **look, showlegend=False)
    fig.update_xaxes(range=[-1.5, 6.5], dtick=1, zeroline=True, zerolinecolor=t.faint)
    fig.update_yaxes(range=[-1, 9], dtick=1, zeroline=True, zerolinecolor=t.faint)
    return fig.update_layout(moving)


def gate_parts(
    text_values: Any, text: Any, prefix: Any, output: Any, gate: int | float, title: str
) -> tuple[list[dict], dict]:
    """What changes in `gate_plane` from one setting to the next: its five traces, its layout."""
    points = [np.asarray(p, dtype=float) for p in (text_values, text, prefix, output)]
    values, text, prefix, output = points
    named = f"output: λ = {gate:.2f}"
    return [
        dict(x=values[:, 0], y=values[:, 1], text=["value of token 1", "value of token 2"]),
        dict(x=[text[0], prefix[0]], y=[text[1], prefix[1]]),
        dict(x=[text[0]], y=[text[1]], text=["the text alone"]),
        dict(x=[prefix[0]], y=[prefix[1]], text=["value of the prefix"]),
        dict(x=[output[0]], y=[output[1]], text=[named]),
    ], dict(title=dict(text=title))


def thrown_away(tuned: Tuned, dark: bool | None = None) -> go.Figure:
    """An MLP prefix while it trains and in its file, from what is attached; the table and the two
    matrices of the network are to scale.

    Raises ValueError unless the MLP prefix is what is attached.
    """
    tensors = dict(tuned.trainable)
    names = {name.rpartition(".")[2]: name for name in tensors if name.endswith("table")}
    weights = [tensor for name, tensor in tensors.items() if name.endswith("weight")]
    if not names or len(weights) != 2:
        raise ValueError("draw an MLP prefix: PrefixTuning(P, prefix_projection=True)")
    Z, (W_1, W_2) = tensors[names["table"]], weights
    layers, heads, P, d_head = tuned.prefix[0].shape
    trained = sum(tensor.numel() for tensor in tensors.values())
    stored, d_kv = 2 * layers * heads * P * d_head, heads * d_head
    sheet = Sheet(
        f"{trained:,} numbers train; {stored:,} are kept",
        360,
        f"Above, while it trains: a table Z ({P} × {Z.shape[1]}) goes through W1 "
        f"({W_1.shape[0]} × {W_1.shape[1]}), tanh and W2 ({W_2.shape[0]} × {W_2.shape[1]}), and "
        f"what comes out is cut into {layers} pairs of keys and values ({P} × {d_kv} each). Below, "
        "after training: the same pairs, and the table and the network are crossed out.",
        dark,
    )
    t, unit = sheet.theme, 104 / W_2.shape[0]
    for y, words, kept in ((96, "while it trains", False), (268, "in the file", True)):
        sheet.text(14, y - 76, f"<b>{words}</b>", NORMAL)
        x = 60.0
        for name, tensor in (("Z", Z), ("W₁", W_1), ("W₂", W_2)):
            rows, cols = tensor.shape
            w, h = max(cols * unit, 3), max(rows * unit, 3)
            hover = f"{name}: {rows:,} × {cols:,}"
            sheet.matrix(x, y - h / 2, w, h, "", "" if kept else GREEN, hover=hover)
            ink = t.quiet if kept else t.text(GREEN)
            sheet.text(x + w / 2, y + 60, f"<b>{name}</b>", SMALL, ink, "center")
            sheet.text(x + w / 2, y + 75, f"{rows:,} × {cols:,}", SMALL, ink, "center")
            if not kept:
                sheet.arrow([(x + w + 4, y), (x + w + 58, y)], t.edge)
                if name == "W₁":
                    sheet.text(x + w + 31, y - 12, "tanh", SMALL, t.quiet, "center")
            x += w + 66
        if kept:
            for ends in ([(30, y - 50), (x - 50, y + 50)], [(30, y + 50), (x - 50, y - 50)]):
                sheet.line(ends, t.ink, 2.5)
        pairs, step = x + 4, (sheet.width - x - 16) / layers
        for layer in range(layers):
            left = pairs + layer * step
            for side, name in enumerate(("P<sub>k</sub>", "P<sub>v</sub>")):
                column = left + side * 31
                sheet.matrix(column, y - 24, 27, 48, "", GREEN, made=not kept,
                             hover=f"layer {layer + 1}: {P} × {d_kv}")  # fmt: skip
                ink = t.on(t.fill(GREEN) if kept else t.tint(GREEN))
                sheet.text(column + 13.5, y, name, SMALL, ink, "center")
            sheet.text(left + 29, y - 36, f"layer {layer + 1}", SMALL, t.quiet, "center")
        middle = pairs + ((layers - 1) * step + 58) / 2
        words = "kept" if kept else "the network makes them anew at every step"
        sheet.text(middle, y + 42, f"{P} × {d_kv} each; {words}", SMALL, t.quiet, "center")
    return sheet.done()


def prefix_shapes(T: int, virtual: int, d_head: int, dark: bool | None = None) -> go.Figure:
    """The shapes in one head of attention with a prefix: a strip for each token, real or virtual.

    T tokens of text, `virtual` of the prefix, heads of d_head numbers. A strip is to scale in
    neither direction; every box has as many strips as its matrix has tokens.
    """
    keys, side, wide = virtual + T, 13, 96
    foot = 44 + keys * side
    sheet = Sheet(
        f"Keys, values and mask get {virtual} more; queries and what comes out do not",
        foot + 62,
        f"A line of matrices. q / √d, {T} × {d_head}, times the keys, transposed, "
        f"{d_head} × {keys}, plus the mask, {T} × {keys}, gives scores. Their softmax times the "
        f"values, {keys} × {d_head}, gives h, {T} × {d_head}. The first {virtual} of the keys, of "
        "the mask's columns and of the values are green. The mask is 0 in the green columns and "
        "up to the diagonal.",
        dark,
    )
    t, middle = sheet.theme, 26 + keys * side / 2

    def strips(x: Number, name: str, size: str, count: int, tall: bool) -> None:
        """One for each of `count` tokens, those of the prefix first; tall: side by side."""
        across, down = (count * side, wide) if tall else (wide, count * side)
        y = middle - down / 2
        for i in range(count):
            fill = t.fill(GREEN) if count == keys and i < virtual else t.frozen
            at = (x + i * side, y) if tall else (x, y + i * side)
            sheet.box(*at, *((side, down) if tall else (wide, side)), fill, t.paper)
        sheet.box(x, y, across, down, "rgba(0,0,0,0)")
        under(x + across / 2, name, size)

    def under(x: Number, name: str, size: str) -> None:
        sheet.text(x, foot, f"<b>{name}</b>", NORMAL, align="center")
        sheet.text(x, foot + 18, size, SMALL, t.quiet, "center")

    def sign(x: Number, words: str) -> None:
        sheet.text(x, middle, words, LARGE, align="center")

    x, grid = 24, keys * side
    strips(x, "q / √d", f"T × d: {T} × {d_head}", T, False)
    sign(x := x + wide + 14, "·")
    strips(x := x + 14, "[P<sub>k</sub>; K]ᵀ", f"d × (P + T): {d_head} × {keys}", keys, True)
    sign(x := x + grid + 18, "+")
    top = middle - T * side / 2
    for row in range(T):
        for column in range(keys):
            seen = column - virtual <= row
            fill = t.fill(GREEN) if column < virtual else t.frozen if seen else t.paper
            edge = t.paper if seen else t.faint
            sheet.box(x + 18 + column * side, top + row * side, side, side, fill, edge)
    sheet.box(x + 18, top, grid, T * side, "rgba(0,0,0,0)")
    under(x + 18 + grid / 2, "M", f"T × (P + T): {T} × {keys}")
    x += 18 + grid
    sheet.text(x + 42, middle - 14, "softmax", SMALL, t.quiet, "center")
    sheet.arrow([(x + 12, middle), (x + 72, middle)])
    sign(x := x + 84, "·")
    strips(x := x + 14, "[P<sub>v</sub>; V]", f"(P + T) × d: {keys} × {d_head}", keys, False)
    sign(x := x + wide + 16, "=")
    strips(x + 16, "h", f"T × d: {T} × {d_head}", T, False)
    sheet.key(24, foot + 44, [(GREEN, "prefix"), ("", "text")])
    sheet.text(170, foot + 44, "empty: the future, −∞ in the mask; all else in it is 0", SMALL,
               t.quiet)  # fmt: skip
    return sheet.done()


def positions(tokens: Sequence[str], virtual: int, dark: bool | None = None) -> go.Figure:
    """Which position each token of the text is told, with the prefix beside it and in the cache."""
    sheet = Sheet(
        f"The same {virtual} virtual tokens; the text begins at 0, or at {virtual}",
        214,
        f"Two rows of {virtual} green virtual tokens and {len(tokens)} grey tokens of text. Above, "
        f"peftlab: the text has the positions 0 to {len(tokens) - 1}. Below, PEFT: the text has "
        f"the positions {virtual} to {virtual + len(tokens) - 1}.",
        dark,
    )
    t, left, w = sheet.theme, 250, 40
    for y, name, words, start in (
        (24, "peftlab", "keys and values beside the text", 0),
        (120, "PEFT", "keys and values in the cache,<br>as if they had been read", virtual),
    ):
        sheet.text(14, y + 22, f"<b>{name}</b>", NORMAL)
        sheet.text(14, y + 46, words, SMALL, t.quiet)
        for i in range(virtual):
            sheet.matrix(left + i * w, y, w - 4, 44, "", GREEN)
            if start:
                sheet.text(left + i * w + 18, y + 56, f"({i})", SMALL, t.quiet, "center")
        for i, token in enumerate(tokens):
            x = left + (virtual + i) * w + 10
            sheet.matrix(x, y, w - 4, 44)
            sheet.text(x + 18, y + 22, token.strip(), SMALL, t.on(t.frozen), "center")
            sheet.text(x + 18, y + 56, f"<b>{start + i}</b>", SMALL, align="center")
        sheet.text(left - 12, y + 56, "position", SMALL, t.quiet, "right")
    return sheet.done()


def within_and_through(
    distance: Sequence[int | float], ranks: Sequence[int], virtual: int, most: int, title: str
) -> go.Figure:
    """Layer by layer: how far the words' attention among themselves moved, and the rank of what
    the prefix added, beside its bound in one layer; `most` is as much as a head can have."""
    layers = list(range(1, 1 + len(ranks)))
    fig = figure(title, "", "", height=380, showlegend=False, margin_l=90)
    colour = COLOURS["prefix_tuning"]
    points = dict(mode="lines+markers", line=dict(color=colour, width=1.5))
    points |= dict(marker=dict(color=colour, symbol="square", size=9))
    fig.add_scatter(x=layers, y=list(distance), **points, xaxis="x", yaxis="y", name="distance")
    fig.add_scatter(x=layers, y=list(ranks), **points, xaxis="x2", yaxis="y2", name="rank")
    lines = ((virtual, f"P = {virtual}: the most in one layer"), (most, f"{most}: all of a head"))
    for height, words in lines:
        fig.add_shape(type="line", xref="x2 domain", yref="y2", x0=0, x1=1, y0=height, y1=height,
                      line=dict(color=GREY, dash="dash", width=1.5))  # fmt: skip
        fig.add_annotation(text=words, xref="x2 domain", yref="y2", x=0.98, y=height, yshift=15,
                           xanchor="right", showarrow=False, font_size=12)  # fmt: skip
    for i, (domain, name) in enumerate(
        (([0, 0.44], "attention among the words:<br>distance from the base (0 to 1)"),
         ([0.58, 1], "what the prefix adds:<br>independent directions (rank)")), 1
    ):  # fmt: skip
        end = "" if i == 1 else "2"
        across = dict(domain=domain, anchor=f"y{end}", title=dict(text="layer"), dtick=1)
        up = dict(anchor=f"x{end}", title=dict(text=name, font=dict(size=12), standoff=14))
        fig.update_layout({f"xaxis{end}": {**AXIS, **across}, f"yaxis{end}": {**AXIS, **up}})
    return fig.update_layout(yaxis2_range=[0, 1.25 * most], yaxis_range=[-0.02, 1])


def rates(table: pd.DataFrame, title: str) -> go.Figure:
    """The share right against the learning rate, for one or two values of `form`: every run's
    point, a line through the means, and its name over the rates where the mean is above 0.9."""
    fig = figure(title, "learning rate", "share right", height=400, showlegend=False)
    colour, ticks = COLOURS["prefix_tuning"], sorted(table["lr"].unique())
    looks = (("square", "solid"), ("square-open", "dash"))
    for (form, runs), (marker, dash) in zip(table.groupby("form", sort=False), looks, strict=False):
        mean = runs.groupby("lr")["exact"].mean()
        line = dict(color=colour, dash=dash, width=2)
        fig.add_scatter(x=mean.index, y=mean, mode="lines", line=line, name=form)
        look = dict(color=colour, symbol=marker, size=9, opacity=0.7)
        fig.add_scatter(x=runs["lr"], y=runs["exact"], mode="markers", marker=look, name=form)
        works = mean[mean > 0.9].index
        middle = (np.log10(works.min()) + np.log10(works.max())) / 2
        most = mean[works].max()
        fig.add_annotation(text=form, x=middle, y=most, yshift=18, showarrow=False)
    marks = dict(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    fig.update_xaxes(type="log", **marks)
    return fig.update_yaxes(range=[-0.05, 1.2], tickvals=[0, 0.25, 0.5, 0.75, 1])


def runs_by_row(table: pd.DataFrame, value: str, row: str, title: str, x_title: str) -> go.Figure:
    """Every run as a point: one row for each value of `row`, from the top, one colour and marker
    for each `label`; a bar marks the mean."""
    rows = list(dict.fromkeys(table[row]))
    fig = figure(title, x_title, "", height=150 + 70 * len(rows))
    looks = styles(dict.fromkeys(table["label"]))
    step = 0.3 / max(1, len(looks) - 1)
    for i, (label, style) in enumerate(looks.items()):
        mine = table[table["label"] == label]
        y = [rows.index(name) - 0.15 + i * step for name in mine[row]]
        look = dict(color=style["colour"], symbol=style["marker"], size=11, opacity=0.75)
        fig.add_scatter(x=mine[value], y=y, mode="markers", marker=look, name=label)
        for name, mean in mine.groupby(row)[value].mean().items():
            at = rows.index(name) - 0.15 + i * step
            fig.add_shape(type="line", x0=mean, x1=mean, y0=at - 0.12, y1=at + 0.12,
                          line=dict(color=style["colour"], width=2.5))  # fmt: skip
    legend = dict(orientation="h", x=0, xanchor="left", y=1.0, yanchor="bottom")
    fig.update_layout(legend=legend, margin_l=170)
    fig.update_layout(title=dict(x=0, xref="container", pad_l=12))
    return fig.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=rows, range=[len(rows) - 0.5, -0.5]
    )
