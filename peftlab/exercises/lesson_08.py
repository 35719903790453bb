"""Lesson 08, QLoRA: blocks, levels, bits, the gradient through codes, and four broken readers."""

from __future__ import annotations

import pandas as pd
import torch

from peftlab.exercises import after, exercise, expect, question
from peftlab.exercises.clinic import Ward
from peftlab.exercises.forms import a_number, a_tensor, same, several, unlike
from peftlab.sites.quantisation import NF4_OFFSET, blockwise, normal_levels, quantise, table


# --- predict first -----------------------------------------------------------------------------
@question(
    "A weight is a code of 4 bits. Every block of 64 weights has one scale in float32. How many "
    "bits does a weight take, all in all?",
    {
        "a": ("4", "Nobody can read the codes without their scales, and those take bits too."),
        "b": ("4.127",
              "That is with scales in 8 bits, which is the next step: double quantisation."),
        "c": ("4.5", "One scale of 32 bits is shared by 64 weights."),
        "d": ("36", "Each block has one scale, not each weight.")},
)  # fmt: skip
def how_many_bits():
    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    held = quantise(values, 64, double_quant=False)
    bits = {"a": 4.0, "b": round(quantise(torch.ones(4096, 256)).bits, 3), "c": 4.5, "d": 36.0}
    letter = next(letter for letter, number in bits.items() if number == held.bits)
    return (
        letter,
        f"{held.bytes:,} bytes are held for {values.numel():,} weights: {held.bits} bits.",
    )


@question(
    "A text says: 'in QLoRA backpropagation goes only through A and B, which is why memory falls.' "
    "Two layers in a row, both with codes and A, B. What must the gradient of the first layer's B "
    "pass through on its way?",
    {
        "a": ("only A and B of both layers", "A and B of the second layer are beside its W̃: the "
              "output of the first goes into both, so the gradient comes back out of both."),
        "b": ("W̃ of the second layer as well", "The first layer's output is read by W̃ too."),
        "c": ("W̃ of both layers", "The first layer's own W̃ lies beside its B, not behind it.")},
)  # fmt: skip
def which_way():
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    first, second, x = draw(6, 6), draw(6, 6), draw(1, 6)
    A, B = (draw(2, 6), draw(2, 6)), (draw(6, 2), draw(6, 2))

    def gradient(first, second):
        b = B[0].clone().requires_grad_()
        h = first @ x.T + b @ (A[0] @ x.T)
        # A linear loss: the gradient is a product of what stands behind b, and of nothing else.
        (second @ h + B[1] @ (A[1] @ h)).sum().backward()
        return b.grad

    usual = gradient(first, second)
    needs_second = not torch.allclose(usual, gradient(first, torch.zeros(6, 6)))
    needs_first = not torch.allclose(usual, gradient(torch.zeros(6, 6), second))
    letter = "c" if needs_first else "b" if needs_second else "a"
    return letter, (
        f"Put zeros in place of the second W̃: the gradient changes: {needs_second}. "
        f"In place of the first: {needs_first}."
    )


@question(
    "ΔW is a hundredth of the size of W. You merge it: W + ΔW is written in 4 bits again, with "
    "blocks of 64. How much of ΔW is in the new weight?",
    {
        "a": ("nearly all of it", "A code moves only when W + ΔW crosses a halfway point."),
        "b": ("about half of it", "Few codes move, but one that moves goes a whole level, which is "
              "far more than ΔW asked for."),
        "c": ("none of it: what arrives is as far from ΔW as nothing would be",
              "The few codes that move go by a whole level, and the scales of the blocks "
              "move too.")},
)  # fmt: skip
def how_much_arrives():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(256, 256, generator=generator)
    delta = 0.01 * torch.randn(256, 256, generator=generator)
    start = quantise(W).dequantise()
    arrived = quantise(start + delta).dequantise() - start
    moved = (quantise(start + delta).packed != quantise(start).packed).float().mean().item()
    wrong = ((arrived - delta).norm() / delta.norm()).item()
    letter = "a" if wrong < 0.2 else "b" if wrong < 0.8 else "c"
    return letter, (
        f"{moved:.1%} of the bytes change. What arrives differs from ΔW by {wrong:.1f} times ΔW."
    )


# --- the levels --------------------------------------------------------------------------------
def levels_solution(quantile):
    offset = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    positive = [quantile(0.5 + i * (offset - 0.5) / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + i * (offset - 0.5) / 7) for i in range(7, 0, -1)]
    return [level / positive[-1] for level in (*negative, 0.0, *positive)]


