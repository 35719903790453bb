"""Scores that grow in a cell's output while it trains."""

import pandas as pd
import plotly.graph_objects as go
from IPython.display import clear_output, display

from peftlab import figures


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
