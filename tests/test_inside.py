"""A learner's function in the model: what it gives, what replaces it, and that nothing is left.

Tolerance: the logits are at most about 40, and one function after another rounds differently, by
about 100 u of the largest, with u = 2⁻²⁴ of float32.
"""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import peftlab
from peftlab.exercises import inside, lesson_04, lesson_06

BOUND = 40 * 100 * 2**-24
TARGETS = ["q", "up"]


@pytest.fixture(scope="module", params=["tiny-gpt", "tiny-llama"])
def any_base(request):
    return peftlab.load(request.param)


@pytest.fixture(scope="module")
def base():
    return peftlab.load("tiny-gpt")


def state(base):
    """All that a function in the model could leave behind."""
    names = {*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping}
    hooks = [len(module._forward_hooks) for module in base.model.modules()]
    return names, hooks, base.model.config._attn_implementation, base.fingerprint()


def tokens(base):
    return base.tokenizer([" the old mill near the garden"], return_tensors="pt").input_ids


def with_attention(base):
    """The package's logits with a prefix, and the function that gives those of a learner's."""
    ids = tokens(base)
    with peftlab.attach(base, peftlab.PrefixTuning(3), seed=0) as attached, torch.no_grad():
        packaged = attached(ids, torch.ones_like(ids))
        P_k, P_v = (t.detach().clone() for t in attached.prefix)

    @torch.no_grad()
    def compute(function):
        with inside.attention(base, function, P_k, P_v):
            return base.model(ids, attention_mask=torch.ones_like(ids)).logits

    return packaged, compute


def put_beside(linear, delta):
    first, end = linear.rows

    def hook(module, args, output):
        h = output.clone()
        h[..., first:end] += delta(args[0])
        return h

    return linear.module.register_forward_hook(hook)


def with_hooks(base):
    """The package's logits with LoRA, and the function that gives those of a learner's forward."""
    ids, method = tokens(base), peftlab.LoRA(r=8, alpha=16, target_modules=TARGETS)
    with peftlab.attach(base, method, seed=0) as attached, torch.no_grad():
        for delta in attached.deltas.values():
            torch.nn.init.normal_(delta.B, std=0.1)
        packaged, deltas = attached(ids), dict(attached.deltas)

    @torch.no_grad()
    def compute(function):
        with inside.linears(base, function, deltas, 16, put_beside):
            return base.model(ids).logits

    return packaged, compute


def apart(a, b):
    return (a - b).abs().max().item()


def test_the_solution_of_attention_gives_the_package_s_logits(any_base):
    packaged, compute = with_attention(any_base)
    before = state(any_base)
    assert apart(compute(lesson_04.attend_with_prefix), packaged) < BOUND
    assert state(any_base) == before


def test_the_solution_of_the_narrow_road_gives_the_package_s_logits(base):
    packaged, compute = with_hooks(base)
    before = state(base)
    assert apart(compute(lesson_06.forward_solution), packaged) < BOUND
    assert state(base) == before


def no_prefix(query, key, value, mask, P_k, P_v):
    return lesson_04.attend_with_prefix(query, key, value, mask, P_k[:, :0], P_v[:, :0])


def no_scale(x, W, A, B, alpha):
    return x @ W.T + x @ A.T @ B.T


def test_a_wrong_function_is_seen_in_the_logits(base):
    for (packaged, compute), wrong in ((with_attention(base), no_prefix),
                                       (with_hooks(base), no_scale)):  # fmt: skip
        assert apart(compute(wrong), packaged) > 0.1


def stub(*_):
    raise NotImplementedError


@pytest.mark.parametrize("lesson", ["04", "06"])
@pytest.mark.parametrize("answer", ["stub", "wrong", "right", "stops"])
def test_whose_function_runs_is_said(base, lesson, answer, capsys):
    packaged, compute = (with_attention if lesson == "04" else with_hooks)(base)
    exercise = lesson_04.attend if lesson == "04" else lesson_06.forward

    def stops(*given):  # in the model, and not on the grader's tensors
        if given[0].shape[-1] in (32, 192):
            raise IndexError("too small")
        return exercise.solution(*given)

    wrong = no_prefix if lesson == "04" else no_scale
    given = {"stub": stub, "wrong": wrong, "right": lambda *a: exercise.solution(*a),
             "stops": stops}[answer]  # fmt: skip
    before = state(base)
    assert apart(inside.run(exercise, given, compute), packaged) < BOUND
    assert state(base) == before
    [line] = capsys.readouterr().out.splitlines()
    said = {"stub": "not attempted yet", "wrong": "not right yet", "right": "your function",
            "stops": "IndexError: too small"}[answer]  # fmt: skip
    assert said in line


def test_nothing_is_left_when_the_function_raises(base):
    before = state(base)
    for _, compute in (with_attention(base), with_hooks(base)):
        with pytest.raises(NotImplementedError):
            compute(stub)
        assert state(base) == before
