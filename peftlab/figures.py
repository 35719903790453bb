"""Data in, Plotly figure out. Each method keeps one colour and one marker in the whole course.

The colours are those of Okabe and Ito, told apart by colour-blind eyes; methods of one site share
a colour and differ in marker. No figure loads a script from anywhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from peftlab.accounting import readable_percent

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"

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

_AXIS = dict(gridcolor="#e6e6e6", linecolor="#444", showline=True, ticks="outside", zeroline=False)
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
        xaxis=_AXIS,
        yaxis=_AXIS,
        legend=dict(bgcolor="rgba(255,255,255,0.7)"),
    )
)


def use_template() -> None:
    """Make the course's looks the default, and show figures from their data alone."""
    pio.templates.default = "peftlab"
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


def _styles(labels: Iterable[str]) -> dict[str, dict]:
    """Colour, marker and dash of each label: the method's own, told apart by dash if it repeats."""
    spare, seen, styles = [VERMILLION, SKY, PURPLE, GREEN, ORANGE, BLUE], {}, {}
    for label in labels:
        key = method_key(label)
        times = seen[key] = seen.get(key, -1) + 1
        colour = COLOURS[key] if key else spare[times % len(spare)]
        dash = DASHES[times % len(DASHES)] if key else "solid"
        marker = MARKERS[key] if key else "circle"
        styles[label] = dict(colour=colour, marker=marker, dash=dash)
    return styles


def _figure(title: str, x: str, y: str, **layout) -> go.Figure:
    fig = go.Figure(layout=dict(template="peftlab", title_text=title, **layout))
    return fig.update_xaxes(title_text=x).update_yaxes(title_text=y)


SITES = {
    "input_embeddings": (ORANGE, "input embeddings", "prompt tuning, P-tuning"),
    "keys_values": (GREEN, "keys and values", "prefix tuning, P-tuning v2"),
    "linear_weights": (BLUE, "linear weights", "LoRA, DoRA, QLoRA, pruning"),
    "sublayer_outputs": (PURPLE, "sublayer outputs", "adapters, (IA)³"),
    "existing_parameters": (BLACK, "existing parameters", "full fine-tuning, BitFit"),
}

_PARTS = [  # site, text, x0, x1, y0, y1 on a sheet of 100 by 50
    ("input_embeddings", "P₁", 2, 8, 40, 45),
    ("input_embeddings", "P₂", 2, 8, 34, 39),
    (None, "the", 2, 8, 28, 33),
    (None, "old", 2, 8, 22, 27),
    (None, "mill", 2, 8, 16, 21),
    ("existing_parameters", "LN", 17, 21, 22, 39),
    ("linear_weights", "W<sub>q</sub>", 26, 31.5, 35, 41),
    ("linear_weights", "W<sub>k</sub>", 26, 31.5, 27.5, 33.5),
    ("linear_weights", "W<sub>v</sub>", 26, 31.5, 20, 26),
    ("keys_values", "K", 34.5, 40.5, 27.5, 33.5),
    ("keys_values", "V", 34.5, 40.5, 20, 26),
    ("linear_weights", "W<sub>o</sub>", 43.5, 49, 27.5, 33.5),
    ("sublayer_outputs", "+", 53, 57, 26, 35),
    ("existing_parameters", "LN", 61, 65, 22, 39),
    ("linear_weights", "W<sub>up</sub>", 69.5, 75, 27.5, 33.5),
    ("linear_weights", "W<sub>down</sub>", 77, 83, 27.5, 33.5),
    ("sublayer_outputs", "+", 86.5, 90.5, 26, 35),
]
_FRAMES = [  # text, x0, x1, y0, y1
    ("one of L transformer blocks", 14, 93, 15, 49),
    ("attention", 24, 51, 18, 45.5),
    ("MLP", 67.5, 85, 18, 45.5),
]
_ARROWS = [(8.5, 16.5), (21.5, 24), (51, 53), (57, 61), (65, 67.5), (85, 86.5), (90.5, 98)]


