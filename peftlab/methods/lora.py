"""LoRA: a low-rank delta beside frozen linear weights."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peftlab.bases import fused
from peftlab.methods.deltas import DeltaMethod, sharing


class LowRankDelta(nn.Module):
    r"""The formula:  $\Delta W = s B A$,  applied as  $s B (A x)$,  with  $s = \alpha / r$.

    A (r, d_in) starts uniform in ±1/√d_in, B (d_out, r) starts at zero, so ΔW starts at zero.
    `forward` goes through the r-dimensional middle and never forms the (d_out, d_in) product.
    """

    def __init__(
        self, d_in: int, d_out: int, r: int, alpha: int | float, dropout=0.0, use_rslora=False
    ):
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r))
        self.scale = alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw A on the CPU, so that a seed gives the same A on any device; set B to zero."""
        bound = 1 / math.sqrt(self.A.shape[1])
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        A = self.A
        if x.dtype != A.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)  # a base in 16 bits still trains factors in 32; autocast chooses
        if self.training:
            x = self.dropout(x)
        return nn.functional.linear(nn.functional.linear(x, A) * self.scale, self.B)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        return self.scale * self.B @ self.A


@dataclass(frozen=True)
class LoRA(DeltaMethod):
    r"""Low-rank adaptation.

        h = W x + s B A x      W (d_out, d_in) frozen,  A (r, d_in),  B (d_out, r),  s = α / r

    Trained and stored: A and B of every target matrix, r·(d_in + d_out) numbers each.
    `target_modules` are logical: any of q k v o up down gate, or "all-linear". GPT-2 has q, k and
    v in one fused matrix; each target still has its own A, and its own B for its own rows. With
    `fused`, targets that share a matrix share one A, and B has a row for each of their rows; for
    q, k and v PEFT does the same with c_attn. Every shared A saves r·d_in numbers, but it is a
    different method: all these targets read the same r numbers from x.

    Hu et al. 2021, arXiv:2106.09685, section 4.1. The paper draws A from a Gaussian; the authors'
    code draws it uniformly, as here. Defaults: q and v as in the paper, alpha = 2 r.

    `use_rslora` sets s = α / √r, so that neither the output nor the gradients shrink or grow with
    r. Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.

    `loraplus_lr_ratio` is λ: the rate of B is λ times the rate of A. In a wide model one rate for
    both moves B too little. Hayou et al. 2024, arXiv:2402.12354, section 4, with λ = 16.
    """

    r: int = 8
    alpha: int | float = 16
    target_modules: tuple[str, ...] | list[str] | str = ("q", "v")
    dropout: int | float = 0.0
    use_rslora: bool = False
    loraplus_lr_ratio: int | float = 1.0
    fused: bool = False

    name = "lora"
    title = "LoRA"
    learning_rate = 3e-3
    limits = {"r": (1,), "alpha": (0.0,), "dropout": (0.0, 1.0), "loraplus_lr_ratio": (1.0,)}

    def rate(self, name):
        return float(self.loraplus_lr_ratio) if name.endswith(".B") else 1.0

    def places(self, base):
        linears, shape = super().places(base), base.anatomy.shape
        shared = self.fused and sharing(self.targets(shape.targets), shape)
        return fused(linears) if shared else linears

    def delta(self, linear, attachment, generator):
        size = (linear.d_in, linear.d_out)
        delta = LowRankDelta(*size, self.r, self.alpha, self.dropout, self.use_rslora)
        delta.initialise(generator)
        return delta

    def size(self, d_in, d_out):
        return self.r * (d_in + d_out)

    def parameters(self, shape):
        shared = sharing(self.targets(shape.targets), shape)[1:] if self.fused else []
        less = [n * self.r * d_in for t in shared for n, d_in, _ in shape.matrices(t)]
        return super().parameters(shape) - sum(less)
