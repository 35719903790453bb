"""NF4: the frozen weights held as codes of four bits, and nothing to train."""

from dataclasses import dataclass

from peftlab.bases import Shape, fused
from peftlab.methods.deltas import Targeted
from peftlab.sites import CodedWeight
from peftlab.sites.quantisation import QUANT_TYPES, check_block_size, held_bytes


@dataclass(frozen=True)
class NF4(Targeted):
    r"""Frozen weights in four bits.

        W̃ = m · T[c]      c (d_out, d_in) codes of 4 bits,  T the 16 levels,  m one a block
        y = W̃ x + b       W̃ is decoded for this product, and again for its gradient

    Trained and stored: nothing; the codes come from the base's own weights. List it before a
    method that trains: `[NF4(), LoRA(r=8)]`. A block is `block_size` numbers along a row of W,
    continued in the next row; `double_quant` writes the m's in 8 bits. `quant_type` is nf4, or
    for comparison fp4, e2m1 or int4. Biases, norms, embeddings and the model's head do not change.

    `target_modules` are logical, but whole modules are coded: GPT-2 has one for q, k and v, so
    naming one of them codes all three. The originals are kept on the CPU for `detach`.

    Dettmers et al. 2023, arXiv:2305.14314, section 3: 4-bit NormalFloat, double quantisation.
    """

    block_size: int = 64
    double_quant: bool = True
    quant_type: str = "nf4"
    target_modules: tuple[str, ...] | list[str] | str = "all-linear"

    name = "nf4"
    title = "NF4"
    choices = {"double_quant": (True, False), "quant_type": QUANT_TYPES}

    def __post_init__(self):
        super().__post_init__()
        check_block_size(self.block_size)

    @property
    def codes(self):
        """This method itself: it holds the base's weights as codes."""
        return self

    def reach(self, base, attachment, generator):
        places = self.places(base)
        for linear in places:  # all are checked before the first is coded
            check_block_size(self.block_size, linear.d_out * linear.d_in, linear.name)
        for linear in places:
            options = dict(double_quant=self.double_quant, quant_type=self.quant_type)
            attachment.enter(CodedWeight(linear, block_size=self.block_size, **options))

    def places(self, base):
        """The whole modules that contain a target."""
        modules = {linear.module for linear in super().places(base)}
        whole = fused(list(base.anatomy.linears.values()))
        return [linear for linear in whole if linear.module in modules]

    def parameters(self, shape):
        return 0

    def coded(self, shape: Shape) -> tuple[int, int]:
        """Σ d_in d_out over the coded modules, and the bytes of their codes and scales."""
        weights = size = 0
        for copies, n, target in shape.modules(self.targets(shape.targets)):
            check_block_size(self.block_size, n, target)
            weights += copies * n
            size += copies * held_bytes(n, self.block_size, self.double_quant)
        return weights, size
