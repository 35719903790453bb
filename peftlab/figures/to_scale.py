"""What trains beside what does not, as areas: a share that an eye can compare."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.accounting import readable_percent
from peftlab.figures.sheet import NORMAL, SMALL, WIDTH, Sheet
from peftlab.figures.style import COLOURS

SIDE, TOP, LEFT = 168, 10, 14


def to_scale(
    counts: Mapping[str, tuple[int, int]], method: str, title: str, dark: bool | None = None
) -> go.Figure:
    """Models as grey squares of one size, and in each a square of the method's colour: what trains.

    `counts` maps a model's name to (numbers that train, numbers in all); the coloured area is that
    share of the square, but no side is drawn thinner than 3 pixels. `method` gives the colour.
    """
    sheet = Sheet(title, TOP + SIDE + 78, "", dark)
    t, colour = sheet.theme, COLOURS[method]
    wide, told = (WIDTH - 2 * LEFT) / len(counts), []
    for at, (name, (trained, total)) in enumerate(counts.items()):
        x, low, share = LEFT + at * wide, TOP + SIDE, readable_percent(trained, total)
        told.append(f"{name}: {trained:,} of {total:,} numbers train, {share}")
        sheet.matrix(x, TOP, SIDE, SIDE, hover=f"{name}: {total:,} numbers, frozen")
        side = SIDE * (trained / total) ** 0.5
        sheet.matrix(x, low - max(side, 3), side, side, colour=colour, hover=told[-1])
        sheet.text(x, low + 18, f"<b>{name}</b>", NORMAL)
        sheet.text(x, low + 38, f"{total:,} numbers", SMALL, t.quiet)
        sheet.text(x, low + 58, f"<b>{trained:,}</b> train: {share}", SMALL, t.text(colour))
    words = f"Squares of one size, a part of each coloured. {'; '.join(told)}."
    sheet.figure.update_layout(meta=dict(alt=words, paper=t.paper))
    return sheet.done()
