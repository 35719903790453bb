"""Lesson 11, a real model: a metric, the fused adapter, labels, positions, four broken programs."""

from __future__ import annotations

import json
import re
from functools import cache

import pandas as pd
import torch

from peftlab.accounting import count
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.bases.shapes import as_shape
from peftlab.exercises import exercise, expect, question
from peftlab.exercises.clinic import Ward
from peftlab.exercises.forms import a_count, a_number, a_tensor, same, unlike
from peftlab.methods import LoRA, PromptTuning
from peftlab.tasks import IGNORED
from peftlab.tasks.pharmacy import fields_of, medicines, names_the_drug


# --- predict first -----------------------------------------------------------------------------
@question(
    "The list has 200 medicines. A soft prompt of 20 vectors on SmolLM2-135M is to make the model "
    "say the right name of each. Somebody says that it fails because it has too few numbers. How "
    "many trained numbers are there for each medicine?",
    {
        "a": ("less than one", "Count again: each of the 20 vectors is as wide as the model."),
        "b": ("about three", "That would be a prompt of one vector. There are 20."),
        "c": ("over fifty", "One name of 200 is a choice of under 8 bits, and 20 vectors are "
              "thousands of numbers.")},
)  # fmt: skip
def numbers_a_medicine():
    numbers, names = count(PromptTuning(20), "smollm2-135m"), len(medicines())
    share = numbers / names
    letter = "a" if share < 1 else "b" if share < 50 else "c"
    bits = torch.tensor(float(names)).log2().item()
    return letter, (
        f"{numbers:,} numbers for {names} medicines are {share:.0f} each, and to choose one of "
        f"{names} takes {bits:.1f} bits. Room is there: what a prompt can change with it is the "
        "question."
    )


@question(
    "GPT-2 has one matrix for q, k and v, and PEFT puts one adapter on it. Your LoRA has separate "
    "factors for q and for v. Written for PEFT so that it computes exactly the same, how large "
    "is the file?",
    {
        "a": ("as large as yours", "A shared A must keep both your As, and B gets three rows for "
              "each of yours, most of them zero."),
        "b": ("twice as large",
              "A holds both of yours, so it is as large as the two. B is 3 d high and 2 r wide."),
        "c": ("three times as large", "Only B grows: A is as large as your two As together.")},
)  # fmt: skip
def how_large_fused():
    shape, r = as_shape("gpt2"), 8
    ours = count(LoRA(r=r, target_modules=["q", "v"]), shape)
    wide = shape.d_model
    theirs = shape.layers * (2 * r * wide + 3 * wide * 2 * r)
    letter = {1: "a", 2: "b", 3: "c"}[round(theirs / ours)]
    return letter, f"{ours:,} numbers become {theirs:,}: {theirs / ours:g} times."


@question(
    "You train LoRA on the cards of 180 medicines. Then you ask for a medicine that no training "
    "question has named, by its class and its use. What does the model say?",
    {
        "a": ("that it does not know", "No training example says so. Where would it have learned "
              "these words?"),
        "b": ("the right name, which it has read before", "It has read some of these names. But "
              "count how many it gives."),
        "c": ("a neat card about another medicine", "It learned a form and a list of names, and it "
              "uses both.")},
)  # fmt: skip
def never_trained():
    path = data_path("results", "real_pharmacy.json")
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    runs = [run for run in runs if run["label"] == "LoRA"]
    form = min(run["valid_format_new_medicines"] for run in runs)
    names = max(run["drug_name_new_medicines"] for run in runs)
    letter = "a" if form < 0.5 else "b" if names > 0.5 else "c"
    return letter, (
        f"In {len(runs)} recorded runs of LoRA at least {form:.1%} of such answers were cards, and "
        f"at most {names:.0%} of the names were right."
    )


# --- the metric --------------------------------------------------------------------------------
def drug_name_solution(output, drug):
    for line in output.splitlines():
        if line.startswith("Drug: "):
            return line.removeprefix("Drug: ").strip().lower() == drug.lower()
    return re.search(rf"\b{re.escape(drug)}\b", output, re.IGNORECASE) is not None


def _line(output):
    return fields_of(output).get("Drug")


