"""Whether a training step fits: its parts beside the memory of usual GPUs."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.figures.style import BLUE, GREY, ORANGE, PURPLE, SKY, VERMILLION, figure
from peftlab.figures.theme import theme

STEP_PARTS = {
    "weights": GREY,
    "codes": BLUE,
    "adapters": ORANGE,
    "optimiser": PURPLE,
    "activations": SKY,
    "gradients": VERMILLION,
    "buffers": "#F0E442",
}
MOMENTS = {"update": "when the update is made", "loss": "around the loss"}
GB = 1e9


def fits_bars(
    moments: Mapping[str, Mapping[str, int]], gpus: Mapping[str, int], title: str
) -> go.Figure:
    """The bytes of a step by part at its two moments, and how many each GPU has free."""
    most = max(sum(parts.values()) for parts in moments.values()) / GB
    fig = figure(title, "GB", "", barmode="stack", height=330)
    for part, colour in STEP_PARTS.items():
        held = [moments[moment].get(part, 0) / GB for moment in MOMENTS]
        fig.add_bar(
            x=held, y=list(MOMENTS.values()), name=part, marker_color=colour, orientation="h",
            hovertemplate=f"{part}: %{{x:.2f}} GB<extra></extra>",
        )  # fmt: skip
    ink = theme().ink
    for at, (name, size) in enumerate(gpus.items()):
        fits = most <= size / GB
        fig.add_vline(x=size / GB, line=dict(color=ink, width=1, dash="solid" if fits else "dot"))
        fig.add_annotation(
            x=size / GB, y=1.02 + 0.085 * (at % 3), yref="paper", showarrow=False, font_size=10,
            text=name, xanchor="center", yanchor="bottom",
        )  # fmt: skip
    fig.update_layout(margin=dict(l=170, r=30, t=110, b=90), title=dict(y=0.96, font_size=15))
    fig.update_layout(legend=dict(orientation="h", y=-0.28, x=0))
    right = max(most, max(gpus.values(), default=0) / GB) * 1.06
    return fig.update_xaxes(range=[0, right])