def _sides(quantile, negative, positive, top=NF4_OFFSET, zero=True):
    sides = [
        [quantile(0.5 + i * (top - 0.5) / count) for i in range(1, count + 1)]
        for count in (negative, positive)
    ]
    return [*(-q for q in sides[0][::-1]), *([0.0] if zero else []), *sides[1]]


def _scaled(levels):
    return [level / max(map(abs, levels)) for level in levels]


@exercise(
    "The sixteen levels", solution=levels_solution,
    mistakes=(
        (lambda q: levels_solution(q)[::-1], "these are the levels in another order: code 0 is the "
         "lowest, and what is written with one order is not read with another",
         lambda given, right: same(given.sort().values, right)),
        (lambda q: _scaled(_sides(q, 7, 8, top=1.0)), "a level is infinite or not a number: the "
         "quantile of probability 1 is infinite, so stop at the offset",
         lambda given, right: not given.isfinite().all()),
        (lambda q: [i / 7.5 - 1 for i in range(16)],
         "these lie at equal distances: no quantile was asked for",
         lambda given, right: len(given) == 16 and given.diff().std() < 1e-6),
        (lambda q: _scaled(_sides(q, 7, 7)),
         "15 levels, the same on both sides: this table circulates, and a sixteenth code is wasted",
         lambda given, right: len(given) == 15),
        (lambda q: _scaled(_sides(q, 8, 8, zero=False)), "no level is zero: a weight of zero could "
         "not be written, and padding and pruned weights would come back as something else",
         lambda given, right: len(given) == 16 and 0 not in given),
        (lambda q: _sides(q, 7, 8), "they are right up to a factor: divide by the largest, so that "
         "a block's largest weight has the level 1",
         lambda given, right: same(given / given.abs().max(), right)),
        (lambda q: _scaled(_sides(q, 8, 7)),
         "the eighth level is on the wrong side: NF4 has eight above zero and seven below"),
        (lambda q: _scaled(_sides(q, 7, 8, top=1 - 1 / 32)),
         lambda given, right: "sixteen levels with a zero, but of another offset: the "
             f"probabilities go from ½ to {NF4_OFFSET:.4f}; {unlike(given, right)}",
         lambda given, right: len(given) == 16)),
    praise="the table of NF4, within 1e-6 of the one that is used everywhere",
    otherwise=lambda given, right: f"16 levels are needed; yours are {len(given)}",
    right=normal_levels, difficulty=3, importance=4, minutes=8,
    hints=(
        "Eight levels above zero, zero itself, seven below: sixteen.",
        "The probabilities go from ½ to the offset in equal steps: 8 above, 7 below, each side "
        "with steps of its own. The offset is the mean of 1 − 1/30 and 1 − 1/32.",
        "At last divide all of them by the largest, so that they lie in [−1, 1]."),
)  # fmt: skip
def levels(answer):
    def quantile(probability):
        made = torch.special.ndtri(torch.as_tensor(probability, dtype=torch.float64))
        return made if isinstance(probability, torch.Tensor) else made.item()

    return a_tensor(answer(quantile)).double().flatten()


# --- blocks ------------------------------------------------------------------------------------
def encode_solution(weights, levels, block_size):
    blocks = weights.view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax[:, None]
    codes = (scaled[..., None] - levels).abs().argmin(dim=-1)
    return codes.view(-1), absmax


def _encode(weights, levels, block_size, absmax=None, nearest=True):
    blocks = weights.view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if absmax is None else absmax(blocks)
    scaled = blocks / absmax[:, None]
    if nearest:
        return (scaled[..., None] - levels).abs().argmin(dim=-1).view(-1), absmax
    return (torch.searchsorted(levels, scaled, right=True) - 1).clamp(0).view(-1), absmax


def _weights(blocks=8, size=64):
    weights = torch.randn(blocks * size, generator=torch.Generator().manual_seed(3))
    weights[:size] *= 0.1  # one block is much smaller than the others
    return weights


