"""What stands beside a frozen weight or sublayer, to scale: LoRA's narrow road, a bottleneck."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.figures.described import describe
from peftlab.figures.draw import render
from peftlab.figures.sheet import NORMAL, SMALL, Sheet
from peftlab.figures.style import COLOURS
from peftlab.methods import Method
from peftlab.methods.bottleneck import Bottleneck
from peftlab.tuned import attach


def bottleneck(f: Bottleneck, where: str, method: str, dark: bool | None = None) -> go.Figure:
    """A small module beside the stream, to scale: d numbers become m, are bent, become d again.

    `f` is one of `tuned.modules`, and `where` its sublayer; `method` gives the colour.
    """
    m, d = f.W_down.shape
    count = sum(p.numel() for p in f.parameters())
    title = f"A bottleneck at {where}: {d} numbers pass through {m}; {count:,} parameters train"
    alt = (
        f"A bottleneck adapter at {where}. A token's {d} numbers go through W_down, {m} by {d}, a "
        f"non-linearity, {f.non_linearity}, and W_up, {d} by {m}, and are added to what came in."
    )
    sheet = Sheet(title, 300, alt, dark)
    t, colour = sheet.theme, COLOURS[method]
    ink, line, unit = t.text(colour), t.line(colour), 150 / d
    stream, y = 40, 180
    sheet.stream(20, 780, stream, f"what the sublayer gives, {d} numbers a token")
    sheet.arrow([(80, stream), (80, y), (140, y)], line, 2)
    sheet.matrix(143, y - m * unit / 2, 150, m * unit, "", colour)
    sheet.text(218, y - m * unit / 2 - 14, f"<b>W_down</b> {m} × {d}", NORMAL, ink, "center")
    sheet.text(218, y + m * unit / 2 + 14, f"b_down {m}", SMALL, ink, "center")
    sheet.arrow([(295, y), (362, y)], line, 2)
    sheet.columns(326, y - m * unit / 2, 1, 7, m * unit, colour, made=True)
    sheet.text(330, y + m * unit / 2 + 14, f"{m} numbers", SMALL, t.quiet, "center")
    sheet.plus(380, y, "σ", line, 16)
    sheet.text(380, y + 28, f.non_linearity, SMALL, t.quiet, "center")
    sheet.arrow([(397, y), (457, y)], line, 2)
    sheet.matrix(460, y - 75, m * unit, 150, "", colour)
    right = 460 + max(3, m * unit)
    sheet.text(right + 8, y - 66, f"<b>W_up</b> {d} × {m}", NORMAL, ink)
    sheet.text(right + 8, y - 48, f"b_up {d}", SMALL, ink)
    if f.scaling != 1:
        sheet.text(right + 60, y + 14, f"× {f.scaling:g}", NORMAL, ink)
    sheet.arrow([(right + 2, y), (690, y), (690, stream + 10)], line, 2)
    sheet.plus(690, stream)
    return sheet.done()


def adapter_places(base, methods: Mapping[str, Method], dark: bool | None = None) -> dict:
    """One picture of the block for each method: the same model, with the switch moved on.

    The base must be free; each method is attached, drawn and taken off again.
    """
    figures = {}
    for label, method in methods.items():
        with attach(base, method) as tuned:
            figures[label] = render(describe(tuned), dark)
    return figures
