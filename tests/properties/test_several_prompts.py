"""Kept soft prompts: one in place for all rows, or another for each row of one batch.

A row of a mixed batch must be what that row is with its own prompt alone, up to the rounding of
batched products: 4 E, as in the suite of every method.
"""

import pytest
import torch
from models import (
    CASES,
    FAMILIES,
    GENERATING,
    U32,
    U64,
    adapted,
    call,
    padded,
    put,
    rows_of,
    stir,
    surroundings,
    tiny,
    token_ids,
)

from peftlab import PrefixTuning, PTuning, attach

NAMES = ("prompt", "prefix", "p lama", "p around", "v2 depth", "deep", "prompt + prefix")
ON_ALL = pytest.mark.parametrize(
    "family, case", [(family, case) for case in NAMES for family in FAMILIES]
)


def rows():
    return padded([token_ids(1, n, seed=n)[0] for n in (7, 4, 6)], "right")


def kept(case, family, dtype=torch.float32):
    """A base with two prompts kept, "a" and "b", and a third that trains."""
    tuned = put(case, tiny(family, dtype))
    for seed, name in enumerate("ab", start=1):
        stir(tuned, seed)
        tuned.keep(name)
    return stir(tuned, 5)


def answers(tuned):
    ids, mask = rows()
    with torch.no_grad():
        return rows_of(tuned, call(tuned, ids, mask), mask)


@ON_ALL
def test_each_row_has_its_own(case, family):
    tuned, double = kept(case, family), kept(case, family, torch.float64)
    single = {}
    for name in ("a", "b", None):
        tuned.use(name)
        double.use(name)
        single[name] = answers(double)
        E = max(
            (x.double() - y).abs().max().item()
            for x, y in zip(answers(tuned), single[name], strict=True)
        )
    assert not torch.equal(single["a"][0], single["b"][0])
    assert not torch.equal(single["a"][0], single[None][0])
    for order in (["a", "b", "a"], ("b", "b", "a")):
        tuned.use(order)
        double.use(order)
        for row, (ours, theirs) in enumerate(zip(answers(tuned), answers(double), strict=True)):
            wanted = single[order[row]][row]
            assert (theirs - wanted).abs().max() <= 4 * E * U64 / U32
            assert (ours - wanted).abs().max() <= 4 * E
    double.use(None)
    assert all(torch.equal(x, y) for x, y in zip(answers(double), single[None], strict=True))
    before = tuned.state()
    tuned.use("a")
    assert all(torch.equal(before[name], tensor) for name, tensor in tuned.state().items())


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("family", GENERATING)
def test_generation_row_by_row(case, family):
    tuned = kept(case, family, torch.float64)
    prompts = ["ab>", "the > longest one", ">q"]
    single = {}
    for name in "ab":
        tuned.use(name)
        single[name] = tuned.generate(prompts, max_new_tokens=5)
    tuned.use(["b", "a", "b"])
    wanted = [single["b"][0], single["a"][1], single["b"][2]]
    assert tuned.generate(prompts, max_new_tokens=5) == wanted


@pytest.mark.parametrize("case", ["prefix", "p lama", "head v2", "head prompt"])
def test_an_adapter_is_kept_from_its_folder(case, tmp_path):
    other = adapted(case, "bert", seed=3)
    ids = token_ids(2, 6)
    with torch.no_grad():
        wanted = other(ids)
    other.save(tmp_path)
    tuned = put(case, tiny("bert"))
    tuned.keep("other", tmp_path)
    tuned.use("other")
    with torch.no_grad():
        assert torch.equal(tuned(ids), wanted)


def test_what_is_refused(tmp_path):
    tuned = kept("prefix", "gpt2")
    with pytest.raises(KeyError, match=r"nothing was kept as 'c': there are \['a', 'b'\]"):
        tuned.use("c")
    with pytest.raises(KeyError, match="nothing was kept as 'c'"):
        tuned.use(["a", "c", "b"])
    for case in ("prefix", "prompt", "deep"):
        for family in ("gpt2", "t5"):
            mixed = kept(case, family)
            mixed.use(["a", "b"])
            with pytest.raises(ValueError, match=r"2 (prefixes|prompts) for a batch of 3 rows"):
                answers(mixed)
            mixed.use("a")
            answers(mixed)
    other = adapted("full", "gpt2")
    with pytest.raises(ValueError, match="Full fine-tuning cannot be kept and swapped"):
        other.keep("x")
    assert not other.kept
    head = adapted("head v2", "bert")
    head.keep("x")
    with pytest.raises(ValueError, match="a head is one for the whole batch"):
        head.use(["x", "x"])
    tuned.detach()
    for act in (lambda: tuned.keep("x"), lambda: tuned.use("a")):
        with pytest.raises(RuntimeError, match="was detached"):
            act()


@pytest.mark.parametrize(
    "mine, theirs",
    [
        (PrefixTuning(3), PrefixTuning(4)),
        (PrefixTuning(3), PrefixTuning(3, shift_positions=True)),
        (PTuning(3, "mlp"), PTuning(3, "mlp", placement=[(3, "after >")])),
        (PTuning(3, "mlp"), PrefixTuning(3)),
    ],
)
def test_an_adapter_of_another_kind_is_not_kept(mine, theirs, tmp_path):
    """The same tensors at other places or positions are another method, and would be noise."""
    attach(tiny("gpt2"), theirs).save(tmp_path)
    tuned = attach(tiny("gpt2"), mine)
    with pytest.raises(ValueError):
        tuned.keep("x", tmp_path)
    assert not tuned.kept


def test_a_head_of_another_kind_is_not_kept(tmp_path):
    adapted("head p back", "bert").save(tmp_path)
    tuned = attach(tiny("bert"), CASES["head p back"].methods, head=CASES["head v2"].head)
    with pytest.raises(ValueError, match="head"):
        tuned.keep("x", tmp_path)


def test_training_under_a_kept_prompt_is_refused():
    """What trains would not be what is read."""
    from models import letters

    from peftlab import train

    tuned = kept("prefix", "gpt2")
    tuned.use("a")
    with pytest.raises(ValueError, match=r"use\(None\)"):
        train(tuned, letters(), steps=1, progress=False, evaluate=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_while_kept_prompts_are_in_use(family):
    base = tiny(family)
    before = surroundings(base)
    tuned = attach(base, PrefixTuning(3))
    tuned.keep("a")
    tuned.use(["a", "a", "a"])
    answers(tuned)
    tuned.detach()
    assert surroundings(base) == before
