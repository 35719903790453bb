"""Weights in codes inside a model: what is held, what passes through, what merging costs."""

import math

import pytest
import torch
from models import (
    FAMILIES,
    U32,
    U64,
    call,
    letters,
    loss_of,
    stir,
    surroundings,
    tiny,
    token_ids,
)

from peftlab import (
    IA3,
    NF4,
    AdaLoRA,
    BitFit,
    DoRA,
    FullFineTuning,
    HoulsbyAdapter,
    LoRA,
    PiSSA,
    PromptTuning,
    Prune,
    QLoRA,
    VeRA,
    accounting,
    attach,
    train,
)
from peftlab.bases.anatomy import CODES
from peftlab.methods import Method
from peftlab.sites.quantisation import bits_per_weight, quantise
from peftlab.training import move

FLOAT32, FLOAT64 = torch.float32, torch.float64
BLOCK = 8
METHOD = QLoRA(r=3, alpha=5, block_size=BLOCK)
PARTS = [NF4(block_size=BLOCK), LoRA(r=3, alpha=5, target_modules="all-linear")]


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def base(family):
    """A base that must be as it was when the test is over."""
    base = tiny(family)
    before, output = surroundings(base), call(base, token_ids(2, 5))
    yield base
    base.detach()
    assert surroundings(base) == before
    assert torch.equal(call(base, token_ids(2, 5)), output)
    assert not coded_modules(base)


def coded_modules(base) -> list[torch.nn.Module]:
    return [module for module in base.model.modules() if CODES in vars(module)]


def gradients(tuned, ids) -> dict[str, torch.Tensor]:
    for parameter in tuned.trainable.values():
        parameter.grad = None
    loss_of(tuned, ids).backward()
    return {name: p.grad.clone() for name, p in tuned.trainable.items()}


# What is held ----------------------------------------------------------------------------------


def test_every_linear_module_is_held_as_the_codes_of_its_rows(base):
    """(d_out, d_in) is read row by row, also where the module stores it transposed."""
    rows = {}
    for linear in base.anatomy.linears.values():
        rows.setdefault(linear.module, []).append(linear.weight.clone())
    wanted = {module: quantise(torch.cat(parts), BLOCK) for module, parts in rows.items()}
    tuned = attach(base, NF4(block_size=BLOCK))
    assert len(tuned.codes) == len(wanted) > 0
    for linear in base.anatomy.linears.values():
        codes = linear.code.codes
        assert torch.equal(codes.packed, wanted[linear.module].packed)
        assert torch.equal(linear.weight, codes.dequantise()[linear.index])
        weight = linear.module.weight
        assert weight.isnan().all()
        assert weight.untyped_storage().nbytes() == 4


def test_what_is_no_target_stays(base):
    tuned = attach(base, NF4(block_size=BLOCK, target_modules=["o", "down"]))
    coded = {id(module.weight) for module in coded_modules(base)}
    for name, p in base.model.named_parameters():
        assert p.isnan().any() == (id(p) in coded), name
    wanted = [n for n, li in base.anatomy.linears.items() if li.target in ("o", "down")]
    assert list(tuned.codes) == wanted
    assert len(coded) == len(wanted)


def test_one_of_three_in_a_fused_module_codes_all_three():
    tuned = attach(tiny("gpt2"), NF4(block_size=BLOCK, target_modules=["k"]))
    assert list(tuned.codes) == ["layers.0.qkv", "layers.1.qkv"]
    assert NF4(BLOCK, target_modules=["k"]).coded(tuned.anatomy.shape)[0] == 2 * 3 * 24 * 24


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_closed_form_counts_the_bytes_really_held(base, double_quant):
    for targets in ("all-linear", ["q"], ["v", "down"]):
        method = NF4(12, double_quant, target_modules=targets)
        tuned = attach(base, method)
        weights = sum(codes.shape.numel() for codes in tuned.codes.values())
        held = sum(codes.bytes for codes in tuned.codes.values())
        assert method.coded(base.anatomy.shape) == (weights, held)
        count = tuned.count()
        assert (count.parameters, count.measured, count.stored, count.file_bytes) == (0, 0, 0, 0)
        tuned.detach()