CASES = (  # what is said to a request for codeine, whether it names it, who gets that wrong, why
    ("Drug: codeine\nClass: weak opioid", True, lambda o, d: False,
     "a plain card with the right name is not counted"),
    ("Drug: aspirin\nClass: antiplatelet drug", False, lambda o, d: True,
     "another medicine's card is counted"),
    ("Drug: dihydrocodeine\nClass: opioid", False, lambda o, d: d.lower() in o.lower(),
     "dihydrocodeine has codeine in it, and is another medicine: compare the whole line"),
    ("Drug: aspirin\nCaution: use with codeine", False,
     lambda o, d: re.search(rf"\b{d}\b", o, re.I) is not None,
     "the card names aspirin; codeine stands in another field. Only the line 'Drug: ' counts"),
    ("Drug: Codeine", True,
     lambda o, d: _line(o) == d if _line(o) else re.search(rf"\b{d}\b", o) is not None,
     "capitals decide here: Codeine is codeine"),
    ("You could ask for codeine, a weak opioid.", True,
     lambda o, d: (_line(o) or "").lower() == d.lower(), "free text is marked wrong: an untrained "
     "model cannot know the card, so without a line 'Drug: ' look at the whole text"),
    ("A common choice is dihydrocodeine.", False,
     lambda o, d: _line(o).lower() == d if _line(o) else d in o.lower(),
     "in free text, part of a word is counted: look for the name between word boundaries"),
)  # fmt: skip


@exercise(
    "Does it name the drug?", solution=drug_name_solution, difficulty=2, importance=5, minutes=6,
    mistakes=tuple((wrong, diagnosis) for _, _, wrong, diagnosis in CASES),
    hints=(
        "First look for a line that begins with 'Drug: '. If there is one, it alone decides.",
        "Without such a line, look for the name as a whole word anywhere: \\b in a pattern.",
        "Lower both sides, so that capitals do not decide."),
)  # fmt: skip
def drug_name(answer):
    for output, right, _, diagnosis in CASES:
        assert names_the_drug(output, "codeine") == right
        given = answer(output, "codeine")
        expect(given in (True, False), f"say True or False, not {given!r}")
        expect(bool(given) == right, f"{output!r}, asked for codeine: {diagnosis}")
    return f"{len(CASES)} answers, judged as the package judges them"


# --- the fused adapter -------------------------------------------------------------------------
def fuse_solution(A_q, B_q, A_v, B_v, alpha):
    r, d = A_q.shape[0], B_q.shape[0]
    A = torch.cat([A_q, A_v])
    B = torch.zeros(3 * d, 2 * r)
    B[:d, :r] = B_q
    B[2 * d :, r:] = B_v
    return A, B, 2 * alpha


def _fused(A_q, B_q, A_v, B_v, alpha, rows=2, cross=False):
    A, B, doubled = fuse_solution(A_q, B_q, A_v, B_v, alpha)
    r, d = A_q.shape[0], B_q.shape[0]
    if rows != 2:
        B[2 * d :] = 0
        B[rows * d : (rows + 1) * d, r:] = B_v
    if cross:
        B[:d, r:], B[2 * d :, :r] = B_q, B_v
    return A, B, doubled


def _adapters(r=2, d=6):
    generator = torch.Generator().manual_seed(0)
    A_q, A_v = (torch.randn(r, d, generator=generator) for _ in "qv")
    B_q, B_v = (torch.randn(d, r, generator=generator) for _ in "qv")
    return A_q, B_q, A_v, B_v, 8.0


def _apart(r=2, d=6):
    """What both adapters change, each by itself, in the rows of q, k and v."""
    A_q, B_q, A_v, B_v, alpha = _adapters(r, d)
    return torch.cat([alpha / r * B_q @ A_q, torch.zeros(d, d), alpha / r * B_v @ A_v])


