"""Adapters as folders: written, read with checks, and exported as plain models.

`tuned.save`, `Tuned.load` and `tuned.merge_and_export` call these functions; `layouts` beside this
file converts to and from PEFT.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftlab.bases import Base, LanguageModel, _quiet
from peftlab.bases.files import is_finite, read_json, read_tensors, shortened
from peftlab.methods import NF4, Method
from peftlab.methods.heads import Head
from peftlab.sites import Site
from peftlab.sites.structures import SmallerShape
from peftlab.tuned import layouts
from peftlab.tuned.folders import replaced
from peftlab.tuned.identity import same_numbers

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PICKLED = (
    f"{PICKLE} there is a pickle, which can run code when it is read, so it is not read. "
    "Convert it to safetensors: PEFT's save_pretrained writes them"
)
ADAPTERHUB = (
    f"{CONFIG} is AdapterHub's, whose layout is not read. Merge the adapter there (merge_adapter) "
    "and give the folder of the merged model to peftlab.load"
)
INSTEAD = {  # what another program leaves in an adapter's folder, and what to do with it
    PICKLE: PICKLED,
    "adapter_model*-of-*.safetensors": (
        "its weights are in several files: join their tensors in one, with safetensors' load_file "
        "and save_file"
    ),
    "adapters.safetensors": (
        "adapters.safetensors there is MLX's, whose layout is not read. mlx_lm.fuse merges it into "
        "a model, and peftlab.load reads the folder of that"
    ),
    "pytorch_adapter.bin": ADAPTERHUB,
    "adapter.safetensors": ADAPTERHUB,
    "config.json": "a model is there, which peftlab.load reads",
}
RECORD = "peftlab.json"  # our record, where CONFIG is PEFT's
FORMATS = {CONFIG: 1, RECORD: 2}
ROOM = 10_000_000  # numbers that may be made before each tensor's size is compared
# Hyper-parameters that decide the meaning of tensors of the same size.
MEANING = ("name", "placement", "shift_positions", "depth", "r", "init_r", "alpha", "use_rslora")
MEANING += ("projection_prng_key",)
FACTS = ("family", "layers", "d_model")  # not the vocabulary: tokens may be added
MODEL = ("*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*")
MODEL += ("merges.txt", "*_tokens*.json", "*.model", "*chat_template*", "source.json")


def save(tuned: LanguageModel, folder: Path) -> Path:
    """Write PEFT's own layout if it holds all that is stored, otherwise ours."""
    with suppress(layouts.Unknown):
        layout = layouts.Layout.of(tuned)
        if layout.whole:
            return write_peft(tuned, layout, folder)
    return _write(folder, tuned.state(), {CONFIG: _record(tuned, tuned.folded, CONFIG)})


def write_peft(tuned: LanguageModel, layout: layouts.Layout, folder: Path) -> Path:
    """Write PEFT's two files and our record beside them."""
    methods = [m if isinstance(m, NF4) else layout.method for m in tuned.folded]
    described = {CONFIG: layout.config, RECORD: _record(tuned, methods, RECORD)}
    return _write(folder, layout.tensors, described)


def _record(tuned: LanguageModel, methods: list[Method], file: str) -> dict:
    """The record of a saved adapter, for this file: these methods, on this base."""
    return {
        "format": FORMATS[file],
        "base": tuned.name,
        "base_shape": tuned.facts,
        "base_numbers": tuned.numbers,
        "methods": [method.to_dict() for method in methods],
        "trained_as": [method.to_dict() for method in tuned.methods],
        "head": tuned.head.to_dict() if tuned.head else None,
    }


