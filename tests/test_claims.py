"""The claims of the sources: all there, in a form that holds, and every verdict derived anew."""

import json
import re
import statistics
from collections import Counter
from dataclasses import replace

import pytest
import yaml

import peftlab
from peftlab.bases.data import data_path
from peftlab.experiments import claims
from peftlab.experiments.claims import evidence, facts, propositions, quantities
from peftlab.experiments.claims.__main__ import counts, main
from peftlab.experiments.claims.evidence import Outcome

CLAIMS = claims.load()
SIZES = {"S0": 27, "S1": 36, "S2": 12, "S3": 21, "S4": 87}  # how many each source makes
LESSONS = {f"{number:02}" for number in range(15)}
YES, NO, UNTOLD = Outcome.YES, Outcome.NO, Outcome.NOT_TOLD_APART
LEANS_YES, LEANS_NO = Outcome.LEANS_YES, Outcome.LEANS_NO


def texts(claim):
    return claim.says, claim.right, claim.why


def called(given):
    """Every call in a proposition, as it is written."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, dict):
        for value in given.values():
            yield from called(value)
    elif isinstance(given, list):
        for value in given:
            yield from called(value)


# --- what is there -------------------------------------------------------------------------------


def test_all_claims_are_there_once():
    ids = [claim.id for claim in CLAIMS]
    assert ids == [f"{s}-{n:02}" for s, most in SIZES.items() for n in range(1, most + 1)]
    assert len(CLAIMS) == 183
    assert peftlab.claims.load() is CLAIMS


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_is_whole(claim):
    assert re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", claim.lines)
    assert claim.lesson in LESSONS and claim.topic and claim.reference
    assert claim.verdict in claims.VERDICTS
    for text in (claim.says, claim.right):
        assert text[0].isupper() and text.endswith(".")
    assert 1 <= len(re.findall(r"[.!?](?= |$)", claim.right)) <= 2
    assert bool(claim.why) == (claim.how in ("read", "open")) == (not claim.propositions)
    assert not {'"', "“", "„", "«"} & set("".join(texts(claim)))  # nobody is quoted


def test_no_two_claims_share_a_sentence():
    said = Counter(claim.says for claim in CLAIMS)
    assert max(said.values()) == 1


def test_every_function_and_file_that_is_named_exists():
    for claim in CLAIMS:
        for proposition in (*claim.propositions, *claim.also):
            kind = claims.kind_of(proposition)
            given = proposition[kind]
            if kind in evidence.COMPARATORS:
                assert evidence.read(given["file"])["runs"]
                continue
            room = facts if "fact" in kind else quantities
            for call in called(given):
                assert callable(getattr(room, call.split()[0])), f"{claim.id}: {call}"


def test_shapes_of_others_say_where_they_are_from():
    shapes = json.loads(data_path("claims", "shapes.json").read_text(encoding="utf-8"))
    assert all("arXiv:" in shape["source"] for shape in shapes.values())
    # Lester et al. 2021, table 4, less one vector of the prompt.
    assert quantities.parameters("t5.1.1-small") == 76_961_664 - 512
    assert quantities.parameters("t5.1.1-xxl") == 11_135_336_448 - 4096


# --- every verdict -------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_the_verdict_follows(claim):
    found = claims.check(claim)
    assert found.verdict == claim.verdict, found.sentence
    assert len(found.outcomes) == len(claim.propositions)
    assert found.sentence


def test_most_are_decided_and_the_counts_are_told():
    grounds = Counter(claim.decided_by for claim in CLAIMS)
    assert grounds["computation"] + grounds["experiment"] + grounds["leaning runs"] >= 130
    assert sum(grounds.values()) == 183
    assert f"computation {grounds['computation']}" in counts(CLAIMS)
    assert 25 <= sum(claim.decides for claim in CLAIMS) <= 35


def test_no_run_wins_with_few_seeds_or_a_rate_at_the_end_of_its_grid():
    """A firm ranking needs five seeds and rates inside; a level needs three runs above it."""
    for claim in CLAIMS:
        for proposition in claim.propositions:
            kind = claims.kind_of(proposition)
            if kind not in evidence.COMPARATORS:
                continue
            outcome, sentence = propositions.evaluate(proposition)
            if outcome in (YES, NO) and "reaches" not in kind:
                n = int(re.search(r"(\d+) seeds", sentence)[1])
                assert n >= evidence.SEEDS and "inside their grids" in sentence, claim.id
            elif outcome in (YES, NO):
                assert int(re.search(r"in (\d+) runs", sentence)[1]) >= evidence.RUNS, claim.id


# --- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, outcomes, word",
    [
        ("parts", [YES, YES], "true"),
        ("parts", [YES, NO], "imprecise"),
        ("parts", [NO, NO], "wrong"),
        ("parts", [YES, UNTOLD], "disputed"),
        ("parts", [YES, LEANS_YES], "disputed"),
        ("parts", [YES, LEANS_NO], "disputed"),
        ("parts", [YES, NO, UNTOLD], "imprecise"),
        ("cases", [YES, NO], "depends"),
        ("cases", [LEANS_YES, LEANS_NO], "depends"),
        ("cases", [LEANS_NO, LEANS_NO], "disputed"),
        ("cases", [UNTOLD], "disputed"),
        ("cases", [NO, LEANS_NO], "wrong"),
        ("cases", [YES, UNTOLD], "disputed"),
        ("cases", [YES, YES], "true"),
        ("cases", [YES, LEANS_NO], "depends"),
    ],
)
def test_the_word_that_follows(how, outcomes, word):
    assert claims.verdict(how, outcomes) == word


def runs(scores, label, end=False):
    marked = {evidence.AT_THE_END[0]: end} if end is not None else {}
    return [{"label": label, "seed": n, "score": s, **marked} for n, s in enumerate(scores)]


@pytest.fixture
def compared(monkeypatch):
    """`higher` of two lists of scores, whose rate may lie at the end of a grid."""

    def of(ours, theirs, end=False, comparator=evidence.higher, **options):
        made = {"runs": [*runs(ours, "this", end), *runs(theirs, "that")]}
        monkeypatch.setattr(evidence, "read", lambda file: made)
        sides = {"this": {"label": "this"}, "that": {"label": "that"}}
        return comparator("made", "score", **sides, **options)[0]

    return of


FIVE, ABOVE = [0.5, 0.52, 0.51, 0.5, 0.53], [0.7, 0.72, 0.71, 0.7, 0.73]


def test_five_seeds_inside_the_grid_decide(compared):
    assert compared(ABOVE, FIVE) is YES
    assert compared(FIVE, ABOVE) is NO
    assert compared(FIVE, FIVE) is UNTOLD
    assert compared(ABOVE, FIVE, times=2) is NO


def test_fewer_seeds_and_rates_at_the_end_lean(compared):
    assert compared(ABOVE[:4], FIVE[:4]) is LEANS_YES
    assert compared(FIVE, ABOVE, end=True) is LEANS_NO
    assert compared(ABOVE, FIVE, end=None) is LEANS_YES  # nobody says that the rate was searched
    assert compared([0.5, 0.9, 0.5], [0.6, 0.6, 0.6]) is UNTOLD


def test_spread(compared):
    wide, narrow = [0.1, 0.9, 0.2, 0.8, 0.5, 0.0], [0.5, 0.51, 0.5, 0.49, 0.5, 0.52]
    assert compared(wide, narrow, comparator=evidence.wider) is YES
    assert compared(narrow, wide, comparator=evidence.wider) is NO


def test_a_level(monkeypatch):
    monkeypatch.setattr(evidence, "read", lambda file: {"runs": runs([0.9, 0.8, 0.95], "this")})
    asked = {"file": "made", "metric": "score", "where": {"label": "this"}}
    assert evidence.reaches(**asked, at_least=0.8)[0] is YES
    assert evidence.reaches(**asked, at_least=0.85)[0] is UNTOLD
    assert evidence.never_reaches(**asked, at_least=0.8)[0] is NO
    assert evidence.never_reaches(**asked, at_least=0.85)[0] is UNTOLD
    monkeypatch.setattr(evidence, "read", lambda file: {"runs": runs([0.9, 0.8], "this")})
    assert evidence.reaches(**asked, at_least=0.5)[0] is UNTOLD  # two runs show nothing
    with pytest.raises(LookupError, match="no row"):
        evidence.reaches("made", "score", {"label": "none"}, 0.5)


def test_steps_to_a_level(monkeypatch):
    looks = [[(20, 0.1), (40, 0.95)], [(20, 0.95), (40, 1.0)]]
    made = [
        {"label": label, "looks": [{"step": step, "score": s} for step, s in seen]}
        for label, seen in zip(("slow", "fast"), looks, strict=True)
        for _ in range(3)
    ]
    monkeypatch.setattr(evidence, "read", lambda file: {"runs": made})
    sides = {"this": {"label": "fast"}, "that": {"label": "slow"}}
    assert evidence.sooner("made", "score", **sides, level=0.9)[0] is LEANS_YES
    with pytest.raises(LookupError, match="not every run"):
        evidence.sooner("made", "score", **sides, level=0.99)


def test_students_t_and_welchs_interval():
    """Tables of Student's t; and equal spreads of equal size, where Welch is the pooled test."""
    for freedom, value in ((1, 12.706), (2, 4.303), (8, 2.306), (30, 2.042), (1000, 1.962)):
        assert evidence.student(freedom) == pytest.approx(value, abs=5e-4)
    low, high = evidence.interval(ABOVE, FIVE)
    half = evidence.student(8) * (2 * statistics.variance(FIVE) / 5) ** 0.5
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-9)
    assert evidence.interval([1.0], [0.5]) == (0.5, 0.5)


