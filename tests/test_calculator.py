"""The calculator: what it says is what `memory.predict` says, of any rows, tokens and size."""

import time

import numpy as np
import pytest

import peftlab
from peftlab import accounting, figures, memory, panels
from peftlab.bases.shapes import Shape
from peftlab.figures.sheet import alt_text, overlaps, pale
from peftlab.memory import calculator
from peftlab.memory.calculator import GPUS, KINDS, MODELS, calculate, room, traced

KEPT = sorted(calculator.kept())


def parts_of(key: str) -> tuple:
    model, kind, dtype, *more = key.split(" | ")
    return model, kind, dtype, bool(more)


# (model, kind, size, batch, length, dtype, checkpointing); the first two are traced in the test.
SETTINGS = [
    ("tiny-llama", "LoRA", 8, 3, 64, "bfloat16", True),
    ("tiny-gpt", "Full fine-tuning", 0, 2, 96, "float32", False),
    ("bert-large", "Prompt tuning", 24, 2, 200, "bfloat16", True),
]


@pytest.mark.parametrize(("model", "kind", "size", "batch", "length", "dtype", "again"), SETTINGS)
def test_it_says_what_predict_says(model, kind, size, batch, length, dtype, again):
    """But for blocks of 512 bytes, of which there is one a storage."""
    told = calculate(model, kind, size or None, batch, length, dtype, again)
    said = memory.predict(
        KINDS[kind].make(size), model, batch, length,
        dtype=dtype, checkpointing=again, device="cuda", head=calculator.head_of(model),
    )  # fmt: skip
    assert told.weights == said.bytes("weights")
    assert told.optimiser == said.bytes("optimiser")
    assert told.gradients == said.bytes("gradients")
    assert abs(told.activations - said.bytes("activations")) <= 64 * 4 * batch * length
    assert 0 <= said.peak - told.peak_here <= 512 * 2000 and said.peak > 0
    assert told.peak_here == pytest.approx(said.peak, rel=0.02)


@pytest.mark.parametrize("key", KEPT)
def test_a_kept_trace_agrees_with_closed_forms(key):
    """Weights, gradients and moments are counted, at two sizes and in every mode."""
    model, kind, dtype, again = parts_of(key)
    shape, length = Shape.named(model), 256
    for size in KINDS[kind].sizes[:2]:
        told = calculate(model, kind, size or None, 2, length, dtype, again)
        method = KINDS[kind].make(size)
        head = 0 if shape.head == "lm" else 2 * (shape.d_model + 1)
        trained = accounting.count(method, shape) + head
        if kind not in ("Full fine-tuning", "BitFit"):
            assert told.gradients == 4 * trained, size
            assert told.optimiser == pytest.approx(8 * trained, rel=1e-3)
        frozen = accounting.base_parameters(shape)
        width = 4 if method.in_place or dtype == "float32" else 2
        coded, codes = method.coded(shape)
        numbers = (frozen - coded) * width + codes
        assert told.codes == codes
        own = told.weights - told.adapters - 4 * head
        assert own == pytest.approx(numbers, rel=2e-3)  # and tables of rotary positions
        for moment in ("loss", "update"):
            parts = told.parts(moment)
            assert min(parts.values()) >= 0, parts
        assert sum(told.parts(told.moment).values()) == told.peak


