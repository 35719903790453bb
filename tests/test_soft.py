"""Soft prompts: how large they are, where they start, and what reads them."""

from dataclasses import replace

import pytest
import torch
from models import FAMILIES, adapted, put, tiny, token_ids, tokenizer

import peftlab
from peftlab import (
    DeepPromptTuning,
    PrefixTuning,
    PromptAndPrefix,
    PromptTuning,
    PTuning,
    PTuningV2,
    attach,
    attention,
)
from peftlab.bases.shapes import as_shape

# A small Llama with grouped heads: d = 256, 2 of 8 heads for keys of width 32, so d_kv = 64.
TOY = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
MODELS = {"gpt2": "gpt2", "bert": "bert-base", "t5": "t5-base", "toy": TOY}


def mlp(P, **options):
    return PrefixTuning(P, prefix_projection=True, encoder_hidden_size=512, **options)


# Counted by hand or by PEFT, not by this package. d = 768 and L = 12, in the toy 256 and 4.
# P d. T5: before the encoder's input only.
PROMPT = [
    *(("gpt2", 5, 3_840), ("gpt2", 20, 15_360), ("gpt2", 100, 76_800)),
    *(("bert", 5, 3_840), ("bert", 20, 15_360), ("bert", 100, 76_800)),
    *(("t5", 5, 3_840), ("t5", 20, 15_360), ("t5", 100, 76_800)),
    *(("toy", 5, 1_280), ("toy", 20, 5_120), ("toy", 100, 25_600)),
]
# 2 P L d_kv; in T5 3 · 12 sublayers: of the encoder, of the decoder, and across.
PREFIX = [
    *(("gpt2", 5, 92_160), ("gpt2", 10, 184_320), ("gpt2", 20, 368_640), ("gpt2", 100, 1_843_200)),
    *(("bert", 5, 92_160), ("bert", 10, 184_320), ("bert", 20, 368_640), ("bert", 100, 1_843_200)),
    *(("t5", 5, 276_480), ("t5", 10, 552_960), ("t5", 20, 1_105_920), ("t5", 100, 5_529_600)),
    *(("toy", 5, 2_560), ("toy", 10, 5_120), ("toy", 20, 10_240), ("toy", 100, 51_200)),
]
# P d + (d + 1) m + (m + 1) 2 L d_kv with m = 512.
PREFIX_MLP = [
    *(("gpt2", 10, 9_857_024), ("gpt2", 20, 9_864_704)),
    *(("bert", 10, 9_857_024), ("bert", 20, 9_864_704)),
    *(("t5", 10, 28_768_256), ("t5", 20, 28_775_936)),
    *(("toy", 10, 396_800), ("toy", 20, 399_360)),
]
# P d + 14 d² + 18 d: two LSTM layers of d / 2 in each direction, then d → d → d.
LAMA = [("gpt2", 9, 8_278_272), ("bert", 9, 8_278_272), ("t5", 9, 8_278_272), ("toy", 9, 924_416)]
# P d + 2 (d² + d).
MLP = [("gpt2", 9, 1_188_096), ("bert", 9, 1_188_096), ("t5", 9, 1_188_096), ("toy", 9, 133_888)]
# PEFT's: P d + 3 (d² + d). Of T5 it trains a second set of P rows that nothing reads: 40 for 20.
MLP_PEFT = [
    *(("gpt2", 20, 1_787_136), ("bert", 20, 1_787_136), ("t5", 40, 1_802_496)),
    ("toy", 20, 202_496),
]
# PEFT's: P d, two LSTM layers of d in each direction, then 2 d → 2 d → d.
LSTM_PEFT = [
    *(("gpt2", 20, 27_174_144), ("bert", 20, 27_174_144), ("t5", 40, 27_189_504)),
    ("toy", 20, 3_028_736),
]
# P L d; of T5's two stacks the encoder alone, 12 layers and not 24.
DEEP = [
    *(("gpt2", 10, 92_160), ("gpt2", 20, 184_320), ("bert", 10, 92_160), ("bert", 20, 184_320)),
    *(("t5", 10, 184_320 // 2), ("t5", 20, 368_640 // 2), ("toy", 10, 10_240), ("toy", 20, 20_480)),
]
KNOWN = {
    "prompt": (PromptTuning, PROMPT),
    "prefix": (PrefixTuning, PREFIX),
    "p-tuning v2": (PTuningV2, PREFIX),
    "prefix mlp": (mlp, PREFIX_MLP),
    "lama": (PTuning, LAMA),
    "mlp": (lambda P: PTuning(P, "mlp"), MLP),
    "mlp peft": (lambda P: PTuning(P, "mlp", "peft"), MLP_PEFT),
    "lstm peft": (lambda P: PTuning(P, "lstm", "peft"), LSTM_PEFT),
    "deep": (DeepPromptTuning, DEEP),
}


@pytest.mark.parametrize(
    "name, model, P, wanted",
    [(name, *row) for name, (_, rows) in KNOWN.items() for row in rows],
)
def test_the_closed_form(name, model, P, wanted):
    assert peftlab.count(KNOWN[name][0](P), MODELS[model]) == wanted


@pytest.mark.parametrize("model", MODELS)
def test_what_is_stored_does_not_depend_on_what_made_it(model):
    def stored(method):
        return method.stored(as_shape(MODELS[model]))

    for P in (5, 20):
        assert stored(mlp(P)) == stored(PrefixTuning(P))
        assert stored(PTuning(P)) == stored(PTuning(P, "attention")) == stored(PromptTuning(P))
        both = stored(PrefixTuning(P)) + stored(PromptTuning(P))
        assert stored(PromptAndPrefix(P)) == stored(PromptAndPrefix(P, False)) == both


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_depth_counts_from_the_top_of_each_stack(depth):
    """2 P d_kv for each sublayer: one a layer, in T5's decoder two."""
    for model, sublayers in (("gpt2", depth), ("bert", depth), ("t5", 3 * depth)):
        wanted = 2 * 7 * 768 * sublayers
        assert peftlab.count(PTuningV2(7, depth=depth), MODELS[model]) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_upper_layers_are_reached(family):
    tuned = attach(tiny(family), PTuningV2(2, depth=1))
    if family == "t5":
        assert tuned.sites == [
            "encoder.layers.2.kv",
            "decoder.layers.1.kv",
            "decoder.layers.1.cross.kv",
        ]
    else:
        assert tuned.sites == ["layers.1.kv"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_prefix_is_the_keys_and_values_of_the_text(family):
    base = tiny(family)
    ids = base.tokenizer("Sort:Sor", add_special_tokens=False, return_tensors="pt")["input_ids"]
    sites = base.anatomy.attentions
    given = (ids,) if family == "t5" else ()
    with torch.no_grad(), attention.recorded(base.model, sites) as records:
        base(ids, None, *given)
    plain = attach(base, PrefixTuning(8, init="text", init_text="Sort:"))
    for i, site in enumerate(sites):
        assert torch.equal(plain.prefix[0][i], records[site.name].key[0])
        assert torch.equal(plain.prefix[1][i], records[site.name].value[0])
    plain.detach()
    # Another method that is attached already takes no part in it, whatever it needs of a text.
    for other in (PromptTuning(3), PTuning(2, "mlp", placement=[(2, "before >")])):
        both = attach(base, [other, PrefixTuning(8, init="text", init_text="Sort:")])
        assert all(torch.equal(a, b) for a, b in zip(both.prefix, plain.prefix, strict=True))
        both.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_run_once_a_generation_and_never_stale(family):
    if family == "bert":
        family = "gpt2"
    tuned = adapted("p lama", family)
    (network,) = tuned.modules.values()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    before = tuned.generate(["a>", "b>c"], max_new_tokens=4)
    assert len(calls) == 1
    kept = {name: p.data.clone() for name, p in tuned.trainable.items()}
    for parameter in tuned.trainable.values():
        parameter.data.mul_(-2)  # in place, as fused optimisers do: no version is counted
    with torch.no_grad():
        assert not torch.equal(tuned.prompt, tuned.state()["p_tuning.prompt"] + 1)
        moved = tuned.prompt.clone()
        for name, tensor in kept.items():
            tuned.trainable[name].data.copy_(tensor)
        assert not torch.equal(moved, tuned.prompt)
    assert tuned.generate(["a>", "b>c"], max_new_tokens=4) == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_token_is_embedded_once_while_decoding(family):
    """The prompt reads the embeddings of the first pass alone: later ones are the model's own."""
    tuned, lengths = adapted("prompt", family), []
    embedding = tuned.base.anatomy.embedding
    hook = embedding.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    tuned.generate(["a>", "b>c"], max_new_tokens=4)
    hook.remove()
    assert lengths == [3, 1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_prompt_is_where_it_says(family):
    tuned = put("prompt and prefix", tiny(family))
    shape = tuned.anatomy.shape
    assert tuned.prompt.shape == (3, 24)
    size = (shape.attentions, shape.kv_heads, 3, shape.head_dim)
    assert [part.shape for part in tuned.prefix] == [size, size]
    assert tuned.state().keys() == {f"prompt_and_prefix.{k}" for k in ("prompt", "P_k", "P_v")}
    lora = adapted("lora", family)
    for name in ("prompt", "prefix"):
        with pytest.raises(AttributeError, match=f"LoRA has no {name}"):
            getattr(lora, name)


def test_attaching_draws_from_its_own_generator():
    """torch's own stays where it was, and does not matter."""
    for case in ("p lama", "p attention", "prefix mlp", "prompt and prefix", "head v2"):
        torch.manual_seed(1)
        first = put(case, tiny("bert")).state()
        after = torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(1), after)
        torch.manual_seed(2)
        second = put(case, tiny("bert")).state()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_16_bits_has_soft_prompts_in_32(family, dtype):
    for case in ("prefix", "prompt and prefix", "p lama", "deep"):
        tuned = put(case, tiny(family, dtype))
        assert all(p.dtype == torch.float32 for p in tuned.trainable.values())
        ids = token_ids(2, 5)
        with torch.no_grad():
            out = tuned(ids, None, *([ids] if family == "t5" else []))
        assert out.dtype == dtype and out.isfinite().all()
    assert len(tokenizer(family))


def test_a_width_that_the_papers_encoder_cannot_halve_is_refused():
    odd = replace(as_shape(TOY), d_model=255)
    with pytest.raises(ValueError, match='d_model=255 is odd: sizes="lama" halves it'):
        PTuning(3).parameters(odd)
    assert PTuning(3, sizes="few-shot").parameters(odd) > 0
