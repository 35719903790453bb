"""What is compared: entries, each a method with its first guess of a rate, on one task and base."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from peftlab.methods import Method
from peftlab.tasks import SPLITS, Example, Task
from peftlab.tasks import load as load_task

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
HEAD_RATE = 3e-3  # the first guess for a head


@dataclass(frozen=True)
class Entry:
    """A row of the comparison. Without methods it is the head alone, and `lr` counts for nothing.

    `lr` is where the search of its rate begins, a guess and no setting. `steps` and `batch_size`
    take the place of the contest's, where entries are compared at equal cost.
    """

    label: str
    methods: tuple[Method, ...]
    lr: float
    steps: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Contest:
    """Entries on one task and one base, all with as many steps of as many examples.

    `options` are those of the task. `dev` is how many examples of dev the search scores, and `test`
    how many of the test are read, from the first on; None takes all. `examples` is how many of the
    training split a run has, drawn by its seed, so that the draw is a part of what varies between
    seeds; a larger number has the examples of a smaller one among it.
    """

    name: str
    task: str
    base: str
    steps: int
    batch_size: int
    entries: tuple[Entry, ...]
    options: dict = field(default_factory=dict)
    dev: int | None = None
    test: int | None = None
    examples: int | None = None

    def load_task(self) -> Task:
        """The task with the examples that this contest takes; those of training undrawn."""
        task = load_task(self.task, **self.options)
        task.dev, task.test = task.dev[: self.dev], task.test[: self.test]
        return task

    def entry(self, label: str) -> Entry:
        return next(entry for entry in self.entries if entry.label == label)

    def facts(self) -> dict:
        """What every row of this contest has in common, ready for JSON."""
        task = self.load_task()
        sizes = {f"{split} examples": len(getattr(task, split)) for split in SPLITS}
        if self.examples is not None:
            sizes |= {"train examples": self.examples, "train examples drawn": "by the seed"}
        return {
            "task": self.task,
            "options": self.options,
            "base": self.base,
            "steps": self.steps,
            "batch size": self.batch_size,
            "main": task.main,
            **sizes,
        }


def drawn(examples: list[Example], number: int | None, seed: int) -> list[Example]:
    """So many of the examples, chosen by the seed; all in their order for None.

    Raises ValueError for more than there are.
    """
    if number is None:
        return examples
    if number > len(examples):
        raise ValueError(f"{number} examples of {len(examples)}")
    return Random(f"examples {seed}").sample(examples, len(examples))[:number]


@dataclass(frozen=True)
class Try:
    """One training run of an entry, scored on one split."""

    contest: str
    label: str
    lr: float
    head_lr: float | None  # None where the task has no head
    seed: int
    split: str
    steps: int
    batch_size: int

    @property
    def key(self) -> tuple:
        """What tells two runs of one file apart."""
        return tuple(vars(self).values())


KEYS = tuple(Try.__dataclass_fields__)
