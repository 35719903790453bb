"""Texts with gold tags: the grammar of the documents, with marks on the words that it fills in.

`TaggedWriter` writes the sentences of `documents.Writer` and some of its own, but the phrases that
it fills into them carry invisible marks behind every word: private-use characters that say the part
of speech and, for entities, the part that the phrase plays. Since a mark comes after the word,
articles and capitals turn out as they do without. `Tagged.of` takes the marks off again and gives
the plain text with its gold tags, exact by construction.

A word without a mark belongs to the wording of a sentence. `LEXICON` knows one tag for each, and
`BEFORE` the few in the documents' sentences that depend on the next word. In the sentences written
here an ambiguous word says what it is: 'saw her/PRON paint the door'. A word that nothing accounts
for is an error.
"""

import re
from dataclasses import dataclass

from peftlab.experiments import words as w
from peftlab.experiments.documents import ATTRIBUTES, Writer, a, sentence
from peftlab.tasks import Example
from peftlab.tasks.facts import QUESTIONS, TRAINED_WORDINGS
from peftlab.tasks.reading import NEW, TRAINED, Question
from peftlab.tasks.tagging import ENTITIES, PARTS

# one character for each part of speech; two for each entity, for its first and its further words
PART = {part: chr(0xE000 + i) for i, part in enumerate(PARTS)}
BEGIN = {entity: chr(0xE100 + i) for i, entity in enumerate(ENTITIES)}
INSIDE = {entity: chr(0xE200 + i) for i, entity in enumerate(ENTITIES)}
MEANING = {
    **{character: part for part, character in PART.items()},
    **{character: f"B-{entity}" for entity, character in BEGIN.items()},
    **{character: f"I-{entity}" for entity, character in INSIDE.items()},
}
MARK = "[\ue000-\uf8ff]"
PIECE = re.compile(rf"('s(?!\w)|\w+|[^\w\s\ue000-\uf8ff]+)({MARK}*)")  # a word and its marks
INLINE = re.compile(r"(\w+)/([A-Z]+)")

LEXICON = {
    word: part
    for part, line in {
        "NOUN": "school trade years living house home work road day morning thing tool town time "
        "friend owner pet shop coins people tree",
        "VERB": "works earns became goes moved knows likes loves makes keeps shares feeds visits "
        "went find needs lives sells buy belongs called opens bought looked paid has come saw seen "
        "wants begins lay see ran live",
        "PROPN": "sundays",
        "AUX": "is was were are can will been",
        "ADJ": "small happy important best favourite fond many much last",
        "ADV": "never often ago also later too most long there",
        "PRON": "she he it they you nothing somebody everybody nobody all",
        "DET": "the a an every some no",
        "PREP": "as by for after at without in of on with from to under into over near",
        "CONJ": "and but",
        "PART": "'s '",
    }.items()
    for word in line.split()
}
# (a word of the documents' sentences, the next one): what it is there
BEFORE = {
    ("as", "happy"): "ADV",
    ("that", "is"): "PRON",
    ("has", "been"): "AUX",
    ("to", "live"): "PART",
}

