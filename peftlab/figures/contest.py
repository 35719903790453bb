"""A comparison of methods: every seed a point, the interval of the mean, and the references."""

from itertools import cycle

import plotly.graph_objects as go

from peftlab.bench.results import Result
from peftlab.figures.style import BLACK, BLUE, GREY, figure
from peftlab.figures.theme import theme


def score_intervals(result: Result, title: str) -> go.Figure:
    """The test score of every entry, the highest mean on top, one point a seed.

    A bar is the 95% interval of the mean over seeds and test examples. Broken lines are the
    references: the untuned base and the commonest answer, or others that are recorded.
    """
    told = result.comparisons.sort_values("mean", kind="stable")
    labels = told["label"].tolist()
    fig = figure(
        title, f"test score, {result.main.replace('_', ' ')}", "", height=90 + 30 * len(told)
    )
    runs = result.runs
    fig.add_scatter(
        x=runs[result.main], y=runs["label"], mode="markers", name="one seed",
        marker=dict(color=BLUE, size=7, opacity=0.5),
    )  # fmt: skip
    low, high = (told["interval"].str[i] for i in (0, 1))
    fig.add_scatter(
        x=told["mean"], y=labels, mode="markers", name="mean, 95% interval",
        marker=dict(color=theme().line(BLACK), symbol="line-ns-open", size=12),
        error_x=dict(
            symmetric=False, color=theme().line(BLACK), thickness=1.5,
            array=high - told["mean"], arrayminus=told["mean"] - low,
        ),
    )  # fmt: skip
    if len(result.references):
        means = result.references.groupby("label")[result.main].mean()
        for (label, score), dash in zip(
            means.items(), cycle(("dash", "dot", "dashdot")), strict=False
        ):
            line = dict(color=GREY, dash=dash)
            fig.add_vline(x=score, line=line)
            fig.add_scatter(
                x=[None], y=[None], mode="lines", line=line, name=f"{label.lower()}, {score:.0%}"
            )
    fig.update_layout(
        xaxis=dict(range=[-0.05, 1.05], tickformat=".0%"),
        yaxis=dict(categoryorder="array", categoryarray=labels, automargin=True),
        legend=dict(orientation="h", y=-0.22, yanchor="top", x=0),
        margin=dict(b=90),
    )
    return fig
