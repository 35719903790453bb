"""Curves that grow in a cell's output while it trains."""

from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go
from IPython.display import clear_output, display

from peftlab import figures


class LiveCurve:
    """An `on_step` for `train`: it redraws the loss every `every` steps and at the last of `steps`.

    `beside` are the histories of earlier runs, by label; `histories` are these and this run's.
    """

    def __init__(
        self,
        label: str,
        steps: int,
        title: str,
        beside: dict[str, pd.DataFrame] | None = None,
        every: int = 10,
    ):
        self.label, self.steps, self.title, self.every = label, steps, title, every
        self.histories, self.records = dict(beside or {}), []

    def __call__(self, record: dict) -> None:
        """Note one step; `record` has at least "step" and "loss"."""
        self.records.append(record)
        self.histories[self.label] = pd.DataFrame(self.records)
        if record["step"] % self.every == 0 or record["step"] == self.steps:
            clear_output(wait=True)
            figure = figures.learning_curves(self.histories, title=self.title)
            display(figure.update_layout(legend=dict(x=0.99, y=0.99, xanchor="right")))


class LiveShares:
    """An `on_step` for `train(eval_every=…)`: it redraws the named scores whenever dev is scored.

    `names` are metrics of the task that are shares; `looks` holds the records so far.
    """

    def __init__(self, names: tuple[str, ...], title: str, y_title: str):
        self.names, self.title, self.y_title = names, title, y_title
        self.looks: list[dict] = []

    def figure(self) -> go.Figure:
        """A line for each score, over the steps so far."""
        table = pd.DataFrame(self.looks, columns=["step", *self.names])
        lines = {
            name.replace("_", " "): table.rename(columns={name: "share"}) for name in self.names
        }
        drawn = figures.learning_curves(lines, "share", self.title, self.y_title)
        return drawn.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")

    def __call__(self, record: dict) -> None:
        """Note one step if it has the scores."""
        if set(self.names) <= record.keys():
            self.looks.append({key: record[key] for key in ("step", *self.names)})
            clear_output(wait=True)
            display(self.figure())


class LiveLooks:
    """An `on_step` for `train`: every `every` steps it looks, and redraws what it saw so far.

    `look(step)` returns numbers by name; `draw(table)` makes a figure of the table of all looks,
    which has "step", "loss" (the mean since the last look) and those numbers. `first` is what was
    seen before step 1, if it shall be drawn.
    """

    def __init__(self, look: Callable, draw: Callable, every: int, first: dict | None = None):
        self.look, self.draw, self.every = look, draw, every
        self.looks: list[dict] = [] if first is None else [first]
        self._losses: list[float] = []

    @property
    def table(self) -> pd.DataFrame:
        """One row for each look so far."""
        return pd.DataFrame(self.looks)

    def __call__(self, record: dict) -> None:
        """Note one step; `record` has "step" and "loss"."""
        self._losses.append(record["loss"])
        if record["step"] % self.every == 0:
            loss, self._losses = sum(self._losses) / len(self._losses), []
            self.looks.append({"step": record["step"], "loss": loss, **self.look(record["step"])})
            clear_output(wait=True)
            display(self.draw(self.table))
