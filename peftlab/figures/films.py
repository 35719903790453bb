"""Drawings in steps: a training step through LoRA, a weight through a quantiser, a gradient's way.

Each gives frames, a caption and a drawing, all to one size. `panels.film` shows them one by one.
"""

import re
from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from torch import Tensor

from peftlab.figures.bell import bell
from peftlab.figures.low_rank import LOWER, UPPER, Road
from peftlab.figures.sheet import LARGE, NORMAL, SMALL, WIDTH, Number, Sheet, number
from peftlab.figures.style import BLUE, COLOURS, GREEN, VERMILLION
from peftlab.sites.quantisation import nearest, table
from peftlab.tuned import Tuned

Frame = tuple[str, go.Figure]


def lora_step(
    tuned: Tuned, name: str, x: Tensor, g: Tensor, lr: Number = 0.1, dark: bool | None = None
) -> list[Frame]:
    """Two steps of training through one LoRA, with the sizes of what really moves.

    `name` is one of `tuned.sites`, x (d_in) comes in, and g (d_out) is the gradient that reaches
    h. The steps are plain gradient descent on copies of A and B; the adapter is left as it is.
    """
    delta = tuned.deltas[name]
    A, B, s = delta.A.detach().clone(), delta.B.detach().clone(), delta.scale
    frames: list[Frame] = []
    for turn in (1, 2):
        found = dict(Ax=A @ x, add=s * (B @ (A @ x)), dB=s * torch.outer(g, A @ x),
                     dA=s * torch.outer(B.T @ g, x))  # fmt: skip
        size = {key: number(value.norm().item(), 2) for key, value in found.items()}
        zero = found["dA"].norm() == 0
        stages = (
            f"x comes in and takes both roads; W x is the base's own answer (step {turn})",
            f"A squeezes x into {len(A)} numbers, of length {size['Ax']}",
            f"B spreads them out again: added is a vector of length {size['add']}",
            "backward: g arrives at h, goes through W to the layer below, and leaves nothing in W",
            f"B comes first: its gradient s g (A x)ᵀ has the length {size['dB']}",
            f"A gets what passes through B: s (Bᵀ g) xᵀ has the length {size['dA']}",
            "the step: B moves, A stays, because B was zero" if zero else "the step: both move",
        )
        for stage, caption in enumerate(stages):
            still = ("B",) if zero else ("A", "B")
            moved = still if stage == len(stages) - 1 else ()
            frames.append((caption, _road(tuned, name, stage, turn, caption, moved, dark)))
        A, B = A - lr * found["dA"], B - lr * found["dB"]
    return frames


def _road(
    tuned: Tuned, name: str, stage: int, turn: int, caption: str, moved: Sequence[str],
    dark: bool | None,
) -> go.Figure:  # fmt: skip
    """One frame: what has happened is thin, what happens now is thick."""
    road = Road(tuned, name, dark)
    s, t = road.sheet, road.sheet.theme
    blue, red = t.line(BLUE), t.line(VERMILLION)
    right, sum_x = road.w_right + 5, road.sum_x
    forward = (
        ([(52, UPPER), (road.w_left - 6, UPPER)], [(right, UPPER), (sum_x - 10, UPPER)]),
        ([(60, UPPER), (60, LOWER), (road.a_left - 6, LOWER)],),
        ([(road.a_right + 5, LOWER), (road.b_left - 6, LOWER)],
         [(road.b_right + 5, LOWER), (sum_x, LOWER), (sum_x, UPPER + 10)],
         [(sum_x + 10, UPPER), (732, UPPER)]),
    )  # fmt: skip
    backward = (
        ([(732, UPPER), (sum_x + 10, UPPER)], [(sum_x - 10, UPPER), (right + 1, UPPER)],
         [(road.w_left - 5, UPPER), (52, UPPER)]),
        ([(sum_x, UPPER + 10), (sum_x, LOWER), (road.b_right + 7, LOWER)],),
        ([(road.b_left - 5, LOWER), (road.a_right + 7, LOWER)],),
    )  # fmt: skip
    ways = forward if stage < 3 else backward
    done = stage if stage < 3 else stage - 3
    for at, lines in enumerate(ways):
        if at > done or done >= len(ways):
            continue
        ink = (blue if stage < 3 else red) if at == done else t.edge
        for line in lines:
            s.arrow(line, ink, 3.5 if at == done else 1.2)
    places = {"A": (road.a_left, road.a_right), "B": (road.b_left, road.b_right)}
    for matrix in moved:
        middle = sum(places[matrix]) / 2
        s.text(middle - 18, LOWER + 74, "moves", NORMAL, t.text(GREEN), "right")
        s.arrow([(middle - 12, LOWER + 84), (middle - 12, LOWER + 66)], t.line(GREEN), 3)
    road.names("frozen", "", "")
    part = "forward" if stage < 3 else "backward" if stage < 6 else "the update"
    words = f"Step {turn} of 2, {part}"
    return road.done(words, f"{words}. {caption}.")


