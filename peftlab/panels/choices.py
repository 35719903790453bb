"""The methods as a slider offers them: made from one size and a set of targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from peftlab import accounting
from peftlab.bases.shapes import Shape, as_shape
from peftlab.methods import (
    FullFineTuning,
    HoulsbyAdapter,
    LoRA,
    Method,
    ParallelAdapter,
    PfeifferAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
)
from peftlab.methods.prompt_starts import PREFIX_INITS, PROMPT_INITS

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)
TARGETS = ("q", "k", "v", "o", "up", "down", "gate")


@dataclass(frozen=True)
class Choice:
    """How a method is made from one size and a set of targets, as a slider offers them.

    `in_context` says that the virtual tokens take places of the model's context.
    """

    build: Callable[[int, tuple[str, ...]], Method]
    size_name: str
    sizes: tuple[int, ...]
    start: int
    targeted: bool = False
    in_context: bool = False


CHOICES = {
    "LoRA": Choice(
        lambda size, targets: LoRA(r=size, alpha=2 * size, target_modules=targets),
        "rank r",
        RANKS,
        8,
        targeted=True,
    ),
    "Prompt tuning": Choice(
        lambda size, _: PromptTuning(num_virtual_tokens=size),
        "virtual tokens P",
        LENGTHS,
        20,
        in_context=True,
    ),
    "Prefix tuning": Choice(
        lambda size, _: PrefixTuning(num_virtual_tokens=size), "virtual tokens P", LENGTHS, 20
    ),
    "P-tuning v2": Choice(
        lambda size, _: PTuningV2(num_virtual_tokens=size), "virtual tokens P", LENGTHS, 20
    ),
    "P-tuning, LSTM": Choice(
        lambda size, _: PTuning(num_virtual_tokens=size, sizes="peft"),
        "virtual tokens P",
        LENGTHS,
        20,
        in_context=True,
    ),
    "P-tuning, MLP": Choice(
        lambda size, _: PTuning(num_virtual_tokens=size, encoder="mlp", sizes="peft"),
        "virtual tokens P",
        LENGTHS,
        20,
        in_context=True,
    ),
    **{
        name: Choice(lambda size, _, kind=kind: kind(size), "bottleneck m", RANKS, 8)
        for name, kind in (
            ("Houlsby adapter", HoulsbyAdapter),
            ("Pfeiffer adapter", PfeifferAdapter),
            ("Parallel adapter", ParallelAdapter),
        )
    },
    "Full fine-tuning": Choice(lambda *_: FullFineTuning(), "no size to choose", RANKS, 8),
}


def build_method(name: str, size: int, targets: Sequence[str] = ("q", "v")) -> Method:
    """The method that a panel's controls describe; it takes of size and targets what it has."""
    if name not in CHOICES:
        raise ValueError(f"unknown method {name!r}; allowed: {', '.join(CHOICES)}")
    return CHOICES[name].build(size, tuple(targets))


def starts(method: Method) -> tuple[str, ...]:
    """Where a soft prompt may start, its own default first; none for other methods.

    A start from a text is left out: a slider cannot say which text.
    """
    known = {PromptTuning: PROMPT_INITS, PrefixTuning: PREFIX_INITS}.get(type(method), ())
    return tuple(init for init in known if init != "text")


def allowed_sizes(name: str, targets: Sequence[str], model: str | Shape) -> tuple[int, ...]:
    """The sizes a slider offers: no rank above a target's smaller side, no prompt that fills it."""
    choice, shape = CHOICES[name], as_shape(model)
    most = shape.context - 1 if choice.in_context else max(choice.sizes)
    if choice.targeted:
        most = min(min(i, o) for t in targets for _, i, o in shape.matrices(t))
    return tuple(size for size in choice.sizes if size <= most)


@lru_cache(maxsize=256)
def _counts(name: str, targets: tuple[str, ...], shape: Shape) -> dict[int, int]:
    """Trained parameters at every size that the slider offers."""
    sizes = allowed_sizes(name, targets, shape)
    return {size: accounting.count(build_method(name, size, targets), shape) for size in sizes}
