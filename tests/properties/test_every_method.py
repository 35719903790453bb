"""What every method proves, written once, over `models.CASES` on GPT-2 and on grouped-head Llama.

Tolerances. Two float32 evaluations of one function each lie within E of its exact value, so within
2 E of each other. E is measured: the largest difference between the float32 model and its float64
twin over all logits of the same batch. It is a sample of the rounding error, not its bound, so it
is doubled: `close` allows 4 E. In float64 the same errors are 2⁻²⁹ times as large (u = 2⁻⁵³ for
2⁻²⁴), and so is the tolerance.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    CASES,
    FAMILIES,
    U32,
    U64,
    adapted,
    hook_count,
    padded,
    stir,
    tiny,
    token_ids,
)
from torch.nn.functional import cross_entropy

from peftlab import LoRA, PromptTuning, attach
from peftlab.training import target_loss

FLOAT64 = torch.float64


def rounding(case, family, ids, mask=None) -> float:
    """E: the largest float32 rounding error of the adapted model's logits on this batch."""
    with torch.no_grad():
        single, double = (
            adapted(case, family, dtype)(ids, mask) for dtype in (torch.float32, FLOAT64)
        )
    shown = slice(None) if mask is None else mask.bool()
    return (single.double() - double)[shown].abs().max().item()


def frozen(tuned, ids, mask=None):
    with torch.no_grad():
        return tuned(ids, mask)


def test_the_output_at_init(case, family):
    base = tiny(family)
    ids = token_ids(3, 9)
    before = base(ids)
    after = frozen(attach(base, CASES[case].methods), ids)
    assert torch.equal(before, after) == CASES[case].starts_equal


def test_only_what_the_method_named_gets_gradient(case, family):
    base = tiny(family)
    tuned = stir(attach(base, CASES[case].methods))
    ids = token_ids(3, 9)
    target_loss(tuned(ids), ids).backward()
    ours = {id(parameter) for parameter in tuned.trainable.values()}
    for name, parameter in base.model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in ours), name
    assert all(parameter.grad.abs().sum() > 0 for parameter in tuned.trainable.values())


def test_the_closed_form_is_what_was_counted(case, family):
    tuned = attach(tiny(family), CASES[case].methods)
    with_gradient = {
        id(p): p.numel()
        for p in (*tuned.model.parameters(), *tuned.trainable.values())
        if p.requires_grad
    }
    count = tuned.count()
    assert count.parameters == count.measured == sum(with_gradient.values())
    assert count.stored == sum(tensor.numel() for tensor in tuned.state().values())


def test_save_and_load_give_the_same_output(case, family, tmp_path):
    tuned = adapted(case, family)
    ids = token_ids(3, 9)
    wanted = frozen(tuned, ids)
    folder = tuned.save(tmp_path / "adapter")
    base = tuned.detach()
    loaded = attach(base, folder)
    assert torch.equal(frozen(loaded, ids), wanted)
    assert loaded.methods == tuned.methods
    loaded.detach()
    elsewhere = attach(tiny(family), str(folder))
    assert torch.equal(frozen(elsewhere, ids), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=["float32", "float64"])
def test_merged_and_unmerged(case, family, dtype):
    tuned = adapted(case, family, dtype)
    ids = token_ids(3, 9)
    untouched = tuned.base.fingerprint()
    wanted = frozen(tuned, ids)
    if not CASES[case].merges:
        with pytest.raises(ValueError, match="cannot be merged"):
            tuned.merge()
        assert not tuned.merged
        assert tuned.base.fingerprint() == untouched
        return
    tuned.merge()
    assert tuned.merged
    assert tuned.base.fingerprint() != untouched
    # Beside the product's own rounding, that of BA and that of W + ΔW: twice the usual 4 E.
    close = 8 * rounding(case, family, ids) * (1 if dtype == torch.float32 else U64 / U32)
    assert (frozen(tuned, ids) - wanted).abs().max() <= close
    tuned.merge()  # a second time: nothing is added again
    tuned.unmerge()
    assert tuned.base.fingerprint() == untouched
    assert torch.equal(frozen(tuned, ids), wanted)
    tuned.merge()
    tuned.detach()
    assert tuned.base.fingerprint() == untouched


def test_detach_gives_the_base_back_bit_for_bit(case, family):
    base = tiny(family)
    ids = token_ids(3, 9)
    before = (base.fingerprint(), base(ids))
    addresses = {name: p.data_ptr() for name, p in base.model.named_parameters()}
    hooks = hook_count(base.model)
    for _ in range(2):  # and again on the base that was given back
        tuned = stir(attach(base, CASES[case].methods))
        assert not torch.equal(frozen(tuned, ids), before[1])
        assert tuned.detach() is base
        tuned.detach()  # safe twice
        assert base.fingerprint() == before[0]
        assert torch.equal(base(ids), before[1])
        assert {name: p.data_ptr() for name, p in base.model.named_parameters()} == addresses
        assert hook_count(base.model) == hooks
        assert not any(p.requires_grad for p in base.model.parameters())
        assert base.adapted_by is None