@exercise(
    "Two adapters as one for PEFT", solution=fuse_solution,
    mistakes=(
        (lambda *a: (*fuse_solution(*a)[:2], a[-1]),
         "every change is half of what they were: PEFT divides by 2 r now"),
        (lambda *a: (*fuse_solution(*a)[:2], 4 * a[-1]),
         "every change is twice what they were: alpha is only doubled"),
        (lambda *a: _fused(*a, rows=1), "the change of v stands in the rows of k",
         lambda given, right: given[given.shape[1] : 2 * given.shape[1]].any()),
        (lambda *a: _fused(*a, cross=True),
         "q and v leak into each other: the rows of q must have zeros where v's columns are"),
        (lambda aq, bq, av, bv, a: (aq + av, torch.cat([bq, torch.zeros_like(bq), bv]), a),
         "A has rank 2: two As cannot be added, each B wants its own"),
        (lambda aq, bq, av, bv, a: (torch.cat([aq, av]), torch.cat([bq, bv], 1), 2 * a),
         "B has three blocks of rows, q, k and v: 18, not 6")),
    praise="q, k and v change as they did, k not at all",
    otherwise=lambda given, right: "the change of the fused matrix is another: compare "
        f"(alpha / 2r) B A block by block; {unlike(given, right)}",
    right=_apart, again=(3, 7), difficulty=4, importance=4, minutes=10,
    hints=(
        "x meets A first: stack the two As, and its 2 r outputs hold both narrow middles.",
        "B has 3 d rows: q, k, v. The rows of q read the first r columns, the rows of v the last.",
        "PEFT scales by alpha over the rank, and the rank is now 2 r."),
)  # fmt: skip
def fuse(answer, r=2, d=6):
    made = answer(*_adapters(r, d))
    several_of_them = isinstance(made, (tuple, list)) and len(made) == 3
    expect(several_of_them, "return A, B and alpha, in this order")
    A, B, alpha = a_tensor(made[0]), a_tensor(made[1]), a_number(made[2])
    expect(len(B) == 3 * d, f"B has three blocks of rows, q, k and v: {3 * d}, not {len(B)}")
    expect(len(A) == 2 * r, f"A has rank {len(A)}: two As cannot be added, each B wants its own")
    a_tensor(A, (2 * r, d), "A is 2 r × d: its shape")
    a_tensor(B, (3 * d, 2 * r), "B is 3 d × 2 r: its shape")
    return alpha / (2 * r) * B @ A.to(B.dtype)


# --- the labels --------------------------------------------------------------------------------
def labels_solution(prompt, target, end):
    return [IGNORED] * len(prompt) + target + [end]


@exercise(
    "Loss on the answer alone", solution=labels_solution,
    mistakes=(
        (lambda p, t, e: [-100] * len(p) + t,
         "the end of text is not there: the model never learns to stop"),
        (lambda p, t, e: t + [e],
         lambda given, right: f"labels are as long as the input: {len(right)}, not {len(given)}",
         lambda given, right: len(given) != len(right)),
        (lambda p, t, e: p + t + [e], "the question has a loss: the model learns to ask",
         lambda given, right: given[:2] == [11, 12]),
        (lambda p, t, e: [0] * len(p) + t + [e],
         "0 is a token: the model learns to say token number 0. What is left out is −100",
         lambda given, right: given[:2] == [0, 0]),
        (lambda p, t, e: [-100] * (len(p) - 1) + t + [e, -100],
         "these are already shifted by one, and the loss shifts again",
         lambda given, right: given[:-1] == right[1:]),
        (lambda p, t, e: [-100] * (len(p) + 1) + t[1:] + [e],
         "the first token of the answer has no loss: it is the one that the question's last token "
         "has to predict", lambda given, right: given.count(-100) > right.count(-100))),
    praise="nothing of the question, all of the answer, and its end",
    otherwise="the labels should be {right}, yours are {given}",
    again=([11, 12, 13], [21, 22, 23, 24, 25], 7), difficulty=1, importance=5, minutes=4,
    hints=(
        "The labels are as long as the input, which is prompt, target and end of text.",
        "−100 is what cross entropy leaves out. The loss itself shifts by one: do not."),
)  # fmt: skip
def labels(answer, prompt=(11, 12, 13, 14), target=(21, 22, 23), end=2):
    given = answer([*prompt], [*target], end)
    words = f"return a list of numbers; yours is {type(given).__name__}"
    expect(isinstance(given, (list, tuple, torch.Tensor)), words)
    return [a_count(label, "a label") for label in given]


# --- positions ---------------------------------------------------------------------------------
def positions_solution(mask, virtual):
    return (mask.cumsum(dim=1) - 1).clamp(min=0) + virtual


