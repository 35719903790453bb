"""Weights as codes of four bits: sixteen levels, a scale for every block, two codes in a byte.

    w ≈ m · T[c]      T the levels in [−1, 1],  c a code of 4 bits,  m = max|w| of the block

Pure functions of tensors, and `Quantised`, which holds exactly the bytes that it counts. A tensor
is read row by row and cut into blocks; each block has its own m. With double quantisation the m's
are codes too: their mean is subtracted, and the differences are cut into blocks of 256 and
written in 8 bits. Dettmers et al. 2023, arXiv:2305.14314, section 3.

The tie rule: a value exactly halfway between two levels takes the lower one. The scaled value is
w · (1/m) and the halfway points are (a + b)/2, both in float32, so near a tie the codes are those
of bitsandbytes and not always those of w / m.

On a GPU kernels can do the same with the same bits, for those who ask for them: `kernels.py`.
"""

import functools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Int32, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import pad

from peftlab.bases.plain import has_numbers, plain
from peftlab.sites import kernels

Levels = Float32[Tensor, " levels"]

QUANT_TYPES = ("nf4", "fp4", "e2m1", "int4")
ABSMAX_BLOCK = 256  # how many m's share one scale under double quantisation

# The probability of NF4's outermost quantiles. At probability 1 the quantile is infinite, so the
# table stops short of it. If the normal is cut into n equally likely cells, the middle of the
# outermost cell is 1/(2n) from the edge. All 16 levels suggest n = 16; the 15 that lie evenly
# around an exact zero suggest n = 15. The average of the two is bitsandbytes' constant, 0.9677083.
# This origin is our reading: neither the paper nor the code gives one.
NF4_OFFSET = ((1 - 1 / 30) + (1 - 1 / 32)) / 2


def normal_levels(negative: int = 7, positive: int = 8, offset: float = NF4_OFFSET) -> Levels:
    """Quantiles of the normal on both sides of an exact zero, divided by the largest.

    The probabilities go from ½ to `offset` in equal steps, as many as there are levels on that
    side. Each half has its own step, so that neither has a level of −0 beside the zero.
    """
    steps = [torch.linspace(0.5, offset, n + 1, dtype=torch.float64) for n in (negative, positive)]
    below, above = (torch.special.ndtri(step[1:]) for step in steps)
    levels = torch.cat([-below.flip(0), torch.zeros(1, dtype=torch.float64), above])
    return (levels / levels.abs().max()).float()


def float_levels(subnormal: float) -> Levels:
    """Numbers with one sign, two exponent and one mantissa bit: 2ᵉ (1 + m/2), and a subnormal.

    Sorted, and divided by the largest. Before that the positive ones are 2, 3, 4, 6, 8, 12, and
    below them the subnormal, which is 1 in the format itself.
    """
    positive = [subnormal, *(2**e * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1))]
    levels = [*(-level for level in positive[::-1]), 0.0, *positive]
    return torch.tensor(levels, dtype=torch.float32) / 12


def table(quant_type: str = "nf4") -> Levels:
    """The levels of a data type in [−1, 1], lowest first. Raises ValueError for an unknown type.

    nf4    16 levels at quantiles of the normal
    fp4    15 levels, as bitsandbytes has them: its subnormal is 1/192, where E2M1 has 1/12
    e2m1   15 levels, the format itself
    int4   15 levels at equal distances, −7/7 … 7/7

    Every caller gets a copy: who writes into it changes nobody else's.
    """
    with plain():
        return _table(quant_type).clone()


def dynamic_table() -> Levels:
    """A copy of the 8-bit levels for the m's: zero, one, and ±10⁻ᵉ times the middles of 2⁶⁻ᵉ cells
    of [0.1, 1], for e = 0 … 6: fine near the ends, and never coarse in ratio. Dettmers et al. 2021,
    arXiv:2110.02861, section 2.1."""
    with plain():
        return _dynamic_table().clone()


@functools.cache
def _table(quant_type: str) -> Levels:
    with plain():  # it is kept for tensors with numbers as well
        if quant_type == "nf4":
            return normal_levels()
        if quant_type in ("fp4", "e2m1"):
            return float_levels(0.0625 if quant_type == "fp4" else 1.0)
        if quant_type == "int4":
            return torch.arange(-7, 8, dtype=torch.float32) / 7
    raise ValueError(f"quant_type={quant_type!r}: allowed is {', '.join(QUANT_TYPES)}")


