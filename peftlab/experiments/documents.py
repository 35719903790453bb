"""The documents that `tiny-gpt` is pre-trained on: short texts about the made-up world.

A `Writer` owns a random generator and the *public* part of the world. Held-out people are not in
that part, and invented names come from a class of name pairs that no held-out person can have
(`name_class`), so no document can mention them.
"""

import json
import random
from functools import cache

from peftlab.bases.data import data_path
from peftlab.experiments import words as w
from peftlab.tasks.facts import QUESTIONS

FIRST_NAMES = [name for pair in zip(w.WOMEN, w.MEN, strict=False) for name in pair]
HELD_OUT, KNOWN, INVENTED = "held out", "known", "invented"


def name_class(first: str, last: str) -> str:
    """Who may carry this pair of names: each pair belongs to exactly one class."""
    key = (3 * _index(tuple(FIRST_NAMES))[first] + _index(tuple(w.LAST_NAMES))[last]) % 10
    return HELD_OUT if key == 0 else KNOWN if key < 5 else INVENTED


@cache
def _index(names: tuple[str, ...]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


@cache
def load_world() -> dict:
    """`data/world/world.json` as it was written, held-out people included."""
    return json.loads(data_path("world", "world.json").read_text(encoding="utf-8"))


def public_world() -> dict:
    """The world without its held-out people: all that a `Writer` gets to see."""
    return {key: value for key, value in load_world().items() if key != "held_out"}


def a(noun: str) -> str:
    """The noun with its article: 'a cat', 'an owl'."""
    return f"an {noun}" if noun[0] in "aeiouAEIOU" else f"a {noun}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# One line per fact. {S} is the person (name or pronoun), {P} the possessive.
BIOGRAPHY = {
    "job": [
        "{S} works as {job}.",
        "{S} is {job}.",
        "{S} earns a living as {job}.",
        "By trade {s} is {job}.",
        "For many years {s} has been {job}.",
        "{S} became {job} after school.",
    ],
    "tool": [
        "At work {s} needs {tool} every day.",
        "{S} never goes to work without {tool}.",
        "{P} most important tool is {tool}.",
    ],
    "home": [
        "{S} lives in {home}.",
        "{P} home is in {home}.",
        "{S} has a small house in {home}.",
        "{P} home town is {home}.",
        "You can find {p} house in {home}.",
        "{S} moved to {home} long ago.",
    ],
    "region": [
        "That is in {region}.",
        "{S} is happy to live in {region}.",
        "{S} knows every road in {region}.",
    ],
    "likes": [
        "{S} likes {likes}.",
        "{S} is fond of {likes}.",
        "{S} loves {likes} most of all.",
        "Nothing makes {o} as happy as {likes}.",
        "{P} favourite thing is {likes}.",
        "On Sundays {s} has time for {likes}.",
    ],
    "pet": [
        "{S} has {pet}.",
        "{S} keeps {pet}.",
        "{P} pet is {pet}.",
        "{S} shares the house with {pet}.",
        "{S} is the owner of {pet}.",
        "Every morning {s} feeds {pet}.",
    ],
    "friend": [
        "{P} best friend is {friend}.",
        "{S} often visits {friend}.",
        "{S} went to school with {friend}.",
    ],
}

FURTHER_QUESTIONS = {
    "region": ["In which region does {n} live?", "Which region is home to {n}?"],
    "tool": ["What tool does {n} use at work?", "Which tool does {n} need for work?"],
    "friend": ["Who is the best friend of {n}?", "Name the best friend of {n}."],
    "friend home": ["Where does the best friend of {n} live?"],
    "friend job": ["What is the job of the best friend of {n}?"],
}
SHOP_QUESTIONS = {
    "town": ["Where is {n}?", "In which town is {n}?"],
    "region": ["In which region is {n}?"],
    "sells": ["What does {n} sell?", "What can you buy at {n}?"],
    "owner": ["Who owns {n}?", "Who is the owner of {n}?"],
    "owner home": ["Where does the owner of {n} live?"],
}
ATTRIBUTES = ("job", "home", "likes", "pet")
ARROWS = ["->", "=>", ":", "|", "=", ">>", "--", "::", "~", "...", ";", ">", "/", "is", "<-", "+"]
WRAPS = ["{}", "{}", "{}", "{}", "[{}]", "({})", '"{}"', "<{}>", "{{{}}}", "- {}", "* {}", "# {}"]
SYMBOLS = [chr(code) for code in range(33, 127)]
ALPHABET = [chr(code) for code in range(ord("a"), ord("z") + 1)]


class Writer:
    """Writes documents; `write()` gives one as (kind, text), drawn by the shares in `MIX`."""

    def __init__(self, seed: int | str, world: dict | None = None):
        self.rng = random.Random(seed)
        world = world or public_world()
        self.people, self.shops = world["people"], world["shops"]
        self.jobs, self.regions = world["jobs"], world["regions"]
        self.by_name = {person["name"]: person for person in self.people}
        self.region_of = {town: region for region, towns in self.regions.items() for town in towns}
        self.towns = list(self.region_of)
        self.women = frozenset(w.WOMEN)
        self.kinds, self.shares = list(MIX), list(MIX.values())

    def write(self) -> tuple[str, str]:
        kind = self.rng.choices(self.kinds, self.shares)[0]
        return kind, getattr(self, kind)()

    # -- people ---------------------------------------------------------------------------------

    def invented_person(self) -> dict:
        """Somebody who exists in one document only."""
        pick = self.rng.choice
        while True:
            first, last = pick(FIRST_NAMES), pick(w.LAST_NAMES)
            if name_class(first, last) == INVENTED:
                break
        return {
            "name": f"{first} {last}",
            "job": pick(list(self.jobs)),
            "home": pick(self.towns),
            "likes": pick(w.LIKES),
            "pet": pick(w.PETS),
        }

    def facts(self, person: dict) -> dict:
        """Every phrase that a biography sentence may need."""
        first = person["name"].split()[0]
        she = first in self.women
        return {
            "pronoun": ("she", "her", "her") if she else ("he", "him", "his"),
            "first": first,
            "name": person["name"],
            "job": a(person["job"]),
            "tool": a(self.jobs[person["job"]]),
            "home": person["home"],
            "region": self.region_of[person["home"]],
            "likes": person["likes"],
            "pet": a(person["pet"]),
            "friend": person.get("friend", ""),
        }

    def tell(self, facts: dict, attribute: str, named: bool) -> str:
        """One sentence on one attribute; `named` asks for the full name."""
        template = self.rng.choice(BIOGRAPHY[attribute])
        she, her, hers = facts["pronoun"]
        who = facts["name"] if named else facts["first"] if self.rng.random() < 0.25 else she
        if who != she:
            she, her, hers = who, who, who + "'s" if who[-1] != "s" else who + "'"
        return template.format(S=sentence(she), s=she, o=her, P=sentence(hers), p=hers, **facts)

    def biography(self, person: dict | None = None, length: int = 7) -> str:
        rng = self.rng
        person = person or rng.choice(self.people)
        facts = self.facts(person)
        order = list(ATTRIBUTES)
        rng.shuffle(order)
        told = []
        for attribute in order:
            told.append(attribute)
            if attribute == "job" and rng.random() < 0.4:
                told.append("tool")
            if attribute == "home" and rng.random() < 0.4:
                told.append("region")
        if facts["friend"] and rng.random() < 0.4:
            told.insert(rng.randrange(len(told) + 1), "friend")
        if told[0] == "region":
            told = told[1:]
        full = rng.random() < 0.3  # name the person in full in every sentence
        lines = [
            self.tell(facts, attribute, named=full or position == 0)
            for position, attribute in enumerate(told[:length])
        ]
        return " ".join(lines)

    def answer(self, person: dict, attribute: str) -> str:
        if attribute == "region":
            return self.region_of[person["home"]]
        if attribute == "tool":
            return self.jobs[person["job"]]
        if attribute.startswith("friend "):
            return self.by_name[person["friend"]][attribute.split()[1]]
        return person[attribute]

    def ask(self, person: dict, attribute: str) -> str:
        wordings = QUESTIONS.get(attribute) or FURTHER_QUESTIONS[attribute]
        question = self.rng.choice(wordings).format(n=person["name"])
        return f"Q: {question}\nA: {self.answer(person, attribute)}"

    def question_list(self) -> str:
        rng = self.rng
        one = rng.choice(self.people) if rng.random() < 0.4 else None
        lines = []
        for _ in range(rng.randint(2, 7)):
            person = one or rng.choice(self.people)
            further = rng.random() < 0.15
            attribute = rng.choice(list(FURTHER_QUESTIONS) if further else ATTRIBUTES)
            lines.append(self.ask(person, attribute))
        return "\n".join(lines)

    def context_questions(self) -> str:
        rng = self.rng
        people = [self.invented_person() for _ in range(rng.choice((1, 1, 2, 3)))]
        lines = [self.biography(person) for person in people]
        for _ in range(rng.randint(1, 4)):
            attribute = rng.choice((*ATTRIBUTES, "region", "tool"))
            lines.append(self.ask(rng.choice(people), attribute))
        return "\n".join(lines)

    def attribute_table(self) -> str:
        rng = self.rng
        person = rng.choice(self.people)
        keys = ["name", *rng.sample(ATTRIBUTES, rng.randint(2, 4))]
        if rng.random() < 0.3:
            keys.append("friend")
        if rng.random() < 0.2:
            return "|".join(keys) + "\n" + "|".join(person[key] for key in keys)
        arrow = rng.choice((":", ":", " =", " ->", " -", " |"))
        joint = rng.choice(("\n", "\n", " ; ", ", "))
        return joint.join(f"{key}{arrow} {person[key]}" for key in keys)

    # -- shops and weather ----------------------------------------------------------------------

    def shop(self) -> str:
        rng = self.rng
        shop = rng.choice(self.shops)
        name, town, owner = shop["name"], shop["town"], shop["owner"]
        first, second = rng.sample(shop["sells"], 2)
        if rng.random() < 0.4:
            lines = []
            for _ in range(rng.randint(1, 4)):
                shop = rng.choice((shop, shop, rng.choice(self.shops)))
                key = rng.choice(list(SHOP_QUESTIONS))
                answer = {
                    "sells": " and ".join(shop["sells"]),
                    "region": self.region_of[shop["town"]],
                    "owner home": self.by_name[shop["owner"]]["home"],
                }.get(key) or shop[key]
                question = rng.choice(SHOP_QUESTIONS[key]).format(n=shop["name"])
                lines.append(f"Q: {question}\nA: {answer}")
            return "\n".join(lines)
        lines = [
            rng.choice(
                (
                    f"{name} is a shop in {town}.",
                    f"In {town} there is a shop called {name}.",
                    f"{name} opens every {rng.choice(w.DAYS)} in {town}.",
                )
            ),
            rng.choice(
                (
                    f"It sells {first} and {second}.",
                    f"You can buy {first} there, and also {second}.",
                    f"People come from all over {self.region_of[town]} to buy {first}.",
                )
            ),
            rng.choice((f"The owner is {owner}.", f"It belongs to {owner}.")),
        ]
        if rng.random() < 0.5:
            buyer = rng.choice(FIRST_NAMES)
            price = rng.randint(1, 99)
            lines.append(
                rng.choice(
                    (
                        f"Last {rng.choice(w.MONTHS)} {buyer} bought some {first} "
                        f"for {price} coins.",
                        f"{buyer} looked at the {first}, but {price} coins was too much.",
                        f"{buyer} paid {price} coins for {second} and went home happy.",
                    )
                )
            )
        return " ".join(lines)

    def weather(self) -> str:
        rng = self.rng
        town, day = rng.choice(self.towns), rng.choice(w.DAYS)
        part = rng.choice(("morning", "afternoon", "evening", "night"))
        degrees = rng.randint(-9, 34)
        feel = "cold" if degrees < 10 else "mild" if degrees < 20 else "warm"
        first, second = rng.sample(w.SKY if feel == "cold" else w.SKY[3:], 2)
        advice = {
            "cold": ("Wear a thick coat.", "Keep the stove lit.", "Take gloves and a scarf."),
            "mild": ("Take a light coat.", "A good day for a walk.", "Leave the windows open."),
            "warm": ("Drink enough water.", "Stay in the shade.", "The lake is open for bathing."),
        }
        opening = rng.choice(
            (
                f"Weather for {town} on {day}: {first} in the {part}, then {second}.",
                f"On {day} {town} will see {first} and later {second}.",
                f"{day} in {town} begins with {first}. By {part} expect {second}.",
            )
        )
        middle = rng.choice(
            (
                f"It will be {feel}, about {degrees} degrees.",
                f"With {degrees} degrees it stays {feel}.",
            )
        )
        return f"{opening} {middle} {rng.choice(advice[feel])}"

    # -- reviews --------------------------------------------------------------------------------

    def clause(self, positive: bool) -> str:
        rng = self.rng
        aspects, praise, blame = rng.choice(list(w.ASPECTS.values()))
        aspect = rng.choice(aspects)
        good, bad = rng.choice((praise, w.PRAISE)), rng.choice((blame, w.BLAME))
        right, wrong = (good, bad) if positive else (bad, good)
        style = rng.random()
        if style < 0.45:
            degree = rng.choice(("", "", "really ", "very ", "quite "))
            return f"the {aspect} was {degree}{rng.choice(right)}"
        if style < 0.75:
            return rng.choice(
                (
                    f"the {aspect} was not {rng.choice(wrong)}",
                    f"the {aspect} was not {rng.choice(wrong)} at all",
                    f"nobody could call the {aspect} {rng.choice(wrong)}",
                )
            )
        like = ("I loved the {}", "I enjoyed the {}", "we did not hate the {}")
        hate = ("I hated the {}", "I did not like the {}", "we never enjoyed the {}")
        return rng.choice(like if positive else hate).format(aspect)

    def review(self) -> tuple[str, bool]:
        """A review of one, three or five clauses and whether most of them praise."""
        rng = self.rng
        count, positive = rng.choice((1, 1, 3, 3, 5)), rng.random() < 0.5
        for_it = rng.randint(count // 2 + 1, count)
        signs = [positive] * for_it + [not positive] * (count - for_it)
        rng.shuffle(signs)
        clauses = [self.clause(sign) for sign in signs]
        if count > 1 and rng.random() < 0.6:
            return sentence(", ".join(clauses[:-1]) + " and " + clauses[-1]) + ".", positive
        return " ".join(sentence(clause) + "." for clause in clauses), positive

    def labelled_reviews(self) -> str:
        rng = self.rng
        pair = rng.choice(w.LABELS)
        shape = rng.choice(
            (
                "Review: {r}\nLabel: {l}",
                "{r}\n{l}",
                "{r} -> {l}",
                "text: {r}\nmood: {l}",
                "{l}: {r}",
            )
        )
        lines = []
        for _ in range(rng.randint(1, 5)):
            text, positive = self.review()
            lines.append(shape.format(r=text, l=pair[0] if positive else pair[1]))
        if rng.random() < 0.15:
            return self.verdict()
        return "\n".join(lines)

    def verdict(self) -> str:
        """A visit told in running text, with its overall verdict in the last sentence."""
        rng = self.rng
        text, positive = self.review()
        word = rng.choice(w.PRAISE if positive else w.BLAME)
        name, day = rng.choice(FIRST_NAMES), rng.choice(w.DAYS)
        ending = rng.choice(
            (
                f"{name} said the visit was {word}.",
                f"So our {day} was {word}.",
                f"We call that {word}.",
            )
        )
        return f"{text} {ending}"

    # -- slots to text --------------------------------------------------------------------------

    def slots(self) -> dict[str, str]:
        pick = self.rng.choice
        return {
            "name": f"The {pick(w.PLACE_ADJECTIVES)} {pick(w.PLACE_NOUNS)}",
            "kind": pick(w.KINDS),
            "food": pick(w.FOODS),
            "price": pick(w.PRICES),
            "area": pick(w.AREAS),
        }

    def slots_to_text(self) -> str:
        rng = self.rng
        form = rng.choice((" = ", ": ", " -> "))
        joint = rng.choice((" | ", ", ", "\n", " ; "))
        head = rng.choice(("", "", "text: ", "=> "))
        items = []
        for _ in range(rng.randint(1, 3)):
            slots = self.slots()
            keys = list(slots)
            if rng.random() < 0.3:
                rng.shuffle(keys)
            given = joint.join(f"{key}{form}{slots[key]}" for key in keys)
            items.append(f"{given}\n{head}{self.plain_sentence(slots)}")
        return "\n".join(items)

    def plain_sentence(self, slots: dict[str, str]) -> str:
        text = self.rng.choice(
            (
                "{name} is {a_price} {kind} near the {area} that serves {food}.",
                "{name} is {a_kind} by the {area} with {price} {food}.",
                "Near the {area} you find {name}, {a_price} {kind} that serves {food}.",
                "For {price} {food} go to {name}, {a_kind} near the {area}.",
                "At {name}, {a_kind} by the {area}, the {food} is {price}.",
            )
        )
        return text.format(a_price=a(slots["price"]), a_kind=a(slots["kind"]), **slots)

    # -- stories --------------------------------------------------------------------------------

    def story(self) -> str:
        rng = self.rng
        pick = rng.choice
        hero, friend = rng.sample(FIRST_NAMES, 2)
        she, her, hers = ("she", "her", "her") if hero in self.women else ("he", "him", "his")
        thing, other = rng.sample(w.OBJECTS, 2)
        place, goal = rng.sample(w.PLACES, 2)
        material, state = pick(w.MATERIALS), pick(w.STATES)
        animal, animal_state = pick(w.ANIMALS), pick(w.STATES)
        feeling, later = rng.sample(w.FEELINGS, 2)
        adverb, sky, colour = pick(w.ADVERBS), pick(w.SKY), pick(w.COLOURS)
        season, month, day = pick(w.SEASONS), pick(w.MONTHS), pick(w.DAYS)
        number = pick(("two", "three", "four", "five", "six", "seven"))
        lines = [
            pick(
                (
                    f"One {season} morning {hero} and {friend} walked to the {place}.",
                    f"It was {day}, and {hero} was {feeling}. {friend} came to the {place} too.",
                    f"{hero} and {friend} knew {a(animal_state)} {animal} near the {place}.",
                    f"In {month} {hero} went to the {place} with {friend}.",
                    f"Every {season} {hero} visited the {goal} with {hers} friend {friend}.",
                    f"Long ago {hero} and {friend} lived in a house near the {goal}.",
                    f"Once there was {a(animal_state)} {animal} "
                    f"that {hero} and {friend} knew well.",
                )
            ),
            pick(
                (
                    f"There {she} found {a(material)} {thing}.",
                    f"{sentence(she)} was looking for {a(state)} {thing}.",
                    f"Under a {colour} tree lay {a(state)} {thing}.",
                    f"{friend} had hidden the {material} {thing} there {number} years before.",
                    f"An old woman gave {her} {a(material)} {thing} and went away.",
                    f"Behind the {place} {she} saw {a(colour)} door and opened it {adverb}.",
                )
            ),
            pick(
                (
                    f"The {thing} was {state}, but {hero} did not mind.",
                    f'"What a {state} {thing}!" said {hero}.',
                    f'"Whose {thing} is this?" asked {friend} {adverb}.',
                    f"Then the {sky} came, and the {animal} ran into the {place}.",
                    f"{sentence(a(animal))} watched them {adverb} from the {place}.",
                    f"{friend} wanted to sell it for {number} coins.",
                )
            ),
            pick(
                (
                    f"{hero} asked {friend} for help, and together they carried it to the {goal}.",
                    f"So they put the {thing} into a {colour} bag and walked {adverb} home.",
                    f"But the {animal} took the {thing} and hid it in the {goal}.",
                    f"For {number} days they waited in the {goal}, and the {sky} did not stop.",
                    f"They changed the {thing} for {a(other)} that was even more {state}.",
                    f"{friend} cleaned it {adverb} until it looked like new.",
                )
            ),
            pick(
                (
                    f"In the end {hero} was {later}, and everybody went to bed.",
                    f"{friend} never forgot that {season}.",
                    f"Since then the {thing} has stood in the {goal}.",
                    f'"We should do this again," said {friend}, and {hero} was {later}.',
                    f"That evening they made a fire and told the story of the {thing}.",
                    f"And the {animal} was never {feeling} again.",
                )
            ),
        ]
        if rng.random() < 0.3:
            del lines[rng.choice((2, 3))]
        return " ".join(lines)

    # -- letters and series ---------------------------------------------------------------------

    def letter_item(self, task: str) -> tuple[str, str]:
        """Input and output of one letter task."""
        rng = self.rng
        if task == "symbols":
            text = "".join(rng.choices(SYMBOLS, k=rng.randint(1, 6)))
            text = " ".join(text) if rng.random() < 0.5 else text
            return text, text
        letters = rng.sample(ALPHABET[:-1], rng.randint(3, 6))
        answer = {
            "copy": letters,
            "reverse": letters[::-1],
            "sort": sorted(letters),
            "next": [chr(ord(letter) + 1) for letter in letters],
            "upper": [letter.upper() for letter in letters],
        }[task]
        return " ".join(letters), " ".join(answer)

    def letters(self) -> str:
        """Letter tasks with their instruction; reverse, next and upper have this one form only."""
        rng = self.rng
        task = rng.choice(("copy", "reverse", "sort", "next", "upper", "symbols"))
        name = "copy" if task == "symbols" else task
        lines = []
        for _ in range(rng.randint(1, 4)):
            given, answer = self.letter_item(task)
            lines.append(f"{name}: {given} -> {answer}")
        return "\n".join(lines)

    def series(self) -> str:
        """One to seven items of one task in one random format: the task shows in the items."""
        rng = self.rng
        task = rng.choice(("copy", "sort", "symbols", "mood", "mood", "mood", *ATTRIBUTES))
        pair = rng.choice(w.LABELS)
        if rng.random() < 0.2:
            pair = pair[::-1]
        arrow, wrap = rng.choice(ARROWS), rng.choice(WRAPS)
        arrow = rng.choice((" {} ", " {} ", "\n{} ", "  {} ")).format(arrow)
        joint = rng.choice(("\n", "\n", "\n\n", " ; ", "\t"))
        items = []
        for _ in range(rng.randint(1, 7)):
            if task == "mood":
                given, positive = self.review()
                answer = pair[0] if positive else pair[1]
            elif task in ATTRIBUTES:
                person = rng.choice(self.people)
                given, answer = person["name"], person[task]
            else:
                given, answer = self.letter_item(task)
            items.append(wrap.format(given) + arrow + answer)
        return joint.join(items)


# share of each kind among the documents, in percent
MIX = {
    "biography": 24,
    "question_list": 18,
    "labelled_reviews": 10,
    "story": 10,
    "context_questions": 8,
    "slots_to_text": 7,
    "letters": 6,
    "series": 9,
    "attribute_table": 4,
    "shop": 2,
    "weather": 2,
}
