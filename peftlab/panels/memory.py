"""The memory explorer: the bytes of a training step, for every method."""

from dataclasses import dataclass
from functools import lru_cache

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab import accounting, figures
from peftlab.bases.shapes import Shape, as_shape, names
from peftlab.methods import (
    FullFineTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
)
from peftlab.panels.panel import Panel, replace_parts

BATCHES = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BESIDE_FULL = {  # what full fine-tuning is compared with; the last name is the legend's
    "Full fine-tuning": FullFineTuning(),
    "LoRA, q and v": LoRA(r=8),
    "LoRA, all linear": LoRA(r=8, target_modules="all-linear"),
    "Prompt tuning": PromptTuning(20),
    "Prefix tuning": PrefixTuning(20),
}


@dataclass(frozen=True)
class MemoryView:
    """What the memory explorer shows: the bytes of a step for every method, in float32.

    `steps` are `accounting.Step`s; what is kept aside to undo full fine-tuning is not shown.
    """

    model: str
    batch: int
    length: int
    steps: dict[str, accounting.Step]

    def peak(self, label: str) -> int:
        """The most bytes at any time of the step, without what is kept aside."""
        return self.steps[label].peak - self.steps[label].aside

    @property
    def ratios(self) -> dict[str, float]:
        """How many times a method's peak goes into that of full fine-tuning."""
        full = self.peak("Full fine-tuning")
        return {label: full / self.peak(label) for label in self.steps}

    @property
    def text(self) -> str:
        full = accounting.readable_bytes(self.peak("Full fine-tuning"))
        lora, prompt = (self.ratios[name] for name in ("LoRA, q and v", "Prompt tuning"))
        return (
            f"{full} for full fine-tuning of {self.model} at {self.batch} × {self.length} tokens: "
            f"{lora:.2f} times LoRA, {prompt:.2f} times prompt tuning"
        )

    def moments(self) -> dict[str, dict[str, dict[str, int]]]:
        """Bytes by part at the two moments that can be the peak."""
        shown = {}
        for label, step in self.steps.items():
            standing = {"weights": step.weights, "Adam's moments": step.adam}
            loss = {"activations": step.activations, "around the loss": step.around_it}
            shown[label] = {
                "loss": standing | loss,
                "update": standing | {"gradients": step.gradients},
            }
        return shown

    def figure(self) -> go.Figure:
        return figures.memory_bars(self.moments(), self.text)


def memory_models() -> tuple[str, ...]:
    """Models whose training steps the closed form knows and that have a head of their own."""
    known = [name for name in names() if Shape.named(name).head == "lm"]
    return tuple(sorted(known, key=accounting.base_parameters))


def memory_lengths(model: str | Shape) -> tuple[int, ...]:
    """Tokens that fit beside the virtual ones."""
    most = as_shape(model).context - 20
    return tuple(length for length in TOKENS if length <= most)


@lru_cache(maxsize=256)
def memory_view(model: str | Shape, batch: int, length: int) -> MemoryView:
    """The bytes of one training step on `batch` rows of `length` tokens, for `BESIDE_FULL`.

    Raises ValueError for a model without a walk or a batch that does not fit.
    """
    shape = as_shape(model)
    steps = {
        label: accounting.step_bytes(method, shape, batch, length)
        for label, method in BESIDE_FULL.items()
    }
    return MemoryView(shape.name, batch, length, steps)


class MemoryExplorer(Panel):
    """See `memory_explorer`."""

    def __init__(self, model: str, batch: int, length: int):
        wide = dict(style={"description_width": "110px"}, layout=widgets.Layout(width="460px"))
        self.model = widgets.Dropdown(
            options=memory_models(), value=model, description="model", **wide
        )
        self.batch = widgets.SelectionSlider(
            options=BATCHES, value=batch, description="rows", **wide
        )
        self.length = widgets.SelectionSlider(
            options=memory_lengths(model), value=length, description="tokens a row", **wide
        )
        self.answer = widgets.HTML()
        for name in ("model", "batch", "length", "answer"):
            getattr(self, name).add_class(f"peftlab-memory-{name}")
        self.view = memory_view(model, batch, length)
        self.plot = go.FigureWidget(self.view.figure())
        controls = [self.model, self.batch, self.length, self.answer]
        self.widget = widgets.VBox([*controls, self.plot])
        for control in controls[:3]:
            control.observe(self._changed, "value")
        self._changed()

    def _changed(self, _=None) -> None:
        lengths = memory_lengths(self.model.value)
        if self.length.options != lengths:
            now = max(length for length in lengths if length <= max(self.length.value, lengths[0]))
            self.length.unobserve(self._changed, "value")
            self.length.options, self.length.value = lengths, now
            self.length.observe(self._changed, "value")
        self.view = memory_view(self.model.value, self.batch.value, self.length.value)
        self.answer.value = f"<b style='font-size:1.25em'>{self.view.text}</b>"
        traces = figures.memory_traces(self.view.moments())
        replace_parts(self.plot, traces, {"title_text": self.view.text})

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Memory explorer: {self.view.text}"


def memory_explorer(model: str = "gpt2", batch: int = 8, length: int = 128) -> MemoryExplorer:
    """A panel of what a training step holds, for five methods: choose model, rows and tokens."""
    return MemoryExplorer(model, batch, length)
