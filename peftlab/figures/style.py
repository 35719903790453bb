"""Each method's colour and marker, and the looks that all figures share.

The colours are those of Okabe and Ito, told apart by colour-blind eyes; the pale ones are darkened
until they stand out from white by 3, as WCAG asks of lines and marks. Methods of one site share a
colour and differ in marker.
"""

from collections.abc import Iterable

import plotly.graph_objects as go
import plotly.io as pio

from peftlab.figures.theme import DARK, DARK_TEMPLATE, contrast, theme

BLACK, ORANGE, SKY, GREEN = "#000000", "#C07F00", "#3D95C9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#737373"
OLIVE = "#8F8A00"  # of no method

_STYLE = {
    "base": (GREY, "circle-open"),
    "full_fine_tuning": (BLACK, "circle"),
    "bitfit": (BLACK, "x"),
    "layer_norm": (BLACK, "cross"),
    "prompt_tuning": (ORANGE, "diamond"),
    "p_tuning": (ORANGE, "diamond-open"),
    "prefix_tuning": (GREEN, "square"),
    "p_tuning_v2": (GREEN, "square-open"),
    "deep_prompt_tuning": (ORANGE, "hourglass"),
    "prompt_and_prefix": (GREEN, "bowtie"),
    "lora": (BLUE, "triangle-up"),
    "dora": (BLUE, "triangle-down"),
    "pissa": (BLUE, "triangle-left"),
    "vera": (BLUE, "triangle-right"),
    "adalora": (BLUE, "triangle-up-open"),
    "qlora": (SKY, "triangle-up"),
    "nf4": (SKY, "triangle-up-open"),
    "houlsby": (PURPLE, "star"),
    "pfeiffer": (PURPLE, "star-open"),
    "parallel": (PURPLE, "hexagon"),
    "ia3": (PURPLE, "hexagon-open"),
    "prune": (VERMILLION, "pentagon"),
    "prune_structures": (VERMILLION, "pentagon-open"),
}
COLOURS = {method: colour for method, (colour, _) in _STYLE.items()}
MARKERS = {method: marker for method, (_, marker) in _STYLE.items()}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

AXIS = dict(gridcolor="#e6e6e6", linecolor="#444", showline=True, ticks="outside", zeroline=False)
pio.templates["peftlab"] = go.layout.Template(
    layout=dict(
        font=dict(family="Helvetica, Arial, sans-serif", size=14, color="#222"),
        title=dict(x=0, xref="paper", xanchor="left", font=dict(size=16)),
        colorway=[BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK],
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin=dict(l=70, r=25, t=60, b=60),
        height=380,
        hoverlabel=dict(font=dict(size=13)),
        xaxis=AXIS,
        yaxis=AXIS,
        legend=dict(bgcolor="rgba(255,255,255,0.7)"),
    )
)

pio.templates[DARK_TEMPLATE] = go.layout.Template(pio.templates["peftlab"]).update(
    layout=dict(
        font_color=DARK.ink,
        paper_bgcolor=DARK.paper,
        plot_bgcolor=DARK.paper,
        xaxis=dict(gridcolor=DARK.faint, linecolor=DARK.edge),
        yaxis=dict(gridcolor=DARK.faint, linecolor=DARK.edge),
        legend_bgcolor="rgba(17,17,17,0.7)",
    )
)


def use_template(dark: bool = False) -> None:
    """Make the course's looks the default, and show figures from their data alone.

    `dark`: for a notebook on dark paper. Figures made from then on are dark.
    """
    pio.templates.default = DARK_TEMPLATE if dark else "peftlab"
    if pio.renderers.default != "colab":
        pio.renderers.default = "plotly_mimetype"


def method_key(label: str) -> str | None:
    """The method a label speaks of, so that "LoRA, r=8" gets LoRA's colour.

    >>> method_key("QLoRA, 4 bits")
    'qlora'
    >>> method_key("(IA)³"), method_key("LayerNorm tuning")
    ('ia3', 'layer_norm')
    """
    text = label.lower().replace(" ", "_").replace("-", "_")
    text = text.replace("(ia)³", "ia3").replace("layernorm", "layer_norm")
    return max((key for key in _STYLE if key in text), key=len, default=None)


def styles(labels: Iterable[str]) -> dict[str, dict]:
    """Colour, marker and dash of each label: the method's own, told apart by dash if it repeats.

    The colour is that of a line on the paper in use.
    """
    spare, seen, styles = [VERMILLION, SKY, PURPLE, GREEN, OLIVE, BLUE, ORANGE], {}, {}
    for label in labels:
        key = method_key(label)
        times = seen[key] = seen.get(key, -1) + 1
        colour = COLOURS[key] if key else spare[times % len(spare)]
        if contrast(colour, theme().paper) < 3:
            colour = theme().line(colour)
        dash = DASHES[times % len(DASHES)] if key else "solid"
        marker = MARKERS[key] if key else "circle"
        styles[label] = dict(colour=colour, marker=marker, dash=dash)
    return styles


def figure(title: str, x: str, y: str, **layout) -> go.Figure:
    fig = go.Figure(layout=dict(template=theme().template, title_text=title, **layout))
    return fig.update_xaxes(title_text=x).update_yaxes(title_text=y)
