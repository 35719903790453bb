"""Where Hugging Face PEFT (0.21.2) fails or does something else, and ours does not.

Each test shows what PEFT does, so that it fails on the day that PEFT does otherwise, and that ours
is right there. What ours does is proved against other references in tests/equivalence.

| where | PEFT | ours |
| --- | --- | --- |
| prefix, T5 | the decoder's attention to itself alone | all three attentions |
| prefix, T5, L layers | layer l reads layer 2 l mod L's: even L, half trains | its own |
| prefix, T5, d_kv ≠ d_model / heads | fails | works |
| prefix, T5, decoder deeper than encoder | fails | works |
| prefix, T5, decoder less deep | trains tensors that nothing reads | has none |
| prefix, DistilBERT | refused; told the sizes, nothing or an error | works |
| prefix, checkpointing switched on later | decoders fail, BERT loses it in silence | works |
| prefix by an MLP, grouped heads | table as wide as the keys | table as wide as the model |
| prefix, init_weights="zero" | called a no-op, moves every logit | "zero" is called none |
| prompt and P-tuning, T5, by default | two tables, one of them never read | one table |
| prompt and P-tuning, padding on the left | positions and distances count it | they do not |
| text behind a prompt or prefix, transformers 5.24 | not what its logits say | what they say |
"""

import peft
import pytest
import torch
import transformers
from models import (
    CONTEXT,
    VOCABULARY,
    call,
    decoder_ids,
    hf_model,
    padded,
    stir,
    tiny,
    token_ids,
    tokenizer,
)

from peftlab import PrefixTuning, PromptTuning, attach
from peftlab.bases import Base
from peftlab.bases.caches import cache_name

from .twins import GENERATES, CachePrefix, fitting_t5, greedy, twins

FLOAT64 = torch.float64
P = 4

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


def wrapped(model, config, task):
    config.task_type = task
    return peft.get_peft_model(model, config).to(next(model.parameters()).dtype).eval()


def prefix_on_t5(dtype=FLOAT64, **sizes):
    """PEFT's prefix on a T5, and a batch for it."""
    _, model = fitting_t5(dtype, **sizes)
    theirs = wrapped(model, peft.PrefixTuningConfig(num_virtual_tokens=P), "SEQ_2_SEQ_LM")
    ids = token_ids(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return theirs, batch | {"decoder_input_ids": decoder_ids(ids)}


@pytest.mark.parametrize("layers, read", [(2, {0}), (4, {0, 2}), (3, {0, 1, 2})])
def test_half_of_the_prefix_never_trains_on_t5_with_an_even_number_of_layers(layers, read):
    """PEFT writes its keys and values twice one after the other, and deals four to each layer."""
    theirs, batch = prefix_on_t5(num_layers=layers, num_decoder_layers=layers)
    theirs(**batch).logits.square().sum().backward()
    weight = theirs.prompt_encoder["default"].embedding.weight
    by_layer = weight.grad.view(P, layers, -1).abs().sum(dim=(0, 2))
    assert {layer for layer in range(layers) if by_layer[layer] > 0} == read
    base, _ = fitting_t5(FLOAT64, num_layers=layers, num_decoder_layers=layers)
    ours = attach(base, PrefixTuning(P))
    ours(**batch).square().sum().backward()
    for tensor in ours.prefix:
        assert (tensor.grad.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(
    "sizes, error", [({"d_kv": 10}, RuntimeError), ({"num_layers": 2}, IndexError)]
)
def test_t5_of_other_sizes(sizes, error):
    """Ours goes by the sizes observed: it equals the prefix of a cache made by hand."""
    theirs, batch = prefix_on_t5(**sizes)
    with pytest.raises(error):
        theirs(**batch)
    base, model = fitting_t5(FLOAT64, **sizes)
    ours = stir(attach(base, CachePrefix(P)))
    pairs = [
        (k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))
        for k, v in zip(*ours.prefix, strict=True)
    ]
    cache = transformers.EncoderDecoderCache(
        transformers.DynamicCache(pairs), transformers.DynamicCache()
    )
    with torch.no_grad():
        wanted = model(**batch, **{cache_name(model): cache}).logits
        # Both compute in float64 with sums of some tens of terms: 1e-12 is thousands of roundings.
        assert (ours(**batch) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_unused_prefixes_where_the_decoder_has_fewer_layers():
    theirs, batch = prefix_on_t5(num_layers=3, num_decoder_layers=1)
    theirs(**batch).logits.square().sum().backward()
    weight = theirs.prompt_encoder["default"].embedding.weight
    assert (weight.grad.view(P, 3, -1).abs().sum(dim=(0, 2)) > 0).tolist() == [True, False, False]


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        dim=24,
        n_layers=2,
        n_heads=3,
        hidden_dim=40,
        initializer_range=0.2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.DistilBertForMaskedLM(config).eval().to(FLOAT64)


def test_distilbert():
    """Refused for its names of sizes. With these given the mask is widened and nothing else: no
    word of it where the mask is all ones and not looked at, else an error."""
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in (7, 4)], "right")
    plain = distilbert()(input_ids=ids, attention_mask=mask).logits
    config = peft.PrefixTuningConfig(num_virtual_tokens=P)
    with pytest.raises(ValueError, match="token_dim"):
        wrapped(distilbert(), config, "FEATURE_EXTRACTION")
    config = peft.PrefixTuningConfig(num_virtual_tokens=P, token_dim=24, num_attention_heads=3)
    theirs = wrapped(distilbert(), config, "FEATURE_EXTRACTION")
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs(input_ids=ids, attention_mask=mask)
    whole = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    assert torch.equal(theirs(**whole).logits, distilbert()(**whole).logits)
    ours = stir(attach(Base("distil", distilbert(), tokenizer("bert")), PrefixTuning(P)))
    together = ours(ids, mask)
    assert (together - plain)[mask.bool()].abs().max() > 0.1
    together[mask.bool()].square().sum().backward()
    assert all((t.grad.flatten(1).abs().sum(dim=1) > 0).all() for t in ours.prefix)
    for row, real in zip(range(2), (7, 4), strict=True):
        alone = ours(ids[row : row + 1, :real])[0]
        assert (together[row, :real] - alone).abs().max() <= 1e-12 * alone.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_gradient_checkpointing_switched_on_after_wrapping(family):
    """Ours: tests/equivalence/test_gradient_checkpointing.py, on all four families."""
    ids = token_ids(2, 6)
    config = peft.PrefixTuningConfig(num_virtual_tokens=P)
    task = "FEATURE_EXTRACTION" if family == "bert" else "CAUSAL_LM"
    theirs = wrapped(hf_model(family), config, task)
    theirs.base_model.gradient_checkpointing_enable()
    theirs.train()
    if family != "bert":
        with pytest.raises(RuntimeError, match="must match the size"):
            theirs(input_ids=ids, attention_mask=torch.ones_like(ids))
        return
    theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    assert theirs.prompt_encoder["default"].embedding.weight.grad is None


