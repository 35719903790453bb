"""The sites by themselves: what each changes in a model, and that it takes it back."""

import pytest
import torch
from models import FAMILIES, U64, hook_count, tiny, token_ids
from torch import nn

from peftlab.methods.lora import LowRankDelta
from peftlab.sites import ExistingParameters, InputEmbeddings, LinearWeight

FLOAT64 = torch.float64


@pytest.fixture(params=FAMILIES)
def base(request):
    return tiny(request.param, FLOAT64)


def delta_for(linear, r=2):
    delta = LowRankDelta(linear.d_in, linear.d_out, r, 4).double()
    delta.initialise(torch.Generator().manual_seed(0))
    nn.init.uniform_(delta.B, -1, 1, generator=torch.Generator().manual_seed(1))
    return delta


def test_a_delta_acts_on_its_own_rows_only(base):
    """The module's output gains x ΔWᵀ on the target's rows, and nothing anywhere else."""
    for linear in base.anatomy.linears.values():
        x = torch.randn(2, 3, linear.d_in, dtype=FLOAT64)
        plain = linear.module(x)
        delta = delta_for(linear)
        with LinearWeight(linear, delta):
            change = linear.module(x) - plain
        wanted = torch.zeros_like(change)
        wanted[..., slice(*linear.rows)] = x @ delta.delta_weight().T
        # Products of 2 and d_in terms in another order, added to outputs of this size.
        close = 2 * (linear.d_in + 4) * U64 * (plain.abs().max() + wanted.abs().max())
        assert (change - wanted).abs().max() <= close
        assert (wanted[..., slice(*linear.rows)].abs() > 0).all()
        untouched = torch.ones(change.shape[-1], dtype=torch.bool)
        untouched[slice(*linear.rows)] = False
        assert not change[..., untouched].any()
        assert torch.equal(linear.module(x), plain)


def test_a_delta_is_merged_once_and_the_original_is_restored(base):
    linear = base.anatomy.linears["layers.1.v"]
    before, kept = base.fingerprint(), linear.weight.clone()
    site = LinearWeight(linear, delta_for(linear))
    with site:
        site.merge()
        site.merge()
        assert site.merged
        assert torch.equal(linear.weight, kept + site.delta.delta_weight())
        site.unmerge()
        site.unmerge()
        assert not site.merged and base.fingerprint() == before
        site.merge()
    assert base.fingerprint() == before


def test_virtual_tokens_are_tokens_if_they_are_embeddings(base):
    """With rows of the embedding as P, the model continues as if it had read those tokens."""
    ids = token_ids(2, 9, seed=3)
    ids[1, :4] = ids[0, :4]
    prompt = nn.Parameter(base.anatomy.embedding.weight[ids[0, :4]].clone())
    plain = base(ids)[:, 4:]
    with InputEmbeddings(base.model, base.anatomy.embedding, prompt):
        for mask in (None, torch.ones(2, 5, dtype=torch.long)):
            # The same numbers in the same shapes: nothing is rounded differently.
            assert torch.equal(base(ids[:, 4:], mask), plain)
        # As transformers calls it: positional, with labels, or without positions.
        assert torch.equal(base.model(ids[:, 4:]).logits, plain)
        labelled = base.model(ids[:, 4:], labels=ids[:, 4:])
        assert torch.equal(labelled.logits, plain)
        last = base.model(input_ids=ids[:, 4:], logits_to_keep=1).logits
        assert last.shape[1] == 1
    # The last virtual token predicts the first real one, as the last of those words does.
    wanted = nn.functional.cross_entropy(base(ids)[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    # transformers takes the loss in float32: 2⁻²⁴ relative for each of some ten operations.
    assert abs(labelled.loss - wanted) <= 10 * 2.0**-24 * wanted


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_every_site_takes_everything_back(base, error):
    ids = token_ids(2, 6)
    before = (base.fingerprint(), hook_count(base.model), base(ids))
    addresses = [p.data_ptr() for p in base.model.parameters()]
    linear = base.anatomy.linears["layers.0.o"]
    names = [name for name, _ in base.model.named_parameters()]
    for site in (
        InputEmbeddings(base.model, base.anatomy.embedding, nn.Parameter(torch.randn(3, 24))),
        LinearWeight(linear, delta_for(linear)),
        ExistingParameters(base.model, names),
        ExistingParameters(base.model, names[3:5]),
    ):
        try:
            with site:
                if isinstance(site, ExistingParameters):
                    for parameter in site.parameters.values():
                        assert parameter.requires_grad
                        parameter.data += 1
                    base(ids).sum().backward()
                elif isinstance(site, LinearWeight):
                    site.merge()
                assert not torch.equal(base(ids), before[2])
                if error is not None:
                    raise error
        except (RuntimeError, KeyboardInterrupt) as raised:
            assert type(raised) is error
        assert (base.fingerprint(), hook_count(base.model)) == before[:2]
        assert torch.equal(base(ids), before[2])
        assert [p.data_ptr() for p in base.model.parameters()] == addresses
        assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())


def test_tied_parameters_stay_tied_while_they_train():
    base = tiny("gpt2")
    with ExistingParameters(base.model, [name for name, _ in base.model.named_parameters()]):
        assert base.model.lm_head.weight is base.model.transformer.wte.weight
    assert base.model.lm_head.weight is base.model.transformer.wte.weight