# Around a shop, mostly as in `Writer.shop`. One sentence of each line.
SHOP = (
    (
        "{shop} is a shop in {site}.",
        "In {site} there/PRON is a shop called {shop}.",
        "{shop} opens every {day} in {site}.",
        "{shop} moved to {site} long ago.",
    ),
    (
        "It sells {one} and {two}.",
        "You can buy {one} there, and also {two}.",
        "People come from all/ADV over {region} to/PART buy {one}.",
    ),
    ("The owner is {owner}.", "It belongs to {owner}.", "{owner} is the owner."),
    (
        "Last {month} {buyer} bought some {one} for {price} coins.",
        "{buyer} looked at the {one}, but {price} coins was too much.",
        "{buyer} paid {price} coins for {two} and went home/ADV happy.",
    ),
)
# Of the favourite things, those that a shop may sell.
SOLD = """
soup cheese coffee puzzles honey chocolate cards tea curry pasta roses comics mushrooms pancakes
olives peaches lemonade sushi
""".split()
# Towns, animals, trades and wares that play no part.
ASIDE = (
    "On {day} {town} will see {sky} and later {sky2}.",
    "{day} in {town} begins with {sky}.",
    "It was {day}, and {a_state} {animal} ran into the {place}.",
    "Somebody saw {an_animal} near the {place}.",
    "Everybody knows the {job} from {town}.",
    "{a_job} came/VERB by/ADV with {an_animal}.",
    "Under a tree lay some {ware}.",
    "Nobody in {town} likes {likes}.",
)
# What one does to what. Every verb here is a noun too, and so is the verb with an s.
ACTS = {
    "paint": "mirror tile crown door",
    "stamp": "book map letter",
    "hammer": "tile ring nail",
    "drill": "tile button stone",
    "film": "guide cook nurse castle",
    "judge": "cook play film dance",
    "nurse": "pilot judge goat",
    "map": "castle valley",
    "book": "guide pilot play room",
    "pilot": "boat",
    "cook": "fish",
    "play": "film drum",
    "brush": "crown net horse",
    "press": "button stamp cheese",
    "rope": "bottle net wheel",
    "button": "coat cloak",
    "bottle": "paint honey",
    "hose": "net brush garden",
    "guide": "pilot judge nurse",
    "tile": "hall tower",
    "crown": "judge cook nurse",
    "mirror": "play film moon",
    "ring": "bell",
    "net": "crow fish",
}
WHO_ACT = "cook guide judge nurse pilot".split()  # those of them that are people
AS_VERB = (
    "{S} {acts} the {thing}.",
    "Every {day} {s} {acts} {p} {thing}.",
    "{S} wants to/PART {act} the {thing}.",
    "On {day} {s} will {act} the {thing}.",
    "{other} saw {o} {act} the {thing}.",
    "They {act} {p} {thing} every {season}.",
    "The {agents} {act} the {thing}.",
    "The {agent} {acts} {p} {thing}.",
    "{P} {agents} {act} the {thing}.",
)
AS_NOUN = (
    "{P} {act} is {state}.",
    "{other} saw {p} {act} in the {place}.",
    "The {acts} of the {agent} were {state}.",
    "{S} looked at the {act} of the {agent}.",
    "{number} {acts} lay under {p} {thing}.",
    "{P} {agent} has {a_act} and the {thing}.",
    "{S} has/AUX seen {p} {acts}.",
    "That/DET {act} is {state}.",
    "That/PRON is the {act} of {p} {agent}.",
)
OTHERWISE = (
    "{S} went home/ADV {adverb}.",
    "{S} wants to/PART work/VERB in {town}.",
    "They work/VERB like/PREP {a_job}.",
    "They like/VERB to/PART walk/VERB to {town}.",
    "{P} visits/NOUN to {town} are long/ADJ.",
    "{P} needs/NOUN are small.",
    "They love/VERB {o}.",
    "{other} went for a walk/NOUN with {o}.",
    "It will rain/VERB on {day}.",
    "The rain/NOUN was {state}.",
    "The {place} is open/ADJ on {day}.",
    "They open/VERB {p} {place}.",
    "{P} love/NOUN of {likes} is new/ADJ.",
)


def mark(phrase: str, part: str, entity: str = "") -> str:
    """The phrase with marks behind every word; all its words are the same part of speech."""
    marked = []
    for word in phrase.split():
        begins = INSIDE if marked else BEGIN
        marked.append(word + PART[part] + (begins[entity] if entity else ""))
    return " ".join(marked)


def fill(wording: str, slots: dict[str, str]) -> str:
    """The wording with its inline tags as marks and its slots filled with marked phrases."""
    wording = INLINE.sub(lambda found: mark(*found.groups()), wording)
    return sentence(wording.format(**slots))


def plural(act: str) -> str:
    """The word with an s: many of the noun, or what she does."""
    return act + ("es" if act.endswith(("s", "sh")) else "s")


@dataclass(frozen=True)
class Tagged:
    """A plain text, and for each of its words the part of speech and the entity tag."""

    text: str
    parts: tuple[str, ...]
    entities: tuple[str, ...]
    found: dict[str, int]  # for each entity the character at which it first begins

    @classmethod
    def of(cls, marked: str) -> "Tagged":
        """Takes the marks off. Raises ValueError for a word that nothing accounts for."""
        # `Writer.tell` looks at a name's last letter, and finds a mark
        marked = re.sub(rf"s({MARK}+)'s(?!\w)", r"s\1'", marked)
        pieces = list(PIECE.finditer(marked))
        parts, entities, found = [], [], {}
        for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
            meanings = [MEANING[character] for character in piece[2]]
            entity = meanings.pop() if len(meanings) == 2 else "O"
            parts.append(meanings[0] if meanings else look_up(piece[1], after and after[1]))
            entities.append(entity)
            if entity[0] == "B":
                before = re.sub(MARK, "", marked[: piece.start()])
                found.setdefault(entity[2:], len(before))
        return cls(re.sub(MARK, "", marked), tuple(parts), tuple(entities), found)