def test_the_bytes_of_a_large_model_by_hand():
    """Llama-2-7B: 32 blocks of four 4096² and three 4096·11008. All blocks of 64 fill blocks of
    256, so a matrix of n weights holds n/2 + n/64 + 4n/(64·256) + 4 bytes."""
    n = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    codes = n // 2 + n // 64 + n // 4096 + 32 * 7 * 4
    for method in (NF4(), QLoRA()):
        assert method.coded(accounting.as_shape("llama-2-7b")) == (n, codes)
    assert abs(8 * codes / n - bits_per_weight()) < 1e-5
    ledger = accounting.training_bytes(QLoRA(r=64), "llama-2-7b", "bfloat16")
    adapter = 64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    rest = accounting.base_parameters("llama-2-7b") - n
    assert ledger.weights == codes + 2 * rest + 4 * adapter
    assert (ledger.gradients, ledger.adam) == (4 * adapter, 8 * adapter)
    plain = accounting.training_bytes(LoRA(r=64, target_modules="all-linear"), "llama-2-7b")
    assert (plain.gradients, plain.adam) == (ledger.gradients, ledger.adam)


# What passes through ---------------------------------------------------------------------------


def test_qlora_is_nf4_and_lora(base):
    ids = token_ids(3, 7)
    ours, theirs = stir(attach(base, METHOD)), stir(attach(tiny(base.name[5:]), PARTS))
    assert [name[1:] for name in ours.trainable] == list(theirs.trainable)  # "q" and "lora.…"
    assert torch.equal(call(ours, ids), call(theirs, ids))
    one, other = gradients(ours, ids), gradients(theirs, ids)
    assert all(torch.equal(one[name], other[name[1:]]) for name in one)
    assert ours.count().parameters == theirs.count().parameters
    theirs.detach()


def dense(family, dtype):
    """A base whose weights are what the codes decode to, as ordinary weights."""
    base = tiny(family, dtype)
    with attach(base, NF4(block_size=BLOCK)) as tuned:
        decoded = {module: vars(module)[CODES].decode() for module in coded_modules(base)}
        assert len(decoded) == len(tuned.codes)
    for module, weight in decoded.items():
        module.weight.data = weight.contiguous()
    return base


def test_outputs_and_gradients_are_those_of_the_dense_decoded_base(family):
    """The same products in another order. E, the largest difference between float32 and float64 on
    the dense base, is a sample of the rounding error; both lie within it of the truth, and it is
    doubled: 4 E, and of the gradients the worst E / max|g|."""
    ids = token_ids(3, 9)
    outputs, grads = {}, {}
    for dtype in (FLOAT32, FLOAT64):
        for kind in ("codes", "dense"):
            if kind == "codes":
                tuned = stir(attach(tiny(family, dtype), METHOD))
            else:
                tuned = stir(attach(dense(family, dtype), PARTS[1]))
            outputs[kind, dtype] = call(tuned, ids).detach()
            made = gradients(tuned, ids)
            grads[kind, dtype] = {name.removeprefix("q"): g for name, g in made.items()}
            tuned.detach()
    E = (outputs["dense", FLOAT32].double() - outputs["dense", FLOAT64]).abs().max()

    def apart(a, b):
        return max(
            ((grads[a][name].double() - g).abs().max() / g.abs().max()).item()
            for name, g in grads[b].items()
        )

    relative = apart(("dense", FLOAT32), ("dense", FLOAT64))
    for dtype, scale in ((FLOAT32, 1), (FLOAT64, U64 / U32)):
        off = (outputs["codes", dtype] - outputs["dense", dtype]).abs().max()
        assert off <= 4 * E * scale
        assert apart(("codes", dtype), ("dense", dtype)) <= 4 * relative * scale
    assert all(g.abs().max() > 0 for g in grads["codes", FLOAT32].values())


def test_no_dense_weight_is_kept_for_the_backward_pass(family):
    """What a step keeps is what plain LoRA keeps, weights of the base apart."""
    ids = token_ids(2, 6)

    def kept(method):
        tuned = stir(attach(tiny(family), method))
        own = {p.data_ptr() for p in (*tuned.model.parameters(), *tuned.trainable.values())}
        seen = {}

        def note(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.data_ptr(), tensor.shape] = tensor  # held: no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of(tuned, ids)
        return sorted(tuple(tensor.shape) for tensor in seen.values())

    assert kept(METHOD) == kept(PARTS[1])


def test_a_coded_module_still_adds_its_bias(base):
    biased = [li for li in base.anatomy.linears.values() if li.module.bias is not None]
    with attach(base, NF4(block_size=BLOCK)):
        for linear in biased:
            assert torch.equal(linear.module(torch.zeros(1, linear.d_in))[0], linear.module.bias)
    assert bool(biased) == (base.anatomy.family in ("gpt2", "bert"))


