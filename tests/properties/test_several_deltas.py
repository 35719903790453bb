"""Several adapters on one base: swapped, weighed, and another for each row of one batch.

Tolerances are 4 E as in the suite of every method, E the float32 error over the same batch; in
float64 4 E · 2⁻²⁹. A sum of two deltas is rounded once more than one of them: twice that.
"""

import pytest
import torch
from models import (
    FAMILIES,
    U32,
    U64,
    call,
    padded,
    put,
    rows_of,
    stir,
    surroundings,
    tiny,
    token_ids,
)

from peftlab import AdaLoRA, DoRA, LoRA, PrefixTuning, Prune, attach, train
from peftlab.tuned.kept import Deltas

FLOAT32, FLOAT64 = torch.float32, torch.float64
NAMES = ("lora", "lora all", "dora", "pissa", "vera", "adalora")
ON_ALL = pytest.mark.parametrize(
    "family, case",
    [(family, "lora") for family in FAMILIES] + [("gpt2", case) for case in NAMES[1:]],
)


def rows():
    return padded([token_ids(1, n, seed=n)[0] for n in (7, 4, 6)], "right")


def kept(case, family, dtype=FLOAT32):
    """A base with two adapters kept, "a" and "b", and a third that trains."""
    tuned = put(case, tiny(family, dtype))
    for seed, name in enumerate("ab", start=1):
        stir(tuned, seed)
        tuned.keep(name)
    return stir(tuned, 5)


def answers(tuned):
    ids, mask = rows()
    with torch.no_grad():
        return rows_of(tuned, call(tuned, ids, mask), mask)


def apart(ours, theirs) -> float:
    return max((x.double() - y).abs().max().item() for x, y in zip(ours, theirs, strict=True))


@ON_ALL
def test_each_row_has_its_own(case, family):
    tuned, double = kept(case, family), kept(case, family, FLOAT64)
    single, E = {}, 0.0
    for name in ("a", "b", None):
        tuned.use(name)
        double.use(name)
        single[name] = answers(double)
        E = max(E, apart(answers(tuned), single[name]))
    assert not torch.equal(single["a"][0], single["b"][0])
    assert not torch.equal(single["a"][0], single[None][0])
    for order in (["a", "b", "a"], ("b", "b", "a")):
        wanted = [single[name][row] for row, name in enumerate(order)]
        tuned.use(order)
        double.use(order)
        assert apart(answers(double), wanted) <= 4 * E * U64 / U32
        assert apart(answers(tuned), wanted) <= 4 * E
    double.use(None)
    assert all(torch.equal(x, y) for x, y in zip(answers(double), single[None], strict=True))


@pytest.mark.parametrize("case", ["lora", "lora fused", "rslora plus", "nf4 + lora"])
def test_rows_in_two_products_are_rows_one_by_one(case, monkeypatch):
    """The page shows the loop; what runs is two batched products, unless a mask holds zeros."""
    found = {}
    for dtype in (FLOAT32, FLOAT64):
        tuned = kept(case, "gpt2", dtype)
        tuned.use(["b", "a", "b"])
        assert all(site.instead.factors for site in tuned._sites if site.delta is not None)
        products = answers(tuned)
        with monkeypatch.context() as patch:
            patch.setattr(Deltas, "apply", Deltas.one_by_one)
            found[dtype] = [products, answers(tuned)]
    (few, many), (few64, many64) = found.values()
    E = max(apart(few, few64), apart(many, many64))
    assert apart(few, many) <= 4 * E and apart(few64, many64) <= 4 * E * U64 / U32


@pytest.mark.parametrize("methods", [[Prune(0.5), LoRA(r=3)], [DoRA(r=3)]])
def test_what_has_no_two_products_runs_one_by_one(methods, monkeypatch):
    tuned = attach(tiny("gpt2", FLOAT64), methods)
    for seed, name in enumerate("ab"):
        stir(tuned, seed)
        tuned.keep(name)
    tuned.use(["b", "a", "b"])
    wanted, calls = answers(tuned), []
    plain = Deltas.one_by_one
    count = lambda self, *inputs: calls.append(1) or plain(self, *inputs)  # noqa: E731
    monkeypatch.setattr(Deltas, "one_by_one", count)
    assert all(torch.equal(x, y) for x, y in zip(answers(tuned), wanted, strict=True))
    assert len(calls) == len(tuned.deltas)


