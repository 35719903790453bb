"""The levels of a 4-bit data type as bins under a bell, and a weight that drops into one."""

import math
import statistics

import numpy as np
import plotly.graph_objects as go
import torch

from peftlab.figures.sheet import NORMAL, SMALL, Number, Sheet, number
from peftlab.figures.style import COLOURS
from peftlab.sites.quantisation import NF4_OFFSET, nearest, table

HIGH = 190  # of the bell
# The normal whose quantile at NF4's outermost probability is 1, the largest level.
DEVIATION = 1 / statistics.NormalDist().inv_cdf(NF4_OFFSET)


def bell(
    weight: Number, scale: Number, quant_type: str = "nf4", dark: bool | None = None
) -> go.Figure:
    """A weight drops into one of the bins of a data type, under the normal that weights resemble.

    `scale` is the largest |w| of its block. The bins end halfway between two levels; the code of
    the weight is the number of its bin. Raises ValueError if |weight| is above the scale.
    """
    if not 0 < scale or abs(weight) > scale:
        raise ValueError(
            f"weight={weight:g}: allowed is −{scale:g} to {scale:g}, its block's scale"
        )
    levels = table(quant_type)
    at = weight / scale
    code = int(nearest(torch.tensor([at], dtype=torch.float32), levels)[0])
    values = [float(level) for level in levels]
    level, error = values[code], scale * values[code] - weight
    drop, back, over = number(at, 3), number(scale * level, 3), number(scale, 3)
    title = f"{number(weight, 3)} becomes code {code}: {over} × {number(level, 3)} = {back}"
    alt = (
        f"A bell curve with the {len(values)} bins of {quant_type}. The weight {number(weight, 3)} "
        f"over its block's largest, {over}, is {drop}. It falls into bin {code}, whose "
        f"level is {number(level, 3)}. Decoded it is {back}, off by {number(error, 4)}."
    )
    sheet = Sheet(title, 376, alt, dark)
    t, colour = sheet.theme, COLOURS["nf4"]
    base = 290.0

    def x_of(value: Number) -> Number:
        return 400 + 360 * value

    def y_of(value: Number) -> Number:
        return base - HIGH * math.exp(-0.5 * (value / DEVIATION) ** 2)

    edges = [-1.06, *[(a + b) / 2 for a, b in zip(values, values[1:], strict=False)], 1.06]
    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        xs = np.linspace(low, high, 16)
        top = [(x_of(v), y_of(v)) for v in xs]
        here = i == code
        fill = t.fill(colour) if here else t.frozen if i % 2 else t.faint
        sheet.area([(x_of(low), base), *top, (x_of(high), base)], fill)
    curve = np.linspace(-1.06, 1.06, 161)
    sheet.line([(x_of(v), y_of(v)) for v in curve], t.edge)
    sheet.line([(x_of(-1.06), base), (x_of(1.06), base)], t.edge)
    last = -99.0
    for i, value in enumerate(values):
        ink = t.text(colour) if i == code else t.ink
        sheet.line([(x_of(value), base), (x_of(value), base + 7)], ink, 2.5 if i == code else 1.2)
        sheet.text(
            x_of(value), base + 16, f"<b>{i}</b>" if i == code else f"{i}", SMALL, ink, "center"
        )
        if x_of(value) - last > 42 or value in (-1.0, 0.0, 1.0):
            last = x_of(value)
            sheet.text(last, base + 32, f"{number(value, 2)}", SMALL, t.quiet, "center")
    words = f"code, and the level it stands for: the weight over its block's largest, {over}"
    sheet.text(400, base + 52, words, SMALL, t.quiet, "center")
    fall = x_of(at)
    side = -1 if at > 0.5 else 1
    sheet.arrow([(fall, 40), (fall, base - 4)], t.ink, 2)
    sheet.plus(fall, 34, "w", t.ink, 11)
    words = f"w = {number(weight, 3)}, and w / {over} = {drop}"
    sheet.text(fall + 18 * side, 34, words, NORMAL, t.ink, "left" if side > 0 else "right")
    moved = f"decoded as {back}: off by {number(error, 4)}"
    sheet.text(fall + 18 * side, 52, moved, NORMAL, t.text(colour), "left" if side > 0 else "right")
    return sheet.done()