# --- a weight through the quantiser -------------------------------------------------------------


def weight_to_code(block: Tensor, at: int, dark: bool | None = None) -> list[Frame]:
    """A weight's way into four bits and back: its block, its scale, its bin, its code, its return.

    `block` (block size) are the weights that share a scale; `at` says which of them is followed.
    """
    values, levels = block.float().tolist(), table("nf4")
    scale, weight = max(map(abs, values)), values[at]
    code = int(nearest(torch.tensor([weight / scale]), levels)[0])
    back = scale * float(levels[code])
    most = max(range(len(values)), key=lambda i: abs(values[i]))
    told = {
        "w": number(weight, 4), "scale": number(scale, 4), "share": number(weight / scale, 3),
        "level": number(float(levels[code]), 3), "back": number(back, 4),
        "off": number(back - weight, 4), "bits": f"{code:04b}",
    }  # fmt: skip
    captions = (
        f"{len(values)} neighbours are a block; one of them is followed: w = {told['w']}",
        f"the largest of the block becomes its scale: {told['scale']}",
        f"w over the scale: {told['share']}, so every weight now lies between −1 and 1",
        f"the nearest of 16 levels is {told['level']}, number {code}",
        f"stored are four bits, {told['bits']}, and once for the block its scale",
        f"decoded: {told['scale']} × {told['level']} = {told['back']}, off by {told['off']}",
    )
    frames = []
    for stage, caption in enumerate(captions):
        if stage == 3:
            frames.append((caption, bell(weight, scale, dark=dark)))
            continue
        frames.append((caption, _strip(values, at, most, scale, back, stage, code, caption, dark)))
    return frames


def _strip(
    values: list[float], at: int, most: int, scale: Number, back: Number, stage: int, code: int,
    caption: str, dark: bool | None,
) -> go.Figure:  # fmt: skip
    """The weights of a block as bars around zero, in the size of `bell`."""
    titles = ("A block of weights", "Its scale", "Over the scale", "", "What is stored", "And back")
    s = Sheet(titles[stage], 376, f"{titles[stage]}. {caption}.", dark)
    t, colour, middle, high = s.theme, COLOURS["nf4"], 150, 116
    wide = (WIDTH - 120) / len(values)
    s.line([(60, middle), (WIDTH - 60, middle)], t.edge, 1)
    top, low = ("1", "−1") if stage >= 2 else (number(scale, 3), number(-scale, 3))
    for y, words in ((middle - high, top), (middle + high, low)):
        s.line([(60, y), (WIDTH - 60, y)], t.faint, 1)
        s.text(54, y, words, SMALL, t.quiet, "right")
    for i, value in enumerate(values):
        tall = value / scale * high
        ink = colour if i == at else BLUE if i == most and stage == 1 else ""
        s.matrix(60 + i * wide + 1, middle - max(tall, 0), max(wide - 2, 3), abs(tall), colour=ink)
    x = 60 + (at + 0.5) * wide
    s.text(x, middle + high + 22, "<b>w</b>", LARGE, t.text(colour), "center")
    if stage == 4:
        for bit, value in enumerate(f"{code:04b}"):
            s.box(330 + bit * 36, 306, 34, 34, t.tint(colour), t.line(colour))
            s.text(347 + bit * 36, 323, f"<b>{value}</b>", LARGE, align="center")
    if stage == 5:
        y = middle - back / scale * high
        s.line([(x - 26, y), (x + 26, y)], t.line(GREEN), 3)
        s.text(x + 32 if x < WIDTH / 2 else x - 32, y - 10, "decoded", SMALL, t.text(GREEN),
               "left" if x < WIDTH / 2 else "right")  # fmt: skip
    return s.done()


