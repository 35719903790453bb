"""One attention function for every family: it adds virtual keys and values, and it records.

transformers looks its attention functions up by name. Ours is registered as `peftlab`, together
with a mask function of the same name: without that entry padding and causality would vanish, and
nothing would be said. `observe` finds the places that a model's attention really goes through;
a model that computes attention in another way has none, and is refused by whoever asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "peftlab"
CACHES = ("cache", "past_key_values")  # the argument's name from transformers 5.24 on, and before


def cache_name(module: nn.Module) -> str:
    """What a model or a stack calls the keys and values so far; "" if it takes none."""
    taken = signature(module.forward).parameters
    return next((name for name in CACHES if name in taken), "")


def cache_in(kwargs: dict[str, Any]) -> Cache | None:
    """The keys and values so far among the arguments of a forward pass."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


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


@dataclass
class Prefix:
    """Virtual keys and values that one attention module reads.

    `read()` gives keys and values, (kv_heads, P, head_dim) each, or one such pair for each row,
    (batch, kv_heads, P, head_dim). `bias(queries, keys)` gives the position bias of the prefix
    columns, (1, heads, queries, P), where a family has one and the prefix has positions.
    """

    read: Callable[[], tuple[Tensor, Tensor]]
    bias: Callable[[int, int], Tensor] | None = None


@dataclass
class Record:
    """What one attention module did in one forward; `weights` (batch, heads, queries, P + keys).

    query (batch, heads, queries, head_dim); key and value (batch, kv_heads, P + keys, head_dim);
    output (batch, heads, queries, head_dim), before the output projection; `mask` is what was
    added to the scores, prefix columns included; `virtual` is P.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    virtual: int
    weights: Tensor
    output: Tensor


# Weak on both sides: a model that is dropped with its prefix is not kept alive from here.
_PREFIXES: WeakKeyDictionary[nn.Module, ref[Prefix]] = WeakKeyDictionary()
_RECORDERS: WeakKeyDictionary[nn.Module, Callable[[nn.Module, Record], None]] = WeakKeyDictionary()


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys head_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Float[Tensor, "batch queries heads head_dim"], Tensor | None]:
    """Softmax attention over [virtual keys; keys], in the form that transformers calls.

    Every mask and every bias gets its columns for the virtual keys here and nowhere else: zeros,
    so that each query sees the whole prefix.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError(f"{type(module).__name__} caps its scores: peftlab does not")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    virtual, prefix = 0, _PREFIXES.get(module)
    prefix = None if prefix is None else prefix()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
            ~attention_mask, torch.finfo(query.dtype).min
        )
    if prefix is not None:
        extra_key, extra_value = (
            (t if t.ndim == 4 else t.expand(len(key), -1, -1, -1)).to(key.dtype)
            for t in prefix.read()
        )
        if len(extra_key) != len(key):
            raise ValueError(f"{len(extra_key)} prefixes for a batch of {len(key)} rows")
        virtual = extra_key.shape[2]
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (virtual, 0))
        if position_bias is not None:
            real = position_bias[..., : key.shape[2]]
            columns = prefix.bias(query.shape[2], key.shape[2]) if prefix.bias else None
            if columns is None:
                position_bias = F.pad(real, (virtual, 0))
            else:
                position_bias = torch.cat([columns.to(real), real], dim=-1)
        key = torch.cat([extra_key, key], dim=2)
        value = torch.cat([extra_value, value], dim=2)
    added = attention_mask
    if position_bias is not None:
        added = position_bias if added is None else added + position_bias
    recorder = _RECORDERS.get(module)
    if recorder is None:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=added, dropout_p=dropout, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None
    weights = attention_weights(query, key, added, scaling)
    output = weighted_sum(F.dropout(weights, dropout, module.training), value)
    recorder(module, Record(query, key, value, added, scaling, virtual, weights, output))
    return output.transpose(1, 2).contiguous(), weights


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
    """The values, averaged by the weights."""
    return weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)  # an explicit mask; None where all may be seen


@contextlib.contextmanager
def dispatched(model: PreTrainedModel):
    """Inside, the model's attention goes through `attend`; afterwards as before."""
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = {id(part.config): (part.config, part.config._attn_implementation) for part in parts}
    for config, _ in before.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in before.values():
            config._attn_implementation = name


@contextlib.contextmanager
def prefixed(prefixes: dict[nn.Module, Prefix]):
    """Inside, these attention modules read these prefixes."""
    if taken := [module for module in prefixes if module in _PREFIXES]:
        raise ValueError(f"two methods want the same site, the prefix of {type(taken[0]).__name__}")
    _PREFIXES.update({module: ref(prefix) for module, prefix in prefixes.items()})
    try:
        yield
    finally:
        for module in prefixes:
            _PREFIXES.pop(module, None)


@contextlib.contextmanager
def recorded(model: PreTrainedModel, sites: list[AttentionSite]):
    """Inside, every forward is recorded: yields a dict that each forward fills, name -> Record."""
    names = {site.module: site.name for site in sites}
    records: dict[str, Record] = {}

    def keep(module: nn.Module, record: Record) -> None:
        records[names[module]] = record

    _RECORDERS.update(dict.fromkeys(names, keep))
    try:
        with dispatched(model):
            yield records
    finally:
        for module in names:
            _RECORDERS.pop(module, None)


@torch.no_grad()
def observe(model: PreTrainedModel, layers: dict[str, list[nn.Module]]) -> list[AttentionSite]:
    """Every attention sublayer that `attend` reaches, in the order of the computation.

    `layers` gives the blocks of each stack. One forward on two tokens finds them, and the heads
    and sizes of their keys: nothing is read from a configuration.
    """
    found: list[tuple[nn.Module, Record]] = []
    place = {
        module: (stack, index)
        for stack, blocks in layers.items()
        for index, block in enumerate(blocks)
        for module in block.modules()
    }

    def keep(module: nn.Module, record: Record) -> None:
        found.append((module, record))

    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    given = {"decoder_input_ids": tokens[:, :1]} if model.config.is_encoder_decoder else {}
    training = model.training
    _RECORDERS.update(dict.fromkeys(place, keep))
    try:
        model.eval()
        with dispatched(model):
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given)
    finally:
        for module in place:
            _RECORDERS.pop(module, None)
        model.train(training)
    sites = []
    for module, record in found:
        stack, layer = place[module]
        cross = record.key.shape[2] != record.query.shape[2]  # two tokens read by one
        name = f"{stack}.layers.{layer}" if stack else f"layers.{layer}"
        sites.append(
            AttentionSite(
                name=f"{name}.cross" if cross else name,
                module=module,
                stack=stack,
                layer=layer,
                cross=cross,
                heads=record.query.shape[1],
                kv_heads=record.key.shape[1],
                head_dim=record.key.shape[3],
            )
        )
    return sites
