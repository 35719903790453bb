"""The sites by themselves: what each changes in a model, and that it takes it back."""

import pytest
import torch
from models import FAMILIES, U64, call, hook_count, surroundings, tiny, token_ids
from torch import nn

from peftlab import LoRA, PTuning, attach
from peftlab.methods.bottleneck import Bottleneck
from peftlab.methods.ia3 import Factors
from peftlab.methods.lora import LowRankDelta
from peftlab.sites import (
    ExistingParameters,
    InputEmbeddings,
    KeysValues,
    LinearWeight,
    Scale,
    SublayerOutput,
)

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
        wanted[..., linear.index] = x @ delta.delta_weight().T
        # Products of 2 and d_in terms in another order, added to outputs of this size.
        close = 2 * (linear.d_in + 4) * U64 * (plain.abs().max() + wanted.abs().max())
        assert (change - wanted).abs().max() <= close
        assert (wanted[..., linear.index].abs() > 0).all()
        untouched = torch.ones(change.shape[-1], dtype=torch.bool)
        untouched[linear.index] = False
        assert not change[..., untouched].any()
        assert torch.equal(linear.module(x), plain)


def test_a_delta_is_merged_once_and_the_original_is_restored(base):
    linear = base.anatomy.select(("v",))[1]
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


def bottleneck():
    module = Bottleneck(24, 3, "gelu", 1.0).double()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1, generator=torch.Generator().manual_seed(0))
    return module


def factors(size):
    module = Factors(size).double()
    nn.init.uniform_(module.l, -1, 2, generator=torch.Generator().manual_seed(0))
    return module


def test_factors_act_on_their_own_rows_only(base):
    """The module's output is l times what it was on the target's rows, and as it was elsewhere."""
    for linear in base.anatomy.linears.values():
        x = torch.randn(2, 3, linear.d_in, dtype=FLOAT64)
        plain, module = linear.module(x), factors(linear.d_out)
        wanted = plain.clone()
        wanted[..., linear.index] *= module.l
        with Scale(linear, module):
            assert torch.equal(linear.module(x), wanted)
        if linear.whole:
            module = factors(linear.d_in)
            with Scale(linear, module, of_input=True):
                assert torch.equal(linear.module(x), linear.module.forward(x * module.l))
        assert torch.equal(linear.module(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT64])
def test_factors_on_parts_have_the_gradients_of_their_formula(dtype):
    """k and v of a fused weight, bit for bit: in 16 bits the factors' type sums the gradients."""
    linears = tiny("gpt2", dtype).anatomy.linears
    parts = [linears[f"layers.0.{target}"] for target in "kv"]
    module, held = parts[0].module, torch.float32 if dtype == torch.bfloat16 else dtype
    scales = [Scale(part, Factors(part.d_out).to(held)) for part in parts]
    factors = [nn.init.uniform_(scale.module.l, -2, 2) for scale in scales]
    x = torch.randn(2, 9, parts[0].d_in, dtype=dtype)
    plain = module(x).detach()
    with scales[0], scales[1]:
        scaled = module(x)
        pull = torch.randn_like(scaled)
        scaled.backward(pull)
    wanted = plain.clone()
    for part, factor in zip(parts, factors, strict=True):
        y = plain[..., part.index]
        wanted[..., part.index] = (y * factor.detach()).to(dtype)
        grad = (pull[..., part.index].to(held) * y).sum_to_size(factor.shape)
        assert torch.equal(factor.grad, grad)
    assert torch.equal(scaled, wanted)


def test_scaled_weights_and_biases_are_restored(base):
    for linear in base.anatomy.linears.values():
        before, kept = base.fingerprint(), (linear.weight.clone(), linear.bias)
        site = Scale(linear, factors(linear.d_out))
        with site:
            site.merge()
            site.merge()
            assert torch.equal(linear.weight, kept[0] * site.module.l[:, None])
            assert site.merged and base.fingerprint() != before
            site.unmerge()
            site.unmerge()
            assert not site.merged and base.fingerprint() == before
            site.merge()
        assert base.fingerprint() == before


def test_sublayers_are_named_by_block_and_kind(base):
    for sublayer in base.anatomy.sublayers:
        where, kind = sublayer.name.rsplit(".", 1)
        ends = ("q", "o") if kind != "mlp" else ("up", "down")
        cross = "cross." if kind == "cross" else ""
        names = [f"{where}.{cross}{end}" for end in ends]
        assert [sublayer.first.name, sublayer.last.name] == names
        assert (sublayer.kind, sublayer.last.d_out) == (kind, base.anatomy.shape.d_model)
    counted = [s.kind for s in base.anatomy.sublayers]
    assert all(base.anatomy.shape.sublayers(kind) == counted.count(kind) for kind in set(counted))


def in_front(base, prompt):
    """Virtual tokens as a site on this base."""
    return InputEmbeddings(base.anatomy, lambda: {"prompt": prompt}, [(len(prompt), "front", None)])


