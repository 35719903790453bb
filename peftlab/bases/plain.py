"""Tensors without numbers: this package runs on them to predict memory.

If the numbers of a small tensor decide a size, such as the rows of q in a fused weight, `plain()`
makes the tensor with numbers. If they decide no size, the caller asks `has_numbers` and uses a
substitute.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily as plain

__all__ = ["has_numbers", "plain"]


def has_numbers(tensor: Tensor) -> bool:
    """Whether the tensor's numbers can be read: not inside `vmap`, nor of a CUDA graph's steps, nor
    while a step is compiled."""
    if torch.compiler.is_compiling():
        return False
    recording = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    stacked = torch._C._functorch.is_batchedtensor(tensor)
    return not (recording or stacked or isinstance(tensor, FakeTensor))
