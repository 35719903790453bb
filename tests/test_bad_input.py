"""Whatever is wrong, one clear error says what and what is allowed, and the base is untouched."""

import json
import math
import os
import pickle

import pytest
import torch
from models import (
    CONTEXT,
    FAMILIES,
    adapted,
    call,
    config,
    decoder_ids,
    hf_model,
    hook_count,
    letters,
    stir,
    surroundings,
    tiny,
    token_ids,
    tokenizer,
)
from safetensors.torch import load_file, save_file

import peftlab
from peftlab import (
    AdaLoRA,
    BitFit,
    DeepPromptTuning,
    DoRA,
    FullFineTuning,
    LayerNormTuning,
    LoRA,
    PiSSA,
    PrefixTuning,
    PromptAndPrefix,
    PromptTuning,
    Prune,
    PTuning,
    PTuningV2,
    VeRA,
    attach,
)
from peftlab.bases import CLASSES, Base
from peftlab.methods import Method
from peftlab.methods.heads import Tagging

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD = "peftlab.json"  # says what CONFIG says, where CONFIG is PEFT's


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def base(family):
    """A base that must be as it was, with nothing attached, when the test is over."""
    base = tiny(family)
    before, output = surroundings(base), call(base, token_ids(2, 5))
    yield base
    assert surroundings(base) == before
    assert torch.equal(call(base, token_ids(2, 5)), output)


@pytest.mark.parametrize("method", [FullFineTuning(), BitFit(), LayerNormTuning()])
def test_float16_is_not_trained_in_place(method):
    base = tiny("gpt2", torch.float16)
    before = surroundings(base)
    with pytest.raises(ValueError, match="in float16, in which steps .* load the base in float32"):
        attach(base, method)
    assert surroundings(base) == before and base.adapted_by is None
    attach(base, LoRA(r=2, alpha=4)).detach()  # trains its own numbers, in float32


