"""Bases: loading, the anatomy of each family, and running a frozen model."""

import math

import pytest
import torch
from models import CONTEXT, FAMILIES, U32, VOCABULARY, hf_model, tiny, token_ids, tokenizer
from torch.nn.functional import cross_entropy

import peftlab
from peftlab.bases import TARGETS, Base


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def base(family) -> Base:
    return tiny(family)


@pytest.fixture
def folder(family, tmp_path):
    """A base on disk in Hugging Face format."""
    hf_model(family).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_load_gives_what_was_saved(folder, base):
    for name in (folder, str(folder)):
        loaded = peftlab.load(name)
        assert loaded.fingerprint() == base.fingerprint()
        assert loaded.digest == base.digest
        ids = token_ids(2, 7)
        assert torch.equal(loaded(ids), base(ids))
        assert loaded.tokenizer.decode(loaded.tokenizer("Grüße, 12!")["input_ids"]) == "Grüße, 12!"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_load_in_another_type(folder):
    loaded = peftlab.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(family):
    bare = tokenizer()
    bare.pad_token = None
    assert Base("bare", hf_model(family), bare).tokenizer.pad_token_id == bare.eos_token_id


def test_the_shape_counts_the_model(base):
    assert base.anatomy.shape.parameters() == sum(p.numel() for p in base.model.parameters())
    assert f"{base.anatomy.shape.parameters():,} parameters" in repr(base)
    assert base.context == CONTEXT


def test_every_target_is_a_view_of_the_right_size(base):
    """Writing to a linear's weight writes to the model, and each matrix has the shape's numbers."""
    anatomy = base.anatomy
    assert set(anatomy.targets) <= set(TARGETS) and anatomy.targets == anatomy.shape.targets
    assert len(anatomy.linears) == len(anatomy.targets) * anatomy.shape.layers
    for linear in anatomy.linears.values():
        assert anatomy.shape.matrices(linear.target) == [(2, linear.d_in, linear.d_out)]
        assert linear.weight.shape == (linear.d_out, linear.d_in)
        before = base.fingerprint()
        kept = linear.weight[0, 0].clone()
        with torch.no_grad():
            linear.weight[0, 0] += 1
            assert base.fingerprint() != before
            linear.weight[0, 0] = kept
        assert base.fingerprint() == before


def test_fused_rows_are_q_then_k_then_v():
    """Zeroing one target's rows and bias silences the part of c_attn that attention calls so."""
    base = tiny("gpt2")
    module = base.model.transformer.h[0].attn.c_attn
    x = torch.randn(1, 3, 24)
    for part, target in enumerate("qkv"):
        linear = base.anatomy.linears[f"layers.0.{target}"]
        start, stop = linear.rows
        wanted = module(x).split(24, dim=2)[part]  # as in GPT2Attention.forward
        ours = x @ linear.weight.T + module.bias[start:stop]
        # Two orders of a sum of 24 products and a bias.
        assert (ours - wanted).abs().max() <= 2 * 25 * U32 * (x.abs() @ linear.weight.abs().T).max()


def test_select_goes_layer_by_layer_and_refuses_strangers(base):
    names = [linear.name for linear in base.anatomy.select(("v", "q"))]
    assert names == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    with pytest.raises(ValueError, match="unknown target 'c_attn'.*has q, k, v, o, up, down"):
        base.anatomy.select(("q", "c_attn"))


def test_the_fingerprint_sees_every_bit(base):
    before = base.fingerprint()
    assert before == base.fingerprint() and len(before) == 64
    for name, tensor in base.model.state_dict().items():
        bits = tensor.view(torch.int32).flatten()
        bits[-1] ^= 1  # the last bit of one number
        assert base.fingerprint() != before, name
        bits[-1] ^= 1
    assert base.fingerprint() == before
    assert tiny(base.anatomy.family, seed=1).digest != base.digest


def test_loss_is_the_mean_over_all_tokens(base):
    """Whatever the batch size; against the sum over each text alone."""
    texts = ["abc", "a much longer text", "xy", "z"]
    total = tokens = 0
    for text in texts:
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        if ids.shape[1] > 1:
            total += cross_entropy(base(ids)[0, :-1], ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
    for batch_size in (1, 3, 32):
        # 20 tokens' losses, each with the rounding of logits that come from sums of 24 to 96
        # terms over 2 layers: some hundred roundings, relative to losses of this size.
        assert math.isclose(base.loss(texts, batch_size), total / tokens, rel_tol=500 * U32)


def test_generate_stops_at_the_end_of_text_and_hides_it(base):
    """A model whose head is made to prefer one letter twice, then the end."""
    calls = []

    def force(module, args, output):
        step = len(calls)
        calls.append(step)
        output.logits[:] = 0
        output.logits[..., base.tokenizer("k")["input_ids"][0] if step < 2 else 0] = 9
        return output

    hook = base.model.register_forward_hook(force)
    assert base.generate(["ab", "longer"], max_new_tokens=10) == ["kk", "kk"]
    assert len(calls) == 3
    hook.remove()


def test_generate_puts_the_model_back_into_training_mode(base):
    base.train()
    first = base.generate(["ab"], max_new_tokens=4)
    assert base.model.training
    base.train(False)
    assert base.generate(["ab"], max_new_tokens=4) == first
    assert base.generate([]) == []


def test_logits_have_the_vocabulary_and_a_mask_of_ones_is_no_mask(base):
    ids = token_ids(2, CONTEXT)
    logits = base(ids)
    assert logits.shape == (2, CONTEXT, VOCABULARY)
    assert torch.equal(base(ids, torch.ones_like(ids)), logits)
