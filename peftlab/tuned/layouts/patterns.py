"""Regular expressions that came in a file, matched in bounded time.

`re` tries one way to match after the other, and a pattern such as (a+)+b has exponentially many.
Here all ways go on together: each part of a pattern takes the places in the text where it may
begin to those where it may end. Places are the bits of a whole number. What follows of one place
is computed once, so the time grows with the pattern and with a power of the text.
"""

import re
from functools import cache, reduce
from operator import or_
from re import _constants as kinds
from re import _parser as parser

LONGEST = 400  # characters of a pattern
CLASSES = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}
CLASSES |= {f"NOT_{name}": sign.upper() for name, sign in CLASSES.items()}
STARTS, ENDS = (kinds.AT_BEGINNING, kinds.AT_BEGINNING_STRING), (kinds.AT_END, kinds.AT_END_STRING)


def matches(pattern: str, text: str) -> bool:
    """Whether the pattern matches the whole text, or all that is behind one of its dots.

    Raises ValueError for a pattern that is none, is too long, or looks around in the text.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern of {len(pattern):,} characters: at most {LONGEST} are read")
    try:
        if not set(pattern) & set("*+?{|("):  # `re` has one way to match at each dot
            return re.match(rf"(.*\.)?({pattern})$", text) is not None
        starts = 1 + sum(2 << i for i, sign in enumerate(text) if sign == ".")
        return bool(_Places(text).behind_any(_parsed(pattern), starts) >> len(text))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error


@cache
def _parsed(pattern: str) -> parser.SubPattern:
    """The parts of a pattern, as `re` sees them."""
    return parser.parse(f"(?:{pattern})")


class _Places:
    """The places in one text, between its characters: bit i is the place before character i."""

    def __init__(self, text: str):
        self.text = text
        self.known: dict[tuple[int, int], int] = {}

    def behind(self, parts, place: int) -> int:
        """Where these parts, one after another, may end if they begin at this place."""
        key = id(parts), place
        if key not in self.known:
            places = 1 << place
            for kind, value in parts:
                places = self.step(kind, value, places)
            self.known[key] = places
        return self.known[key]

    def behind_any(self, parts, places: int) -> int:
        """Where they may end if they begin at any of these places."""
        return reduce(or_, [self.behind(parts, place) for place in _bits(places)], 0)

    def step(self, kind, value, places: int) -> int:
        """Where one part may end."""
        if kind is kinds.SUBPATTERN and not any(value[1:3]):
            return self.behind_any(value[3], places)
        if kind is kinds.BRANCH:
            return reduce(or_, [self.behind_any(parts, places) for parts in value[1]])
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT):
            return self.repeated(*value, places)
        if kind is kinds.AT and value in (*STARTS, *ENDS):
            return places & (1 if value in STARTS else 1 << len(self.text))
        inside = places & ~(1 << len(self.text))
        return sum(2 << i for i in _bits(inside) if _is(kind, value, self.text[i]))

    def repeated(self, low: int, high: int, parts, places: int) -> int:
        """Where `low` to `high` repetitions may end."""
        found, enough = 0, len(self.text) + 1  # more repetitions reach no other place
        for count in range(min(high, 2 * enough) + 1):
            if count >= min(low, enough):
                places &= ~found
                found |= places
            places = self.behind_any(parts, places)
        return found


def _bits(places: int) -> list[int]:
    return [i for i in range(places.bit_length()) if places >> i & 1]


def _is(kind, value, sign: str) -> bool:
    """Whether a character is what this part asks for."""
    if kind is kinds.ANY:
        return sign != "\n"
    if kind in (kinds.LITERAL, kinds.NOT_LITERAL):
        return (ord(sign) == value) == (kind is kinds.LITERAL)
    if kind is kinds.RANGE:
        return value[0] <= ord(sign) <= value[1]
    if kind is kinds.CATEGORY:
        return bool(re.match(CLASSES[str(value).removeprefix("CATEGORY_")], sign))
    if kind is kinds.IN:
        but = value[0][0] is kinds.NEGATE
        return any(_is(*each, sign) for each in value[but:]) != but
    raise ValueError(f"{str(kind).lower()} in a pattern is not read")
