"""Scores, masks and bits, against numpy's sorting and packing and torch's own pruning."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, tiny
from torch import nn
from torch.nn.utils import prune as torch_prune

from peftlab.methods import calibration, scores
from peftlab.sites import masked

TEXTS = ("abc>de", "a", "the longest text of all of them", "zz>")


def scores_like(rows, columns, seed=0, levels=None):
    """Random scores; with `levels` only so many different ones, so that most are equal."""
    generator = np.random.default_rng(seed)
    values = generator.random((rows, columns)).astype(np.float32)
    return values if levels is None else np.floor(values * levels)


def lowest_by_hand(values, count):
    """False at the `count` lowest of a flat list; of equal ones those that come first."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    mask = np.ones(len(values), dtype=bool)
    mask[order[:count]] = False
    return mask


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 30),
    sparsity=st.floats(0, 1),
    levels=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 50),
)
def test_every_scope_has_its_exact_number_of_zeros(rows, columns, sparsity, levels, seed):
    """Against a sort in Python by (score, place), group by group."""
    both = [scores_like(rows, columns, seed, levels), scores_like(columns, rows, seed + 1, levels)]
    given_scores = [torch.from_numpy(S) for S in both]
    layer = scores.choose(given_scores, sparsity, "layer")
    row = scores.choose(given_scores, sparsity, "row")
    everywhere = scores.choose(given_scores, sparsity, "global")
    size = rows * columns
    for S, of_layer, of_row in zip(both, layer, row, strict=True):
        by_hand = lowest_by_hand(S.flatten().tolist(), round(sparsity * size))
        assert (of_layer.numpy().flatten() == by_hand).all()
        for values, mask in zip(S.tolist(), of_row.numpy(), strict=True):
            assert (mask == lowest_by_hand(values, round(sparsity * len(values)))).all()
    together = np.concatenate([S.flatten() for S in both]).tolist()
    by_hand = lowest_by_hand(together, round(sparsity * 2 * size))
    assert (np.concatenate([m.numpy().flatten() for m in everywhere]) == by_hand).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.95, 1.0])
def test_magnitude_is_torchs_own_pruning(sparsity):
    """torch.nn.utils.prune, one matrix by itself and several together; no two entries are equal."""
    layers = [nn.Linear(13, 7), nn.Linear(7, 29)]
    weights = [layer.weight.detach().clone() for layer in layers]
    found = [scores.magnitude(W) for W in weights]
    alone = scores.choose(found, sparsity, "layer")
    together = scores.choose(found, sparsity, "global")
    for layer, mask in zip(layers, alone, strict=True):
        torch_prune.l1_unstructured(layer, "weight", amount=sparsity)
        assert torch.equal(layer.weight_mask.bool(), mask)
        torch_prune.remove(layer, "weight")
    for layer, W in zip(layers, weights, strict=True):
        layer.weight.data = W.clone()
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=sparsity
    )
    for layer, mask in zip(layers, together, strict=True):
        assert torch.equal(layer.weight_mask.bool(), mask)


