"""Shapes are read right from names and configs; unknown ones are refused by name."""

import json

import pytest

from peftlab.bases.data import data_path
from peftlab.bases.shapes import FAMILIES, Shape, as_shape, names

PUBLISHED = sorted(path.stem for path in data_path("configs").glob("*.json"))


def test_every_promised_model_is_known():
    promised = "gpt2 gpt2-medium gpt2-large gpt2-xl bert-base bert-large t5-base llama-2-7b"
    promised += " llama-3-8b llama-3-70b tinyllama-1.1b smollm2-135m qwen2.5-0.5b"
    promised += " llama-2-13b llama-2-70b llama-3.2-1b llama-3.2-3b mistral-7b smollm2-360m"
    promised += " smollm2-1.7b qwen2.5-1.5b qwen2.5-3b qwen2.5-7b qwen2.5-14b qwen2.5-32b"
    promised += " qwen2.5-72b t5-large t5-3b t5-11b"
    assert set(promised.split()) == set(PUBLISHED)
    assert set(names()) >= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_files_hold_facts_and_their_source(name):
    config = json.loads(data_path("configs", f"{name}.json").read_text())
    assert config["source"].startswith("written by hand from https://")
    assert config["model_type"] in FAMILIES


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_model_by_name_by_dict_and_by_shape(name):
    shape = Shape.named(name)
    fields = json.loads(data_path("configs", f"{name}.json").read_text())
    assert as_shape(name) is not shape and as_shape(name) == shape
    assert as_shape(shape) is shape
    assert Shape.from_config(fields, name) == shape
    assert as_shape(fields).parameters() == shape.parameters()


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen2.5-72b", 72_706_203_648),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
    ],
)
def test_what_was_written_by_hand_counts_as_published(name, published):
    """The number of parameters that the model's page on the hub gives for its file."""
    assert Shape.named(name).parameters() == published


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'gpt5'; known: .*gpt2-xl.*t5-base"):
        as_shape("gpt5")


def test_unknown_family_lists_the_known_ones():
    known = "gpt2, llama, qwen2, gpt_neox, bert, roberta, distilbert, t5"
    with pytest.raises(ValueError, match=f"unknown family 'mamba'; known: {known}"):
        as_shape({"model_type": "mamba"})


def test_a_target_that_a_family_lacks_is_refused():
    with pytest.raises(ValueError, match="gpt2 has no target 'gate'; it has: q, k, v, o, up, down"):
        as_shape("gpt2").matrices("gate")


def test_grouped_heads_make_k_and_v_narrow():
    shape = Shape.named("llama-3-8b")
    assert shape.matrices("q") == [(32, 4096, 4096)]
    assert shape.matrices("v") == [(32, 4096, 1024)]
    assert shape.d_kv == 8 * 128


def test_t5_counts_self_and_cross_attention_of_both_stacks():
    shape = Shape.named("t5-base")
    assert shape.matrices("q") == [(36, 768, 768)]  # 12 encoder, 12 decoder, 12 cross
    assert shape.matrices("up") == [(24, 768, 3072)]
    assert shape.norms == 2 * 12 + 3 * 12 + 2


@pytest.mark.parametrize(
    ("name", "kind", "head"),
    [
        ("gpt2", "decoder", "lm"),
        ("qwen2.5-0.5b", "decoder", "lm"),
        ("bert-base", "encoder", "pooler"),
        ("t5-base", "encoder-decoder", "lm"),
    ],
)
def test_kind_and_head_of_the_named(name, kind, head):
    shape = Shape.named(name)
    assert (shape.kind, shape.head) == (kind, head)
    headless = shape.without_head()
    assert (headless.kind, headless.head) == (kind, "none")
    assert headless.norms == shape.norms and headless.matrices("q") == shape.matrices("q")


def test_a_tied_head_costs_nothing_and_an_untied_one_a_table():
    tied, untied = Shape.named("gpt2"), Shape.named("llama-2-7b")
    assert tied.without_head().parameters() == tied.parameters()
    assert untied.parameters() - untied.without_head().parameters() == 32000 * 4096


def test_roberta_counts_positions_from_behind_the_padding():
    fields = dict(
        model_type="roberta",
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=514,
        type_vocab_size=1,
        vocab_size=10,
    )
    shape = as_shape(fields)
    assert (shape.context, shape.positions, shape.segments) == (512, 514, 1)
    assert as_shape(fields | dict(pad_token_id=0)).context == 513


def test_optional_fields_default_as_in_transformers():
    plain = dict(
        model_type="llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        vocab_size=50,
    )
    shape = as_shape(plain)
    assert (shape.kv_heads, shape.head_dim, shape.tied, shape.biased) == (4, 16, False, ())
    biased = as_shape(plain | dict(attention_bias=True, mlp_bias=True))
    extra = 2 * (4 * 64 + 96 + 96 + 64)  # layers · (q k v o + up + gate + down)
    assert biased.parameters() - shape.parameters() == extra
