"""Codes of four bits: the tables by hand, the blocks by definition, the bytes as they are held."""

import math
import statistics

import pytest
import torch
from models import U32

from peftlab.sites.quantisation import (
    ABSMAX_BLOCK,
    QUANT_TYPES,
    below,
    bits_per_weight,
    blockwise,
    dynamic_table,
    held_bytes,
    nearest,
    normal_levels,
    pack,
    quantise,
    table,
    unpack,
)


def weights(*size, seed=0) -> torch.Tensor:
    return 0.02 * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# Tables ----------------------------------------------------------------------------------------


def test_nf4_is_made_of_quantiles_of_the_normal():
    """Against Python's own inverse of the normal, which is exact to about 1e-16."""
    quantile = statistics.NormalDist().inv_cdf
    top = 1 - (1 / 30 + 1 / 32) / 2
    positive = [quantile(0.5 + i * (top - 0.5) / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + i * (top - 0.5) / 7) for i in range(7, 0, -1)]
    wanted = torch.tensor([*negative, 0.0, *positive], dtype=torch.float64) / quantile(top)
    # One rounding to float32, of numbers of at most one; float64's own error is nothing beside it.
    assert (table("nf4") - wanted).abs().max() <= 1.01 * U32
    assert len(table("nf4")) == 16
    assert table("nf4")[7] == 0
    assert (table("nf4")[0], table("nf4")[-1]) == (-1, 1)


def test_a_table_is_handed_out_as_a_copy():
    before, weight = [table("nf4"), dynamic_table()], weights(6, 48)
    wanted = quantise(weight, 24).dequantise()
    table("nf4").mul_(0.5)
    dynamic_table().zero_()
    quantise(weight, 24).levels.zero_()
    assert all(map(torch.equal, before, [table("nf4"), dynamic_table()]))
    assert torch.equal(quantise(weight, 24).dequantise(), wanted)


def test_the_naive_quantiles_are_infinite_and_divide_to_nothing():
    levels = normal_levels(offset=1.0)
    assert levels.isnan().any()
    assert not normal_levels(offset=1 - 1e-9).isnan().any()


def test_the_other_tables_by_hand():
    e2m1 = [0, 1, 2, 3, 4, 6, 8, 12]
    assert torch.equal(table("e2m1"), torch.tensor([*(-x for x in e2m1[:0:-1]), *e2m1]) / 12)
    assert torch.equal(table("int4"), torch.tensor(range(-7, 8)) / 7)
    differs = table("fp4") != table("e2m1")
    assert differs.nonzero().flatten().tolist() == [6, 8]
    assert table("fp4")[8] == torch.tensor(1 / 192)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_table_is_in_order_and_has_zero_and_its_ends(quant_type):
    levels = table(quant_type)
    assert (levels.diff() > 0).all()
    assert 0 in levels
    assert levels.abs().max() == levels[-1] == 1
    assert len(levels) <= 16


def test_the_table_for_the_scales():
    levels = dynamic_table()
    assert len(levels) == len(levels.unique()) == 256
    assert 0 in levels and 1 in levels
    # 64 cells of [0.1, 1], the middle of the first and of the last.
    cell = 0.9 / 64
    close = 4 * U32
    assert abs(levels[-2] - (1 - cell / 2)) <= close
    assert abs(levels[0] + (1 - cell / 2)) <= close
    assert abs(levels[levels >= 0.1].min() - (0.1 + cell / 2)) <= close
    assert sum((levels > 0.01) & (levels < 0.1)) == 32


# Codes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_code_is_the_nearest_level_of_the_block(quant_type):
    """By definition, one weight after the other in float64, wherever it is not within a few
    roundings of a tie."""
    weight, levels = weights(6, 48), table(quant_type).double()
    q = quantise(weight, 24, quant_type, double_quant=False)
    blocks = weight.view(-1, 24).double()
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
    distance = (scaled.unsqueeze(-1) - levels).abs()
    two = distance.topk(2, largest=False).values
    clear = two[..., 1] - two[..., 0] > 8 * U32
    assert clear.float().mean() > 0.99
    assert torch.equal(q.codes.view(-1, 24)[clear].long(), distance.argmin(dim=-1)[clear])
    assert torch.equal(q.scales, weight.view(-1, 24).abs().amax(dim=1))
    assert torch.equal(
        q.dequantise(),
        (table(quant_type)[q.codes.int()].view(-1, 24) * q.scales[:, None]).view(6, 48),
    )


