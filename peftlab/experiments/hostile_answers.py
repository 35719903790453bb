"""Every exercise against answers that do harm, and against right ones written in other ways.

    python -m peftlab.experiments.hostile_answers --seed 0   # data/results/hostile_answers.json

A hostile answer must get a sentence, and neither pass nor raise; a right one must pass. After each
the exercise's own solution must still pass, and nothing that outlives an answer may have changed:
the tables of levels, the streams of random numbers, PyTorch's settings, a shipped base. The seed
draws the order.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import random
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from peftlab import exercises
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.exercises import Exercise, answers, collect
from peftlab.sites.quantisation import QUANT_TYPES, dynamic_table, table

NAN = float("nan")
LOOP = 0.2  # seconds of the processor for an answer that loops for ever


def each(change: Callable, made: Any) -> Any:
    """A result with every number, tensor, word or set in it changed."""
    if isinstance(made, (list, tuple)):
        return type(made)(each(change, item) for item in made)
    if isinstance(made, dict):
        return {key: each(change, item) for key, item in made.items()}
    return change(made)


def result(change: Callable) -> Callable:
    """The solution with each number of its result changed."""
    return lambda solution: lambda *args: each(change, solution(*args))


def tensors(change: Callable) -> Callable:
    """The solution with each tensor of its result changed."""
    return result(lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf)


def gives(value: Any) -> Callable:
    return lambda solution: lambda *args: value


def does(act: Callable, then: Any = 0) -> Callable:
    """An answer that acts, and returns one and the same thing."""

    def make(solution):
        def answer(*args):
            act(*args)
            return then

        return answer

    return make


def first_does(act: Callable) -> Callable:
    """The solution, which acts before it returns what is right."""

    def make(solution):
        def answer(*args):
            made = each(copied, solution(*args))
            act(*args)
            return made

        return answer

    return make


def copied(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def raises(error: BaseException) -> Callable:
    def fail(*args):
        raise error

    return does(fail)


# --- what does harm -----------------------------------------------------------------------------


class Liar:
    """Claims to equal everything, and to be true, a number and a tensor."""

    __class__ = torch.Tensor
    shape, dtype, ndim = (3,), torch.float32, 1

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0

    def __bool__(self):
        return True

    def __float__(self):
        return 1.0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True


class LyingTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True


class LyingInt(int):
    __eq__ = __ge__ = __le__ = lambda self, other: True
    __hash__ = int.__hash__


class LyingWord(str):
    __eq__ = lambda self, other: True  # noqa: E731
    __hash__ = str.__hash__


class Unspeakable(Exception):
    def __str__(self):
        raise SystemExit("no words")


class Beyond(BaseException):
    pass


def zeros(*args) -> None:
    for item in args:
        if isinstance(item, torch.Tensor):
            item.detach().zero_()
        elif isinstance(item, torch.nn.Module):
            zeros(*item.parameters(), *item.buffers())
        elif isinstance(item, (list, tuple)):
            zeros(*item)
        elif isinstance(item, dict):
            zeros(*item.values())
            item.clear()


def halves_tables(*args) -> None:
    for levels in (*map(table, QUANT_TYPES), dynamic_table()):
        levels.mul_(0.5)
    zeros(*(getattr(item, "levels", None) for item in args))


def settings(*args) -> None:
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(False)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    sys.setrecursionlimit(20_000)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir("/")


def draws(*args) -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)


def for_ever(*args) -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:
            pass


def without_end(*args):
    return without_end(*args) + 1


def holds_itself() -> list:
    made: list = []
    made.append(made)
    return made


def counting() -> Iterator[int]:
    while True:
        yield 1


def longer(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return torch.cat([leaf.flatten(), leaf.flatten()[:1], leaf.flatten()[:1]])
    return [leaf, leaf]


def off(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (
            ~leaf if leaf.dtype == torch.bool else leaf + (0.37 if leaf.is_floating_point() else 1)
        )
    return (
        not leaf if isinstance(leaf, bool) else leaf + 0.37 if isinstance(leaf, (int, float)) else 0
    )


def filled(value: float) -> Callable:
    return result(
        lambda leaf: torch.full(leaf.shape, value) if isinstance(leaf, torch.Tensor) else value
    )


HOSTILE: dict[str, Callable] = {
    "nothing": gives(None),
    "a word": gives("right"),
    "no word": gives(""),
    "bytes": gives(b"\x00"),
    "not a number": gives(NAN),
    "infinity": gives(float("inf")),
    "minus infinity": gives(float("-inf")),
    "a complex number": gives(1 + 1j),
    "zero": gives(0),
    "a large number": gives(10**400),
    "a truth": gives(NotImplemented),
    "an empty list": gives([[]]),
    "a list of nothing": gives([None] * 3),
    "an empty dictionary": gives({}),
    "an empty tensor": gives(torch.empty(0)),
    "a tensor without numbers": gives(torch.empty(3, device="meta")),
    "a tensor too large to read": gives(torch.zeros(1).expand(10**13)),
    "a list that holds itself": gives(holds_itself()),
    "a generator": lambda solution: lambda *args: (item for item in [1]),
    "a generator without end": lambda solution: lambda *args: counting(),
    "a class": gives(Liar),
    "a module": gives(json),
    "a function": lambda solution: lambda *args: solution,
    "an array of objects": gives(np.array([object()])),
    "a liar": gives(Liar()),
    "liars": result(lambda leaf: Liar()),
    "lying tensors": result(
        lambda leaf: torch.zeros(getattr(leaf, "shape", ())).as_subclass(LyingTensor)
    ),
    "lying numbers": result(lambda leaf: LyingInt(7777)),
    "lying words": result(lambda leaf: LyingWord("7777")),
    "the right numbers as words": result(lambda leaf: f"<{leaf}>"),
    "the right numbers and an imaginary part": result(
        lambda leaf: leaf + 1j if isinstance(leaf, (torch.Tensor, int, float)) else 1j
    ),
    "the right shapes without numbers": filled(NAN),
    "the right shapes of infinity": filled(float("inf")),
    "the right numbers and more": result(longer),
    "numbers that are off": result(off),
    "no parameters": lambda solution: lambda: 1,
    "too many parameters": lambda solution: lambda a, b, c, d, e, f, g, h, i: 1,
    "a class in place of a function": lambda solution: Liar,
    "a liar in place of a function": lambda solution: Liar(),
    "a number in place of a function": lambda solution: 3.0,
    "an error": raises(ZeroDivisionError("no")),
    "an error without words": raises(Unspeakable()),
    "an error of PyTorch's that is a NotImplementedError": does(
        lambda *args: torch.softmax(torch.tensor([1, 2]), 0)
    ),
    "an exit": raises(SystemExit(0)),
    "a Ctrl-C of its own": raises(KeyboardInterrupt()),
    "a generator's exit": raises(GeneratorExit()),
    "the end of an iteration": raises(StopIteration(1)),
    "several errors": raises(ExceptionGroup("two", [ValueError(), TypeError()])),
    "an error of no known kind": raises(Beyond()),
    "no end of calls": does(without_end),
    "too large a list": does(lambda *args: [0] * 10**15),
    "too large a tensor": does(lambda *args: torch.empty(10**15)),
    "a loop without end": does(for_ever),
    "zeros in all inputs": does(zeros, torch.zeros(1)),
    "other levels": does(halves_tables, torch.zeros(1)),
    "other settings": does(settings),
    "other draws": does(draws),
}

# --- what is right ------------------------------------------------------------------------------


def floats(dtype: torch.dtype) -> Callable:
    return tensors(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf)


def masks(dtype: torch.dtype) -> Callable:
    return tensors(lambda leaf: leaf if leaf.is_floating_point() else leaf.to(dtype))


def in_numpy(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().numpy()
    return np.asarray(leaf)[()] if isinstance(leaf, (bool, int, float)) else leaf


def next_number(leaf: torch.Tensor) -> torch.Tensor:
    """One rounding further, as another order of operations may give it."""
    if not leaf.is_floating_point():
        return leaf
    return torch.where(leaf == 0, leaf, leaf.nextafter(torch.full_like(leaf, torch.inf)))


def turned(kind: type) -> Callable:
    """Tuples and lists of the result as another kind of collection."""

    def make(solution):
        def answer(*args):
            made = solution(*args)
            return kind(made) if isinstance(made, (list, tuple)) else made

        return answer

    return make


def on(dtype: torch.dtype) -> Callable:
    """The solution on inputs of another dtype: rounding differs at every operation."""

    def cast(leaf):
        numbers = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if numbers or isinstance(leaf, torch.nn.Module) else leaf

    return lambda solution: lambda *args: solution(*each(cast, args))


RIGHT: dict[str, Callable] = {
    "itself": lambda solution: solution,
    "float64": floats(torch.float64),
    "float32": floats(torch.float32),
    "float16": floats(torch.float16),
    "bfloat16": floats(torch.bfloat16),
    "whole numbers in float64": masks(torch.float64),
    "whole numbers in int64": masks(torch.int64),
    "computed in float64": on(torch.float64),
    "computed in float32": on(torch.float32),
    "numbers as tensors": result(
        lambda leaf: torch.tensor(leaf) if type(leaf) in (int, bool) else leaf
    ),
    "numbers as tensors of one": result(
        lambda leaf: torch.tensor([[leaf]]) if type(leaf) in (int, bool) else leaf
    ),
    "numbers as floats": result(lambda leaf: float(leaf) if type(leaf) is int else leaf),
    "in NumPy": result(in_numpy),
    "a list for a tuple": turned(list),
    "a tuple for a list": turned(tuple),
    "tensors as lists": tensors(lambda leaf: leaf.tolist()),
    "views": tensors(lambda leaf: leaf.view_as(leaf)),
    "strides": tensors(lambda leaf: torch.stack([leaf, leaf], dim=-1)[..., 0]),
    "with a gradient": tensors(
        lambda leaf: leaf.detach().clone().requires_grad_() if leaf.is_floating_point() else leaf
    ),
    "rounded otherwise": tensors(next_number),
    "over its inputs": first_does(zeros),
    "and other levels": first_does(halves_tables),
    "and other settings": first_does(settings),
    "and other draws": first_does(draws),
    "and much to say": first_does(lambda *args: print(end="")),
}
NAMES: dict[str, Callable] = {
    "itself": dict,
    "in another order": lambda right: dict(reversed(right.items())),
    "an ordered dictionary": OrderedDict,
    "in capitals": lambda right: {letter: name.upper() for letter, name in right.items()},
    "with spaces": lambda right: {letter: f" {name} " for letter, name in right.items()},
    "in another spelling": lambda right: {
        letter: name.replace("optimiser", "optimizer") for letter, name in right.items()
    },
}
HALF = {"float16", "bfloat16"}
NOT_RIGHT = {  # where a rewriting changes what is asked for
    "02-initialise": HALF  # a leaf is asked for, and what is made of one is none
    | {"float64", "float32", "views", "strides", "rounded otherwise", "tensors as lists"}
    | {"in NumPy"},
    "03-throw_it_away": {"with a gradient"},
    "04-fold_the_mlp": {"with a gradient"},
    "01-adam_step": HALF,  # its moments are below what 16 bits can write
    "08-levels": HALF,
    "08-encode": HALF | {"computed in float64"},  # a rounding near a tie is another code
    "08-backward": {"computed in float64"},  # what is decoded is in float32
}


def lessons() -> dict[str, ModuleType]:
    """The lessons' modules by number."""
    names = [info.name for info in pkgutil.iter_modules(exercises.__path__)]
    return {
        name[-2:]: importlib.import_module(f"peftlab.exercises.{name}")
        for name in names
        if name.startswith("lesson_")
    }


