"""The memory explorer: the bytes of a training step, for every method."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab import accounting, figures
from peftlab.bases.data import data_path
from peftlab.bases.shapes import Shape, as_shape
from peftlab.memory import MOMENTS
from peftlab.methods import (
    FullFineTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
)
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot

BATCHES = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
VIRTUAL = 20
BESIDE_FULL = {  # what full fine-tuning is compared with; the last name is the legend's
    "Full fine-tuning": FullFineTuning(),
    "LoRA, q and v": LoRA(r=8),
    "LoRA, all linear": LoRA(r=8, target_modules="all-linear"),
    "Prompt tuning": PromptTuning(VIRTUAL),
    "Prefix tuning": PrefixTuning(VIRTUAL),
}


@dataclass(frozen=True)
class Step:
    """Bytes of one training step in float32 on a CPU, part by part.

    `aside` is what waits to be put back: the originals under full fine-tuning. `at_loss` is the
    most at any time of the forward and the backward pass, `at_update` of the update.
    """

    weights: int
    aside: int
    optimiser: int
    gradients: int
    activations: int
    at_loss: int
    at_update: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.at_loss, self.at_update)


@dataclass(frozen=True)
class MemoryView:
    """What the memory explorer shows: the bytes of a step for every method.

    What is kept aside to undo full fine-tuning is not shown.
    """

    model: str
    batch: int
    length: int
    steps: dict[str, Step]

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
            standing = {"weights": step.weights, "Adam's moments": step.optimiser}
            loss = standing | {"activations": step.activations}
            around = step.at_loss - step.aside - sum(loss.values())
            shown[label] = {
                "loss": loss | {"around the loss": around},
                "update": standing | {"gradients": step.gradients},
            }
        return shown

    def figure(self) -> go.Figure:
        return figures.memory_bars(self.moments(), self.text)


def memory_models() -> tuple[str, ...]:
    """Models whose steps were traced."""
    return tuple(sorted(_traces(), key=accounting.base_parameters))


def memory_lengths(model: str | Shape) -> tuple[int, ...]:
    """Tokens that fit beside the virtual ones."""
    most = as_shape(model).context - VIRTUAL
    return tuple(length for length in TOKENS if length <= most)


def value(coefficients: Sequence[int | Fraction], batch: int, length: int) -> int | Fraction:
    """A polynomial: the coefficients of B^i T^j, i = 0 and 1, j = 0 to 2."""
    one, two = (a + length * (b + length * c) for a, b, c in (coefficients[:3], coefficients[3:]))
    return one + batch * two


@lru_cache(maxsize=1)
def _traces() -> dict:
    """What `experiments.trace_memory` found, by model and method."""
    return json.loads(data_path("results", "memory_traces.json").read_text(encoding="utf-8"))[
        "models"
    ]


@lru_cache(maxsize=256)
def memory_view(model: str | Shape, batch: int, length: int) -> MemoryView:
    """The bytes of one training step on `batch` rows of `length` tokens, for `BESIDE_FULL`.

    They are those of `memory.predict`, to the byte, from stored traces; of a single row, whose
    logits a decoder does not copy, they are the most that it can be. Raises ValueError for a model
    without a trace or a batch that does not fit.
    """
    shape = as_shape(model)
    if shape.name not in _traces():
        raise ValueError(f"no trace of {shape.name}; there are: {', '.join(_traces())}")
    for name, given in (("batch", batch), ("length", length)):
        if given < 1:
            raise ValueError(f"{name}={given}: allowed is at least 1")
    if length + VIRTUAL > shape.context:
        raise ValueError(f"{length} tokens and {VIRTUAL} virtual ones: {shape.context} fit")
    steps = {}
    for label, told in _traces()[shape.name].items():
        most = {
            moment: max(value(line, batch, length) for line in told[moment]) for moment in MOMENTS
        }
        parts = ("weights", "aside", "optimiser", "gradients", "activations")
        steps[label] = Step(
            **{part: value(told[part], batch, length) for part in parts},
            at_loss=max(most["forward"], most["backward"]),
            at_update=most["step"],
        )
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
        self.plot = Plot(self.view.figure())
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
        self.plot.change(traces, {"title_text": self.view.text})

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Memory explorer: {self.view.text}"


def memory_explorer(model: str = "gpt2", batch: int = 8, length: int = 128) -> MemoryExplorer:
    """A panel of what a training step holds, for five methods: choose model, rows and tokens."""
    return MemoryExplorer(model, batch, length)