def test_a_tie_goes_to_the_lower_level():
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    values = torch.tensor([-0.75, -0.25, 0.25, 0.75])  # all exactly between two
    assert nearest(values, levels).tolist() == [0, 1, 2, 3]
    above = values.nextafter(torch.tensor(2.0))
    assert nearest(above, levels).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_pass_for_each_point_counts_what_a_search_finds(quant_type):
    levels = table(quant_type)
    halfway = (levels[:-1] + levels[1:]) / 2
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    values = [weights(999) * 50, halfway, halfway.nextafter(up), halfway.nextafter(down)]
    values = torch.cat([*values, levels, -torch.zeros(1)])
    assert torch.equal(below(values, halfway).long(), torch.bucketize(values, halfway))
    many = dynamic_table()
    assert torch.equal(below(values, many).long(), torch.bucketize(values, many))


def test_levels_in_any_order_give_the_same_values():
    levels = table("nf4")
    mixed = levels[torch.randperm(16, generator=torch.Generator().manual_seed(3))]
    weight = weights(8, 64)
    one, other = quantise(weight), quantise(weight, levels=mixed)
    assert torch.equal(one.dequantise(), other.dequantise())
    assert not torch.equal(one.packed, other.packed)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_what_is_on_a_level_stays(quant_type, double_quant):
    """Weights that are m · T[c] already come back; under double quantisation one m is exact, for
    its distance from the mean is zero."""
    levels = table(quant_type)
    weight = (0.5 * levels).repeat(4)
    q = quantise(weight, len(levels), quant_type, double_quant)
    assert torch.equal(q.dequantise(), weight)


def test_zeros_stay_zeros_beside_others():
    weight = weights(4, 64)
    weight[1] = 0
    q = quantise(weight, 64, double_quant=False)
    assert not q.dequantise()[1].any()
    assert q.dequantise()[0].any()
    assert not quantise(torch.zeros(4, 64)).dequantise().any()


@pytest.mark.parametrize("double_quant", [False, True])
def test_codes_keep_no_graph_of_a_weight_that_trains(double_quant):
    weight = torch.nn.Parameter(weights(4, 64))
    q = quantise(weight, 64, double_quant=double_quant)
    assert not any(tensor.requires_grad for tensor in q.tensors.values())
    assert not q.dequantise().requires_grad


def test_every_error_is_at_most_half_the_widest_gap():
    """|w − m T[c]| ≤ m · gap / 2, and three roundings."""
    weight = weights(64, 64)
    for quant_type in QUANT_TYPES:
        q = quantise(weight, 32, quant_type, double_quant=False)
        bound = q.scales[:, None] * (table(quant_type).diff().max() / 2 + 3 * U32)
        assert ((weight - q.dequantise()).view(-1, 32).abs() <= bound).all()


def test_double_quantisation_reads_the_scales_back_to_half_a_gap():
    """m − mean lies between two of the 256 levels; the widest gap among them is 0.9/64, save the
    two at the ends that reach ±1. Then one product and one sum."""
    weight = weights(512, 512, seed=1)
    exact, coded = quantise(weight, 64, double_quant=False), quantise(weight, 64)
    off = (coded.scales - exact.absmax).abs().view(-1, ABSMAX_BLOCK)
    gap = dynamic_table().diff().max()
    assert gap <= 0.9 / 64 * 1.001
    bound = coded.scale[:, None] * gap / 2 + 4 * U32 * exact.absmax.max()
    # −1 has no level of its own: the lowest is half a cell above it, so no farther.
    assert (off <= bound).all()
    assert off.max() > 0
    assert torch.equal(exact.packed, coded.packed)  # the codes were made with the exact scales


