"""The gate in the plane: what a prefix can do to one output, and what it cannot."""

from dataclasses import dataclass
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab.figures import prefix as drawn
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot

GATE_SUMS = (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)  # of the prefix; that of the text is 4
GATE_SPLITS = (0, 0.25, 0.5, 0.75, 1)  # what the first of the two tokens gets of the text's part
TEXT_SUM, TEXT_VALUES, PREFIX_VALUE = 4, ((4.0, 0.0), (0.0, 4.0)), (0.0, 8.0)


@dataclass(frozen=True)
class GateView:
    """One output between the text and the prefix.

    `prefix_sum` is the sum of e^score over the prefix, `split` the part of token 1 among the words.
    """

    prefix_sum: int | float
    split: int | float

    @property
    def gate(self) -> int | float:
        return self.prefix_sum / (self.prefix_sum + TEXT_SUM)

    @property
    def alone(self) -> tuple[int | float, int | float]:
        """Attention to the text alone."""
        one, two = TEXT_VALUES
        x, y = (self.split * a + (1 - self.split) * b for a, b in zip(one, two, strict=True))
        return x, y

    @property
    def output(self) -> tuple[int | float, int | float]:
        mixed = zip(self.alone, PREFIX_VALUE, strict=True)
        x, y = ((1 - self.gate) * a + self.gate * b for a, b in mixed)
        return x, y

    @property
    def text(self) -> str:
        x, y = self.output
        return (
            f"λ = {self.prefix_sum:g} / ({self.prefix_sum:g} + {TEXT_SUM}) = {self.gate:.2f}: the "
            f"output ({x:.2f}, {y:.2f}) lies {self.gate:.0%} of the way to the prefix"
        )

    @property
    def shown(self) -> tuple:
        """What `figures.prefix.gate_plane` and `gate_parts` take."""
        title = f"λ = {self.gate:.2f}: from the text {self.gate:.0%} of the way to the prefix"
        return TEXT_VALUES, self.alone, PREFIX_VALUE, self.output, self.gate, title

    def figure(self) -> go.Figure:
        return drawn.gate_plane(*self.shown)


def gate_view(prefix_sum: int | float = 4, split: int | float = 0.5) -> GateView:
    """One setting. Raises ValueError for one that the sliders do not have."""
    for name, value, all_ in (
        ("prefix_sum", prefix_sum, GATE_SUMS),
        ("split", split, GATE_SPLITS),
    ):
        if value not in all_:
            raise ValueError(f"{name}={value}: allowed are {', '.join(f'{v:g}' for v in all_)}")
    return GateView(prefix_sum, split)


class GateLab(Panel):
    """See `gate_lab`."""

    def __init__(self, prefix_sum: int | float, split: int | float):
        self.view = gate_view(prefix_sum, split)
        options = dict(style={"description_width": "170px"}, layout=widgets.Layout(width="460px"))
        self.prefix_sum = widgets.SelectionSlider(
            options=[(f"{v:g}", v) for v in GATE_SUMS],
            value=prefix_sum,
            description="e^score of the prefix",
            **options,
        )
        self.split = widgets.SelectionSlider(
            options=[(f"{v:.0%}", v) for v in GATE_SPLITS],
            value=split,
            description="query: token 1 gets",
            **options,
        )
        self.text = widgets.HTML(f"<b>{escape(self.view.text)}</b>")
        for name in ("prefix_sum", "split", "text"):
            getattr(self, name).add_class(f"peftlab-gate-{name.replace('_', '-')}")
        self.plot = Plot(self.view.figure())
        self.widget = widgets.VBox([self.prefix_sum, self.split, self.text, self.plot])
        for slider in (self.prefix_sum, self.split):
            slider.observe(self._changed, "value")

    def _changed(self, _=None) -> None:
        self.view = gate_view(self.prefix_sum.value, self.split.value)
        self.text.value = f"<b>{escape(self.view.text)}</b>"
        self.plot.change(*drawn.gate_parts(*self.view.shown))

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Gate lab: {self.view.text}"


def gate_lab(prefix_sum: int | float = 4, split: int | float = 0.5) -> GateLab:
    """A panel with one output of attention in the plane: two words, and a prefix of one.

    The prefix's slider moves the output between the text and the prefix; only the query's moves
    the text along the line between its words.
    """
    return GateLab(prefix_sum, split)
