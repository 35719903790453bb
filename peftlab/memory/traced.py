"""A training step on tensors without numbers: what it takes, told before there are weights.

The model is built from its config, the methods are attached, and the step is taken by the very code
that `measure` runs, on torch's fake tensors: they have sizes and storages, and no memory. So what
is predicted is what is measured, of any model whose config transformers knows, on a machine that
could not hold it.

What a step keeps, as a rule:

    linear map   its input where the weight or a delta beside it trains; the weight itself where its
                 input carries a gradient; nothing for a bias
    LayerNorm    its input and two numbers a token, where a gradient passes or a part of it trains
    RMSNorm      its input where that carries a gradient, the scaled input where its weight trains
    attention    q, k, v, its output, and a number a query and head
    nonlinearity its input
    loss         the log-probabilities: batch × tokens × vocabulary
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import masking_utils

from peftlab.bases import CLASSES, FAMILIES, Base, LanguageModel
from peftlab.bases.plain import plain
from peftlab.bases.shapes import Shape, named_config, names
from peftlab.memory.step import DTYPES, Counter, How, Memory, followed
from peftlab.methods import Method
from peftlab.methods.heads import Classification, Head, Spans
from peftlab.tasks import IGNORED
from peftlab.tuned import Tuned, attach


def predict(
    methods: Method | list[Method],
    model: Any,
    batch: int = 1,
    length: int = 128,
    *,
    targets: int | None = None,
    head: Head | None = None,
    dtype: str = "float32",
    checkpointing: bool = False,
    optimiser: str = "adamw",
    device: str = "cpu",
) -> Memory:
    """What `measure` would find for these methods on this model, without its weights.

    `model` is a base, a transformers config, or a name of `bases.shapes.names()`. The step is on
    `batch` full rows of `length` tokens, dropout off. The last `targets` tokens of a row have a
    label, or all of them; T5's decoder writes so many tokens, as many as `length` if not told.

    `dtype` is that of the arithmetic and of a frozen model; what trains is in float32, and so is
    the whole of a model whose own parameters train. Below float32 the forward pass runs under
    autocast. A base keeps the type that it was loaded in. `checkpointing` keeps the input of each
    block alone.

    With `device="cuda"` no GPU is needed. A GPU differs in this: attention goes to the kernels that
    it has; autocast does norms, powers and sums in float32; AdamW works on all tensors together and
    has one more copy of what trains for a moment; originals of coded weights are not on the GPU;
    blocks are multiples of 512 bytes; and matrix products take a workspace of 32 MiB, as on a
    Hopper, where others take 8. What a kernel takes inside is not counted.

    Which entries a mask holds at zero, and which structures go, is no question of size, so where
    that depends on the weights the first of them go. Every question of a tensor is answered with
    yes: rows are full, weights are finite.

    Raises ValueError for a setting out of range, for rows that do not fit the context, for a family
    that peftlab does not know, and for an encoder without a head of its own and none given.
    """
    again = Gpu if device == "cuda" else contextlib.nullcontext
    how = How(device, dtype, checkpointing, optimiser, again=again)
    with blank(methods, model, how, head) as tuned:
        counter = Counter() if device == "cpu" else _Blocks()
        return followed(tuned, rows(tuned, batch, length, targets), how, counter)


@contextlib.contextmanager
def blank(
    methods: Method | list[Method], model: Any, how: How, head: Head | None = None
) -> Iterator[Tuned]:
    """Inside, the methods are attached to a model without numbers, and steps can be taken."""
    methods = list(methods) if isinstance(methods, list | tuple) else [methods]
    made = _blank(_facts_of(model, how.dtype, methods))
    try:
        with made.numberless(how), attach(made.base, methods, head=head) as tuned:
            yield tuned
    except BaseException:
        _blank.cache_clear()  # whatever the error left behind
        raise


def rows(tuned: Tuned, batch: int, length: int, targets: int | None = None) -> dict[str, Tensor]:
    """A batch of full rows, with the labels that its head reads."""
    for name, value in (("batch", batch), ("length", length), ("targets", targets)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: allowed is at least 1")
    ids = torch.zeros(batch, length, dtype=torch.long)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if targets is not None:
        with plain():  # their number decides what the head reads
            given["labels"] = torch.full((batch, length), IGNORED)
            given["labels"][:, -targets:] = 0
    if tuned.kind == "encoder-decoder":
        written = torch.zeros(batch, targets or length, dtype=torch.long)
        given |= {"decoder_input_ids": written, "labels": written.clone()}
    if isinstance(tuned.head, Classification):
        given["labels"] = ids.new_zeros(batch)
    elif isinstance(tuned.head, Spans):
        given["labels"] = ids.new_zeros(batch, 2)
    return given


# --- a base without numbers ------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What a model without numbers is built from."""

    name: str
    config: str  # JSON, with the family in "model_type"
    head: str  # as `Shape.head`
    dtype: torch.dtype


class Words:
    """In the place of a tokenizer: every text is one token, the first."""

    pad_token_id = eos_token_id = 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [0]}