def every() -> dict[str, Exercise]:
    """All exercises by lesson and name."""
    return {
        f"{number}-{item.name}": item
        for number, module in lessons().items()
        for item in collect(module)
        if isinstance(item, Exercise)
    }


def trials(seed: int) -> list[tuple[str, str, bool]]:
    """Exercise, answer, and whether it is right: all of them, in the order that the seed draws."""
    made = []
    for key, item in every().items():
        rewritings = RIGHT if callable(item.solution) else NAMES
        made += [(key, name, False) for name in HOSTILE]
        made += [(key, name, True) for name in rewritings if name not in NOT_RIGHT.get(key, ())]
    random.Random(seed).shuffle(made)
    return made


def state(base) -> str:
    """What no answer may change, in words that differ if it did."""
    streams = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    levels = [levels.tolist() for levels in (*map(table, QUANT_TYPES), dynamic_table())]
    found = [get() for get, _ in answers.SETTINGS]
    return repr((streams, levels, found, signal.getsignal(signal.SIGINT), base.fingerprint()))


def one(name: str, right: bool, item: Exercise) -> tuple[str, str]:
    """The verdict on one answer, and its words."""
    rewritings = RIGHT if callable(item.solution) else NAMES
    answer = (rewritings if right else HOSTILE)[name](item.solution)
    bound = answers.SECONDS
    if name == "a loop without end":
        answers.SECONDS = LOOP
    try:
        verdict = item(answer)
        return verdict.status, verdict.message
    except BaseException as error:
        return "raised", answers.describe(error)
    finally:
        answers.SECONDS = bound


