"""Closed forms against models built without memory, and against a table of known counts."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peftlab import accounting
from peftlab.bases.data import data_path
from peftlab.bases.shapes import Shape, as_shape
from peftlab.methods import (
    AdaLoRA,
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    PiSSA,
    PromptTuning,
    VeRA,
)

CLASSES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "distilbert": (DistilBertConfig, DistilBertModel),
    "t5": (T5Config, T5ForConditionalGeneration),
}

# The last parts of module names, and how many logical matrices share the module.
MODULES = {
    "gpt2": {
        "q": ("attn.c_attn",),
        "k": ("attn.c_attn",),
        "v": ("attn.c_attn",),
        "o": ("attn.c_proj",),
        "up": ("mlp.c_fc",),
        "down": ("mlp.c_proj",),
    },
    "llama": {t: (f".{t}_proj",) for t in ("q", "k", "v", "o", "up", "down", "gate")},
    "bert": {
        "q": ("self.query",),
        "k": ("self.key",),
        "v": ("self.value",),
        "o": ("attention.output.dense",),
        "up": ("intermediate.dense",),
        "down": (".output.dense",),
    },
    "t5": {t: (f"Attention.{t}",) for t in "qkvo"}
    | {"up": ("DenseReluDense.wi", ".wi_1"), "gate": (".wi_0",), "down": ("DenseReluDense.wo",)},
}
MODULES["qwen2"] = MODULES["llama"]
MODULES["roberta"] = MODULES["bert"]
MODULES["distilbert"] = {t: (f".{t}_lin",) for t in "qkv"} | {
    "o": (".out_lin",),
    "up": ("ffn.lin1",),
    "down": ("ffn.lin2",),
}
MODULES["gpt_neox"] = {t: (".query_key_value",) for t in "qkv"} | {
    "o": ("attention.dense",),
    "up": (".dense_h_to_4h",),
    "down": (".dense_4h_to_h",),
}
FUSED = ("gpt2", "gpt_neox")

TOY = dict(  # a small Llama with grouped heads
    model_type="llama",
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
    vocab_size=1000,
    tie_word_embeddings=False,
)
T5_V1_1 = dict(  # gated MLP, untied head, as in the models that prompt tuning was published on
    model_type="t5",
    d_model=64,
    d_kv=16,
    d_ff=160,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=6,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    vocab_size=100,
)
BIASED = TOY | dict(attention_bias=True, mlp_bias=True, head_dim=48, tie_word_embeddings=True)
CONFIGS = {p.stem: json.loads(p.read_text()) for p in sorted(data_path("configs").glob("*.json"))}
# Written by hand from the config.json of FacebookAI/roberta-base, distilbert-base-uncased and
# EleutherAI/pythia-160m on the Hugging Face hub.
ROBERTA_BASE = CONFIGS["bert-base"] | dict(
    model_type="roberta",
    max_position_embeddings=514,
    type_vocab_size=1,
    vocab_size=50265,
    pad_token_id=1,
)
DISTILBERT = dict(
    model_type="distilbert",
    dim=768,
    hidden_dim=3072,
    n_layers=6,
    n_heads=12,
    max_position_embeddings=512,
    vocab_size=30522,
)
PYTHIA_160M = dict(
    model_type="gpt_neox",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=2048,
    vocab_size=50304,
    tie_word_embeddings=False,
)
CONFIGS |= {
    "roberta-base": ROBERTA_BASE,
    "distilbert-base": DISTILBERT,
    "pythia-160m": PYTHIA_160M,
    "toy-neox": PYTHIA_160M | dict(attention_bias=False, tie_word_embeddings=True),
}
CONFIGS |= {"toy-gqa": TOY, "toy-t5-v1.1": T5_V1_1, "toy-biased": BIASED}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A shape, and the real model of the same config without memory."""
    fields = CONFIGS[request.param]
    config_class, model_class = CLASSES[fields["model_type"]]
    config = config_class(**{k: v for k, v in fields.items() if k not in ("source", "model_type")})
    with torch.device("meta"):
        model = model_class(config)
    return as_shape(config), model


