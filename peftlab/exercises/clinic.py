"""Clinics: broken runs under letters, to be told apart by what can be seen of them.

A lesson writes its faults once, in a `Ward`. The lesson examines the patients in its own way; the
exercise, its mistakes and their diagnoses follow from the ward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from peftlab.exercises import Exercise, Untouched, expect


@dataclass(frozen=True)
class Ward:
    """Letters, and which fault each of them hides.

    `table` maps a fault to its letter, what it is, and its sign: a whole sentence on what gives it
    away, shown to who misses it. `where`, `what` and `word` are used in diagnoses: "Look again at
    `where`A", "you named one `what` twice", "`where`A has no `word` yet". `again` is what is said
    of the first letter that is wrong, from its `sign`, or from what was `said` and `sign_of_said`.
    """

    table: dict[str, tuple[str, str, str]]
    where: str = "patient "
    what: str = "fault"
    word: str = "diagnosis"
    again: str = "Look again at {where}{letter}. {sign}"

    @property
    def faults(self) -> dict[str, str]:
        """What each fault is, in the order in which the learner reads them."""
        return {fault: text for fault, (_, text, _) in self.table.items()}

    @property
    def right(self) -> dict[str, str]:
        """The fault of each letter."""
        letters = {letter: fault for fault, (letter, _, _) in self.table.items()}
        return {letter: letters[letter] for letter in sorted(letters)}

    def examine(self, one: Callable, name: str = "") -> pd.DataFrame:
        """`one(fault)` for a sound run (its fault is None) and every patient, in one table.

        `one` returns a table or rows of it; the first column is the patient: `name` and a letter.
        """
        found = []
        for letter, fault in {"sound": None, **self.right}.items():
            rows = pd.DataFrame(one(fault))
            rows.insert(0, "patient", letter if fault is None else name + letter)
            found.append(rows)
        return pd.concat(found, ignore_index=True)

    def exercise(self, name: str, title: str, confused: tuple, unknown: str, **options) -> Exercise:
        """To give each letter its fault. `confused` are pairs of letters that learners exchange.

        `unknown` is a name of a fault that is on no list.
        """
        right = self.right
        first, second = list(right)[:2]
        exchanged = [self.swapped(*pair) for pair in confused]
        mistakes = (
            *((wrong, self._look_again(wrong, right)) for wrong in exchanged),
            (right | {first: right[second]}, f"you named one {self.what} twice"),
            (right | {second: unknown}, f"{unknown!r} is none of the {self._all} {self.what}s"),
            ({first: right[first]}, f"{self.where}{second} has no {self.word} yet"),
        )
        praise = "; ".join(f"{letter}: {self.faults[right[letter]]}" for letter in right)
        options = {"praise": praise, "otherwise": self._look_again} | options
        return Exercise(name, title, self._named, right, mistakes, **options)

    def swapped(self, first: str, second: str) -> dict[str, str]:
        """The right answer with two of its faults exchanged."""
        right = self.right
        return right | {first: right[second], second: right[first]}

    def _look_again(self, given: dict[str, str], right: dict[str, str]) -> str:
        letter = next(letter for letter in right if given[letter] != right[letter])
        said, signs = given[letter], {fault: sign for fault, (_, _, sign) in self.table.items()}
        return self.again.format(
            where=self.where,
            letter=letter,
            said=said,
            sign=signs[right[letter]],
            sign_of_said=signs[said],
        )

    @property
    def _all(self) -> str:
        return {4: "four", 5: "five"}[len(self.table)]

    def _named(self, answer: Any) -> dict[str, str]:
        """The fault that was named for each letter: each of them once."""
        right = self.right
        first, fault, known = next(iter(right)), next(iter(self.table)), ", ".join(self.table)
        expect(
            isinstance(answer, dict), f'answer with a dict, such as {{"{first}": "{fault}", ...}}'
        )
        if all(answer.get(letter) in (None, ...) for letter in right):
            raise Untouched
        named, faults = {}, {_folded(fault): fault for fault in self.table}
        for letter in right:
            given = answer.get(letter)
            expect(given not in (None, ...), f"{self.where}{letter} has no {self.word} yet")
            named[letter] = faults.get(_folded(given))
            expect(
                named[letter],
                f"{given!r} is none of the {self._all} {self.what}s, which are {known}",
            )
        expect(
            len(set(named.values())) == len(named),
            f"you named one {self.what} twice: each of the {self._all} occurs once",
        )
        return named


def _folded(name: Any) -> str:
    """A fault's name in small letters and one spelling."""
    return str(name).strip().lower().replace("optimizer", "optimiser")


def gradient(tensors) -> float:
    """The length of the gradient of several tensors together; NaN if none of them has one."""
    found = [tensor.grad.norm() for tensor in tensors if tensor.grad is not None]
    return torch.stack(found).norm().item() if found else float("nan")


def distance(tensors, start) -> float:
    """How far several tensors together are from where they started, as a Euclidean distance."""
    gaps = [(now.detach() - then).norm() for now, then in zip(tensors, start, strict=True)]
    return torch.stack(gaps).norm().item()


def course(
    parts: dict,
    optimiser,
    loss_of: Callable,
    task,
    steps: int,
    size: int,
    seed: int,
    moved=distance,
) -> Iterator[dict[str, float]]:
    """Train a patient, and yield what can be seen after each step.

    `parts` maps the name of a column to tensors: of "{} table" the columns are "gradient table" and
    "moved table". `loss_of(examples)` is the loss of `size` examples of `task.train`;
    `moved(tensors, start)` says how far tensors are from their start.
    """
    start = {name: [t.detach().clone() for t in tensors] for name, tensors in parts.items()}
    order = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(task.train), generator=order)[:size].tolist()
        loss = loss_of([task.train[i] for i in chosen])
        if loss.requires_grad:  # else PyTorch would refuse to go backwards
            loss.backward()
        row = {"step": step, "loss": loss.item()}
        row |= {name.format("gradient"): gradient(tensors) for name, tensors in parts.items()}
        optimiser.step()
        for tensor in [tensor for tensors in parts.values() for tensor in tensors]:
            tensor.grad = None
        row |= {
            name.format("moved"): moved(tensors, start[name]) for name, tensors in parts.items()
        }
        yield row
