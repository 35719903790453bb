"""The five sites of a block, drawn."""

from collections.abc import Iterable

import plotly.graph_objects as go

from peftlab.figures.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, figure

SITES = {
    "input_embeddings": (ORANGE, "input embeddings", "prompt tuning, P-tuning"),
    "keys_values": (GREEN, "keys and values", "prefix tuning, P-tuning v2"),
    "linear_weights": (BLUE, "linear weights", "LoRA, DoRA, QLoRA, pruning"),
    "sublayer_outputs": (PURPLE, "sublayer outputs", "adapters, (IA)³"),
    "existing_parameters": (BLACK, "existing parameters", "full fine-tuning, BitFit"),
}

_PARTS = [  # site, text, x0, x1, y0, y1 on a sheet of 100 by 50
    ("input_embeddings", "P₁", 2, 8, 40, 45),
    ("input_embeddings", "P₂", 2, 8, 34, 39),
    (None, "the", 2, 8, 28, 33),
    (None, "old", 2, 8, 22, 27),
    (None, "mill", 2, 8, 16, 21),
    ("existing_parameters", "LN", 17, 21, 22, 39),
    ("linear_weights", "W<sub>q</sub>", 26, 31.5, 35, 41),
    ("linear_weights", "W<sub>k</sub>", 26, 31.5, 27.5, 33.5),
    ("linear_weights", "W<sub>v</sub>", 26, 31.5, 20, 26),
    ("keys_values", "K", 34.5, 40.5, 27.5, 33.5),
    ("keys_values", "V", 34.5, 40.5, 20, 26),
    ("linear_weights", "W<sub>o</sub>", 43.5, 49, 27.5, 33.5),
    ("sublayer_outputs", "+", 53, 57, 26, 35),
    ("existing_parameters", "LN", 61, 65, 22, 39),
    ("linear_weights", "W<sub>up</sub>", 69.5, 75, 27.5, 33.5),
    ("linear_weights", "W<sub>down</sub>", 77, 83, 27.5, 33.5),
    ("sublayer_outputs", "+", 86.5, 90.5, 26, 35),
]
_FRAMES = [  # text, x0, x1, y0, y1
    ("one of L transformer blocks", 14, 93, 15, 49),
    ("attention", 24, 51, 18, 45.5),
    ("MLP", 67.5, 85, 18, 45.5),
]
_ARROWS = [(8.5, 16.5), (21.5, 24), (51, 53), (57, 61), (65, 67.5), (85, 86.5), (90.5, 98)]


def five_sites(lit: str | Iterable[str] = (), title: str | None = None) -> go.Figure:
    """The course's map: five places where a method can touch a transformer, some of them lit."""
    lit = [lit] if isinstance(lit, str) else list(lit)
    for site in lit:
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}; the five are {', '.join(SITES)}")
    if title is None:
        names = " and ".join(SITES[site][1] for site in lit)
        title = (
            f"Here we touch: {names}" if 0 < len(lit) < 5 else "Five places to adapt a transformer"
        )
    fig = figure(title, "", "", height=360, margin=dict(l=5, r=5, t=45, b=5))
    hidden = dict(visible=False, fixedrange=True)
    fig.update_xaxes(range=[0, 100], **hidden).update_yaxes(range=[-1, 51], **hidden)

    def box(x0, x1, y0, y1, fill, line, text, colour, dash="solid", **label):
        label = dict(text=text, font=dict(color=colour, size=13), padding=2) | label
        line = dict(color=line, width=1.5, dash=dash)
        fig.add_shape(
            type="rect", x0=x0, x1=x1, y0=y0, y1=y1, fillcolor=fill, line=line, label=label
        )

    for text, x0, x1, y0, y1 in _FRAMES:
        box(x0, x1, y0, y1, "#fafafa", "#bbb", text, "#555", textposition="top left")
    for start, end in _ARROWS:
        arrow = dict(ax=start, ay=30.5, axref="x", ayref="y", arrowhead=2, arrowcolor="#777")
        fig.add_annotation(x=end, y=30.5, text="", arrowwidth=1.3, **arrow)
    for site, text, x0, x1, y0, y1 in _PARTS:
        on = site in lit
        fill, line = (SITES[site][0],) * 2 if on else ("#ffffff", "#aaa")
        dash = "dot" if site == "input_embeddings" and not on else "solid"
        box(x0, x1, y0, y1, fill, line, text, _ink(fill) if on else "#666", dash)
    for i, (site, (colour, name, users)) in enumerate(SITES.items()):
        on = site in lit
        left = 0.5 + 20 * i
        fill = colour if on else "#ffffff"
        box(left, left + 3, 7, 11.5, fill, colour, str(i + 1), _ink(fill) if on else "#666")
        ink = "#222" if on else "#777"
        head = f"<b>{name}</b>" if on else name
        note = dict(showarrow=False, xanchor="left", align="left", font=dict(size=12, color=ink))
        fig.add_annotation(x=left + 3.2, y=9.3, text=head, **note)
        fig.add_annotation(
            x=left, y=3.5, text=f"<span style='font-size:11px'>{users}</span>", **note
        )
    return fig


def _ink(fill: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
