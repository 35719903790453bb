"""The five sites: each one changes what a frozen model computes, and undoes it bit for bit.

Each site is a context manager. Entering it reaches into the model, leaving it takes everything
back, whatever happened in between. Nothing here knows any method. Here so far:

    InputEmbeddings     virtual tokens among the embedded input, or anew at every layer
    KeysValues          virtual keys and values in attention
    LinearWeight        a delta beside one linear weight W
    CodedWeight         the weight of one linear module held as codes of four bits
    MaskedWeight        some entries of W held at zero
    SublayerOutput      a small module after or beside attention or the MLP
    Scale               factors on what one linear weight gives, or reads
    ExistingParameters  some of the model's own parameters unfrozen
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from inspect import signature

import torch
from torch import Tensor, nn

from peftlab import attention
from peftlab.attention import AttentionSite, Prefix
from peftlab.bases import Anatomy, Linear, Sublayer
from peftlab.bases.anatomy import CODED
from peftlab.masks import pack, unpack
from peftlab.quantisation import Quantised, quantise

Read = Callable[[], dict[str, Tensor]]  # the tensors of a soft prompt, now


class InputEmbeddings:
    """Virtual tokens among the embedded input of one stack of layers.

        x = [P; E(tokens)]        positions 0 … P−1 for the virtual tokens, P … for the real ones

    `read()["prompt"]` is P (P, d_model), or (batch, P, d_model) with one prompt for each row.
    `placement` lists blocks as (count, where), where being "front", "back", "before X" or
    "after X" of the first X, a token's id. A hook before the stack's forward puts the virtual
    tokens in, and one behind it takes their hidden states out, so that heads, losses and callers
    see the real tokens alone. T5's decoder is the exception: it attends to the virtual tokens'
    states as well, as in the paper. While decoding with a cache the virtual tokens are inside the
    cache: only the mask and the positions are extended.

    With `every_layer`, `read()["prompt"]` is (layers, P, d_model): what the virtual tokens have
    become at a layer's input is dropped, and that layer's own vectors stand in their place.
    """

    name = "input_embeddings"

    def __init__(
        self,
        anatomy: Anatomy,
        read: Read,
        placement: Iterable[tuple[int, str, int | None]],
        every_layer: bool = False,
    ):
        self.anatomy, self.read, self.placement = anatomy, read, tuple(placement)
        self.count = sum(count for count, _, _ in self.placement)
        self.every_layer = every_layer
        self.stack_name, self.stack = next(iter(anatomy.stacks.items()))
        self.has_positions = anatomy.takes_positions
        # In front of everything, padding included, where positions are told and not counted.
        self.simple = self.has_positions and all(w == "front" for _, w, _ in self.placement)
        self.real: Tensor | None = None  # (batch, seq): where the real tokens are now, if moved

    def __enter__(self):
        hooks = [
            self.stack.register_forward_pre_hook(self._put_in, with_kwargs=True),
            self.stack.register_forward_hook(self._take_out),
        ]
        decoder = self.anatomy.stacks.get("decoder")
        if decoder is not None:
            hooks.append(decoder.register_forward_pre_hook(self._widen_mask, with_kwargs=True))
        if self.every_layer:
            for layer, block in enumerate(self.anatomy.layers[self.stack_name][1:], start=1):
                hook = self._replace(layer)
                hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        self.hooks = hooks
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        self.real = None

    def _put_in(self, stack, args, kwargs):
        if self.anatomy.bare:
            self.real = None
            return args, kwargs
        if args:
            names = signature(stack.forward).parameters
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        kwargs.pop("cache_position", None)
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        embedded = kwargs.get("inputs_embeds")
        if embedded is None:
            embedded = self.anatomy.embedding(ids)  # batch seq d_model
        batch, length, _ = embedded.shape
        cache = kwargs.get("past_key_values")
        cached = cache.get_seq_length() if cache is not None else 0
        if mask is None:
            real = length + max(cached - self.count, 0)
            mask = torch.ones(batch, real, dtype=torch.long, device=embedded.device)
        positions = kwargs.get("position_ids")
        if positions is None and self.has_positions:
            positions = self.anatomy.positions(mask)[:, -length:]
        if cached:
            self.real = None
            order, _ = self._order(mask)
            kwargs["attention_mask"] = self._arrange(order, mask, 1)
            if self.has_positions:
                kwargs["position_ids"] = positions + self.count
            return (), kwargs
        prompt = self.read()["prompt"]
        first = (prompt[..., 0, :, :] if self.every_layer else prompt).to(embedded.dtype)
        if ids is None and any(token is not None for *_, token in self.placement):
            raise ValueError("virtual tokens stand at a token of the text: input_ids are needed")
        order, at = self._order(mask, ids, inside=True)
        kwargs["attention_mask"] = self._arrange(order, mask, 1)
        kwargs["inputs_embeds"] = self._arrange(order, embedded, first)
        kwargs["input_ids"] = None
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = self._arrange(order, kwargs["token_type_ids"], 0)
        if self.has_positions:
            positions = positions.expand(batch, -1)
            kwargs["position_ids"] = self._arrange(order, *self._positions(positions, at))
        if order is None:
            here = torch.arange(self.count + length, device=embedded.device).expand(batch, -1)
        else:
            here = order.argsort(dim=1)  # where each of [virtual; real] went
        self.virtual, self.real = here[:, : self.count], here[:, self.count :]
        return (), kwargs

    def _positions(self, real: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions of the real tokens and of the virtual ones, (batch, seq) and (batch, P)."""
        start = self.anatomy.first_position
        mine = torch.arange(self.count, device=real.device).expand(len(real), -1)
        if at is None:
            return real + self.count, mine + start
        before = (at[:, None, :] <= torch.arange(real.shape[1], device=real.device)[:, None]).sum(2)
        earlier = at.argsort(dim=1, stable=True).argsort(dim=1)  # virtual tokens to the left
        ahead = real.gather(1, at.clamp(max=real.shape[1] - 1))  # of the token that it precedes
        behind = real.gather(1, (at - 1).clamp(min=0)) + 1  # padding may follow: count from before
        where = [where for count, where, _ in self.placement for _ in range(count)]
        front = torch.tensor([w == "front" for w in where], device=real.device)
        follows = torch.tensor([w in ("after", "back") for w in where], device=real.device)
        anchored = torch.where(front, start, torch.where(follows, behind, ahead))
        return real + before, earlier + anchored

    def _order(
        self, mask: Tensor, ids: Tensor | None = None, inside: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """How [virtual; real] is put in order, and the real token that each virtual one precedes.

        Unless `inside` the text, which is not known while decoding, they all stand in front: of
        the mask alone that is the same, for there virtual and real tokens are alike.
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
        """[virtual; real] of every row, in order."""
        if isinstance(virtual, int):
            virtual = real.new_full((len(real), self.count), virtual)
        elif virtual.ndim < real.ndim:
            virtual = virtual.expand(len(real), *virtual.shape)
        elif len(virtual) != len(real):
            raise ValueError(f"{len(virtual)} prompts for a batch of {len(real)} rows")
        joined = torch.cat([virtual, real], dim=1)
        if order is None:
            return joined
        return joined.gather(
            1, order.view(*order.shape, *[1] * (joined.ndim - 2)).expand_as(joined)
        )

    def _take_out(self, stack, args, output):
        if self.real is not None and "decoder" not in self.anatomy.stacks:
            hidden = output.last_hidden_state
            if self.simple:
                output.last_hidden_state = hidden[:, self.count :]
            else:
                where = self.real[:, :, None].expand(-1, -1, hidden.shape[2])
                output.last_hidden_state = hidden.gather(1, where)
        return output

    def _widen_mask(self, decoder, args, kwargs):
        """T5's decoder sees the encoder's virtual tokens too."""
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[1] < states.shape[1]:
            order, _ = self._order(mask)
            kwargs = {**kwargs, "encoder_attention_mask": self._arrange(order, mask, 1)}
        return args, kwargs

    def _replace(self, layer: int):
        def hook(block, args, kwargs):
            if self.real is None:
                return args, kwargs
            hidden = args[0] if args else kwargs["hidden_states"]
            own = self.read()["prompt"][..., layer, :, :].to(hidden.dtype)
            own = own.expand(len(hidden), -1, -1)
            where = self.virtual[:, :, None].expand_as(own)
            hidden = hidden.scatter(1, where, own)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook


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
                cache = kwargs.get("past_key_values")
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


class LinearWeight:
    """A delta beside one linear weight:  y = W x + b + delta(x).

    The delta is a module with `forward(x)` and `delta_weight()` (d_out, d_in); one with
    `of_output` True is called as `forward(x, W x)`. Merging writes W + delta_weight() into the
    model, keeps the original rows and takes the hook away; unmerging puts those back. Where
    entries of W are held at zero by a mask M, so are the delta's: it is then (M ⊙ ΔW) x, which has
    no low-rank form. `instead` are other deltas in its place, weighed or row by row.
    """

    def __init__(self, linear: Linear, delta: nn.Module):
        self.name, self.linear, self.delta = linear.name, linear, delta
        self.names = [part.name for part in getattr(linear, "parts", [linear])]
        self.original: object | None = None  # the rows, or codes, that merging replaced
        self.instead: Deltas | None = None

    @property
    def merged(self) -> bool:
        return self.original is not None

    def __enter__(self):
        self.hook = self.linear.module.register_forward_hook(self._add)
        return self

    def __exit__(self, *_):
        self.unmerge()
        self.hook.remove()

    def frozen(self) -> Tensor:
        """W alone, also while the delta is merged into it."""
        if self.merged and self.linear.code is not None:
            raise RuntimeError(f"{self.name} is merged into codes: call unmerge() first")
        return self.original if self.merged else self.linear.weight

    def _add(self, module, args, output):
        x = (args[0],)
        if getattr(self.delta, "of_output", False):
            x += (self.linear.product(output),)
        if self.instead is None:
            added = self._added(self.delta, *x)
        else:
            added = self.instead.apply(self._added, *x)
        return self.linear.add_to(output, added.to(output.dtype))

    def _added(self, delta: Callable, x: Tensor, *product: Tensor) -> Tensor:
        """What one delta adds to the output."""
        if self.linear.mask is None:
            return delta(x, *product)
        weight = self._masked(delta.delta_weight())
        return nn.functional.linear(self._dropout(x.to(weight.dtype)), weight)

    @property
    def _dropout(self) -> Callable[[Tensor], Tensor]:
        """What the delta does to x before its own product, where it has that."""
        return getattr(self.delta, "dropout", nn.Identity())

    def _masked(self, delta: Tensor) -> Tensor:
        mask = self.linear.mask
        return delta if mask is None else torch.where(mask, delta, 0.0)

    @torch.no_grad()
    def merge(self) -> None:
        """Write W + ΔW into the model and keep the original. Codes are encoded anew."""
        if not self.merged:
            code, weight = self.linear.code, self.linear.weight
            delta = self.delta if self.instead is None else self.instead
            summed = weight + self._masked(delta.delta_weight()).to(weight.dtype)
            self.original = weight.clone() if code is None else code.snapshot()
            self.linear.write(summed)
            self.hook.remove()  # a merged weight runs as a plain one

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept original back: restored, not subtracted."""
        if self.merged:
            if self.linear.code is not None:
                self.linear.code.restore(self.original)
            elif isinstance(self.original, Tensor):  # or the codes went, and what was in them
                self.linear.write(self.original)  # follows the model to its device
            self.original = None
            self.hook = self.linear.module.register_forward_hook(self._add)


class CodedProduct(torch.autograd.Function):
    """y = W̃ x with W̃ decoded for this product and again for its gradient: x̄ = W̃ᵀ ȳ.

    Between the two only the codes are there. A weight that is codes has no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, codes: Quantised) -> Tensor:
        ctx.codes = codes  # held by the site anyway: nothing is added to what a step keeps
        return nn.functional.linear(x, codes.dequantise(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ ctx.codes.dequantise(gradient.dtype), None


class CodedWeight:
    """The weight of a whole linear module held as codes:  y = W̃ x + b,  W̃ = m · T[c].

    `linear` is all that the module computes, of GPT-2 q, k and v together. Codes are made of
    (d_out, d_in), row by row, however the module stores it. The original is kept aside, on the CPU,
    and put back on leaving. Where it was, there is a view of a single NaN that takes no memory:
    code that reads past the codes shows.
    """

    in_the_weight = True

    def __init__(self, linear: Linear, **options):
        self.name, self.linear, self.options = f"{linear.name}.codes", linear, options
        self.module, self.transposed = linear.module, linear.transposed
        self.codes: Quantised | None = None

    def __enter__(self):
        if self.module in CODED:
            raise ValueError(f"two methods want the same site, {self.name}")
        weight = self.module.weight
        self.encode(weight)
        self.original = weight.data.cpu()
        try:
            self._leave_a_view(weight.device)
            CODED[self.module] = self
            self.module.forward = self._forward
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.module.__dict__.pop("forward", None)
        CODED.pop(self.module, None)
        self.module.weight.data = self.original.to(self.module.weight.device)

    def _leave_a_view(self, device: torch.device | str) -> None:
        nothing = self.original.new_full((), torch.nan, device=device)
        self.module.weight.data = nothing.expand(self.original.shape)

    def _forward(self, x: Tensor) -> Tensor:
        kind, bias = x.device.type, self.module.bias
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else self.module.weight.dtype
        output = CodedProduct.apply(x.to(dtype), self.codes)
        return output if bias is None else output + bias.to(dtype)

    def decode(self) -> Tensor:
        """W̃ as the module stores it, in the type of the original."""
        weight = self.codes.dequantise(self.module.weight.dtype)
        return weight.T if self.transposed else weight

    def encode(self, weight: Tensor) -> None:
        """Hold this weight, as the module stores it, from now on."""
        self.codes = quantise(weight.T if self.transposed else weight, **self.options)

    def snapshot(self) -> Quantised:
        """The codes as they are now."""
        return self.codes

    def restore(self, snapshot: Quantised) -> None:
        """Hold these codes again, on the module's device."""
        self.codes = snapshot.to(self.module.weight.device)

    def to(self, device: torch.device | str) -> None:
        """The codes follow the model; the original stays where it is."""
        self.codes = self.codes.to(device)
        self._leave_a_view(device)


class MaskedWeight:
    """Some entries of one linear weight held at zero:  y = (M ⊙ W) x + b.

    The mask M is kept as bits, one an entry, and `mask` is what they say; at first all ones. The
    zeros stand in the model's own dense tensor, whose size and speed are what they were. The
    original rows are kept, and put back on leaving. Where W itself trains, `apply` zeroes what a
    step has moved. With `mask_deltas` a delta beside W is held at zero in the same places.
    """

    in_the_weight = True  # there is nothing to merge

    def __init__(self, linear: Linear, mask_deltas: bool = True):
        if linear.code is not None:
            raise ValueError(f"{linear.name} is held as codes: a mask is put on before them")
        self.name, self.linear, self.mask_deltas = f"{linear.name}.mask", linear, mask_deltas

    def __enter__(self):
        self.original = self.linear.weight.detach().clone()
        self.bits = pack(torch.ones_like(self.original, dtype=torch.bool))
        return self

    def __exit__(self, *_):
        self.linear.mask = None
        self.linear.write(self.original)  # follows the model to its device

    @property
    def mask(self) -> Tensor:
        """M (d_out, d_in), False where W is held at zero."""
        return unpack(self.bits, self.linear.d_out, self.linear.d_in)

    @property
    def trains(self) -> bool:
        """Whether the weight itself is being trained."""
        return self.linear.module.weight.requires_grad

    @property
    def now(self) -> Tensor:
        """W (d_out, d_in) that the mask is put on: as it trains, or the original."""
        return self.linear.weight.detach() if self.trains else self.original

    @torch.no_grad()
    def hold(self, mask: Tensor) -> None:
        """Take this mask from now on."""
        self.bits.copy_(pack(mask))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Write M ⊙ W."""
        mask = self.mask
        self.linear.write(self.now.masked_fill(~mask, 0))
        self.linear.mask = mask if self.mask_deltas else None

    refresh = apply  # after the bits were read from a file

    def to(self, device) -> None:
        """Move what is kept beside the model."""
        self.bits, self.original = self.bits.to(device), self.original.to(device)
        if self.linear.mask is not None:
            self.linear.mask = self.linear.mask.to(device)


class SublayerOutput:
    """A small module f after one sublayer, or beside it.

        after    y ← y + f(y)      y: what the last linear map gives, before dropout and residual
        beside   y ← y + f(x)      x: what the first linear map reads

    Hooks on those two maps are all there is, so f runs wherever the sublayer does: with a cache,
    in a recomputed block, under a prefix. Deltas and scales of the last map act before f reads y,
    in whatever order they were attached: `settle` is called when all are.
    """

    alone = "two at one sublayer would have to say which reads the other's output"

    def __init__(self, sublayer: Sublayer, f: nn.Module, beside: bool = False):
        self.name, self.sublayer, self.f, self.beside = sublayer.name, sublayer, f, beside
        self.x: Tensor | None = None  # between the first map and the last

    def __enter__(self):
        self.hooks = ExitStack()
        if self.beside:  # in front of other hooks: a scale on the first map is not x's
            first = self.sublayer.first.module
            hook = first.register_forward_pre_hook(self._read, prepend=True)
            self.hooks.callback(hook.remove)
        self.hook = self.sublayer.last.module.register_forward_hook(self._add)
        return self

    def settle(self) -> None:
        """Go behind all other hooks on the last map."""
        self.hook.remove()
        self.hook = self.sublayer.last.module.register_forward_hook(self._add)

    def __exit__(self, *_):
        self.hook.remove()
        self.hooks.close()
        self.x = None

    def _read(self, module, args):
        self.x = args[0]

    def _add(self, module, args, output):
        x, self.x = (self.x if self.beside else output), None
        return output + self.f(x).to(output.dtype)


class Scale:
    """Factors l on what one linear weight gives, its bias included, or on what it reads.

        y = l ⊙ (W x + b)    l (d_out,)    merged:  W ← diag(l) W,  b ← l ⊙ b
        y = W (l ⊙ x) + b    l (d_in,)     merged:  W ← W diag(l)

    `module.l` holds l. Of a fused module's input there is only one for all its weights, so there
    only an output can be scaled. Merging keeps the original rows; unmerging puts those back.
    """

    alone = "l ⊙ (W + ΔW) x and l ⊙ W x + ΔW x differ, and a list does not say which is meant"

    def __init__(self, linear: Linear, module: nn.Module, of_input: bool = False):
        if of_input and not linear.whole:
            raise ValueError(
                f"{linear.name} is part of a fused weight and shares its input: "
                "only its output can be scaled"
            )
        self.name, self.linear, self.module, self.of_input = linear.name, linear, module, of_input
        self.original: tuple[object, Tensor | None] | None = None  # what merging replaced

    @property
    def merged(self) -> bool:
        return self.original is not None

    def __enter__(self):
        if self.of_input:
            self.hook = self.linear.module.register_forward_pre_hook(self._scale_input)
        else:
            self.hook = self.linear.module.register_forward_hook(self._scale_output)
        return self

    def __exit__(self, *_):
        self.unmerge()
        self.hook.remove()

    def _scale_input(self, module, args):
        if self.merged:
            return args
        return ((args[0] * self.module.l).to(args[0].dtype), *args[1:])

    def _scale_output(self, module, args, output):
        return output if self.merged else self.linear.scale(output, self.module.l)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the scaled weight, and bias, into the model and keep the originals."""
        if self.merged:
            return
        linear, factors = self.linear, self.module.l
        code, weight, bias = linear.code, linear.weight, linear.bias
        kept = weight.clone() if code is None else code.snapshot()
        self.original = (kept, None if bias is None or self.of_input else bias.clone())
        linear.write(weight * (factors if self.of_input else factors[:, None]))
        if self.original[1] is not None:
            linear.module.bias[linear.index] = (bias * factors).to(bias.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept originals back: restored, not divided."""
        if not self.merged:
            return
        linear, (kept, bias) = self.linear, self.original
        if linear.code is not None:
            linear.code.restore(kept)
        elif isinstance(kept, Tensor):  # or the codes went, and what was in them
            linear.write(kept)
        if bias is not None:
            linear.module.bias[linear.index] = bias.to(linear.module.bias.device)
        self.original = None


class Kept:
    """A delta with other tensors in it: what was kept, in the module that trains."""

    def __init__(self, delta: nn.Module, tensors: dict[str, Tensor]):
        self.delta, self.tensors = delta, tensors

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.delta, self.tensors, inputs)

    def delta_weight(self) -> Tensor:
        """ΔW of the kept tensors."""
        names = {f"delta.{name}": tensor for name, tensor in self.tensors.items()}
        return torch.func.functional_call(_Weight(self.delta), names, ())


class _Weight(nn.Module):
    """A delta whose `forward` gives ΔW, for `functional_call` knows no other method."""

    def __init__(self, delta: nn.Module):
        super().__init__()
        self.delta = delta

    def forward(self) -> Tensor:
        return self.delta.delta_weight()


class Deltas:
    """Several kept deltas beside one weight: Σ w_i ΔW_i, or another for each row of the batch.

    The deltas are weighed, not their factors: with factors summed, (B₁ + B₂)(A₁ + A₂) would have
    the products of one adapter's A and another's B in it.
    """

    def __init__(
        self,
        deltas: dict[str, Kept],
        weights: dict[str, float] | None = None,
        rows: list[str] | None = None,
    ):
        self.deltas, self.weights, self.rows = deltas, weights, rows

    def apply(self, added: Callable, *inputs: Tensor) -> Tensor:
        """What they add, `added(delta, *inputs)` being what one of them adds."""
        if self.rows is None:
            return sum(w * added(self.deltas[name], *inputs) for name, w in self.weights.items())
        if len(self.rows) != len(inputs[0]):
            raise ValueError(f"{len(self.rows)} deltas for a batch of {len(inputs[0])} rows")
        parts, order = [], []
        for name, delta in self.deltas.items():  # each delta runs once, on the rows that are its
            its = [i for i, row in enumerate(self.rows) if row == name]
            parts.append(added(delta, *(tensor[its] for tensor in inputs)))
            order += its
        where = torch.tensor(order, device=parts[0].device).argsort()
        return torch.cat(parts)[where]

    def delta_weight(self) -> Tensor:
        """Σ w_i ΔW_i. Raises ValueError where rows differ."""
        if self.rows is not None:
            raise ValueError("rows with deltas of their own cannot be merged into one weight")
        return sum(w * self.deltas[name].delta_weight() for name, w in self.weights.items())


class ExistingParameters:
    """Some of the model's own parameters, unfrozen. The originals are kept aside.

    Training happens on copies inside the same `Parameter` objects; leaving puts the original
    tensors themselves back, so that not even their addresses have changed.
    """

    name = "parameters"
    in_the_weight = True  # there is nothing to merge
    alone = "both would train it"

    def __init__(self, model: nn.Module, names: Iterable[str]):
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in names}
        self.names = [f"parameters: {name}" for name in self.parameters]

    def __enter__(self):
        self.originals = {name: p.data for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *_):
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self.originals[name].to(parameter.device)
