"""Scores of how much each entry of a weight matters, and masks made of the scores.

>>> W = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
>>> lowest_out(magnitude(W).view(1, -1), 0.5).view(2, 3).int().tolist()
[[0, 0, 0], [1, 1, 1]]
>>> lowest_out(magnitude(W), 0.34).int().tolist()
[[0, 1, 1], [0, 1, 1]]
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peftlab.methods.checks import check_choice, require

Matrix = Float[Tensor, "d_out d_in"]


def magnitude(W: Matrix) -> Matrix:
    """|W|: how far an entry is from zero. In at least 32 bits, as every score."""
    return W.abs().to(torch.promote_types(W.dtype, torch.float32))


def wanda(W: Matrix, norms: Float[Tensor, " d_in"]) -> Matrix:
    """|W_ij| ‖X_j‖: an entry counts by its size times the usual size of its input."""
    size = magnitude(W)
    return size * norms.to(size)


def lowest_out(
    scores: Float[Tensor, "groups n"], sparsity: int | float
) -> Bool[Tensor, "groups n"]:
    """The mask of each group: exactly the round(sparsity · n) lowest scores are False.

    Among equal scores the first goes first, so that the same scores give the same mask anywhere.
    """
    count = round(sparsity * scores.shape[1])
    order = scores.argsort(dim=1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


def choose(scores: list[Tensor], sparsity: int | float, within: str) -> list[Tensor]:
    """A mask for each matrix of scores (d_out, d_in).

    Entries are compared `within` a "row", a "layer" (one matrix), all matrices ("global"), or
    every four neighbours along the input ("2:4"). Raises ValueError for another word, a sparsity
    outside 0 to 1, and fours where d_in is no multiple of four.
    """
    check_choice("within", within, ("row", "layer", "global", "2:4"))
    require("sparsity", sparsity, 0.0, 1.0)
    if within == "2:4" and (odd := [S.shape[1] for S in scores if S.shape[1] % 4]):
        raise ValueError(f"within='2:4': {odd[0]} inputs are no multiple of four")
    if within == "global":
        together = torch.cat([S.flatten() for S in scores])[None]
        parts = lowest_out(together, sparsity)[0].split([S.numel() for S in scores])
    else:
        width = {"layer": lambda S: S.numel(), "row": lambda S: S.shape[1], "2:4": lambda S: 4}
        parts = [lowest_out(S.reshape(-1, width[within](S)), sparsity) for S in scores]
    return [part.view(S.shape) for part, S in zip(parts, scores, strict=True)]


def is_two_four(mask: Bool[Tensor, "d_out d_in"]) -> bool:
    """Whether exactly two of every four neighbours along the input are held at zero."""
    return mask.shape[1] % 4 == 0 and bool((mask.view(-1, 4).sum(dim=1) == 2).all())


def cubic(sparsity: int | float, progress: int | float) -> float:
    """s (1 − (1 − t)³): fast at first, slow at the end (Zhu and Gupta 2017)."""
    return sparsity * (1 - (1 - min(progress, 1.0)) ** 3)
