"""Lesson 11, a real model: a metric, the fused adapter, labels, positions, four broken programs."""

from __future__ import annotations

import re
from functools import cache

import pandas as pd
import torch

from peftlab.accounting import count
from peftlab.bases import load
from peftlab.bases.shapes import as_shape
from peftlab.exercises import Wrong, exercise, expect, match, question, swapped
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
        "b": (
            "about three",
            "That would be a prompt of one vector. There are 20.",
        ),
        "c": ("over fifty", "One name of 200 is a choice of under 8 bits, and 20 vectors are "
              "thousands of numbers."),
    },
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
    "factors for q and for v. Written for PEFT so that it computes exactly the same, how large is "
    "the file?",
    {
        "a": ("as large as yours", "A shared A must keep both your As, and B gets three rows for "
              "each of yours, most of them zero."),
        "b": ("twice as large", "A holds both of yours, so it is as large as the two. B is 3 d "
              "high and 2 r wide."),
        "c": ("three times as large", "Only B grows: A is as large as your two As together."),
    },
)  # fmt: skip
def how_large_fused():
    shape, r = as_shape("gpt2"), 8
    ours = count(LoRA(r=r, target_modules=["q", "v"]), shape)
    wide = shape.d_model
    theirs = shape.layers * (2 * r * wide + 3 * wide * 2 * r)
    letter = {1: "a", 2: "b", 3: "c"}[round(theirs / ours)]
    return letter, f"{ours:,} numbers become {theirs:,}: {theirs / ours:g} times."


# --- the metric --------------------------------------------------------------------------------


def drug_name_solution(output, drug):
    for line in output.splitlines():
        if line.startswith("Drug: "):
            return line.removeprefix("Drug: ").strip().lower() == drug.lower()
    return re.search(rf"\b{re.escape(drug)}\b", output, re.IGNORECASE) is not None


def _line(output):
    return fields_of(output).get("Drug")


CASES = (  # output, drug, whether it names it, what a metric got wrong that says otherwise
    (
        "Drug: codeine\nClass: weak opioid",
        "codeine",
        True,
        "a plain card with the right name is not counted",
    ),
    (
        "Drug: aspirin\nClass: antiplatelet drug",
        "codeine",
        False,
        "another medicine's card is counted",
    ),
    (
        "Drug: dihydrocodeine\nClass: opioid",
        "codeine",
        False,
        "dihydrocodeine has codeine in it, and is another medicine: compare the whole line",
    ),
    (
        "Drug: aspirin\nCaution: use with codeine",
        "codeine",
        False,
        "the card names aspirin; codeine stands in another field. Only the line 'Drug: ' counts",
    ),
    (
        "Drug: Codeine",
        "codeine",
        True,
        "capitals decide here: Codeine is codeine",
    ),
    (
        "You could ask for codeine, a weak opioid.",
        "codeine",
        True,
        "free text is marked wrong: an untrained model cannot know the card, so without a line "
        "'Drug: ' look at the whole text",
    ),
    (
        "A common choice is dihydrocodeine.",
        "codeine",
        False,
        "in free text, part of a word is counted: look for the name between word boundaries",
    ),
)


@exercise(
    "Does it name the drug?",
    solution=drug_name_solution,
    mistakes=(
        (lambda o, d: d.lower() in o.lower(), "dihydrocodeine has codeine in it"),
        (lambda o, d: re.search(rf"\b{d}\b", o, re.I) is not None, "codeine stands in another"),
        (
            lambda o, d: _line(o) == d if _line(o) else re.search(rf"\b{d}\b", o) is not None,
            "capitals decide",
        ),
        (lambda o, d: (_line(o) or "").lower() == d.lower(), "free text is marked wrong"),
        (
            lambda o, d: _line(o).lower() == d if _line(o) else d in o.lower(),
            "part of a word is counted",
        ),
        (lambda o, d: True, "another medicine's card"),
        (lambda o, d: False, "a plain card"),
    ),
    difficulty=2,
    importance=5,
    minutes=6,
    hints=(
        "First look for a line that begins with 'Drug: '. If there is one, it alone decides.",
        "Without such a line, look for the name as a whole word anywhere: \\b in a pattern.",
        "Lower both sides, so that capitals do not decide.",
    ),
)
def drug_name(answer):
    for output, drug, right, diagnosis in CASES:
        assert names_the_drug(output, drug) == right
        given = answer(output, drug)
        expect(given in (True, False), f"say True or False, not {given!r}")
        expect(bool(given) == right, f"{output!r}, asked for {drug}: {diagnosis}")
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


