"""Lesson 09, pruning: a mask, two scores, a cut that is really smaller, and a merge that is not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from peftlab.bases.data import data_path
from peftlab.exercises import Wrong, exercise, expect, question
from peftlab.methods.scores import choose, is_two_four

# --- predict first -----------------------------------------------------------------------------


@question(
    "You set half of a 512×512 matrix to zero and save it. Its safetensors file is now:",
    {
        "a": ("about half as large", "A zero is stored as any other number: four bytes."),
        "b": ("as large as before", "The file holds shape times width, whatever the values are."),
        "c": ("about 3% larger", "That would be values and mask: one bit more for 32."),
        "d": ("about 53% as large", "That is values that are not zero, and one bit an entry."),
    },
)
def half_the_file():
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    (mask,) = choose([W.abs()], 0.5, "layer")
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for tensor in (W, W * mask):
            save_file({"W": tensor}, path := Path(folder) / "W.safetensors")
            sizes.append(path.stat().st_size)
    ratio = sizes[1] / sizes[0]
    letter = "b" if ratio == 1 else "a" if ratio < 0.515 else "d" if ratio < 1 else "c"
    return letter, f"{sizes[0]:,} bytes before, {sizes[1]:,} after."


@question(
    "Half of W is zero. Beside it you trained a LoRA that knows nothing of the mask, and merge it: "
    "W + (α/r) B A. How much of the result is zero?",
    {
        "a": ("still half", "ΔW is written onto the zeros as well."),
        "b": ("a quarter", "A and B would need zeros of their own for that."),
        "c": (
            "next to nothing",
            "A product of two dense matrices has a number at every entry, small as it may be.",
        ),
        "d": ("what the rank allows: r of every d", "Low rank is not the same as few entries."),
    },
)
def merged_zeros():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 96, generator=generator)
    (mask,) = choose([W.abs()], 0.5, "layer")
    delta = torch.randn(96, 8, generator=generator) @ torch.randn(8, 96, generator=generator)
    share = ((W * mask + 1e-3 * delta) == 0).float().mean().item()
    letter = "c" if share < 0.01 else "d" if share < 0.15 else "b" if share < 0.4 else "a"
    return letter, f"Zeros before {(~mask).float().mean():.0%}, after {share:.0%}."


@question(
    "Take a sixth of the neurons out of every MLP of tiny-gpt. Which choice hurts most?",
    {
        "a": ("drawn at random", "At random you lose a fair sample. There is something worse."),
        "b": (
            "those with the smallest weights",
            "Small weights can stand for large effects: the activation between them is not small.",
        ),
        "c": (
            "those that the loss feels least",
            "That choice looks at the effect itself, to first order.",
        ),
    },
)
def worst_neurons():
    rows = json.loads(data_path("results", "pruning.json").read_text())["curves"]
    loss = {}
    for row in rows:
        if (row["base"], row["group"]) == ("tiny-gpt", "neurons") and row["amount"] < 0.2:
            loss.setdefault(row["label"], []).append(row["loss"])
    mean = {label: sum(values) / len(values) for label, values in loss.items()}
    letters = {"random": "a", "by magnitude": "b", "by gradient": "c"}
    found = ", ".join(f"{label} {value:.2f}" for label, value in mean.items())
    return letters[max(mean, key=mean.get)], f"Loss in nats: {found}."


# --- the mask ----------------------------------------------------------------------------------


def same(mine, right) -> bool:
    """A tensor of the same shape and numbers."""
    return (
        isinstance(mine, torch.Tensor)
        and mine.shape == right.shape
        and torch.allclose(mine.double(), right.double())
    )


def weight(rows: int = 6, columns: int = 8, seed: int = 9) -> torch.Tensor:
    """Random numbers, no two of one size; those of one row are larger than those of another."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return W * torch.linspace(0.2, 2, rows, dtype=torch.float64)[:, None]


def by_magnitude_solution(W, sparsity):
    count = round(sparsity * W.numel())
    order = W.abs().flatten().argsort()
    mask = torch.ones(W.numel(), dtype=torch.bool)
    mask[order[:count]] = False
    return mask.view(W.shape)