def look_up(word: str, after: str | None) -> str:
    """The part of speech of a word that carries no mark."""
    word = word.lower()
    part = BEFORE.get((word, after)) or LEXICON.get(word)
    if part is None and not re.search(r"\w", word):
        part = "PUNCT"
    if part is None:
        raise ValueError(f"{word!r}, before {after!r}, has no mark and is not in the lexicon")
    return part


class TaggedWriter(Writer):
    """Writes examples of the tasks with gold tags; nobody is in two of its texts."""

    def __init__(self, seed: int | str, world: dict | None = None):
        super().__init__(seed, world)
        self.met = set()

    def invented_person(self) -> dict:
        """Somebody whom this writer has not mentioned before."""
        while True:
            person = super().invented_person()
            if person["name"] not in self.met:
                self.met.add(person["name"])
                return person

    def facts(self, person: dict) -> dict:
        """Every phrase that a biography sentence may need, marked."""
        facts = super().facts(person)
        she, her, hers = facts["pronoun"]
        tool = self.jobs[person["job"]]
        return {
            "pronoun": (she, mark(her, "PRON"), mark(hers, "DET")),
            "first": mark(facts["first"], "PROPN", "SUBJECT"),
            "name": mark(facts["name"], "PROPN", "SUBJECT"),
            "job": a(mark(person["job"], "NOUN", "JOB")),
            "tool": a(mark(tool, "NOUN")),
            "home": mark(facts["home"], "PROPN", "HOME"),
            "region": mark(facts["region"], "PROPN", "REGION"),
            "likes": mark(facts["likes"], "NOUN", "LIKES"),
            "pet": a(mark(person["pet"], "NOUN", "PET")),
            "friend": mark(facts["friend"], "PROPN", "FRIEND"),
        }

    def life(self, person: dict, attributes: list[str]) -> list[str]:
        """One marked sentence on each attribute, the first with the full name."""
        facts = self.facts(person)
        return [self.tell(facts, attribute, not i) for i, attribute in enumerate(attributes)]

    def entities(self) -> Example:
        """Somebody, perhaps a shop, perhaps something that concerns neither, in any order."""
        rng = self.rng
        person = self.invented_person()
        person["friend"] = self.invented_person()["name"]
        person["likes"] = rng.choice(rng.choice((w.LIKES, SOLD, w.GOODS)))
        person["pet"] = rng.choice(rng.choice((w.PETS, w.ANIMALS)))
        attributes = rng.sample((*ATTRIBUTES, "friend", "friend", "home"), 3)
        attributes = list(dict.fromkeys(attributes))
        if "home" in attributes and rng.random() < 0.3:
            attributes.insert(attributes.index("home") + 1, "region")
        blocks = [self.life(person, attributes)]
        if rng.random() < 0.8:
            blocks.append(self.shop_lines())
        for wording in rng.sample(ASIDE, rng.choice((0, 1, 2))):
            blocks.append([fill(wording, self.world_slots())])
        rng.shuffle(blocks)
        tagged = Tagged.of(" ".join(line for block in blocks for line in block))
        return Example(tagged.text, " ".join(tagged.entities))

    def shop_lines(self) -> list[str]:
        """Where it is, what it sells, and one or both of who owns it and who bought there."""
        rng = self.rng
        site = rng.choice(self.towns)
        one, two = rng.sample(rng.choice((w.GOODS, SOLD)), 2)
        title = f"The {rng.choice(w.SHOP_ADJECTIVES)} {rng.choice(w.SHOP_NOUNS)}"
        slots = {
            "shop": mark(title, "PROPN", "SHOP"),
            "site": mark(site, "PROPN", "SITE"),
            "region": mark(self.region_of[site], "PROPN", "REGION"),
            "one": mark(one, "NOUN", "GOODS"),
            "two": mark(two, "NOUN", "GOODS"),
            "owner": mark(self.invented_person()["name"], "PROPN", "OWNER"),
            "buyer": mark(self.invented_person()["name"], "PROPN", "BUYER"),
            "price": mark(str(rng.randint(1, 99)), "NUM"),
        }
        where, what, owner, buyer = (rng.choice(wordings) for wordings in SHOP)
        ending = rng.choice(([owner], [buyer], [owner, buyer]))
        return [fill(wording, self.world_slots() | slots) for wording in (where, what, *ending)]

    def world_slots(self) -> dict[str, str]:
        """Phrases that play no part, marked with their part of speech."""
        pick = self.rng.choice
        sky, sky2 = self.rng.sample(w.SKY, 2)
        job, animal = pick(list(self.jobs)), pick(pick((w.PETS, w.ANIMALS)))
        nouns = {
            "sky": sky,
            "sky2": sky2,
            "job": job,
            "animal": animal,
            "place": pick(w.PLACES),
            "ware": pick(pick((w.GOODS, SOLD))),
            "likes": pick(pick((w.LIKES, SOLD, w.GOODS))),
            "season": pick(w.SEASONS),
        }
        number = pick(("two", "three", "four", "five", "six", "seven"))
        return {
            **{key: mark(noun, "NOUN") for key, noun in nouns.items()},
            "a_job": a(mark(job, "NOUN")),
            "an_animal": a(mark(animal, "NOUN")),
            "town": mark(pick(self.towns), "PROPN"),
            "day": mark(pick(w.DAYS), "PROPN"),
            "month": mark(pick(w.MONTHS), "PROPN"),
            "state": mark(pick(w.STATES), "ADJ"),
            "adverb": mark(pick(w.ADVERBS), "ADV"),
            "a_state": a(mark(pick(w.STATES), "ADJ")),
            "number": mark(number, "NUM"),
        }

    def speech(self) -> Example:
        """Four sentences; all but the first with words that can be two parts of speech."""
        rng = self.rng
        facts = self.facts(self.invented_person())
        lines = [self.acting(facts, rng.choice(kind)) for kind in (AS_VERB, AS_NOUN, OTHERWISE)]
        rng.shuffle(lines)
        attribute = rng.choice((*ATTRIBUTES, "tool"))
        tagged = Tagged.of(" ".join([self.tell(facts, attribute, True), *lines]))
        return Example(tagged.text, " ".join(tagged.parts))

    def acting(self, facts: dict, wording: str) -> str:
        """One sentence with a word of `ACTS`, a noun or a verb as the wording says."""
        rng = self.rng
        she, her, hers = facts["pronoun"]
        act, agent = rng.choice(list(ACTS)), rng.choice(WHO_ACT)
        part = "NOUN" if wording in AS_NOUN else "VERB"
        named = rng.random() < 0.25
        slots = {
            "S": sentence(facts["first"] if named else she),
            "s": facts["first"] if named else she,
            "o": her,
            "P": sentence(hers),
            "p": hers,
            "act": mark(act, part),
            "acts": mark(plural(act), part),
            "a_act": a(mark(act, part)),
            "agent": mark(agent, "NOUN"),
            "agents": mark(agent + "s", "NOUN"),
            "thing": mark(rng.choice(ACTS[act].split()), "NOUN"),
            "other": mark(self.invented_person()["name"], "PROPN"),
        }
        return fill(wording, self.world_slots() | slots)

    def reading(self, new_wording: bool) -> Question:
        """The lives of two or three people and a question on one of them."""
        rng = self.rng
        attribute = rng.choice(ATTRIBUTES)
        count = rng.choice((2, 3))
        people = []
        while len(people) < count:
            person = self.invented_person()
            known = {name for other in people for name in other["name"].split()}
            same = any(other[attribute] == person[attribute] for other in people)
            if not same and not known & set(person["name"].split()):
                people.append(person)
        asked = rng.randrange(count)
        lines, start = [], 0
        for position, person in enumerate(people):
            told = [attribute, *rng.sample([x for x in ATTRIBUTES if x != attribute], 4 - count)]
            if rng.random() < 0.5:
                told.append(rng.choice([x for x in ATTRIBUTES if x not in told]))
            rng.shuffle(told)
            tagged = Tagged.of(" ".join(self.life(person, told)))
            if position == asked:
                start = sum(len(line) + 1 for line in lines) + tagged.found[attribute.upper()]
            lines.append(tagged.text)
        wordings = QUESTIONS[attribute]
        wordings = wordings[TRAINED_WORDINGS:] if new_wording else wordings[:TRAINED_WORDINGS]
        question = rng.choice(wordings).format(n=people[asked]["name"])
        return Question(
            "\n".join([*lines, question]),
            people[asked][attribute],
            NEW if new_wording else TRAINED,
            start,
        )
