"""What every method proves, written once, over `models.CASES` on GPT-2, Llama, BERT and T5.

Tolerances. Two float32 evaluations of one function each lie within E of its exact value, so within
2 E of each other. E is measured: the largest difference between the float32 model and its float64
twin over all logits of the same batch. It is a sample of the rounding error, not its bound, so it
is doubled: `close` allows 4 E. In float64 the same errors are 2⁻²⁹ times as large (u = 2⁻⁵³ for
2⁻²⁴), and so is the tolerance.

`ON_EVERY` runs a property on every case: on every family, and on one where a case is an option of a
method that has a plain case. A few properties take long and do not depend on where a method starts;
`ON_PLAIN` runs them on the plain cases, which stand for their kind, on every family.
"""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    ANCHOR,
    BY_TURNS,
    CASES,
    CONTEXT,
    DECODERS,
    FAMILIES,
    ON_EVERY,
    ON_GENERATING,
    ON_PLAIN,
    PAIRS,
    PLAIN,
    U32,
    U64,
    adapted,
    call,
    decoder_ids,
    hook_count,
    loss_of,
    padded,
    put,
    rows_of,
    stir,
    surroundings,
    tiny,
    token_ids,
)
from safetensors.torch import load_file

from peftlab import LoRA, PrefixTuning, PromptTuning, PTuning, attach, attention
from peftlab.bases.caches import cache_name
from peftlab.methods.heads import Spans

FLOAT32, FLOAT64 = torch.float32, torch.float64
DTYPES = (FLOAT32, FLOAT64)


def frozen(model, ids, mask=None):
    with torch.no_grad():
        return call(model, ids, mask)


def rounding_of(single, double, ids) -> float:
    """E: the largest difference between a float32 model's logits on this batch and its twin's."""
    mask = torch.ones_like(ids)
    rows = zip(
        rows_of(single, frozen(single, ids, mask), mask),
        rows_of(double, frozen(double, ids, mask), mask),
        strict=True,
    )
    return max((a.double() - b).abs().max().item() for a, b in rows)


def close_in(dtype, E) -> float:
    """4 E, or what that is in float64."""
    return 4 * E * (1 if dtype == FLOAT32 else U64 / U32)


def lengths(*wanted) -> list[torch.Tensor]:
    return [token_ids(1, length, seed=length)[0] for length in wanted]


# Where it starts, and what trains -------------------------------------------------------------


@ON_EVERY
def test_the_output_at_init(case, family):
    """Exactly the base's, or another: nothing in between. Under a head, its hidden states are."""
    base = tiny(family)
    ids = token_ids(3, 9)
    before = frozen(base, ids)
    if CASES[case].head is not None:
        mask = torch.ones_like(ids)
        hidden = base.anatomy.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    tuned = put(case, base)
    if CASES[case].head is not None:
        before = tuned.head.logits(tuned.linear, hidden, mask)
    assert torch.equal(before, frozen(tuned, ids)) == CASES[case].starts_equal


