"""The course's map: five sites in one block, each where a real method has put a real tensor."""

from collections.abc import Iterable
from dataclasses import replace

import plotly.graph_objects as go

from peftlab.bases import Base
from peftlab.figures.described import Drawing, describe
from peftlab.figures.draw import render
from peftlab.figures.sheet import NORMAL, Number, Sheet
from peftlab.figures.sites import SITES
from peftlab.methods import METHODS
from peftlab.tuned import attach

# A small method of each site, in the site's colour.
SHOWN = {
    "input_embeddings": ("prompt_tuning", dict(num_virtual_tokens=3)),
    "keys_values": ("prefix_tuning", dict(num_virtual_tokens=3)),
    "linear_weights": ("lora", dict(r=8, target_modules="all-linear")),
    "sublayer_outputs": ("houlsby", dict(bottleneck=24)),
    "existing_parameters": ("layer_norm", {}),
}


def site_map(
    base: Base, lit: str | Iterable[str] | None = None, dark: bool | None = None
) -> go.Figure:
    """One block of a real model and the five places where a method can touch it, some of them lit.

    `lit` names one or several of `SITES`; without it all five are. For each lit site a small method
    is attached, described and taken off again, so the base must be free. Raises ValueError for a
    site that is none of the five.
    """
    lit = list(SITES) if lit is None else [lit] if isinstance(lit, str) else list(lit)
    for site in lit:
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}; the five are {', '.join(SITES)}")
    marks = {name: f"<b>{i}</b> " for i, (name, _) in enumerate(SHOWN.values(), 1)}
    boxes, drawing = [], None
    for site, (name, options) in SHOWN.items():
        with attach(base, METHODS[name](**options)) as tuned:
            whole = describe(tuned)
        drawing = drawing or replace(whole, boxes=[], brief=True, marks=marks)
        if site in lit:
            boxes += whole.trained
        if site == "input_embeddings":
            boxes += [box for box in whole.boxes if not box.trained]
    trained = {(box.stack, box.site, box.name) for box in boxes if box.trained}
    drawing.boxes = [b for b in boxes if b.trained or (b.stack, b.site, b.name) not in trained]
    return _titled(drawing, base, lit, dark)


def _titled(drawing: Drawing, base: Base, lit: list[str], dark: bool | None) -> go.Figure:
    names = [SITES[site][1] for site in lit]
    title = f"Five places to adapt a transformer: a block of {base.name}"
    if len(lit) < len(SITES):
        title = f"Here we touch: {' and '.join(names)}" if lit else f"A block of {base.name}"
    drawing.title = title

    def legend(sheet: Sheet, y: Number) -> Number:
        """The five sites in two columns, numbered; an unlit one is grey."""
        t = sheet.theme
        for i, (site, (colour, name, users)) in enumerate(SITES.items()):
            x, row = 14 + i % 2 * 390, y + 4 + i // 2 * 22
            on = site in lit
            sheet.matrix(x, row - 8, 20, 16, f"{i + 1}", colour if on else "")
            ink = t.text(colour) if on else t.quiet
            sheet.text(x + 27, row, f"<b>{name}</b>: {users}", NORMAL, ink)
        return 22 * 3

    return render(drawing, dark, title=title, legend=legend)
