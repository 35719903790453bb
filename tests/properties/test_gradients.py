"""Gradients against finite differences in float64, at torch's own tolerances for gradcheck."""

import pytest
import torch
from models import EVERY, adapted, call, token_ids
from torch.autograd import gradcheck

from peftlab.attention import AttentionSite
from peftlab.methods.lora import LowRankDelta
from peftlab.methods.prompt_networks import PrefixMLP, PromptEncoder

FLOAT64 = torch.float64
THROUGH = (
    *("prompt", "prompt random", "lora", "lora + prompt", "prefix", "prefix mlp", "prefix shifted"),
    *("p lama", "p around", "p back", "v2 depth", "deep", "prompt and prefix", "prompt + prefix"),
    *("houlsby", "houlsby all", "pfeiffer", "parallel", "parallel attention", "ia3", "ia3 both"),
    *("bitfit", "layer norm", "mam", "head adapter", "qlora"),
    *("head v2", "head prompt", "head deep"),
)


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


def output_of(module):
    """What a module makes, as a function of its parameters, for gradcheck."""
    names = [name for name, _ in module.named_parameters()]

    def made(*values):
        return tuple(
            torch.func.functional_call(module, dict(zip(names, values, strict=True)), ()).values()
        )

    return made, tuple(p.detach().requires_grad_() for p in module.parameters())


@pytest.mark.parametrize(
    "encoder, sizes",
    [
        ("lstm", "lama"),
        ("lstm", "few-shot"),
        ("mlp", "peft"),
        ("mlp", "lama"),
        ("attention", "lama"),
    ],
)
def test_the_prompt_encoder(encoder, sizes):
    """ReLU has no slope at zero, and no unit is there: the inputs are drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = PromptEncoder(torch.randn(3, 4), encoder, sizes, hidden=2, layers=2).double()
    assert gradcheck(*output_of(module))


@pytest.mark.parametrize("with_prompt", [False, True])
def test_the_prefix_mlp(with_prompt):
    """... and it is the formula, for each sublayer, head and virtual token."""
    sites = [
        AttentionSite(f"layers.{i}", torch.nn.Identity(), "", i, False, 4, 2, 3) for i in range(2)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = PrefixMLP(torch.randn(3, 4), 5, sites, with_prompt).double()
    assert gradcheck(*output_of(module))
    E, (W1, b1), (W2, b2) = module.table, module.mlp[0].parameters(), module.mlp[2].parameters()
    formula = torch.tanh(E @ W1.T + b1) @ W2.T + b2  # P, 2·S·d_kv
    made = module()
    for part, name in enumerate(("P_k", "P_v")):
        for site in range(2):
            for head in range(2):
                start = ((part * 2 + site) * 2 + head) * 3
                wanted = formula[:, start : start + 3]
                # Sums of at most 5 products, in another order.
                assert (made[name][site, head] - wanted).abs().max() <= 20 * 2.0**-53
    assert ("prompt" in made) == with_prompt


@pytest.mark.parametrize(
    "family, case", [(family, case) for family, case in EVERY if case in THROUGH]
)
def test_through_a_model(case, family):
    """Every trained tensor at once, along random directions (gradcheck's fast mode)."""
    tuned = adapted(case, family, FLOAT64)
    ids = token_ids(2, 5)
    # gradcheck moves its inputs in place, and these are the very tensors that the model uses.
    parameters = tuple(tuned.trainable.values())
    assert gradcheck(lambda *_: call(tuned, ids).log_softmax(dim=-1)[0], parameters, fast_mode=True)
