"""LoRA's relatives against Hugging Face PEFT: logits, gradients, counts, starts, learning rates.

Every tensor of ours is one of PEFT's as it is. The tolerances are those of test_peft.py: E is
PEFT's own float32 error, 4 E is allowed, and in float64 4 E · 2⁻²⁹.

On GPT-2 PEFT adapts c_attn as one matrix, which only `fused` does as well; the others are compared
on the matrices that are not fused. PEFT's PiSSA writes the residual into the base, in float32 or
less; so its start is compared in float32, and what it computes with a residual of ours in place.
PEFT divides AdaLoRA's alpha by init_r + 10⁻⁵, and so it is given as much more.
"""

import warnings

import peft
import pytest
import torch
from models import FAMILIES, U32, U64, decoder_ids, hf_model, stir, tiny, token_ids
from peft.optimizers import create_loraplus_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab import AdaLoRA, DoRA, LoRA, PiSSA, VeRA, attach
from peftlab.training import Run, _groups

from .test_peft import backward, forward, worst
from .twins import Twins, _same, _wrap

FLOAT32, FLOAT64 = torch.float32, torch.float64
QV, UNFUSED = ["q", "v"], ["o", "up", "down"]
METHODS = {
    "rslora": lambda targets: LoRA(r=3, alpha=2, target_modules=targets, use_rslora=True),
    "dora": lambda targets: DoRA(r=3, alpha=5, target_modules=targets),
    "dora all": lambda _: DoRA(r=2, target_modules="all-linear"),
    "pissa": lambda targets: PiSSA(r=3, alpha=5, target_modules=targets),
    "vera": lambda targets: VeRA(r=7, target_modules=targets),
    "vera all": lambda _: VeRA(r=30, target_modules="all-linear", projection_prng_key=5),
    "adalora": lambda targets: AdaLoRA(init_r=4, target_r=2, alpha=3, target_modules=targets),
    "fused": lambda _: LoRA(r=3, alpha=5, target_modules=["q", "k", "v"], fused=True),
    "fused and others": lambda _: LoRA(r=2, target_modules="all-linear", fused=True),
}
SEPARATE = ["rslora", "dora", "pissa", "vera", "adalora"]
PAIRS = [(family, name) for family in FAMILIES for name in SEPARATE]
PAIRS += [("gpt2", "fused"), ("gpt2", "fused and others")]
PAIRS += [("llama", "dora all"), ("llama", "vera all")]  # grouped heads: keys are narrower
every = pytest.mark.parametrize("family, method", PAIRS)


def method_for(family, name):
    return METHODS[name](UNFUSED if family == "gpt2" else QV)


def config_for(method, modules, transposed):
    given = {"target_modules": modules, "fan_in_fan_out": transposed}
    if isinstance(method, VeRA):
        key = method.projection_prng_key
        return peft.VeraConfig(r=method.r, projection_prng_key=key, **given)
    if isinstance(method, AdaLoRA):
        sizes = {"init_r": method.init_r, "target_r": method.target_r, "total_step": 100}
        alpha = method.alpha * (method.init_r + 1e-5) / method.init_r
        return peft.AdaLoraConfig(lora_alpha=alpha, **sizes, **given)
    more = {"use_dora": isinstance(method, DoRA)}
    more["use_rslora"] = getattr(method, "use_rslora", False)
    return peft.LoraConfig(r=method.r, lora_alpha=method.alpha, **more, **given)


def tensors_of(layer, method):
    """Our name for a tensor, and PEFT's of the same numbers, with how it is turned."""
    if isinstance(method, VeRA):
        return {"d": layer.vera_lambda_d["default"], "b": layer.vera_lambda_b["default"]}
    if isinstance(method, AdaLoRA):
        names = {"P": layer.lora_B, "L": layer.lora_E, "Q": layer.lora_A}
        return {ours: theirs["default"] for ours, theirs in names.items()}
    found = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if isinstance(method, DoRA):
        found["m"] = layer.lora_magnitude_vector["default"].weight
    return found


@torch.no_grad()
def twins(family, name, dtype):
    """Ours away from its start, and PEFT's with the same numbers."""
    method = method_for(family, name)
    ours = stir(attach(tiny(family, dtype), method))
    modules = {module: name for name, module in ours.model.named_modules()}
    places = {site.name: modules[site.linear.module] for site in ours._sites}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out
        config = config_for(method, list(places.values()), family == "gpt2")
        theirs = _wrap(ours, hf_model(family, dtype), config)
    parts = []
    for place, module in places.items():
        layer = theirs.base_model.model.get_submodule(module)
        for key, parameter in tensors_of(layer, method).items():
            parameter.copy_(ours.trainable[f"{method.name}.{place}.{key}"].view_as(parameter))
            parts += _same(method.name, {f"{place}.{key}": parameter})
            if key == "L":  # a column there
                parts[-1].read = lambda t, place=place: {f"adalora.{place}.L": t[:, 0]}
        if isinstance(method, PiSSA):
            start = ours.deltas[place]
            residual = start.scale * start.B0 @ start.A0
            weight = layer.base_layer.weight
            weight -= residual.T if family == "gpt2" else residual
    for name, parameter in theirs.named_parameters():
        if ".ranknum." in name:  # init_r, a constant, that asks for a gradient once it is cast
            parameter.requires_grad_(False)
    assert {id(p) for p in theirs.parameters() if p.requires_grad} == {
        id(part.parameter) for part in parts
    }
    return Twins(ours, theirs.eval(), parts)


