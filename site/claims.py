"""The page of what is often said of these methods, and what holds."""

import re

from peftlab.experiments import claims

SHOWN = ("wrong", "imprecise", "depends", "disputed", "not tested")
OPENING = """# What is often said

People say many things about these methods. Here is what they say, in our words, and what holds.
A lesson shows most of it; the number links to it.

"""


def plain(text: str) -> str:
    """Words in which nothing is markup."""
    return re.sub(r"([\\*_`\[\]<>$#|])", r"\\\1", " ".join(text.split()))


def page(lessons: dict[str, str]) -> str:
    """Claims that do not simply hold, by lesson; `lessons` has the title of each number's lesson
    and its page."""
    found = [claim for claim in claims.load() if claim.verdict in SHOWN]
    text = OPENING
    for number, (title, target) in lessons.items():
        mine = [claim for claim in found if claim.lesson == number]
        if mine:
            text += f"## [{title}]({target})\n\n"
        for claim in mine:
            meaning = claims.VERDICTS[claim.verdict]
            text += f"**{plain(claim.says)}** *{claim.verdict.capitalize()}: {meaning}.*\n"
            text += f": {plain(claim.right)} ({plain(claim.reference)})\n\n"
    return text
