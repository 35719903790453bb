"""(IA)³ in PEFT: what its defaults scale, and how it unmerges."""

import peft
import pytest
import torch
import transformers
from models import hf_model, stir, tiny, token_ids

from peftlab import IA3, attach, count

FLOAT64 = torch.float64

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def wrapped(model, **options):
    return peft.get_peft_model(model, peft.IA3Config(**options)).eval()


def meta(config):
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def trained(model, **options):
    return wrapped(model, **options).get_nb_trainable_parameters()[0]


def test_on_gpt2_its_default_scales_the_queries_too():
    theirs = trained(meta(transformers.GPT2Config()))
    assert theirs == count(IA3(["q", "k", "v", "down"]), "gpt2") == 64_512
    assert count(IA3(), "gpt2") == 55_296  # what the paper scales: 12 (768 + 768 + 3072)


def test_on_bert_its_default_scales_what_the_attention_gives_too():
    """Two names end in "output.dense": that of the MLP's last map, and that of the attention's."""
    model = meta(transformers.BertConfig())
    theirs = trained(model)
    with_o = IA3(["k", "v", "o", "down"], feedforward_modules=["o", "down"])
    assert theirs == count(with_o, "bert-base") == count(IA3(), "bert-base") + 12 * 768


def test_ours_is_its_fused_one_with_the_queries_at_one():
    """In float64: both compute in the same order but for a product with 1, so within a rounding
    of each of the few hundred terms that follow."""
    ours = stir(attach(tiny("gpt2", FLOAT64), IA3()))
    theirs = wrapped(
        hf_model("gpt2", FLOAT64),
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
    ).double()
    with torch.no_grad():
        for layer, block in enumerate(theirs.base_model.model.transformer.h):
            fused, down = (m.ia3_l["default"] for m in (block.attn.c_attn, block.mlp.c_proj))
            for part, target in enumerate("qkv"):
                rows = slice(24 * part, 24 * (part + 1))
                factors = ours.modules[f"layers.{layer}.{target}"].l if target != "q" else 1.0
                fused[rows, 0] = factors
            down[0] = ours.modules[f"layers.{layer}.down"].l
        ids = token_ids(2, 7)
        wanted = theirs(input_ids=ids).logits
        assert (ours(ids) - wanted).abs().max() <= 1e-13 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:Unmerge result")
def test_it_unmerges_by_division_and_ours_restores():
    """PEFT divides by l + 1e-8 and says that the result can be inaccurate; a factor of zero is
    lost for good."""
    model = hf_model("llama")
    before = model.model.layers[0].self_attn.k_proj.weight.clone()
    theirs = wrapped(model, target_modules=["k_proj"], feedforward_modules=[])
    layer = theirs.base_model.model.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        layer.ia3_l["default"][0] = 0.0
    layer.merge()
    layer.unmerge()
    after = layer.get_base_layer().weight
    assert not torch.equal(after, before) and not after[0].any()
    base = tiny("llama")
    ours, untouched = attach(base, IA3()), base.fingerprint()
    with torch.no_grad():
        ours.modules["layers.0.k"].l[0] = 0.0
    ours.merge()
    ours.unmerge()
    assert base.fingerprint() == untouched
