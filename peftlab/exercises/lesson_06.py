"""Lesson 06, LoRA: the update, its start, its forward pass, its size, two relatives, and five
adapters to cure."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peftlab.accounting import count, training_bytes
from peftlab.exercises import Wrong, exercise, expect, question
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
        "d": (
            "neither",
            "That happens if both start at zero. Here A x is not zero, and B sees it.",
        ),
    },
)
def first_gradient():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 6, generator=generator, requires_grad=True)
    B = torch.zeros(5, 2, requires_grad=True)
    x, target = torch.randn(4, 6, generator=generator), torch.randn(4, 5, generator=generator)
    (x @ A.T @ B.T - target).square().mean().backward()
    moved = (A.grad.norm().item() > 0, B.grad.norm().item() > 0)
    letter = {(True, True): "a", (True, False): "b", (False, True): "c", (False, False): "d"}[moved]
    return letter, f"Norm of A's gradient {A.grad.norm():.2f}, of B's {B.grad.norm():.2f}."


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


# --- the update --------------------------------------------------------------------------------


def factors(r: int = 3, d_in: int = 7, d_out: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Random A (r, d_in) and B (d_out, r), the same at every call."""
    generator = torch.Generator().manual_seed(6)
    A = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    return A, B


def near(a, b) -> bool:
    """Same shape, same numbers up to rounding."""
    return isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(a, b.to(a.dtype))


def delta_weight_solution(A, B, alpha):
    r = A.shape[0]
    return (alpha / r) * B @ A


@exercise(
    "ΔW from its factors",
    solution=delta_weight_solution,
    mistakes=(
        (lambda A, B, alpha: B @ A, "forgot alpha / r"),
        (lambda A, B, alpha: alpha * B @ A, "divide alpha by r"),
        (lambda A, B, alpha: alpha * A.shape[0] * B @ A, "multiplied alpha by r"),
        (lambda A, B, alpha: alpha / A.shape[1] * B @ A, "divided alpha by d_in"),
        (lambda A, B, alpha: A @ B, "A comes first"),
        (lambda A, B, alpha: alpha / A.shape[0] * (B @ A).T, "transposed"),
    ),
    difficulty=1,
    importance=5,
    minutes=3,
    hints=(
        "ΔW has the shape of W: (d_out, d_in). Which order of A (r, d_in) and B (d_out, r) has it?",
        "r is the number of rows of A. The scale is alpha divided by it.",
    ),
)
def delta_weight(answer):
    A, B = factors()
    alpha, right = 6.0, 2.0 * B @ A
    try:
        mine = answer(A, B, alpha)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Wrong(
            "the shapes do not fit. Perhaps A comes first in your product: with A (r, d_in) and "
            "B (d_out, r) it is B @ A"
        ) from error
    expect(isinstance(mine, torch.Tensor), f"return a tensor; yours is {type(mine).__name__}")
    if near(mine, right):
        return "B A, scaled by alpha / r, in the shape of W"
    expect(not near(mine, B @ A), "the product is right, but you forgot alpha / r")
    expect(not near(mine, alpha * B @ A), "did you divide alpha by r? Your scale is alpha itself")
    expect(not near(mine, alpha * 3 * B @ A), "you multiplied alpha by r: the scale is alpha / r")
    expect(not near(mine, alpha / 7 * B @ A), "you divided alpha by d_in: r is A.shape[0]")
    expect(not near(mine.T, right), "yours is transposed: ΔW is (d_out, d_in), as W is")
    raise Wrong(f"ΔW should be {tuple(right.shape)} with other numbers; yours is {describe(mine)}")


def describe(tensor: torch.Tensor) -> str:
    """A tensor's shape and size in a few words."""
    return f"{tuple(tensor.shape)} with norm {tensor.norm():.3g}"


# --- the start ---------------------------------------------------------------------------------


def initialise_solution(r, d_in, d_out):
    bound = 1 / math.sqrt(d_in)
    A = torch.empty(r, d_in).uniform_(-bound, bound)
    B = torch.zeros(d_out, r)
    return A, B


