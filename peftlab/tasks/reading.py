"""Reading: a question on a short text, answered by a span of that text.

    Ada Abbott has a small house in Harwick. She keeps an owl. ...
    Ben Baxter is a cook. ...
    In which town does Ada Abbott live?          -> Harwick

The prompt is the lives of two or three people, one a line, and the question in the last line; the
target is the answer as it stands in the text, and `start` the character at which it begins. The
people are invented for one example each, so nothing can be remembered; people of one example have
different first and last names and different answers. The task goes on encoders, with a head that
gives every token a score as the start and one as the end of the answer.

The questions have the wordings of `facts`: seven for each attribute, of which five are used in
training. Half of the questions in dev and test have one of the other two ("new wordings").
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peftlab.methods import heads
from peftlab.tasks import Example, Task, share
from peftlab.tasks.offsets import check_kind, encode

if TYPE_CHECKING:
    import torch

    from peftlab.bases import LanguageModel

LONGEST = 8  # tokens after the first one of an answer
TRAINED, NEW = "trained wordings", "new wordings"


@dataclass(frozen=True)
class Question(Example):
    """An example whose target is a part of its prompt: `prompt[start:].startswith(target)`."""

    start: int = 0

    @property
    def context(self) -> str:
        """The prompt without its last line, the question."""
        return self.prompt.rpartition("\n")[0]


class Reading(Task):
    name = "reading"
    title = "Reading: answers are spans of the text"
    main = "exact"
    example = Question
    head: ClassVar[heads.Spans] = heads.Spans()
    max_new_tokens = 0

    def batch(
        self,
        examples: list[Question],
        tokenizer,
        device="cpu",
        context: int | None = None,
        kind: str = "encoder",
    ) -> dict[str, torch.Tensor]:
        """Ids, mask and labels (batch, 2): the first and the last token of the answer.

        Raises ValueError for another kind of model and for an example longer than `context`.
        """
        import torch

        check_kind(kind, "reading")
        encoded = encode([example.prompt for example in examples], tokenizer, context)
        labels = [
            answer_tokens(example, offsets)
            for example, offsets in zip(examples, encoded.offsets, strict=True)
        ]
        batch = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "labels": torch.tensor(labels),
        }
        return {key: tensor.to(device) for key, tensor in batch.items()}

    def answers(self, model: LanguageModel, examples: list[Question]) -> list[str]:
        """The best span of each text."""
        texts = [example.prompt for example in examples]
        encoded = encode(texts, model.tokenizer, model.context)
        ids, mask = encoded.input_ids.to(model.device), encoded.attention_mask.to(model.device)
        logits = model(ids, mask).cpu()  # (batch, seq, 2)
        return [best_span(*of) for of in zip(examples, encoded.offsets, logits, strict=True)]

    def grade(self, examples: list[Question], outputs: list[str]) -> dict[str, float]:
        """`exact`: the share of answers that are the target; `f1`: the mean overlap in words;
        `new_wordings`: exact on the questions whose wording is not in training."""
        pairs = list(zip(examples, outputs, strict=True))
        exact = [example.target == output for example, output in pairs]
        overlap = [word_f1(example.target, output) for example, output in pairs]
        scores = {"exact": share(exact), "f1": share(overlap)}
        new = [right for right, (e, _) in zip(exact, pairs, strict=True) if e.group == NEW]
        return scores | ({"new_wordings": share(new)} if new else {})


def answer_tokens(example: Question, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """The first and the last token that cover a character of the answer."""
    end = example.start + len(example.target)
    inside = [
        position
        for position, (first, last) in enumerate(offsets)
        if first < last and first < end and last > example.start
    ]
    if not inside:
        raise ValueError(f"no token covers the answer {example.target!r} of {example.prompt!r}")
    return inside[0], inside[-1]


def best_span(example: Question, offsets: list[tuple[int, int]], logits: torch.Tensor) -> str:
    """The text of the span with the highest sum of its start's and its end's logits, (seq, 2).

    The span lies inside the context, and its end comes at most `LONGEST` tokens after its start.
    """
    import torch

    limit = len(example.context)
    inside = [i for i, (first, last) in enumerate(offsets) if first < last <= limit]
    first, count = inside[0], inside[-1] - inside[0] + 1
    starts, ends = logits[first : first + count].float().unbind(dim=-1)  # each (count,)
    allowed = torch.ones(count, count).triu().tril(LONGEST).bool()
    sums = (starts[:, None] + ends[None, :]).masked_fill(~allowed, -torch.inf)  # (count, count)
    start, end = divmod(int(sums.argmax()), count)
    return example.prompt[offsets[first + start][0] : offsets[first + end][1]]


def word_f1(target: str, output: str) -> float:
    """The harmonic mean of precision and recall of the words, repeated words counted."""
    wanted, given = target.split(), output.split()
    shared = (Counter(wanted) & Counter(given)).total()
    return 2 * shared / (len(wanted) + len(given))


TASK = Reading