def _write(folder: Path, tensors: dict[str, Tensor], described: dict[str, dict]) -> Path:
    """Write the tensors and the JSON files in place of an earlier adapter.

    Raises ValueError for a tensor that is not finite, which nothing would read again.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{name} has numbers that are not finite: the adapter is not saved")
    with replaced(folder, (CONFIG, WEIGHTS, PICKLE, RECORD), "an adapter", keep=True) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        for name, config in described.items():
            if "format" in config:
                config = config | {"digest": _digest(config, new / WEIGHTS)}
            (new / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _digest(record: dict, weights: Path) -> str:
    """SHA-256 of the record, without its digest, and of the file with the weights."""
    rest = json.dumps({k: v for k, v in record.items() if k != "digest"}, sort_keys=True)
    with weights.open("rb") as file:
        both = hashlib.file_digest(file, "sha256").digest() + rest.encode()
    return hashlib.sha256(both).hexdigest()


def export(tuned: LanguageModel, folder: Path) -> Path:
    """Write a plain transformers folder with the change in its weights, and the tokenizer."""
    if tuned.head is not None:
        raise ValueError("a head is no part of a transformers model: it cannot be exported")
    if isinstance(tuned.anatomy.shape, SmallerShape):
        raise ValueError(
            f"{tuned.label}: the sublayers that are left differ in size, which no configuration "
            "of transformers can say: it cannot be exported"
        )
    loose = [site for site in tuned.mergeable() if not site.merged]
    for site in loose:  # a delta is added to the decoded weight in plain numbers
        if site.linear.code and site.delta is None:
            raise ValueError(f"{site.name} cannot be merged into codes")
    try:
        for site in loose:
            if site.linear.code is None:
                site.merge()
        with _quiet(), replaced(folder, MODEL, "a model") as new:
            tuned.model.save_pretrained(new, state_dict=_plain(tuned, loose))
            tuned.tokenizer.save_pretrained(new)
    finally:
        for site in reversed(loose):
            site.unmerge()
    return folder


@torch.no_grad()
def _plain(tuned: LanguageModel, loose: list[Site]) -> dict[str, Tensor]:
    """The model's tensors, weights held as codes decoded, plus the deltas not merged."""
    state = tuned.model.state_dict()
    names = {module: name for name, module in tuned.model.named_modules()}
    for site in loose:
        if site.linear.code is not None:
            weight = state[f"{names[site.linear.module]}.weight"]
            rows = weight.T if site.linear.transposed else weight
            delta = site.delta if site.instead is None else site.instead
            rows[site.linear.index] += delta.delta_weight().to(rows.dtype)
    return state


def read(folder: str | Path, base: Base) -> tuple[dict, layouts.Fill]:
    """The configuration of a saved adapter, with its methods and head built, and a function that
    returns its tensors once these are attached. Raises ValueError if it is for another base."""
    folder = Path(folder)
    _check_there(folder)
    name = RECORD if (folder / RECORD).is_file() else CONFIG
    with _damaged(folder, name):
        config, theirs = read_json(folder / name), read_json(folder / CONFIG)
    if "config" in theirs and not {"peft_type", "format"} & theirs.keys():
        raise ValueError(f"the adapter in {str(folder)!r}: {ADAPTERHUB}")
    peft_alone = name == CONFIG and "peft_type" in config
    with _damaged(folder, name):
        if not peft_alone:
            if config["format"] != FORMATS[name]:
                raise ValueError(f"format {config['format']}; this peftlab reads {FORMATS[name]}")
            digest = _digest(config, folder / WEIGHTS)
            config["methods"] = [Method.from_dict(method) for method in config["methods"]]
            head = config["head"]
            config["head"] = None if head is None else Head.from_dict(head)
            if not config["methods"] and head is None:
                raise ValueError("no method and no head is in it")
            _checked_facts(config)
    with _damaged(folder, WEIGHTS):
        tensors = read_tensors(folder / WEIGHTS)
    if peft_alone:  # PEFT stores at most the base's name: `layouts.read` checks each tensor's size
        with _damaged(folder, CONFIG, fitting=True):
            codes = [Method.from_dict(theirs.pop(layouts.CODES))] if layouts.CODES in theirs else []
            method, fill = layouts.read(base, theirs, tensors)
        return {"methods": [*codes, method], "head": None}, partial(_filled, folder, fill)
    _check_base(config, base)
    with _damaged(folder, name):
        _check_room(config["methods"], config["head"], base, tensors)
    changed = ""
    if config.get("digest", digest) != digest:  # the first version wrote none
        changed = f"{name} or {WEIGHTS} is not as it was written: one was changed"

    def fill(tuned: LanguageModel) -> dict[str, Tensor]:
        return layouts.Layout.of(tuned).read(theirs, tensors) if name == RECORD else tensors

    return config, partial(_filled, folder, fill, changed=changed)