@exercise(
    "Where A and B start",
    solution=initialise_solution,
    mistakes=(
        (lambda r, d_in, d_out: (torch.zeros(r, d_in), torch.zeros(d_out, r)), "both are zero"),
        (lambda r, d_in, d_out: (torch.randn(r, d_in) / 9, torch.randn(d_out, r)), "not the base"),
        (lambda r, d_in, d_out: (torch.zeros(r, d_in), torch.randn(d_out, r)), "other way round"),
        (lambda r, d_in, d_out: (torch.randn(d_in, r) / 9, torch.zeros(r, d_out)), "A should be"),
        (lambda r, d_in, d_out: (torch.ones(r, d_in) / 9, torch.zeros(d_out, r)), "rows of A"),
        (lambda r, d_in, d_out: (torch.randn(r, d_in), torch.zeros(d_out, r)), "too large"),
    ),
    difficulty=2,
    importance=5,
    minutes=4,
    hints=(
        "Before the first step the adapted model must equal the base: ΔW = 0.",
        "If both are zero, both gradients are zero, and nothing ever moves. One of them is enough.",
        "A has d_in numbers a row. Entries of about 1/√d_in keep those of A x as large as x's.",
    ),
)
def initialise(answer):
    r, d_in, d_out = 4, 81, 50
    A, B = answer(r, d_in, d_out)
    for name, mine, shape in (("A", A, (r, d_in)), ("B", B, (d_out, r))):
        expect(
            tuple(mine.shape) == shape, f"{name} should be {shape}; yours is {tuple(mine.shape)}"
        )
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
    return "A random at 1/√d_in, B zero: the base at the start, and B has a gradient"


# --- the forward pass --------------------------------------------------------------------------


def forward_solution(x, W, A, B, alpha):
    r = A.shape[0]
    return x @ W.T + (alpha / r) * (x @ A.T) @ B.T


@exercise(
    "Forward without a dense ΔW",
    solution=forward_solution,
    mistakes=(
        (lambda x, W, A, B, alpha: x @ (W + alpha / len(A) * B @ A).T, "forms the dense"),
        (lambda x, W, A, B, alpha: alpha / len(A) * (x @ A.T) @ B.T, "left out W x"),
        (lambda x, W, A, B, alpha: x @ W.T + (x @ A.T) @ B.T, "without the scale"),
        (lambda x, W, A, B, alpha: x @ W.T + alpha * (x @ A.T) @ B.T, "scale is alpha itself"),
        (
            lambda x, W, A, B, alpha: alpha / len(A) * (x @ W.T + x @ A.T @ B.T),
            "scaled the base",
        ),
        (lambda x, W, A, B, alpha: W @ x + alpha / len(A) * B @ (A @ x), "features last"),
    ),
    difficulty=2,
    importance=4,
    minutes=5,
    hints=(
        "x comes as rows, features last: the formula W x is written x @ W.T in code.",
        "Go through the narrow middle: first x @ A.T, which has only r numbers a token.",
        "(x @ A.T) @ B.T and x @ (B @ A).T are equal on paper. Count the multiplications of each.",
    ),
)
def forward(answer):
    tokens, d_in, d_out, r, alpha = 6, 96, 64, 4, 12.0
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
    W = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    A, B = factors(r, d_in, d_out)
    try:
        with FlopCounterMode(display=False) as counter:
            mine = answer(x, W, A, B, alpha)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Wrong(
            f"the shapes do not fit: x is {tuple(x.shape)}, tokens first and features last, so "
            "each product is x @ (matrix).T"
        ) from error
    base, low = x @ W.T, (x @ A.T) @ B.T
    if near(mine, base + alpha / r * low):
        thin = 2 * tokens * (d_in * d_out + r * (d_in + d_out))
        expect(
            counter.get_total_flops() <= thin,
            "the output is right, but your code forms the dense ΔW: it spent "
            f"{counter.get_total_flops():,} operations where {thin:,} do",
        )
        return f"{thin:,} operations, and no (d_out, d_in) product in between"
    expect(isinstance(mine, torch.Tensor), f"return a tensor; yours is {type(mine).__name__}")
    expect(not near(mine, alpha / r * low), "that is the delta alone: you left out W x")
    expect(not near(mine, base + low), "W x + B A x, without the scale alpha / r")
    expect(
        not near(mine, base + alpha * low), "did you divide alpha by r? The scale is alpha itself"
    )
    expect(
        not near(mine, alpha / r * (base + low)), "you scaled the base too: only B A x is scaled"
    )
    raise Wrong(
        f"the output should be {describe(base + alpha / r * low)}; yours is {describe(mine)}"
    )


# --- two relatives ------------------------------------------------------------------------------


