"""Soft prompts that are each other: what each lesson says about them, to the last digits.

Where two ways compute one function by other operations, `closeness.check` says how near they must
be. Where they are the same operations on the same numbers, they are equal bit for bit.
"""

import pytest
import torch
from models import FAMILIES, U64, call, loss_of, padded, token_ids

from peftlab import (
    DeepPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    attach,
    attention,
)

from .bases import BOTH, DECODERS, EVERY, adapted, base_of, fill
from .closeness import check
from .test_cache_route import OfDecoder

P = 4
CLOSE = 1e-5  # in float32, of the largest logit
FLOAT64 = torch.float64
every = pytest.mark.parametrize("family", EVERY)
decoders = pytest.mark.parametrize("family", DECODERS)


def rows(side="right"):
    return padded([token_ids(1, n, seed=n)[0] for n in (9, 4, 6)], side)


@torch.no_grad()
def logits(model, ids=None, mask=None):
    if ids is None:
        ids, mask = rows()
    return call(model, ids, mask)


def gradients(tuned):
    loss_of(tuned, *rows()).backward()
    return [parameter.grad for parameter in tuned.trainable.values()]


@torch.no_grad()
def run(model, ids, read=None, **given):
    """Everything that attention did in one forward: name -> Record."""
    with attention.recorded(model.model, model.anatomy.attentions) as records:
        if ids is None:
            model.model(**given)
        else:
            call(model, ids)
        return dict(records)


# 1 and 9: what made a soft prompt is thrown away


@every
@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(P, prefix_projection=True, encoder_hidden_size=5),
        PTuningV2(P, prefix_projection=True, encoder_hidden_size=5),
        PTuning(P, "lstm"),
        PTuning(P, "mlp"),
        PTuning(P, "attention"),
    ],
    ids=["prefix mlp", "v2 mlp", "p lstm", "p mlp", "p attention"],
)
def test_the_network_is_thrown_away_and_the_output_stays(family, method, tmp_path):
    """The flat method holds what the network made: the same numbers, the same bits."""
    tuned = adapted(family, method)
    wanted, state = logits(tuned), tuned.state()
    tuned.save(tmp_path)
    base = tuned.detach()
    flat = attach(base, method.folded())
    flat.load_state(state)
    assert flat.count().parameters == sum(t.numel() for t in state.values())
    assert torch.equal(logits(flat), wanted)
    flat.detach()
    assert torch.equal(logits(attach(base, tmp_path)), wanted)


# 2 and 8: two names for one method


@every
@pytest.mark.parametrize(
    "one, other",
    [
        (PTuningV2(P), PrefixTuning(P)),
        (PTuning(P, "embedding"), PromptTuning(P)),
        (PTuning(P, "embedding", placement=[(1, "front"), (3, "front")]), PromptTuning(P)),
    ],
    ids=["v2 is prefix tuning", "p-tuning is prompt tuning", "in two blocks"],
)
def test_two_names(family, one, other):
    """The same start from the same seed, the same output, the same gradients."""
    first, second = adapted(family, one), adapted(family, other)
    for a, b in zip(first.trainable.values(), second.trainable.values(), strict=True):
        assert torch.equal(a, b)
    assert first.count() == second.count()
    assert torch.equal(logits(first), logits(second))
    for a, b in zip(gradients(first), gradients(second), strict=True):
        assert torch.equal(a, b)


# 3: real tokens as a prefix


def with_text(family, dtype, shift):
    """Logits under a prefix made of a text, and with the text itself before each row."""
    base = base_of(family, dtype)
    text = base.tokenizer("Sort: ba", add_special_tokens=False, return_tensors="pt")["input_ids"]
    count, (ids, mask) = text.shape[1], rows()
    init = {"init": "text", "init_text": "Sort: ba", "shift_positions": shift}
    with torch.no_grad():
        if family == "t5":  # its decoder's keys know what the encoder read: the text
            answer = token_ids(1, 6)
            whole = base(text, decoder_input_ids=torch.cat([text, answer], dim=1))[:, count:]
            return attach(base, OfDecoder(count, **init))(text, decoder_input_ids=answer), whole
        before = text.expand(len(ids), -1)
        longer = torch.cat([before, ids], dim=1), torch.cat([torch.ones_like(before), mask], dim=1)
        whole = base(*longer)[:, count:][mask.bool()]
        return attach(base, PrefixTuning(count, **init))(ids, mask)[mask.bool()], whole


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
def test_keys_and_values_of_a_text_are_the_text(family):
    check(*(with_text(family, dtype, shift=True) for dtype in BOTH), within=CLOSE)


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
def test_without_shifted_positions_they_are_not(family, record_property):
    """The prefix then stands where the text stands: its own positions are used twice."""
    prefix, text = with_text(family, FLOAT64, shift=False)
    apart = ((prefix - text).abs().max() / text.abs().max()).item()
    record_property("relative difference of the logits", apart)
    assert apart > 0.01


