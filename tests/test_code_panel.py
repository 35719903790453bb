"""The code explorer: every slider over its range, against quantising by hand."""

from itertools import product

import pytest
import torch

from peftlab import figures, panels
from peftlab.sites.quantisation import QUANT_TYPES, bits_per_weight, quantise

NORMAL = 0.02 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)) ** 3  # long tails


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("weight", [NORMAL, WIDE], ids=["normal", "long tails"])
def test_every_setting(weight, double_quant):
    sizes, hashed = panels.block_sizes(weight), panels.HashedWeight(weight)  # errors made once
    assert sizes == tuple(s for s in panels.BLOCK_SIZES if weight.numel() % s == 0)
    assert (min(sizes), max(sizes)) in ((8, 2048), (8, 64))
    for kind, size in product(QUANT_TYPES, sizes):
        view = panels.code_view(hashed, size, kind, double_quant, "W")
        made = quantise(weight, size, kind, double_quant)
        assert view.error == ((made.dequantise() - weight).norm() / weight.norm()).item()
        assert view.bits == bits_per_weight(size, double_quant)
        assert f"{view.bits:.3f} bits" in view.text and f"{view.error:.1%}" in view.text
        traces = {trace.name: trace for trace in view.figure().data}
        assert set(traces) == set(QUANT_TYPES)
        assert max(traces[kind].marker.size) == traces[kind].marker.size[sizes.index(size)]
        assert traces[kind].y[sizes.index(size)] == 100 * view.error


def test_smaller_blocks_take_more_bits_and_lose_less():
    """On a normal the error of every type falls with the block size, without a single step up."""
    for kind in QUANT_TYPES:
        errors = panels.code_view(NORMAL, 64, kind, False).errors[kind]
        assert list(errors.values()) == sorted(errors.values())
    bits = [bits_per_weight(size) for size in panels.BLOCK_SIZES]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize(
    "options, words",
    [({"block_size": 7}, "block_size=7 does not divide"), ({"quant_type": "x"}, "allowed is nf4")],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        panels.code_view(NORMAL, **options)


def test_the_widget_says_what_the_function_says():
    panel = panels.code_explorer({"normal": NORMAL, "wide": WIDE})
    for name, kind, double in (("normal", "int4", True), ("wide", "fp4", False)):
        panel.weight.value, panel.quant_type.value = name, kind
        panel.double_quant.value = double
        for size in panel.block_size.options:
            panel.block_size.value = size
            wanted = panels.code_view(panel.weights[name], size, kind, double, name)
            assert panel.view.text == wanted.text and wanted.text in panel.answer.value
            assert panel.plot.layout.title.text == f"{name}: {wanted.text}"
            assert panel.static().layout.title.text == panel.plot.layout.title.text
            shown = {trace.name: tuple(trace.y) for trace in panel.plot.data}
            assert shown == {trace.name: tuple(trace.y) for trace in wanted.figure().data}
    assert panel.describe().startswith("Code explorer: wide")


def test_a_weight_that_a_block_size_does_not_divide_gets_the_next_smaller():
    panel = panels.code_explorer({"normal": NORMAL, "wide": WIDE})
    panel.block_size.value = 2048
    panel.weight.value = "wide"
    assert panel.block_size.value == max(panels.block_sizes(WIDE))


def test_the_levels_of_several_types_in_one_figure():
    figure = figures.code_levels({"a": [-1.0, 0.0, 1.0], "b": [-1.0, 1.0]}, "T")
    assert [list(trace.x) for trace in figure.data[1:]] == [[-1, 1], [-1, 0, 1]]
    assert list(figure.layout.yaxis.ticktext) == ["b", "a"]