def combine_solution(adapters, weights):
    return sum(
        w * alpha / A.shape[0] * B @ A for (A, B, alpha), w in zip(adapters, weights, strict=True)
    )


def _of_factors(adapters, weights):
    A = sum(w * A for (A, _, _), w in zip(adapters, weights, strict=True))
    B = sum(w * B for (_, B, _), w in zip(adapters, weights, strict=True))
    return adapters[0][2] / len(A) * B @ A


def _sum_of_factors(adapters, weights):
    A, B = sum(A for A, _, _ in adapters), sum(B for _, B, _ in adapters)
    return adapters[0][2] / len(A) * B @ A


@exercise(
    "Two adapters as one",
    solution=combine_solution,
    mistakes=(
        (_of_factors, "weighed the factors"),
        (_sum_of_factors, "added the factors"),
        (
            lambda adapters, weights: sum(
                w * B @ A for (A, B, _), w in zip(adapters, weights, strict=True)
            ),
            "left out alpha / r",
        ),
        (
            lambda adapters, weights: combine_solution(adapters, [1.0] * len(weights)),
            "without the weights",
        ),
        (
            lambda adapters, weights: combine_solution(
                adapters, [w / sum(weights) for w in weights]
            ),
            "divided the weights",
        ),
        (
            lambda adapters, weights: combine_solution(
                [(A, B, adapters[0][2]) for A, B, _ in adapters], weights
            ),
            "alpha of the first",
        ),
    ),
    difficulty=3,
    importance=3,
    minutes=6,
    hints=(
        "What is weighed is the change of the weight: Σ w_i ΔW_i, and each ΔW has its own alpha.",
        "(B₁ + B₂)(A₁ + A₂) is B₁A₁ + B₂A₂ and two products more, which belong to neither.",
    ),
)
def combine(answer):
    adapters = [(*factors(), 6.0), (*(2 * t.flip(0) for t in factors()), 3.0)]
    weights = [0.75, 0.5]
    right = combine_solution(adapters, weights)
    mine = answer(adapters, weights)
    if near(mine, right):
        return "the deltas weighed, each at its own scale, and no products of strangers"
    expect(isinstance(mine, torch.Tensor), f"return a tensor; yours is {type(mine).__name__}")
    expect(
        not near(mine, _of_factors(adapters, weights)),
        "you weighed the factors: their product has B of one adapter times A of the other in it, "
        "and each weight squared",
    )
    expect(
        not near(mine, _sum_of_factors(adapters, weights)),
        "you added the factors: their product has B of one adapter times A of the other in it",
    )
    expect(
        not near(mine, sum(w * B @ A for (A, B, _), w in zip(adapters, weights, strict=True))),
        "the sum of the products B A, but you left out alpha / r of each",
    )
    expect(
        not near(mine, combine_solution(adapters, [1.0, 1.0])),
        "that is the sum of both deltas, without the weights",
    )
    expect(
        not near(mine, combine_solution(adapters, [w / sum(weights) for w in weights])),
        "you divided the weights by their sum: they are what was asked for, and need not sum to 1",
    )
    expect(
        not near(mine, combine_solution([(A, B, 6.0) for A, B, _ in adapters], weights)),
        "you used alpha of the first adapter for both: each has its own",
    )
    raise Wrong(f"the sum should be {describe(right)}; yours is {describe(mine)}")


def dora_solution(W, A, B, alpha, m):
    changed = W + (alpha / A.shape[0]) * B @ A
    return m[:, None] * changed / changed.norm(dim=1, keepdim=True)


