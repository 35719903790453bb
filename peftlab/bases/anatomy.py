"""Where things are inside a frozen model: the embedding, and every linear weight by its role.

Module paths describe each family once. Sizes are read from the modules themselves, never
guessed from a configuration. The logical targets are the same everywhere:

    q k v o      the four projections of an attention
    up down gate the projections of the MLP (gate only where the MLP is gated)
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftlab.attention import AttentionSite, observe
from peftlab.bases.files import FLOATS
from peftlab.bases.plain import plain
from peftlab.bases.shapes import ATTENTION, GATED_MLP, Shape

TARGETS = ATTENTION + GATED_MLP


@dataclass(frozen=True)
class Part:
    """Where a block keeps one linear weight: the module's path, and the part if it is fused."""

    path: str
    part: int = 0
    of: int = 1
    by_head: bool = False  # rows are grouped by head: a head's rows of all parts are together


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture, from the model without its head or from a block.

    `stacks` is keyed by the stack's own path ("" is the whole model), each with its linear weights
    by target; those of T5's second attention are cross.target. `head` is the path of what reads the
    last hidden states in a language model, if those are not the output embeddings themselves.
    """

    kind: str  # "decoder", "encoder" or "encoder-decoder"
    embedding: str
    layers: str  # the blocks in a stack
    stacks: dict[str, dict[str, Part]]
    head: str = ""


def _parts(paths: dict[str, str]) -> dict[str, Part]:
    return {target: Part(path) for target, path in paths.items()}


def _one_matrix(path: str, by_head: bool = False) -> dict[str, Part]:
    """q, k and v, which one fused matrix computes."""
    return {target: Part(path, part, 3, by_head) for part, target in enumerate("qkv")}


_GPT2 = _one_matrix("attn.c_attn") | _parts(
    {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
)
_LLAMA = _parts(
    {target: f"self_attn.{target}_proj" for target in "qkvo"}
    | {target: f"mlp.{target}_proj" for target in GATED_MLP}
)
_GPT_NEOX = _one_matrix("attention.query_key_value", by_head=True) | _parts(
    {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
)
_BERT = _parts(
    {name[0]: f"attention.self.{name}" for name in ("query", "key", "value")}
    | {"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
)
_DISTILBERT = _parts(
    {target: f"attention.{target}_lin" for target in "qkv"}
    | {"o": "attention.out_lin", "up": "ffn.lin1", "down": "ffn.lin2"}
)
_T5_SELF = _parts({target: f"layer.0.SelfAttention.{target}" for target in "qkvo"})
_T5_CROSS = _parts({f"cross.{target}": f"layer.1.EncDecAttention.{target}" for target in "qkvo"})
_T5_MLP = _parts({"up": "layer.1.DenseReluDense.wi", "down": "layer.1.DenseReluDense.wo"})
_T5_DECODER_MLP = _parts({"up": "layer.2.DenseReluDense.wi", "down": "layer.2.DenseReluDense.wo"})
_T5 = {"encoder": _T5_SELF | _T5_MLP, "decoder": _T5_SELF | _T5_CROSS | _T5_DECODER_MLP}
_WORDS = "embeddings.word_embeddings"
FAMILIES = {
    "gpt2": Family("decoder", "wte", "h", {"": _GPT2}),
    "llama": Family("decoder", "embed_tokens", "layers", {"": _LLAMA}),
    "qwen2": Family("decoder", "embed_tokens", "layers", {"": _LLAMA}),
    "gpt_neox": Family("decoder", "embed_in", "layers", {"": _GPT_NEOX}),
    "bert": Family("encoder", _WORDS, "encoder.layer", {"": _BERT}, "cls"),
    "roberta": Family("encoder", _WORDS, "encoder.layer", {"": _BERT}, "lm_head"),
    "distilbert": Family(
        "encoder", _WORDS, "transformer.layer", {"": _DISTILBERT}, "vocab_transform"
    ),
    "t5": Family("encoder-decoder", "shared", "block", _T5),
}


@runtime_checkable
class Coded(Protocol):
    """Something that holds a module's weight as codes: it decodes them and encodes new weights."""

    def decode(self) -> Tensor: ...  # the weight as the module stores it
    def encode(self, weight: Tensor) -> None: ...  # hold this weight from now on
    def snapshot(self) -> object: ...  # the codes as they are now
    def restore(self, snapshot: object) -> None: ...  # hold these codes again


