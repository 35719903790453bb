"""The count explorer: choose method, size, targets and model, and read what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab import accounting, figures
from peftlab.bases.shapes import Shape, as_shape, names
from peftlab.panels.choices import CHOICES, TARGETS, _counts, allowed_sizes, build_method
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot


@dataclass(frozen=True)
class CountView:
    """What the count explorer shows for one setting."""

    name: str
    model: str
    size: int
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    parameters: int
    base: int
    file_bytes: int

    @property
    def percent(self) -> float:
        return 100 * self.parameters / self.base

    @property
    def text(self) -> str:
        return (
            f"{self.parameters:,} parameters"
            f" · {accounting.readable_percent(self.parameters, self.base)} of {self.model}"
            f" · {accounting.readable_bytes(self.file_bytes)} in float32"
        )

    def figure(self) -> go.Figure:
        return figures.counts_figure(
            self.sizes,
            self.counts,
            self.size,
            self.model,
            self.base,
            size_name=CHOICES[self.name].size_name,
            label=self.name,
        )


def count_view(name: str, size: int, targets: Sequence[str], model: str | Shape) -> CountView:
    """Parameters, percentage and file size of one setting, and the counts at every other size.

    Raises ValueError for a size that the method does not allow on this model.
    """
    shape = as_shape(model)
    if CHOICES[name].targeted and not targets:
        raise ValueError("choose at least one target")
    method = build_method(name, size, targets)
    parameters = accounting.count(method, shape)
    counts = dict(sorted({**_counts(name, tuple(targets), shape), size: parameters}.items()))
    return CountView(
        name=name,
        model=shape.name,
        size=size,
        sizes=tuple(counts),
        counts=tuple(counts.values()),
        parameters=parameters,
        base=accounting.base_parameters(shape),
        file_bytes=accounting.file_bytes(method, shape),
    )


class CountExplorer(Panel):
    """See `count_explorer`."""

    def __init__(self, model: str, method: str, targets: Sequence[str]):
        choice = CHOICES[method]
        wide = {"description_width": "110px"}
        self.method = widgets.Dropdown(
            options=list(CHOICES), value=method, description="method", style=wide
        )
        models = sorted(names(), key=accounting.base_parameters)
        self.model = widgets.Dropdown(options=models, value=model, description="model", style=wide)
        self.size = widgets.SelectionSlider(
            options=allowed_sizes(method, targets, model),
            value=choice.start,
            description=choice.size_name,
            style=wide,
            layout=widgets.Layout(width="460px"),
        )
        self.targets = {
            target: widgets.ToggleButton(
                value=target in targets,
                description=target,
                tooltip=f"adapt the {target} matrices",
                layout=widgets.Layout(width="62px"),
            )
            for target in TARGETS
        }
        row = widgets.HBox(list(self.targets.values()))
        self.answer = widgets.HTML()
        for widget, name in (
            (self.method, "method"),
            (self.model, "model"),
            (self.size, "size"),
            (row, "targets"),
            (self.answer, "count"),
        ):
            widget.add_class(f"peftlab-{name}")
        self.view = count_view(method, choice.start, targets, model)
        self.plot = Plot(self.view.figure())
        top = widgets.HBox([self.method, self.model])
        self.widget = widgets.VBox([top, self.size, row, self.answer, self.plot])
        self._busy = False
        for widget in (self.method, self.model, self.size, *self.targets.values()):
            widget.observe(self._changed, "value")
        self._changed()

    @property
    def chosen(self) -> list[str]:
        """The targets that are on and that the model has."""
        available = as_shape(self.model.value).targets
        return [t for t in TARGETS if self.targets[t].value and t in available]

    def _changed(self, _=None) -> None:
        if self._busy:  # the changes that this function makes itself
            return
        self._busy = True
        try:
            self._update()
        finally:
            self._busy = False

    def _update(self) -> None:
        name, model, choice = self.method.value, self.model.value, CHOICES[self.method.value]
        for target, button in self.targets.items():
            shown = choice.targeted and target in as_shape(model).targets
            button.layout.display = None if shown else "none"
        if choice.targeted and not self.chosen:
            self.answer.value = "<b>choose at least one target</b>"
            return
        sizes = allowed_sizes(name, self.chosen, model)
        if self.size.description != choice.size_name:  # another method: start anew
            self.size.description = choice.size_name
            size = choice.start
        else:
            size = self.size.value
        if self.size.options != sizes:
            self.size.options = sizes
        self.size.value = max((s for s in sizes if s <= size), default=sizes[0])
        self.size.disabled = name == "Full fine-tuning"
        self.view = count_view(name, self.size.value, self.chosen, model)
        self.answer.value = f"<b style='font-size:1.25em'>{self.view.text}</b>"
        self.plot.draw(self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Count explorer: {self.view.name}, {self.view.text}"


def count_explorer(
    model: str = "gpt2", method: str = "LoRA", targets: Sequence[str] = ("q", "v")
) -> CountExplorer:
    """A panel that counts: choose method, size, targets and model, and read what it costs."""
    return CountExplorer(model, method, targets)
