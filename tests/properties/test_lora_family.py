"""What sets each of LoRA's relatives apart, against formulas written out densely.

In float64; where a sum is taken in another order, the tolerance is the number of its terms times
the unit roundoff times the size of the terms.
"""

import copy
import pickle
import threading

import pytest
import torch
from models import FAMILIES, U64, adapted, call, hook_count, letters, put, stir, tiny, token_ids
from peft.tuners.adalora.layer import RankAllocator

from peftlab import AdaLoRA, DoRA, LoRA, PiSSA, VeRA, attach, train
from peftlab.methods.pissa import principal

FLOAT64 = torch.float64
QKV = ["q", "k", "v"]


# rsLoRA, LoRA+, one A for several targets --------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4, 9])
def test_rslora_divides_by_the_root(r):
    for use_rslora, scale in ((False, 6 / r), (True, 6 / r**0.5)):
        method = LoRA(r=r, alpha=6, use_rslora=use_rslora)
        tuned = attach(tiny("gpt2"), method)
        assert {delta.scale for delta in tuned.deltas.values()} == {scale}


def test_loraplus_moves_b_further_and_a_as_far():
    """Adam's first step is the rate times the sign of the gradient, and A's gradient is zero."""
    moved = {}
    for ratio in (1, 8):
        tuned = stir(attach(tiny("gpt2", FLOAT64), LoRA(r=2, loraplus_lr_ratio=ratio)))
        before = tuned.state()
        train(tuned, letters(), steps=1, lr=1e-3, warmup=0, progress=False, evaluate=False)
        after = tuned.state()
        moved[ratio] = {name: (after[name] - before[name]).abs().max().item() for name in after}
    for name in moved[1]:
        times = 8 if name.endswith(".B") else 1
        # The step is η g / (|g| + ε): 1e-8 beside gradients above 1e-5 in some entry.
        assert moved[8][name] == pytest.approx(times * moved[1][name], rel=1e-9)
        assert moved[1][name] == pytest.approx(1e-3, rel=1e-2)


def test_one_a_for_q_k_and_v_is_separate_factors_with_one_a():
    """... and no other way round: separate factors have rank 3 r together, the shared A has r."""
    ids = token_ids(3, 9)
    shared = stir(attach(tiny("gpt2", FLOAT64), LoRA(r=2, target_modules=QKV, fused=True)))
    apart = attach(tiny("gpt2", FLOAT64), LoRA(r=2, target_modules=QKV))
    assert shared.sites == apart.sites
    tensors = {}
    for layer in range(2):
        delta = shared.deltas[f"layers.{layer}.qkv"]
        for target, B in zip(QKV, delta.B.split(24), strict=True):
            name = f"lora.layers.{layer}.{target}"
            tensors |= {f"{name}.A": delta.A.detach(), f"{name}.B": B.detach()}
    apart.load_state(tensors)
    with torch.no_grad():
        # One product of 72 rows or three of 24: sums of 24 and of 2 terms, through two layers.
        assert (shared(ids) - apart(ids)).abs().max() <= 1000 * U64 * shared(ids).abs().max()
    stir(apart)
    stacked = torch.cat([apart.deltas[f"layers.0.{t}"].delta_weight() for t in QKV])
    assert torch.linalg.matrix_rank(stacked) == 6
    assert torch.linalg.matrix_rank(shared.deltas["layers.0.qkv"].delta_weight()) == 2


@pytest.mark.parametrize("targets", [["q", "v"], ["k", "v"], "all-linear"])
def test_a_shared_a_reaches_the_rows_of_its_targets(targets):
    """q and v alone: the rows of k lie between them and stay."""
    base = tiny("gpt2", FLOAT64)
    before = {name: linear.weight.clone() for name, linear in base.anatomy.linears.items()}
    method = LoRA(r=2, target_modules=targets, fused=True)
    tuned = stir(attach(base, method))
    assert tuned.count().measured == method.parameters(base.anatomy.shape)
    ids = token_ids(2, 7)
    with torch.no_grad():
        live = tuned(ids)
        tuned.merge()
        assert (tuned(ids) - live).abs().max() <= 1000 * U64 * live.abs().max()
    for name, linear in base.anatomy.linears.items():
        reached = targets == "all-linear" or linear.target in targets
        assert torch.equal(linear.weight, before[name]) != reached


