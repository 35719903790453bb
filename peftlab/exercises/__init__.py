"""Exercises that say what went wrong.

A lesson's module defines its exercises with `@exercise` and its predict-first questions with
`@question`. In the notebook the learner hands over a function (or a letter) and sees a `Verdict`:
passed, not attempted yet, or a diagnosis of the probable mistake. A check never raises into the
notebook, so Run All goes on.

An exercise carries its own solution and a set of wrong answers with the words that their diagnosis
must contain; the tests run all of them.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MARKS = {"passed": "✓", "wrong": "✗", "open": "…"}


class Wrong(Exception):
    """Raised inside a check, with the diagnosis for the learner."""


def expect(condition: Any, diagnosis: str) -> None:
    """Say the diagnosis unless the condition holds."""
    if not bool(condition):
        raise Wrong(diagnosis)


@dataclass(frozen=True)
class Verdict:
    """What the grader says: `status` is passed, wrong or open (not attempted yet)."""

    status: str
    message: str

    def __repr__(self) -> str:
        return f"{MARKS[self.status]} {self.message}"

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@dataclass(frozen=True, repr=False)
class Exercise:
    """A check of the learner's answer; call it with the answer.

    `check(answer)` raises `Wrong` with a diagnosis, or returns words of confirmation. `solution`
    passes; each of `mistakes` is an answer learners write, and words its diagnosis contains.
    Difficulty and importance go from 1 to 5.
    """

    name: str
    title: str
    check: Callable[[Any], str | None]
    solution: Any
    mistakes: tuple[tuple[Any, str], ...] = ()
    difficulty: int = 2
    importance: int = 3
    minutes: int = 5
    hints: tuple[str, ...] = field(default=())

    def __call__(self, answer: Any = None) -> Verdict:
        if answer is None or answer is ...:
            return Verdict("open", f"{self.title}: not attempted yet")
        try:
            praise = self.check(answer)
        except Wrong as wrong:
            return Verdict("wrong", f"{self.title}: {wrong}")
        except NotImplementedError:
            return Verdict("open", f"{self.title}: not attempted yet")
        except Exception as error:  # the learner's code may fail in any way: say how, go on
            return Verdict("wrong", f"{self.title}: your code stopped with {describe(error)}")
        return Verdict("passed", f"{self.title}: {praise or 'correct'}")

    def __repr__(self) -> str:
        return f"Exercise: {self.title}"  # the solution stays folded

    @property
    def source(self) -> str:
        """The solution's text, for the folded cell."""
        return inspect.getsource(self.solution) if callable(self.solution) else repr(self.solution)

    def _repr_html_(self) -> str:
        stars = "●" * self.difficulty + "○" * (5 - self.difficulty)
        weight = "●" * self.importance + "○" * (5 - self.importance)
        hints = "".join(
            f"<details><summary>Hint {n}</summary><p>{html.escape(hint)}</p></details>"
            for n, hint in enumerate(self.hints, 1)
        )
        return (
            f"<p><b>{html.escape(self.title)}</b> &nbsp; difficulty {stars} &nbsp; "
            f"importance {weight} &nbsp; about {self.minutes} minutes</p>{hints}"
            "<details><summary>Solution</summary>"
            f"<pre>{html.escape(self.source)}</pre></details>"
        )


def describe(error: Exception) -> str:
    """An exception in one line, for a learner."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def exercise(title: str, solution: Any, **options) -> Callable[[Callable], Exercise]:
    """Turn a check function into an `Exercise` named after it."""

    def wrap(check: Callable) -> Exercise:
        return Exercise(check.__name__, title, check, solution, **options)

    return wrap


@dataclass(frozen=True, repr=False)
class Question:
    """A predict-first question: commit to a letter, then the answer is computed.

    `compute()` returns the right letter from a computation, never from a typed answer, and words
    with the numbers it found. `choices` maps a letter to (text, why it is wrong if it is).
    """

    name: str
    text: str
    choices: dict[str, tuple[str, str]]
    compute: Callable[[], tuple[str, str]]

    def __call__(self, answer: Any = None) -> Verdict:
        if answer is None or answer is ...:
            return Verdict("open", "Prediction: not made yet. Pick a letter, then run this again")
        letter = str(answer).strip().lower()
        if letter not in self.choices:
            allowed = ", ".join(self.choices)
            return Verdict("wrong", f"Prediction: {answer!r} is none of {allowed}")
        right, found = self.compute()
        if letter == right:
            return Verdict("passed", f"Prediction: {letter} is right. {found}")
        return Verdict("wrong", f"Prediction: not {letter}. {self.choices[letter][1]} {found}")

    def __repr__(self) -> str:
        return f"Predict: {self.text}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<li><b>{letter}</b> &nbsp; {html.escape(text)}</li>"
            for letter, (text, _) in self.choices.items()
        )
        return f"<p><b>Predict:</b> {html.escape(self.text)}</p><ul>{rows}</ul>"


def question(text: str, choices: dict[str, tuple[str, str]]) -> Callable[[Callable], Question]:
    """Turn a function that computes the right letter into a `Question` named after it."""

    def wrap(compute: Callable) -> Question:
        return Question(compute.__name__, text, choices, compute)

    return wrap


def collect(module) -> list[Exercise | Question]:
    """Every exercise and question of a lesson's module, in the order they are written."""
    return [item for item in vars(module).values() if isinstance(item, (Exercise, Question))]


def finding(statement: str, holds: Any) -> None:
    """Print a statement about a run, and whether it held in this one."""
    print("✓" if holds else "✗ not in this run:", statement)


def swapped(right: dict[str, str], first: str, second: str) -> dict[str, str]:
    """A right answer with two of its names exchanged: a mistake that learners make."""
    return right | {first: right[second], second: right[first]}


def match(
    answer: dict,
    right: dict[str, str],
    known: dict[str, str],
    signs: dict[str, str],
    where: str = "patient ",
    what: str = "fault",
    word: str = "diagnosis",
) -> str:
    """Grade names that were given to letters: each of `known` belongs to one letter of `right`.

    `signs` says what gives a name away: a whole sentence, shown for the first letter that is wrong.
    Returns the right names in words.
    """
    if all(answer.get(letter) in (None, ...) for letter in right):
        raise NotImplementedError
    for letter in right:
        given = answer.get(letter)
        expect(given not in (None, ...), f"{where}{letter} has no {word} yet")
        expect(
            given in known, f"{given!r} is none of the four {what}s, which are {', '.join(known)}"
        )
    expect(
        len({answer[letter] for letter in right}) == len(right),
        f"you named one {what} twice: each of the four occurs once",
    )
    for letter, name in right.items():
        expect(answer[letter] == name, f"Look again at {where}{letter}. {signs[name]}")
    return "; ".join(f"{letter}: {known[name]}" for letter, name in right.items())