def run(chosen: list[tuple[str, str, bool]]) -> list[dict]:
    """The trials of which something is wrong."""
    items, base, faults = every(), load("tiny-gpt"), []
    now = state(base)
    for key, name, right in chosen:
        verdict, words = one(name, right, items[key])
        healthy = items[key](items[key].solution).passed
        before, now = now, state(base)
        poisoned = now != before or not healthy
        if verdict != ("passed" if right else "wrong") or poisoned or not words:
            row = {"exercise": key, "answer": name, "right": right, "verdict": verdict}
            faults.append(row | {"words": words, "poisoned": poisoned})
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="so many trials of all")
    parser.add_argument("--out", type=Path, default=data_path("results", "hostile_answers.json"))
    options = parser.parse_args()
    chosen, begun = trials(options.seed)[: options.sample], time.perf_counter()
    faults = run(chosen)
    report = {
        "command": f"python -m peftlab.experiments.hostile_answers --seed {options.seed}",
        "date": date.today().isoformat(),
        "seed": options.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "seconds": round(time.perf_counter() - begun),
        "exercises": len({key for key, _, _ in chosen}),
        "hostile answers": sum(not right for _, _, right in chosen),
        "hostile answers that passed, raised or were taken for a stub": sum(
            not row["right"] and row["verdict"] != "wrong" for row in faults
        ),
        "right answers": sum(right for _, _, right in chosen),
        "right answers that failed": sum(
            row["right"] and row["verdict"] != "passed" for row in faults
        ),
        "poisoned": sum(row["poisoned"] for row in faults),
        "faults": faults,
    }
    options.out.write_text(
        json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