def test_detaching_in_the_middle_of_training_switches_dropout_off(case, family):
    base = tiny(family)
    ids = token_ids(2, 9)
    before = base(ids)
    tuned = attach(base, CASES[case].methods)
    tuned.train()
    tuned.detach()
    assert torch.equal(base(ids), before)


def test_train_and_eval_change_no_weight(case, family):
    tuned = adapted(case, family)
    ids = token_ids(2, 9)
    state, fingerprint, wanted = tuned.state(), tuned.base.fingerprint(), frozen(tuned, ids)
    for switch in (tuned.train, tuned.model.train, tuned.model.eval, lambda: tuned.train(False)):
        switch()
        frozen(tuned, ids)
        assert tuned.base.fingerprint() == fingerprint
        assert all(torch.equal(tensor, state[name]) for name, tensor in tuned.state().items())
    assert torch.equal(frozen(tuned, ids), wanted)


def test_evaluation_is_without_dropout_from_the_start(case, family, tmp_path):
    ids = token_ids(2, 9)
    tuned = adapted(case, family)
    assert torch.equal(frozen(tuned, ids), frozen(tuned, ids))
    folder = tuned.save(tmp_path)
    tuned.detach()
    loaded = attach(tuned.base, folder)
    assert torch.equal(frozen(loaded, ids), frozen(loaded, ids))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=["float32", "float64"])
def test_padding_and_the_rest_of_the_batch_change_nothing(case, family, side, dtype):
    rows = [token_ids(1, length, seed=length)[0] for length in (11, 4, 7, 1)]
    ids, mask = padded(rows, side)
    tuned = adapted(case, family, dtype)
    together = frozen(tuned, ids, mask)
    close = 4 * rounding(case, family, ids, mask) * (1 if dtype == torch.float32 else U64 / U32)
    for row, tokens in enumerate(rows):
        alone = frozen(tuned, tokens[None])[0]
        assert (together[row][mask[row].bool()] - alone).abs().max() <= close


def test_padding_changes_no_gradient(case, family):
    """The loss of a padded batch is the mean over the tokens of its rows, in gradients as well."""
    rows = [token_ids(1, length, seed=length)[0] for length in (9, 5)]

    def gradients(dtype, *batches):
        tuned = adapted(case, family, dtype)
        total = 0
        for ids, mask in batches:
            labels = ids.masked_fill(mask == 0, -100)
            labels[torch.arange(len(ids)), mask.argmax(dim=1)] = -100  # nothing predicts the first
            logits = tuned(ids, mask)[:, :-1].flatten(0, 1)
            total += cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        total.backward()
        return [p.grad for p in tuned.trainable.values()]

    alone = [(row[None], torch.ones(1, len(row), dtype=torch.long)) for row in rows]
    wanted, single = gradients(FLOAT64, *alone), gradients(torch.float32, *alone)
    for side in ("left", "right"):
        ours = gradients(FLOAT64, padded(rows, side))
        for together, apart, rough in zip(ours, wanted, single, strict=True):
            close = 4 * (rough - apart).abs().max() * U64 / U32
            assert (together - apart).abs().max() <= close


