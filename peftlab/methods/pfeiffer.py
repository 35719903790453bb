"""The adapter of Pfeiffer et al.: one bottleneck a block, after the MLP."""

from dataclasses import dataclass

from torch import nn

from peftlab.methods.bottleneck import Adapter


@dataclass(frozen=True)
class PfeifferAdapter(Adapter):
    r"""A small module after the MLP of every block.

        y ← y + W_up σ(W_down y + b_down) + b_up      W_down (m, d_model),  W_up (d_model, m)

    y is the output of the MLP's last linear map. Trained and stored: 2 m d_model + m + d_model
    numbers a block; m is `bottleneck`; 48 is BERT-base's d_model over the usual reduction factor
    of 16. It starts near the identity: W_down and W_up are drawn from a Gaussian of standard
    deviation σ₀ = 0.02, biases are zero, as in the authors' library. ReLU passes half of the
    square, so f(y) is about σ₀² √(m d_model / 2) times as large as y, 5% on BERT-base.

    Pfeiffer et al. 2021, arXiv:2005.00247 (AdapterFusion). Implementations differ in the input of
    f. Here f reads y, as in Houlsby's adapter, so the two differ only in number and start. In the
    authors' library f reads the result of the residual sum: LN(y + h) on BERT, with h the residual
    stream, and y + h if the norm comes first; the output of f is still added to y, and the norm
    follows again. The sizes are equal, the functions are not.
    """

    bottleneck: int = 48

    name = "pfeiffer"
    title = "Pfeiffer adapter"
    learning_rate = 1e-2

    def initialise(self, f, generator):
        for weight in (f.W_down, f.W_up):
            nn.init.normal_(weight, 0.0, 0.02, generator=generator)
