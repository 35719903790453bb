"""Which entries of a matrix are held at zero: scores, masks, and one bit for each when stored.

>>> W = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
>>> lowest_out(magnitude(W).view(1, -1), 0.5).view(2, 3).int().tolist()
[[0, 0, 0], [1, 1, 1]]
>>> lowest_out(magnitude(W), 0.34).int().tolist()
[[0, 1, 1], [0, 1, 1]]
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from peftlab.bases import LanguageModel, Linear


def magnitude(W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """|W|: how far an entry is from zero."""
    return W.abs()


def wanda(
    W: Float[Tensor, "d_out d_in"], norms: Float[Tensor, " d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """|W_ij| ‖X_j‖: an entry counts for as much as what usually comes through it."""
    return W.abs() * norms.to(W)


def lowest_out(
    scores: Float[Tensor, "groups n"], sparsity: int | float
) -> Bool[Tensor, "groups n"]:
    """The mask of each group by itself: exactly round(sparsity · n) of the lowest are False.

    Of equal scores the first goes first, so that the same scores give the same mask anywhere.
    """
    count = round(sparsity * scores.shape[1])
    order = scores.argsort(dim=1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


def choose(scores: list[Tensor], sparsity: int | float, within: str) -> list[Tensor]:
    """A mask for each matrix of scores (d_out, d_in).

    Entries are compared `within` a "row", a "layer" (one matrix), all matrices ("global"), or
    every four neighbours along the input ("2:4").
    """
    if within == "global":
        together = torch.cat([S.flatten() for S in scores])[None]
        parts = lowest_out(together, sparsity)[0].split([S.numel() for S in scores])
    else:
        width = {"layer": lambda S: S.numel(), "row": lambda S: S.shape[1], "2:4": lambda S: 4}
        parts = [lowest_out(S.reshape(-1, width[within](S)), sparsity) for S in scores]
    return [part.view(S.shape) for part, S in zip(parts, scores, strict=True)]


def is_two_four(mask: Bool[Tensor, "d_out d_in"]) -> bool:
    """Whether of every four neighbours along the input exactly two are held at zero."""
    return mask.shape[1] % 4 == 0 and bool((mask.view(-1, 4).sum(dim=1) == 2).all())


def cubic(sparsity: int | float, progress: int | float) -> float:
    """s (1 − (1 − t)³): fast while much is superfluous, slow at the end (Zhu and Gupta 2017)."""
    return sparsity * (1 - (1 - min(progress, 1.0)) ** 3)


def pack(mask: Bool[Tensor, "d_out d_in"]) -> UInt8[Tensor, " bytes"]:
    """Eight entries a byte, row by row, the first in the lowest bit; the last byte is filled up."""
    bits = nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits * 2 ** torch.arange(8, device=mask.device)).sum(dim=1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, " bytes"], rows: int, columns: int) -> Bool[Tensor, "rows cols"]:
    """The inverse of `pack`."""
    bits = packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    return bits.flatten()[: rows * columns].view(rows, columns).bool()


@torch.no_grad()
def input_norms(
    model: LanguageModel, linears: list[Linear], texts: tuple[str, ...], batch_size: int = 32
) -> dict[nn.Module, Float[Tensor, " d_in"]]:
    """‖X_j‖₂ of every input feature of these weights, over all real tokens of the texts.

    Keyed by module, for q, k and v of a fused one read the same input. An encoder reads the texts
    as they are, T5's decoder reads them a second time behind its start token. Raises ValueError
    if no text has a token.
    """
    squares: dict[nn.Module, Tensor] = {}
    mask = torch.zeros(0)

    def collect(module, args):
        x = args[0][mask].double()  # real tokens alone, (tokens, d_in)
        squares[module] = squares.get(module, 0) + x.square().sum(dim=0)

    with ExitStack() as stack, model._evaluating():
        for module in dict.fromkeys(linear.module for linear in linears):
            stack.callback(module.register_forward_pre_hook(collect).remove)
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            batch = model.tokenizer(
                chunk, return_tensors="pt", padding=True, padding_side="right"
            ).to(model.device)
            ids, real = batch["input_ids"].long(), batch["attention_mask"]
            mask = real.bool()
            if not mask.any():
                continue
            given = ()
            if model.kind == "encoder-decoder":
                first = torch.full_like(ids[:, :1], model.decoder_start[0])
                given = (torch.cat([first, ids[:, :-1]], dim=1),)
            model(ids, real, *given)
    if not squares:
        raise ValueError("no token in the calibration texts: Wanda needs the inputs of W")
    return {module: total.sqrt() for module, total in squares.items()}