def _lowest(scores, count):
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort()[:count]] = False
    return mask.view(scores.shape)


@exercise(
    "A mask by magnitude",
    solution=by_magnitude_solution,
    mistakes=(
        (lambda W, s: ~by_magnitude_solution(W, s), "the wrong way round"),
        (lambda W, s: _lowest(W, round(s * W.numel())), "most negative"),
        (lambda W, s: choose([W.abs()], s, "row")[0], "row by row"),
        (lambda W, s: W * by_magnitude_solution(W, s), "that is the pruned matrix"),
        (lambda W, s: W.abs() > s, "threshold"),
        (lambda W, s: _lowest(W.abs(), round((1 - s) * W.numel())), "share that stays"),
    ),
    difficulty=1,
    importance=5,
    minutes=4,
    hints=(
        "Sort the absolute values of the whole matrix, not those of each row.",
        "round(sparsity · number of entries) of the smallest become False, all others are True.",
    ),
)
def by_magnitude(answer):
    W = weight()
    for sparsity in (0.25, 0.375):
        right = by_magnitude_solution(W, sparsity)
        mine = answer(W.clone(), sparsity)
        expect(isinstance(mine, torch.Tensor), f"return a tensor; yours is {type(mine).__name__}")
        if mine.dtype != torch.bool:
            expect(not same(mine, W * right), "that is the pruned matrix: return the mask alone")
            raise Wrong(f"a mask is of True and False; yours is {mine.dtype}")
        if same(mine, right):
            continue
        count = round(sparsity * W.numel())
        expect(not same(mine, ~right), "the wrong way round: True is what stays")
        expect(
            not same(mine, _lowest(W, count)),
            "you took the most negative entries: −3 is far from zero, 0.1 is near",
        )
        expect(
            not same(mine, choose([W.abs()], sparsity, "row")[0]),
            "you compared row by row; here the entries of the whole matrix are compared",
        )
        expect(
            not same(mine, W.abs() > sparsity),
            "the sparsity is a share of the entries, no threshold for their size",
        )
        expect(
            not same(mine, _lowest(W.abs(), W.numel() - count)),
            "you read the sparsity as the share that stays: it is the share that goes",
        )
        gone = (~mine).sum().item()
        raise Wrong(f"{count} of {W.numel()} entries should go, the smallest; yours takes {gone}")
    return "exactly round(s · n) of the smallest entries, wherever they stand"


# --- Wanda -------------------------------------------------------------------------------------


def wanda_score_solution(W, X):
    return W.abs() * X.norm(dim=0)


@exercise(
    "Wanda's score",
    solution=wanda_score_solution,
    mistakes=(
        (lambda W, X: W * X.norm(dim=0), "some scores are"),
        (lambda W, X: W.abs(), "inputs do not appear"),
        (lambda W, X: W.abs() * X.norm(dim=1)[: W.shape[1]], "over the features"),
        (lambda W, X: W.abs() * X.square().sum(dim=0), "square root"),
        (lambda W, X: W.abs() * X.sum(dim=0), "cancel"),
        (lambda W, X: W.abs() * W.norm(dim=0), "columns of W"),
    ),
    difficulty=2,
    importance=4,
    minutes=5,
    hints=(
        "X is (tokens, d_in): one norm for each of its columns.",
        "Column j of W is multiplied by the norm of input j, in every row.",
    ),
)
def wanda_score(answer):
    W = weight(5, 8)
    X = weight(40, 8, seed=10) * torch.linspace(3, 0.1, 8, dtype=torch.float64)
    right, mine = W.abs() * X.norm(dim=0), answer(W.clone(), X.clone())
    if same(mine, right):
        return "an entry counts for as much as what usually comes through it"
    expect(isinstance(mine, torch.Tensor), f"return a tensor; yours is {type(mine).__name__}")
    expect(mine.shape == W.shape, f"a score for each entry, {tuple(W.shape)}; {tuple(mine.shape)}")
    expect(
        not same(mine, W * X.norm(dim=0)),
        "some scores are negative: W itself is in it, and not its size",
    )
    expect(not same(mine, W.abs()), "that is magnitude alone: the inputs do not appear in it")
    expect(
        not same(mine, W.abs() * X.norm(dim=1)[: W.shape[1]]),
        "you took the norm over the features of a token; take it over the tokens, dim=0",
    )
    expect(
        not same(mine, W.abs() * X.square().sum(dim=0)),
        "you forgot the square root: ‖X_j‖₂, not its square",
    )
    expect(
        not same(mine, W.abs() * X.sum(dim=0)),
        "you summed the inputs: positive and negative ones cancel. A norm cannot",
    )
    expect(
        not same(mine, W.abs() * W.norm(dim=0)),
        "those are norms of the columns of W. X is what comes in",
    )
    raise Wrong("S_ij = |W_ij| · ‖X_j‖₂, with X_j the column j of X over all tokens")


