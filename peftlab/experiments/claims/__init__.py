"""What five sources say about adapting models: each claim, its verdict, and what decides it.

    from peftlab.experiments import claims
    claims.load()               183 claims, in the order of the sources
    claims.check(claim)         the verdict derived anew, and the numbers found, in a sentence

`python -m peftlab.experiments.claims` prints them. The claims lie in `data/claims/*.yaml`, in our
own words. Each has a verdict, the right statement, a reference, and under `check` one of these:

    parts   the propositions that the claim is made of: all hold (true), none (wrong), some
            (imprecise)
    cases   the claim in several settings: it holds in all (true), in some (depends), or it fails
            in one and is not seen to hold in any (wrong)
    read    it is about what somebody wrote: the reference decides, and no computation can
    open    not tested: the experiment that would decide it

A proposition is one comparison (`propositions`) of numbers that are computed (`quantities`), one
fact about a model that is looked at (`facts`), or a comparison of recorded runs (`evidence`).
Runs that cannot tell, because they are too few or lean without deciding, make the verdict
"disputed". `also` holds the right statement to the same comparisons: it must hold, whatever the
claim does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from peftlab.bases.data import data_path
from peftlab.experiments.claims.evidence import RESULTS, everywhere
from peftlab.experiments.claims.propositions import KINDS, Outcome, evaluate, written

SOURCES = ("S0", "S1", "S2", "S3", "S4")
VERDICTS = {
    "true": "it holds",
    "imprecise": "a part of it does not hold, or an essential part is missing",
    "wrong": "it does not hold",
    "depends": "it holds in some settings and not in others",
    "disputed": "measured, and the runs do not tell",
    "not tested": "no run and no computation here can tell",
}
FIRM = {Outcome.YES, Outcome.NO}
CHECKS = ("parts", "cases", "read", "open")
DECIDED = ("computation", "experiment", "reading", "nothing")


@dataclass(frozen=True)
class Claim:
    """One claim of one source, and what is known of it.

    `lines` are those of the source; `lesson` is the number of the lesson whose topic it is; `says`
    is the claim and `right` the right statement, both in our words. `decides` says whether somebody
    who chooses a method would choose otherwise. `how` is one of `CHECKS`; `propositions` are the
    claim's own, and `also` those of the right statement; `why` is the text of `read` and `open`.
    """

    id: str
    lines: str
    lesson: str
    topic: str
    says: str
    verdict: str
    right: str
    reference: str
    how: str
    decides: bool = False
    why: str = ""
    propositions: tuple[dict, ...] = field(default=(), hash=False)
    also: tuple[dict, ...] = field(default=(), hash=False)

    @property
    def source(self) -> str:
        """S0 to S4."""
        return self.id.split("-")[0]

    @property
    def decided_by(self) -> str:
        """What the verdict rests on: one of `DECIDED`. Nothing decides what is disputed or not
        tested; recorded runs count as the ground if a firm one is among the propositions."""
        if self.how == "read":
            return "reading"
        if self.verdict in ("not tested", "disputed"):
            return "nothing"
        firm = [each for each in self.propositions if evaluate(each)[0] in FIRM]
        recorded = any(kind_of(each) in RESULTS or "result " in str(each) for each in firm)
        return "experiment" if recorded else "computation"


@dataclass(frozen=True)
class Found:
    """What a check found: the verdict that follows, what each proposition gave, in sentences."""

    verdict: str
    outcomes: tuple[Outcome, ...]
    sentence: str


@functools.cache
def load() -> list[Claim]:
    """All claims, ordered by source and number. Raises ValueError for a file that is not whole."""
    paths = sorted(Path(data_path("claims")).glob("*.yaml"))
    read = [
        _claim(given)
        for path in paths
        for given in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    ids = [claim.id for claim in read]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"twice in data/claims: {', '.join(twice)}")
    return sorted(read, key=lambda claim: claim.id)


def named(name: str) -> Claim:
    """The claim of this id. Raises KeyError if there is none."""
    return {claim.id: claim for claim in load()}[name]


def check(claim: Claim) -> Found:
    """Derive the verdict again.

    A claim that rests on a reading, or that nothing decides, gives its verdict back and says why.
    Raises ValueError if the right statement itself does not hold.
    """
    results = [evaluate(each) for each in claim.propositions]
    beside = [evaluate(each) for each in claim.also]
    for given, (outcome, sentence) in zip(claim.also, beside, strict=True):
        if outcome is not Outcome.YES:
            raise ValueError(f"{claim.id}: its right statement fails at {given}: {sentence}")
    outcomes = tuple(outcome for outcome, _ in results)
    sentence = " ".join(sentence for _, sentence in results + beside)
    if claim.how == "read":
        said = f"By reading {claim.reference}: {claim.why}. {sentence}"
        return Found(claim.verdict, (), said.strip())
    if claim.how == "open":
        return Found("not tested", (), f"What would decide it: {claim.why}. {sentence}".strip())
    return Found(verdict(claim.how, outcomes), outcomes, sentence)


def verdict(how: str, outcomes: Iterable[Outcome]) -> str:
    """The word that follows from what the propositions of a claim gave.

    >>> verdict("parts", [Outcome.YES, Outcome.NO])
    'imprecise'
    >>> verdict("cases", [Outcome.YES, Outcome.NO, Outcome.LEANS_NO])
    'depends'
    >>> verdict("cases", [Outcome.LEANS_YES, Outcome.LEANS_NO])
    'disputed'
    """
    found = set(outcomes)
    if found == {Outcome.YES}:
        return "true"
    if how == "parts":
        if FIRM <= found:
            return "imprecise"
        return "wrong" if found == {Outcome.NO} else "disputed"  # a part is open, so the whole is
    if FIRM <= found:
        return "depends"
    return "wrong" if Outcome.NO in found else "disputed"  # one firm case refutes what is for all


def kind_of(proposition: dict) -> str:
    """The comparison that a proposition makes: its one key among `KINDS`."""
    (kind,) = set(proposition) & set(KINDS)
    return kind


def _spread(propositions: list[dict]) -> Iterator[dict]:
    """`everywhere` in full: one comparison for each recorded task."""
    for each in propositions:
        yield from everywhere(**each["everywhere"]) if "everywhere" in each else [each]


def _claim(given: dict) -> Claim:
    given = dict(given)
    checked = given.pop("check")
    (how,) = [key for key in checked if key != "also"]
    text = how in ("read", "open")
    claim = Claim(
        **given,
        how=how,
        why=checked[how] if text else "",
        propositions=() if text else tuple(_spread(checked[how])),
        also=tuple(checked.get("also", ())),
    )
    known = claim.verdict in VERDICTS and how in CHECKS and claim.source in SOURCES
    if not known or (how == "open") != (claim.verdict == "not tested"):
        raise ValueError(f"{claim.id}: verdict {claim.verdict!r} does not go with {how!r}")
    for each in (*claim.propositions, *claim.also):
        kind_of(each)
    return claim


__all__ = ["DECIDED", "VERDICTS", "Claim", "Found", "check", "load", "named", "verdict", "written"]
