"""What was measured before and after, row by row."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.figures.style import COLOURS, GREY, MARKERS, figure


def before_after(
    rows: Mapping[str, tuple[int | float, int | float]],
    method: str,
    title: str,
    axis: str,
    labels: tuple[str, str],
    guess: int | float | None = None,
) -> go.Figure:
    """One row for each name, from the top: a point before, a point after, a line between them.

    `rows` maps a name to (before, after), `labels` are the two in words; `method` gives colour and
    marker of what is after. A dashed line stands at `guess`, what a uniform guess would have.
    """
    fig = figure(title, axis, "", height=150 + 26 * len(rows))
    for name, pair in rows.items():
        fig.add_scatter(
            x=pair, y=[name, name], mode="lines", line=dict(color=GREY, width=1), showlegend=False,
            hoverinfo="skip",
        )  # fmt: skip
    looks = ((GREY, MARKERS["base"]), (COLOURS[method], MARKERS[method]))
    for at, (label, (colour, symbol)) in enumerate(zip(labels, looks, strict=True)):
        x = [pair[at] for pair in rows.values()]
        line = dict(color=colour, width=2)
        marker = dict(color=colour, symbol=symbol, size=10, line=line)
        fig.add_scatter(x=x, y=list(rows), mode="markers", marker=marker, name=label)
    if guess is not None:
        fig.add_vline(x=guess, line=dict(color=GREY, dash="dash"))
        fig.add_annotation(
            x=guess, y=1, yref="paper", yanchor="bottom", text="a uniform guess", showarrow=False,
            font_size=12,
        )  # fmt: skip
    fig.update_yaxes(autorange="reversed", type="category", ticks="")
    fig.update_xaxes(rangemode="tozero")
    legend = dict(orientation="h", x=0, y=1, yanchor="bottom", xanchor="left")
    return fig.update_layout(margin=dict(l=150, t=90), legend=legend)
