"""The memory explorer over the whole range of its sliders, as a pure function and as a widget."""

import json
import time

import pytest

import peftlab
from peftlab import accounting, memory, panels
from peftlab.bases.shapes import Shape

WIDGET = "application/vnd.jupyter.widget-view+json"
FULL, PROMPT = "Full fine-tuning", "Prompt tuning"


@pytest.mark.parametrize("model", panels.memory_models())
def test_every_row_and_length_at_both_ends(model):
    """More rows or more tokens never take less, and what trains takes 16 bytes a parameter."""
    lengths, n = panels.memory_lengths(model), accounting.base_parameters(model)
    assert lengths and max(lengths) + 20 <= Shape.named(model).context
    for batch in (panels.BATCHES[0], panels.BATCHES[-1]):
        peaks = []
        for length in {lengths[0]: None, lengths[-1]: None}:
            view = panels.memory_view(model, batch, length)
            assert set(view.steps) == set(panels.BESIDE_FULL)
            step = view.steps[FULL]
            assert step.aside == step.gradients == 4 * n
            assert 4 * n <= step.weights <= 4.001 * n  # and tables of rotary positions
            assert 8 * n <= step.optimiser <= 8.001 * n  # and the number of steps
            assert view.peak(FULL) == step.peak - 4 * n  # what is kept aside is not shown
            assert 1 <= view.ratios[PROMPT] < 16 / 4 * 1.2 or length < 64
            assert f"{batch} × {length} tokens" in view.text
            peaks.append(view.peak(PROMPT))
        assert peaks == sorted(peaks)


BETWEEN = [  # of batches and lengths, none was traced
    *(("tiny-gpt", label, 7, 61) for label in panels.BESIDE_FULL),
    ("tiny-llama", "LoRA, q and v", 3, 100),
    ("tiny-t5", "Prefix tuning", 1, 77),
    ("gpt2", FULL, 2, 33),
    ("gpt2", PROMPT, 6, 250),
    ("smollm2-135m", "LoRA, all linear", 64, 2048),
]


@pytest.mark.parametrize("model, label, batch, length", BETWEEN)
def test_between_what_was_traced_it_is_what_is_predicted(model, label, batch, length):
    """To the byte: the parts, and the most at any time."""
    step = panels.memory_view(model, batch, length).steps[label]
    told = memory.predict(panels.BESIDE_FULL[label], model, batch, length)
    for part in ("weights", "aside", "optimiser", "gradients", "activations"):
        assert getattr(step, part) == told.bytes(part), part
    assert step.at_loss == max(told.most["forward"], told.most["backward"])
    assert step.at_update == told.most["step"]


@pytest.mark.parametrize("label", ["LoRA, q and v", PROMPT])
def test_of_one_row_it_is_the_most(label):
    """The logits of one row lie together without a copy, and so do its labels."""
    step = panels.memory_view("tiny-gpt", 1, 64).steps[label]
    told = memory.predict(panels.BESIDE_FULL[label], "tiny-gpt", 1, 64)
    assert step.weights == told.bytes("weights")
    assert 0 <= step.activations - told.bytes("activations") <= 8 * 64
    assert told.peak <= step.peak <= told.peak + 16 * 1024


def test_the_ratio_falls_from_four_towards_one_as_rows_are_added():
    ratios = [panels.memory_view("gpt2", batch, 128).ratios[PROMPT] for batch in panels.BATCHES]
    assert ratios == sorted(ratios, reverse=True)
    assert 3 < ratios[0] <= 4.2 and 1 < ratios[-1] < 1.3


def test_the_bars_are_the_parts():
    view = panels.memory_view("gpt2", 8, 128)
    figure = view.figure()
    assert figure.layout.title.text == view.text
    for label, step in view.steps.items():
        loss = view.moments()[label]["loss"]
        update = view.moments()[label]["update"]
        assert sum(loss.values()) == step.at_loss - step.aside
        assert sum(update.values()) <= step.at_update - step.aside
        assert max(step.at_loss, step.at_update) - step.aside == view.peak(label)
    shown = {trace.name: sum(trace.y) for trace in figure.data}
    assert shown["gradients"] == sum(step.gradients for step in view.steps.values())


def test_moving_the_widgets():
    panel = peftlab.panels.memory_explorer("gpt2", 8, 128)
    before = panel.describe()
    panel.batch.value = 64
    assert panel.view == panels.memory_view("gpt2", 64, 128) and panel.describe() != before
    panel.length.value = 512
    panel.model.value = "t5-base"  # has room for fewer tokens: the slider moves down
    assert panel.length.value == 256 and panel.view.model == "t5-base"
    assert panel.view.text in panel.answer.value
    assert panel.plot.layout.title.text == panel.view.text
    drawn = {trace.name: tuple(trace.y) for trace in panel.plot.data}
    assert drawn == {trace.name: tuple(trace.y) for trace in panel.view.figure().data}


def test_a_move_is_shown_within_150_ms():
    panel = peftlab.panels.memory_explorer("gpt2", 1, 32)
    panels.memory_view.cache_clear()
    times = []
    for batch in (2, 4, 8):
        start = time.process_time()
        panel.batch.value = batch
        times.append(time.process_time() - start)
    assert min(times) < 0.15, times  # of this process alone, type checks included


def test_the_output_carries_widget_and_still():
    bundle = peftlab.panels.memory_explorer()._repr_mimebundle_()
    assert {WIDGET, panels.STILL, "text/plain"} <= bundle.keys()
    assert json.dumps(bundle[panels.STILL])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="unknown model 'gpt9'"):
        panels.memory_view("gpt9", 1, 32)
    with pytest.raises(ValueError, match="1024 tokens and 20 virtual ones: 1024 fit"):
        panels.memory_view("gpt2", 1, 1024)
    with pytest.raises(ValueError, match="batch=0"):
        panels.memory_view("gpt2", 0, 32)
