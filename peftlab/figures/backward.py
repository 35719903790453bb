"""The backward pass drawn: what a linear layer needs, what a block keeps, what rounding takes."""

from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from torch import Tensor

from peftlab.bases.shapes import Shape
from peftlab.figures.memory import PARTS
from peftlab.figures.sheet import LARGE, NORMAL, SMALL, WIDTH, Number, Sheet
from peftlab.figures.style import BLACK

KEPT, GRADIENT = PARTS["activations"], PARTS["gradients"]


def linear_backward(x: Tensor, W: Tensor, g: Tensor, dark: bool | None = None) -> go.Figure:
    """y = x Wᵀ and both of its gradients, with every number.

    x (tokens, d_in), W (d_out, d_in), and g (tokens, d_out), the gradient of y.
    """
    y, of_W, of_x = x @ W.T, g.T @ x, g @ W
    cell, top = 34, 40
    low = top + cell * max(len(x), len(W)) + 100
    sheet = Sheet("", low + 34 * max(len(x), len(W)) + 46, "", dark)
    t, red = sheet.theme, sheet.theme.line(GRADIENT)
    left, middle, right = 70, 340, 626

    def grid(x0: Number, y0: Number, numbers: Tensor, fill: str, words: str, ink: str) -> None:
        for i, row in enumerate(numbers.tolist()):
            for j, number in enumerate(row):
                sheet.box(x0 + j * cell, y0 + i * cell, cell, cell, fill, t.paper, width=2)
                place = (x0 + (j + 0.5) * cell, y0 + (i + 0.5) * cell)
                sheet.text(*place, f"{number:g}".replace("-", "−"), LARGE, t.on(fill), "center")
        wide = len(numbers[0]) * cell
        sheet.text(x0 + wide / 2, y0 - 12, words, NORMAL, ink, "center")

    def middle_of(numbers: Tensor, y0: Number) -> Number:
        return y0 + len(numbers) * cell / 2

    grid(left, top, x, t.fill(KEPT), _named("x", x), t.text(KEPT))
    grid(middle, top, W, t.fill(BLACK), _named("W", W), t.ink)
    grid(right, top, y, t.frozen, "<b>y = x Wᵀ</b>", t.ink)
    grid(right, low, g, t.fill(GRADIENT), "<b>g = ∂L/∂y</b>", t.text(GRADIENT))
    grid(middle, low, of_W, t.tint(GRADIENT), "<b>∂L/∂W = gᵀ x</b>", t.text(GRADIENT))
    grid(left, low, of_x, t.tint(GRADIENT), "<b>∂L/∂x = g W</b>", t.text(GRADIENT))
    d_in, d_out = x.shape[1] * cell, g.shape[1] * cell
    edge = left + d_in  # where x ends
    ahead, back = middle_of(x, top), middle_of(g, low)
    sheet.arrow([(edge + 6, ahead), (middle - 6, ahead)])
    sheet.arrow([(middle + d_in + 6, ahead), (right - 6, ahead)])
    sheet.arrow([(right + d_out / 2, top + len(x) * cell + 6), (right + d_out / 2, low - 24)])
    sheet.text(right + d_out / 2 + 8, (top + len(x) * cell + low - 18) / 2, "the loss", SMALL)
    sheet.arrow([(right - 6, back), (middle + d_in + 6, back)], red)
    bottom = low + max(len(x), len(W)) * cell + 18
    around = [(right + d_out / 2, low + len(g) * cell + 4), (right + d_out / 2, bottom)]
    around += [(left + d_in / 2, bottom), (left + d_in / 2, low + len(x) * cell + 5)]
    sheet.arrow(around, red)
    start, end = top + len(x) * cell + 5, low - 22
    sheet.arrow([(edge - 20, start), (middle + 10, end)], t.line(KEPT), 2.5, "dot", 0.7)
    sheet.arrow([(middle + 20, top + len(W) * cell + 5), (edge - 10, end)], t.ink, 2.5, "dot", 0.7)
    between = (start + end) / 2
    sheet.text(edge - 40, between, "x, kept", SMALL, t.text(KEPT), "right")
    sheet.text(middle + 34, between, "W, there anyway", SMALL)
    alt = (
        f"Forward: x {_size(x)} times W transposed, W {_size(W)}, is y {_size(y)}. Backward: g "
        f"{_size(g)} makes two gradients. That of W, {_rows(of_W)}, is g transposed times x. That "
        f"of x, {_rows(of_x)}, is g times W. The two dotted arrows from x and from W cross."
    )
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    title = "Backward they change places: W's gradient needs x, and x's gradient needs W"
    return sheet.resized(title, bottom + 16).done()


def _size(matrix: Tensor) -> str:
    return " × ".join(map(str, matrix.shape))


def _named(name: str, matrix: Tensor) -> str:
    return f"<b>{name}</b> {_size(matrix)}"


def _rows(matrix: Tensor) -> str:
    return "; ".join(", ".join(f"{number:g}" for number in row) for row in matrix.tolist())


