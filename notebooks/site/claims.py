"""The page of what is often said of these methods, and what holds."""

import re

from peftlab.experiments import claims

SHOWN = ("wrong", "imprecise", "depends", "disputed", "not tested")
OPENING = """# What is often said

People say many things about these methods. Here is what they say, in our words, and what holds.
Each part links to the lesson whose topic it is.

"""
NUMBER = re.compile(r"\bS\d-\d\d\b")


def plain(text: str) -> str:
    """Words in which nothing is markup, but that a claim's number is a link to it."""
    text = re.sub(r"([\\*_`\[\]<>$#|])", r"\\\1", " ".join(text.split()))
    return NUMBER.sub(lambda number: f"[this claim](#claim-{number[0].lower()})", text)


def page(lessons: dict[str, tuple[str, str]]) -> str:
    """Claims that do not simply hold, by lesson, and those that they name; `lessons` has the title
    of each number's lesson and its page."""
    known = claims.load()
    told = [claim for claim in known if claim.verdict in SHOWN]
    named = {number for claim in told for number in NUMBER.findall(claim.right)}
    found = [claim for claim in known if claim in told or claim.id in named]
    text = OPENING
    for number, (title, target) in lessons.items():
        mine = [claim for claim in found if claim.lesson == number]
        if mine:
            text += f"## [{title}]({target})\n\n"
        for claim in mine:
            meaning = claims.VERDICTS[claim.verdict]
            text += f"(claim-{claim.id.lower()})=\n**{plain(claim.says)}**\n\n"
            text += f"*{claim.verdict.capitalize()}: {meaning}.* {plain(claim.right)}\n"
            text += f"({plain(claim.reference)})\n\n"
    return text
