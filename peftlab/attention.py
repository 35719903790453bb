"""One attention function for every family: it adds virtual keys and values, and it records.

transformers looks up its attention functions by name. Ours is registered as `peftlab`, together
with a mask function of the same name: without that entry the model would silently lose its padding
and causal masks. `observe` finds the attention modules that really call `attend`. A model that
computes attention in another way has none, and the callers of `observe` refuse it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "peftlab"


@dataclass(frozen=True)
class AttentionSite:
    """One attention sublayer: its module, and the sizes of its keys and values as observed."""

    name: str  # "layers.3", "encoder.layers.0", "decoder.layers.0.cross"
    module: nn.Module
    stack: str
    layer: int
    cross: bool
    heads: int
    kv_heads: int
    head_dim: int


@runtime_checkable
class Prefix(Protocol):
    """Virtual keys and values that one attention module reads; `count` is P."""

    count: int

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """P_k and P_v in this type, each (kv_heads, P, head_dim), or with one pair for each row
        (batch, kv_heads, P, head_dim)."""

    def bias(self, queries: int, keys: int) -> Tensor | None:
        """The position bias of the prefix columns, (1, heads, queries, P); None if the family has
        no such bias or the prefix no positions."""


@dataclass
class Record:
    """One attention module in one forward pass; `weights` (batch, heads, queries, P + keys).

    query (batch, heads, queries, head_dim); key and value (batch, kv_heads, P + keys, head_dim);
    output (batch, heads, queries, head_dim), before the output projection; `mask` was added to
    the scores and includes the prefix columns; `virtual` is P.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    virtual: int
    weights: Tensor
    output: Tensor


# Attributes of an attention module: a copy of the model carries copies of them.
PREFIX, RECORDER = "peftlab_prefix", "peftlab_recorder"


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    prefilled: bool = False,
    **kwargs,
) -> tuple[Float[Tensor, "batch queries heads head_dim"], Tensor | None]:
    """Softmax attention over [virtual keys; keys], which a cache may hold already (`prefilled`)."""
    if kwargs.get("softcap") is not None:
        raise ValueError(f"{type(module).__name__} caps its scores: peftlab does not")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefix, recorder = vars(module).get(PREFIX), vars(module).get(RECORDER)
    if prefix is not None and not prefilled:
        key, value = with_prefix(key, value, *prefix.read(key.dtype))
    added = added_scores(attention_mask, position_bias, query, key, prefix)
    if recorder is None:
        output = fused_attention(query, key, value, added, scaling, dropout)
        return output.transpose(1, 2).contiguous(), None
    weights = attention_weights(query, key, added, scaling)
    output = weighted_sum(F.dropout(weights, dropout, module.training), value)
    virtual = 0 if prefix is None else prefix.count
    recorder(module, Record(query, key, value, added, scaling, virtual, weights, output))
    return output.transpose(1, 2).contiguous(), weights


def with_prefix(
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    P_k: Float[Tensor, "*batch kv_heads virtual head_dim"],
    P_v: Float[Tensor, "*batch kv_heads virtual head_dim"],
) -> tuple[Tensor, Tensor]:
    """Prefix tuning itself: [P_k; K] and [P_v; V], (batch, kv_heads, virtual + keys, head_dim)."""
    if P_k.ndim == 3:  # one prefix for all rows
        P_k, P_v = (P.expand(len(key), -1, -1, -1) for P in (P_k, P_v))
    if len(P_k) != len(key):
        raise ValueError(f"{len(P_k)} prefixes for a batch of {len(key)} rows")
    key = torch.cat([P_k.to(key.dtype), key], dim=2)
    value = torch.cat([P_v.to(value.dtype), value], dim=2)
    return key, value


def added_scores(
    mask: Tensor | None,
    position_bias: Tensor | None,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    prefix: Prefix | None,
) -> Tensor | None:
    """The mask plus the bias for the scores of all keys; None if there is neither.

    Only this function gives masks and biases their columns for the virtual keys: zeros, so that
    each query sees the whole prefix, or the bias that the prefix has there.
    """
    if mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least)
    if prefix is not None and mask is not None:
        mask = F.pad(mask, (prefix.count, 0))
    if prefix is not None and position_bias is not None:
        real = key.shape[2] - prefix.count
        position_bias = position_bias[..., :real]
        columns = prefix.bias(query.shape[2], real)
        if columns is None:
            position_bias = F.pad(position_bias, (prefix.count, 0))
        else:
            position_bias = torch.cat([columns.to(position_bias), position_bias], dim=-1)
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    return position_bias + mask


