"""Letter skills: what a prefix can elicit, what it can combine, and what it has to teach.

    in: d a c b
    out: a b c d

`load("letters", skill="sort")`. All skills have this one form, which no pre-training document has,
and five of them the same inputs, three to six different letters from a to y:

- `sort`, in the order of the alphabet: known. Pre-training has it with its name in front, and in
  the `series` documents without a name and in many forms.
- `reverse`, last to first: known, but always with its name in front, in one form.
- `upper`, as capitals: known in the same way.
- `descend`, from y to a: half new. No document has it, but it is `sort` followed by `reverse`.
- `permute`, each letter replaced by a fixed other one (`CIPHER`): a new mapping. What a position
  has to look at is known, as in `next` and `upper`; what to write is not.
- `double_histogram`, for each letter how often it stands in the input: new. The inputs have four to
  eight letters that repeat. A position has to look at all equal letters and count them, which no
  document asks for.

Virtual keys and values cannot change how attention is divided among the real tokens; Petrov, Torr
and Bibi (2024, arXiv:2310.19698, section 5) show with sorting, sums and the double histogram that
a prefix elicits and combines what pre-training has taught, and fails at a task that needs a new
pattern of attention.

No two examples of a skill are made of the same letters, so neither an input in another order nor
its target is in two splits.
"""

from __future__ import annotations

from peftlab._data import data_path
from peftlab.tasks import SPLITS, Example, Task, read, share

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
CIPHER = dict(zip(ALPHABET, "qwertyuiopasdfghjklzxcvbnm", strict=True))  # rows of a keyboard
SKILLS = {
    "sort": sorted,
    "reverse": lambda letters: letters[::-1],
    "upper": lambda letters: [letter.upper() for letter in letters],
    "descend": lambda letters: sorted(letters, reverse=True),
    "permute": lambda letters: [CIPHER[letter] for letter in letters],
    "double_histogram": lambda letters: [str(letters.count(letter)) for letter in letters],
}


def example(skill: str, letters: list[str]) -> Example:
    answer = SKILLS[skill](letters)
    return Example(f"in: {' '.join(letters)}\nout:", " " + " ".join(answer))


class Letters(Task):
    """One skill; `skill` says which."""

    name = "letters"
    title = "Letter skills"
    main = "exact"
    max_new_tokens = 10
    skill = ""

    @classmethod
    def load(cls, skill: str = "sort") -> Letters:
        """The task of one skill, with its examples from `data/tasks/letters/`."""
        if skill not in SKILLS:
            raise ValueError(f"no skill {skill!r}; there are {', '.join(SKILLS)}")
        folder = data_path("tasks", "letters", skill)
        task = cls(**{split: read(folder / f"{split}.jsonl") for split in SPLITS})
        task.skill, task.title = skill, f"{cls.title}: {skill}"
        return task

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """`exact`: the share of right answers; `letters`: the share of letters (or counts) that
        are right and in their places, where one too many is as wrong as one missing."""
        exact, places = [], []
        for example, output in zip(examples, outputs, strict=True):
            wanted, given = example.target.split(), output.split()
            exact.append(example.target == output)
            longest = max(len(wanted), len(given))
            places += [wanted[i : i + 1] == given[i : i + 1] for i in range(longest)]
        return {"exact": share(exact), "letters": share(places)}


TASK = Letters
