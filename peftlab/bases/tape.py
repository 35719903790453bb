"""A training step as pure numbers: which tensors its forward pass keeps for the backward pass.

Autograd keeps a tensor only where a derivative needs it. `Tape` has one method for each operation
of the families here, with that operation's rule; the walks below it call them in the order in
which a model computes, and a method says through its `Plan` what it adds at which site.

    y = x Wᵀ + b     x is kept if W trains; a frozen W needs x for nothing
    norm(x)          x and its statistics, if x carries a gradient or the norm trains
    gelu(x), silu(x) x, if it carries a gradient
    a ⊙ b            a if b carries a gradient, b if a does
    attention        q, k, v, the output, one number a row, if any of the three carries a gradient
    cross entropy    the log-probabilities

So what a layer keeps hangs on one question: does a gradient pass here at all? Below the first
trained tensor none does, and nothing is kept.

The rules are those of torch's operations on a CPU without dropout, and of rows without padding;
tests hold every one against what autograd really keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from peftlab.bases.shapes import Shape

Names = Callable[[str], bool]  # which of the names "layers.3.q", "layers.3.norm1.bias", …


@dataclass(eq=False)
class Value:
    """A tensor as numbers: its rows and width, whether a gradient flows to it, bytes of a number.

    Views share the storage of what they show, so a view is the same Value.
    """

    rows: int
    width: int
    grad: bool = False
    size: int = 4

    @property
    def bytes(self) -> int:
        return self.rows * self.width * self.size


@dataclass
class Plan:
    """What methods add to a forward pass, site by site.

    prompt       virtual tokens at the input; `placed`: not all in front of everything;
                 `every_layer`: written over with others at each layer's input
    prefixes     (count, takes): virtual keys and values where takes(stack, layer)
    before       (names, f): f(tape, x) stands in place of these linear maps' input
    beside       (names, f, shared): f(tape, x, y) is added to the output y of these linear maps;
                 `shared`: once for all that one module computes together
    after        (names, f): f(tape, x, y) stands in place of the output y of these linear maps, or
                 sublayers ("layers.3.mlp"), that read x
    masked       weights some of whose entries are held at zero, and a delta's beside them
    trains       which of the model's own tensors train, by name
    prompt_makers, prefix_makers   f(tape): networks that make them, run once by the prompt, and
                                   once in each stack by the prefix
    standing     bytes that stand beside the weights and do not train
    aside        bytes that wait to be put back, and masks
    decoded      weights of the largest matrix that codes are decoded to for a moment
    """

    shape: Shape
    prompt: int = 0
    placed: bool = False
    every_layer: bool = False
    prefixes: list[tuple[int, Callable[[str, int], bool]]] = field(default_factory=list)
    before: list[tuple[Names, Callable[[Tape, Value], Value]]] = field(default_factory=list)
    beside: list[tuple[Names, Callable[[Tape, Value, Value], Value], bool]] = field(
        default_factory=list
    )
    after: list[tuple[Names, Callable[[Tape, Value, Value], Value]]] = field(default_factory=list)
    masked: list[Names] = field(default_factory=list)
    unfrozen: list[Names] = field(default_factory=list)
    prompt_makers: list[Callable[[Tape], None]] = field(default_factory=list)
    prefix_makers: list[Callable[[Tape], None]] = field(default_factory=list)
    standing: int = 0
    aside: int = 0
    decoded: int = 0

    def put_beside(
        self, targets: Sequence[str], delta: Callable[[Tape, Value, Value], Value], shared=False
    ) -> None:
        """A delta beside every linear map with one of these logical names."""
        self.beside.append((lambda name: name.rsplit(".", 1)[-1] in targets, delta, shared))

    def trains(self, name: str) -> bool:
        """Whether this tensor of the model itself trains."""
        return any(names(name) for names in self.unfrozen)

    def prefix(self, stack: str, layer: int) -> int:
        """Virtual keys in the attentions of this layer."""
        return sum(count for count, takes in self.prefixes if takes(stack, layer))


class Tape:
    """The operations of a forward pass on `Value`s, and what they keep: `kept`, value → place."""

    def __init__(self, plan: Plan, batch: int):
        self.plan, self.batch = plan, batch
        self.kept: dict[Value, str] = {}
        self.place = "input"
        self.order: Value | None = None
        self.under_mask = False  # while a delta is asked what it keeps
        self.joined = False  # and it is one delta for several weights
        self.around_loss = self.around_layer = 0  # bytes needed for a moment, beside what is kept
        self.cache: dict[str, Value] = {}

    def keep(self, *values: Value | None) -> None:
        """These are needed in the backward pass: each is counted where it is first kept."""
        for value in values:
            if value is not None:
                self.kept.setdefault(value, self.place)

    def by_place(self) -> dict[str, int]:
        """Bytes kept, by the place that needed them first."""
        places: dict[str, int] = {}
        for value, place in self.kept.items():
            places[place] = places.get(place, 0) + value.bytes
        return places

    def shared(self, name: str, rows: int, width: int, size: int = 4) -> Value:
        """A tensor that several layers read, made once."""
        return self.cache.setdefault(name, Value(rows, width, size=size))

    def heads(self, stack: str, layer: int, cross: bool = False) -> tuple[int, int]:
        """Heads of an attention, and those of its keys. Some may have been taken out."""
        shape = self.plan.shape
        left = getattr(shape, "attention", ())
        first = (shape.layers if stack == "decoder" else 0) + cross * shape.decoder_layers
        return left[first + layer] if left else (shape.heads, shape.kv_heads)

    def d_ff(self, stack: str, layer: int) -> int:
        """Width of an MLP. Some neurons may have been taken out."""
        left = getattr(self.plan.shape, "neurons", ())
        first = self.plan.shape.layers if stack == "decoder" else 0
        return left[first + layer] if left else self.plan.shape.d_ff

    # --- operations --------------------------------------------------------------------------

    def linear(self, x: Value, width: int, weight: bool = False, bias: bool = False) -> Value:
        """x Wᵀ + b, told which of the two train."""
        if weight:
            self.keep(x)
        return Value(x.rows, width, x.grad or weight or bias)

    def mapped(self, x: Value, width: int, *names: str) -> Value:
        """One linear map of the model by its name, or a fused one by several, and what is there."""
        for here, change in self.plan.before:
            if here(names[0]):
                x = change(self, x)
        y = self.linear(
            x,
            width,
            any(self.plan.trains(f"{name}.weight") for name in names),
            any(self.plan.trains(f"{name}.bias") for name in names),
        )
        part = width // len(names)
        for here, delta, shared in self.plan.beside:
            hits = [name for name in names if here(name)]
            for its in [hits] if shared and hits else [[name] for name in hits]:
                self.joined = len(its) > 1
                self.under_mask = any(held(name) for name in its for held in self.plan.masked)
                if delta(self, x, Value(y.rows, part * len(its), y.grad)).grad:
                    y = replace(y, grad=True)
        if len(names) == 1:
            return self.at(names[0], x, y)
        for name in names:  # a part of a fused output is changed in place
            if self.at(name, x, Value(y.rows, part, y.grad)).grad:
                y = replace(y, grad=True)
        return y

    def at(self, name: str, x: Value, y: Value) -> Value:
        """An output y, after what methods put behind it; x was read for it."""
        for here, change in self.plan.after:
            if here(name):
                y = change(self, x, y)
        return y

    def norm(self, x: Value, name: str) -> Value:
        """LayerNorm (x, mean and deviation) or RMSNorm, which the families build out of parts."""
        weight, bias = (self.plan.trains(f"{name}.{part}") for part in ("weight", "bias"))
        normed = Value(x.rows, x.width, x.grad or weight or bias)
        if self.plan.shape.norm_size > x.width:
            if normed.grad:
                self.keep(x, Value(x.rows, 1), Value(x.rows, 1))
            return normed
        if x.grad:  # x² and x · r keep x, the root and the product keep r
            self.keep(x, Value(x.rows, 1))
        if weight:
            self.keep(Value(x.rows, x.width))  # x · r, before it is scaled
        return normed

    def act(self, x: Value, kind: str | None = None) -> Value:
        """The nonlinearity. "gelu_new" is written out in Python and keeps four tensors."""
        kind, y = kind or self.plan.shape.activation, Value(x.rows, x.width, x.grad)
        # Alive for a moment: it and its input, or their gradients, and three of the width d_model.
        wide = 2 * x.width + 3 * self.plan.shape.d_model
        self.around_layer = max(self.around_layer, Value(x.rows, wide).bytes)
        if x.grad and kind in ("relu", "tanh"):
            self.keep(y)
        elif x.grad:
            self.keep(x)
            if kind == "gelu_new":  # x / 2, tanh(…), 1 + tanh(…)
                self.keep(*(Value(x.rows, x.width) for _ in range(3)))
        return y

    def product(self, a: Value, b: Value) -> Value:
        """a ⊙ b, of one size."""
        if b.grad:
            self.keep(a)
        if a.grad:
            self.keep(b)
        return Value(a.rows, a.width, a.grad or b.grad)

    def times(self, x: Value, made: bool = False) -> Value:
        """x times a trained number for each column, which is kept too if it was `made`."""
        self.keep(x)
        if made and x.grad:
            self.keep(Value(1, x.width))
        return Value(x.rows, x.width, True)

    def masked(self, x: Value, width: int) -> Value:
        """(M ⊙ ΔW) x: ΔW is formed, and M is there already, unless it is put together first."""
        self.keep(x, *([Value(width, x.width, size=1)] if self.joined else ()))
        if x.grad:
            self.keep(Value(width, x.width))
        return Value(x.rows, width, True)

    def add(self, a: Value, b: Value) -> Value:
        """a + b keeps nothing."""
        return Value(a.rows, a.width, a.grad or b.grad)

    def scaled(self, x: Value) -> Value:
        """x times a plain number keeps nothing."""
        return Value(x.rows, x.width, x.grad)

    def rotated(self, x: Value) -> Value:
        """Rotary positions: cosines and sines, the same in every layer."""
        if x.grad:
            rows, width = x.rows, self.plan.shape.head_dim
            self.keep(*(self.shared(name, rows, width) for name in ("cos", "sin")))
        return Value(x.rows, x.width, x.grad)

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        heads: tuple[int, int],
        stack: str,
        layer: int,
        bias: Value | None = None,
        causal: bool = True,
        cross: bool = False,
    ) -> Value:
        """Fused attention. With a prefix anywhere it runs through peftlab's own function.

        `bias` is T5's position bias, of heads · queries · keys numbers. A bias that trains keeps
        torch from its fused kernel: queries, keys, values and weights are then kept apart.
        """
        batch, width = self.batch, self.plan.shape.head_dim
        (heads, kv_heads), inner = heads, heads[0] * width
        rows = q.rows  # batch · queries
        queries, keys = rows // batch, k.rows // batch
        virtual, ours = self.plan.prefix(stack, layer), bool(self.plan.prefixes)
        mask = None
        if bias is not None and bias.grad:
            if causal and not cross:
                self.keep(Value(queries, keys, size=1))  # where the mask was laid over the bias
            self.keep(Value(rows, inner), Value(k.rows, inner), Value(k.rows, inner))
            self.keep(Value(rows * heads, keys))
            return Value(rows, inner, True)
        if ours:
            explicit = causal and not cross
            if explicit and bias is None and not virtual:
                mask = self.shared(f"mask {stack}", rows, keys)
            elif explicit:
                mask = Value(rows * (1 if bias is None else heads), keys + virtual)
            elif bias is not None:
                mask = Value(heads * queries, keys + virtual) if virtual else bias
            if virtual:
                k, v = (Value(batch * (keys + virtual), kv_heads * width, True) for _ in (k, v))
            if heads > kv_heads:
                k, v = (Value(x.rows, inner, x.grad) for x in (k, v))
        elif bias is not None:
            mask = bias if cross else Value(heads * queries, keys)
        out = Value(rows, inner, q.grad or k.grad or v.grad)
        if out.grad:
            self.keep(q, k, v, out, Value(rows, heads), mask)
        return out

    def cross_entropy(self, logits: Value, rows: int, copied: bool) -> None:
        """Log-probabilities of the `rows` that are scored, their labels if copied, their number."""
        self.place = "output"
        scored = Value(rows, logits.width)
        if logits.grad:
            self.keep(scored, Value(1, 1))
            if copied:
                self.keep(Value(rows, 1, size=8))
        # Beside the log-probabilities: logits and a copy of those that score, or two gradients.
        forward = logits.bytes + (scored.bytes if copied else 0)
        self.around_loss = max(forward, 2 * scored.bytes)

    def run(self, makers: list[Callable[[Tape], None]]) -> None:
        for maker in makers:
            maker(self)

    def enter(self, stack: str, layer: int) -> str:
        """The place of a layer, whose virtual tokens may be written over in front of it."""
        if self.plan.every_layer and stack != "decoder" and layer:
            self.keep(self.order)
        self.place = f"{stack}.layers.{layer}".removeprefix(".")
        return self.place

    # --- what every family begins with -------------------------------------------------------

    def embedded(self, length: int) -> Value:
        """Tokens, their positions and segments where these are learned, and virtual tokens."""
        shape, plan, rows = self.plan.shape, self.plan, self.batch * length
        self.run(plan.prefix_makers)
        if plan.prompt:
            self.run(plan.prompt_makers)
        trains = plan.trains("embedding.weight")
        for name, learned in (("positions", shape.positions), ("segments", shape.segments)):
            if learned and plan.trains(f"{name}.weight"):
                trains = True
                self.keep(Value(rows, 1, size=8))
        if not plan.prompt:
            return Value(rows, shape.d_model, trains)
        rows += self.batch * plan.prompt
        joined = Value(rows, shape.d_model, True)
        if plan.placed or shape.kind == "encoder-decoder":  # put in order by their numbers
            self.order = Value(rows, 1, size=8)  # where each of [virtual; real] went
            self.keep(joined, Value(rows, 1, size=8))
            return Value(rows, shape.d_model, True)
        self.order = Value(length + plan.prompt, 1, size=8)
        return joined

    def without_prompt(self, x: Value, length: int) -> Value:
        """The hidden states of the real tokens, taken out behind the stack."""
        if not self.plan.prompt:
            return x
        if self.plan.placed:
            self.keep(x, self.order)
        return Value(self.batch * length, x.width, x.grad)


# --- the families: what each computes, in its order ----------------------------------------------


def gpt2(tape: Tape, length: int) -> Value:
    """Norm before each sublayer; q, k and v come out of one matrix and stay one tensor."""
    shape = tape.plan.shape
    x = tape.embedded(length)
    for layer in range(shape.layers):
        at = tape.enter("", layer)
        h = tape.norm(x, f"{at}.norm1")
        heads = tape.heads("", layer)
        inner = heads[0] * shape.head_dim
        qkv = tape.mapped(h, 3 * inner, *(f"{at}.{t}" for t in "qkv"))
        a = tape.mapped(tape.attention(qkv, qkv, qkv, heads, "", layer), shape.d_model, f"{at}.o")
        x = tape.add(x, tape.at(f"{at}.attention", h, a))
        h = tape.norm(x, f"{at}.norm2")
        x = tape.add(x, _mlp(tape, h, layer))
    tape.place = "output"
    return tape.without_prompt(tape.norm(x, "norm"), length)


def llama(tape: Tape, length: int) -> Value:
    """RMSNorm, rotary positions on q and k, a gated MLP."""
    shape = tape.plan.shape
    x = tape.embedded(length)
    for layer in range(shape.layers):
        at = tape.enter("", layer)
        h = tape.norm(x, f"{at}.norm1")
        heads = tape.heads("", layer)
        inner, d_kv = (count * shape.head_dim for count in heads)
        q = tape.mapped(h, inner, f"{at}.q")
        k, v = (tape.mapped(h, d_kv, f"{at}.{t}") for t in "kv")
        a = tape.attention(tape.rotated(q), tape.rotated(k), v, heads, "", layer)
        a = tape.mapped(a, shape.d_model, f"{at}.o")
        x = tape.add(x, tape.at(f"{at}.attention", h, a))
        x = tape.add(x, _mlp(tape, tape.norm(x, f"{at}.norm2"), layer))
    tape.place = "output"
    return tape.without_prompt(tape.norm(x, "norm"), length)


def _mlp(tape: Tape, x: Value, layer: int, stack: str = "") -> Value:
    """W_down act(W_up x), or W_down (act(W_gate x) ⊙ W_up x)."""
    shape, d_ff, at = tape.plan.shape, tape.d_ff(stack, layer), tape.place
    if shape.gated:
        gate = tape.act(tape.mapped(x, d_ff, f"{at}.gate"))
        h = tape.product(gate, tape.mapped(x, d_ff, f"{at}.up"))
    else:
        h = tape.act(tape.mapped(x, d_ff, f"{at}.up"))
    return tape.at(f"{at}.mlp", x, tape.mapped(h, shape.d_model, f"{at}.down"))


def bert(tape: Tape, length: int) -> Value:
    """Norm behind each sum; every token sees every other."""
    shape = tape.plan.shape
    x = tape.norm(tape.embedded(length), "norm")
    for layer in range(shape.layers):
        at = tape.enter("", layer)
        heads = tape.heads("", layer)
        q, k, v = (tape.mapped(x, heads[0] * shape.head_dim, f"{at}.{t}") for t in "qkv")
        h = tape.attention(q, k, v, heads, "", layer, causal=False)
        h = tape.at(f"{at}.attention", x, tape.mapped(h, shape.d_model, f"{at}.o"))
        x = tape.norm(tape.add(x, h), f"{at}.norm1")
        x = tape.norm(tape.add(x, _mlp(tape, x, layer)), f"{at}.norm2")
    tape.place = "output"
    return tape.without_prompt(x, length)


def t5(tape: Tape, length: int, targets: int) -> Value:
    """Two stacks; each has one bias of relative positions, and the decoder reads the encoder."""
    shape = tape.plan.shape
    tape.place = "encoder.input"
    states = _t5_stack(tape, tape.embedded(length), "encoder", shape.layers)
    tape.run(tape.plan.prefix_makers)
    tape.place = "decoder.input"
    rows = tape.batch * targets
    x = Value(rows, shape.d_model, tape.plan.trains("embedding.weight"))
    return _t5_stack(tape, x, "decoder", shape.decoder_layers, states)


def _t5_stack(tape: Tape, x: Value, stack: str, layers: int, states: Value | None = None) -> Value:
    shape, plan = tape.plan.shape, tape.plan
    queries, keys = x.rows // tape.batch, 0 if states is None else states.rows // tape.batch
    trains = plan.trains(f"{stack}.bias.weight")
    bias = Value(shape.heads * queries, queries, trains)
    nothing = Value(tape.heads(stack, 0, states is not None)[0] * queries, keys)  # zeros, for all
    whole = {(shape.heads, shape.kv_heads)}
    fewer = not whole.issuperset(getattr(shape, "attention", ()))  # each takes its own columns
    for layer in range(layers):
        at = tape.enter(stack, layer)
        if layer == 0 and trains:
            tape.keep(Value(queries, queries, size=8))  # the number of every pair's distance
        h = tape.norm(x, f"{at}.norm1")
        heads = tape.heads(stack, layer)
        if trains and fewer:
            tape.keep(Value(heads[0], 1, size=8))  # which columns of the bias
        q, k, v = (tape.mapped(h, heads[0] * shape.head_dim, f"{at}.{t}") for t in "qkv")
        a = tape.attention(q, k, v, heads, stack, layer, bias, causal=stack == "decoder")
        a = tape.mapped(a, shape.d_model, f"{at}.o")
        x = tape.add(x, tape.at(f"{at}.attention", h, a))
        if states is not None:
            h = tape.norm(x, f"{at}.cross.norm")
            heads = tape.heads(stack, layer, cross=True)
            inner = heads[0] * shape.head_dim
            q = tape.mapped(h, inner, f"{at}.cross.q")
            k, v = (tape.mapped(states, inner, f"{at}.cross.{t}") for t in "kv")
            a = tape.attention(q, k, v, heads, stack, layer, nothing, cross=True)
            a = tape.mapped(a, shape.d_model, f"{at}.cross.o")
            x = tape.add(x, tape.at(f"{at}.cross", h, a))
        x = tape.add(x, _mlp(tape, tape.norm(x, f"{at}.norm2"), layer, stack))
    tape.place = f"{stack}.output"
    return tape.norm(x, f"{stack}.norm")


FAMILIES = {"gpt2": gpt2, "llama": llama, "qwen2": llama, "bert": bert, "roberta": bert, "t5": t5}


def record(plan: Plan, batch: int, length: int, targets: int, head=None) -> Tape:
    """One training step of a batch of full rows, `targets` tokens long where a decoder writes.

    `head(tape, hidden)` stands in place of the model's own and gives (logits, rows that score).
    """
    shape, tape = plan.shape, Tape(plan, batch)
    if shape.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{shape.family} has no walk: what a step keeps is known for {known}")
    if shape.decoder_layers:
        h = tape.scaled(t5(tape, length, targets))  # tied tables: states are scaled down
        tape.place = "output"
        logits = tape.linear(h, shape.vocab, plan.trains("head.weight"))
        tape.cross_entropy(logits, batch * targets, copied=False)
        return tape
    hidden = FAMILIES[shape.family](tape, length)
    if head is not None:
        logits, rows = head(tape, hidden)
        tape.cross_entropy(logits, rows, copied=False)
    elif shape.head == "masked_lm":
        h = tape.act(tape.mapped(hidden, shape.d_model, "head.dense"))
        h = tape.norm(h, "head.norm")
        weight, bias = (plan.trains(f"head.{part}") for part in ("weight", "bias"))
        tape.cross_entropy(tape.linear(h, shape.vocab, weight, bias), batch * length, copied=False)
    elif shape.head == "lm":  # the logits of each token score the next one
        logits = tape.linear(hidden, shape.vocab, plan.trains("head.weight"))
        tape.cross_entropy(logits, batch * (length - 1), copied=True)
    else:
        raise ValueError(f"{shape.name} has no head of its own: give one")
    return tape
