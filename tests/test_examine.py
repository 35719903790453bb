"""What `examine` finds in an adapter: each fault by its name, and nothing in a sound one."""

import json

import peft
import pytest
import torch
from models import CASES, ON_EVERY, adapted, put, stir, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from peftlab import IA3, HoulsbyAdapter, LoRA, attach, examine

LORA = dict(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
SOFT = ("prompt", "prefix", "p_tuning", "v2", "deep")


def symptoms(examination) -> str:
    return "\n".join(finding.symptom for finding in examination.findings)


def peft_model(stirred=True, **options):
    """A PEFT LoRA on a small GPT-2, with its B away from zero."""
    model = peft.get_peft_model(tiny("gpt2").model, peft.LoraConfig(**LORA | options))
    for name, parameter in model.named_parameters():
        if stirred and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


@ON_EVERY
def test_a_sound_adapter_of_any_method_has_no_finding(family, case, tmp_path):
    tuned = stir(put(case, tiny(family)), size=0.005)
    found = examine(tuned)
    assert not found.findings, found
    count = tuned.count()  # a network that makes a prompt is not stored, and a mask does not train
    assert found.table["numbers"].sum() >= min(count.stored, count.parameters) + count.head
    assert "nothing found" in str(found) and tuned.label in repr(found)
    tuned.save(tmp_path / "it")
    tuned.detach()
    assert not examine(tmp_path / "it").findings, examine(tmp_path / "it")
    assert not examine(tmp_path / "it", tuned.base).findings


def test_examining_changes_nothing():
    tuned = adapted("lora", "gpt2")
    before, state = tuned.base.fingerprint(), tuned.state()
    examine(tuned)
    assert tuned.base.fingerprint() == before
    assert all(torch.equal(state[name], tensor) for name, tensor in tuned.state().items())


def test_a_row_says_what_the_place_is():
    tuned = adapted("lora", "llama")
    row = examine(tuned).table.set_index("place").loc["layers.1.q"]
    delta, linear = tuned.deltas["layers.1.q"], tuned.anatomy.linears["layers.1.q"]
    norm = delta.delta_weight().norm().item()
    assert row["kind"] == "q" and row["layer"] == 1 and row["rank"] == row["used"] == 3
    assert row["numbers"] == 3 * (linear.d_in + linear.d_out)
    assert row["scale"] == pytest.approx(5 / 3)
    assert row["norm"] == pytest.approx(norm)
    assert row["share"] == pytest.approx(norm / linear.weight.norm().item())
    values = torch.linalg.svdvals(delta.delta_weight()).square()
    assert row["top"] == pytest.approx((values[0] / values.sum()).item())


def test_a_folder_says_what_the_attached_adapter_says(tmp_path):
    tuned = adapted("lora", "llama")
    tuned.save(tmp_path)
    attached, stored = examine(tuned).table, examine(tmp_path, tuned.base).table
    for column in ("numbers", "rank", "scale", "norm", "share", "top"):
        assert sorted(stored[column]) == pytest.approx(sorted(attached[column]))


def test_an_untrained_adapter_computes_its_base():
    for method in (LoRA(r=2), IA3()):
        found = examine(attach(tiny("gpt2"), method))
        assert "every update is zero" in symptoms(found)
        assert len(found.findings) == 1


def test_one_place_that_was_not_trained_is_named():
    tuned = adapted("lora", "gpt2")
    with torch.no_grad():
        tuned.deltas["layers.1.v"].B.zero_()
    [finding] = examine(tuned).findings
    assert finding.place == "layers.1.v" and "not elsewhere" in finding.symptom


def test_rows_of_zeros_are_directions_that_are_not_used():
    tuned = adapted("lora", "gpt2")
    with torch.no_grad():
        tuned.deltas["layers.0.q"].A[1:].zero_()
    [finding] = examine(tuned).findings
    assert finding.place == "layers.0.q" and "1 of 3 directions" in finding.symptom


def test_a_scale_of_zero_and_one_that_was_left_behind():
    assert "the scale is 0" in symptoms(examine(stir(attach(tiny("gpt2"), LoRA(r=2, alpha=0)))))
    small = stir(attach(tiny("gpt2"), LoRA(r=8, alpha=1)), size=0.01)
    assert "alpha / r = 0.125 is small" in symptoms(examine(small))
    large = stir(attach(tiny("gpt2"), LoRA(r=1, alpha=64)), size=0.001)
    assert "alpha / r = 64 is large" in symptoms(examine(large))


def test_an_update_larger_than_the_weight():
    assert "as large as the weight" in symptoms(examine(stir(put("lora", tiny("gpt2")), size=3.0)))


def test_numbers_that_are_not_finite(tmp_path):
    tuned = adapted("lora", "gpt2")
    tuned.save(tmp_path)
    with torch.no_grad():
        tuned.deltas["layers.0.q"].A[0, 0] = torch.nan
    [finding] = examine(tuned).findings
    assert finding.place == "layers.0.q: A" and "not finite" in finding.symptom
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = torch.inf
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "not finite" in symptoms(examine(tmp_path))  # `attach` refuses this folder


def test_tokens_that_the_base_does_not_have(tmp_path):
    adapted("prompt", "gpt2").save(tmp_path)
    record = tmp_path / "peftlab.json"
    config = json.loads(record.read_text())
    config["base_shape"]["vocab"] += 2
    record.write_text(json.dumps(config))
    [finding] = examine(tmp_path, tiny("gpt2")).findings
    assert "it was trained with" in finding.symptom


def test_no_folder_and_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        examine(tmp_path)
    tuned = adapted("lora", "gpt2")
    tuned.detach()
    with pytest.raises(RuntimeError, match="detached"):
        examine(tuned)
    assert "nothing acts" in symptoms(examine(tiny("gpt2").model))


# --- Hugging Face PEFT -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(**LORA),
        peft.LoraConfig(**LORA, use_dora=True),
        peft.AdaLoraConfig(target_modules=["c_attn"], init_r=4, total_step=9, fan_in_fan_out=True),
        peft.VeraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True),
        peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: config.peft_type.value.lower() + "_dora" * getattr(config, "use_dora", 0),
)
def test_a_sound_adapter_of_peft_has_no_finding(config, tmp_path):
    model = peft.get_peft_model(tiny("gpt2").model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape)
    assert not examine(model).findings, examine(model)
    model.save_pretrained(tmp_path)
    assert not examine(tmp_path, tiny("gpt2")).findings, examine(tmp_path, tiny("gpt2"))


