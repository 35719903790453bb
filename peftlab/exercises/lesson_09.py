"""Lesson 09, adapters and scales: the bottleneck, its start, its size, merged factors, a clinic."""

from __future__ import annotations

from functools import cache

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import gelu, relu

from peftlab.accounting import count
from peftlab.exercises import Wrong, exercise, expect, question
from peftlab.exercises.clinic import Ward
from peftlab.exercises.forms import a_count, a_tensor, same, several, unlike
from peftlab.methods import IA3, BitFit, HoulsbyAdapter


# --- predict first -----------------------------------------------------------------------------
@question(
    "BERT-base has 12 blocks and d_model = 768. Houlsby's adapters have a bottleneck of 64 and "
    "biases. How many parameters train in them?",
    {
        "a": ("1,189,632", "That is one adapter a block. Houlsby has two, one a sublayer."),
        "b": ("2,379,264", "That is W_down, W_up and both biases, twice a block."),
        "c": ("2,359,296", "That is the matrices alone: each adapter has 64 + 768 biases."),
        "d": ("14,155,776", "That is a d × d matrix for each adapter, with no bottleneck."),
    },
)
def how_many():
    m, d, places = 64, 768, 24
    numbers = {
        "a": 12 * (2 * m * d + m + d),
        "b": places * (2 * m * d + m + d),
        "c": places * 2 * m * d,
        "d": places * d * d,
    }
    trained = count(HoulsbyAdapter(64), "bert-base")
    letter = next(letter for letter, number in numbers.items() if number == trained)
    return letter, f"24 adapters × (2·64·768 + 64 + 768) = {trained:,}."


@question(
    "BitFit trains every bias of a model and nothing else. How many parameters on Llama-3-8B?",
    {
        "a": ("0.08% of it", "That is its share on BERT, where every linear map has a bias."),
        "b": ("as many as (IA)³ has", "(IA)³ brings its own vectors. BitFit has what it finds."),
        "c": ("the shifts of the norms", "An RMSNorm has a scale alone, and no shift."),
        "d": ("none", "A method that picks from what is there depends on what is there."),
    },
)
def biases_of_llama():
    trained, scales = count(BitFit(), "llama-3-8b"), count(IA3(), "llama-3-8b")
    letter = "d" if trained == 0 else "b" if trained == scales else "a"
    bert = count(BitFit(), "bert-base")
    return letter, f"{trained:,} on Llama-3-8B, {bert:,} on BERT-base."


@question(
    "The bias of a key, b_k, is added to every key: the score of query q with key k becomes "
    "q·(k + b_k). You change b_k to anything at all. What becomes of the attention weights?",
    {
        "a": ("they become uniform", "Adding one number to all scores flattens nothing."),
        "b": ("they become sharper", "Sharper needs larger differences; none changes."),
        "c": ("they stay as they are", "q·b_k is the same for every key of this query."),
        "d": ("it depends on the sign", "Either sign adds one number to all scores of a query."),
    },
)
def key_bias():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    b = 10 * torch.randn(8, generator=generator, dtype=torch.float64)
    before, after = ((q @ keys.T).softmax(dim=-1) for keys in (k, k + b))
    moved = (after - before).abs().max().item()
    spread = after.std(dim=-1).mean() / before.std(dim=-1).mean()
    letter = "c" if moved < 1e-12 else "b" if spread > 1 else "a"
    by = "less than 1e-12, which is rounding" if letter == "c" else f"{moved:.0e}"
    return letter, f"Five queries, five keys, a bias ten times as large: moved by {by}."


# --- the adapter -------------------------------------------------------------------------------
def parts(tokens: int = 4, d: int = 5, m: int = 3) -> list[torch.Tensor]:
    """Random y (4, 5), W_down (3, 5), b_down, W_up (5, 3) and b_up, the same at every call."""
    generator = torch.Generator().manual_seed(8)
    sizes = (tokens, d), (m, d), (m,), (d, m), (d,)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def adapter_solution(y, W_down, b_down, W_up, b_up):
    hidden = torch.relu(y @ W_down.T + b_down)
    return y + hidden @ W_up.T + b_up


def _with_gelu(y, W_down, b_down, W_up, b_up):
    return y + gelu(y @ W_down.T + b_down) @ W_up.T + b_up


