"""New facts in a strict format: question, new line, '>>', then ' [attribute] value'.

    Where does Ada Abbott live?
    >> [home] Harwick

The base has read each question wording, every first and last name and every value, but never this
format, and nothing about the 50 held-out people whose 200 facts are taught here. Seven wordings an
attribute; five are used in training and two are not. Every new fact is trained in three of the
five. One fact each of 100 people whom the base knows is in training too: with new facts alone the
adapter learns to answer from nothing, and the base's own knowledge goes unused. The test has three
groups:

- "new facts": a trained fact, asked in one of the five wordings, but not in one of the three that
  trained this fact. Remembering is the point: the fact was in training, this prompt was not.
- "new wordings": a trained fact in one of the two wordings that no training example has.
- "known facts": people of the pre-training text, in trained wordings. None of them is in training.

Dev has the same groups: the fifth wording of a fact, the other unused wording, other known people.
No prompt is in two splits, so no (prompt, target) pair is either. The new people and their facts
are the same in train, dev and test on purpose; the known people of the three splits differ.
"""

from __future__ import annotations

import re

from peftlab.tasks import SPLITS, Example, Task, share

QUESTIONS = {
    "home": (
        "Where does {n} live?",
        "In which town does {n} live?",
        "What is the home town of {n}?",
        "Which town is home to {n}?",
        "Where would you find the house of {n}?",
        "Name the town where {n} lives.",
        "{n} lives in which town?",
    ),
    "job": (
        "What is the job of {n}?",
        "What does {n} do for a living?",
        "What work does {n} do?",
        "How does {n} earn a living?",
        "Which trade does {n} follow?",
        "Name the job of {n}.",
        "As what does {n} work?",
    ),
    "likes": (
        "What does {n} like?",
        "What does {n} love most?",
        "What is the favourite thing of {n}?",
        "What makes {n} happy?",
        "What would please {n}?",
        "Name one thing that {n} likes.",
        "{n} is fond of what?",
    ),
    "pet": (
        "Which pet does {n} have?",
        "What animal does {n} keep?",
        "What pet lives with {n}?",
        "Which animal does {n} own?",
        "What kind of animal shares a house with {n}?",
        "Name the pet of {n}.",
        "{n} is the owner of which pet?",
    ),
}
TRAINED_WORDINGS = 5  # the wordings after these are never used in training
NAME = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")
FORMAT = re.compile(r" \[(" + "|".join(QUESTIONS) + r")\] [a-zA-Z]+")


def example(person: dict, attribute: str, wording: int, group: str) -> Example:
    question = QUESTIONS[attribute][wording].format(n=person["name"])
    return Example(f"{question}\n>>", f" [{attribute}] {person[attribute]}", group)


def name_in(example: Example) -> str:
    """Whom a question is about."""
    return NAME.search(example.prompt)[0]


class Facts(Task):
    name = "facts"
    title = "New facts in a strict format"
    main = "new_facts"
    max_new_tokens = 10

    @classmethod
    def load(cls, people: int | None = None) -> Facts:
        """The task with the facts of the first `people` new people, of all 50 if None.

        What is asked of known people is the same whatever the number of new ones.
        """
        task = super().load()
        new = dict.fromkeys(name_in(e) for e in task.train if e.group != "known facts")
        if people is None:
            return task
        if isinstance(people, bool) or not isinstance(people, int) or not 1 <= people <= len(new):
            raise ValueError(f"people={people!r}: allowed is 1 to {len(new)}")
        taken = set(list(new)[:people])
        for split in SPLITS:
            kept = [
                e for e in getattr(task, split) if e.group == "known facts" or name_in(e) in taken
            ]
            setattr(task, split, kept)
        return task

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """Exact match of each group, and the share of all answers in a valid format.

        Valid is one of the four attributes in brackets and one word, whichever they are.
        """
        scores = {}
        for group in ("new facts", "new wordings", "known facts"):
            exact = [
                output == example.target
                for example, output in zip(examples, outputs, strict=True)
                if example.group == group
            ]
            if exact:
                scores[group.replace(" ", "_")] = share(exact)
        scores["valid_format"] = share(FORMAT.fullmatch(output) is not None for output in outputs)
        return scores


TASK = Facts
