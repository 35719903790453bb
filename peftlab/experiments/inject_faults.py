"""Failures and kills at random places: the base has to be as before, a folder old or new.

    python -m peftlab.experiments.inject_faults      # writes data/results/faults.json

A failure is an exception that is raised at a line of peftlab or at an operation of torch, the n-th
of those that a verb runs without it, with n drawn by the seed: a line raises KeyboardInterrupt, as
the stop button does, an operation OutOfMemoryError. Then `base.detach()` is called. The base must
have its tensors, its hooks and its logits, and take another method.

A kill stops a process in `save` or `merge_and_export`, at a random time. The folder, which held a
good adapter or model before, must hold that or the new one, whole.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import peftlab
from peftlab import methods as m
from peftlab.bases import Base, load
from peftlab.bases.data import data_path
from peftlab.experiments.sweep_soft import write
from peftlab.methods import Method
from peftlab.training import move, train
from peftlab.tuned import Tuned, attach

BASES = ("tiny-gpt", "tiny-llama", "tiny-bert", "tiny-t5")
CASES: dict[str, list[Method]] = {
    "full": [m.FullFineTuning()],
    "bitfit": [m.BitFit()],
    "layer norm": [m.LayerNormTuning()],
    "prompt": [m.PromptTuning(3)],
    "deep prompt": [m.DeepPromptTuning(2)],
    "p-tuning": [m.PTuning(3)],
    "prefix": [m.PrefixTuning(3)],
    "prefix mlp": [m.PrefixTuning(3, prefix_projection=True, encoder_hidden_size=8)],
    "v2 + nf4": [m.NF4(), m.PTuningV2(3)],
    "prompt and prefix": [m.PromptAndPrefix(2, encoder_hidden_size=4)],
    "lora": [m.LoRA(r=2, target_modules="all-linear")],
    "dora": [m.DoRA(r=2)],
    "pissa": [m.PiSSA(r=2)],
    "vera": [m.VeRA(r=4)],
    "adalora": [m.AdaLoRA(init_r=3, target_r=2)],
    "qlora": [m.QLoRA(r=2)],
    "houlsby": [m.HoulsbyAdapter(2)],
    "pfeiffer": [m.PfeifferAdapter(2)],
    "parallel": [m.ParallelAdapter(2)],
    "ia3": [m.IA3()],
    "prune + lora": [m.Prune(0.5), m.LoRA(r=2)],
    "prune + full": [m.Prune(0.5), m.FullFineTuning()],
    "smaller + lora": [m.PruneStructures(heads=0.34, neurons=0.25), m.LoRA(r=2)],
    "mam": [m.PrefixTuning(2), m.ParallelAdapter(2)],
}
MERGING = ("lora", "dora", "pissa", "vera", "adalora", "qlora", "ia3", "prune + lora")
SWAPPING = ("prompt", "prefix", "lora", "dora", "vera")
VERBS = ("attach", "detach", "train", "move", "save", "merge", "unmerge", "export", "keep", "use")
HERE = str(Path(peftlab.__file__).parent)


class Enough(torch.OutOfMemoryError):
    """The failure of an operation."""


class Operations(TorchDispatchMode):
    """Inside, operations are counted; number `fail` raises."""

    def __init__(self, fail: int = 0):
        super().__init__()
        self.fail, self.count = fail, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.fail:
            raise Enough("out of memory, on purpose")
        return function(*args, **(kwargs or {}))


class Lines:
    """Inside, lines of peftlab are counted; number `fail` raises, and so does nothing after it."""

    def __init__(self, fail: int = 0):
        self.fail, self.count = fail, 0

    def __enter__(self):
        self.before = sys.gettrace()  # a debugger's, or that of a measurement of coverage
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _call(self, frame, event, _):
        name = frame.f_code.co_filename
        return self._line if name.startswith(HERE) and "experiments" not in name else None

    def _line(self, frame, event, _):
        if event == "line":
            self.count += 1
            if self.count == self.fail:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def verbs_of(case: str) -> list[str]:
    """The verbs that this case has."""
    barred = {"merge", "unmerge", "export"} if case not in MERGING else set()
    barred |= {"keep", "use"} if case not in SWAPPING else set()
    return [verb for verb in VERBS if verb not in barred]


def prepared(verb: str, case: str, base: Base, folder: Path) -> Callable:
    """What a failure is put into, with everything done that has to be done before."""
    if verb == "attach":
        return lambda: attach(base, CASES[case])
    tuned = stirred(attach(base, CASES[case]), 0)
    if verb == "unmerge":
        tuned.merge(requantise=True)
    if verb == "use":
        tuned.keep("a")
    task = _task(base)
    return {
        "detach": tuned.detach,
        "train": lambda: train(tuned, task, steps=1, batch_size=2, evaluate=False, progress=False),
        "move": lambda: move(tuned, "cpu"),
        "save": lambda: tuned.save(folder / "adapter"),
        "merge": lambda: tuned.merge(requantise=True),
        "unmerge": tuned.unmerge,
        "export": lambda: tuned.merge_and_export(folder / "model"),
        "keep": lambda: tuned.keep("a"),
        "use": lambda: tuned.use("a"),
    }[verb]


def _task(base: Base):
    """A task that this kind of base can be trained on."""
    return peftlab.tasks.load("sentiment" if base.kind == "encoder" else "facts")


@torch.no_grad()
def stirred(tuned: Tuned, seed: int) -> Tuned:
    """The same adapter away from its start, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.trainable.values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return tuned