@pytest.mark.parametrize("dtype", [FLOAT64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_another_precision(family, dtype):
    """What trains is at least in 32 bits, unless it is the base's own.

    In bfloat16 that is every case; of float64, in which most proofs below run, each case on one
    family, by turns.
    """
    names = [name for where, name in PAIRS if where == family]
    if dtype == FLOAT64:
        names = [name for name in names if BY_TURNS[name] == family]
    for name in names:
        tuned = put(name, tiny(family, dtype))
        loss_of(tuned, token_ids(2, 7)).backward()
        own = {id(parameter) for parameter in tuned.base.model.parameters()}
        added = [p for p in tuned.trainable.values() if id(p) not in own]
        assert {p.dtype for p in added} <= {torch.promote_types(dtype, FLOAT32)}, name
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in added), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_zeros_is_not_nothing(family):
    """A key of zeros scores 0 and takes its share of the softmax: P of them dilute the values.

    The first layer's attention is what it was, times 1 − λ, λ = P / (P + Σ exp(scores)).
    """
    base = tiny(family, FLOAT64)
    ids = token_ids(2, 7)
    first = base.anatomy.attentions[:1]
    with attention.recorded(base.model, first) as plain:
        frozen(base, ids)
    tuned = attach(base, PrefixTuning(3, init="zero"))
    with attention.recorded(base.model, first) as diluted:
        frozen(tuned, ids)
    old, new = plain[first[0].name], diluted[first[0].name]
    keys = old.key.repeat_interleave(old.query.shape[1] // old.key.shape[1], dim=1)
    scores = old.query @ keys.transpose(2, 3) * old.scaling
    total = (scores if old.mask is None else scores + old.mask).exp().sum(dim=-1, keepdim=True)
    kept = total / (total + 3)
    assert kept.min() < 0.95  # not nothing
    # A few dozen roundings of numbers of this size.
    assert (new.output - kept * old.output).abs().max() <= 100 * U64 * old.output.abs().max()


@ON_EVERY
def test_only_what_the_method_named_gets_gradient(case, family):
    base = tiny(family)
    tuned = stir(put(case, base))
    loss_of(tuned, token_ids(3, 9)).backward()
    ours = {id(parameter) for parameter in tuned.trainable.values()}
    for name, parameter in base.model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in ours), name
    for name, parameter in tuned.trainable.items():
        if (name, CASES[case].head) != ("head.bias", Spans()):
            assert parameter.grad.abs().sum() > 0, name  # that one adds the same to every token


@ON_EVERY
def test_the_closed_form_is_what_was_counted_and_stored(case, family, tmp_path):
    tuned = put(case, tiny(family))
    with_gradient = {
        id(p): p.numel()
        for p in (*tuned.model.parameters(), *tuned.trainable.values())
        if p.requires_grad
    }
    count = tuned.count()
    assert count.parameters == count.measured == sum(with_gradient.values()) - count.head
    assert count.head == sum(p.numel() for n, p in tuned.trainable.items() if n[:5] == "head.")
    state = tuned.state()
    assert count.stored + count.head == sum(tensor.numel() for tensor in state.values())
    folder = tuned.save(tmp_path)
    written = load_file(folder / "adapter_model.safetensors")
    size = sum(tensor.nbytes for tensor in written.values())
    if not (folder / "peftlab.json").exists():
        assert written.keys() == state.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
        assert count.file_bytes == size
        return
    # In PEFT's layout of GPT-2's fused matrix there are zeros beside them, else they are all.
    assert count.file_bytes == size if family != "gpt2" else count.file_bytes <= size
    numbers = Counter(x for t in written.values() for x in t.abs().flatten().tolist())
    assert not Counter(x for t in state.values() for x in t.abs().flatten().tolist()) - numbers


@ON_EVERY
def test_save_and_load_give_the_same_output(case, family, tmp_path):
    """A network that makes a prompt is thrown away, and nothing changes.

    Each of the three evaluations would draw its own dropout: none of them does.
    """
    tuned = adapted(case, family)
    ids = token_ids(3, 9)
    wanted = frozen(tuned, ids)
    folder = tuned.save(tmp_path / "adapter")
    base = tuned.detach()
    loaded = attach(base, folder)
    assert torch.equal(frozen(loaded, ids), wanted)
    assert loaded.methods == tuned.folded
    assert loaded.head == tuned.head
    frozen_numbers = sum(tensor.numel() for tensor in loaded.frozen.values())
    assert loaded.count().measured + frozen_numbers == loaded.count().stored == tuned.count().stored
    networks = tuple(f"{name}.encoder." for name in tuned.sources)
    assert not any(name.startswith(networks) for name in loaded.trainable)
    loaded.detach()
    elsewhere = attach(tiny(family), str(folder))
    assert torch.equal(frozen(elsewhere, ids), wanted)


@ON_EVERY
def test_the_same_seed_draws_the_same_start(case, family):
    first, second = (put(case, tiny(family), seed=3).state() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    if CASES[case].drawn:
        other = put(case, tiny(family), seed=4).state()
        assert any(not torch.equal(first[name], other[name]) for name in first)


# Merging and detaching ------------------------------------------------------------------------


@ON_EVERY
def test_merged_and_unmerged(case, family):
    plain, single = tiny(family).fingerprint(), adapted(case, family)
    untouched = single.base.fingerprint()
    assert (untouched == plain) == CASES[case].restored
    if not CASES[case].merges:
        if CASES[case].methods:  # a head alone has nothing that could be merged
            with pytest.raises(ValueError, match="cannot be merged"):
                single.merge()
            assert not single.merged
            assert single.base.fingerprint() == untouched
        return
    ids, double = token_ids(3, 9), adapted(case, family, FLOAT64)
    E = rounding_of(single, double, ids)
    for tuned, before in ((single, plain), (double, tiny(family, FLOAT64).fingerprint())):
        untouched = tuned.base.fingerprint()
        assert (untouched == before) == CASES[case].restored
        wanted = frozen(tuned, ids)
        tuned.merge()
        assert tuned.merged
        assert tuned.base.fingerprint() != untouched
        # Beside the product's own rounding, that of BA and that of W + ΔW: twice the usual 4 E.
        close = 2 * close_in(wanted.dtype, E)
        assert (frozen(tuned, ids) - wanted).abs().max() <= close
        tuned.merge()  # a second time: nothing is added again
        tuned.unmerge()
        assert tuned.base.fingerprint() == untouched
        assert torch.equal(frozen(tuned, ids), wanted)
        tuned.merge()
        tuned.detach()
        assert tuned.base.fingerprint() == before


@ON_EVERY
def test_detach_gives_the_base_back_bit_for_bit(case, family):
    base = tiny(family)
    ids = token_ids(3, 9)
    before, output = surroundings(base), frozen(base, ids)
    for _ in range(2):  # and again on the base that was given back
        tuned = stir(put(case, base))
        changed = frozen(tuned, ids)
        assert changed.shape != output.shape or not torch.equal(changed, output)
        assert tuned.detach() is base
        tuned.detach()  # safe twice
        assert surroundings(base) == before
        assert torch.equal(frozen(base, ids), output)


@ON_PLAIN
def test_detaching_in_the_middle_of_training_switches_dropout_off(case, family):
    base = tiny(family)
    ids = token_ids(2, 9)
    before = frozen(base, ids)
    tuned = put(case, base)
    tuned.train()
    tuned.detach()
    assert torch.equal(frozen(base, ids), before)


@ON_PLAIN
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


@ON_PLAIN
def test_an_adapted_base_takes_no_second_adapter(case, family):
    tuned = adapted(case, family)
    ids = token_ids(2, 5)
    before = (hook_count(tuned.model), frozen(tuned, ids))
    with pytest.raises(RuntimeError, match="already carries.*detach"):
        attach(tuned.base, LoRA())
    assert tuned.base.adapted_by is tuned
    assert hook_count(tuned.model) == before[0]
    assert torch.equal(frozen(tuned, ids), before[1])


# Errors and interrupts ------------------------------------------------------------------------

# Every method on every family with one of two errors: an error, or the interrupt that no `except
# Exception` catches. They take turns, so that each method meets both, and each family.
ERRORS = (RuntimeError, KeyboardInterrupt)
TURNS = {name: turn for turn, name in enumerate((*CASES, *FAMILIES))}
ON_PLAIN_BY_TURNS = pytest.mark.parametrize(
    "family, case, error",
    [
        pytest.param(f, case, ERRORS[(TURNS[f] + TURNS[case]) % 2], id=f"{f}-{case}")
        for f, case in PLAIN
    ],
)


@ON_PLAIN
def test_a_failing_second_method_leaves_nothing_behind(case, family):
    """The first methods are good, the last cannot be attached: the base is as it was."""
    base = tiny(family)
    ids = token_ids(2, 5)
    before, output = surroundings(base), frozen(base, ids)
    bad = [*CASES[case].methods, LoRA(r=25, target_modules=["o"])]  # o is 24 wide at most
    with pytest.raises(ValueError):
        attach(base, bad, head=CASES[case].head)
    assert surroundings(base) == before
    assert torch.equal(frozen(base, ids), output)


@ON_PLAIN_BY_TURNS
def test_an_interrupt_while_it_is_attached_leaves_nothing_behind(case, family, error):
    """Wherever attaching touches the model: in each place that it looks for the first time."""
    for place in ("embedding", "last block", "mode"):
        base = tiny(family)
        base.train(place == "mode")  # a base with dropout on is switched, to look at it
        before = surroundings(base)

        def raising(*_, **__):
            raise error("now")

        if place == "last block":
            hook = base.anatomy.layers[next(iter(base.anatomy.layers))][-1]
            handle = hook.register_forward_pre_hook(raising)
        elif place == "embedding":
            handle = base.anatomy.embedding.register_forward_hook(raising)
        else:
            handle, base.model.train = None, raising
        try:
            put(case, base)
        except error:
            pass
        if handle is not None:
            handle.remove()
        else:
            del base.model.train
            assert base.adapted_by is None
        base.detach()  # where that place was not touched
        assert surroundings(base) == before


@ON_PLAIN_BY_TURNS
def test_an_interrupt_in_forward_or_backward_leaves_nothing_behind(case, family, error):
    """The adapted model goes on as before it, and detaching gives the base back."""
    base = tiny(family)
    before = surroundings(base)
    tuned = stir(put(case, base))
    ids = token_ids(2, 6)
    wanted = frozen(tuned, ids)

    def raising(*_, **__):
        raise error("now")

    blocks = [block for blocks in base.anatomy.layers.values() for block in (blocks[0], blocks[-1])]
    for block in blocks:
        handle = block.register_forward_hook(raising)
        with pytest.raises(error, match="now"):
            frozen(tuned, ids)
        with pytest.raises(error, match="now"):
            loss_of(tuned, ids)
        handle.remove()
        assert torch.equal(frozen(tuned, ids), wanted)
    for parameter in list(tuned.trainable.values())[:2]:
        handle = parameter.register_hook(raising)
        with pytest.raises(error, match="now"):
            loss_of(tuned, ids).backward()
        handle.remove()
        assert torch.equal(frozen(tuned, ids), wanted)
    tuned.detach()
    assert surroundings(base) == before


# Padding and the batch ------------------------------------------------------------------------


@ON_PLAIN
def test_padding_and_the_rest_of_the_batch_change_nothing(case, family):
    """E is taken over every evaluation that is compared here."""
    rows = lengths(11, 4, 7, 1)

    def evaluations(dtype):
        tuned = adapted(case, family, dtype)
        alone = [frozen(tuned, tokens[None])[0] for tokens in rows]
        batches = (padded(rows, side) for side in ("left", "right"))
        return [alone] + [rows_of(tuned, frozen(tuned, *batch), batch[1]) for batch in batches]

    results = {dtype: evaluations(dtype) for dtype in DTYPES}
    both = zip(*(sum(results[dtype], []) for dtype in DTYPES), strict=True)
    E = max((single.double() - double).abs().max().item() for single, double in both)
    for dtype, (alone, *together) in results.items():
        for batch in together:
            for row, wanted in zip(batch, alone, strict=True):
                assert (row - wanted).abs().max() <= close_in(dtype, E)


@ON_PLAIN
def test_padding_changes_no_gradient(case, family):
    """The loss of a padded batch is the sum over its rows, in gradients as well.

    E is taken over all trained tensors: a vector of a few factors is too small a sample.
    """
    rows = lengths(9, 5)
    alone = [(row[None], torch.ones(1, len(row), dtype=torch.long)) for row in rows]

    def gradients(tuned, *batches):
        loss = sum(loss_of(tuned, *batch, reduction="sum") for batch in batches)
        return list(torch.autograd.grad(loss, list(tuned.trainable.values())))

    ways = [alone, [padded(rows, "left")], [padded(rows, "right")]]
    single, double = (
        [gradients(tuned, *way) for way in ways]
        for tuned in (adapted(case, family, dtype) for dtype in DTYPES)
    )
    both = zip(sum(single, []), sum(double, []), strict=True)
    E = max((rough - exact).abs().max().item() for rough, exact in both)
    for apart, *together in zip(*double, strict=True):
        for other in together:
            assert (other - apart).abs().max() <= close_in(FLOAT64, E)


# Generation -----------------------------------------------------------------------------------

NEW = 6
GREEDY = dict(
    min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
)
PROMPTS = [f"ab{ANCHOR}", f"the {ANCHOR} longest one", f"{ANCHOR}q"]


@ON_GENERATING
def test_cached_generation_is_full_recomputation(case, family):
    """Greedy, token by token, on a left-padded batch; in float64, so that no near tie decides."""
    rows = lengths(9, 3, 6)
    ids, mask = padded(rows, "left")
    tuned = adapted(case, family, FLOAT64)
    with torch.no_grad():
        out = tuned.model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY
        )
        cached = torch.stack(out.logits, dim=1)  # batch new vocab
        for row, tokens in enumerate(rows):
            said = torch.zeros(1, dtype=torch.long)  # T5's decoder starts with its padding
            for step in range(NEW):
                if tuned.kind == "decoder":
                    last = tuned(torch.cat([tokens, said[1:]])[None])[0, -1]
                else:
                    last = tuned(tokens[None], None, said[None])[0, -1]
                # `generate` gives logits in float32: one rounding, and that of the float64 is less.
                assert (cached[row, step] - last).abs().max() <= 2 * U32 * last.abs().max()
                said = torch.cat([said, last.argmax()[None]])
            assert out.sequences[row, -NEW:].tolist() == said[1:].tolist()


@pytest.mark.parametrize("family, case", [p for p in PLAIN if p[0] in DECODERS])
def test_cached_logits_are_the_full_ones(case, family):
    """One token at a time through the cache, without a mask, gives the logits of the whole.

    Virtual tokens inside the text need the token that they stand at in the first piece.
    """
    ids = token_ids(2, 6)
    tuned = adapted(case, family, FLOAT64)
    close = close_in(FLOAT64, rounding_of(adapted(case, family), tuned, ids))
    first = 3 if CASES[case].anchored else 1
    with torch.no_grad():
        whole, cache, steps, name = tuned(ids), None, [], cache_name(tuned.model)
        for piece in (ids[:, :first], *ids[:, first:].split(1, dim=1)):
            out = tuned.model(input_ids=piece, **{name: cache}, use_cache=True)
            cache = out[name]
            steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() <= close


@ON_GENERATING
def test_generate_returns_the_new_text_of_each_prompt(case, family):
    """Together, alone, and merged."""
    tuned = adapted(case, family, FLOAT64)
    together = tuned.generate(PROMPTS, max_new_tokens=6)
    assert together == [tuned.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert not tuned.model.training
    if CASES[case].merges:
        tuned.merge()
        assert tuned.generate(PROMPTS, max_new_tokens=6) == together


@ON_GENERATING
def test_beam_search_is_the_same_without_a_cache(case, family):
    ids, mask = padded(lengths(7, 3), "left")
    tuned = adapted(case, family, FLOAT64)
    beams = {**GREEDY, "num_beams": 3}
    with torch.no_grad():
        cached, whole = (
            tuned.model.generate(ids, attention_mask=mask, use_cache=use_cache, **beams)
            for use_cache in (True, False)
        )
    assert torch.equal(cached, whole)


# Any setting ----------------------------------------------------------------------------------


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
    plain = frozen(base, ids)
    tuned = attach(base, LoRA(r=r, alpha=alpha, target_modules=targets))
    assert torch.equal(frozen(tuned, ids), plain)
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


@pytest.mark.parametrize("init", ["vocabulary", "random", "text", "normal", "zero"])
@settings(max_examples=4, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    count=st.integers(1, 47),
    batch=st.integers(1, 3),
    data=st.data(),
)
def test_any_prompt(init, family, count, batch, data):
    """Every length up to the last position: shapes, count, the start, detach."""
    base = tiny(family)
    text = "Answer:" if init == "text" else None
    tuned = attach(base, PromptTuning(count, init, text), seed=count)
    assert tuned.prompt.shape == (count, 24)
    assert tuned.count().measured == count * 24
    assert tuned.context == CONTEXT - count
    length = data.draw(st.integers(1, tuned.context))
    given_tokens = 5 if family == "t5" else length
    shape = (batch, given_tokens, base.anatomy.shape.vocab)
    assert frozen(tuned, token_ids(batch, length)).shape == shape
    table = base.anatomy.embedding.weight
    if init == "random":
        assert tuned.prompt.abs().max() <= 0.5
    elif init == "zero":
        assert not tuned.prompt.any()
    elif init == "normal":  # none of 24 · P draws lies beyond 6 σ, but for one in 10⁶ such tests
        assert 0 < tuned.prompt.abs().max() <= 6 * table.std()
        assert not (tuned.prompt[:, None] == table).all(dim=2).any()
    else:  # every row is a row of the embedding
        assert (tuned.prompt[:, None] == table).all(dim=2).any(dim=1).all()
    if init == "text":
        words = base.tokenizer("Answer:" * count, add_special_tokens=False)["input_ids"][:count]
        assert torch.equal(tuned.prompt, table[words])
    tuned.detach()
    assert torch.equal(frozen(base, token_ids(1, 4)), frozen(tiny(family), token_ids(1, 4)))


@settings(max_examples=16, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    count=st.integers(1, 70),
    init=st.sampled_from(["vocabulary", "random", "text", "zero"]),
    shift=st.booleans(),
    batch=st.integers(1, 3),
    data=st.data(),
)
def test_any_prefix(family, count, init, shift, batch, data):
    """A prefix takes no position unless it is shifted, so it may be longer than the context."""
    base = tiny(family)
    before = surroundings(base)
    text = "Answer:" if init == "text" else None
    method = PrefixTuning(count, init=init, init_text=text, shift_positions=shift)
    if shift and count >= CONTEXT or init == "text" and count > 2 * CONTEXT:
        with pytest.raises(ValueError, match=f"num_virtual_tokens={count}"):
            attach(base, method)
        assert surroundings(base) == before
        return
    if init in ("text", "vocabulary") and count > CONTEXT:
        count = CONTEXT - 1  # these starts are keys and values of real tokens in their positions
        method = PrefixTuning(count, init=init, init_text=text, shift_positions=shift)
    tuned = attach(base, method, seed=count)
    shape = base.anatomy.shape
    P_k, P_v = tuned.prefix
    assert P_k.shape == P_v.shape == (shape.attentions, shape.kv_heads, count, shape.head_dim)
    assert tuned.count().measured == 2 * shape.attentions * count * shape.d_kv
    assert tuned.context == CONTEXT - (count if shift else 0)
    length = data.draw(st.integers(1, tuned.context))
    logits = frozen(tuned, token_ids(batch, length))
    assert logits.shape[:2] == (batch, 5 if family == "t5" else length)
    assert logits.isfinite().all()
    if init == "zero":
        assert not P_k.any() and not P_v.any()
    tuned.detach()
    assert surroundings(base) == before


@st.composite
def placements(draw, family):
    """Blocks in any order, at most one a place, and every place that this family allows."""
    places = ["front", f"before {ANCHOR}", f"after {ANCHOR}"]
    if family not in DECODERS:
        places.append("back")
    chosen = draw(st.lists(st.sampled_from(places), min_size=1, unique=True))
    return tuple((draw(st.integers(1, 3)), place) for place in chosen)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), family=st.sampled_from(FAMILIES), side=st.sampled_from(["left", "right"]))
