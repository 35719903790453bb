"""DoRA: the length of every row of a weight is trained separately from its direction."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peftlab.methods.deltas import DeltaMethod
from peftlab.methods.lora import LowRankDelta


class MagnitudeDelta(LowRankDelta):
    r"""The formula:  $W' = m \odot \frac{W + sBA}{n}$,  $n$ the norms of the rows of $W + sBA$.

    m (d_out) starts as the norms of W's rows, so W' starts as W. The output is

        W' x = W x + (m/n − 1) ⊙ W x + (m/n) ⊙ s B (A x)

    where the frozen module computes W x already. `frozen()` returns W.
    """

    of_output = True  # called with x and W x

    def __init__(self, frozen: Callable[[], Tensor], r: int, alpha: int | float, dropout=0.0):
        W = frozen()
        super().__init__(*W.T.shape, r, alpha, dropout)
        self.to(W.device, torch.promote_types(W.dtype, torch.float32))
        self.frozen = frozen

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Initialise A and B as LoRA does, and m from W."""
        super().initialise(generator)
        with torch.no_grad():
            self.m = nn.Parameter(self.norms())

    def norms(self) -> Float[Tensor, " d_out"]:
        """n, from W Aᵀ (d_out, r) and A Aᵀ (r, r), so that no second W is held:

        ‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ      w and b rows of W and B
        """
        A, B, s, W = self.A, self.B, self.scale, self.frozen().to(self.A)
        crossed = ((W @ A.T) * B).sum(dim=1)
        squared = ((B @ (A @ A.T)) * B).sum(dim=1)
        return (W.square().sum(dim=1) + 2 * s * crossed + s**2 * squared).clamp(min=0).sqrt()

    def ratio(self) -> Float[Tensor, " d_out"]:
        """m / n. The gradient does not pass through n; a row of zeros stays a row of zeros."""
        with torch.no_grad():
            n = self.norms()
        return self.m / n.clamp(min=torch.finfo(n.dtype).tiny)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], Wx: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        ratio = self.ratio()
        return (ratio - 1) * Wx + ratio * super().forward(x)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W' − W, for merging and inspection."""
        W, ratio = self.frozen().to(self.m), self.ratio()[:, None]
        return (ratio - 1) * W + ratio * super().delta_weight()


@dataclass(frozen=True)
class DoRA(DeltaMethod):
    r"""Weight-decomposed low-rank adaptation: LoRA changes the direction, m gives the length.

        h = m ⊙ ((W + s B A) x) / n      W (d_out, d_in) frozen,  A (r, d_in),  B (d_out, r),
                                         m (d_out),  n_i = ‖row i of W + s B A‖,  s = α / r

    Trained and stored: A, B and m, r·(d_in + d_out) + d_out numbers for each target matrix.
    The paper writes W with its outputs in columns and calls n a column-wise norm; here a row
    computes one output. The gradient treats n as a constant, as in section 4.3, which saves memory
    and changes little. `dropout` acts only before A. A merged DoRA is one dense matrix.

    Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.
    """

    r: int = 8
    alpha: int | float = 16
    target_modules: tuple[str, ...] | list[str] | str = ("q", "v")
    dropout: int | float = 0.0

    name = "dora"
    title = "DoRA"
    learning_rate = 3e-3
    limits = {"r": (1,), "alpha": (0.0,), "dropout": (0.0, 1.0)}

    def delta(self, linear, attachment, generator):
        delta = MagnitudeDelta(lambda: linear.weight, self.r, self.alpha, self.dropout)
        delta.initialise(generator)
        return delta

    def reach(self, base, attachment, generator):
        super().reach(base, attachment, generator)
        for site in attachment.sites:
            site.delta.frozen = site.frozen  # W alone, even while the delta is merged

    def size(self, d_in, d_out):
        return self.r * (d_in + d_out) + d_out