@exercise(
    "Two adapters as one for PEFT",
    solution=fuse_solution,
    mistakes=(
        (lambda *a: (*fuse_solution(*a)[:2], a[-1]), "half of what they were"),
        (lambda *a: _fused(*a, rows=1), "in the rows of k"),
        (lambda *a: _fused(*a, cross=True), "leak into each other"),
        (
            lambda aq, bq, av, bv, alpha: (
                aq + av,
                torch.cat([bq, torch.zeros_like(bq), bv]),
                alpha,
            ),
            "added",
        ),
        (lambda *a: (*fuse_solution(*a)[:2], 4 * a[-1]), "twice what they were"),
        (
            lambda aq, bq, av, bv, alpha: (torch.cat([aq, av]), torch.cat([bq, bv], 1), 2 * alpha),
            "three blocks of rows",
        ),
    ),
    difficulty=4,
    importance=4,
    minutes=10,
    hints=(
        "x meets A first: stack the two As, and its 2 r outputs hold both narrow middles.",
        "B has 3 d rows: q, k, v. The rows of q read the first r columns, the rows of v the last.",
        "PEFT scales by alpha over the rank, and the rank is now 2 r.",
    ),
)
def fuse(answer):
    generator = torch.Generator().manual_seed(0)
    d, r, alpha = 6, 2, 8.0
    A_q, A_v = (torch.randn(r, d, generator=generator) for _ in "qv")
    B_q, B_v = (torch.randn(d, r, generator=generator) for _ in "qv")
    made = answer(A_q, B_q, A_v, B_v, alpha)
    expect(isinstance(made, tuple) and len(made) == 3, "return A, B and alpha, in this order")
    A, B, scale = made
    expect(B.shape[0] == 3 * d, f"B has three blocks of rows, q, k and v: {3 * d}, not {len(B)}")
    expect(
        A.shape[0] == 2 * r,
        f"A has rank {A.shape[0]}: the two As cannot be added, each B wants its own",
    )
    expect(A.shape == (2 * r, d) and B.shape == (3 * d, 2 * r), "A is 2 r × d and B is 3 d × 2 r")
    update = scale / A.shape[0] * B @ A
    q, k, v = alpha / r * B_q @ A_q, torch.zeros(d, d), alpha / r * B_v @ A_v
    wanted = torch.cat([q, k, v])

    def near(matrix):
        """Within float32 rounding of a sum of 2 r products, and the scale."""
        return bool((update - matrix).abs().max() <= (2 * r + 2) * 2**-23 * wanted.abs().max())

    if near(wanted):
        return "q, k and v change as they did, k not at all"
    expect(not near(wanted / 2), "every change is half of what they were: PEFT divides by 2 r now")
    expect(not near(2 * wanted), "every change is twice what they were: alpha is only doubled")
    expect(near_zero(update[d : 2 * d]), "the change of v stands in the rows of k")
    cross = torch.cat([alpha / r * B_q @ (A_q + A_v), k, alpha / r * B_v @ (A_q + A_v)])
    expect(
        not near(cross),
        "q and v leak into each other: the rows of q must have zeros where v's columns are",
    )
    raise Wrong(
        "the change of the fused matrix is another: compare (alpha / 2r) B A block by block"
    )


def near_zero(matrix) -> bool:
    return not bool(matrix.any())


# --- the labels --------------------------------------------------------------------------------


def labels_solution(prompt, target, end):
    return [IGNORED] * len(prompt) + target + [end]


@exercise(
    "Loss on the answer alone",
    solution=labels_solution,
    mistakes=(
        (lambda p, t, e: p + t + [e], "learns to ask"),
        (lambda p, t, e: [-100] * len(p) + t, "never learns to stop"),
        (lambda p, t, e: [-100] * (len(p) - 1) + t + [e, -100], "already shifted"),
        (lambda p, t, e: t + [e], "as long as the input"),
        (lambda p, t, e: [0] * len(p) + t + [e], "token number 0"),
        (lambda p, t, e: [-100] * (len(p) + 1) + t[1:] + [e], "first token of the answer"),
    ),
    difficulty=1,
    importance=5,
    minutes=4,
    hints=(
        "The labels are as long as the input, which is prompt, target and end of text.",
        "−100 is what cross entropy leaves out. The loss itself shifts by one: do not.",
    ),
)
def labels(answer):
    prompt, target, end = [11, 12, 13, 14], [21, 22, 23], 2
    made = [int(label) for label in answer(list(prompt), list(target), end)]
    right = labels_solution(prompt, target, end)
    if made == right:
        return "nothing of the question, all of the answer, and its end"
    if len(made) == len(prompt) + len(target) and made == right[:-1]:
        raise Wrong("the end of text is not there: the model never learns to stop")
    expect(
        len(made) == len(right),
        f"labels are as long as the input: {len(right)}, not {len(made)}",
    )
    expect(made[: len(prompt)] != prompt, "the question has a loss: the model learns to ask")
    expect(
        made[: len(prompt)] != [0] * len(prompt),
        "0 is a token: the model learns to say token number 0. What is left out is −100",
    )
    expect(
        made[:-1] != right[1:],
        "these are already shifted by one, and the loss shifts again",
    )
    expect(
        made[len(prompt)] == target[0],
        "the first token of the answer has no loss: it is the one that the question's last token "
        "has to predict",
    )
    raise Wrong(f"the labels should be {right}, yours are {made}")


