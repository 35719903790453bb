"""The way out to Hugging Face PEFT and the way in, with PEFT's own save and load on the other side.

Tolerances. As in test_peft.py: E is the largest difference between PEFT's float32 logits and its
float64 logits of the same adapter on the same batch, and 4 E is allowed between ours and PEFT's.
Loading moves bits and computes nothing, so what comes back is compared with `torch.equal`; where a
tensor is one of several that were stacked or filled up, sums have other terms in another order,
and the logits are within 4 E again.
"""

import copy
import functools
import json
import pickle
import re
import warnings

import peft
import pytest
import torch
from models import (
    FAMILIES,
    adapted,
    call,
    decoder_ids,
    hf_model,
    hook_count,
    stir,
    surroundings,
    tiny,
    token_ids,
)
from safetensors.torch import load_file, save_file

import peftlab
from peftlab import (
    IA3,
    NF4,
    AdaLoRA,
    BitFit,
    DoRA,
    FullFineTuning,
    HoulsbyAdapter,
    LayerNormTuning,
    LoRA,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    Prune,
    PruneStructures,
    PTuning,
    PTuningV2,
    QLoRA,
    VeRA,
    attach,
)
from peftlab.bases import CLASSES, Base
from peftlab.tuned.interop import from_peft, to_peft
from peftlab.tuned.layouts.patterns import matches
from peftlab.tuned.layouts.write import shortest

from .test_peft_differs import distilbert
from .twins import greedy

FLOAT32, FLOAT64 = torch.float32, torch.float64
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "peftlab.json"
SHIFTED = {"shift_positions": True}
ALL = {"target_modules": "all-linear"}
METHODS = {
    "lora": LoRA(r=3, alpha=5),
    "lora all": LoRA(r=2, alpha=3, **ALL),
    "lora o": LoRA(r=2, target_modules=["o"]),
    "rslora": LoRA(r=3, alpha=2, use_rslora=True),
    "rslora all": LoRA(r=2, alpha=2, use_rslora=True, **ALL),
    "fused": LoRA(r=3, target_modules=["q", "k", "v"], fused=True),
    "fused all": LoRA(r=2, fused=True, **ALL),
    "dora": DoRA(r=3, alpha=5),
    "dora all": DoRA(r=2, **ALL),
    "pissa": PiSSA(r=3, alpha=5),
    "pissa all": PiSSA(r=2, **ALL),
    "adalora": AdaLoRA(init_r=4, target_r=2),
    "adalora all": AdaLoRA(init_r=3, target_r=2, alpha=5, **ALL),
    "vera": VeRA(r=7),
    "vera all": VeRA(r=9, projection_prng_key=3, **ALL),
    "ia3": IA3(),
    "ia3 both": IA3(["q", "o", "up", "down"], ["o", "down"]),
    "layer norm": LayerNormTuning(),
    "prompt": PromptTuning(5),
    "p lstm": PTuning(4),
    "p mlp": PTuning(2, "mlp"),
    "prefix": PrefixTuning(4, **SHIFTED),
    "prefix mlp": PrefixTuning(3, prefix_projection=True, encoder_hidden_size=5, **SHIFTED),
    "prefix unshifted": PrefixTuning(4),
    "v2": PTuningV2(3, **SHIFTED),
    "v2 all layers": PTuningV2(3, depth=2, **SHIFTED),
}
PREFIX = ["prefix", "prefix mlp", "prefix unshifted", "v2", "v2 all layers"]
FUSED = ["fused", "fused all"]
LIKE_LLAMA = ["lora o", "rslora all", "pissa all", "vera all", "v2 all layers", "p mlp"]
SHORT = ["lora", "lora all", "dora", "pissa", "adalora", "vera", "ia3", "layer norm", "prompt"]
BASES = {
    "gpt2": [m for m in METHODS if m != "prefix unshifted"],
    "llama": [m for m in METHODS if m not in FUSED],
    "bert": [m for m in METHODS if m not in (*FUSED, *LIKE_LLAMA, "prefix unshifted")],
    "t5": [m for m in METHODS if m not in (*FUSED, *LIKE_LLAMA, *PREFIX)],
    "tiny-gpt": [*SHORT, "prefix"],
    "tiny-llama": [*SHORT, "prefix", "prefix unshifted"],
}
PAIRS = [(family, method) for family, methods in BASES.items() for method in methods]
every = pytest.mark.parametrize("family, method", PAIRS)
# What PEFT's tensors cannot say in themselves: VeRA's random factors as blocks.
NEEDS_RECORD = [("gpt2", "vera"), ("gpt2", "vera all"), ("tiny-gpt", "vera")]


@functools.cache
def shipped(name) -> Base:
    return peftlab.load(name)


def model_of(family, dtype=FLOAT32):
    """A model for PEFT to change in place."""
    if family in FAMILIES:
        return hf_model(family, dtype)
    return copy.deepcopy(shipped(family).model).to(dtype)


