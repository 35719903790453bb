"""The decision flow: each method is a lane that ends at the question that rules it out."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from peftlab.figures.sheet import NORMAL, SMALL, WIDTH, Sheet
from peftlab.figures.style import COLOURS, GREY, VERMILLION, method_key

LEFT, ROW, HEAD = 14, 40, 42
WORDS = 262  # for the questions


def decision_lanes(
    steps: Sequence[tuple[str, Mapping[str, str]]],
    lanes: Sequence[str],
    chosen: str = "",
    outcome: str = "",
    dark: bool | None = None,
) -> go.Figure:
    """Questions from top to bottom, and for each the methods that it rules out, with the reason.

    `steps` are (question, {method: why not}); `lanes` all methods from left to right. A lane that
    reaches the bottom meets every constraint; `chosen` is the one that is advised.
    """
    wide = (WIDTH - WORDS - LEFT) / len(lanes)
    ends = {lane: at for at, (_, out) in enumerate(steps) for lane in out}
    reasons = {lane: why for _, out in steps for lane, why in out.items()}
    through = [lane for lane in lanes if lane not in ends]
    told = "; ".join(f"{lane}: {reasons.get(lane, 'comes through')}" for lane in lanes)
    title = outcome or f"{len(through)} of {len(lanes)} methods come through"
    s = Sheet(title, HEAD + ROW * len(steps) + 52, f"{title}. {told}.", dark)
    bottom = HEAD + ROW * len(steps)
    for at, (question, out) in enumerate(steps):
        y = HEAD + at * ROW
        s.line([(LEFT, y), (WIDTH - LEFT, y)], s.theme.faint, 1)
        s.text(LEFT, y + ROW / 2, question, NORMAL, "" if out else s.theme.quiet)
    for at, lane in enumerate(lanes):
        x = WORDS + (at + 0.5) * wide
        colour = COLOURS.get(method_key(lane) or "", GREY)
        ink = s.theme.line(colour)
        low = HEAD + (ends[lane] + 0.5) * ROW if lane in ends else bottom + 12
        name = "<br>".join(lane.split(" "))
        weight = f"<b>{name}</b>" if lane == chosen else name
        s.text(x, HEAD - 8, weight, SMALL, s.theme.text(colour), "center", "bottom")
        width = 5 if lane == chosen else 3 if lane in through else 1.5
        if lane in ends:
            s.line([(x, HEAD), (x, low)], ink, width)
            stop = s.theme.line(VERMILLION)
            s.line([(x - 11, low), (x + 11, low)], stop, 4)
            s.dot(x, low, stop, f"{lane}: {reasons[lane]}")
        else:
            s.arrow([(x, HEAD), (x, low)], ink, width, head=0.6)
            s.dot(x, HEAD + 2, ink, f"{lane} meets every constraint")
    words = "these meet every constraint" if through else "nothing meets every constraint"
    s.text(LEFT, bottom + 12, words, NORMAL)
    note = "a bar: ruled out here; point at it for the reason"
    s.text(LEFT, bottom + 38, note, SMALL, s.theme.quiet)
    return s.done()
