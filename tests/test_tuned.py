"""Attaching and what an adapted base offers, beside what the property suite proves."""

import copy
import json

import pytest
import torch
from models import (
    CASES,
    FAMILIES,
    adapted,
    call,
    hook_count,
    stir,
    surroundings,
    tiny,
    token_ids,
)
from safetensors.torch import load_file, save_file

import peftlab
from peftlab import IA3, NF4, FullFineTuning, LoRA, PromptTuning, QLoRA, attach
from peftlab.bases import CLASSES
from peftlab.training import move
from peftlab.tuned.identity import numbers_of

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=FAMILIES)
def base(request):
    return tiny(request.param)


def test_the_sites_reached_are_named(base):
    tuned = attach(base, [LoRA(target_modules=["v", "q"]), PromptTuning(3)])
    linears = [n for n in base.anatomy.linears if n.endswith((".q", ".v"))]
    if base.kind != "encoder-decoder":
        assert linears == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    assert tuned.sites == [*linears, "input_embeddings"]
    assert list(tuned.deltas) == linears
    assert set(tuned.trainable) == {
        "prompt_tuning.prompt",
        *(f"lora.{name}.{factor}" for name in linears for factor in "AB"),
    }
    assert tuned.label == "LoRA + Prompt tuning"
    assert (tuned.virtual_tokens, tuned.context) == (3, 45)
    assert f"{len(linears) + 1} sites" in repr(tuned) and f"{tuned.count().parameters:,}" in repr(
        tuned
    )


def test_all_linear_is_every_target(base):
    tuned = attach(base, LoRA(target_modules="all-linear"))
    assert tuned.sites == list(base.anatomy.linears)


def test_a_target_named_twice_is_one_target(base):
    assert LoRA(target_modules=["q", "q", "v"]) == LoRA()
    assert attach(base, LoRA(target_modules=["q", "q"])).count().measured > 0


def test_the_count_in_percent_and_bytes(base):
    count = attach(base, PromptTuning(4)).count()
    assert (count.parameters, count.stored, count.file_bytes) == (96, 96, 384)
    assert count.percent == 100 * 96 / sum(p.numel() for p in base.model.parameters())


def test_a_saved_adapter_is_safetensors_and_json(base, tmp_path):
    """PEFT's two files where it knows the method, and beside them what was trained on what."""
    tuned = stir(attach(base, LoRA(r=2)))
    folder = tuned.save(tmp_path / "deep" / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "peftlab.json",
    ]
    assert all(key.startswith("base_model.model.") for key in load_file(folder / WEIGHTS))
    theirs = json.loads((folder / "adapter_config.json").read_text())
    assert theirs["peft_type"] == "LORA" and theirs["base_model_name_or_path"] == base.name
    written = json.loads((folder / "peftlab.json").read_text())
    assert written["methods"] == [
        {
            "method": "lora",
            "r": 2,
            "alpha": 16,
            "target_modules": ["q", "v"],
            "dropout": 0.0,
            "use_rslora": False,
            "loraplus_lr_ratio": 1.0,
            "fused": False,
        }
    ]
    assert written["base_numbers"] == numbers_of(base)
    state, first = tuned.state(), load_file(folder / WEIGHTS)
    tuned.merge()  # saving a merged adapter saves the same factors
    again = load_file(tuned.save(tmp_path / "merged") / WEIGHTS)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    tuned.detach()
    loaded = attach(base, folder).state()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_what_peft_does_not_know_is_saved_under_our_names(base, tmp_path):
    """Also over an adapter that was in PEFT's layout, and the other way round."""
    for methods in (LoRA(r=2), [LoRA(r=2), PromptTuning(3)], LoRA(r=2), FullFineTuning()):
        tuned = stir(attach(base, methods))
        state, folder = tuned.state(), tuned.save(tmp_path)
        known = methods == LoRA(r=2)
        assert (folder / "peftlab.json").exists() == known
        assert (load_file(folder / WEIGHTS).keys() == state.keys()) != known
        described = json.loads((folder / "adapter_config.json").read_text())
        assert ("peft_type" in described) == known and ("methods" in described) != known
        tuned.detach()
        with attach(base, folder) as loaded:
            assert all(torch.equal(loaded.state()[name], t) for name, t in state.items())


