"""Runs and methods: learning curves, bars, counts, spectra, maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from peftlab.accounting import readable_percent
from peftlab.figures.style import (
    AXIS,
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    figure,
    method_key,
    styles,
)


def learning_curves(
    histories: Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]],
    metric: str = "loss",
    title: str | None = None,
    y_title: str | None = None,
) -> go.Figure:
    """A metric against the step, one colour a method; of several seeds each one, and the mean.

    A curve that lies under others is wider than they are, so that its edges can be seen.
    """
    y_title = y_title or ("loss (nats per token)" if metric == "loss" else metric.replace("_", " "))
    fig = figure(
        title or f"{metric.replace('_', ' ').capitalize()} during training", "step", y_title
    )
    means, wide = {}, {}
    for label, style in styles(histories).items():
        runs = histories[label]
        runs = [runs] if isinstance(runs, pd.DataFrame) else list(runs)
        runs = [run[["step", metric]].dropna() for run in runs]
        means[label] = pd.concat(runs).groupby("step")[metric].mean()
        line = dict(color=style["colour"], dash=style["dash"])
        if len(runs) > 1:
            for run in runs:
                thin = dict(mode="lines", line=dict(width=1, **line), opacity=0.35)
                fig.add_scatter(x=run["step"], y=run[metric], **thin, showlegend=False, name=label)
        mean = means[label]
        few = len(mean) <= 30
        fig.add_scatter(
            x=mean.index,
            y=mean,
            mode="lines+markers" if few else "lines",
            line=dict(width=2.5, **line),
            marker=dict(symbol=style["marker"], size=8, color=style["colour"]),
            name=f"{label} (mean of {len(runs)} seeds)" if len(runs) > 1 else label,
            showlegend=True,
        )
        wide[label] = fig.data[-1]
    for label, above in _curves_above(means).items():
        wide[label].line.width += 4 * above
        wide[label].marker.size += 6 * above
    return fig


def _curves_above(curves: Mapping[str, pd.Series]) -> dict[str, int]:
    """How many of the curves drawn after each one hide it: at half of its steps or more they lie
    within a hundredth of the height of all."""
    drawn = pd.DataFrame(curves)
    near = (drawn.max().max() - drawn.min().min()) / 100
    labels = list(curves)
    return {
        label: sum(
            bool((drawn[label] - drawn[other]).abs().le(near).sum() >= max(2, least))
            for other in labels[i + 1 :]
        )
        for i, (label, least) in enumerate((drawn.count() / 2).items())
    }


def small_multiples(
    table: pd.DataFrame, x: str, y: str, panel: str, title: str, x_title: str, y_title: str
) -> go.Figure:
    """One small plot for each value of `panel`, side by side with one y axis: a line for each
    `label` through the means, and every seed's point; `x` is logarithmic."""
    panels = list(dict.fromkeys(table[panel]))
    looks = styles(dict.fromkeys(table["label"]))
    fig = figure(title, "", y_title, height=360, legend=dict(x=1, xanchor="right", y=0.5))
    ticks, width = sorted(table[x].unique()), 1 / len(panels)
    ends = [np.log10(ticks[0]) - 0.12, np.log10(ticks[-1]) + 0.12]
    for i, name in enumerate(panels, 1):
        rows, axis = table[table[panel] == name], "x" if i == 1 else f"x{i}"
        for label, style in looks.items():
            mine = rows[rows["label"] == label].sort_values(x)
            look = dict(color=style["colour"], symbol=style["marker"], size=8)
            points = dict(x=mine[x], y=mine[y], mode="markers", marker=look, opacity=0.6)
            fig.add_scatter(**points, xaxis=axis, name=label, showlegend=False)
            mean = mine.groupby(x)[y].mean()
            line = dict(x=mean.index, y=mean, mode="lines", line=dict(color=style["colour"]))
            fig.add_scatter(**line, xaxis=axis, name=label, showlegend=i == 1)
        place = dict(domain=[(i - 1) * width + 0.01, i * width - 0.01], anchor="y", type="log")
        text = dict(text=f"{name}<br>{x_title}", font=dict(size=12))
        marks = dict(tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks], range=ends)
        fig.update_layout({f"xaxis{i}": {**AXIS, **place, **marks, "title": text}})
    return fig.update_yaxes(range=[-0.04, 1.04])


def bars_by_method(
    table: pd.DataFrame, value: str, title: str, y_title: str, by: str = "method"
) -> go.Figure:
    """Mean bars with every seed's point; the whisker is one standard deviation over the seeds."""
    groups = {str(label): group[value].dropna() for label, group in table.groupby(by, sort=False)}
    fig = figure(title, "", y_title, showlegend=False)
    for label, style in styles(groups).items():
        values, colour = groups[label], style["colour"]
        x = f"{label}<br>n = {len(values)}"
        spread = values.std(ddof=1) if len(values) > 1 else None
        whisker = dict(array=[spread], color="#444", visible=spread is not None)
        bar = dict(marker=dict(color=colour, opacity=0.35, line=dict(color=colour, width=1.5)))
        fig.add_bar(x=[x], y=[values.mean()], error_y=whisker, name=label, width=0.6, **bar)
        marker = dict(color=colour, symbol=style["marker"], size=9)
        fig.add_scatter(x=[x] * len(values), y=values, mode="markers", marker=marker, name=label)
    return fig


