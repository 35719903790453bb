"""AdaLoRA: one budget of ranks, which training distributes among the weights."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear as times

from peftlab.methods.checks import require
from peftlab.methods.deltas import DeltaMethod


class TripletDelta(nn.Module):
    r"""The formula:  $\Delta W = s P \Lambda Q = s \sum_i \lambda_i p_i q_i^\top$.

    The columns p_i of P (d_out, r) and the rows q_i of Q (r, d_in) start orthonormal, Λ = diag(λ)
    starts at zero. A triplet with λ_i = 0 is off: it adds nothing, and only λ_i has a gradient.
    """

    def __init__(self, d_in: int, d_out: int, r: int, alpha: int | float, dropout=0.0):
        super().__init__()
        self.P = nn.Parameter(torch.empty(d_out, r))
        self.L = nn.Parameter(torch.zeros(r))  # λ
        self.Q = nn.Parameter(torch.empty(r, d_in))
        self.scale, self.dropout = alpha / r, nn.Dropout(dropout)
        self.register_buffer("importance", torch.full((r,), torch.nan), persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw new directions, and set λ to zero."""
        for tensor, size in ((self.P, self.P.shape), (self.Q.T, self.Q.T.shape)):
            tensor.copy_(torch.linalg.qr(torch.randn(size, generator=generator)).Q)
        self.L.zero_()

    @property
    def rank(self) -> int:
        """How many triplets are on."""
        return int((self.L != 0).sum())

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        low = times(self.dropout(x.to(self.P.dtype)), self.Q)  # *batch r
        return times(low * (self.scale * self.L), self.P)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        return (self.P * (self.scale * self.L)) @ self.Q


@dataclass(frozen=True)
class AdaLoRA(DeltaMethod):
    r"""Adaptive low-rank adaptation: every weight starts with init_r triplets and keeps fewer.

        h = W x + s P Λ Q x      W (d_out, d_in) frozen,  P (d_out, init_r),  Λ = diag(λ),
                                 Q (init_r, d_in),  s = α / init_r

    Trained and stored: P, λ and Q, init_r·(d_in + d_out + 1) numbers for each target matrix. After
    every step, the score of a triplet is the change of the loss without it, to first order:

        I_i ← β I_i + (1 − β) |λ_i ∂loss/∂λ_i|

    The b triplets with the highest I, among all weights, stay; the λ of the others become 0.
    `budget` gives b: for N weights it falls from N·init_r to N·target_r, between the shares `start`
    and `end` of the run. A λ of 0 may grow again before `end`, but not in a later run.

    Zhang et al. 2023, arXiv:2303.10512, equations 3, 5 and 12; β is β₁ there. Left out: the penalty
    that keeps P and Q orthonormal, the scores of their entries, uncertainty (equations 8 to 11).
    """

    init_r: int = 12
    target_r: int = 8
    alpha: int | float = 24
    target_modules: tuple[str, ...] | list[str] | str = ("q", "v")
    dropout: int | float = 0.0
    beta1: int | float = 0.85
    start: int | float = 0.1
    end: int | float = 0.7

    rank = "init_r"
    name = "adalora"
    title = "AdaLoRA"
    learning_rate = 1e-2
    limits = {"init_r": (1,), "alpha": (0.0,)}
    limits |= dict.fromkeys(("dropout", "beta1", "start"), (0.0, 1.0))

    def __post_init__(self):
        super().__post_init__()
        require("target_r", self.target_r, 1, self.init_r)
        require("end", self.end, float(self.start), 1.0)

    def delta(self, linear, attachment, generator):
        delta = TripletDelta(linear.d_in, linear.d_out, self.init_r, self.alpha, self.dropout)
        delta.initialise(generator)
        return delta

    def size(self, d_in, d_out):
        return self.init_r * (d_in + d_out + 1)

    def budget(self, done: float, weights: int) -> int:
        """How many triplets may stay: weights · (target_r + (init_r − target_r) (1 − u)³)."""
        u = 1.0 if done >= self.end else (done - self.start) / (self.end - self.start or 1.0)
        extra = (self.init_r - self.target_r) * (1 - max(u, 0.0)) ** 3
        return round(weights * (self.target_r + extra))

    @torch.no_grad()
    def after_step(self, attachment, step, steps):
        deltas, done = [site.delta for site in attachment.sites], step / steps
        if begins := step == 1 or bool(deltas[0].importance.isnan().any()):
            on = torch.stack([delta.P.grad.any(dim=0) for delta in deltas])  # none where λ was 0
            for delta, closed in zip(deltas, ~on & on.any(), strict=True):
                delta.importance.zero_().masked_fill_(closed, -1)  # below every score
        for delta in deltas:
            if done < self.end or begins:  # later the choice is fixed
                score = delta.importance.lerp((delta.L * delta.L.grad).abs(), 1 - self.beta1)
                delta.importance.copy_(score.where(delta.importance >= 0, -1))
        scores = torch.cat([delta.importance for delta in deltas])
        stay = min(self.budget(done, len(deltas)), int((scores >= 0).sum()))
        kept = torch.zeros_like(scores).index_fill(0, scores.topk(stay).indices, 1.0)
        for delta, factors in zip(deltas, kept.split(self.init_r), strict=True):
            delta.L.mul_(factors)
