"""The functions of `quantisation.py` as Triton kernels, equal to them bit for bit.

A program of a kernel takes a few blocks of weights, as a tile of rows: each row is one block, which
has one m. Three things keep the bits:

    1/m           is rounded correctly (`div_rn`), where Triton's own division is not
    T[c] s + mean is rounded twice: no launch may fuse product and sum (`enable_fp_fusion=False`)
    a tie         goes to the lower level: a code counts the halfway points below the scaled weight

This file is imported only where a kernel runs, because only there Triton has to be installed.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlab.sites.quantisation import ABSMAX_BLOCK, dynamic_table

TILE = 4096  # weights of one program
WARPS = 4


@triton.jit
def decode(
    packed,  # (blocks · BLOCK / 2,) bytes
    absmax,  # (blocks,) m, or with DOUBLE their codes
    scale,  # (blocks / 256,)
    mean,  # ()
    levels,  # (16,)
    dynamic,  # (256,)
    out,  # (blocks · BLOCK,)
    blocks,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, at least BLOCK
):
    """m · T[c]: every byte is read once, and both of its weights are written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.load(absmax + row, mask=row < blocks, other=0)
    if DOUBLE:
        coarse = tl.load(scale + row // GROUP, mask=row < blocks, other=0)
        m = tl.load(dynamic + m.to(tl.int32)) * coarse + tl.load(mean)

    pair = tl.arange(0, WIDTH // 2)
    inside = (row < blocks)[:, None] & (pair < BLOCK // 2)[None, :]
    byte = tl.load(packed + row[:, None] * (BLOCK // 2) + pair[None, :], mask=inside, other=0)
    byte = byte.to(tl.int32)
    first, second = tl.load(levels + (byte >> 4)), tl.load(levels + (byte & 15))
    weight = tl.interleave(first, second) * m[:, None]  # (ROWS, WIDTH)

    column = tl.arange(0, WIDTH)
    inside = (row < blocks)[:, None] & (column < BLOCK)[None, :]
    where = out + row[:, None] * BLOCK + column[None, :]
    tl.store(where, weight.to(out.dtype.element_ty), mask=inside)


@triton.jit
def below(scaled, halfway, BITS: tl.constexpr):
    """How many of the 2^BITS − 1 halfway points, in rising order, lie below: a search by halves."""
    count = tl.zeros_like(scaled).to(tl.int32)
    for bit in tl.static_range(BITS):
        step = 1 << (BITS - 1 - bit)
        count += tl.where(scaled > tl.load(halfway + count + (step - 1)), step, 0)
    return count


@triton.jit
def scale_rows(value, SMALLEST: tl.constexpr):
    """m of each row, and the row times 1/m; m is infinite where something is no finite number."""
    size = tl.where(value == value, tl.abs(value), float("inf"))
    m = tl.max(size, axis=1)
    inverse = tl.div_rn(1.0, tl.maximum(m, SMALLEST))
    return m, tl.minimum(tl.maximum(value * inverse[:, None], -1.0), 1.0)


@triton.jit
def encode(
    flat,  # (blocks · BLOCK,)
    halfway,  # (15,) rising
    order,  # (16,) which level is the i-th from below
    packed,  # (blocks · BLOCK / 2,)
    absmax,  # (blocks,)
    blocks,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes, two a byte, and m of every block."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < blocks)[:, None] & (column < BLOCK)[None, :]
    value = tl.load(flat + row[:, None] * BLOCK + column[None, :], mask=inside, other=0)
    m, scaled = scale_rows(value.to(tl.float32), SMALLEST)
    tl.store(absmax + row, m, mask=row < blocks)

    code = tl.load(order + below(scaled, halfway, 4))
    first, second = tl.split(code.reshape(ROWS, WIDTH // 2, 2))
    pair = tl.arange(0, WIDTH // 2)
    inside = (row < blocks)[:, None] & (pair < BLOCK // 2)[None, :]
    where = packed + row[:, None] * (BLOCK // 2) + pair[None, :]
    tl.store(where, (first << 4 | second).to(tl.uint8), mask=inside)


@triton.jit
def encode_scales(
    values,  # (n,)
    halfway,  # (255,) rising
    codes,  # (n,)
    scale,  # (n / GROUP, rounded up,)
    n,
    SMALLEST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Codes of 8 bits, and the scale of every GROUP of values; the last may be short."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m, scaled = scale_rows(tl.load(values + at, mask=at < n, other=0), SMALLEST)
    tl.store(scale + row, m, mask=row * GROUP < n)
    tl.store(codes + at, below(scaled, halfway, 8).to(tl.uint8), mask=at < n)


# Tables on a device ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def levels_there(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The levels, sixteen of them: those that no code means are zeros."""
    padded = [*levels, *[0.0] * (16 - len(levels))]
    return torch.tensor(padded, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=64)
def search_there(levels: tuple[float, ...], bits: int, device: torch.device) -> tuple[Tensor, ...]:
    """The 2^bits − 1 halfway points in rising order, infinite where there is no level, and which
    level each place among them means."""
    ordered, order = torch.tensor(levels, dtype=torch.float32).sort(stable=True)
    spare = 2**bits - len(levels)
    halfway = torch.nn.functional.pad((ordered[:-1] + ordered[1:]) / 2, (0, spare), value=torch.inf)
    order = torch.nn.functional.pad(order.int(), (0, spare))
    return halfway.to(device), order.to(device)


@functools.cache
def dynamic_there(device: torch.device) -> Tensor:
    """The 256 levels of the scales."""
    return dynamic_table().to(device)


@functools.cache
def dynamic_levels() -> tuple[float, ...]:
    return tuple(dynamic_table().tolist())


# Launches ----------------------------------------------------------------------------------------

SMALLEST = torch.finfo(torch.float32).tiny
EXACT = dict(num_warps=WARPS, enable_fp_fusion=False)


def tile(block_size: int) -> tuple[int, int]:
    """Rows and width of a program's tile."""
    width = max(triton.next_power_of_2(block_size), 2)
    return max(TILE // width, 1), width


def on(tensor: Tensor):
    """Triton launches on the current device; this makes the tensor's that one."""
    return torch.cuda.device_of(tensor)


def dequantise(packed, absmax, scale, mean, levels, size, block_size, dtype) -> Tensor:
    out = torch.empty(size, dtype=dtype, device=packed.device)
    rows, width = tile(block_size)
    blocks, double = absmax.shape[0], scale is not None
    levels = levels_there(tuple(levels), packed.device)
    dynamic = dynamic_there(packed.device) if double else levels
    scale, mean = (scale, mean) if double else (absmax, absmax)
    with on(packed):
        decode[(triton.cdiv(blocks, rows),)](
            *(packed, absmax, scale, mean, levels, dynamic, out, blocks),
            **dict(BLOCK=block_size, GROUP=ABSMAX_BLOCK, DOUBLE=double, ROWS=rows, WIDTH=width),
            **EXACT,
        )
    return out


def quantise(flat, levels, block_size) -> tuple[Tensor, Tensor]:
    rows, width = tile(block_size)
    blocks = flat.shape[0] // block_size
    packed = torch.empty(flat.shape[0] // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    halfway, order = search_there(tuple(levels), 4, flat.device)
    with on(flat):
        encode[(triton.cdiv(blocks, rows),)](
            *(flat, halfway, order, packed, absmax, blocks),
            **dict(SMALLEST=SMALLEST, BLOCK=block_size, ROWS=rows, WIDTH=width),
            **EXACT,
        )
    return packed, absmax


def quantise_scales(values) -> tuple[Tensor, Tensor]:
    n, rows = values.shape[0], TILE // ABSMAX_BLOCK
    groups = triton.cdiv(n, ABSMAX_BLOCK)
    codes = torch.empty(n, dtype=torch.uint8, device=values.device)
    scale = torch.empty(groups, dtype=torch.float32, device=values.device)
    halfway, _ = search_there(dynamic_levels(), 8, values.device)
    with on(values):
        encode_scales[(triton.cdiv(groups, rows),)](
            *(values, halfway, codes, scale, n),
            **dict(SMALLEST=SMALLEST, GROUP=ABSMAX_BLOCK, ROWS=rows),
            **EXACT,
        )
    return codes, scale
