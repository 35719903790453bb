"""What is learned: examples of a task, how they become a batch, and how an answer is scored.

`load(name)`, with one of `NAMES`, reads the examples from `data/tasks/`, where
`python -m peftlab.experiments.make_world` put them; `load("letters", skill="sort")` is one of six
skills. Those of the pharmacy are from `make_pharmacy`; `load("pharmacy", medicines=20)` is a small
part of them. Those of `PUBLIC` do not ship: the module `public` says where they are read from.
Train, dev and test share no (prompt, target) pair; each task's module says what else they share
and why.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from peftlab.bases.data import data_path
from peftlab.bases.files import built, check_fetched

if TYPE_CHECKING:
    import torch

    from peftlab.bases import LanguageModel

WITHOUT_HEAD = ("sentiment", "facts", "slots", "letters")  # answered in words
REAL = ("pharmacy",)  # words that only a real language model has read
NAMES = (*WITHOUT_HEAD, "entities", "speech", "reading", *REAL)
PUBLIC = ("sst2", "wnut17", "e2e")  # read from a folder or the hub
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

    head: ClassVar = None  # the head that the task needs, None for the model's own
    example: ClassVar[type[Example]] = Example  # what its files hold

    @classmethod
    def load(cls) -> Task:
        """The task with its examples from `data/tasks/`."""
        folder = data_path("tasks", cls.name)
        return cls(**{split: read(folder / f"{split}.jsonl", cls.example) for split in SPLITS})

    def split(self, name: str) -> list[Example]:
        """The examples of train, dev or test. Raises ValueError if there is none."""
        if not (examples := getattr(self, name)):
            raise ValueError(f"the task {self.name} has no examples in {name}")
        return examples

    def batch_for(self, model: LanguageModel, examples: list[Example]) -> dict[str, torch.Tensor]:
        """`batch` as this model takes it, on its device."""
        return self.batch(
            examples, model.tokenizer, model.device, context=model.context, kind=model.kind
        )

    def batch(
        self,
        examples: list[Example],
        tokenizer,
        device="cpu",
        context: int | None = None,
        kind: str = "decoder",
    ) -> dict[str, torch.Tensor]:
        """Right-padded ids, mask and labels; the loss counts the target and its end of text only.

        Of a decoder the input is prompt and target; of an encoder-decoder the prompt with a gap
        behind it, where `decoder_input_ids` has the target; of an encoder the prompt and one
        masked token, which the target has to be. Raises ValueError if the longest example has
        more tokens than `context`, or an encoder's target more than one.
        """
        if not examples:
            raise ValueError("a batch needs at least one example")
        make = {"decoder": self._running, "encoder": self._cloze, "encoder-decoder": self._pairs}
        batch = make[kind](examples, tokenizer)
        longest = batch["input_ids"].shape[1]
        if context is not None and longest > context:
            raise ValueError(f"the longest example has {longest} tokens, only {context} fit")
        return {key: tensor.to(device) for key, tensor in batch.items()}

    def _cloze(self, examples: list[Example], tokenizer) -> dict[str, torch.Tensor]:
        """Prompt and mask token for an encoder; the label is the target, at the mask."""
        import torch

        texts = [example.prompt + tokenizer.mask_token for example in examples]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        targets = tokenizer([e.target for e in examples], add_special_tokens=False)["input_ids"]
        if long := [e.target for e, ids in zip(examples, targets, strict=True) if len(ids) != 1]:
            raise ValueError(f"an encoder fills one token; {long[0]!r} is not one")
        masked = batch["input_ids"] == tokenizer.mask_token_id
        masked &= masked.flip(1).cumsum(dim=1).flip(1) == 1  # the last one of each row
        labels = torch.where(masked, torch.tensor(targets), IGNORED)
        return {**{k: batch[k] for k in ("input_ids", "attention_mask")}, "labels": labels}

    def _pairs(self, examples: list[Example], tokenizer) -> dict[str, torch.Tensor]:
        """Prompt with a gap for the encoder, what fills it for the decoder."""
        import torch

        gap = "<extra_id_0>" if "<extra_id_0>" in tokenizer.get_vocab() else ""
        texts = [example.prompt + gap for example in examples]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        start = [tokenizer.pad_token_id, *([tokenizer.convert_tokens_to_ids(gap)] if gap else [])]
        targets = tokenizer([e.target for e in examples], add_special_tokens=False)["input_ids"]
        longest = max(map(len, targets))
        given = torch.full((len(examples), len(start) + longest), tokenizer.pad_token_id)
        labels = torch.full_like(given, IGNORED)
        for row, ids in enumerate(targets):
            given[row, : len(start) + len(ids)] = torch.tensor(start + ids)
            wanted = torch.tensor([*ids, tokenizer.eos_token_id])
            labels[row, len(start) - 1 : len(start) + len(ids)] = wanted
        return {
            **{k: batch[k] for k in ("input_ids", "attention_mask")},
            "decoder_input_ids": given,
            "labels": labels,
        }

    def _running(self, examples: list[Example], tokenizer) -> dict[str, torch.Tensor]:
        """Prompt and target in one line, for a decoder."""
        import torch

        prompts = tokenizer([example.prompt for example in examples])["input_ids"]
        targets = tokenizer([e.target for e in examples], add_special_tokens=False)["input_ids"]
        targets = [ids + [tokenizer.eos_token_id] for ids in targets]
        lengths = [
            len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)
        ]
        size = (len(examples), max(lengths))
        input_ids = torch.full(size, tokenizer.pad_token_id)
        mask = torch.zeros(size, dtype=torch.long)
        labels = torch.full(size, IGNORED)
        for row, (prompt, target, length) in enumerate(zip(prompts, targets, lengths, strict=True)):
            input_ids[row, :length] = torch.tensor(prompt + target)
            mask[row, :length] = 1
            labels[row, len(prompt) : length] = torch.tensor(target)
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def score(
        self,
        model: LanguageModel,
        examples: list[Example] | None = None,
        batch_size: int = 64,
    ) -> dict[str, float]:
        """Metrics between 0 and 1 on `examples`, on the test split if none are given.

        Raises ValueError if there is no example, or anything else among them.
        """
        import torch

        examples = self.test if examples is None else examples
        for name in (name for name in SPLITS if examples is getattr(self, name)):
            self.split(name)
        several = isinstance(examples, list | tuple) and len(examples) > 0
        if not several or not all(isinstance(each, Example) for each in examples):
            raise ValueError(f"examples={examples!r:.60}: a list of examples is needed, not empty")
        outputs = []
        for start in range(0, len(examples), batch_size):
            with torch.no_grad():
                outputs += self.answers(model, examples[start : start + batch_size])
        return self.grade(examples, outputs)

    def answers(self, model: LanguageModel, examples: list[Example]) -> list[str]:
        """What the model says to each, generated if the task knows no other way."""
        prompts = [example.prompt for example in examples]
        return model.generate(prompts, max_new_tokens=self.max_new_tokens)

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """Metrics of the answers; each task has its own."""
        raise NotImplementedError


def share(values) -> float:
    """The mean of true and false values."""
    values = list(values)
    return sum(values) / len(values)


def load(name: str, **options) -> Task:
    """The task called `name`, one of `NAMES`, with its examples from `data/tasks/`; or of `PUBLIC`.

    Options are the `skill` of the letters; the number of new `people` of the facts and of
    `medicines` of the pharmacy; of public
    tasks how many examples `train`, `dev` and `test` take, by which `seed`; and of "sst2" its
    `answer`, "word" or "class".
    """
    if name not in (*NAMES, *PUBLIC):
        raise ValueError(f"no task {name!r}; there are {', '.join((*NAMES, *PUBLIC))}")
    shared = {"entities": "tagging", "speech": "tagging"}  # two tasks in one module
    module = importlib.import_module(f"peftlab.tasks.{shared.get(name, name)}")
    task = module.TASKS[name] if name in shared else module.TASK
    return task.load(**options)


SPLITS = ("train", "dev", "test")


def read(path: Path, kind: type[Example] = Example) -> list[Example]:
    """The examples in a file with one JSON object a line.

    Raises ValueError, with file and line, for a line that is none or lacks a field of an example,
    or has one too many or one of another type; also for a file without examples.
    """
    found = []
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        try:
            found += [built(kind, json.loads(line))] if line.strip() else []
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path}: no examples")
    return found


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, without its byte order mark. Raises ValueError for another."""
    check_fetched(path)
    try:
        return path.read_bytes().decode("utf-8-sig")  # as it is: only \n ends a line
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
