"""A sublayer of a block in a frame under the residual stream: what all share, and the MLP."""

from peftlab.figures.cells import HEAD, LINE, Cell, Words, colour_of, labels, times, wide, write
from peftlab.figures.described import Drawing
from peftlab.figures.sheet import SMALL, Number, Sheet, width_of

BAND, FOOT = 22, 18  # above the matrices, and below them for the frame's name


class Frame:
    """What the two kinds share: a tap on the stream, a last matrix, adapters, the way back up."""

    kind = last = ""

    def __init__(self, drawing: Drawing, sheet: Sheet, stack: str, unit: Number, prefix: str = ""):
        self.drawing, self.sheet, self.stack = drawing, sheet, stack
        self.unit, self.prefix = unit, prefix
        self.boxes = drawing.at(stack, self.kind)
        self.norm = drawing.at(stack, f"{self.kind}.norm")
        self.out = self.cell(self.last)
        self.adapter: Words = labels(self.boxes, sheet)
        self.d = max(3.0, self.out.rows * unit)  # the height of one token's column
        heading = width_of(self.out.heading, SMALL) + 12
        words = max(heading, wide(self.out.words) + 4, self._adapter_width + 14)
        self.end = max(self.out.full_width + 14, words)

    def cell(self, role: str) -> Cell:
        return Cell(self.drawing, self.sheet, self.stack, f"{self.prefix}{role}", self.unit)

    @property
    def _narrow(self) -> Number:
        """The side of an adapter's matrices that is m long."""
        ms = [box.shape[0] for box in self.boxes if len(box.shape) == 2]
        return max(3.0, min(ms) * self.unit) if ms else 0.0

    @property
    def _adapter_width(self) -> Number:
        return max(self.d + 18 + self._narrow + 22, wide(self.adapter)) if self.boxes else 0.0

    @property
    def need(self) -> Number:
        """The height of what stands above one another at the end of the sublayer."""
        own = HEAD + self.out.full_height + LINE * len(self.out.words) + 6
        return own + (self.d + 22 + LINE * len(self.adapter) if self.boxes else 0)

    def frame(self, x: Number, y: Number, w: Number, h: Number, words: str) -> None:
        self.sheet.box(x, y, w, h, self.sheet.theme.paper, self.sheet.theme.faint)
        self.sheet.text(x + 8, y + h - 4, words, SMALL, self.sheet.theme.quiet, at="bottom")

    def tap(self, x: Number, stream: Number, top: Number) -> None:
        """From the stream down into the frame, through the norm if it comes first."""
        if self.drawing.first and self.norm:
            y = stream + 11
            self.sheet.line([(x, stream), (x, y)])
            self._norm(x - 4, y, self.d, 4)
            self.sheet.line([(x, y + 4), (x, top)])
            self._norm_words(x + self.d + 2, y + 2, "left")
        else:
            self.sheet.line([(x, stream), (x, top)])

    def _norm(self, x: Number, y: Number, w: Number, h: Number) -> None:
        box = next((box for box in self.norm if box.trained), self.norm[0])
        hover = ", ".join(f"{b.name} {b.size}" for b in self.norm)
        self.sheet.matrix(x, y, w, h, "", colour_of(box), hover=f"norm: {hover}")

    def _norm_words(self, x: Number, y: Number, align: str) -> None:
        trained = [box for box in self.norm if box.trained]
        words, ink = "norm", self.sheet.theme.quiet
        if trained:
            names = ", ".join(box.name for box in trained)
            ink = self.sheet.theme.text(colour_of(trained[0]))
            words = f"{self.sheet.marks.get(trained[0].method, '')}norm {names}"
            words += "" if self.sheet.brief else f" {trained[0].size} {times(trained[0])}"
        self.sheet.text(x, y, words, SMALL, ink, align)

    def finish(
        self, x: Number, bottom: Number, stream: Number, bus: Number, top: Number, level: Number
    ) -> None:
        """The last matrix at x, at this level where there is room, its adapter above it, and the
        sum on the stream."""
        sheet, out = self.sheet, self.out
        y = bottom - LINE * len(out.words) - 4 - out.full_height
        least = top + BAND + HEAD + self.need - (bottom - y) - HEAD + 6 if self.boxes else 0
        y = min(y, max(level - out.h / 2, least))
        out.draw(x, y)
        write(sheet, x, y + out.full_height + 9, out.words)
        self.entry, back = (x, y + out.h / 2), x + self.end - 8
        middle, up = y + out.h / 2, [(back, stream)]
        sheet.line([(x + out.full_width + 1, middle), (back, middle), (back, stream + 8)])
        if self.boxes:
            self._adapter(x, back, bus, top)
        sheet.arrow([(back, stream + 22), (back, stream + 9)])
        sheet.plus(*up[0])
        if not self.drawing.first and self.norm:
            self._norm(back + 14, stream - self.d / 2, 4, self.d)
            self._norm_words(back + 20, stream - self.d / 2 - 8, "right")

    def _adapter(self, x: Number, back: Number, bus: Number, top: Number) -> None:
        sheet, box = self.sheet, self.boxes[0]
        ink = sheet.theme.line(colour_of(box))
        y = top + BAND / 2 + self.d / 2  # the middle of its matrices
        low, right = x + self.d / 2, x + self.d + 18
        for part in self.boxes:
            if len(part.shape) == 2:
                first = part.shape[0] <= part.shape[1] and "down" in part.name
                w, h = (self.d, self._narrow) if first else (self._narrow, self.d)
                at = x if first else right
                hover = f"{part.name}: {part.size} × {part.copies} = {part.numbers:,} numbers"
                sheet.matrix(at, y - h / 2, w, h, "", colour_of(part), hover=hover)
        sheet.arrow([(x + self.d + 1, y), (right - 1, y)], ink)
        sheet.arrow([(right + self._narrow + 1, y), (back - 9, y)], ink)
        sheet.plus(back, y, colour=ink, r=7)
        if box.how == "beside":
            line = [(bus, top + 8), (low, top + 8), (low, y - self._narrow / 2 - 1)]
        else:
            under = y + self.d / 2 + 7
            line = [(back, under), (low, under), (low, y + self._narrow / 2 + 1)]
        sheet.arrow(line, ink)
        write(sheet, x, y + self.d / 2 + 17, self.adapter)


