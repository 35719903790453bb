"""What every panel has: widgets, a figure for where no kernel runs, and a smooth redraw."""

import json
import sys
from collections.abc import Sequence

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import display

WIDGET = "application/vnd.jupyter.widget-view+json"
STILL = "application/vnd.peftlab.still+json"  # a Plotly figure that stands for the panel


class Plot(go.FigureWidget):
    """A figure whose channel to the page opens with all that there is to draw.

    Plotly opens it empty and sends the data in a second message, and a page that is busy may draw
    in between: empty axes, which no later message fills.
    """

    _complete = False

    def __init__(self, figure: go.Figure):
        super().__init__(figure)
        self._complete = True
        self.open()

    def open(self) -> None:
        """Open the channel, once there is something to say."""
        if self._complete:
            super().open()


class Panel:
    """A widget, and a figure of its state for where no kernel runs."""

    widget: widgets.Widget
    plot: go.FigureWidget

    def static(self) -> go.Figure:
        """The figure that stands for the panel."""
        raise NotImplementedError

    def describe(self) -> str:
        """The panel in one line of text."""
        raise NotImplementedError

    def close(self) -> None:
        """Close every widget of the panel; ipywidgets keeps each until it is closed."""
        open_, found = [self.widget, self.plot], []
        while open_:
            widget = open_.pop()
            if widget not in found:
                found.append(widget)
                for key in widget.keys:
                    value = getattr(widget, key)
                    parts = value if isinstance(value, list | tuple) else [value]
                    open_ += [part for part in parts if isinstance(part, widgets.Widget)]
        for widget in found:
            widget.close()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        self.plot._repr_mimebundle_()  # hands the figure's latest state to the browser's copy
        return self._bundle(json.loads(self.static().to_json()))

    def _bundle(self, still: dict) -> dict:
        """What is shown, the same under ipywidgets 7, which Colab has, and 8."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return {WIDGET: view, "text/plain": self.describe(), STILL: still}

    def _ipython_display_(self) -> None:
        """Colab draws a widget that is displayed, and none that a cell returns."""
        if "google.colab" not in sys.modules:
            raise NotImplementedError  # so IPython takes the bundle
        display(self._repr_mimebundle_(), raw=True)


def replace_parts(plot: go.FigureWidget, traces: Sequence[dict], layout: dict) -> None:
    """Show what differs between two states of one figure, in one message to the page."""
    with plot.batch_update():
        for old, new in zip(plot.data, traces, strict=True):
            old.update(new)
        plot.layout.update(layout)


def redraw(plot: go.FigureWidget, figure: go.Figure) -> None:
    """Give `plot` the traces and titles of `figure`, in one message and without a flicker."""
    with plot.batch_update():
        for old, new in zip(plot.data, figure.data, strict=True):
            old.update(new.to_plotly_json(), overwrite=False)
        plot.layout.update(
            title=figure.layout.title,
            annotations=figure.layout.annotations,
            xaxis=figure.layout.xaxis,
            yaxis=figure.layout.yaxis,
        )
