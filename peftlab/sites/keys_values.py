"""Virtual keys and values in attention."""

import torch
from torch import Tensor, nn

from peftlab import attention
from peftlab.attention import AttentionSite
from peftlab.bases import Anatomy
from peftlab.bases.caches import Prefilled, cache_in
from peftlab.sites.embeddings import Read
from peftlab.sites.site import PerThread, Shown, Site


class KeysValues(Site):
    """Virtual keys and values in front of those of the text, in some attention sublayers.

        softmax(q [P_k; K]ᵀ / √d) [P_v; V]

    `read()` returns P_k and P_v, each (sublayers, kv_heads, P, head_dim), or with a leading batch
    axis. The queries' positions stay 0 … T−1. With `shift_positions` they begin at P, as when a
    library passes the prefix as a cache; the relative bias of T5's decoder then covers the prefix.
    """

    def __init__(
        self, anatomy: Anatomy, sites: list[AttentionSite], read: Read, shift_positions: bool
    ):
        super().__init__("keys_values", [f"{site.name}.kv" for site in sites])
        self.anatomy, self.sites, self.read, self.shift = anatomy, sites, read, shift_positions
        self.inside: list[attention.Prefixed | attention.Dispatched] = []
        self.apart = PerThread()  # this pass's prefix, its type, and what each sublayer reads

    def __enter__(self):
        prefixes = {s.module: LayerPrefix(self, i, s) for i, s in enumerate(self.sites)}
        self.inside = [attention.Prefixed(prefixes), attention.Dispatched(self.anatomy.model)]
        for context in self.inside:
            context.__enter__()
        for module in self.anatomy.stacks.values():
            self.hooks.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
        return self

    def __exit__(self, *_):
        super().__exit__()
        for context in reversed(self.inside):
            context.__exit__()
        self.inside = []
        self.apart.set(None)

    def shown(self) -> list[Shown]:
        """The virtual keys and values, those of each attention at its place."""
        made = self.read()
        return [
            Shown(letter, made[letter], name, how, i)
            for i, name in enumerate(self.names)
            for letter, how in (("P_k", "key"), ("P_v", "value"))
        ]

    def parts(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """P_k and P_v of every sublayer: cast and taken apart once a forward pass, by whoever reads
        first."""
        made = self.read()
        if (known := self.apart.get()) is None or known[0] is not made or known[1] != dtype:
            apart = (made[letter].to(dtype).unbind(-4) for letter in ("P_k", "P_v"))
            known = made, dtype, list(zip(*apart, strict=True))
            self.apart.set(known)
        return known[2]

    @property
    def count(self) -> int:
        """The current number of virtual tokens."""
        return self.read()["P_k"].shape[-2]

    def _begin(self, stack, args, kwargs):
        if isinstance(cache_in(kwargs), Prefilled):
            kwargs = {**kwargs, "prefilled": True}  # the model hands it on to `attend`
        if not (self.shift and self.anatomy.takes_positions):
            return args, kwargs
        positions = kwargs.get("position_ids")
        if positions is None:
            ids = args[0] if args else kwargs.get("input_ids")
            ids = kwargs.get("inputs_embeds") if ids is None else ids
            cache = cache_in(kwargs)
            start = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
            positions = positions + self.anatomy.first_position
        return args, {**kwargs, "position_ids": positions + self.count}


class LayerPrefix:
    """The part of the prefix that one attention module reads."""

    def __init__(self, site: KeysValues, index: int, place: AttentionSite):
        self.site, self.index = site, index
        first = site.anatomy.layers[place.stack][0]
        biased = [m for m in first.modules() if getattr(m, "has_relative_attention_bias", False)]
        shifted = site.shift and place.stack == "decoder" and not place.cross and biased
        self.table: nn.Module | None = biased[0] if shifted else None  # T5's relative positions

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """P_k and P_v, each (kv_heads, P, head_dim), or with a leading batch axis."""
        return self.site.parts(dtype)[self.index]

    count = property(lambda self: self.site.count)  # of virtual tokens, as of now

    def bias(self, queries: int, keys: int) -> Tensor | None:
        """T5's learned bias between the last `queries` of `keys` and the prefix before them."""
        if self.table is None:
            return None
        count = self.site.count
        whole = self.table.compute_bias(count + keys, count + keys)  # 1 heads keys keys
        return whole[:, :, -queries:, :count]