@ON_ALL
def test_a_kept_adapter_answers_as_the_one_it_was(case, family):
    """Bit for bit: the same numbers in the same operations, and what trains is untouched."""
    tuned = stir(put(case, tiny(family)), 1)
    wanted = answers(tuned)
    tuned.keep("a")
    stir(tuned, 2)
    other, state = answers(tuned), tuned.state()
    tuned.use("a")
    assert all(torch.equal(x, y) for x, y in zip(answers(tuned), wanted, strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in tuned.state().items())
    tuned.use(None)
    assert all(torch.equal(x, y) for x, y in zip(answers(tuned), other, strict=True))


@ON_ALL
def test_a_weighted_sum_is_one_of_deltas_and_not_of_factors(case, family):
    tuned = put(case, tiny(family, FLOAT64))
    weights, dense, states = {"a": 0.75, "b": -0.5}, {}, {}
    for seed, name in enumerate(weights, start=1):
        stir(tuned, seed)
        tuned.keep(name)
        states[name] = tuned.state()
        for place, delta in tuned.deltas.items():
            dense[place] = dense.get(place, 0) + weights[name] * delta.delta_weight().detach()
    mixed = {k: sum(w * states[name][k] for name, w in weights.items()) for k in states["a"]}
    base = {place: tuned.anatomy.linears[place].weight.clone() for place in dense}
    tuned.use(weights)
    live = answers(tuned)
    before = tuned.base.fingerprint()
    tuned.merge()
    for place, delta in dense.items():
        # The same products and sums, in which each number is rounded a few times.
        close = 8 * U64 * (base[place].abs() + delta.abs()).max()
        assert (tuned.anatomy.linears[place].weight - base[place] - delta).abs().max() <= close
    single = kept(case, family)
    E = apart(answers(single), answers(kept(case, family, FLOAT64)))
    assert apart(answers(tuned), live) <= 8 * E * U64 / U32
    tuned.unmerge()
    assert tuned.base.fingerprint() == before
    tuned.use(None)
    tuned.load_state(mixed)  # what a sum of factors would be
    assert apart(answers(tuned), live) > 1e-3


def test_every_weight_one_is_that_adapter_and_none_is_the_base():
    tuned = kept("lora", "gpt2")
    tuned.use("a")
    wanted = answers(tuned)
    tuned.use({"a": 1.0})
    assert all(torch.equal(x, y) for x, y in zip(answers(tuned), wanted, strict=True))
    plain = answers(tiny("gpt2"))
    tuned.use({"a": 0.0, "b": 0})
    assert all(torch.equal(x, y) for x, y in zip(answers(tuned), plain, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_generation_row_by_row(family):
    tuned = kept("lora", family, FLOAT64)
    prompts = ["ab>", "the > longest one", ">q"]
    single = {}
    for name in "ab":
        tuned.use(name)
        single[name] = tuned.generate(prompts, max_new_tokens=5)
    tuned.use(["b", "a", "b"])
    wanted = [single["b"][0], single["a"][1], single["b"][2]]
    assert tuned.generate(prompts, max_new_tokens=5) == wanted


def test_deltas_and_prefixes_are_swapped_together():
    tuned = attach(tiny("gpt2", FLOAT64), [LoRA(r=2), PrefixTuning(3)])
    single = {}
    for seed, name in enumerate("ab", start=1):
        stir(tuned, seed)
        tuned.keep(name)
        single[name] = answers(tuned)
    stir(tuned, 3)
    tuned.use(["a", "b", "b"])
    wanted = [single["a"][0], single["b"][1], single["b"][2]]
    # Some hundred roundings of numbers of this size, in two layers and the logits.
    assert apart(answers(tuned), wanted) <= 1000 * U64 * max(x.abs().max() for x in wanted)
    with pytest.raises(ValueError, match="soft prompts have no weighted sum"):
        tuned.use({"a": 0.5, "b": 0.5})


def test_an_adapter_is_kept_from_its_folder(tmp_path):
    other = stir(put("pissa", tiny("llama")), 3)
    wanted = answers(other)
    other.save(tmp_path)
    tuned = put("pissa", tiny("llama"))
    tuned.keep("other", tmp_path)
    tuned.use("other")
    assert all(torch.equal(x, y) for x, y in zip(answers(tuned), wanted, strict=True))


def test_what_is_refused():
    tuned = kept("lora", "gpt2")
    with pytest.raises(KeyError, match=r"nothing was kept as 'c': there are \['a', 'b'\]"):
        tuned.use({"a": 1.0, "c": 1.0})
    for weight in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="the weight of 'a' is .*: a number is needed"):
            tuned.use({"a": weight})
    assert tuned.using is None
    tuned.use(["a", "b"])
    with pytest.raises(ValueError, match="2 deltas for a batch of 3 rows"):
        answers(tuned)
    before = tuned.base.fingerprint()
    with pytest.raises(ValueError, match="rows with deltas of their own cannot be merged"):
        tuned.merge()
    assert not tuned.merged and tuned.base.fingerprint() == before
    tuned.use("a")
    tuned.merge()
    with pytest.raises(ValueError, match=r"merged: call unmerge\(\) before use"):
        tuned.use("b")
    tuned.unmerge()
    from models import letters

    with pytest.raises(ValueError, match=r"use\(None\)"):
        train(tuned, letters(), steps=1, progress=False, evaluate=False)


@pytest.mark.parametrize(
    "mine, theirs",
    [
        (LoRA(r=3), LoRA(r=2)),
        (LoRA(r=3), LoRA(r=3, alpha=3)),
        (LoRA(r=3), LoRA(r=3, use_rslora=True)),
        (LoRA(r=3), LoRA(r=3, target_modules=["q", "k"])),
        (LoRA(r=3), DoRA(r=3)),
        (AdaLoRA(init_r=4, target_r=2), AdaLoRA(init_r=5, target_r=2)),
    ],
)
def test_an_adapter_of_another_kind_is_not_kept(mine, theirs, tmp_path):
    """The same tensors at another scale are another delta."""
    attach(tiny("gpt2"), theirs).save(tmp_path)
    tuned = attach(tiny("gpt2"), mine)
    with pytest.raises(ValueError):
        tuned.keep("x", tmp_path)
    assert not tuned.kept


@pytest.mark.parametrize("merged", [False, True])
def test_detaching_while_kept_deltas_are_in_use(merged):
    base = tiny("llama")
    before = surroundings(base)
    tuned = attach(base, LoRA(r=3))
    stir(tuned).keep("a")
    tuned.use({"a": 2.0} if merged else ["a", "a", "a"])
    answers(tuned)
    if merged:
        tuned.merge()
    tuned.detach()
    assert surroundings(base) == before
