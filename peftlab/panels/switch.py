"""The switch: one block of the model, and at each turn another method's tensors in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab import figures
from peftlab.accounting import readable_percent
from peftlab.bases import Base
from peftlab.methods import Method
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot
from peftlab.tuned import attach


@dataclass(frozen=True)
class SwitchView:
    """One position of the switch: what is attached there, counted, and its drawing."""

    label: str
    parameters: int
    base: int
    drawing: go.Figure

    @property
    def text(self) -> str:
        share = readable_percent(self.parameters, self.base)
        return f"{self.label}: {self.parameters:,} parameters train, {share} of the model"

    def figure(self) -> go.Figure:
        return self.drawing


def switch_views(base: Base, methods: Mapping[str, Method]) -> dict[str, SwitchView]:
    """A view of each method, by its label; the base must be free and is left as it was.

    Raises ValueError without a method.
    """
    if not methods:
        raise ValueError("give one method or more, such as {'(IA)³': IA3()}")
    counted = {}
    for label, method in methods.items():
        with attach(base, method) as tuned:
            counted[label] = tuned.count().parameters
    pictures, total = figures.adapter_places(base, methods), base.anatomy.shape.parameters()
    return {
        label: SwitchView(label, counted[label], total, picture)
        for label, picture in pictures.items()
    }


class MethodSwitch(Panel):
    """See `method_switch`."""

    def __init__(self, base: Base, methods: Mapping[str, Method]):
        self.views = switch_views(base, methods)
        self.view = next(iter(self.views.values()))
        self.switch = widgets.ToggleButtons(
            options=list(self.views),
            value=self.view.label,
            description="method",
            style={"description_width": "60px", "button_width": "auto"},
        )
        self.text = widgets.HTML(f"<b>{escape(self.view.text)}</b>")
        self.switch.add_class("peftlab-switch")
        self.text.add_class("peftlab-switch-text")
        self.plot = Plot(self.view.figure())
        self.widget = widgets.VBox([self.switch, self.text, self.plot])
        self.switch.observe(self._changed, "value")

    def _changed(self, _=None) -> None:
        self.view = self.views[self.switch.value]
        self.text.value = f"<b>{escape(self.view.text)}</b>"
        self.plot.draw(self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Method switch: {self.view.text}"


def method_switch(base: Base, methods: Mapping[str, Method]) -> MethodSwitch:
    """A panel that draws one block of a model with the chosen method's tensors at their places.

    `methods` maps a label to a method; each is attached, drawn, and taken off again.
    """
    return MethodSwitch(base, methods)