def measured_matrices(shape, model, target):
    """(d_in, d_out) of every matrix of a target, found by walking the modules."""
    sizes = []
    for name, module in model.named_modules():
        if not name.endswith(MODULES[shape.family][target]):
            continue
        if shape.family in ("bert", "roberta") and target == "down" and "attention" in name:
            continue
        d_in, d_out = module.weight.shape
        if shape.family != "gpt2":  # a Linear holds (d_out, d_in), GPT-2's Conv1D (d_in, d_out)
            d_in, d_out = d_out, d_in
        if shape.family in FUSED and target in ("q", "k", "v"):
            d_out //= 3  # one fused matrix for the three
        sizes.append((d_in, d_out))
    return sizes


def test_base_total_equals_the_model(pair):
    shape, model = pair
    assert shape.parameters() == sum(p.numel() for p in model.parameters())


def test_every_target_matrix_equals_the_model(pair):
    shape, model = pair
    for target in shape.targets:
        closed = [(d_in, d_out) for n, d_in, d_out in shape.matrices(target) for _ in range(n)]
        assert closed == measured_matrices(shape, model, target), target


def test_every_block_matrix_is_a_target(pair):
    """The targets' weights are all two-dimensional weights inside the blocks, none forgotten."""
    shape, model = pair
    outside = ("embed", "wte", "wpe", "shared", "lm_head", "pooler", "relative_attention_bias")
    weights = [p for n, p in model.named_parameters() if not any(word in n for word in outside)]
    closed = sum(n * i * o for t in shape.targets for n, i, o in shape.matrices(t))
    assert closed == sum(p.numel() for p in weights if p.dim() == 2)