@pytest.mark.parametrize(
    "proposition, outcome",
    [
        ({"equal": ["count prompt_tuning gpt2 num_virtual_tokens=20", 15_360]}, YES),
        ({"equal": ["count prompt_tuning gpt2 num_virtual_tokens=20", 15_361]}, NO),
        ({"about": [{"ratio": [10, 4]}, 2.5, 0.0]}, YES),
        ({"about": [2.6, 2.5, 0.01]}, NO),
        ({"within": [{"sum": [1, 2]}, 3, 4]}, YES),
        ({"below": [{"product": [2, 3]}, 6]}, NO),
        ({"above": [7, 6]}, YES),
        ({"fact": "merged_by 1"}, NO),
        ({"no_fact": "merged_by 1"}, YES),
        ({"fact": "starts_as_the_base prefix_tuning init=zero"}, NO),
        ({"fact": "two_names prefix_tuning deep_prompt_tuning"}, NO),
        ({"fact": "touches lora InputEmbeddings"}, NO),
        ({"fact": "peft_has LoraConfig no_such_field"}, NO),
    ],
)
def test_a_proposition_can_hold_and_fail(proposition, outcome):
    found, sentence = propositions.evaluate(proposition)
    assert found is outcome and sentence.endswith(".")


def test_a_right_statement_that_fails_is_no_verdict():
    claim = replace(claims.named("S4-46"), also=({"equal": [1, 2]},))
    with pytest.raises(ValueError, match="S4-46: its right statement fails"):
        claims.check(claim)


def test_a_changed_verdict_is_found(monkeypatch, capsys):
    changed = [replace(claims.named("S4-46"), verdict="true"), claims.named("S4-47")]
    monkeypatch.setattr("peftlab.experiments.claims.__main__.load", lambda: changed)
    assert main(["--check"]) == 1
    assert "→ wrong" in capsys.readouterr().out


def test_the_table_is_filtered(capsys):
    assert main(["--lesson", "10", "--verdict", "wrong", "--decides"]) == 0
    shown = capsys.readouterr().out
    assert "S0-19!" in shown and "S0-22" not in shown and "S4-46" not in shown
    assert main(["--id", "S4-46"]) == 0
    assert "491,520" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        ({"verdict": "maybe"}, "does not go with"),
        ({"verdict": "not tested"}, "does not go with"),
        ({"check": {"open": "a run"}}, "does not go with"),
        ({"id": "S9-01"}, "does not go with"),
        ({"check": {"parts": [{"guess": 1}]}}, "not enough values"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(change, words):
    path = data_path("claims", "s0.yaml")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))[0]
    with pytest.raises(ValueError, match=words):
        claims._claim(given | change)
