"""What is learned: examples of a task, how they become a batch, and how an answer is scored.

`load("sentiment" | "facts" | "slots")` reads the examples from `data/tasks/`, where
`python -m peftlab.experiments.make_world` put them. Train, dev and test share no (prompt, target)
pair; each task's module says what else they share and why.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peftlab._data import data_path

if TYPE_CHECKING:
    import torch

    from peftlab.bases import LanguageModel

NAMES = ("sentiment", "facts", "slots")
IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """A prompt, the target that should follow it, and the group that it is reported under."""

    prompt: str
    target: str
    group: str = ""


@dataclass
class Task:
    """Examples in three splits and the scores of a model on them."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]

    name: ClassVar[str]
    title: ClassVar[str]
    main: ClassVar[str]  # the headline metric
    max_new_tokens: ClassVar[int]

    def batch(
        self, examples: list[Example], tokenizer, device="cpu", context: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Right-padded ids, mask and labels; the loss counts the target and its end of text only.

        Raises ValueError if the longest example has more tokens than `context`.
        """
        import torch

        if not examples:
            raise ValueError("a batch needs at least one example")
        prompts = tokenizer([example.prompt for example in examples])["input_ids"]
        targets = tokenizer([e.target for e in examples], add_special_tokens=False)["input_ids"]
        targets = [ids + [tokenizer.eos_token_id] for ids in targets]
        lengths = [
            len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)
        ]
        longest = max(lengths)
        if context is not None and longest > context:
            raise ValueError(f"the longest example has {longest} tokens, only {context} fit")
        size = (len(examples), longest)
        input_ids = torch.full(size, tokenizer.pad_token_id)
        mask = torch.zeros(size, dtype=torch.long)
        labels = torch.full(size, IGNORED)
        for row, (prompt, target, length) in enumerate(zip(prompts, targets, lengths, strict=True)):
            input_ids[row, :length] = torch.tensor(prompt + target)
            mask[row, :length] = 1
            labels[row, len(prompt) : length] = torch.tensor(target)
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        return {key: tensor.to(device) for key, tensor in batch.items()}

    def score(
        self,
        model: LanguageModel,
        examples: list[Example] | None = None,
        batch_size: int = 64,
    ) -> dict[str, float]:
        """Metrics between 0 and 1 on `examples`, on the test split if none are given."""
        examples = self.test if examples is None else examples
        outputs = []
        for start in range(0, len(examples), batch_size):
            prompts = [example.prompt for example in examples[start : start + batch_size]]
            outputs += model.generate(prompts, max_new_tokens=self.max_new_tokens)
        return self.grade(examples, outputs)

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """Metrics of the generated `outputs`; each task has its own."""
        raise NotImplementedError


def share(values) -> float:
    """The mean of true and false values."""
    values = list(values)
    return sum(values) / len(values)


def load(name: str) -> Task:
    """The task called `name`, one of `NAMES`, with its examples from `data/tasks/`."""
    if name not in NAMES:
        raise ValueError(f"no task {name!r}; there are {', '.join(NAMES)}")
    module = importlib.import_module(f"peftlab.tasks.{name}")
    splits = {split: read(data_path("tasks", name, f"{split}.jsonl")) for split in SPLITS}
    return module.TASK(**splits)


SPLITS = ("train", "dev", "test")


def read(path) -> list[Example]:
    """The examples in a file with one JSON object a line."""
    return [Example(**json.loads(line)) for line in path.read_text().splitlines()]
