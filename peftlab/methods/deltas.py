"""What the methods at linear weights share: targets, and one delta for each weight."""

from __future__ import annotations

import torch
from torch import nn

from peftlab.bases import Base, Linear, Shape
from peftlab.methods.checks import checked_targets
from peftlab.methods.method import Attachment, Method
from peftlab.sites import LinearWeight


class Targeted(Method, listed=False):
    """A method at linear weights with certain roles.

    Subclasses are dataclasses with a field `target_modules`: any of q k v o up down gate, as a
    list, or "all-linear".
    """

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "target_modules", checked_targets(self.target_modules))

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

    def matrices(self, shape: Shape) -> list[tuple[int, int, int]]:
        """(copies, d_in, d_out) of every target weight."""
        return [m for target in self.targets(shape.targets) for m in shape.matrices(target)]

    def places(self, base: Base) -> list[Linear]:
        """The target weights."""
        return base.anatomy.select(self.targets(base.anatomy.targets))


class DeltaMethod(Targeted, listed=False):
    """A method that puts a delta beside every target weight.

    Subclasses make the delta (`delta`) and say how many numbers it trains (`size`).
    """

    def delta(
        self, linear: Linear, attachment: Attachment, generator: torch.Generator
    ) -> nn.Module:
        """The delta for this weight as it starts."""
        raise NotImplementedError

    def size(self, d_in: int, d_out: int, where: str = "") -> int:
        """How many numbers train beside a weight of this size, named `where` in an error."""
        raise NotImplementedError

    def reach(self, base, attachment, generator):
        for linear in self.places(base):
            site = LinearWeight(linear, self.delta(linear, attachment, generator))
            attachment.enter(site, site.delta)

    def parameters(self, shape: Shape) -> int:
        """Σ size(d_in, d_out) over the target matrices."""
        return sum(
            copies * self.size(d_in, d_out, target)
            for target in self.targets(shape.targets)
            for copies, d_in, d_out in shape.matrices(target)
        )


def sharing(targets: tuple[str, ...], shape: Shape) -> list[str]:
    """The targets that this family holds in one matrix. ValueError unless there are two."""
    shared = [target for target in targets if target in shape.fused]
    if len(shared) < 2:
        have = f"holds {', '.join(shape.fused)} in one" if shape.fused else "has none in common"
        raise ValueError(
            f"fused=True with {', '.join(targets)}: two targets in one "
            f"matrix are needed, and {shape.family} {have}"
        )
    return shared
