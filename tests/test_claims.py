"""The claims of the sources: all there, in a form that holds, and every verdict derived anew."""

import contextlib
import copy
import itertools
import json
import re
import statistics
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

import peftlab as pl
from peftlab import attention
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
    assert pl.claims.load() is CLAIMS


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
                file = given["file"] if "file" in given else f"bench_{given['contest']}"
                assert evidence.read(file)["runs"]
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
    assert grounds["computation"] + grounds["experiment"] >= 130
    assert sum(grounds.values()) == 183
    assert f"computation {grounds['computation']}" in counts(CLAIMS)
    assert 25 <= sum(claim.decides for claim in CLAIMS) <= 35


# --- a value that changes ------------------------------------------------------------------------


def other_values(given):
    """The numbers of a proposition with the first that is computed made larger, smaller, or equal
    to another of them."""
    values = [propositions.number(each) for each in given]
    at = next(i for i, each in enumerate(given) if not isinstance(each, (int, float)))
    factors = [factor**sign for factor in (1.5, 4, 100, 1e4) for sign in (1, -1)]
    for value in [*values, values[at] + 1, *(values[at] * factor for factor in factors)]:
        yield [*values[:at], value, *values[at + 1 :]]


READ = evidence.read.__wrapped__


def changed_results(monkeypatch, change):
    """Every result file as it would be with its rows changed."""
    files = {}

    def changed(file):
        if file not in files:
            files[file] = made = copy.deepcopy(READ(file))
            for rows in made.values():
                for row in rows if isinstance(rows, list) else []:
                    if isinstance(row, dict):
                        change(row)
        return files[file]

    monkeypatch.setattr(evidence, "read", changed)


SETTINGS = {"lr", "fraction", "sparsity", "dropout", "scaling", "init_std", "alpha"}


def turned(row):
    """A score s becomes 1 − s, and a curve that falls one that does not."""
    for key, value in row.items():
        if isinstance(value, float) and key not in SETTINGS:
            row[key] = 1 - value
        elif isinstance(value, dict):
            turned(value)
        elif key == "blocks":
            row[key] = [1 - each for each in value]
        elif key == "curve":
            row[key] = [10 + i for i in range(len(value))]


DECIDING = [
    pytest.param(proposition, id=f"{claim.id}-{n}")
    for claim in CLAIMS
    if claim.decided_by in ("computation", "experiment")
    for n, proposition in enumerate(claim.propositions)
    if propositions.evaluate(proposition)[0] in (YES, NO)
    and "fact" not in claims.kind_of(proposition)
]


def a_tenth(row):
    """A score becomes a tenth of it."""
    for key, value in row.items():
        if isinstance(value, float) and key not in SETTINGS:
            row[key] = value / 10
        elif key == "blocks":
            row[key] = [each / 10 for each in value]


EVERY = [each for claim in CLAIMS for each in (*claim.propositions, *claim.also)]
FACTS = sorted({each[kind] for each in EVERY if "fact" in (kind := claims.kind_of(each))})
RECORDED = sorted(
    {call for each in EVERY for call in called(each) if call.split()[0] in ("result", "entry")}
)


@pytest.mark.parametrize("proposition", DECIDING)
def test_a_changed_value_changes_the_answer(proposition, monkeypatch):
    """A number is multiplied, a recorded score taken from one: the answer of every proposition that
    decides a claim is then another. For facts see below."""
    kind, before = claims.kind_of(proposition), propositions.evaluate(proposition)[0]
    if kind in propositions.COMPARISONS:
        after = {propositions.evaluate({kind: v})[0] for v in other_values(proposition[kind])}
        assert after - {before}
        return
    after = set()
    for change in (turned, a_tenth):
        changed_results(monkeypatch, change)
        after.add(propositions.evaluate(proposition)[0])
    assert after - {before}


