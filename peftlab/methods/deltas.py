"""The common part of the methods at linear weights: targets, and one delta for each weight."""

from torch import Generator, nn

from peftlab.bases import Base, Linear, Shape
from peftlab.methods.method import Attachment, Method
from peftlab.sites import LinearWeight


class Targeted(Method, listed=False):
    """A method at linear weights with certain roles.

    Subclasses are dataclasses. `target_modules`: a list of q k v o up down gate, or "all-linear".
    """

    def __post_init__(self):
        super().__post_init__()
        targets = self.target_modules
        if targets == "all-linear":
            return
        if not isinstance(targets, list | tuple) or not targets:
            needed = "give a list of targets, such as ['q', 'v'], or 'all-linear'"
            raise ValueError(f"target_modules={targets!r}: {needed}")
        object.__setattr__(self, "target_modules", tuple(dict.fromkeys(targets)))  # once each

    def targets(self, available: tuple[str, ...]) -> tuple[str, ...]:
        """The targets on a model with the available ones; ValueError for an unavailable target."""
        if self.target_modules == "all-linear":
            return available
        for target in self.target_modules:
            if target not in available:
                known = ", ".join(available)
                raise ValueError(f"unknown target {target!r}: this model has {known}")
        return self.target_modules

    def matrices(self, shape: Shape) -> list[tuple[int, int, int]]:
        """(copies, d_in, d_out) of every target weight."""
        return [m for target in self.targets(shape.targets) for m in shape.matrices(target)]

    def places(self, base: Base) -> list[Linear]:
        """The target weights."""
        return base.anatomy.select(self.targets(base.anatomy.targets))


class DeltaMethod(Targeted, listed=False):
    """A method that puts a delta beside every target weight.

    Subclasses make the delta (`delta`) and say how many numbers it trains (`size`). `rank` names
    the field with the delta's rank, at most that of each target matrix; None sets no limit.
    """

    rank = "r"

    def delta(self, linear: Linear, attachment: Attachment, generator: Generator) -> nn.Module:
        """The delta for this weight, with its initial values."""
        raise NotImplementedError

    def size(self, d_in: int, d_out: int) -> int:
        """How many numbers train beside a weight of this size."""
        raise NotImplementedError

    def check(self, d_in: int, d_out: int, where: str) -> None:
        """Raise ValueError if the rank is above the largest rank of a matrix of this size."""
        most = min(d_in, d_out)
        if self.rank is not None and (r := getattr(self, self.rank)) > most:
            raise ValueError(f"{self.rank}={r} at {where} ({d_out}×{d_in}): allowed is 1 to {most}")

    def reach(self, base, attachment, generator):
        for linear in self.places(base):
            self.check(linear.d_in, linear.d_out, linear.name)
            site = LinearWeight(linear, self.delta(linear, attachment, generator))
            attachment.enter(site, site.delta)

    def parameters(self, shape: Shape) -> int:
        """Σ size(d_in, d_out) over the target matrices."""
        total = 0
        for target in self.targets(shape.targets):
            for copies, d_in, d_out in shape.matrices(target):
                self.check(d_in, d_out, target)
                total += copies * self.size(d_in, d_out)
        return total


def sharing(targets: tuple[str, ...], shape: Shape) -> list[str]:
    """The targets that this family stores in one matrix. ValueError for fewer than two."""
    shared = [target for target in targets if target in shape.fused]
    if len(shared) < 2:
        have = f"holds {', '.join(shape.fused)} in one" if shape.fused else "has none in common"
        needed = f"two targets in one matrix are needed, and {shape.family} {have}"
        raise ValueError(f"fused=True with {', '.join(targets)}: {needed}")
    return shared
