"""Attention and the MLP of one block, each in a frame under the residual stream."""

from peftlab.figures.cells import HEAD, LINE, Cell, Words, colour_of, labels, times, wide, write
from peftlab.figures.described import Drawing
from peftlab.figures.sheet import SMALL, Number, Sheet, width_of

TEXT_TOKENS, MOST = 3, 8  # columns drawn for the text, and at most for virtual tokens
COLUMN = 4
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
            words, ink = (
                f"norm {names} {trained[0].size} {times(trained[0])}",
                self.sheet.theme.text(colour_of(trained[0])),
            )
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


class AttentionFrame(Frame):
    """norm → q, k, v → softmax over [P_k; K] → o, with P virtual columns if there are any."""

    kind, last = "attention", "o"

    def __init__(self, drawing, sheet, stack, unit, cross=False):
        self.kind, self.cross = ("cross" if cross else "attention"), cross
        super().__init__(drawing, sheet, stack, unit, "cross." if cross else "")
        self.three = [self.cell(role) for role in "qkv"]
        self.whole = labels(
            [b for b in drawing.at(stack, f"{self.prefix}qkv") if b.how != "frozen"], sheet
        )
        self.virtual = {box.how: box for box in drawing.at(stack, f"{self.prefix}kv")}
        tall = [max(cell.full_height, LINE * len(cell.words)) for cell in self.three]
        if self.virtual:
            tall.append(max(cell.h for cell in self.three) + LINE + 6)
        self.step = HEAD + max(tall) + 8
        self.label = max(wide(cell.words) for cell in self.three)
        self.label += 8 if self.label else 0
        self.head = max(width_of(cell.heading, SMALL) for cell in self.three)
        strips = max(cell.full_width for cell in self.three)
        left = max(strips + self._tall_strips + self.label + 6, self.head + 4)
        self.left = max(left, wide(self.whole))
        self.columns = max(
            self._columns_width,
            wide(self._virtual_words("key")),
            wide(self._virtual_words("value")),
        )
        self.width = 22 + self.left + self.columns + 18 + 46 + 14 + self.end + 6

    @property
    def _tall_strips(self) -> Number:
        return 6.0 * sum(
            box.name != "W" for box in self.drawing.at(self.stack, f"{self.prefix}qkv")
        )

    @property
    def _shown(self) -> int:
        return min(MOST, max((box.shape[-2] for box in self.virtual.values()), default=0))

    @property
    def _columns_width(self) -> Number:
        return (self._shown + TEXT_TOKENS) * (COLUMN + 1.5) + 4

    @property
    def height(self) -> Number:
        three = 3 * self.step + (LINE * len(self.whole) + 4 if self.whole else 0)
        return max(three, self.need)

    def _virtual_words(self, how: str) -> Words:
        box = self.virtual.get(how)
        if box is None:
            return []
        ink = self.sheet.theme.text(colour_of(box))
        return [(f"{box.name} {box.size}", ink), (("made " if box.made else "") + times(box), ink)]

    def draw(self, x: Number, stream: Number, top: Number, height: Number) -> None:
        sheet, t = self.sheet, self.sheet.theme
        heads, kv = (cell.counted(self.drawing.head_dim) for cell in self.three[:2])
        words = f"{heads} heads" if heads == kv else f"{heads} query, {kv} key-value heads"
        name = "attention to the encoder" if self.cross else "attention"
        self.frame(x, top, self.width, height + BAND + FOOT, f"{name}, {words}")
        bus, at, bottom = x + 10, x + 22, top + BAND + height
        step = max(
            self.step, (height - (LINE * len(self.whole) + 4)) / 3 if not self.whole else self.step
        )
        ys = [top + BAND + HEAD + i * step for i in range(3)]
        middles = [y + cell.h / 2 for y, cell in zip(ys, self.three, strict=True)]
        taps = middles[:1] if self.cross else middles
        self.tap(bus, stream, top)
        sheet.line([(bus, top), (bus, taps[-1])])
        beside = at + self.left + 2
        self.memory = None
        if self.cross:
            self.memory = (bus + 6, top, middles[2])
        for i, (cell, y, middle) in enumerate(zip(self.three, ys, middles, strict=True)):
            start = bus if middle in taps else bus + 6
            sheet.arrow([(start, middle), (at - 1, middle)])
            cell.draw(at, y)
            words_at = at + cell.full_width + 5 + self._tall_strips
            write(
                sheet, words_at, max(y + 6, middle - LINE * (len(cell.words) - 1) / 2), cell.words
            )
            used = words_at + wide(cell.words) + 2 if cell.words else at + cell.full_width + 2
            self._result(i, used, beside, middle)
        self._fused(at, ys, middles)
        pill = beside + self.columns + 18
        edge = beside + self.columns
        between = (middles[0] + middles[1]) / 2
        sheet.line([(edge, middles[1]), (edge + 6, middles[1]), (edge + 6, between)])
        start = [(edge, middles[0]), (edge + 6, middles[0])]
        sheet.arrow([*start, (edge + 6, between), (pill - 1, between)])
        sheet.box(pill, between - 9, 46, 18, t.paper, t.edge)
        sheet.text(pill + 23, between, "softmax", SMALL, t.ink, "center")
        end = pill + 46 + 14
        self.finish(end, bottom, stream, bus, top, middles[2])
        sheet.arrow([(pill + 23, between + 9), (pill + 23, middles[2] - 8)])
        sheet.arrow([(edge, middles[2]), (pill + 23 - 9, middles[2])])
        sheet.plus(pill + 23, middles[2], "×")
        ex, ey = self.entry
        sheet.arrow(
            [(pill + 32, middles[2]), (ex - 9, middles[2]), (ex - 9, ey), (ex - 1, ey)]
            if abs(ey - middles[2]) > 2
            else [(pill + 32, ey), (ex - 1, ey)]
        )

    def _result(self, i: int, start: Number, x: Number, middle: Number) -> None:
        """Q, K or V as columns, the virtual ones in front."""
        sheet, how = self.sheet, ("query", "key", "value")[i]
        cell, box = self.three[i], self.virtual.get(how)
        sheet.line([(start, middle), (x - 3, middle)])
        high, at = cell.h, x
        if box is not None:
            at = (
                sheet.columns(
                    x, middle - high / 2, self._shown, COLUMN, high, colour_of(box), made=box.made
                )
                + 3
            )
            first, second = self._virtual_words(how)
            sheet.text(x, middle - high / 2 - 3, *[first[0], SMALL, first[1]], at="bottom")
            sheet.text(x, middle + high / 2 + 8, second[0], SMALL, second[1])
        else:
            sheet.text(x, middle - high / 2 - 3, "QKV"[i], SMALL, sheet.theme.quiet, at="bottom")
        sheet.columns(at, middle - high / 2, TEXT_TOKENS, COLUMN, high)
        end = at + TEXT_TOKENS * (COLUMN + 1.5)
        sheet.line([(end, middle), (x + self.columns, middle)])

    def _fused(self, x: Number, ys: list[Number], middles: list[Number]) -> None:
        """What belongs to q, k and v as one matrix: tall strips at their side, its words below."""
        boxes = [b for b in self.drawing.at(self.stack, f"{self.prefix}qkv") if b.how != "frozen"]
        at = x + max(cell.full_width for cell in self.three) + 4
        for box in boxes:
            if box.name != "W" and box.shape[0] > self.three[0].cols:
                high = box.shape[0] * self.unit
                self.sheet.matrix(at, middles[1] - high / 2, 3, high, "", colour_of(box))
                at += 6
        write(self.sheet, x, ys[2] + self.three[2].full_height + 12, self.whole)


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
