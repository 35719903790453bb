"""What stands beside a frozen weight or sublayer, to scale: LoRA's narrow road, a bottleneck."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.accounting import readable_percent
from peftlab.bases import Linear
from peftlab.figures.described import describe
from peftlab.figures.draw import render
from peftlab.figures.sheet import LARGE, NORMAL, SMALL, Number, Sheet, width_of
from peftlab.figures.style import COLOURS
from peftlab.methods import Method
from peftlab.methods.bottleneck import Bottleneck
from peftlab.methods.lora import LowRankDelta
from peftlab.tuned import attach


def narrow_road(linear: Linear, delta: LowRankDelta, dark: bool | None = None) -> go.Figure:
    """LoRA beside one weight: x goes through W, and through A and B, where only r numbers pass.

    `linear` is `tuned.anatomy.linears[name]` and `delta` is `tuned.deltas[name]`. All boxes have
    one scale, and no side is thinner than 3 pixels.
    """
    (r, d_in), d_out = delta.A.shape, delta.B.shape[0]
    trained, frozen = r * (d_in + d_out), d_in * d_out
    share = readable_percent(trained, frozen)
    title = f"{trained:,} parameters train beside the {frozen:,} of W: {share}"
    zero = not delta.B.detach().count_nonzero()
    alt = (
        f"LoRA at {linear.name}. The input x of {d_in:,} numbers goes two ways. Above, through the "
        f"frozen W, {d_out:,} by {d_in:,}. Below, through A, {r} by {d_in:,}, where only {r} "
        f"numbers remain, and through B, {d_out:,} by {r}, times {delta.scale:g}. Both results "
        f"are added to h. {trained:,} parameters train, {frozen:,} are frozen."
    )
    sheet = Sheet(title, 420, alt, dark)
    t, colour = sheet.theme, COLOURS["lora"]
    ink, line = t.text(colour), t.line(colour)
    unit = 170 / max(d_in, d_out)
    top, road = 104, 310  # the middles of the two ways
    w, h, low = d_in * unit, d_out * unit, max(3.0, r * unit)
    left = 400 - w / 2
    _vector(sheet, 50, top, h=d_in * unit, name="x", size=d_in)
    sheet.arrow([(62, top), (left - 3, top)], width=2)
    sheet.matrix(left, top - h / 2, w, h)
    name, size = f"<b>W</b> of {linear.name}", f"{d_out:,} × {d_in:,}, frozen"
    inside = width_of(name, LARGE) + 8 < w and h > 44
    place, lettering = (top - 10, t.on(t.frozen)) if inside else (top + h / 2 + 13, t.ink)
    sheet.text(400, place, name, LARGE, lettering, "center")
    sheet.text(400, place + 20, size, NORMAL, lettering, "center")
    sheet.line([(left + w + 2, top), (684, top)], width=2)
    a, b = 230 - w / 2, 470
    sheet.arrow([(86, top), (86, road), (a - 3, road)], line, 2)
    sheet.matrix(a, road - low / 2, w, low, "", colour)
    sheet.text(230, road - low / 2 - 14, f"<b>A</b> {r} × {d_in:,}", LARGE, ink, "center")
    sheet.text(230, road + low / 2 + 15, "starts at random", SMALL, t.quiet, "center")
    sheet.arrow([(a + w + 2, road), (b - 3, road)], line, max(2.0, min(low, 5.0)), head=0.7)
    sheet.text((a + w + b) / 2, road - 24, f"only {r} numbers", NORMAL, ink, "center")
    sheet.text((a + w + b) / 2, road + 22, "pass for each token", NORMAL, ink, "center")
    sheet.matrix(b, road - h / 2, low, h, "", colour)
    sheet.text(b + low + 8, road - h / 2 + 10, f"<b>B</b> {d_out:,} × {r}", LARGE, ink)
    state = "starts at zero" if zero else "started at zero"
    sheet.text(b + low + 8, road - h / 2 + 30, state, SMALL, t.quiet)
    sheet.line([(b + low + 2, road), (692, road)], line, 2)
    sheet.text(590, road - 14, f"× {delta.scale:g}", LARGE, ink, "center")
    sheet.text(590, road + 15, "the scale α / r", SMALL, t.quiet, "center")
    sheet.arrow([(692, road), (692, top + 9)], line, 2)
    sheet.plus(692, top)
    sheet.arrow([(701, top), (734, top)], width=2)
    _vector(sheet, 740, top, h=d_out * unit, name="h", size=d_out)
    return sheet.done()


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


def _vector(sheet: Sheet, x: Number, y: Number, h: Number, name: str, size: int) -> None:
    """A token's numbers: a column with its name and its size."""
    sheet.columns(x - 4, y - h / 2, 1, 8, h)
    sheet.text(x, y + h / 2 + 12, f"<b>{name}</b> {size:,}", NORMAL, align="center")