def test_peft_and_its_folder_say_the_same(tmp_path):
    model = peft_model(alpha_pattern={"h.1.attn.c_attn": 16})
    model.save_pretrained(tmp_path)
    inside, stored = examine(model).table, examine(tmp_path, tiny("gpt2")).table
    for column in ("numbers", "rank", "scale", "norm", "share"):
        assert sorted(stored[column]) == pytest.approx(sorted(inside[column]))
    assert set(stored["scale"]) == {2.0, 4.0}


def test_targets_that_hit_few_layers():
    layers = len(tiny("gpt2").model.transformer.h)
    found = examine(peft_model(layers_to_transform=[0]))
    assert f"it acts in 1 of {layers} layers" in symptoms(found)
    assert found.reach == {"c_attn": (1, layers)}
    assert f"c_attn 1 of {layers}" in str(found)


def test_peft_untrained_and_switched_off():
    assert "every update is zero" in symptoms(examine(peft_model(stirred=False)))
    model = peft_model()
    with model.disable_adapter():
        assert "switched off" in symptoms(examine(model))
    assert not examine(model).findings


def test_what_trains_but_is_not_saved():
    model = peft_model()
    model.get_input_embeddings().weight.requires_grad_(True)
    [finding] = examine(model).findings
    assert "folder will not have it" in finding.symptom and "wte.weight" in finding.place
    assert not examine(peft_model(trainable_token_indices=[3])).findings
    assert not examine(peft_model(modules_to_save=["ln_f"])).findings


def test_a_new_head_that_stays_frozen():
    config = tiny("gpt2").model.config
    config.num_labels, config.pad_token_id = 3, 0
    for task, frozen in ((None, True), ("SEQ_CLS", False)):
        model = AutoModelForSequenceClassification.from_config(config)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=task, **LORA))
        assert ("a new head that is frozen" in symptoms(examine(model))) == frozen


def test_factors_in_float16():
    model = peft_model().half()
    assert "float16" in symptoms(examine(model))


def test_adapters_that_are_small_networks_say_their_norm():
    tuned = adapted("houlsby", "gpt2")
    assert isinstance(tuned.methods[0], HoulsbyAdapter) and CASES["houlsby"]
    assert (examine(tuned).table["norm"] > 0).all()
