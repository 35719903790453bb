"""The interface of a method: hyper-parameters, a closed form for its size, and its sites."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from peftlab.bases import Base, Shape
from peftlab.methods.attachment import Attachment
from peftlab.methods.checks import check_choice, require
from peftlab.methods.watch import watch

METHODS: dict[str, type[Method]] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method's hyper-parameters. Subclasses are frozen dataclasses, so they print and compare.

    A subclass implements `reach` and `parameters`; everything else has a default that fits most
    methods. Its annotated fields are the hyper-parameters; `name`, `limits` and the like have no
    annotation there. `METHODS`, and thus saved adapters, list it by its `name`, unless it has
    `listed=False`, as a method of a single experiment or test does.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-3
    in_place: ClassVar[bool] = False  # True: the base's own parameters train
    limits: ClassVar[dict[str, tuple]] = {}  # the range of a hyper-parameter: lowest, highest
    choices: ClassVar[dict[str, tuple]] = {}  # or its allowed values
    start_is_stored: ClassVar[bool] = False  # True: the initial value of each number is saved too
    stored_width: ClassVar[int | None] = None  # bytes of a stored number that is not a float
    codes: ClassVar[Method | None] = None  # the method that holds the base's weights as codes

    def __init_subclass__(cls, listed: bool = True, **kwargs):
        super().__init_subclass__(**kwargs)
        if listed:
            METHODS[cls.name] = cls

    def __post_init__(self):
        """Raise ValueError for a hyper-parameter out of range, saying what is allowed."""
        for name, limits in self.limits.items():
            require(name, getattr(self, name), *limits)
        for name, allowed in self.choices.items():
            check_choice(name, getattr(self, name), allowed)

    def attach(self, base: Base, generator: torch.Generator, headless: bool = False) -> Attachment:
        """Reach the sites and create the parameters. On an error nothing stays attached."""
        attachment = Attachment(self, base, headless)
        try:
            watch(base)
            self.reach(base, attachment, generator)
        except BaseException:
            attachment.leave()
            raise
        return attachment

    def reach(self, base: Base, attachment: Attachment, generator: torch.Generator) -> None:
        """Enter this method's sites, and draw the initial values from the generator."""
        raise NotImplementedError

    def parameters(self, shape: Shape) -> int:
        """How many numbers train, in closed form."""
        raise NotImplementedError

    def folded(self) -> Method:
        """The method that the stored tensors belong to: itself, unless a part is not stored."""
        return self

    def stored(self, shape: Shape) -> int:
        """How many numbers a saved adapter holds."""
        return self.folded().parameters(shape) * (2 if self.start_is_stored else 1)

    def file_bytes(self, shape: Shape, width: int = 4) -> int:
        """Bytes of the stored numbers, with `width` bytes for a trained one."""
        return self.stored(shape) * (self.stored_width or width)

    def coded(self, shape: Shape) -> tuple[int, int]:
        """How many weights of the base are held as codes, and the bytes of those codes."""
        return (0, 0) if self.codes is None else self.codes.coded(shape)

    def rate(self, name: str) -> float:
        """The learning rate of this trained tensor, as a multiple of the method's rate."""
        return 1.0

    def after_step(self, attachment: Attachment, step: int, steps: int) -> None:
        """Called after each training step, from 1 to `steps`, before the gradients are cleared."""

    def to_dict(self) -> dict:
        """Name and hyper-parameters, ready for JSON."""
        return {"method": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(config: dict) -> Method:
        """The inverse of `to_dict`. Raises ValueError for an unknown method or hyper-parameter."""
        if not isinstance(config, dict):
            raise ValueError(f"a method is described by a dict, not by {config!r}")
        options = dict(config)
        name = options.pop("method", None)
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}: known are {', '.join(sorted(METHODS))}")
        try:
            return METHODS[name](**options)
        except TypeError as error:
            raise ValueError(f"bad hyper-parameters for {name}: {error}") from error