@functools.cache
def _dynamic_table() -> Levels:
    with plain():
        edges = [torch.linspace(0.1, 1, 2 ** (6 - e) + 1, dtype=torch.float32) for e in range(7)]
        positive = torch.cat([(x[:-1] + x[1:]) / 2 * 10.0**-e for e, x in enumerate(edges)])
        return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


def _there(table: Tensor, device: torch.device) -> Tensor:
    """A small table on a device; on a GPU it stays, so that no forward pass waits for a copy."""
    if device.type != "cuda":
        return table.to(device)
    return _kept_there(tuple(table.flatten().tolist()), table.shape, device)


@functools.lru_cache(maxsize=64)
def _kept_there(numbers: tuple[float, ...], shape: torch.Size, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device).view(shape)


def nearest(values: Float32[Tensor, "*size"], levels: Levels) -> UInt8[Tensor, "*size"]:
    """The index of the nearest level; a value exactly halfway takes the lower one.

    Levels may come in any order. Of two equal levels the first takes the values below them.
    """
    ordered, order = levels.sort(stable=True)
    halfway = (ordered[:-1] + ordered[1:]) / 2
    found = order.to(torch.uint8).index_select(0, below(values, halfway).flatten())
    return found.view(values.shape)


def below(
    values: Float32[Tensor, "*size"], halfway: Float32[Tensor, " points"]
) -> Int32[Tensor, "*size"]:
    """How many of the points, in rising order, lie below each value.

    A search in a table for each value. If the points are few, a CPU passes faster over all values
    once for each point.
    """
    if len(halfway) > 15 or values.device.type != "cpu" or not has_numbers(values):
        return torch.bucketize(values, halfway, out_int32=True)
    count = torch.zeros(values.shape, dtype=torch.uint8)
    for point in halfway:
        count += values > point
    return count.int()


def blockwise(
    flat: Float32[Tensor, " n"], block_size: int, levels: Levels
) -> tuple[UInt8[Tensor, " n"], Float32[Tensor, " blocks"]]:
    """Codes, and m = max|w| of every block; the last block may be short.

    A block of zeros has m = 0 and the code of zero.
    """
    blocks = pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    inverse = 1 / absmax.clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (blocks * inverse[:, None]).clamp(-1, 1)  # w · (1/m) can round to above 1
    codes = nearest(scaled, levels.to(flat.device)).view(-1)
    return codes[: len(flat)].clone(), absmax  # a view would hold the padding as well


def pack(codes: UInt8[Tensor, " n"]) -> UInt8[Tensor, " bytes"]:
    """Two codes of four bits in a byte, the first in the high half; an odd number is padded."""
    high, low = pad(codes, (0, len(codes) % 2)).view(-1, 2).unbind(dim=1)
    return high << 4 | low


def unpack(packed: UInt8[Tensor, " bytes"], n: int) -> UInt8[Tensor, " n"]:
    """The first n codes of packed bytes."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]


@dataclass(frozen=True, eq=False)
class Quantised:
    """A tensor in 4 bits: its codes, and the scales that decode them.

    `packed` has two codes a byte, `absmax` one m for each block: numbers in float32, or with
    double quantisation the codes of m − `mean`, in blocks of 256 whose scales are `scale`.
    """

    packed: UInt8[Tensor, " bytes"]
    absmax: Tensor
    scale: Float32[Tensor, " scales"] | None
    mean: Float32[Tensor, ""] | None
    shape: torch.Size
    block_size: int
    levels: Levels

    def __post_init__(self):
        with plain():  # a kernel is told the levels as numbers: it has its own copy on the device
            object.__setattr__(self, "numbers", tuple(self.levels.tolist()))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors held here, but for the table of levels, which has 64 bytes."""
        held = {name: getattr(self, name) for name in ("packed", "absmax", "scale", "mean")}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def bytes(self) -> int:
        """Bytes really held: the sum of the storages' sizes."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())

    @property
    def bits(self) -> float:
        """Bits really held for each weight."""
        return 8 * self.bytes / self.shape.numel()

    @property
    def codes(self) -> UInt8[Tensor, "*shape"]:
        """The codes, one a byte, in the shape of the tensor, for inspection."""
        return unpack(self.packed, self.shape.numel()).view(self.shape)

    @property
    def scales(self) -> Float32[Tensor, " blocks"]:
        """m of every block, as decoded."""
        if self.scale is None:
            return self.absmax
        coarse = self.scale.repeat_interleave(ABSMAX_BLOCK)[: len(self.absmax)]
        return _there(_dynamic_table(), coarse.device)[self.absmax.int()] * coarse + self.mean

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
        """m · T[c], computed in float32. Each byte looks up its two levels at once."""
        if kernels.take(self.packed, self.block_size):
            held = self.packed, self.absmax, self.scale, self.mean
            size = self.numbers, self.shape, self.block_size
            return torch.ops.peftlab.dequantise(*held, *size, dtype)
        pairs = torch.cartesian_prod(*[pad(self.levels, (0, 16 - len(self.levels)))] * 2)
        both = _there(pairs, self.packed.device).view(torch.int64).flatten()  # two levels' bits
        values = both.index_select(0, self.packed.int()).view(torch.float32)
        values = values[: self.shape.numel()].view(-1, self.block_size)
        return values.mul_(self.scales[:, None]).view(self.shape).to(dtype)

    def to(self, device: torch.device | str) -> "Quantised":
        """The same bytes on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors.items()})