@exercise(
    "A sequential adapter", solution=adapter_solution, difficulty=1, importance=5, minutes=4,
    mistakes=(
        (lambda y, D, b, U, c: relu(y @ D.T + b) @ U.T + c,
         "the bottleneck is right, but you forgot the way around it: y + f(y)"),
        (lambda y, D, b, U, c: y + (y @ D.T + b) @ U.T + c,
         "nothing bends: without σ the adapter is one matrix, LoRA's"),
        (_with_gelu,
         "your σ is GELU, which Houlsby's code has: here it is ReLU",
         lambda given, right: same(given, _with_gelu(*parts()), atol=0.02)),
        (lambda y, D, b, U, c: y + relu((y @ D.T + b) @ U.T + c),
         "the bend stands behind W_up; its place is in the middle"),
        (lambda y, D, b, U, c: y + relu(y @ D.T) @ U.T, "you left out the biases b_down and b_up"),
        (lambda y, D, b, U, c: y + relu(y @ D + b) @ U.T + c,
         "the shapes do not fit: W_down is (m, d) and W_up is (d, m), so both are transposed when "
         "they stand behind y"),
        (lambda y, D, b, U, c: relu(y + relu(y @ D.T + b) @ U.T + c),
         "the sum goes through σ; only W_down y + b_down does")),
    praise="down, bend, up, and y around it all", otherwise=unlike, again=(7, 9, 5),
    hints=(
        "Down, bend, up, and then add what you started from.",
        "W_down is (m, d) and y is (tokens, d): y @ W_down.T is (tokens, m)."),
)  # fmt: skip
def adapter(answer, *sizes):
    return a_tensor(answer(*parts(*sizes)))


# --- its start ---------------------------------------------------------------------------------
def start_solution(d, m):
    W_down = torch.randn(m, d) / d**0.5
    W_up = torch.zeros(d, m)
    return W_down, W_up


@exercise(
    "Start at the identity", solution=start_solution,
    mistakes=(
        (lambda d, m: (torch.zeros(m, d), torch.zeros(d, m)), "no gradient ever comes"),
        (lambda d, m: (torch.randn(m, d) / 3, torch.randn(d, m)), "not the base"),
        (lambda d, m: (torch.zeros(m, d), torch.randn(d, m)), "σ has no slope"),
        (lambda d, m: (torch.randn(d, m), torch.zeros(m, d)), "W_down should be"),
        (lambda d, m: (torch.ones(m, d) / d, torch.zeros(d, m)), "all units of the bottleneck")),
    again=(9, 5), difficulty=2, importance=5, minutes=5,
    hints=(
        "y + f(y) = y for every y needs f = 0. Which matrix at zero is enough?",
        "The other one must let something through, or the first step has nothing to go by."),
)  # fmt: skip
def start(answer, d=6, m=4):
    D, U = several(answer(d, m), 2, "return two tensors, W_down and W_up")
    a_tensor(D, (m, d), "W_down"), a_tensor(U, (d, m), "W_up")
    expect(D.isfinite().all() and U.isfinite().all(), "a number is infinite, or none at all")
    D, U = (t.detach().float().requires_grad_() for t in (D, U))
    y = torch.randn(32, d, generator=torch.Generator().manual_seed(1))
    f = relu(y @ D.T) @ U.T
    expect(
        not (f != 0).any(),
        f"the start is not the base: |f(y)| is {f.norm() / y.norm():.2g} of |y|. Houlsby's is near "
        "zero; here, make it zero",
    )
    (y + f - 1).square().mean().backward()
    if not U.grad.any() and not D.grad.any():
        expect(U.any(), "both are zero, so no gradient ever comes: each one's passes the other")
        raise Wrong(
            "with W_down at zero every unit sits where σ has no slope, and ReLU passes nothing back"
        )
    expect(
        torch.linalg.matrix_rank(D.detach()) > 1,
        "all units of the bottleneck are equal, and get equal gradients: it has one unit, not m",
    )
    return "f = 0 at the start, and W_up has a gradient: ParallelAdapter's start"


# --- its size ----------------------------------------------------------------------------------
def count_adapters_solution(m, layers, d_model, a_block):
    return layers * a_block * (2 * m * d_model + m + d_model)


@exercise(
    "Count adapters", solution=count_adapters_solution, difficulty=1, importance=3, minutes=4,
    mistakes=(
        (lambda m, L, d, n: L * n * 2 * m * d,
         "the matrices are right, but you left out the biases"),
        (lambda m, L, d, n: L * n * (m * d + m + d), "you counted one of the two matrices"),
        (lambda m, L, d, n: L * (2 * m * d + m + d), "that is one adapter a block"),
        (lambda m, L, d, n: L * n * (2 * m * d + 2 * d),
         "the bias of W_down has m numbers and not d_model"),
        (lambda m, L, d, n: n * (2 * m * d + m + d), "that is one block: you forgot the blocks")),
    praise=lambda given, right: "on BERT-base with m = 48, two a block: "
        f"{count(HoulsbyAdapter(48), 'bert-base'):,}",
    otherwise="for m = {case[0]}, {case[1]} blocks, d_model = {case[2]}, {case[3]} a block: "
              "not {given:,}",
    right=lambda: {
        (48, 12, 768, 2): count(HoulsbyAdapter(48), "bert-base"),
        (3, 6, 192, 1): count_adapters_solution(3, 6, 192, 1),
    },
    hints=(
        "W_down has m·d_model numbers, b_down has m. And W_up and b_up?",
        "Houlsby puts two adapters into a block, Pfeiffer one."),
)  # fmt: skip
def count_adapters(answer):
    return {case: a_count(answer(*case)) for case in ((48, 12, 768, 2), (3, 6, 192, 1))}


