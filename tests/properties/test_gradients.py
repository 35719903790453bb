"""Gradients against finite differences in float64, at torch's own tolerances for gradcheck."""

import pytest
import torch
from models import FAMILIES, adapted, token_ids
from torch.autograd import gradcheck

from peftlab.methods.lora import LowRankDelta

FLOAT64 = torch.float64


def drawn(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=FLOAT64).requires_grad_()


@pytest.mark.parametrize("d_in, d_out, r, alpha", [(5, 3, 2, 4), (3, 5, 3, 1), (4, 4, 1, 0.5)])
def test_the_low_rank_delta(d_in, d_out, r, alpha):
    delta = LowRankDelta(d_in, d_out, r, alpha).double()

    def output(x, A, B):
        return torch.func.functional_call(delta, {"A": A, "B": B}, (x,))

    x, A, B = drawn(2, 3, d_in), drawn(r, d_in, seed=1), drawn(d_out, r, seed=2)
    assert gradcheck(output, (x, A, B))
    # ... and it is the formula: at most r + d_in + d_out products are summed in either order.
    dense = alpha / r * torch.einsum("or,ri,bti->bto", B, A, x)
    size = alpha / r * (x.abs() @ A.abs().T @ B.abs().T).max()
    assert (output(x, A, B) - dense).abs().max() <= (r + d_in + d_out) * 2.0**-53 * size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["prompt", "prompt random", "lora", "lora + prompt"])
def test_through_a_model(case, family):
    """Every trained tensor at once, along random directions (gradcheck's fast mode)."""
    tuned = adapted(case, family, FLOAT64)
    ids = token_ids(2, 5)
    # gradcheck moves its inputs in place, and these are the very tensors that the model uses.
    parameters = tuple(tuned.trainable.values())
    assert gradcheck(lambda *_: tuned(ids).log_softmax(dim=-1)[0], parameters, fast_mode=True)