def base_of(family, dtype=FLOAT32) -> Base:
    if family in FAMILIES:
        return tiny(family, dtype)
    return Base(family, model_of(family, dtype), shipped(family).tokenizer)


def trained(family, method, dtype=FLOAT32):
    """Ours, away from its start."""
    noise = 0.2 if family in FAMILIES else 0.02  # trained weights are smaller than ours at random
    return stir(attach(base_of(family, dtype), method), size=noise)


def ids_for(family):
    return token_ids(2, 9)


@torch.no_grad()
def ours_of(tuned, ids):
    return call(tuned, ids)


@torch.no_grad()
def theirs_of(model, ids, outputs):
    """PEFT's logits of the real tokens; T5 reads five tokens."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = decoder_ids(ids)
    return model(**given).logits[:, -outputs.shape[1] :]


def loaded_by_peft(family, folder, dtype=FLOAT32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trouble in ("Unexpected keyword", "Found missing", ".*were not used"):
            warnings.filterwarnings("error", message=trouble)
        model = peft.PeftModel.from_pretrained(
            model_of(family, dtype), folder, autocast_adapter_dtype=False
        )
    return model.to(dtype).eval()


def rounding(family, folder, ids, outputs) -> float:
    """E, and PEFT's float32 logits."""
    single, double = (
        theirs_of(loaded_by_peft(family, folder, dtype), ids, outputs)
        for dtype in (FLOAT32, FLOAT64)
    )
    return (single.double() - double).abs().max(), single


@every
def test_there_and_back(family, method, tmp_path):
    """PEFT reads what was written; it comes back bit for bit with the record, and without it."""
    tuned = trained(family, METHODS[method])
    ids = ids_for(family)
    wanted, state = ours_of(tuned, ids), tuned.state()
    folder = to_peft(tuned, tmp_path)
    E, theirs = rounding(family, folder, ids, wanted)
    assert (theirs - wanted).abs().max() <= 4 * E
    untuned = ours_of(tuned.detach(), ids)
    assert (wanted - untuned).abs().max() > 100 * E  # it was an adapter worth moving

    back = from_peft(tuned.base, folder)
    if method == "prefix unshifted":  # turned to the positions that PEFT has
        assert (ours_of(back, ids) - wanted).abs().max() <= 4 * E
        assert back.methods[0].shift_positions
    else:
        assert back.methods == tuned.folded
        assert torch.equal(ours_of(back, ids), wanted)
        assert all(torch.equal(back.state()[name], tensor) for name, tensor in state.items())
    back.detach()

    (folder / RECORD).unlink()  # as any other program leaves it
    if (family, method) in NEEDS_RECORD:
        with pytest.raises(ValueError, match="q, k, v at once"):
            from_peft(tuned.base, folder)
        return
    back = attach(tuned.base, folder)
    assert (ours_of(back, ids) - wanted).abs().max() <= 4 * E
    assert not hook_count(back.detach().model)


@every
def test_saved_is_what_peft_reads(family, method, tmp_path):
    """Where PEFT knows the method `save` writes the same folder, unless that is not all of ours."""
    if family not in ("gpt2", "llama"):
        return
    tuned = trained(family, METHODS[method])
    saved, written = tuned.save(tmp_path / "saved"), to_peft(tuned, tmp_path / "written")
    own = method == "prefix unshifted" or (family, method) in NEEDS_RECORD
    assert (saved / RECORD).exists() != own
    if not own:
        for name in (CONFIG, WEIGHTS, RECORD):
            assert (saved / name).read_bytes() == (written / name).read_bytes()


GENERATING = [(f, m) for f, m in PAIRS if f in ("gpt2", "llama")]
GENERATING += [("tiny-gpt", m) for m in ("lora", "prompt", "prefix")]
GENERATING += [("tiny-llama", m) for m in ("lora", "prefix unshifted")]


@pytest.mark.parametrize("family, method", GENERATING)
def test_the_same_text(family, method, tmp_path):
    """Greedy, in float64, each prompt alone."""
    tuned = trained(family, METHODS[method], FLOAT64)
    texts = ["ab>", "the longest> one"]
    wanted = tuned.generate(texts, max_new_tokens=6)
    model = loaded_by_peft(family, to_peft(tuned, tmp_path), FLOAT64)
    for text, words in zip(texts, wanted, strict=True):
        given = {k: tuned.tokenizer(text, return_tensors="pt")[k] for k in ("input_ids",)}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        out = greedy(model, given, 6, tuned.tokenizer.eos_token_id)
        new = out[0, given["input_ids"].shape[1] :]
        assert tuned.tokenizer.decode(new, skip_special_tokens=True) == words


# What PEFT trained ------------------------------------------------------------------------------

