"""A block of weights in four bits: its numbers, its scale, and the scale of scales."""

import plotly.graph_objects as go
from torch import Tensor

from peftlab.figures.sheet import SMALL, Number, Sheet, number
from peftlab.figures.style import COLOURS
from peftlab.sites.quantisation import ABSMAX_BLOCK, Quantised


def block_of_weights(
    weight: Tensor, codes: Quantised, block: int = 0, dark: bool | None = None
) -> go.Figure:
    """A block of weights as codes: its numbers, its scale m, and under double quantisation the
    scale that 256 such m share.

    `weight` is what was encoded, and `codes` what `quantise` made of it. Raises IndexError for a
    block that is not there.
    """
    size, scales = codes.block_size, codes.scales.detach().float().cpu()
    if not 0 <= block < len(scales):
        raise IndexError(f"block={block}: there are {len(scales)}")
    w = weight.detach().float().cpu().reshape(-1)[block * size : (block + 1) * size]
    numbers = codes.codes.reshape(-1)[block * size : (block + 1) * size].tolist()
    m, double = float(scales[block]), codes.scale is not None
    title = (
        f"{size} weights share the scale m = {number(m, 4)}; {codes.bits:.2f} bits a weight in all"
    )
    shared = min(ABSMAX_BLOCK, len(scales) - block // ABSMAX_BLOCK * ABSMAX_BLOCK)
    alt = f"{title}. Each weight is a code of 4 bits: the nearest level to w over m."
    alt += (
        f" {shared} scales m are themselves codes of 8 bits and share one scale." if double else ""
    )
    sheet = Sheet(title, 412 if double else 282, alt, dark)
    t, colour = sheet.theme, COLOURS["nf4"]
    step, zero, half = 768 / size, 86.0, 58
    most = float(w.abs().max()) or 1.0
    sheet.text(14, 6, f"block {block}: {size} weights as they were", SMALL, t.quiet)
    top = int(w.abs().argmax())
    for i, value in enumerate(w.tolist()):
        tall = value / most * half
        fill, edge = (t.fill(colour), t.line(colour)) if i == top else (t.frozen, t.edge)
        sheet.box(
            16 + i * step,
            zero - max(tall, 0),
            max(step - 2, 1),
            abs(tall),
            fill,
            edge,
            hover=f"w {number(value, 4)}, code {numbers[i]}",
        )
    sheet.line([(16, zero), (784, zero)], t.edge, 1)
    x = 16 + (top + 0.5) * step
    left = x > 560
    sheet.text(
        x + (-9 if left else 9),
        zero - half - 6 if w[top] > 0 else zero + half + 6,
        f"the largest, {number(most, 4)}",
        SMALL,
        t.text(colour),
        "right" if left else "left",
    )
    per_row = 32
    first = "their codes" if size <= 2 * per_row else f"the first {2 * per_row} of their codes"
    words = f"{first}, 4 bits each: the nearest level to w / m"
    sheet.text(14, 172, words, SMALL, t.quiet)
    cell = 768 / per_row
    for i, code in enumerate(numbers[: 2 * per_row]):
        at, y = 16 + i % per_row * cell, 184 + i // per_row * 24
        sheet.box(at, y, cell - 2, 21, t.frozen, t.edge)
        sheet.text(at + cell / 2 - 1, y + 11, str(code), SMALL, t.on(t.frozen), "center")
    y = 248.0
    sheet.matrix(16, y, 92, 24, f"m {number(m, 4)}", colour)
    kind = f"8 bits, as decoded (it was {number(most, 4)})" if double else "32 bits"
    sheet.text(118, y + 12, f"the scale of this block: {kind}", SMALL, t.quiet)
    if double:
        _scale_of_scales(sheet, 298.0, scales, block, codes)
    return sheet.done()


def _scale_of_scales(sheet: Sheet, y: Number, scales: Tensor, block: int, codes: Quantised) -> None:
    """The m's that share one scale, as columns around their mean; this block's is marked."""
    t, colour = sheet.theme, COLOURS["nf4"]
    first = block // ABSMAX_BLOCK * ABSMAX_BLOCK
    group, mean = scales[first : first + ABSMAX_BLOCK], float(codes.mean)
    coarse = float(codes.scale[block // ABSMAX_BLOCK])
    far = float((group - mean).abs().max()) or 1.0
    step, zero = 768 / ABSMAX_BLOCK, y + 40
    for i, value in enumerate((group - mean).tolist()):
        tall, here = value / far * 34, first + i == block
        fill = t.fill(colour) if here else t.edge
        sheet.box(
            16 + i * step, zero - max(tall, 0), step if here else step - 1, abs(tall), fill, fill
        )
    sheet.line([(16, zero), (784, zero)], t.edge, 1)
    x = 16 + (block - first + 0.5) * step
    sheet.line([(62, y - 26), (62, y - 10), (x, y - 10), (x, y + 4)], t.line(colour), 1, "dot")
    words = f"{len(group)} scales m less their mean {number(mean, 4)}, 8 bits each"
    sheet.text(14, zero + 48, words, SMALL, t.quiet)
    shared = f"one scale for all of them, {number(coarse, 4)}: 32 bits"
    sheet.text(784, zero + 48, shared, SMALL, t.quiet, "right")