def counts_figure(
    sizes: Sequence[int],
    counts: Sequence[int],
    current: int,
    model: str,
    total: int,
    size_name: str = "rank r",
    label: str = "LoRA",
    title: str | None = None,
) -> go.Figure:
    """Trained parameters by rank or prompt length: the current one marked, the base as a line."""
    colour, marker = COLOURS.get(method_key(label), BLUE), MARKERS.get(method_key(label), "circle")
    here = counts[list(sizes).index(current)]
    title = title or f"{label}: {here:,} parameters, {readable_percent(here, total)} of {model}"
    fig = figure(title, size_name, "trained parameters", showlegend=False)
    line = dict(color=colour, width=2)
    fig.add_scatter(x=list(sizes), y=list(counts), mode="lines", line=line, name=label)
    symbol = dict(symbol=marker, size=14, color=colour, line=dict(color="white", width=1.5))
    fig.add_scatter(
        x=[current], y=[here], mode="markers+text", marker=symbol, name="current",
        text=[f"{here:,}"], textposition="top left", cliponaxis=False,
    )  # fmt: skip
    ends = dict(x=[min(sizes), max(sizes)], y=[total, total], mode="lines", name="base")
    fig.add_scatter(line=dict(color=GREY, dash="dash", width=1.5), **ends)
    note = dict(showarrow=False, xanchor="left", yshift=11, text=f"all of {model}: {total:,}")
    fig.add_annotation(x=np.log10(min(sizes)), y=np.log10(total), **note)
    ticks = [i * 10**k for k in range(5) for i in (1, 2, 5)]
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    low, high = np.log10(min(counts)), np.log10(total)
    return fig.update_yaxes(type="log", dtick=1, tickformat="~s", range=[low - 0.3, high + 0.7])


def strengths(
    curves: Mapping[str, Mapping[float, float]], current: float, title: str, y_title: str
) -> go.Figure:
    """Something measured while a trained change is turned up from 0, the base, to 1 and beyond."""
    fig = figure(title, "strength t: 0 is the base, 1 is as trained", y_title)
    for (label, style), dash in zip(styles(curves).items(), DASHES, strict=False):
        at, colour = curves[label], style["colour"]
        line, small = dict(color=colour, dash=dash, width=2), dict(symbol=style["marker"], size=8)
        points = dict(x=list(at), y=list(at.values()), mode="lines+markers", marker=small)
        fig.add_scatter(**points, line=line, name=label)
        mark = dict(symbol=style["marker"], size=16, color=colour)
        fig.add_scatter(
            x=[current], y=[at[current]], mode="markers", marker=mark, name=label, showlegend=False
        )
    lowest = min(min(at.values()) for at in curves.values())
    if lowest > 0:
        fig.update_yaxes(type="log", dtick=1, exponentformat="none")
    return fig


def heat_map(
    matrix: Any,
    x: Any = None,
    y: Any = None,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    unit: str = "",
    diverging: bool = False,
) -> go.Figure:
    """A matrix in colour, first row on top; `diverging` puts zero at white, for signed values."""
    values = np.asarray(matrix, dtype=float)
    fig = figure(title, x_title, y_title)
    most = float(np.abs(values).max())
    signed = dict(colorscale="RdBu", zmin=-most, zmax=most)
    bar = dict(title=dict(text=unit, side="top"))
    fig.add_heatmap(
        z=values, x=x, y=y, colorbar=bar, **(signed if diverging else dict(colorscale="Cividis"))
    )
    return fig.update_yaxes(autorange="reversed", showgrid=False).update_xaxes(showgrid=False)


def spectrum(
    singular_values: Mapping[str, Any], title: str, y_title: str = "singular value"
) -> go.Figure:
    """Singular values of one or several matrices, largest first, on a logarithmic axis."""
    fig = figure(title, "index, largest first", y_title)
    for label, style in styles(singular_values).items():
        values = np.sort(np.asarray(singular_values[label], dtype=float))[::-1]
        fig.add_scatter(
            x=np.arange(1, len(values) + 1),
            y=values,
            mode="lines+markers",
            line=dict(color=style["colour"], dash=style["dash"]),
            marker=dict(symbol=style["marker"], size=6),
            name=label,
            showlegend=True,
        )
    return fig.update_yaxes(
        type="log", exponentformat="power", minor=dict(ticks="outside"), dtick=1
    )