@pytest.mark.parametrize("call", RECORDED)
def test_a_recorded_number_is_that_of_the_file(call, monkeypatch):
    """With what lies in the file three times as large, so is the number."""
    kind, file, *path = call.split()
    metric = path[0].replace(":", " ").split(".")
    made = copy.deepcopy(evidence.read(file))
    rows = next((word.split("=")[1] for word in path if word.startswith("rows=")), "runs")
    for row in made[rows] if kind == "result" else [made]:
        *outer, last = metric if kind == "result" else path
        for name in outer:
            row = row.get(name, {})
        if row.get(last) is not None:
            row[last] *= 3
    before = propositions.number(call)
    monkeypatch.setattr(evidence, "read", lambda _: made)
    assert propositions._called.__wrapped__(quantities, call) == pytest.approx(3 * before)


def drifting(monkeypatch):
    """Every call of the model gives other logits than the one before."""
    logits, calls = facts.logits, itertools.count()
    monkeypatch.setattr(facts, "logits", lambda *given: logits(*given) + 0.1 * next(calls))


def patched(name, value):
    return lambda monkeypatch: monkeypatch.setattr(facts, name, value)


class NoModel(facts.Wrapper):
    """Holds the model outside its parts, and puts no other module to training."""

    def __init__(self, model):
        torch.nn.Module.__init__(self)
        self.__dict__["model"] = model
        self.prompt = torch.nn.Parameter(torch.zeros(facts.P, 8))


def softmax_over_queries(query, key, value):
    return (query @ key.T).softmax(dim=0) @ value


def gate_that_is_off(monkeypatch):
    monkeypatch.setattr(facts.probes, "gate", lambda record: SimpleNamespace(error=0.1))


def attention_as_before(monkeypatch):
    """Under the prompt the text reads itself as without it, and no virtual token."""
    recorded, seen = attention.recorded, []

    @contextlib.contextmanager
    def same(*given):
        with recorded(*given) as records:
            seen.append(records)
            plain = seen[0] if len(seen) > 1 else None
            wide = (facts.P, 0, facts.P, 0)
            yield (
                plain
                and {
                    name: SimpleNamespace(weights=torch.nn.functional.pad(record.weights, wide))
                    for name, record in first.items()
                }
                or records
            )
        if len(seen) == 1:
            first.update(records)

    first = {}
    monkeypatch.setattr(attention, "recorded", same)


def bases_in_turn(monkeypatch):
    """The first base asked for is another one."""
    others = itertools.chain([facts.base_named("tiny-bert")], itertools.repeat(None))
    named = facts.base_named
    monkeypatch.setattr(facts, "base_named", lambda name: next(others) or named(name))


def blocks_give_another_type(monkeypatch):
    class Other(torch.Tensor):
        pass

    base = facts.base_named("tiny-bert")
    block = next(iter(base.anatomy.layers.values()))[0]
    hook = block.register_forward_hook(lambda *seen: seen[-1].as_subclass(Other))
    monkeypatch.setattr(facts, "ids", lambda *given, ids=facts.ids: (hook, ids(*given))[1])
    return hook


def one_layer_short(monkeypatch):
    """The method's keys and values are those of all layers but one."""

    @contextlib.contextmanager
    def short(*given, **options):
        with ATTACHED(*given, **options) as tuned:
            P_k, P_v = tuned.prefix
            yield SimpleNamespace(prefix=(P_k[1:], P_v[1:]), anatomy=tuned.anatomy)

    monkeypatch.setattr(facts, "attached", short)


def factors_swapped(monkeypatch):
    delta = facts._delta

    def swapped(tuned):
        found = delta(tuned)
        return SimpleNamespace(A=found.B, B=found.A, delta_weight=found.delta_weight)

    monkeypatch.setattr(facts, "_delta", swapped)


