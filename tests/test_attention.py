"""The one attention function: it is each family's own, and what it records is what happened.

Tolerances: E is the largest difference between the family's own fused attention in float32 and in
float64, a sample of the rounding error of the whole model, doubled twice: 4 E (see
properties/test_every_method.py); in float64 2⁻²⁹ of that.
"""

import gc
import weakref

import pytest
import torch
import transformers
from models import FAMILIES, U32, U64, adapted, call, padded, put, surroundings, tiny, token_ids
from test_bases import specimen
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftlab import (
    DeepPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    attach,
    attention,
    probes,
)
from peftlab.bases.anatomy import Anatomy
from peftlab.bases.caches import cache_in, cache_name

EVERY = ("gpt2", "llama", "qwen2", "gpt_neox", "bert", "roberta", "distilbert", "t5", "t5 gated")
BATCHES = ("whole", "left", "right")


def batch(kind, family="gpt2"):
    rows = [token_ids(1, n, seed=n)[0] for n in ((6, 6, 6) if kind == "whole" else (6, 2, 4))]
    ids, mask = padded(rows, "right" if kind == "whole" else kind)
    if family == "roberta":
        ids[ids == 1] = 7  # its padding token, by which it counts positions if none are given
    return ids, mask


def logits(base, ids, mask):
    """Of the real tokens; a mask of ones is told, so that nobody warns."""
    given = {"input_ids": ids, "attention_mask": mask}
    if base.kind == "encoder-decoder":
        given["decoder_input_ids"] = torch.arange(1, 13).view(3, 4)
    else:
        given["position_ids"] = base.anatomy.positions(mask)
    with torch.no_grad():
        out = base.model(**given).logits
    return out if base.kind == "encoder-decoder" else out[mask.bool()]


class Fixed:
    """A prefix that is what it is, without positions."""

    def __init__(self, P_k, P_v):
        self.pair = P_k, P_v
        self.count = P_k.shape[-2]

    def read(self, dtype):
        return self.pair

    def bias(self, queries, keys):
        return None

    def widened(self, mask):
        return torch.nn.functional.pad(mask, (self.count, 0))


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", EVERY)
def test_without_a_prefix_it_is_the_familys_own(name, kind):
    """Against both of transformers' own, eager and fused."""
    ids, mask = batch(kind, name)
    base, double = specimen(name), specimen(name)
    double.model.double()
    results = {}
    for implementation in ("eager", "sdpa"):
        for model in (base, double):
            model.model.set_attn_implementation(implementation)
        results[implementation] = logits(base, ids, mask)
    exact = logits(double, ids, mask)  # fused: some eager ones take their softmax in float32
    E = (results["sdpa"].double() - exact).abs().max()
    with attention.Dispatched(base.model), attention.Dispatched(double.model):
        for theirs in results.values():
            assert (logits(base, ids, mask) - theirs).abs().max() <= 4 * E
        assert (logits(double, ids, mask) - exact).abs().max() <= 4 * E * U64 / U32


