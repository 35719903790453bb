"""NF4: the frozen weights held as codes of four bits, and nothing to train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from peftlab.bases import Base, Linear, Shape, fused
from peftlab.methods.deltas import DeltaMethod
from peftlab.methods.method import Method
from peftlab.quantisation import check_block_size, held_bytes, table
from peftlab.sites import CodedWeight


@dataclass(frozen=True)
class NF4(Method):
    r"""Frozen weights in four bits.

        W̃ = m · T[c]      c (d_out, d_in) codes of 4 bits,  T the 16 levels,  m one a block
        y = W̃ x + b       W̃ is decoded for this product, and again for its gradient

    Trained and stored: nothing; the codes are made of the base's own weights. It stands before a
    method that trains: `[NF4(), LoRA(r=8)]`. A block is `block_size` numbers along a row of W, and
    the next row where it ends; `double_quant` writes the m's in 8 bits. `quant_type` is nf4, or
    for comparison fp4, e2m1 or int4. Biases, norms and embeddings stay as they are, and so does
    the language model's head.

    `target_modules` are logical, but what is coded is the module: GPT-2's q, k and v are one, and
    naming one of them codes all three. The originals wait on the CPU for `detach`.

    Dettmers et al. 2023, arXiv:2305.14314, section 3: 4-bit NormalFloat, double quantisation.
    """

    block_size: int = 64
    double_quant: bool = True
    quant_type: str = "nf4"
    target_modules: tuple[str, ...] | list[str] | str = "all-linear"

    name: ClassVar[str] = "nf4"
    title: ClassVar[str] = "NF4"

    def __post_init__(self):
        check_block_size(self.block_size)
        table(self.quant_type)
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant={self.double_quant!r}: allowed is True, False")
        DeltaMethod.__post_init__(self)

    targets = DeltaMethod.targets  # named and refused as of a method with deltas

    def reach(self, base, attachment, generator):
        options = dataclasses.asdict(self)
        del options["target_modules"]
        places = self._places(base)
        for linear in places:  # all are checked before the first is coded
            check_block_size(self.block_size, linear.d_out * linear.d_in, linear.name)
        for linear in places:
            site = attachment.stack.enter_context(CodedWeight(linear, **options))
            attachment.sites.append(site)

    def _places(self, base: Base) -> list[Linear]:
        """The whole modules that play a target's role."""
        chosen = base.anatomy.select(self.targets(base.anatomy.targets))
        modules = {linear.module for linear in chosen}
        return [
            linear
            for linear in fused(list(base.anatomy.linears.values()))
            if linear.module in modules
        ]

    def parameters(self, shape: Shape) -> int:
        """None."""
        return 0

    def coded(self, shape: Shape) -> tuple[int, int]:
        """Σ d_in d_out over the coded modules, and the bytes of their codes and scales."""
        weights = size = 0
        for copies, n, target in self._sizes(shape):
            check_block_size(self.block_size, n, target)
            weights += copies * n
            size += copies * held_bytes(n, self.block_size, self.double_quant)
        return weights, size

    def _sizes(self, shape: Shape) -> Iterator[tuple[int, int, str]]:
        """How many modules of how many weights, and a target in them."""
        targets = self.targets(shape.targets)
        if set(shape.fused) & set(targets):
            parts = [matrix for target in shape.fused for matrix in shape.matrices(target)]
            yield parts[0][0], sum(d_in * d_out for _, d_in, d_out in parts), shape.fused[0]
        for target in targets:
            if target not in shape.fused:
                for copies, d_in, d_out in shape.matrices(target):
                    yield copies, d_in * d_out, target

    def footprint(self, plan):
        """A frozen product keeps nothing but its weight, and that is codes."""
        plan.decoded = max(n for _, n, _ in self._sizes(plan.shape))
