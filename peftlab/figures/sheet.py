"""The vocabulary of all drawings, on a sheet measured in pixels.

    a matrix                a box to scale, its sizes on it
    frozen, trained         grey, the method's colour
    a token                 a column
    the residual stream     a thick line that everything adds to
    a product               an arrow

A sheet is a Plotly figure: stored with its data and a PNG like any other. Its text for those who
cannot see it is `alt_text(figure)`.
"""

import re
from collections.abc import Sequence

import plotly.graph_objects as go

from peftlab.figures.theme import contrast, theme

WIDTH, SMALL, NORMAL, LARGE = 800, 11, 12, 15
TOP = 44  # room for the title
Number = int | float
Point = tuple[Number, Number]
# Widths of Helvetica's letters, in thousandths of the size; the others are as wide as a digit.
_WIDTHS = {222: "ijl'", 278: " .,:;/!|ft[]I", 333: "r()-·", 500: "ckvsxyzJ", 722: "CDHNRUw×+=≤",
           778: "GOQ⊙", 833: "mM", 944: "W", 667: "ABEKPSVXY&", 1000: "→←…—"}  # fmt: skip
_WIDTH = {letter: width / 1000 for width, letters in _WIDTHS.items() for letter in letters}


def width_of(text: str, size: Number) -> Number:
    """About how wide a line of text is, in pixels; tags take no room."""
    lines = re.sub(r"<(?!br)[^>]*>", "", text).split("<br>")
    return size * max(sum(_WIDTH.get(letter, 0.556) for letter in line) for line in lines)


