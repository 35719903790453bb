"""What the methods beside linear weights share: targets, and one delta for each weight."""

from __future__ import annotations

import torch
from torch import nn

from peftlab.bases import Linear, Shape
from peftlab.methods.method import Attachment, Method
from peftlab.sites import LinearWeight


class DeltaMethod(Method, listed=False):
    """A method that puts a delta beside every target weight.

    Subclasses are dataclasses with a field `target_modules`: any of q k v o up down gate, as a
    list, or "all-linear". They make the delta (`delta`) and say what it trains (`size`).
    """

    def __post_init__(self):
        targets = self.target_modules
        if targets != "all-linear":
            if not isinstance(targets, list | tuple) or not targets:
                raise ValueError(
                    f"target_modules={targets!r}: give a list of targets, such as ['q', 'v'], "
                    "or 'all-linear'"
                )
            object.__setattr__(self, "target_modules", tuple(dict.fromkeys(targets)))  # once each

    def targets(self, available: tuple[str, ...]) -> tuple[str, ...]:
        """The targets on a model that has these; ValueError for one that it has not."""
        if self.target_modules == "all-linear":
            return available
        for target in self.target_modules:
            if target not in available:
                raise ValueError(
                    f"unknown target {target!r}: this model has {', '.join(available)}"
                )
        return self.target_modules

    def delta(
        self, linear: Linear, attachment: Attachment, generator: torch.Generator
    ) -> nn.Module:
        """The delta for this weight as it starts."""
        raise NotImplementedError

    def size(self, d_in: int, d_out: int, where: str = "") -> int:
        """How many numbers train beside a weight of this size, named `where` in an error."""
        raise NotImplementedError

    def places(self, base) -> list[Linear]:
        """The weights that a delta goes beside."""
        return base.anatomy.select(self.targets(base.anatomy.targets))

    def reach(self, base, attachment, generator):
        for linear in self.places(base):
            delta, weight = self.delta(linear, attachment, generator), linear.weight
            delta.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            attachment.sites.append(attachment.stack.enter_context(LinearWeight(linear, delta)))
            attachment.modules[linear.name] = delta
            for name, parameter in delta.named_parameters():
                attachment.trainable[f"{self.name}.{linear.name}.{name}"] = parameter

    def parameters(self, shape: Shape) -> int:
        """Σ size(d_in, d_out) over the target matrices."""
        return sum(
            copies * self.size(d_in, d_out, target)
            for target in self.targets(shape.targets)
            for copies, d_in, d_out in shape.matrices(target)
        )


def check_rank(name: str, r: int, d_in: int, d_out: int, where: str) -> None:
    """Raise ValueError if a rank is above what a matrix of this size can have."""
    most = min(d_in, d_out)
    if r > most:
        raise ValueError(f"{name}={r} at {where} ({d_out}×{d_in}): allowed is 1 to {most}")