def kept_in_block(shape: Shape, dark: bool | None = None) -> go.Figure:
    """What each operation of a GPT-2 block keeps of one token, to scale, with fused attention.

    `shape` has the sizes of the model. Raises ValueError for another family.
    """
    if shape.family != "gpt2":
        raise ValueError(f"family {shape.family!r}: the block that is drawn is one of GPT-2")
    d, heads, wide = shape.d_model, shape.heads, shape.d_ff
    stations = (  # name, numbers kept in any case, numbers kept for a W that trains, words
        ("norm", d + 2, 0, "d + 2"),
        ("c_attn", 0, d, "d"),
        ("attention", 4 * d + heads, 0, "4 d + heads"),
        ("c_proj", 0, 0, "needs what<br>attention<br>keeps"),
        ("norm", d + 2, 0, "d + 2"),
        ("c_fc", 0, d, "d"),
        ("GELU", wide, 0, f"{wide // d} d"),
        ("c_proj", 0, wide, f"{wide // d} d"),
    )
    always, trains = (sum(station[i] for station in stations) for i in (1, 2))
    high, top, step = 140, 12, (WIDTH - 40) / len(stations)
    most = max(a + b for _, a, b, _ in stations)
    sheet = Sheet("", top + high + 96, "", dark)
    t, base = sheet.theme, top + high + 56
    sheet.stream(14, WIDTH - 14, top + 13)
    for at, (name, kept, if_trained, words) in enumerate(stations):
        x, fill = 24 + at * step, t.frozen if name in ("attention", "GELU") else t.fill(BLACK)
        sheet.box(x, top, step - 18, 27, fill)
        ink = t.on(fill)
        sheet.text(x + (step - 18) / 2, top + 13, f"<b>{name}</b>", NORMAL, ink, "center")
        tall = (kept + if_trained) / most * high
        hover = f"{name}: {kept + if_trained:,} numbers a token"
        if kept:
            sheet.matrix(x + 14, base - tall, step - 46, tall, colour=KEPT, hover=hover)
        if if_trained:
            sheet.matrix(x + 14, base - tall, step - 46, tall, colour=KEPT, made=True, hover=hover)
        sheet.text(x + (step - 18) / 2, base - tall - 5, words, SMALL, align="center", at="bottom")
    sheet.line([(14, base), (WIDTH - 14, base)], t.edge)
    kinds = (
        (KEPT, False, "kept in any case"),
        (KEPT, True, "kept only because W trains"),
        (BLACK, False, "has weights"),
        ("", False, "has none"),
    )
    for n, (colour, made, words) in enumerate(kinds):
        sheet.matrix(24 + n * 190, base + 16, 14, 10, colour=colour, made=made)
        sheet.text(43 + n * 190, base + 21, words, SMALL, t.quiet)
    title = (
        f"One block keeps {always + trains:,} numbers a token if it trains, {always:,} if frozen"
    )
    words = ". ".join(
        f"{name} keeps {kept + mine:,}" + (" because its W trains" if mine else "")
        for name, kept, mine, _ in stations
        if kept + mine
    )
    alt = f"The operations of a block in order, d = {d}, {heads} heads, and what each keeps of a "
    alt += f"token. {words}. The first c_proj needs what attention keeps already."
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    return sheet.resized(title, base + 36).done()


def rounded_steps(
    weight: Number, rates: Sequence[float], dtype: torch.dtype = torch.bfloat16,
    dark: bool | None = None,
) -> go.Figure:  # fmt: skip
    """Where a step of each rate takes a weight among the numbers that a type has near it, and which
    of them it is rounded to. The weight is rounded to the type first."""
    start = torch.tensor(float(weight)).to(dtype)
    first = start.item()
    near = sorted({*_walk(start, 1, 2), *_walk(start, -1, _steps_down(start, max(rates)) + 1)})
    name, row, left = str(dtype).removeprefix("torch."), 62, 128
    scale = (WIDTH - left - 40) / (near[-1] - near[0])
    sheet = Sheet("", 46 + row * len(rates), "", dark)
    t, told = sheet.theme, []

    def at(number: Number) -> Number:
        return left + (number - near[0]) * scale

    for i, rate in enumerate(rates):
        y, lands = 44 + row * i, first - rate
        ends = torch.tensor(lands).to(dtype).item()
        sheet.text(14, y, f"step {_plain(rate)}", NORMAL)
        sheet.line([(left - 14, y), (WIDTH - 20, y)], t.edge)
        for number in near:
            sheet.line([(at(number), y - 6), (at(number), y + 6)], t.edge, 2)
        back = ends == first
        colour = t.line(GRADIENT) if back else t.ink
        over = [(at(number), y - 22) for number in (first, lands)]
        sheet.arrow([(at(first), y - 10), *over, (at(lands), y - 3)], colour, head=0.8)
        sheet.dot(at(ends), y, colour, f"stored: {ends:g}")
        words = "rounded back: it has not moved" if back else f"stored: {ends:.6f}"
        sheet.text(at(ends), y + 17, words, SMALL, t.text(GRADIENT) if back else t.ink, "center")
        told.append(f"a step of {_plain(rate)} lands at {lands:.6f} and is stored as {ends:.6f}")
    lost = [rate for rate in rates if torch.tensor(first - rate).to(dtype) == start]
    gap = near[-2] - near[-3]
    title = f"Numbers of {name} near {first:.4g} are {gap:.2g} apart: "
    title += f"{len(lost)} of {len(rates)} steps are rounded away"
    alt = f"The numbers that {name} has near {first:.6f}, as marks. " + "; ".join(told) + "."
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    return sheet.resized(title, 46 + row * len(rates)).done()


def _plain(rate: float) -> str:
    """0.00001 instead of 1e-05."""
    return f"{rate:.10f}".rstrip("0")


def _walk(start: Tensor, sign: int, count: int) -> list[float]:
    """The start and so many neighbours of it, in one direction."""
    found, limit = [start], torch.tensor(sign * float("inf"), dtype=start.dtype)
    for _ in range(count):
        found.append(torch.nextafter(found[-1], limit))
    return [number.item() for number in found]


def _steps_down(start: Tensor, distance: float) -> int:
    """How many neighbours below the start are within the distance."""
    count = 0
    while float(start) - _walk(start, -1, count + 1)[-1] <= distance:
        count += 1
    return count