STEP, ATTACHED, P_TUNING = facts.step, facts.attached, facts.PTuning
nothing = patched("step", lambda *_, **__: None)
SPOILED = {
    "alpha_is_a_rate": patched("step", lambda tuned, **_: STEP(tuned)),
    "attention_is_scaled": lambda m: m.setattr(
        attention, "attention_weights", lambda q, k, *_: q @ k.transpose(-1, -2)
    ),
    "can_be_placed": patched("PTuning", lambda n, e, placement: P_TUNING(n, e)),
    "composes": patched("logits", lambda *_: torch.tensor(float("nan"))),
    "encoder_over_the_length": "P=1",
    "factors_are_renamed": "r=6",
    "gradient_crosses_the_base": lambda m: m.setattr(
        torch.autograd, "grad", lambda loss, inputs, **_: [torch.zeros_like(inputs[0])]
    ),
    "growing_prompts_are_blind": lambda m: m.setattr(torch, "equal", lambda *_: False),
    "layers_return_tensors": blocks_give_another_type,
    "leaves_the_base": nothing,
    "lora_product_of_shapes": factors_swapped,
    "lora_starts_with_b": patched("attached", lambda name: ATTACHED(name, moved=True)),
    "lstm_refuses_indices": lambda m: m.setattr(torch.nn, "LSTM", lambda *_: lambda given: given),
    "mask_is_a_product": patched("Prune", lambda _: pl.Prune(0.0)),
    "mask_saves_nothing": bases_in_turn,
    "loop_piles_up_gradients": "mended=true",
    "hooked_prompts_outgrow_the_mask": "mended=true",
    "plain_class_hides_its_prompts": "mended=true",
    "merged_by": "3",
    "merging_keeps_the_output": drifting,
    "network_can_go": drifting,
    "peft_has": "no_such_field",
    "prefix_is_a_gate": gate_that_is_off,
    "prompt_changes_attention": attention_as_before,
    "prompt_is_its_own_prefix": drifting,
    "prompt_is_prepended": lambda m: m.setattr(facts, "CLOSE", 0.0) or drifting(m),
    "prompt_leaves_the_vocabulary": nothing,
    "prompt_starts_with_words": patched(
        "PromptTuning", lambda n, **_: pl.PromptTuning(n, init="normal")
    ),
    "queries_take_no_prefix": lambda m: m.setattr(
        torch.nn.functional, "scaled_dot_product_attention", softmax_over_queries
    ),
    "rank_is_at_most": patched("attached", lambda name, **_: ATTACHED(name, moved=True, r=4)),
    "reaches_layers": one_layer_short,
    "rows_mix": drifting,
    "saves_and_fits_its_base": drifting,
    "starts_as_the_base": drifting,
    "touches": "InputEmbeddings LinearWeight",
    "two_names": drifting,
    "updates_all": nothing,
    "wrapper_wakes_dropout": patched("Wrapper", NoModel),
    "wrappers_store_the_base_each": patched("Wrapper", NoModel),
}


@pytest.mark.parametrize("call", FACTS)
def test_a_fact_can_fail(call, monkeypatch):
    """With the model spoiled, or asked for something else, the same look at it says no."""
    name, called = call.split()[0], propositions._called.__wrapped__
    spoil = SPOILED[name]
    assert called(facts, call)[0] or name in {"touches", "two_names", "merged_by", "peft_has"}
    if isinstance(spoil, str):
        words = [word for word in call.split() if name != "merged_by" or word == name]
        assert not called(facts, " ".join([*words, spoil]))[0]
        return
    hook = spoil(monkeypatch)
    try:
        assert not called(facts, call)[0]
    finally:
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize(
    "claim",
    [claim for claim in CLAIMS if claim.decided_by in ("computation", "experiment")],
    ids=lambda claim: claim.id,
)
def test_another_answer_is_another_verdict(claim):
    outcomes = list(claims.check(claim).outcomes)
    other = {YES: NO, NO: YES}
    verdicts = {
        claims.verdict(claim.how, [*outcomes[:at], other[each], *outcomes[at + 1 :]])
        for at, each in enumerate(outcomes)
        if each in other
    }
    assert verdicts - {claim.verdict}


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
        ("cases", [LEANS_YES, LEANS_NO], "disputed"),
        ("cases", [LEANS_NO, LEANS_NO], "disputed"),
        ("cases", [UNTOLD], "disputed"),
        ("cases", [NO, LEANS_NO], "wrong"),
        ("cases", [YES, UNTOLD], "disputed"),
        ("cases", [YES, YES], "true"),
        ("cases", [YES, LEANS_NO], "disputed"),
        ("cases", [NO, LEANS_YES], "wrong"),
        ("cases", [YES, NO, LEANS_NO], "depends"),
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


