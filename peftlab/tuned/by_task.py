"""One base and several tasks, each with a method of its own; one is attached at a time.

`Tuned.keep` and `Tuned.use` swap adapters of one kind, in one attachment. Here the kinds differ:
a prompt for one task, LoRA for another, all weights for a third.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from peftlab.bases import Base
from peftlab.methods import Method
from peftlab.methods.heads import Head
from peftlab.tuned.tuned import Tuned, attach


@dataclass
class _Entry:
    """How a task's adapter is made, and what it held when it was taken off."""

    methods: Method | list[Method]
    seed: int
    head: Head | None
    kept: dict[str, Tensor] = field(default_factory=dict)


class TaskAdapters:
    """Adapters by the name of their task, on one base.

        adapters = TaskAdapters(base)
        adapters.add("sort", PromptTuning(20))    # attached; train it
        adapters.add("facts", LoRA(r=8))          # the prompt comes off, and is kept
        adapters.use("sort")                      # and comes back as it was

    What is kept are the tensors that train and those that are stored beside them, on the base's
    device. If a method cannot be attached, the one before it is attached again.
    """

    def __init__(self, base: Base):
        self.base = base
        self.current: str | None = None
        self.tuned: Tuned | None = None
        self._entries: dict[str, _Entry] = {}

    @property
    def names(self) -> list[str]:
        """The tasks, in the order in which they were added."""
        return list(self._entries)

    def add(
        self, name: str, methods: Method | list[Method], seed: int = 0, head: Head | None = None
    ) -> Tuned:
        """Attach a new adapter for a task. Raises ValueError if the task has one already."""
        if name in self._entries:
            raise ValueError(f"{name!r} has an adapter already; use({name!r}) attaches it")
        entry = _Entry(methods, seed, head)
        tuned = self._swapped(name, entry)
        self._entries[name] = entry
        return tuned

    def use(self, name: str) -> Tuned:
        """Attach the adapter of a task as it was when it came off.

        The `Tuned` is a new one, unless this task's is attached. Raises ValueError for a task
        without an adapter.
        """
        if name not in self._entries:
            raise ValueError(
                f"no adapter for {name!r}; there are {', '.join(self.names) or 'none'}"
            )
        if name == self.current and self.tuned.attached:
            return self.tuned
        return self._swapped(name, self._entries[name])

    def close(self) -> Base:
        """Take off what is attached, and keep it: the base is bit for bit as before.

        Raises RuntimeError if it was detached behind our back, because then what it learned since
        it was attached here cannot be kept for every method.
        """
        if self.tuned is not None:
            name, tuned, self.current, self.tuned = self.current, self.tuned, None, None
            if not tuned.attached:
                raise RuntimeError(
                    f"the adapter of {name!r} was detached elsewhere, so what it learned since it "
                    "was attached is not kept; use() and close() take adapters off"
                )
            tuned.unmerge()
            places = tuned.trainable | tuned.frozen
            self._entries[name].kept = {key: t.detach().clone() for key, t in places.items()}
            tuned.detach()
        return self.base

    def _swapped(self, name: str, entry: _Entry) -> Tuned:
        before = self.current
        self.close()
        try:
            tuned = attach(self.base, entry.methods, entry.seed, entry.head)
        except BaseException:
            if before is not None:
                self._swapped(before, self._entries[before])
            raise
        if entry.kept:
            tuned.load_state(entry.kept)
        self.current, self.tuned = name, tuned
        return tuned

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}{'*' * (name == self.current)}" for name in self._entries)
        return f"adapters of {self.base.name}: {listed or 'none'}"