def test_any_placement(data, family, side):
    """Virtual tokens that are embeddings of a word's letters act as that word, where it stands.

    The base itself reads the text with the words in their places, row by row; the tuned one reads
    the padded batch without them.
    """
    blocks = data.draw(placements(family))
    total = sum(count for count, _ in blocks)
    base = tiny(family, FLOAT64)
    rows = lengths(*data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)))
    method = PTuning(total, "embedding", placement=blocks)
    words = token_ids(1, total, seed=total)[0]
    words[words == words.new_tensor(31)] = 5
    texts, kept = [], []
    for row in rows:
        at = row.tolist().index(base.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"][0])
        start = {"front": 0, f"before {ANCHOR}": at, f"after {ANCHOR}": at + 1, "back": len(row)}
        pieces, done = [], 0
        for count, place in blocks:
            pieces.append((start[place], words[done : done + count]))
            done += count
        text, real, here = [], [], 0
        for where, piece in sorted(pieces, key=lambda pair: pair[0]):  # stable, as in the list
            text += [*row[here:where].tolist()]
            real += [True] * (where - here)
            text += piece.tolist()
            real += [False] * len(piece)
            here = where
        text += row[here:].tolist()
        real += [True] * (len(row) - here)
        texts.append(torch.tensor(text))
        kept.append(torch.tensor(real))
    ids, mask = padded(rows, side)
    given_tokens = [decoder_ids(row[None]) for row in rows] if family == "t5" else [None] * 3
    with torch.no_grad():
        plain = [
            base(text[None], None, *([] if tokens is None else [tokens]))[0]
            for text, tokens in zip(texts, given_tokens, strict=False)
        ]
    tuned = attach(base, method)
    tuned.load_state({"p_tuning.prompt": base.anatomy.embedding.weight[words].detach().clone()})
    together = rows_of(tuned, frozen(tuned, ids, mask), mask)
    for ours, theirs, real in zip(together, plain, kept, strict=True):
        wanted = theirs if family == "t5" else theirs[real]
        # Some hundred roundings of numbers of this size, in two layers and the logits.
        assert (ours - wanted).abs().max() <= 1000 * U64 * (1 + wanted.abs().max())
