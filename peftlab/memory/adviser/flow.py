"""The decision flow: questions in order, each rules out the methods that cannot meet it.

Every question but the last is decided by computation or by what a library's documentation says:
whether a step fits, whether a change can be merged, how large a file is. Which of the methods that
are left scores best is a matter of evidence, and without it the adviser says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

from peftlab.memory.adviser.evidence import about, comparisons, near, unbeaten
from peftlab.memory.adviser.need import Need
from peftlab.memory.adviser.questions import (
    can_do,
    codes,
    delay,
    file,
    fits,
    served,
    size_of,
    together,
    weights,
)
from peftlab.memory.adviser.recipes import RECIPES, Recipe
from peftlab.memory.calculator import KINDS

OUTCOMES = ("method", "not enough evidence", "nothing fits")
IN_WORDS = 16  # with fewer examples nothing is recorded, and they fit into a prompt in words

FLOW: dict[str, tuple[str, Callable[[str, Need], str]]] = {
    "can": ("Can this model do the task with it?", can_do),
    "bits": ("May the base be in four bits?", codes),
    "weights": ("May the model's own weights change?", weights),
    "together": ("Do several tasks meet in a batch?", together),
    "delay": ("May an answer take longer?", delay),
    "file": ("Is a task's file small enough?", file),
    "served": ("Does the server know it?", served),
    "fits": ("Does a training step fit the GPU?", fits),  # the only one that takes a while
}
GIVEN_UP = {  # what a need is without the wish that a question is about
    "bits": {"four_bits": True},
    "weights": {"weights_may_change": True, "keep": False},
    "together": {"together": 1},
    "delay": {"no_delay": False},
    "file": {"megabytes": None},
    "served": {"serve": "peft"},
}
SKIPPED = {"can": ("can", "fits"), "fits": ("fits",)}  # another model, a larger GPU


@dataclass(frozen=True)
class Step:
    """A question, the methods that come through, and why each of the others does not."""

    key: str
    question: str
    left: tuple[str, ...]
    out: dict[str, str]


@dataclass(frozen=True)
class Advice:
    """`method` is what to take, or to begin with where the evidence is not enough; "" if nothing
    fits. `why` says it in sentences. `relax` are the least changes after which something fits."""

    need: Need
    outcome: str
    method: str
    path: tuple[Step, ...]
    why: tuple[str, ...]
    rows: tuple[dict, ...] = ()
    relax: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[str, ...]:
        """The methods that meet every constraint."""
        return self.path[-1].left

    @property
    def recipe(self) -> Recipe | None:
        """Defaults with reasons, and what to try next."""
        return RECIPES.get(self.method)

    @property
    def code(self) -> str:
        """Lines for Hugging Face PEFT."""
        return self.recipe.code(self.need, size_of(self.method, self.need)) if self.recipe else ""


def advise(need: Need, rows: list[dict] | None = None) -> Advice:
    """A method for a need, with the path to it. `rows` are comparisons; by default the recorded."""
    path = _path(need)
    left = path[-1].left
    if not left:
        return Advice(need, "nothing fits", "", path, _nothing(path), relax=_relax(need))
    seen = about(comparisons() if rows is None else rows, need.task, left)
    deciding = [row for row in seen if near(row, need.model)]
    best = unbeaten(deciding, list(left)) or list(left)
    method = max(best, key=lambda kind: (RECIPES[kind].doors, -list(KINDS).index(kind)))
    decided = bool(deciding) and len(best) < len(left)
    why = [RECIPES[method].because]
    if decided:
        why.append(f"Recorded: {', '.join(k for k in left if k not in best)} scored worse.")
    elif len(left) > 1:
        why.append(f"Which of {', '.join(left)} scores best: not enough evidence.")
    doubts = [] if decided else _doubts(method, left, need)
    outcome = "not enough evidence" if doubts else "method"
    return Advice(need, outcome, method, path, (*why, *doubts), tuple(seen))


def _path(need: Need, without: tuple[str, ...] = ()) -> tuple[Step, ...]:
    left, path = tuple(RECIPES), []
    for key, (question, against) in FLOW.items():
        if key not in without:
            said = {kind: against(kind, need) for kind in left}
            left = tuple(kind for kind in left if not said[kind])
            path.append(Step(key, question, left, {k: why for k, why in said.items() if why}))
    return tuple(path)


def _doubts(method: str, left: tuple[str, ...], need: Need) -> list[str]:
    """What the need turns on and no computation tells."""
    found = []
    if need.goal == "score" and len(left) > 1:
        found.append("You want the best score: measure those that are left on your own data.")
    if need.examples < IN_WORDS:
        found.append(f"{need.examples} examples: put them into a prompt in words first.")
    if need.skill == "knowledge" and all(RECIPES[kind].soft for kind in left):
        found.append("Whether vectors in front can carry new knowledge: not measured at this size.")
    if need.keep and need.no_delay:
        found.append("Merged it is always on: what it forgets then has to be measured.")
    return found


def _nothing(path: tuple[Step, ...]) -> tuple[str, ...]:
    last = next(step for step in path if not step.left)
    return (f"{last.question} No method is left after this question.",)


def _relax(need: Need) -> tuple[str, ...]:
    """The fewest questions that have to be answered otherwise, and what would then be left."""
    for count in (1, 2, 3):
        found = []
        for keys in combinations(FLOW, count):
            fields = {name: value for key in keys for name, value in GIVEN_UP.get(key, {}).items()}
            skipped = tuple(other for key in keys for other in SKIPPED.get(key, ()))
            if left := _path(replace(need, **fields), skipped)[-1].left:
                asked = " and ".join(FLOW[key][0] for key in keys)
                found.append(f"{asked} Then {', '.join(left)}.")
        if found:
            return tuple(found)
    return ()
