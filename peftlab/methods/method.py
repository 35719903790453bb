"""What every method has: hyper-parameters, a closed form for its size, and a way onto a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from peftlab.bases import Base, Shape
from peftlab.bases.tape import Plan

if TYPE_CHECKING:
    from peftlab.soft import Source

METHODS: dict[str, type[Method]] = {}


@dataclasses.dataclass
class Attachment:
    """What a method put on a base: the sites it holds and the parameters that train.

    `sources` are what soft prompts are read from. `frozen` are tensors that are stored beside the
    trained ones, each behind a function, for a move to another device replaces them. `headless`
    says that a head stands in place of the language model's own. `chosen` is the method with what
    it chose on this base said by name. Closing `stack` undoes everything.
    """

    stack: ExitStack
    headless: bool = False
    sites: list = dataclasses.field(default_factory=list)
    trainable: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    modules: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    frozen: dict[str, Callable[[], torch.Tensor]] = dataclasses.field(default_factory=dict)
    virtual_tokens: int = 0
    chosen: Method | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A method's hyper-parameters. Subclasses are frozen dataclasses, so they print and compare.

    A subclass goes by its `name` in `METHODS`, and so in saved adapters, unless `listed=False`:
    an experiment's or a test's own method is nobody else's.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-3
    in_place: ClassVar[bool] = False  # True: what trains are the base's own parameters

    def __init_subclass__(cls, listed: bool = True, **kwargs):
        super().__init_subclass__(**kwargs)
        if listed:
            METHODS[cls.name] = cls

    def attach(self, base: Base, generator: torch.Generator, headless: bool = False) -> Attachment:
        """Reach the sites and create the parameters. On an error nothing stays behind."""
        stack = ExitStack()
        attachment = Attachment(stack, headless)
        try:
            self.reach(base, attachment, generator)
        except BaseException:
            stack.close()
            raise
        return attachment

    def reach(self, base: Base, attachment: Attachment, generator: torch.Generator) -> None:
        """Enter this method's sites on `attachment.stack` and fill in the attachment."""
        raise NotImplementedError

    def parameters(self, shape: Shape) -> int:
        """How many numbers train, in closed form."""
        raise NotImplementedError

    def stored(self, shape: Shape) -> int:
        """How many numbers a saved adapter holds."""
        return self.parameters(shape)

    def file_bytes(self, shape: Shape, width: int = 4) -> int:
        """Bytes of what is stored, with `width` bytes for a trained number."""
        return width * self.stored(shape)

    def coded(self, shape: Shape) -> tuple[int, int]:
        """How many weights of the base are held as codes, and the bytes of those."""
        return 0, 0

    def objection(self, before: list[Method], after: list[Method]) -> str:
        """Why it cannot stand between these methods on one base; "" where it can."""
        return ""

    def rate(self, name: str) -> float:
        """The learning rate of this trained tensor, as a multiple of the method's."""
        return 1.0

    def after_step(self, attachment: Attachment, step: int, steps: int) -> None:
        """Called behind step 1 … steps of training, while the gradients are still there."""

    def footprint(self, plan: Plan) -> None:
        """Put down in the plan what this method adds to a forward pass, site by site.

        `accounting.saved_activations` reads off it what a training step keeps.
        """
        raise ValueError(f"{self.title} does not say what a step with it keeps: no `footprint`")

    def folded(self) -> Method:
        """The method that the stored tensors belong to: itself, unless something is left behind."""
        return self

    def to_dict(self) -> dict:
        """Name and hyper-parameters, ready for JSON."""
        return {"method": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(config: dict) -> Method:
        """The inverse of `to_dict`. Raises ValueError for an unknown method or hyper-parameter."""
        if not isinstance(config, dict):
            raise ValueError(f"a method is described by a dict, not by {config!r}")
        options = {key: value for key, value in config.items() if key != "method"}
        name = config.get("method")
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}: known are {', '.join(sorted(METHODS))}")
        try:
            return METHODS[name](**options)
        except TypeError as error:
            raise ValueError(f"bad hyper-parameters for {name}: {error}") from error


def require(name: str, value, low, high=None) -> None:
    """Raise ValueError unless low ≤ value (≤ high), saying what is allowed."""
    kind = int if isinstance(low, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        needed = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}={value!r}: {needed} is needed")
    if not low <= value <= (value if high is None else high):
        allowed = f"{low} to {high}" if high is not None else f"at least {low}"
        raise ValueError(f"{name}={value}: allowed is {allowed}")


def check_texts(method: Method, score: str) -> None:
    """Raise ValueError unless `calibration` is a list of texts, for this score and no other."""
    texts = method.calibration
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"calibration={texts!r}: a list of texts is needed")
    object.__setattr__(method, "calibration", tuple(texts))
    if (method.score == score) != bool(texts):
        raise ValueError(f"calibration: score={score!r} needs texts to run, and no other does")
