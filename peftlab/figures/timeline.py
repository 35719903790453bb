"""The memory of one training step as it passes: forward, backward, step."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.accounting import readable_bytes
from peftlab.figures.memory import PARTS
from peftlab.figures.sheet import NORMAL, SMALL, Number, Sheet
from peftlab.memory import Memory

STACK = ("weights", "aside", "optimiser", "gradients", "activations")  # from below
WORDS = {"aside": "originals kept aside", "optimiser": "Adam's moments"}
HIGH = 250


def step_timeline(
    memories: Mapping[str, Memory], dark: bool | None = None, title: str = ""
) -> go.Figure:
    """What is in memory during a training step, one panel for each label, with one scale.

    `memories` has what `memory.measure` or `memory.predict` returned. A layer's activations are
    kept when its forward pass is done; in the backward pass they go, and its gradients come. The
    dots are the totals at the end of forward, backward and step; the dashed line is the most that
    was in use at any time, short-lived tensors included. Without a `title` it says these.
    """
    peak = max(max(memory.peak, *memory.total.values()) for memory in memories.values())
    peaks = [f"{label}: {readable_bytes(memory.peak)}" for label, memory in memories.items()]
    title = title or "The most memory that a step needs is " + "; ".join(peaks)
    alt = ". ".join(_in_words(label, memory) for label, memory in memories.items())
    sheet = Sheet(title, HIGH + 100, f"{title}. {alt}.", dark)
    width = (784 - 62) / len(memories)
    for i, (label, memory) in enumerate(memories.items()):
        _panel(sheet, 66 + i * width, width - 18, label, memory, peak)
    used = [
        part for part in STACK if any(part in m.parts and m.bytes(part) for m in memories.values())
    ]
    _axis(sheet, peak)
    sheet.key(14, HIGH + 86, [(_colour(part), WORDS.get(part, part)) for part in used])
    return sheet.done()


def _colour(part: str) -> str:
    return {"aside": "#a6761d"}.get(part) or PARTS[WORDS.get(part, part)]


def course(memory: Memory) -> list[tuple[str, dict[str, int]]]:
    """What is held after each part of a step: ("forward", bytes by part) for each layer in order,
    then the backward pass from the last layer to the first, then the step. What belongs to no layer
    has its gradient first, as a tied embedding has."""
    steady = {
        part: memory.bytes(part)
        for part in ("weights", "aside", "optimiser")
        if part in memory.parts
    }
    kept, grown = memory.parts["activations"], memory.parts["gradients"]
    places = sorted(kept.keys() | grown.keys(), key=_depth)
    held, states = {"activations": 0, "gradients": 0}, []
    states.append(("forward", {**steady, **held}))
    for place in places:
        held["activations"] += kept.get(place, 0)
        states.append(("forward", {**steady, **held}))
    for place in reversed(places):
        held["activations"] -= kept.get(place, 0)
        held["gradients"] += grown.get(place, 0)
        states.append(("backward", {**steady, **held}))
    states.append(("step", {**steady, **held}))
    return states


def _depth(place: str) -> tuple:
    """Encoder before decoder, input before layers, output behind them."""
    last = place.rsplit(".", 1)[-1]
    inside = {"input": -1}.get(last, int(last) if last.isdigit() else 10**6)
    return place.startswith(("decoder", "output")), inside, place == "around"


def _panel(
    sheet: Sheet, x: Number, width: Number, label: str, memory: Memory, peak: Number
) -> None:
    t, states = sheet.theme, course(memory)
    base = 34 + HIGH
    lengths = {"forward": 0.4, "backward": 0.4, "step": 0.2}
    counts = {name: sum(s == name for s, _ in states) for name in lengths}
    xs, at, before = [], x, None
    for name, _ in states:
        at += (
            0
            if before is None
            else width * lengths[name] / max(1, counts[name] - (name == "forward"))
        )
        xs.append(at)
        before = name
    low = [0.0] * len(states)
    for part in STACK:
        size = [state.get(part, 0) for _, state in states]
        if any(size):
            top = [a + b for a, b in zip(low, size, strict=True)]
            up = [(px, base - v / peak * HIGH) for px, v in zip(xs, top, strict=True)]
            down = [(px, base - v / peak * HIGH) for px, v in zip(xs, low, strict=True)]
            fill = _colour(part)
            sheet.area([*up, *reversed(down)], t.fill(fill), t.line(fill))
            low = top
    sheet.line([(x, base), (x + width, base)], t.edge)
    sheet.text(x, 12, f"<b>{label}</b>", NORMAL)
    ends = {
        name: x + width * share
        for name, share in (("forward", 0.4), ("backward", 0.8), ("step", 1.0))
    }
    start = x
    for name, end in ends.items():
        sheet.text((start + end) / 2, base + 12, name, SMALL, t.quiet, "center")
        sheet.line([(end, base), (end, base + 6)], t.edge)
        start = end
    line = base - memory.peak / peak * HIGH
    sheet.line([(x, line), (x + width, line)], t.ink, 1.2, "dash")
    sheet.text(x + width, line - 8, f"most: {readable_bytes(memory.peak)}", SMALL, t.ink, "right")
    for name, end in ends.items():
        total = memory.total[name]
        hover = f"{label}, after {name}: {readable_bytes(total)}"
        sheet.dot(end, base - total / peak * HIGH, hover=hover)


def _axis(sheet: Sheet, peak: Number) -> None:
    """Bytes at four heights."""
    for share in (0, 0.25, 0.5, 0.75, 1.0):
        y = 34 + HIGH * (1 - share)
        sheet.text(60, y, readable_bytes(round(peak * share)), SMALL, sheet.theme.quiet, "right")


def _in_words(label: str, memory: Memory) -> str:
    parts = [
        f"{WORDS.get(part, part)} {readable_bytes(memory.bytes(part))}"
        for part in STACK
        if part in memory.parts
    ]
    return f"{label}: {', '.join(parts)}; the most at any time is {readable_bytes(memory.peak)}"
