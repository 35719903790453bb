"""Does it fit? The peak of one training step of a real model on a GPU, part by part.

    told = calculate("llama-3-8b", "QLoRA", size=16, batch=1, length=512, dtype="bfloat16")
    told.peak, told.parts("loss"), told.fits("RTX 4090")

The numbers are those of `memory.predict(..., device="cuda")`. Every allocation of a step is a
polynomial in rows B, tokens T and the method's size s (a rank, a width, a number of virtual
tokens), and it grows evenly with the number of layers. So a few small steps on tensors
without numbers tell of every B, T and s, at the model's own depth, and after them an answer takes
milliseconds. `data/results/calculator_traces.json` keeps what they told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache

import numpy as np

from peftlab import accounting
from peftlab.bases.data import data_path
from peftlab.bases.shapes import Shape, named_config
from peftlab.memory.curves import DEPTH, DEPTHS, Curves, alike
from peftlab.memory.step import MOMENTS, How, followed
from peftlab.memory.traced import WORKSPACE, Gpu, blank, rows
from peftlab.methods import (
    IA3,
    BitFit,
    DoRA,
    FullFineTuning,
    HoulsbyAdapter,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    QLoRA,
)
from peftlab.methods.heads import Classification

GIB = 2**30
RESERVE = GIB  # what CUDA's own context takes, and what the allocator cannot fill
# Memory as the driver reports it, in MiB: it is less than the name says where ECC takes a part.
GPUS = {
    "T4 16 GB": 15360,
    "L4 24 GB": 23034,
    "A10 24 GB": 23028,
    "RTX 4090 24 GB": 24564,
    "A100 40 GB": 40960,
    "A100 80 GB": 81920,
    "H100 80 GB": 81559,
    "H200 141 GB": 143771,
}
MODELS = (  # those that the traces are kept of, smallest first
    *("smollm2-135m", "bert-large", "smollm2-360m", "qwen2.5-0.5b", "t5-large", "llama-3.2-1b"),
    *("qwen2.5-1.5b", "smollm2-1.7b", "t5-3b", "qwen2.5-3b", "llama-3.2-3b", "llama-2-7b"),
    *("mistral-7b", "qwen2.5-7b", "llama-3-8b", "t5-11b", "llama-2-13b", "qwen2.5-14b"),
    *("qwen2.5-32b", "llama-2-70b", "llama-3-70b", "qwen2.5-72b"),
)


@dataclass(frozen=True)
class Kind:
    """A method of the calculator: how it is made, what its size is called, and its usual sizes."""

    make: Callable[[int], Method]
    size: str = ""
    usual: int = 0
    sizes: tuple[int, ...] = (0,)


RANKS, VIRTUAL, WIDTHS = (4, 8, 16, 32, 64, 128, 256), (8, 16, 32, 64, 128), (8, 16, 32, 64, 128)
KINDS = {
    "Full fine-tuning": Kind(lambda _: FullFineTuning()),
    "LoRA, q and v": Kind(lambda r: LoRA(r=r), "rank", 8, RANKS),
    "LoRA": Kind(lambda r: LoRA(r=r, target_modules="all-linear"), "rank", 16, RANKS),
    "QLoRA": Kind(lambda r: QLoRA(r=r), "rank", 16, RANKS),
    "DoRA": Kind(lambda r: DoRA(r=r, target_modules="all-linear"), "rank", 16, RANKS),
    "Prompt tuning": Kind(PromptTuning, "virtual tokens", 32, VIRTUAL),
    "Prefix tuning": Kind(PrefixTuning, "virtual tokens", 32, VIRTUAL),
    "Houlsby adapter": Kind(HoulsbyAdapter, "bottleneck", 64, WIDTHS),
    "(IA)³": Kind(lambda _: IA3()),
    "BitFit": Kind(lambda _: BitFit()),
}
DTYPES = ("float32", "bfloat16")
PARTS = ("weights", "aside", "optimiser", "gradients", "activations")

# 1, T, T², s, sT, s², and these times B.
POWERS = [(b, t, s) for b in (0, 1) for t, s in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2))]
# Multiples of 32: kernels of attention round up to them.
PLACES = [(b, 32 * (1 + t), 32 * (1 + s)) for b, t, s in POWERS]
PLACES = [(2 + b, t, s) for b, t, s in PLACES]
WHERE = [
    (b, t, s)
    for b in (2**i for i in range(11))
    for t in (2**i for i in range(4, 16))
    for s in (1, 8, 32, 128, 512)
]


@cache
def sizes_of(model: str, kind: str) -> tuple[int, ...]:
    """The sizes of a method that this model has room for, such as ranks up to its smallest matrix;
    all of them if the model does not take the method at any."""
    shape, found = Shape.named(model), []
    for size in KINDS[kind].sizes:
        with suppress(ValueError):
            KINDS[kind].make(size).parameters(shape)
            found.append(size)
    return tuple(found) or KINDS[kind].sizes


def degree(kind: str) -> int:
    """The highest power of a method's size: virtual tokens may meet each other in attention."""
    return {"": 0, "virtual tokens": 2}.get(KINDS[kind].size, 1)


