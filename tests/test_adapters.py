"""Adapters, scales and biases: their sizes, their start, what they go with, what is refused."""

import math

import pytest
import torch
from models import FAMILIES, U32, U64, call, stir, surroundings, tiny, token_ids
from test_accounting import CONFIGS, pair  # noqa: F401  a fixture: every shape with its model
from test_bases import SPECIMENS, specimen
from torch import nn

from peftlab import (
    IA3,
    BitFit,
    HoulsbyAdapter,
    LayerNormTuning,
    LoRA,
    ParallelAdapter,
    PfeifferAdapter,
    PrefixTuning,
    attach,
    count,
    load,
)
from peftlab.bases.shapes import as_shape
from peftlab.methods.bottleneck import Bottleneck
from peftlab.methods.heads import Tagging

FLOAT64 = torch.float64
ADAPTERS = (HoulsbyAdapter, PfeifferAdapter, ParallelAdapter)
ALL = [HoulsbyAdapter(3), PfeifferAdapter(3), ParallelAdapter(3), IA3(), LayerNormTuning()]


@pytest.fixture(params=FAMILIES)
def base(request):
    """A base that must be as it was, with nothing attached, when the test is over."""
    base = tiny(request.param, FLOAT64)
    before = surroundings(base)
    yield base
    assert surroundings(base) == before


# Sizes ----------------------------------------------------------------------------------------

