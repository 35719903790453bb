"""Attention in its frame: q, k, v as matrices, then as columns, the softmax, and o."""

from peftlab.figures.cells import HEAD, LINE, Words, colour_of, labels, times, wide, write
from peftlab.figures.frames import BAND, FOOT, Frame
from peftlab.figures.sheet import SMALL, Number, width_of

TEXT_TOKENS, MOST = 3, 8  # columns drawn for the text, and at most for virtual tokens
COLUMN = 4  # the width of one


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
        left = max(strips + self.label + 6, self.head + 4)
        self.left = max(left, wide(self.whole))
        self.columns = max(
            self._columns_width,
            wide(self._virtual_words("key")),
            wide(self._virtual_words("value")),
        )
        self.width = 22 + self.left + self.columns + 18 + 46 + 14 + self.end + 6

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
        if self.sheet.brief:
            return [(self.sheet.marks.get(box.method, "") + box.name, ink), ("", ink)]
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
            words_at = at + cell.full_width + 5
            write(
                sheet, words_at, max(y + 6, middle - LINE * (len(cell.words) - 1) / 2), cell.words
            )
            used = words_at + wide(cell.words) + 2 if cell.words else at + cell.full_width + 2
            self._result(i, used, beside, middle)
        write(sheet, at, ys[2] + self.three[2].full_height + 12, self.whole)
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
