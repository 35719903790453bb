"""Adapters, scales and biases drawn: a bend by hand, what each method reads and where it adds, a
bias that the softmax takes away, a norm inside the next weight; and what a forward pass costs."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from peftlab.figures.sheet import LARGE, NORMAL, SMALL, Number, Sheet
from peftlab.figures.style import BLACK, BLUE, COLOURS, DASHES, GREY, figure, styles
from peftlab.figures.theme import theme

PURPLE = COLOURS["houlsby"]
CELL = 36
WHERE = {"k": "keys", "v": "values", "down": "inside the MLP"}


def _grid(
    sheet: Sheet, x: Number, y: Number, numbers: Tensor, colour: str = "", made: bool = False,
    digits: str = "g", cell: Number = CELL,
) -> None:  # fmt: skip
    """A matrix with every number in its cell."""
    t = sheet.theme
    fill = t.frozen if not colour else t.tint(colour) if made else t.fill(colour)
    for i, row in enumerate(numbers.tolist()):
        for j, number in enumerate(row):
            sheet.box(x + j * cell, y + i * cell, cell, cell, fill, t.paper, width=2)
            text = format(number + 0.0, digits).replace("-", "−")
            place = (x + (j + 0.5) * cell, y + (i + 0.5) * cell)
            sheet.text(*place, text, NORMAL, t.on(fill), "center")


def hand_bend(W_down: Tensor, W_up: Tensor, y: Tensor, dark: bool | None = None) -> go.Figure:
    """y + W_up ReLU(W_down y) for y and for −y, every number in its cell."""
    (m, d), gap = W_down.shape, 52
    sheet = Sheet("", 10, "", dark)
    t, ink, high, told = sheet.theme, sheet.theme.text(PURPLE), d * CELL, []
    top = 36
    for row, (name, v) in enumerate((("y", y), ("−y", -y))):
        low = W_down @ v
        bent = torch.relu(low)
        f = W_up @ bent
        x, at = 26.0, top + row * (high + 62)
        middle = at + high / 2
        parts = (
            (name, v, ""),
            ("W_down", W_down, PURPLE),
            (f"W_down ({name})" if row else "W_down y", low, PURPLE),
            ("ReLU", bent, PURPLE),
            ("W_up", W_up, PURPLE),
            (f"f({name})", f, PURPLE),
            (f"{name} + f({name})", v + f, ""),
        )
        for label, numbers, colour in parts:
            made = bool(colour) and numbers.dim() == 1  # by a matrix; what trains is a matrix
            numbers = numbers if numbers.dim() == 2 else numbers[:, None]
            rows, cols = numbers.shape
            if label != name:
                sheet.arrow([(x + 8, middle), (x + gap - 8, middle)], t.edge)
                x += gap
            up = middle - rows * CELL / 2
            _grid(sheet, x, up, numbers, colour, made)
            words = f"<b>{label}</b>"
            place = (x + cols * CELL / 2, up - 11)
            sheet.text(*place, words, NORMAL, ink if colour else t.ink, "center")
            x += cols * CELL
        told.append(f"{name} = {v.tolist()}: in the middle {low.tolist()}, bent {bent.tolist()}, ")
        told[-1] += f"f = {f.tolist()}"
    alt = f"An adapter from {d} numbers to {m} and back, by hand. {'; '.join(told)}."
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    title = "ReLU lets −y through and stops y: no matrix can do that"
    return sheet.resized(title, top + 2 * high + 62 + 14).done()


# --- what each reads, and where it adds ---------------------------------------------------------
def reads_and_adds(dark: bool | None = None) -> go.Figure:
    """Six methods around one frozen sublayer: the place that each reads, and where it acts."""
    sheet = Sheet("", 402, "", dark)
    t = sheet.theme
    told = []
    for place, (name, draw, first, second) in enumerate(_PLACES):
        x, y = 14 + 264 * (place % 3), 8 + 200 * (place // 3)
        sheet.text(x, y + 8, f"<b>{name}</b>", NORMAL)
        draw(sheet, x, y + 30)
        sheet.text(x, y + 155, first, SMALL, t.quiet)
        sheet.text(x, y + 170, second, SMALL, t.quiet)
        told.append(f"{name}: {first}, {second}")
    alt = f"One sublayer beside the residual stream, six times. {'; '.join(told)}."
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    return sheet.resized("The same sublayer six times: what is read, and where it acts", 392).done()


STREAM, ROAD, BELOW = 10, 62, 104  # the stream, the frozen road, the road of what trains
START, END = 18, 222


def _block(sheet: Sheet, x: Number, y: Number, end: Number = END, name: str = "sublayer") -> None:
    """The stream, and a frozen sublayer that reads x from it and adds y to it."""
    sheet.stream(x, x + 250, y + STREAM)
    sheet.arrow([(x + START, y + STREAM), (x + START, y + ROAD), (x + 76, y + ROAD)])
    if name:
        sheet.matrix(x + 78, y + ROAD - 17, 72, 34, name)
    sheet.arrow([(x + 152, y + ROAD), (x + end, y + ROAD), (x + end, y + STREAM + 9)])
    sheet.plus(x + end, y + STREAM)


def _module(sheet: Sheet, x: Number, y: Number, name: str, colour: str, wide: int = 44) -> None:
    """A small trained thing, centred on a point."""
    t = sheet.theme
    sheet.box(x - wide / 2, y - 11, wide, 22, t.fill(colour), t.line(colour))
    sheet.text(x, y, f"<b>{name}</b>", NORMAL, t.on(t.fill(colour)), "center")


def _after(sheet: Sheet, x: Number, y: Number) -> None:
    _block(sheet, x, y)
    line = sheet.theme.line(PURPLE)
    sheet.arrow([(x + 162, y + ROAD), (x + 162, y + BELOW), (x + 170, y + BELOW)], line)
    sheet.line([(x + 188, y + BELOW), (x + 204, y + BELOW)], line)
    sheet.arrow([(x + 204, y + BELOW), (x + 204, y + ROAD + 9)], line)
    _module(sheet, x + 183, y + BELOW, "f", PURPLE, 24)
    sheet.plus(x + 204, y + ROAD, colour=line, r=7)


def _after_the_sum(sheet: Sheet, x: Number, y: Number) -> None:
    _block(sheet, x, y, 168)
    line = sheet.theme.line(PURPLE)
    sheet.arrow([(x + 186, y + STREAM), (x + 186, y + BELOW), (x + 194, y + BELOW)], line)
    sheet.line([(x + 214, y + BELOW), (x + 232, y + BELOW)], line)
    sheet.arrow([(x + 232, y + BELOW), (x + 232, y + STREAM + 9)], line)
    _module(sheet, x + 208, y + BELOW, "f", PURPLE, 24)
    sheet.plus(x + 232, y + STREAM, colour=line)


def _beside(sheet: Sheet, x: Number, y: Number, name: str = "s · f", colour: str = PURPLE) -> None:
    _block(sheet, x, y, name="sublayer" if colour == PURPLE else "W")
    line = sheet.theme.line(colour)
    sheet.arrow([(x + 48, y + ROAD), (x + 48, y + BELOW), (x + 88, y + BELOW)], line)
    sheet.line([(x + 138, y + BELOW), (x + 190, y + BELOW)], line)
    sheet.arrow([(x + 190, y + BELOW), (x + 190, y + ROAD + 9)], line)
    _module(sheet, x + 114, y + BELOW, name, colour, 50)
    sheet.plus(x + 190, y + ROAD, colour=line, r=7)


def _lora(sheet: Sheet, x: Number, y: Number) -> None:
    _beside(sheet, x, y, "B A", BLUE)


def _factors(sheet: Sheet, x: Number, y: Number) -> None:
    _block(sheet, x, y, name="")
    line = sheet.theme.line(PURPLE)
    sheet.matrix(x + 78, y + ROAD - 17, 20, 34)
    sheet.matrix(x + 132, y + ROAD - 17, 20, 34)
    sheet.line([(x + 98, y + ROAD), (x + 132, y + ROAD)])
    sheet.arrow([(x + 115, y + BELOW - 12), (x + 115, y + ROAD + 9)], line)
    _module(sheet, x + 115, y + BELOW, "l", PURPLE, 24)
    sheet.plus(x + 115, y + ROAD, "×", line, 7)


def _own(sheet: Sheet, x: Number, y: Number) -> None:
    _block(sheet, x, y)
    t = sheet.theme
    sheet.matrix(x + 40, y + ROAD - 17, 22, 34)
    for at, name in ((44, "g"), (54, "b"), (152, "b")):
        sheet.matrix(x + at, y + ROAD - 17, 4, 34, colour=BLACK)
        sheet.text(x + at + 2, y + ROAD + 28, f"<b>{name}</b>", NORMAL, t.text(BLACK), "center")
    sheet.text(x + 51, y + ROAD - 27, "norm", SMALL, t.quiet, "center")


_PLACES = (
    ("Houlsby, Pfeiffer (here)", _after, "f reads what the sublayer gives", "and adds to it"),
    ("Pfeiffer (their library)", _after_the_sum, "f reads behind the sum",
     "(in BERT: behind the norm)"),
    ("parallel", _beside, "f reads what the sublayer reads", "and adds to what it gives, times s"),
    ("LoRA", _lora, "reads and adds around one W", "no bend: it can be merged"),
    ("(IA)³", _factors, "multiplies k, v and the MLP's inside", "by factors: they can be merged"),
    ("BitFit, LayerNorm tuning", _own, "nothing is added: biases b train,",
     "or g and b of the norms"),
)  # fmt: skip


# --- what is idle, and what folds away ---------------------------------------------------------
def idle_bias(q: Tensor, k: Tensor, b: Tensor, dark: bool | None = None) -> go.Figure:
    """Scores q·k, the number q·b that a key's bias adds to a whole row, and the softmax of both.

    q (queries, d), k (keys, d), b (d,); scores are not divided by √d here.
    """
    scores, more = q @ k.T, (q @ b)[:, None].expand(-1, len(k))
    sheet = Sheet("", 10, "", dark)
    t, top = sheet.theme, 62
    x, wide, high = 30.0, len(k) * CELL, len(q) * CELL
    parts = (
        ("<b>q · k</b>", scores, "", "g", ""),
        ("<b>q · b_k</b>", more, BLACK, "g", "+"),
        ("<b>q · (k + b_k)</b>", scores + more, "", "g", "="),
        ("<b>softmax</b> of both", scores.softmax(-1), "", ".0%", "→"),
    )
    for words, numbers, colour, digits, sign in parts:
        if sign:
            sheet.text(x + 22, top + high / 2, sign, LARGE, t.quiet, "center")
            x += 44
        cell = CELL + 8 if digits == ".0%" else CELL
        left, size = x, cell if digits == ".0%" else CELL
        sheet.text(left, top - 14, words, NORMAL, t.text(colour) if colour else t.ink)
        for i, row in enumerate(numbers.tolist()):
            fill = t.fill(colour) if colour else t.frozen
            for j, number in enumerate(row):
                sheet.box(left + j * size, top + i * CELL, size, CELL, fill, t.paper, width=2)
                text = format(number + 0.0, digits).replace("-", "−")
                place = (left + (j + 0.5) * size, top + (i + 0.5) * CELL)
                sheet.text(*place, text, NORMAL, t.on(fill), "center")
        x += len(k) * size
    low = top + high + 16
    sheet.text(30, low, "a row is a query", SMALL, t.quiet)
    sheet.text(30 + wide + 44, low, "one number a row", SMALL, t.quiet)
    after = (scores + more).softmax(-1)
    moved = (after - scores.softmax(-1)).abs().max().item()
    title = "A key's bias adds one number to a whole row, and the softmax takes it away"
    alt = (
        f"Scores {scores.tolist()}, to each row of which q·b is added: {(q @ b).tolist()}. "
        f"The attention weights move by at most {moved:.0e}."
    )
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    return sheet.resized(title, low + 16).done()


def norm_folded(
    W: Tensor, c: Tensor, g: Tensor, b: Tensor, dark: bool | None = None
) -> go.Figure:  # fmt: skip
    """W (g ⊙ x̂ + b) + c as one matrix and one bias: g on the columns of W, W b into the bias."""
    sheet = Sheet("", 10, "", dark)
    t, ink, top = sheet.theme, sheet.theme.text(BLACK), 96
    (rows, cols), high = W.shape, W.shape[0] * CELL

    def both(x: Number, W: Tensor, c: Tensor, names: Sequence[str], made: str) -> Number:
        """A matrix and its bias, side by side; returns the right end."""
        _grid(sheet, x, top, W, made, bool(made))
        at = x + cols * CELL + 26
        _grid(sheet, at, top, c[:, None], made, bool(made))
        sheet.text(x + cols * CELL / 2, top + high + 14, names[0], NORMAL, align="center")
        sheet.text(at + CELL / 2, top + high + 14, names[1], NORMAL, align="center")
        return at + CELL

    left = 150
    _grid(sheet, left, 34, g[None, :], BLACK)
    sheet.text(left - 10, 34 + CELL / 2, "<b>g</b> of the norm", NORMAL, ink, "right")
    for j in range(cols):
        sheet.arrow([(left + (j + 0.5) * CELL, 73), (left + (j + 0.5) * CELL, 92)], t.line(BLACK))
    right = both(left, W, c, ("<b>W</b>", "<b>c</b>"), "")
    sheet.text(left - 10, top + high / 2, "the next weight", NORMAL, t.quiet, "right")
    _grid(sheet, right + 62, top + (rows - cols) * CELL / 2, b[:, None], BLACK)
    sheet.text(
        right + 62 + CELL / 2, top + high + 14, "<b>b</b> of the norm", NORMAL, ink, "center"
    )
    sheet.arrow([(right + 54, top + high / 2), (right + 8, top + high / 2)], t.line(BLACK))
    sheet.text(right + 31, top + high / 2 - 12, "W b", NORMAL, ink, "center")
    end = right + 62 + CELL
    sheet.text(end + 50, top + high / 2, "=", LARGE, t.quiet, "center")
    names = ("<b>W diag(g)</b>", "<b>W b + c</b>")
    both(end + 100, W * g, W @ b + c, names, BLACK)
    title = "Folded into the next weight, a norm is a factor on each column and a bias"
    alt = (
        f"W = {W.tolist()} with bias {c.tolist()}; the norm before it has g = {g.tolist()} and "
        f"b = {b.tolist()}. Together they are {(W * g).tolist()} with bias {(W @ b + c).tolist()}."
    )
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    return sheet.resized(title, top + high + 32).done()


# --- results -----------------------------------------------------------------------------------
def factors_by_layer(factors: Mapping[str, Tensor], title: str) -> go.Figure:
    """Boxes of learned factors by layer and place, "layers.3.k" and so on; lines at 1 and at 0.

    A box holds the middle half, its line is the median, its whiskers end at the furthest points.
    """
    rows = [
        {"layer": int(name.split(".")[-2]), "where": name.split(".")[-1], "factor": value}
        for name, tensor in factors.items()
        for value in tensor.tolist()
    ]
    table = pd.DataFrame(rows)
    table["where"] = table["where"].replace(WHERE)
    fig = figure(title, "layer", "factor l")
    edge = theme().text(PURPLE)  # the median must show in the fullest box
    for place, (where, rows) in enumerate(table.groupby("where", sort=False)):
        look = dict(marker_color=PURPLE, line=dict(color=edge, width=1.5), whiskerwidth=0.6)
        opacity = (0.1, 0.35, 0.7)[place % 3]
        red, green, blue = (int(PURPLE[i : i + 2], 16) for i in (1, 3, 5))
        fig.add_box(
            x=rows["layer"], y=rows["factor"].round(4), name=str(where), boxpoints=False,
            fillcolor=f"rgba({red},{green},{blue},{opacity})", offsetgroup=place, **look,
        )  # fmt: skip
    for level, dash in ((1, "solid"), (0, "dash")):
        fig.add_hline(y=level, line=dict(color=GREY, dash=dash, width=1.5), layer="below")
    fig.update_layout(boxmode="group", legend=dict(orientation="h", y=-0.22, x=0), margin_b=80)
    return fig.update_xaxes(dtick=1).update_yaxes(showgrid=False)  # a grid would hide both lines


def forward_costs(times: pd.DataFrame, title: str) -> go.Figure:
    """The time of a forward pass as a multiple of the plain base's: a row for each "label".

    `times` has "label", "batch", and the quartiles "low", "ratio" and "high" of the pairs.
    """
    fig = figure(title, "forward pass, times the plain base's (median and quartiles)", "")
    labels = list(dict.fromkeys(times["label"]))
    looks = styles(labels)
    for n, (batch, rows) in enumerate(times.groupby("batch")):
        shift, dash = (0.16, DASHES[2]) if n else (-0.16, DASHES[0])
        for row in rows.itertuples():
            look, y = looks[row.label], labels.index(row.label) + shift
            colour = look["colour"] or GREY
            marker = dict(symbol=look["marker"], size=10, color=colour)
            line = dict(mode="lines", line=dict(color=colour, width=2, dash=dash))
            fig.add_scatter(x=[row.low, row.high], y=[y, y], **line, showlegend=False)
            name = f"{row.label}, batch {batch}"
            point = dict(mode="markers", marker=marker, name=name, showlegend=False)
            fig.add_scatter(x=[row.ratio], y=[y], **point)
        line = dict(mode="lines", line=dict(color=GREY, width=2, dash=dash))
        fig.add_scatter(x=[None], y=[None], **line, name=f"batch {batch}")
    fig.add_vline(x=1, line=dict(color=GREY, dash="dash"), layer="below")
    fig.update_xaxes(range=[times["low"].min() - 0.03, times["high"].max() + 0.03])
    ticks = dict(tickvals=list(range(len(labels))), ticktext=labels, ticks="")
    fig.update_yaxes(range=[len(labels) - 0.5, -0.5], **ticks)
    legend = dict(x=0.99, xanchor="right", y=0.99)
    return fig.update_layout(height=130 + 40 * len(labels), margin_l=210, legend=legend)