class MlpFrame(Frame):
    """norm → up (and gate) → non-linearity → down."""

    kind, last = "mlp", "down"

    def __init__(self, drawing, sheet, stack, unit):
        super().__init__(drawing, sheet, stack, unit)
        self.inner = [self.cell(role) for role in (("gate", "up") if drawing.gated else ("up",))]
        self.label = max(wide(cell.words) for cell in self.inner)
        head = max(width_of(cell.heading, SMALL) for cell in self.inner)
        self.left = max(
            max(c.full_width for c in self.inner) + 5 + self.label,
            head - (8 if drawing.gated else 26),
        )
        self.width = 22 + self.left + 14 + 20 + 14 + self.end + 6

    @property
    def height(self) -> Number:
        inner = sum(HEAD + max(c.full_height, LINE * len(c.words)) + 6 for c in self.inner)
        return max(inner, self.need)

    def draw(self, x: Number, stream: Number, top: Number, height: Number) -> None:
        sheet = self.sheet
        self.frame(x, top, self.width, height + BAND + FOOT, "MLP")
        bus, at, bottom = x + 10, x + 22, top + BAND + height
        self.tap(bus, stream, top)
        y, middles = top + BAND + HEAD, []
        join = at + self.left + 14
        for cell in self.inner:
            middles.append(y + cell.h / 2)
            cell.draw(at, y)
            words_at = at + cell.full_width + 5
            write(
                sheet,
                words_at,
                max(y + 6, middles[-1] - LINE * (len(cell.words) - 1) / 2),
                cell.words,
            )
            used = words_at + wide(cell.words) + 2 if cell.words else at + cell.full_width + 2
            sheet.arrow([(bus, middles[-1]), (at - 1, middles[-1])])
            sheet.line([(used, middles[-1]), (join, middles[-1])])
            y += HEAD + max(cell.full_height, LINE * len(cell.words)) + 6
        sheet.line([(bus, top), (bus, middles[-1])])
        end = at + self.left + 48
        self.finish(end, bottom, stream, bus, top, bottom)
        ex, ey = self.entry
        sheet.arrow([(join, middles[0]), (join, ey), (ex - 1, ey)])
        sheet.plus(join, middles[0], "σ")
        if self.drawing.gated:
            sheet.plus(join, middles[1], "×")