def test_under_autocast_the_product_is_in_sixteen_bits(family):
    tuned = stir(attach(tiny(family), METHOD))
    linear = next(iter(tuned.anatomy.linears.values()))
    seen = {}
    hook = linear.module.register_forward_hook(lambda m, a, out: seen.update(dtype=out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(tuned, token_ids(2, 5))
    hook.remove()
    assert seen["dtype"] == torch.bfloat16
    loss.backward()
    assert all(p.grad.dtype == FLOAT32 and p.grad.any() for p in tuned.trainable.values())
    tuned.detach()


def test_training_moves_a_and_b_and_no_code():
    base = tiny("gpt2")
    before = base.fingerprint()
    tuned = attach(base, METHOD)
    codes = {name: c.packed.clone() for name, c in tuned.codes.items()}
    run = train(tuned, letters(), steps=40, batch_size=11, lr=0.03, progress=False)
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0] / 2
    assert all(torch.equal(c.packed, codes[name]) for name, c in tuned.codes.items())
    tuned.detach()
    assert base.fingerprint() == before


def test_the_codes_move_with_the_model(base):
    tuned = stir(attach(base, METHOD))
    wanted = call(tuned, token_ids(2, 5))
    move(tuned, "cpu")
    assert torch.equal(call(tuned, token_ids(2, 5)), wanted)
    weight = coded_modules(base)[0].weight
    assert weight.untyped_storage().nbytes() == 4


def test_a_saved_adapter_holds_no_code_and_finds_them_again(base, tmp_path):
    tuned = stir(attach(base, METHOD))
    wanted = call(tuned, token_ids(2, 5))
    folder = tuned.save(tmp_path)
    assert not [name for name in tuned.state() if "codes" in name]
    tuned.detach()
    assert torch.equal(call(attach(base, folder), token_ids(2, 5)), wanted)


# Merging ---------------------------------------------------------------------------------------


def test_merging_into_codes_has_to_be_asked_for(base):
    tuned = stir(attach(base, METHOD))
    codes, wanted = tuned.codes, call(tuned, token_ids(2, 5))
    with pytest.raises(ValueError, match=r"held as codes and cannot be merged.*requantise=True"):
        tuned.merge()
    assert not tuned.merged
    assert all(tuned.codes[name] is c for name, c in codes.items())
    assert torch.equal(call(tuned, token_ids(2, 5)), wanted)


@pytest.mark.parametrize("methods", [[METHOD], PARTS, PARTS[::-1]], ids=["one", "two", "turned"])
def test_merging_into_codes_costs_and_unmerging_gives_them_back(base, methods):
    ids = token_ids(2, 5)
    tuned = stir(attach(base, methods))
    codes, wanted = tuned.codes, call(tuned, ids)
    tuned.merge(requantise=True)
    off = (call(tuned, ids) - wanted).abs().max()
    assert off > 1e-3  # rounding alone is a thousand times smaller
    tuned.merge(requantise=True)  # a second time: nothing is added again
    assert (call(tuned, ids) - wanted).abs().max() == off
    tuned.unmerge()
    for name, held in tuned.codes.items():
        assert all(torch.equal(t, codes[name].tensors[key]) for key, t in held.tensors.items())
    assert torch.equal(call(tuned, ids), wanted)
    tuned.merge(requantise=True)
    tuned.detach()  # the fixture compares the base, bit for bit


def test_what_is_merged_is_the_nearest_code(family):
    """Against the sum itself, quantised once, where a module plays one role."""
    if family == "gpt2":
        return  # q, k and v of one module are merged one after the other
    tuned = stir(attach(tiny(family), [NF4(BLOCK, double_quant=False), PARTS[1]]))
    sums = {
        name: linear.weight + tuned.deltas[name].delta_weight().detach()
        for name, linear in tuned.anatomy.linears.items()
    }
    tuned.merge(requantise=True)
    for name, linear in tuned.anatomy.linears.items():
        wanted = quantise(sums[name], BLOCK, double_quant=False)
        assert torch.equal(linear.weight, wanted.dequantise())
    tuned.detach()


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [NF4, QLoRA])
@pytest.mark.parametrize(
    "options, words",
    [
        ({"block_size": 0}, "block_size=0: a whole number of at least 1"),
        ({"block_size": 6.5}, "block_size=6.5: a whole number"),
        ({"quant_type": "nf3"}, "quant_type='nf3': allowed is nf4, fp4, e2m1, int4"),
        ({"double_quant": 1}, "double_quant=1: allowed is True, False"),
        ({"target_modules": []}, r"target_modules=\[\]: give a list"),
    ],
)
def test_settings_out_of_range(method, options, words, untyped):
    with pytest.raises(ValueError, match=words):
        method(**options)