def test_norms_equal_the_model(pair):
    shape, model = pair
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert shape.norms == len(norms)
    assert {shape.norm_size} == {sum(p.numel() for p in m.parameters()) for m in norms}


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("bert-base", "BertForMaskedLM"),
        ("roberta-base", "RobertaForMaskedLM"),
        ("distilbert-base", "DistilBertForMaskedLM"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_lm_head_equals_the_model(name, model_class, tied):
    """And without any head, what is left is the model's backbone."""
    model_class = getattr(transformers, model_class)
    fields = {k: v for k, v in CONFIGS[name].items() if k not in ("source", "model_type")}
    config = model_class.config_class(**fields, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = model_class(config)
    shape = replace(as_shape(config), head="masked_lm")
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    backbone = sum(p.numel() for p in model.base_model.parameters())
    assert shape.without_head().parameters() == backbone
    assert as_shape(config).without_head() == shape.without_head()


# Pythia's table of sizes (Biderman et al. 2023, arXiv:2304.01373) counts every parameter, and
# those that are not embeddings; RoBERTa (arXiv:1907.11692) and DistilBERT (arXiv:1910.01108)
# print millions.
@pytest.mark.parametrize(
    ("name", "published", "unit"),
    [
        ("pythia-160m", 162_322_944, 1),
        ("roberta-base", 125, 10**6),
        ("distilbert-base", 66, 10**6),
    ],
)
def test_published_sizes(name, published, unit):
    shape = as_shape(CONFIGS[name])
    assert round(shape.parameters() / unit) == published
    if name == "pythia-160m":
        assert shape.parameters() - 2 * shape.vocab * shape.d_model == 85_056_000


@pytest.mark.parametrize("r", [1, 8, 13])
@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v", "o"), "all-linear"])
def test_lora_equals_the_walk(pair, r, targets):
    shape, model = pair
    sizes = [
        size
        for target in (shape.targets if targets == "all-linear" else targets)
        for size in measured_matrices(shape, model, target)
    ]
    walked = sum(r * d_in + d_out * r for d_in, d_out in sizes)  # A and B of each matrix
    assert accounting.count(LoRA(r=r, target_modules=targets), shape) == walked


def test_prompt_and_full_equal_the_model(pair):
    shape, model = pair
    width = model.get_input_embeddings().weight.shape[1]
    assert accounting.count(PromptTuning(num_virtual_tokens=20), shape) == 20 * width
    total = sum(p.numel() for p in model.parameters())
    assert accounting.count(FullFineTuning(), shape) == total
    assert accounting.percent(FullFineTuning(), shape) == 100


# Computed once, apart from this package: totals by building the model (transformers 5.23, meta
# device), prompt as P·d, LoRA as Σ r(d_in + d_out) over the targets with sizes written out by
# hand; PEFT 0.21.2 gave the same numbers for T5 base with r=8 on q,v (884,736) and for the toy
# with r=8 on all linear maps (145,408).
KNOWN = {
    "gpt2": {"full": 124439808, "P": {5: 3840, 20: 15360, 100: 76800}},
    "bert-base": {"full": 109482240, "P": {5: 3840, 20: 15360, 100: 76800}},
    "t5-base": {"full": 222903552, "P": {5: 3840, 20: 15360, 100: 76800}},
    "toy-gqa": {"full": 3332352, "P": {5: 1280, 20: 5120, 100: 25600}},
}
KNOWN_LORA = {  # r: (q,v), (q,k,v,o), all-linear
    "gpt2": {
        1: (36864, 73728, 165888),
        4: (147456, 294912, 663552),
        8: (294912, 589824, 1327104),
        16: (589824, 1179648, 2654208),
        64: (2359296, 4718592, 10616832),
    },
    "t5-base": {
        1: (110592, 221184, 405504),
        4: (442368, 884736, 1622016),
        8: (884736, 1769472, 3244032),
        16: (1769472, 3538944, 6488064),
        64: (7077888, 14155776, 25952256),
    },
    "toy-gqa": {
        1: (3328, 6656, 18176),
        4: (13312, 26624, 72704),
        8: (26624, 53248, 145408),
        16: (53248, 106496, 290816),
        64: (212992, 425984, 1163264),
    },
}
KNOWN_LORA["bert-base"] = KNOWN_LORA["gpt2"]  # the same matrices


@pytest.mark.parametrize("name", KNOWN)
def test_known_counts(name):
    shape = as_shape(CONFIGS[name])
    assert accounting.count(FullFineTuning(), shape) == KNOWN[name]["full"]
    for length, expected in KNOWN[name]["P"].items():
        assert accounting.count(PromptTuning(num_virtual_tokens=length), shape) == expected
    for r, row in KNOWN_LORA[name].items():
        for targets, expected in zip((("q", "v"), "qkvo", "all-linear"), row, strict=True):
            targets = tuple(targets) if targets == "qkvo" else targets
            assert accounting.count(LoRA(r=r, target_modules=targets), shape) == expected


# Computed apart from this package, as the table above: LoRA's numbers and d_out for each target.
KNOWN_DORA = {
    "gpt2": {4: 165888, 8: 313344, 16: 608256},
    "bert-base": {4: 165888, 8: 313344, 16: 608256},
    "t5-base": {4: 497664, 8: 940032, 16: 1824768},
    "toy-gqa": {4: 14592, 8: 27904, 16: 54528},
}


@pytest.mark.parametrize("name", KNOWN_DORA)
def test_known_counts_of_the_lora_family(name):
    shape = as_shape(CONFIGS[name])
    for r, expected in KNOWN_DORA[name].items():
        assert accounting.count(DoRA(r=r), shape) == expected
        plain = accounting.count(LoRA(r=r), shape)
        assert accounting.count(LoRA(r=r, use_rslora=True, loraplus_lr_ratio=16), shape) == plain
        assert accounting.count(PiSSA(r=r), shape) == plain == accounting.stored(LoRA(r=r), shape)
        assert accounting.stored(PiSSA(r=r), shape) == 2 * plain
        matrices = [m for t in "qv" for m in shape.matrices(t)]
        ranks = sum(copies for copies, _, _ in matrices)
        adalora = AdaLoRA(init_r=r, target_r=1)
        assert accounting.count(adalora, shape) == plain + r * ranks
        rows = sum(copies * d_out for copies, _, d_out in matrices)
        assert accounting.count(VeRA(r=r), shape) == r * ranks + rows


def test_known_counts_of_a_shared_factor():
    """PEFT 0.21.2 trained 147,456 numbers with r = 4 on GPT-2's c_attn, 393,216 on GPT-2 medium's:
    as many as separate factors on q and v have, and two thirds of what they have on q, k and v."""
    targets = ("q", "k", "v")
    for name, expected in (("gpt2", 147456), ("gpt2-medium", 393216)):
        fused = accounting.count(LoRA(r=4, target_modules=targets, fused=True), name)
        assert fused == expected == accounting.count(LoRA(r=4), name)
        assert 3 * fused == 2 * accounting.count(LoRA(r=4, target_modules=targets), name)


def test_published_counts_of_vera():
    """Table 2 of the paper: RoBERTa base with r = 1024 on q and v, printed as 0.043M; large with
    r = 256, 0.061M."""
    large = ROBERTA_BASE | dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    for fields, r, published in ((ROBERTA_BASE, 1024, 0.043), (large, 256, 0.061)):
        assert round(accounting.count(VeRA(r=r), as_shape(fields)) / 1e6, 3) == published


def test_known_count_of_a_published_table():
    """LoRA, table 4 of the paper: GPT-3 with q and v, r=1, printed as 4.7M."""
    gpt3 = Shape("gpt3", "gpt2", 96, 12288, 96, 96, 128, 4 * 12288, 50257, 2048)
    assert accounting.count(LoRA(r=1), gpt3) == 4718592


def test_bytes_percent_and_ledger():
    method = LoRA(r=8)
    assert accounting.stored(method, "gpt2") == 294912
    assert accounting.file_bytes(method, "gpt2") == 4 * 294912
    assert accounting.file_bytes(method, "gpt2", "bfloat16") == 2 * 294912
    assert accounting.readable_bytes(4 * 294912) == "1.2 MB"
    assert accounting.readable_bytes(12) == "12 bytes"
    assert (accounting.readable_bytes(999), accounting.readable_bytes(1000)) == (
        "999 bytes",
        "1.0 kB",
    )
    assert accounting.readable_percent(7, 7) == "100%"
    assert accounting.readable_percent(8192, 70_553_706_496) == "0.0000116%"
    assert round(accounting.percent(method, "gpt2"), 3) == 0.237
    base = accounting.base_parameters("gpt2")
    assert accounting.training_bytes(FullFineTuning(), "gpt2").total == 16 * base
    assert accounting.training_bytes(FullFineTuning(), "gpt2", "bfloat16").total == 16 * base
    biases = accounting.training_bytes(BitFit(), "gpt2", "bfloat16")
    assert biases.total == 2 * (base - 102144) + 16 * 102144  # its numbers are the base's own
    lora = accounting.training_bytes(method, "gpt2", "bfloat16")
    assert lora.total == 2 * base + 16 * 294912
    assert (lora.gradients, lora.adam) == (4 * 294912, 8 * 294912)


@pytest.mark.parametrize("method", [LoRA(r=4), PromptTuning(num_virtual_tokens=5)])
def test_file_bytes_bound_a_real_file(method, tmp_path):
    """safetensors adds eight bytes and a JSON header of names and shapes, nothing more."""
    import safetensors.torch

    shape = as_shape(CONFIGS["toy-gqa"])
    if method.name == "lora":
        tensors = {
            f"{target}.{i}.{letter}": torch.zeros(size)
            for target in method.target_modules
            for copies, d_in, d_out in shape.matrices(target)
            for i in range(copies)
            for letter, size in (("A", (4, d_in)), ("B", (d_out, 4)))
        }
    else:
        tensors = {"prompt": torch.zeros(5, shape.d_model)}
    path = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file(tensors, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - 8 - header == accounting.file_bytes(method, shape)
    assert header < 200 * len(tensors)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown dtype 'int3'; allowed: float32, bfloat16"):
        accounting.file_bytes(LoRA(), "gpt2", "int3")
    with pytest.raises(ValueError, match="unknown model 'gpt9'"):
        accounting.count(LoRA(), "gpt9")
    with pytest.raises(ValueError, match="unknown target 'gate'"):
        accounting.count(LoRA(target_modules=("gate",)), "gpt2")
    with pytest.raises(ValueError, match="r=1025"):
        accounting.count(LoRA(r=1025), "llama-3-8b")  # k and v have 1,024 rows
