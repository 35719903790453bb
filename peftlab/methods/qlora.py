"""QLoRA: LoRA beside frozen weights that are held in four bits."""

from dataclasses import dataclass

from peftlab.methods.lora import LoRA
from peftlab.methods.nf4 import NF4


@dataclass(frozen=True)
class QLoRA(LoRA):
    r"""Low-rank adaptation of a base in four bits.

        h = W̃ x + (α / r) B A x      W̃ (d_out, d_in) = m · T[c],  A (r, d_in),  B (d_out, r)

    Every linear weight is held as codes; `target_modules` only says which get A and B. Trained and
    stored: A and B, r·(d_in + d_out) numbers a target. `[NF4(...), LoRA(...)]` is the same method
    in two parts. The gradient passes through every W̃, but no W̃ has a gradient of its own. At the
    start h is the output of the base in four bits. Merging rounds, so it needs `requantise`.

    Dettmers et al. 2023, arXiv:2305.14314, section 3, equation 5; defaults from section 5. The
    paper also keeps optimiser states in pages of host memory; here they stay on the device.
    """

    r: int = 64
    target_modules: tuple[str, ...] | list[str] | str = "all-linear"
    block_size: int = 64
    double_quant: bool = True
    quant_type: str = "nf4"

    name = "qlora"
    title = "QLoRA"

    def __post_init__(self):
        super().__post_init__()
        _ = self.codes  # raises where NF4 raises

    @property
    def codes(self) -> NF4:
        """The method that holds the base in four bits."""
        return NF4(self.block_size, self.double_quant, self.quant_type)

    def reach(self, base, attachment, generator):
        self.codes.reach(base, attachment, generator)
        super().reach(base, attachment, generator)
