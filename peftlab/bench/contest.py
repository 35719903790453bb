"""What is compared: entries, each a method with its first guess of a rate, on one task and base."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftlab.methods import Method
from peftlab.tasks import Task
from peftlab.tasks import load as load_task

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
HEAD_RATE = 3e-3  # the first guess for a head


@dataclass(frozen=True)
class Entry:
    """A row of the comparison. Without methods it is the head alone, and `lr` counts for nothing.

    `lr` is where the search of its rate begins, a guess and no setting.
    """

    label: str
    methods: tuple[Method, ...]
    lr: float


@dataclass(frozen=True)
class Contest:
    """Entries on one task and one base, all with as many steps of as many examples.

    `options` are those of the task. `dev` is how many examples of dev the search scores, from the
    first on; None takes all.
    """

    name: str
    task: str
    base: str
    steps: int
    batch_size: int
    entries: tuple[Entry, ...]
    options: dict = field(default_factory=dict)
    dev: int | None = None

    def load_task(self) -> Task:
        """The task with the examples that this contest takes."""
        task = load_task(self.task, **self.options)
        task.dev = task.dev[: self.dev]
        return task

    def entry(self, label: str) -> Entry:
        return next(entry for entry in self.entries if entry.label == label)

    def facts(self) -> dict:
        """What every row of this contest has in common, ready for JSON."""
        task = self.load_task()
        return {
            "task": self.task,
            "options": self.options,
            "base": self.base,
            "steps": self.steps,
            "batch size": self.batch_size,
            "main": task.main,
            **{
                f"{split} examples": len(getattr(task, split)) for split in ("train", "dev", "test")
            },
        }


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
