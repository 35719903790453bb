"""What the course says: all its answers, right and wrong, its questions, clinics and methods.

    python -m peftlab.experiments.course_table      # writes data/results/course.json

A lesson's module computes what it compares an answer with, so it agrees with itself even if both
have changed. This table is what both were: a change of a solution, a wrong answer, a question, a
patient or the defaults of a method shows in it, and whoever meant the change runs the command again
and reads the difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from peftlab import tasks
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.exercises import Exercise, Question, collect
from peftlab.exercises.answers import outcome, usual
from peftlab.experiments.hostile_answers import lessons
from peftlab.experiments.sweep_soft import write
from peftlab.experiments.sweep_v2 import GrowingPrompts
from peftlab.methods import METHODS, DeepPromptTuning, Method, PromptAndPrefix, PTuningV2

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
ROUNDING = 1e-3  # of what is computed in float32, on any processor
STEPS = 3  # of the clinics that train for longer in the lesson


def summary(value: Any) -> Any:
    """A result in a few numbers: of a tensor its shape, its length and its part along a wave, in
    which every place counts differently."""
    if isinstance(value, Tensor):
        flat = value.detach().flatten().double()
        wave = torch.cos(torch.arange(len(flat), dtype=torch.float64))
        along = flat @ wave / wave.norm().clamp(min=1e-9)
        numbers = [rounded(float(number)) for number in (flat.norm(), along)]
        return {"shape": list(value.shape), "length, along": numbers}
    if isinstance(value, pd.DataFrame):
        return {str(name): [summary(item) for item in column] for name, column in value.items()}
    if isinstance(value, dict):
        return {str(key): summary(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [summary(item) for item in value]
    if isinstance(value, set):
        return sorted(map(str, value))
    if isinstance(value, Exception):
        return f"{type(value).__name__}: {value}"
    return rounded(value) if isinstance(value, float) else value


def rounded(number: float) -> float | str:
    """Six digits of a number; of infinity and NaN the name, which JSON does not know."""
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)


def alike(a: Any, b: Any) -> bool:
    """Whether two summaries are the same but for rounding, numbers in words included."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        if all(isinstance(item, float) for item in [*a, *b]) and len(a) == len(b):
            largest = max(map(abs, a), default=0.0)
            return all(abs(x - y) <= ROUNDING * largest for x, y in zip(a, b, strict=True))
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, str) and isinstance(b, str):
        numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (a, b)]
        words = [NUMBER.sub("#", text) for text in (a, b)]
        return words[0] == words[1] and alike(*numbers)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= max(ROUNDING * abs(a), 1e-6)
    return type(a) is type(b) and a == b


def other(made: Any) -> Any:
    """A result of the same form with other numbers in it."""
    if isinstance(made, Tensor):
        return ~made if made.dtype == torch.bool else made * 2 + 7
    if isinstance(made, (list, tuple)):
        return type(made)(other(item) for item in made)
    if isinstance(made, dict):
        return {key: other(item) for key, item in made.items()}
    if isinstance(made, bool):
        return not made
    return made + made + 7 if isinstance(made, (int, float)) else type(made)()


def near(made: Any) -> Any:
    """A result of the same form that is off by one."""
    if isinstance(made, Tensor):
        return made if made.dtype == torch.bool else made + 1
    if isinstance(made, (list, tuple)):
        return type(made)(near(item) for item in made)
    return made + 1 if type(made) in (int, float) else made


def flat(made: Any) -> Any:
    """A result in another form: tensors as one row, several as one."""
    if isinstance(made, Tensor):
        return made.flatten()
    return flat(made[0]) if isinstance(made, (list, tuple)) and made else [made]


def of_exercise(item: Exercise) -> dict:
    """What its solution and its wrong answers give and are told, at both sizes."""
    answers = [item.solution, *(wrong for wrong, *_ in item.mistakes)]
    sizes = ((), item.again) if item.again else ((),)
    unusual = []
    if callable(item.solution):
        for change in (other, near, flat):
            unusual.append(lambda *args, change=change: change(item.solution(*args)))
    return {
        "card": [item.difficulty, item.importance, item.minutes],
        "gives": [[summary(outcome(item.trial, a, size)) for size in sizes] for a in answers],
        "told": [item(answer).message for answer in answers + unusual],
    }


def of_question(item: Question) -> dict:
    """The right letter, and what is found."""
    with usual():
        letter, found = item.compute()
    return {"right": letter, "found": found}


def of_clinic(number: str, module) -> Any:
    """What the patients of a lesson show in their first steps."""
    if number in ("02", "03", "04"):
        shown = module.clinic(load("tiny-gpt"), tasks.load("sentiment"), steps=STEPS)
    elif number == "05":
        base, task = load("tiny-bert"), tasks.load("entities")
        methods = [PTuningV2(4), PromptAndPrefix(4), DeepPromptTuning(4), GrowingPrompts(4)]
        named = dict(zip(module.DEFINITIONS, methods, strict=True))
        shown = {
            "clinic": module.clinic(base, task, steps=STEPS, batch_size=2),
            "observe": module.observe(base, named, "A cat ."),
        }
    elif number == "09":
        shown = module.clinic(steps=STEPS)
    else:
        shown = module.clinic()
    if number == "06":
        shown = {ward: table.head(STEPS) for ward, table in shown.items()}
    return summary(shown)


def of_method(method: type[Method]) -> dict:
    """Its name in words, its defaults, and what each hyper-parameter may be."""
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    rate = method.learning_rate  # of some methods one that depends on the others
    return {
        "title": method.title,
        "learning rate": rate if isinstance(rate, float) else method().learning_rate,
        "defaults": {name: repr(value) for name, value in defaults.items()},
        "limits": {name: repr(value) for name, value in method.limits.items()},
        "choices": {name: repr(value) for name, value in method.choices.items()},
    }


def every() -> Iterator[tuple[str, Any, tuple]]:
    """The key of each row, and the function and its arguments that make it."""
    for name in sorted(METHODS):
        yield name, of_method, (METHODS[name],)
    for number, module in lessons().items():
        for item in collect(module):
            make = of_exercise if isinstance(item, Exercise) else of_question
            yield f"{number} {item.name}", make, (item,)
        if hasattr(module, "clinic"):
            yield f"{number} clinic", of_clinic, (number, module)


def kept() -> dict[str, Any]:
    """The rows that were written."""
    found = json.loads(data_path("results", "course.json").read_text(encoding="utf-8"))
    return {row["name"]: row["says"] for row in found["rows"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = {
        "command": "python -m peftlab.experiments.course_table",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    rows = [{"name": name, "says": make(*given)} for name, make, given in every()]
    write(options.out / "course.json", facts, {"rows": rows})


if __name__ == "__main__":
    main()
