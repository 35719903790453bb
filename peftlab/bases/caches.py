"""Cached keys and values: what a family calls them, and a cache that begins with a prefix."""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from peftlab.attention import PREFIX, AttentionSite, Prefix, with_prefix

CACHES = ("cache", "past_key_values")  # the argument's name since transformers 5.24, and before


def cache_name(module: nn.Module) -> str:
    """The name of the forward argument for the cached keys and values; "" if there is none."""
    return _cache_name(type(module))


@cache
def _cache_name(kind: type[nn.Module]) -> str:
    taken = signature(kind.forward).parameters
    return next((name for name in CACHES if name in taken), "")


def cache_in(kwargs: dict[str, Any]) -> Cache | None:
    """The cached keys and values among the arguments of a forward pass, or None."""
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


class Prefilled(DynamicCache):
    """An empty cache of a decoder whose first keys get the prefixes in front, once for an answer.

    Its length is that of the text, so masks and positions are made as without a prefix.
    """

    def __init__(self, prefixes: dict[int, Prefix]):
        super().__init__()
        for layer in range(1 + max(prefixes)):
            own = PrefilledLayer(prefixes[layer]) if layer in prefixes else DynamicLayer()
            self.layers.append(own)


class PrefilledLayer(DynamicLayer):
    """The keys and values of one attention: [P_k; K] and [P_v; V], of which only K is counted."""

    def __init__(self, prefix: Prefix):
        super().__init__()
        self.prefix = prefix

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            made = self.prefix.read(key_states.dtype)
            key_states, value_states = with_prefix(key_states, value_states, *made)
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return max(super().get_seq_length() - self.prefix.count, 0)


def prefilled(model: nn.Module, sites: list[AttentionSite]) -> dict[str, Prefilled]:
    """The argument for an answer's empty cache, in which the first keys get the prefix in front;
    none with a sliding window, which would leave the prefix behind."""
    if any(DynamicCache(config=model.config).is_sliding):
        return {}
    return {cache_name(model): Prefilled({s.layer: vars(s.module)[PREFIX] for s in sites})}