def fused_attention(query, key, value, added, scaling, dropout: float = 0.0) -> Tensor:
    """`weighted_sum(attention_weights(...), value)` in one call of torch's.

    The heads of a group read the same keys. One query of each is as good as several queries of one
    head, so that while decoding no key is copied.
    """
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    if packed := groups > 1 and query.shape[2] == 1 and (added is None or added.shape[1] == 1):
        query = query.reshape(len(query), -1, groups, query.shape[3])
    elif groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=added, dropout_p=dropout, scale=scaling
    )
    return output.reshape(len(query), heads, 1, -1) if packed else output


def attention_weights(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    added: Tensor | None,
    scaling: float,
) -> Float[Tensor, "batch heads queries keys"]:
    """softmax(scaling · Q Kᵀ + added); each key head serves a group of query heads."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    return (scores if added is None else scores + added).softmax(dim=-1)


def weighted_sum(
    weights: Float[Tensor, "batch heads queries keys"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
) -> Float[Tensor, "batch heads queries head_dim"]:
    """The average of the values, weighted by `weights`."""
    return weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)


def explicit_mask(dtype: torch.dtype = torch.float32, **kwargs) -> Tensor | None:
    """transformers' own mask as numbers to add to scores; None if it hides no key.

    While a CUDA graph is recorded, a GPU cannot be asked whether one query has padding before it.
    """
    recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    one = kwargs["q_length"] == 1 and not recording
    kwargs["allow_is_causal_skip"] = one and kwargs.get("allow_is_causal_skip", False)
    kept = sdpa_mask(**kwargs)
    if kept is None:
        return None
    return torch.zeros_like(kept, dtype=dtype).masked_fill(~kept, torch.finfo(dtype).min)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, explicit_mask)


class Dispatched:
    """Inside, the model's attention calls what has the name; afterwards it is as before."""

    def __init__(self, model: PreTrainedModel, name: str = NAME):
        self.name = name
        configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
        self.before = [(config, config._attn_implementation) for config in configs]

    def __enter__(self):
        for config, _ in self.before:
            config._attn_implementation = self.name
        return self

    def __exit__(self, *_):
        for config, name in self.before:
            config._attn_implementation = name


class Prefixed:
    """Inside, these attention modules read these prefixes."""

    def __init__(self, prefixes: dict[nn.Module, Prefix]):
        self.prefixes = prefixes

    def __enter__(self):
        if taken := [module for module in self.prefixes if PREFIX in vars(module)]:
            where = type(taken[0]).__name__
            raise ValueError(f"two methods want the same site, the prefix of {where}")
        for module, prefix in self.prefixes.items():
            setattr(module, PREFIX, prefix)
        return self

    def __exit__(self, *_):
        for module, prefix in self.prefixes.items():
            if vars(module).get(PREFIX) is prefix:
                delattr(module, PREFIX)


def recorded(model: PreTrainedModel, sites: list[AttentionSite]):
    """Inside, every forward pass is recorded: it fills the given dict, name -> Record."""
    return _recording(model, {site.module: site.name for site in sites})


@contextlib.contextmanager
def _recording(model: PreTrainedModel, keys: dict[nn.Module, Any]):
    """Inside, each attention that one of the modules computes fills the dict, key -> Record."""
    records: dict[Any, Record] = {}

    def keep(module: nn.Module, record: Record) -> None:
        records[keys[module]] = record

    try:
        for module in keys:
            setattr(module, RECORDER, keep)
        with Dispatched(model):
            yield records
    finally:
        for module in keys:
            vars(module).pop(RECORDER, None)


@torch.no_grad()
def observe(model: PreTrainedModel, layers: dict[str, list[nn.Module]]) -> list[AttentionSite]:
    """Every attention sublayer that calls `attend`, in the order of computation.

    `layers` gives the blocks of each stack. One forward pass on two tokens finds the sublayers with
    their heads and key sizes; nothing is read from a configuration.
    """
    places = {
        module: (module, stack, layer)
        for stack, blocks in layers.items()
        for layer, block in enumerate(blocks)
        for module in block.modules()
    }
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    given = {"decoder_input_ids": tokens[:, :1]} if model.config.is_encoder_decoder else {}
    training = model.training
    try:
        model.eval()
        with _recording(model, places) as records:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given)
    finally:
        model.train(training)
    sites = []
    for (module, stack, layer), record in records.items():
        cross = record.key.shape[2] != record.query.shape[2]  # one query reads two tokens
        name = f"{stack}.layers.{layer}{'.cross' if cross else ''}".removeprefix(".")
        (_, heads, _, _), (_, kv_heads, _, head_dim) = record.query.shape, record.key.shape
        sites.append(AttentionSite(name, module, stack, layer, cross, heads, kv_heads, head_dim))
    return sites
