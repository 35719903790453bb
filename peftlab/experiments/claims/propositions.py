"""One comparison each: of numbers, of a fact, of recorded runs. Gives an outcome and a sentence.

A number is written as itself, as a call in one line (`count lora gpt2 r=8`, see `quantities`), or
as `{ratio: [a, b]}`, `{sum: [a, b]}`, `{product: [a, b]}` of numbers.

    equal: [a, b]             the same number
    about: [a, b, share]      apart by at most this share of b
    within: [a, low, high]    low ≤ a ≤ high
    below: [a, b]             a < b;  `above` the other way round
    fact: "name arguments"    a function of `facts` says so;  `no_fact` says the opposite
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable
from typing import Any

import yaml

from peftlab.experiments.claims import evidence, facts, quantities
from peftlab.experiments.claims.evidence import Number, Outcome

__all__ = ["KINDS", "Outcome", "evaluate", "number", "written"]


def equal(a: Number, b: Number) -> bool:
    """The same number, to the last digit."""
    return a == b


def about(a: Number, b: Number, share: Number) -> bool:
    """Apart by at most this share of b."""
    return math.isclose(a, b, rel_tol=0, abs_tol=share * abs(b))


def within(a: Number, low: Number, high: Number) -> bool:
    """low ≤ a ≤ high."""
    return low <= a <= high


def below(a: Number, b: Number) -> bool:
    """a < b."""
    return a < b


def above(a: Number, b: Number) -> bool:
    """a > b."""
    return a > b


COMPARISONS = {
    "equal": (equal, "{0} is {1}"),
    "about": (about, "{0} is {1} to within a share of {2}"),
    "within": (within, "{0} lies between {1} and {2}"),
    "below": (below, "{0} is below {1}"),
    "above": (above, "{0} is above {1}"),
}


class Kind(enum.StrEnum):
    """Where the answer comes from."""

    NUMBERS = enum.auto()
    FACT = enum.auto()
    RESULTS = enum.auto()


KINDS = dict.fromkeys(COMPARISONS, Kind.NUMBERS) | {"fact": Kind.FACT, "no_fact": Kind.FACT}
KINDS |= dict.fromkeys(evidence.COMPARATORS, Kind.RESULTS)


def evaluate(proposition: dict) -> tuple[Outcome, str]:
    """Whether it holds, and what was found."""
    ((kind, given),) = proposition.items()
    if kind in evidence.COMPARATORS:
        return evidence.COMPARATORS[kind](**given)
    if kind in ("fact", "no_fact"):
        holds, sentence = _called(facts, given)
        return Outcome.of(holds == (kind == "fact")), sentence
    compare, template = COMPARISONS[kind]
    values = [number(each) for each in given]
    holds = compare(*values)
    words = [written(each, value) for each, value in zip(given, values, strict=True)]
    said = template.format(*words)
    return Outcome.of(holds), f"{said}: {'yes' if holds else 'no'}."


def number(given: Any) -> Number:
    """The value of a number as it is written in `data/claims`."""
    if isinstance(given, str):
        return _called(quantities, given)
    if isinstance(given, dict):
        ((operation, parts),) = given.items()
        values = [number(each) for each in parts]
        if operation == "ratio":
            return values[0] / values[1]
        return {"sum": sum, "product": math.prod}[operation](values)
    return given


def written(given: Any, value: Number) -> str:
    """A number in a sentence, with what it is."""
    if isinstance(value, int) or float(value).is_integer():
        shown = f"{int(value):,}"
    else:
        shown = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return shown if isinstance(given, Number) else f"{_phrase(given)} = {shown}"


def _phrase(given: Any) -> str:
    if isinstance(given, dict):
        ((operation, parts),) = given.items()
        between = {"ratio": " / ", "sum": " + ", "product": " × "}[operation]
        return between.join(_phrase(each) for each in parts)
    return f"`{given}`" if isinstance(given, str) else f"{given:,}"


@functools.cache
def _called(room: Any, line: str) -> Any:
    """`name a b c=1` as the call `room.name("a", "b", c=1)`; values are read as YAML."""
    name, *words = line.split()
    function: Callable = getattr(room, name)
    plain = [yaml.safe_load(word) for word in words if "=" not in word]
    named = dict(word.split("=", 1) for word in words if "=" in word)
    return function(*plain, **{key: yaml.safe_load(value) for key, value in named.items()})