CODES = "peftlab_codes"  # attribute of a module whose weight is held as codes: a `Coded`


@dataclass(eq=False)
class Linear:
    """One linear weight W of shape (d_out, d_in), or those rows of a fused one that have this role.

    GPT-2 stores its weights transposed (`Conv1D`, d_in first), and GPT-NeoX interleaves the rows
    of q, k and v head by head; `weight` is always (d_out, d_in), with the rows in their own order.
    A site may hold the module's weight as codes (`code`): `weight` is then the decoded weight. A
    site may also hold entries at zero, where `mask` (d_out, d_in) is False.
    """

    name: str  # "layers.3.q", "decoder.layers.3.cross.q"
    target: str
    layer: int
    module: nn.Module
    rows: tuple[int, int] | Int[Tensor, " d_out"]  # start and stop, or the number of every row
    transposed: bool
    mask: Tensor | None = None

    @property
    def parts(self) -> list[Linear]:
        """The separate weights: this one alone, or the parts of a fused weight."""
        return [self]

    @property
    def code(self) -> Coded | None:
        """The object that holds this module's weight as codes, or None."""
        return vars(self.module).get(CODES)

    @property
    def index(self) -> slice | Int[Tensor, " d_out"]:
        """The index of these rows in the module's weight, bias or output."""
        return self.rows if isinstance(self.rows, Tensor) else slice(*self.rows)

    @property
    def whole(self) -> bool:
        """Whether the module has this role and no other."""
        return self.d_out == self.module.weight.shape[1 if self.transposed else 0]

    @property
    def _stored(self) -> Float[Tensor, "all_rows d_in"]:
        weight = self.module.weight if self.code is None else self.code.decode()
        return weight.T if self.transposed else weight

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """W: a view of the model's own storage, or a copy if the rows are not contiguous.

        Only `write` changes the model in every family, including weights held as codes.
        """
        return self._stored[self.index]

    @torch.no_grad()
    def write(self, values: Float[Tensor, "d_out d_in"]) -> None:
        """Write these values into the model, on its device and in its dtype, or as codes.

        Raises ValueError if their shape is not that of W.
        """
        if values.shape != (self.d_out, self.d_in):
            given = "×".join(map(str, values.shape))
            raise ValueError(f"{self.name} is {self.d_out}×{self.d_in}, not {given}")
        stored = self._stored
        stored[self.index] = values.to(stored.device, stored.dtype)
        if self.code is not None:
            self.code.encode(stored.T if self.transposed else stored)

    def product(self, output: Float[Tensor, "*batch all_rows"]) -> Float[Tensor, "*batch d_out"]:
        """W x from the module's output: this weight's columns minus the bias; never a view."""
        rows = output[..., self.index]
        return rows.clone() if self.bias is None else rows - self.bias

    def add_to(
        self, output: Float[Tensor, "*batch all_rows"], delta: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch all_rows"]:
        """The module's output, with delta added to the columns that this weight computes.

        A fused output is changed in place, so that q, k and v can be added one after another.
        """
        if output.shape == delta.shape:
            return output + delta
        if isinstance(self.rows, Tensor):
            return output.index_add_(-1, self.rows.to(output.device), delta)
        output[..., slice(*self.rows)].add_(delta)
        return output

    def scale(
        self, output: Float[Tensor, "*batch all_rows"], factors: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "*batch all_rows"]:
        """The module's output, with this weight's columns multiplied by `factors`."""
        if self.whole:
            return (output * factors).to(output.dtype)
        if output.dtype == factors.dtype and isinstance(self.index, slice):
            output[..., self.index].mul_(factors)  # autograd keeps the values before scaling
            return output
        rows = output[..., self.index].clone()  # 16 bits: the gradient sums in the factors' type
        output[..., self.index] = (rows * factors).to(output.dtype)
        return output

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """b, if there is one: a view or a copy, like `weight`."""
        return None if self.module.bias is None else self.module.bias[self.index]

    @property
    def d_out(self) -> int:
        return len(self.rows) if isinstance(self.rows, Tensor) else self.rows[1] - self.rows[0]

    @property
    def d_in(self) -> int:
        return self.module.weight.shape[0 if self.transposed else 1]


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One attention or MLP of a block: `first` reads x, `last` computes y.

    y includes the bias of `last`; it is taken before dropout, the residual sum and any later norm.
    """

    name: str  # "layers.3.attention", "layers.3.mlp", "decoder.layers.3.cross"
    kind: str  # "attention", "cross" or "mlp"
    first: Linear  # its q, or up
    last: Linear  # its o, or down


class Fused(Linear):
    """Several weights of one module as one weight, with their rows in the module's order.

    Its name joins their targets, "layers.3.qkv"; `parts` are the separate weights.
    """

    def __init__(self, parts: list[Linear]):
        first = parts[0]
        self._parts, self.layer, self.module = parts, first.layer, first.module
        self.target = "".join(part.target for part in parts)
        self.name = first.name.removesuffix(first.target) + self.target
        self.transposed = first.transposed
        with plain():
            every = torch.arange(max(first.module.weight.shape))
            rows, self.order = torch.cat([every[part.index] for part in parts]).sort()
            start, stop = rows[0].item(), rows[-1].item() + 1
        self.rows = (start, stop) if stop - start == len(rows) else rows

    @property
    def parts(self) -> list[Linear]:
        return self._parts

    @property
    def mask(self) -> Tensor | None:
        """The joined masks of the parts, or None if no part has one."""
        if all(part.mask is None for part in self.parts):
            return None
        size = self.module.weight.new_ones
        masks = [size(p.d_out, p.d_in) if p.mask is None else p.mask for p in self.parts]
        return torch.cat([mask.bool() for mask in masks])[self.order]


def fused(linears: list[Linear]) -> list[Linear]:
    """The same weights, with those of one module joined into one."""
    modules: dict[nn.Module, list[Linear]] = {}
    for linear in linears:
        modules.setdefault(linear.module, []).append(linear)
    return [parts[0] if len(parts) == 1 else Fused(parts) for parts in modules.values()]


class Anatomy:
    """The parts of one model that methods reach.

    shape      its sizes, with the head that this model really has
    stacks     the modules that turn tokens or vectors into hidden states: {"": …}, or T5's
               "encoder" and "decoder"; `backbone` is the only stack, or the encoder
    layers     the blocks of each stack
    embedding  the token embedding (both stacks of T5 look up the same tensor)
    linears    every linear weight by name, "layers.3.q"; in T5 the name of the stack comes first,
               and the decoder's second attention has "decoder.layers.3.cross.q"
    """

    def __init__(self, model: nn.Module, name: str):
        self.model = model
        family = FAMILIES[model.config.model_type]
        backbone = model.base_model  # the model without its head; T5 or headless: the model itself
        self.family, self.kind = model.config.model_type, family.kind
        self.shape = _measured_head(model, Shape.from_config(model.config, name=name))
        self.bare = False  # True: the model runs without its attached virtual tokens
        self.stacks: dict[str, nn.Module] = {}
        self.layers: dict[str, list[nn.Module]] = {}
        self.linears: dict[str, Linear] = {}
        for stack, parts in family.stacks.items():
            if self.shape.gated and "gate" not in parts:  # a newer T5
                up = parts["up"].path
                parts = parts | {"up": Part(f"{up}_1"), "gate": Part(f"{up}_0")}
            self.stacks[stack] = backbone.get_submodule(stack)
            self.layers[stack] = list(self.stacks[stack].get_submodule(family.layers))
            for layer, block in enumerate(self.layers[stack]):
                for key, part in parts.items():
                    site = f"{stack}.layers.{layer}.{key}".removeprefix(".")
                    self.linears[site] = self._linear(site, layer, block, part)

    def _linear(self, site: str, layer: int, block: nn.Module, part: Part) -> Linear:
        module = block.get_submodule(part.path)
        kind, held = type(module), module.weight.dtype
        if kind not in (nn.Linear, Conv1D) or held not in FLOATS:
            raise ValueError(
                f"{self.shape.name}: {site} is a {kind.__name__} of {held}, no linear map of "
                "floating-point numbers: load the unquantised weights"
            )
        transposed = kind is Conv1D
        every = module.weight.shape[1 if transposed else 0]
        size = every // part.of
        rows = (part.part * size, (part.part + 1) * size)
        if part.by_head:
            with plain():
                numbers = torch.arange(every).view(self.shape.heads, part.of, -1)
                rows = numbers[:, part.part].flatten()
        return Linear(site, site.rsplit(".", 1)[-1], layer, module, rows, transposed)

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding as it is now: adding tokens replaces it."""
        return self.model.base_model.get_submodule(FAMILIES[self.family].embedding)

    @property
    def shape(self) -> Shape:
        """The sizes as they are now, with the tokens that were added."""
        rows = self.embedding.num_embeddings
        return self._shape if rows == self._shape.vocab else replace(self._shape, vocab=rows)

    @shape.setter
    def shape(self, shape: Shape) -> None:
        self._shape = shape

    @property
    def backbone(self) -> nn.Module:
        """The stack that reads the input: the only one, or T5's encoder."""
        return next(iter(self.stacks.values()))

    @cached_property
    def sublayers(self) -> list[Sublayer]:
        """Every attention and MLP, block by block."""
        found = []
        for name, last in self.linears.items():
            if last.target in ("o", "down"):
                where = name.removesuffix(last.target)
                first, kind = ("q", "attention") if last.target == "o" else ("up", "mlp")
                block = where.removesuffix("cross.")
                kind = kind if where == block else "cross"
                found.append(Sublayer(block + kind, kind, self.linears[where + first], last))
        return found

    @cached_property
    def attentions(self) -> list[AttentionSite]:
        """Every attention sublayer that a prefix can reach; one run of the model finds them."""
        with self.alone():
            return observe(self.model, self.layers)

    @contextlib.contextmanager
    def alone(self):
        """Inside, the model runs without the virtual tokens that are attached to it."""
        before, self.bare = self.bare, True
        try:
            yield
        finally:
            self.bare = before

    @contextlib.contextmanager
    def reading(self, places: Int[Tensor, " n"]):
        """Inside, the language-model head reads the hidden states at these places alone, numbered
        through the rows of a batch: the model's logits are (n, vocab).

        Other threads that run the model meanwhile get all logits.
        """
        mine = threading.get_ident()

        def pick(module, args):
            if threading.get_ident() == mine:
                return (args[0].flatten(0, 1).index_select(0, places),)

        path = FAMILIES[self.family].head
        head = self.model.get_submodule(path) if path else self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()

    @property
    def takes_positions(self) -> bool:
        """Whether the model can be told the positions of its tokens; T5 has only distances."""
        return self.kind != "encoder-decoder"

    @property
    def first_position(self) -> int:
        """The position of the first token: RoBERTa's table begins with unused rows."""
        return self.shape.positions - self.shape.context if self.family == "roberta" else 0

    def positions(self, mask: Shaped[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """The position of every token, counted without the padding on either side."""
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0) + self.first_position

    @property
    def targets(self) -> tuple[str, ...]:
        """The logical targets that this family has."""
        found = {linear.target for linear in self.linears.values()}
        return tuple(target for target in TARGETS if target in found)

    def select(self, targets: tuple[str, ...]) -> list[Linear]:
        """The linear weights with one of these roles, layer by layer.

        Raises ValueError for a role that this family does not have.
        """
        if unknown := [t for t in targets if t not in self.targets]:
            has = ", ".join(self.targets)
            raise ValueError(f"unknown target {unknown[0]!r}: {self.family} has {has}")
        return [linear for linear in self.linears.values() if linear.target in targets]


def _measured_head(model: nn.Module, shape: Shape) -> Shape:
    """The shape with the head that this model has, and tied or not as the model was loaded."""
    head = model.get_output_embeddings()
    if head is not None:
        tied = head.weight is model.get_input_embeddings().weight
        return replace(shape, head="masked_lm" if shape.kind == "encoder" else "lm", tied=tied)
    pooler = getattr(model.base_model, "pooler", None)
    return replace(shape, head="none" if pooler is None else "pooler")
