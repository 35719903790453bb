"""The adapter of Houlsby et al.: a bottleneck after every attention and every MLP."""

from dataclasses import dataclass

from torch import nn

from peftlab.methods.bottleneck import Adapter


@dataclass(frozen=True)
class HoulsbyAdapter(Adapter):
    r"""A small module after both sublayers of every block.

        y ← y + W_up σ(W_down y + b_down) + b_up      W_down (m, d_model),  W_up (d_model, m)

    y is the output of a sublayer's last linear map, before dropout, the residual sum and, in BERT,
    the layer norm. Trained and stored: 2 m d_model + m + d_model numbers for each of two sublayers
    a block; m is `bottleneck`. The attention of T5's decoder to its encoder gets none, as in most
    work on T5, unless `sublayers` contains "cross".

    It starts near the identity: W_down and W_up are drawn from a Gaussian of standard deviation
    σ₀ = `init_std`, truncated at 2 σ₀, which leaves s = 0.880 σ₀; biases are zero. GELU halves
    small inputs, so f(y) is about s² √(m d_model) / 2 times as large as y, 0.9% on BERT-base at
    m = 64; no entry is ever above (2 σ₀)² m ‖y‖₁.

    Houlsby et al. 2019, arXiv:1902.00751, section 2. The text gives σ₀ = 1e-2, the authors' code
    1e-3; their σ is GELU, that of the adapters library swish ("silu"). The paper also trains the
    layer norms, as [HoulsbyAdapter(), LayerNormTuning()] does. The task head is counted apart.
    """

    bottleneck: int = 64
    non_linearity: str = "gelu"
    sublayers: tuple[str, ...] | list[str] = ("attention", "mlp")
    init_std: int | float = 1e-2

    name = "houlsby"
    title = "Houlsby adapter"
    learning_rate = 1e-2
    limits = {**Adapter.limits, "init_std": (1e-9,)}

    def initialise(self, f, generator):
        std = self.init_std
        for weight in (f.W_down, f.W_up):
            nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)
