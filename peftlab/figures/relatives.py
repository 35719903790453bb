"""LoRA's relatives drawn: what each changes of A, B and W, and what a sum of factors has in it."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.figures.sheet import LARGE, NORMAL, SMALL, Number, Sheet
from peftlab.figures.style import COLOURS, VERMILLION

BLUE = COLOURS["lora"]
SIDE, THIN = 66, 7  # of W, and of a strip beside it
WORDS = {
    "LoRA": ("ΔW = (α / r) B A", "A at random, B at zero"),
    "LoRA, one A": ("q, k and v share one A", "three B, one above the other"),
    "PiSSA": ("starts at W's strongest directions", "W keeps the rest, frozen"),
    "DoRA": ("m holds a length for each row", "A and B turn the rows"),
    "VeRA": ("A and B: random, frozen, shared", "only two vectors train"),
    "AdaLoRA": ("P Λ Q, a number for each direction", "the least important go off"),
}


def relatives(counts: Mapping[str, int], dark: bool | None = None) -> go.Figure:
    """Six relatives beside one grey W each: blue trains, grey is frozen.

    `counts` are the parameters that each trains, by the names in `WORDS`, in this order.
    """
    sheet = Sheet("", 400, "", dark)
    t, ink = sheet.theme, sheet.theme.text(BLUE)
    for place, (name, count) in enumerate(counts.items()):
        x, y = 24 + 262 * (place % 3), 12 + 192 * (place // 3)
        sheet.text(x, y + 6, f"<b>{name}</b>", LARGE)
        _PARTS[name](sheet, x, y + 26)
        first, second = WORDS[name]
        sheet.text(x, y + 132, first, SMALL, t.quiet)
        sheet.text(x, y + 147, second, SMALL, t.quiet)
        sheet.text(x, y + 164, f"{count:,} train", SMALL, ink)
    said = "; ".join(
        f"{name}, {count:,}: {', '.join(WORDS[name])}" for name, count in counts.items()
    )
    sheet.figure.update_layout(meta=dict(alt=f"What trains beside W. {said}", paper=t.paper))
    return sheet.resized("Each relative changes one thing about A, B or W", 384).done()


def _pair(sheet: Sheet, x: Number, y: Number, colour: str = BLUE) -> None:
    """W with B at its right side and A under it."""
    sheet.matrix(x, y, SIDE, SIDE, "W")
    sheet.matrix(x + SIDE + 6, y, THIN, SIDE, colour=colour)
    sheet.matrix(x, y + SIDE + 6, SIDE, THIN, colour=colour)
    ink = sheet.theme.text(colour) if colour else sheet.theme.quiet
    sheet.text(x + SIDE + 20, y + SIDE / 2, "<b>B</b>", NORMAL, ink)
    sheet.text(x + SIDE + 6, y + SIDE + 16, "<b>A</b>", NORMAL, ink)


def _one_a(sheet: Sheet, x: Number, y: Number) -> None:
    ink, high = sheet.theme.text(BLUE), SIDE / 3
    for row, name in enumerate("qkv"):
        sheet.matrix(x, y + row * high, SIDE, high - 2, f"W{name}")
        sheet.matrix(x + SIDE + 6, y + row * high, THIN, high - 2, colour=BLUE)
        sheet.text(x + SIDE + 20, y + (row + 0.45) * high, f"<b>B</b>{name}", SMALL, ink)
    sheet.matrix(x, y + SIDE + 6, SIDE, THIN, colour=BLUE)
    sheet.text(x + SIDE + 6, y + SIDE + 16, "<b>A</b>", NORMAL, ink)


def _pissa(sheet: Sheet, x: Number, y: Number) -> None:
    _pair(sheet, x, y)
    grey = sheet.theme.quiet
    sheet.arrow([(x + SIDE + 40, y + 6), (x + SIDE + 18, y + 6)], grey)
    sheet.text(x + SIDE + 44, y + 6, "split off W", SMALL, grey)


def _dora(sheet: Sheet, x: Number, y: Number) -> None:
    _pair(sheet, x + 22, y)
    sheet.matrix(x + 10, y, 3, SIDE, colour=BLUE)
    sheet.text(x - 4, y + SIDE + 12, "<b>m</b>", NORMAL, sheet.theme.text(BLUE))


def _vera(sheet: Sheet, x: Number, y: Number) -> None:
    _pair(sheet, x, y, "")
    ink = sheet.theme.text(BLUE)
    sheet.matrix(x + SIDE + 34, y, 3, SIDE, colour=BLUE)
    sheet.text(x + SIDE + 42, y + SIDE / 2, "<b>b</b>", NORMAL, ink)
    sheet.matrix(x + SIDE + 22, y + SIDE + 6, 3, THIN + 4, colour=BLUE)
    sheet.text(x + SIDE + 30, y + SIDE + 16, "<b>d</b>", NORMAL, ink)


def _adalora(sheet: Sheet, x: Number, y: Number) -> None:
    t, ink, cell = sheet.theme, sheet.theme.text(BLUE), 9
    sheet.matrix(x, y, SIDE, SIDE, "W")
    sheet.matrix(x + SIDE + 6, y, THIN + 4, SIDE, colour=BLUE)
    sheet.matrix(x, y + SIDE + 6, SIDE, THIN + 4, colour=BLUE)
    sheet.text(x + SIDE + 22, y + SIDE / 2 - 12, "<b>P</b>", NORMAL, ink)
    sheet.text(x + SIDE + 6, y + SIDE + 18, "<b>Q</b>", NORMAL, ink)
    for i in range(4):
        corner = (x + SIDE + 44 + i * cell, y + 24 + i * cell)
        fill = t.fill(BLUE) if i < 2 else t.paper
        sheet.box(*corner, cell, cell, fill, t.line(BLUE))
    sheet.text(x + SIDE + 86, y + 28, "<b>Λ</b>", NORMAL, ink)
    sheet.text(x + SIDE + 86, y + 54, "off", SMALL, t.quiet)


_PARTS = {
    "LoRA": _pair,
    "LoRA, one A": _one_a,
    "PiSSA": _pissa,
    "DoRA": _dora,
    "VeRA": _vera,
    "AdaLoRA": _adalora,
}


def sum_of_factors(dark: bool | None = None) -> go.Figure:
    """(B₁ + B₂)(A₁ + A₂) as a table of four products: two were trained, two belong to nobody."""
    sheet = Sheet("", 232, "", dark)
    t, blue, red = sheet.theme, sheet.theme.text(BLUE), sheet.theme.text(VERMILLION)
    left, top, w, h = 96, 44, 150, 74
    for col in range(2):
        sheet.matrix(left + col * (w + 10), top - 18, w, 9, colour=BLUE)
        middle = left + col * (w + 10) + w / 2
        sheet.text(middle, top - 30, f"<b>A{'₁₂'[col]}</b>", NORMAL, blue, "center")
    for row in range(2):
        y = top + row * (h + 10)
        sheet.matrix(left - 18, y, 9, h, colour=BLUE)
        sheet.text(left - 42, y + h / 2, f"<b>B{'₁₂'[row]}</b>", NORMAL, blue)
        for col in range(2):
            x, own = left + col * (w + 10), row == col
            colour, ink = (BLUE, blue) if own else (VERMILLION, red)
            sheet.box(x, y, w, h, t.paper, t.line(colour), "solid" if own else "dot", 1.6)
            name = f"<b>B{'₁₂'[row]} A{'₁₂'[col]}</b>"
            sheet.text(x + w / 2, y + h / 2 - 9, name, LARGE, ink, "center")
            words = f"adapter {'12'[row]}" if own else "nobody trained it"
            sheet.text(x + w / 2, y + h / 2 + 13, words, SMALL, t.quiet, "center")
    x = left + 2 * (w + 10) + 24
    sheet.text(x, top + 26, "A sum of <b>updates</b> is the diagonal:", NORMAL)
    sheet.text(x, top + 46, "<b>B₁A₁ + B₂A₂</b>", LARGE, blue)
    sheet.text(x, top + 96, "A sum of <b>factors</b>, multiplied,", NORMAL)
    sheet.text(x, top + 114, "is all four:", NORMAL)
    sheet.text(x, top + 134, "<b>(B₁ + B₂)(A₁ + A₂)</b>", LARGE, red)
    alt = (
        "A table of products. On the diagonal B1 A1 and B2 A2, which two adapters trained. Off it "
        "B1 A2 and B2 A1, which nobody trained and which a sum of factors contains."
    )
    sheet.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    return sheet.resized("Add the factors, and half of what you get belongs to nobody", 224).done()
