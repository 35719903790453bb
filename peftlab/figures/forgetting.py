"""What training makes of the old: losses against the line of a uniform guess, leaks by moment."""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from peftlab.figures.style import AXIS, BLACK, BLUE, DASHES, GREY, ORANGE, VERMILLION, figure
from peftlab.figures.theme import theme

SHARES = {"new_facts": ("new facts", BLUE, "circle"), "known_facts": ("known facts", ORANGE, "x")}
LOSSES = {"loss": ("training loss", BLUE, "circle"), "old": ("loss on old texts", ORANGE, "x")}


def _two_panels(title: str, left: str, right: str, height: int = 420) -> go.Figure:
    """An empty figure with the panels x, y and x2, y2 side by side; each y has a title."""
    fig = figure(title, "step", left, height=height)
    fig.update_layout(
        xaxis_domain=[0, 0.44],
        xaxis2={**AXIS, "domain": [0.56, 1], "anchor": "y2", "title": "step"},
        yaxis2={**AXIS, "anchor": "x2", "title": right},
        legend=dict(orientation="h", y=-0.3, yanchor="top", x=0),
        margin=dict(t=80, b=110),
    )
    return fig


def _uniform(fig: go.Figure, uniform: float) -> None:
    """The line of a uniform guess, in the right panel."""
    ends = dict(x0=0, x1=1, xref="x2 domain", y0=uniform, y1=uniform, yref="y2")
    fig.add_shape(type="line", line=dict(color=GREY, dash="dash"), **ends)
    note = dict(text="uniform guess", showarrow=False, xanchor="left", yanchor="bottom")
    fig.add_annotation(x=0.02, xref="x2 domain", y=uniform, yref="y2", font_size=12, **note)


def learned_and_lost(looks: pd.DataFrame, uniform: float, title: str) -> go.Figure:
    """One run: shares of new and old facts on the left, losses on the right, over the steps.

    `looks` has "step", "loss" (on the training batch), "old" (on old texts), both in nats a token,
    "new_facts" and "known_facts"; `uniform` is the loss of a uniform guess.
    """
    fig = _two_panels(title, "share of answers right", "nats per token")
    for columns, x, y in ((SHARES, "x", "y"), (LOSSES, "x2", "y2")):
        for column, (name, colour, symbol) in columns.items():
            look = dict(line=dict(color=colour), marker=dict(symbol=symbol, size=8))
            fig.add_scatter(
                x=looks["step"], y=looks[column], xaxis=x, yaxis=y, name=name,
                mode="lines+markers", **look,
            )  # fmt: skip
    _uniform(fig, uniform)
    fig.update_layout(yaxis=dict(range=[-0.05, 1.05], tickformat=".0%"))
    return fig.update_layout(yaxis2=dict(range=[-0.4, max(uniform, looks["loss"].max()) + 0.8]))


def forgetting_by_rate(runs: pd.DataFrame, uniform: float, title: str) -> go.Figure:
    """New facts on the left and the loss on old texts on the right, a line for each rate.

    `runs` has "lr", "seed", "step", "new_facts" and "old" (nats a token); lines are means, and
    every seed's last look is a point.
    """
    seeds, end = runs["seed"].nunique(), runs["step"].max()
    subtitle = f"lines: means of {seeds} seeds; points: every seed at step {end}"
    fig = _two_panels(f"{title}<br><sup>{subtitle}</sup>", "new facts right", "loss on old texts")
    shades = (BLUE, ORANGE, theme().line(BLACK), VERMILLION)
    for i, (rate, some) in enumerate(runs.groupby("lr")):
        colour, dash = shades[i % len(shades)], DASHES[i % len(DASHES)]
        for column, x, y in (("new_facts", "x", "y"), ("old", "x2", "y2")):
            mean, last = some.groupby("step")[column].mean(), some[some["step"] == end]
            fig.add_scatter(
                x=mean.index, y=mean, xaxis=x, yaxis=y, mode="lines", name=f"rate {rate:g}",
                line=dict(color=colour, dash=dash, width=2.5), showlegend=column == "old",
            )  # fmt: skip
            points = dict(x=last["step"], y=last[column], xaxis=x, yaxis=y, mode="markers")
            fig.add_scatter(**points, marker=dict(color=colour, size=8), showlegend=False)
    _uniform(fig, uniform)
    fig.update_layout(yaxis=dict(range=[-0.05, 1.05], tickformat=".0%"))
    return fig.update_layout(yaxis2=dict(rangemode="tozero"))


def leaks(charts: pd.DataFrame, moments: Sequence[str], title: str) -> go.Figure:
    """Bytes alive at each moment of each step, a panel for each patient, the sound run in grey.

    `charts` has "patient", "number" (of the step) and a column of bytes for each moment.
    """
    lines: Mapping[str, list[float]] = {
        str(name): [row[moment] / 1e3 for _, row in some.iterrows() for moment in moments]
        for name, some in charts.groupby("patient", sort=False)
    }
    sound = lines.pop("sound")
    fig = figure(title, "", "kB alive", height=400, legend=dict(orientation="h", y=-0.3, x=0))
    ticks = [i * len(moments) for i in range(len(sound) // len(moments))]
    width = 1 / len(lines)
    for i, (name, line) in enumerate(lines.items(), 1):
        axis = "x" if i == 1 else f"x{i}"
        every = {"a sound run": (sound, GREY), "patient": (line, VERMILLION)}
        for label, (values, colour) in every.items():
            fig.add_scatter(
                x=list(range(len(values))), y=values, xaxis=axis, mode="lines+markers", name=label,
                line=dict(color=colour, dash="dot" if colour == GREY else "solid"),
                marker=dict(size=5), text=[m for _ in ticks for m in moments], showlegend=i == 1,
            )  # fmt: skip
        place = dict(domain=[(i - 1) * width + 0.01, i * width - 0.01], anchor="y")
        marks = dict(tickvals=ticks, ticktext=[str(n + 1) for n in range(len(ticks))])
        fig.update_layout({f"xaxis{i}": {**AXIS, **place, **marks, "title": f"{name}, step"}})
    return fig.update_yaxes(rangemode="tozero").update_layout(margin_b=100)
