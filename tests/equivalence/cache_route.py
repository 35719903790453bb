"""Prefix keys and values through the cache: a second implementation, nothing shared with ours.

Before every forward the prefix is put into a new cache as if its tokens had been read already.
The model then shifts positions, attends to the prefix and lets T5's relative bias reach it, all by
its own code. It can reach no encoder and no cross attention, and a cache that was used once holds
the text as well: it has to be built anew each time.
"""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel


def name(model: PreTrainedModel) -> str:
    """The argument's name: it changed in transformers 5.24."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def cache_of(P_k: Tensor, P_v: Tensor, rows: int) -> DynamicCache:
    """P_k and P_v (layers, kv_heads, P, head_dim) as the past of every row."""
    pairs = [tuple(t.expand(rows, -1, -1, -1) for t in pair) for pair in zip(P_k, P_v, strict=True)]
    return DynamicCache(pairs)


def logits(
    model: PreTrainedModel,
    P_k: Tensor,
    P_v: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoder_input_ids: Tensor | None = None,
) -> Tensor:
    """The model's logits after a prefix in every layer of its decoder."""
    cache, count = cache_of(P_k, P_v, len(input_ids)), P_k.shape[2]
    if decoder_input_ids is not None:
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            **{name(model): EncoderDecoderCache(cache, DynamicCache())},
        ).logits
    seen = attention_mask.new_ones(len(input_ids), count)
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return model(
        input_ids=input_ids,
        attention_mask=torch.cat([seen, attention_mask], dim=1),
        position_ids=positions + count,
        **{name(model): cache},
    ).logits


@torch.no_grad()
def continued(model, P_k, P_v, ids: Tensor, new: int, encoded: Tensor | None = None) -> Tensor:
    """Greedy continuation of one row, the prefix and the whole row read anew at every token.

    For T5 the row is the decoder's, and `encoded` what its encoder reads.
    """
    for _ in range(new):
        given = [ids] if encoded is None else [encoded]
        given.append(torch.ones_like(given[0]))
        out = logits(model, P_k, P_v, *given, *([] if encoded is None else [ids]))
        ids = torch.cat([ids, out[:, -1:].argmax(dim=-1)], dim=1)
    return ids[:, -new:]
