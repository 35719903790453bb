"""Where the memory of a training step goes."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.figures.style import GREY, OLIVE, PURPLE, SKY, VERMILLION, figure

PARTS = {  # of the memory of a training step
    "weights": GREY,
    "Adam's moments": PURPLE,
    "gradients": VERMILLION,
    "activations": SKY,
    "around the loss": OLIVE,
}


def memory_bars(
    moments: Mapping[str, Mapping[str, Mapping[str, int | float]]], title: str
) -> go.Figure:
    """What a training step holds: for each label its moments, for each moment bytes by part."""
    traces = memory_traces(moments)
    fig = figure(title, "", "bytes", barmode="stack", height=430)
    for (part, colour), trace in zip(PARTS.items(), traces, strict=True):
        fig.add_bar(**trace, name=part, marker_color=colour)
    fig.update_yaxes(tickformat="~s", ticksuffix="B").update_xaxes(tickangle=0, tickfont_size=11)
    return fig.update_layout(margin=dict(b=70), legend=dict(traceorder="reversed"))


def memory_traces(moments: Mapping[str, Mapping[str, Mapping[str, int | float]]]) -> list[dict]:
    """What differs between two of those figures: a stack of bars for each part."""
    pairs = [(label, moment) for label, held in moments.items() for moment in held]
    x = [[label for label, _ in pairs], [moment for _, moment in pairs]]
    return [dict(x=x, y=[moments[a][b].get(part, 0) for a, b in pairs]) for part in PARTS]
