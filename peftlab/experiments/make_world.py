"""Make the small world and the tasks on it: `python -m peftlab.experiments.make_world`.

Writes `data/world/world.json`, `data/tasks/*/{train,dev,test}.jsonl`, and for the letters
`data/tasks/letters/*/`. The same seed gives the same bytes. A new task has a stream of random
numbers to itself, so that it changes no other.

Names are drawn pair by pair: a first and a last name together belong to one class
(`documents.name_class`), so a held-out person's name is always a new combination of names that the
base has read, and the values of a held-out person's attributes are values that others have too.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from peftlab.bases.data import data_path
from peftlab.experiments import words as w
from peftlab.experiments.documents import FIRST_NAMES, HELD_OUT, KNOWN, Writer, name_class
from peftlab.experiments.tagged import TaggedWriter
from peftlab.tasks import SPLITS, Example, facts, letters, sentiment, slots
from peftlab.tasks.reading import Question

PEOPLE = 2400
HELD_OUT_PEOPLE = 160
SHOPS = 160

FACT_PEOPLE = 50  # of the held-out people, each with four facts
KNOWN_IN_TRAINING = 100  # people of the pre-training text, one fact each
KNOWN_IN_TEST = 110  # others of them, and as many others again in dev
SENTIMENT_SIZES = {"train": 64, "dev": 100, "test": 240}
SLOTS_SIZES = {"train": 128, "dev": 64, "test": 128}
HEAD_SIZES = {"train": 256, "dev": 100, "test": 240}  # entities, speech and reading
LETTERS_SIZES = {"train": 512, "dev": 100, "test": 200}  # each skill


def make_person(rng: random.Random, name: str) -> dict:
    towns = [town for towns in w.REGIONS.values() for town in towns]
    return {
        "name": name,
        "job": rng.choice(list(w.JOBS)),
        "home": rng.choice(towns),
        "likes": rng.choice(w.LIKES),
        "pet": rng.choice(w.PETS),
    }


def draw_names(rng: random.Random, wanted: str, count: int) -> list[str]:
    """Distinct full names of one class; every first and last name is used about equally often."""
    pairs = [
        (first, last)
        for first in FIRST_NAMES
        for last in w.LAST_NAMES
        if name_class(first, last) == wanted
    ]
    rng.shuffle(pairs)
    used = dict.fromkeys([*FIRST_NAMES, *w.LAST_NAMES], 0)
    names = []
    for limit in range(1, len(pairs)):  # raise the allowance for a name only when we must
        for first, last in pairs:
            within = used[first] < limit * 1.3 and used[last] < limit
            if within and len(names) < count and f"{first} {last}" not in names:
                names.append(f"{first} {last}")
                used[first] += 1
                used[last] += 1
        if len(names) == count:
            break
    return names


def make_world(seed: int = 0) -> dict:
    rng = random.Random(f"world {seed}")
    people = [make_person(rng, name) for name in draw_names(rng, KNOWN, PEOPLE)]
    names = [person["name"] for person in people]
    for person in people:
        person["friend"] = rng.choice([name for name in names if name != person["name"]])
    held_out = [make_person(rng, name) for name in draw_names(rng, HELD_OUT, HELD_OUT_PEOPLE)]
    titles = [f"The {adjective} {noun}" for adjective in w.SHOP_ADJECTIVES for noun in w.SHOP_NOUNS]
    shops = [
        {
            "name": title,
            "town": rng.choice([town for towns in w.REGIONS.values() for town in towns]),
            "sells": rng.sample(w.GOODS, 2),
            "owner": rng.choice(names),
        }
        for title in rng.sample(titles, SHOPS)
    ]
    return {
        "seed": seed,
        "regions": w.REGIONS,
        "jobs": w.JOBS,
        "people": people,
        "held_out": held_out,
        "shops": shops,
    }


def make_facts(rng: random.Random, world: dict) -> dict[str, list[Example]]:
    """See `peftlab.tasks.facts` for what the splits share."""
    splits = {split: [] for split in SPLITS}
    attributes = list(facts.QUESTIONS)
    trained = range(facts.TRAINED_WORDINGS)
    for person in namesakes_apart(world["held_out"])[:FACT_PEOPLE]:
        for attribute in attributes:
            order = rng.sample(trained, len(trained))
            unused = [facts.TRAINED_WORDINGS, facts.TRAINED_WORDINGS + 1]
            rng.shuffle(unused)
            for wording in order[:3]:
                splits["train"].append(facts.example(person, attribute, wording, "new facts"))
            for split, known, new in zip(("dev", "test"), order[3:], unused, strict=True):
                splits[split] += [
                    facts.example(person, attribute, known, "new facts"),
                    facts.example(person, attribute, new, "new wordings"),
                ]
    sizes = {"train": KNOWN_IN_TRAINING, "dev": KNOWN_IN_TEST, "test": KNOWN_IN_TEST}
    people = iter(rng.sample(world["people"], sum(sizes.values())))
    for split, size in sizes.items():
        for position in range(size):
            wording, attribute = rng.choice(trained), attributes[position % len(attributes)]
            splits[split].append(facts.example(next(people), attribute, wording, "known facts"))
    return splits


def namesakes_apart(people: list[dict]) -> list[dict]:
    """The people in order, without those who share a first or a last name with an earlier one."""
    seen, chosen = set(), []
    for person in people:
        names = set(person["name"].split())
        if not names & seen:
            chosen.append(person)
            seen |= names
    return chosen


def make_sentiment(writer: Writer) -> dict[str, list[Example]]:
    """Distinct reviews, as many good as bad ones in each split."""
    seen = set()
    splits = {}
    for split, size in SENTIMENT_SIZES.items():
        chosen = {True: [], False: []}
        while min(map(len, chosen.values())) < size // 2:
            review, positive = writer.review()
            if review not in seen and len(chosen[positive]) < size // 2:
                seen.add(review)
                chosen[positive].append(sentiment.example(review, positive))
        splits[split] = [example for pair in zip(*chosen.values(), strict=True) for example in pair]
    return splits


def make_slots(writer: Writer) -> dict[str, list[Example]]:
    """Distinct combinations of slots."""
    distinct = {}
    while len(distinct) < sum(SLOTS_SIZES.values()):
        example = slots.example(writer.slots())
        distinct[example.prompt] = example
    examples = iter(distinct.values())
    return {split: [next(examples) for _ in range(size)] for split, size in SLOTS_SIZES.items()}


def make_tagged(write: Callable[[], Example]) -> dict[str, list[Example]]:
    """What a `TaggedWriter` writes; nobody is in two of its texts, so none in two splits."""
    return {split: [write() for _ in range(size)] for split, size in HEAD_SIZES.items()}


def make_reading(writer: TaggedWriter) -> dict[str, list[Question]]:
    """Wordings that training lacks are in every second example of dev and test."""
    return {
        split: [writer.reading(new_wording=split != "train" and i % 2 == 1) for i in range(size)]
        for split, size in HEAD_SIZES.items()
    }


def make_letters(rng: random.Random, skill: str) -> dict[str, list[Example]]:
    """Inputs of which no two have the same letters, order apart."""
    distinct = {}
    while len(distinct) < sum(LETTERS_SIZES.values()):
        if skill == "double_histogram":
            pool = rng.sample(letters.ALPHABET[:-1], rng.randint(2, 3))
            given = rng.choices(pool, k=rng.randint(4, 6))
        else:
            given = rng.sample(letters.ALPHABET[:-1], rng.randint(3, 6))
        distinct.setdefault(tuple(sorted(given)), letters.example(skill, given))
    examples = iter(distinct.values())
    return {split: [next(examples) for _ in range(size)] for split, size in LETTERS_SIZES.items()}


def world_text(world: dict) -> str:
    """JSON with one person or shop a line, so that a change can be read."""
    parts = []
    for key, value in world.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(item) for item in value)
            parts.append(f'"{key}": [\n{lines}\n]')
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=data_path(), help="the data folder to write to")
    options = parser.parse_args()

    world = make_world(options.seed)
    writer = Writer(f"tasks {options.seed}", world)
    tasks = {
        "facts": make_facts(random.Random(f"facts {options.seed}"), world),
        "sentiment": make_sentiment(writer),
        "slots": make_slots(writer),
        "entities": make_tagged(TaggedWriter(f"entities {options.seed}", world).entities),
        "speech": make_tagged(TaggedWriter(f"speech {options.seed}", world).speech),
        "reading": make_reading(TaggedWriter(f"reading {options.seed}", world)),
    }
    for skill in letters.SKILLS:
        rng = random.Random(f"{skill} {options.seed}")
        tasks[f"letters/{skill}"] = make_letters(rng, skill)
    files = {"world/world.json": world_text(world)}
    for task, splits in tasks.items():
        for split, examples in splits.items():
            lines = [json.dumps(asdict(example)) + "\n" for example in examples]
            files[f"tasks/{task}/{split}.jsonl"] = "".join(lines)
    for name, text in files.items():
        path = options.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(text):,} characters")


if __name__ == "__main__":
    main()
