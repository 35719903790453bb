"""VeRA: random projections that all weights share, and two small vectors for each weight."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear as times

from peftlab.methods.deltas import DeltaMethod


class Projections(nn.Module):
    """A (r, d_in) and B (d_out, r), drawn once for all weights and never trained.

    Uniform in ±√(6 / fan), where fan is the number of columns: variance 2 / fan (He et al. 2015).
    """

    def __init__(self, d_in: int, d_out: int, r: int, key: int):
        super().__init__()
        generator = torch.Generator().manual_seed(key)
        for name, size in (("A", (r, d_in)), ("B", (d_out, r))):
            bound = math.sqrt(6 / size[1])
            drawn = torch.empty(size).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn)


class VectorDelta(nn.Module):
    r"""The formula:  $\Delta W = \Lambda_b B \Lambda_d A$,  the Λ diagonal.

    A is the first d_in columns of the shared A, B the first d_out rows of the shared B. b (d_out)
    starts at zero, d (r) at `d_initial`.
    """

    def __init__(self, shared: Projections, d_in: int, d_out: int, d_initial: float, dropout):
        super().__init__()
        self.shared = (shared,)  # a tuple hides it from this module: it moves and counts once
        self.d = nn.Parameter(torch.full((shared.A.shape[0],), float(d_initial)))
        self.b = nn.Parameter(torch.zeros(d_out))
        self.d_in, self.dropout = d_in, nn.Dropout(dropout)

    @property
    def A(self) -> Float[Tensor, "r d_in"]:
        return self.shared[0].A[:, : self.d_in].to(self.d)

    @property
    def B(self) -> Float[Tensor, "d_out r"]:
        return self.shared[0].B[: len(self.b)].to(self.d)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        x = self.dropout(x.to(self.d.dtype))
        return self.b * times(self.d * times(x, self.A), self.B)

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        return (self.b[:, None] * self.B) @ (self.d[:, None] * self.A)


@dataclass(frozen=True)
class VeRA(DeltaMethod):
    r"""Vector-based random matrix adaptation.

        h = W x + b ⊙ B (d ⊙ (A x))      W (d_out, d_in) frozen,  A (r, d_in) and B (d_out, r)
                                         random and frozen,  d (r),  b (d_out)

    Trained and stored: d and b, r + d_out numbers for each target matrix. A and B are drawn once,
    as large as the largest target needs; every target uses their first columns and rows. They are
    not stored: `projection_prng_key` is their seed and part of the method, so the same method draws
    the same A and B anywhere. A unit of r costs one number a matrix, so r may exceed the matrix.

    Kopiczko et al. 2024, arXiv:2310.11454, section 3.2, with d_initial = 0.1 and r = 256 or more.
    """

    r: int = 256
    target_modules: tuple[str, ...] | list[str] | str = ("q", "v")
    projection_prng_key: int = 0
    d_initial: int | float = 0.1
    dropout: int | float = 0.0

    rank = None
    name = "vera"
    title = "VeRA"
    learning_rate = 2e-2
    limits = {"r": (1,), "projection_prng_key": (0,), "d_initial": (0.0,), "dropout": (0.0, 1.0)}

    def __post_init__(self):
        super().__post_init__()
        if self.d_initial == 0:
            raise ValueError(
                "d_initial=0: allowed is above 0, because b is 0 too and nothing has a gradient"
            )

    def reach(self, base, attachment, generator):
        linears = self.places(base)
        d_in, d_out = max(each.d_in for each in linears), max(each.d_out for each in linears)
        shared = Projections(d_in, d_out, self.r, self.projection_prng_key)
        attachment.hold(shared, f"{self.name}.projections")
        super().reach(base, attachment, generator)

    def delta(self, linear, attachment, generator):
        shared = attachment.modules[f"{self.name}.projections"]
        return VectorDelta(shared, linear.d_in, linear.d_out, self.d_initial, self.dropout)

    def size(self, d_in, d_out):
        return self.r + d_out
