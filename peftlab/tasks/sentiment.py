"""Sentiment by verbalizer: a review, then the word that sums it up, ' great' or ' awful'.

The base has read such reviews with many pairs of labels, never in this prompt and never with this
pair as labels. The two label words are single tokens. The answer is the one with the higher
log-probability after the prompt; nothing is generated.

No review is in two splits, but all are built from the same clauses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftlab.tasks import Example, Task, share

if TYPE_CHECKING:
    from peftlab.bases import LanguageModel

LABELS = {True: " great", False: " awful"}


def example(review: str, positive: bool) -> Example:
    return Example(f"{review}\nIn the end:", LABELS[positive])


class Sentiment(Task):
    name = "sentiment"
    title = "Sentiment by verbalizer"
    main = "accuracy"
    max_new_tokens = 1
    words: ClassVar[dict[bool, str]] = LABELS

    def answers(self, model: LanguageModel, examples: list[Example]) -> list[str]:
        """The label word that is more probable than the other one."""
        import torch

        labels = list(self.words.values())
        tokens = model.tokenizer(labels, add_special_tokens=False)["input_ids"]
        logits, wanted = model.aligned(self.batch_for(model, examples))  # (batch, n, vocab)
        first = (wanted >= 0).int().argmax(dim=1)  # where the label word is predicted
        rows = torch.arange(len(examples), device=logits.device)
        best = logits[rows, first][:, [ids[0] for ids in tokens]].argmax(dim=1)  # (batch,)
        return [labels[i] for i in best.tolist()]

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """The share that is answered with its own label."""
        pairs = zip(examples, outputs, strict=True)
        return {"accuracy": share(example.target == output for example, output in pairs)}


TASK = Sentiment
