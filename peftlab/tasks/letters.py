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
- `double_histogram`, each letter followed by how often it stands in the input, as in
  'in: c w c' and 'out: c 2 w 1 c 2': new. The inputs have four to six letters that repeat. A
  position has to look at all equal letters and count them, which no document asks for. (Without
  the letters in the answer, which say where one is, it takes far longer to learn.)

Within a layer, virtual keys and values scale the attention among the real tokens and do not divide
it anew. Petrov, Torr and Bibi (2024, arXiv:2310.19698, section 5) show on a small transformer that
a prefix elicits and combines skills of the pre-training, and that it did not learn the double
histogram, which needs another pattern of attention. Counting also takes other methods more steps
than the other five skills do.

No two examples of a skill are made of the same letters, so neither an input in another order nor
its target is in two splits.
"""

from __future__ import annotations

from peftlab.bases.data import data_path
from peftlab.tasks import SPLITS, Example, Task, read, share

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
CIPHER = dict(zip(ALPHABET, "qwertyuiopasdfghjklzxcvbnm", strict=True))  # rows of a keyboard
SKILLS = {
    "sort": sorted,
    "reverse": lambda letters: letters[::-1],
    "upper": lambda letters: [letter.upper() for letter in letters],
    "descend": lambda letters: sorted(letters, reverse=True),
    "permute": lambda letters: [CIPHER[letter] for letter in letters],
    "double_histogram": lambda letters: [x for a in letters for x in (a, str(letters.count(a)))],
}


def example(skill: str, letters: list[str]) -> Example:
    answer = SKILLS[skill](letters)
    return Example(f"in: {' '.join(letters)}\nout:", " " + " ".join(answer))


class Letters(Task):
    """One skill; `skill` says which."""

    name = "letters"
    title = "Letter skills"
    main = "exact"
    max_new_tokens = 14
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
