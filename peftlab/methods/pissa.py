"""PiSSA: LoRA that starts at the principal singular vectors of the weight."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear as times

from peftlab.methods.deltas import DeltaMethod


class PrincipalDelta(nn.Module):
    r"""The formula:  $\Delta W = s (B A - B_0 A_0)$,  $A_0$ and $B_0$ the frozen start.

    s B₀ A₀ = U_r S_r V_rᵀ is the best approximation of W of rank r, split evenly:
    A₀ = √(S_r / s) V_rᵀ and B₀ = U_r √(S_r / s).
    """

    def __init__(self, W: Float[Tensor, "d_out d_in"], r: int, alpha: int | float):
        super().__init__()
        self.scale = alpha / r
        A, B = (factor / self.scale**0.5 for factor in principal(W, r))
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        x = x.to(self.A.dtype)
        now = times(times(x, self.A) * self.scale, self.B)
        start = times(times(x, self.A0) * self.scale, self.B0)
        return now - start  # the same operations on the same numbers: exactly 0 at the start

    def delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        return self.scale * (self.B @ self.A - self.B0 @ self.A0)


def principal(
    W: Float[Tensor, "d_out d_in"], r: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """A and B such that B A is the best approximation of W of rank r, and A Aᵀ = Bᵀ B = S_r.

    A singular pair has two possible signs. Here the largest entry of u in absolute value is > 0.
    """
    U, S, Vh = torch.linalg.svd(W.detach().double().cpu(), full_matrices=False)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    sign = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    root = S.sqrt()
    A, B = root[:, None] * sign.T * Vh, U * sign * root
    dtype = torch.promote_types(W.dtype, torch.float32)
    # In the order of memory that a file has: a product's last bit depends on it.
    return A.to(dtype).contiguous(), B.to(dtype).contiguous()


@dataclass(frozen=True)
class PiSSA(DeltaMethod):
    r"""Principal singular values and vectors adaptation.

        h = W x + s (B A − B₀ A₀) x      W (d_out, d_in) frozen,  A, A₀ (r, d_in),
                                         B, B₀ (d_out, r),  s = α / r

    A and B start at A₀ and B₀, the r largest singular values of W with their vectors. So the
    directions in which W is largest train, and both factors have a gradient at step 1. Trained: A
    and B, r·(d_in + d_out) numbers for each target matrix. Stored: these and the start, A₀ and B₀,
    twice as many numbers, because a decomposition on another machine gives other digits or vectors.

    The paper writes the residual W − s B₀ A₀ into the frozen weight and adds s B A. This is the
    same function, but the base does not change: `forward` subtracts the start, which takes twice
    the time of LoRA's two products. A merged PiSSA is one dense matrix.

    Meng et al. 2024, arXiv:2404.02948, section 3. The default alpha = r is theirs.
    """

    r: int = 8
    alpha: int | float = 8
    target_modules: tuple[str, ...] | list[str] | str = ("q", "v")

    name = "pissa"
    title = "PiSSA"
    learning_rate = 1e-3
    limits = {"r": (1,), "alpha": (0.0,)}
    start_is_stored = True

    def __post_init__(self):
        super().__post_init__()
        if self.alpha == 0:
            raise ValueError(
                "alpha=0: allowed is above 0, because the start is divided by alpha / r"
            )

    def delta(self, linear, attachment, generator):
        return PrincipalDelta(linear.weight, self.r, self.alpha)

    def size(self, d_in, d_out):
        return self.r * (d_in + d_out)
