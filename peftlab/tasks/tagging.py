"""A tag for every word: `entities`, who and what plays which part, and `speech`, parts of speech.

    Ada  Abbott lives in Harwick .        Everybody saw her  paint the door .
    B-SU I-SU   O     O  B-HOME  O        PRON      VERB PRON VERB DET NOUN PUNCT

(SU stands for SUBJECT.) The prompt of an example is the text, its target the tags with one space
between them. The words are what `WORD` finds: letters and digits, the ending 's, or a run of other
signs. Both tasks go on encoders, with a head that gives every token a tag; the first token of a
word stands for it.

The word itself does not tell the tag, in either task. Entities are parts that something plays: a
person is the SUBJECT of the text, the FRIEND, the OWNER of a shop or the BUYER there; a town is the
HOME of a person, the SITE of a shop or, in the weather, nothing; an animal is a PET or passes by; a
thing is what the subject LIKES, or GOODS of a shop, or lies about. In the parts of speech, 'paint'
is a noun or a verb, 'her' a pronoun or a determiner, and so on. `baseline` is the score of giving
each word its most frequent tag.

No full name is in two splits: the people of the test are new, their first and last names are not.
The gold comes from the grammar that wrote the text, `peftlab.experiments.tagged`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, ClassVar

from peftlab.methods import heads
from peftlab.tasks import IGNORED, Example, Task, share
from peftlab.tasks.offsets import check_kind, encode

if TYPE_CHECKING:
    import torch

    from peftlab.bases import LanguageModel

WORD = re.compile(r"'s\b|\w+|[^\w\s]+")
NAMED = "SUBJECT FRIEND OWNER BUYER SHOP".split()  # those may have several words, others have one
ENTITIES = [*NAMED, *"HOME SITE REGION JOB PET LIKES GOODS".split()]
PARTS = "NOUN PROPN VERB AUX ADJ ADV PRON DET PREP CONJ NUM PART PUNCT".split()


class Tagging(Task):
    """What the two tasks share."""

    labels: ClassVar[tuple[str, ...]]
    head: ClassVar[heads.Tagging]
    word: ClassVar[re.Pattern] = WORD
    max_new_tokens = 0

    def batch(
        self,
        examples: list[Example],
        tokenizer,
        device="cpu",
        context: int | None = None,
        kind: str = "encoder",
    ) -> dict[str, torch.Tensor]:
        """Ids, mask and labels (batch, seq): a class at the first token of each word, else −100.

        Raises ValueError for another kind of model, for an example longer than `context`, and if a
        word has no token that begins in it.
        """
        import torch

        check_kind(kind, "tagging")
        encoded = encode([example.prompt for example in examples], tokenizer, context)
        labels = torch.full_like(encoded.input_ids, IGNORED)
        for row, (example, offsets) in enumerate(zip(examples, encoded.offsets, strict=True)):
            for tag, position in zip(
                example.target.split(),
                first_tokens(example.prompt, offsets, self.word),
                strict=True,
            ):
                labels[row, position] = self.labels.index(tag)
        batch = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "labels": labels,
        }
        return {key: tensor.to(device) for key, tensor in batch.items()}

    def answers(self, model: LanguageModel, examples: list[Example]) -> list[str]:
        """The most probable tag of each word."""
        batch = self.batch_for(model, examples)
        logits = model(batch["input_ids"], batch["attention_mask"])  # (batch, seq, labels)
        best, asked = logits.argmax(dim=-1), batch["labels"] != IGNORED
        return [
            " ".join(self.labels[i] for i in row[kept].tolist())
            for row, kept in zip(best, asked, strict=True)
        ]

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """`accuracy`: the share of words with the right tag. An output has a tag for each word."""
        pairs = zip(examples, outputs, strict=True)
        return {
            "accuracy": share(
                wanted == given
                for example, output in pairs
                for wanted, given in zip(example.target.split(), output.split(), strict=True)
            )
        }

    def words(self, example: Example) -> list[str]:
        """The words that the tags of this example stand for."""
        return self.word.findall(example.prompt)

    def tags_in_training(self) -> dict[str, Counter]:
        """How often each word has each tag in the training split."""
        seen = defaultdict(Counter)
        for example in self.train:
            for word, tag in zip(self.words(example), example.target.split(), strict=True):
                seen[word][tag] += 1
        return dict(seen)

    def baseline(self, examples: list[Example] | None = None) -> dict[str, float]:
        """Metrics of giving each word the tag that it has most often in training.

        A word that training lacks gets the tag that is most frequent among words seen once there.
        This is the most that word identity can tell.
        """
        examples = self.test if examples is None else examples
        seen = self.tags_in_training()
        once = Counter(tag for tags in seen.values() if tags.total() == 1 for tag in tags)
        unknown = once.most_common(1)[0][0]
        best = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
        outputs = [
            " ".join(best.get(word, unknown) for word in self.words(example))
            for example in examples
        ]
        return self.grade(examples, outputs)


class Entities(Tagging):
    name = "entities"
    title = "Who and what plays which part"
    main = "f1"
    labels = ("O", *(f"B-{entity}" for entity in ENTITIES), *(f"I-{entity}" for entity in NAMED))
    head = heads.Tagging(labels)

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """`f1` over all entities, right when first word, last word and kind are; `accuracy`."""
        right = wanted = given = 0
        for example, output in zip(examples, outputs, strict=True):
            gold, found = spans(example.target.split()), spans(output.split())
            right += len(gold & found)
            wanted += len(gold)
            given += len(found)
        f1 = 2 * right / (wanted + given) if wanted + given else 1.0
        return {"f1": f1, **super().grade(examples, outputs)}


class Speech(Tagging):
    name = "speech"
    title = "Parts of speech"
    main = "accuracy"
    labels = tuple(PARTS)
    head = heads.Tagging(labels)

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """`accuracy` over all words; `ambiguous` over those that have several tags in training."""
        tags = self.tags_in_training()
        right = [
            wanted == given
            for example, output in zip(examples, outputs, strict=True)
            for word, wanted, given in zip(
                words(example.prompt), example.target.split(), output.split(), strict=True
            )
            if len(tags.get(word, ())) > 1
        ]
        scores = super().grade(examples, outputs)
        return scores | ({"ambiguous": share(right)} if right else {})


def words(text: str) -> list[str]:
    """The words of a text, in order; every character but spaces is in one."""
    return WORD.findall(text)


def first_tokens(
    text: str, offsets: list[tuple[int, int]], pattern: re.Pattern = WORD
) -> list[int]:
    """For each word the position of the first token that begins in it.

    Raises ValueError if a word has none.
    """
    starts = {}
    for position, (start, end) in enumerate(offsets):
        if start < end:
            starts.setdefault(start, position)
    firsts = []
    for word in pattern.finditer(text):
        inside = [starts[i] for i in range(word.start(), word.end()) if i in starts]
        if not inside:
            raise ValueError(f"no token begins in the word {word.group()!r} of {text!r}")
        firsts.append(inside[0])
    return firsts


def spans(tags: list[str]) -> set[tuple[int, int, str]]:
    """(first word, last word, kind) of each entity; an I- that continues nothing begins one."""
    found, start = set(), 0
    for position, tag in enumerate(tags):
        kind = tag[2:]
        before = tags[position - 1] if position else "O"
        if tag.startswith("B-") or before[2:] != kind:
            start = position
        after = tags[position + 1] if position + 1 < len(tags) else "O"
        if kind and after != f"I-{kind}":
            found.add((start, position, kind))
    return found


TASKS = {"entities": Entities, "speech": Speech}
