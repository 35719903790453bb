"""The costs of adapting, in closed form: parameters, storage, what training holds for good.

Needs no weights. All that a step holds is traced: see `memory.predict`.

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