def terms(batch: int, length: int, size: int, degree: int) -> np.ndarray:
    """The monomials at one place, up to this power of the size."""
    powers = [power for power in POWERS if power[2] <= degree]
    return np.array([batch**b * length**t * size**s for b, t, s in powers], float)


def places(degree: int) -> list[tuple[int, int, int]]:
    """Rows, tokens and size of the steps that are traced: as many as there are monomials."""
    return [at for at, power in zip(PLACES, POWERS, strict=True) if power[2] <= degree]


@cache
def _inverse(degree: int) -> np.ndarray:
    """From the values at `places` to the coefficients, exact until it is written as floats."""
    rows = [[Fraction(int(x)) for x in terms(*place, degree)] for place in places(degree)]
    n = len(rows)
    rows = [row + [Fraction(i == j) for j in range(n)] for i, row in enumerate(rows)]
    for i in range(n):  # Gauss and Jordan
        pivot = next(j for j in range(i, n) if rows[j][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(n):
            if j != i and rows[j][i]:
                factor = rows[j][i]
                rows[j] = [x - factor * y for x, y in zip(rows[j], rows[i], strict=True)]
    return np.array([[float(x) for x in row[n:]] for row in rows])


def trace(model: str, kind: str, dtype: str, checkpointing: bool) -> dict[str, list]:
    """The polynomials of a step at the model's own depth: of each part, and of what is alive after
    those allocations that are the most somewhere, around the "loss" and at the "update"."""
    config = named_config(model)
    (layers,) = {config[key] for key in DEPTH if key in config}
    low, high = (_of_depth(model, kind, dtype, checkpointing, depth) for depth in DEPTHS)
    deep = layers - DEPTHS[0]
    told: dict[str, list] = {
        part: (low[part] + (high[part] - low[part]) * deep).tolist() for part in PARTS
    }
    grid = np.array([terms(*where, degree(kind)) for where in WHERE])
    for name, moments in (("loss", ("forward", "backward")), ("update", ("step",))):
        lines = np.array(
            [
                one + (more - one) * deep
                for moment in moments
                for one, more in alike(low[moment], high[moment])
            ]
        )
        highest = sorted(set((grid @ lines.T).argmax(axis=1).tolist()))
        told[name] = np.unique(lines[highest], axis=0).tolist()
    return told


def _of_depth(model: str, kind: str, dtype: str, checkpointing: bool, depth: int) -> dict:
    """Coefficients of the parts, and of what is alive after each allocation of each moment, with
    what made it and how large it was."""
    config = named_config(model)
    config |= {key: depth for key in DEPTH if key in config}
    how = How("cuda", dtype, checkpointing, again=Gpu)
    at, found = places(degree(kind)), {}
    for size in dict.fromkeys(size for _, _, size in at):
        # What is attached stays for all steps of this size.
        with blank(KINDS[kind].make(size), config, how, head_of(model)) as tuned:
            for place in (place for place in at if place[2] == size):
                counter = Curves()
                memory = followed(tuned, rows(tuned, *place[:2]), how, counter)
                found[place] = memory, counter.curves[1:]
    inverse = _inverse(degree(kind))

    def fitted(sizes: Sequence[int]) -> np.ndarray:
        # Bytes are whole or halves in every monomial; what is left is the rounding of floats.
        return np.round(inverse @ np.array(sizes, float), 3)

    told: dict = {part: fitted([found[place][0].bytes(part) for place in at]) for part in PARTS}
    for index, moment in enumerate(MOMENTS):
        told[moment] = []
        for events in zip(*(found[place][1][index] for place in at), strict=True):
            names, sizes, alive = zip(*events, strict=True)
            told[moment].append(((names, sizes), fitted(alive)))
    return told


def head_of(model: str) -> Classification | None:
    """What an encoder carries: it has no head of its own. None for a language model."""
    return None if Shape.named(model).head == "lm" else Classification(("no", "yes"))


def key(model: str, kind: str, dtype: str, checkpointing: bool) -> str:
    """The name under which a trace is kept."""
    return f"{model} | {kind} | {dtype}{' | checkpointing' * checkpointing}"


@lru_cache(maxsize=1)
def kept() -> dict[str, dict]:
    """The traces that `python -m peftlab.experiments.trace_calculator` wrote, by `key`."""
    path = data_path("results", "calculator_traces.json")
    return json.loads(path.read_text(encoding="utf-8"))["traces"] if path.exists() else {}


@lru_cache(maxsize=512)
def traced(model: str, kind: str, dtype: str, checkpointing: bool) -> dict[str, np.ndarray]:
    """A trace that is kept, or else one made now, which takes seconds."""
    told = kept().get(key(model, kind, dtype, checkpointing))
    told = told or trace(model, kind, dtype, checkpointing)
    return {name: np.array(value) for name, value in told.items()}


@dataclass(frozen=True)
class Told:
    """Bytes of one training step on a GPU.

    `aside` is what peftlab keeps to undo full fine-tuning. Nobody else does, so `peak` is without
    it, and `peak_here` is what this package takes. `codes` is a part of the weights, and so are
    the `adapters`. The update's peak is with the gradients, that of the loss with the activations.
    """

    model: str
    kind: str
    weights: int
    codes: int
    adapters: int
    optimiser: int
    gradients: int
    activations: int
    aside: int
    at_loss: int
    at_update: int

    @property
    def peak(self) -> int:
        """The most at any time of the step."""
        return self.peak_here - self.aside

    @property
    def peak_here(self) -> int:
        """The same with the originals that peftlab keeps aside."""
        return max(self.at_loss, self.at_update)

    @property
    def moment(self) -> str:
        """When the peak is: at the "loss" or at the "update"."""
        return "loss" if self.at_loss >= self.at_update else "update"

    def parts(self, moment: str) -> dict[str, int]:
        """What is there at the "loss" or at the "update"; `buffers` live for a moment only."""
        own = self.weights - self.codes - self.adapters
        found = {"weights": own, "codes": self.codes, "adapters": self.adapters}
        found["optimiser"] = self.optimiser
        if moment == "loss":
            found["activations"], most = self.activations, self.at_loss
        else:
            found["gradients"], most = self.gradients, self.at_update
        return found | {"buffers": most - self.aside - sum(found.values())}

    def fits(self, gpu: str) -> bool:
        """Whether the peak, and the `RESERVE`, are at most the memory of this GPU."""
        return self.peak + RESERVE <= room(gpu)


def room(gpu: str) -> int:
    """The bytes of a GPU. Raises ValueError for one that is not in `GPUS`."""
    if gpu not in GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    return GPUS[gpu] * 2**20


def calculate(
    model: str,
    kind: str,
    size: int | None = None,
    batch: int = 1,
    length: int = 512,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
) -> Told:
    """The bytes of one training step with AdamW; see `memory.predict` for what is assumed.

    `kind` is one of `KINDS`, `size` its rank, width or number of virtual tokens (the usual one if
    not given), and `dtype` that of the arithmetic and of frozen weights: what trains is in float32.
    An encoder carries a head of two classes. Raises ValueError for a setting that is not allowed.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown method {kind!r}; known: {', '.join(KINDS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed is {', '.join(DTYPES)}")
    size = KINDS[kind].usual if size is None or not KINDS[kind].size else size
    for name, given in (("batch", batch), ("length", length), ("size", size or 1)):
        if given < 1:
            raise ValueError(f"{name}={given}: allowed is at least 1")
    shape = Shape.named(model)
    virtual = size if KINDS[kind].size == "virtual tokens" else 0
    if length + virtual > shape.context:
        raise ValueError(f"{model} has room for {shape.context} tokens, not {length + virtual}")
    told, at = traced(model, kind, dtype, checkpointing), terms(batch, length, size, degree(kind))
    sizes = {part: round(float(told[part] @ at)) for part in PARTS}
    method = KINDS[kind].make(size)
    adapters = 0 if method.in_place else 4 * accounting.count(method, shape)
    codes = method.coded(shape)[1]
    loss, update = (round(float((told[moment] @ at).max())) for moment in ("loss", "update"))
    return Told(
        model, kind, codes=codes, adapters=adapters, **sizes,
        at_loss=loss + WORKSPACE, at_update=update,
    )  # fmt: skip