# DoRA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_is_the_formula(family):
    """W' = m (W + s B A) / n, its rows as long as m says, whatever A and B are."""
    tuned = adapted("dora", family, FLOAT64)
    for site in tuned._sites:
        W, delta = site.linear.weight, site.delta
        changed = W + delta.scale * delta.B @ delta.A
        n = changed.norm(dim=1)
        # n² is a sum of squares that may cancel: d_in + 2 r terms of the size of the largest.
        size = (W.norm(dim=1) + (delta.scale * delta.B @ delta.A).norm(dim=1)) ** 2
        close = (W.shape[1] + 10) * U64 * size / n
        assert ((delta.norms() - n).abs() <= close).all()
        wanted = delta.m[:, None] * changed / n[:, None]
        far = 4 * (close / n * delta.m.abs()).max() * (changed / n[:, None]).abs().max()
        assert (W + delta.delta_weight() - wanted).abs().max() <= far + 8 * U64 * W.abs().max()
        lengths = (W + delta.delta_weight()).norm(dim=1)
        assert ((lengths - delta.m.abs()).abs() <= 4 * W.shape[1] * U64 * lengths + far).all()


def test_the_gradient_of_dora_takes_the_norm_as_a_constant():
    """Against a dense W' with n detached; with n in the graph A's gradient would be another."""
    tuned = adapted("dora", "llama", FLOAT64)
    site = tuned._sites[0]
    delta, W = site.delta, site.linear.weight
    x = torch.randn(5, W.shape[1], dtype=FLOAT64, generator=torch.Generator().manual_seed(0))
    grads = {}
    for way in ("ours", "constant", "not constant"):
        if way == "ours":
            out = delta(x, x @ W.T)
        else:
            changed = W + delta.scale * delta.B @ delta.A
            n = changed.norm(dim=1)
            n = n.detach() if way == "constant" else n
            out = x @ (delta.m[:, None] * changed / n[:, None]).T - x @ W.T
        loss = (out * torch.arange(out.numel()).view_as(out)).sum()
        grads[way] = torch.autograd.grad(loss, (delta.A, delta.B, delta.m))
    for ours, constant in zip(grads["ours"], grads["constant"], strict=True):
        # Some hundred products in another order.
        assert (ours - constant).abs().max() <= 1000 * U64 * constant.abs().max()
    assert (grads["constant"][0] - grads["not constant"][0]).abs().max() > 0.01


def test_dora_knows_its_weight_while_it_is_merged():
    tuned = adapted("dora", "gpt2", FLOAT64)
    before = {name: delta.delta_weight() for name, delta in tuned.deltas.items()}
    tuned.merge()
    assert all(torch.equal(before[n], delta.delta_weight()) for n, delta in tuned.deltas.items())


# PiSSA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_out, d_in, r", [(6, 9, 1), (9, 6, 3), (7, 7, 7)])
def test_the_principal_factors(d_out, d_in, r):
    """B A is the best approximation: what is left has the other singular values. The same sign
    for W whatever sign the decomposition chose, and both factors share S evenly."""
    W = torch.randn(d_out, d_in, dtype=FLOAT64, generator=torch.Generator().manual_seed(r))
    A, B = principal(W, r)
    S = torch.linalg.svdvals(W)
    close = 10 * d_out * d_in * U64 * S[0]  # backward stability of the decomposition
    left = torch.linalg.svdvals(W - B @ A)[: len(S) - r]
    assert (left - S[r:]).abs().max() <= close if r < len(S) else (W - B @ A).abs().max() <= close
    for gram in (A @ A.T, B.T @ B):
        assert (gram - torch.diag(S[:r])).abs().max() <= close
    top = B.gather(0, B.abs().argmax(dim=0, keepdim=True))
    assert (top > 0).all()
    again = principal(W.T.contiguous().T, r)
    assert (again[0] - A).abs().max() <= 100 * close / (S[:-1] - S[1:]).min()


