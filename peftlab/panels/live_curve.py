"""A curve that grows in a cell's output while it trains."""

import pandas as pd
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
