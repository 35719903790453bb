"""Tensors without numbers: memory is predicted by running this package on them.

Where the numbers of a small tensor decide a size, such as which rows of a fused weight are q's, the
tensor is made inside `plain()` and has numbers always. Where they decide nothing that has a size,
the caller asks `has_numbers`, and takes a substitute.
"""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily as plain

__all__ = ["has_numbers", "plain"]


def has_numbers(tensor: Tensor) -> bool:
    """Whether the tensor's numbers can be read."""
    return not isinstance(tensor, FakeTensor)