def test_an_adapter_saved_before_there_was_a_layout_of_pefts_still_loads(base, tmp_path):
    """Format 1: our names in the tensors' file, the methods in the configuration."""
    tuned = stir(attach(base, LoRA(r=2)))
    state, folder = tuned.state(), tuned.save(tmp_path)
    written = json.loads((folder / "peftlab.json").read_text())
    (folder / "peftlab.json").unlink()
    tuned.detach()
    del written["base_numbers"], written["digest"]
    written |= {"format": 1, "base_digest": base.digest}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file(state, folder / WEIGHTS)
    loaded = attach(base, folder)
    assert loaded.methods == [LoRA(r=2)]
    assert all(torch.equal(loaded.state()[name], tensor) for name, tensor in state.items())


def test_a_float64_adapter_loads_onto_float32_rounded(tmp_path):
    """Types follow the base: the tensors are those of the file, rounded once."""
    tuned = adapted("lora", "llama", torch.float64)
    folder = tuned.save(tmp_path)
    assert all(t.dtype == torch.float64 for t in load_file(folder / WEIGHTS).values())
    loaded = attach(tiny("llama"), folder)
    for name, tensor in tuned.state().items():
        assert torch.equal(loaded.trainable[name], tensor.float())


def test_methods_on_one_site_are_refused(base):
    before = (base.fingerprint(), hook_count(base.model))
    for methods, words in (
        ([LoRA(), LoRA(r=2, target_modules=["v"])], "same site, .*layers.0.*v"),
        ([PromptTuning(3), PromptTuning(4)], "same site, input_embeddings"),
        ([FullFineTuning(), LoRA()], "composes with no other"),
        ([LoRA(), FullFineTuning()], "composes with no other"),
        ([], "no method"),
    ):
        with pytest.raises(ValueError, match=words):
            attach(base, methods)
        assert base.adapted_by is None
        assert (base.fingerprint(), hook_count(base.model)) == before
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    attach(base, [LoRA(), LoRA(r=2, target_modules=["o"])])  # different sites compose


def test_a_parameter_that_trains_unasked_is_found_and_nothing_stays(base):
    stray = next(base.model.parameters())
    stray.requires_grad_(True)
    hooks = hook_count(base.model)
    with pytest.raises(AssertionError, match="trains, but no method asked for it"):
        attach(base, LoRA())
    assert base.adapted_by is None and hook_count(base.model) == hooks


def test_lora_and_prompt_do_what_each_does_alone():
    """Composed, with one of the two at its neutral start or absent, it is the other."""
    ids = token_ids(2, 6)
    composed = attach(tiny("gpt2"), [LoRA(), PromptTuning(4, "text", "abcd")])
    alone = attach(tiny("gpt2"), PromptTuning(4, "text", "abcd"))
    assert torch.equal(composed(ids), alone(ids))  # B is zero
    stir(composed)
    with torch.no_grad():
        composed.prompt.copy_(alone.prompt)
    lora = attach(tiny("gpt2"), LoRA())
    lora.load_state({name: t for name, t in composed.state().items() if name.startswith("lora")})
    words = lora.tokenizer("abcd")["input_ids"]
    joined = torch.cat([torch.tensor(words).expand(2, -1), ids], dim=1)
    # The virtual tokens are those words, so LoRA alone that reads them says the same.
    assert torch.equal(composed(ids), lora(joined)[:, 4:])


