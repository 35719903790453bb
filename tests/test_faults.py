"""What fails leaves a base whole, a folder old or new, and a name for what it says.

`python -m peftlab.experiments.inject_faults` does it 1,900 times; here is a sample, with failures
at places that a reader can follow.
"""

import copy
import json
import os
import random
import threading
from pathlib import Path

import peft
import pytest
import torch
from models import FAMILIES, adapted, call, hook_count, stir, surroundings, tiny, token_ids
from safetensors.torch import load_file

import peftlab
from peftlab import (
    IA3,
    NF4,
    BitFit,
    DoRA,
    FullFineTuning,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Prune,
    PruneStructures,
    QLoRA,
    attach,
)
from peftlab.bases import Base, Linear
from peftlab.bases.data import data_path
from peftlab.experiments import hostile_files, inject_faults
from peftlab.sites import codes, site
from peftlab.tuned import folders

QLORA = QLoRA(r=2, block_size=8)
# The same sums in another order: at most 44 terms, each sum off by 44 · 2⁻²⁴ of its largest part,
# in two layers of four maps one after the other.
ROUNDING = 8 * 44 * 2**-24
OUT_OF_MEMORY = torch.OutOfMemoryError("on purpose")


def failing_at(monkeypatch, owner, name: str, number: int, error=OUT_OF_MEMORY) -> list[int]:
    """Let call `number` of a function raise; the list counts the calls."""
    real, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


# --- the base ----------------------------------------------------------------------------------


def test_a_sample_of_failures_over_verbs_methods_and_families():
    found = inject_faults.failures(24, seed=3)
    assert found["failures"] == 24 and found["base changed"] == []


@pytest.mark.parametrize("methods", [LoRA(), DoRA(), QLORA, IA3(), [Prune(0.5), LoRA()]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_that_fails_is_undone(family, methods, monkeypatch):
    """The same output as before it, no matter which weight fails, and a plain base afterwards."""
    base, ids = tiny(family), token_ids(2, 7)
    before = surroundings(base)
    tuned = stir(attach(base, methods))
    with torch.no_grad():
        wanted, hooks = call(tuned, ids), hook_count(base.model)
        for number in (1, 3):
            with monkeypatch.context() as patch:
                failing_at(patch, Linear, "write", number, KeyboardInterrupt())
                with pytest.raises(KeyboardInterrupt):
                    tuned.merge(requantise=True)
            assert not tuned.merged and hook_count(base.model) == hooks
            assert torch.equal(call(tuned, ids), wanted)
    tuned.detach()
    assert surroundings(base) == before


def test_codes_that_cannot_be_written_again_stay(monkeypatch):
    base, ids = tiny("llama"), token_ids(2, 7)
    tuned = stir(attach(base, QLORA))
    with torch.no_grad():
        wanted = call(tuned, ids)
        with monkeypatch.context() as patch:
            failing_at(patch, codes, "quantise", 3)
            with pytest.raises(torch.OutOfMemoryError):
                tuned.merge(requantise=True)
        assert torch.equal(call(tuned, ids), wanted)


@pytest.mark.parametrize(
    "methods", [FullFineTuning(), BitFit(), LayerNormTuning(), Prune(0.5)], ids=str
)
def test_no_memory_for_a_copy_while_attaching(methods, monkeypatch):
    base = tiny("gpt2")
    before = surroundings(base)
    with monkeypatch.context() as patch:
        failing_at(patch, torch.Tensor, "clone", 5)
        with pytest.raises(torch.OutOfMemoryError):
            attach(base, methods)
    assert surroundings(base) == before
    attach(base, LoRA())


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize(
    "methods",
    [QLORA, [NF4(8), PrefixTuning(2)], FullFineTuning(), [Prune(0.5), FullFineTuning()]],
    ids=["qlora", "nf4 + prefix", "full", "prune + full"],
)
def test_detach_is_called_until_it_succeeds(methods, again, monkeypatch):
    """It stays attached as long as an original is not back, whoever calls."""
    base = tiny("llama")
    before = surroundings(base)
    tuned = stir(attach(base, methods))
    for _ in range(again):
        with monkeypatch.context() as patch:
            failing_at(patch, torch.Tensor, "to", 3)
            with pytest.raises(torch.OutOfMemoryError):
                base.detach()
        assert base.adapted_by is tuned
        with pytest.raises(RuntimeError, match="already carries"):
            attach(base, LoRA())
    base.detach()
    assert base.adapted_by is None and surroundings(base) == before


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda base: base.anatomy.linears["layers.0.q"].module.weight.data.mul_(3), "logits"),
        (lambda base: next(base.model.parameters()).requires_grad_(True), "wants a gradient"),
        (lambda base: base.anatomy.linears["layers.0.up"].module.half(), "types"),
        (lambda base: base.model.resize_token_embeddings(300), "another size"),
    ],
)
def test_detach_says_done_only_after_looking(damage, words):
    base = tiny("llama")
    tuned = attach(base, LoRA())
    damage(base)
    with pytest.raises(RuntimeError, match=f"not what it was before attaching: .*{words}"):
        tuned.detach()
    assert base.adapted_by is tuned


