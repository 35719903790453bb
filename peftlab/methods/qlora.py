"""QLoRA: LoRA beside frozen weights that are held in four bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftlab.methods.lora import LoRA
from peftlab.methods.nf4 import NF4


@dataclass(frozen=True)
class QLoRA(LoRA):
    r"""Low-rank adaptation of a base in four bits.

        h = W̃ x + (α / r) B A x      W̃ (d_out, d_in) = m · T[c],  A (r, d_in),  B (d_out, r)

    Every linear weight is held as codes, whatever `target_modules` says: they are for A and B.
    Trained and stored: A and B, r·(d_in + d_out) numbers a target. `[NF4(...), LoRA(...)]` is the
    same thing in two parts. The gradient goes through every W̃ on
    its way down, but none of them has one of its own. At the start h is not the base's output but
    that of the base in four bits. Merging into the codes rounds, so it has to be asked for.

    Dettmers et al. 2023, arXiv:2305.14314, section 3, equation 5; defaults from section 5. The
    paper keeps optimiser states in pages of host memory as well; here they stay where they are.
    """

    r: int = 64
    target_modules: tuple[str, ...] | list[str] | str = "all-linear"
    block_size: int = 64
    double_quant: bool = True
    quant_type: str = "nf4"

    name: ClassVar[str] = "qlora"
    title: ClassVar[str] = "QLoRA"

    def __post_init__(self):
        super().__post_init__()
        _ = self.codes  # refuses what NF4 refuses

    @property
    def codes(self) -> NF4:
        """The method that holds the base in four bits."""
        return NF4(self.block_size, self.double_quant, self.quant_type)

    def reach(self, base, attachment, generator):
        self.codes.reach(base, attachment, generator)
        super().reach(base, attachment, generator)