# --- the gradient of a frozen model -------------------------------------------------------------


def frozen_backward(tuned: Tuned, dark: bool | None = None) -> list[Frame]:
    """A gradient's way from the loss to the lowest tensor that trains, block by block.

    Call it after `backward()`: what has a gradient is read from the tensors. A frozen weight lets
    it through and keeps none; below the lowest trained tensor nothing has to be computed.
    """
    blocks = tuned.anatomy.shape.layers
    got = dict.fromkeys(range(-1, blocks), 0)  # −1: below the first block
    for name, parameter in tuned.trainable.items():
        found = re.search(r"(?:layers?|h|block)\.(\d+)\.", name)
        below = re.search(r"wte|wpe|embed|shared|prompt", name)
        if parameter.grad is not None and (found or below):
            got[int(found[1]) if found else -1] += 1
    lowest = min((at for at in got if got[at]), default=blocks)
    ways = [(blocks, "the loss has a gradient; every block still waits")]
    for at in reversed(range(max(lowest, 0), blocks)):
        words = (
            f"{got[at]} trained tensors take their gradients, and it goes on"
            if got[at] else "nothing trains here; frozen weights pass it on and keep none"
        )  # fmt: skip
        ways.append((at, f"block {at}: {words}"))
    if lowest > 0:
        below = "block 0 is" if lowest == 1 else f"blocks 0 to {lowest - 1} are"
        ways.append((lowest - 0.5, f"nothing below block {lowest} trains: {below} not entered"))
    elif lowest < 0:
        ways.append((-0.5, "only here, below all blocks, does it reach what trains"))
    else:
        ways.append((-0.5, "it came down to the first block: no block was spared"))
    return [(caption, _reach(blocks, got, at, caption, dark)) for at, caption in ways]


def _reach(
    blocks: int, got: dict[int, int], now: Number, caption: str, dark: bool | None
) -> go.Figure:
    """The blocks from left to right, and how far the gradient has come from the right."""
    title = "How far the gradient has come"
    s = Sheet(title, 170, f"{title}. {caption}.", dark)
    wide, high, y = (WIDTH - 150) / blocks, 56, 40
    colour, red = BLUE, s.theme.line(VERMILLION)
    for at in range(blocks):
        x, passed = 30 + at * wide, at >= now
        s.box(x, y, wide - 16, high, edge=red if at == now else "", width=3 if at == now else 1)
        s.text(x + (wide - 16) / 2, y + 16, f"block {at}", SMALL, align="center")
        for i in range(min(got[at], 8)):
            s.matrix(x + 8 + i * 9, y + 30, 7, 18, colour=colour, made=not passed)
    end = 30 + blocks * wide
    s.box(end, y, 70, high, edge=red if now == blocks else "", width=3 if now == blocks else 1)
    s.text(end + 35, y + high / 2, "<b>loss</b>", NORMAL, align="center")
    stop = 30 + max(now, 0) * wide + (wide / 2 if now < blocks else 0)
    if now < blocks:
        stop = 30 + int(now + 0.5) * wide + (0 if now % 1 else wide / 2 - 8)
        s.line([(end + 35, y + high), (end + 35, y + high + 24)], red, 2.5)
        s.arrow([(end + 35, y + high + 24), (stop, y + high + 24)], red, 2.5)
    s.key(30, y + high + 58, [("", "frozen"), (colour, "trained, has its gradient")])
    return s.done()