def test_as_a_context_manager(base):
    before = base.fingerprint()
    with pytest.raises(RuntimeError, match="inside"), attach(base, FullFineTuning()) as tuned:
        stir(tuned)
        raise RuntimeError("inside")
    assert base.fingerprint() == before and base.adapted_by is None
    base.detach()  # nothing to do
    attach(base, LoRA())
    base.detach()
    assert base.adapted_by is None


@pytest.mark.parametrize("case", ["full", "lora", "prompt"])
def test_what_was_detached_can_no_longer_change_or_claim_the_base(case, tmp_path):
    tuned = adapted(case, "gpt2")
    state = tuned.state()
    base = tuned.detach()
    before = base.fingerprint()
    for act in (tuned.merge, lambda: tuned.load_state(state), lambda: tuned.save(tmp_path)):
        with pytest.raises(RuntimeError, match="was detached"):
            act()
    newer = attach(base, LoRA())
    tuned.detach()  # the old one's goodbye does not take the new one off
    assert base.adapted_by is newer and newer.sites
    newer.detach()
    assert base.fingerprint() == before


def test_moving_keeps_the_parameter_objects():
    tuned = adapted("lora", "gpt2")
    objects = {name: id(parameter) for name, parameter in tuned.trainable.items()}
    move(tuned, "cpu")
    assert {name: id(parameter) for name, parameter in tuned.trainable.items()} == objects


def test_the_prompt_is_where_it_says(base):
    tuned = attach(base, PromptTuning(4))
    assert tuned.prompt is tuned.trainable["prompt_tuning.prompt"]
    tuned.detach()
    with pytest.raises(AttributeError, match="LoRA has no prompt"):
        attach(base, LoRA()).prompt  # noqa: B018


def test_a_vocabulary_larger_than_the_embedding_is_drawn_from_the_embedding(base):
    """Some tokenizers have had tokens added that the model never got."""
    base.tokenizer.add_tokens([f"<extra {i}>" for i in range(2000)])
    tuned = attach(base, PromptTuning(40))
    table = base.anatomy.embedding.weight
    assert (tuned.prompt[:, None] == table).all(dim=2).any(dim=1).all()


def test_methods_survive_their_description():
    for case in CASES.values():
        for method in case.methods:
            described = json.loads(json.dumps(method.to_dict()))
            assert type(method).from_dict(described) == method


# A plain folder --------------------------------------------------------------------------------

PARTLY = [NF4(8, target_modules=["q", "up"]), LoRA(r=2, target_modules="all-linear")]

EXPORTED = [(f, c) for f in FAMILIES for c in ("lora", "lora + ia3", "full", "prune + lora")]
EXPORTED += [("gpt2", c) for c in ("lora fused", "dora all", "pissa", "bitfit", "prune + full")]
EXPORTED += [("llama", c) for c in ("lora all", "vera", "adalora", "layer norm")]


