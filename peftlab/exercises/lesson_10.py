"""Lesson 10, pruning: a mask, two scores, a cut that is really smaller, and a merge that is not."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from peftlab.bases import load
from peftlab.exercises import after, exercise, expect, question
from peftlab.exercises.forms import a_tensor, same, several, unlike
from peftlab.methods import PruneStructures
from peftlab.methods.calibration import own_loss
from peftlab.methods.scores import choose
from peftlab.methods.structure_scores import importance
from peftlab.tasks import load as load_task
from peftlab.tuned import attach


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
        "c": ("next to nothing",
              "A product of two dense matrices has a number at every entry, small as it may be."),
        "d": ("what the rank allows: r of every d", "Low rank is not the same as few entries.")},
)  # fmt: skip
def merged_zeros():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 96, generator=generator)
    (mask,) = choose([W.abs()], 0.5, "layer")
    delta = torch.randn(96, 8, generator=generator) @ torch.randn(8, 96, generator=generator)
    share = ((W * mask + 1e-3 * delta) == 0).float().mean().item()
    letter = "c" if share < 0.01 else "d" if share < 0.15 else "b" if share < 0.4 else "a"
    return letter, f"Zeros before {(~mask).float().mean():.0%}, after {share:.0%}."


@question(
    "Each of tiny-gpt's six MLPs has 768 neurons. Take the 128 with the smallest weights out of "
    "one MLP at a time. Where does it hurt?",
    {
        "a": ("in all six, about the same",
              "In five of them next to nothing happens."),
        "b": ("in the first only", "Most of its loudest neurons have small weights."),
        "c": ("in the last only", "It is nearest to the output, and it hardly loses by it."),
        "d": ("nowhere: small weights do little",
              "A small weight does little if what comes through it is small too."),
    },
)  # fmt: skip
def where_it_hurts():
    base, known = load("tiny-gpt"), load_task("facts").test
    known = [example for example in known if example.group == "known facts"][:24]
    asked = [(e.prompt.split("\n")[0], e.target.split()[-1]) for e in known]
    texts = [f"Q: {question}\nA: {answer}" for question, answer in asked]  # as the base read them
    losses = [_loss(base, texts)]
    for i in range(base.anatomy.shape.layers):
        size = importance(base.anatomy, "neurons", f"layers.{i}")
        gone = size.argsort()[:128].tolist()
        with attach(base, PruneStructures(neurons={f"layers.{i}": gone})) as smaller:
            losses.append(_loss(smaller, texts))
    before, *after = losses
    hurt = [i for i, loss in enumerate(after) if loss > before + 0.5]
    letter = {(): "d", (0,): "b", (len(after) - 1,): "c"}.get(tuple(hurt), "a")
    found = ", ".join(f"{loss:.2f}" for loss in after)
    return letter, f"Loss on facts it knows: {before:.2f} nats; without them, by layer: {found}."


def _loss(model, texts):
    with torch.no_grad():
        return own_loss(model, texts).mean().item()


# --- the mask ----------------------------------------------------------------------------------
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


def _other_number(given, right):
    s = next(s for s in right if not same(given[s], right[s]))
    mine, wanted = (int((mask[s] == 0).sum()) for mask in (given, right))
    taken = f"takes {mine}" if mine != wanted else "takes as many others"
    return f"{wanted} of {right[s].numel()} entries should go, the smallest; yours {taken}"


@exercise(
    "A mask by magnitude", solution=by_magnitude_solution,
    mistakes=(
        (after(by_magnitude_solution, lambda mask: ~mask),
         "the wrong way round: True is what stays"),
        (lambda W, s: _lowest(W, round(s * W.numel())),
         "you took the most negative entries: −3 is far from zero, 0.1 is near"),
        (lambda W, s: choose([W.abs()], s, "row")[0],
         "you compared row by row; here the entries of the whole matrix are compared"),
        (lambda W, s: W * by_magnitude_solution(W, s),
         "that is the pruned matrix: return the mask alone"),
        (lambda W, s: W.abs() > s,
         "the sparsity is a share of the entries, no threshold for their size"),
        (lambda W, s: _lowest(W.abs(), round((1 - s) * W.numel())),
         "you read the sparsity as the share that stays: it is the share that goes")),
    praise="exactly round(s · n) of the smallest entries, wherever they stand",
    otherwise=_other_number, again=(7, 9), difficulty=1, importance=5, minutes=4,
    hints=(
        "Sort the absolute values of the whole matrix, not those of each row.",
        "round(sparsity · number of entries) of the smallest become False, all others are True."),
)  # fmt: skip
def by_magnitude(answer, *sizes):
    W, masks = weight(*sizes), {}
    for sparsity in (0.25, 0.375):
        mine = a_tensor(answer(W, sparsity), tuple(W.shape), "the mask's shape")
        two = ((mine == 0) | (mine == 1)).all()
        expect(
            two or same(mine, W * by_magnitude_solution(W, sparsity)),
            f"a mask is of True and False; yours is of other numbers, {mine.dtype}",
        )
        masks[sparsity] = mine.bool() if two else mine
    return masks


# --- Wanda -------------------------------------------------------------------------------------
def wanda_score_solution(W, X):
    return W.abs() * X.norm(dim=0)


@exercise(
    "Wanda's score", solution=wanda_score_solution,
    mistakes=(
        (lambda W, X: W * X.norm(dim=0),
         "some scores are negative: W itself is in it, and not its size"),
        (lambda W, X: W.abs(), "that is magnitude alone: the inputs do not appear in it"),
        (lambda W, X: W.abs() * X.norm(dim=1)[: W.shape[1]],
         "you took the norm over the features of a token; take it over the tokens, dim=0"),
        (lambda W, X: W.abs() * X.norm(dim=1),
         "the shapes do not fit: dim=1 makes one number a token; a column is over tokens, dim=0"),
        (lambda W, X: W.abs() * X.square().mean(dim=0).sqrt(),
         "you took the mean over the tokens: a norm is the root of a sum"),
        (lambda W, X: W.abs() * X.square().sum(dim=0),
         "you forgot the square root: ‖X_j‖₂, not its square"),
        (lambda W, X: W.abs() * X.sum(dim=0),
         "you summed the inputs: positive and negative ones cancel. A norm cannot"),
        (lambda W, X: W.abs() * W.norm(dim=0),
         "those are norms of the columns of W. X is what comes in")),
    praise="an entry counts for as much as what usually comes through it",
    otherwise=lambda given, right: "S_ij = |W_ij| · ‖X_j‖₂, with X_j the column j of X over all "
        f"tokens: {unlike(given, right)}",
    again=(7, 9, 35), difficulty=2, importance=4, minutes=5,
    hints=(
        "X is (tokens, d_in): one norm for each of its columns.",
        "Column j of W is multiplied by the norm of input j, in every row."),
)  # fmt: skip
def wanda_score(answer, d_out=5, d_in=8, tokens=40):
    W = weight(d_out, d_in)
    X = weight(tokens, d_in, seed=10) * torch.linspace(3, 0.1, d_in, dtype=torch.float64)
    return a_tensor(answer(W, X), (d_out, d_in), "a score for each entry: the shape")


# --- 2:4 ---------------------------------------------------------------------------------------
def two_four_solution(scores):
    groups = scores.reshape(-1, 4)
    keep = groups.argsort(dim=1)[:, 2:]  # the places of the two largest
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(1, keep, True)
    return mask.view(scores.shape)


def _kept_in_fours(given, right):
    counts = given.bool().reshape(-1, 4).sum(dim=1)
    if (counts == 2).all():
        return "each of your groups keeps 2 entries, and not always the largest"
    return f"your groups keep {counts.min()} to {counts.max()} entries; each must keep 2"


@exercise(
    "Two of every four", solution=two_four_solution,
    mistakes=(
        (lambda S: two_four_solution(S.T).T,
         "your fours lie along the output, down the columns; hardware wants them along the input"),
        (lambda S: ~two_four_solution(S), "you kept the two smallest of each group"),
        (lambda S: choose([S], 0.5, "row")[0], "that is half of every row, wherever it falls: some "
         "fours have three zeros and some have one"),
        (lambda S: choose([S], 0.5, "layer")[0], "that is half of the matrix, wherever it falls: "
         "some fours have three zeros and some have one"),
        (lambda S: two_four_solution(S.roll(-2, 1)).roll(2, 1),
         "your groups begin in the middle: the first is columns 0 to 3")),
    praise="every group of four along the input keeps its two largest",
    otherwise=_kept_in_fours, again=(7, 20), difficulty=2, importance=4, minutes=6,
    hints=(
        "A group is four neighbours of one row: scores.reshape(-1, 4) has one a line.",
        "argsort along dim=1 gives places, the lowest score first. The last two stay."),
)  # fmt: skip
def two_four(answer, rows=8, columns=12):
    given = answer(weight(rows, columns).abs())
    return a_tensor(given, (rows, columns), "the mask is as the scores: its shape")


# --- the cut -----------------------------------------------------------------------------------
def cut_neurons_solution(up, bias, down, gone):
    stay = [j for j in range(len(up)) if j not in gone]
    return up[stay], bias[stay], down[:, stay]


def _zeroed(up, bias, down, gone):
    up, bias, down = up.clone(), bias.clone(), down.clone()
    up[list(gone)], bias[list(gone)], down[:, list(gone)] = 0, 0, 0
    return up, bias, down


def _bias_as_it_was(up, bias, down, gone):
    up, _, down = cut_neurons_solution(up, bias, down, gone)
    return up, bias, down


@exercise(
    "Take neurons out", solution=cut_neurons_solution, difficulty=2, importance=5, minutes=6,
    mistakes=(
        (_zeroed, "up is as large as before: zeroing a row does not remove it",
         lambda given, right: len(given[0]) > len(right[0])),
        (lambda u, b, d, gone: (*cut_neurons_solution(u, b, d, gone)[:2], d),
         "down still has a column for every neuron: the shapes no longer fit",
         lambda given, right: given[2].shape[1] > right[2].shape[1]),
        (_bias_as_it_was, "the bias still has an entry for every neuron",
         lambda given, right: len(given[1]) > len(right[1])),
        (lambda u, b, d, gone: (u[list(gone)], b[list(gone)], d[:, list(gone)]),
         "you kept the ones that were to go"),
        (lambda u, b, d, gone: (*cut_neurons_solution(u, b, d, gone)[:2], d[:, len(gone) :]),
         "up is right, but down has other neurons' columns: the same places must go in both",
         lambda given, right: same(given[0], right[0]) and not same(given[2], right[2]))),
    again=(9, 7, (0, 3, 4, 8)),
    praise="the neurons are gone, and the output is that of the full size with them silenced",
    otherwise=lambda given, right: next(
        f"{name} is another: {unlike(mine, other)}"
        for name, mine, other in zip(("up", "the bias", "down"), given, right, strict=True)
        if not same(mine, other)),
    hints=(
        "Neuron j is row j of up (d_ff, d_model), entry j of its bias, column j of down.",
        "Keep the same list of places in all three. Zeroing is not removing."),
)  # fmt: skip
def cut_neurons(answer, d_ff=8, d=5, gone=(1, 4, 6)):
    mine = answer(weight(d_ff, d), weight(1, d_ff, 11)[0], weight(d, d_ff, 12), gone)
    return several(mine, 3, "return three tensors: up, bias, down")


# --- the merge ---------------------------------------------------------------------------------
def merge_masked_solution(W, mask, A, B, alpha):
    delta = alpha / len(A) * B @ A
    return mask * (W + delta)


@exercise(
    "Merge and keep the zeros", solution=merge_masked_solution,
    mistakes=(
        (lambda W, M, A, B, a: M * W + a / len(A) * B @ A,
         "the zeros are gone: ΔW has a number at every entry"),
        (lambda W, M, A, B, a: W + M * (a / len(A) * B @ A),
         "what was pruned from W came back: the mask belongs to W as well"),
        (lambda W, M, A, B, a: M * W, "ΔW is missing: what LoRA learned is lost"),
        (lambda W, M, A, B, a: M * (W + a * B @ A), "did you divide alpha by r?"),
        (lambda W, M, A, B, a: merge_masked_solution(W, ~M, A, B, a),
         "your mask is upside down: True is what stays")),
    praise="half is still exactly zero, and what was learned is in the rest",
    otherwise=lambda given, right: f"M ⊙ (W + (α / r) B A) is expected: {unlike(given, right)}",
    again=(7, 9, 3, 5.0), difficulty=2, importance=4, minutes=5,
    hints=(
        "ΔW is alpha / r · B A, dense. Which entries of it may be written?",
        "M ⊙ (W + ΔW): what is pruned stays zero in both terms."),
)  # fmt: skip
def merge_masked(answer, d_out=6, d_in=8, r=2, alpha=6.0):
    W, A, B = weight(d_out, d_in), weight(r, d_in, 14), weight(d_out, r, 15)
    (M,) = choose([W.abs()], 0.5, "layer")
    return a_tensor(answer(W, M, A, B, alpha))