def test_virtual_tokens_are_tokens_if_they_are_embeddings(base):
    """With rows of the embedding as P, the model continues as if it had read those tokens."""
    ids = token_ids(2, 9, seed=3)
    ids[1, :4] = ids[0, :4]
    answer = (torch.arange(10).view(2, 5),) if base.kind == "encoder-decoder" else ()
    prompt = base.anatomy.embedding.weight[ids[0, :4]].clone()
    plain = base(ids, None, *answer)
    plain = plain if answer else plain[:, 4:]
    given = {"decoder_input_ids": answer[0]} if answer else {}
    # The head multiplies fewer rows, perhaps in another order: 24 products for each logit.
    close = 2 * 24 * U64 * plain.abs().max() * 4
    with in_front(base, prompt):
        for mask in (None, torch.ones(2, 5, dtype=torch.long)):
            assert (base(ids[:, 4:], mask, *answer) - plain).abs().max() <= close
        # As transformers calls it: positional, or without positions.
        assert (base.model(ids[:, 4:], **given).logits - plain).abs().max() <= close
    assert torch.equal(call(base, ids), call(tiny(base.anatomy.family, FLOAT64), ids))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_virtual_tokens_and_the_labels_of_transformers(family):
    base = tiny(family, FLOAT64)
    ids = token_ids(2, 9, seed=3)
    ids[1, :4] = ids[0, :4]
    with in_front(base, base.anatomy.embedding.weight[ids[0, :4]].clone()):
        labelled = base.model(ids[:, 4:], labels=ids[:, 4:])
        assert torch.equal(labelled.logits, base(ids[:, 4:]))
        last = base.model(input_ids=ids[:, 4:], logits_to_keep=1).logits
        assert last.shape[1] == 1
    # Between real tokens alone: the last virtual one's state is taken out.
    wanted = nn.functional.cross_entropy(base(ids)[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
    # transformers takes the loss in float32: 2⁻²⁴ relative for each of some ten operations.
    assert abs(labelled.loss - wanted) <= 10 * 2.0**-24 * wanted


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_every_site_takes_everything_back(base, error):
    ids = token_ids(2, 6)
    sites = base.anatomy.attentions
    before, output = surroundings(base), call(base, ids)
    linear, last = next(iter(base.anatomy.linears.values())), base.anatomy.sublayers[0].last
    names = [name for name, _ in base.model.named_parameters()]
    shape = (len(sites), sites[0].kv_heads, 3, sites[0].head_dim)
    keys_values = {"P_k": torch.randn(shape).double(), "P_v": torch.randn(shape).double()}
    every_layer = torch.randn(base.anatomy.shape.layers, 2, 24, dtype=FLOAT64)
    for site in (
        in_front(base, torch.randn(3, 24, dtype=FLOAT64)),
        InputEmbeddings(
            base.anatomy, lambda: {"prompt": every_layer}, [(2, "front", None)], every_layer=True
        ),
        KeysValues(base.anatomy, sites, lambda: keys_values, shift_positions=False),
        KeysValues(base.anatomy, sites, lambda: keys_values, shift_positions=True),
        LinearWeight(linear, delta_for(linear)),
        *(
            SublayerOutput(s, bottleneck(), b)
            for s in base.anatomy.sublayers
            for b in (True, False)
        ),
        Scale(linear, factors(linear.d_out)),
        Scale(last, factors(last.d_in), of_input=True),
        ExistingParameters(base.model, names),
        ExistingParameters(base.model, names[3:5]),
    ):
        try:
            with site:
                if isinstance(site, ExistingParameters):
                    for parameter in site.parameters.values():
                        assert parameter.requires_grad
                        parameter.data += 1
                    call(base, ids).sum().backward()
                elif isinstance(site, LinearWeight | Scale):
                    site.merge()
                assert not torch.equal(call(base, ids), output)
                if error is not None:
                    raise error
        except (RuntimeError, KeyboardInterrupt) as raised:
            assert type(raised) is error
        assert surroundings(base) == before
        assert torch.equal(call(base, ids), output)


def test_tied_parameters_stay_tied_while_they_train():
    base = tiny("gpt2")
    with ExistingParameters(base.model, [name for name, _ in base.model.named_parameters()]):
        assert base.model.lm_head.weight is base.model.transformer.wte.weight
    assert base.model.lm_head.weight is base.model.transformer.wte.weight


def test_detach_finds_a_hook_that_no_site_has_listed(base):
    """As an interrupt between the hook and the list leaves it; somebody else's hook stays."""
    module = next(iter(base.anatomy.linears.values())).module
    theirs = module.register_forward_hook(lambda *_: None)
    before = hook_count(base.model)
    tuned = attach(base, LoRA(r=2, target_modules="all-linear"))
    ours = [h for h in module._forward_hooks.values() if h.__module__.startswith("peftlab.")]
    for hook in ours:
        module.register_forward_hook(hook)
    assert ours and tuned.detach() is base
    assert hook_count(base.model) == before
    theirs.remove()


def test_many_virtual_tokens_at_one_place_keep_their_order():
    """So many that a sort which is not stable exchanges equal ones: positions count through."""
    base, told = tiny("bert"), []
    method = PTuning(24, "mlp", placement=[(12, "back"), (12, "front")])
    with attach(base, method) as tuned:
        (stack,) = base.anatomy.stacks.values()
        hook = stack.register_forward_pre_hook(
            lambda module, args, kwargs: told.append(kwargs["position_ids"]), with_kwargs=True
        )
        call(tuned, token_ids(2, 5))
        hook.remove()
    assert told[0].tolist() == [list(range(24 + 5))] * len(told[0])
