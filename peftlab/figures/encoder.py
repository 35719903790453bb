"""P-tuning drawn: how a network makes the prompt, what it does to a step, what is kept of it, and
where a template puts the vectors; and two figures of results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from peftlab.figures.sheet import LARGE, NORMAL, SMALL, Number, Sheet, number
from peftlab.figures.style import COLOURS, DASHES, MARKERS, figure
from peftlab.figures.theme import mixed, theme
from peftlab.tuned import Tuned

PROMPT = COLOURS["p_tuning"]
VIRTUAL = "◆"


def _parts(tuned: Tuned, call: str) -> tuple[Any, dict[str, Any], dict[str, Any], Any]:
    """The table, the LSTM's and the MLP's tensors by name, and the prompt that they make.

    Raises ValueError unless P-tuning with an LSTM is what is attached.
    """
    tensors = {name.rpartition("encoder.")[2]: t for name, t in tuned.trainable.items()}
    lstm = {name[4:]: t for name, t in tensors.items() if name.startswith("mix.weight_ih")}
    lstm |= {name[4:]: t for name, t in tensors.items() if name.startswith("mix.weight_hh")}
    mlp = {name[4:]: t for name, t in tensors.items() if name.startswith("mlp.")}
    if "table" not in tensors or not lstm:
        raise ValueError(f"draw P-tuning with an LSTM: {call}")
    return tensors["table"], lstm, mlp, tuned.prompt


def _sizes(tuned: Tuned) -> tuple[int, int, int]:
    """How many numbers the LSTM and the MLP have, and how many train in all."""
    found = {"mix": 0, "mlp": 0}
    for name, tensor in tuned.trainable.items():
        part = name.rpartition("encoder.")[2].partition(".")[0]
        if part in found:
            found[part] += tensor.numel()
    return found["mix"], found["mlp"], sum(t.numel() for t in tuned.trainable.values())


def prompt_maker(tuned: Tuned, tokens: Sequence[str], dark: bool | None = None) -> go.Figure:
    """From the table to the model, from what is attached: a column is a token; the LSTM is unrolled
    over the virtual tokens, in both directions.

    Raises ValueError unless P-tuning with an LSTM of 2 to 5 virtual tokens is attached.
    """
    table, _, _, prompt = _parts(tuned, "PTuning(4)")
    P, d = prompt.shape
    if not 2 <= P <= 5:
        raise ValueError("draw P-tuning with an LSTM of 2 to 5 virtual tokens: PTuning(4)")
    mix, mlp, trained = _sizes(tuned)
    layers, T = tuned.anatomy.shape.layers, len(tokens)
    title = f"{trained:,} numbers train to make {P} vectors of {d}: {P * d:,} numbers"
    alt = (
        f"From below: a table Z of {P} vectors, {table.shape[0]} × {table.shape[1]}, trained. An "
        "LSTM goes over them from left to right and from right to left, with the same weights at "
        f"every vector, {mix:,} numbers. An MLP takes each output alone, {mlp:,} numbers, and out "
        f"comes the prompt P, {P} × {d}, which is made and not trained. It stands in front of the "
        f"rows of the frozen table for {T} tokens of text, below {layers} frozen layers."
    )
    sheet = Sheet(title, 392, alt, dark)
    t, left, w, gap = sheet.theme, 150, 74, 14
    ink, line = t.text(PROMPT), t.line(PROMPT)
    centres = [left + i * w + (w - 12) / 2 for i in range(P)]
    right = left + P * w - 12

    def column(i: int, y: Number, name: str, made: bool) -> None:
        fill = t.tint(PROMPT) if made else t.fill(PROMPT)
        sheet.box(left + i * w, y, w - 12, 28, fill, line, "dot" if made else "solid")
        sheet.text(centres[i], y + 14, name, NORMAL, t.on(fill), "center")

    def up(start: Number, end: Number, at: Sequence[Number], colour: str) -> None:
        for x in at:
            sheet.arrow([(x, start), (x, end)], colour)

    sheet.box(left - 8, 16, right - left + 16 + gap + T * w, 46, t.frozen, t.edge)
    middle = (left + right + gap + T * w) / 2
    sheet.text(middle, 39, f"the base: {layers} frozen layers", NORMAL, t.on(t.frozen), "center")
    up(84, 63, centres, t.edge)
    for i in range(P):
        column(i, 86, f"P{i + 1}", made=True)
        column(i, 338, f"z{i + 1}", made=False)
    for j, token in enumerate(tokens):
        x = right + 12 + gap + j * w
        sheet.box(x, 86, w - 12, 28, t.frozen, t.edge)
        sheet.text(x + (w - 12) / 2, 100, token.strip(), NORMAL, t.on(t.frozen), "center")
        up(84, 63, [x + (w - 12) / 2], t.edge)
    up(142, 115, centres, line)
    sheet.box(left - 8, 144, right - left + 16, 36, t.fill(PROMPT), line)
    on = t.on(t.fill(PROMPT))
    sheet.text((left + right) / 2, 162, "<b>MLP</b>, on each vector alone", NORMAL, on, "center")
    up(208, 181, centres, line)
    sheet.box(left - 8, 210, right - left + 16, 100, t.paper, line, width=1.6)
    for y, forward in ((232, True), (288, False)):
        for i, x in enumerate(centres):
            sheet.box(x - 13, y - 13, 26, 26, t.fill(PROMPT), line)
            beyond = i + 1 if forward else i - 1
            if 0 <= beyond < P:
                step = 14 if forward else -14
                sheet.arrow([(x + step, y), (centres[beyond] - step, y)], line)
    up(337, 312, centres, line)
    words, x = t.quiet, right + 30
    for y, first, second in (
        (158, "<b>MLP</b>: a matrix, a ReLU, a matrix", f"{mlp:,} numbers, the same for all"),
        (232, "<b>LSTM</b>, from left to right", "and, below, from right to left;"),
        (270, "its layers lie one upon another", f"{mix:,} numbers, the same for all"),
        (345, f"<b>Z</b> {table.shape[0]} × {table.shape[1]}: the table", "each vector its own"),
    ):
        sheet.text(x, y, first, SMALL, ink)
        sheet.text(x, y + 16, second, SMALL, words if y < 340 else ink)
    sheet.text(left - 16, 94, f"<b>P</b> {P} × {d}", SMALL, ink, "right")
    sheet.text(left - 16, 110, "made, and stored", SMALL, t.quiet, "right")
    sheet.text(left - 16, 352, "trained", SMALL, ink, "right")
    x = right + 12 + gap
    sheet.text(x, 126, "rows of the frozen table", SMALL, t.quiet)
    return sheet.done()


def hand_step(H: Any, G: Any, W: Any, dark: bool | None = None) -> go.Figure:
    """One step on P itself, and one on W where P = H W, with every number: both are a matrix times
    the same gradient G (P, d). H (P, h), W (h, d), all whole numbers, the learning rate 1."""
    H, G, W = (np.asarray(m, dtype=float) for m in (H, G, W))
    prompt, mix = H @ W, H @ H.T
    rows = (
        ("a step on P", np.eye(len(H)), "<b>I</b>"),
        ("a step on W₂", mix, "<b>H Hᵀ</b>"),
    )
    moved = (np.nonzero(np.abs(mix @ G).sum(axis=1))[0] + 1).tolist()
    wanted = (np.nonzero(np.abs(G).sum(axis=1))[0] + 1).tolist()
    title = (
        f"The loss asks row {_listed(wanted)} to move; through W₂ rows {_listed(moved)} move"
        if len(moved) > len(wanted)
        else "Both steps move the same rows"
    )
    words = "; ".join(
        f"{name}: P goes from {prompt.tolist()} to {(prompt - matrix @ G).tolist()}"
        for name, matrix, _ in rows
    )
    alt = f"Matrices with their numbers. The gradient of P is {G.tolist()}. {words}."
    cell, gap, high = 40, 34, 168
    sheet = Sheet(title, 2 * high + 10, alt, dark)
    t, ink = sheet.theme, sheet.theme.text(PROMPT)

    def grid(x: Number, y: Number, numbers: Any, colour: str, marked: Any = None) -> Number:
        for i, row in enumerate(numbers):
            for j, value in enumerate(row):
                strong = marked is not None and marked[i][j] != 0
                fill = t.fill(PROMPT) if strong else t.tint(PROMPT) if colour else t.frozen
                sheet.box(x + j * cell, y + i * cell, cell, cell, fill, t.paper, width=2)
                place = (x + (j + 0.5) * cell, y + (i + 0.5) * cell)
                sheet.text(*place, number(value, 0), LARGE, t.on(fill), "center")
        return x + len(numbers[0]) * cell

    for k, (name, matrix, symbol) in enumerate(rows):
        top, step = 62 + k * high, -matrix @ G
        below, middle = top + len(H) * cell + 15, top + len(H) * cell / 2
        sheet.text(14, top - 38, f"<b>{name}</b>", NORMAL)
        x = 60.0
        for sign, numbers, colour, label, marked in (
            ("", matrix, "mix", symbol, None),
            ("×", G, "", "<b>G</b>, the gradient", None),
            ("→", step, "step", f"the step: −{symbol} <b>G</b>", step),
            ("", prompt, "P", "<b>P</b> before", None),
            ("→", prompt + step, "P", "<b>P</b> after", step),
        ):
            if sign:
                sheet.text(x + gap / 2, middle, sign, LARGE, t.ink, "center")
            elif x > 60:
                x += 42
            start = x + gap if sign else x
            end = grid(start, top, numbers, colour, marked)
            tone = t.quiet if not colour else ink
            sheet.text((start + end) / 2, below, label, SMALL, tone, "center")
            x = end
    return sheet.done()


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(str(n) for n in numbers)


def row_kernels(kernels: Mapping[str, Any], dark: bool | None = None) -> go.Figure:
    """How far row i of the prompt moves for a gradient at row j, (P, P) for each way to make it; a
    grid is as dark as its largest number, which stands below with the mean of the others."""
    found = {name: np.asarray(kernel, dtype=float) for name, kernel in kernels.items()}
    P, count = len(next(iter(found.values()))), len(found)
    wide = 172
    cell = wide / P
    between = (788 - count * wide) / count
    shares, lengths = {}, {}
    for name, kernel in found.items():
        lengths[name] = kernel.diagonal().mean()
        shares[name] = kernel[~np.eye(P, dtype=bool)].mean() / lengths[name]
    said = "; ".join(
        f"{name}: a row's own gradient moves it {lengths[name]:.1f} times as far as without an "
        f"encoder, another row's {shares[name]:.2f} of that"
        for name in found
    )
    sheet = Sheet(
        "Through a network every row answers to the gradient of every other",
        wide + 116,
        f"{count} grids of {P} by {P} rows of the prompt. {said}.",
        dark,
    )
    t, top = sheet.theme, 44
    for k, (name, kernel) in enumerate(found.items()):
        left = 10 + between / 2 + k * (wide + between)
        middle, most = left + wide / 2, kernel.max()
        sheet.text(middle, 14, f"<b>{name}</b>", NORMAL, align="center")
        sheet.text(middle, 32, "gradient at row j →", SMALL, t.quiet, "center")
        for i in range(P):
            for j in range(P):
                fill = mixed(t.paper, t.fill(PROMPT), max(0.0, kernel[i, j]) / most)
                hover = f"{name}: row {i + 1} moves {kernel[i, j]:.2f} for row {j + 1}'s gradient"
                sheet.box(left + j * cell, top + i * cell, cell, cell, fill, t.faint, hover=hover)
        low = top + wide + 18
        sheet.text(middle, low, f"own row: {number(lengths[name], 1)}", NORMAL, t.ink, "center")
        words = f"another row: {number(shares[name], 2)} of that"
        sheet.text(middle, low + 18, words, NORMAL, t.text(PROMPT), "center")
    return sheet.done()


def kept_of_encoder(tuned: Tuned, dark: bool | None = None) -> go.Figure:
    """P-tuning with an LSTM while it trains and in its file, from what is attached; every matrix is
    to one scale.

    Raises ValueError unless P-tuning with an LSTM is attached.
    """
    table, lstm, mlp, prompt = _parts(tuned, "PTuning(20)")
    (P, d), (mix, tail, trained) = prompt.shape, _sizes(tuned)
    deep = len(lstm) // 4
    steps = [lstm[f"weight_{kind}_l{i}"] for i in range(deep) for kind in ("ih", "hh")]
    title = f"{trained:,} numbers train; {P * d:,} are kept"
    alt = (
        f"Above, while it trains: a table Z ({table.shape[0]} × {table.shape[1]}), an LSTM of "
        f"{len(lstm)} matrices in two directions ({mix:,} numbers with its biases), an MLP of two "
        f"matrices ({tail:,}), and the prompt P ({P} × {d}) that they make. Below, in the file: P "
        "alone; the rest is crossed out."
    )
    sheet = Sheet(title, 466, alt, dark)
    t = sheet.theme
    unit = min(0.2, 150 / (2 * max(m.shape[0] for m in steps)))
    for top, heading, kept in ((22, "while it trains", False), (252, "in the file", True)):
        middle, x = top + 88, 40.0
        sheet.text(14, top - 8, f"<b>{heading}</b>", NORMAL)
        ink = t.quiet if kept else t.text(PROMPT)

        def block(x: Number, y: Number, tensor: Any, hover: str, kept: bool = kept) -> Number:
            h, w = (max(3.0, side * unit) for side in tensor.shape)
            sheet.matrix(x, y - h / 2, w, h, "", "" if kept else PROMPT, hover=hover)
            return x + w

        def named(
            x0: Number, x1: Number, lines: Sequence[str], y: Number = middle + 92, ink: str = ink
        ) -> None:
            for i, words in enumerate(lines):
                sheet.text((x0 + x1) / 2, y + 15 * i, words, SMALL, ink, "center")

        end = block(x, middle, table, f"Z: {table.shape[0]} × {table.shape[1]}")
        named(x, end, ("<b>Z</b>, the table", f"{table.shape[0]} × {table.shape[1]}"))
        sheet.arrow([(end + 8, middle), (end + 84, middle)], t.edge)
        x = start = end + 92
        for way, shift in (("", -42), ("_reverse", 42)):
            x = start
            for i in range(deep):
                for kind in ("ih", "hh"):
                    tensor = lstm[f"weight_{kind}_l{i}{way}"]
                    words = f"layer {i + 1}, {'backward' if way else 'forward'}: "
                    words += f"{tensor.shape[0]} × {tensor.shape[1]}"
                    x = block(x, middle + shift, tensor, words) + 5
                x += 8
        x -= 13
        named(start, x, ("<b>LSTM</b>, two directions", f"{mix:,} numbers"))
        sheet.arrow([(x + 8, middle), (x + 84, middle)], t.edge)
        start = x + 92
        x = block(start, middle, mlp["0.weight"], "W₁ of the MLP") + 6
        x = block(x, middle, mlp["2.weight"], "W₂ of the MLP")
        named(start, x, ("<b>MLP</b>", f"{tail:,} numbers"))
        if kept:
            for y0, y1 in ((middle - 78, middle + 78), (middle + 78, middle - 78)):
                sheet.line([(24, y0), (x + 10, y1)], t.ink, 2.5)
        else:
            sheet.arrow([(x + 8, middle), (x + 84, middle)], t.edge)
        start, w, h = x + 120, d * unit, max(3.0, P * unit)
        sheet.matrix(start, middle - h / 2, w, h, "", PROMPT, made=not kept, hover=f"P: {P} × {d}")
        of_prompt = dict(y=middle - 24, ink=t.text(PROMPT))
        named(start, start + w, (f"<b>P</b> {P} × {d}",), **of_prompt)
        words = f"kept: {P * d:,} numbers" if kept else "made anew at every step"
        named(start, start + w, (words,), middle + 24, t.quiet)
    return sheet.done()


def template_places(rows: Mapping[str, Sequence[str]], dark: bool | None = None) -> go.Figure:
    """Where virtual tokens stand in a text: a row for each template, its tokens in order; a virtual
    token is "◆"."""
    longest = max(len(tokens) for tokens in rows.values())
    said = "; ".join(f"{name}: {' '.join(tokens)}" for name, tokens in rows.items())
    sheet = Sheet(
        f"{next(iter(rows.values())).count(VIRTUAL)} vectors in {len(rows)} places",
        len(rows) * 46 + 34,
        f"{len(rows)} rows of tokens, {VIRTUAL} for a virtual one. {said}.",
        dark,
    )
    t, left = sheet.theme, 150
    room, small = sheet.width - left - 10, 26
    words = max(sum(token != VIRTUAL for token in tokens) for tokens in rows.values())
    w = (room - (longest - words) * (small + 3)) / words - 3
    for k, (name, tokens) in enumerate(rows.items()):
        y, x, virtual = 14 + k * 46, float(left), 0
        sheet.text(left - 12, y + 14, name, NORMAL, align="right")
        for token in tokens:
            if token == VIRTUAL:
                virtual += 1
                fill = t.fill(PROMPT)
                sheet.box(x, y, small, 28, fill, t.line(PROMPT))
                sheet.text(x + small / 2, y + 14, f"P{virtual}", SMALL, t.on(fill), "center")
                x += small + 3
            else:
                gap = token.startswith("[MASK")
                fill = t.paper if gap else t.frozen
                edge = t.ink if gap else t.edge
                sheet.box(x, y, w, 28, fill, edge, width=2 if gap else 1)
                sheet.text(x + w / 2, y + 14, token, SMALL, t.on(fill), "center")
                x += w + 3
    foot = 14 + len(rows) * 46 + 4
    sheet.key(left, foot, [(PROMPT, "virtual tokens: trained"), ("", "the text: frozen")])
    return sheet.done()


def seeds_in_rows(table: pd.DataFrame, value: str, row: str, title: str, x_title: str) -> go.Figure:
    """Every run as a point, a row for each value of `row` from the top; runs that are equal stand
    one on another, and a bar marks the mean."""
    rows = list(dict.fromkeys(table[row]))
    high = table.groupby(row)[value].agg(lambda runs: runs.value_counts().max()).max()
    tall = max(62, 5.6 * (high - 1) / 0.6)  # pixels: a stack ends well below the row above
    height = 130 + round(tall * len(rows))
    fig = figure(title, x_title, "", height=height, showlegend=False, margin_l=160)
    colour, step = theme().line(PROMPT), 5.6 / tall
    for at, name in enumerate(rows):
        runs = table.loc[table[row] == name, value].sort_values()
        level = runs.groupby(runs).cumcount()  # how many equal ones lie below
        look = dict(color=colour, symbol=MARKERS["p_tuning"], size=10, line_width=1.5)
        fig.add_scatter(x=runs, y=at - step * level, mode="markers", marker=look, name=name)
        mean = dict(type="line", x0=runs.mean(), x1=runs.mean(), y0=at + 0.2, y1=at - 0.35)
        fig.add_shape(**mean, line=dict(color=theme().ink, width=2.5))
    fig.update_layout(title=dict(x=0, xref="container", pad_l=12))
    ends = [len(rows) - 0.6, -max(0.5, step * high + 0.1)]
    return fig.update_yaxes(tickvals=list(range(len(rows))), ticktext=rows, range=ends)


def moved_by_step(curves: Mapping[str, pd.DataFrame], title: str) -> go.Figure:
    """How far each step moved the prompt, in learning rates: columns `step` and `far` for each way
    to make it, which is named at the end of its line."""
    fig = figure(title, "step", "movement of P, in learning rates", height=400, showlegend=False)
    colour = theme().line(PROMPT)
    for (name, rows), dash in zip(curves.items(), DASHES, strict=False):
        look = dict(color=colour, symbol=MARKERS["p_tuning"], size=8)
        fig.add_scatter(
            x=rows["step"], y=rows["far"], mode="lines+markers", marker=look, name=name,
            line=dict(color=colour, dash=dash, width=2),
        )  # fmt: skip
        end = dict(x=rows["step"].iloc[-1], y=float(np.log10(rows["far"].iloc[-1])))
        fig.add_annotation(text=name, xanchor="left", xshift=10, showarrow=False, **end)
    fig.update_layout(margin_r=110).update_xaxes(dtick=5)
    return fig.update_yaxes(type="log", dtick=1)
