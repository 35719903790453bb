"""Exercises that say what went wrong.

A lesson's module defines its exercises with `@exercise` and its predict-first questions with
`@question`. In the notebook the learner hands over a function (or a letter) and sees a `Verdict`:
passed, not attempted yet, or a diagnosis of the probable mistake. Nothing raises into the
notebook, so Run All goes on.

An exercise tries the answer, which `answers` contains, and compares what comes out with what comes
out of its own solution and of its table of wrong answers, each with its diagnosis.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peftlab.exercises import answers
from peftlab.exercises.answers import Stopped, TookTooLong, Untouched, Wrong, outcome, usual
from peftlab.exercises.forms import expect, same

MARKS = {"passed": "✓", "wrong": "✗", "open": "…"}


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


def after(function: Callable, change: Callable) -> Callable:
    """A function with its result changed: a wrong answer that differs from the solution at its end.

    `change` gets the result, or its items if it is a tuple.
    """

    def changed(*args):
        made = function(*args)
        return change(*made) if isinstance(made, tuple) else change(made)

    return changed


@dataclass(frozen=True, repr=False)
class Exercise:
    """A trial of the learner's answer; call it with the answer.

    `trial(answer)` runs the answer and returns what it gives, or raises `Wrong` if that has the
    wrong form. What the solution gives passes. Each of `mistakes` is (wrong answer, diagnosis) or
    (wrong answer, diagnosis, recogniser): the first row whose wrong answer gives the same, or whose
    recogniser says yes to (given, right), has the diagnosis; `otherwise` is said if none does.
    A wrong answer whose form is wrong has words of what the trial says to it for its diagnosis.

    Diagnoses, `otherwise` and `praise` are words, with {given} and {right} where the two are to be
    quoted, or functions of (given, right) that return words. Without `praise` the trial says all
    that is wrong, and returns the praise. `right()` is computed in place of what the solution
    gives, if there is an independent way to it. Both are tried a second time with the sizes in
    `again`. `atol` is the tolerance of `same`. Difficulty and importance go from 1 to 5.
    """

    name: str
    title: str
    trial: Callable[..., Any]
    solution: Any
    mistakes: tuple[tuple, ...] = ()
    praise: str | Callable | None = None
    otherwise: str | Callable = "the result is another, and none of the usual mistakes gives it"
    right: Callable[..., Any] | None = None
    again: tuple = ()
    atol: float = 1e-6
    difficulty: int = 2
    importance: int = 3
    minutes: int = 5
    hints: tuple[str, ...] = field(default=())

    def __call__(self, answer: Any = None) -> Verdict:
        if answer is None or answer is ...:
            return Verdict("open", f"{self.title}: not attempted yet")
        try:
            with usual():
                status, words = "passed", self.judge(answer)
        except Wrong as wrong:
            status, words = "wrong", str(wrong)
        except Untouched:
            status, words = "open", "not attempted yet"
        except Stopped as stopped:
            status, words = "wrong", f"your code stopped with {answers.describe(stopped.error)}"
            if isinstance(stopped.error, TookTooLong):
                words = f"your code took longer than {answers.SECONDS:g} s: does its loop end?"
        except Exception as error:  # in a comparison
            status = "wrong"
            words = f"what you return cannot be compared ({answers.describe(error)})"
        return Verdict(status, f"{self.title}: {words}")

    def wanted(self, *size) -> Any:
        """What the trial of a right answer gives."""
        right = self.right(*size) if self.right else outcome(self.trial, self.solution, size)
        if isinstance(right, Exception):
            raise right
        return right

    def judge(self, answer: Any) -> str:
        """The praise for a right answer. Raises `Wrong` with the diagnosis, or what stops it."""
        if callable(self.solution) and not callable(answer):
            raise Wrong("hand over the function itself: name it, without calling it")
        for size in ((), self.again) if self.again else ((),):
            praise = self._judge(answer, size)
        return praise

    def _judge(self, answer: Any, size: tuple) -> str:
        given = outcome(self.trial, answer, size)
        stopped = isinstance(given, Exception)
        if stopped and (self.praise is None or not isinstance(given, Stopped)):
            raise given
        if self.praise is None:
            return given or "correct"
        right = self.wanted(*size)
        if same(given, right, self.atol):
            return fill(self.praise, right, right)
        for wrong, diagnosis, *recogniser in self.mistakes:
            try:
                if recogniser and not stopped:
                    found = recogniser[0](given, right)
                else:
                    found = same(given, outcome(self.trial, wrong, size), self.atol)
                words = fill(diagnosis, given, right) if found else None
            except Exception:  # a result of another form than the row is about
                continue
            if words:
                raise Wrong(words)
        if stopped:
            raise given
        try:
            words = fill(self.otherwise, given, right)
        except Exception:
            words = type(self).otherwise
        raise Wrong(words)

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


def fill(words: str | Callable, given: Any, right: Any) -> str:
    """Words with what was given and what is right in the places of {given} and {right}.

    If a trial gives a dictionary of cases, both are those of the first case that is wrong, which
    is {case}.
    """
    if callable(words):
        return words(given, right)
    case = None
    if isinstance(given, dict) and isinstance(right, dict):
        case = next((case for case in right if not same(given.get(case), right[case])), None)
    if case is not None:
        given, right = given.get(case), right[case]
    said = words.format(given=given, right=right, case=case)
    hidden = given is not right and said == words.format(given=right, right=right, case=case)
    if hidden and "{given" in words and "{right" in words:
        said += f" (to the last digit: {given!r} and {right!r})"
    return said


def exercise(title: str, solution: Any, **options) -> Callable[[Callable], Exercise]:
    """Turn a trial into an `Exercise` named after it."""

    def wrap(trial: Callable) -> Exercise:
        return Exercise(trial.__name__, title, trial, solution, **options)

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
        word = answer if type(answer) is str else type(answer).__name__
        letter = word.strip().lower()
        if letter not in self.choices:
            allowed = ", ".join(self.choices)
            return Verdict("wrong", f"Prediction: {word!r} is none of {allowed}")
        with usual():
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
