"""A training step on tensors without numbers: what it takes, told before there are weights.

The model is built from its config, the methods are attached, and the step is taken by the very code
that `measure` runs, on torch's fake tensors: they have sizes and storages, and no memory. So what
is predicted is what is measured, of any model whose config transformers knows, on a machine that
could not hold it.

What a step keeps, as a rule:

    linear map   its input where the weight or a delta beside it trains; the weight itself where its
                 input carries a gradient; nothing for a bias
    LayerNorm    its input and two numbers a token, wherever a gradient passes or a part of it trains
    RMSNorm      its input where that carries a gradient, the scaled input where its weight trains
    attention    q, k, v, its output, and a number a query and head
    nonlinearity its input
    loss         the log-probabilities: batch × tokens × vocabulary
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from peftlab.attention import NAME
from peftlab.bases import CLASSES, FAMILIES, Base
from peftlab.bases.shapes import Shape, config_of
from peftlab.memory.step import DTYPES, Counter, How, Memory, followed
from peftlab.methods import Method
from peftlab.methods.heads import Classification, Head, Spans
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
    `batch` full rows of `length` tokens, dropout off; T5's decoder writes `targets` tokens, as many
    as `length` if not told.

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
    how = How(device, dtype, checkpointing, optimiser)
    config, kind, pooler, tokenizer = _facts(model)
    with traced(config, methods, head=head, how=how)
    ...