@pytest.fixture
def untyped():
    """What a user meets: the checks of annotations, which only the tests switch on, are off."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("method", [NF4(block_size=7), QLoRA(block_size=7), NF4(4096)])
def test_a_block_size_that_does_not_divide(base, method):
    with pytest.raises(ValueError, match=r"does not divide the [\d,]+ weights of .*layers.0.*such"):
        attach(base, method)
    with pytest.raises(ValueError, match="does not divide"):
        method.coded(base.anatomy.shape)


@pytest.mark.parametrize(
    "methods, words",
    [
        ([NF4(8), NF4(8, target_modules=["o"])], "want the same site, .*codes"),
        ([NF4(8), QLoRA(block_size=8)], "want the same site, .*codes"),
        ([QLoRA(r=2, block_size=8), LoRA()], "want the same site"),
        ([NF4(8), FullFineTuning()], "composes with no other"),
        ([NF4(8, target_modules=["gates"])], "unknown target 'gates'"),
        ([QLoRA(r=2, block_size=8, target_modules=["gates"])], "unknown target 'gates'"),
    ],
)
def test_what_does_not_compose(base, methods: list[Method], words):
    with pytest.raises(ValueError, match=words):
        attach(base, methods)


def test_codes_alone_do_not_train_and_do_not_merge(base):
    tuned = attach(base, NF4(block_size=BLOCK))
    with pytest.raises(ValueError, match="no parameter to train: attach LoRA beside it"):
        train(tuned, letters(), steps=1)
    for options in ({}, {"requantise": True}):
        with pytest.raises(ValueError, match="cannot be merged: it has no ΔW"):
            tuned.merge(**options)


def test_a_weight_without_a_code_leaves_nothing_behind(family):
    base = tiny(family)
    linear = list(base.anatomy.linears.values())[-1]
    with torch.no_grad():
        linear.weight[0, 0] = math.inf
    before = surroundings(base)
    with pytest.raises(ValueError, match="infinite or not a number has no code"):
        attach(base, METHOD)
    assert surroundings(base) == before
    assert not coded_modules(base)


BESIDE = {
    "dora": [DoRA(r=3)],
    "pissa": [PiSSA(r=3)],
    "vera": [VeRA(r=5)],
    "adalora": [AdaLoRA(init_r=4, target_r=2)],
    "ia3": [IA3()],
    "bitfit": [BitFit()],
    "houlsby": [HoulsbyAdapter(4)],
    "prompt": [PromptTuning(3)],
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_composes_with_what_trains(name, family):
    """Beside codes: gradients reach all of it, merging where it merges is undone, the base is
    given back bit for bit; and in the other order as well."""
    if name == "bitfit" and family == "llama":
        return  # it has no bias
    ids = token_ids(2, 5)
    for methods in ([NF4(BLOCK), *BESIDE[name]], [*BESIDE[name], NF4(BLOCK)]):
        base = tiny(family)
        before = surroundings(base)
        tuned = stir(attach(base, methods), size=0.02)
        assert len(tuned.codes) > 0
        wanted, made = call(tuned, ids), gradients(tuned, ids)
        assert all(g.isfinite().all() for g in made.values())
        assert any(g.any() for g in made.values())
        if name in ("dora", "pissa", "vera", "adalora", "ia3"):
            tuned.merge(requantise=True)
            assert not torch.equal(call(tuned, ids), wanted)
            tuned.unmerge()
            assert torch.equal(call(tuned, ids), wanted)
            tuned.merge(requantise=True)
        tuned.detach()
        assert surroundings(base) == before


@pytest.mark.parametrize("codes", [NF4(BLOCK), QLoRA(r=2, block_size=BLOCK)])
def test_a_mask_and_codes_are_refused_in_either_order(base, codes):
    for methods in ([Prune(0.5), codes], [codes, Prune(0.5)]):
        with pytest.raises(ValueError, match="Prune does not go with"):
            attach(base, methods)
