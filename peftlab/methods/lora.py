"""LoRA: a low-rank delta beside frozen linear weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peftlab.bases import Shape
from peftlab.methods.method import Method, require
from peftlab.sites import LinearWeight


class LowRankDelta(nn.Module):
    r"""The formula:  $\Delta W = \frac{\alpha}{r} B A$,  applied as  $\frac{\alpha}{r} B (A x)$.

    A (r, d_in) starts uniform in ±1/√d_in, B (d_out, r) starts at zero, so ΔW starts at zero.
    `forward` goes through the r-dimensional middle and never forms the (d_out, d_in) product.
    """

    def __init__(
        self, d_in: int, d_out: int, r: int, alpha: int | float, dropout: int | float = 0.0
    ):
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r))
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw A anew, and set B to zero."""
        bound = 1 / math.sqrt(self.A.shape[1])
        nn.init.uniform_(self.A, -bound, bound, generator=generator)
        nn.init.zeros_(self.B)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        x = x.to(self.A.dtype)  # a base in 16 bits still trains factors in 32
        low = nn.functional.linear(self.dropout(x), self.A) * self.scale  # *batch r
        return nn.functional.linear(low, self.B)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        """ΔW itself, for merging and for looking."""
        return self.scale * self.B @ self.A


@dataclass(frozen=True)
class LoRA(Method):
    r"""Low-rank adaptation.

        h = W x + (α / r) B A x      W (d_out, d_in) frozen,  A (r, d_in),  B (d_out, r)

    Trained and stored: A and B of every target matrix, r·(d_in + d_out) numbers each.
    `target_modules` are logical: any of q k v o up down gate, or "all-linear". On GPT-2, whose
    q, k and v are one fused matrix, each target has its own A and B on its own rows; sharing one
    A over the fused matrix, as some libraries do, is a different method of the same size.

    Hu et al. 2021, arXiv:2106.09685, section 4.1. The paper draws A from a Gaussian; the authors'
    code draws it uniformly, as here. Defaults: q and v as in the paper, alpha = 2 r.
    """

    r: int = 8
    alpha: int | float = 16
    target_modules: tuple[str, ...] | list[str] | str = ("q", "v")
    dropout: int | float = 0.0

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    learning_rate: ClassVar[float] = 3e-3

    def __post_init__(self):
        require("r", self.r, 1)
        require("alpha", self.alpha, 0.0)
        require("dropout", self.dropout, 0.0, 1.0)
        targets = self.target_modules
        if targets != "all-linear":
            if not isinstance(targets, list | tuple) or not targets:
                raise ValueError(
                    f"target_modules={targets!r}: give a list of targets, such as ['q', 'v'], "
                    "or 'all-linear'"
                )
            object.__setattr__(self, "target_modules", tuple(dict.fromkeys(targets)))  # once each

    def targets(self, available: tuple[str, ...]) -> tuple[str, ...]:
        """The targets on a model that has these; ValueError for one that it has not."""
        if self.target_modules == "all-linear":
            return available
        for target in self.target_modules:
            if target not in available:
                raise ValueError(
                    f"unknown target {target!r}: this model has {', '.join(available)}"
                )
        return self.target_modules

    def reach(self, base, attachment, generator):
        for linear in base.anatomy.select(self.targets(base.anatomy.targets)):
            self._check_rank(linear.d_in, linear.d_out, linear.name)
            delta = LowRankDelta(linear.d_in, linear.d_out, self.r, self.alpha, self.dropout)
            delta.initialise(generator)
            weight = linear.weight
            delta.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            attachment.sites.append(attachment.stack.enter_context(LinearWeight(linear, delta)))
            attachment.modules[linear.name] = delta
            attachment.trainable[f"lora.{linear.name}.A"] = delta.A
            attachment.trainable[f"lora.{linear.name}.B"] = delta.B

    def parameters(self, shape: Shape) -> int:
        """Σ r (d_in + d_out) over the target matrices."""
        total = 0
        for target in self.targets(shape.targets):
            for copies, d_in, d_out in shape.matrices(target):
                self._check_rank(d_in, d_out, target)
                total += copies * self.r * (d_in + d_out)
        return total

    def _check_rank(self, d_in: int, d_out: int, where: str) -> None:
        most = min(d_in, d_out)
        if self.r > most:
            raise ValueError(f"r={self.r} at {where} ({d_out}×{d_in}): allowed is 1 to {most}")
