"""Where codes of four bits are made and decoded by kernels: on an NVIDIA GPU, and when asked for.

`quantisation.py` is the page to read. With Triton the same three functions run as one kernel each,
`triton_codes.py`, because on a GPU every line of the page is a pass over memory. The kernels give
the same numbers, bit for bit. They are off unless you ask for them:

    with kernels.used():
        ...

or PEFTLAB_KERNELS=1 in the environment, before peftlab is imported. On a CPU, and where they cannot
run, the page's own lines are taken all the same.

torch knows each kernel as an operation of its own, `torch.ops.peftlab.…`, with a rule that says
which tensors come out. So a compiler and a memory trace see one operation and no temporaries. No
operation has a gradient: `CodedProduct` decodes again in its backward pass.

What they save is in `data/results/nf4_time_cuda.json`, by `tests/benchmarks/nf4_time.py`.
`memory.predict` knows the page alone, and for it the peak of a step was measured: so the page is
what runs unless you ask.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator

import torch
from torch import Tensor, library

WIDEST = 4096  # weights in the largest block that a kernel takes
OLDEST = (8, 0)  # compute capability: Ampere, the first with bfloat16

_on = os.environ.get("PEFTLAB_KERNELS") == "1"


@contextlib.contextmanager
def used(on: bool = True) -> Iterator[None]:
    """Inside, kernels make and decode the codes on a GPU; with `on=False` they do not.

    It holds for the whole process, because a backward pass on a GPU has a thread of its own.
    """
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def take(tensor: Tensor, block_size: int) -> bool:
    """Whether the kernels take this tensor: where they are asked for and can run, if a block has an
    even number of weights, so that no byte lies in two, and at most `WIDEST`."""
    if not _on or not tensor.is_cuda or block_size % 2 or block_size > WIDEST:
        return False
    return can_run(tensor.device.index)


@torch.compiler.assume_constant_result  # a compiler asks once, and does not look inside
def can_run(index: int | None = None) -> bool:
    """Whether this GPU, the current one without an index, can run Triton's kernels: it is at least
    an Ampere, and Triton is installed and finds the C compiler that it makes launchers with."""
    return _can_run(index)


@functools.cache
def _can_run(index: int | None) -> bool:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    installed = importlib.util.find_spec("triton") is not None
    return bool(compiler and installed) and torch.cuda.get_device_capability(index) >= OLDEST


# The operations ----------------------------------------------------------------------------------

for schema in (
    "dequantise(Tensor packed, Tensor absmax, Tensor? scale, Tensor? mean, float[] levels, "
    "SymInt[] size, int block_size, ScalarType dtype) -> Tensor",
    "quantise(Tensor flat, float[] levels, int block_size) -> (Tensor, Tensor)",
    "quantise_scales(Tensor values) -> (Tensor, Tensor)",
):
    library.define(f"peftlab::{schema.split('(')[0]}", schema[schema.index("(") :])


@library.register_fake("peftlab::dequantise")
def _(packed, absmax, scale, mean, levels, size, block_size, dtype):
    return packed.new_empty(size, dtype=dtype)


@library.register_fake("peftlab::quantise")
def _(flat, levels, block_size):
    n = flat.shape[0]
    packed = flat.new_empty(n // 2, dtype=torch.uint8)
    return packed, flat.new_empty(n // block_size, dtype=torch.float32)


@library.register_fake("peftlab::quantise_scales")
def _(values):
    from peftlab.sites.quantisation import ABSMAX_BLOCK

    scales = -(-values.shape[0] // ABSMAX_BLOCK)
    return values.new_empty(values.shape, dtype=torch.uint8), values.new_empty(scales)


@library.impl("peftlab::dequantise", "CUDA")
def _(packed, absmax, scale, mean, levels, size, block_size, dtype):
    from peftlab.sites import triton_codes

    return triton_codes.dequantise(packed, absmax, scale, mean, levels, size, block_size, dtype)


@library.impl("peftlab::quantise", "CUDA")
def _(flat, levels, block_size):
    from peftlab.sites import triton_codes

    return triton_codes.quantise(flat, levels, block_size)


@library.impl("peftlab::quantise_scales", "CUDA")
def _(values):
    from peftlab.sites import triton_codes

    return triton_codes.quantise_scales(values)
