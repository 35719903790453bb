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
def replaced(folder: Path, own: tuple[str, ...], what: str, keep: bool = False) -> Iterator[Path]:
    """Inside, a new folder to write into; then it takes the place of `folder`, which goes.

    The new one is written beside the old one and flushed to the disk, and then the two change
    places in one step where the system can do that (Linux). Whatever fails or stops before, the old
    folder is whole. What it holds of other names than `own` goes along with `keep`, as a README
    does always; otherwise it is refused. Raises FileExistsError for that, for a file and for the
    working folder, and OSError if the new folder cannot be written.
    """
    place = folder.expanduser().resolve()
    others = _others(folder, place, own, what)
    if foreign := [path.name for path in others if not keep and path.name not in NOTES]:
        raise FileExistsError(
            f"{str(folder)!r} holds {foreign[0]!r}, no part of {what}, and would be replaced: "
            "give a new or an empty folder"
        )
    new = place.with_name(f".new-{uuid.uuid4().hex[:8]}")
    try:
        new.mkdir(parents=True)
        yield new
        for file in (path for path in new.rglob("*") if path.is_file()):
            file.chmod(new.stat().st_mode & 0o666)  # safetensors writes for the owner alone
            with file.open("rb") as written:
                os.fsync(written)
        for path in others:
            if path.is_dir():
                shutil.copytree(path, new / path.name, symlinks=True, copy_function=_linked)
            elif not (new / path.name).exists():
                _linked(path, new / path.name)
        _put(new, place)
    except (OSError, safetensors.SafetensorError) as error:
        kind = type(error) if isinstance(error, OSError) else OSError
        told = f"{what} cannot be written to {str(folder)!r}, where nothing was changed: {error}"
        raise kind(told) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _others(folder: Path, place: Path, own: tuple[str, ...], what: str) -> list[Path]:
    """What is there under other names. Raises FileExistsError unless the place may be taken."""
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file: {what} goes into a folder of its own")
    if place in (here := Path.cwd().resolve(), *here.parents):
        raise FileExistsError(f"{str(folder)!r} is the working folder: give {what} one of its own")
    found = sorted(place.iterdir()) if place.exists() else []
    return [path for path in found if not any(fnmatch(path.name, pattern) for pattern in own)]


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


def _linked(path: str | Path, to: str | Path) -> None:
    """The same file under a second name, or a copy where the system has no such names."""
    try:
        os.link(path, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, to, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    paths = (HERE, os.fsencode(one), HERE, os.fsencode(other))
    return rename is not None and rename(*paths, EXCHANGE) == 0
