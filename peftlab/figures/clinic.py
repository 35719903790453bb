"""Drawings of a clinic: where a run breaks, which labels count, how far a gradient gets."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from peftlab.figures.sheet import NORMAL, SMALL, WIDTH, Sheet
from peftlab.figures.style import COLOURS, GREEN, VERMILLION

LEFT = 14
# What to look at first: the question, how to look, and what to do if the answer is no.
ORDER = (
    (
        "Does the service see the adapter?",
        "logits with it and without it differ",
        "load it, switch it on, read the missing keys",
    ),
    (
        "Is everything that trains in the file?",
        "load it in a new process, score it again",
        "trainable_token_indices, modules_to_save",
    ),
    (
        "Are the labels what you mean?",
        "decode one row: answer and end, nothing else",
        "mask prompt and padding, keep the end",
    ),
    (
        "Does every layer get a gradient?",
        "pl.examine, and gradients after one step",
        "targets; input gradients; float32",
    ),
    (
        "Does it move far enough?",
        "rate, alpha, decay beside the usual ones",
        "three rates, alpha with r, decay 0",
    ),
    (
        "Does it learn eight examples by heart?",
        "train on one batch until the loss is near 0",
        "one of the answers above was not true",
    ),
)


def stations(faults: Mapping[str, Sequence[str]], dark: bool | None = None) -> go.Figure:
    """A run from its text to its answers, in two rows, with what breaks at each station."""
    names, across = list(faults), (len(faults) + 1) // 2
    wide = (WIDTH - 2 * LEFT) / across
    lines = max(map(len, faults.values()))
    high = 46 + 16 * lines
    words = "; ".join(f"{name}: {', '.join(faults[name])}" for name in names)
    count = sum(map(len, faults.values()))
    title = f"{count} faults that raise no error, at the station where each one happens"
    s = Sheet(title, 2 * high + 8, f"A run in {len(names)} stations. {words}.", dark)
    ink = s.theme.text(VERMILLION)
    for at, name in enumerate(names):
        x, y = LEFT + at % across * wide, at // across * high + 4
        s.box(x, y, wide - 30, 28, s.theme.frozen)
        s.text(x + (wide - 30) / 2, y + 14, f"<b>{name}</b>", NORMAL, align="center")
        if at % across < across - 1:
            s.arrow([(x + wide - 28, y + 14), (x + wide - 3, y + 14)])
        for row, fault in enumerate(faults[name]):
            s.text(x + 2, y + 42 + 16 * row, fault, SMALL, ink)
    return s.done()


def counted_labels(
    tokens: Sequence[str], ways: Mapping[str, Sequence[bool]], dark: bool | None = None
) -> go.Figure:
    """One row of a batch, and which of its tokens each way of labelling puts into the loss."""
    start, gap, row = 150, 2, 44
    wide = (WIDTH - start - LEFT) / len(tokens)
    told = "; ".join(
        f"{way}: {', '.join(t for t, yes in zip(tokens, on, strict=True) if yes)}"
        for way, on in ways.items()
    )
    title = "The same row under different labels: coloured tokens are in the loss"
    s = Sheet(title, row * len(ways) + 26, f"Tokens in the loss. {told}.", dark)
    colour = COLOURS["lora"]
    for at, (way, on) in enumerate(ways.items()):
        y = at * row + 6
        s.text(LEFT, y + 15, way, NORMAL)
        for i, (token, yes) in enumerate(zip(tokens, on, strict=True)):
            s.matrix(start + i * wide, y, wide - gap, 30, colour=colour if yes else "")
            fill = s.theme.fill(colour) if yes else s.theme.frozen
            s.text(start + (i + 0.5) * wide - 1, y + 15, token, SMALL, s.theme.on(fill), "center")
    s.key(LEFT, row * len(ways) + 14, [(colour, "in the loss"), ("", "left out, label −100")])
    return s.done()


def gradient_reach(ways: Mapping[str, Sequence[bool]], dark: bool | None = None) -> go.Figure:
    """How far back a gradient gets: for each way, the blocks whose adapters were given one."""
    row, start, high = 92, 190, 34
    count = len(next(iter(ways.values())))
    wide = (WIDTH - start - 130) / count
    told = "; ".join(f"{way}: {sum(on)} of {count} blocks" for way, on in ways.items())
    s = Sheet("How far back the gradient came", row * len(ways) + 22, f"{told}.", dark)
    colour, ink = COLOURS["lora"], s.theme.text(VERMILLION)
    for at, (way, on) in enumerate(ways.items()):
        y = at * row + 16
        s.text(LEFT, y + high / 2, way, NORMAL)
        for i, yes in enumerate(on):
            x = start + i * wide
            s.box(x, y, wide - 10, high)
            s.text(x + 6, y + high / 2, f"block {i}", SMALL)
            s.matrix(x + wide - 24, y + 6, 8, high - 12, colour=colour if yes else "")
        end = start + count * wide
        s.matrix(end, y, 44, high, "norm", colour)
        s.text(end + 84, y + high / 2, "<b>loss</b>", NORMAL, align="center")
        low, first = y + high + 14, next((i for i, yes in enumerate(on) if yes), count)
        stop = start + first * wide
        s.line([(end + 84, y + high / 2 + 10), (end + 84, low)], s.theme.line(colour), 2)
        s.arrow([(end + 84, low), (stop, low)], s.theme.line(colour), 2)
        if first:
            s.text(stop - 8, low, "no input of a block wants a gradient: it stops", SMALL, ink,
                   "right")  # fmt: skip
    s.key(LEFT, row * len(ways) + 12, [(colour, "got a gradient"), ("", "got none, or is frozen")])
    return s.done()


def decision_order(
    steps: Sequence[tuple[str, str, str]] = ORDER, dark: bool | None = None
) -> go.Figure:
    """Questions from top to bottom: (question, how to look, what "no" means)."""
    row, left, wide = 74, 36, 330
    told = "; ".join(f"{n}. {asked} {look} If not: {no}" for n, (asked, look, no) in
                     enumerate(steps, 1))  # fmt: skip
    title = "What to look at first: the cheapest question that can clear the most"
    s = Sheet(title, row * len(steps) + 30, told, dark)
    good, bad = s.theme.line(GREEN), s.theme.line(VERMILLION)
    for at, (asked, look, no) in enumerate(steps):
        y, middle = at * row + 6, left + wide / 2
        s.box(left, y, wide, 48)
        s.text(left + 10, y + 15, f"<b>{at + 1}  {asked}</b>", NORMAL)
        s.text(left + 10, y + 34, look, SMALL)
        s.arrow([(left + wide, y + 24), (left + wide + 46, y + 24)], bad)
        s.text(left + wide + 14, y + 15, "no", SMALL, s.theme.text(VERMILLION))
        s.text(left + wide + 54, y + 24, no, SMALL)
        s.arrow([(middle, y + 48), (middle, y + row)], good)
        s.text(middle + 8, y + 61, "yes", SMALL, s.theme.text(GREEN))
    s.text(left + wide / 2, row * len(steps) + 16, "now it is the data, the task or the method",
           NORMAL, align="center")  # fmt: skip
    return s.done()
