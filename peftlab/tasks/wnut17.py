"""WNUT-17: entities that are new and rare, in posts and comments.

    Tokyo      is going to see     The      Great         Wall
    B-location O  O     O  O   B-creative-work I-creative-work I-creative-work

Derczynski, Nichols, van Erp and Limsopatham (2017). Six kinds of entities, a tag for every word, F1
over whole entities; the kinds of train are spread otherwise than those of the test, and hardly an
entity is in both. The words are those of the data set, with one space between them.

What is read otherwise than it is written: where the test has two tags for a word, the first counts;
a word of which a tokenizer would see nothing, such as a lone variation selector, is read as '*'.
`train`, `dev` and `test` are how many sentences to take, drawn by `seed`; None takes all.
"""

from __future__ import annotations

import re
import unicodedata
from typing import ClassVar

from peftlab.methods import heads
from peftlab.tasks import Example
from peftlab.tasks.public import Source, lines, rows, some
from peftlab.tasks.tagging import Entities

KINDS = ("corporation", "creative-work", "group", "location", "person", "product")
LABELS = ("O", *(f"{part}-{kind}" for kind in KINDS for part in "BI"))  # in the hub's order


def parse(text: str) -> list[dict]:
    """Sentences, with white space between two of them; word, tab, tag on a line."""
    sentences, words = [], []
    for number, pieces in enumerate([*lines(text, "\t"), []], start=1):
        if pieces:
            if (tag := pieces[1].split(",")[0]) not in LABELS:
                raise ValueError(
                    f"line {number}: unknown tag {tag!r}: known are {', '.join(LABELS)}"
                )
            words.append(pieces)
        elif words:
            sentences.append({"tokens": [w for w, _ in words], "tags": [t for _, t in words]})
            words = []
    return sentences


def convert(row: dict) -> dict:
    return {"tokens": row["tokens"], "tags": [LABELS[tag] for tag in row["ner_tags"]]}


SOURCE = Source(
    "wnut17",
    "leondz/wnut_17",
    {"train": "train.conll", "validation": "dev.conll", "test": "test.conll"},
    parse,
    convert,
    revision="refs/convert/parquet",  # the main branch is a program, which is no longer run
)


def visible(word: str) -> str:
    """The word without white space, '*' if there is nothing else to see in it."""
    word = "".join(word.split())
    return word if any(unicodedata.category(sign)[0] not in "CM" for sign in word) else "*"


def example(row: dict) -> Example:
    tags = [tag.split(",")[0] for tag in row["tags"]]
    return Example(" ".join(map(visible, row["tokens"])), " ".join(tags))


class Wnut17(Entities):
    name = "wnut17"
    title = "WNUT-17: new and rare entities"
    labels = LABELS
    head: ClassVar[heads.Tagging] = heads.Tagging(LABELS)
    word = re.compile(r"\S+")

    @classmethod
    def load(
        cls,
        train: int | None = None,
        dev: int | None = None,
        test: int | None = None,
        seed: int = 0,
    ) -> Wnut17:
        """The task with its examples."""
        found = rows(SOURCE)
        wanted = {"train": train, "dev": dev, "test": test}
        hub = {"train": "train", "dev": "validation", "test": "test"}
        return cls(
            **{
                split: [example(row) for row in some(found[hub[split]], number, seed, split)]
                for split, number in wanted.items()
            }
        )


TASK = Wnut17