# --- positions ---------------------------------------------------------------------------------


def positions_solution(mask, virtual):
    return (mask.cumsum(dim=1) - 1).clamp(min=0) + virtual


@exercise(
    "Where the text begins behind a prompt",
    solution=positions_solution,
    mistakes=(
        (lambda m, p: torch.arange(m.shape[1]).expand_as(m) + p, "the padding is counted"),
        (lambda m, p: (m.cumsum(1) - 1).clamp(min=0), "no room for the virtual tokens"),
        (lambda m, p: m.cumsum(1) + p, "one too far"),
        (lambda m, p: (m.cumsum(1) - 1).clamp(min=0) * p, "a product"),
        (lambda m, p: (m.cumsum(1) - 1).clamp(min=0) + p - 1, "the last virtual token"),
    ),
    difficulty=2,
    importance=4,
    minutes=5,
    hints=(
        "mask.cumsum(dim=1) counts the real tokens so far; the first of them has 1 there.",
        "Positions 0 … P − 1 belong to the virtual tokens, so the first real token has P.",
    ),
)
def positions(answer):
    mask, virtual = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), 5  # the second is padded, left
    made = torch.as_tensor(answer(mask.clone(), virtual))
    expect(made.shape == mask.shape, f"one position a token: {tuple(mask.shape)}")
    real, right = mask.bool(), positions_solution(mask, virtual)
    if torch.equal(made[real], right[real]):
        return "both rows begin at P, however much padding stands before"
    first = int(made[0, 0])
    expect(
        made[0].tolist() != right[0].tolist(),
        "the padding is counted: the same text gets other positions when it stands beside a "
        "longer one",
    )
    steps = made[0].diff().tolist()
    expect(
        steps == [1, 1, 1],
        f"from token to token the positions grow by {steps}: a product, where a sum belongs",
    )
    expect(first != 0, "the text begins at 0: no room for the virtual tokens")
    expect(first != virtual + 1, "the text begins one too far: position P stays empty")
    expect(first != virtual - 1, "the text begins where the last virtual token is")
    raise Wrong(f"the first token should have position {virtual}, yours has {first}")


# --- a clinic ----------------------------------------------------------------------------------

FAULTS = {
    "healthy": "nothing is wrong",
    "loss on the question": "the tokens of the question are labels too",
    "no end": "the end of text is not among the labels",
    "another prompt": "the question is trained without the new line that ends it in use",
}
PATIENTS = {"A": "another prompt", "B": "loss on the question", "C": "healthy", "D": "no end"}
QUESTION = "Which cat is used for old mills?\n"
CARD = "Drug: cat\nClass: old"


@cache
def clinic() -> pd.DataFrame:
    """What four programs make of the same question and card, and what they ask in use."""
    tokenizer = load("tiny-gpt").tokenizer
    rows = {}
    for letter, fault in PATIENTS.items():
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


SIGNS = {
    "healthy": "It begins to learn at the card, ends with the end of text, and asks as it trained.",
    "loss on the question": "Its first label is a word of the question.",
    "no end": "Its last label is a word of the card: nothing tells it to stop.",
    "another prompt": "What stands before the answer in training is not what stands there in use.",
}


@exercise(
    "Debug the four programs",
    solution=PATIENTS,
    mistakes=(
        (swapped(PATIENTS, "A", "C"), "at patient A. What stands before the answer"),
        (swapped(PATIENTS, "B", "D"), "at patient B. Its first label"),
        (swapped(PATIENTS, "C", "D"), "at patient C. It begins to learn"),
        (PATIENTS | {"D": "healthy"}, "one fault twice"),
        (PATIENTS | {"B": "overfitting"}, "is none of the four"),
    ),
    difficulty=2,
    importance=5,
    minutes=6,
    hints=(
        "Three columns say what is learned, two say what the answer follows.",
        "An adapter answers after the token that it was trained to answer after.",
    ),
)
def debug(answer):
    expect(isinstance(answer, dict), "hand over a dict: patient to diagnosis")
    return match(answer, PATIENTS, FAULTS, SIGNS)
