"""The strength explorer: a trained change, turned up and down."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab import figures
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot


@dataclass(frozen=True)
class StrengthView:
    """What the strength explorer shows for one setting; a curve maps a strength to a number."""

    strength: float
    curves: Mapping[str, Mapping[float, float]]
    y_title: str

    @property
    def text(self) -> str:
        here = ", ".join(f"{name} {at[self.strength]:.3g}" for name, at in self.curves.items())
        return f"strength {self.strength:g}: {here}"

    def figure(self) -> go.Figure:
        title = f"{self.text[0].upper()}{self.text[1:]}"
        return figures.strengths(self.curves, self.strength, title, self.y_title)


def strength_view(
    curves: Mapping[str, Mapping[float, float]], strength: float, y_title: str
) -> StrengthView:
    """Every curve at one strength. Raises ValueError for a strength that none was measured at."""
    if not curves or len({tuple(at) for at in curves.values()}) > 1:
        raise ValueError("give one curve or more, all measured at the same strengths")
    measured = next(iter(curves.values()))
    if strength not in measured:
        known = ", ".join(f"{s:g}" for s in measured)
        raise ValueError(f"strength {strength:g} was not measured; there are {known}")
    return StrengthView(strength, curves, y_title)


class StrengthExplorer(Panel):
    """See `strength_explorer`."""

    def __init__(self, curves: Mapping[str, Mapping[float, float]], strength: float, y_title: str):
        self.curves, self.y_title = {k: dict(v) for k, v in curves.items()}, y_title
        self.view = strength_view(self.curves, strength, y_title)
        self.strength = widgets.SelectionSlider(
            options=[(f"{s:g}", s) for s in next(iter(self.curves.values()))],
            value=strength,
            description="strength t",
            style={"description_width": "110px"},
            layout=widgets.Layout(width="460px"),
        )
        self.text = widgets.HTML(f"<b>{escape(self.view.text)}</b>")
        self.strength.add_class("peftlab-strength")
        self.text.add_class("peftlab-strength-text")
        self.plot = Plot(self.view.figure())
        self.widget = widgets.VBox([self.strength, self.text, self.plot])
        self.strength.observe(self._changed, "value")

    def _changed(self, _=None) -> None:
        self.view = strength_view(self.curves, self.strength.value, self.y_title)
        self.text.value = f"<b>{escape(self.view.text)}</b>"
        self.plot.draw(self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Strength explorer: {self.view.text}"


def strength_explorer(
    curves: Mapping[str, Mapping[float, float]], strength: float = 1.0, y_title: str = "loss (nats)"
) -> StrengthExplorer:
    """A panel that turns a trained change up and down: 0 is the base, 1 is as trained.

    `curves` maps a label to {strength: what was measured there}, computed beforehand.
    """
    return StrengthExplorer(curves, strength, y_title)
