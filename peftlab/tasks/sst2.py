"""SST-2: is a sentence of a film review positive or negative?

    a gorgeous , witty , seductive movie . It was      ->  great

Socher and others (2013), in the form of GLUE. `load("sst2")` asks for a word: the sentence, 'It
was', then the more probable of ' great' and ' terrible' (the prompt of Gao, Fisch and Chen 2021,
arXiv:2012.15723, table 1). `load("sst2", answer="class")` puts a `Classification` head on an
encoder. `train`, `dev` and `test` are how many examples to take, drawn by `seed`; None takes all.

The labels of GLUE's own test split are not public, so the 872 sentences of its validation split are
the test here, as in most papers. Dev is 1,000 rows of the training split, or a tenth of a smaller
one, always the same. Training has phrases besides whole sentences, so dev has phrases of sentences
that are in train: it is easier than the test. No text is in two splits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from peftlab.methods import heads
from peftlab.tasks import Example, Task
from peftlab.tasks.offsets import check_kind, encode
from peftlab.tasks.public import Source, lines, rows, some, split_off
from peftlab.tasks.sentiment import Sentiment

if TYPE_CHECKING:
    import torch

    from peftlab.bases import LanguageModel

WORDS = {True: " great", False: " terrible"}
CLASSES = ("negative", "positive")


def parse(text: str) -> list[dict]:
    """Rows of a table with a header: label, tab, sentence."""
    found = []
    for number, pieces in enumerate(lines(text, "\t")[1:], start=2):
        if pieces:
            label, sentence = pieces
            if label not in ("0", "1"):
                raise ValueError(f"line {number} has the label {label!r}: allowed are 0 and 1")
            found.append({"sentence": sentence.strip(), "positive": label == "1"})
    return found


def convert(row: dict) -> dict:
    return {"sentence": row["sentence"].strip(), "positive": row["label"] == 1}


SOURCE = Source(
    "sst2",
    "stanfordnlp/sst2",
    {"train": "train.tsv", "validation": "dev.tsv"},
    parse,
    convert,
)


def example(row: dict) -> Example:
    return Example(f"{row['sentence']} It was", WORDS[row["positive"]])


class Sst2(Sentiment):
    name = "sst2"
    title = "SST-2: sentiment of film reviews"
    words = WORDS

    @classmethod
    def load(
        cls,
        train: int | None = None,
        dev: int | None = None,
        test: int | None = None,
        seed: int = 0,
        answer: str = "word",
    ) -> Task:
        """The task with its answer as a word or as a class."""
        if answer not in ("word", "class"):
            raise ValueError(f"answer={answer!r}: allowed is word, class")
        made = cls if answer == "word" else Sst2Class
        found = rows(SOURCE)
        seen = {row["sentence"] for row in found["validation"]}
        first = {row["sentence"]: row for row in reversed(found["train"])}  # of equal ones
        pool = [row for row in first.values() if row["sentence"] not in seen][::-1]
        kept, held = split_off(pool, min(1000, max(1, len(pool) // 10)))
        splits = {"train": (kept, train), "dev": (held, dev), "test": (found["validation"], test)}
        return made(
            **{
                split: [made.example_of(row) for row in some(values, number, seed, split)]
                for split, (values, number) in splits.items()
            }
        )

    example_of = staticmethod(example)


class Sst2Class(Sst2):
    """The sentence alone under a head with two classes; the target of an example is a class."""

    head: ClassVar[heads.Classification] = heads.Classification(CLASSES)
    max_new_tokens = 0

    @staticmethod
    def example_of(row: dict) -> Example:
        return Example(row["sentence"], CLASSES[row["positive"]])

    def batch(
        self,
        examples: list[Example],
        tokenizer,
        device="cpu",
        context: int | None = None,
        kind: str = "encoder",
    ) -> dict[str, torch.Tensor]:
        """Ids, mask and labels (batch,)."""
        import torch

        check_kind(kind, "the classes of SST-2")
        encoded = encode([example.prompt for example in examples], tokenizer, context)
        batch = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "labels": torch.tensor([CLASSES.index(example.target) for example in examples]),
        }
        return {key: tensor.to(device) for key, tensor in batch.items()}

    def answers(self, model: LanguageModel, examples: list[Example]) -> list[str]:
        """The most probable class of each sentence."""
        batch = self.batch_for(model, examples)
        logits = model(batch["input_ids"], batch["attention_mask"])  # (batch, classes)
        return [CLASSES[best] for best in logits.argmax(dim=-1).tolist()]


TASK = Sst2