@pytest.mark.parametrize("levels", [None, 1, 2])
def test_two_of_every_four_neighbours_stay(levels):
    S = scores_like(9, 24, 3, levels)
    (mask,) = scores.choose([torch.from_numpy(S)], 0.5, "2:4")
    assert scores.is_two_four(mask)
    for row, kept in zip(S, mask.numpy(), strict=True):
        for at in range(0, 24, 4):  # group by group
            assert (kept[at : at + 4] == lowest_by_hand(row[at : at + 4].tolist(), 2)).all()
    wrong = mask.clone()
    wrong[3, 5] = ~wrong[3, 5]
    assert not scores.is_two_four(wrong)
    assert not scores.is_two_four(torch.ones(2, 6, dtype=torch.bool))
    if levels is None:
        assert not scores.is_two_four(mask.roll(1, dims=1))  # as many zeros, in other fours


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_bits_are_numpys(rows, columns, seed):
    mask = scores_like(rows, columns, seed) < 0.5
    packed = masked.pack(torch.from_numpy(mask))
    assert packed.dtype == torch.uint8 and len(packed) == -(-rows * columns // 8)
    assert (packed.numpy() == np.packbits(mask, bitorder="little")).all()
    assert (masked.unpack(packed, rows, columns).numpy() == mask).all()


def test_the_cubic_schedule():
    """Zhu and Gupta's equation 1 with s_i = 0, t_0 = 0: (s_i − s_f)(1 − t)³ + s_f."""
    for progress in np.linspace(0, 1, 11):
        wanted = 0.8 + (0 - 0.8) * (1 - progress) ** 3
        assert scores.cubic(0.8, progress) == pytest.approx(wanted, abs=1e-15)
    assert scores.cubic(0.8, 0) == 0 and scores.cubic(0.8, 1) == scores.cubic(0.8, 3) == 0.8
    steps = np.diff([scores.cubic(0.8, t) for t in np.linspace(0, 1, 11)])
    assert (np.diff(steps) < 0).all()  # ever smaller


@pytest.mark.parametrize("family", FAMILIES)
def test_input_norms_are_those_of_every_text_alone(family):
    """No padding is counted: text by text, the inputs' squares summed in numpy."""
    base = tiny(family, torch.float64)
    linears = list(base.anatomy.linears.values())
    norms = calibration.input_norms(base, linears, TEXTS, batch_size=3)
    squares = {}

    def watch(module, args):
        x = args[0].numpy().reshape(-1, args[0].shape[-1])
        squares[module] = squares.get(module, 0) + (x**2).sum(axis=0)

    hooks = [m.register_forward_pre_hook(watch) for m in {linear.module for linear in linears}]
    with torch.no_grad():
        for text in TEXTS:
            ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
            start = torch.zeros(1, 1, dtype=torch.long)
            given_ids = (torch.cat([start, ids[:, :-1]], dim=1),) if family == "t5" else ()
            base(ids, None, *given_ids)
    for hook in hooks:
        hook.remove()
    assert norms.keys() == squares.keys() == {linear.module for linear in linears}
    for module, norm in norms.items():
        # The same float64 sums in another order, behind two layers: far more than their roundings.
        np.testing.assert_allclose(norm.numpy(), np.sqrt(squares[module]), rtol=1e-10)


def test_input_norms_need_a_token():
    base = tiny("gpt2")
    with pytest.raises(ValueError, match="no token in the calibration texts"):
        calibration.input_norms(base, list(base.anatomy.linears.values()), ("", ""))


def test_wanda_weighs_each_column():
    """What the score says of a column follows its inputs: scaled up, it stays longer."""
    W = torch.tensor([[1.0, -2.0, 3.0, 4.0], [4.0, 3.0, 2.0, -1.0]])
    norms = torch.tensor([10.0, 1.0, 1.0, 0.1])
    wanted = [[10, 2, 3, 0.4], [40, 3, 2, 0.1]]
    # One product of two float32 numbers each.
    np.testing.assert_allclose(scores.wanda(W, norms).numpy(), wanted, rtol=2.0**-23)
    (mask,) = scores.choose([scores.wanda(W, norms)], 0.5, "row")
    assert mask.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 3e5, 1e30])
def test_scores_have_32_bits_whatever_the_weight_has(dtype, size):
    """Norms that float16 cannot hold: the masks are those of the same weight in float64."""
    W = torch.from_numpy(scores_like(8, 24, 5) - 0.5).to(dtype)
    norms = torch.from_numpy(scores_like(1, 24, 6)[0]).double() * size
    found = scores.wanda(W, norms)
    assert found.dtype == scores.magnitude(W).dtype == torch.promote_types(dtype, torch.float32)
    assert found.isfinite().all() and torch.equal(scores.magnitude(W).double(), W.double().abs())
    wanted = W.double().abs() * norms.float().double()
    assert torch.equal(scores.lowest_out(found, 0.5), scores.lowest_out(wanted, 0.5))


@pytest.mark.parametrize(
    "shape, sparsity, within, words",
    [
        ((2, 6), 0.5, "2:4", "6 inputs are no multiple of four"),
        ((4, 7), 0.5, "2:4", "7 inputs"),
        ((8, 1), 0.5, "2:4", "1 inputs"),
        ((3, 2), 0.5, "2:4", "2 inputs"),
        ((2, 8), 0.5, "column", "within='column': allowed is row, layer, global, 2:4"),
        ((2, 8), 1.5, "row", "sparsity=1.5: allowed is 0.0 to 1.0"),
        ((2, 8), -0.5, "layer", "sparsity=-0.5"),
    ],
)
def test_what_is_no_group_is_refused(shape, sparsity, within, words):
    with pytest.raises(ValueError, match=words):
        scores.choose([torch.rand(4, 8), torch.rand(shape)], sparsity, within)
