"""What is attached, drawn: one block of the model with every trained tensor at its place."""

from collections.abc import Callable

import plotly.graph_objects as go

from peftlab.accounting import readable_percent
from peftlab.figures.attention_frame import COLUMN, MOST, TEXT_TOKENS, AttentionFrame
from peftlab.figures.cells import LINE, colour_of, times
from peftlab.figures.described import Box, Drawing, describe
from peftlab.figures.frames import BAND, FOOT, MlpFrame
from peftlab.figures.sheet import SMALL, WIDTH, Number, Sheet, width_of
from peftlab.figures.style import BLACK, COLOURS
from peftlab.methods.method import METHODS
from peftlab.tuned import Tuned

STREAM = 24  # from the stream of a row to its frames
AROUND = {
    "network": "the network that makes what is pale above; it is thrown away after training",
    "shared": "frozen, drawn from a seed, shared by all places",
    "around": "around the blocks",
}


def draw(tuned: Tuned, dark: bool | None = None, stack: str | None = None) -> go.Figure:
    """What is attached to a model, from its own tensors: one block, each trained tensor at its
    place with its size and the number of layers that have it; what is frozen is grey.

    `stack` draws T5's "encoder" or "decoder" alone. `dark`: on dark paper; by default as the
    template in use. Raises RuntimeError after detach(), and ValueError for an unknown stack.
    """
    return render(describe(tuned), dark, stack)


def render(
    drawing: Drawing,
    dark: bool | None = None,
    stack: str | None = None,
    title: str = "",
    legend: Callable[[Sheet, Number], Number] | None = None,
) -> go.Figure:
    """A description as a figure. `title` and `legend` replace those that tell what trains; the
    legend draws itself at a height and returns its own."""
    stacks = list(drawing.layers)
    if stack is not None and stack not in stacks:
        raise ValueError(f"stack={stack!r}: {drawing.model} has {', '.join(map(repr, stacks))}")
    sheet = Sheet("", 100, drawing.words(), dark)
    sheet.brief, sheet.marks = drawing.brief, drawing.marks
    rows = [
        _Row(drawing, sheet, each, at) for at, each in enumerate(stacks) if stack in (None, each)
    ]
    strips = [] if drawing.brief else _strips(drawing)
    y = 0.0
    for row in rows:
        row.top = y
        y += row.above + STREAM + row.height + BAND + FOOT + 6
    sheet.width = max(WIDTH, *(row.width for row in rows))
    for row in rows:
        row.draw(rows[0])
    for kind, boxes in strips:
        y = _strip(sheet, drawing, y, kind, boxes)
    y += 12 + (_key(sheet, y + 12, drawing) if legend is None else legend(sheet, y + 12))
    return sheet.resized(title or _title(drawing), y).done()


def _title(drawing: Drawing) -> str:
    if not drawing.numbers:
        return f"{drawing.title}: nothing trains"
    share = readable_percent(drawing.numbers, drawing.total)
    return f"{drawing.title}: {drawing.numbers:,} numbers train ({share})"


class _Row:
    """One stack: what enters it, one of its blocks, its stream from left to right."""

    def __init__(self, drawing: Drawing, sheet: Sheet, stack: str, at: int):
        self.drawing, self.sheet, self.stack, self.at = drawing, sheet, stack, at
        self.top = 0.0
        two = len(drawing.layers) > 1
        sizes = [n for (_, role), all_ in drawing.weights.items() for size in all_ for n in size]
        d = drawing.weights[stack, "down"][0][0]
        side = max(d, *(rows for rows, _ in drawing.weights[stack, "q"]))
        stacked = 2 if drawing.gated else 1
        self.unit = min(
            (60 if two else 132 / stacked**0.5) / max(sizes), (30 if two else 46) / side
        )
        self.d = d * self.unit
        self.above = self.d / 2 + 17
        args = (drawing, sheet, stack, self.unit)
        self.frames = [AttentionFrame(*args)]
        if (stack, "cross.o") in drawing.weights:
            self.frames.append(AttentionFrame(*args, cross=True))
        self.frames.append(MlpFrame(*args))
        self.prompt = [b for b in drawing.boxes if b.how == "token" and at == 0]
        self.words = ", ".join(_prompt_words(box, drawing) for box in self.prompt)
        tokens = (min(MOST, self.prompt[0].shape[-2]) if self.prompt else 0) + TEXT_TOKENS
        table = next(box for box in drawing.boxes if box.site == "input" and box.name == "E")
        name = "E" if drawing.brief else f"E {table.size}"
        words = max(width_of(self.words, SMALL), 0 if at else width_of(name, SMALL)) + 10
        self.entry = max(tokens * (COLUMN + 1.5) + 14, words)
        self.above += 14 if self.prompt else 0

    @property
    def height(self) -> Number:
        return max(frame.height for frame in self.frames)

    @property
    def width(self) -> Number:
        return 12 + self.entry + sum(frame.width + 6 for frame in self.frames) + 24

    def draw(self, first: "_Row") -> None:
        sheet, stream = self.sheet, self.top + self.above
        top = stream + STREAM
        spare = (sheet.width - self.width) / (len(self.frames) + 1)
        gap = min(max(spare, 0), 40)
        x = 12 + self.entry + 8 + gap / 2
        end = x + sum(frame.width + 6 + gap for frame in self.frames) + 10
        sheet.stream(12, end, stream)
        wide_is = self.drawing.weights[self.stack, "down"][0][0]
        count = self.drawing.layers[self.stack]
        name = f"{self.stack}: " if self.stack else ""
        sheet.text(
            12,
            stream - self.above + 8,
            f"{name}residual stream, {wide_is:,} wide; one of {count} blocks",
            SMALL,
            sheet.theme.quiet,
        )
        for frame in self.frames:
            frame.draw(x, stream, top, self.height)
            if isinstance(frame, AttentionFrame) and frame.memory:
                self._remember(frame, first)
            x += frame.width + 6 + gap
        self.end = (end, stream)
        self._entry(stream)

    def _entry(self, stream: Number) -> None:
        """Tokens, the virtual ones in front, and the table that the text's come from."""
        sheet, x, y = self.sheet, 14.0, stream - self.d / 2
        for box in self.prompt:
            shown = min(MOST, box.shape[-2])
            x = sheet.columns(x, y, shown, COLUMN, self.d, colour_of(box), made=box.made) + 4
        sheet.columns(x, y, TEXT_TOKENS, COLUMN, self.d)
        if self.prompt:
            ink = sheet.theme.text(colour_of(self.prompt[0]))
            sheet.text(14, y - 9, self.words, SMALL, ink)
        if self.at:
            return
        table = next(box for box in self.drawing.boxes if box.site == "input" and box.name == "E")
        colour, high, low = colour_of(table), 54, stream + self.d / 2 + 20
        sheet.arrow([(x + 7, low), (x + 7, stream + self.d / 2 + 2)])
        left, right = x + 7 - min(self.d / 2, x - 7), x + 7 + self.d / 2
        hover = f"embedding table: {table.size}"
        sheet.matrix(left, low, right - left, high, "", colour, hover=hover)
        for k in (0, 5):  # a break: the table is longer than drawn
            ends = [(left - 2, low + high / 2 + k + 3), (right + 2, low + high / 2 + k - 3)]
            sheet.line(ends, sheet.theme.paper, 2)
        ink = sheet.theme.text(colour) if colour else sheet.theme.quiet
        sheet.text(
            14, low + high + 9, "<b>E</b>" if sheet.brief else f"<b>E</b> {table.size}", SMALL, ink
        )

    def _remember(self, frame: AttentionFrame, first: "_Row") -> None:
        """The encoder's output, which the decoder's second attention reads."""
        x, _, low = frame.memory
        ink = self.sheet.theme.quiet
        turn, right, path = self.top + 4, self.sheet.width - 6, []
        if first is not self:
            end, stream = first.end
            right = min(end + 8, right)
            path = [(end, stream), (right, stream)]
        path += [(right, turn), (x, turn), (x, low)]
        self.sheet.line(path, ink, 1.2, "dash")
        above = turn + 9 if first is self else turn - 7
        self.sheet.text(right - 6, above, "the encoder's output", SMALL, ink, "right")