def five_sites(lit: str | Iterable[str] = (), title: str | None = None) -> go.Figure:
    """The course's map: five places where a method can touch a transformer, some of them lit."""
    lit = [lit] if isinstance(lit, str) else list(lit)
    for site in lit:
        if site not in SITES:
            raise ValueError(f"unknown site {site!r}; the five are {', '.join(SITES)}")
    if title is None:
        names = " and ".join(SITES[site][1] for site in lit)
        title = (
            f"Here we touch: {names}" if 0 < len(lit) < 5 else "Five places to adapt a transformer"
        )
    fig = _figure(title, "", "", height=360, margin=dict(l=5, r=5, t=45, b=5))
    hidden = dict(visible=False, fixedrange=True)
    fig.update_xaxes(range=[0, 100], **hidden).update_yaxes(range=[-1, 51], **hidden)

    def box(x0, x1, y0, y1, fill, line, text, colour, dash="solid", **label):
        label = dict(text=text, font=dict(color=colour, size=13), padding=2) | label
        line = dict(color=line, width=1.5, dash=dash)
        fig.add_shape(
            type="rect", x0=x0, x1=x1, y0=y0, y1=y1, fillcolor=fill, line=line, label=label
        )

    for text, x0, x1, y0, y1 in _FRAMES:
        box(x0, x1, y0, y1, "#fafafa", "#bbb", text, "#555", textposition="top left")
    for start, end in _ARROWS:
        arrow = dict(ax=start, ay=30.5, axref="x", ayref="y", arrowhead=2, arrowcolor="#777")
        fig.add_annotation(x=end, y=30.5, text="", arrowwidth=1.3, **arrow)
    for site, text, x0, x1, y0, y1 in _PARTS:
        on = site in lit
        fill, line = (SITES[site][0],) * 2 if on else ("#ffffff", "#aaa")
        dash = "dot" if site == "input_embeddings" and not on else "solid"
        box(x0, x1, y0, y1, fill, line, text, _ink(fill) if on else "#666", dash)
    for i, (site, (colour, name, users)) in enumerate(SITES.items()):
        on = site in lit
        left = 0.5 + 20 * i
        fill = colour if on else "#ffffff"
        box(left, left + 3, 7, 11.5, fill, colour, str(i + 1), _ink(fill) if on else "#666")
        ink = "#222" if on else "#777"
        head = f"<b>{name}</b>" if on else name
        note = dict(showarrow=False, xanchor="left", align="left", font=dict(size=12, color=ink))
        fig.add_annotation(x=left + 3.2, y=9.3, text=head, **note)
        fig.add_annotation(
            x=left, y=3.5, text=f"<span style='font-size:11px'>{users}</span>", **note
        )
    return fig


