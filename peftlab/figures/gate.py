"""The gate λ: one query's attention as a mixture of the prefix's own and the text's own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from peftlab.figures.scores import shown
from peftlab.figures.sheet import NORMAL, SMALL, Number, Sheet, width_of
from peftlab.figures.style import COLOURS


def gate_road(
    keys: Sequence[str], shares: Any, virtual: int, query: str, dark: bool | None = None
) -> go.Figure:
    """One query's attention taken apart: (1 − λ) of the text's own, and λ of the prefix's.

    `shares` (P + T,) are its weights over `keys`, as `AttentionMap.weights(name)[head, query]` has
    them; those that it may not see are zero.
    """
    w = np.asarray(shares, dtype=float)
    gate = float(w[:virtual].sum())
    parts = {"prefix": w[:virtual] / max(gate, 1e-12), "text": w[virtual:] / max(1 - gate, 1e-12)}
    title = f"For {shown(query)!r} the gate λ is {gate:.2f}: "
    title += f"h = {1 - gate:.2f} h_text + {gate:.2f} h_prefix"
    names = [shown(key) for key in keys]
    top = [f"{names[i]} {w[i]:.2f}" for i in np.argsort(-w)[:4]]
    alt = f"{title}. The largest shares: {', '.join(top)}. The text's shares among themselves are "
    alt += "those that it has without a prefix."
    sheet = Sheet(title, 430, alt, dark)
    t, colour = sheet.theme, COLOURS["prefix_tuning"]
    step = min(46.0, 640 / len(w))
    left = 400 - step * len(w) / 2
    sheet.text(14, 16, f"All {len(w)} shares sum to one.", NORMAL, t.quiet)
    _bars(sheet, left, 120, w, names, virtual, step, 84)
    sheet.text(left + step * virtual / 2, 160, f"λ = {gate:.2f}", NORMAL, t.text(colour), "center")
    sheet.text(
        left + step * (virtual + len(w)) / 2,
        160,
        f"1 − λ = {1 - gate:.2f}",
        NORMAL,
        t.ink,
        "center",
    )
    centres = {"prefix": 180.0, "text": 560.0}
    colours = {"prefix": colour, "text": ""}
    starts = {"prefix": left + step * virtual / 2, "text": left + step * (virtual + len(w)) / 2}
    for name, part in parts.items():
        own = names[:virtual] if name == "prefix" else names[virtual:]
        wide = min(step, 330 / len(part))
        x = centres[name] - wide * len(part) / 2
        ink = t.line(colours[name]) if colours[name] else t.ink
        sheet.arrow(
            [(starts[name], 170), (starts[name], 186), (centres[name], 186), (centres[name], 202)],
            ink,
        )
        _bars(sheet, x, 310, part, own, len(part) if name == "prefix" else 0, wide, 84)
        words = (
            "attention over the prefix alone"
            if name == "prefix"
            else "attention over the text alone"
        )
        sheet.text(
            centres[name], 212, words, SMALL, t.text(colour) if colours[name] else t.quiet, "center"
        )
        sheet.arrow(
            [
                (centres[name], 350),
                (centres[name], 396),
                (370 + (-10 if name == "prefix" else 10), 396),
            ],
            ink,
            2,
        )
        share = "h_prefix × λ" if name == "prefix" else "h_text × (1 − λ)"
        sheet.text(
            centres[name] + 8, 374, share, NORMAL, t.text(colour) if colours[name] else t.ink
        )
    sheet.plus(370, 396)
    sheet.arrow([(370, 405), (370, 426)])
    sheet.text(380, 418, "<b>h</b>", NORMAL)
    return sheet.done()


def _bars(
    sheet: Sheet, x: Number, y: Number, shares, names, virtual: int, step: Number, high: Number
) -> None:
    """Shares as columns on a line, with their names below."""
    t = sheet.theme
    for i, share in enumerate(shares):
        colour = COLOURS["prefix_tuning"] if i < virtual else ""
        fill, edge = (t.fill(colour), t.line(colour)) if colour else (t.frozen, t.edge)
        tall = max(0.5, share * high)
        at = x + i * step
        sheet.box(
            at + step * 0.12,
            y - tall,
            step * 0.76,
            tall,
            fill,
            edge,
            hover=f"{names[i]}: {share:.3f}",
        )
        if width_of(names[i], SMALL) < step * 1.05:
            sheet.text(
                at + step / 2,
                y + 12,
                names[i],
                SMALL,
                t.text(colour) if colour else t.ink,
                "center",
            )
    sheet.line([(x, y), (x + step * len(shares), y)], t.edge, 1)