SIX = ("best", "good", "middle", "poor", "last", "late")


def contest(scores, inside=True, curves=None):
    """A contest of the bench with these scores by label, (seeds,) each; its test has no noise."""
    runs = [
        {"label": label, "seed": n, "exact": score, "blocks": [score] * 20}
        | {"curve": (curves or {}).get(label, [1.0] * 25)}
        for label, several in scores.items()
        for n, score in enumerate(several)
    ]
    entries = {label: {"lr": 0.1, "inside": {"lr": inside}} for label in scores}
    known = {"main": "exact", "steps": 100, "dev examples": 100}
    return known | {"runs": runs, "entries": entries}


@pytest.fixture
def held(monkeypatch):
    """`played` or another comparison on a contest that is made."""

    def of(made, comparator=evidence.played, **options):
        monkeypatch.setattr(evidence, "read", lambda file: made)
        return comparator("made", **options)[0]

    return of


def test_a_contest_decides_by_its_corrected_verdicts(held):
    made = contest({"best": ABOVE, "good": [s - 0.01 * (n % 2) for n, s in enumerate(ABOVE)]})
    made |= contest({"best": ABOVE, "last": FIVE})
    assert held(made, this="best", that="last") is YES
    assert held(made, this="last", that="best") is NO
    assert held(made, this="last", that="best", times=0.5) is YES
    assert held(made, this="best", that="last", times=2) is NO
    assert held(contest({"best": ABOVE, "last": FIVE}, inside=False), this="best", that="last") is (
        UNTOLD
    )
    few = contest({"best": ABOVE, "last": FIVE}) | {"dev examples": 99}
    assert held(few, this="best", that="last") is UNTOLD
    with pytest.raises(ValueError, match="at least 5"):
        held(contest({"best": ABOVE[:4], "last": FIVE[:4]}), this="best", that="last")


def test_many_pairs_make_a_contest_careful(held):
    """What two entries alone would tell, fifteen pairs do not."""
    near = [0.69, 0.72, 0.70, 0.71, 0.70]
    noise = [0.01, 0.03, 0.02, 0.01, 0.03]
    pair = {"best": [a + b for a, b in zip(near, noise, strict=True)], "good": near}
    assert held(contest(pair), this="best", that="good") is YES
    assert held(contest(pair), this="best", that="good", times=1.001) is YES
    many = contest(pair | dict.fromkeys(SIX[2:], near))
    assert held(many, this="best", that="good") is UNTOLD
    assert held(many, this="best", that="good", times=1.001) is UNTOLD


def test_which_learns_sooner(held):
    curves = {"best": [2.0, 0.5, 0.05], "last": [2.0, 2.0, 0.5]}
    made = contest({"best": ABOVE, "last": FIVE}, curves=curves)
    asked = dict(comparator=evidence.learns_sooner, this="best", that="last")
    assert held(made, **asked, level=0.1) is YES  # the other one never does
    assert held(made, **asked | {"this": "last", "that": "best"}, level=0.1) is NO
    assert held(made, **asked, level=3.0) is UNTOLD  # both from the first part on
    made = contest({"best": ABOVE, "last": FIVE}, inside=False, curves=curves)
    assert held(made, **asked, level=0.1) is UNTOLD


def test_a_contest_takes_the_place_of_an_older_comparison():
    found = evidence.everywhere("P-tuning v2", "LoRA", only=["facts"])
    assert found == [
        {
            "played": {
                "contest": "facts",
                "this": "Prefix tuning (P-tuning v2)",
                "that": "LoRA",
                "times": 1.0,
            }
        }
    ]
    asked = [next(iter(each)) for each in evidence.everywhere("QLoRA", "LoRA")]
    assert set(asked) <= {"played", "higher"} and len(asked) == len(evidence.TASKS)


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
