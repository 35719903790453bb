"""E2E: facts about a restaurant, then a sentence that says them.

    name: Blue Spice | type: coffee shop | area: city centre
    A coffee shop in the city centre area called Blue Spice.

Novikova, Dušek and Rieser (2017, arXiv:1706.09254). In training every reference is an example; dev
and test have one example for each set of facts, with all its references, as it is scored in the
literature. No set of facts is in two splits. A folder may have no train split: the sets of facts in
its validation file are then parted into train and dev, seven to one, always the same way.

Spaces that a tokenizer put around punctuation are taken out of facts and references.
`train`, `dev` and `test` are how many examples to take, drawn by `seed`; None takes all.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from peftlab.tasks import Example, Task, share
from peftlab.tasks.public import Source, lines, rows, some, split_off
from peftlab.tasks.reading import word_f1

KEYS = {"Type": "type", "eatType": "type", "priceRange": "price"}
KEYS |= {"customerRating": "customer rating", "familyFriendly": "family friendly"}
UNSAID = "family friendly"  # yes or no, which no text says in these words
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Described(Example):
    """An example whose target is the first of its references."""

    references: tuple[str, ...] = ()


def joined(text: str) -> str:
    """The text without spaces in front of punctuation, around hyphens and behind '£'."""
    text = re.sub(r"\s+([.,;:!?)]|'(?:s|d|m|ll|re|ve)\b|n't\b)", r"\1", text.strip())
    return re.sub(r"(?<=\w)\s+-\s+(?=\w)", "-", re.sub(r"([(£])\s+", r"\1", text))


def row(slots: dict[str, str], references: list[str]) -> dict:
    return {
        "slots": {KEYS.get(key, key): joined(value) for key, value in slots.items()},
        "references": [joined(text) for text in references],
    }


def parse(text: str) -> list[dict]:
    """Rows of 'key : value | key : value||reference'."""
    found = []
    for number, pieces in enumerate(lines(text, "||"), start=1):
        if pieces:
            slots = [slot.split(" : ", 1) for slot in pieces[0].split(" | ")]
            if any(len(slot) != 2 for slot in slots):
                raise ValueError(f"line {number} has a slot without ' : ': {pieces[0][:60]!r}")
            found.append(row(dict(slots), [pieces[1]]))
    return found


def convert(given: dict) -> dict:
    slots = re.findall(r"(\w[\w ]*)\[([^\]]*)\]", given["meaning_representation"])
    return row(dict(slots), list(given.get("references") or [given["target"]]))


SOURCE = Source(
    "e2e",
    "GEM/e2e_nlg",
    {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"},
    parse,
    convert,
    revision="refs/convert/parquet",  # the main branch is a program, which is no longer run
    optional=("train",),
)


def prompt(slots: dict[str, str]) -> str:
    return " | ".join(f"{key}: {value}" for key, value in slots.items()) + "\n"


def slots_of(prompt: str) -> dict[str, str]:
    """The inverse of `prompt`."""
    return dict(slot.split(": ", 1) for slot in prompt.strip().split(" | "))


def grouped(found: list[dict]) -> dict[str, list[str]]:
    """All references of each set of facts."""
    groups: dict[str, list[str]] = {}
    for given in found:
        groups.setdefault(prompt(given["slots"]), []).extend(given["references"])
    return {facts: list(dict.fromkeys(texts)) for facts, texts in groups.items()}


def all_of(facts: str, texts: list[str]) -> Described:
    return Described(facts, texts[0], references=tuple(texts))


class E2E(Task):
    name = "e2e"
    title = "E2E: facts about a restaurant in a sentence"
    main = "bleu"
    max_new_tokens = 96  # the longest reference has 88 of SmolLM2
    example = Described

    @classmethod
    def load(
        cls,
        train: int | None = None,
        dev: int | None = None,
        test: int | None = None,
        seed: int = 0,
    ) -> E2E:
        """The task with its examples."""
        found = {split: grouped(given) for split, given in rows(SOURCE).items()}
        if "train" not in found:
            pairs = list(found["validation"].items())
            parts = split_off(pairs, max(1, len(pairs) // 8))
            found["train"], found["validation"] = map(dict, parts)
        unseen = found["validation"].keys() | found["test"].keys()
        trained = [
            Described(facts, text)
            for facts, texts in found["train"].items()
            if facts not in unseen
            for text in texts
        ]
        tested = [all_of(facts, texts) for facts, texts in found["test"].items()]
        held = [
            all_of(facts, texts)
            for facts, texts in found["validation"].items()
            if facts not in found["test"]
        ]
        return cls(
            train=some(trained, train, seed, "train"),
            dev=some(held, dev, seed, "dev"),
            test=some(tested, test, seed, "test"),
        )

    def grade(self, examples: list[Described], outputs: list[str]) -> dict[str, float]:
        """`bleu` over all outputs; `f1`, the overlap in words with the nearest reference;
        `coverage`, the share of facts whose value stands in the output, 'family friendly' apart.

        All three on the lower-cased words of `WORD`, so they compare with each other and with no
        published number.
        """
        said = [words(output) for output in outputs]
        wanted = [[words(text) for text in e.references or (e.target,)] for e in examples]
        overlap = [
            max(word_f1(" ".join(reference), " ".join(given)) for reference in references)
            for given, references in zip(said, wanted, strict=True)
        ]
        covered = [
            found
            for example, output in zip(examples, outputs, strict=True)
            for found in coverage(slots_of(example.prompt), output)
        ]
        return {"bleu": bleu(said, wanted), "f1": share(overlap), "coverage": share(covered)}


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def coverage(slots: dict[str, str], text: str) -> list[bool]:
    """For each fact that a text would say in the same words, whether this one does."""
    said = f" {' '.join(words(text))} "
    return [f" {' '.join(words(value))} " in said for key, value in slots.items() if key != UNSAID]


def bleu(outputs: list[list[str]], references: list[list[list[str]]], longest: int = 4) -> float:
    r"""$\min(1, e^{1 - r/c}) \cdot (\prod_{n=1}^{4} p_n)^{1/4}$ over all outputs together.

    p_n is the share of the outputs' n-grams that a reference has too, each counted at most as often
    as in the reference that has it most; c the words of all outputs, r those of the references
    nearest in length, the shorter of two. Papineni and others (2002), sections 2.1 to 2.3.
    """
    given = nearest = 0
    right, total = [0] * longest, [0] * longest
    for output, texts in zip(outputs, references, strict=True):
        given += len(output)
        nearest += min((abs(len(text) - len(output)), len(text)) for text in texts)[1]
        for n in range(1, longest + 1):
            limit = Counter()
            for text in texts:
                limit |= grams(text, n)
            mine = grams(output, n)
            right[n - 1] += (mine & limit).total()
            total[n - 1] += mine.total()
    if not all(right):
        return 0.0
    precision = sum(math.log(r / t) for r, t in zip(right, total, strict=True)) / longest
    return math.exp(min(0.0, 1 - nearest / given) + precision)


def grams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


TASK = E2E
