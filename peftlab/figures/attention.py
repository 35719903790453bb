"""What attention looks at, and what tokens weigh."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from peftlab.figures.style import AXIS, BLUE, COLOURS, GREY, figure


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
    fig = figure(title, "", "")
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
        fig.update_layout({f"xaxis{i}": {**AXIS, **axis, "showgrid": False}})
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
    ends = [0, virtual - 1] if virtual > 3 else [0][:virtual]  # two narrow columns: one name
    named = [*ends, *range(virtual, len(keys))]
    letters = _spelled(keys[i].strip() or keys[i] for i in named)  # narrow: the rows show blanks
    at = [i - 0.6 if 0 < i < virtual else i for i in named]  # clear of the first word's name
    columns = dict(tickvals=at, ticktext=letters, tickfont=small)
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
    fig = figure(title, x_title, "", height=110 + 26 * len(rows))
    fig.add_bar(x=list(values), y=rows, orientation="h", marker_color=colour)
    return fig.update_yaxes(tickvals=rows, ticktext=[repr(t) for t in tokens], autorange="reversed")
