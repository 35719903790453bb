"""Forms that answers have, and when two are the same."""

from __future__ import annotations

import math
from numbers import Number
from typing import Any

import torch

from peftlab.exercises.answers import Wrong, describe

ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest number


def expect(condition: Any, diagnosis: str) -> None:
    """Say the diagnosis unless the condition holds."""
    if not bool(condition):
        raise Wrong(diagnosis)


def same(a: Any, b: Any, atol: float = 1e-6) -> bool:
    """Whether two answers are equal: numbers up to rounding, and everything else exactly.

    Tensors by shape and values, as far as the coarser of their dtypes can tell; lists, tuples and
    dictionaries item by item; exceptions by type. NaN equals NaN.
    """
    if isinstance(a, Exception) or isinstance(b, Exception):
        errors = [getattr(error, "error", error) for error in (a, b)]
        kinds = {(type(error), "dtype" in describe(error)) for error in errors}
        return len(kinds) == 1
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], atol) for key in a)
    if not all(isinstance(x, (torch.Tensor, Number)) for x in (a, b)):
        return type(a) is type(b) and bool(a == b)
    if all(isinstance(x, int) for x in (a, b)):
        return a == b
    if all(isinstance(x, Number) for x in (a, b)):
        whole = any(isinstance(x, int) for x in (a, b))
        close = math.isclose(a, b, rel_tol=1e-9 if whole else 1e-6, abs_tol=atol)
        return close or (a != a and b != b)
    a, b = (torch.as_tensor(x).detach().cpu() for x in (a, b))
    if a.shape != b.shape:
        return False
    finite = b.double()[b.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    atol = max(atol, *(ROUNDING.get(x.dtype, 0.0) * largest for x in (a, b)))
    return torch.allclose(a.double(), b.double(), atol=atol, equal_nan=True)


def a_tensor(made: Any, shape: tuple | None = None, words: str = "") -> torch.Tensor:
    """What an answer returned, as a tensor; else the learner is told what it is.

    With a `shape`, another one is told with the `words`, which say what stands along its axes.
    """
    if isinstance(made, (list, tuple)):
        try:
            tensors = made and all(isinstance(item, torch.Tensor) for item in made)
            made = torch.stack(list(made)) if tensors else torch.tensor(made)
        except (ValueError, TypeError, RuntimeError):
            pass
    expect(isinstance(made, torch.Tensor), f"return a tensor; yours is {type(made).__name__}")
    fits = shape is None or made.shape == tuple(shape)
    expect(fits, f"{words or 'the shape'} should be {shape}; yours is {tuple(made.shape)}")
    return made


def several(made: Any, count: int, words: str) -> list[torch.Tensor]:
    """So many tensors, if an answer returned a tuple or a list of them; else the words are said."""
    expect(isinstance(made, (tuple, list)) and len(made) == count, words)
    return [a_tensor(item) for item in made]


def a_number(made: Any) -> Number:
    """What an answer returned, if it is a number or a tensor of one; else the learner is told."""
    if isinstance(made, torch.Tensor) and made.numel() == 1:
        made = made.item()
    expect(isinstance(made, Number), f"return a number; yours is {type(made).__name__}")
    return made


def a_count(made: Any, what: str = "a count") -> int:
    """A whole number that an answer returned, as an int; else the learner is told `what` is one."""
    number = a_number(made)
    whole = not isinstance(number, bool) and math.isfinite(number) and number == int(number)
    expect(whole, f"{what} is a whole number; yours is {number!r}")
    return int(number)


def digits(given: float, right: float) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to tell them apart, three at least."""
    for count in range(3, 18):  # 17 tell any two apart
        words = f"{given:.{count}g}", f"{right:.{count}g}"
        if words[0] != words[1]:
            break
    return words


def unlike(given: Any, right: Any) -> str:
    """How a tensor differs from the right one, in shape, or most of all in one place.

    Of several tensors it is the first that differs, and so it is of places that are as far off but
    for rounding.
    """
    if isinstance(given, (tuple, list)):
        given, right = next(p for p in zip(given, right, strict=True) if not same(*p))
    if given.shape != right.shape:
        return f"the shape should be {tuple(right.shape)}; yours is {tuple(given.shape)}"
    apart = (given.detach().double() - right.double()).abs().nan_to_num(math.inf)
    place = tuple((apart >= 0.999 * apart.max()).nonzero()[0].tolist())
    mine, wanted = digits(given[place].item(), right[place].item())
    return f"the number at {list(place)} should be {wanted}; yours is {mine}"