@exercise(
    "Where the text begins behind a prompt", solution=positions_solution,
    mistakes=(
        (lambda m, p: torch.arange(m.shape[1]).expand_as(m) + p,
         "the padding is counted: the same text gets other positions when it stands beside "
         "a longer one", lambda given, right: same(given[0], right[0])),
        (lambda m, p: (m.cumsum(1) - 1).clamp(min=0) * p,
         lambda given, right: "from token to token the positions grow by "
             f"{given[0].diff().tolist()}: a product, where a sum belongs",
         lambda given, right: (given[0].diff() != 1).any()),
        (lambda m, p: (m.cumsum(1) - 1).clamp(min=0),
         "the text begins at 0: no room for the virtual tokens",
         lambda given, right: given[0][0] == 0),
        (lambda m, p: m.cumsum(1) + p, "the text begins one too far: position P stays empty",
         lambda given, right: given[0][0] == right[0][0] + 1),
        (lambda m, p: (m.cumsum(1) - 1).clamp(min=0) + p - 1,
         "the text begins where the last virtual token is",
         lambda given, right: given[0][0] == right[0][0] - 1)),
    praise="both rows begin at P, however much padding stands before",
    otherwise=lambda given, right: "the tokens of the two rows should have positions "
        f"{[row.tolist() for row in right]}; yours have {[row.tolist() for row in given]}",
    again=(7, 9), difficulty=2, importance=4, minutes=5,
    hints=(
        "mask.cumsum(dim=1) counts the real tokens so far; the first of them has 1 there.",
        "Positions 0 … P − 1 belong to the virtual tokens, so the first real token has P."),
)  # fmt: skip
def positions(answer, T=4, virtual=5):
    """The positions of the tokens of one row, and of those of one that is padded, left."""
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, : T // 2] = 0
    made = a_tensor(answer(mask, virtual), (2, T), "one position a token: the shape")
    return made[0], made[1, T // 2 :]


# --- a clinic ----------------------------------------------------------------------------------
WARD = Ward({
    "healthy": ("C", "nothing is wrong",
        "It begins to learn at the card, ends with the end of text, and asks as it trained."),
    "loss on the question": ("B", "the tokens of the question are labels too",
        "Its first label is a word of the question."),
    "no end": ("D", "the end of text is not among the labels",
        "Its last label is a word of the card: nothing tells it to stop."),
    "another prompt": ("A", "the question is trained without the new line that ends it in use",
        "What stands before the answer in training is not what stands there in use."),
})  # fmt: skip
FAULTS = WARD.faults
QUESTION = "Which cat is used for old mills?\n"
CARD = "Drug: cat\nClass: old"


@cache
def clinic() -> pd.DataFrame:
    """What four programs make of the same question and card, and what they ask in use."""
    tokenizer = load("tiny-gpt").tokenizer
    rows = {}
    for letter, fault in WARD.right.items():
        trained = QUESTION.rstrip("\n") if fault == "another prompt" else QUESTION
        prompt = tokenizer(trained)["input_ids"]
        card = "\n" + CARD if fault == "another prompt" else CARD
        target = tokenizer(card, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *target, tokenizer.eos_token_id]
        marked = list(ids)
        if fault != "loss on the question":
            marked[: len(prompt)] = [IGNORED] * len(prompt)
        if fault == "no end":
            marked[-1] = IGNORED
        kept = [token for token in marked if token != IGNORED]
        rows[letter] = {
            "tokens": len(ids),
            "with a loss": len(kept),
            "first label": tokenizer.decode(kept[:1]),
            "last label": tokenizer.decode(kept[-1:]),
            "before the answer, trained": tokenizer.decode(prompt[-1:]),
            "before the answer, in use": tokenizer.decode(tokenizer(QUESTION)["input_ids"][-1:]),
        }
    return pd.DataFrame(rows).T.rename_axis("patient").map(repr)


debug = WARD.exercise(
    "debug", "Debug the four programs", confused=("AC", "BD", "CD"), unknown="overfitting",
    difficulty=2, importance=5, minutes=6,
    hints=(
        "Three columns say what is learned, two say what the answer follows.",
        "An adapter answers after the token that it was trained to answer after."),
)  # fmt: skip
