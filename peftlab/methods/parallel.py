"""The scaled parallel adapter of He et al.: a bottleneck beside the MLP."""

import math
from dataclasses import dataclass

from torch import nn

from peftlab.methods.bottleneck import Adapter


@dataclass(frozen=True)
class ParallelAdapter(Adapter):
    r"""A small module beside the MLP of every block: it reads the MLP's input.

        y ← y + s (W_up σ(W_down x + b_down) + b_up)      W_down (m, d_model),  W_up (d_model, m)

    The MLP's first linear map reads x, its last one computes y; s is `scaling`. Trained and
    stored: 2 m d_model + m + d_model numbers a block; m is `bottleneck`. W_down starts uniform in
    ±1/√d_model, W_up and both biases start at zero, so the output starts exactly as the base's,
    as in LoRA and in the authors' code.

    The adapter is LoRA with a non-linearity in the middle, around two matrices at once: with σ the
    identity and around one matrix it would be LoRA, and could be merged. In a model that normalises
    first, x is taken after the norm; the adapters library takes it before. With a prefix beside it,
    [PrefixTuning(30), ParallelAdapter(512)], it is the authors' MAM adapter.

    He et al. 2022, arXiv:2110.04366, sections 3 and 4; for XSum they use m = 512 and s = 4.
    """

    bottleneck: int = 512
    scaling: int | float = 4.0

    name = "parallel"
    title = "Parallel adapter"
    learning_rate = 1e-2
    beside = True

    def initialise(self, f, generator):
        bound = 1 / math.sqrt(f.W_down.shape[1])
        nn.init.uniform_(f.W_down, -bound, bound, generator=generator)
        nn.init.zeros_(f.W_up)