@pytest.mark.parametrize("family, case", EXPORTED)
def test_a_merged_model_is_exported_and_what_is_attached_stays_as_it_was(family, case, tmp_path):
    """transformers reads the merged weights bit for bit, and so gives the merged logits."""
    tuned = adapted(case, family)
    base, ids = tuned.base, token_ids(2, 7)
    before = surroundings(base)
    with torch.no_grad():
        beside = call(tuned, ids)
        if CASES[case].merges:
            tuned.merge()
        merged = call(tuned, ids)
    inside = {name: t.clone() for name, t in base.model.state_dict().items()}
    tuned.unmerge()

    folder = tuned.merge_and_export(tmp_path / "plain")
    assert not tuned.merged and surroundings(base) == before
    with torch.no_grad():
        assert torch.equal(call(tuned, ids), beside)
    assert (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
    plain = CLASSES[base.kind].from_pretrained(folder)
    assert all(torch.equal(t, inside[name]) for name, t in plain.state_dict().items())
    loaded = peftlab.load(folder)
    with torch.no_grad():
        assert torch.equal(call(loaded, ids), merged)
    assert loaded.tokenizer("ab>")["input_ids"] == base.tokenizer("ab>")["input_ids"]

    if CASES[case].merges:
        tuned.merge()
        tuned.merge_and_export(tmp_path / "again")
        assert tuned.merged  # as it was
        again = load_file(tmp_path / "again" / "model.safetensors")
        first = load_file(folder / "model.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("methods", [QLoRA(r=3, block_size=8), PARTLY, NF4(8)])
def test_of_codes_the_numbers_are_exported(family, methods, tmp_path):
    """W̃ + ΔW, not rounded again, where merging would round. Logits as in the tests of merging:
    twice 4 E, with E the exported model's own distance from its float64 twin."""
    tuned = stir(attach(tiny(family), methods))
    before, ids, codes = surroundings(tuned.base), token_ids(2, 7), dict(tuned.codes)
    with torch.no_grad():
        wanted = call(tuned, ids)
    loaded = peftlab.load(tuned.merge_and_export(tmp_path))
    assert all(tuned.codes[name] is kept for name, kept in codes.items())
    after = surroundings(tuned.base)
    assert after.keys() == before.keys()
    assert all(after[k] == v for k, v in before.items()) and not tuned.merged
    with torch.no_grad():
        assert torch.equal(call(tuned, ids), wanted)
        for name, delta in tuned.deltas.items():
            summed = tuned.anatomy.linears[name].weight + delta.delta_weight()
            assert torch.equal(loaded.anatomy.linears[name].weight, summed)
        logits, double = call(loaded, ids), copy.deepcopy(loaded)
        double.model.double()
        E = (logits.double() - call(double, ids)).abs().max()
        assert (logits - wanted).abs().max() <= 8 * E
    if tuned.deltas:
        tuned.merge(requantise=True)  # now the sum is in the codes, and so it is what they say
        merged = peftlab.load(tuned.merge_and_export(tmp_path / "again"))
        with torch.no_grad():
            assert (call(merged, ids) - call(tuned, ids)).abs().max() <= 8 * E
        assert tuned.merged


def test_a_scale_on_codes_is_not_exported(tmp_path):
    tuned = attach(tiny("llama"), [NF4(8), IA3()])
    with pytest.raises(ValueError, match="k cannot be merged into codes"):
        tuned.merge_and_export(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    "family, case, words",
    [
        ("gpt2", "prompt", "input_embeddings cannot be merged: it has no ΔW"),
        ("llama", "prefix", "cannot be merged: it has no ΔW"),
        ("llama", "houlsby", "cannot be merged: it has no ΔW"),
        ("llama", "lora + prompt", "cannot be merged: it has no ΔW"),
        ("llama", "nf4 + prefix", "cannot be merged: it has no ΔW"),
        ("llama", "smaller + lora", "differ in size.*cannot be exported"),
        ("llama", "smaller + full", "differ in size.*cannot be exported"),
        ("bert", "head lora", "a head is no part of a transformers model"),
    ],
)
def test_what_cannot_be_exported(family, case, words, tmp_path):
    tuned = adapted(case, family)
    before, ids = surroundings(tuned.base), token_ids(2, 7)
    with torch.no_grad():
        wanted = call(tuned, ids)
    with pytest.raises(ValueError, match=words):
        tuned.merge_and_export(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    assert surroundings(tuned.base) == before and not tuned.merged
    with torch.no_grad():
        assert torch.equal(call(tuned, ids), wanted)
    tuned.detach()
    with pytest.raises(RuntimeError, match="was detached"):
        tuned.merge_and_export(tmp_path / "plain")


def test_an_export_that_fails_leaves_nothing_merged(tmp_path):
    tuned = adapted("lora", "llama")
    before = surroundings(tuned.base)
    (tmp_path / "taken").write_text("")
    with pytest.raises(Exception):  # noqa: B017  (whatever writing a file over it raises)
        tuned.merge_and_export(tmp_path / "taken" / "plain")
    assert not tuned.merged and surroundings(tuned.base) == before
