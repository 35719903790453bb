"""Damaged and hostile files: refused in one sentence, or what they were.

    python -m peftlab.experiments.hostile_files      # writes data/results/hostile_files.json

Good folders of adapters and of a base, and files of tasks, are changed at places drawn by the seed:
bits, lengths, whole files, values in JSON, tensors. Then they are read. Counted are

    refused    an error of ours, or of the system, in one sentence that names the folder or the file
    same       read, and what was read is what was written
    other      read as something else, which a file without a record of ours may be
    unclear    another error, or a sentence that names nothing
    silent     read as something else in spite of our record, or with numbers that are not finite
    hanging    no answer after 20 seconds
    base       the base that the adapter was meant for is changed afterwards
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import peftlab
from peftlab import methods as m
from peftlab import tasks
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.experiments.inject_faults import stirred
from peftlab.experiments.sweep_soft import write
from peftlab.tuned import attach

SECONDS = 20
DEEP = json.loads("[" * 200 + "]" * 200)
VALUES = [None, True, -1, 0, 3, 1e308, 10**9, float("nan"), "", "x", "é\u2028", [], {}, DEEP]
VALUES += [["q"] * 3, {"r": 4}, "(a+)+$", "../../etc/passwd", "q" * 10_000]
RAW = [b"", b"{", b"\xff\xfe\x00", b"version https://git-lfs.github.com/spec/v1\n", b"null"]
ADAPTERS = {
    "PEFT's files with our record": m.LoRA(r=2),
    "of codes": m.QLoRA(r=2),
    "ours alone": m.HoulsbyAdapter(2),
    "a prompt": m.PromptTuning(3),
    "a mask": [m.Prune(0.5), m.LoRA(r=2)],
    "PEFT's files alone": m.LoRA(r=2, target_modules="all-linear"),
}
HERE = str(Path(peftlab.__file__).parent)


def bits(path: Path, rng: random.Random) -> None:
    """Turn over one to eight bits."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def length(path: Path, rng: random.Random) -> None:
    """Cut the file, or add to it."""
    data = path.read_bytes()
    cut = data[: rng.randrange(len(data))]
    path.write_bytes(rng.choice([cut, data + b"\x00" * 9, data + data[:50]]))


def whole(path: Path, rng: random.Random) -> None:
    """Another file in its place, or none, or a folder."""
    path.unlink()
    if (kind := rng.randrange(len(RAW) + 2)) < len(RAW):
        path.write_bytes(RAW[kind])
    elif kind == len(RAW):
        path.mkdir()


def values(path: Path, rng: random.Random) -> None:
    """Change, drop or add a value somewhere in a JSON file, or in a line of one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else None
    at = rng.randrange(len(lines)) if lines else 0
    top = json.loads(lines[at] if lines else path.read_text(encoding="utf-8"))
    place = top
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
            place = place[key]
            continue
        break
    if rng.random() < 0.2:
        del place[key]
    elif rng.random() < 0.2 and isinstance(place, dict):
        place[rng.choice(["extra", "r", ""])] = rng.choice(VALUES)
    else:
        place[key] = rng.choice(VALUES)
    text = json.dumps(top, ensure_ascii=False)
    if lines:
        lines[at] = text
        text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")


def numbers(path: Path, rng: random.Random) -> None:
    """Change a tensor: its numbers, type, size or name, or leave it out."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = rng.randrange(9)
    if kind < 3:
        tensor = tensor.float().clone()
        tensor.view(-1)[rng.randrange(tensor.numel())] = [float("nan"), float("inf"), 7.0][kind]
    if kind < 8:
        tensors[name + ("x" if kind == 7 else "")] = {
            3: lambda t: t.to(rng.choice([torch.int32, torch.bool, torch.float64])),
            4: lambda t: t.new_zeros(0),
            5: lambda t: t.T.contiguous() if t.ndim == 2 else t[:1].clone(),
            6: lambda t: torch.zeros(10_000, 3),
        }.get(kind, lambda t: t)(tensor)
    save_file(tensors, path, metadata={"format": "pt"})


def change(path: Path, rng: random.Random) -> str:
    """Change one file in a way that fits its kind; its name."""
    ways: list[Callable] = [bits, length, whole]
    ways += [values] * 4 if path.suffix in (".json", ".jsonl") else []
    ways += [numbers] * 4 if path.suffix == ".safetensors" else []
    way = rng.choice(ways)
    way(path, rng)
    return f"{way.__name__} of {path.name}"


