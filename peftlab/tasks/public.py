"""Public data sets: rows out of a folder, or out of the `datasets` library by their hub names.

None of them ships with peftlab. `rows` looks for a folder of the data set's name in the folder that
the environment variable PEFTLAB_DATASETS names, then on the hub. Both give the same rows, and
everything after that is the same: a task need not know where its examples came from.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 5  # to wait for the hub's answer, once
SPLITS = ("train", "validation", "test")  # as the hub calls them


@dataclass(frozen=True)
class Source:
    """Where a data set is, and how a row of it is read."""

    name: str  # of the folder
    hub: str
    files: dict[str, str]  # split to file
    parse: Callable[[str], list[dict]]  # the text of a file to rows
    convert: Callable[[dict], dict]  # a row of the hub to such a row
    revision: str | None = None
    optional: tuple[str, ...] = ()  # splits that a folder may lack


def rows(source: Source) -> dict[str, list[dict]]:
    """The rows of each split; says where they are from if that is the hub.

    Raises FileNotFoundError if the data set is in neither place, and ValueError for a file that
    cannot be read, with its line.
    """
    folder = os.environ.get("PEFTLAB_DATASETS")
    if folder and Path(folder, source.name).is_dir():
        return _from_folder(source, Path(folder, source.name))
    missing = (
        f"no data set {source.name!r}: PEFTLAB_DATASETS "
        + (f"({folder}) has no folder {source.name}" if folder else "is not set")
        + f", and {source.hub} cannot be had from the hub: {{}}. Put "
        f"{', '.join(source.files.values())} into a folder {source.name} and name the folder above "
        "it in PEFTLAB_DATASETS; or, with a network, pip install datasets"
    )
    return _from_hub(source, missing)


def _from_folder(source: Source, folder: Path) -> dict[str, list[dict]]:
    found = {}
    for split, file in source.files.items():
        path = folder / file
        if not path.is_file():
            if split in source.optional:
                continue
            raise FileNotFoundError(f"{folder} has no {file}, which is the {split} split")
        try:
            found[split] = source.parse(path.read_bytes().decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not found[split]:
            raise ValueError(f"{path}: no rows")
    return found


def _from_hub(source: Source, missing: str) -> dict[str, list[dict]]:
    if importlib.util.find_spec("datasets") is None:
        raise FileNotFoundError(missing.format("the library datasets is not installed"))
    import datasets
    import huggingface_hub

    constants, unreached = huggingface_hub.constants, None
    if not constants.HF_HUB_OFFLINE:
        try:  # once, where the library would try for minutes
            huggingface_hub.HfApi().dataset_info(source.hub, timeout=SECONDS)
            print(f"{source.name}: downloading {source.hub} from {constants.ENDPOINT}", flush=True)
        except Exception as error:  # whatever the client's HTTP library raises
            unreached = error
    try:
        with _offline(constants, datasets.config) if unreached else contextlib.nullcontext():
            loaded = datasets.load_dataset(source.hub, revision=source.revision)
    except Exception as error:
        cause = unreached or error
        told = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise FileNotFoundError(missing.format(told)) from cause
    print(f"{source.name}: {source.hub}, in this machine's cache of data sets", flush=True)
    try:
        return {split: [source.convert(row) for row in loaded[split]] for split in source.files}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{source.hub} has other rows than are read here: {error!r}") from error


@contextlib.contextmanager
def _offline(*settings):
    """Nobody is asked inside: what is in the cache is used."""
    before = [each.HF_HUB_OFFLINE for each in settings]
    for each in settings:
        each.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.HF_HUB_OFFLINE = value


def lines(text: str, separator: str, parts: int = 2) -> list[list[str]]:
    """Each line of the text in its parts, empty lines as none. Raises ValueError with the line."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        pieces = line.rstrip("\r").split(separator, parts - 1) if line.strip() else []
        if pieces and len(pieces) != parts:
            raise ValueError(f"line {number} has no {separator!r}: {line[:60]!r}")
        found.append(pieces)
    return found


def some(values: list, number: int | None, seed: int, what: str) -> list:
    """`number` of the values, drawn by the seed and in their order; all of them for None."""
    if number is None:
        return values
    if not 1 <= number <= len(values):
        raise ValueError(f"{what}={number}: allowed is 1 to {len(values):,}, or None for all")
    chosen = random.Random(seed).sample(range(len(values)), number)
    return [values[i] for i in sorted(chosen)]


def split_off(values: list, number: int) -> tuple[list, list]:
    """The values without `number` of them, and those: always the same ones.

    Raises ValueError unless some are left.
    """
    if number >= len(values):
        raise ValueError(f"{len(values)} examples are too few to take a dev split out of them")
    chosen = set(random.Random(0).sample(range(len(values)), number))
    kept = [value for i, value in enumerate(values) if i not in chosen]
    return kept, [values[i] for i in sorted(chosen)]
