"""Runs of LoRA and its relatives: what a cut update keeps, how seeds differ, what was forgotten."""

import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from peftlab.figures.style import BLACK, COLOURS, GREY, MARKERS, figure, styles
from peftlab.figures.theme import theme

BLUE = COLOURS["lora"]


def kept_by_rank(cuts: pd.DataFrame, trained: pd.Series, r: int = 8) -> go.Figure:
    """What full updates keep when each is cut to its r strongest directions, beside LoRA.

    `cuts` has "r", "seed", "energy" and "new facts"; `trained` has the new facts of LoRA that was
    trained at rank r, one run each.
    """
    some = cuts[cuts["r"] > 0]
    kept = some.groupby("r")["new facts"].mean()
    title = (
        f"Cut to rank {r}, full updates keep {kept[r]:.0%} of the new facts; "
        f"trained at rank {r}, LoRA has {trained.mean():.1%}"
    )
    seeds = cuts["seed"].nunique()
    title += f"<br><sup>every run's point, {seeds} seeds a rank; lines are means</sup>"
    fig = figure(title, "rank r that is kept of each update", "share")
    black = theme().line(BLACK)
    for column, colour, symbol in (("new facts", black, "circle"), ("energy", GREY, "x")):
        mean = some.groupby("r")[column].mean()
        line = dict(color=colour)
        fig.add_scatter(x=mean.index, y=mean, mode="lines", line=line, showlegend=False)
        marker = dict(color=colour, symbol=symbol, size=8)
        name = {"new facts": "new facts, full update cut", "energy": "energy of the update"}[column]
        fig.add_scatter(x=some["r"], y=some[column], mode="markers", marker=marker, name=name)
    marker = dict(color=BLUE, symbol=MARKERS["lora"], size=12)
    at = dict(x=[r] * len(trained), y=trained, mode="markers", marker=marker)
    fig.add_scatter(**at, name="new facts, LoRA trained")
    ticks = dict(tickvals=mean.index, ticktext=[str(rank) for rank in mean.index])
    fig.update_xaxes(type="log", **ticks).update_yaxes(tickformat=".0%")
    return fig.update_layout(legend=dict(x=0.99, y=0.02, xanchor="right", yanchor="bottom"))


def seeds_by_row(
    table: pd.DataFrame, value: str, title: str, axis: str, share: bool = False
) -> go.Figure:
    """One row for each "label" in the order of the table: every seed's point and a bar at the mean.

    Rows of points that overlap are not told apart by these seeds.
    """
    rows = {str(label): group[value] for label, group in table.groupby("label", sort=False)}
    seeds = sorted({len(values) for values in rows.values()})
    n = " or ".join(map(str, seeds))
    fig = figure(
        f"{title}<br><sup>every seed's point, n = {n} a row; | is the mean</sup>", axis, ""
    )
    for label, style in styles(rows).items():
        values, look = rows[label], dict(color=style["colour"] or GREY)
        marker = dict(symbol=style["marker"], size=10, **look)
        fig.add_scatter(
            x=values, y=[label] * len(values), mode="markers", marker=marker, name=label
        )
        mean = dict(symbol="line-ns", size=18, line=dict(width=2.5, **look))
        fig.add_scatter(x=[values.mean()], y=[label], mode="markers", marker=mean, name="mean")
    fig.update_yaxes(autorange="reversed", type="category", ticks="")
    if share:
        fig.update_xaxes(tickformat=".0%", range=[-0.03, 1.03])
    return fig.update_layout(
        showlegend=False, height=130 + 36 * len(rows), margin=dict(l=150, t=70)
    )


def _hollow(style: dict) -> str:
    """The ending of the marker of a label that repeats a method."""
    return "-open" if style["dash"] != "solid" else ""


def learned_and_forgotten(
    groups: Mapping[str, pd.DataFrame], room: int | float, title: str
) -> go.Figure:
    """New facts against what was forgotten, a point for each run; a line where a uniform guess is.

    Each group has "forgotten" and "new_facts"; `room` is how much a uniform guess has forgotten.
    """
    fig = figure(title, "forgotten: nats per token, more than before", "new facts right")
    for (label, runs), (_, style) in zip(groups.items(), styles(groups).items(), strict=True):
        look = dict(color=style["colour"], symbol=style["marker"] + _hollow(style), size=10)
        at = dict(x=runs["forgotten"], y=runs["new_facts"], mode="markers")
        fig.add_scatter(**at, marker=look, name=label)
    fig.add_vline(x=room, line=dict(color=GREY, dash="dash"))
    words = "a uniform guess<br>of the next token"
    fig.add_annotation(
        x=math.log10(room), y=0.5, text=words, showarrow=False, xanchor="left", xshift=6,
        align="left", font_size=12,
    )  # fmt: skip
    fig.update_xaxes(type="log", tickvals=[0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20])
    fig.update_yaxes(tickformat=".0%", range=[-0.05, 1.05])
    return fig.update_layout(legend=dict(x=0.01, y=0.99, yanchor="top"))


def forgotten_by_size(looks: pd.DataFrame, room: int | float, title: str) -> go.Figure:
    """What was forgotten against the size of the update, a line for each "run" as it trains.

    `looks` has "label", "run", "size" (‖ΔW‖ over ‖W‖) and "forgotten" in nats per token.
    """
    fig = figure(title, "size of the update: ‖ΔW‖ / ‖W‖, all matrices together", "forgotten, nats")
    for label, style in styles(dict.fromkeys(looks["label"])).items():
        mine = looks[looks["label"] == label]
        for n, (_, run) in enumerate(mine.groupby("run", sort=False)):
            colour = dict(color=style["colour"])
            marker = dict(symbol=style["marker"] + _hollow(style), size=8, **colour)
            at = dict(x=run["size"], y=run["forgotten"], mode="lines+markers")
            fig.add_scatter(
                **at, marker=marker, line=dict(width=1.5, **colour), name=label, showlegend=n == 0
            )
    fig.add_hline(y=room, line=dict(color=GREY, dash="dash"))
    note = dict(text="a uniform guess", showarrow=False, xanchor="left", yanchor="bottom")
    fig.add_annotation(x=0.01, xref="paper", y=math.log10(room), font_size=12, **note)
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    return fig.update_xaxes(type="log", tickvals=ticks).update_yaxes(type="log", tickvals=ticks)
