"""Slots to text in a new style, with some words mapped to new ones.

    name> The Red Oak kind> inn food> soup price> cheap area> river
    Once there was a humble tavern near the water. It was The Red Oak, and everybody had soup.

The base has turned slots into plain sentences, in other forms. Two things are new: the style of the
sentence, and fourteen words (`NEW_WORDS`) that stand for kinds, prices and areas. They are reported
apart, since a method may pick up the one before the other. No combination of slots is in two
splits; every slot value is in training.
"""

from __future__ import annotations

import re

from peftlab.tasks import Example, Task, share

NEW_WORDS = {
    "inn": "tavern",
    "cafe": "parlour",
    "bar": "den",
    "bakery": "hearth",
    "diner": "hall",
    "cheap": "humble",
    "fair": "honest",
    "costly": "lordly",
    "river": "water",
    "market": "stalls",
    "station": "rails",
    "harbour": "ships",
    "park": "trees",
    "church": "tower",
}
STYLE = re.compile(
    r"Once there was an? (?P<price>\w+) (?P<kind>\w+) near the (?P<area>\w+)\. "
    r"It was (?P<name>The \w+ \w+), and everybody had (?P<food>\w+)\."
)


def example(slots: dict[str, str]) -> Example:
    """`slots` has name, kind, food, price and area."""
    prompt = " ".join(f"{key}> {value}" for key, value in slots.items()) + "\n"
    price, kind, area = (NEW_WORDS[slots[key]] for key in ("price", "kind", "area"))
    article = "an" if price == "honest" else "a"
    return Example(
        prompt,
        f"Once there was {article} {price} {kind} near the {area}. "
        f"It was {slots['name']}, and everybody had {slots['food']}.",
    )


class Slots(Task):
    name = "slots"
    title = "Slots to text in a new style"
    main = "exact"
    max_new_tokens = 48

    def grade(self, examples: list[Example], outputs: list[str]) -> dict[str, float]:
        """`style`: the new sentence with the right name and food, whatever the mapped words;
        `mapping`: the share of the three mapped words that stand in their places;
        `exact`: the whole sentence."""
        style, mapping = [], []
        for example, output in zip(examples, outputs, strict=True):
            wanted = STYLE.fullmatch(example.target)
            given = STYLE.fullmatch(output)
            slots = wanted.groupdict()
            same = {key: given is not None and given[key] == slots[key] for key in slots}
            style.append(same["name"] and same["food"])
            mapping += [same[key] for key in ("price", "kind", "area")]
        pairs = zip(examples, outputs, strict=True)
        exact = share(example.target == output for example, output in pairs)
        return {"style": share(style), "mapping": share(mapping), "exact": exact}


TASK = Slots