# --- 2:4 ---------------------------------------------------------------------------------------


def two_four_solution(scores):
    groups = scores.reshape(-1, 4)
    keep = groups.argsort(dim=1)[:, 2:]  # the places of the two largest
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(1, keep, True)
    return mask.view(scores.shape)


@exercise(
    "Two of every four",
    solution=two_four_solution,
    mistakes=(
        (lambda S: two_four_solution(S.T).T, "along the output"),
        (lambda S: ~two_four_solution(S), "the two smallest"),
        (lambda S: choose([S], 0.5, "row")[0], "half of every row"),
        (lambda S: choose([S], 0.5, "layer")[0], "half of the matrix"),
        (lambda S: two_four_solution(S.roll(-2, 1)).roll(2, 1), "begin"),
    ),
    difficulty=2,
    importance=4,
    minutes=6,
    hints=(
        "A group is four neighbours of one row: scores.reshape(-1, 4) has one a line.",
        "argsort along dim=1 gives places, the lowest score first. The last two stay.",
    ),
)
def two_four(answer):
    S = weight(8, 12).abs()
    right, mine = two_four_solution(S), answer(S.clone())
    expect(isinstance(mine, torch.Tensor) and mine.shape == S.shape, "a mask of the scores' shape")
    if same(mine, right) and is_two_four(mine.bool()):
        return "every group of four along the input keeps its two largest"
    expect(
        not same(mine, two_four_solution(S.T).T),
        "your fours lie along the output, down the columns; hardware wants them along the input",
    )
    expect(not same(mine, ~right), "you kept the two smallest of each group")
    for within, words in (("row", "half of every row"), ("layer", "half of the matrix")):
        expect(
            not same(mine, choose([S], 0.5, within)[0]),
            f"that is {words}, wherever it falls: some fours have three zeros and some have one",
        )
    expect(
        not same(mine, two_four_solution(S.roll(-2, 1)).roll(2, 1)),
        "your groups begin in the middle: the first is columns 0 to 3",
    )
    counts = mine.bool().reshape(-1, 4).sum(dim=1)
    raise Wrong(f"your groups keep {counts.min()} to {counts.max()} entries; each must keep 2")


# --- the cut -----------------------------------------------------------------------------------


def cut_neurons_solution(up, bias, down, gone):
    stay = [j for j in range(len(up)) if j not in gone]
    return up[stay], bias[stay], down[:, stay]


def _zeroed(up, bias, down, gone):
    up, bias, down = up.clone(), bias.clone(), down.clone()
    up[list(gone)], bias[list(gone)], down[:, list(gone)] = 0, 0, 0
    return up, bias, down


