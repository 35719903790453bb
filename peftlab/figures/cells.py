"""A linear weight with all that is attached to it, and the labels beside it."""

from dataclasses import dataclass, field

from peftlab.figures.described import Box, Drawing, spans
from peftlab.figures.sheet import SMALL, Number, Sheet, width_of
from peftlab.figures.style import BLACK, COLOURS

LINE = 13  # from one line of small text to the next
HEAD = 15  # a heading above a matrix
Words = list[tuple[str, str]]  # lines and their colours


def colour_of(box: Box) -> str:
    """The colour of what a method brings or trains; "" is frozen."""
    return COLOURS.get(box.method, BLACK) if box.trained or box.made else ""


def labels(boxes: list[Box], sheet: Sheet) -> Words:
    """A line for each tensor that trains, and how many layers have those above it; a line for what
    a method holds frozen."""
    found: Words = []
    moving = [box for box in boxes if box.trained or box.made]
    if sheet.brief:
        methods = dict.fromkeys(box.method for box in moving)
        deep = max((len(box.shape) for box in moving), default=0)  # matrices alone, if any
        moving = [box for box in moving if len(box.shape) == deep]
        named = [[box for box in moving if box.method == method] for method in methods]
        return [
            (
                sheet.marks.get(own[0].method, "") + ", ".join(box.name for box in own),
                sheet.theme.text(colour_of(own[0])),
            )
            for own in named
            if own
        ]
    for at, box in enumerate(moving):
        ink = sheet.theme.text(colour_of(box))
        found.append((f"{box.name} {box.size}", ink))
        if box.layers and (at + 1 == len(moving) or moving[at + 1].layers != box.layers):
            found.append((("made " if box.made else "") + times(box), ink))
    kinds = {"mask": "zeros held", "codes": "4-bit codes"}
    still = [box for box in boxes if box not in moving]
    found += [(kinds[box.how], sheet.theme.quiet) for box in still if box.how in kinds]
    if names := dict.fromkeys(box.name for box in still if box.how not in kinds):
        found.append((f"{', '.join(names)} frozen", sheet.theme.quiet))
    return found


def times(box: Box) -> str:
    """ "× 6", or with the layers if they are not the first ones in a row."""
    every = sorted(set(box.layers)) == list(range(len(set(box.layers))))
    return f"× {len(box.layers)}" + (
        "" if every and len(box.layers) > 1 else f", {spans(box.layers)}"
    )


def wide(words: Words) -> Number:
    return max((width_of(text, SMALL) for text, _ in words), default=0.0)


def write(sheet: Sheet, x: Number, y: Number, words: Words, align: str = "left") -> None:
    """Lines of small text, the first centred on y."""
    for i, (text, ink) in enumerate(words):
        sheet.text(x, y + i * LINE, text, SMALL, ink, align)


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