@pytest.mark.parametrize("key", KEPT)
def test_more_rows_and_more_tokens_take_more(key):
    model, kind, dtype, again = parts_of(key)
    lengths = [n for n in panels.row_lengths(model, kind)]
    for batch, length in ((1, lengths[0]), (4, lengths[-1])):
        here = calculate(model, kind, None, batch, length, dtype, again)
        rows = calculate(model, kind, None, 2 * batch, length, dtype, again)
        assert here.peak <= rows.peak
        shorter = calculate(model, kind, None, batch, max(length // 2, 32), dtype, again)
        assert shorter.peak <= here.peak


def test_checkpointing_takes_less_and_codes_take_less():
    for key in KEPT:
        model, kind, dtype, again = parts_of(key)
        without = calculator.key(model, kind, dtype, False)
        if again and without in KEPT:
            one, other = (calculate(model, kind, None, 4, 512, dtype, how) for how in (True, False))
            assert one.peak < other.peak, key
        if kind == "QLoRA" and key.replace("QLoRA", "LoRA") in KEPT:
            plain = calculate(model, "LoRA", 16, 1, 512, dtype, again)
            assert calculate(model, kind, 16, 1, 512, dtype, again).peak < plain.peak


def test_the_inverse_is_exact():
    for degree in (0, 1, 2):
        at = calculator.places(degree)
        matrix = np.array([calculator.terms(*place, degree) for place in at])
        assert matrix.shape == (len(at), len(at))
        assert np.allclose(calculator._inverse(degree) @ matrix, np.eye(len(at)), atol=1e-6)


def test_which_gpu_it_fits():
    told = calculator.Told("gpt2", "LoRA", 10**9, 0, 0, 0, 0, 0, 0, 2 * 10**10, 10**9)
    assert not told.fits("T4 16 GB") and told.fits("L4 24 GB")
    full = calculator.Told("gpt2", "LoRA", 10**9, 0, 0, 0, 0, 0, 10**10, 2 * 10**10, 10**9)
    assert full.peak == 10**10 and full.fits("T4 16 GB")  # what is kept aside is not counted
    assert list(GPUS.values()) == sorted(GPUS.values()) or room("A10 24 GB") < room("L4 24 GB")
    with pytest.raises(ValueError, match="unknown GPU 'abacus'"):
        told.fits("abacus")


def test_bad_settings_are_refused():
    for change, words in (
        (dict(kind="Magic"), "unknown method 'Magic'; known: Full fine-tuning"),
        (dict(dtype="float8"), "dtype='float8': allowed is float32, bfloat16"),
        (dict(batch=0), "batch=0: allowed is at least 1"),
        (dict(length=9000), "has room for 8192 tokens, not 9000"),
        (dict(model="gpt9"), "unknown model 'gpt9'"),
    ):
        with pytest.raises(ValueError, match=words):
            calculate(**(dict(model="llama-3-8b", kind="LoRA") | change))


# --- the panel -------------------------------------------------------------------------------


def test_the_whole_range_of_what_is_kept():
    for key in KEPT:
        model, kind, dtype, again = parts_of(key)
        lengths = panels.row_lengths(model, kind)
        for batch, length in ((panels.ROWS[0], lengths[0]), (panels.ROWS[-1], lengths[-1])):
            sizes = calculator.sizes_of(model, kind)
            for size in {sizes[0], sizes[-1]}:
                view = panels.fits_view(model, kind, size, batch, length, dtype, again)
                fits = [name for name in GPUS if view.told.peak + calculator.RESERVE <= room(name)]
                assert list(view.gpus) == fits
                assert ("fits none" in view.text) == (not fits)
                assert model in view.name and str(length) in view.name


def test_a_rank_above_a_model_is_not_offered():
    assert calculator.sizes_of("smollm2-135m", "LoRA")[-1] == 128
    assert calculator.sizes_of("llama-3-8b", "LoRA") == KINDS["LoRA"].sizes
    panel = panels.fits("llama-3-8b", "LoRA", size=256)
    panel.model.value = "smollm2-135m"
    assert panel.size.value in panel.size.options and max(panel.size.options) == 128
    assert "smollm2-135m" in panel.view.name
    panel.close()


def test_moving_the_widgets_and_their_time():
    model, kind, dtype, again = next(
        parts_of(key)
        for key in KEPT
        if "| LoRA |" in key
        and "checkpointing" in key
        and Shape.named(parts_of(key)[0]).context > 1024
    )
    panel = panels.fits(model, kind)
    traced(model, kind, dtype, again)
    times, before = [], panel.describe()
    for control, value in ((panel.batch, 8), (panel.length, 1024), (panel.size, 64)):
        start = time.process_time()
        control.value = value
        times.append(time.process_time() - start)
    assert panel.view == panels.fits_view(model, kind, 64, 8, 1024)
    assert panel.describe() != before and panel.view.text in panel.answer.value
    assert min(times) < 0.15, times
    shown = {trace.name: sum(trace.x) for trace in panel.plot.data}
    told = panel.view.told
    assert shown["weights"] == pytest.approx(2 * told.parts("loss")["weights"] / 1e9)
    panel.close()


def test_what_a_model_does_not_take_is_said(monkeypatch):
    panel = panels.fits("llama-3-8b", "LoRA")

    def refuses(*_, **__):
        raise ValueError("it has no biases")

    monkeypatch.setattr("peftlab.panels.calculator.fits_view", refuses)
    panel.batch.value = 2
    assert panel.answer.value == "<b>it has no biases</b>"
    panel.close()


def test_the_models_are_known_and_in_order():
    sizes = [Shape.named(model).parameters() for model in MODELS]
    assert max(sizes) > 70e9 and min(sizes) < 0.2e9
    assert len(set(MODELS)) == len(MODELS)
    assert peftlab.panels.row_lengths("t5-large", "Prompt tuning") == (128, 256)


@pytest.mark.parametrize("dark", [False, True])
def test_the_parts_of_a_step_are_drawn_to_scale(dark):
    rows = {"Full": {"weights": 8 * 10**9, "optimiser": 16 * 10**9}, "Coded": {"codes": 10**9}}
    figure = figures.step_parts(rows, {"a GPU": 12 * 10**9}, "title", dark)
    assert not overlaps(figure) and not pale(figure)
    boxes = [s for s in figure.layout.shapes if s.type == "rect"]
    wide = [s.x1 - s.x0 for s in boxes[:3]]
    assert wide == pytest.approx([8 * wide[2], 16 * wide[2], wide[2]])
    (line,) = [s for s in figure.layout.shapes if s.line.dash == "dot"]
    assert float(line.path[1:].split(",")[0]) == pytest.approx(boxes[0].x0 + 12 * wide[2], abs=0.1)
    said = alt_text(figure)
    assert "Full 24.0 GB, weights 8.0, optimiser 16.0" in said and "a GPU has 12.0 GB" in said