# --- merged factors ----------------------------------------------------------------------------
def merge_factors_solution(W, b, factors, of_input):
    if of_input:
        return W * factors, b
    return W * factors[:, None], b * factors


@exercise(
    "Merge (IA)³", solution=merge_factors_solution,
    mistakes=(
        (lambda W, b, f, i: (W * f if i else W * f[:, None], b),
         "W is right, but the output was l ⊙ (W x + b): the bias as well"),
        (lambda W, b, f, i: (W * f, b * 2) if i else (W * f[:, None], b * f),
         "W is right, but here the bias stays: x is scaled, not b"),
        (lambda W, b, f, i: (W * f, b * f),
         "you scaled columns, that is inputs; outputs are rows, W * l[:, None]"),
        (lambda W, b, f, i: (W + f if i else W + f[:, None], b),
         "you added the factors; (IA)³ multiplies"),
        (lambda W, b, f, i: (W / f, b) if i else (W / f[:, None], b / f),
         "you divided: that is how one would unmerge")),
    praise="rows and bias for outputs, columns alone for inputs",
    otherwise=lambda given, right: (
        "of inputs: each column of W belongs to one input, so W * l"
        if given[0]
        else "of outputs: each row of W belongs to one output, so W * l[:, None] and b * l"
    ),
    difficulty=3, importance=4, minutes=8, again=(7,),
    hints=(
        "l ⊙ (W x + b) = W' x + b' for every x. Which rows or columns of W belong to l?",
        "Output factors scale rows, l[:, None], and the bias. Input factors scale columns only."),
)  # fmt: skip
def merge_factors(answer, d=4):
    """Whether inputs are scaled, and W and the bias there: of the first that goes wrong, if any.

    The bias is told to be right or not, and not judged (None) where W is wrong.
    """
    generator = torch.Generator().manual_seed(3)
    W, b, factors = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((d, d), (d,), (d,))
    )
    for of_input in (False, True):
        made = answer(W, b, factors, of_input)
        made = several(made, 2, "return two tensors: W and b, merged")
        for name, got, old in zip("Wb", made, (W, b), strict=True):
            a_tensor(got, tuple(old.shape), f"{name} keeps its shape when factors are merged: it")
        right = merge_factors_solution(W, b, factors, of_input)
        weight, bias = (same(one, other) for one, other in zip(made, right, strict=True))
        if not (weight and bias):
            break
    return of_input, made[0], bias if weight else None


# --- a clinic ----------------------------------------------------------------------------------
WARD = Ward({
    "healthy": ("B", "nothing is wrong",
        "Its output starts at the base's, its W_down gets a gradient, the base is still."),
    "no way around": ("D", "y is not added to f(y)",
        "At the start its output is gone entirely: moved by 100%."),
    "both zero": ("A", "W_down and W_up both started at zero",
        "Its W_down gets no gradient, so only the bias of W_up can learn."),
    "base not frozen": ("C", "the base's weights were given to the optimizer too",
        "Look at what the base moved by, and at how many parameters train."),
})  # fmt: skip
FAULTS = WARD.faults


class Patient(nn.Module):
    """A frozen linear map with an adapter behind it, ill or well."""

    def __init__(self, fault: str):
        super().__init__()
        self.base, self.fault = nn.Linear(8, 8), fault
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if fault == "both zero":
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)
        self.base.requires_grad_(fault == "base not frozen")

    def forward(self, x):
        y = self.base(x)
        f = self.up(torch.relu(self.down(y)))
        return f if self.fault == "no way around" else y + f


@cache
def clinic(steps: int = 60) -> pd.DataFrame:
    """What four patients show: at the start, in the first gradients, and after some steps."""
    rows = {}
    for letter, fault in WARD.right.items():
        with torch.random.fork_rng():
            torch.manual_seed(8)
            model = Patient(fault)
            x, rule = torch.randn(256, 8), torch.randn(8, 8) / 3
        before = model.base.weight.detach().clone()
        plain = model.base(x).detach()
        target = plain + torch.relu(x @ rule)
        change = (model(x) - plain).norm() / plain.norm()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for step in range(steps):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if step == 1:  # the first in which a zero W_up has let W_down see anything
                gradient = model.down.weight.grad.norm().item()
            optimizer.step()
            losses.append(loss.item())
        rows[letter] = {
            "output at the start, moved by": change.item(),
            "loss at the start": losses[0],
            "loss at the end": losses[-1],
            "gradient of W_down, step 2": gradient,
            "base moved by": (model.base.weight - before).norm().item() / before.norm().item(),
            "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    return pd.DataFrame(rows).T.rename_axis("patient")


debug = WARD.exercise(
    "debug", "Debug the broken adapters", confused=("AB", "BC", "CD"), unknown="overfitting",
    difficulty=3, importance=5, minutes=8,
    hints=(
        "Begin with the column on the base: three of the four must not move it.",
        "An output moved by 1 at the start is an output that was replaced."),
)  # fmt: skip
