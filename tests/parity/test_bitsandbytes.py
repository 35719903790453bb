"""Codes, tables and scales against bitsandbytes, which since 0.50 quantises on the CPU.

Given its table the codes are the same bit for bit: both scale by w · (1/m) in float32 and compare
with the float32 halfway points, and both give a tie to the lower level. Its table is a list of
constants, ours is derived: they agree within 2e-7.

For double quantisation its CPU kernel first rounds the scaled m to a grid of 2¹⁶ values, so that
close to a tie its 8-bit code is not always the nearest. On that grid a value moves by at most
δ = 1/65535, so its level is at most 2 δ farther from the value than the nearest one, which ours is.
"""

import pytest
import torch
from bitsandbytes import functional as theirs
from models import U32

from peftlab.sites.quantisation import blockwise, dynamic_table, quantise, table

SIZES = (32, 64, 128, 256, 1024)
DELTA = 1 / 65535
BOTH = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def weights(seed=0, rows=256, columns=1024):
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def their_table(quant_type):
    return theirs.get_4bit_type(quant_type, device="cpu")


def on_ties(levels, block=64):
    """Blocks whose scaled weights lie on the halfway points, and one float to either side."""
    ordered = levels.unique()
    halfway = (ordered[:-1] + ordered[1:]) / 2
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    values = torch.cat([ordered, halfway, halfway.nextafter(up), halfway.nextafter(down)])
    values = torch.cat([values, values.new_zeros(block - 1 - len(values)), torch.ones(1)])
    return torch.stack([values * m for m in (1.0, 0.5, 0.3, 0.0123, 7.7)])


@BOTH
def test_the_table(quant_type):
    assert (table(quant_type) - their_table(quant_type).unique()).abs().max() <= 2e-7


def test_the_table_for_the_scales():
    assert torch.equal(dynamic_table(), theirs.create_dynamic_map())


@BOTH
@pytest.mark.parametrize("block_size", SIZES)
def test_codes_and_scales_bit_for_bit_given_its_table(quant_type, block_size):
    levels = their_table(quant_type)
    for weight in (weights(), weights(1).bfloat16(), weights(2).half()):
        packed, state = theirs.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
        ours = quantise(weight, block_size, double_quant=False, levels=levels)
        assert torch.equal(ours.packed, packed.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.dequantise(weight.dtype), theirs.dequantize_4bit(packed, state))


@BOTH
def test_ties_and_their_neighbours(quant_type):
    levels = their_table(quant_type)
    weight = on_ties(levels)
    packed, _ = theirs.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    assert torch.equal(quantise(weight, 64, levels=levels).packed, packed.flatten())


def test_the_derived_table_gives_almost_every_code():
    """Tables 2e-7 apart move a halfway point by 2e-7, and the scaled weights have a density below
    2 in [−1, 1]: of 2²⁰ weights about 15 · 2e-7 · 2 · 2²⁰ = 6 can change sides."""
    weight = weights(3, 1024, 1024)
    packed, _ = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert (quantise(weight).packed != packed.flatten()).sum() <= 6


@BOTH
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_double_quantised_scales(quant_type, block_size):
    weight = weights(4, 512, 1024)
    exact = quantise(weight, block_size, double_quant=False).absmax
    packed, state = theirs.quantize_4bit(
        weight, blocksize=block_size, quant_type=quant_type, compress_statistics=True
    )
    ours = quantise(weight, block_size, quant_type)
    assert torch.equal(ours.mean, state.offset)
    assert torch.equal(ours.scale, state.state2.absmax)
    assert (ours.absmax == state.absmax).float().mean() > 0.99
    read = theirs.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # 2 δ of the block's scale, and the roundings of a product and a sum.
    farther = 2 * DELTA * ours.scale.repeat_interleave(256)[: len(exact)] + 4 * U32 * exact.max()
    assert ((read - exact).abs() <= (ours.scales - exact).abs() + farther).all()
    same = ours.absmax == state.absmax
    assert torch.equal(ours.scales[same], read[same])
    # ... and so the weights: |T| ≤ 1, so no weight is farther apart than its two scales.
    whole = theirs.dequantize_4bit(packed, state) - ours.dequantise()
    apart = (read - ours.scales).abs() + 2e-7 * exact + 4 * U32 * exact.max()
    agree = (ours.packed == packed.flatten()).repeat_interleave(2).view(-1, block_size)
    assert (whole.view(-1, block_size).abs() <= apart[:, None])[agree].all()


def test_where_an_eight_bit_code_differs_the_value_is_next_to_a_tie():
    values = torch.randn(256 * 200, generator=torch.Generator().manual_seed(5))
    codes, scale = blockwise(values, 256, dynamic_table())
    their_codes, _ = theirs.quantize_blockwise(values, blocksize=256)
    scaled = values * (1 / scale).repeat_interleave(256)
    off = codes != their_codes
    assert 0 < off.sum() < 0.005 * len(values)
    ours, other = (dynamic_table()[c[off].int()] - scaled[off] for c in (codes, their_codes))
    assert (ours.abs() <= other.abs()).all()
    assert (other.abs() - ours.abs()).max() <= 2 * DELTA
