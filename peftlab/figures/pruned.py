"""Pruning in pictures: masks of a small matrix, Wanda's score, a neuron taken out, the costs."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from peftlab.bases import Linear
from peftlab.figures.sheet import LARGE, NORMAL, SMALL, Number, Sheet
from peftlab.figures.style import BLACK, BLUE, COLOURS, GREY, MARKERS, figure
from peftlab.figures.theme import theme

RED = COLOURS["prune"]
CELL = 38  # pixels of a number in a small matrix


def _say(value: Number) -> str:
    return f"{value:.3g}".replace("-", "−")


def _grid(sheet: Sheet, x: Number, y: Number, numbers: Tensor, mask: Tensor, fours: bool) -> None:
    """Numbers in cells; those that the mask takes are empty but for a pale number, struck out."""
    t = sheet.theme
    for i, (row, kept) in enumerate(zip(numbers.tolist(), mask.tolist(), strict=True)):
        for j, (value, stays) in enumerate(zip(row, kept, strict=True)):
            left, top = x + j * CELL, y + i * CELL
            fill = t.frozen if stays else t.paper
            sheet.box(left, top, CELL, CELL, fill, t.faint)
            words = _say(value) if stays else f"<s>{_say(value)}</s>"
            ink = t.on(fill) if stays else t.text(RED)
            sheet.text(left + CELL / 2, top + CELL / 2, words, NORMAL, ink, "center")
    rows, columns = numbers.shape
    for j in range(0, columns + 1, 4 if fours else columns):
        at = x + j * CELL
        sheet.line([(at, y), (at, y + rows * CELL)], t.ink, 2 if fours else 1)
    for at in (y, y + rows * CELL):
        sheet.line([(x, at), (x + columns * CELL, at)], t.ink, 1)


def hand_masks(W: Tensor, masks: Mapping[str, Tensor], dark: bool | None = None) -> go.Figure:
    """A small matrix with its numbers under each mask, two side by side: what goes is struck out.

    A mask whose label has "2:4" gets a line around every four.
    """
    rows, columns = W.shape
    sheet = Sheet("", 10, "", dark)
    t, wide, high, said = sheet.theme, 400, rows * CELL + 62, []
    for n, (label, mask) in enumerate(masks.items()):
        x, y = 20 + n % 2 * wide, 36 + n // 2 * high
        sheet.text(x, y - 18, f"<b>{label}</b>", NORMAL)
        _grid(sheet, x, y, W, mask, "2:4" in label)
        gone = (~mask).sum(dim=1).tolist()
        words = f"zeros in the rows: {', '.join(map(str, gone))}" if sum(gone) else "nothing gone"
        sheet.text(x, y + rows * CELL + 13, words, SMALL, t.quiet)
        said.append(f"{label}: {(W * mask).tolist()}")
    alt = "One small matrix under several masks. " + "; ".join(said)
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    counts = {int((~mask).sum()) for mask in masks.values()} - {0}
    title = f"{' or '.join(map(str, sorted(counts)))} of {W.numel()} numbers go: which ones depends"
    title += " on what is compared"
    return sheet.resized(title, 24 + -(-len(masks) // 2) * high).done()


def loud_inputs(
    W: Tensor, norms: Tensor, by_size: Tensor, by_wanda: Tensor, dark: bool | None = None
) -> go.Figure:
    """A small matrix by size, and the same with each column multiplied by the norm of its input.

    The bars above the columns are the norms; what each mask takes is struck out.
    """
    (rows, columns), top = W.shape, 108
    sheet = Sheet("", 10, "", dark)
    t, scores = sheet.theme, W.abs() * norms
    left, right = 40, 440
    heads = ("W, compared by |W|", "scores |W| ‖X‖, compared")
    for x, numbers, mask, head in zip(
        (left, right), (W, scores), (by_size, by_wanda), heads, strict=True
    ):
        sheet.text(x, 16, f"<b>{head}</b>", NORMAL)
        _grid(sheet, x, top, numbers, mask, False)
    most, floor = float(norms.max()), top - 8
    for j, norm in enumerate(norms.tolist()):
        high, x = max(2.0, 44 * norm / most), right + j * CELL
        sheet.box(x + 8, floor - high, CELL - 16, high, t.fill(BLUE), t.line(BLUE))
        words = _say(norm)
        sheet.text(x + CELL / 2, floor - high - 9, words, SMALL, t.text(BLUE), "center")
    sheet.text(right - 10, floor - 12, "‖X_j‖: how loud", SMALL, t.text(BLUE), "right")
    sheet.text(right - 10, floor + 2, "input j is", SMALL, t.text(BLUE), "right")
    middle = top + rows * CELL / 2
    sheet.arrow([(left + columns * CELL + 20, middle), (right - 20, middle)], t.line(BLUE), 2)
    sheet.text((left + columns * CELL + right) / 2, middle - 14, "each column",
               SMALL, t.quiet, "center")  # fmt: skip
    sheet.text((left + columns * CELL + right) / 2, middle + 14, "times its norm",
               SMALL, t.quiet, "center")  # fmt: skip
    low = top + rows * CELL + 16
    turned = int((by_size != by_wanda).sum()) // 2
    for x, mask, other, words in (
        (left, by_size, by_wanda, "gone, and saved by its input"),
        (right, by_wanda, by_size, "gone in its place"),
    ):
        gone = [_say(W[i, j].item()) for i, j in (other & ~mask).nonzero().tolist()]
        some = ", ".join(gone[:3]) + (", …" if len(gone) > 3 else "")
        sheet.text(x, low, f"{words}: {some or 'none'}", SMALL, t.quiet)
    alt = (
        f"W = {W.tolist()}; its inputs have the norms {[round(n, 3) for n in norms.tolist()]}. By "
        f"size stays {(W * by_size).tolist()}; by size times norm stays {(W * by_wanda).tolist()}."
    )
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    title = f"Loud inputs save small weights: {turned} of {int((~by_size).sum())} choices change"
    return sheet.resized(title, low + 16).done()


def neurons_out(
    up: Linear, down: Linear, gone: Sequence[int], dark: bool | None = None
) -> go.Figure:
    """An MLP to scale with some neurons marked, and the smaller one that is left without them.

    Neuron j is row j of `up`, an entry of its bias, and column j of `down`.
    """
    d_ff, d = up.d_out, up.d_in
    left = d_ff - len(set(gone))
    unit = 176 / d_ff
    sheet = Sheet("", 10, "", dark)
    t, red, top = sheet.theme, sheet.theme.line(RED), 64
    middle = top + d_ff * unit / 2

    def mlp(x: Number, count: int, marks: Sequence[int]) -> None:
        """x, up, the neurons, down, the output; `count` neurons, some of them marked."""
        side, long = d * unit, count * unit
        y = middle - long / 2
        sheet.matrix(x, middle - side / 2, 6, side, hover=f"x: {d} numbers")
        sheet.arrow([(x + 10, middle), (x + 26, middle)])
        sheet.matrix(x + 30, y, side, long, hover=f"up: {count} × {d}")
        sheet.arrow([(x + 34 + side, middle), (x + 52 + side, middle)])
        sheet.matrix(x + 56 + side, y, 6, long, hover=f"{count} neurons")
        sheet.arrow([(x + 66 + side, middle), (x + 84 + side, middle)])
        sheet.matrix(x + 88 + side, middle - side / 2, long, side, hover=f"down: {d} × {count}")
        end = x + 88 + side + long
        sheet.arrow([(end + 4, middle), (end + 22, middle)])
        sheet.matrix(end + 26, middle - side / 2, 6, side, hover=f"output: {d} numbers")
        for j in marks:
            at = j * unit
            sheet.line([(x + 30, y + at), (x + 30 + side, y + at)], red, 2)
            sheet.line([(x + 56 + side, y + at), (x + 62 + side, y + at)], red, 2)
            sheet.line([(x + 88 + side + at, middle - side / 2),
                        (x + 88 + side + at, middle + side / 2)], red, 2)  # fmt: skip
        low = top + d_ff * unit + 14
        sheet.text(x + 30 + side / 2, low, f"<b>up</b> {count} × {d}", SMALL, align="center")
        sheet.text(x + 88 + side + long / 2, middle + side / 2 + 14, f"<b>down</b> {d} × {count}",
                   SMALL, align="center")  # fmt: skip

    mlp(20, d_ff, sorted(set(gone)))
    mlp(430, left, ())
    sheet.text(20, 18, f"<b>{len(set(gone))} neurons marked</b>", LARGE, t.text(RED))
    sheet.text(20, 38, "a row of up, its bias, a column of down", SMALL, t.quiet)
    sheet.text(430, 18, "<b>taken out</b>", LARGE)
    sheet.text(430, 38, "smaller matrices, nothing but ordinary products", SMALL, t.quiet)
    before, after = (n * (2 * d + 1) for n in (d_ff, left))
    alt = (
        f"An MLP with up {d_ff} by {d} and down {d} by {d_ff}; {len(set(gone))} neurons are "
        f"marked, each a row of up and a column of down. Beside it the MLP without them: up {left} "
        f"by {d}, down {d} by {left}; {before - after:,} parameters fewer."
    )
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    title = f"A neuron is a row and a column: without {len(set(gone))} of {d_ff}, "
    title += f"{before - after:,} parameters fewer"
    return sheet.resized(title, top + d_ff * unit + 30).done()


LORA = COLOURS["lora"]
LOOKS = {  # of scores, and of ways back
    "magnitude": (RED, "pentagon"),
    "magnitude, all matrices together": (RED, "pentagon-open"),
    "Wanda": (BLUE, "diamond"),
    "gradient": (BLACK, "square"),
    "random": (GREY, "x"),
    "LoRA, under the mask": (LORA, MARKERS["lora"]),
    "LoRA, dense": (LORA, MARKERS["adalora"]),
    "full fine-tuning, under the mask": (BLACK, "circle"),
    "full fine-tuning, gradual": (BLACK, "circle-open"),
}


def loss_by_sparsity(rows: pd.DataFrame, marks: Mapping[str, float], title: str) -> go.Figure:
    """Loss against the share of zeros, a point for each run and a line through each label's means.

    `rows` has "label", "amount" and "loss"; `marks` are losses that get a dashed line with a name,
    such as that of the model as it was.
    """
    fig = figure(title, "sparsity: share of the linear weights that is zero", "nats per token")
    for label, mine in rows.groupby("label", sort=False):
        colour, symbol = LOOKS.get(label, (BLACK, "circle"))
        colour = theme().line(colour)
        mean = mine.groupby("amount").loss.mean()
        line = dict(color=colour, width=1.5, dash="dot" if symbol.endswith("open") else "solid")
        fig.add_scatter(x=mean.index, y=mean, mode="lines", line=line, showlegend=False)
        marker = dict(color=colour, symbol=symbol, size=9, line=dict(width=2, color=colour))
        fig.add_scatter(x=mine.amount, y=mine.loss, mode="markers", marker=marker, name=label)
    for name, loss in marks.items():
        fig.add_hline(y=loss, line=dict(color=GREY, dash="dash"))
        note = dict(text=name, showarrow=False, xanchor="left", yanchor="top", font_size=12)
        fig.add_annotation(x=0.13, xref="paper", y=math.log10(loss), **note)
    fig.update_xaxes(tickformat=".0%")
    fig.update_yaxes(type="log", tickvals=[0.5, 1, 2, 4, 8, 16])
    legend = dict(orientation="h", x=0, y=-0.26)
    return fig.update_layout(legend=legend, margin=dict(t=70, b=100), height=440)


def runs_in_rows(
    runs: pd.DataFrame, marks: Mapping[str, float], title: str, axis: str
) -> go.Figure:
    """Losses in rows, one line of points for each label within a row; a bar where the mean is.

    `runs` has "row", "label" and "loss"; `marks` are losses that get a dashed line with a name.
    """
    n = sorted(set(runs.groupby(["row", "label"]).size()))
    title += f"<br><sup>every run's point, n = {' or '.join(map(str, n))}; | is the mean</sup>"
    fig, rows = figure(title, axis, ""), list(dict.fromkeys(runs.row))
    for label, mine in runs.groupby("label", sort=False):
        colour, symbol = LOOKS.get(label, (BLACK, "circle"))
        colour = theme().line(colour)
        x, y, means = [], [], []
        for row, some in mine.groupby("row", sort=False):
            labels = list(dict.fromkeys(runs[runs.row == row].label))
            at = rows.index(row) + (labels.index(label) - (len(labels) - 1) / 2) * 0.26
            x, y = x + some.loss.tolist(), y + [at] * len(some)
            means.append((some.loss.mean(), at))
        look = dict(color=colour, line=dict(width=2, color=colour))
        fig.add_scatter(
            x=x, y=y, mode="markers", marker=dict(symbol=symbol, size=9, **look), name=label
        )
        bar = dict(symbol="line-ns", size=14, **look)
        fig.add_scatter(
            x=[mean for mean, _ in means], y=[at for _, at in means], mode="markers", marker=bar,
            showlegend=False, name="mean",
        )  # fmt: skip
    for name, loss in marks.items():
        fig.add_vline(x=loss, line=dict(color=GREY, dash="dash"))
        note = dict(text=name, showarrow=False, xanchor="left", yanchor="bottom", font_size=12)
        fig.add_annotation(x=math.log10(loss), xshift=4, yref="paper", y=0.0, **note)
    ticks = [0.8, 1, 1.5, 2, 3, 4, 6, 8, 12]
    ends = [min([*marks.values(), *runs.loss]) * 0.9, max([*marks.values(), *runs.loss]) * 1.1]
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks],
                     range=[math.log10(end) for end in ends])  # fmt: skip
    fig.update_yaxes(tickvals=list(range(len(rows))), ticktext=rows, ticks="", showgrid=False,
                     range=[len(rows) - 0.4, -0.6])  # fmt: skip
    legend = dict(orientation="h", x=0, y=-0.3)
    return fig.update_layout(legend=legend, margin=dict(l=130, t=70, b=100), height=410)


def damage_by_layer(table: pd.DataFrame, untouched: float, title: str) -> go.Figure:
    """The loss without some neurons of one MLP at a time, by "layer" and "which" of them went."""
    fig = figure(title, "the MLP that loses them", "nats per token")
    looks = ((RED, MARKERS["prune_structures"]), (GREY, "x"), (BLUE, "diamond"))
    for n, (which, mine) in enumerate(table.groupby("which", sort=False)):
        colour, symbol = looks[n % len(looks)]
        marker = dict(color=colour, symbol=symbol, size=10, line=dict(width=2, color=colour))
        beside = mine.layer + (n - 0.5) * 0.24
        fig.add_scatter(x=beside, y=mine.loss, mode="markers", marker=marker, name=which)
    fig.add_hline(y=untouched, line=dict(color=GREY, dash="dash"))
    note = dict(text="nothing taken out", showarrow=False, xanchor="center", yanchor="bottom")
    fig.add_annotation(x=0.5, xref="paper", y=untouched, yshift=12, font_size=12, **note)
    ticks = sorted(table.layer.unique())
    fig.update_xaxes(tickvals=ticks, ticktext=[f"layer {i}" for i in ticks])
    fig.update_yaxes(rangemode="tozero")
    return fig.update_layout(legend=dict(x=0.99, xanchor="right", y=0.98, yanchor="top"))


def times_by_row(times: pd.DataFrame, title: str) -> go.Figure:
    """Recorded times in rows: the median, a line over the middle half, and what the number of
    linear weights that is left would make of the first row's time.

    `times` has "label", "linear weights", "ms", "low", "high"; its first row is the plain model.
    """
    first = times.iloc[0]
    part = times["linear weights"] / first["linear weights"]
    fig = figure(title, "milliseconds of a forward pass", "")
    spread = dict(
        type="data", symmetric=False, array=times.high - times.ms, arrayminus=times.ms - times.low
    )
    marker = dict(color=RED, symbol=MARKERS["prune"], size=10)
    fig.add_scatter(
        x=times.ms, y=times.label, error_x=spread, mode="markers", marker=marker,
        name="median, and the middle half of the runs",
    )  # fmt: skip
    expected = dict(color=GREY, symbol="line-ns", size=20, line=dict(width=2.5, color=GREY))
    fig.add_scatter(
        x=part * first.ms, y=times.label, mode="markers", marker=expected,
        name="the plain model's time × the share of weights left",
    )  # fmt: skip
    fig.update_yaxes(autorange="reversed", type="category", ticks="")
    fig.update_xaxes(rangemode="tozero")
    legend = dict(orientation="h", x=0, y=-0.24, xanchor="left")
    return fig.update_layout(height=470, margin=dict(l=250, t=70, b=110), legend=legend)