def _filled(
    folder: Path, fill: layouts.Fill, tuned: LanguageModel, changed: str = ""
) -> dict[str, Tensor]:
    """The tensors of what is attached. Raises ValueError for the tensor that does not fit, and if
    all fit, for what was `changed`."""
    with _damaged(folder, WEIGHTS, fitting=True):
        ours = fill(tuned)
        layouts.check_shapes(ours, tuned.state())
        if changed:
            raise ValueError(changed)
        return ours


def _checked_facts(config: dict) -> None:
    """Raise KeyError, TypeError or ValueError unless the record says enough of its base."""
    first = "base_digest" in config  # as the first version wrote it
    for key in ("base", "trained_as", *(() if first else ("base_numbers", "digest"))):
        config[key]
    for fact in FACTS:
        config["base_shape"][fact]
    for numbers in dict(config.get("base_numbers", {})).values():
        for number in numbers:
            math.isfinite(number)


def _check_there(folder: Path) -> None:
    """Raise FileNotFoundError unless the two files are there, saying what is there instead."""
    if folder.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is a file: give the folder that it is in")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            missing = f"no {name} in {str(folder)!r}"
            for pattern, told in INSTEAD.items():
                if any(folder.glob(pattern)):
                    raise FileNotFoundError(f"{missing}: {told}")
            inside = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))
            told = (
                f"give {' or '.join(map(repr, inside))}" if inside else "no adapter was saved there"
            )
            raise FileNotFoundError(f"{missing}: {told}")


def _check_room(methods: list[Method], head: Head | None, base: Base, tensors: dict) -> None:
    """Raise ValueError for methods that are far larger than the file, before they are made."""
    shape, declared = base.anatomy.shape, 0
    if head is not None:
        declared, shape = head.parameters(shape.d_model), shape.without_head()
    for method in methods:
        if method.folded() != method:
            raise ValueError(f"{method} is stored as {method.folded()}")
        declared += max(method.parameters(shape), method.stored(shape))
        shape = method.smaller(shape) if hasattr(method, "smaller") else shape
    held = sum(tensor.numel() for tensor in tensors.values())
    if declared > held + ROOM:
        raise ValueError(f"the methods have {declared:,} numbers, and {WEIGHTS} has {held:,}")


@contextmanager
def _damaged(folder: Path, name: str, fitting: bool = False):
    """Inside, every problem with a file is a ValueError that names it.

    `fitting`: a ValueError says that the adapter does not fit, not that the file is damaged.
    """
    where = f"the adapter in {str(folder)!r}"
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if fitting and isinstance(error, ValueError):
            raise ValueError(f"{where}: {shortened(error)}") from error
        problem = f"{name} has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{where} ({name}) is damaged: {shortened(problem)}") from error


def _check_base(config: dict, base: Base) -> None:
    """Raise ValueError unless the adapter was trained on this base."""
    trained_on, shape = config["base"], config["base_shape"]
    here = base.adapted_by.facts if base.adapted_by else shape_facts(base)
    for fact in FACTS:
        if shape[fact] != here[fact]:
            raise ValueError(
                f"this adapter was trained on {trained_on} {shape}; {base.name} is {here}"
            )
    if not same_numbers(config, base):
        raise ValueError(
            f"this adapter was trained on other weights of {trained_on}'s shape than "
            f"those of {base.name} here: it would be noise on them"
        )


def check_kind(config: dict, tuned: LanguageModel) -> None:
    """Raise ValueError unless the adapter's tensors have the places and meaning of this one's."""
    for ours, theirs in zip_longest(tuned.methods, config["methods"]):
        for key in MEANING:
            mine, other = getattr(ours, key, None), getattr(theirs, key, None)
            if mine != other:
                raise ValueError(f"the adapter has {key}={other!r}; here it is {mine!r}")
        if hasattr(ours, "targets"):
            there = tuned.anatomy.targets
            if set(ours.targets(there)) != set(theirs.targets(there)):
                own, other = ours.target_modules, theirs.target_modules
                raise ValueError(f"the adapter has target_modules={other!r}; here it is {own!r}")
    if config["head"] != tuned.head:
        raise ValueError(f"the adapter has head={config['head']}; here it is {tuned.head}")


def shape_facts(base: Base) -> dict:
    """The facts by which an adapter recognises its base; of these, `FACTS` have to be equal."""
    shape = base.anatomy.shape
    facts = {name: getattr(shape, name) for name in (*FACTS, "vocab")}
    return facts | {"parameters": shape.parameters()}