def test_pissa_has_a_gradient_in_both_factors_at_the_first_step():
    base = tiny("llama", FLOAT64)
    for method, moves in ((LoRA(r=2), False), (PiSSA(r=2), True)):
        tuned = attach(base, method)
        call(tuned, token_ids(2, 7)).square().sum().backward()
        grads = [p.grad.abs().sum() > 0 for n, p in tuned.trainable.items() if n.endswith(".A")]
        assert all(grads) == any(grads) == moves
        tuned.detach()


# VeRA --------------------------------------------------------------------------------------------


def test_vera_has_one_a_and_one_b_and_every_weight_a_slice():
    tuned = adapted("vera all", "llama")
    shared = tuned.modules["vera.projections"]
    assert shared.A.shape == (30, 44) and shared.B.shape == (44, 30)
    for site in tuned._sites:
        delta = site.delta
        assert torch.equal(delta.A, shared.A[:, : site.linear.d_in])
        assert torch.equal(delta.B, shared.B[: site.linear.d_out])
        assert delta.A.data_ptr() == shared.A.data_ptr()  # no copy
    names = {name.rsplit(".", 1)[1] for name in tuned.state()}
    assert names == {"b", "d"}
    other = attach(tiny("llama"), VeRA(r=30, target_modules="all-linear", projection_prng_key=1))
    assert not torch.equal(other.modules["vera.projections"].A, shared.A)


# AdaLoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, start, end", [(100, 0.1, 0.7), (37, 0.0, 1.0), (50, 0.5, 0.5)])
def test_the_budget_is_pefts_cubic(total, start, end):
    """... rounded, where PEFT cuts off: the two differ by less than one triplet."""
    method = AdaLoRA(init_r=12, target_r=4, start=start, end=end)
    theirs = RankAllocator.__new__(RankAllocator)
    config = {"tinit": start * total, "tfinal": total - end * total, "total_step": total}
    theirs.peft_config = type("Config", (), {**config, "deltaT": 1})
    theirs.init_bgt, theirs.target_bgt = 12 * 7, 4 * 7
    budgets = [method.budget(step / total, 7) for step in range(1, total + 1)]
    for step, ours in enumerate(budgets, start=1):
        if step not in (start * total, end * total):  # the ends belong to other sides
            assert abs(ours - theirs.budget_schedule(step)[0]) <= 1
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == 28


def test_what_stays_on_is_what_mattered_most():
    """At every step the budget is spent exactly, on the highest scores of all weights together;
    behind `end` the choice is fixed; the count does not change."""
    method = AdaLoRA(init_r=4, target_r=2, start=0.2, end=0.6)
    tuned = attach(tiny("gpt2"), method)
    deltas, seen = list(tuned.deltas.values()), []

    def look(record):
        scores = torch.cat([delta.importance for delta in deltas])
        on = torch.cat([delta.L != 0 for delta in deltas])
        budget = method.budget(record["step"] / 20, len(deltas))
        assert on.sum() == sum(delta.rank for delta in deltas) == budget
        assert scores[on].min() >= scores[~on].max() if budget < len(on) else on.all()
        seen.append(on)

    count = tuned.count()
    train(tuned, letters(), steps=20, lr=0.1, progress=False, evaluate=False, on_step=look)
    assert seen[-1].sum() == 2 * len(deltas)
    assert all(torch.equal(on, seen[-1]) for on in seen[11:])
    assert not torch.equal(seen[0], seen[-1])
    assert tuned.count() == count
    assert len({delta.rank for delta in deltas}) > 1  # and not the same share for every weight


def on(tuned):
    return torch.cat([delta.L.detach() != 0 for delta in tuned.deltas.values()])