def number(value: Number, digits: int) -> str:
    """With so many digits behind the point, and a real minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def alt_text(figure: go.Figure) -> str:
    """What a drawing says, in words."""
    return figure.layout.meta["alt"]


class Sheet:
    """A sheet of `width` by `height` pixels, x to the right and y down; a title stands above it."""

    def __init__(
        self, title: str, height: Number, alt: str, dark: bool | None = None, width: int = WIDTH
    ):
        self.theme, self.width, self.height = theme(dark), width, height
        self.brief = False  # True: names alone, without sizes
        self.marks: dict[str, str] = {}  # a number in front of what a method brings
        self.figure = go.Figure(
            layout=dict(
                template=self.theme.template,
                title=dict(text=title, y=1 - 22 / (height + TOP), yanchor="middle"),
                width=width,
                height=height + TOP,
                margin=dict(l=0, r=0, t=TOP, b=0),
                meta=dict(alt=alt, paper=self.theme.paper),
                showlegend=False,
                hovermode="closest",
            )
        )
        self.figure.layout.title.update(x=12 / width, xref="container", font_size=LARGE)
        hidden = dict(visible=False, fixedrange=True)
        self.figure.update_xaxes(range=[0, width], **hidden)
        self.figure.update_yaxes(range=[height, 0], **hidden)
        self._shapes, self._notes, self._hover = [], [], []

    def resized(self, title: str, height: Number) -> "Sheet":
        """The same sheet with another title and height, known when all is placed."""
        self.height = height
        self.figure.update_layout(height=height + TOP, width=self.width)
        self.figure.layout.title.update(text=title, y=1 - 22 / (height + TOP), x=12 / self.width)
        self.figure.update_yaxes(range=[height, 0]).update_xaxes(range=[0, self.width])
        return self

    def done(self) -> go.Figure:
        """The figure, with all that was drawn."""
        self.figure.update_layout(shapes=self._shapes, annotations=self._notes)
        if self._hover:
            x, y, text = zip(*self._hover, strict=True)
            self.figure.add_scatter(
                x=x, y=y, hovertext=text, hoverinfo="text", mode="markers",
                marker=dict(size=22, color=self.theme.edge, opacity=0),
            )  # fmt: skip
        return self.figure

    def box(
        self, x: Number, y: Number, w: Number, h: Number, fill: str = "", edge: str = "",
        dash: str = "solid", width: Number = 1.0, hover: str = "", under: bool = False,
    ) -> None:  # fmt: skip
        """A rectangle from its upper left corner; frozen unless a colour is given. `under`: below
        the traces of the figure."""
        fill, edge = fill or self.theme.frozen, edge or self.theme.edge
        line = dict(color=edge, width=width, dash=dash)
        self._shapes.append(dict(type="rect", x0=x, y0=y, x1=x + w, y1=y + h, fillcolor=fill))
        self._shapes[-1] |= dict(line=line, layer="below" if under else "above")
        if hover:
            self._hover.append((x + w / 2, y + h / 2, hover))

    def matrix(
        self, x: Number, y: Number, w: Number, h: Number, name: str = "", colour: str = "",
        made: bool = False, hover: str = "",
    ) -> None:  # fmt: skip
        """A box to scale: grey, or in a method's colour; pale and dotted if made, not trained.

        No side is drawn thinner than 3 pixels. The name stands inside where it fits.
        """
        w, h, t = max(w, 3.0), max(h, 3.0), self.theme
        fill = t.frozen if not colour else t.tint(colour) if made else t.fill(colour)
        edge = t.line(colour) if colour else t.edge
        self.box(x, y, w, h, fill, edge, "dot" if made else "solid", hover=hover)
        if name and width_of(name, NORMAL) + 4 <= w and h >= NORMAL + 4:
            self.text(x + w / 2, y + h / 2, f"<b>{name}</b>", NORMAL, t.on(fill), "center")

    def columns(
        self, x: Number, y: Number, count: int, w: Number, h: Number, colour: str = "",
        gap: Number = 1.5, made: bool = False,
    ) -> Number:  # fmt: skip
        """Tokens, each a column w wide; returns the x behind the last."""
        for i in range(count):
            self.matrix(x + i * (w + gap), y, w, h, colour=colour, made=made)
        return x + count * (w + gap) - gap

    def text(
        self, x: Number, y: Number, text: str, size: Number = NORMAL, colour: str = "",
        align: str = "left", at: str = "middle", angle: int = 0,
    ) -> None:  # fmt: skip
        """Words at a point: `align` left, center or right of it, `at` top, middle or bottom."""
        self._notes.append(
            dict(x=x, y=y, text=text, showarrow=False, xanchor=align, yanchor=at, align=align)
        )
        font = dict(size=size, color=colour or self.theme.ink)
        self._notes[-1] |= dict(font=font, textangle=angle, borderpad=0)

    def line(
        self, points: Sequence[Point], colour: str = "", width: Number = 1.5, dash: str = "solid"
    ) -> None:
        """A line through points."""
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        line = dict(color=colour or self.theme.ink, width=width, dash=dash)
        self._shapes.append(dict(type="path", path=path, line=line))

    def area(self, points: Sequence[Point], fill: str, edge: str = "") -> None:
        """A closed shape through points."""
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) + "Z"
        line = dict(color=edge or fill, width=1 if edge else 0)
        self._shapes.append(dict(type="path", path=path, fillcolor=fill, line=line))

    def arrow(
        self, points: Sequence[Point], colour: str = "", width: Number = 1.5, dash: str = "solid",
        head: Number = 1.0,
    ) -> None:  # fmt: skip
        """A line through points that ends in a head."""
        (x0, y0), (x1, y1) = points[-2:]
        long = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        back = min(0.99, max(5, 2.2 * width * head) / long)
        neck = (x1 - (x1 - x0) * back, y1 - (y1 - y0) * back)
        self.line([*points[:-1], neck], colour, width, dash)
        self._notes.append(
            dict(
                x=x1, y=y1, ax=x1 - (x1 - x0) * min(1, 9 / long),
                ay=y1 - (y1 - y0) * min(1, 9 / long), axref="x", ayref="y", text="",
                arrowhead=2, arrowsize=head, arrowwidth=width, arrowcolor=colour or self.theme.ink,
            )
        )  # fmt: skip

    def plus(
        self, x: Number, y: Number, sign: str = "+", colour: str = "", r: Number = 8.5
    ) -> None:
        """A small circle in which two things meet: + or ×."""
        t = self.theme
        line = dict(color=colour or t.ink, width=1.4)
        self._shapes.append(dict(type="circle", x0=x - r, y0=y - r, x1=x + r, y1=y + r))
        self._shapes[-1] |= dict(fillcolor=t.paper, line=line)
        if sign == "+":
            self.line([(x - r / 2, y), (x + r / 2, y)], colour or t.ink)
            self.line([(x, y - r / 2), (x, y + r / 2)], colour or t.ink)
        else:
            self.text(x, y, sign, NORMAL, t.text(colour) if colour else t.ink, "center")

    def dot(self, x: Number, y: Number, colour: str = "", hover: str = "") -> None:
        """A point that was measured."""
        line = dict(color=self.theme.paper, width=1.5)
        place = dict(x0=x - 4.5, x1=x + 4.5, y0=y - 4.5, y1=y + 4.5)
        fill = colour or self.theme.ink
        self._shapes.append(dict(type="circle", fillcolor=fill, line=line, **place))
        if hover:
            self._hover.append((x, y, hover))

    def stream(self, x0: Number, x1: Number, y: Number, words: str = "") -> None:
        """The residual stream, from left to right."""
        self.arrow([(x0, y), (x1, y)], self.theme.edge, 4, head=0.6)
        if words:
            self.text(x0 + 4, y - 6, words, SMALL, self.theme.quiet, at="bottom")

    def key(self, x: Number, y: Number, entries: Sequence[tuple[str, str]]) -> None:
        """Small boxes with what their colour means: (colour, words); "" is frozen."""
        for colour, words in entries:
            self.matrix(x, y - 5, 14, 10, colour=colour)
            self.text(x + 19, y, words, SMALL, self.theme.quiet)
            x += 19 + width_of(words, SMALL) + 22


def extents(figure: go.Figure) -> list[tuple[Number, Number, Number, Number, str]]:
    """The rectangle that each text of a drawing takes: left, top, right, bottom, and the text."""
    found = []
    for note in figure.layout.annotations:
        if note.text:
            w, h = width_of(note.text, note.font.size), note.font.size * 1.2
            h *= note.text.count("<br>") + 1
            w, h = (h, w) if note.textangle else (w, h)
            left = note.x - {"left": 0, "center": 0.5, "right": 1}[note.xanchor] * w
            top = note.y - {"top": 0, "middle": 0.5, "bottom": 1}[note.yanchor] * h
            found.append((left, top, left + w, top + h, note.text))
    return found


def overlaps(figure: go.Figure) -> list[str]:
    """Which texts of a drawing touch each other or leave the sheet; none should."""
    width, height = figure.layout.width, figure.layout.height - TOP
    places, wrong = extents(figure), []
    for i, (left, top, right, bottom, text) in enumerate(places):
        if left < 0 or top < -2 or right > width or bottom > height + 2:
            wrong.append(f"{text!r} leaves the sheet")
        for other in places[i + 1 :]:
            apart = other[0] >= right or other[2] <= left or other[1] >= bottom or other[3] <= top
            if not apart and min(bottom, other[3]) - max(top, other[1]) > 2:
                wrong.append(f"{text!r} lies on {other[4]!r}")
    return wrong


def pale(figure: go.Figure) -> list[str]:
    """Which words stand out from what is behind them by less than 4.5, WCAG's least for words."""
    wrong, paper = [], figure.layout.meta["paper"]
    boxes = [s for s in figure.layout.shapes if s.type == "rect"]
    for note in figure.layout.annotations:
        if note.text:
            under = [s for s in boxes if s.x0 <= note.x <= s.x1 and s.y0 <= note.y <= s.y1]
            behind = under[-1].fillcolor if under else paper
            if contrast(note.font.color, behind) < 4.5:
                wrong.append(note.text)
    return wrong
