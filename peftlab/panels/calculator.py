"""The calculator: does a training step of a real model fit a GPU?"""

from dataclasses import dataclass
from functools import lru_cache

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab import figures
from peftlab.accounting import readable_bytes
from peftlab.bases.shapes import Shape
from peftlab.memory import calculator
from peftlab.memory.calculator import DTYPES, GPUS, KINDS, MODELS, RESERVE, Told, calculate, room
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot

ROWS = (1, 2, 4, 8, 16, 32, 64)
ROW_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class FitsView:
    """What the calculator shows."""

    told: Told
    size: int
    batch: int
    length: int
    dtype: str
    checkpointing: bool

    @property
    def gpus(self) -> tuple[str, ...]:
        """Those on which it fits."""
        return tuple(name for name in GPUS if self.told.fits(name))

    @property
    def name(self) -> str:
        """The setting in words."""
        kind = KINDS[self.told.kind]
        size = f" ({kind.size} {self.size})" if kind.size else ""
        again = " with checkpointing" if self.checkpointing else ""
        return (
            f"{self.told.kind}{size} of {self.told.model}, {self.batch} × {self.length} tokens, "
            f"{self.dtype}{again}"
        )

    @property
    def text(self) -> str:
        smallest = min(self.gpus, key=room, default=None)
        fits = f"fits from the {smallest} on" if smallest else "fits none of these GPUs"
        return f"{readable_bytes(self.told.peak)} at the peak: {fits}"

    def figure(self) -> go.Figure:
        moments = {moment: self.told.parts(moment) for moment in ("loss", "update")}
        free = {name: room(name) - RESERVE for name in GPUS}
        title = self.name.replace(f", {self.dtype}", f",<br>{self.dtype}")
        return figures.fits_bars(moments, free, title)


@lru_cache(maxsize=512)
def fits_view(
    model: str,
    kind: str,
    size: int = 0,
    batch: int = 1,
    length: int = 512,
    dtype: str = "bfloat16",
    checkpointing: bool = True,
) -> FitsView:
    """The bytes of one step, and where it fits; see `memory.calculator.calculate`."""
    size = (size or KINDS[kind].usual) if kind in KINDS else size
    told = calculate(model, kind, size, batch, length, dtype, checkpointing)
    return FitsView(told, size, batch, length, dtype, checkpointing)


def row_lengths(model: str, kind: str) -> tuple[int, ...]:
    """Tokens that fit the model, beside the largest prompt."""
    virtual = max(KINDS[kind].sizes) if KINDS[kind].size == "virtual tokens" else 0
    return tuple(n for n in ROW_TOKENS if n + virtual <= Shape.named(model).context)


class FitsPanel(Panel):
    """See `fits`."""

    def __init__(self, **start):
        wide = dict(
            style={"description_width": "130px"},
            layout=widgets.Layout(width="480px", max_width="98%"),
        )
        view = fits_view(**start)
        kind = view.told.kind
        self.model = widgets.Dropdown(
            options=MODELS, value=view.told.model, description="model", **wide
        )
        self.kind = widgets.Dropdown(options=tuple(KINDS), value=kind, description="method", **wide)
        self.size = widgets.SelectionSlider(
            options=calculator.sizes_of(view.told.model, kind),
            value=view.size,
            description=KINDS[kind].size,
            **wide,
        )
        self.batch = widgets.SelectionSlider(
            options=ROWS, value=view.batch, description="rows", **wide
        )
        self.length = widgets.SelectionSlider(
            options=row_lengths(view.told.model, kind), value=view.length,
            description="tokens a row", **wide,
        )  # fmt: skip
        self.dtype = widgets.ToggleButtons(
            options=DTYPES, value=view.dtype, description="type", style=wide["style"]
        )
        self.checkpointing = widgets.Checkbox(
            value=view.checkpointing, description="checkpointing", **wide
        )
        self.answer = widgets.HTML()
        self.controls = [self.model, self.kind, self.size, self.batch, self.length, self.dtype]
        self.controls.append(self.checkpointing)
        for name in ("model", "kind", "size", "batch", "length", "dtype", "checkpointing"):
            getattr(self, name).add_class(f"peftlab-fits-{name}")
        self.answer.add_class("peftlab-fits-answer")
        self.view = view
        self.plot = Plot(view.figure())
        self.widget = widgets.VBox([*self.controls, self.answer, self.plot])
        for control in self.controls:
            control.observe(self._changed, "value")
        self._shown()

    def _changed(self, _=None) -> None:
        for control in self.controls:
            control.unobserve(self._changed, "value")
        self._allowed()
        for control in self.controls:
            control.observe(self._changed, "value")
        model, kind = self.model.value, self.kind.value
        how = dict(dtype=self.dtype.value, checkpointing=self.checkpointing.value)
        if calculator.key(model, kind, *how.values()) not in calculator.kept():
            self.answer.value = "small steps are taken first, which lasts half a minute ..."
        try:
            self.view = fits_view(
                model, kind, self.size.value, self.batch.value, self.length.value, **how
            )
        except ValueError as error:  # the model does not take this method
            self.answer.value = f"<b>{error}</b>"
            return
        self._shown()

    def _allowed(self) -> None:
        """Sizes are those of the method, sizes and lengths those that the model has room for."""
        kind = KINDS[self.kind.value]
        sizes = calculator.sizes_of(self.model.value, self.kind.value)
        if self.size.options != sizes:
            same, now = self.size.description == kind.size, self.size.value
            wanted = now if same and now in sizes else min(kind.usual, sizes[-1])
            self.size.options, self.size.value = sizes, wanted
            self.size.description = kind.size
        lengths = row_lengths(self.model.value, self.kind.value)
        if self.length.options != lengths:
            now = max(n for n in lengths if n <= max(self.length.value, lengths[0]))
            self.length.options, self.length.value = lengths, now

    def _shown(self) -> None:
        self.answer.value = f"<b style='font-size:1.25em'>{self.view.text}</b>"
        self.plot.draw(self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Calculator: {self.view.name}: {self.view.text}"


def fits(model: str = "llama-3-8b", kind: str = "QLoRA", **start) -> FitsPanel:
    """A panel that says what a training step of a real model takes, and which GPU has room for it:
    choose model, method, its size, rows, tokens, type and checkpointing."""
    return FitsPanel(model=model, kind=kind, **start)
