"""Virtual keys and values in attention."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from peftlab import attention
from peftlab.attention import AttentionSite, Prefix
from peftlab.bases import Anatomy
from peftlab.sites.embeddings import Read


class KeysValues:
    """Virtual keys and values in front of those of the text, in some attention sublayers.

        softmax(q [P_k; K]ᵀ / √d) [P_v; V]

    `read()` gives P_k and P_v, (sublayers, kv_heads, P, head_dim) each, or with a batch in front.
    The queries' positions stay 0 … T−1; with `shift_positions` they begin at P, as they do when a
    library passes the prefix as a cache; in T5's decoder the relative bias then reaches the prefix.
    """

    def __init__(
        self, anatomy: Anatomy, sites: list[AttentionSite], read: Read, shift_positions: bool
    ):
        self.anatomy, self.sites, self.read, self.shift = anatomy, sites, read, shift_positions
        self.names = [f"{site.name}.kv" for site in sites]
        self.now: dict[str, Tensor] = {}

    def __enter__(self):
        prefixes = {site.module: self._prefix(i, site) for i, site in enumerate(self.sites)}
        with ExitStack() as stack:
            stack.enter_context(attention.dispatched(self.anatomy.model))
            stack.enter_context(attention.prefixed(prefixes))
            for module in self.anatomy.stacks.values():
                hook = module.register_forward_pre_hook(self._begin, with_kwargs=True)
                stack.callback(hook.remove)
            self.undo = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.undo.close()
        self.now = {}

    def _begin(self, stack, args, kwargs):
        """Read the prefix once a forward, and shift the positions where that is asked."""
        self.now = self.read()
        if self.shift and self.anatomy.takes_positions:
            count, positions = self.now["P_k"].shape[-2], kwargs.get("position_ids")
            if positions is None:
                ids = args[0] if args else kwargs.get("input_ids")
                ids = kwargs.get("inputs_embeds") if ids is None else ids
                cache = attention.cache_in(kwargs)
                start = cache.get_seq_length() if cache is not None else 0
                positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
                positions = positions + self.anatomy.first_position
            kwargs = {**kwargs, "position_ids": positions + count}
        return args, kwargs

    def _prefix(self, index: int, site: AttentionSite) -> Prefix:
        def read() -> tuple[Tensor, Tensor]:
            return self.now["P_k"][..., index, :, :, :], self.now["P_v"][..., index, :, :, :]

        first = self.anatomy.layers[site.stack][0]
        biased = [m for m in first.modules() if getattr(m, "has_relative_attention_bias", False)]
        if not self.shift or site.cross or site.stack != "decoder" or not biased:
            return Prefix(read)

        def bias(queries: int, keys: int) -> Tensor:
            """T5's learned bias between the last `queries` of `keys` and the prefix before them."""
            count = self.now["P_k"].shape[-2]
            whole = biased[0].compute_bias(count + keys, count + keys)  # 1 heads keys keys
            return whole[:, :, -queries:, :count]

        return Prefix(read, bias)
