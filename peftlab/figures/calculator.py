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
    sizes = sorted(gpus.items(), key=lambda item: item[1])
    roomy = [size / GB for _, size in sizes if size / GB >= most]
    right = 1.08 * max(most, roomy[0] if roomy else sizes[-1][1] / GB)
    shown = [(name, size / GB) for name, size in sizes if size / GB < right]
    for at, (name, size) in enumerate(shown):
        dash = "solid" if size >= most else "dot"
        fig.add_vline(x=size, line=dict(color=theme().ink, width=1, dash=dash))
        fig.add_annotation(
            x=size, y=1 + 0.1 * (at % 4), yref="paper", showarrow=False, font_size=11,
            text=name, xanchor="right" if size > 0.85 * right else "center", yanchor="bottom",
        )  # fmt: skip
    fig.update_layout(
        margin=dict(l=190, r=30, t=135, b=100),
        title=dict(x=0.02, xref="container", y=0.96, font_size=15),
    )
    fig.update_layout(legend=dict(orientation="h", y=-0.5, x=0, traceorder="normal"))
    return fig.update_xaxes(range=[0, right], title_standoff=5).update_layout(height=380)