@dataclass
class Cell:
    """The linear weight of one role. B and m (d_out, …) stand at its right side, because they have
    its rows; A and an input's factors (…, d_in) lie under it, because they have its columns."""

    drawing: Drawing
    sheet: Sheet
    stack: str
    role: str
    unit: Number  # pixels for a row or a column
    boxes: list[Box] = field(default_factory=list)

    def __post_init__(self):
        self.rows, self.cols = self.drawing.weights[self.stack, self.role][0]
        every = self.drawing.at(self.stack, self.role)
        self.boxes = [box for box in every if box.how != "frozen"]
        self.joined = [b for b in self.drawing.at(self.stack, self._fused) if b.how != "frozen"]
        whole = [box for box in [*self.boxes, *self.joined] if (box.how, box.name) == ("own", "W")]
        self.colour = colour_of(whole[0]) if whole else ""
        self.words: Words = labels(self.boxes, self.sheet)
        self.w, self.h = max(3, self.cols * self.unit), max(3, self.rows * self.unit)
        inside = ("mask", "codes")
        strips = [box for box in self.boxes if box not in whole and box.how not in inside]
        self.right = [box for box in strips if self._has_rows(box)]
        self.under = [box for box in strips if box not in self.right]
        for box in self.joined:  # of one tensor for q, k and v each gets its rows
            if box not in whole and box.how not in inside:
                if box.shape[0] > self.rows:
                    self.right.append(box)
                elif self.role.endswith("v"):
                    self.under.append(box)

    @property
    def _fused(self) -> str:
        where, dot, target = self.role.rpartition(".")
        return f"{where}{dot}qkv" if target in "qkv" else ""

    def _has_rows(self, box: Box) -> bool:
        if box.how == "input" or len(box.shape) > 2:
            return False
        if len(box.shape) == 2 and box.shape[1] == self.cols and box.shape[0] != self.rows:
            return False
        return box.shape[0] == self.rows and box.name not in ("A", "A0", "Q", "d")

    @property
    def size(self) -> str:
        """ "768 × 192", or the range if layers differ."""
        sizes = self.drawing.weights[self.stack, self.role]
        return " × ".join(_span([size[i] for size in sizes]) for i in (0, 1))

    def counted(self, head_dim: int) -> str:
        """How many heads its rows are."""
        sizes = self.drawing.weights[self.stack, self.role]
        return _span([rows // head_dim for rows, _ in sizes])

    @property
    def heading(self) -> str:
        role = self.role.rpartition(".")[2]
        return f"<b>{role}</b>" if self.sheet.brief else f"<b>{role}</b> {self.size}"

    def thick(self, box: Box, side: int) -> Number:
        return max(3.0, (box.shape[side] if len(box.shape) > 1 else 1) * self.unit)

    @property
    def full_width(self) -> Number:
        """W with the strips at its right side."""
        return self.w + sum(2 + self.thick(box, 1) for box in self.right)

    @property
    def full_height(self) -> Number:
        return self.h + sum(2 + self.thick(box, 0) for box in self.under)

    def draw(self, x: Number, y: Number) -> None:
        """W with its upper left corner at a point, its heading above, its strips around it."""
        sheet, t = self.sheet, self.sheet.theme
        name = self.role.rpartition(".")[2]
        state = "trained" if self.colour else "frozen"
        sheet.matrix(
            x, y, self.w, self.h, "", self.colour, hover=f"W of {name}: {self.size}, {state}"
        )
        sheet.text(x, y - 3, self.heading, SMALL, t.ink, at="bottom")
        for how, step in (("codes", 4), ("mask", 5)):
            if any(box.how == how for box in [*self.boxes, *self.joined]):
                self._pattern(x, y, how, step)
        at = x + self.w + 2
        for box in self.right:
            thick = self.thick(box, 1)
            self._strip(at, y, thick, self.h, box)
            at += thick + 2
        at = y + self.h + 2
        for box in self.under:
            thick, long = self.thick(box, 0), max(3.0, box.shape[-1] * self.unit)
            self._strip(x, at, long, thick, box)
            at += thick + 2

    def _strip(self, x: Number, y: Number, w: Number, h: Number, box: Box) -> None:
        hover = f"{box.name}: {box.size} × {box.copies} = {box.numbers:,} numbers"
        self.sheet.matrix(x, y, w, h, "", colour_of(box), box.made, hover)

    def _pattern(self, x: Number, y: Number, how: str, step: int) -> None:
        """Codes are a grid, a mask is hatched."""
        sheet, edge = self.sheet, self.sheet.theme.edge
        for i in range(1, int(self.w / step)):
            top = (x + i * step, y)
            end = (x + i * step, y + self.h) if how == "codes" else (x + (i - 1) * step, y + self.h)
            sheet.line([top, end], edge, 0.8, "solid" if how == "codes" else "dot")
        if how == "codes":
            for i in range(1, int(self.h / step)):
                sheet.line([(x, y + i * step), (x + self.w, y + i * step)], edge, 0.8)
