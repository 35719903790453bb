"""Soft prompts side by side: where in tokens × layers each of them puts numbers that train."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from peftlab.figures.cells import colour_of
from peftlab.figures.described import Box, Drawing
from peftlab.figures.sheet import NORMAL, SMALL, Number, Sheet, width_of

TEXT = 3  # tokens of text in each grid
LEGEND = (
    ("vector", "a vector that trains enters here"),
    ("bars", "a key and a value that train"),
    ("state", "a hidden state, computed"),
    ("text", "text, frozen"),
    ("", "rows are layers, the last on top"),
)


def soft_definitions(drawings: Mapping[str, Drawing], dark: bool | None = None) -> go.Figure:
    """One grid for each definition, from what is attached: a column is a token, a row a layer.

    `drawings` has `describe(tuned)` by label. A full cell of a virtual token is a vector that
    trains and enters there; two bars are a key and a value that train, with no hidden state; an
    outline is a hidden state that the frozen model computes from the layer below. Of T5 the first
    stack is drawn. Raises ValueError where a method has no virtual token.
    """
    depth = max(next(iter(d.layers.values())) for d in drawings.values())
    width = 776 / len(drawings)
    row = min(32.0, 280 / depth)
    reading = "; ".join(_in_words(label, drawing) for label, drawing in drawings.items())
    title = f"{len(drawings)} definitions of a soft prompt: the same tokens, other places to train"
    sheet = Sheet(title, 112 + row * depth, f"{title}. {reading}.", dark)
    for i, (label, drawing) in enumerate(drawings.items()):
        _grid(sheet, 12 + i * width, width - 14, label, drawing, depth, row)
    tokens, keys = _soft(list(drawings.values())[-1])
    legend(sheet, 92 + row * depth, colour_of((tokens or keys)[0]), LEGEND, 38)
    return sheet.done()


def _soft(drawing: Drawing) -> tuple[list[Box], list[Box]]:
    """The boxes of virtual tokens, and those of virtual keys, of the first stack."""
    first = next(iter(drawing.layers))
    tokens = [box for box in drawing.boxes if box.how == "token"]
    keys = [box for box in drawing.boxes if box.how == "key" and box.stack == first]
    keys = [box for box in keys if box.site == "kv"]
    if not tokens and not keys:
        raise ValueError(f"{drawing.title}: it has no virtual token to draw")
    return tokens, keys


def _grid(
    sheet: Sheet, x: Number, width: Number, label: str, drawing: Drawing, depth: int, row: Number
) -> None:
    t, (tokens, keys) = sheet.theme, _soft(drawing)
    box = (tokens or keys)[0]
    colour, count = colour_of(box), box.shape[-2]
    shown, name = min(count, 4), 18
    cell = min(26.0, (width - name) / (shown + TEXT + 0.4))
    left = x + name
    sheet.text(x, 12, f"<b>{label}</b>", NORMAL, t.text(colour))
    numbers = f"{drawing.numbers:,} numbers train"
    sheet.text(x, 29, numbers, SMALL, t.quiet)
    entering = {0} if tokens else set()
    entering |= {layer for each in tokens for layer in each.layers}
    bars = {layer for each in keys for layer in each.layers}
    for layer in range(depth):
        y = 46 + row * (depth - 1 - layer)
        sheet.text(left - 5, y + row / 2, str(layer), SMALL, t.quiet, "right")
        for i in range(shown + TEXT):
            at = left + i * cell + (4 if i >= shown else 0)
            if i >= shown:
                sheet.box(at + 2, y + 3, cell - 4, row - 6, t.frozen, t.edge)
            else:
                _virtual(
                    sheet, at + 2, y + 3, cell - 4, row - 6, box, layer, entering, bars, tokens
                )
    base = 46 + row * depth
    words = f"{count} virtual"
    if width_of(words, SMALL) < shown * cell + 14:
        sheet.text(left, base + 9, words, SMALL, t.text(colour))
    text = left + shown * cell + 4
    sheet.text(max(text, left + width_of(words, SMALL) + 8), base + 9, "text", SMALL, t.quiet)


def _virtual(sheet, x, y, w, h, box: Box, layer: int, entering, bars, tokens) -> None:
    """One virtual token in one layer."""
    t, colour = sheet.theme, colour_of(box)
    fill, edge = t.fill(colour), t.line(colour)
    state = layer in entering
    if state:
        sheet.box(x, y, w, h, t.tint(colour) if box.made else fill, edge)
    elif tokens:
        sheet.box(x, y, w, h, t.paper, t.edge, "dot")
    if layer in bars:
        bar = t.paper if state else fill
        for side in (0.12, 0.58):
            sheet.box(x + side * w, y + h * 0.15, w * 0.3, h * 0.7, bar, edge)


def legend(
    sheet: Sheet, y: Number, colour: str, entries: Sequence[tuple[str, str]], gap: Number
) -> None:
    """What stands in a cell, as it is drawn, and in words: a vector, bars, a state, or text."""
    t, x = sheet.theme, 14.0
    fill, edge = t.fill(colour), t.line(colour)
    for kind, words in entries:
        if kind == "bars":
            sheet.box(x, y - 6, 5, 12, fill, edge)
            sheet.box(x + 8, y - 6, 5, 12, fill, edge)
        elif kind:
            looks = {"vector": (fill, edge), "state": (t.paper, t.edge), "text": (t.frozen, t.edge)}
            sheet.box(x, y - 6, 14, 12, *looks[kind], "dot" if kind == "state" else "solid")
        sheet.text(x + (19 if kind else 0), y, words, SMALL, t.quiet)
        x += width_of(words, SMALL) + gap


def _in_words(label: str, drawing: Drawing) -> str:
    tokens, keys = _soft(drawing)
    parts = [f"{label} trains {drawing.numbers:,} numbers"]
    if tokens:
        layers = {layer for box in tokens for layer in box.layers}
        parts.append(f"vectors enter at {'every layer' if len(layers) > 1 else 'the input alone'}")
    if keys:
        parts.append(f"keys and values in {len(keys[0].layers)} layers")
    return ", ".join(parts)
