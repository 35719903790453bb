"""The code explorer: quantise a weight, and read the error."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import ipywidgets as widgets
import plotly.graph_objects as go
import torch

from peftlab import figures
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot
from peftlab.sites.quantisation import (
    QUANT_TYPES,
    bits_per_weight,
    check_block_size,
    quantise,
    table,
)

BLOCK_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class HashedWeight:
    """A weight that a cache can hold: the same one is itself alone."""

    values: torch.Tensor


@lru_cache(maxsize=8)
def _code_errors(weight: HashedWeight, double_quant: bool) -> dict[str, dict[int, float]]:
    """RMS error over RMS weight, by data type and block size."""
    values = weight.values

    def error(kind: str, block: int) -> float:
        off = quantise(values, block, kind, double_quant).dequantise() - values
        return (off.norm() / values.norm()).item()

    sizes = block_sizes(values)
    return {kind: {block: error(kind, block) for block in sizes} for kind in QUANT_TYPES}


def block_sizes(weight: torch.Tensor) -> tuple[int, ...]:
    """The block sizes that a slider offers: those that divide the number of weights."""
    return tuple(size for size in BLOCK_SIZES if weight.numel() % size == 0)


@dataclass(frozen=True)
class CodeView:
    """What the code explorer shows for one setting; `errors` by data type and block size."""

    name: str
    quant_type: str
    block_size: int
    double_quant: bool
    bits: float
    errors: Mapping[str, Mapping[int, float]]

    @property
    def error(self) -> float:
        """RMS error as a part of the RMS of the weights."""
        return self.errors[self.quant_type][self.block_size]

    @property
    def text(self) -> str:
        return (
            f"{self.quant_type}, blocks of {self.block_size}: {self.bits:.3f} bits a weight,"
            f" error {self.error:.1%} of the weights' size"
        )

    def figure(self) -> go.Figure:
        sizes = self.errors[self.quant_type]
        bits = {size: bits_per_weight(size, self.double_quant) for size in sizes}
        now = (self.quant_type, self.block_size)
        return figures.code_errors(self.errors, bits, now, f"{self.name}: {self.text}")


def code_view(
    weight: torch.Tensor | HashedWeight,
    block_size: int = 64,
    quant_type: str = "nf4",
    double_quant: bool = True,
    name: str = "weights",
) -> CodeView:
    """Bits and error of one weight in codes, and the errors at every other setting.

    Raises ValueError for a block size that does not divide, and for an unknown data type.
    """
    weight = weight if isinstance(weight, HashedWeight) else HashedWeight(weight)
    check_block_size(block_size, weight.values.numel(), name)
    table(quant_type)
    errors = _code_errors(weight, double_quant)
    bits = bits_per_weight(block_size, double_quant)
    return CodeView(name, quant_type, block_size, double_quant, bits, errors)


class CodeExplorer(Panel):
    """See `code_explorer`."""

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self.weights = {name: HashedWeight(w.detach().float()) for name, w in weights.items()}
        first = next(iter(self.weights))
        wide = {"description_width": "110px"}
        self.weight = widgets.Dropdown(options=list(weights), description="weight", style=wide)
        self.quant_type = widgets.Dropdown(
            options=list(QUANT_TYPES), description="data type", style=wide
        )
        self.block_size = widgets.SelectionSlider(
            options=block_sizes(self.weights[first].values),
            value=64,
            description="block size",
            style=wide,
            layout=widgets.Layout(width="460px"),
        )
        self.double_quant = widgets.Checkbox(value=True, description="scales in 8 bits too")
        self.answer = widgets.HTML()
        self.controls = {
            "weight": self.weight,
            "type": self.quant_type,
            "block": self.block_size,
            "double": self.double_quant,
        }
        for name, widget in (*self.controls.items(), ("answer", self.answer)):
            widget.add_class(f"peftlab-code-{name}")
        self.view = self._view()
        self.plot = Plot(self.view.figure())
        top = widgets.HBox([self.weight, self.quant_type])
        below = widgets.HBox([self.block_size, self.double_quant])
        self.widget = widgets.VBox([top, below, self.answer, self.plot])
        for widget in self.controls.values():
            widget.observe(self._changed, "value")
        self._changed()

    def _view(self) -> CodeView:
        name = self.weight.value
        return code_view(
            self.weights[name],
            self.block_size.value,
            self.quant_type.value,
            self.double_quant.value,
            name,
        )

    def _changed(self, _=None) -> None:
        sizes = block_sizes(self.weights[self.weight.value].values)
        if self.block_size.options != sizes:  # another weight, which other sizes divide
            size = self.block_size.value
            self.block_size.options = sizes
            self.block_size.value = max((s for s in sizes if s <= size), default=sizes[0])
        self.view = self._view()
        self.answer.value = f"<b style='font-size:1.25em'>{self.view.text}</b>"
        self.plot.draw(self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Code explorer: {self.view.name}, {self.view.text}"


def code_explorer(weights: Mapping[str, torch.Tensor]) -> CodeExplorer:
    """A panel that quantises: choose a weight, a data type and a block size, and read the error."""
    return CodeExplorer(weights)
