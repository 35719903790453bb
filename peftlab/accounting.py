"""The costs of adapting, in closed form: parameters, storage, memory. Needs no weights.

A model is a name (see `bases.shapes.names()`), a transformers config, a base, or a `Shape`.

    >>> from peftlab.methods import LoRA
    >>> count(LoRA(r=8), "gpt2")
    294912
    >>> file_bytes(LoRA(r=8), "gpt2")
    1179648
"""

from dataclasses import dataclass
from math import floor, log10
from typing import Any

from peftlab.bases.shapes import as_shape
from peftlab.bases.tape import Plan, Tape, record

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of one number


def count(method: Any, model: Any) -> int:
    """How many parameters `method` trains on `model`."""
    return method.parameters(as_shape(model))


def stored(method: Any, model: Any) -> int:
    """How many numbers the saved adapter holds, without those thrown away after training."""
    return method.stored(as_shape(model))


def base_parameters(model: Any) -> int:
    """The number of parameters of the model itself; tied ones count once."""
    return as_shape(model).parameters()


def percent(method: Any, model: Any) -> float:
    """Trained parameters as a percentage of the base's own."""
    return 100 * count(method, model) / base_parameters(model)


def file_bytes(method: Any, model: Any, dtype: str = "float32") -> int:
    """Bytes of the stored tensors. The file on disk adds a header with names and shapes."""
    return method.file_bytes(as_shape(model), _width(dtype))


@dataclass(frozen=True)
class Ledger:
    """Bytes that training holds from step to step, without the activations of a step."""

    weights: int
    gradients: int
    adam: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.adam


def training_bytes(method: Any, model: Any, dtype: str = "float32") -> Ledger:
    r"""Weights, gradients and Adam's two moments.

        frozen · b  +  trained · (4 + 4 + 8)      b: bytes of a frozen number, by `dtype`

    A trained number takes float32 for its weight, its gradient and each of Adam's two moments. A
    frozen number needs neither gradient nor moments, and its `dtype` can be narrower; weights that
    a method holds as codes take the codes' bytes. Not counted: activations, temporary buffers, and
    the copies of the originals with which full fine-tuning and codes can be undone here.
    """
    base, trained = base_parameters(model), count(method, model)
    coded, codes = method.coded(as_shape(model))
    frozen = (base - trained if method.in_place else base) - coded
    weights = frozen * _width(dtype) + codes + 4 * trained
    return Ledger(weights=weights, gradients=4 * trained, adam=8 * trained)


def saved_activations(
    methods: Any,
    model: Any,
    batch: int = 1,
    length: int = 128,
    targets: int | None = None,
    head: Any = None,
) -> dict[str, int]:
    """Bytes that the forward pass of one training step keeps for its backward pass, by layer.

    `batch` full rows of `length` tokens, in float32, dropout off; T5's decoder writes `targets`
    tokens, as many if not told. What is kept is counted where it is first needed: "input",
    "layers.0", …, "output", of T5 with the stack in front. Parameters and the batch itself are
    not in it. `bases.tape` has the rules.
    """
    return _record(methods, model, batch, length, targets, head).by_place()


def _record(methods, model, batch, length, targets, head) -> Tape:
    shape, targets = as_shape(model), length if targets is None else targets
    for name, value in (("batch", batch), ("length", length), ("targets", targets)):
        if value < 1:
            raise ValueError(f"{name}={value}: allowed is at least 1")
    plan = Plan(shape if head is None else shape.without_head())
    for method in _as_list(methods):
        method.footprint(plan)
    if length + plan.prompt > shape.context:
        raise ValueError(f"{length} tokens and {plan.prompt} virtual ones: {shape.context} fit")
    return record(plan, batch, length, targets, head and head.footprint)


def _as_list(methods: Any) -> list:
    return list(methods) if isinstance(methods, list | tuple) else [methods]


@dataclass(frozen=True)
class Step:
    """Bytes of one training step in float32, part by part.

    `aside` is the copy of the original weights that makes full fine-tuning undoable here, on a CPU
    that of weights held as codes, the masks and originals of pruned ones, and what structured
    pruning took out; `around_it` lives for a moment beside the activations: logits, their copy
    and gradients, or what one layer works on, a decoded weight and the numbers to look it up
    included; `around_update` beside the gradients.
    """

    weights: int
    aside: int
    gradients: int
    adam: int
    activations: int
    around_it: int
    around_update: int

    @property
    def peak(self) -> int:
        """The most at any time: at the loss, or when the gradients are there."""
        standing = self.weights + self.aside + self.adam
        at_loss = self.activations + self.around_it
        return standing + max(at_loss, self.gradients + self.around_update)


def step_bytes(
    methods: Any,
    model: Any,
    batch: int = 1,
    length: int = 128,
    targets: int | None = None,
    head: Any = None,
    device: str = "cpu",
) -> Step:
    """What one training step holds and when; the arguments are those of `saved_activations`.

    On a CPU torch's Adam updates in place; on a GPU it makes the roots of all second moments
    first. A table that embeds tokens and scores them has two gradients and their sum for a moment.
    """
    shape = as_shape(model)
    tape = _record(methods, model, batch, length, targets, head)
    counts = {method: 4 * count(method, tape.plan.shape) for method in _as_list(methods)}
    trained, copied = sum(counts.values()), sum(n for m, n in counts.items() if m.in_place)
    held = [method.coded(tape.plan.shape) for method in counts]
    coded, codes = (sum(numbers) for numbers in zip(*held, strict=True)) if held else (0, 0)
    extra = 0 if head is None else 4 * head.parameters(shape.d_model)
    table = shape.vocab * shape.d_model * 4 if tape.plan.trains("embedding.weight") else 0
    whole = shape if head is None else shape.without_head()
    left = shape.parameters() - whole.parameters() + tape.plan.shape.parameters()
    return Step(
        weights=4 * (left - coded) + codes + tape.plan.standing + trained - copied + extra,
        aside=copied + tape.plan.aside + (4 * coded if device == "cpu" else 0),
        gradients=trained + extra,
        adam=2 * (trained + extra),
        activations=sum(tape.by_place().values()),
        around_it=max(tape.around_loss, tape.around_layer + 6 * tape.plan.decoded),
        around_update=max(
            2 * table if shape.tied else 0, 0 if device == "cpu" else trained + extra
        ),
    )


def readable_bytes(size: int) -> str:
    """Bytes in the decimal units that file browsers show.

    >>> readable_bytes(1_179_648)
    '1.2 MB'
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def readable_percent(part: int, whole: int) -> str:
    """The percentage with three significant digits, never with an exponent.

    >>> readable_percent(294_912, 124_439_808)
    '0.237%'
    """
    value = 100 * part / whole
    return f"{value:.{max(0, 2 - floor(log10(value)))}f}%"


def _width(dtype: str) -> int:
    if dtype not in BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: {', '.join(BYTES)}")
    return BYTES[dtype]