# Computed once, apart from this package: L (2 d m + d + m) for each adapter of a block; (IA)³
# L (2 d_kv + d_ff), in T5 Le (2 d_kv + d_ff) + Ld (4 d_kv + d_ff); norms (2 L + 1) times 2 d, or d
# for RMSNorm, in T5 (2 Le + 1 + 3 Ld + 1) d; biases 11 L d + 2 d in BERT, its pooler's included,
# 11 L d + d in GPT-2. The toy's (IA)³ is PEFT's number as well.
KNOWN = {  # Houlsby and Pfeiffer with m of 8 and 64, (IA)³, BitFit, norms
    "gpt2": (313536, 156768, 2379264, 1189632, 55296, 102144, 38400),
    "bert-base": (313536, 156768, 2379264, 1189632, 55296, 102912, 38400),
    "t5-base": (627072, 313536, 4758528, 2379264, 129024, 0, 47616),
    "toy-gqa": (34880, 17440, 264704, 132352, 3328, 0, 2304),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_counts(name):
    shape = as_shape(CONFIGS[name])
    methods = [HoulsbyAdapter(8), PfeifferAdapter(8), HoulsbyAdapter(64), PfeifferAdapter(64)]
    methods += [IA3(), BitFit(), LayerNormTuning()]
    assert tuple(count(method, shape) for method in methods) == KNOWN[name]
    assert count(ParallelAdapter(64), shape) == count(PfeifferAdapter(64), shape)


def test_known_counts_of_publications():
    """Houlsby et al.'s 2.1% and LoRA's Adapter-H rows for GPT-3; the default of Pfeiffer's library.

    The 2.1% are 1.92% by the formula: BERT-large, m = 64, with the 2 L norms of the blocks, without
    the head. LayerNorm tuning has the norm of the embeddings as well.
    """
    large, d = as_shape("bert-large"), 1024
    size = count(HoulsbyAdapter(64), large) + count(LayerNormTuning(), large) - 2 * d
    assert size == 6_441_984 and round(100 * size / large.parameters(), 2) == 1.92
    gpt3 = as_shape(CONFIGS["gpt2"])
    gpt3 = type(gpt3)("gpt3", "gpt2", 96, 12288, 96, 96, 128, 4 * 12288, 50257, 2048)
    assert round(count(HoulsbyAdapter(1), gpt3) / 1e6, 1) == 7.1
    assert round(count(HoulsbyAdapter(8), gpt3) / 1e6, 1) == 40.1
    assert count(PfeifferAdapter(), "bert-base") == 894_528
    assert count(IA3(["q", "k", "v", "down"]), "gpt2") == 64_512  # PEFT's own for GPT-2


def test_biases_and_norms_equal_the_model(pair):  # noqa: F811
    shape, model = pair
    named = list(model.named_parameters())
    biases = sum(p.numel() for name, p in named if name.rsplit(".", 1)[-1] == "bias")
    norms = sum(p.numel() for name, p in named if "norm" in name.lower() or ".ln_" in name)
    assert (count(BitFit(), shape), count(LayerNormTuning(), shape)) == (biases, norms)


def test_the_sites_are_the_sublayers(base):
    shape, decoder = base.anatomy.shape, base.anatomy.layers.get("decoder", [])
    every = HoulsbyAdapter(2, sublayers=["attention", "mlp"] + ["cross"] * bool(decoder))
    with attach(base, every) as tuned:
        assert len(tuned.sites) == shape.attentions + shape.blocks
        kinds = [site.rsplit(".", 1)[-1] for site in tuned.sites]
        assert kinds.count("cross") == len(decoder) == shape.decoder_layers
    assert [attach(base, method).detach() for method in ALL]


# Where they start -----------------------------------------------------------------------------


def test_the_truncated_gaussian_of_houlsby():
    """s = 0.880 σ₀ is what truncation at 2 σ₀ leaves: s² = σ₀² (1 − 4 φ(2) / (2 Φ(2) − 1)).

    The sample's deviation is off by s √(κ − 1) / (2 √n), κ < 3 the kurtosis: 5 of these in 24,576
    entries are below 5 s / √(2 n), 2.3%.
    """
    tuned = attach(load("tiny-gpt"), HoulsbyAdapter(64))
    phi = math.exp(-2) / math.sqrt(2 * math.pi)
    s = 1e-2 * math.sqrt(1 - 4 * phi / math.erf(math.sqrt(2)))
    assert s == pytest.approx(0.880e-2, rel=1e-3)
    for f in tuned.modules.values():
        for W in (f.W_down, f.W_up):
            assert W.abs().max() <= 2e-2
            assert abs(W.std() - s) <= 5 * s / math.sqrt(2 * W.numel())
        assert not f.b_down.any() and not f.b_up.any()
    tuned.detach()


@pytest.mark.parametrize(
    "method, predicted",
    [
        (HoulsbyAdapter(64), 0.880**2 * 1e-4 * math.sqrt(64 * 192) / 2),
        (HoulsbyAdapter(64, init_std=1e-3), 0.880**2 * 1e-6 * math.sqrt(64 * 192) / 2),
        (PfeifferAdapter(48), 0.02**2 * math.sqrt(48 * 192 / 2)),
    ],
)
def test_the_output_at_the_start_differs_by_the_stated_amount(method, predicted):
    """|f(y)| / |y| on real sublayer outputs, root mean squares, is what the docstring derives.

    Hidden units are s |y| times standard normal numbers. GELU halves numbers near zero, ReLU halves
    their square; W_up sums m of them. One sublayer's ratio has a spread of about 1/√(2 m) from
    its m hidden units and as much from the d_model sums: 0.10 each at m = 48. Five of these 0.14
    are allowed for one, and the mean over the sublayers lies within 0.25.
    """
    base = load("tiny-gpt")
    tuned = attach(base, method)
    ratios, ids = [], token_ids(4, 32)
    for f in tuned.modules.values():

        def look(module, args, output):
            ratios.append((output.norm() / args[0].norm()).item() / predicted)

        f.register_forward_hook(look)
    with torch.no_grad():
        call(tuned, ids)
    ratios = torch.tensor(ratios)
    assert len(ratios) == len(tuned.sites)
    assert ((ratios - 1).abs() < 0.7).all() and abs(ratios.mean() - 1) < 0.25
    tuned.detach()


def test_the_bound_of_houlsby_holds_for_every_input(base):
    """|f(y)| ≤ (2 σ₀)² m ‖y‖₁ entry by entry: |GELU(z)| ≤ |z|, and no weight exceeds 2 σ₀."""
    f = Bottleneck(24, 7, "gelu", 1.0)
    for seed, size in enumerate((1e-3, 1.0, 1e3)):
        generator = torch.Generator().manual_seed(seed)
        HoulsbyAdapter(7).initialise(f, generator)
        y = size * torch.randn(50, 24, generator=generator)
        bound = 4e-4 * 7 * y.abs().sum(dim=1, keepdim=True)
        assert (f(y).abs() <= bound).all()


def test_the_formula_of_the_bottleneck():
    """f(x) = s (W_up σ(W_down x + b_down) + b_up), by einsum; some ten products in a sum."""
    for name, sigma in (("relu", nn.ReLU()), ("gelu", nn.GELU()), ("tanh", nn.Tanh())):
        f = Bottleneck(6, 4, name, 2.5).double()
        nn.init.normal_(f.W_down), nn.init.normal_(f.W_up), nn.init.normal_(f.b_up)
        nn.init.normal_(f.b_down)
        x = torch.randn(2, 3, 6, dtype=FLOAT64)
        hidden = sigma(torch.einsum("mi,bti->btm", f.W_down, x) + f.b_down)
        wanted = 2.5 * (torch.einsum("im,btm->bti", f.W_up, hidden) + f.b_up)
        assert (f(x) - wanted).abs().max() <= 50 * U64 * wanted.abs().max()


@pytest.mark.parametrize("method", [m(3) for m in ADAPTERS], ids=lambda m: m.name)
def test_an_adapter_reads_the_output_of_its_sublayer_and_the_parallel_one_its_input(base, method):
    """What is added to y is f(y), or f(x) of what the first map of the sublayer reads."""
    parallel, found = isinstance(method, ParallelAdapter), {}
    sublayers = [s for s in base.anatomy.sublayers if s.kind in method.sublayers]
    hooks = [
        s.last.module.register_forward_hook(lambda _, __, y, s=s: found.update({s.name: y}))
        for s in sublayers
    ]  # before the adapter's own, so that it sees y
    with stir(attach(base, method)) as tuned:
        for s in sublayers:
            hooks += [
                s.first.module.register_forward_pre_hook(
                    lambda _, x, s=s: found.update({s.name + " x": x[0]})
                ),
                s.last.module.register_forward_hook(
                    lambda _, __, y, s=s: found.update({s.name + " new": y})
                ),
            ]
        call(tuned, token_ids(2, 5))
        modules = {site.name: site.f for site in tuned._sites}
        for s in sublayers:
            y = found[s.name]
            added = modules[s.name](found[s.name + " x"] if parallel else y)
            assert added.any() and torch.equal(found[s.name + " new"], y + added)
        for hook in hooks:
            hook.remove()


# Together with others -------------------------------------------------------------------------


def test_the_order_in_a_list_changes_nothing(base):
    """An adapter reads what its linear map gives with its delta or scale, merged or not."""
    ids = token_ids(2, 7)
    for others in (
        [LoRA(r=2, target_modules=["o", "down"])],
        [IA3(["o", "up", "down"], ["down"])],
    ):
        for adapter in (HoulsbyAdapter(3), ParallelAdapter(3)):
            outputs = []
            for methods in ([adapter, *others], [*others, adapter]):
                tuned = attach(base, methods)
                for name, parameter in sorted(tuned.trainable.items()):
                    generator = torch.Generator().manual_seed(len(name))
                    noise = torch.randn(parameter.shape, generator=generator, dtype=FLOAT64)
                    parameter.data = 0.3 * noise  # a start depends on what was drawn before
                with torch.no_grad():
                    outputs.append(call(tuned, ids))
                    for site in tuned._sites:
                        site.merge()
                    outputs.append(call(tuned, ids))
                tuned.detach()
            for other in outputs[1:]:
                # Hundreds of roundings of numbers of this size, in five layers at most.
                assert (other - outputs[0]).abs().max() <= 1000 * U64 * outputs[0].abs().max()


def test_two_at_one_place_are_refused_with_the_reason(base):
    for pair_, words in (
        ([LoRA(target_modules=["q", "v"]), IA3()], r"same site, .*0.*\.v: .*ΔW.* differ"),
        ([IA3(), LoRA(target_modules=["down"])], r"same site, .*0\.down: .*ΔW.* differ"),
        ([HoulsbyAdapter(2), PfeifferAdapter(2)], r"0\.mlp: two at one sublayer"),
        ([ParallelAdapter(2), HoulsbyAdapter(2)], r"0\.mlp: two at one sublayer"),
        ([LayerNormTuning(), LayerNormTuning()], "parameters: .*: both would train it"),
    ):
        with pytest.raises(ValueError, match=words):
            attach(base, pair_)
    if base.anatomy.shape.biases:
        with pytest.raises(ValueError, match="parameters: .*: both would train it"):
            attach(base, [BitFit(), LayerNormTuning()])
        attach(base, [HoulsbyAdapter(2), BitFit(), LoRA(r=2)]).detach()
    attach(base, [PrefixTuning(2), HoulsbyAdapter(2), IA3(), LayerNormTuning()]).detach()
    attach(base, [ParallelAdapter(2, sublayers=["attention"]), PfeifferAdapter(2)]).detach()


def test_an_adapter_cannot_be_merged_and_lora_beside_it_neither(base):
    for methods in ([HoulsbyAdapter(2)], [LoRA(r=2), ParallelAdapter(2)], [LayerNormTuning()]):
        tuned = stir(attach(base, methods))
        with pytest.raises(ValueError, match="cannot be merged: it has no ΔW"):
            tuned.merge()
        assert not tuned.merged
        tuned.detach()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_biases_of_keys_do_nothing(family):
    """q·(k + b) = q·k + q·b, the same for every key, and the softmax takes no notice.

    Their gradient is nothing but rounding. Under a prefix, whose keys they do not shift, they act.
    """
    base, ids = tiny(family, FLOAT64), token_ids(2, 9)
    rows = [(linear, linear.index) for linear in base.anatomy.select(("k",))]
    for method, idle in ((None, True), (PrefixTuning(3), False)):
        tuned = attach(base, [BitFit()] + ([method] if method else []))
        call(tuned, ids).square().sum().backward()
        for linear, index in rows:
            bias = linear.module.bias
            ours, others = bias.grad[index].abs().max(), tuned.trainable.values()
            largest = max(p.grad.abs().max() for p in others)
            assert (ours <= 100 * U64 * largest) == idle
        with torch.no_grad():
            before = call(tuned, ids)
            for linear, index in rows:
                linear.module.bias[index] += 3.0
            moved = (call(tuned, ids) - before).abs().max()
        assert (moved <= 1000 * U64 * before.abs().max()) == idle
        tuned.detach()


def test_a_base_in_16_bits_trains_factors_in_32():
    base = tiny("gpt2", torch.bfloat16)
    ids, before = token_ids(2, 6), base.fingerprint()
    plain = call(base, ids)
    for method in (ParallelAdapter(3), IA3()):
        tuned = attach(base, method)
        assert all(p.dtype == torch.float32 for p in tuned.trainable.values())
        with torch.no_grad():
            assert torch.equal(call(tuned, ids), plain)
        call(stir(tuned), ids).float().square().mean().backward()
        assert call(tuned, ids).dtype == torch.bfloat16
        tuned.detach()
    assert base.fingerprint() == before


# What is refused ------------------------------------------------------------------------------


@pytest.fixture
def untyped():
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    "options, words",
    [
        ({"bottleneck": 0}, "bottleneck=0: allowed is at least 1"),
        ({"bottleneck": -3}, "bottleneck=-3: allowed is at least 1"),
        ({"bottleneck": 1.5}, "bottleneck=1.5: a whole number is needed"),
        ({"bottleneck": "64"}, "bottleneck='64': a whole number is needed"),
        ({"bottleneck": None}, "bottleneck=None: a whole number is needed"),
        ({"scaling": -1}, "scaling=-1: allowed is at least 0"),
        ({"scaling": math.nan}, "scaling=nan: allowed is at least 0"),
        ({"scaling": "4"}, "scaling='4': a number is needed"),
        ({"non_linearity": "swish"}, "non_linearity='swish': allowed is relu, gelu, silu, tanh"),
        ({"sublayers": []}, r"sublayers=\[\]: give a list of some of attention, cross, mlp"),
        ({"sublayers": "mlp"}, "sublayers='mlp': give a list"),
        ({"sublayers": ["ffn"]}, r"sublayers=\['ffn'\]: give a list of some of attention, cross"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_adapters_refuse(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target_modules": []}, r"target_modules=\[\]: give a list"),
        ({"target_modules": "k"}, "target_modules='k': give a list"),
        ({"feedforward_modules": "down"}, "feedforward_modules='down': give a list"),
        ({"feedforward_modules": ["up"]}, "'up', which is not among target_modules, k, v, down"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_ia3_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        IA3(**options)


def test_what_a_base_has_not(base):
    shape, name = base.anatomy.shape, base.name
    if not shape.biases:
        with pytest.raises(ValueError, match=f"BitFit trains biases, and {name} has none: no"):
            attach(base, BitFit())
        assert count(BitFit(), shape) == 0
    for method, words in (
        (IA3(["k", "query"], []), "unknown target 'query'|has no target 'query'"),
        (HoulsbyAdapter(2, sublayers=["cross"]), "has no sublayer 'cross'; it has: attention, mlp"),
    ):
        if "sublayer" in words and shape.decoder_layers:
            continue
        for act in (lambda m=method: attach(base, m), lambda m=method: count(m, shape)):
            with pytest.raises(ValueError, match=words):
                act()
    if base.anatomy.family == "gpt2":
        with pytest.raises(ValueError, match="layers.0.q is part of a fused weight"):
            attach(base, IA3(["q"], ["q"]))
    with pytest.raises(ValueError, match="init_std=-1"):
        HoulsbyAdapter(2, init_std=-1)


def test_gradients_in_float32_reach_every_factor(base):
    """A factor on a fused output is in place, and autograd must have kept what was there."""
    tuned = stir(attach(base, IA3(["q", "k", "v"], [])))
    call(tuned, token_ids(2, 6)).square().sum().backward()
    worst = U32
    for name, factors in tuned.trainable.items():
        assert factors.grad.abs().max() > worst, name
    tuned.detach()


# Every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_family_is_adapted_counted_merged_and_given_back(name):
    base = specimen(name)
    before, ids = surroundings(base), token_ids(2, 6)
    shape = base.anatomy.shape
    answers = {"decoder_input_ids": ids} if base.kind == "encoder-decoder" else {}
    methods = [*ALL, HoulsbyAdapter(2, sublayers=["attention"]), IA3(["q", "o", "up"], ["o"])]
    methods += [BitFit()] if shape.biases else []
    with torch.no_grad():
        plain = base.model(ids, **answers)[0].clone()
        for method in methods:
            tuned = stir(attach(base, method))
            changed = base.model(ids, **answers)[0]
            assert not torch.equal(changed, plain) and changed.isfinite().all()
            assert tuned.count().measured == count(method, shape)
            if isinstance(method, IA3):
                tuned.merge()
                merged = base.model(ids, **answers)[0]
                # Some hundred roundings of numbers of this size, in two or three layers.
                assert (merged - changed).abs().max() <= 1000 * U32 * changed.abs().max()
            assert surroundings(tuned.detach()) == before
    if base.kind == "encoder":
        for method in (LayerNormTuning(), BitFit()):
            tuned = attach(base, method, head=Tagging(("O", "B")))
            assert tuned.count().parameters == count(method, shape.without_head())
            tuned.detach()