def _ink(fill: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"


def learning_curves(
    histories: Mapping[str, pd.DataFrame | Sequence[pd.DataFrame]],
    metric: str = "loss",
    title: str | None = None,
    y_title: str | None = None,
) -> go.Figure:
    """A metric against the step, one colour a method; of several seeds each one, and the mean."""
    y_title = y_title or ("loss (nats per token)" if metric == "loss" else metric.replace("_", " "))
    fig = _figure(
        title or f"{metric.replace('_', ' ').capitalize()} during training", "step", y_title
    )
    for label, style in _styles(histories).items():
        runs = histories[label]
        runs = [runs] if isinstance(runs, pd.DataFrame) else list(runs)
        runs = [run[["step", metric]].dropna() for run in runs]
        line = dict(color=style["colour"], dash=style["dash"])
        if len(runs) > 1:
            for run in runs:
                thin = dict(mode="lines", line=dict(width=1, **line), opacity=0.35)
                fig.add_scatter(x=run["step"], y=run[metric], **thin, showlegend=False, name=label)
        mean = pd.concat(runs).groupby("step", as_index=False)[metric].mean()
        few = len(mean) <= 30
        fig.add_scatter(
            x=mean["step"],
            y=mean[metric],
            mode="lines+markers" if few else "lines",
            line=dict(width=2.5, **line),
            marker=dict(symbol=style["marker"], size=8, color=style["colour"]),
            name=f"{label} (mean of {len(runs)} seeds)" if len(runs) > 1 else label,
            showlegend=True,
        )
    return fig


def small_multiples(
    table: pd.DataFrame, x: str, y: str, panel: str, title: str, x_title: str, y_title: str
) -> go.Figure:
    """One small plot for each value of `panel`, side by side with one y axis: a line for each
    `label` through the means, and every seed's point; `x` is logarithmic."""
    panels = list(dict.fromkeys(table[panel]))
    styles = _styles(dict.fromkeys(table["label"]))
    fig = _figure(title, "", y_title, height=360, legend=dict(x=1, xanchor="right", y=0.5))
    ticks, width = sorted(table[x].unique()), 1 / len(panels)
    ends = [np.log10(ticks[0]) - 0.12, np.log10(ticks[-1]) + 0.12]
    for i, name in enumerate(panels, 1):
        rows, axis = table[table[panel] == name], "x" if i == 1 else f"x{i}"
        for label, style in styles.items():
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
        fig.update_layout({f"xaxis{i}": {**_AXIS, **place, **marks, "title": text}})
    return fig.update_yaxes(range=[-0.04, 1.04])


def bars_by_method(
    table: pd.DataFrame, value: str, title: str, y_title: str, by: str = "method"
) -> go.Figure:
    """Mean bars with every seed's point; the whisker is one standard deviation over the seeds."""
    groups = {str(label): group[value].dropna() for label, group in table.groupby(by, sort=False)}
    fig = _figure(title, "", y_title, showlegend=False)
    for label, style in _styles(groups).items():
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
    fig = _figure(title, size_name, "trained parameters", showlegend=False)
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
    fig = _figure(title, "strength t: 0 is the base, 1 is as trained", y_title)
    for (label, style), dash in zip(_styles(curves).items(), DASHES, strict=False):
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
    fig = _figure(title, x_title, y_title)
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
    fig = _figure(title, "index, largest first", y_title)
    for label, style in _styles(singular_values).items():
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


def attention_pair(
    maps: Mapping[str, Any],
    gates: Mapping[str, Any],
    keys: Sequence[str],
    queries: Sequence[str],
    virtual: int,
    title: str,
) -> go.Figure:
    """One head's attention twice, side by side, with the gate λ of each query beside it.

    `maps` and `gates` have the same two labels: weights (queries, keys) and λ (queries). The first
    `virtual` keys are the prefix; a line stands between them and the text. The colour is the square
    root's: where a row has many keys, all would be dark otherwise.
    """
    traces, moving = attention_parts(maps, gates, keys, queries, virtual, title)
    fig = _figure(title, "", "")
    for i, (label, trace) in enumerate(zip(maps, traces, strict=False), 1):
        fig.add_heatmap(
            **trace, name=label, xaxis=f"x{i}", yaxis="y", coloraxis="coloraxis",
            hovertemplate="query %{y}, key %{x}: %{customdata:.3f}<extra></extra>",
        )  # fmt: skip
    colours = (GREY, COLOURS["prefix_tuning"])
    for label, trace, colour in zip(gates, traces[2:], colours, strict=True):
        fig.add_bar(
            **trace, name=label, orientation="h", xaxis="x3", yaxis="y", marker_color=colour
        )
    domains = ((0.0, 0.33), (0.37, 0.70), (0.77, 1.0))
    names = [f"{label}: prefix | text" for label in maps] + ["λ of each query"]
    for i, (name, domain) in enumerate(zip(names, domains, strict=True), 1):
        heading = dict(text=name, font=dict(size=12))
        axis = dict(title=heading, domain=domain, anchor="y", tickangle=0)
        fig.update_layout({f"xaxis{i}": {**_AXIS, **axis, "showgrid": False}})
    bar = dict(title=dict(text="share", side="top"), tickvals=[0, 0.1**0.5, 0.5**0.5, 1])
    bar |= dict(ticktext=["0", "0.1", "0.5", "1"], thickness=10, x=1.02)
    fig.update_layout(
        coloraxis=dict(colorscale="Cividis", cmin=0, cmax=1, colorbar=bar),
        legend=dict(orientation="h", x=1, xanchor="right", y=1.0, yanchor="bottom"),
        xaxis3=dict(range=[0, 1], tickformat=".1f"),
        yaxis=dict(title_text="query", showgrid=False),
        margin=dict(r=60, b=80),
    )
    return fig.update_layout(moving)


def attention_parts(
    maps: Mapping[str, Any],
    gates: Mapping[str, Any],
    keys: Sequence[str],
    queries: Sequence[str],
    virtual: int,
    title: str,
) -> tuple[list[dict], dict]:
    """What changes in `attention_pair` from one head to the next: its four traces, its layout.

    A panel puts them into the figure that it has; to build another would take longer than the eye
    wants to wait. A token that comes twice keeps two rows.
    """
    rows = list(range(len(queries)))
    weights = [np.asarray(weights, dtype=float) for weights in maps.values()]
    traces: list[dict] = [dict(z=np.sqrt(w), customdata=w) for w in weights]
    traces += [dict(x=np.asarray(share, dtype=float), y=rows) for share in gates.values()]
    small = dict(size=10)
    named = [i for i in range(len(keys)) if i >= virtual or i in (0, virtual - 1)]
    letters = _spelled(keys[i].strip() or keys[i] for i in named)  # narrow: the rows show blanks
    columns = dict(tickvals=named, ticktext=letters, tickfont=small)
    columns |= dict(range=[-0.5, len(keys) - 0.5])
    edge = dict(x0=virtual - 0.5, x1=virtual - 0.5, y0=-0.5, y1=len(queries) - 0.5, type="line")
    edge |= dict(yref="y", line=dict(color="white", width=3))
    return traces, dict(
        title=dict(text=title),
        height=170 + 22 * max(len(queries), 8),
        shapes=[dict(xref=x, **edge) for x in ("x", "x2")],
        xaxis=columns,
        xaxis2=columns,
        yaxis=dict(
            tickvals=rows, ticktext=_spelled(queries), tickfont=small,
            range=[len(queries) - 0.5, -0.5],
        ),
    )  # fmt: skip


def _spelled(tokens: Iterable[str]) -> list[str]:
    """Tokens as they are told apart on an axis: blanks and line ends are visible."""
    return [token.replace(" ", "␣").replace("\n", "⏎") for token in tokens]


def token_bars(
    tokens: Sequence[str], values: Any, title: str, x_title: str, colour: str = BLUE
) -> go.Figure:
    """One horizontal bar a token, the first on top; a token that comes twice keeps two bars."""
    rows = list(range(len(tokens)))
    fig = _figure(title, x_title, "", height=110 + 26 * len(rows))
    fig.add_bar(x=list(values), y=rows, orientation="h", marker_color=colour)
    return fig.update_yaxes(tickvals=rows, ticktext=[repr(t) for t in tokens], autorange="reversed")


CODE_TYPES = {  # data types of four bits
    "nf4": (SKY, "triangle-up-open"),
    "e2m1": (VERMILLION, "square-open"),
    "int4": (BLACK, "circle-open"),
    "fp4": (PURPLE, "x-thin-open"),
}


def code_levels(tables: Mapping[str, Sequence[float]], title: str) -> go.Figure:
    """The levels of data types, one row each, over the normal that weights resemble."""
    fig = _figure(title, "level, as a part of the block's largest weight", "")
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
    fig = _figure(title, "block size, and bits a weight", "error, % of the weights' own size")
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
    fig = _figure(title, "share that is gone", "loss (nats per token)", showlegend=False)
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


PARTS = {  # of the memory of a training step
    "weights": GREY,
    "Adam's moments": PURPLE,
    "gradients": VERMILLION,
    "activations": SKY,
    "around the loss": "#F0E442",
}


def memory_bars(
    moments: Mapping[str, Mapping[str, Mapping[str, int | float]]], title: str
) -> go.Figure:
    """What a training step holds: for each label its moments, for each moment bytes by part."""
    traces = memory_traces(moments)
    fig = _figure(title, "", "bytes", barmode="stack", height=430)
    for (part, colour), trace in zip(PARTS.items(), traces, strict=True):
        fig.add_bar(**trace, name=part, marker_color=colour)
    fig.update_yaxes(tickformat="~s", ticksuffix="B").update_xaxes(tickangle=0, tickfont_size=11)
    return fig.update_layout(margin=dict(b=70), legend=dict(traceorder="reversed"))


def memory_traces(moments: Mapping[str, Mapping[str, Mapping[str, int | float]]]) -> list[dict]:
    """What differs between two of those figures: a stack of bars for each part."""
    pairs = [(label, moment) for label, held in moments.items() for moment in held]
    x = [[label for label, _ in pairs], [moment for _, moment in pairs]]
    return [dict(x=x, y=[moments[a][b].get(part, 0) for a, b in pairs]) for part in PARTS]


def by_layer(
    tables: Mapping[str, Mapping[str, int | float]],
    title: str,
    y_title: str,
    x_title: str = "layer",
) -> go.Figure:
    """One number a layer for each label, in the order of the layers; a missing one is zero."""
    places = list(dict.fromkeys(place for table in tables.values() for place in table))
    places.sort(key=_depth)
    fig = _figure(title, x_title, y_title)
    for label, style in _styles(tables).items():
        fig.add_scatter(
            x=[place.removeprefix("layers.") for place in places],
            y=[tables[label].get(place, 0) for place in places],
            mode="lines+markers",
            line=dict(color=style["colour"], dash=style["dash"]),
            marker=dict(symbol=style["marker"], size=9),
            name=label,
        )
    return fig.update_xaxes(type="category").update_yaxes(rangemode="tozero", tickformat="~s")


def _depth(place: str) -> tuple:
    """Encoder before decoder, input before layers, output behind them."""
    last = place.rsplit(".", 1)[-1]
    inside = {"input": -1, "output": 10**6}.get(last, int(last) if last.isdigit() else 10**6)
    return place.startswith(("decoder", "output")), inside
