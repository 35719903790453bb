"""Labels that nothing foretells: how many bits a method can store.

A prompt is four letters, its target one of sixteen by the toss of a die, so the base can know
none of them and nothing can be generalised. What is learned by heart is therefore stored in what
trains: of an example log₂ 16 = 4 bits less what the loss says is still open (`bench.trends.bits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from peftlab.bench.contest import Contest
from peftlab.tasks import Example, Task, share
from peftlab.tasks.letters import ALPHABET

CLASSES = 16
LONG = 4  # letters of a prompt
SCORED = 512  # examples that are asked again


class Labels(Task):
    """Random labels; dev and test ask examples of the training again."""

    name = "labels"
    title = "Random labels"
    main = "exact"
    max_new_tokens = 2

    @classmethod
    def load(cls, number: int = 1024, classes: int = CLASSES, seed: int = 0) -> Labels:
        """So many examples, no two with one prompt. Raises ValueError for more than there are."""
        if not 1 <= number <= len(ALPHABET) ** LONG:
            raise ValueError(f"number={number}: allowed is 1 to {len(ALPHABET) ** LONG}")
        rng, made = Random(f"labels {seed}"), {}
        while len(made) < number:
            prompt = f"in: {' '.join(rng.choices(ALPHABET, k=LONG))}\nout:"
            made.setdefault(prompt, f" {rng.choice(ALPHABET[:classes])}")
        examples = [Example(prompt, target) for prompt, target in made.items()]
        return cls(examples, examples[:SCORED], examples[:SCORED])

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """`exact`: the share of right answers."""
        pairs = zip(examples, outputs, strict=True)
        return {"exact": share(example.target == output for example, output in pairs)}


@dataclass(frozen=True)
class Memorising(Contest):
    """A contest on random labels."""

    def load_task(self) -> Labels:
        task = Labels.load(**self.options)
        task.dev, task.test = task.dev[: self.dev], task.test[: self.test]
        return task
