"""Light and dark: the colours of a drawing, and whether an eye can tell them from the paper."""

from dataclasses import dataclass

import plotly.io as pio

DARK_TEMPLATE = "peftlab_dark"


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", from 0 (black) to 1 (white), as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, from 1 (the same) to 21 (black on white)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def mixed(one: str, other: str, share: int | float) -> str:
    """The colour that has this share of `other` in it."""
    pairs = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


@dataclass(frozen=True)
class Theme:
    """What one sheet is painted with. Frozen things are grey, trained ones have a method's colour.

    `edge` and `ink` stand out from `paper` by at least 3 and 4.5, WCAG's least for lines and words.
    """

    name: str
    template: str
    paper: str
    ink: str
    quiet: str  # words that explain
    frozen: str
    edge: str
    faint: str  # frames and grids, which carry no meaning alone

    def fill(self, colour: str) -> str:
        """A method's colour as an area: black and white change places on dark paper."""
        far = contrast(colour, self.paper) >= 1.5
        return colour if far else {"#000000": "#f2f2f2"}.get(colour, self.ink)

    def line(self, colour: str, least: int | float = 3.0) -> str:
        """The colour, moved towards the ink until it stands out from the paper by `least`."""
        colour = self.fill(colour)
        steps = (mixed(colour, self.ink, i / 20) for i in range(21))
        return next(shade for shade in steps if contrast(shade, self.paper) >= least)

    def text(self, colour: str) -> str:
        """The colour for words on the paper."""
        return self.line(colour, 4.5)

    def tint(self, colour: str) -> str:
        """A pale area in the colour: something made, not trained."""
        return mixed(self.fill(colour), self.paper, 0.7)

    def on(self, fill: str) -> str:
        """Black or white, whichever reads better on an area."""
        return max("#000000", "#ffffff", key=lambda ink: contrast(ink, fill))


LIGHT = Theme(
    "light", "peftlab", "#ffffff", "#222222", "#575c63", "#d9dce1", "#80868f", "#e3e5e9"
)  # fmt: skip
DARK = Theme(
    "dark", DARK_TEMPLATE, "#111111", "#ececec", "#a9afb8", "#454b54", "#8d949e", "#33373d"
)  # fmt: skip


def theme(dark: bool | None = None) -> Theme:
    """The light or the dark one; without a word, that of the template in use."""
    if dark is None:
        dark = pio.templates.default == DARK_TEMPLATE
    return DARK if dark else LIGHT
