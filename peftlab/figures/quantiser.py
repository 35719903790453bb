"""Four bits drawn: levels from equal steps of probability, the road through codes and back, and
an optimiser whose moments can leave the GPU."""

import statistics
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from peftlab.accounting import readable_bytes
from peftlab.figures.sheet import NORMAL, SMALL, Number, Sheet, number
from peftlab.figures.style import BLUE, COLOURS, ORANGE, PURPLE, VERMILLION
from peftlab.sites.quantisation import NF4_OFFSET, Quantised, table

NORMAL_OF = statistics.NormalDist()
LARGEST = NORMAL_OF.inv_cdf(NF4_OFFSET)  # what the quantiles are divided by


def quantile_steps(dark: bool | None = None) -> go.Figure:
    """NF4's levels as quantiles: equal steps up the axis of probability, carried over to the
    normal's cumulative curve and down to the levels; eight steps above ½, seven below."""
    levels = [float(level) for level in table("nf4")]
    title = "Equal steps of probability give unequal levels: close in the middle, wide outside"
    alt = (
        "The cumulative curve of a normal. On its axis of probability, seven equal steps lead "
        f"from one half down to {1 - NF4_OFFSET:.3f} and eight equal, smaller ones up to "
        f"{NF4_OFFSET:.3f}. From each a line goes over to the curve and down to a level. The "
        f"levels are {', '.join(number(level, 2) for level in levels)}."
    )
    sheet = Sheet(title, 420, alt, dark)
    t, colour = sheet.theme, COLOURS["nf4"]
    left, base, high = 118, 352, 320

    def x_of(level: Number) -> Number:
        return 460 + 310 * level

    def y_of(probability: Number) -> Number:
        return base - high * probability

    sheet.line([(left, y_of(1)), (left, base)], t.edge)
    sheet.line([(left, base), (784, base)], t.edge)
    for i, level in enumerate(levels):
        p = NORMAL_OF.cdf(level * LARGEST)
        ink = t.line(colour) if level > 0 else t.line(VERMILLION) if level < 0 else t.ink
        sheet.line([(left - 6, y_of(p)), (x_of(level), y_of(p)), (x_of(level), base + 6)], ink, 1.2)
        if i % 2 == 1 or level in (-1.0, 1.0):
            words = number(level, 2) if level else "0"
            sheet.text(x_of(level), base + 17, words, SMALL, t.quiet, "center")
    curve = np.linspace(-1.09, 1.045, 161)
    sheet.line([(x_of(v), y_of(NORMAL_OF.cdf(v * LARGEST))) for v in curve], t.ink, 2.5)
    for p, words in ((1, "1"), (0.5, "½"), (0, "0")):
        sheet.text(left - 12, y_of(p), words, SMALL, t.quiet, "right")
    for p in (NF4_OFFSET, 1 - NF4_OFFSET):
        away = 5 if p > 0.5 else -5
        sheet.text(left - 12, y_of(p) + away, f"{p:.3f}", SMALL, t.ink, "right")
    sheet.text(14, y_of(0.74), "8 equal<br>steps up", NORMAL, t.text(colour))
    sheet.text(14, y_of(0.26), "7 equal<br>steps down", NORMAL, t.text(VERMILLION))
    sheet.text(left - 100, 14, "probability", SMALL, t.quiet)
    words = f"level: the quantile over the largest quantile, {LARGEST:.3f}"
    sheet.text(460, base + 42, words, SMALL, t.quiet, "center")
    return sheet.done()