def asked(read: Callable, folder: Path) -> tuple[str, object]:
    """How reading ends: "read" and what was read, or what kind of error, and the error."""

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return "read", read(folder)
    except TimeoutError:
        return "hanging", None
    except (ValueError, OSError) as error:
        told, last = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
        names = [folder.name, *(path.name for path in folder.parent.rglob("*"))]
        system = isinstance(error, OSError)
        ours = last.startswith(HERE) or system
        clear = ours and len(told) < 1500 and any(name in told for name in names)
        return ("refused" if clear else "unclear"), error
    except BaseException as error:
        return "unclear", error
    finally:
        signal.alarm(0)


def adapters(count: int, rng: random.Random, scratch: Path) -> tuple[Counter, list[str]]:
    """Folders of adapters, put on the base that they were made for."""
    base, found, told = load("tiny-gpt"), Counter(), []
    before, good, meant = base.fingerprint(), {}, {}
    for i, (label, methods) in enumerate(ADAPTERS.items()):
        with stirred(attach(base, methods), i) as tuned:
            good[label] = tuned.save(scratch / str(i))
        if label.endswith("alone") and (good[label] / "peftlab.json").exists():
            (good[label] / "peftlab.json").unlink()
        with attach(base, good[label]) as tuned:
            meant[label] = _meaning(tuned)
    for _ in range(count):
        label = rng.choice(list(ADAPTERS))
        folder = scratch / "changed" / "adapter"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(good[label], folder)
        way = change(rng.choice(sorted(folder.iterdir())), rng)
        ends, what = asked(partial(attach, base), folder)
        if ends == "read":
            finite = all(t.isfinite().all() for t in what.state().values())
            ends = "same" if _meaning(what) == meant[label] else "other"
            gone = way == "whole of peftlab.json"  # then it is PEFT's files alone
            recorded = label != "PEFT's files alone" and not gone
            if not finite or (ends == "other" and recorded):
                ends = "silent"
        base.detach()
        if base.fingerprint() != before:
            found["base"] += 1
            base = load("tiny-gpt")
        found[ends] += 1
        if ends in ("unclear", "silent", "hanging"):
            told.append(f"{label}, {way}: {type(what).__name__}: {str(what)[:200]}")
    return found, told


def _meaning(tuned) -> tuple:
    state = {name: tensor.numpy().tobytes() for name, tensor in tuned.state().items()}
    return [method.to_dict() for method in tuned.methods], tuned.head, state


def bases(count: int, rng: random.Random, scratch: Path) -> tuple[Counter, list[str]]:
    """Folders of a base."""
    found, told, folder = Counter(), [], scratch / "base" / "tiny"
    for _ in range(count):
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(data_path("bases") / "tiny-gpt", folder)
        way = change(rng.choice(sorted(folder.iterdir())), rng)
        ends, what = asked(load, folder)
        if ends == "read":
            finite = all(p.isfinite().all() for p in what.model.parameters())
            ends = "other" if finite else "silent"
        found[ends] += 1
        if ends in ("unclear", "silent", "hanging"):
            told.append(f"a base, {way}: {type(what).__name__}: {str(what)[:200]}")
    return found, told


def examples(count: int, rng: random.Random, scratch: Path) -> tuple[Counter, list[str]]:
    """Files of tasks."""
    found, told, path = Counter(), [], scratch / "task" / "train.jsonl"
    source = data_path("tasks", "facts", "train.jsonl")
    good = source.read_bytes().splitlines(keepends=True)[:20]
    for _ in range(count):
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(good))
        way = change(path, rng)
        ends, what = asked(tasks.read, path)
        if ends == "read":
            texts = all(isinstance(e.prompt, str) and isinstance(e.target, str) for e in what)
            ends = "other" if texts else "silent"
        found[ends] += 1
        if ends in ("unclear", "silent", "hanging"):
            told.append(f"a task, {way}: {type(what).__name__}: {str(what)[:200]}")
    return found, told


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=1500)
    parser.add_argument("--bases", type=int, default=500)
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scratch, rows, told = Path(tempfile.mkdtemp()), [], []
    asked_for = {adapters: options.adapters, bases: options.bases, examples: options.tasks}
    for kind, count in asked_for.items():
        found, lines = kind(count, random.Random(options.seed), scratch)
        rows.append({"files": kind.__name__, "read": count} | dict(sorted(found.items())))
        told += lines
        print(rows[-1], *lines, sep="\n", flush=True)
    shutil.rmtree(scratch)
    facts = {
        "command": f"python -m peftlab.experiments.hostile_files --seed {options.seed}",
        "seed": options.seed,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "unclear, silent or hanging": told,
    }
    write(options.out / "hostile_files.json", facts, {"rows": rows})


if __name__ == "__main__":
    main()
