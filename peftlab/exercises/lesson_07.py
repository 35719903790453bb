"""Lesson 07, QLoRA: levels, blocks, bytes, the gradient through codes, and four broken readers."""

from __future__ import annotations

import math

import pandas as pd
import torch

from peftlab.exercises import Wrong, exercise, expect, match, question, swapped
from peftlab.sites.quantisation import NF4_OFFSET, blockwise, normal_levels, quantise, table, unpack

# --- predict first -----------------------------------------------------------------------------


@question(
    "A weight is a code of 4 bits. Every block of 64 weights has one scale in float32. How many "
    "bits does a weight take, all in all?",
    {
        "a": ("4", "Nobody can read the codes without their scales, and those take bits too."),
        "b": (
            "4.127",
            "That is with scales in 8 bits, which is the next step: double quantisation.",
        ),
        "c": ("4.5", "One scale of 32 bits is shared by 64 weights."),
        "d": ("36", "Each block has one scale, not each weight."),
    },
)
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
        "c": ("W̃ of both layers", "The first layer's own W̃ lies beside its B, not behind it."),
    },
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
        "c": ("none of it: what arrives is as far from ΔW as nothing would be", "The few codes "
              "that move go by a whole level, and the scales of the blocks move too."),
    },
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
    "The sixteen levels",
    solution=levels_solution,
    mistakes=(
        (lambda q: _scaled(_sides(q, 7, 7)), "15 levels"),
        (lambda q: _scaled(_sides(q, 7, 8, top=1.0)), "infinite"),
        (lambda q: _sides(q, 7, 8), "divide by the largest"),
        (lambda q: _scaled(_sides(q, 8, 8, zero=False)), "no level is zero"),
        (lambda q: [i / 7.5 - 1 for i in range(16)], "equal distances"),
        (lambda q: _scaled(_sides(q, 8, 7)), "wrong side"),
        (lambda q: _scaled(_sides(q, 7, 8, top=1 - 1 / 32)), "another offset"),
    ),
    difficulty=3,
    importance=4,
    minutes=8,
    hints=(
        "Eight levels above zero, zero itself, seven below: sixteen.",
        "The probabilities go from ½ to the offset in equal steps: 8 above, 7 below, each side "
        "with steps of its own. The offset is the mean of 1 − 1/30 and 1 − 1/32.",
        "At last divide all of them by the largest, so that they lie in [−1, 1].",
    ),
)
def levels(answer):
    def quantile(probability):
        if not 0 < probability < 1:
            return math.copysign(math.inf, probability - 0.5)
        return torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)).item()

    mine = torch.as_tensor([float(level) for level in answer(quantile)], dtype=torch.float64)
    right = normal_levels().double()
    expect(
        mine.isfinite().all(),
        "a level is infinite or not a number: the quantile of probability 1 is infinite, so stop "
        "at the offset",
    )
    mine = mine.sort().values
    even = len(mine) == 16 and torch.allclose(mine.diff(), mine.diff()[:1], atol=1e-6)
    expect(not even, "these lie at equal distances: no quantile was asked for")
    expect(
        len(mine) != 15,
        "15 levels, the same on both sides: this table circulates, and a sixteenth code is wasted",
    )
    expect(len(mine) == 16, f"16 levels are needed; yours are {len(mine)}")
    expect(
        0 in mine,
        "no level is zero: a weight of zero could not be written, and padding and pruned weights "
        "would come back as something else",
    )
    expect(
        mine.abs().max() < 1 + 1e-6,
        "they are right up to a factor: divide by the largest, so that a block's largest weight "
        "has the level 1",
    )
    if torch.allclose(mine, right, atol=1e-6):
        return "the table of NF4, within 1e-6 of the one that is used everywhere"
    expect(
        not torch.allclose(mine, -right.flip(0), atol=1e-6),
        "the eighth level is on the wrong side: NF4 has eight above zero and seven below",
    )
    raise Wrong(
        "sixteen levels with a zero, but of another offset: the probabilities go from ½ to "
        f"{NF4_OFFSET:.4f}. Your second level is {mine[1]:.4f}; it should be {right[1]:.4f}"
    )


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


