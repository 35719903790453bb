"""What the tests switch on: every annotation of peftlab is checked at each call."""

import jaxtyping
import pytest
import torch

from peftlab.attention import with_prefix
from peftlab.bases import listed


def test_the_sizes_of_an_axis_agree_within_a_call():
    P_k, P_v, short = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)
    for tokens in (5, 6):  # the next call has other sizes
        key = torch.zeros(1, 2, tokens, 4)
        assert with_prefix(key, key, P_k, P_v)[0].shape == (1, 2, tokens + 3, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="dimension virtual is 1 .* of 3"):
        with_prefix(key, key, P_k, short)
    with pytest.raises(jaxtyping.TypeCheckError, match="P_k"):
        with_prefix(key, key, P_k.long(), P_v)


def test_so_are_types_without_a_shape():
    with pytest.raises(jaxtyping.TypeCheckError, match="texts"):
        listed(7)


def test_what_a_user_meets_is_not_checked(untyped):
    with pytest.raises(ValueError, match="a list of texts"):
        listed(7)