@exercise(
    "DoRA: a length for every row",
    solution=dora_solution,
    mistakes=(
        (
            lambda W, A, B, alpha, m: (
                m[:, None] * (W + alpha / len(A) * B @ A) / W.norm(dim=1, keepdim=True)
            ),
            "norms of W alone",
        ),
        (
            lambda W, A, B, alpha, m: m[:, None] * (W + alpha / len(A) * B @ A),
            "never divided",
        ),
        (
            lambda W, A, B, alpha, m: (
                m[:, None]
                * (W + alpha / len(A) * B @ A)
                / (W + alpha / len(A) * B @ A).norm(dim=0, keepdim=True)
            ),
            "columns",
        ),
        (
            lambda W, A, B, alpha, m: (
                m[:, None] * (W + alpha / len(A) * B @ A) / (W + alpha / len(A) * B @ A).norm()
            ),
            "one norm for the whole",
        ),
        (lambda W, A, B, alpha, m: dora_solution(W, A, B, len(A), m), "left out alpha / r"),
        (
            lambda W, A, B, alpha, m: (
                W + m[:, None] * torch.nn.functional.normalize(alpha / len(A) * B @ A, dim=1)
            ),
            "normalised the delta",
        ),
    ),
    difficulty=3,
    importance=2,
    minutes=8,
    hints=(
        "First the weight that LoRA would make, W + (alpha / r) B A. DoRA changes its rows.",
        "Divide each row by its own norm, then give it the length in m: every row of W' has it.",
    ),
)
def dora(answer):
    A, B = factors()
    generator = torch.Generator().manual_seed(8)
    W = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    m, alpha = 1 + torch.rand(5, generator=generator, dtype=torch.float64), 6.0
    right, changed = dora_solution(W, A, B, alpha, m), W + alpha / 3 * B @ A
    try:
        mine = answer(W, A, B, alpha, m)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Wrong(
            "the shapes do not fit: m is (d_out), one number for each row. m[:, None] makes it a "
            "column"
        ) from error
    if near(mine, right):
        lengths = ", ".join(f"{value:.2f}" for value in mine.norm(dim=1))
        return f"the rows of W' have the lengths {lengths}, which is m"
    expect(isinstance(mine, torch.Tensor), f"return a tensor; yours is {type(mine).__name__}")
    long = m[:, None]
    expect(
        not near(mine, long * changed / W.norm(dim=1, keepdim=True)),
        "you divided by the norms of W alone: as A and B train, the rows of W' would not be as "
        "long as m says",
    )
    expect(not near(mine, long * changed), "you never divided by the norms: m would be a scale")
    expect(
        not near(mine, long * changed / changed.norm(dim=0, keepdim=True)),
        "those are the norms of the columns (dim=0). A row makes one output; the paper says "
        "column, but there W is transposed",
    )
    expect(
        not near(mine, long * changed / changed.norm()),
        "that is one norm for the whole matrix: every row has its own",
    )
    expect(
        not near(mine, dora_solution(W, A, B, 3, m)),
        "direction and length are right, but you left out alpha / r",
    )
    expect(
        not near(mine, W + long * nn.functional.normalize(alpha / 3 * B @ A, dim=1)),
        "you normalised the delta: what has direction and length is W + ΔW",
    )
    raise Wrong(f"W' should be {describe(right)}; yours is {describe(mine)}")


# --- the size ----------------------------------------------------------------------------------


def count_lora_solution(r, layers, d_model, d_kv, targets):
    d_out = {"q": d_model, "k": d_kv, "v": d_kv, "o": d_model}
    return layers * sum(r * (d_model + d_out[target]) for target in targets)