LINEARS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "k_proj", "down_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "t5": ["q", "v", "wo"],
}
ONE = {"gpt2": "h.1.attn.c_attn", "llama": "layers.1.self_attn.q_proj"}
ONE |= {"bert": "layer.1.attention.self.query", "t5": "decoder.block.1.layer.0.SelfAttention.q"}
NORMS = {"gpt2": ["ln_1", "ln_f"], "llama": ["input_layernorm"], "bert": ["LayerNorm"]}
NORMS |= {"t5": ["layer_norm"]}
P = {"num_virtual_tokens": 4}
THEIRS = {
    "lora": lambda f: peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEARS[f]),
    "patterns": lambda f: peft.LoraConfig(
        r=3, target_modules=LINEARS[f], rank_pattern={ONE[f]: 5}, alpha_pattern={ONE[f]: 7}
    ),
    "one layer": lambda f: peft.LoraConfig(target_modules=[ONE[f]], r=2, use_rslora=True),
    "rslora patterns": lambda f: peft.LoraConfig(
        r=3, target_modules=LINEARS[f], rank_pattern={ONE[f]: 5}, use_rslora=True
    ),
    "dora": lambda f: peft.LoraConfig(r=3, target_modules=LINEARS[f], use_dora=True),
    "dora patterns": lambda f: peft.LoraConfig(
        r=3, target_modules=LINEARS[f], use_dora=True, use_rslora=True, rank_pattern={ONE[f]: 2}
    ),
    "dora one layer": lambda f: peft.LoraConfig(r=3, target_modules=[ONE[f]], use_dora=True),
    "adalora": lambda f: peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=LINEARS[f]),
    "adalora one layer": lambda f: peft.AdaLoraConfig(
        init_r=3, total_step=9, lora_alpha=5, target_modules=[ONE[f]]
    ),
    "vera": lambda f: peft.VeraConfig(r=6, target_modules=LINEARS[f][-1:]),
    "ia3": lambda f: peft.IA3Config(target_modules=LINEARS[f], feedforward_modules=LINEARS[f][-1:]),
    "ia3 one layer": lambda f: peft.IA3Config(target_modules=[ONE[f]], feedforward_modules=[]),
    "norms": lambda f: peft.LNTuningConfig(target_modules=NORMS[f]),
    "prompt": lambda f: peft.PromptTuningConfig(**P),
    "p mlp": lambda f: peft.PromptEncoderConfig(**P, encoder_hidden_size=5),
    "p lstm": lambda f: peft.PromptEncoderConfig(
        **P, encoder_hidden_size=5, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda f: peft.PrefixTuningConfig(**P),
    "prefix mlp": lambda f: peft.PrefixTuningConfig(
        **P, prefix_projection=True, encoder_hidden_size=6
    ),
}
TASKS = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}
PREFIXES_ON_T5 = [("t5", "prefix"), ("t5", "prefix mlp")]


