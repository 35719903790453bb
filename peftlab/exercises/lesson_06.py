"""Lesson 06, LoRA: the update, its forward pass and gradients, its start, its size, and five
adapters to cure."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peftlab.accounting import count
from peftlab.exercises import after, exercise, expect, question
from peftlab.exercises.clinic import Ward
from peftlab.exercises.forms import a_count, a_tensor, same, several, unlike
from peftlab.methods import LoRA


# --- predict first -----------------------------------------------------------------------------
@question(
    "GPT-2 has 12 blocks and d_model = 768. LoRA with r = 8 goes to q and v, each 768×768. How "
    "many numbers train?",
    {
        "a": ("14,155,776", "That is every entry of the 24 matrices: full fine-tuning of them."),
        "b": ("147,456", "That is A alone, or B alone. Each matrix has both: r·d_in and r·d_out."),
        "c": ("294,912", "That is one A and one B for each of the 24 matrices."),
        "d": ("2,359,296", "That multiplies by alpha = 16 too. Scaling is not a parameter, r is."),
    },
)
def how_many():
    numbers = {
        "a": 24 * 768 * 768,
        "b": 24 * 8 * 768,
        "c": 24 * 8 * 2 * 768,
        "d": 24 * 8 * 768 * 16,
    }
    trained = count(LoRA(r=8, target_modules=["q", "v"]), "gpt2")
    letter = next(letter for letter, number in numbers.items() if number == trained)
    return letter, f"24 matrices × 8 × (768 + 768) = {trained:,}."


@question(
    "LoRA starts with A random and B zero. Which of them gets a gradient in the very first step?",
    {
        "a": ("both", "The gradient of A passes through B, and B is zero."),
        "b": ("only A", "It is the other way round: A's gradient is Bᵀ times something."),
        "c": ("only B", "B's gradient is something times the inner activation A x."),
        "d": ("neither",
              "That happens if both start at zero. Here A x is not zero, and B sees it.")},
)  # fmt: skip
def first_gradient():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 6, generator=generator, requires_grad=True)
    B = torch.zeros(5, 2, requires_grad=True)
    x, target = torch.randn(4, 6, generator=generator), torch.randn(4, 5, generator=generator)
    (x @ A.T @ B.T - target).square().mean().backward()
    moved = (A.grad.norm().item() > 0, B.grad.norm().item() > 0)
    letter = {(True, True): "a", (True, False): "b", (False, True): "c", (False, False): "d"}[moved]
    return letter, f"Norm of A's gradient {A.grad.norm():.2f}, of B's {B.grad.norm():.2f}."


# --- the update --------------------------------------------------------------------------------
def factors(r: int = 3, d_in: int = 7, d_out: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Random A (r, d_in) and B (d_out, r), the same at every call."""
    generator = torch.Generator().manual_seed(6)
    A = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    return A, B


def delta_weight_solution(A, B, alpha):
    r = A.shape[0]
    return (alpha / r) * B @ A