@torch.no_grad()
def quantise(
    weight: Shaped[Tensor, "*shape"],
    block_size: int = 64,
    quant_type: str = "nf4",
    double_quant: bool = True,
    levels: Levels | None = None,
) -> Quantised:
    """Encode a tensor in codes of 4 bits.

    `levels`, 2 to 16 finite numbers, replaces the data type's own table. Raises ValueError for
    others, if `block_size` does not divide the number of weights, for a tensor that is empty or has
    no floating point, and if a weight is not finite.
    """
    levels = table(quant_type) if levels is None else levels
    if not 2 <= len(levels) <= 16 or not levels.isfinite().all():
        raise ValueError(f"{len(levels)} levels: allowed are 2 to 16 finite numbers, for 4 bits")
    if not weight.numel():
        raise ValueError(f"a tensor {tuple(weight.shape)} is empty: there is nothing to encode")
    if not weight.is_floating_point():
        raise ValueError(
            f"{weight.dtype} has no codes: numbers of a floating-point type are needed"
        )
    check_block_size(block_size, weight.numel())
    flat = weight.detach().reshape(-1)
    if by_kernel := kernels.take(flat, block_size):
        packed, absmax = torch.ops.peftlab.quantise(flat, levels.tolist(), block_size)
    else:
        codes, absmax = blockwise(flat.float(), block_size, levels)
        packed = pack(codes)
    mean = absmax.mean()
    if not mean.isfinite():  # a weight is not finite, or only the sum of the m's is not
        if not absmax.isfinite().all():
            raise ValueError("a weight that is infinite or not a number has no code")
        mean = absmax.double().mean().float()
    if not double_quant:
        return Quantised(packed, absmax, None, None, weight.shape, block_size, levels)
    if by_kernel:
        absmax, scale = torch.ops.peftlab.quantise_scales(absmax - mean)
    else:
        absmax, scale = blockwise(absmax - mean, ABSMAX_BLOCK, _dynamic_table())
    return Quantised(packed, absmax, scale, mean, weight.shape, block_size, levels)


def check_block_size(block_size: int, n: int = 0, where: str = "the tensor") -> None:
    """Raise ValueError unless blocks of this size fill n weights; without n, unless they could."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size={block_size!r}: a whole number of at least 1 is needed")
    if n % block_size:
        near = next(d for d in range(min(block_size, n), 0, -1) if n % d == 0)
        raise ValueError(
            f"block_size={block_size} does not divide the {n:,} weights of {where}: "
            f"allowed is a divisor of {n:,}, such as {near}"
        )


def held_bytes(n: int, block_size: int = 64, double_quant: bool = True) -> int:
    """Bytes of n weights: half a byte each, and the scales.

    The scales take 4 bytes a block; with double quantisation 1 a block, 4 for every 256 blocks,
    and 4 for the mean.
    """
    blocks = n // block_size
    scales = blocks + 4 * -(-blocks // ABSMAX_BLOCK) + 4 if double_quant else 4 * blocks
    return -(-n // 2) + scales


def bits_per_weight(block_size: int = 64, double_quant: bool = True) -> float:
    """Bits for a weight in a tensor so large that its mean does not count.

        4 + 32/B,  or with double quantisation  4 + 8/B + 32/(256 B)

    >>> bits_per_weight(64, double_quant=False), round(bits_per_weight(64), 6)
    (4.5, 4.126953)
    """
    return 4 + (8 + 32 / ABSMAX_BLOCK if double_quant else 32) / block_size