def made_by_peft(family, kind, folder):
    """An adapter that PEFT saved, its values drawn at random."""
    config = THEIRS[kind](family)
    config.task_type = TASKS.get(family, "CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, and of what is not on the hub
        torch.manual_seed(0)
        model = peft.get_peft_model(hf_model(family), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn_like(parameter)
        model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "family, kind", [(f, k) for f in FAMILIES for k in THEIRS if (f, k) not in PREFIXES_ON_T5]
)
def test_what_peft_made_computes_the_same_here(family, kind, tmp_path):
    theirs, ids, base = made_by_peft(family, kind, tmp_path), token_ids(2, 7), tiny(family)
    before = surroundings(base)
    tuned = from_peft(base, tmp_path)
    ours = ours_of(tuned, ids)
    E, again = rounding(family, tmp_path, ids, ours)
    # A network that makes a prompt rounds otherwise for two rows at a time than for the file.
    assert (again - theirs_of(theirs, ids, ours)).abs().max() <= 4 * E
    assert (ours - again).abs().max() <= 4 * E
    assert (ours - ours_of(tiny(family), ids)).abs().max() > 100 * E
    out = to_peft(tuned, tmp_path / "out")  # and out again
    assert (theirs_of(loaded_by_peft(family, out), ids, ours) - ours).abs().max() <= 4 * E
    tuned.detach()
    assert surroundings(base) == before


def test_triplets_that_peft_left_out_are_off_here(tmp_path):
    """A trained AdaLoRA is saved without the triplets that were switched off, module by module."""
    config = peft.AdaLoraConfig(
        init_r=4, total_step=9, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(hf_model("llama"), config)
    kept = {"0.self_attn.q_proj": [True, False, True, False], "1.self_attn.v_proj": [False] * 4}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
        for where, row in kept.items():
            layer = model.base_model.model.get_submodule(f"model.layers.{where}")
            layer.lora_E["default"][~torch.tensor(row)] = 0
    config.rank_pattern = {f"model.layers.{m}.lora_E": row for m, row in kept.items()}
    ids = token_ids(2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rank of zero
        model.eval().save_pretrained(tmp_path)
    tuned = from_peft(tiny("llama"), tmp_path)
    ours = ours_of(tuned, ids)
    double = copy.deepcopy(model).double()
    wanted = theirs_of(model, ids, ours)
    E = (wanted.double() - theirs_of(double, ids, ours)).abs().max()
    assert (ours - wanted).abs().max() <= 4 * E
    ranks = {name: delta.rank for name, delta in tuned.deltas.items()}
    assert ranks == {"layers.0.q": 2, "layers.0.v": 4, "layers.1.q": 4, "layers.1.v": 0}


@pytest.mark.parametrize("kind", ["lora", "norms"])
def test_an_adapter_of_the_model_without_its_head(kind, tmp_path):
    """PEFT's names begin inside the backbone then."""
    config, ids = THEIRS[kind]("bert"), token_ids(2, 7)
    theirs = peft.get_peft_model(hf_model("bert").bert, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                noise = torch.Generator().manual_seed(len(name))
                parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    theirs.eval().save_pretrained(tmp_path)
    tuned = from_peft(tiny("bert"), tmp_path)
    with torch.no_grad():
        wanted = theirs(input_ids=ids).last_hidden_state
        ours = tuned.model.bert(input_ids=ids).last_hidden_state
        truth = copy.deepcopy(theirs).double()(input_ids=ids).last_hidden_state
    assert (ours - wanted).abs().max() <= 4 * (wanted.double() - truth).abs().max()


@pytest.mark.parametrize(
    "methods", [QLoRA(r=3, block_size=8), [NF4(8), PrefixTuning(3, **SHIFTED)]]
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_on_a_base_in_four_bits_the_adapter_goes_out_and_the_codes_stay(family, methods, tmp_path):
    """It is right on a base that holds what the codes say, and comes back with the codes."""
    tuned, ids = trained(family, methods), token_ids(2, 7)
    wanted, state = ours_of(tuned, ids), tuned.state()
    names = {module: name for name, module in tuned.model.named_modules()}
    coded = {names[s.module]: s.decode() for s in tuned._sites if s.codes is not None}
    assert len(coded) == (8 if family == "gpt2" else 14)
    folder = to_peft(tuned, tmp_path)
    outputs = []
    for dtype in (FLOAT32, FLOAT64):
        model = hf_model(family, dtype)
        for name, weight in coded.items():
            model.get_submodule(name).weight.data.copy_(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        outputs.append(theirs_of(model.to(dtype).eval(), ids, wanted))
    assert (wanted - outputs[0]).abs().max() <= 4 * (outputs[0].double() - outputs[1]).abs().max()
    base = tuned.detach()
    back = attach(base, folder)
    assert back.methods == tuned.folded and torch.equal(ours_of(back, ids), wanted)
    assert all(torch.equal(back.state()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("method", ["lora all", "dora", "ia3", "layer norm", "prompt", "prefix"])
def test_an_encoder_without_a_head_of_its_own(method, tmp_path):
    """As sentence encoders are: hidden states, and names that begin inside the backbone."""
    bare = Base("bare", hf_model("bert").bert, tiny("bert").tokenizer)
    tuned, ids = stir(attach(bare, METHODS[method])), token_ids(2, 7)
    folder, outputs = to_peft(tuned, tmp_path), []
    for dtype in (FLOAT32, FLOAT64):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(
                hf_model("bert", dtype).bert, folder, autocast_adapter_dtype=False
            )
        with torch.no_grad():
            outputs.append(model.to(dtype).eval()(input_ids=ids).last_hidden_state[:, -7:])
    with torch.no_grad():
        wanted = tuned.model(input_ids=ids).last_hidden_state
        close = 4 * (outputs[0].double() - outputs[1]).abs().max()
        assert (wanted - outputs[0]).abs().max() <= close
        tuned.detach()
        assert torch.equal(attach(bare, folder).model(input_ids=ids).last_hidden_state, wanted)


def test_what_is_written_is_small_where_it_can_be(tmp_path):
    """Names as a user of PEFT would write them, and no zeros but GPT-2's blocks."""
    for family, targets in (("gpt2", ["c_attn"]), ("llama", ["q_proj", "v_proj"])):
        tuned = trained(family, LoRA(r=3, alpha=5))
        folder = to_peft(tuned, tmp_path / family)
        config = json.loads((folder / CONFIG).read_text())
        n = len(tuned.deltas) // 2 // len(targets)
        assert config["target_modules"] == targets and config["fan_in_fan_out"] == (
            family == "gpt2"
        )
        assert (config["r"], config["lora_alpha"]) == (3 * n, 5 * n)
        assert not config["rank_pattern"] and config["task_type"] == "CAUSAL_LM"
        stored = sum((t != 0).sum().item() for t in load_file(folder / WEIGHTS).values())
        assert stored == tuned.count().stored
    mixed = json.loads(
        (to_peft(trained("gpt2", METHODS["lora all"]), tmp_path) / CONFIG).read_text()
    )
    assert mixed["rank_pattern"] == {"c_attn": 6} and mixed["alpha_pattern"] == {"c_attn": 9}


@pytest.mark.parametrize("method", ["lora all", "dora", "pissa", "ia3"])
def test_merged_or_not_the_files_are_the_same(method, tmp_path):
    tuned = trained("gpt2", METHODS[method])
    first = to_peft(tuned, tmp_path / "first")
    tuned.merge()
    second = to_peft(tuned, tmp_path / "second")
    for name in (CONFIG, WEIGHTS, RECORD):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_adapter_that_diverged_is_not_put_on(value, tmp_path):
    """Nor without our record; the tensor is named."""
    made_by_peft("llama", "lora", tmp_path)
    first = sorted(load_file(tmp_path / WEIGHTS))[0]
    change(tmp_path, WEIGHTS, lambda tensors: tensors[first].view(-1)[:1].fill_(value))
    refused(tiny("llama"), tmp_path, f"is damaged: {WEIGHTS} has numbers that are not .*{first}")


def test_the_shortest_ends_of_names():
    every = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj", "c_proj_x"]
    assert shortest(every[:4], every) == ["c_proj"]
    assert shortest(["h.0.mlp.c_proj", "h.1.mlp.c_proj"], every) == ["mlp.c_proj"]
    assert shortest(["h.1.mlp.c_proj"], every) == ["1.mlp.c_proj"]
    assert shortest([], every) == []


# What does not go out --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, methods, words",
    [
        ("gpt2", HoulsbyAdapter(3), "PEFT does not know .*: it knows LoRA .*prompt tuning"),
        ("gpt2", BitFit(), "PEFT does not know BitFit: it knows"),
        ("llama", FullFineTuning(), "PEFT does not know"),
        ("llama", Prune(0.5), "PEFT does not know"),
        ("llama", [LoRA(), PromptTuning(3)], "holds one method, not LoRA . Prompt tuning"),
        ("llama", [Prune(0.5), LoRA()], "holds one method"),
        ("llama", [PruneStructures(heads=0.34), LoRA(r=3)], "holds one method"),
        ("bert", PTuning(2, "mlp", placement=[(1, "front"), (1, "back")]), "all .* in front"),
        ("gpt2", PrefixTuning(3), "positions begin behind the prefix.*shift_positions=True"),
        ("bert", PrefixTuning(3), "positions begin behind the prefix.*shift_positions=True"),
        ("llama", PTuningV2(3, depth=1, **SHIFTED), "every layer; here .* upper ones"),
        ("t5", PrefixTuning(3, **SHIFTED), "the decoder's attention to itself alone"),
        ("llama", AdaLoRA(alpha=0), "alpha=0"),
    ],
)
def test_what_peft_does_not_have_is_refused_and_saved_as_ours(family, methods, words, tmp_path):
    tuned = trained(family, methods)
    with pytest.raises(ValueError, match=words):
        to_peft(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ids = token_ids(2, 7)
    wanted, folder = ours_of(tuned, ids), tuned.save(tmp_path)
    assert not (folder / RECORD).exists()
    base = tuned.detach()
    with pytest.raises(ValueError, match="has no peft_type: PEFT did not write it"):
        from_peft(base, folder)
    assert torch.equal(ours_of(attach(base, folder), ids), wanted)


def test_a_head_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="PEFT's layout of a head is not written"):
        to_peft(adapted("head lora", "bert"), tmp_path)


def test_a_prefix_under_rotary_positions_that_depend_on_the_length_needs_the_shift(tmp_path):
    tuned = trained("llama", PrefixTuning(3))
    tuned.model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="angles that depend on the length"):
        to_peft(tuned, tmp_path)


def test_what_was_detached_is_not_written(tmp_path):
    tuned = trained("llama", LoRA(r=2))
    tuned.detach()
    with pytest.raises(RuntimeError, match="was detached"):
        to_peft(tuned, tmp_path)


# What does not come in -------------------------------------------------------------------------


def refused(base, folder, words, error=ValueError):
    before = surroundings(base)
    with pytest.raises(error, match=words):
        from_peft(base, folder)
    with pytest.raises(error, match=words):
        attach(base, folder)
    assert surroundings(base) == before


def change(folder, name, edit):
    """Rewrite one of PEFT's files."""
    path = folder / name
    if name == WEIGHTS:
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        config = json.loads(path.read_text())
        edit(config)
        path.write_text(json.dumps(config))


@pytest.fixture(params=["lora", "dora", "adalora", "ia3", "norms", "prompt", "prefix"])
def theirs(request, tmp_path):
    """A good adapter of PEFT's for Llama."""
    made_by_peft("llama", request.param, tmp_path)
    return tmp_path


def test_another_base(theirs):
    """Of another family or of other sizes: said by what does not fit. A prompt has no more than
    a width, and GPT-2's is the same here."""
    if "PROMPT_TUNING" not in (theirs / CONFIG).read_text():
        refused(tiny("gpt2"), theirs, r"cannot go on tiny-gpt2: .*(is no|is \(.*is needed)")
    config = copy.deepcopy(hf_model("llama").config)
    config.update({"hidden_size": 16, "head_dim": 4})
    wider = CLASSES["decoder"].from_config(config)
    other = Base("narrow", wider, tiny("llama").tokenizer)
    refused(other, theirs, r"cannot go on narrow: .* is \(.*\); \(.*\) is needed")
    change(theirs, CONFIG, lambda c: c.update(base_model_name_or_path="some/llama"))
    refused(other, theirs, r"cannot go on narrow \(it was made for 'some/llama'\)")


def test_damaged_files(theirs):
    base, path = tiny("llama"), theirs / WEIGHTS
    whole = path.read_bytes()
    for content in (whole[:-4], whole[:20], b"", pickle.dumps({"x": 1})):
        path.write_bytes(content)
        refused(base, theirs, "is damaged")
    path.unlink()
    (theirs / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))
    refused(base, theirs, "adapter_model.bin there is a pickle.*Convert", FileNotFoundError)
    (theirs / "adapter_model.bin").unlink()
    refused(base, theirs, "no adapter_model.safetensors in .*no adapter was", FileNotFoundError)
    path.write_bytes(whole)
    config = (theirs / CONFIG).read_text()
    for text in ("", "{", "[]", config[:-9]):
        (theirs / CONFIG).write_text(text)
        with pytest.raises(ValueError, match="is damaged|has no peft_type"):
            from_peft(base, theirs)
        with pytest.raises(ValueError, match="is damaged"):
            attach(base, theirs)
    (theirs / CONFIG).unlink()
    refused(base, theirs, "no adapter_config.json", FileNotFoundError)
    assert base.adapted_by is None


def test_tampered_tensors(theirs):
    base, path = tiny("llama"), theirs / WEIGHTS
    whole, first = path.read_bytes(), sorted(load_file(path))[0]
    for edit, words in (
        (lambda t: t.update({first: torch.zeros(3, 7)}), r"is \(3, 7\); \(.*\) is needed"),
        (
            lambda t: t.update({first: t[first][:1].repeat(2, *[1] * (t[first].ndim - 1))}),
            "is needed",
        ),
        (lambda t: t.update({"a.stranger": torch.zeros(2)}), "a.stranger is no "),
        (lambda t: t.update({first.replace("0", "9") + "x": t[first].clone()}), "is no "),
    ):
        change(theirs, WEIGHTS, edit)
        refused(base, theirs, words)
        path.write_bytes(whole)
    if (
        "LN_TUNING" not in (theirs / CONFIG).read_text()
        and "IA3" not in (theirs / CONFIG).read_text()
    ):
        change(theirs, WEIGHTS, lambda t: t.pop(first))  # of those two each tensor stands alone
        refused(base, theirs, "is missing")
        path.write_bytes(whole)
    from_peft(base, theirs).detach()


@pytest.mark.parametrize(
    "edit",
    [
        {"merge_weights": True, "enable_lora": None},
        {"ensure_weight_tying": True},
        {"lora_dtype": "float32", "lorap_lr_ratio": 16.0},
        {"bias": None},
        {"loftq_config": {"loftq_bits": 4}, "corda_config": {}, "megatron_config": None},
        {"layers_pattern": "([a-z0-9._]+)+!", "exclude_modules": "(a|a)*!"},
        {"rank_pattern": {"([a-z0-9._]+)+!": 9, "(.*a){30}!": 9, "(.?){60}!": 9}},
        {"alpha_pattern": {"((((.{1,60}){1,60}){1,60}){1,60}){1,60}!": 9, "(.|..){1000000}!": 9}},
    ],
)
def test_keys_that_change_nothing(edit, tmp_path):
    made_by_peft("llama", "lora", tmp_path)
    base, ids = tiny("llama"), token_ids(2, 7)
    wanted = ours_of(from_peft(base, tmp_path), ids)
    base.detach()
    change(tmp_path, CONFIG, lambda config: config.update(edit))
    assert torch.equal(ours_of(from_peft(base, tmp_path), ids), wanted)


def test_a_byte_order_mark(theirs):
    path = theirs / CONFIG
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    from_peft(tiny("llama"), theirs).detach()


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_factors_that_are_no_floats(theirs, dtype):
    first = sorted(load_file(theirs / WEIGHTS))[0]
    change(theirs, WEIGHTS, lambda t: t.update({first: torch.ones(t[first].shape).to(dtype)}))
    refused(tiny("llama"), theirs, f"{first} holds {dtype}; torch.float32 is needed")


def test_what_other_programs_leave_in_a_folder(tmp_path):
    """It is told what it is, and what to do with it."""
    base, folder = tiny("llama"), tmp_path / "adapter"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for edit, words, error in (
        (lambda: (folder / WEIGHTS).rename(folder / "adapters.safetensors"), "MLX's", OSError),
        (
            lambda: (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00002.safetensors"),
            "in several files: join",
            OSError,
        ),
        (lambda: (folder / WEIGHTS).rename(folder / "pytorch_adapter.bin"), "AdapterHub", OSError),
        (lambda: (folder / WEIGHTS).write_text(pointer), "LFS pointer: run git lfs", ValueError),
        (
            lambda: (folder / CONFIG).write_text('{"config": {"architecture": "lora"}}'),
            "AdapterHub's",
            ValueError,
        ),
        (
            lambda: (tmp_path / "x").mkdir() or folder.rename(tmp_path / "x" / "sft"),
            r"give '.*x.sft'",
            OSError,
        ),
    ):
        made_by_peft("llama", "lora", folder)
        edit()
        where = tmp_path / "x" if not folder.exists() else folder
        with pytest.raises(FileNotFoundError if error is OSError else error, match=words):
            attach(base, where)
        for path in folder.glob("*"):
            path.unlink()
    with pytest.raises(FileNotFoundError, match="is a file: give the folder"):
        attach(base, tmp_path / "x" / "sft" / WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"an adapter is there: load .*attach\(base, "):
        peftlab.load(tmp_path / "x" / "sft")


@pytest.mark.parametrize(
    "pattern, text, found",
    [
        ("q_proj", "layers.0.q_proj", True),
        ("q_proj", "layers.0.xq_proj", False),
        ("^layers.0", "layers.0", True),
        ("^q_proj", "layers.0.q_proj", False),
        (r".*\.0\..*", "layers.0.q_proj", True),
        (r"layers\.(0|1|12)\..*(q|v)_proj$", "model.layers.12.attn.v_proj", True),
        (r"layers\.(?:[0-9]|1[0-5])\.\w+", "layers.16.q", False),
        (r"layers\.\d{1,2}\.[^k]+", "layers.31.q", True),
        (r"(a+)+b?", "a" * 60, True),
    ],
)
def test_patterns_match_as_in_peft(pattern, text, found):
    assert matches(pattern, text) == found
    assert (re.match(rf"(.*\.)?({pattern})$", text) is not None) == found


@pytest.mark.parametrize(
    "method", [PrefixTuning(3, **SHIFTED), PrefixTuning(3), PTuningV2(3, **SHIFTED)]
)
def test_a_prefix_under_a_sliding_window(method, tmp_path):
    """Ours is read from everywhere and PEFT's leaves the window: neither is taken for the other."""
    made_by_peft("llama", "prefix", tmp_path)
    tuned = trained("llama", method)
    tuned.model.config.sliding_window = 4
    tuned.model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="leaves the window of sliding layers"):
        to_peft(tuned, tmp_path / "out")
    ids, folder = token_ids(2, 7), tuned.save(tmp_path / "saved")
    wanted, base = ours_of(tuned, ids), tuned.detach()
    assert not (folder / RECORD).exists()
    assert torch.equal(ours_of(attach(base, folder), ids), wanted)
    base.detach()
    refused(base, tmp_path, "leaves the window of sliding layers")


@pytest.mark.parametrize(
    "edit, words",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not read: known are LORA, ADALORA, VERA"),
        ({"peft_type": ["LORA"]}, "is damaged"),
        ({"bias": "all"}, "bias='all': biases trained beside"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'.: a head"),
        ({"init_lora_weights": "pissa"}, "'pissa' starts by changing the base.*conversion"),
        (
            {"init_lora_weights": "loftq"},
            "'loftq' starts by .* call merge_and_unload.*peftlab.load",
        ),
        ({"enable_lora": [True, False]}, "enable_lora=.* of LORA: no method here does that"),
        ({"rank_pattern": {"(" * 300: 4}}, "rank_pattern has .*missing"),
        ({"rank_pattern": {"a" * 999: 4}}, "a pattern of 999 characters: at most 400"),
        ({"rank_pattern": {r"(\w)\1*": 4}}, "groupref in a pattern is not read"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens=.3. of LORA: no method here"),
        ({"tomorrow": True}, "tomorrow=True of LORA: no method here does that"),
        ({"r": 2}, r"lora_A.weight is \(3, \d+\); \(2, \d+\) is needed"),
        ({"r": "three"}, "r='three': a whole number is needed"),
        ({"r": 0}, "r=0: allowed is at least 1"),
        ({"lora_alpha": None}, "lora_alpha=None: a number is needed"),
        ({"lora_dropout": 7}, "dropout=7: allowed is 0.0 to 1.0"),
        ({"rank_pattern": {"q_proj": 4}}, r"is \(3, 24\); \(4, 24\) is needed"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern has '.'"),
        ({"rank_pattern": [4]}, "is damaged"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ],
)
def test_a_configuration_that_is_not_known(edit, words, tmp_path):
    made_by_peft("llama", "lora", tmp_path)
    change(tmp_path, CONFIG, lambda config: config.update(edit))
    refused(tiny("llama"), tmp_path, words)


def test_a_key_of_the_configuration_that_is_missing(tmp_path):
    made_by_peft("llama", "lora", tmp_path)
    for key in ("r", "lora_alpha"):
        good = (tmp_path / CONFIG).read_text()
        change(tmp_path, CONFIG, lambda config, key=key: config.pop(key))
        refused(tiny("llama"), tmp_path, f"is damaged: adapter_config.json has no '{key}'")
        (tmp_path / CONFIG).write_text(good)


@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens", "layers.7.self_attn.q_proj"])
def test_a_target_that_no_method_reaches(target, tmp_path):
    made_by_peft("llama", "lora", tmp_path)
    pair = {f"base_model.model.{target}.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"}
    change(tmp_path, WEIGHTS, lambda tensors: tensors.update(pair))
    refused(tiny("llama"), tmp_path, f"'{target}' is no linear weight of tiny-llama")


def test_projections_of_another_seed(tmp_path):
    made_by_peft("llama", "vera", tmp_path)
    change(tmp_path, CONFIG, lambda config: config.update(projection_prng_key=1))
    refused(tiny("llama"), tmp_path, "vera_A is not what projection_prng_key=1 draws")


def test_prefixes_where_pefts_reaches_less(tmp_path):
    """test_peft_differs.py shows what PEFT does on T5 and on DistilBERT."""
    made_by_peft("llama", "prefix", tmp_path)
    tuned = attach(Base("distil", distilbert(), tiny("bert").tokenizer), PrefixTuning(4, **SHIFTED))
    with pytest.raises(ValueError, match="as a cache, and distilbert takes none"):
        to_peft(tuned, tmp_path / "out")
    refused(tuned.detach(), tmp_path, "as a cache, and distilbert takes none")
    refused(tiny("t5"), tmp_path, "the decoder's attention to itself alone, and here in all three")


@pytest.mark.parametrize("method", ["lora", "dora", "prompt"])
def test_what_another_program_changed_is_not_read_by_our_record(method, tmp_path):
    """Trained on in PEFT: a block that was zero is not, or alpha is another. Its files alone are
    read, and mean what they mean there."""
    tuned = trained("gpt2", METHODS[method])
    folder, base = to_peft(tuned, tmp_path), tuned.detach()
    first = sorted(load_file(folder / WEIGHTS))[-1]
    if method == "prompt":
        change(folder, CONFIG, lambda config: config.update(num_virtual_tokens=4))
        words = "num_virtual_tokens is not as peftlab wrote it"
    else:
        change(folder, WEIGHTS, lambda tensors: tensors[first].add_(0.1))
        words = f"{first} is not as peftlab wrote it: another library"
    refused(base, folder, f"{words}.*Without peftlab.json")
    (folder / RECORD).unlink()
    if method == "prompt":
        refused(base, folder, "prompt_embeddings is .* is needed")
        return
    ids = token_ids(2, 7)
    ours = ours_of(from_peft(base, folder), ids)
    E, theirs = rounding("gpt2", folder, ids, ours)
    assert (ours - theirs).abs().max() <= 4 * E


def test_kept_from_pefts_folder(tmp_path):
    """Also by an adapter that is attached: of the same kind, put in place and taken out."""
    made_by_peft("llama", "lora", tmp_path)
    ids = token_ids(2, 7)
    tuned = attach(tiny("llama"), LoRA(r=3, alpha=5, target_modules=["q", "k", "down"]))
    tuned.keep("theirs", tmp_path)
    tuned.use("theirs")
    ours = ours_of(tuned, ids)
    E, again = rounding("llama", tmp_path, ids, ours)
    assert (ours - again).abs().max() <= 4 * E
    tuned.detach()
    other = attach(tiny("llama"), LoRA(r=3, alpha=5, target_modules=["q", "k"]))
    with pytest.raises(ValueError, match="the adapter has target_modules"):
        other.keep("theirs", tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ('{"config": {"architecture": "lora"}, "version": "adapters.1.0.0"}', "AdapterHub"),
        ("{", "is no valid JSON"),
        ('{"format": 1}', "has no peft_type: PEFT did not write it"),
    ],
)
def test_from_peft_says_what_it_found(text, words, tmp_path):
    made_by_peft("llama", "lora", tmp_path)
    (tmp_path / CONFIG).write_text(text)
    base = tiny("llama")
    with pytest.raises(ValueError, match=words):
        from_peft(base, tmp_path)
    assert base.adapted_by is None