@exercise(
    "Take neurons out",
    solution=cut_neurons_solution,
    mistakes=(
        (_zeroed, "as large as before"),
        (
            lambda up, bias, down, gone: (*cut_neurons_solution(up, bias, down, gone)[:2], down),
            "down still has",
        ),
        (
            lambda up, bias, down, gone: (
                cut_neurons_solution(up, bias, down, gone)[0],
                bias,
                cut_neurons_solution(up, bias, down, gone)[2],
            ),
            "the bias still has",
        ),
        (
            lambda up, bias, down, gone: (up[list(gone)], bias[list(gone)], down[:, list(gone)]),
            "kept the ones that were to go",
        ),
        (
            lambda up, bias, down, gone: (
                *cut_neurons_solution(up, bias, down, gone)[:2],
                down[:, : len(up) - len(gone)],
            ),
            "other neurons' columns",
        ),
    ),
    difficulty=2,
    importance=5,
    minutes=6,
    hints=(
        "Neuron j is row j of up (d_ff, d_model), entry j of its bias, column j of down.",
        "Keep the same list of places in all three. Zeroing is not removing.",
    ),
)
def cut_neurons(answer):
    up, bias, down, gone = weight(8, 5), weight(1, 8, 11)[0], weight(5, 8, 12), (1, 4, 6)
    mine = answer(up.clone(), bias.clone(), down.clone(), gone)
    expect(isinstance(mine, tuple) and len(mine) == 3, "return three tensors: up, bias, down")
    right = cut_neurons_solution(up, bias, down, gone)
    if all(same(a, b) for a, b in zip(mine, right, strict=True)):
        x = weight(3, 5, 13)
        whole = torch.relu(x @ up.T + bias)
        whole[:, list(gone)] = 0
        smaller = torch.relu(x @ right[0].T + right[1]) @ right[2].T
        assert torch.allclose(smaller, whole @ down.T)
        return "3 of 8 neurons gone, and the output is that of the full size with them silenced"
    expect(mine[0].shape != up.shape, "up is as large as before: zeroing a row does not remove it")
    expect(
        mine[2].shape[1] == 5 or mine[2].shape != down.shape,
        "down still has a column for every neuron: the shapes no longer fit",
    )
    expect(mine[1].shape != bias.shape, "the bias still has an entry for every neuron")
    expect(not same(mine[0], up[list(gone)]), "you kept the ones that were to go")
    expect(
        not (same(mine[0], right[0]) and not same(mine[2], right[2])),
        "up is right, but down has other neurons' columns: the same places must go in both",
    )
    raise Wrong(f"up should be {tuple(right[0].shape)} and down {tuple(right[2].shape)}")


# --- the merge ---------------------------------------------------------------------------------


def merge_masked_solution(W, mask, A, B, alpha):
    delta = alpha / len(A) * B @ A
    return mask * (W + delta)


@exercise(
    "Merge and keep the zeros",
    solution=merge_masked_solution,
    mistakes=(
        (lambda W, M, A, B, alpha: M * W + alpha / len(A) * B @ A, "zeros are gone"),
        (lambda W, M, A, B, alpha: W + M * (alpha / len(A) * B @ A), "came back"),
        (lambda W, M, A, B, alpha: M * W, "learned is lost"),
        (lambda W, M, A, B, alpha: M * (W + alpha * B @ A), "divide alpha by r"),
        (lambda W, M, A, B, alpha: ~M * (W + alpha / len(A) * B @ A), "upside down"),
    ),
    difficulty=2,
    importance=4,
    minutes=5,
    hints=(
        "ΔW is alpha / r · B A, dense. Which entries of it may be written?",
        "M ⊙ (W + ΔW): what is pruned stays zero in both terms.",
    ),
)
def merge_masked(answer):
    W, A, B, alpha = weight(6, 8), weight(2, 8, 14), weight(6, 2, 15), 6.0
    (M,) = choose([W.abs()], 0.5, "layer")
    delta = 3.0 * B @ A
    right, mine = M * (W + delta), answer(W.clone(), M.clone(), A.clone(), B.clone(), alpha)
    if same(mine, right):
        return "half is still exactly zero, and what was learned is in the rest"
    expect(isinstance(mine, torch.Tensor), f"return a tensor; yours is {type(mine).__name__}")
    expect(not same(mine, M * W + delta), "the zeros are gone: ΔW has a number at every entry")
    expect(
        not same(mine, W + M * delta),
        "what was pruned from W came back: the mask belongs to W as well",
    )
    expect(not same(mine, M * W), "ΔW is missing: what LoRA learned is lost")
    expect(not same(mine, M * (W + 2 * delta)), "did you divide alpha by r?")
    expect(not same(mine, ~M * (W + delta)), "your mask is upside down: True is what stays")
    raise Wrong("M ⊙ (W + (α / r) B A) is expected, in the shape of W")