def test_packing_is_two_a_byte_and_loses_nothing():
    for n in (1, 2, 15, 256):
        codes = torch.randint(16, (n,), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
        packed = pack(codes)
        assert len(packed) == math.ceil(n / 2)
        assert torch.equal(unpack(packed, n), codes)
    assert pack(torch.tensor([1, 15, 2], dtype=torch.uint8)).tolist() == [0x1F, 0x20]


def test_a_short_last_block_has_its_own_scale():
    codes, absmax = blockwise(torch.tensor([1.0, -2.0, 0.0, 0.5]), 3, table("int4"))
    assert absmax.tolist() == [2.0, 0.5]
    assert codes.tolist() == [10, 0, 7, 14]  # 7/7 · ½ is 3.5/7, a tie: the lower, 3/7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_hold_the_same_numbers(dtype):
    weight = weights(16, 64).to(dtype)
    q = quantise(weight)
    assert torch.equal(q.packed, quantise(weight.float()).packed)
    assert q.dequantise(dtype).dtype == dtype
    assert torch.equal(q.dequantise(dtype), q.dequantise().to(dtype))


def test_on_another_device_the_bytes_are_the_same():
    q = quantise(weights(16, 64))
    moved = q.to("cpu")
    assert torch.equal(moved.dequantise(), q.dequantise())
    assert {t.device.type for t in q.to("meta").tensors.values()} == {"meta"}


def test_nf4_fits_a_normal_best_of_the_four():
    """At 2²⁰ draws the error of a mean of squares is about 0.1%; the types lie 2% to 16% apart."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    error = {
        t: (quantise(weight, 64, t, False).dequantise() - weight).square().mean().sqrt().item()
        for t in QUANT_TYPES
    }
    assert sorted(error, key=error.get) == ["nf4", "e2m1", "int4", "fp4"]
    assert abs(error["nf4"] - 0.0920) < 0.0003


# Bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "size, block", [((6, 5), 3), ((64, 64), 64), ((300, 128), 32), ((7, 1), 7)]
)
def test_the_closed_form_is_what_is_held(size, block, double_quant):
    q = quantise(weights(*size), block, double_quant=double_quant)
    held = sum(len(t.numpy().tobytes()) for t in q.tensors.values())  # and no storage is longer
    assert held == q.bytes == held_bytes(math.prod(size), block, double_quant)
    assert q.packed.dtype == torch.uint8
    assert (q.absmax.dtype == torch.uint8) == double_quant


def test_bits_a_weight_in_the_bytes_really_held():
    """4 + 8/64 + 32/(64·256) = 4.126953 and 32 bits for one mean among two million."""
    q = quantise(weights(1024, 2048))
    assert round(q.bits, 3) == 4.127
    assert q.bits == bits_per_weight(64) + 32 / q.shape.numel()
    assert quantise(weights(1024, 64), double_quant=False).bits == 4.5
    assert bits_per_weight(64) == 4 + 8 / 64 + 32 / (64 * 256)
    assert q.bits / 16 < 0.30


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"block_size": 7}, "block_size=7 does not divide the 4,096 weights .* such as 4"),
        ({"block_size": 8192}, "block_size=8192 does not divide"),
        ({"block_size": 0}, "block_size=0: a whole number of at least 1"),
        ({"block_size": True}, "block_size=True: a whole number"),
        ({"quant_type": "nf5"}, "quant_type='nf5': allowed is nf4, fp4, e2m1, int4"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        quantise(weights(64, 64), **options)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_weight_without_a_code_is_refused(bad):
    weight = weights(64, 64)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="infinite or not a number"):
        quantise(weight)


# What has no codes ---------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "weight, levels, words",
    [
        (torch.ones(64), torch.linspace(-1, 1, 17), "17 levels: allowed are 2 to 16"),
        (torch.ones(64), torch.linspace(-1, 1, 256), "256 levels"),
        (torch.ones(64), torch.ones(1), "1 levels"),
        (torch.ones(64), torch.empty(0), "0 levels"),
        (torch.ones(64), torch.tensor([-1.0, math.nan, 1.0]), "finite numbers"),
        (torch.empty(0, 64), None, "is empty"),
        (torch.empty(0), None, "is empty"),
        (torch.ones(64, dtype=torch.int32), None, "torch.int32 .* floating-point"),
        (torch.ones(64, dtype=torch.int8), None, "torch.int8"),
        (torch.ones(64, dtype=torch.bool), None, "torch.bool"),
    ],
)
def test_what_has_no_codes_is_refused(weight, levels, words, double_quant):
    with pytest.raises(ValueError, match=words):
        quantise(weight, double_quant=double_quant, levels=levels)


@pytest.mark.parametrize("count", [2, 3, 15, 16])
def test_as_many_levels_as_four_bits_hold(count):
    levels = torch.linspace(-1, 1, count)
    q = quantise(levels.repeat(64), count, double_quant=False, levels=levels)
    assert torch.equal(q.dequantise(), levels.repeat(64))


@pytest.mark.parametrize("size", [3e38, 3.4e38, 1e37, 1e20])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_mean_of_the_scales_does_not_overflow(size, mixed):
    """512 weights near the end of float32, all equal or every other block small."""
    weight = torch.full((8, 64), size)
    if mixed:
        weight[::2] = 1.0
    q = quantise(weight)
    assert q.mean.isfinite() and q.dequantise().isfinite().all()
    # m − mean is read back to half a gap of its 256 levels, as above.
    assert (q.dequantise() - weight).abs().max() <= size / 64