def _facts_of(model: Any, dtype: str, methods: list[Method]) -> _Facts:
    width = torch.float32 if any(m.in_place for m in methods) else DTYPES[dtype]
    if isinstance(model, LanguageModel):
        base = getattr(model, "base", model)
        config, weight = base.model.config, base.anatomy.embedding.weight
        head = base.anatomy.shape.head
        return _Facts(base.name, config.to_json_string(use_diff=False), head, weight.dtype)
    if isinstance(model, Shape):
        if model.name not in names() or replace(Shape.named(model.name), head=model.head) != model:
            raise ValueError(f"{model.name}: a shape has no config; give a base, config or name")
        return _Facts(model.name, json.dumps(named_config(model.name)), model.head, width)
    config = named_config(model) if isinstance(model, str) else model
    config = config if isinstance(config, dict) else config.to_dict()
    shape = Shape.from_config(config, model if isinstance(model, str) else None)
    return _Facts(shape.name, json.dumps(config), shape.head, width)


@functools.lru_cache(maxsize=8)
def _blank(facts: _Facts) -> _Blank:
    return _Blank(facts)


class _Blank:
    """A base whose tensors have sizes and no numbers, and the only place where it can be run."""

    def __init__(self, facts: _Facts):
        fields = json.loads(facts.config)
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        family = FAMILIES[config.model_type]
        kind = CLASSES[family.kind] if "lm" in facts.head else transformers.AutoModel
        self.mode = _Numberless(allow_non_fake_inputs=True)
        with self.numberless(How()):
            model = kind.from_config(config, dtype=facts.dtype)
            model.tie_weights()
            if facts.head == "none" and hasattr(model, "pooler"):
                model.pooler = None
            self.base = Base(facts.name, model, Words(config.vocab_size), "a config")

    @contextlib.contextmanager
    def numberless(self, how: How) -> Iterator[None]:
        """Inside, tensors are made without numbers, and what is asked of them is answered."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.mode)
            # Rows are full: transformers may ask that too, and leave the mask out.
            stack.enter_context(mock.patch.object(masking_utils, "is_tracing", lambda *_: False))
            # Everything is made where it belongs, and in float32 at least.
            stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_: module))
            # It draws again until all fit.
            stack.enter_context(mock.patch.object(nn.init, "trunc_normal_", lambda w, *_, **__: w))
            stack.enter_context(how.again())
            yield


class _Numberless(FakeTensorMode):
    """Whether something holds of a tensor without numbers: yes. What number it is: 1."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for more often than anything else
        if function is torch.ops.aten._local_scalar_dense.default:
            (asked,) = args
            if isinstance(asked, FakeTensor) and asked.constant is None:
                if asked.dtype == torch.bool:
                    return True
                if asked.is_floating_point():
                    return 1.0
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if function is torch.ops.aten.native_layer_norm.default and not _is_short(args[2]):
            return result[0], result[1].float(), result[2].float()  # as the kernel has them
        return result


# --- what a GPU does otherwise ---------------------------------------------------------------

BLOCK = 512  # bytes: the allocator gives multiples of it
WORKSPACE = 32 * 2**20  # bytes that cuBLAS takes on a Hopper, from the first product on
# What autocast does in float32 on a GPU, and in 16 bits on a CPU: by casting what it is given, or
# only the result.
CASTS = {"layer_norm", "pow", "__pow__", "__rpow__", "rsqrt", "exp", "log", "norm", "nll_loss"}
SUMS = {"softmax", "log_softmax", "sum", "cumsum", "prod"}


class Gpu(TorchFunctionMode):
    """Inside, a CPU takes the decisions of a GPU: kernels of attention, types under autocast."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            if name in CASTS:
                args, kwargs = _float(args), _float(kwargs)
            elif name in SUMS and _is_short(args[0]) and kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": torch.float32}
        return function(*args, **kwargs)


def _is_short(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _float(values: Any) -> Any:
    return tree_map(lambda value: value.float() if _is_short(value) else value, values)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The first of torch's kernels that takes these: flash (16 bits, no mask), the memory-efficient
    one (one key head a query head), or the plain formula, which keeps all scores."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        attn_mask = attn_mask.to(dtype) if attn_mask is not None else None
    options = {"scale": scale}
    if attn_mask is None and _is_short(query):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, **options)[0]
    grouped = query.shape[1] != key.shape[1]
    if grouped or query.shape[-1] * query.element_size() % 16:
        plain = torch.ops.aten._scaled_dot_product_attention_math
        options["enable_gqa"] = enable_gqa
        return plain(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]
    if attn_mask is not None:
        columns = attn_mask.shape[-1]
        attn_mask = F.pad(attn_mask, (0, -columns % 8))[..., :columns]
        attn_mask = attn_mask.expand(*query.shape[:3], columns)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, **options)[0]


class _Blocks(Counter):
    """Counts as a GPU's allocator does."""

    def __init__(self):
        super().__init__()
        self.live.unit = BLOCK
        self.moments = 0

    def most(self) -> int:
        """Products are taken in the forward pass and in the backward pass, not in the update."""
        self.moments += 1
        return super().most() + (WORKSPACE if self.moments in (2, 3) else 0)
