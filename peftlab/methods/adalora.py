"""AdaLoRA: one budget of ranks, shared out among the weights while they train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear as times

from peftlab.methods.checks import check_rank, require
from peftlab.methods.deltas import DeltaMethod


class TripletDelta(nn.Module):
    r"""The formula:  $\Delta W = s P \Lambda Q = s \sum_i \lambda_i p_i q_i^\top$.

    p_i are the columns of P (d_out, r), q_i the rows of Q (r, d_in), both orthonormal at the
    start, and Λ = diag(λ) starts at zero. A triplet with λ_i = 0 is switched off: it has no part
    in the output and its vectors have no gradient, but λ_i itself has one.
    """

    def __init__(self, d_in: int, d_out: int, r: int, alpha: int | float, dropout=0.0):
        super().__init__()
        self.P = nn.Parameter(torch.empty(d_out, r))
        self.L = nn.Parameter(torch.zeros(r))  # λ
        self.Q = nn.Parameter(torch.empty(r, d_in))
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("importance", torch.zeros(r), persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw the directions anew, and set λ to zero."""
        for tensor, size in ((self.P, self.P.shape), (self.Q.T, self.Q.T.shape)):
            tensor.copy_(torch.linalg.qr(torch.randn(size, generator=generator)).Q)
        self.L.zero_()

    @property
    def rank(self) -> int:
        """How many triplets are switched on."""
        return int((self.L != 0).sum())

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        low = times(self.dropout(x.to(self.P.dtype)), self.Q)  # *batch r
        return times(low * (self.scale * self.L), self.P)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """ΔW itself, for merging and for looking."""
        return (self.P * (self.scale * self.L)) @ self.Q


@dataclass(frozen=True)
class AdaLoRA(DeltaMethod):
    r"""Adaptive low-rank adaptation: every weight begins with init_r triplets, few are kept.

        h = W x + s P Λ Q x      W (d_out, d_in) frozen,  P (d_out, init_r),  Λ = diag(λ),
                                 Q (init_r, d_in),  s = α / init_r

    Trained and stored: P, λ and Q, init_r·(d_in + d_out + 1) numbers for each target matrix, those
    of triplets that are off among them. After every step each triplet is scored by how much the
    loss would change without it, to first order, smoothed over steps:

        I_i ← β I_i + (1 − β) |λ_i ∂loss/∂λ_i|

    and of all triplets of all weights the b with the highest I stay; the λ of the others become 0.
    With t the share of the run that is done, b falls from N·init_r at `start` to N·target_r at
    `end` along a cubic, N the number of weights: N (target_r + (init_r − target_r) (1 − u)³), with
    u = (t − start) / (end − start). Before `start` nothing is switched off. A λ that was set to 0
    still has a gradient and may come back at any step before `end`; then the choice is fixed.

    Zhang et al. 2023, arXiv:2303.10512, equations 3, 5 and 12; β is β₁ there. Left out: the
    penalty that keeps P and Q orthogonal (they only start so), the scores of the entries of P and
    Q, which the paper adds to those of λ, and the factor for their uncertainty (equations 8 to 11).
    """

    init_r: int = 12
    target_r: int = 8
    alpha: int | float = 24
    target_modules: tuple[str, ...] | list[str] | str = ("q", "v")
    dropout: int | float = 0.0
    beta1: int | float = 0.85
    start: int | float = 0.1
    end: int | float = 0.7

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    learning_rate: ClassVar[float] = 1e-2
    limits: ClassVar[dict] = {"init_r": (1,), "alpha": (0.0,)} | dict.fromkeys(
        ("dropout", "beta1", "start"), (0.0, 1.0)
    )

    def __post_init__(self):
        super().__post_init__()
        require("target_r", self.target_r, 1, self.init_r)
        require("end", self.end, float(self.start), 1.0)

    def delta(self, linear, attachment, generator):
        check_rank("init_r", self.init_r, linear.d_in, linear.d_out, linear.name)
        delta = TripletDelta(linear.d_in, linear.d_out, self.init_r, self.alpha, self.dropout)
        delta.initialise(generator)
        return delta

    def size(self, d_in, d_out, where=""):
        check_rank("init_r", self.init_r, d_in, d_out, where)
        return self.init_r * (d_in + d_out + 1)

    def budget(self, done: float, weights: int) -> int:
        """How many triplets may stay when this share of the run is done."""
        if done < self.start:
            return weights * self.init_r
        u = 1.0 if done >= self.end else (done - self.start) / (self.end - self.start)
        extra = (self.init_r - self.target_r) * (1 - u) ** 3
        return round(weights * (self.target_r + extra))

    @torch.no_grad()
    def after_step(self, attachment, step, steps):
        deltas, done = [site.delta for site in attachment.sites], step / steps
        for delta in deltas:
            new = (delta.L * delta.L.grad).abs()
            if step == 1:
                delta.importance.zero_()
            if done < self.end or step == 1:  # afterwards the choice is fixed
                delta.importance.lerp_(new, 1 - self.beta1)
        scores = torch.cat([delta.importance for delta in deltas])
        stay = torch.zeros_like(scores, dtype=torch.bool)
        stay[scores.topk(self.budget(done, len(deltas))).indices] = True
        for delta, kept in zip(deltas, stay.split(self.init_r), strict=True):
            delta.L.mul_(kept)
