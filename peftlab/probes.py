"""What happened inside: nearest tokens of a prompt, the spectrum of an update, forgetting."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from peftlab.bases import Base, LanguageModel


def nearest_tokens(
    prompt: Float[Tensor, "virtual d_model"], base: Base, k: int = 3
) -> list[list[tuple[str, float]]]:
    """The k vocabulary tokens whose embeddings point most nearly the same way as each vector.

    Returns, for each virtual token, (token text, cosine similarity) pairs, best first. A near
    token is a neighbour, not a translation: vectors far from every token have neighbours too.
    """
    table = base.anatomy.embedding.weight.detach()
    cosine = F.normalize(prompt.detach().to(table), dim=1) @ F.normalize(table, dim=1).T
    values, ids = cosine[:, : len(base.tokenizer)].topk(k, dim=1)
    return [
        [(base.tokenizer.decode([i]), v) for i, v in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def prompt_distance(prompt: Float[Tensor, "virtual d_model"], base: Base) -> dict[str, float]:
    """How long the prompt's vectors are, and the vocabulary's: mean Euclidean norms."""
    table = base.anatomy.embedding.weight.detach()
    return {
        "prompt": prompt.detach().norm(dim=1).mean().item(),
        "vocabulary": table.norm(dim=1).mean().item(),
    }


def spectrum(delta_weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " rank"]:
    """Singular values of an update ΔW, largest first, in float64 and on the CPU."""
    return torch.linalg.svdvals(delta_weight.detach().double().cpu())


def energy(singular_values: Float[Tensor, " rank"], r: int) -> float:
    """The share of ‖ΔW‖² that the best rank-r approximation keeps, from 0 to 1."""
    squares = singular_values.square()
    return (squares[:r].sum() / squares.sum()).item()


def numerical_rank(delta_weight: Float[Tensor, "d_out d_in"]) -> int:
    """How many singular values stand above float32 rounding: σ > σ₁ · max(d_out, d_in) · ε."""
    values = spectrum(delta_weight)
    threshold = values[0] * max(delta_weight.shape) * torch.finfo(torch.float32).eps
    return int((values > threshold).sum())


def forgetting(model: LanguageModel, texts: list[str], before: float) -> float:
    """How much worse the model predicts its old text: loss now − loss before, nats per token."""
    return model.loss(texts) - before