@exercise(
    "Codes, block by block",
    solution=encode_solution,
    mistakes=(
        (
            lambda w, t, b: _encode(w, t, b, lambda x: x.abs().max().expand(len(x))),
            "one scale for all",
        ),
        (
            lambda w, t, b: _encode(w, t, b, lambda x: x.amax(dim=1)),
            "largest weight, with its sign",
        ),
        (lambda w, t, b: _encode(w, t, b, lambda x: x.std(dim=1)), "standard deviation"),
        (lambda w, t, b: _encode(w, t, b, nearest=False), "the level below"),
        (
            lambda w, t, b: (encode_solution(w, t, b)[0], torch.ones(len(w) // b)),
            "scales are all 1",
        ),
        (lambda w, t, b: _encode(w, t, b, lambda x: torch.ones(len(x))), "never divided"),
    ),
    difficulty=2,
    importance=5,
    minutes=6,
    hints=(
        "weights.view(-1, block_size) has one block a row.",
        "The scale of a block is its largest absolute value, so that the scaled weights lie in "
        "[−1, 1].",
        "(scaled[..., None] - levels).abs() is the distance to every level; argmin finds the "
        "nearest.",
    ),
)
def encode(answer):
    weights = torch.randn(512, generator=torch.Generator().manual_seed(3))
    weights[:64] *= 0.1  # one block is much smaller than the others
    levels = table("nf4")
    codes, absmax = answer(weights, levels, 64)
    right, scales = blockwise(weights, 64, levels)
    codes, absmax = torch.as_tensor(codes).flatten(), torch.as_tensor(absmax).flatten()
    expect(len(codes) == 512, f"one code a weight is needed: 512, not {len(codes)}")
    expect(len(absmax) == 8, f"one scale a block is needed: 8, not {len(absmax)}")
    same = torch.equal(codes.long(), right.long())
    if same and torch.allclose(absmax, scales):
        return "512 codes and 8 scales, as the package has them"
    expect(
        not (same and bool((absmax == 1).all())),
        "the codes are right, but the scales are all 1: nobody could read them back",
    )
    expect(
        not bool((absmax == absmax[0]).all()) or bool((absmax == 1).all()),
        "one scale for all blocks: a single large weight then decides about all of them",
    )
    expect(not bool((absmax == 1).all()), "the weights were never divided by a scale")
    blocks = weights.view(-1, 64)
    expect(
        not torch.allclose(absmax, blocks.amax(dim=1)),
        "the scale is the largest weight, with its sign: take the largest absolute value",
    )
    expect(
        not torch.allclose(absmax, blocks.std(dim=1)),
        "the scale is the standard deviation: weights beyond it would have no level at all",
    )
    off = codes.long() - right.long()
    expect(
        not (bool((off <= 0).all()) and bool((off < 0).any())),
        "the level below is taken, not the nearest: the error is twice as large",
    )
    raise Wrong(f"{int((off != 0).sum())} of 512 codes are not those of the nearest level")


# --- bytes -------------------------------------------------------------------------------------


def pack_solution(codes):
    return codes[::2] * 16 + codes[1::2]


@exercise(
    "Two codes in a byte",
    solution=pack_solution,
    mistakes=(
        (lambda c: c[::2] + c[1::2], "lie on top of each other"),
        (lambda c: c[::2] + 16 * c[1::2], "in the low half"),
        (lambda c: c, "still one code a byte"),
        (lambda c: c[: len(c) // 2] * 16 + c[len(c) // 2 :], "first half of all codes"),
        (lambda c: c[::2] * 10 + c[1::2], "by ten"),
    ),
    difficulty=1,
    importance=3,
    minutes=4,
    hints=(
        "A byte has 8 bits, a code has 4. The first goes into the high four: times 16.",
        "codes[::2] are the first of every pair, codes[1::2] the second.",
    ),
)
def pack(answer):
    codes = torch.randint(16, (40,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    mine = torch.as_tensor(answer(codes)).flatten()
    expect(len(mine) != 40, "still one code a byte: 40 bytes for 40 codes, where 20 do")
    expect(len(mine) == 20, f"20 bytes are needed; yours are {len(mine)}")
    right, first, second = pack_solution(codes), codes[::2], codes[1::2]
    if torch.equal(mine.to(torch.uint8), right):
        assert torch.equal(unpack(right, 40), codes)
        return "20 bytes, and unpacking gives all 40 codes back"
    expect(
        not torch.equal(mine, first + second),
        "the two codes lie on top of each other: 3 and 4 would read like 4 and 3",
    )
    expect(
        not torch.equal(mine, first + 16 * second),
        "the first code is in the low half: that would work too, but readers of this format look "
        "for it in the high half",
    )
    expect(
        not torch.equal(mine, first * 10 + second),
        "you multiply by ten: four bits are sixteen values",
    )
    expect(
        not torch.equal(mine, codes[:20] * 16 + codes[20:]),
        "you pair the first half of all codes with the second: neighbours share a byte",
    )
    raise Wrong(f"the first byte of codes {codes[:2].tolist()} should be {right[0]}, not {mine[0]}")


# --- the gradient ------------------------------------------------------------------------------


def backward_solution(gradient, codes):
    return gradient @ codes.dequantise()


@exercise(
    "The gradient through the codes",
    solution=backward_solution,
    mistakes=(
        (lambda g, c: g @ c.dequantise().T, "shapes do not fit"),
        (lambda g, c: torch.zeros(len(g), c.shape[1]), "no gradient at all"),
        (lambda g, c: g.T @ g, "gradient of a weight"),
        (lambda g, c: g @ table("nf4")[c.codes.int()], "left out the scales"),
        (lambda g, c: g @ c.codes.float(), "numbers of the levels"),
    ),
    difficulty=3,
    importance=5,
    minutes=6,
    hints=(
        "Forward, row by row, it is y = x W̃ᵀ with W̃ (d_out, d_in). Which matrix turns ȳ into x̄?",
        "W̃ is frozen: no gradient of W̃ is asked for. But x came from somewhere that trains.",
        "codes.dequantise() is W̃. It is made again here, so that nothing dense is kept between.",
    ),
)
def backward(answer):
    generator = torch.Generator().manual_seed(2)
    codes = quantise(torch.randn(48, 64, generator=generator), 64)
    gradient = torch.randn(5, 48, generator=generator)
    weight = codes.dequantise()
    try:
        mine = answer(gradient, codes)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Wrong(
            "the shapes do not fit: ȳ is (tokens, d_out) and W̃ is (d_out, d_in), so no transpose "
            "is needed"
        ) from error
    expect(isinstance(mine, torch.Tensor), f"return a tensor; yours is {type(mine).__name__}")
    if mine.shape == (5, 64) and torch.allclose(mine, gradient @ weight, atol=1e-4):
        return "ȳ W̃, with W̃ decoded a second time: nothing dense was kept"
    expect(
        mine.shape == (5, 64),
        f"yours is {tuple(mine.shape)}: that looks like the gradient of a weight, and W̃ has none. "
        "x̄ has the shape of x, (5, 64)",
    )
    expect(
        mine.any(),
        "no gradient at all: everything below this layer, with its A and B, would never train",
    )
    expect(
        not torch.allclose(mine, gradient @ table("nf4")[codes.codes.int()], atol=1e-4),
        "you left out the scales: levels times m of their block are the weights",
    )
    expect(
        not torch.allclose(mine, gradient @ codes.codes.float(), atol=1e-3),
        "the codes are only the numbers of the levels, not weights: decode them first",
    )
    raise Wrong("x̄ should be ȳ W̃, and its numbers are others")


# --- the clinic --------------------------------------------------------------------------------

FAULTS = {
    "one block": "one scale for the whole matrix, where each block of 64 should have its own",
    "swapped": "the two codes of each byte are read in the wrong order",
    "no scale": "the levels are never multiplied by the scale of their block",
    "no mean": "double quantisation, and the mean of the scales is not added back",
}
WARD = {"A": "swapped", "B": "no mean", "C": "one block", "D": "no scale"}
_SIGNS = {
    "one block": "Its largest weight is right and the error is not: most weights have become zero.",
    "swapped": "Its error all but vanishes once neighbours are exchanged.",
    "no scale": "Its largest weight is exactly 1, whatever the matrix was.",
    "no mean": "It has about as many zeros as it should have, but all weights are far too small.",
}


def _patient(fault: str) -> tuple[torch.Tensor, torch.Tensor]:
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


def clinic() -> pd.DataFrame:
    """Four readers of one matrix's codes, and a sound one: errors, zeros, the largest weight."""
    rows = {}
    for patient, fault in {"sound": "", **WARD}.items():
        weight, read = _patient(fault)
        exchanged = read.view(-1, 2).flip(1).view(weight.shape)
        rows[patient] = {
            "error, % of W": 100 * ((read - weight).norm() / weight.norm()).item(),
            "neighbours exchanged": 100 * ((exchanged - weight).norm() / weight.norm()).item(),
            "zeros, %": 100 * (read == 0).float().mean().item(),
            "largest / largest of W": (read.abs().max() / weight.abs().max()).item(),
            "typical / typical of W": (read.abs().mean() / weight.abs().mean()).item(),
        }
    return pd.DataFrame(rows).T.rename_axis("patient")


@exercise(
    "Debug the broken readers",
    solution=WARD,
    mistakes=(
        (swapped(WARD, "A", "B"), "Look again at patient A"),
        (swapped(WARD, "B", "C"), "Look again at patient B"),
        (swapped(WARD, "C", "D"), "Look again at patient C"),
        (WARD | {"D": "one block"}, "twice"),
        (WARD | {"D": "too few bits"}, "none of the four"),
    ),
    difficulty=3,
    importance=4,
    minutes=8,
    hints=(
        "Which patient gets well when neighbours are exchanged?",
        "Levels without scales lie in [−1, 1], wherever the weights lay.",
        "A single large weight makes one scale for all large: what is then nearest to the others?",
    ),
)
def debug(answer):
    expect(isinstance(answer, dict), 'answer with a dict, such as {"A": "swapped", ...}')
    return match(answer, WARD, FAULTS, _SIGNS)