@exercise(
    "ΔW from its factors", solution=delta_weight_solution, difficulty=1, importance=5, minutes=3,
    mistakes=(
        (lambda A, B, a: B @ A, "the product is right, but you forgot alpha / r"),
        (lambda A, B, a: a * B @ A, "did you divide alpha by r? Your scale is alpha itself"),
        (lambda A, B, a: a / len(A) ** 0.5 * B @ A,
         "you divided alpha by the root of r: that is rsLoRA's scale, LoRA's is alpha / r"),
        (lambda A, B, a: a // len(A) * B @ A, "your scale is a whole number: // rounds"),
        (lambda A, B, a: a * len(A) * B @ A, "you multiplied alpha by r: the scale is alpha / r"),
        (lambda A, B, a: a / A.shape[1] * B @ A, "you divided alpha by d_in: r is A.shape[0]"),
        (lambda A, B, a: A @ B, "the shapes do not fit. Perhaps A comes first in your product: "
         "with A (r, d_in) and B (d_out, r) it is B @ A"),
        (after(delta_weight_solution, lambda delta: delta.T),
         "yours is transposed: ΔW is (d_out, d_in), as W is")),
    praise="B A, scaled by alpha / r, in the shape of W", otherwise=unlike, again=(5, 11, 9, 12.0),
    hints=(
        "ΔW has the shape of W: (d_out, d_in). Which order of A (r, d_in) and B (d_out, r) has it?",
        "r is the number of rows of A. The scale is alpha divided by it."),
)  # fmt: skip
def delta_weight(answer, r=3, d_in=7, d_out=5, alpha=6.0):
    return a_tensor(answer(*factors(r, d_in, d_out), alpha))


# --- the forward pass --------------------------------------------------------------------------
def forward_solution(x, W, A, B, alpha):
    r = A.shape[0]
    return x @ W.T + (alpha / r) * (x @ A.T) @ B.T


@exercise(
    "Forward without a dense ΔW", solution=forward_solution,
    mistakes=(
        (lambda x, W, A, B, a: x @ (W + a / len(A) * B @ A).T,
         "the output is right, but your code forms the dense ΔW"),
        (lambda x, W, A, B, a: x @ W.T - a / len(A) * (x @ A.T) @ B.T,
         "you subtracted the delta: it is added to W x"),
        (lambda x, W, A, B, a: a / len(A) * (x @ A.T) @ B.T,
         "that is the delta alone: you left out W x"),
        (lambda x, W, A, B, a: x @ W.T + (x @ A.T) @ B.T,
         "W x + B A x, without the scale alpha / r"),
        (lambda x, W, A, B, a: x @ W.T + a * (x @ A.T) @ B.T,
         "did you divide alpha by r? The scale is alpha itself"),
        (lambda x, W, A, B, a: a / len(A) * (x @ W.T + x @ A.T @ B.T),
         "you scaled the base too: only B A x is scaled"),
        (lambda x, W, A, B, a: W @ x + a / len(A) * B @ (A @ x),
         "the shapes do not fit: x is (tokens, d_in), features last, so each product is "
         "x @ (matrix).T")),
    praise="no (d_out, d_in) product in between, and no operation too many",
    otherwise=unlike, again=(7, 75, 51, 3, 5.0), difficulty=2, importance=4, minutes=5,
    hints=(
        "x comes as rows, features last: the formula W x is written x @ W.T in code.",
        "Go through the narrow middle: first x @ A.T, which has only r numbers a token.",
        "(x @ A.T) @ B.T and x @ (B @ A).T are equal on paper. Count the multiplications of each."),
)  # fmt: skip
def forward(answer, tokens=6, d_in=96, d_out=64, r=4, alpha=12.0):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
    W = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    A, B = factors(r, d_in, d_out)
    right = forward_solution(x, W, A, B, alpha)
    thin = 2 * tokens * (d_in * d_out + r * (d_in + d_out))
    with FlopCounterMode(display=False) as counter:
        made = a_tensor(answer(x, W, A, B, alpha))
    spent = counter.get_total_flops()
    expect(
        spent <= thin or not same(made, right),
        "the output is right, but your code forms the dense ΔW: it spent "
        f"{spent:,} operations where {thin:,} do",
    )
    return made


# --- the gradients -----------------------------------------------------------------------------
def gradients_solution(x, g, A, B, alpha):
    s = alpha / A.shape[0]
    return s * (g @ B).T @ x, s * g.T @ (x @ A.T)


def _by_autograd(tokens=6, r=3, d_in=7, d_out=5, alpha=6.0):
    """Both gradients, computed by PyTorch from a loss whose gradient at h is g."""
    x, g, A, B = _at_a_layer(tokens, r, d_in, d_out)
    A, B = A.requires_grad_(), B.requires_grad_()
    ((alpha / r * x @ A.T @ B.T) * g).sum().backward()
    return A.grad, B.grad


def _at_a_layer(tokens, r, d_in, d_out):
    """x (tokens, d_in), g (tokens, d_out), A and B, the same at every call."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
    g = torch.randn(tokens, d_out, generator=generator, dtype=torch.float64)
    return x, g, *factors(r, d_in, d_out)


@exercise(
    "The gradients of A and B", solution=gradients_solution, right=_by_autograd,
    mistakes=(
        (lambda x, g, A, B, a: gradients_solution(x, g, A, B, len(A)),
         "both would be right with a scale of 1: you left out s = alpha / r"),
        (lambda x, g, A, B, a: gradients_solution(x, g, A, B, a * len(A)),
         "did you divide alpha by r? Your scale is alpha itself"),
        (after(gradients_solution, lambda of_A, of_B: (of_B, of_A)),
         "these are the two gradients in the other order: A's comes first"),
        (after(gradients_solution, lambda of_A, of_B: (of_A.T, of_B.T)),
         "both are transposed: a gradient has the shape of its factor, A (r, d_in), B (d_out, r)"),
        (after(gradients_solution, lambda of_A, of_B: (-of_A, -of_B)),
         "the signs are turned round: that is the direction of a step, not the gradient"),
        (lambda x, g, A, B, a: after(gradients_solution, lambda p, q: (p / len(x), q / len(x)))(
            x, g, A, B, a), "you took the mean over the tokens: their contributions add up"),
        (lambda x, g, A, B, a: (a / len(A) * B.T @ g @ x.T, a / len(A) * g @ (A @ x).T),
         "the shapes do not fit: tokens are rows here, so g xᵀ, summed over them, is g.T @ x")),
    praise="equal to what PyTorch's backward gives, and no (d_out, d_in) matrix on the way",
    otherwise=unlike, again=(9, 5, 11, 13, 12.0), difficulty=3, importance=5, minutes=8,
    hints=(
        "Tokens are rows. The sum over tokens of g xᵀ, column times row, is g.T @ x in code.",
        "For B: first A x for every token, x @ A.T. Then g.T @ of that, times s.",
        "For A: first Bᵀ g for every token, g @ B. Then its transpose @ x, times s."),
)  # fmt: skip
def gradients(answer, tokens=6, r=3, d_in=7, d_out=5, alpha=6.0):
    given = answer(*_at_a_layer(tokens, r, d_in, d_out), alpha)
    return tuple(several(given, 2, "return two tensors: the gradient of A, then that of B"))


# --- the start ---------------------------------------------------------------------------------
def initialise_solution(r, d_in, d_out):
    bound = 1 / math.sqrt(d_in)
    A = torch.empty(r, d_in).uniform_(-bound, bound)
    B = torch.zeros(d_out, r)
    return A, B


@exercise(
    "Where A and B start", solution=initialise_solution,
    mistakes=(
        (lambda r, d_in, d_out: (torch.zeros(r, d_in), torch.zeros(d_out, r)), "both are zero"),
        (lambda r, d_in, d_out: (torch.randn(r, d_in) / 9, torch.randn(d_out, r)), "not the base"),
        (lambda r, d_in, d_out: (torch.zeros(r, d_in), torch.randn(d_out, r)), "other way round"),
        (lambda r, d_in, d_out: (torch.randn(d_in, r) / 9, torch.zeros(r, d_out)), "A should be"),
        (lambda r, d_in, d_out: (torch.ones(r, d_in) / 9, torch.zeros(d_out, r)), "rows of A"),
        (lambda r, d_in, d_out: (torch.randn(r, d_in), torch.zeros(d_out, r)), "too large"),
        (lambda r, d_in, d_out: (torch.rand(r, d_in) / 9, torch.zeros(d_out, r)), "one sign")),
    again=(3, 49, 27), difficulty=2, importance=5, minutes=4,
    hints=(
        "Before the first step the adapted model must equal the base: ΔW = 0.",
        "If both are zero, both gradients are zero, and nothing ever moves. One of them is enough.",
        "A has d_in numbers a row. Entries of about 1/√d_in keep those of A x as large as x's."),
)  # fmt: skip
def initialise(answer, r=4, d_in=81, d_out=50):
    A, B = several(answer(r, d_in, d_out), 2, "return two tensors, A and B")
    A, B = (a_tensor(*each).float() for each in ((A, (r, d_in), "A"), (B, (d_out, r), "B")))
    expect(A.isfinite().all() and B.isfinite().all(), "a number is infinite, or none at all")
    zero_A, zero_B = not A.any(), not B.any()
    expect(
        not (zero_A and zero_B),
        "both are zero, and so are both gradients, now and after every step: nothing ever trains",
    )
    expect(
        zero_A or zero_B,
        "both are random, so ΔW is not zero: before the first step this is not the base any more",
    )
    expect(
        zero_B,
        "ΔW is zero and this would train, but it is the other way round: the paper and its code "
        "draw A and set B to zero",
    )
    expect(
        torch.linalg.matrix_rank(A) == r,
        "the rows of A depend on each other, so they get the same gradient or nearly: you pay for "
        f"r = {r} and train less. Draw A at random",
    )
    size = A.std().item() * math.sqrt(d_in)
    expect(
        0.1 < size < 3,
        f"the entries of A are too {'large' if size > 1 else 'small'}: about 1/√d_in is usual, "
        f"yours are {size:.1f} times that",
    )
    expect((A < 0).any() and (A > 0).any(), "all numbers of A have one sign: draw around zero")
    return "A random at 1/√d_in, B zero: the base at the start, and B has a gradient"


# --- the size ----------------------------------------------------------------------------------
def count_lora_solution(r, layers, d_model, d_kv, targets):
    d_out = {"q": d_model, "k": d_kv, "v": d_kv, "o": d_model}
    return layers * sum(r * (d_model + d_out[target]) for target in targets)


def _of_llama(numbers):
    """`numbers(r, targets)` for three adapters of Llama-3-8B."""
    cases = (8, "q"), (8, "v"), (16, "q, k, v, o")
    return {(r, names): numbers(r, tuple(names.split(", "))) for r, names in cases}


@exercise(
    "Count under grouped heads", solution=count_lora_solution,
    mistakes=(
        (lambda r, L, d, d_kv, ts: L * len(ts) * r * 2 * d,
         "k and v are not as wide as d_model here: under grouped heads they have d_kv outputs"),
        (lambda r, L, d, d_kv, ts: count_lora_solution(r, 1, d, d_kv, ts),
         "that is one layer: multiply by their number"),
        (lambda r, L, d, d_kv, ts: L * len(ts) * r * d,
         "that is only A, (r, d_in) numbers: B has r·d_out more"),
        (lambda r, L, d, d_kv, ts: L * sum(r * d * (d_kv if t in "kv" else d) for t in ts),
         "you multiplied d_in by d_out: that is the size of a full ΔW, r times. A and B add up"),
        (lambda r, L, d, d_kv, ts: L * sum(r * (d_kv if t in "kv" else d) for t in ts),
         "that is only B, (d_out, r) numbers: A has r·d_in more"),
        (lambda r, L, d, d_kv, ts: L * len(ts) * r * (d + d_kv),
         "you gave every target d_kv outputs: q and o have d_model of them")),
    praise=lambda given, right: "Llama-3-8B with r = 8 on q and v: "
        f"{count(LoRA(r=8, target_modules=['q', 'v']), 'llama-3-8b'):,}, checked against peftlab",
    otherwise="for r = {case[0]} on {case[1]} expected {right:,}, yours {given:,}",
    right=lambda: _of_llama(lambda r, ts: count(LoRA(r=r, target_modules=ts), "llama-3-8b")),
    difficulty=2, importance=3, minutes=5,
    hints=(
        "Each matrix costs r·(d_in + d_out). Sum over the targets, then over the layers.",
        "With grouped heads, several query heads share one key head: k and v come out d_kv wide, "
        "smaller than d_model. All four take d_model numbers in."),
)  # fmt: skip
def count_lora(answer):
    return _of_llama(lambda r, targets: a_count(answer(r, 32, 4096, 1024, targets)))


# --- the clinic --------------------------------------------------------------------------------
WARD = Ward({
    "healthy": ("ward 3", "nothing is wrong",
        "the loss falls smoothly, B has a gradient at once, A follows, ΔW grows: leave it"),
    "both zero": ("ward 4", "A and B both started at zero",
        "both gradients are exactly zero in every step, so no optimizer could move it"),
    "alpha times r": ("ward 2", "the delta is scaled by alpha · r instead of alpha / r",
        "ΔW jumps far beyond the size that is needed in the first steps, and the loss goes up "
        "before it comes down"),
    "not in the optimizer": ("ward 1", "the optimizer was given no parameter of the adapter",
        "B has a gradient in every step, and yet ΔW stays exactly zero: somebody computes "
        "gradients that nobody applies"),
    "dropout left on": ("ward 5", "dropout still drops while the model is evaluated",
        "the loss falls, but the same input gives two different losses"),
}, where="",
    again="{letter} is not {said!r}. For that one you would see this: {sign_of_said}")  # fmt: skip
FAULTS = WARD.faults


def _patient(fault: str, steps: int = 60) -> pd.DataFrame:
    """One 24×24 layer learns a change of rank 2 with LoRA, r = 4, alpha = 8, and one fault."""
    generator = torch.Generator().manual_seed(11)
    d, r, alpha = 24, 4, 8.0
    W = torch.randn(d, d, generator=generator) / math.sqrt(d)
    change = torch.randn(d, 2, generator=generator) @ torch.randn(2, d, generator=generator) / d
    inputs = torch.randn(steps + 1, 32, d, generator=generator)
    noise = torch.Generator().manual_seed(12)

    A = torch.empty(r, d).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d), generator=generator)
    A = nn.Parameter(torch.zeros(r, d) if fault == "both zero" else A)
    B = nn.Parameter(torch.zeros(d, r))
    scale = alpha * r if fault == "alpha times r" else alpha / r

    def loss_of(x, dropout):
        kept = (torch.rand(x.shape, generator=noise) > 0.3).float() / 0.7 if dropout else 1.0
        output = x @ W.T + scale * ((x * kept) @ A.T) @ B.T
        return (output - x @ (W + change).T).square().mean()

    trained = [nn.Parameter(torch.zeros(1))] if fault == "not in the optimizer" else [A, B]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    rows = []
    for step, x in enumerate(inputs[:steps], 1):
        A.grad = B.grad = None
        loss_of(x, dropout=fault == "dropout left on").backward()
        with torch.no_grad():
            first, second = (loss_of(inputs[-1], fault == "dropout left on") for _ in range(2))
            rows.append(
                {
                    "step": step,
                    "loss": first.item(),
                    "gradient of A": A.grad.norm().item(),
                    "gradient of B": B.grad.norm().item(),
                    "size of ΔW": (scale * B @ A).norm().item(),
                    "same input, twice": abs(first - second).item(),
                }
            )
        optimizer.step()
    return pd.DataFrame(rows)


def clinic() -> dict[str, pd.DataFrame]:
    """Five adapters in training, one of them healthy: a table of measurements for each ward.

    Every step's loss on a fixed batch, the norms of both gradients and of ΔW, and by how much two
    evaluations of that same batch differ.
    """
    return {ward: _patient(fault) for ward, fault in WARD.right.items()}


debug = WARD.exercise(
    "debug", "Debug the broken adapters",
    confused=(("ward 1", "ward 4"), ("ward 2", "ward 5"), ("ward 3", "ward 5")), unknown="bad luck",
    praise="all five. " + "; ".join(f"{fault}: {row[-1]}" for fault, row in WARD.table.items()),
    difficulty=3, importance=5, minutes=10,
    hints=(
        "Look at the gradients before the loss. Zero for both, or for none?",
        "A gradient without a movement: who should have applied it?",
        "The last column is the difference between two evaluations of one and the same batch."),
)  # fmt: skip