@torch.no_grad()
def seen(base: Base) -> list:
    """What has to be equal: numbers, hooks, wanted gradients, attributes of modules, logits."""
    ids = torch.arange(5, 17)[None]
    given = {"decoder_input_ids": ids} if base.kind == "encoder-decoder" else {}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
    modules = list(base.model.modules())
    return [
        base.fingerprint(),
        sum(len(getattr(module, kind)) for module in modules for kind in kinds),
        [p.requires_grad or p.grad is not None for p in base.model.parameters()],
        [sorted(vars(module)) for module in modules],
        [linear.mask is None for linear in base.anatomy.linears.values()],
        base.model.training,
        base(ids, **given).numpy().tobytes(),
    ]


def one_failure(verb: str, case: str, base: Base, rng: random.Random, before: list) -> str:
    """Put one failure into a verb, take everything off, and say what is wrong: "" if nothing."""
    kind = rng.choice((Lines, Operations))
    folder = Path(tempfile.mkdtemp())
    try:
        act = prepared(verb, case, base, folder)
        with kind() as counted:
            act()
        base.detach()
        act = prepared(verb, case, base, folder)
        try:
            with kind(rng.randint(1, max(counted.count, 1))):
                act()
        except (KeyboardInterrupt, Exception):  # another library may make another error of it
            pass
        try:
            base.detach()
        except RuntimeError as error:  # it looked, and says so
            return f"{case}: {verb} of {base.name}: {error}"
        if seen(base) != before:
            return f"{case}: {verb} of {base.name} left the base changed"
        with attach(base, m.LoRA(r=2)):
            pass
        return ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def failures(count: int, seed: int) -> dict:
    """Failures over every base, case and verb in turn, in an order drawn by the seed."""
    rng, wrong, done = random.Random(seed), [], Counter()
    for name in BASES:
        base = load(name)
        before = seen(base)
        pairs = [(verb, case) for case in CASES for verb in verbs_of(case)]
        pairs = [(v, c) for v, c in pairs if c != "bitfit" or name in ("tiny-gpt", "tiny-bert")]
        rng.shuffle(pairs)
        for i in range(count // len(BASES)):
            verb, case = pairs[i % len(pairs)]
            done[verb] += 1
            if told := one_failure(verb, case, base, rng, before):
                wrong.append(told)
                base = load(name)
    return {"failures": sum(done.values()), "by verb": dict(done), "base changed": wrong}


def kills(verb: str, count: int, seed: int) -> dict:
    """Kill a process that writes a folder again and again, and look at the folder."""
    rng, folder = random.Random(seed), Path(tempfile.mkdtemp(), "it")
    base, wanted, found = load("tiny-gpt"), [], Counter()
    writers = []
    for i, alpha in enumerate((4, 64)):
        method = m.LoRA(r=2, alpha=alpha)
        with stirred(attach(base, method), i) as tuned:
            _act(verb, tuned, folder)
        wanted.append(_content(folder))
        writers.append((method, i))
    for _ in range(count):
        child = os.fork()
        if child == 0:
            for i in range(10**6):
                method, number = writers[i % 2]
                with stirred(attach(base, method), number) as tuned:
                    _act(verb, tuned, folder)
            os._exit(0)
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            found["whole" if _content(folder) in wanted else "silently wrong"] += 1
            (load(folder) if verb == "export" else attach(base, folder)) and base.detach()
        except Exception:
            found["lost"] += 1
    shutil.rmtree(folder.parent)
    return {"kills": count} | {key: found[key] for key in ("whole", "silently wrong", "lost")}


def _act(verb: str, tuned: Tuned, folder: Path) -> None:
    tuned.merge_and_export(folder) if verb == "export" else tuned.save(folder)


def _content(folder: Path) -> dict:
    """Every file of a folder: tensors by name, the rest as bytes."""
    return {
        path.name: (
            {k: t.numpy().tobytes() for k, t in load_file(path).items()}
            if path.suffix == ".safetensors"
            else path.read_bytes()
        )
        for path in sorted(folder.iterdir())
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--failures", type=int, default=1200)
    parser.add_argument("--saves", type=int, default=500)
    parser.add_argument("--exports", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = {
        "command": f"python -m peftlab.experiments.inject_faults --seed {options.seed}",
        "seed": options.seed,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    rows = {
        "failures": failures(options.failures, options.seed),
        "save": kills("save", options.saves, options.seed),
        "export": kills("export", options.exports, options.seed),
    }
    write(options.out / "faults.json", facts, {name: [row] for name, row in rows.items()})
    print(rows)


if __name__ == "__main__":
    main()
