"""Virtual tokens in the embedded input, or new ones at every layer."""

from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature

import torch
from torch import Tensor
from transformers import StaticCache

from peftlab.bases import Anatomy
from peftlab.bases.caches import cache_in
from peftlab.sites.site import PerThread, Shown, Site

Read = Callable[[], dict[str, Tensor]]  # returns the current tensors of a soft prompt
Block = tuple[int, str, int | None]  # virtual tokens at one place: their number, place, token


class InputEmbeddings(Site):
    """Virtual tokens in the embedded input of one stack of layers.

        x = [P; E(tokens)]        positions 0 … P−1 for the virtual tokens, P … for the real ones

    `read()["prompt"]` is P (P, d_model), or (batch, P, d_model) with one prompt for each row.
    `placement` lists blocks as (count, place, token): place is "front", "back", or "before" or
    "after" the first token with the id `token`. A hook before the stack's forward inserts the
    virtual tokens, and a hook after it removes their hidden states, so that heads, losses and
    callers see only the real tokens. T5's decoder is the exception: it attends to the states of
    the virtual tokens as well, as in the paper. When a cache is used for decoding, it contains the
    virtual tokens: only the mask and the positions are extended.

    With `every_layer`, `read()["prompt"]` is (layers, P, d_model): at the input of each layer,
    that layer's own vectors replace the hidden states of the virtual tokens.
    """

    def __init__(
        self, anatomy: Anatomy, read: Read, placement: Iterable[Block], every_layer: bool = False
    ):
        super().__init__("input_embeddings")
        self.anatomy, self.read, self.placement = anatomy, read, tuple(placement)
        self.count = sum(count for count, _, _ in self.placement)
        self.every_layer = every_layer
        # All virtual tokens in front of the text and its padding; the model takes position ids.
        self.simple = anatomy.takes_positions and all(w == "front" for _, w, _ in self.placement)
        # Places of the virtual tokens (batch, P), and of the real ones among them (batch, seq).
        self.places = PerThread()

    def __enter__(self):
        changes = {self.anatomy.backbone: self._put_in}
        if "decoder" in self.anatomy.stacks:
            changes[self.anatomy.stacks["decoder"]] = self._widen_mask
        if self.every_layer:
            blocks = next(iter(self.anatomy.layers.values()))
            changes |= {blocks[i]: partial(self._replace, i) for i in range(1, len(blocks))}
        for module, change in changes.items():
            self.hooks.append(module.register_forward_pre_hook(change, with_kwargs=True))
        self.hooks.append(self.anatomy.backbone.register_forward_hook(self._take_out))
        return self

    def __exit__(self, *_):
        super().__exit__()
        self.places.set(None)

    def _put_in(self, stack, args, kwargs):
        self.places.set(None)
        if self.anatomy.bare:
            return args, kwargs
        if args:
            kwargs |= zip(signature(stack.forward).parameters, args, strict=False)
        kwargs.pop("cache_position", None)
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        embedded, positions = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        given = ids if embedded is None else embedded
        batch, length = given.shape[:2]
        cache = cache_in(kwargs)
        cached = cache.get_seq_length() if cache is not None else 0
        if isinstance(cache, StaticCache) or (mask is not None and mask.ndim != 2):
            raise ValueError(
                "a static cache has no room for virtual tokens at the input: use "
                "cache_implementation='dynamic', and a mask (batch, seq)"
            )
        if mask is None:
            real = length + max(cached - self.count, 0)
            mask = torch.ones(batch, real, dtype=torch.long, device=given.device)
        if positions is None and self.anatomy.takes_positions:
            positions = self.anatomy.positions(mask)[:, -length:]
        order, at = self._order(mask, ids, inside=not cached)
        kwargs["attention_mask"] = self._arrange(order, mask, 1)
        if cached:
            if self.anatomy.takes_positions:
                kwargs["position_ids"] = positions + self.count
            return (), kwargs
        embedded = self.anatomy.embedding(ids) if embedded is None else embedded
        prompt = self.read()["prompt"]
        first = (prompt[..., 0, :, :] if self.every_layer else prompt).to(embedded.dtype)
        kwargs["inputs_embeds"] = self._arrange(order, embedded, first)
        kwargs["input_ids"] = None
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = self._arrange(order, kwargs["token_type_ids"], 0)
        if self.anatomy.takes_positions:
            positions = positions.expand(batch, -1)
            kwargs["position_ids"] = self._arrange(order, *self._positions(positions, at))
        if order is None:
            here = torch.arange(self.count + length, device=embedded.device).expand(batch, -1)
        else:
            here = order.argsort(dim=1)  # the new place of each of [virtual; real]
        self.places.set((here[:, : self.count], here[:, self.count :]))
        return (), kwargs

    def _positions(self, real: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions of the real tokens, (batch, seq), and of the virtual ones, (batch, P)."""
        start = self.anatomy.first_position
        mine = torch.arange(self.count, device=real.device).expand(len(real), -1)
        if at is None:
            return real + self.count, mine + start
        before = (at[:, None, :] <= torch.arange(real.shape[1], device=real.device)[:, None]).sum(2)
        earlier = at.argsort(dim=1, stable=True).argsort(dim=1)  # how many virtual tokens precede
        ahead = real.gather(1, at.clamp(max=real.shape[1] - 1))  # position of the next real token
        behind = real.gather(1, (at - 1).clamp(min=0)) + 1  # one after the previous real token
        where = [where for count, where, _ in self.placement for _ in range(count)]
        front = torch.tensor([w == "front" for w in where], device=real.device)
        follows = torch.tensor([w in ("after", "back") for w in where], device=real.device)
        anchored = torch.where(front, start, torch.where(follows, behind, ahead))
        return real + before, earlier + anchored

    def _order(
        self, mask: Tensor, ids: Tensor | None = None, inside: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """The order of [virtual; real], and the real token that each virtual one precedes.

        Unless they go `inside` the text, which is unknown while decoding, all are in front. The
        mask is the same either way, because it does not tell virtual from real tokens.
        """
        if self.simple:
            return None, None
        first = mask.int().argmax(dim=1)  # (batch,)
        columns = []
        for count, where, token in self.placement:
            if where == "front" or not inside:
                at = first
            elif where == "back":
                at = mask.shape[1] - mask.flip(1).int().argmax(dim=1)
            elif ids is None:
                raise ValueError(
                    "virtual tokens stand at a token of the text: input_ids are needed"
                )
            else:
                hits = (ids == token) & mask.bool()
                if not hits.any(dim=1).all():
                    row = int((~hits.any(dim=1)).nonzero()[0])
                    raise ValueError(f"row {row} has no token {token} to put virtual tokens at")
                at = hits.int().argmax(dim=1) + (where == "after")
            columns.append(at[:, None].expand(-1, count))
        at = torch.cat(columns, dim=1)  # batch virtual
        tokens = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
        return torch.cat([2 * at, 2 * tokens + 1], dim=1).argsort(dim=1, stable=True), at

    def _arrange(self, order: Tensor | None, real: Tensor, virtual: Tensor | int) -> Tensor:
        """[virtual; real] of every row, put in this order."""
        if isinstance(virtual, int):
            virtual = real.new_full((len(real), self.count), virtual)
        elif virtual.ndim < real.ndim:
            virtual = virtual.expand(len(real), *virtual.shape)
        elif len(virtual) != len(real):
            raise ValueError(f"{len(virtual)} prompts for a batch of {len(real)} rows")
        joined = torch.cat([virtual, real], dim=1)
        if order is None:
            return joined
        index = order.view(*order.shape, *[1] * (joined.ndim - 2))
        return joined.gather(1, index.expand_as(joined))

    def _take_out(self, stack, args, output):
        if (places := self.places.get()) and "decoder" not in self.anatomy.stacks:
            hidden = output.last_hidden_state
            where = places[1][:, :, None].expand(-1, -1, hidden.shape[2])
            real = hidden[:, self.count :] if self.simple else hidden.gather(1, where)
            output.last_hidden_state = real

    def _widen_mask(self, decoder, args, kwargs):
        """Let T5's decoder see the encoder's virtual tokens too."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[1] < states.shape[1]:
            order, _ = self._order(mask)
            kwargs = {**kwargs, "encoder_attention_mask": self._arrange(order, mask, 1)}
        return args, kwargs

    def _replace(self, layer: int, block, args, kwargs):
        """Replace the hidden states of the virtual tokens by this layer's own vectors."""
        if not (places := self.places.get()):
            return args, kwargs
        hidden, *others = args
        own = self.read()["prompt"][..., layer, :, :].to(hidden.dtype)
        own = own.expand(len(hidden), -1, -1)
        where = places[0][:, :, None].expand_as(own)
        return (hidden.scatter(1, where, own), *others), kwargs

    def shown(self) -> list[Shown]:
        """The virtual tokens, those of each layer at its place."""
        prompt = self.read()["prompt"]
        if not self.every_layer:
            return [Shown("P", prompt, "input", "token")]
        stack = next(iter(self.anatomy.layers))
        names = [f"{stack}.layers.{i}.input".removeprefix(".") for i in range(len(prompt))]
        return [Shown("P", prompt, name, "token", i) for i, name in enumerate(names)]

    def held(self) -> list[Tensor]:
        """The places of the virtual and the real tokens in the last forward pass."""
        return list(self.places.get() or ())
