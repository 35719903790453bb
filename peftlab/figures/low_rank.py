"""LoRA drawn: the narrow road beside W and its gradients, a product by hand, the first steps, and
what can be done with an adapter that is trained."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from torch import Tensor

from peftlab.figures.sheet import LARGE, NORMAL, SMALL, WIDTH, Number, Sheet
from peftlab.figures.style import COLOURS, VERMILLION
from peftlab.figures.theme import mixed
from peftlab.tuned import Tuned

BLUE = COLOURS["lora"]
SIDE = 128  # pixels of the longest side of a matrix on the roads
UPPER, LOWER = 92, 262  # where the two roads run
TOKEN = 9  # the width of a token


def narrow_road(tuned: Tuned, name: str, dark: bool | None = None) -> go.Figure:
    """W and the road through A and B beside it, to scale, with the sizes of an attached LoRA.

    `name` is one of `tuned.sites`.
    """
    road = Road(tuned, name, dark)
    sheet, t, r = road.sheet, road.sheet.theme, road.r
    ink = t.text(BLUE)
    sheet.arrow([(46, UPPER), (road.w_left - 4, UPPER)])
    sheet.line([(road.w_right + 4, UPPER), (road.sum_x - 8, UPPER)])
    sheet.arrow([(60, UPPER), (60, LOWER), (road.a_left - 4, LOWER)], t.line(BLUE))
    sheet.arrow([(road.a_right + 4, LOWER), (road.b_left - 5, LOWER)], t.line(BLUE))
    sheet.arrow(
        [(road.b_right + 5, LOWER), (road.sum_x, LOWER), (road.sum_x, UPPER + 9)], t.line(BLUE)
    )
    middle = (road.a_right + road.b_left) / 2
    sheet.text(middle, LOWER - 14, f"<b>{r} numbers</b>", NORMAL, ink, "center")
    sheet.text(middle, LOWER + 13, "a token", SMALL, ink, "center")
    sheet.text(road.sum_x - 12, LOWER - 12, f"× α / r = {road.scale:g}", NORMAL, ink, "right")
    sheet.arrow([(road.sum_x + 9, UPPER), (732, UPPER)])
    road.names("frozen", "trained, starts at random", "trained, starts at zero")
    trained, frozen = r * (road.d_in + road.d_out), road.d_in * road.d_out
    title = (
        f"{trained:,} parameters train beside the {frozen:,} of W: one in {frozen / trained:.0f}"
    )
    alt = (
        f"The input x, {road.d_in} numbers, takes two roads. Above through W, "
        f"{road.d_out} by {road.d_in}, frozen. Below through A, {r} by {road.d_in}, to {r} "
        f"numbers, then through B, {road.d_out} by {r}, times alpha over r, {road.scale:g}. "
        "The sum is h."
    )
    return road.done(title, alt)


def gradient_road(tuned: Tuned, name: str, dark: bool | None = None) -> go.Figure:
    """The same two roads backward: what reaches A and B, and what B = 0 stops.

    `name` is one of `tuned.sites`.
    """
    road = Road(tuned, name, dark)
    sheet, t, r = road.sheet, road.sheet.theme, road.r
    red, ink = t.line(VERMILLION), t.text(VERMILLION)
    sheet.arrow([(732, UPPER), (road.sum_x + 9, UPPER)], red)
    sheet.arrow([(road.sum_x - 9, UPPER), (road.w_right + 5, UPPER)], red)
    sheet.arrow([(road.w_left - 4, UPPER), (46, UPPER)], red)
    sheet.arrow([(road.sum_x, UPPER + 9), (road.sum_x, LOWER), (road.b_right + 6, LOWER)], red)
    sheet.arrow([(road.b_left - 4, LOWER), (road.a_right + 5, LOWER)], red)
    sheet.text(road.sum_x + 12, UPPER + 24, "<b>g</b> = ∂L/∂h", NORMAL, ink)
    sheet.text(60, UPPER - 16, "to the layer below", SMALL, ink)
    middle = (road.a_right + road.b_left) / 2
    sheet.text(middle, LOWER - 14, f"<b>Bᵀg</b>: {r} numbers", NORMAL, ink, "center")
    sheet.text(middle, LOWER + 14, "zero while B is zero", SMALL, ink, "center")
    road.names("no gradient kept", "∂L/∂A = s (Bᵀg) xᵀ", "∂L/∂B = s g (A x)ᵀ")
    alt = (
        "The gradient g arrives at h from the right. Above it passes through W to the layer "
        "below, and W keeps none. Below it reaches B first, whose gradient is s times g times the "
        f"transpose of A x; then, as the {r} numbers of B transposed times g, it reaches A, whose "
        "gradient is s times these times x transposed. While B is zero nothing reaches A."
    )
    return road.done("Backward, the gradient meets B first; what A gets has to pass through B", alt)


class Road:
    """The sheet of both pictures: x, W above, A and B below, h, all to one scale."""

    def __init__(self, tuned: Tuned, name: str, dark: bool | None):
        delta, linear = tuned.deltas[name], tuned.anatomy.linears[name]
        self.name, self.scale = name, delta.scale
        (self.r, self.d_in), self.d_out = delta.A.shape, linear.d_out
        unit = SIDE / max(self.d_in, self.d_out)
        self.sheet = sheet = Sheet("", 356, "", dark)
        wide, high, thin = self.d_in * unit, self.d_out * unit, max(4.0, self.r * unit)
        self.w_left, self.w_right = 350 - wide / 2, 350 + wide / 2
        self.a_left, self.a_right, self.b_left, self.b_right = 130, 130 + wide, 430, 430 + thin
        self.sum_x = 646
        sheet.matrix(32, UPPER - wide / 2, TOKEN, wide, hover=f"x: {self.d_in} numbers a token")
        sheet.matrix(738, UPPER - high / 2, TOKEN, high, hover=f"h: {self.d_out} numbers a token")
        sheet.matrix(self.w_left, UPPER - high / 2, wide, high, "W", hover=f"W of {name}")
        sheet.matrix(self.a_left, LOWER - thin / 2, wide, thin, colour=BLUE, hover="A")
        sheet.matrix(self.b_left, LOWER - high / 2, thin, high, colour=BLUE, hover="B")
        sheet.plus(self.sum_x, UPPER)
        for x, vector, size in ((36, "x", self.d_in), (742, "h", self.d_out)):
            side = wide if vector == "x" else high
            sheet.text(x, UPPER - side / 2 - 11, f"<b>{vector}</b>", LARGE, align="center")
            sheet.text(x, UPPER + side / 2 + 11, f"{size}", SMALL, sheet.theme.quiet, "center")

    def names(self, of_w: str, of_a: str, of_b: str) -> None:
        """What stands beside the three matrices."""
        sheet, t = self.sheet, self.sheet.theme
        ink, rows = t.text(BLUE), f"{self.d_out} × {self.d_in}"
        sheet.text(self.w_right + 10, UPPER + 22, rows, SMALL, t.quiet)
        sheet.text(self.w_right + 10, UPPER + 37, of_w, SMALL, t.quiet)
        x = (self.a_left + self.a_right) / 2
        sheet.text(x, LOWER - 22, f"<b>A</b>  {self.r} × {self.d_in}", NORMAL, ink, "center")
        sheet.text(x, LOWER + 22, of_a, SMALL, ink, "center")
        x = self.b_right + 10
        sheet.text(x, LOWER + 24, f"<b>B</b>  {self.d_out} × {self.r}", NORMAL, ink)
        sheet.text(x, LOWER + 42, of_b, SMALL, ink)

    def done(self, title: str, alt: str) -> go.Figure:
        self.sheet.figure.update_layout(meta=dict(alt=alt, paper=self.sheet.theme.paper))
        return self.sheet.resized(title, 356).done()


def hand_product(
    W: Tensor, A: Tensor, B: Tensor, scale: Number, dark: bool | None = None
) -> go.Figure:
    """ΔW = scale · B A with every number, and W + ΔW: each number of ΔW is the one of B at its left
    times the one of A above it (r = 1), times the scale."""
    (d_out, d_in), delta = W.shape, scale * B @ A + 0.0  # no number is −0
    cell, top = 40, 66
    sheet = Sheet("", top + d_out * cell + 44, "", dark)
    t, ink = sheet.theme, sheet.theme.text(BLUE)

    def grid(x: Number, y: Number, numbers: Tensor, colour: str, made: bool = False) -> None:
        for i, row in enumerate(numbers.tolist()):
            for j, number in enumerate(row):
                fill = t.frozen if not colour else t.tint(colour) if made else t.fill(colour)
                sheet.box(x + j * cell, y + i * cell, cell, cell, fill, t.paper, width=2)
                place = (x + (j + 0.5) * cell, y + (i + 0.5) * cell)
                sheet.text(*place, f"{number:g}".replace("-", "−"), LARGE, t.on(fill), "center")

    left = 40
    here = left + cell + 26
    grid(left, top, B, BLUE)
    grid(here, top - cell - 14, A, BLUE)
    grid(here, top, delta, BLUE, made=True)
    low = top + d_out * cell + 16
    sheet.text(left + cell / 2, low, f"<b>B</b> {d_out} × 1", NORMAL, ink, "center")
    sheet.text(here + d_in * cell + 10, top - cell / 2 - 14, f"<b>A</b> 1 × {d_in}", NORMAL, ink)
    sheet.text(here + d_in * cell / 2, low, f"<b>ΔW</b> = {scale:g} · B A", NORMAL, ink, "center")
    middle, w_left = top + d_out * cell / 2, here + d_in * cell + 130
    sheet.text(w_left - 60, middle, "added to", NORMAL, t.quiet, "center")
    grid(w_left, top, W, "")
    sheet.text(w_left + d_in * cell / 2, low, "<b>W</b>, frozen", NORMAL, t.quiet, "center")
    sum_left = w_left + d_in * cell + 110
    sheet.text(sum_left - 55, middle, "gives", NORMAL, t.quiet, "center")
    grid(sum_left, top, W + delta, BLUE, made=True)
    sheet.text(sum_left + d_in * cell / 2, low, "<b>W + ΔW</b>", NORMAL, ink, "center")
    words = {n: m.tolist() for n, m in dict(B=B, A=A, ΔW=delta, W=W, sum=W + delta).items()}
    alt = "Matrices with their numbers. " + "; ".join(f"{n}: {m}" for n, m in words.items())
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    trained = A.numel() + B.numel()
    title = f"Every row of ΔW is a multiple of A: {trained} numbers make {delta.numel()}"
    return sheet.resized(title, low + 18).done()


def first_steps(
    states: Sequence[tuple[Tensor, Tensor]], scale: Number, dark: bool | None = None
) -> go.Figure:
    """A, B and ΔW = scale · B A after 0, 1, 2 … steps, the stronger in colour the larger.

    `states` are (A, B) pairs of one small matrix; signs stand in the cells, zeros are empty.
    """
    (r, d_in), d_out = states[0][0].shape, states[0][1].shape[0]
    cell, top, gap = 22, 74, 14
    most = [max(m.abs().max().item() for m in kind) for kind in zip(*states, strict=True)]
    deltas = [scale * B @ A for A, B in states]
    most.append(max(delta.abs().max().item() for delta in deltas))
    wide = r * cell + gap + d_in * cell
    between = (WIDTH - 48 - len(states) * wide) / max(1, len(states) - 1)
    sheet = Sheet("", 10, "", dark)
    t, ink = sheet.theme, sheet.theme.text(BLUE)

    def grid(x: Number, y: Number, numbers: Tensor, largest: float) -> None:
        for i, row in enumerate(numbers.tolist()):
            for j, number in enumerate(row):
                share = abs(number) / largest if largest else 0.0
                fill = mixed(t.paper, t.fill(BLUE), 0.12 + 0.88 * share) if number else t.paper
                sheet.box(x + j * cell, y + i * cell, cell, cell, fill, t.edge)
                if number:
                    sign = "+" if number > 0 else "−"
                    place = (x + (j + 0.5) * cell, y + (i + 0.5) * cell)
                    sheet.text(*place, sign, SMALL, t.on(fill), "center")

    y = top + r * cell + gap
    for step, ((A, B), delta) in enumerate(zip(states, deltas, strict=True)):
        x = 24 + step * (wide + between)
        here = x + r * cell + gap
        words = "at the start" if not step else f"after step {step}"
        sheet.text(x, 16, f"<b>{words}</b>", NORMAL)
        sheet.text(here, top - 14, "<b>A</b>", NORMAL, ink)
        sheet.text(x, y - 14, "<b>B</b>", NORMAL, ink)
        grid(here, top, A, most[0])
        grid(x, y, B, most[1])
        grid(here, y, delta, most[2])
        size = f"<b>ΔW</b>, size {delta.norm().item():.2f}"
        sheet.text(here, y + d_out * cell + 14, size, NORMAL, ink)
        if step:
            moved = [
                name
                for name, now, before in zip("AB", states[step], states[step - 1], strict=True)
                if not torch.equal(now, before)
            ]
            sheet.text(here, 38, f"moved: {' and '.join(moved)}", SMALL, t.quiet)
    alt = "; ".join(
        f"after {n} steps A has the size {A.norm():.2f}, B {B.norm():.2f}, ΔW {d.norm():.2f}"
        for n, ((A, B), d) in enumerate(zip(states, deltas, strict=True))
    )
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    title = "B fills up first, and every number of it by the same amount"
    return sheet.resized(title, y + d_out * cell + 30).done()


def merge_and_swap(sizes: Mapping[str, int], dark: bool | None = None) -> go.Figure:
    """One base three ways: an adapter beside it, written into it, and others to put on.

    `sizes` are the bytes of each adapter's file by name, the first is the one that is on.
    """
    sheet = Sheet("", 236, "", dark)
    t, ink, y, side = sheet.theme, sheet.theme.text(BLUE), 52, 110
    first, *others = sizes

    def pair(x: Number, y: Number, high: Number, colour: str) -> None:
        """A and B as they stand at W: A under it, B at its right side."""
        sheet.matrix(x + high + 6, y, 6, high, colour=colour)
        sheet.matrix(x, y + high + 6, high, 6, colour=colour)

    heads = ("beside", "merged", "on the shelf")
    for x, head in zip((40, 310, 560), heads, strict=True):
        sheet.text(x, 18, f"<b>{head}</b>", LARGE)
    sheet.matrix(40, y, side, side, "W")
    pair(40, y, side, BLUE)
    sheet.text(40, y + side + 32, "two roads at every token;", SMALL, t.quiet)
    sheet.text(40, y + side + 48, "W is as it was", SMALL, t.quiet)
    sheet.matrix(310, y, side, side, "W + ΔW", BLUE, made=True)
    sheet.text(310, y + side + 32, "one matrix of the size of W:", SMALL, t.quiet)
    sheet.text(310, y + side + 48, "it runs like the base", SMALL, t.quiet)
    low, high = y + side / 2 - 14, y + side / 2 + 14
    sheet.arrow([(186, low), (296, low)], t.line(BLUE))
    sheet.text(240, low - 12, "merge()", NORMAL, ink, "center")
    sheet.arrow([(296, high), (186, high)], t.line(BLUE))
    sheet.text(240, high + 14, "unmerge()", NORMAL, ink, "center")
    for n, (name, size) in enumerate(sizes.items()):
        top = y + n * 62
        pair(560, top, 36, BLUE)
        on = "on now" if name == first else "to put on"
        sheet.text(622, top + 12, f"<b>{name}</b>, {on}", NORMAL, ink)
        sheet.text(622, top + 30, f"{size:,} bytes", SMALL, t.quiet)
    alt = (
        "Left: W with A and B beside it. Middle: one matrix W + ΔW of the same size; merge and "
        "unmerge lead from one to the other. Right: adapters as files: "
        + ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items())
    )
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    title = f"One base, {len(sizes)} adapters: beside W, inside it, or in a file"
    return sheet.resized(title, 236).done()
