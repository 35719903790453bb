"""Lesson 07, LoRA's family and settings: the scale for another rank, the rank for a budget, the
room to forget, a sum of adapters, and DoRA."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftlab.accounting import training_bytes
from peftlab.bases import load
from peftlab.exercises import exercise, question
from peftlab.exercises.forms import a_count, a_number, a_tensor, unlike
from peftlab.exercises.lesson_06 import factors
from peftlab.methods import LoRA, PiSSA
from peftlab.training import target_loss
from peftlab.tuned import attach


# --- predict first -----------------------------------------------------------------------------
@question(
    "LoRA on all linears of Llama-3-8B, with r = 64 and a frozen base in 2 bytes a number. You "
    "double r to 128. Bytes for weights, gradients and Adam together, activations apart, grow by:",
    {
        "a": ("less than 5%", "The adapter's own bytes double, and they are no rounding error."),
        "b": ("between 5% and 30%", "Only the adapter's part doubles, the base's part stays."),
        "c": ("between 30% and 100%", "The base weights do not grow, and they are most of it."),
        "d": ("more than 100%", "Nothing in LoRA grows faster than r: twice r, twice the adapter."),
    },
)
def double_the_rank():
    small, large = (
        training_bytes(LoRA(r=r, target_modules="all-linear"), "llama-3-8b", "bfloat16").total
        for r in (64, 128)
    )
    percent = 100 * (large / small - 1)
    letter = "a" if percent < 5 else "b" if percent < 30 else "c" if percent <= 100 else "d"
    return letter, f"From {small / 1e9:.1f} GB to {large / 1e9:.1f} GB: {percent:.0f}% more."


@question(
    "LoRA's B starts at zero, so its first step moves B alone. PiSSA starts A and B at the "
    "largest singular values of W. Which of them does PiSSA's first step move?",
    {
        "a": ("only A", "A's gradient passes through B, and B's through A. Neither is zero here."),
        "b": ("only B", "That is LoRA, because its B is zero. PiSSA's B is not."),
        "c": ("both", "Both factors are in use from the start, so both have a gradient."),
    },
)
def pissa_moves():
    base = load("tiny-gpt")
    ids = base.tokenizer("Mina Balfour lives in Goldcrest", return_tensors="pt").input_ids
    with attach(base, PiSSA(r=2, target_modules=["up"]), seed=0) as tuned:
        target_loss(tuned(ids), ids).backward()
        moved = {n[-1] for n, p in tuned.trainable.items() if p.grad is not None and p.grad.any()}
    letter = {("A",): "a", ("B",): "b", ("A", "B"): "c"}[tuple(sorted(moved))]
    return letter, f"Tensors with a gradient: {', '.join(sorted(moved))}."


# --- settings ----------------------------------------------------------------------------------
def scale_for_rank_solution(alpha, r, new_r):
    return alpha * math.sqrt(new_r / r)


def _ranks(numbers):
    """`numbers(alpha, r, new_r)` for three changes of the rank."""
    cases = (16, 8, 32), (32, 4, 64), (12, 9, 4)
    return {case: numbers(*case) for case in cases}


@exercise(
    "Alpha for another rank", solution=scale_for_rank_solution,
    mistakes=(
        (lambda alpha, r, new: alpha * new / r,
         "that keeps α / r fixed, and the first step grows with the root of r"),
        (lambda alpha, r, new: alpha,
         "that keeps α fixed, and the first step shrinks with the root of r"),
        (lambda alpha, r, new: alpha * math.sqrt(r / new),
         "the wrong way round: a larger r divides α by more, so α has to grow"),
        (lambda alpha, r, new: alpha * r / new,
         "the wrong way round, and without the root"),
        (lambda alpha, r, new: alpha / r * math.sqrt(new / r),
         "that is the scale α / r times the root: give α itself")),
    praise=lambda given, right: "α / √r stays the same: from r = 8 with α = 16 to r = 32 with "
        f"α = {right[16, 8, 32]:g}",
    otherwise="for alpha, r, new_r = {case} expected {right:.4g}, yours {given:.4g}",
    difficulty=2, importance=4, minutes=4,
    hints=(
        "The first step has the size (α / r) · η · √(d_out r / 3). What of it depends on r?",
        "(α / r) · √r is α / √r. Write that this is the same before and after, and solve for α."),
)  # fmt: skip
def scale_for_rank(answer):
    return _ranks(lambda *case: a_number(answer(*case)))


def rank_for_budget_solution(budget, layers, matrices):
    return budget // (layers * sum(d_in + d_out for d_in, d_out in matrices))


def _budgets(numbers):
    """`numbers(budget, layers, matrices)` for three sets of matrices."""
    square, tall = (192, 192), (192, 768)
    cases = (46_080, 6, (square,)), (46_080, 6, (tall,)), (50_000, 5, (square, square, tall))
    return {case: numbers(*case) for case in cases}


@exercise(
    "The rank that a budget buys", solution=rank_for_budget_solution,
    mistakes=(
        (lambda n, L, ms: n // sum(a + b for a, b in ms),
         "that is for one layer: each of the layers has these matrices"),
        (lambda n, L, ms: n // (L * sum(a * b for a, b in ms)),
         "d_in times d_out is the size of a full ΔW: A and B have d_in + d_out numbers for each r"),
        (lambda n, L, ms: n / (L * sum(a + b for a, b in ms)),
         "a rank is a whole number: round down, so that the budget is kept"),
        (lambda n, L, ms: n // (L * sum(a for a, _ in ms)),
         "that pays for A alone: B has d_out numbers for each r"),
        (lambda n, L, ms: n // (L * (ms[0][0] + ms[0][1])),
         "that pays for the first matrix alone: sum over all of them"),
        (lambda n, L, ms: n // (L * len(ms) * (ms[0][0] + ms[0][1])),
         "the matrices differ in size: sum d_in + d_out over them")),
    praise="as 46,080 numbers are spent in this lesson: rank 20 on q, rank 8 on up",
    otherwise="for {case[0]:,} numbers in {case[1]} layers expected {right}, yours {given}",
    difficulty=2, importance=3, minutes=4,
    hints=(
        "What does one unit of rank cost? Sum d_in + d_out over the matrices, times the layers.",
        "How often does that fit into the budget? // divides and rounds down."),
)  # fmt: skip
def rank_for_budget(answer):
    def whole(budget, layers, matrices):
        given = a_number(answer(budget, layers, list(matrices)))
        return given if given != int(given) else a_count(given)

    return _budgets(whole)


def room_to_forget_solution(loss, vocabulary):
    return math.log(vocabulary) - loss


def _rooms(numbers):
    cases = (0.89, 2_048), (3.1, 50_257), (12.0, 49_152)
    return {case: numbers(*case) for case in cases}


@exercise(
    "How much can be forgotten", solution=room_to_forget_solution,
    mistakes=(
        (lambda loss, V: math.log(V), "that is the loss of the uniform guess itself. How far is "
         "it above the base's?"),
        (lambda loss, V: math.log2(V) - loss, "that logarithm counts bits: the loss is in nats, "
         "so take math.log"),
        (lambda loss, V: loss - math.log(V), "the sign is turned round: forgetting is loss after "
         "minus loss before"),
        (lambda loss, V: math.log(V) / loss, "a ratio: forgetting is a difference, in nats"),
        (lambda loss, V: math.log10(V) - loss, "that logarithm is to the base 10: nats take e"),
        (lambda loss, V: max(0.0, math.log(V) - loss), "you cut it at zero: a base may be worse "
         "than a uniform guess before anything is trained")),
    praise=lambda given, right: f"tiny-gpt has {right[0.89, 2_048]:.2f} nats of room: beyond that "
        "it would do better to guess",
    otherwise="for a loss of {case[0]} and {case[1]:,} tokens expected {right:.3f}, "
    "yours {given:.3f}",
    difficulty=1, importance=5, minutes=3,
    hints=(
        "A uniform guess gives each of V tokens the probability 1/V. Its loss is −ln(1/V).",
        "Forgotten is loss after minus loss before. Put the uniform guess in the place of after."),
)  # fmt: skip
def room_to_forget(answer):
    return _rooms(lambda *case: a_number(answer(*case)))


# --- two relatives ------------------------------------------------------------------------------
def combine_solution(adapters, weights):
    return sum(
        w * alpha / A.shape[0] * B @ A for (A, B, alpha), w in zip(adapters, weights, strict=True)
    )


def _of_factors(adapters, weights):
    A = sum(w * A for (A, _, _), w in zip(adapters, weights, strict=True))
    B = sum(w * B for (_, B, _), w in zip(adapters, weights, strict=True))
    return adapters[0][2] / len(A) * B @ A


@exercise(
    "Two adapters as one", solution=combine_solution,
    mistakes=(
        (_of_factors, "you weighed the factors: their product has B of one adapter times A of the "
         "other in it, and each weight squared"),
        (lambda some, w: _of_factors(some, [1.0] * len(w)),
         "you added the factors: their product has B of one adapter times A of the other in it"),
        (lambda some, w: combine_solution([(A, B, len(A)) for A, B, _ in some], w),
         "the sum of the products B A, but you left out alpha / r of each"),
        (lambda some, w: combine_solution(some, [1.0] * len(w)),
         "that is the sum of both deltas, without the weights"),
        (lambda some, w: combine_solution(some, [x / sum(w) for x in w]),
         "you divided the weights by their sum: they are what was asked for, and need not sum "
         "to 1"),
        (lambda some, w: combine_solution([(A, B, some[0][2]) for A, B, _ in some], w),
         "you used alpha of the first adapter for both: each has its own")),
    praise="the deltas are weighed, each at its own scale; no B meets the A of the other adapter",
    otherwise=unlike, again=(5, 9, 11), difficulty=3, importance=3, minutes=6,
    hints=(
        "What is weighed is the change of the weight: Σ w_i ΔW_i, and each ΔW has its own alpha.",
        "(B₁ + B₂)(A₁ + A₂) is B₁A₁ + B₂A₂ and two products more, which belong to neither."),
)  # fmt: skip
def combine(answer, *sizes):
    adapters = [(*factors(*sizes), 6.0), (*(2 * t.flip(0) for t in factors(*sizes)), 3.5)]
    return a_tensor(answer(adapters, [0.75, 0.5]))


def dora_solution(W, A, B, alpha, m):
    changed = W + (alpha / A.shape[0]) * B @ A
    return m[:, None] * changed / changed.norm(dim=1, keepdim=True)


def _dora(length):
    """DoRA with the changed weight divided by `length(W, changed)`."""

    def wrong(W, A, B, alpha, m):
        changed = W + alpha / len(A) * B @ A
        return m[:, None] * changed / length(W, changed)

    return wrong


@exercise(
    "DoRA: a length for every row", solution=dora_solution,
    mistakes=(
        (_dora(lambda W, changed: W.norm(dim=1, keepdim=True)),
         "you divided by the norms of W alone: as A and B train, the rows of W' would not be as "
         "long as m says"),
        (_dora(lambda W, changed: 1), "you never divided by the norms: m would be a scale"),
        (_dora(lambda W, changed: changed.norm(dim=0, keepdim=True)),
         "those are the norms of the columns (dim=0). A row makes one output; the paper says "
         "column, but there W is transposed"),
        (_dora(lambda W, changed: changed.norm()),
         "that is one norm for the whole matrix: every row has its own"),
        (lambda W, A, B, a, m: dora_solution(W, A, B, len(A), m),
         "direction and length are right, but you left out alpha / r"),
        (lambda W, A, B, a, m: W + m[:, None] * nn.functional.normalize(B @ A, dim=1),
         "you normalised the delta: what has direction and length is W + ΔW"),
        (lambda W, A, B, a, m: m * (W + a / len(A) * B @ A),
         "the shapes do not fit: m is (d_out), one number for each row. m[:, None] makes it "
         "a column")),
    praise=lambda given, right: "the rows of W' have the lengths "
        f"{', '.join(f'{x:.2f}' for x in given.norm(dim=1))}, which is m",
    otherwise=unlike, again=(5, 11, 9), difficulty=3, importance=2, minutes=8,
    hints=(
        "First the weight that LoRA would make, W + (alpha / r) B A. DoRA changes its rows.",
        "Divide each row by its own norm, then give it the length in m: every row of W' has it."),
)  # fmt: skip
def dora(answer, r=3, d_in=7, d_out=5):
    generator = torch.Generator().manual_seed(8)
    W = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    m = 1 + torch.rand(d_out, generator=generator, dtype=torch.float64)
    return a_tensor(answer(W, *factors(r, d_in, d_out), 6.5, m))
