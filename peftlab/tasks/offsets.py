"""Texts as tokens that know where they stand: what the tasks with a head of their own share.

A fast tokenizer says which characters each token covers. Tags of words and spans of an answer are
given in characters, so any such tokenizer will do: byte-level pieces, which bring their leading
space along, as well as word pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Encoded:
    """Right-padded ids and mask, and for every text the characters that each token covers."""

    input_ids: torch.Tensor  # (batch, seq)
    attention_mask: torch.Tensor  # (batch, seq)
    offsets: list[list[tuple[int, int]]]  # one (start, end) a token; empty for special tokens


def encode(texts: list[str], tokenizer, context: int | None = None) -> Encoded:
    """The texts with the tokenizer's own special tokens around them.

    Spaces at either end of a token do not count as covered. Raises ValueError for no texts, for a
    tokenizer without offsets, and if the longest text has more tokens than `context`.
    """
    import torch

    if not texts:
        raise ValueError("a batch needs at least one example")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("this task needs a fast tokenizer: only those know the offsets of tokens")
    found = tokenizer(texts, return_offsets_mapping=True)
    lengths = [len(ids) for ids in found["input_ids"]]
    if context is not None and max(lengths) > context:
        raise ValueError(f"the longest example has {max(lengths)} tokens, only {context} fit")
    size = (len(texts), max(lengths))
    input_ids = torch.full(size, tokenizer.pad_token_id)
    mask = torch.zeros(size, dtype=torch.long)
    for row, (ids, length) in enumerate(zip(found["input_ids"], lengths, strict=True)):
        input_ids[row, :length] = torch.tensor(ids)
        mask[row, :length] = 1
    offsets = [
        [_without_spaces(text, start, end) for start, end in spans]
        for text, spans in zip(texts, found["offset_mapping"], strict=True)
    ]
    return Encoded(input_ids, mask, offsets)


def _without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    if not piece.strip():
        return start, start
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def check_kind(kind: str, what: str) -> None:
    """Raises ValueError unless the model is an encoder, the only kind that `what` goes on."""
    if kind != "encoder":
        raise ValueError(f"{what} goes on encoders, with a head of its own; not on a {kind}")
