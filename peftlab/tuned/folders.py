"""Folders that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import safetensors

HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
NOTES = ("README.md", ".gitattributes")  # somebody's own, in any folder: they stay


@contextlib.contextmanager
def replaced(folder: Path, known: tuple[str, ...], what: str) -> Iterator[Path]:
    """Inside, a new folder to write into; then it takes the place of `folder`, which goes.

    `folder` may be missing, empty, or hold files with names like `known`; a README stays. The new
    one is written beside it and flushed to the disk, and then the two change places in one step
    where the system can do that (Linux). Whatever fails or stops before, the old folder is whole.
    Raises FileExistsError if `folder` is a file, the working folder, or holds anything else, and
    OSError if the new one cannot be written.
    """
    place = folder.expanduser().resolve()
    _check(folder, place, known, what)
    new = place.with_name(f".new-{uuid.uuid4().hex[:8]}")
    try:
        new.mkdir(parents=True)
        yield new
        for note in (place / name for name in NOTES):
            if note.is_file():
                shutil.copy2(note, new)
        for file in (path for path in new.rglob("*") if path.is_file()):
            file.chmod(new.stat().st_mode & 0o666)  # safetensors writes for the owner alone
            with file.open("rb") as written:
                os.fsync(written)
        _put(new, place)
    except (OSError, safetensors.SafetensorError) as error:
        kind = type(error) if isinstance(error, OSError) else OSError
        told = f"{what} cannot be written to {str(folder)!r}, where nothing was changed: {error}"
        raise kind(told) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check(folder: Path, place: Path, known: tuple[str, ...], what: str) -> None:
    """Raise FileExistsError unless the place may be taken."""
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file: {what} goes into a folder of its own")
    if place in (here := Path.cwd().resolve(), *here.parents):
        raise FileExistsError(f"{str(folder)!r} is the working folder: give {what} one of its own")
    names = sorted(path.name for path in place.iterdir()) if place.exists() else []
    for name in names:
        if not any(fnmatch(name, pattern) for pattern in (*known, *NOTES)):
            raise FileExistsError(
                f"{str(folder)!r} holds {name!r}, no part of {what}, and would be replaced "
                "whole: give a new or an empty folder"
            )


def _put(new: Path, place: Path) -> None:
    """Put the new folder in its place; after an exchange, the old one is where the new one was."""
    if not place.exists():
        new.rename(place)
    elif not _exchange(new, place):
        old = new.with_name(f"{new.name}.old")
        place.rename(old)
        try:
            new.rename(place)
        except BaseException:
            old.rename(place)
            raise
        shutil.rmtree(old)
    if os.name == "posix":  # the rename itself reaches the disk
        parent = os.open(place.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    paths = (HERE, os.fsencode(one), HERE, os.fsencode(other))
    return rename is not None and rename(*paths, EXCHANGE) == 0