def coded_road(codes: Quantised, r: int, name: str, dark: bool | None = None) -> go.Figure:
    """A layer on codes, forward and backward, with areas to the scale of bytes: the codes stay,
    and W̃ is made for each product and dropped. A and B, of rank `r`, lie beside it."""
    (d_out, d_in), held = codes.shape, codes.bytes
    dense = 4 * d_out * d_in
    title = f"{name}: {readable_bytes(held)} stay, {readable_bytes(dense)} are made twice a step"
    alt = (
        f"A layer of {d_out} by {d_in}. In the middle its codes, {readable_bytes(held)}, which "
        f"stay. Forward they are decoded to W̃, {readable_bytes(dense)}, x is multiplied and W̃ is "
        "dropped. Backward they are decoded once more, the gradient of y is multiplied by W̃ and "
        f"goes on to the layer below. A and B, of rank {r}, lie beside both roads and train."
    )
    sheet = Sheet(title, 392, alt, dark)
    t, sky, red = sheet.theme, COLOURS["nf4"], VERMILLION
    side = 104
    thin = side * held / dense
    centre, up, down, mid = 300, 84, 312, 198

    def dotted(y: Number) -> None:
        sheet.matrix(centre - side / 2, y - side / 2, side, side, "W̃", sky, made=True)
        words = f"float32,<br>{readable_bytes(dense)},<br>then dropped"
        sheet.text(centre + side / 2 + 8, y + 28, words, SMALL, t.quiet)

    dotted(up)
    dotted(down)
    sheet.matrix(centre - side / 2, mid - thin / 2, side, thin, "", sky)
    words = f"<b>codes and scales</b><br>{readable_bytes(held)}: they stay"
    sheet.text(centre + side / 2 + 8, mid, words, NORMAL, t.text(sky))
    sheet.arrow([(centre, mid - thin / 2 - 3), (centre, up + side / 2 + 3)], t.line(sky), 2)
    sheet.arrow([(centre, mid + thin / 2 + 3), (centre, down - side / 2 - 3)], t.line(sky), 2)
    sheet.text(centre - 8, mid - 33, "decode", SMALL, t.text(sky), "right")
    sheet.text(centre - 8, mid + 33, "decode again", SMALL, t.text(sky), "right")
    end = 690
    for y, first, last, ink, words in (
        (up, "x", "y", t.ink, "forward"),
        (down, "x̄", "ȳ", t.line(red), "backward"),
    ):
        sheet.columns(46, y - 30, 1, 8, 60)
        sheet.columns(end + 56, y - 30, 1, 8, 60)
        sheet.text(50, y + 42, f"<b>{first}</b>", NORMAL, align="center")
        sheet.text(end + 60, y + 42, f"<b>{last}</b>", NORMAL, align="center")
        sheet.text(14, y - 50, f"<b>{words}</b>", NORMAL, t.ink if y == up else t.text(red))
        if y == up:
            sheet.arrow([(58, y), (centre - side / 2 - 4, y)], ink, 2)
            sheet.line([(centre + side / 2 + 4, y), (end - 9, y)], ink, 2)
            sheet.arrow([(end + 9, y), (end + 52, y)], ink, 2)
        else:
            sheet.arrow([(end + 52, y), (centre + side / 2 + 4, y)], ink, 2)
            sheet.arrow([(centre - side / 2 - 4, y), (58, y)], ink, 2)
    sheet.plus(end, up)
    blue, beside = t.line(BLUE), 556
    sheet.matrix(beside, mid - 5, 56, 5, "", BLUE)
    sheet.matrix(beside + 70, mid - 30, 5, 56, "", BLUE)
    sheet.text(beside + 26, mid + 14, "<b>A</b>", NORMAL, t.text(BLUE), "center")
    sheet.text(beside + 84, mid + 14, "<b>B</b>", NORMAL, t.text(BLUE))
    sheet.arrow([(beside + 77, mid - 3), (end, mid - 3), (end, up + 10)], blue, 2)
    sheet.line([(beside + 57, mid - 3), (beside + 69, mid - 3)], blue, 2)
    sheet.arrow([(84, up), (84, mid - 48), (540, mid - 48), (540, mid - 3), (553, mid - 3)], blue)
    under = beside + 72.5
    sheet.arrow([(end, down), (end, mid + 46), (under, mid + 46), (under, mid + 29)], t.line(red))
    sheet.text(end + 10, mid - 14, f"rank {r}, float32", SMALL, t.text(BLUE))
    sheet.text(end + 10, mid + 1, "they train", SMALL, t.text(BLUE))
    return sheet.done()


def pages(
    stays: Mapping[str, int], moments: int, batches: Mapping[str, int], card: int,
    dark: bool | None = None,
) -> go.Figure:  # fmt: skip
    """A GPU of `card` bytes at two batches, and at the second one again with a paged optimiser.

    `stays` is what is held for good but for Adam's `moments`; `batches` has what activations take
    at a usual and at a long batch. With pages, moments move to the host's memory as far as needed.
    """
    (usual, little), (long, much) = batches.items()
    held = sum(stays.values()) + moments
    over = held + much - card
    title = f"The long batch misses the card by {readable_bytes(over)}; pages lend it that much"
    if over <= 0:
        title = f"Both batches fit: {readable_bytes(-over)} are left at the long one"
    over = max(over, 0)
    parts = ", ".join(f"{name} {readable_bytes(size)}" for name, size in stays.items())
    alt = (
        f"A card of {readable_bytes(card)}. {parts} and Adam's moments {readable_bytes(moments)} "
        f"stay. Activations take {readable_bytes(little)} at {usual} and {readable_bytes(much)} "
        f"at {long}, which is {readable_bytes(over)} more than there is room. With a paged "
        "optimiser as much of the moments waits in the host's memory meanwhile."
    )
    sheet = Sheet(title, 316, alt, dark)
    t, left = sheet.theme, 16
    unit = 640 / card
    inks = dict(zip(stays, ("", BLUE, PURPLE), strict=False))
    rows = (
        (f"{usual}", little, 0, ""),
        (f"{long}, all on the card", much, 0, "too much" if over else ""),
        (f"{long}, paged", much, over, "in the<br>host's<br>memory" if over else ""),
    )
    edge = left + card * unit
    for i, (words, active, paged, note) in enumerate(rows):
        y = 34 + i * 82
        sheet.text(left, y - 12, words, NORMAL)
        x: Number = left
        every = [*((name, size, inks[name]) for name, size in stays.items())]
        every += [("Adam's moments", moments - paged, ORANGE), ("activations", active, VERMILLION)]
        for name, size, colour in every:
            hover = f"{name}: {readable_bytes(size)}"
            short = {"Adam's moments": "moments", "activations": ""}.get(name, name)
            sheet.matrix(x, y, size * unit, 34, short, colour, hover=hover)
            x += size * unit
        sheet.line([(edge, y - 8), (edge, y + 42)], t.ink, 2, "dash")
        beyond = max(x, edge) + 10
        if paged:
            sheet.matrix(edge + 30, y, paged * unit, 34, "", ORANGE)
            sheet.arrow([(edge + 3, y + 17), (edge + 27, y + 17)], t.line(ORANGE))
            beyond = edge + 38 + paged * unit
        if note:
            ink = t.text(ORANGE if paged else VERMILLION)
            sheet.text(beyond, y + 17, f"{readable_bytes(over)}<br>{note}", SMALL, ink)
    sheet.text(edge, 12, f"the card ends: {readable_bytes(card)}", SMALL, t.ink, "center")
    entries = [(inks[name], f"{name} {readable_bytes(size)}") for name, size in stays.items()]
    entries += [(ORANGE, f"Adam's moments {readable_bytes(moments)}"), (VERMILLION, "activations")]
    sheet.key(left, 294, entries)
    return sheet.done()