def test_a_hook_that_an_interrupt_kept_off_the_list_goes():
    base = tiny("gpt2")
    tuned = attach(base, [LoRA(), PromptTuning(2)])
    for place in tuned._sites:
        place.hooks = []
    tuned.detach()
    assert hook_count(base.model) == 0


def test_hooks_of_others_stay():
    base, seen = tiny("gpt2"), []
    base.model.register_forward_hook(lambda *_: seen.append(1))
    attach(base, LoRA()).detach()
    assert hook_count(base.model) == 1 and seen


@pytest.mark.parametrize(
    "methods",
    [LoRA(), NF4(8), QLORA, BitFit(), LayerNormTuning(), FullFineTuning(), Prune(), IA3()]
    + [PruneStructures(heads=0.5), PruneStructures(layers=0.5)],
    ids=str,
)
def test_a_base_cast_while_something_is_attached(methods):
    """Originals follow the model's type: afterwards it is in one type, as if cast without."""
    base, ids = tiny("gpt2"), token_ids(1, 5)
    tuned = attach(base, methods)
    base.model.to(torch.bfloat16)
    tuned.detach()
    wanted = tiny("gpt2")
    wanted.model.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(base(ids), wanted(ids))
    assert base.fingerprint() == wanted.fingerprint()


# --- names -------------------------------------------------------------------------------------


def test_a_base_does_not_answer_for_what_is_attached():
    base, ids = tiny("gpt2"), token_ids(1, 5)
    with attach(base, LoRA()):
        for ask in (
            lambda: base(ids),
            lambda: base.generate(["ab"], 2),
            lambda: base.loss(["ab ab"]),
            lambda: base.batch_loss({"input_ids": ids, "labels": ids}),
        ):
            with pytest.raises(RuntimeError, match="carries LoRA now"):
                ask()
    base(ids)


def test_a_detached_one_answers_nothing(tmp_path):
    base, ids = tiny("gpt2"), token_ids(1, 5)
    tuned = attach(base, LoRA())
    tuned.detach()
    other = attach(base, LoRA(dropout=0.5))
    for ask in (
        lambda: tuned(ids),
        lambda: tuned.generate(["ab"], 2),
        lambda: tuned.loss(["ab ab"]),
        lambda: tuned.batch_loss({"input_ids": ids, "labels": ids}),
        lambda: tuned.train(True),
        lambda: tuned.eval(),
        lambda: tuned.use(None),
        lambda: tuned.save(tmp_path / "it"),
    ):
        with pytest.raises(RuntimeError, match="was detached"):
            ask()
    assert not base.model.training and other.train() is other and other.eval() is other
    assert base.eval() is base


def test_one_model_has_one_adapter_whichever_base_it_is_reached_by():
    base = tiny("gpt2")
    twin = Base("twin", base.model, base.tokenizer)
    tuned = attach(base, FullFineTuning())
    with pytest.raises(RuntimeError, match="already carries Full fine-tuning"):
        attach(twin, FullFineTuning())
    with pytest.raises(ValueError, match="is attached to this model"):
        Base("third", base.model, base.tokenizer)
    twin.detach()
    assert base.adapted_by is None and not tuned.attached


