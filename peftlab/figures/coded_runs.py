"""What was measured of codes: which are used, and what of an update survives in them."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from peftlab.figures.style import BLACK, BLUE, GREY, MARKERS, VERMILLION, figure
from peftlab.figures.theme import theme
from peftlab.figures.weights import CODE_TYPES


def code_shares(shares: Mapping[str, Sequence[float]], title: str) -> go.Figure:
    """How many of the weights have each code, by data type, beside the share of 1 in 16."""
    fig = figure(title, "code, from the lowest level up", "share of all weights")
    for name, values in shares.items():
        colour, symbol = CODE_TYPES.get(name, (theme().line(BLACK), "circle"))
        marker = dict(symbol=symbol, size=10, color=colour, line=dict(width=2, color=colour))
        line = dict(color=colour, width=1, dash="dot")
        fig.add_scatter(
            x=list(range(len(values))), y=list(values), mode="lines+markers", marker=marker,
            line=line, name=name,
        )  # fmt: skip
    fig.add_hline(y=1 / 16, line=dict(color=GREY, dash="dash"))
    note = dict(text="1 in 16", showarrow=False, xanchor="left", yanchor="bottom", font_size=12)
    fig.add_annotation(x=0, xref="paper", y=1 / 16, **note)
    fig.update_xaxes(dtick=1, range=[-0.6, 15.6])
    fig.update_yaxes(tickformat=".0%", rangemode="tozero")
    return fig.update_layout(legend=dict(x=0.99, xanchor="right", y=0.99))


def what_arrives(table: pd.DataFrame, marks: Mapping[str, float], title: str) -> go.Figure:
    """What of an update is in the codes after merging, by "size" (‖ΔW‖ / ‖W‖).

    "along" is the part of ΔW that arrived, 1 for all of it; "off" is the distance from ΔW over its
    size, 1 for as far away as with no merge at all. `marks` are sizes that get a line with a name.
    """
    fig = figure(title, "size of the update, ‖ΔW‖ / ‖W‖", "as a part of ΔW")
    for column, name, colour, symbol in (
        ("along", "arrives, in ΔW's direction", BLUE, MARKERS["qlora"]),
        ("off", "is wrong, in all directions", VERMILLION, "x"),
    ):
        marker = dict(color=colour, symbol=symbol, size=9)
        at = dict(x=table["size"], y=table[column], mode="lines+markers")
        fig.add_scatter(**at, marker=marker, line=dict(color=colour, width=2), name=name)
    fig.add_hline(y=1, line=dict(color=GREY, dash="dash"))
    for name, size in marks.items():
        fig.add_scatter(
            x=[size, size], y=[0, 1.25], mode="lines+text", text=["", name],
            textposition="top center", line=dict(color=GREY, width=1.5, dash="dot"),
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    ticks = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1]
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    fig.update_yaxes(tickformat=".0%", range=[-0.03, 1.42])
    return fig.update_layout(legend=dict(orientation="h", x=0, y=-0.26), margin_b=100, height=440)


def lost_by_way(table: pd.DataFrame, title: str) -> go.Figure:
    """The loss that each "way" to use a trained adapter adds, "worse", a row for each "base".

    Every seed has its point; 0 is the adapter beside its codes.
    """
    bases, ways = list(table["base"].unique()), list(table["way"].unique())
    seeds = table["seed"].nunique()
    title += f"<br><sup>every seed's point, {seeds} seeds for each base and way</sup>"
    fig = figure(title, "test loss above that beside the codes, nats per target token", "")
    looks = ((VERMILLION, "x"), (GREY, "circle-open"), (BLUE, MARKERS["qlora"]))
    for n, (way, (colour, symbol)) in enumerate(zip(ways, looks, strict=True)):
        mine = table[table["way"] == way]
        y = [bases.index(base) + (n - 1) * 0.24 for base in mine["base"]]
        marker = dict(color=colour, symbol=symbol, size=11)
        fig.add_scatter(x=mine["worse"], y=y, mode="markers", marker=marker, name=way)
    fig.add_vline(x=0, line=dict(color=GREY, dash="dash"))
    places = dict(tickvals=list(range(len(bases))), ticktext=bases, ticks="")
    fig.update_yaxes(**places, range=[len(bases) - 0.5, -0.5], showgrid=False)
    legend = dict(orientation="h", x=0, y=-0.32)
    return fig.update_layout(legend=legend, margin=dict(l=110, b=110, t=70), height=410)
