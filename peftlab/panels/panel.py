"""What every panel has: widgets, a plot, and a figure for where no kernel runs."""

import json
import sys

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import display

from peftlab.panels.plot import Plot, Script

WIDGET = "application/vnd.jupyter.widget-view+json"
STILL = "application/vnd.peftlab.still+json"  # a Plotly figure that stands for the panel


class Panel:
    """A widget, and a figure of its state for where no kernel runs."""

    widget: widgets.Widget
    plot: Plot | None = None  # a panel may show text alone

    def static(self) -> go.Figure:
        """The figure that stands for the panel."""
        raise NotImplementedError

    def describe(self) -> str:
        """The panel in one line of text."""
        raise NotImplementedError

    def close(self) -> None:
        """Close every widget of the panel; ipywidgets keeps each until it is closed. The script
        that draws stays: other panels draw with it."""
        open_, found = [self.widget], []
        while open_:
            widget = open_.pop()
            if widget not in found and not isinstance(widget, Script):
                found.append(widget)
                for key in widget.keys:
                    value = getattr(widget, key)
                    parts = value if isinstance(value, list | tuple) else [value]
                    open_ += [part for part in parts if isinstance(part, widgets.Widget)]
        for widget in found:
            widget.close()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        """What is shown, the same under ipywidgets 7, which Colab has, and 8."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        still = json.loads(self.static().to_json())
        return {WIDGET: view, "text/plain": self.describe(), STILL: still}

    def _ipython_display_(self) -> None:
        """Colab draws a widget that is displayed, and none that a cell returns."""
        if "google.colab" not in sys.modules:
            raise NotImplementedError  # so IPython takes the bundle
        display(self._repr_mimebundle_(), raw=True)
