"""Drawings show what is there: every trained tensor once, with its size, and nothing else."""

import functools
import math
from collections import Counter

import pytest
from models import CASES, PAIRS, put, tiny

import peftlab
from peftlab import figures
from peftlab.figures.described import describe, spans
from peftlab.figures.draw import draw, render
from peftlab.figures.sheet import extents, overlaps, pale
from peftlab.methods import METHODS

GPT2 = [(f, case) for f, case in PAIRS if f == "gpt2" and CASES[case].plain]


@functools.cache
def base(family):
    """One base of each family for all cases: attaching leaves it bit for bit as it was."""
    return tiny(family)


@pytest.fixture
def tuned(request):
    family, case = request.param
    tuned = put(case, base(family))
    yield tuned
    tuned.detach()


@pytest.mark.parametrize("tuned", PAIRS, ids=lambda p: "-".join(p), indirect=True)
def test_a_drawing_is_what_is_attached(tuned):
    drawing = describe(tuned)
    every_trained_tensor_is_drawn_once_with_its_size(tuned, drawing)
    nothing_is_drawn_that_is_not_there(tuned, drawing)
    no_words_of_the_picture_touch_or_leave_it(tuned, drawing)


def every_trained_tensor_is_drawn_once_with_its_size(tuned, drawing):
    parts = Counter(part for box in drawing.boxes for part in box.tensors)
    assert set(parts.values()) <= {1}
    whole = {name for name, index in parts if index is None}
    sliced = {name: set() for name, index in parts if index is not None}
    for name, index in parts:
        if index is not None:
            sliced[name].add(index)
    assert whole | sliced.keys() == tuned.trainable.keys() and not whole & sliced.keys()
    for name, indices in sliced.items():
        assert indices == set(range(len(tuned.trainable[name])))
    for box in drawing.trained:
        for name, index in box.tensors:
            real = tuned.trainable[name].shape
            assert box.shape == tuple(real if index is None else real[1:]), (box.name, name)
        assert len(box.tensors) == box.copies and len(box.layers) in (0, box.copies)
    count = tuned.count()
    assert drawing.numbers == count.measured + count.head


def nothing_is_drawn_that_is_not_there(tuned, drawing):
    anatomy = tuned.anatomy
    own = Counter(tuple(p.shape) for p in tuned.model.parameters())
    for box in drawing.boxes:
        stacks = [stack or "" for stack in anatomy.stacks]
        assert box.stack in stacks or not box.layers
        if box.how == "frozen" and box.name == "W" and box.layers:
            for layer in box.layers:
                name = f"{box.stack}.layers.{layer}.{box.site}".removeprefix(".")
                linear = anatomy.linears[name]
                assert (linear.d_out, linear.d_in) == box.shape
                assert not linear.module.weight.requires_grad
        elif box.how == "frozen":
            assert own[box.shape] >= box.copies and not box.trained
        elif box.how in ("mask", "codes"):
            assert box.shape in drawing.weights.get((box.stack, box.site), [box.shape])
    frozen = [
        box for box in drawing.boxes if box.how == "frozen" and box.name == "W" and box.layers
    ]
    linears = [x for x in anatomy.linears.values() if not x.module.weight.requires_grad]
    assert sum(box.numbers for box in frozen) == sum(x.d_out * x.d_in for x in linears)


def no_words_of_the_picture_touch_or_leave_it(tuned, drawing):
    figure = render(drawing)
    assert overlaps(figure) == []
    assert min(note.font.size for note in figure.layout.annotations if note.text) >= 11
    if tuned.kind != "encoder-decoder":
        assert figure.layout.height <= 600 and figure.layout.width <= 900
    text = figures.alt_text(figure)
    for box in drawing.trained:
        assert f"{box.name} ({box.size})" in text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("tuned", GPT2, ids=lambda p: "-".join(p), indirect=True)
def test_words_stand_out_in_light_and_dark(tuned, dark):
    assert pale(draw(tuned, dark)) == []


def test_every_method_is_among_the_cases():
    drawn = {type(method).name for case in CASES.values() for method in case.methods}
    assert set(METHODS) <= drawn and len(drawn) >= 20


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_stack_of_t5_alone(stack):
    with put("houlsby", base("t5")) as tuned:
        figure = draw(tuned, stack=stack)
        assert overlaps(figure) == [] and figure.layout.height <= 600
        other = {"encoder": "decoder", "decoder": "encoder"}[stack]
        assert not any(text.startswith(f"{other}:") for *_, text in extents(figure))
        with pytest.raises(ValueError, match="has 'encoder', 'decoder'"):
            draw(tuned, stack="middle")


def test_drawing_changes_nothing_and_a_detached_adapter_is_not_drawn():
    fresh = tiny("gpt2")
    before = fresh.fingerprint()
    with put("lora", fresh) as tuned:
        hooks = sum(len(m._forward_hooks) for m in fresh.model.modules())
        draw(tuned)
        assert sum(len(m._forward_hooks) for m in fresh.model.modules()) == hooks
    assert fresh.fingerprint() == before
    with pytest.raises(RuntimeError, match="was detached"):
        draw(tuned)


def test_a_norm_is_where_the_forward_pass_runs_it():
    for family, first in (("gpt2", True), ("llama", True), ("bert", False), ("t5", True)):
        with put("lora", base(family)) as tuned:
            assert describe(tuned).first is first


def test_layers_that_differ_are_said():
    with put("v2 depth", base("gpt2")) as tuned:
        drawing = describe(tuned)
        (key,) = [box for box in drawing.boxes if box.how == "key"]
        assert key.layers == (1,) and key.copies == 1
        assert any("layer 1" in text for *_, text in extents(render(drawing)))
    assert spans((0, 1, 2, 5)) == "layers 0–2, 5" and spans((3,)) == "layer 3"


def test_the_sizes_of_a_strip_are_to_scale():
    with peftlab.attach(base("gpt2"), peftlab.LoRA(r=12, target_modules=["up"])) as tuned:
        shapes = draw(tuned).layout.shapes
    blue = [s for s in shapes if s.fillcolor == figures.COLOURS["lora"] and s.type == "rect"]
    sizes = sorted((s.x1 - s.x0, s.y1 - s.y0) for s in blue if s.x1 - s.x0 != 14)
    (b_wide, b_high), (a_wide, a_high) = sizes
    linear = tuned.anatomy.linears["layers.0.up"]
    assert math.isclose(a_wide / b_high, linear.d_in / linear.d_out, rel_tol=1e-6)
    assert math.isclose(a_high / a_wide, 12 / linear.d_in, rel_tol=1e-6)
    assert math.isclose(b_wide / b_high, 12 / linear.d_out, rel_tol=1e-6)