@exercise(
    "Codes, block by block", solution=encode_solution,
    mistakes=(
        (lambda w, t, b: (encode_solution(w, t, b)[0], torch.ones(len(w) // b)),
         "the codes are right, but the scales are all 1: nobody could read them back"),
        (lambda w, t, b: _encode(w, t, b, lambda x: torch.ones(len(x))),
         "the weights were never divided by a scale",
         lambda given, right: (given[1] == 1).all() and (given[0] != right[0]).any()),
        (lambda w, t, b: _encode(w, t, b, lambda x: x.abs().max().expand(len(x))),
         "one scale for all blocks: a single large weight then decides about all of them",
         lambda given, right: (given[1] == given[1][0]).all()),
        (lambda w, t, b: _encode(w, t, b, lambda x: x.amax(dim=1)),
         "the scale is the largest weight, with its sign: take the largest absolute value"),
        (lambda w, t, b: _encode(w, t, b, lambda x: x.std(dim=1)),
         "the scale is the standard deviation: weights beyond it would have no level at all"),
        (lambda w, t, b: _encode(w, t, b, nearest=False),
         "the level below is taken, not the nearest: the error is twice as large",
         lambda given, right: (given[0] <= right[0]).all())),
    praise="codes and scales as the package has them",
    otherwise=lambda given, right: f"{int((given[0] != right[0]).sum())} of {len(right[0])} codes "
        f"are not those of the nearest level: {unlike(given, right)}",
    right=lambda blocks=8, size=64: blockwise(_weights(blocks, size), size, table("nf4")),
    again=(7, 45), difficulty=2, importance=5, minutes=6,
    hints=(
        "weights.view(-1, block_size) has one block a row.",
        "The scale of a block is its largest absolute value, so that the scaled weights lie "
        "in [−1, 1].",
        "(scaled[..., None] - levels).abs() is the distance to every level; argmin finds "
        "the nearest."),
)  # fmt: skip
def encode(answer, blocks=8, size=64):
    made = answer(_weights(blocks, size), table("nf4"), size)
    codes, absmax = (part.flatten() for part in several(made, 2, "return codes and scales"))
    n = blocks * size
    expect(len(codes) == n, f"one code a weight is needed: {n}, not {len(codes)}")
    expect(len(absmax) == blocks, f"one scale a block is needed: {blocks}, not {len(absmax)}")
    return codes, absmax


# --- bits --------------------------------------------------------------------------------------
def bits_solution(block, group):
    return 4 + 8 / block + 32 / (block * group)


def _sizes(numbers):
    """`numbers(block, group)` for three pairs of sizes."""
    return {case: numbers(*case) for case in ((64, 256), (32, 100), (96, 7))}


@exercise(
    "Bits a weight", solution=bits_solution,
    mistakes=(
        (lambda block, group: 4 + 32 / block,
         "that is one scale of 32 bits a block: here it is a code of 8 bits"),
        (lambda block, group: 4 + 8 / block,
         "you left out the scale of scales: 32 bits for every group of blocks"),
        (lambda block, group: 8 / block + 32 / (block * group),
         "you left out the code itself: 4 bits"),
        (lambda block, group: 4 + 8 / block + 32 / group,
         "a group has `group` blocks, so block · group weights share its 32 bits"),
        (lambda block, group: 4 + 8 / group + 32 / (block * group),
         "a scale of 8 bits is shared by the weights of its block, not by the blocks of its group"),
        (lambda block, group: 4 + 32 / block + 8 / (block * group),
         "the wrong way round: the scale of a block has 8 bits, and the scale of scales has 32"),
        (lambda block, group: (4 + 8 / block + 32 / (block * group)) / 8,
         "that is in bytes: bits are asked for"),
        (lambda block, group: 4 + 8 // block + 32 // (block * group),
         "// rounds to a whole number: bits a weight are a mean, and need none")),
    praise=lambda given, right: f"{right[64, 256]:.3f} bits, for blocks of 64 in groups of 256",
    otherwise="for block, group = {case} expected {right:.5g}, yours {given:.5g}",
    difficulty=1, importance=4, minutes=4,
    hints=(
        "Ask of each kind of number how many weights share it: a code 1, a scale `block`.",
        "The 32 bits of the scale of scales are shared by block · group weights."),
)  # fmt: skip
def bits(answer):
    return _sizes(lambda *case: a_number(answer(*case)))


# --- the gradient ------------------------------------------------------------------------------
def backward_solution(gradient, codes):
    return gradient @ codes.dequantise()


@exercise(
    "The gradient through the codes", solution=backward_solution,
    mistakes=(
        (lambda g, c: g @ c.dequantise().T, "the shapes do not fit: ȳ is (tokens, d_out) and W̃ is "
         "(d_out, d_in), so no transpose is needed"),
        (lambda g, c: g.T @ g, lambda given, right: f"yours is {tuple(given.shape)}: that looks "
             f"like the gradient of a weight, and W̃ has none. x̄ is as x, {tuple(right.shape)}",
         lambda given, right: given.shape != right.shape),
        (after(backward_solution, torch.zeros_like),
         "no gradient at all: everything below this layer, with its A and B, would never train"),
        (lambda g, c: g @ table("nf4")[c.codes.int()],
         "you left out the scales: levels times m of their block are the weights"),
        (lambda g, c: g @ c.codes.float(),
         "the codes are only the numbers of the levels, not weights: decode them first")),
    praise="ȳ W̃, with W̃ decoded a second time: nothing dense was kept",
    otherwise=lambda given, right: f"x̄ should be ȳ W̃: {unlike(given, right)}",
    atol=1e-4, again=(7, 33, 15), difficulty=3, importance=5, minutes=6,
    hints=(
        "Forward, row by row, it is y = x W̃ᵀ with W̃ (d_out, d_in). Which matrix turns ȳ into x̄?",
        "W̃ is frozen: no gradient of W̃ is asked for. But x came from somewhere that trains.",
        "codes.dequantise() is W̃. It is made again here, so that nothing dense is kept between."),
)  # fmt: skip
def backward(answer, tokens=5, d_out=48, d_in=64):
    generator = torch.Generator().manual_seed(2)
    codes = quantise(torch.randn(d_out, d_in, generator=generator), d_in)
    return a_tensor(answer(torch.randn(tokens, d_out, generator=generator), codes))


# --- the clinic --------------------------------------------------------------------------------
WARD = Ward({
    "one block": ("C", "one scale for the whole matrix, where each block of 64 should have its own",
        "Its largest weight is right and the error is not: most weights have become zero."),
    "swapped": ("A", "the two codes of each byte are read in the wrong order",
        "Its error all but vanishes once neighbours are exchanged."),
    "no scale": ("D", "the levels are never multiplied by the scale of their block",
        "Its largest weight is exactly 1, whatever the matrix was."),
    "no mean": ("B", "double quantisation, and the mean of the scales is not added back",
        "It has about as many zeros as it should have, but all weights are far too small."),
})  # fmt: skip
FAULTS = WARD.faults


def _patient(fault: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with a few large weights, and what this reader makes of its codes."""
    generator = torch.Generator().manual_seed(4)
    weight = 0.02 * torch.randn(128, 256, generator=generator)
    weight.view(-1)[::4099] = 0.4  # as real matrices have them
    if fault == "one block":
        return weight, quantise(weight, weight.numel()).dequantise()
    codes = quantise(weight, 64)
    if fault == "swapped":
        return weight, codes.dequantise().view(-1, 2).flip(1).view(weight.shape)
    if fault == "no scale":
        return weight, codes.levels[codes.codes.int()]
    if fault == "no mean":
        scales = (codes.scales - codes.mean)[:, None]
        return weight, (codes.levels[codes.codes.int()].view(-1, 64) * scales).view(weight.shape)
    return weight, codes.dequantise()


def _seen(fault: str | None) -> list[dict[str, float]]:
    weight, read = _patient(fault)
    exchanged = read.view(-1, 2).flip(1).view(weight.shape)
    row = {
        "error, % of W": 100 * ((read - weight).norm() / weight.norm()).item(),
        "neighbours exchanged": 100 * ((exchanged - weight).norm() / weight.norm()).item(),
        "zeros, %": 100 * (read == 0).float().mean().item(),
        "largest / largest of W": (read.abs().max() / weight.abs().max()).item(),
        "typical / typical of W": (read.abs().mean() / weight.abs().mean()).item(),
    }
    return [row]


def clinic() -> pd.DataFrame:
    """Four readers of one matrix's codes, and a sound one: errors, zeros, the largest weight."""
    return WARD.examine(_seen).set_index("patient")


debug = WARD.exercise(
    "debug", "Debug the broken readers", confused=("AB", "BC", "CD"), unknown="too few bits",
    difficulty=3, importance=4, minutes=8,
    hints=(
        "Which patient gets well when neighbours are exchanged?",
        "Levels without scales lie in [−1, 1], wherever the weights lay.",
        "A single large weight makes one scale for all large: what is then nearest to the others?"),
)  # fmt: skip
