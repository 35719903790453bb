"""The adapter of Pfeiffer et al.: one bottleneck a block, behind the MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from peftlab.methods.bottleneck import Adapter


@dataclass(frozen=True)
class PfeifferAdapter(Adapter):
    r"""A small module after the MLP of every block.

        y ← y + W_up σ(W_down y + b_down) + b_up      W_down (m, d_model),  W_up (d_model, m)

    y is what the MLP's last linear map gives. Trained and stored: 2 m d_model + m + d_model
    numbers a block; m is `bottleneck`, 48 being BERT-base's d_model over the usual reduction
    factor of 16. It starts near the identity: W_down and W_up from a Gaussian of standard
    deviation σ₀ = 0.02, biases zero, as in the authors' library. ReLU passes half of the square, so
    f(y) is about σ₀² √(m d_model / 2) times as large as y, 5% on BERT-base.

    Pfeiffer et al. 2021, arXiv:2005.00247 (AdapterFusion). What f reads is not the same everywhere.
    Here it is y, as in Houlsby's adapter, so the two differ in number and start alone. In the
    authors' library it is what stands behind the residual sum: LN(y + h) on BERT, h the residual
    stream, and y + h where the norm comes first; f's result is added to y all the same, and the
    norm follows once more. The size is equal, the function is not.
    """

    bottleneck: int = 48

    name: ClassVar[str] = "pfeiffer"
    title: ClassVar[str] = "Pfeiffer adapter"
    learning_rate: ClassVar[float] = 1e-2

    def initialise(self, f, generator):
        for weight in (f.W_down, f.W_up):
            nn.init.normal_(weight, 0.0, 0.02, generator=generator)