# --- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["save", "export"])
def test_a_kill_leaves_the_old_folder_or_the_new_one(verb):
    found = inject_faults.kills(verb, 12, seed=1)
    assert found == {"kills": 12, "whole": 12, "silently wrong": 0, "lost": 0}


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    base, folder = tiny("gpt2"), tmp_path / "it"
    for alpha in (4, 8):
        with stir(attach(base, LoRA(r=2, alpha=alpha)), alpha) as tuned:
            state, _ = tuned.state(), tuned.save(folder)
        (folder / "README.md").write_text("mine")
        (folder / "runs" / "first").mkdir(parents=True, exist_ok=True)
        (folder / "runs" / "first" / "log.txt").write_text("mine too")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    with attach(base, folder) as again:
        again.save(folder)  # what is no part of an adapter goes along, folders too
        assert (folder / "README.md").read_text() == "mine"
        assert (folder / "runs" / "first" / "log.txt").read_text() == "mine too"
        assert again.methods == [LoRA(r=2, alpha=8)]
        assert all(torch.equal(again.state()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("write", ["save_file", "_digest"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
def test_what_stops_a_save_leaves_the_old_adapter(tmp_path, monkeypatch, write, error):
    base, folder = tiny("gpt2"), tmp_path / "it"
    with stir(attach(base, LoRA(r=2))) as tuned:
        tuned.save(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        stir(tuned)
        failing_at(monkeypatch, peftlab.tuned.saving, write, 1, error)
        words = "nothing was changed" if isinstance(error, OSError) else "^$"
        with pytest.raises(type(error), match=words):
            tuned.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_place_that_holds_something_else_is_refused(tmp_path, monkeypatch):
    tuned = attach(tiny("gpt2"), LoRA(r=2))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds 'diary.txt'"):
        tuned.merge_and_export(tmp_path / "notes")
    for write in (tuned.save, tuned.merge_and_export):
        with pytest.raises(FileExistsError, match="is a file"):
            write(tmp_path / "file")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileExistsError, match="working folder"):
            write(".")
        with pytest.raises(OSError, match="nothing was changed"):
            write(tmp_path / "file" / "below")
    tuned.save(tmp_path / "notes")  # beside it, a file and a folder stay
    (tmp_path / "notes" / "deep").mkdir()
    (tmp_path / "notes" / "deep" / "note.txt").write_text("mine")
    tuned.save(tmp_path / "notes")
    for path in ("file", "notes/diary.txt", "notes/deep/note.txt"):
        assert (tmp_path / path).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("methods", [LoRA(r=2), PromptTuning(2), FullFineTuning(), IA3()], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_diverged_is_not_saved(methods, value, tmp_path):
    tuned = attach(tiny("gpt2"), methods)
    folder = tuned.save(tmp_path / "it")
    before = (folder / "adapter_model.safetensors").read_bytes()
    list(tuned.trainable.values())[-1].data.view(-1)[-1] = value
    with pytest.raises(ValueError, match="has numbers that are not finite: .* not saved"):
        tuned.save(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_every_bit_of_the_weights_is_checked(tmp_path):
    base = tiny("gpt2")
    with stir(attach(base, LoRA(r=2))) as tuned:
        folder = tuned.save(tmp_path / "it")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for place in (-1, -100, -1000):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is not as it was written|is not as peftlab wrote it"):
            attach(base, folder)
    assert base.adapted_by is None


def test_a_folder_says_that_its_base_was_in_codes(tmp_path):
    """Also without our record, and to PEFT, which warns that it does not know the key."""
    base, ids = tiny("llama"), token_ids(2, 7)
    for methods in (QLORA, [NF4(8, quant_type="fp4"), LoRA(r=2)], [NF4(4), IA3()]):
        with stir(attach(base, methods)) as tuned, torch.no_grad():
            folder, wanted = tuned.save(tmp_path / "it"), call(tuned, ids)
        (folder / "peftlab.json").unlink()
        with attach(base, folder) as again, torch.no_grad():
            assert isinstance(again.methods[0], NF4)
            assert (call(again, ids) - wanted).abs().max() <= ROUNDING * wanted.abs().max()
        with pytest.warns(UserWarning, match="base_weights_in_codes"):
            peft.PeftConfig.from_pretrained(folder)


# --- whose base it is --------------------------------------------------------------------------

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def old_record(folder, digest: str) -> None:
    """The record as peftlab 0.1 wrote it."""
    path = folder / "peftlab.json"
    record = json.loads(path.read_text())
    del record["base_numbers"], record["digest"]
    path.write_text(json.dumps(record | {"base_digest": digest}))


@pytest.mark.parametrize("saved", TYPES, ids=str)
@pytest.mark.parametrize("methods", [LoRA(r=2), PromptTuning(2), QLORA], ids=lambda m: m.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_goes_on_its_base_in_any_type(family, methods, saved, tmp_path):
    with attach(tiny(family, saved), methods) as tuned:
        folder = tuned.save(tmp_path)
    for dtype in TYPES:
        with attach(tiny(family, dtype), folder) as there:
            if "QLoRA" not in there.label:
                there.keep("again", folder)
        with pytest.raises(ValueError, match="other weights"):
            attach(tiny(family, dtype, seed=1), folder)


@pytest.mark.parametrize("saved", TYPES, ids=str)
def test_an_adapter_of_the_first_version_in_any_type(saved, tmp_path):
    base = tiny("llama", saved)
    with attach(base, LoRA(r=2)) as tuned:
        folder = tuned.save(tmp_path)
    old_record(folder, base.digest)
    attach(tiny("llama"), folder)
    with pytest.raises(ValueError, match="other weights"):
        attach(tiny("llama", seed=1), folder)
    for dtype in set(TYPES[1:]) - {saved}:
        with pytest.warns(UserWarning, match="shows only if that is loaded in float32"):
            attach(tiny("llama", dtype), folder)


def test_tokens_added_after_loading(tmp_path):
    """The base's facts are those of now, and LoRA of q and v does not depend on the vocabulary."""
    base = tiny("gpt2")
    with attach(base, LoRA(r=2)) as tuned:
        small = tuned.save(tmp_path / "small")
    base.model.resize_token_embeddings(300)
    base.model.requires_grad_(False)
    assert base.anatomy.shape.vocab == base.anatomy.embedding.num_embeddings == 300
    with attach(base, FullFineTuning()) as tuned:
        assert tuned.count().parameters == sum(p.numel() for p in base.model.parameters())
        whole = tuned.save(tmp_path / "whole")
    for folder in (small, whole):
        with attach(base, folder):
            pass
    with pytest.raises(ValueError):
        attach(tiny("gpt2"), whole)


def test_other_shapes_are_refused(tmp_path):
    with attach(tiny("gpt2"), LoRA(r=2)) as tuned:
        folder = tuned.save(tmp_path)
    with pytest.raises(ValueError, match="was trained on"):
        attach(tiny("llama"), folder)


# --- what the model says -----------------------------------------------------------------------

OTHERS = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 4},
    {"num_beams": 2, "num_return_sequences": 2},
    {"suppress_tokens": list(range(5, 200))},
    {"min_new_tokens": 9},
    {"return_dict_in_generate": True},
    {"prompt_lookup_num_tokens": 3},
    {"guidance_scale": 1.5},
    {"do_sample": True, "temperature": 9.0},
    {"cache_implementation": "static"},
    {"max_length": 3},
]


@pytest.mark.parametrize("others", OTHERS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("case", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_greedy_is_greedy_whatever_the_base_is_configured_to_do(family, case, others):
    tuned = adapted(case, family)
    prompts = ["ab ab ab", "hello"]
    wanted = tuned.generate(prompts, 8)
    config = tuned.model.generation_config
    for name, value in others.items():
        setattr(config, name, value)
    assert tuned.generate(prompts, 8) == wanted and tuned.model.generation_config is config
    tuned.detach()
    base = tuned.base
    plain = tiny(family).generate(prompts, 8)
    assert base.generate(prompts, 8) == plain


@pytest.mark.parametrize("where", ["generation_config", "config"])
@pytest.mark.parametrize("several", [True, False])
def test_every_token_that_is_named_as_an_end_ends(where, several):
    base = tiny("gpt2")
    ids = base.tokenizer(["ab"], return_tensors="pt")["input_ids"]
    said = base.model.generate(ids, max_new_tokens=8, do_sample=False)[0, 2:].tolist()
    end = next(token for token in said if token != said[0])
    getattr(base.model, where).eos_token_id = [0, end] if several else end
    wanted = base.tokenizer.decode(said[: said.index(end) + 1])
    assert base.generate(["ab"], 8) == [wanted] and len(said) > said.index(end) + 1


def test_a_static_cache_beside_virtual_tokens_is_refused_in_words():
    tuned = adapted("prompt", "llama")
    batch = tuned.tokenizer(["ab"], return_tensors="pt")
    with pytest.raises(ValueError, match="static cache"):
        tuned.model.generate(**batch, max_new_tokens=2, cache_implementation="static")


def test_who_saves_the_model_with_codes_saves_their_numbers(tmp_path):
    base = tiny("gpt2")
    tuned, ids = attach(base, NF4(8)), token_ids(1, 5)
    with torch.no_grad():
        wanted = call(tuned, ids)
    tuned.model.save_pretrained(tmp_path)
    assert all(t.isfinite().all() for t in load_file(tmp_path / "model.safetensors").values())
    other = tiny("gpt2")
    other.model.load_state_dict(tuned.model.state_dict())
    with torch.no_grad():
        assert (call(other, ids) - wanted).abs().max() <= ROUNDING * wanted.abs().max()


# --- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["parallel", "prompt", "p mlp", "deep", "prefix mlp", "mam"])
def test_two_threads_in_one_model(case):
    """Batches of different lengths at the same time have the logits that each has alone."""
    tuned = adapted(case, "llama")
    batches = [token_ids(2, length) for length in (5, 9, 13)]
    with torch.no_grad():
        wanted = [call(tuned, ids) for ids in batches]
    wrong = []

    def run(which: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(15):
                    if not torch.equal(call(tuned, batches[which]), wanted[which]):
                        wrong.append(which)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert call(copy.deepcopy(tuned), batches[0]).shape == wanted[0].shape


def test_what_a_thread_sets_is_its_own():
    value = site.PerThread()
    value.set(1)
    seen = []
    thread = threading.Thread(target=lambda: (seen.append(value.get()), value.set(2)))
    thread.start()
    thread.join()
    assert seen == [1] and value.get() == 1 and copy.deepcopy(value).get() is None


# --- files of others ---------------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "kind, count",
    [(hostile_files.adapters, 60), (hostile_files.bases, 8), (hostile_files.examples, 40)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_sample_of_hostile_files(kind, count, tmp_path):
    found, told = kind(count, random.Random(3), tmp_path)
    assert not told and not found.keys() & {"unclear", "silent", "hanging", "base"}
    assert found["refused"] > 0 and found.total() == count


def test_what_was_measured():
    """The results that lie in `data/`, at the numbers that they are worth quoting for."""
    faults = json.loads(data_path("results", "faults.json").read_text(encoding="utf-8"))
    (failures,), (saves,), (exports,) = (faults[key] for key in ("failures", "save", "export"))
    assert failures["failures"] >= 1000 and failures["base changed"] == []
    assert (saves["kills"], exports["kills"]) == (500, 200)
    for kills in (saves, exports):
        assert kills["whole"] == kills["kills"]
    files = json.loads(data_path("results", "hostile_files.json").read_text(encoding="utf-8"))
    assert files["unclear, silent or hanging"] == []
    assert sum(row["read"] for row in files["rows"]) >= 2500
    assert not any(row.get("base") for row in files["rows"])


def test_where_folders_cannot_change_places_nothing_is_lost(tmp_path, monkeypatch):
    """No exchange in one step, no second name for a file, and the second of two renames fails."""
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    tuned, folder = attach(tiny("gpt2"), LoRA(r=2)), tmp_path / "it"
    tuned.save(folder)
    (folder / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        failing_at(patch, os, "link", 1, OSError("no second names"))
        tuned.save(folder)
    assert (folder / "README.md").read_text() == "mine"
    stir(tuned)
    with monkeypatch.context() as patch:
        failing_at(patch, Path, "rename", 2, OSError("no room"))
        with pytest.raises(OSError, match="nothing was changed: no room"):
            tuned.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a folder cannot be opened")
def test_what_was_saved_has_reached_the_disk(tmp_path, monkeypatch):
    """First the files, and at last the folder that they were renamed in."""
    written = []

    def seen(file):
        written.append(os.fstat(file if isinstance(file, int) else file.fileno()).st_ino)

    monkeypatch.setattr(os, "fsync", seen)
    folder = attach(tiny("gpt2"), LoRA(r=2)).save(tmp_path / "it")
    assert written[-1] == tmp_path.stat().st_ino
    assert set(written[:-1]) == {path.stat().st_ino for path in folder.iterdir()}