def _prompt_words(box: Box, drawing: Drawing) -> str:
    if drawing.brief:
        return f"{drawing.marks.get(box.method, '')}{box.name}, virtual tokens"
    made = ", made" if box.made else ""
    return f"{box.name} {box.size}" + (f" {times(box)}" if box.layers else "") + made


def _strips(drawing: Drawing) -> list[tuple[str, list[Box]]]:
    """What belongs to no place in a block, in rows below: a network, shared factors, the rest."""
    drawn = [box for box in drawing.boxes if box.how != "token" and box.name != "E"]
    outside = ("input", "output", "other", "head")
    rows = {
        "network": [box for box in drawn if box.site == "network"],
        "shared": [box for box in drawn if box.site == "shared"],
        "around": [box for box in drawn if box.trained and box.site in outside],
    }
    return [(kind, boxes) for kind, boxes in rows.items() if boxes]


def _strip(sheet: Sheet, drawing: Drawing, y: Number, kind: str, boxes: list[Box]) -> Number:
    """A row of matrices with their names and sizes; returns where the next row begins."""
    t, x, first = sheet.theme, 14.0, next(iter(drawing.layers))
    sheet.text(14, y + 14, AROUND[kind], SMALL, t.quiet)
    y += 24
    longest = max(n for box in boxes for n in box.shape)
    unit = 40 / min(longest, 4 * max(rows for rows, _ in drawing.weights[first, "down"]))
    tall = min(40.0, max(3, max(box.shape[0] for box in boxes) * unit))
    for box in boxes:
        ink = t.text(colour_of(box)) if box.trained else t.quiet
        name = f"{box.stack} {box.name}".strip().replace("_embeddings", "")
        size = box.size + (f" × {box.copies}" if box.copies > 1 else "")
        rows, cols = (*box.shape, 1)[:2] if len(box.shape) < 3 else box.shape[:2]
        w, h = (min(40.0, max(3, side * unit)) for side in (cols, rows))
        step = max(width_of(name, SMALL), width_of(size, SMALL), w) + 14
        if x + step > sheet.width:
            x, y = 14.0, y + tall + 2 * LINE + 8
        sheet.matrix(x, y, w, h, "", colour_of(box), box.made, f"{name}: {size}")
        if rows * unit > 40:  # a break: it is longer than drawn
            for k in (18, 23):
                sheet.line([(x - 2, y + k + 2), (x + w + 2, y + k - 2)], t.paper, 2)
        sheet.text(x, y + tall + 8, name, SMALL, ink)
        sheet.text(x, y + tall + 8 + LINE, size, SMALL, ink)
        x += step
    return y + tall + 2 * LINE + 6


def _key(sheet: Sheet, y: Number, drawing: Drawing) -> Number:
    methods = dict.fromkeys(box.method for box in drawing.boxes if box.trained)
    titles = {name: METHODS[name].title for name in methods if name in METHODS}
    entries = [("", "frozen")]
    for method in methods:
        words = f"trained by {titles[method]}" if method in titles else "the new head, trained"
        entries.append((COLOURS.get(method, BLACK), words))
    sheet.key(14, y, entries)
    return 14
