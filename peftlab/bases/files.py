"""Files that somebody else wrote: read, or refused in one sentence that names the file.

Every problem with what a file says is a ValueError. A file that cannot be opened raises the error
of the system, FileNotFoundError or PermissionError.
"""

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POINTER = b"version https://git-lfs"


def shortened(error: object, most: int = 600) -> str:
    """The first line of what an error says, cut if a file made it long."""
    told = next(iter(str(error).splitlines()), "")
    return told if len(told) <= most else f"{told[:most]} …"


def check_fetched(path: Path) -> None:
    """Raise ValueError if Git LFS left a pointer in place of the file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path.name} is a Git LFS pointer: run git lfs pull in its folder")


def read_json(path: Path) -> dict:
    """The object in a JSON file, with or without a byte order mark."""
    check_fetched(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError for a number that is not finite."""
    check_fetched(path)
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors' own, or one of torch for a type that it lacks
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{path.name} has numbers that are not finite in {name}")
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, in 32 bits."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def unusable(model: nn.Module) -> dict[str, str]:
    """The problem with each parameter that no model can compute with, by its name."""
    problems = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOATS:
            problems[name] = f"holds {parameter.dtype}: load the unquantised weights"
        elif not is_finite(parameter):
            problems[name] = "has numbers that are not finite"
    return problems


def built(kind: type, given: Any) -> Any:
    """The dataclass with these fields. Raises TypeError for a field that is unknown, is missing or
    has a value of another type."""
    if not isinstance(given, dict):
        raise TypeError(f"{given!r:.60} is no object")
    try:
        made = kind(**given)
    except AttributeError as error:
        raise TypeError(str(error)) from error
    for name, hint in _hints(kind).items():
        if not _fits(value := getattr(made, name), hint):
            needed = hint.__name__ if isinstance(hint, type) else str(hint)
            raise TypeError(f"{name}={value!r:.60}: {needed} is needed")
    return made


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value is of this type; a list stands for a tuple, and a whole number for any."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    if kind not in (list, tuple):
        return isinstance(value, (int, float) if kind is float else kind)
    if not isinstance(value, (list, tuple)):
        return False
    if kind is list or ... in parts:
        return all(_fits(each, parts[0]) for each in value) if parts else True
    return not parts or len(parts) == len(value) and all(map(_fits, value, parts))