def learned(tuned, steps, **options):
    """Which triplets are on after each step of a run."""
    options = dict(lr=0.1, progress=False, evaluate=False) | options
    seen = []
    train(tuned, letters(), steps=steps, on_step=lambda _: seen.append(on(tuned)), **options)
    return seen


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("method", [AdaLoRA(4, 2), AdaLoRA(3, 1, end=0.5, target_modules=["o"])])
def test_a_second_run_opens_no_triplet_again(method, family, tmp_path):
    """Nor does one of a copy, or of the saved adapter; one that was stopped goes on from there."""
    tuned = attach(tiny(family), method)
    chosen = learned(tuned, 10)[-1]
    assert chosen.sum() == method.target_r * len(tuned.deltas)
    for other in (
        attach(tiny(family), tuned.save(tmp_path)),
        copy.deepcopy(tuned),
        pickle.loads(pickle.dumps(tuned)),
        tuned,
    ):
        for _ in range(2):
            assert all(torch.equal(each, chosen) for each in learned(other, 6))
    stopped = attach(tiny(family), method)
    event = threading.Event()
    options = dict(stop=event, on_step=lambda r: r["step"] == 4 and event.set())
    train(stopped, letters(), steps=10, lr=0.1, progress=False, evaluate=False, **options)
    seen = [on(stopped), *learned(stopped, 10)]
    budgets = [int(each.sum()) for each in seen]
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == chosen.sum()
    assert not any((each & ~seen[0]).any() for each in seen)


def test_the_score_is_what_the_loss_loses_to_first_order():
    """|λ ∂loss/∂λ| against switching the triplet off, for a λ so small that first order is all."""
    tuned = stir(put("adalora", tiny("bert", FLOAT64)))
    ids, delta = token_ids(2, 7), next(iter(tuned.deltas.values()))
    with torch.no_grad():
        delta.L.mul_(1e-5)

    def loss():
        return call(tuned, ids).log_softmax(dim=-1)[..., 3].mean()

    whole = loss()
    (gradient,) = torch.autograd.grad(whole, delta.L)
    for i in range(4):
        off = copy.deepcopy(delta.L.data)
        with torch.no_grad():
            kept = delta.L[i].clone()
            delta.L[i] = 0
            lost = (whole - loss()).abs()
            delta.L[i] = kept
        assert torch.equal(delta.L.data, off)
        # The second order is λ² times a curvature of the size of one.
        assert abs(lost - (kept * gradient[i]).abs()) <= 100 * kept**2


def test_triplets_start_orthonormal():
    tuned = attach(tiny("llama", FLOAT64), AdaLoRA(init_r=4, target_r=2))
    for delta in tuned.deltas.values():
        for gram in (delta.P.T @ delta.P, delta.Q @ delta.Q.T):
            assert (gram - torch.eye(4)).abs().max() <= 1e-6  # drawn in float32


@pytest.mark.parametrize("title", ["rsLoRA", "DoRA", "PiSSA", "VeRA", "AdaLoRA"])
def test_a_relative_of_lora_learns_the_letters(title):
    """Eleven examples, seen again and again: the loss falls to less than half."""
    targets = {"target_modules": "all-linear"}
    method = {
        "rsLoRA": LoRA(use_rslora=True, **targets),
        "DoRA": DoRA(**targets),
        "PiSSA": PiSSA(**targets),
        "VeRA": VeRA(**targets),
        "AdaLoRA": AdaLoRA(**targets),
    }[title]
    lr = 0.1 if title == "VeRA" else 0.02
    quiet = {"batch_size": 11, "evaluate": False, "progress": False}
    run = train(attach(tiny("gpt2"), method), letters(), steps=40, lr=lr, **quiet)
    assert run.records[-1]["loss"] < run.records[0]["loss"] / 2


# Merged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora all", "lora fused", "dora", "pissa", "vera", "adalora"])
def test_a_merged_model_runs_as_a_plain_one(case):
    """The same modules with the same hooks: none. `time_merge` shows the time as well."""
    base = tiny("gpt2")
    plain = hook_count(base.model)
    tuned = stir(put(case, base))
    attached = hook_count(base.model)
    for _ in range(2):
        tuned.merge()
        assert hook_count(base.model) == plain
        tuned.unmerge()
        assert hook_count(base.model) == attached