def test_gradient_checkpointing_switched_on_before_is_refused():
    model = hf_model("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        wrapped(model, peft.PrefixTuningConfig(num_virtual_tokens=P), "CAUSAL_LM")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_prefix_of_zeros_is_no_no_op(family):
    """PEFT's and ours are the same, and both are far from the base at the base's own positions.

    Ours at unshifted positions is PEFT's called with positions from −P on.
    """
    ids = token_ids(2, 6)
    assert "no-op" in peft.PrefixTuningConfig.__dataclass_fields__["init_weights"].metadata["help"]
    config = peft.PrefixTuningConfig(num_virtual_tokens=P, init_weights="zero")
    task = "FEATURE_EXTRACTION" if family == "bert" else "CAUSAL_LM"
    theirs = wrapped(hf_model(family, FLOAT64), config, task)
    positions = torch.arange(6).expand_as(ids) - P
    base = tiny(family, FLOAT64)
    with torch.no_grad():
        made = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
        plain = base(ids)
        ours = attach(base, PrefixTuning(P, init="zero"))(ids)
    assert (made.logits - plain).abs().max() > 0.5
    assert (made.logits - ours).abs().max() <= 1e-12 * ours.abs().max()


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_the_second_table_of_a_prompt_on_t5_is_never_read(config):
    theirs = wrapped(hf_model("t5", FLOAT64), config(num_virtual_tokens=P), "SEQ_2_SEQ_LM")
    ids = token_ids(2, 6)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs(**given, decoder_input_ids=decoder_ids(ids)).logits.square().sum().backward()
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad
    assert (gradient.abs().sum(dim=1) > 0).tolist() == [True] * P + [False] * P


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_a_prompt_before_padding_on_the_left(family):
    """Ours reads a row in a padded batch as it reads it alone; PEFT's does not."""
    base = tiny(family, FLOAT64)
    pair = twins(base, hf_model(family, FLOAT64), PromptTuning(P), stir)
    row = token_ids(1, 4)
    ids, mask = padded([token_ids(1, 9, seed=1)[0], row[0]], "left")
    with torch.no_grad():
        alone = call(pair.ours, row)
        shown = slice(None) if family == "t5" else slice(-4, None)
        ours = call(pair.ours, ids, mask)[1:, shown]
        assert (ours - alone).abs().max() <= 1e-12 * alone.abs().max()
        more = {"decoder_input_ids": decoder_ids(ids, mask)} if family == "t5" else {}
        theirs = pair.theirs(input_ids=ids, attention_mask=mask, **more).logits[1:, shown]
    assert (theirs - alone).abs().max() > 0.01


@pytest.mark.skipif(GENERATES, reason="before transformers 5.24 PEFT's generate is right")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", [PromptTuning(P), CachePrefix(P)], ids=["prompt", "prefix"])
def test_generate_writes_what_its_logits_do_not_say(family, method):
    """Behind a prompt it is right without a cache."""
    pair = twins(tiny(family, FLOAT64), hf_model(family, FLOAT64), method, stir)
    ids = token_ids(1, 5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    said = greedy(pair.theirs, given, 8, None).tolist()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert pair.ours.model.generate(**given, **options).tolist() == said
    try:
        assert pair.theirs.generate(**given, **options).tolist() != said
    except IndexError:  # a position that the model does not have
        pass
    if isinstance(method, PromptTuning):
        assert pair.theirs.generate(**given, **options, use_cache=False).tolist() == said