@every
def test_logits_and_gradients_of_every_trained_tensor(family, method):
    single, double = (twins(family, method, dtype) for dtype in (FLOAT32, FLOAT64))
    (ours32, theirs32), (ours64, theirs64) = forward(single, "left"), forward(double, "left")
    E = (theirs32.double() - theirs64).abs().max()
    assert (ours32 - theirs32).abs().max() <= 4 * E
    assert (ours64 - theirs64).abs().max() <= 4 * E * U64 / U32
    for pair in (single, double):
        backward(pair, "left")
    truth = {name: theirs for name, _, theirs in double.gradients()}
    E = worst((name, theirs, truth[name]) for name, _, theirs in single.gradients())
    assert worst(single.gradients()) <= 4 * E
    assert worst(double.gradients()) <= 4 * E * U64 / U32


@every
def test_the_number_of_trained_parameters(family, method):
    pair = twins(family, method, FLOAT32)
    theirs, _ = pair.theirs.get_nb_trainable_parameters()
    assert theirs == pair.ours.count().parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_vera_draws_the_projections_that_peft_draws(family):
    pair = twins(family, "vera", FLOAT32)
    ours = pair.ours.modules["vera.projections"]
    theirs = pair.theirs.base_model
    assert torch.equal(ours.A, theirs.vera_A["default"])
    assert torch.equal(ours.B, theirs.vera_B["default"])


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_starts_at_the_norms_that_peft_has(family):
    """Sums of d_in squares in any order and a root: relative error (d_in + 2) u, of either."""
    ours = attach(tiny(family, FLOAT64), method_for(family, "dora"))
    modules = {module: name for name, module in ours.model.named_modules()}
    for site in ours._sites:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_for(ours.methods[0], [modules[site.linear.module]], family == "gpt2")
            theirs = _wrap(ours, hf_model(family, FLOAT64), config)
        layer = theirs.base_model.model.get_submodule(modules[site.linear.module])
        wanted = layer.lora_magnitude_vector["default"].weight
        assert ((site.delta.m - wanted).abs() <= 2 * (site.linear.d_in + 2) * U64 * wanted).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_pissa_starts_where_peft_starts(family):
    """Up to the sign of each pair of singular vectors, and both leave the same residual.

    PEFT decomposes in float32: an error of √(d_in d_out) u ‖W‖ at most in W, by the backward
    stability of the decomposition, is one of ‖E‖ / gap in a vector, the gap being that between
    neighbouring singular values; each entry of a factor is √(S / s) times one of a vector.
    """
    method = method_for(family, "pissa")
    ours = attach(tiny(family), method)
    modules = {module: name for name, module in ours.model.named_modules()}
    places = {site: modules[site.linear.module] for site in ours._sites}
    config = peft.LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        target_modules=list(places.values()),
        init_lora_weights="pissa",
        fan_in_fan_out=family == "gpt2",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _wrap(ours, hf_model(family), config)
    for site, module in places.items():
        layer = theirs.base_model.model.get_submodule(module)
        W, delta = site.linear.weight, site.delta
        S = torch.linalg.svdvals(W.double())
        wrong = 4 * (W.shape[0] * W.shape[1]) ** 0.5 * U32 * S[0]
        for i in range(method.r):
            gaps = (S - S[i]).abs()
            gap = gaps[torch.arange(len(S)) != i].min()
            A, B = layer.lora_A["default"].weight[i], layer.lora_B["default"].weight[:, i]
            sign = (A @ delta.A[i]).sign()
            # The size of a factor and what turning its vector by the error can change.
            close = delta.A[i].norm() * (wrong / gap + wrong / S[i] + 8 * U32)
            assert (sign * A - delta.A[i]).abs().max() <= close
            assert (sign * B - delta.B[:, i]).abs().max() <= close


@pytest.mark.parametrize("ratio", [1.0, 4, 16])
def test_loraplus_gives_every_tensor_the_rate_that_peft_gives(ratio):
    method = LoRA(r=3, target_modules=UNFUSED, loraplus_lr_ratio=ratio)
    ours = attach(tiny("llama"), method)
    run = Run("", "", 0, "cpu", "fp32", 1e-3, 1)
    rates = {id(p): group["lr"] for group in _groups(ours, run) for p in group["params"]}
    config = peft.LoraConfig(r=3, target_modules=["o_proj", "up_proj", "down_proj"])
    theirs = _wrap(ours, hf_model("llama"), config)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=float(ratio)
    )
    wanted = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_shape = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            by_shape.setdefault("AB"["lora_B" in name], set()).add(wanted[id(parameter)])
    for factor in "AB":
        mine = {rates[id(p)] for name, p in ours.trainable.items() if name.endswith(factor)}
        assert mine == by_shape[factor]
    assert len(mine) == 1


class Operations(TorchDispatchMode):
    """Counts what is launched: every operation that is not a view of what is there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_launches_no_more_than_pefts(family, mixed):
    """On a GPU a small step takes as long as its launches take. The same deltas on both sides."""
    pair, ids = twins(family, "rslora", FLOAT32), token_ids(2, 7)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "t5":
        given["decoder_input_ids"] = decoder_ids(ids)
    counts = []
    for model in (pair.ours.model, pair.theirs):
        model.train()
        with Operations() as operations:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                logits = model(**given).logits
            logits.float().square().mean().backward()
        counts.append(operations.count)
    assert counts[0] <= counts[1]