def test_cached_generation_is_full_recomputation(case, family):
    """Greedy, token by token, on a left-padded batch; in float64, so that no near tie decides."""
    rows = [token_ids(1, length, seed=length)[0] for length in (9, 3, 6)]
    ids, mask = padded(rows, "left")
    tuned = adapted(case, family, FLOAT64)
    new = 8
    with torch.no_grad():
        out = tuned.model.generate(
            ids,
            attention_mask=mask,
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        for row, tokens in enumerate(rows):
            for _ in range(new):
                best = tuned(tokens[None])[0, -1].argmax()
                tokens = torch.cat([tokens, best[None]])
            assert out[row, ids.shape[1] :].tolist() == tokens[-new:].tolist()


def test_cached_logits_are_the_full_ones(case, family):
    """One token at a time through the cache, without a mask, gives the logits of the whole."""
    ids = token_ids(2, 6)
    tuned = adapted(case, family, FLOAT64)
    close = 4 * rounding(case, family, ids) * U64 / U32
    with torch.no_grad():
        whole, cache, steps = tuned(ids), None, []
        for position in range(ids.shape[1]):
            out = tuned.model(
                input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() <= close


def test_generate_returns_the_new_text_of_each_prompt(case, family):
    tuned = adapted(case, family, FLOAT64)
    prompts = ["ab", "the longest one", "q"]
    together = tuned.generate(prompts, max_new_tokens=6)
    assert together == [tuned.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert not tuned.model.training


def test_merged_generation_is_the_same(case, family):
    if CASES[case].merges:
        tuned = adapted(case, family, FLOAT64)
        prompts = ["ab", "the longest one"]
        before = tuned.generate(prompts, max_new_tokens=6)
        tuned.merge()
        assert tuned.generate(prompts, max_new_tokens=6) == before


def test_the_same_seed_draws_the_same_start(case, family):
    first, second, other = (
        attach(tiny(family), CASES[case].methods, seed=seed).state() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    text = any(getattr(method, "init", None) == "text" for method in CASES[case].methods)
    if case != "full" and not text:  # those two start at numbers that are given, not drawn
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_an_adapted_base_takes_no_second_adapter(case, family):
    tuned = adapted(case, family)
    ids = token_ids(2, 5)
    before = (hook_count(tuned.model), frozen(tuned, ids))
    with pytest.raises(RuntimeError, match="already carries.*detach"):
        attach(tuned.base, LoRA())
    assert tuned.base.adapted_by is tuned
    assert hook_count(tuned.model) == before[0]
    assert torch.equal(frozen(tuned, ids), before[1])


def test_a_failing_second_method_leaves_nothing_behind(case, family):
    """The first methods are good, the last cannot be attached: the base is as it was."""
    base = tiny(family)
    ids = token_ids(2, 5)
    before = (base.fingerprint(), hook_count(base.model), base(ids))
    bad = [*CASES[case].methods, LoRA(r=25, target_modules=["o"])]  # o is 24 wide at most
    with pytest.raises(ValueError):
        attach(base, bad)
    assert base.adapted_by is None
    assert (base.fingerprint(), hook_count(base.model)) == before[:2]
    assert torch.equal(base(ids), before[2])
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    r=st.integers(1, 20),
    alpha=st.floats(0.5, 64),
    targets=st.lists(st.sampled_from(["q", "k", "v", "o", "up", "down"]), min_size=1),
    batch=st.integers(1, 4),
    length=st.integers(1, 12),
)
def test_any_lora(family, r, alpha, targets, batch, length):
    """Count, merge against the formula, detach: for any rank, alpha, targets and batch."""
    base = tiny(family, FLOAT64)
    before = base.fingerprint()
    ids = token_ids(batch, length)
    tuned = attach(base, LoRA(r=r, alpha=alpha, target_modules=targets))
    assert torch.equal(tuned(ids), frozen(tuned.base, ids))
    stir(tuned)
    assert tuned.count().measured == sum(
        copies * r * (d_in + d_out)
        for target in set(targets)
        for copies, d_in, d_out in base.anatomy.shape.matrices(target)
    )
    for name, delta in tuned.deltas.items():
        written = base.anatomy.linears[name].weight + alpha / r * delta.B @ delta.A
        tuned.merge()
        # The same numbers, multiplied in another order: (α/r) B rounded first, or B A.
        close = 4 * r * U64 * (1 + (alpha / r * delta.B.abs() @ delta.A.abs()).max())
        assert (base.anatomy.linears[name].weight - written).abs().max() <= close
        tuned.unmerge()
    tuned.detach()
    assert base.fingerprint() == before


@settings(max_examples=10, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    count=st.integers(1, 47),
    init=st.sampled_from(["vocabulary", "random", "text"]),
    batch=st.integers(1, 3),
    data=st.data(),
)
def test_any_prompt(family, count, init, batch, data):
    """Every length up to the last position: shapes, count, the start, detach."""
    base = tiny(family)
    text = "Answer:" if init == "text" else None
    tuned = attach(base, PromptTuning(count, init, text), seed=count)
    assert tuned.prompt.shape == (count, 24)
    assert tuned.count().measured == count * 24
    assert tuned.context == 48 - count
    length = data.draw(st.integers(1, tuned.context))
    assert frozen(tuned, token_ids(batch, length)).shape == (
        batch,
        length,
        base.anatomy.shape.vocab,
    )
    if init == "random":
        assert tuned.prompt.abs().max() <= 0.5
    else:  # every row is a row of the embedding
        table = base.anatomy.embedding.weight
        assert (tuned.prompt[:, None] == table).all(dim=2).any(dim=1).all()
    if init == "text":
        letters = base.tokenizer("Answer:" * count)["input_ids"][:count]
        assert torch.equal(tuned.prompt, base.anatomy.embedding.weight[letters])
    tuned.detach()
    assert torch.equal(base(token_ids(1, 4)), tiny(family)(token_ids(1, 4)))