# Hyper-parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 0}, "r=0: allowed is at least 1"),
        ({"r": -4}, "r=-4: allowed is at least 1"),
        ({"r": 2.5}, "r=2.5: a whole number is needed"),
        ({"r": "8"}, "r='8': a whole number is needed"),
        ({"r": True}, "r=True: a whole number is needed"),
        ({"r": None}, "r=None: a whole number is needed"),
        ({"alpha": -1}, "alpha=-1: allowed is at least 0"),
        ({"alpha": math.nan}, "alpha=nan: allowed is at least 0"),
        ({"alpha": "16"}, "alpha='16': a number is needed"),
        ({"dropout": -0.1}, "dropout=-0.1: allowed is 0.0 to 1.0"),
        ({"dropout": 1.5}, "dropout=1.5: allowed is 0.0 to 1.0"),
        ({"target_modules": ()}, r"target_modules=\(\): give a list"),
        ({"target_modules": None}, "target_modules=None: give a list"),
        ({"target_modules": "q"}, "target_modules='q': give a list.*or 'all-linear'"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_lora_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        LoRA(**options)


@pytest.mark.parametrize(
    "method, options, words",
    [
        (LoRA, {"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio=0.5: allowed is at least 1.0"),
        (DoRA, {"r": 0}, "r=0: allowed is at least 1"),
        (DoRA, {"alpha": -1}, "alpha=-1: allowed is at least 0"),
        (DoRA, {"dropout": 2}, "dropout=2: allowed is 0.0 to 1.0"),
        (DoRA, {"target_modules": "q"}, "target_modules='q': give a list.*or 'all-linear'"),
        (PiSSA, {"r": 0}, "r=0: allowed is at least 1"),
        (PiSSA, {"alpha": 0}, "alpha=0: allowed is above 0"),
        (VeRA, {"r": 0}, "r=0: allowed is at least 1"),
        (VeRA, {"d_initial": 0}, "d_initial=0: allowed is above 0"),
        (VeRA, {"projection_prng_key": -1}, "projection_prng_key=-1: allowed is at least 0"),
        (VeRA, {"target_modules": []}, r"target_modules=\[\]: give a list"),
        (AdaLoRA, {"init_r": 0}, "init_r=0: allowed is at least 1"),
        (AdaLoRA, {"target_r": 13}, "target_r=13: allowed is 1 to 12"),
        (AdaLoRA, {"beta1": 1.5}, "beta1=1.5: allowed is 0.0 to 1.0"),
        (AdaLoRA, {"start": 0.5, "end": 0.4}, "end=0.4: allowed is 0.5 to 1.0"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_the_lora_family_refuses(method, options, words):
    with pytest.raises(ValueError, match=words):
        method(**options)


@pytest.mark.parametrize(
    "method, words",
    [
        (LoRA(r=99), r"r=99 at .*: allowed is 1 to"),
        (DoRA(r=99), r"r=99 at .*: allowed is 1 to"),
        (PiSSA(r=99), r"r=99 at .*: allowed is 1 to"),
        (AdaLoRA(init_r=99), r"init_r=99 at .*: allowed is 1 to"),
        (DoRA(target_modules=["x"]), "unknown target 'x': this model has q, k, v, o"),
        (VeRA(target_modules=["q", "head"]), "unknown target 'head'"),
    ],
)
def test_the_lora_family_does_not_fit(base, method, words):
    with pytest.raises(ValueError, match=words):
        attach(base, method)


def test_nothing_is_fused_here(base):
    """One A for several targets needs several targets in one matrix."""
    everything = LoRA(r=2, target_modules="all-linear", fused=True)
    if base.anatomy.family == "gpt2":
        attach(base, everything).detach()
        method, words = LoRA(fused=True, target_modules=["q", "o"]), "gpt2 holds q, k, v in one"
    else:
        method, words = everything, f"{base.anatomy.family} has none in common"
    with pytest.raises(ValueError, match=f"two targets in one matrix are needed, and {words}"):
        attach(base, method)
    with pytest.raises(ValueError, match=words):
        peftlab.count(method, base.model.config)


@pytest.mark.parametrize("others", [[LoRA(target_modules=["k"])], [DoRA(), LoRA(r=2)]])
def test_a_weight_takes_one_delta(others):
    """Also where the first holds q, k and v as one."""
    base = tiny("gpt2")
    before = surroundings(base)
    methods = [LoRA(r=2, target_modules=["q", "k", "v"], fused=True), *others]
    with pytest.raises(ValueError, match="two methods want the same site, layers.0"):
        attach(base, methods if len(others) == 1 else others)
    assert surroundings(base) == before


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0: allowed is at least 1"),
        ({"num_virtual_tokens": -1}, "num_virtual_tokens=-1"),
        ({"num_virtual_tokens": 1.5}, "num_virtual_tokens=1.5: a whole number is needed"),
        ({"init": "zeros"}, "init='zeros': allowed is vocabulary, text, random, normal, zero"),
        ({"init": "text"}, 'init="text" and a non-empty init_text go together'),
        ({"init": "text", "init_text": ""}, "go together"),
        ({"init": "random", "init_text": "Sort:"}, "go together"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_prompt_tuning_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        PromptTuning(**options)


def test_a_rank_above_the_matrix(base):
    """The allowed range is named with the place; a rank that just fits is fine."""
    for target in base.anatomy.targets:
        linear = base.anatomy.select((target,))[0]
        most = min(linear.d_in, linear.d_out)
        method = LoRA(r=most + 1, target_modules=[target])
        with pytest.raises(ValueError, match=rf"r={most + 1} at .*0.{target} .*1 to {most}$"):
            attach(base, method)
        with pytest.raises(ValueError, match=f"r={most + 1} at {target} .*1 to {most}$"):
            method.parameters(base.anatomy.shape)
        attach(base, LoRA(r=most, target_modules=[target])).detach()


@pytest.mark.parametrize("target", ["query", "c_attn", "q_proj", "", "Q"])
def test_an_unknown_target(base, target):
    for act in (
        lambda: attach(base, LoRA(target_modules=["q", target])),
        lambda: LoRA(target_modules=["q", target]).parameters(base.anatomy.shape),
    ):
        with pytest.raises(
            ValueError, match=f"unknown target '{target}'.*has q, k, v, o, up, down"
        ):
            act()


@pytest.mark.parametrize(
    "kind, options, words",
    [
        *(
            (kind, options, words)
            for kind in (PrefixTuning, PTuningV2)
            for options, words in (
                ({"num_virtual_tokens": 0}, "num_virtual_tokens=0: allowed is at least 1"),
                ({"num_virtual_tokens": 2.0}, "num_virtual_tokens=2.0: a whole number is needed"),
                ({"encoder_hidden_size": 0}, "encoder_hidden_size=0: allowed is at least 1"),
                ({"encoder_hidden_size": "512"}, "encoder_hidden_size='512': a whole number"),
                ({"init": "normal"}, "init='normal': allowed is vocabulary, text, random, zero"),
                ({"init": "text"}, "non-empty init_text go together"),
                ({"init_text": "Sort:"}, "non-empty init_text go together"),
                (
                    {"init": "text", "init_text": "a", "prefix_projection": True},
                    "needs prefix_projection=False",
                ),
            )
        ),
        (PTuningV2, {"depth": 0}, "depth=0: allowed is at least 1"),
        (PTuningV2, {"depth": -1}, "depth=-1: allowed is at least 1"),
        (PTuningV2, {"depth": 1.5}, "depth=1.5: a whole number is needed"),
        (PTuningV2, {"depth": True}, "depth=True: a whole number is needed"),
        (PTuning, {"num_virtual_tokens": 0}, "num_virtual_tokens=0: allowed is at least 1"),
        (PTuning, {"encoder": "gru"}, "encoder='gru': allowed is lstm, mlp, attention, embedding"),
        (PTuning, {"sizes": "large"}, "sizes='large': allowed is lama, few-shot, peft"),
        (PTuning, {"encoder_num_layers": 0}, "encoder_num_layers=0: allowed is at least 1"),
        (PTuning, {"encoder_hidden_size": 5}, 'is an option of sizes="peft"'),
        (PTuning, {"sizes": "peft", "encoder_hidden_size": 0}, "encoder_hidden_size=0: allowed"),
        (PTuning, {"sizes": "peft", "encoder": "attention"}, "has no attention encoder"),
        (PTuning, {"init": "text"}, "non-empty init_text go together"),
        (
            PTuning,
            {"placement": [(4, "front")]},
            "placement has 4 virtual tokens, num_virtual_tokens=9",
        ),
        (PTuning, {"placement": []}, "placement has 0 virtual tokens"),
        (PTuning, {"placement": [(0, "front"), (9, "back")]}, "a count of placement=0: allowed"),
        (PTuning, {"placement": [(9, "middle")]}, "'middle': allowed is front, back, 'before X'"),
        (PTuning, {"placement": [(9, "before")]}, "'before': allowed is front, back"),
        *(
            (kind, {"num_virtual_tokens": 0}, "num_virtual_tokens=0: allowed is at least 1")
            for kind in (DeepPromptTuning, PromptAndPrefix)
        ),
        *(
            (
                kind,
                {"init": "ones"},
                "init='ones': allowed is vocabulary, text, random, normal, zero",
            )
            for kind in (DeepPromptTuning, PromptAndPrefix, PTuning)
        ),
        (PromptAndPrefix, {"encoder_hidden_size": -2}, "encoder_hidden_size=-2: allowed"),
        (PromptAndPrefix, {"encoder_hidden_size": 2**16 + 1}, "allowed is .*65536"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_soft_prompts_refuse(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(**options)


@pytest.mark.parametrize(
    "placement", ["front", [9], ["front"], [(9,)], [(9, "front", 1)], 9, [(9, 3)], [("9", "front")]]
)
@pytest.mark.usefixtures("untyped")
def test_a_placement_that_is_no_list_of_pairs(placement):
    with pytest.raises(
        ValueError, match="placement=.*: give .count, where. pairs|a count of placement='9'"
    ):
        PTuning(9, placement=placement)


def test_soft_prompts_that_do_not_fit_the_base(base):
    layers = max(base.anatomy.shape.layers, base.anatomy.shape.decoder_layers)
    several = [(2, "before ab")]
    for method, words in (
        (PTuningV2(3, depth=layers + 1), f"depth={layers + 1}: .* allows 1 to {layers}"),
        (PTuning(CONTEXT), f"has 48 positions, so allowed is 1 to {CONTEXT - 1}"),
        (DeepPromptTuning(CONTEXT), f"has 48 positions, so allowed is 1 to {CONTEXT - 1}"),
        (PromptAndPrefix(CONTEXT), f"has 48 positions, so allowed is 1 to {CONTEXT - 1}"),
        (PrefixTuning(CONTEXT, shift_positions=True), "has 48 positions, one at least for"),
    ):
        for act in (
            lambda method=method: attach(base, method),
            lambda method=method: method.parameters(base.anatomy.shape),
        ):
            with pytest.raises(ValueError, match=words):
                act()
    with pytest.raises(ValueError, match="'ab' is 2 tokens of tiny-.*: one is needed"):
        attach(base, PTuning(2, placement=several))
    back = PTuning(2, "mlp", placement=[(2, "back")])
    if base.kind == "decoder":
        with pytest.raises(ValueError, match="nothing can stand behind a text that goes on"):
            attach(base, back)
    else:
        attach(base, back).detach()
    if base.kind != "encoder":
        with pytest.raises(ValueError, match=f"a head goes on an encoder; {base.name} is a"):
            attach(base, PrefixTuning(2), head=Tagging(("O", "B")))
    for pair in (
        [PrefixTuning(2), PTuningV2(3)],
        [PromptTuning(2), PTuning(3)],
        [PromptAndPrefix(2), PrefixTuning(2)],
        [PrefixTuning(2), PrefixTuning(2)],
    ):
        with pytest.raises(ValueError, match="two methods want the same site"):
            attach(base, pair)


def test_a_text_without_the_token_of_a_placement(base):
    tuned = attach(base, PTuning(2, "mlp", placement=[(2, "after >")]))
    ids = token_ids(3, 5)
    ids[1] = 3
    with pytest.raises(ValueError, match="row 1 has no token 30 to put virtual tokens at"):
        call(tuned, ids)
    call(tuned, token_ids(3, 5))
    tuned.detach()


def test_gate_is_not_on_gpt2():
    base = tiny("gpt2")
    with pytest.raises(
        ValueError, match="unknown target 'gate': this model has q, k, v, o, up, down"
    ):
        attach(base, LoRA(target_modules=["gate"]))
    attach(tiny("llama"), LoRA(target_modules=["gate"]))


@pytest.mark.parametrize("count", [CONTEXT, CONTEXT + 1, 10_000])
def test_a_prompt_as_long_as_the_context(base, count):
    method = PromptTuning(count)
    for act in (lambda: attach(base, method), lambda: method.parameters(base.anatomy.shape)):
        with pytest.raises(ValueError, match=f"{count}.*has 48 positions, so allowed is 1 to 47"):
            act()


@pytest.mark.usefixtures("untyped")
def test_an_unknown_method_or_hyper_parameter_in_a_description():
    for described, words in (
        (
            {"method": "magic"},
            "unknown method 'magic': known are .*full_fine_tuning, .*lora",
        ),
        ({"r": 8}, "unknown method None"),
        ({"method": "lora", "rank": 8}, "bad hyper-parameters for lora.*rank"),
        ("lora", "described by a dict, not by 'lora'"),
    ):
        with pytest.raises(ValueError, match=words):
            Method.from_dict(described)


# Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, room", [(None, CONTEXT), (LoRA(), CONTEXT), (PromptTuning(40), CONTEXT - 40)]
)
def test_a_batch_that_does_not_fit(base, method, room):
    model = base if method is None else attach(base, method)
    words = f"tokens do not fit: .* has room for {room}" + (" after 40" if room < CONTEXT else "$")
    call(model, token_ids(2, room))
    with pytest.raises(ValueError, match=f"{room + 1} {words}"):
        call(model, token_ids(2, room + 1))
    if base.kind == "encoder":
        base.detach()
        return
    if base.kind == "encoder-decoder":  # the gap and the end of text are in the input
        with pytest.raises(ValueError, match=f"{room + 1} {words}"):
            model.generate(["a", "b" * (room - 1)], max_new_tokens=4)
        assert len(model.generate(["b" * (room - 2)], max_new_tokens=4)) == 1
        base.detach()
        return
    with pytest.raises(ValueError, match=f"{room + 1} {words}"):
        model.generate(["a", "b" * (room - 3)], max_new_tokens=4)
    with pytest.raises(ValueError, match=f"{room + 2} {words}"):
        model.loss(["short", "b" * (room + 2)])
    assert len(model.generate(["b" * (room - 4)], max_new_tokens=4)) == 1
    base.detach()


def test_a_training_example_that_does_not_fit(base):
    task = letters()
    task.train[3] = type(task.train[3])("a" * CONTEXT, "b")
    for method, room in (
        (LoRA(), CONTEXT),
        (PromptTuning(40), CONTEXT - 40),
        (FullFineTuning(), 48),
    ):
        tuned = attach(base, method)
        tokens = {"decoder": 50, "encoder": 51, "encoder-decoder": 50}[base.kind]
        with pytest.raises(ValueError, match=f"{tokens} tokens, only {room} fit"):
            peftlab.train(tuned, task, steps=8, progress=False, evaluate=False)
        tuned.detach()


def test_empty_prompts_and_texts(base):
    if base.kind == "encoder":
        with pytest.raises(ValueError, match="fills gaps and does not generate"):
            base.generate(["ab"])
    for prompts in ([""], ["ab", ""]) if base.kind != "encoder" else ():
        with pytest.raises(ValueError, match="empty prompt"):
            base.generate(prompts)
    if base.kind != "decoder":
        with pytest.raises(ValueError, match="is no decoder: it does not predict running text"):
            base.loss(["ab"])
        return
    for texts in ([], [""], ["a"]):
        with pytest.raises(ValueError, match="no text has a second token"):
            base.loss(texts)


def test_a_merged_adapter_is_not_trained(base):
    tuned = stir(attach(base, LoRA()))
    tuned.merge()
    with pytest.raises(ValueError, match="merged: call unmerge"):
        peftlab.train(tuned, letters(), steps=1, progress=False)
    tuned.detach()
    with pytest.raises(RuntimeError, match="LoRA was detached"):
        peftlab.train(tuned, letters(), steps=1, progress=False)


# Bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-base", "someone/no-such-base", "/nowhere/at/all"])
def test_an_unknown_base_offline(name):
    with pytest.raises(FileNotFoundError, match=f"no base '{name}': peftlab ships .*tiny-gpt"):
        peftlab.load(name)


@pytest.mark.parametrize("kind", ["bloom", "mamba", "not-even-transformers-knows-it"])
def test_an_unknown_family(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"of the family '{kind}'; peftlab knows gpt2, llama"):
        peftlab.load(tmp_path)


def test_an_unknown_family_in_memory():
    import transformers

    small = transformers.BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=1)
    model = transformers.BloomForCausalLM(small)
    with pytest.raises(ValueError, match="'b' is of the family 'bloom'; peftlab knows gpt2, llama"):
        Base("b", model, tokenizer())


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        peftlab.load(tmp_path)


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", ""])
def test_a_damaged_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        peftlab.load(tmp_path)


@pytest.fixture
def saved(family, tmp_path):
    """A base on disk, to be damaged."""
    hf_model(family).save_pretrained(tmp_path)
    tokenizer(family).save_pretrained(tmp_path)
    return tmp_path


def test_a_list_in_a_file_that_nothing_reads(saved):
    """all-MiniLM-L6-v2 comes with one: the data that it was trained on."""
    (saved / "data_config.json").write_text("[]")
    assert peftlab.load(saved).model is not None
    (saved / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged: model.safetensors.index.json holds no obj"):
        peftlab.load(saved)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_damaged_weights(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    first = sorted(load_file(path))[0]
    for content in (whole[: len(whole) // 2], whole[:1000], b"", os.urandom(500)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            peftlab.load(saved)
    path.write_bytes(whole)
    rewrite(path, lambda tensors: tensors.pop(first))
    with pytest.raises(ValueError, match=f"is damaged: {first} is missing"):
        peftlab.load(saved)
    path.write_bytes(whole)
    rewrite(path, lambda tensors: tensors.update({first: torch.zeros(3)}))
    with pytest.raises(ValueError, match=f"is damaged: {first} is not of the size in config.json"):
        peftlab.load(saved)


def test_no_weights_or_no_tokenizer(saved):
    (saved / "model.safetensors").rename(saved / "kept")
    with pytest.raises(FileNotFoundError, match="no file named model.safetensors"):
        peftlab.load(saved)
    (saved / "kept").rename(saved / "model.safetensors")
    for path in saved.glob("tokenizer*"):
        path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="tokenizer"):
        peftlab.load(saved)


class Payload:
    """Unpickling it makes a folder: the sign that a pickle was read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_instead_of_weights_is_never_read(saved, family):
    trap = saved / "sprung"
    (saved / "model.safetensors").unlink()
    torch.save({"x": Payload(trap)}, saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no file named model.safetensors"):
        peftlab.load(saved)
    torch.save(hf_model(family).state_dict(), saved / "pytorch_model.bin")  # not even a good one
    with pytest.raises(FileNotFoundError, match="no file named model.safetensors"):
        peftlab.load(saved)
    (saved / "model.safetensors").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(ValueError, match="is damaged"):
        peftlab.load(saved)
    assert not trap.exists()


# Adapters -------------------------------------------------------------------------------------


@pytest.fixture(params=["full", "lora", "prompt", "lora + prompt", "prefix mlp", "p around"])
def adapter(request, base, tmp_path):
    """A good adapter of this base on disk, to be damaged."""
    tuned = adapted(request.param, base.anatomy.family)
    return tuned.save(tmp_path / "adapter")


def refused(base, folder, words, error=ValueError):
    with pytest.raises(error, match=words):
        attach(base, folder)
    assert base.adapted_by is None and hook_count(base.model) == 0


def test_no_adapter_there(base, tmp_path):
    refused(base, tmp_path / "nowhere", "no adapter_config.json in", FileNotFoundError)
    refused(base, str(tmp_path), "no adapter_config.json in", FileNotFoundError)
    (tmp_path / CONFIG).write_text("{}")
    refused(base, tmp_path, "no adapter_model.safetensors in", FileNotFoundError)


def test_damaged_tensors(base, adapter):
    path = adapter / WEIGHTS
    whole = path.read_bytes()
    trap = adapter / "sprung"
    pickled = pickle.dumps({"x": Payload(trap)})
    for content in (
        whole[:-4],
        whole[: len(whole) // 2],
        whole[:20],
        b"",
        os.urandom(800),
        pickled,
    ):
        path.write_bytes(content)
        refused(base, adapter, "is damaged")
    assert not trap.exists()
    path.unlink()
    (adapter / "adapter_model.bin").write_bytes(pickled)
    words = "no adapter_model.safetensors in .*adapter_model.bin there is a pickle.*Convert it"
    refused(base, adapter, words, FileNotFoundError)
    assert not trap.exists()


def test_other_tensors(base, adapter):
    path = adapter / WEIGHTS
    whole = path.read_bytes()
    first = sorted(load_file(path))[0]
    shape = tuple(load_file(path)[first].shape)
    for change, words in (
        (lambda t: t.pop(first), f"tensors do not match: {first}"),
        (lambda t: t.update({"a stranger": torch.zeros(2)}), "tensors do not match: a stranger"),
        (lambda t: t.update({first: torch.zeros(3, 7)}), f"{first} is .3, 7.; "),
        (lambda t: t.update({first: torch.zeros(())}), f"{first} is ..; "),
    ):
        rewrite(path, change)
        refused(base, adapter, words)
        path.write_bytes(whole)
    assert shape  # and the good one still loads
    attach(base, adapter).detach()


@pytest.mark.usefixtures("untyped")
def test_a_damaged_description(base, adapter):
    path = adapter / (RECORD if (adapter / RECORD).exists() else CONFIG)
    good, reads = json.loads(path.read_text()), 2 if path.name == RECORD else 1
    for text in ("", "{", "[]", "null", '"lora"', "\x00\xff"):
        path.write_text(text)
        refused(base, adapter, "is damaged")
    path.write_bytes(b"\xff\xfe\x00")
    refused(base, adapter, "is damaged")
    for key in good:
        path.write_text(json.dumps({k: v for k, v in good.items() if k != key}))
        refused(base, adapter, f"is damaged: {path.name} has no '{key}'")
    for change, words in (
        ({"format": 99}, f"is damaged: format 99; this peftlab reads {reads}"),
        ({"methods": [{"method": "magic"}]}, "is damaged: unknown method 'magic': known are"),
        ({"methods": [{"method": "lora", "rank": 3}]}, "is damaged: bad hyper-parameters for lora"),
        ({"methods": [{"method": "lora", "r": 0}]}, "is damaged: r=0: allowed is at least 1"),
        ({"methods": [{"method": "lora", "target_modules": 7}]}, "is damaged: target_modules=7"),
        ({"methods": "lora"}, "is damaged"),
        ({"methods": 3}, "is damaged"),
        ({"methods": []}, "no method"),
        ({"methods": [{"method": "lora", "r": 5, "target_modules": ["o"]}]}, "do not match|is "),
    ):
        path.write_text(json.dumps(good | change))
        refused(base, adapter, words)
    path.write_text(json.dumps(good))
    attach(base, adapter).detach()


def test_an_adapter_of_another_base(base, adapter):
    """Another family or shape, then the same shape with other weights."""
    family = base.anatomy.family
    other = tiny("llama" if family == "gpt2" else "gpt2")
    with pytest.raises(ValueError, match=f"trained on tiny-{family} .*; {other.name} is "):
        attach(other, adapter)
    assert other.adapted_by is None and hook_count(other.model) == 0
    with pytest.raises(ValueError, match=f"trained on other weights of tiny-{family}'s shape"):
        attach(tiny(family, seed=1), adapter)
    attach(base, adapter).detach()


def test_a_base_of_another_depth(base, tmp_path):
    family = base.anatomy.family
    deeper = config(family)
    depth = {"gpt2": "n_layer", "t5": "num_layers"}.get(family, "num_hidden_layers")
    layers = getattr(deeper, depth)
    setattr(deeper, depth, 4)
    model = CLASSES[base.kind].from_config(deeper)
    other = Base("deeper", model, tokenizer(family))
    attach(other, LoRA(r=2, target_modules="all-linear")).save(tmp_path)
    refused(base, tmp_path, f"trained on deeper .*'layers': 4.*'layers': {layers}")


# What others wrote -----------------------------------------------------------------------------


@pytest.fixture
def lora_folder(tmp_path):
    """A LoRA on a tiny GPT-2, in PEFT's layout with our record; its base."""
    tuned = adapted("lora", "gpt2")
    return tuned.save(tmp_path / "adapter"), tuned.detach()


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.fill_(math.nan), "numbers that are not finite in {}"),
        (lambda t: t.view(-1)[:1].fill_(-math.inf), "numbers that are not finite in {}"),
        (lambda t: t.double() * 1e300, "numbers that are not finite in {}"),
        (lambda t: t.to(torch.int32), "{} holds torch.int32; torch.float32 is needed"),
        (lambda t: t.bool(), "{} holds torch.bool"),
        (lambda t: t.to(torch.float8_e5m2), "{} holds torch.float8_e5m2"),
        (lambda t: t.to(torch.complex64), "{} holds torch.complex64"),
    ],
)
def test_tensors_that_are_no_numbers_to_compute_with(lora_folder, change, words, record):
    folder, base = lora_folder
    if not record:
        (folder / RECORD).unlink()
    for name in (sorted(load_file(folder / WEIGHTS))[0], sorted(load_file(folder / WEIGHTS))[-1]):
        whole = (folder / WEIGHTS).read_bytes()
        rewrite(folder / WEIGHTS, lambda t, name=name: t.update({name: change(t[name])}))
        refused(base, folder, words.format(name))
        (folder / WEIGHTS).write_bytes(whole)


def test_half_precision_is_a_number(lora_folder):
    folder, base = lora_folder
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file(
            {k: t.to(dtype) for k, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
        )
        refused(base, folder, f"{WEIGHTS} is not as it was written")
    (folder / RECORD).unlink()
    attach(base, folder).detach()


def test_a_head_alone_is_an_adapter_and_nothing_is_none(tmp_path):
    base, ids = tiny("bert"), token_ids(2, 5)
    tuned = stir(attach(base, [], head=Tagging(("O", "B"))))
    wanted = call(tuned, ids)
    tuned.save(tmp_path)
    tuned.detach()
    with attach(base, tmp_path) as again:
        assert torch.equal(call(again, ids), wanted)
    path = tmp_path / (RECORD if (tmp_path / RECORD).exists() else CONFIG)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"head": None}))
    refused(base, tmp_path, "no method and no head is in it")


def test_a_mask_of_another_kind_of_number(tmp_path):
    tuned = adapted("prune + lora", "llama")
    folder, base = tuned.save(tmp_path), tuned.detach()
    name = next(key for key in load_file(folder / WEIGHTS) if key.endswith("mask"))
    for dtype in (torch.bool, torch.int32, torch.float32):
        tensors = load_file(folder / WEIGHTS)
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / WEIGHTS)
        refused(base, folder, f"{name} holds {dtype}; torch.uint8 is needed")


@pytest.mark.parametrize(
    "case, edit",
    [
        ("prefix", {"num_virtual_tokens": 10**9}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 10**9}),
        ("houlsby", {"bottleneck": 10**9}),
        ("vera", {"r": 10**9}),
        ("prompt and prefix flat", {"encoder_hidden_size": 10**9}),
        ("p lama", {"encoder": "lstm", "encoder_num_layers": 10**9}),
        ("head lora", {"r": 10**9}),
        ("qlora", {"block_size": 10**9}),
        ("lora", {"alpha": 10**400}),
        ("lora", {"alpha": 1e308}),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_nothing_is_made_before_the_sizes_are_compared(case, edit, tmp_path, monkeypatch):
    """A file that declares more than it holds is refused at once."""
    tuned = adapted(case, "bert" if "head" in case else "gpt2")
    folder, base = tuned.save(tmp_path), tuned.detach()
    path = folder / (RECORD if (folder / RECORD).exists() else CONFIG)
    config = json.loads(path.read_text())
    config["methods"][0] |= edit
    path.write_text(json.dumps(config))
    monkeypatch.setattr(torch, "empty", None)  # no factor, table or network is made
    refused(base, folder, "in '.*' .*(json|float32)|allowed is")


@pytest.mark.parametrize(
    "key, value",
    [
        ("head", 5),
        ("head", [1]),
        ("head", "tagging"),
        ("head", {"head": 5}),
        ("head", {"head": "tagging", "labels": 5}),
        ("head", {"head": "tagging", "labels": [1, 2]}),
        ("head", {"head": "tagging", "labels": "abc"}),
        ("head", {"head": "spans", "labels": ["a", "b"]}),
        ("methods", [{"method": ["lora"]}]),
        ("methods", [{"method": "lora", "use_rslora": "no"}]),
        ("methods", [{"method": "lora", "target_modules": [1]}]),
        ("methods", [{"method": "lora", "alpha": math.inf}]),
        ("methods", [{"method": "prefix_tuning", "shift_positions": 1}]),
        ("methods", [{"method": "prompt_tuning", "init": "text", "init_text": 5}]),
        ("methods", [{"method": "houlsby", "bottleneck": 3, "sublayers": "mlp"}]),
        ("methods", [[[]]]),
        ("format", {}),
        ("base_shape", 3),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_values_of_another_type(lora_folder, key, value):
    folder, base = lora_folder
    config = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(config | {key: value}))
    refused(base, folder, "is damaged: |trained on")


@pytest.mark.parametrize("name", [RECORD, CONFIG])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1", "\ufeff[]", '{"a": 1e'])
def test_json_that_is_no_description(lora_folder, name, text):
    folder, base = lora_folder
    good = (folder / name).read_text()
    (folder / name).write_text(text, encoding="utf-8")
    refused(base, folder, f"is damaged: {name} (is no valid JSON|holds no object)")
    (folder / name).write_text("\ufeff" + good, encoding="utf-8")
    attach(base, folder).detach()


def test_files_that_may_not_be_read(lora_folder, saved, monkeypatch):
    """Another error than that of a file that is not there."""
    folder, base = lora_folder
    real = type(folder).open

    def closed(path, *args, **kwargs):
        if path.name == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(type(folder), "open", closed)
    for shut in (CONFIG, RECORD, WEIGHTS):
        with pytest.raises(PermissionError, match=shut):
            attach(base, folder)
    for shut in ("config.json", "model.safetensors", "tokenizer.json"):
        with pytest.raises(PermissionError, match=shut):
            peftlab.load(saved)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_base_that_is_not_finite(saved, value):
    path = saved / "model.safetensors"
    first = sorted(load_file(path))[0]
    rewrite(path, lambda tensors: tensors[first].view(-1)[-1:].fill_(value))
    with pytest.raises(
        ValueError, match=f"is damaged: .*{first}.* has numbers that are not finite"
    ):
        peftlab.load(saved)


def test_a_base_of_other_files(saved):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        whole = (saved / name).read_bytes()
        (saved / name).write_text(pointer)
        with pytest.raises(ValueError, match=f"is damaged: {name} is a Git LFS pointer: run git"):
            peftlab.load(saved)
        (saved / name).write_text("[" * 100_000)
        with pytest.raises(ValueError, match="is damaged"):
            peftlab.load(saved)
        (saved / name).write_bytes(whole)
    good = json.loads((saved / "config.json").read_text())
    layers = next(key for key in ("n_layer", "num_hidden_layers", "num_layers") if key in good)
    vocabulary = {"vocab_size": 10**9}
    for edit, words in (
        ({layers: 10**9}, "config.json describes .* parameters, the weights have"),
        (vocabulary, "config.json describes .* parameters, the weights have"),
        ({layers: "two"}, "is damaged"),
        ({layers: None}, "is damaged"),
        ({"model_type": ["gpt2"]}, "of the family"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\): load the unq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised \(bitsandbytes\)"),
    ):
        (saved / "config.json").write_text(json.dumps(good | edit))
        with pytest.raises(ValueError, match=words):
            peftlab.load(saved)


def carrying(kind):
    """A model that is no plain one."""
    import peft

    model = hf_model("llama")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    layer = model.model.layers[0].self_attn
    if kind == "add_adapter":
        model.add_adapter(lora)
    elif kind == "PeftModel":
        model = peft.get_peft_model(model, lora)
    elif kind == "inner":
        model = peft.get_peft_model(model, lora).base_model.model
    elif kind == "prompt":
        prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, prompt)
    elif kind == "8 bit":
        import bitsandbytes

        layer.q_proj = bitsandbytes.nn.Linear8bitLt(24, 40, bias=False)
    elif kind == "parametrised":
        torch.nn.utils.parametrizations.orthogonal(layer.q_proj)
    else:
        weight = layer.q_proj.weight.data.to(getattr(torch, kind))
        layer.q_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize(
    "kind, words",
    [
        (
            "add_adapter",
            r"adapter of the library peft \(Linear at .*q_proj\): call merge_and_unload",
        ),
        ("PeftModel", r"library peft \(PeftModelForCausalLM at its top\)"),
        ("inner", r"library peft \(Linear at model.layers.0.self_attn.q_proj\)"),
        ("prompt", "library peft"),
        ("8 bit", "layers.0.q is a Linear8bitLt .*load the unquantised weights"),
        ("int8", "layers.0.q is a Linear of torch.int8"),
        ("uint8", "layers.0.q is a Linear of torch.uint8"),
        ("float8_e4m3fn", "layers.0.q is a Linear of torch.float8_e4m3fn"),
        ("parametrised", "layers.0.q is a ParametrizedLinear"),
    ],
)
def test_a_model_that_is_no_plain_one(kind, words):
    with pytest.raises(ValueError, match=words):
        Base("x", carrying(kind), tokenizer())


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "xpu", "cpu:x", ""])
def test_a_device_that_is_not_here(device):
    for act in (lambda: peftlab.load(device=device), lambda: tiny("gpt2").to(device)):
        with pytest.raises(ValueError, match=f"device='{device}': allowed here is cpu"):
            act()


# Inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["the cat", b"the cat", ["a", 3], [None], None, 7, {"a": "b"}])
@pytest.mark.usefixtures("untyped")
def test_what_is_no_list_of_texts(given):
    from peftlab.bases import probes
    from peftlab.methods.calibration import sensitivity
    from peftlab.panels import reply

    base = tiny("gpt2")
    tuned = attach(base, LoRA())
    for act in (
        lambda: tuned.generate(given),
        lambda: tuned.loss(given),
        lambda: probes.forgetting(tuned, given, 0.0),
        lambda: base.detach() or base.generate(given),
        lambda: base.loss(given),
        lambda: sensitivity(base, given) if isinstance(given, str | list) else base.loss(given),
        lambda: Prune(score="wanda", calibration=given),
        lambda: letters().score(base, given) if given else base.loss(given),
        lambda: letters().score(base, [given]),
        lambda: probes.attention_map(base, [given]),
        lambda: reply(base, [given], "base alone", {}),
    ):
        with pytest.raises(ValueError, match="a list of (texts|examples) is needed"):
            act()


def test_a_token_without_a_row(base):
    rows, new = base.anatomy.embedding.num_embeddings, "<new>"
    for token in (rows, rows + 5, -1):
        ids = token_ids(2, 4)
        ids[1, 2] = token
        with pytest.raises(ValueError, match=f"token {token} .*has no row in .*: it has {rows}"):
            call(base, ids)
    if base.kind == "encoder-decoder":
        with pytest.raises(ValueError, match=f"token {rows} .*has no row"):
            base(token_ids(1, 4), None, torch.tensor([[0, rows]]))
    base.tokenizer.add_tokens([new])
    words = f"token {rows} .'{new}'. has no row in the embedding of {base.name}: it has {rows}"
    acts = [
        lambda kind=kind: attach(base, kind(3, init="text", init_text=f"a{new}"))
        for kind in (PromptTuning, PTuning, PrefixTuning, PTuningV2, DeepPromptTuning)
    ]
    acts += [lambda: base.generate(["a", f"b{new}"])] if base.kind != "encoder" else []
    acts += [lambda: base.loss([f"a{new}b"])] if base.kind == "decoder" else []
    for act in acts:
        with pytest.raises(ValueError, match=words):
            act()


@pytest.mark.parametrize("method", [None, LoRA(r=2), PromptTuning(3), PrefixTuning(3)])
def test_masks_of_other_types(base, method):
    model = base if method is None else attach(base, method)
    ids, mask = token_ids(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    wanted = call(model, ids, mask)
    for dtype in (torch.float32, torch.bool, torch.float16, torch.int32):
        given = (ids, mask.to(dtype))
        more = (decoder_ids(ids, mask),) if base.kind == "encoder-decoder" else ()
        assert torch.equal(model(*given, *more), wanted)
    for wrong in (torch.where(mask == 0, -1e9, 0.0), mask * 0.5):
        with pytest.raises(ValueError, match="attention_mask: allowed is 1 for a token and 0"):
            model(ids, wrong, *more)
    base.detach()


@pytest.mark.parametrize(
    "kind", [PromptTuning, PTuning, PrefixTuning, PTuningV2, DeepPromptTuning, PromptAndPrefix]
)
def test_an_init_text_without_a_token(base, kind, monkeypatch):
    real = type(base.tokenizer).__call__

    def deaf(self, text, **options):  # as most tokenizers are to a space of no width
        return real(self, text.replace("\u200b", ""), **options)

    monkeypatch.setattr(type(base.tokenizer), "__call__", deaf)
    with pytest.raises(ValueError, match=f"init_text='.*u200b' has no token of {base.name}"):
        attach(base, kind(3, init="text", init_text="\u200b"))


@pytest.mark.parametrize("kind", [PrefixTuning, PTuningV2])
def test_a_prefix_longer_than_the_positions(base, kind):
    """Its start is the keys and values of pieces of the text that fit."""
    text = "abcdefgh" * (CONTEXT // 8)
    short = attach(base, kind(CONTEXT, init="text", init_text=text)).prefix
    base.detach()
    long = attach(base, kind(2 * CONTEXT + 5, init="text", init_text=text)).prefix
    base.detach()
    for piece, whole in zip(short, long, strict=True):
        assert torch.equal(whole[:, :, :CONTEXT], piece)
        assert torch.equal(whole[:, :, CONTEXT : 2 * CONTEXT], piece)
        assert whole.shape[2] == 2 * CONTEXT + 5
    tuned = attach(base, kind(3 * CONTEXT))
    assert call(tuned, token_ids(1, 3)).isfinite().all()
    base.detach()
