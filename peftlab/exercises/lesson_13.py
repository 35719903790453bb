"""Lesson 13, the showdown: a bet, a rate that is inside, a difference by seeds, who is beaten."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import sqrt

from peftlab.bench.results import Result
from peftlab.exercises import Verdict, exercise, question
from peftlab.exercises.forms import a_number, expect

RUNNERS = (
    "Prompt tuning",
    "Prefix tuning (P-tuning v2)",
    "(IA)³",
    "LoRA",
    "Houlsby adapter",
    "Full fine-tuning",
)


# --- the bet -----------------------------------------------------------------------------------
def _bet(ranking) -> list[str]:
    """The six in the order of a bet. Raises ValueError with what is wrong."""
    if not isinstance(ranking, list | tuple) or not all(isinstance(r, str) for r in ranking):
        raise ValueError(f"a bet is a list of names: {', '.join(RUNNERS)}")
    if unknown := [name for name in ranking if name not in RUNNERS]:
        raise ValueError(f"{unknown[0]!r} does not run; these do: {', '.join(RUNNERS)}")
    if twice := [name for name in RUNNERS if ranking.count(name) > 1]:
        raise ValueError(f"{twice[0]} stands twice in the bet")
    if missing := [name for name in RUNNERS if name not in ranking]:
        raise ValueError(f"the bet has no place for {missing[0]}")
    return list(ranking)


def bet(ranking=None) -> Verdict:
    """Take a bet: the six runners, the best first."""
    if ranking is None or ranking is ...:
        return Verdict("open", "Your bet: not placed yet")
    try:
        return Verdict("passed", f"Your bet: {' > '.join(_bet(ranking))}. Section 5 settles it.")
    except ValueError as error:
        return Verdict("wrong", f"Your bet: {error}")


def settle(ranking, result: Result) -> Verdict:
    """What a bet was worth: over the pairs that are told apart, how many stand as they were bet."""
    if ranking is None or ranking is ...:
        return Verdict("open", f"{result.main.replace('_', ' ')}: no bet to settle")
    try:
        order = _bet(ranking)
    except ValueError as error:
        return Verdict("wrong", f"Your bet: {error}")
    better = result.comparisons.set_index("label").better_than
    right, wrong, open_ = [], [], 0
    for first, second in combinations(order, 2):
        if second in better[first]:
            right.append((first, second))
        elif first in better[second]:
            wrong.append((first, second))
        else:
            open_ += 1
    said = (
        f"{result.main.replace('_', ' ')}: {len(right)} of {len(right) + len(wrong)} pairs that "
        f"are told apart stand as you bet; {open_} pairs nobody can tell apart"
    )
    if wrong:
        first, second = wrong[0]
        said += f". You had {first} before {second}"
    return Verdict("wrong" if wrong else "passed", said)


# --- predict first -----------------------------------------------------------------------------
@question(
    "Two methods are equally good, so each seed is won by either with the same chance. A paper "
    "compares them on three seeds, and one wins all three. How often does that happen?",
    {
        "a": ("never: three of three is a clear result", "It needs three equal tosses of a coin."),
        "b": ("in 1 of 20 comparisons", "That is what a test at 5% would promise."),
        "c": ("in 1 of 8", "So often wins one that you named before. Either may win all three."),
        "d": ("in 1 of 4", "The second seed agrees with the first in one of two cases, the third "
         "as well."),
    },
)  # fmt: skip
def three_of_three():
    chance = 2 * 0.5**3
    letter = {0.05: "b", 0.125: "c", 0.25: "d"}[chance]
    return letter, (
        f"2 × (1/2)³ = {chance:g}. With five seeds it is 2 × (1/2)⁵ = {2 * 0.5**5:g}, still more "
        "than 1 in 20: so a verdict needs how large the differences are, not who won."
    )


@question(
    "Each method of a comparison gets one and the same learning rate, 0.01, 'to be fair'. At their "
    "own best rates LoRA and DoRA both learn all the facts. What does the comparison say of them?",
    {
        "a": ("LoRA is ahead by more than 50 points", "Which of the two stands a large rate?"),
        "b": ("DoRA is ahead by more than 50 points", "It still learns at 0.01, LoRA does not."),
        "c": ("they are level", "At rates of their own they are. At 0.01?"),
        "d": ("both learn nothing", "One of the two still learns all the facts."),
    },
)  # fmt: skip
def one_rate_for_all():
    from peftlab.bench import results

    tried = results.read("facts").tried
    at = tried[tried.lr == 0.01].groupby("label").new_facts.mean()
    lead = at["DoRA"] - at["LoRA"]
    letter = "b" if lead > 0.5 else "a" if lead < -0.5 else "c" if at["DoRA"] > 0.5 else "d"
    return letter, (
        f"On dev DoRA has {at['DoRA']:.0%} at 0.01, LoRA {at['LoRA']:.0%}. The gap was made by "
        "the rate."
    )


# --- a rate that is inside ---------------------------------------------------------------------
SEARCHES = (
    {0.001: 0.80, 0.003: 0.99, 0.01: 0.09},
    {0.001: 0.81, 0.003: 0.90, 0.01: 0.99},
    {0.01: 0.41, 0.03: 0.33, 0.1: 0.12},
    {0.1: 0.65, 0.01: 0.08, 1.0: 0.48, 0.3: 0.70, 0.03: 0.33},
    {0.3: 0.90, 0.01: 0.50, 0.1: 0.20},
    {0.003: 0.77},
)


def next_rate_solution(scores):
    best = max(scores, key=scores.get)
    if best == max(scores):
        return "larger"
    if best == min(scores):
        return "smaller"
    return best


def _of_ends(larger="larger", smaller="smaller", order=sorted):
    def wrong(scores):
        rates = list(order(scores))
        best = max(scores, key=scores.get)
        if best == rates[-1]:
            return larger if larger is not None else best
        if best == rates[0]:
            return smaller if smaller is not None else best
        return best

    return wrong


@exercise(
    "Is the best rate inside?", solution=next_rate_solution, difficulty=2, importance=5, minutes=7,
    mistakes=(
        (lambda scores: max(scores, key=scores.get),
         "the best of what was tried is no result while it stands at an end"),
        (_of_ends(smaller=None), "the smallest rate is an end, too: the next one is smaller"),
        (_of_ends(larger=None), "the largest rate is an end, too: the next one is larger"),
        (_of_ends("smaller", "larger"), "if the largest rate is best, go on to a larger one"),
        (_of_ends(order=list),
         "rates come in any order: compare with the smallest and largest, not the first and last"),
        (lambda scores: max(scores.values()), "return the rate, not its score")),
    praise="all six searches are right: a rate at an end is never the answer",
    otherwise="one of the six searches ends otherwise: {case}, where you return {given}",
    hints=(
        "`max(scores, key=scores.get)` is the best rate.",
        "Compare it with `max(scores)` first, then with `min(scores)`."),
)  # fmt: skip
def next_rate(answer):
    found = {}
    for scores in SEARCHES:
        made = answer(dict(scores))
        told = made.strip().lower() if isinstance(made, str) else float(a_number(made))
        found[str(scores)] = told
    return found


# --- a difference by seeds ---------------------------------------------------------------------
A, B = (0.96, 0.71, 0.55, 0.57, 0.02), (0.31, 0.0, 0.0, 0.0, 0.82)


def paired_solution(a, b):
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean, sqrt(variance / n)


def _spread(divide_by_n=False, one_run=False, unpaired=False, deviation=False):
    def wrong(a, b):
        n = len(a)

        def variance(values):
            mean = sum(values) / n
            return sum((v - mean) ** 2 for v in values) / (n if divide_by_n else n - 1)

        differences = [x - y for x, y in zip(a, b, strict=True)]
        whole = variance(a) + variance(b) if unpaired else variance(differences)
        return sum(differences) / n, sqrt(whole) if one_run else sqrt(whole / n)

    return wrong


@exercise(
    "A difference and its error", solution=paired_solution, difficulty=3, importance=4, minutes=10,
    mistakes=(
        (_spread(unpaired=True),
         "pair them first: with one seed both methods saw the same batches, so take differences "
         "seed by seed"),
        (_spread(one_run=True),
         "that is how far single differences scatter; the mean of n scatters less, by √n"),
        (_spread(divide_by_n=True),
         "divide the squares by n − 1: the mean was taken from the same n differences"),
        (lambda a, b: tuple(x * f for x, f in zip(paired_solution(a, b), (-1, 1), strict=True)),
         "a − b, not b − a")),
    praise="mean and standard error are right: they tell a verdict from chance",
    otherwise=lambda given, right: (
        f"the mean is {given[0]:.4f} and should be {right[0]:.4f}"
        if abs(given[0] - right[0]) > 1e-6
        else f"the standard error is {given[1]:.4f} and should be {right[1]:.4f}"
    ),
    again=((0.9, 0.8, 0.65, 0.7, 0.85, 0.75, 0.95), (0.5, 0.65, 0.6, 0.55, 0.7, 0.3, 0.45)),
    hints=(
        "Five differences, one for each seed. Then their mean.",
        "Standard error: the root of (sum of squared distances from the mean / (n − 1)) / n."),
)  # fmt: skip
def paired(answer, a=A, b=B):
    words = "return two things: the mean difference and its standard error"
    mean, error = several_numbers(answer(list(a), list(b)), words)
    return mean, error


def several_numbers(made, words: str) -> list[float]:
    """Two numbers that an answer returned; else the words are said."""
    expect(isinstance(made, list | tuple) and len(made) == 2, words)
    return [float(a_number(each)) for each in made]


# --- who is beaten -----------------------------------------------------------------------------
POINTS = {
    "Prompt tuning": (3_840, 0.03),
    "LayerNorm tuning": (4_992, 0.24),
    "(IA)³": (6_912, 0.74),
    "BitFit": (12_864, 0.14),
    "LoRA": (165_888, 1.0),
    "QLoRA": (165_888, 1.0),
    "Houlsby adapter": (297_984, 1.0),
    "Full fine-tuning": (3_111_936, 1.0),
}
MORE = {"a": (5, 0.5), "b": (5, 0.4), "c": (7, 0.5), "d": (2, 0.1), "e": (9, 0.9), "f": (2, 0.1)}


def not_dominated_solution(points):
    front = []
    for name, (cost, score) in points.items():
        beaten = any(
            c <= cost and s >= score and (c < cost or s > score) for c, s in points.values()
        )
        if not beaten:
            front.append(name)
    return front


def _beaten_if(rule):
    def wrong(points):
        return [
            name
            for name, mine in points.items()
            if not any(rule(other, mine) for key, other in points.items() if key != name)
        ]

    return wrong


@exercise(
    "Who is not beaten?", solution=not_dominated_solution, difficulty=3, importance=4, minutes=10,
    mistakes=(
        (_beaten_if(lambda o, m: o[0] < m[0] and o[1] > m[1]),
         "as good for less beats, too: one of the two has to be strictly better, not both"),
        (_beaten_if(lambda o, m: o[0] <= m[0] and o[1] >= m[1]),
         "two with the same cost and the same score do not beat each other"),
        (_beaten_if(lambda o, m: o[1] > m[1]),
         "a higher score alone beats nobody: it may cost more"),
        (_beaten_if(lambda o, m: o[0] < m[0]),
         "a lower cost alone beats nobody: it may score less"),
        (_beaten_if(lambda o, m: o[0] >= m[0] and o[1] >= m[1] and o != m),
         "the points are (cost, score): a low cost is good")),
    praise="{right} are not beaten",
    otherwise="these are not the ones that nobody beats: {given}", again=(MORE,),
    hints=(
        "For one point, look at all others: is there one that costs no more and scores no less?",
        "And is one of the two strictly better? Else it is only a twin."),
)  # fmt: skip
def not_dominated(answer, points=POINTS):
    return sorted(str(name) for name in answer(dict(points)))


# --- many tenants ------------------------------------------------------------------------------
def held_solution(base, own, customers, shared):
    if shared:
        return base + customers * own
    return customers * base


@exercise(
    "What a server holds", solution=held_solution, difficulty=1, importance=3, minutes=5,
    mistakes=(
        (lambda base, own, n, shared: n * (base + own) if shared else n * base,
         "the base is shared: it is there once, whatever the number of customers"),
        (lambda base, own, n, shared: base + n * own,
         "merged, every customer has a whole model of their own: no base is shared"),
        (lambda base, own, n, shared: base + n * own if shared else n * (base + own),
         "merged, the own part has gone into the weights: it takes no bytes of its own"),
        (lambda base, own, n, shared: base + own if shared else base,
         "the number of customers is missing")),
    praise="right for a shared base and for merged ones",
    otherwise="with (shared, customers) = {case} it is {right:,}, not {given:,}",
    again=(1_000_003, 1_009, (1, 3)),
    hints=("A merged model is as large as the base.", "Shared: once the base, n times the rest."),
)  # fmt: skip
def held(answer, base=16_000_007, own=42_013, counts: Sequence[int] = (1, 7, 50)):
    cases = [(shared, n) for shared in (True, False) for n in counts]
    return {str(case): a_number(answer(base, own, case[1], case[0])) for case in cases}
