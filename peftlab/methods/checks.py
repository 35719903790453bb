"""Checks of hyper-parameters, with messages that say what is allowed."""

from typing import Any

from peftlab.bases import Shape, listed
from peftlab.bases.files import built

LARGEST = 1e38  # what float32 can hold


def require(name: str, value, low, high=None) -> None:
    """Raise ValueError unless low ≤ value (≤ high), saying what is allowed."""
    kind = int if isinstance(low, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        needed = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}={value!r}: {needed} is needed")
    if not low <= value <= (LARGEST if high is None else high):
        allowed = f"{low} to {high}" if high is not None else f"at least {low}"
        raise ValueError(f"{name}={value}: allowed is {allowed}")


def check_choice(name: str, value, allowed: tuple) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if (type(value), value) not in [(type(each), each) for each in allowed]:  # 1 is not True
        raise ValueError(f"{name}={value!r}: allowed is {', '.join(map(str, allowed))}")


def check_texts(texts, score: str, needed: str) -> tuple[str, ...]:
    """The calibration texts. Raises ValueError unless they are texts, and only `needed` has any."""
    texts = listed(texts, "calibration")
    if (score == needed) != bool(texts):
        raise ValueError(f"calibration: score={needed!r} needs texts to run, and no other does")
    return tuple(texts)


def check_context(count: int, shape: Shape) -> None:
    """Raise ValueError unless a token of the input fits beside `count` virtual ones."""
    if count >= shape.context:
        allowed = f"allowed is 1 to {shape.context - 1}, with one left for the input"
        have = f"{shape.name} has {shape.context} positions"
        raise ValueError(f"num_virtual_tokens={count}: {have}, so {allowed}")


def check_init(init: str, text: str | None, allowed: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown init, for init "text" without a text, or the reverse."""
    check_choice("init", init, allowed)
    if (init == "text") != bool(text):
        raise ValueError('init="text" and a non-empty init_text go together')


def checked_placement(placement, total: int) -> tuple[tuple[int, str], ...] | None:
    """The blocks of a placement as (count, place) pairs; None if there is no placement.

    Raises ValueError unless they are pairs with known places and `total` virtual tokens together.
    """
    if placement is None:
        return None
    try:
        blocks = tuple((count, where) for count, where in placement)
        if not all(isinstance(where, str) for _, where in blocks):
            raise TypeError
    except (TypeError, ValueError):
        needed = "give (count, where) pairs, such as [(3, 'front')]"
        raise ValueError(f"placement={placement!r}: {needed}") from None
    for count, where in blocks:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"a count of placement={count!r}: allowed is a whole number from 1 on")
        if where not in ("front", "back") and not where.startswith(("before ", "after ")):
            raise ValueError(f"{where!r}: allowed is front, back, 'before X', 'after X'")
    if (given := sum(count for count, _ in blocks)) != total:
        raise ValueError(f"placement has {given} virtual tokens, num_virtual_tokens={total}")
    return blocks


def described(config: Any, key: str, known: dict[str, type]) -> Any:
    """The method or head (`key` says which) that a dict from a file describes.

    Raises ValueError for an unknown name or option, and for a value of another type.
    """
    if not isinstance(config, dict):
        raise ValueError(f"a {key} is described by a dict, not by {config!r:.60}")
    options = dict(config)
    name = options.pop(key, None)
    if name not in list(known):  # also where it is no text
        raise ValueError(f"unknown {key} {name!r:.60}: known are {', '.join(known)}")
    try:
        return built(known[name], options)
    except TypeError as error:
        raise ValueError(f"bad hyper-parameters for {name}: {error}") from error