@pytest.mark.parametrize("name", EVERY)
def test_without_our_mask_function_the_answer_would_be_wrong(name):
    """An attention function alone gets no mask, and nothing is said: ours has both entries."""
    assert attention.NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert attention.NAME in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    base = specimen(name)
    ids, mask = batch("left", name)
    wanted = logits(base, ids, mask)
    AttentionInterface.register("maskless", attention.attend)
    try:
        base.model.set_attn_implementation("maskless")
        without = logits(base, ids, mask)
        AttentionMaskInterface.register("maskless", ALL_MASK_ATTENTION_FUNCTIONS[attention.NAME])
        with_mask = logits(base, ids, mask)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("maskless", None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("maskless", None)
    # The rounding error of these models is some 10⁻⁶ of their largest logit, and this is not it.
    assert (with_mask - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (without - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("name", EVERY)
def test_observing_finds_every_attention_and_its_sizes(name):
    base = specimen(name)
    before = surroundings(base)
    shape, sites = base.anatomy.shape, base.anatomy.attentions
    assert len(sites) == shape.attentions
    if base.kind == "encoder-decoder":
        names = [f"encoder.layers.{i}" for i in range(shape.layers)]
        for i in range(shape.decoder_layers):
            names += [f"decoder.layers.{i}", f"decoder.layers.{i}.cross"]
    else:
        names = [f"layers.{i}" for i in range(shape.layers)]
    assert [site.name for site in sites] == names
    for site in sites:
        assert (site.heads, site.kv_heads) == (shape.heads, shape.kv_heads)
        assert site.head_dim == shape.head_dim
        assert site.cross == site.name.endswith("cross")
        assert site.module in set(base.anatomy.layers[site.stack][site.layer].modules())
    base.model.train()
    attention.observe(base.model, base.anatomy.layers)
    assert base.model.training
    base.model.eval()
    assert surroundings(base) == before


def test_the_attentions_are_found_under_virtual_tokens_too():
    """Looked for the first time while a prompt needs a token that the probe does not have."""
    tuned = attach(tiny("gpt2"), PTuning(2, "mlp", placement=[(2, "after >")]))
    assert [site.name for site in tuned.anatomy.attentions] == ["layers.0", "layers.1"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["lora", "prompt", "prefix", "prefix shifted", "v2 depth"])
def test_records_are_what_the_model_did(case, family):
    """Weights sum to one and, times the values, are the output; the logits stay as they are."""
    tuned = adapted(case, family, torch.float64)
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in (6, 3)], "left")
    sites = tuned.anatomy.attentions
    with torch.no_grad():
        wanted = call(tuned, ids, mask)
        with attention.recorded(tuned.model, sites) as records:
            shown = call(tuned, ids, mask)
    real = slice(None) if family == "t5" else mask.bool()
    # Fused and plain attention differ by some hundred roundings of numbers of this size.
    assert (shown - wanted)[real].abs().max() <= 1000 * U64 * (1 + wanted.abs().max())
    assert list(records) == [site.name for site in sites]
    with_prefix = {name.removesuffix(".kv") for name in tuned.sites if name.endswith(".kv")}
    for site in sites:
        record = records[site.name]
        assert record.virtual == (tuned.prefix[0].shape[-2] if site.name in with_prefix else 0)
        assert record.weights.shape[-1] == record.key.shape[2]
        assert (record.weights.sum(dim=-1) - 1).abs().max() <= record.key.shape[2] * 4 * U64
        assert (record.weights >= 0).all()
        value = record.value.repeat_interleave(site.heads // site.kv_heads, dim=1)
        output = torch.einsum("bhqk,bhkd->bhqd", record.weights, value)
        close = 2 * record.key.shape[2] * U64 * record.value.abs().max()
        assert (output - record.output).abs().max() <= close
        if record.virtual:  # a padded key has no weight, a virtual one has
            assert (record.weights[..., : record.virtual] > 0).all()
        if not site.cross and site.stack != "decoder" and case != "prompt":
            padding = record.weights[1, :, 3:, record.virtual : record.virtual + 3]
            assert not padding.any()


def test_both_masks_keep_the_prefix_in_sight():
    """A mask of booleans says the same as one that is added."""
    module = torch.nn.Identity()
    q, k, v = (torch.randn(2, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    seen = torch.ones(3, 3, dtype=torch.bool).tril()[None, None].expand(2, 1, 3, 3)
    added = torch.zeros(2, 1, 3, 3, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    P = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    prefix = Fixed(P[0], P[1])
    with attention.Prefixed({module: prefix}):
        one, _ = attention.attend(module, q, k, v, seen)
        other, _ = attention.attend(module, q, k, v, added)
        with pytest.raises(ValueError, match="two methods want the same site"):
            with attention.Prefixed({module: Fixed(P[0], P[1])}):
                pass
        with pytest.raises(ValueError, match="2 prefixes for a batch of 1 rows"):
            two = Fixed(P, P)
            inner = torch.nn.Identity()
            with attention.Prefixed({inner: two}):
                attention.attend(inner, q[:1], k[:1], v[:1], None)
        with pytest.raises(ValueError, match="Identity caps its scores"):
            attention.attend(module, q, k, v, None, softcap=30.0)
    assert torch.equal(one, other)
    assert attention.PREFIX not in vars(module)
    keys, values = (
        torch.cat([p.expand(2, -1, -1, -1), t], dim=2) for p, t in ((P[0], k), (P[1], v))
    )
    scores = q @ keys.transpose(2, 3) / 2 + F.pad(added, (5, 0))
    wanted = (scores.softmax(dim=-1) @ values).transpose(1, 2)
    # A few dozen roundings of numbers of this size.
    assert (one - wanted).abs().max() <= 100 * U64 * values.abs().max()


@pytest.mark.parametrize("method", [PrefixTuning(3), PTuningV2(3, depth=1)])
def test_a_family_that_does_not_dispatch_is_refused(method, monkeypatch):
    """BLOOM takes our name without a word and computes its own attention."""
    small = transformers.BloomConfig(vocab_size=257, hidden_size=8, n_layer=2, n_head=2)
    model = transformers.BloomForCausalLM(small).eval().requires_grad_(False)
    assert attention.observe(model, {"": list(model.transformer.h)}) == []
    base = tiny("gpt2")
    monkeypatch.setattr(Anatomy, "attentions", attention.observe(model, {"": []}))
    before = surroundings(base)
    with pytest.raises(ValueError, match="computes attention in a way that no prefix reaches"):
        attach(base, method)
    assert surroundings(base) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_while_recording_or_observing_leaves_nothing(family, error):
    base = tiny(family)
    before = surroundings(base)
    sites = base.anatomy.attentions

    def raising(*_):
        raise error("now")

    handle = base.anatomy.layers[sites[-1].stack][-1].register_forward_hook(raising)
    with pytest.raises(error), attention.recorded(base.model, sites):
        call(base, token_ids(2, 4))
    with pytest.raises(error):
        attention.observe(base.model, base.anatomy.layers)
    handle.remove()
    assert surroundings(base) == before


def test_a_dropped_model_is_not_kept_alive():
    for case in ("prefix", "prompt", "prefix mlp", "prompt + prefix"):
        tuned = put(case, tiny("gpt2"))
        model = weakref.ref(tuned.model)
        del tuned
        gc.collect()
        assert model() is None, case


METHODS = {
    "prompt": PromptTuning(3),
    "p": PTuning(5, "mlp", placement=[(2, "front"), (1, "before >"), (2, "after >")]),
    "prefix": PrefixTuning(4),
    "shifted": PrefixTuning(4, shift_positions=True),
    "deep": DeepPromptTuning(3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox", "roberta", "distilbert", "t5"])
def test_soft_prompts_on_the_other_families(name, method):
    """They start, padding changes nothing, and they leave: in float32, to the E of the base."""
    base, double = specimen(name), specimen(name)
    double.model.double()
    before = surroundings(base)
    rows = [batch("whole", name)[0][i, : (6, 2, 4)[i]] for i in range(3)]
    for row in rows:
        row[0] = token_ids(1, 1)[0, 0]  # the token that a placement asks for
    tuned, twin = attach(base, METHODS[method]), attach(double, METHODS[method])
    twin.load_state({key: p.detach().double() for key, p in tuned.trainable.items()})
    given = [torch.arange(1, 5)[None]] if base.kind == "encoder-decoder" else []
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        if name == "roberta":
            ids = ids.masked_fill(mask == 0, 1)
        with torch.no_grad():
            wide = [tokens.expand(3, -1) for tokens in given]
            together, exact = tuned(ids, mask, *wide), twin(ids, mask, *wide)
            real = torch.ones(3, 4, dtype=torch.bool) if given else mask.bool()
            E = (together.double() - exact)[real].abs().max()
            for row, tokens in enumerate(rows):
                alone = tuned(tokens[None], None, *given)[0]
                assert (together[row][real[row]] - alone).abs().max() <= 4 * E
    tuned.detach()
    assert surroundings(base) == before


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_positions_that_nobody_gives_begin_behind_a_shifted_prefix(name):
    base, (ids, mask) = specimen(name), batch("whole", name)
    with attach(base, PrefixTuning(4, shift_positions=True)) as tuned, torch.no_grad():
        assert torch.equal(tuned.model(input_ids=ids, attention_mask=mask).logits, tuned(ids, mask))


def test_what_is_given_by_position_or_with_token_types_is_read():
    tuned = adapted("prompt", "bert")
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in (6, 3)], "right")
    positions = tuned.anatomy.positions(mask)
    with torch.no_grad():
        wanted = tuned(ids, mask)
        types = torch.zeros_like(ids)
        out = tuned.model(ids, mask, types, positions).logits
        stack = tuned.anatomy.backbone(ids, mask).last_hidden_state
        named = tuned.anatomy.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        others = tuned.model(ids, mask, 1 - types, positions).logits
    assert torch.equal(out, wanted) and torch.equal(stack, named)
    assert not torch.equal(others, wanted)


def test_a_placement_inside_needs_the_tokens():
    tuned = adapted("p around", "gpt2")
    with pytest.raises(ValueError, match="input_ids are needed"):
        tuned.model(inputs_embeds=torch.randn(1, 4, 24))
    with pytest.raises(ValueError, match="row 1 has no token 30 to put virtual tokens at"):
        tuned(torch.tensor([[3, 30, 4], [5, 6, 7], [8, 9, 10]]))  # the first of them is named


def test_the_cache_is_found_under_either_of_its_names():
    class New(torch.nn.Module):
        def forward(self, input_ids, cache=None): ...

    class Old(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None): ...

    assert [cache_name(m) for m in (New(), Old(), torch.nn.Identity())] == [
        *("cache", "past_key_values"),
        "",
    ]
    held = transformers.DynamicCache()
    assert cache_in({"past_key_values": held}) is cache_in({"cache": held}) is held
    assert cache_in({"cache": None, "input_ids": 1}) is None


def test_what_has_nothing_to_show_is_refused():
    base = tiny("gpt2")
    with pytest.raises(ValueError, match="an empty text: there is nothing to attend to"):
        probes.attention_map(base, "")
    record = next(iter(probes.attention_map(base, "go on").records.values()))
    with pytest.raises(ValueError, match="no prefix was attended to"):
        probes.gate(record)