@exercise(
    "Count under grouped heads",
    solution=count_lora_solution,
    mistakes=(
        (lambda r, L, d, d_kv, targets: L * len(targets) * r * 2 * d, "as wide as d_model"),
        (lambda r, L, d, d_kv, targets: count_lora_solution(r, 1, d, d_kv, targets), "one layer"),
        (lambda r, L, d, d_kv, targets: L * len(targets) * r * d, "only A"),
        (
            lambda r, L, d, d_kv, targets: (
                L * sum(r * d * (d_kv if t in "kv" else d) for t in targets)
            ),
            "multiplied d_in by d_out",
        ),
        (
            lambda r, L, d, d_kv, targets: L * sum(r * (d_kv if t in "kv" else d) for t in targets),
            "only B",
        ),
        (lambda r, L, d, d_kv, targets: L * len(targets) * r * (d + d_kv), "q and o"),
    ),
    difficulty=2,
    importance=3,
    minutes=5,
    hints=(
        "Each matrix costs r·(d_in + d_out). Sum over the targets, then over the layers.",
        "With grouped heads, several query heads share one key head: k and v come out d_kv wide, "
        "smaller than d_model. All four take d_model numbers in.",
    ),
)
def count_lora(answer):
    layers, d, d_kv = 32, 4096, 1024  # Llama-3-8B

    def ask(r, targets):
        return answer(r, layers, d, d_kv, targets)

    def truth(r, targets):
        return count(LoRA(r=r, target_modules=targets), "llama-3-8b")

    for r, targets in ((8, ("q",)), (8, ("v",)), (16, ("q", "k", "v", "o"))):
        mine, right = ask(r, targets), truth(r, targets)
        if mine == right:
            continue
        widths = [d_kv if target in "kv" else d for target in targets]
        expect(mine != right // layers, "that is one layer: multiply by their number")
        expect(
            mine != layers * sum(r * d * width for width in widths),
            "you multiplied d_in by d_out: that is the size of a full ΔW, r times. A and B add up",
        )
        expect(
            mine != layers * len(targets) * r * 2 * d,
            "k and v are not as wide as d_model here: under grouped heads they have d_kv outputs",
        )
        expect(
            not (mine == layers * r * d and ask(8, ("v",)) == layers * 8 * d),
            "that is only A, (r, d_in) numbers: B has r·d_out more",
        )
        expect(
            mine != layers * sum(r * width for width in widths),
            "that is only B, (d_out, r) numbers: A has r·d_in more",
        )
        expect(
            mine != layers * len(targets) * r * (d + d_kv),
            "you gave every target d_kv outputs: q and o have d_model of them",
        )
        raise Wrong(f"for r = {r} on {', '.join(targets)} expected {right:,}, yours {mine:,}")
    return f"Llama-3-8B with r = 8 on q and v: {truth(8, ('q', 'v')):,}, checked against peftlab"


# --- the clinic --------------------------------------------------------------------------------

FAULTS = {
    "healthy": "nothing is wrong",
    "both zero": "A and B both started at zero",
    "alpha times r": "the delta is scaled by alpha · r instead of alpha / r",
    "not in the optimizer": "the optimizer was given no parameter of the adapter",
    "dropout left on": "dropout still drops while the model is evaluated",
}
_WARDS = ("not in the optimizer", "alpha times r", "healthy", "both zero", "dropout left on")


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
    return {f"ward {n}": _patient(fault) for n, fault in enumerate(_WARDS, 1)}


_CLUES = {
    "healthy": "the loss falls smoothly, B has a gradient at once, A follows, ΔW grows: leave it",
    "both zero": "both gradients are exactly zero in every step, so no optimizer could move it",
    "alpha times r": "ΔW jumps far beyond the size that is needed in the first steps, and the loss "
    "goes up before it comes down",
    "not in the optimizer": "B has a gradient in every step, and yet ΔW stays exactly zero: "
    "somebody computes gradients that nobody applies",
    "dropout left on": "the loss falls, but the same input gives two different losses",
}


def _swapped(first: str, second: str) -> dict[str, str]:
    """The right diagnosis with two wards exchanged."""
    swap = {first: second, second: first}
    return {f"ward {n}": swap.get(fault, fault) for n, fault in enumerate(_WARDS, 1)}


@exercise(
    "Debug the broken adapters",
    solution={f"ward {n}": fault for n, fault in enumerate(_WARDS, 1)},
    mistakes=(
        (_swapped("not in the optimizer", "both zero"), "ward 1 is not 'both zero'"),
        (_swapped("alpha times r", "dropout left on"), "ward 2 is not 'dropout left on'"),
        (_swapped("healthy", "dropout left on"), "ward 3 is not 'dropout left on'"),
        ({"ward 1": "not in the optimizer"}, "no diagnosis for ward 2"),
        ({f"ward {n}": "bad luck" for n in range(1, 6)}, "'bad luck' is not on the list"),
    ),
    difficulty=3,
    importance=5,
    minutes=10,
    hints=(
        "Look at the gradients before the loss. Zero for both, or for none?",
        "A gradient without a movement: who should have applied it?",
        "The last column is the difference between two evaluations of one and the same batch.",
    ),
)
def debug(answer):
    expect(isinstance(answer, dict), 'answer with a dict, such as {"ward 1": "healthy", ...}')
    if answer and all(value is None or value is ... for value in answer.values()):
        raise NotImplementedError
    for n, fault in enumerate(_WARDS, 1):
        ward = f"ward {n}"
        said = answer.get(ward)
        expect(said is not None and said is not ..., f"no diagnosis for {ward} yet")
        expect(said in FAULTS, f"{said!r} is not on the list: {', '.join(FAULTS)}")
        expect(
            said == fault,
            f"{ward} is not {said!r}. For that one you would see this: {_CLUES.get(said)}",
        )
    return "all five. " + "; ".join(f"{fault}: {clue}" for fault, clue in _CLUES.items())
