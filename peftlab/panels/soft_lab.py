"""The soft prompt lab: what lets a prompt or a prefix train, at which learning rate."""

import json
from dataclasses import dataclass
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go

from peftlab import figures
from peftlab.bases.data import data_path
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot

SOFT_LAB = {  # what varies: a row's name in the heat map, its label in soft_lab.json
    ("prompt", "start"): {
        "tokens": "prompt, vocabulary",
        "text": "prompt, text",
        "uniform ±0.5": "prompt, random",
        "normal": "prompt, normal",
        "zeros": "prompt, zero",
    },
    ("prefix", "start"): {
        "tokens": "prefix, vocabulary",
        "text": "prefix, text",
        "N(0, 1)": "prefix, random",
        "zeros": "prefix, zero",
    },
    **{
        (method, "length"): {
            f"P = {P}": f"{method}, vocabulary" if P == 20 else f"{method}, P = {P}"
            for P in (1, 5, 20, 50, 100)
        }
        for method in ("prompt", "prefix")
    },
    ("prompt", "maker"): {
        "none": "prompt, vocabulary",
        "LSTM": "prompt, lstm",
        "MLP": "prompt, mlp",
        "attention": "prompt, attention",
    },
    ("prefix", "maker"): {"none": "prefix, vocabulary", "MLP": "prefix, MLP"},
}
SOFT_METRICS = {  # column of the file, how the seeds become a colour, what counts as trained
    "exact match, mean": ("exact", "mean", 0.95),
    "exact match, worst seed": ("exact", "min", 0.95),
    "loss at the end": ("loss_last", "mean", 0.05),
}


@lru_cache(maxsize=1)
def _soft_runs() -> pd.DataFrame:
    """The lab's runs: mean, min and max over the seeds for each label and learning rate."""
    lab = json.loads(data_path("results", "soft_lab.json").read_text(encoding="utf-8"))
    runs = pd.DataFrame(lab["runs"])
    groups = runs.groupby(["label", "lr"])[["exact", "loss_last"]]
    return groups.agg(["mean", "min", "max", "count"]).round(6)  # alike on every processor


@dataclass(frozen=True)
class SoftLabView:
    """What the lab shows for one choice; `values` is (rows, rates), NaN where nothing was run."""

    method: str
    vary: str
    metric: str
    rows: tuple[str, ...]
    rates: tuple[float, ...]
    values: np.ndarray
    texts: np.ndarray
    seeds: int

    @property
    def trained(self) -> int:
        """How many settings pass the metric's bar."""
        column, _, bar = SOFT_METRICS[self.metric]
        return int((self.values <= bar if column == "loss_last" else self.values >= bar).sum())

    @property
    def text(self) -> str:
        column, _, bar = SOFT_METRICS[self.metric]
        goal = f"end below {bar:g} nats" if column == "loss_last" else f"reach {bar:.0%}"
        run = int(np.isfinite(self.values).sum())
        return f"{self.method} by {self.vary}: {self.trained} of {run} settings {goal}"

    def parts(self) -> tuple[dict, dict]:
        """What differs between two views: of the trace, and of the layout."""
        loss = SOFT_METRICS[self.metric][0] == "loss_last"
        ticks = dict(tickvals=[0, 0.5, 1], ticktext=["0", "0.5", "1"], title_text="share")
        scale = dict(zmin=0, zmax=1, reversescale=False)
        if loss:
            ticks = dict(tickvals=[-3, -2, -1, 0], ticktext=["0.001", "0.01", "0.1", "1"])
            ticks["title_text"] = "nats"
            scale = dict(zmin=-3.7, zmax=1, reversescale=True)
        trace = dict(
            z=np.log10(self.values).round(4) if loss else self.values,
            x=[f"{rate:g}" for rate in self.rates],
            y=list(self.rows),
            text=self.texts,
            colorbar=ticks,
            **scale,
        )
        title = f"{self.text[0].upper()}{self.text[1:]} ({self.metric})"
        rates = f"learning rate ({self.seeds} seeds a cell)"
        return trace, dict(title_text=title, xaxis_title_text=rates)

    def figure(self) -> go.Figure:
        """A heat map in which bright is good; losses on a logarithmic scale of colours."""
        trace, layout = self.parts()
        fig = figures.heat_map(trace["z"])
        fig.update_traces(trace | dict(texttemplate="%{text}", textfont_size=12, hoverinfo="skip"))
        category = dict(xaxis_type="category", yaxis_type="category")
        return fig.update_layout(layout | category, margin_l=110, height=420)


def soft_lab_view(method: str, vary: str, metric: str) -> SoftLabView:
    """One table of the lab in data/results/soft_lab.json: sorting letters, 150 steps, tiny-gpt.

    Raises ValueError for a choice that the lab does not have.
    """
    if (method, vary) not in SOFT_LAB:
        raise ValueError(f"no lab of a {method} by {vary}; there are {list(SOFT_LAB)}")
    if metric not in SOFT_METRICS:
        raise ValueError(f"unknown metric {metric!r}; allowed: {', '.join(SOFT_METRICS)}")
    labels, (column, how, _) = SOFT_LAB[method, vary], SOFT_METRICS[metric]
    found = _soft_runs().loc[list(labels.values()), column]
    table = {part: found[part].unstack().loc[list(labels.values())] for part in found}
    low, high = table["min"].to_numpy(), table["max"].to_numpy()
    values = table[how].to_numpy()
    texts = [
        "" if np.isnan(v) else f"{v:.2g}" if how == "min" else f"{v:.2g}<br>{lo:.2g} – {hi:.2g}"
        for v, lo, hi in zip(values.flat, low.flat, high.flat, strict=True)
    ]
    return SoftLabView(
        method,
        vary,
        metric,
        tuple(labels),
        tuple(table["mean"].columns),
        values,
        np.array(texts, dtype=object).reshape(values.shape),
        int(found["count"].min()),
    )


class SoftPromptLab(Panel):
    """See `soft_prompt_lab`."""

    def __init__(self, method: str, vary: str, metric: str):
        self.view = soft_lab_view(method, vary, metric)
        style = {"description_width": "60px"}
        offered = {
            "method": (list(dict.fromkeys(m for m, _ in SOFT_LAB)), method),
            "vary": (list(dict.fromkeys(v for _, v in SOFT_LAB)), vary),
            "metric": (list(SOFT_METRICS), metric),
        }
        self.choices = {
            name: widgets.Dropdown(options=options, value=value, description=name, style=style)
            for name, (options, value) in offered.items()
        }
        for name, widget in self.choices.items():
            widget.add_class(f"peftlab-lab-{name}")
            widget.observe(self._changed, "value")
        self.plot = Plot(self.view.figure())
        self.widget = widgets.VBox([widgets.HBox(list(self.choices.values())), self.plot])

    def _changed(self, _=None) -> None:
        self.view = soft_lab_view(**{name: w.value for name, w in self.choices.items()})
        trace, layout = self.view.parts()
        self.plot.change([trace], layout)

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Soft prompt lab: {self.view.text} ({self.view.metric})"


def soft_prompt_lab(
    method: str = "prompt", vary: str = "start", metric: str = "exact match, mean"
) -> SoftPromptLab:
    """A panel over the stored lab: what lets a prompt or a prefix train, at which learning rate."""
    return SoftPromptLab(method, vary, metric)
