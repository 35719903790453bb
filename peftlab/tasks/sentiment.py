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

    def score(
        self,
        model: LanguageModel,
        examples: list[Example] | None = None,
        batch_size: int = 64,
    ) -> dict[str, float]:
        """The share of reviews whose own label word is more probable than the other one."""
        import torch

        examples = self.test if examples is None else examples
        labels = list(self.words.values())
        tokens = [
            model.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in labels
        ]
        right = []
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            batch = self.batch_for(model, chunk)
            with torch.no_grad():
                logits, wanted = model.aligned(batch)  # (batch, n, vocab), (batch, n)
            first = (wanted >= 0).int().argmax(dim=1)  # where the label word is predicted
            rows = torch.arange(len(chunk), device=logits.device)
            best = logits[rows, first][:, tokens].argmax(dim=1)  # (batch,)
            right += [labels[i] == e.target for i, e in zip(best.tolist(), chunk, strict=True)]
        return {"accuracy": share(right)}


TASK = Sentiment
