"""Pharmacy: 200 real medicines and answers on a card. Teaching material, not medical advice.

    Which biguanide is used for type 2 diabetes?
    Drug: metformin
    Class: biguanide
    Use: type 2 diabetes
    Effects: diarrhoea, nausea
    Caution: kidney failure

The medicines are in `data/tasks/pharmacy/medicines.jsonl`, written by hand, each with a reference
in which its facts can be checked. Of many uses, side effects and cautions (an illness, a treatment
or a risk to think of) a card has one, two and one, in words that a small model can learn. Nobody
should treat anybody by it.

There are three sorts of question, with twelve wordings each:

- "class" tells the class and the use, and asks which medicine it is.
- "effects" tells the use and two side effects, and asks the same.
- "name" tells the medicine, and asks for its card.

Of the 200 medicines only one has this class and this use, and only one this use and these two side
effects. Outside this list there may be others: it is the list that makes one answer right.

Eight wordings of a sort are used in training, each medicine's questions in four of them. Two are
dev's and two the test's. Twenty medicines are in the test alone. So it has four groups:

- `KNOWN`, a trained medicine in a wording that trained others, but not this medicine;
- `NEW_WORDING`, a trained medicine in a wording that no training example has: remembering is the
  point, the facts were trained and the question was not;
- `NEW_MEDICINE` and `NEW_BOTH`, a medicine that training never mentions, in such wordings. Nothing
  taught says its name, so a right answer is what the base had read about it before, brought into
  the form of the card. A model that learned the list and nothing else gives a name of the list:
  a low score here is no fault of the method, and a high one no merit of what it was taught.

Dev has the second group only. The task is meant for a real language model; the small bases have
never read the words of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from peftlab.bases.data import data_path
from peftlab.tasks import SPLITS, Example, Task, read, share

KNOWN = "trained medicine, trained wording"
NEW_WORDING = "trained medicine, new wording"
NEW_MEDICINE = "new medicine, trained wording"
NEW_BOTH = "new medicine, new wording"
REPORTED = {"": None, "_new_wordings": (NEW_WORDING,), "_new_medicines": (NEW_MEDICINE, NEW_BOTH)}

FIELDS = ("Drug", "Class", "Use", "Effects", "Caution")
TELLS = {"class": ("Class", "Use"), "effects": ("Use", "Effects"), "name": ("Drug",)}
QUESTIONS = {
    "class": (
        "Which {c} is used for {u}?",
        "Name the {c} that is given for {u}.",
        "For {u}, which {c} is there?",
        "What is the name of the {c} for {u}?",
        "A doctor asks for the {c} used for {u}. Which medicine?",
        "Class: {c}. Use: {u}. Which medicine?",
        "Which medicine for {u} has the class {c}?",
        "Tell me the {c} for {u}.",
        "What {c} could a pharmacist hand out for {u}?",
        "The shelf says {c}, for {u}. What stands there?",
        "Which drug belongs to the class {c} and is used for {u}?",
        "I am looking for the {c} against {u}.",
    ),
    "effects": (
        "Which medicine for {u} can cause {a} and {b}?",
        "Name the medicine for {u} whose side effects are {a} and {b}.",
        "For {u}, which medicine may bring {a} and {b}?",
        "What is used for {u} and may cause {a} and {b}?",
        "A medicine for {u} often causes {a} and {b}. Which one?",
        "Use: {u}. Side effects: {a}, {b}. Which medicine?",
        "Which drug for {u} is known for {a} and {b}?",
        "Taken for {u}, it can bring {a} and {b}. What is it?",
        "A patient treated for {u} has {a} and {b}. Which medicine was it?",
        "Tell me the drug for {u} with {a} and {b} as side effects.",
        "What medicine, given for {u}, has the side effects {a} and {b}?",
        "Side effects such as {a} and {b} come with which drug for {u}?",
    ),
    "name": (
        "What is {n}?",
        "Tell me about {n}.",
        "Describe the medicine {n}.",
        "What should I know about {n}?",
        "Write the card of {n}.",
        "What is {n} used for, and what are its side effects?",
        "Which class does {n} belong to, and what is it for?",
        "Summarise {n} for a student.",
        "Give me the facts about {n}.",
        "I was given {n}. What does it do?",
        "Please explain the medicine {n}.",
        "Look up {n} for me.",
    ),
}
TRAINED_WORDINGS = 8  # the wordings after these are never used in training
DEV_WORDINGS = (8, 9)
TEST_WORDINGS = (10, 11)

FEWEST = 20  # medicines that a subset may have
VALUE = r"[A-Za-z0-9][A-Za-z0-9 -]*"
FORMAT = re.compile(
    "\n".join(f"{field}: {VALUE}" for field in FIELDS).replace(
        f"Effects: {VALUE}", f"Effects: {VALUE}, {VALUE}"
    )
)


@dataclass(frozen=True)
class Question(Example):
    """An example whose prompt tells some fields of the card: those of its sort, see `TELLS`."""

    sort: str = ""

    @property
    def drug(self) -> str:
        return fields_of(self.target)["Drug"]


def medicines() -> list[dict]:
    """The hand-written list: drug, drug_class, use, effects, caution and reference of each."""
    lines = data_path("tasks", "pharmacy", "medicines.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


def card(medicine: dict) -> str:
    """The answer to every question about a medicine."""
    values = (
        medicine["drug"],
        medicine["drug_class"],
        medicine["use"],
        ", ".join(medicine["effects"]),
        medicine["caution"],
    )
    return "\n".join(f"{field}: {value}" for field, value in zip(FIELDS, values, strict=True))


def example(medicine: dict, sort: str, wording: int, group: str) -> Question:
    a, b = medicine["effects"]
    question = QUESTIONS[sort][wording].format(
        n=medicine["drug"], c=medicine["drug_class"], u=medicine["use"], a=a, b=b
    )
    return Question(f"{question}\n", card(medicine), group, sort)


def fields_of(output: str) -> dict[str, str]:
    """What stands behind the first 'Drug: ', 'Class: ' and so on that begins a line."""
    found = {}
    for line in output.splitlines():
        field, colon, value = line.partition(": ")
        if colon and field in FIELDS:
            found.setdefault(field, value)
    return found


def names_the_drug(output: str, drug: str) -> bool:
    """Whether the line 'Drug: ' has this name; without such a line, whether the text has it.

    So an answer in free text counts, with whatever capitals: a model that was never trained is not
    marked down for a form that it could not know.
    """
    line = fields_of(output).get("Drug")
    if line is not None:
        return line.strip().lower() == drug.lower()
    return re.search(rf"\b{re.escape(drug)}\b", output, re.IGNORECASE) is not None


class Pharmacy(Task):
    """Which medicine is it, and what is on its card? Teaching material, not medical advice."""

    name = "pharmacy"
    title = "Pharmacy: the card of a medicine"
    main = "drug_name_new_wordings"
    max_new_tokens = 48  # the longest card has 41 tokens of SmolLM2, its end included
    example = Question

    @classmethod
    def load(cls, medicines=None) -> Pharmacy:
        """The task from `data/tasks/pharmacy/`, or a small one with the first few medicines.

        With a number of `medicines`, train and dev are about so many of the trained ones, in the
        drawn order of the training file, and the test asks about them in new wordings only, so
        that a CPU gets through it. Raises ValueError for a number that it cannot be.
        """
        folder = data_path("tasks", cls.name)
        splits = {split: read(folder / f"{split}.jsonl", Question) for split in SPLITS}
        if medicines is None:
            return cls(**splits)
        trained = list(dict.fromkeys(question.drug for question in splits["train"]))
        whole = isinstance(medicines, int) and not isinstance(medicines, bool)
        if not whole or not FEWEST <= medicines <= len(trained):
            raise ValueError(
                f"medicines={medicines!r}: a whole number from {FEWEST} to {len(trained)}, "
                f"or None for all {len(trained)} and the new ones"
            )
        chosen = set(trained[:medicines])
        few = {
            split: [
                question
                for question in questions
                if question.drug in chosen and (split != "test" or question.group == NEW_WORDING)
            ]
            for split, questions in splits.items()
        }
        task = cls(**few)
        task.title = f"{cls.title} ({medicines} medicines)"
        return task

    def grade(self, examples: list[Question], outputs: list[str]) -> dict[str, float]:
        """Three metrics, of all questions and of two parts of them, where there are any.

        `valid_format`: the output is a card and nothing else, whatever stands on it. `drug_name`:
        it names the right medicine, of the questions that do not tell the name. `fields`: the share
        of the fields that are right, letter for letter, of those that the question does not tell.
        With `_new_wordings` of the group `NEW_WORDING`, with `_new_medicines` of medicines that
        were not trained.
        """
        scores = {}
        for part, groups in REPORTED.items():
            pairs = [
                (question, output)
                for question, output in zip(examples, outputs, strict=True)
                if groups is None or question.group in groups
            ]
            values = {
                "valid_format": [FORMAT.fullmatch(output) is not None for _, output in pairs],
                "drug_name": [
                    names_the_drug(output, question.drug)
                    for question, output in pairs
                    if "Drug" not in TELLS[question.sort]
                ],
                "fields": [right for pair in pairs for right in right_fields(*pair)],
            }
            scores |= {f"{metric}{part}": share(v) for metric, v in values.items() if v}
        return scores


def right_fields(question: Question, output: str) -> list[bool]:
    """Of every field that the question does not tell, whether it is right."""
    wanted, given = fields_of(question.target), fields_of(output)
    return [given.get(f) == wanted[f] for f in FIELDS if f not in TELLS[question.sort]]


TASK = Pharmacy