# 4: a soft prompt as a prefix


def as_prefix(family, dtype):
    """Prompt tuning, and the prefix made of the prompt's own keys and values, which saw no text."""
    prompted = adapted(family, PromptTuning(P), dtype)
    base = base_of(family, dtype)
    given = {"inputs_embeds": prompted.prompt.detach()[None]}
    if base.kind == "encoder-decoder":
        given["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    alone = run(base, None, **given)
    prefixed = attach(base, PrefixTuning(P, shift_positions=True))
    names = [site.name for site in base.anatomy.attentions]
    sizes = prefixed.prefix[0][0]
    made = {
        key: torch.stack(
            [
                getattr(alone[n], part)[0] if "decoder" not in n else torch.zeros_like(sizes)
                for n in names
            ]
        )
        for key, part in (("P_k", "key"), ("P_v", "value"))
    }
    return prompted, fill(prefixed, **made)


@decoders
def test_a_prompt_is_its_own_prefix_on_a_decoder(family):
    """In every layer, attention's weights and outputs for the real tokens, and so the logits: the
    virtual tokens' keys and values cannot depend on the text behind them."""
    found = []
    for dtype in BOTH:
        prompted, prefixed = as_prefix(family, dtype)
        ids = token_ids(2, 7)
        one, other = run(prompted, ids), run(prefixed, ids)
        pairs = {}
        for name in one:
            pairs[f"{name} weights"] = one[name].weights[:, :, P:], other[name].weights
            pairs[f"{name} output"] = one[name].output[:, :, P:], other[name].output
        batch, mask = rows()
        real = mask.bool()
        pairs["logits"] = (
            logits(prompted, batch, mask)[real],
            logits(prefixed, batch, mask)[real],
        )
        found.append(pairs)
    for name in found[0]:
        check(found[0][name], found[1][name], name, within=CLOSE if name == "logits" else None)


def test_on_an_encoder_they_part_after_the_first_layer(record_property):
    """BERT: there the virtual tokens see the text, from the second layer's keys on."""
    prompted, prefixed = as_prefix("bert", FLOAT64)
    ids = token_ids(2, 7)
    one, other = run(prompted, ids), run(prefixed, ids)
    apart = [(one[n].output[:, :, P:] - other[n].output).abs().max().item() for n in one]
    record_property("difference of attention's output, layer by layer", apart)
    largest = one["layers.0"].value.abs().max()
    # As for the gate: some tens of terms, each rounded, and as many in the scores.
    assert apart[0] <= 1000 * U64 * largest
    assert apart[1] > 0.01


def test_on_t5s_encoder_the_bias_parts_them_at_once():
    """The first layer's keys and values are the same; its bias by distance never met a prefix."""
    prompted, prefixed = as_prefix("t5", FLOAT64)
    ids = token_ids(2, 7)
    one, other = (run(model, ids)["encoder.layers.0"] for model in (prompted, prefixed))
    for part in ("key", "value"):
        a, b = getattr(one, part), getattr(other, part)
        assert (a - b).abs().max() <= 1000 * U64 * a.abs().max()
    real, P_columns = one.mask[..., P:, :P], other.mask[..., :P]
    assert (P_columns == 0).all()
    assert real.abs().max() > 0.1
    assert (one.output[:, :, P:] - other.output).abs().max() > 0.01


def test_on_an_encoder_the_prefix_of_one_text_is_right_for_that_text_alone():
    """BERT once more, the keys and values taken while the virtual tokens saw the text."""
    prompted = adapted("bert", PromptTuning(P), FLOAT64)
    prefixed = adapted("bert", PrefixTuning(P, shift_positions=True), FLOAT64)
    this, that = token_ids(1, 7), token_ids(1, 7, seed=1)
    records = run(prompted, this).values()
    fill(
        prefixed,
        P_k=torch.stack([record.key[0, :, :P] for record in records]),
        P_v=torch.stack([record.value[0, :, :P] for record in records]),
    )
    wanted = logits(prompted, this, torch.ones_like(this))
    here = logits(prefixed, this, torch.ones_like(this))
    assert (here - wanted).abs().max() <= 1000 * U64 * wanted.abs().max()
    apart = logits(prefixed, that, torch.ones_like(that)) - logits(
        prompted, that, torch.ones_like(that)
    )
    assert apart.abs().max() > 0.01


# 5 and 6: what a prefix does inside one attention


def alone(record, part):
    """Attention over some of the columns, from the queries and keys that were recorded."""
    groups = record.query.shape[1] // record.key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (record.key, record.value))
    scores = record.query @ key.transpose(2, 3) * record.scaling
    if record.mask is not None:
        scores = scores + record.mask
    return scores[..., part].softmax(dim=-1) @ value[:, :, part]


def gate_bound(record):
    """How far rounding takes an output of softmax attention, twice over.

    A score is a sum of d products: its error is at most d u s, s the largest sum of |products|.
    A weight's relative error is at most twice that and n u for the sum of n exponentials; the
    output adds n more. Both sides of the identity are such numbers.
    """
    n, d = record.key.shape[2], record.query.shape[3]
    groups = record.query.shape[1] // record.key.shape[1]
    key = record.key.repeat_interleave(groups, dim=1).abs()
    s = (record.query.abs() @ key.transpose(2, 3)).max() * record.scaling
    if record.mask is not None:
        seen = record.mask > torch.finfo(record.mask.dtype).min / 2
        s = s + (record.mask.abs() * seen).max()
    return 2 * U64 * (2 * d * s + 2 * n + 8) * record.value.abs().max()


@every
@pytest.mark.parametrize("shift", [False, True])
def test_the_gate(family, shift):
    """output = (1 − λ) · attention without the prefix + λ · attention over the prefix alone, with
    λ the softmax's mass on the prefix, in every sublayer (He et al. 2022, arXiv:2110.04366)."""
    tuned = adapted(family, PrefixTuning(P, shift_positions=shift), FLOAT64)
    with attention.recorded(tuned.model, tuned.anatomy.attentions) as records:
        logits(tuned)
    assert len(records) == tuned.anatomy.shape.attentions
    for name, record in records.items():
        assert record.virtual == P
        mass = record.weights[..., :P].sum(dim=-1, keepdim=True)
        assert 0 < mass.min() < mass.max() < 1
        text, prefix = alone(record, slice(P, None)), alone(record, slice(P))
        mixed = (1 - mass) * text + mass * prefix
        seen = torch.ones_like(record.output[..., :1], dtype=torch.bool)
        if record.mask is not None and record.mask.shape[0] > 1:  # a padded query may see nothing
            seen = (record.mask[..., P:].amax(dim=-1, keepdim=True) > -1e30).expand_as(seen)
        assert ((mixed - record.output) * seen).abs().max() <= gate_bound(record), name


@every
def test_a_prefix_keeps_the_ratios_among_the_text_in_the_first_layer_alone(family):
    """Where a layer's input is the same, its weights on the text are all multiplied by 1 − λ.
    Every later attention reads what the first one changed."""
    ids, found = token_ids(2, 7), []
    for dtype in BOTH:
        plain = base_of(family, dtype)
        tuned = adapted(family, PrefixTuning(P), dtype)
        before, after = run(plain, ids), run(tuned, ids)
        ratios = {}
        for name, record in after.items():
            text = record.weights[..., P:]
            ratios[name] = before[name].weights, text / text.sum(dim=-1, keepdim=True)
        found.append(ratios)
    for name, (plain, prefixed) in found[1].items():
        if name.endswith("layers.0"):  # of T5's decoder too, which reads its own input first
            check(found[0][name], found[1][name], name)
        else:
            assert (plain - prefixed).abs().max() > 1e-3, name


# 7: deep prompts that are the prompt


def states_of_the_prompt(prompted, ids):
    """What the virtual tokens have become at the input of every layer, for one row."""
    made = []

    def keep(block, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        made.append(hidden[0, :P].detach().clone())

    anatomy = prompted.anatomy
    hooks = [
        block.register_forward_pre_hook(keep, with_kwargs=True)
        for block in anatomy.layers[next(iter(anatomy.stacks))]
    ]
    logits(prompted, ids, torch.ones_like(ids))
    for hook in hooks:
        hook.remove()
    return torch.stack([prompted.prompt.detach(), *made[1:]])  # before positions are added


def deep_and_shallow(family, dtype, ids, mask):
    """Logits of prompt tuning, and of deep prompts that are its states at the first row alone."""
    prompted = adapted(family, PromptTuning(P), dtype)
    deep = attach(base_of(family, dtype), DeepPromptTuning(P))
    first = ids[:1, : int(mask[0].sum())]
    fill(deep, prompt=states_of_the_prompt(prompted, first))
    one, other = logits(prompted, ids, mask), logits(deep, ids, mask)
    if prompted.kind == "encoder-decoder":
        return one, other
    return one[mask.bool()], other[mask.bool()]


@decoders
def test_deep_prompts_that_are_the_prompts_states_are_the_prompt(family):
    """On a decoder for every text, whichever one they were taken from."""
    check(*(deep_and_shallow(family, dtype, *rows()) for dtype in BOTH), within=CLOSE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in DECODERS])
def test_on_an_encoder_they_are_so_for_the_text_they_were_taken_from(family):
    ids = token_ids(2, 7)
    mask = torch.ones_like(ids)
    check(*(deep_and_shallow(family, dtype, ids[:1], mask[:1]) for dtype in BOTH), within=CLOSE)
    one, other = deep_and_shallow(family, FLOAT64, ids, mask)
    assert (one - other).abs().max() > 0.01
