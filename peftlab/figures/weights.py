"""Weights: their codes, their errors, and what pruning takes."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from peftlab.figures.style import BLACK, COLOURS, GREY, MARKERS, PURPLE, SKY, VERMILLION, figure

CODE_TYPES = {  # data types of four bits
    "nf4": (SKY, "triangle-up-open"),
    "e2m1": (VERMILLION, "square-open"),
    "int4": (BLACK, "circle-open"),
    "fp4": (PURPLE, "x-thin-open"),
}


def code_levels(tables: Mapping[str, Sequence[float]], title: str) -> go.Figure:
    """The levels of data types, one row each, over the normal that weights resemble."""
    fig = figure(title, "level, as a part of the block's largest weight", "")
    names = list(tables)[::-1]
    x = np.linspace(-1, 1, 201)
    bell = np.exp(-0.5 * (x / 0.4) ** 2) * 0.9 + len(names) - 0.4
    grey = dict(color=GREY, width=1.5, dash="dot")
    fig.add_scatter(x=x, y=bell, mode="lines", line=grey, name="a normal", showlegend=False)
    for row, name in enumerate(names):
        colour, _ = CODE_TYPES.get(name, (BLACK, ""))
        mark = dict(symbol="line-ns-open", size=16, color=colour, line=dict(width=2))
        levels = [float(level) for level in tables[name]]
        fig.add_scatter(
            x=levels,
            y=[row] * len(levels),
            mode="markers",
            marker=mark,
            name=name,
            showlegend=False,
        )
    fig.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, range=[-0.6, len(names) + 0.7]
    )
    return fig.update_xaxes(range=[-1.05, 1.05])


def code_errors(
    errors: Mapping[str, Mapping[int, float]], bits: Mapping[int, float], now: tuple, title: str
) -> go.Figure:
    """The error of each data type against the block size; `now`, a type and a size, is marked.

    Above each size stand the bits that a weight takes with it.
    """
    fig = figure(title, "block size, and bits a weight", "error, % of the weights' own size")
    for name, (colour, marker) in CODE_TYPES.items():
        sizes = list(errors[name])
        here = [15 if (name, size) == now else 7 for size in sizes]
        mark = dict(symbol=marker, color=colour, size=here, line=dict(width=2))
        line = dict(color=colour, width=3 if name == now[0] else 1.5)
        values = [100 * errors[name][size] for size in sizes]
        fig.add_scatter(x=sizes, y=values, mode="lines+markers", marker=mark, line=line, name=name)
    ticks = list(bits)
    labels = [f"{size}<br>{bits[size]:.3f}" for size in ticks]
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=labels, title_standoff=8)
    fig.update_layout(margin_b=80)
    return fig.update_yaxes(rangemode="tozero")


def pruning_parts(
    points: Sequence[tuple[float, float]], share: float, untouched: float, label: str, title: str
) -> tuple[list[dict], dict]:
    """What differs between two states of `pruning_curve`: of its traces, and of the layout."""
    x, y = [at for at, _ in points], [loss for _, loss in points]
    traces = [
        dict(x=x, y=y, name=label),
        dict(x=[share], y=[dict(points)[share]]),
        dict(x=[0, 1], y=[untouched, untouched]),
    ]
    return traces, dict(title_text=title)


def pruning_curve(
    points: Sequence[tuple[float, float]], share: float, untouched: float, label: str, title: str
) -> go.Figure:
    """Loss by the share that is gone: the points seen so far, the present one, and the base."""
    fig = figure(title, "share that is gone", "loss (nats per token)", showlegend=False)
    colour = COLOURS["prune"]
    (line, here, base), _ = pruning_parts(points, share, untouched, label, title)
    small = dict(symbol=MARKERS["prune"], size=8, color=colour)
    fig.add_scatter(**line, mode="lines+markers", line=dict(color=colour), marker=small)
    large = dict(symbol=MARKERS["prune"], size=15, color=colour, line=dict(color="white", width=2))
    fig.add_scatter(**here, mode="markers", marker=large, name="now")
    dashed = dict(color=GREY, dash="dash", width=1.5)
    fig.add_scatter(**base, mode="lines", line=dashed, name="untouched")
    fig.update_xaxes(range=[-0.03, 1.0], tickformat=".0%")
    return fig.update_yaxes(rangemode="tozero")
