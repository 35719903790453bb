"""Every slider over its whole range, as pure functions and as widgets; training in a panel."""

import json
import re
import time
from itertools import combinations

import pandas as pd
import plotly.graph_objects as go
import pytest
from models import letters, tiny

from peftlab import accounting, figures, panels
from peftlab.bases.shapes import Shape, names
from peftlab.methods import FullFineTuning, LoRA, PromptTuning

WIDGET = "application/vnd.jupyter.widget-view+json"


STRUCTURES = ("gpt2", "t5-base", "smollm2-135m")  # plain, two stacks, gated with grouped heads


def target_sets(shape):
    """Every set of targets that the buttons can make, on one model of each structure; on the
    others each target alone, the usual sets and all of them: the closed form is a sum over them."""
    if shape.name in STRUCTURES:
        for count in range(1, len(shape.targets) + 1):
            yield from combinations(shape.targets, count)
    else:
        yield from [(target,) for target in shape.targets]
        yield from [("q", "v"), ("q", "k", "v", "o"), shape.targets]


def by_hand(name, size, targets, shape):
    """The closed form, written out once more."""
    if name == "Full fine-tuning":
        return shape.parameters()
    if name == "Prompt tuning":
        return size * shape.d_model
    return sum(n * size * (i + o) for t in targets for n, i, o in shape.matrices(t))


@pytest.mark.parametrize("name", panels.CHOICES)
@pytest.mark.parametrize("model", names())
def test_the_whole_range_of_every_setting(name, model):
    shape = Shape.named(model)
    sets = target_sets(shape) if panels.CHOICES[name].targeted else [("q", "v")]
    for targets in sets:
        previous = 0
        for size in panels.allowed_sizes(name, targets, shape):
            view = panels.count_view(name, size, targets, shape)
            expected = by_hand(name, size, targets, shape)
            assert view.parameters == expected == view.counts[view.sizes.index(size)]
            assert view.percent == pytest.approx(100 * expected / shape.parameters())
            assert view.file_bytes == 4 * expected
            assert view.text.startswith(f"{expected:,} parameters · ")
            assert expected > previous or name == "Full fine-tuning"
            previous = expected


@pytest.mark.parametrize("name", panels.CHOICES)
@pytest.mark.parametrize("model", ["gpt2", "t5-base", "llama-3-70b"])
def test_the_figure_marks_the_setting(name, model):
    for size in panels.allowed_sizes(name, ("q", "v"), model):
        view = panels.count_view(name, size, ("q", "v"), model)
        line, current, base = view.figure().data
        assert list(line.x) == list(view.sizes) and list(line.y) == list(view.counts)
        assert (current.x[0], current.y[0]) == (size, view.parameters)
        assert base.y[0] == accounting.base_parameters(model)
        assert current.marker.color == figures.COLOURS[figures.method_key(name)]


def test_sizes_stop_where_the_model_does():
    assert panels.allowed_sizes("LoRA", ("q",), "smollm2-135m")[-1] == 256
    assert panels.allowed_sizes("LoRA", ("q", "v"), "smollm2-135m")[-1] == 128  # v has 192 rows
    assert panels.allowed_sizes("Prompt tuning", (), "gpt2") == panels.LENGTHS


def test_the_text_says_count_share_and_bytes():
    view = panels.count_view("LoRA", 8, ("q", "v"), "gpt2")
    assert view.text == "294,912 parameters · 0.237% of gpt2 · 1.2 MB in float32"


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="choose at least one target"):
        panels.count_view("LoRA", 8, (), "gpt2")
    with pytest.raises(ValueError, match="r=769"):
        panels.count_view("LoRA", 769, ("q",), "gpt2")
    with pytest.raises(ValueError, match="unknown method 'Magic'; allowed: LoRA, Prompt tuning"):
        panels.build_method("Magic", 8)


def test_methods_are_built_from_the_controls():
    expected = LoRA(r=4, alpha=8, target_modules=("k",))
    assert panels.build_method("LoRA", 4, ["k"]) == expected
    assert panels.build_method("Prompt tuning", 5) == PromptTuning(num_virtual_tokens=5)
    assert panels.build_method("Full fine-tuning", 1) == FullFineTuning()


def shown(panel):
    """The number that the learner reads."""
    return int(re.search(r">([\d,]+) parameters", panel.answer.value)[1].replace(",", ""))


@pytest.fixture(scope="module")
def explorer():
    return panels.count_explorer("gpt2", "LoRA")


@pytest.mark.parametrize("name", panels.CHOICES)
def test_moving_the_widgets(explorer, name):
    explorer.method.value = name
    for model in explorer.model.options:
        explorer.model.value = model
        everywhere = model in STRUCTURES and name != "Full fine-tuning"
        for size in explorer.size.options if everywhere else explorer.size.options[:1]:
            explorer.size.value = size
            expected = by_hand(name, size, explorer.chosen, Shape.named(model))
            assert shown(explorer) == expected
            assert (explorer.plot.data[1].x[0], explorer.plot.data[1].y[0]) == (size, expected)
            assert explorer.plot.layout.title.text == explorer.static().layout.title.text


def test_the_target_buttons():
    panel = panels.count_explorer("gpt2", "LoRA")
    assert panel.targets["gate"].layout.display == "none"  # GPT-2 has no gate
    panel.targets["up"].value = True
    assert shown(panel) == by_hand("LoRA", 8, ("q", "v", "up"), Shape.named("gpt2"))
    for target in ("q", "v", "up"):
        panel.targets[target].value = False
    assert "choose at least one target" in panel.answer.value
    panel.targets["o"].value = True
    assert shown(panel) == by_hand("LoRA", 8, ("o",), Shape.named("gpt2"))
    panel.model.value = "llama-3-8b"
    assert panel.targets["gate"].layout.display is None
    panel.method.value = "Prompt tuning"
    assert panel.targets["o"].layout.display == "none"


def test_a_rank_too_large_for_the_next_model_moves_down():
    panel = panels.count_explorer("gpt2", "LoRA")
    panel.size.value = 256
    panel.model.value = "smollm2-135m"
    assert panel.size.value == 128
    assert shown(panel) == by_hand("LoRA", 128, ("q", "v"), Shape.named("smollm2-135m"))


def test_another_method_starts_at_its_own_size():
    panel = panels.count_explorer("gpt2", "LoRA")
    panel.method.value = "Prompt tuning"
    assert (panel.size.value, panel.size.description) == (20, "virtual tokens P")
    panel.method.value = "Full fine-tuning"
    assert panel.size.disabled and shown(panel) == 124439808
    panel.method.value = "LoRA"
    assert panel.size.value == 8 and not panel.size.disabled


def test_a_move_is_shown_within_150_ms(explorer):
    explorer.method.value, explorer.model.value = "LoRA", "gpt2"
    times = []
    for size in explorer.size.options:
        start = time.perf_counter()
        explorer.size.value = size
        times.append(time.perf_counter() - start)
    assert min(times) < 0.15  # the smallest: other work on this machine is not the panel's


def test_an_output_carries_widget_and_still_and_repeats_exactly():
    first, second = (panels.count_explorer()._repr_mimebundle_() for _ in range(2))
    assert set(first) == {"text/plain", WIDGET, panels.STILL}
    assert first["text/plain"] == (
        "Count explorer: LoRA, 294,912 parameters · 0.237% of gpt2 · 1.2 MB in float32"
    )
    assert json.dumps(first[panels.STILL]) == json.dumps(second[panels.STILL])  # as nbval needs
    assert go.Figure(first[panels.STILL]) == panels.count_explorer().static()


def test_the_still_follows_the_widgets():
    panel = panels.count_explorer()
    panel.size.value = 64
    title = panel._repr_mimebundle_()[panels.STILL]["layout"]["title"]["text"]
    assert title == "LoRA: 2,359,296 parameters, 1.90% of gpt2"


@pytest.fixture
def trainer(monkeypatch):
    """A trainer on a tiny random GPT-2 and a task of letters."""
    monkeypatch.setattr(panels.tasks, "load", lambda name: letters())
    return panels.live_trainer(tiny("gpt2"), tasks=["letters"], steps=6)


def finish(panel):
    panel.thread.join(timeout=60)
    assert not panel.thread.is_alive()


@pytest.mark.parametrize("name", panels.CHOICES)
def test_training_from_the_buttons(trainer, name):
    before = trainer.base.fingerprint()
    trainer.method.value = name
    assert trainer.lr.value == panels.build_method(name, 1).learning_rate
    trainer.train_button.click()
    finish(trainer)
    assert trainer.run.steps == 6 and not trainer.run.interrupted
    assert [record["step"] for record in trainer.records] == [1, 2, 3, 4, 5, 6]
    assert trainer.progress.value == trainer.progress.max == 6
    assert trainer.status.value.startswith("done: 6 steps in ")
    assert list(trainer.plot.data[0].y) == [record["loss"] for record in trainer.records]
    for scores in (trainer.run.before, trainer.run.metrics):
        assert f"<td>{scores['exact']:.1%}</td>" in trainer.scores.value
    assert trainer.base.fingerprint() == before and trainer.base.adapted_by is None
    assert not trainer.train_button.disabled and trainer.stop_button.disabled


def test_stop_keeps_the_steps_so_far(trainer):
    before = trainer.base.fingerprint()
    trainer.steps.value = 100_000
    trainer.train_button.click()
    first = trainer.thread
    end = time.monotonic() + 60
    while len(trainer.records) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    trainer.train_button.click()  # a second press while it trains changes nothing
    assert trainer.thread is first
    trainer.stop_button.click()
    finish(trainer)
    assert trainer.run.interrupted and 3 <= trainer.run.steps < 100_000
    assert trainer.status.value.startswith(f"stopped: {trainer.run.steps} steps")
    assert trainer.base.fingerprint() == before and trainer.base.adapted_by is None


def test_an_error_in_the_thread_is_shown_and_the_base_is_whole(trainer, monkeypatch):
    before = trainer.base.fingerprint()
    real = panels.train

    def broken(tuned, task, on_step, **options):
        def fail(record):
            raise RuntimeError("out of <luck>")

        return real(tuned, task, on_step=fail, **options)

    monkeypatch.setattr(panels, "train", broken)
    trainer.method.value = "Full fine-tuning"
    trainer.train_button.click()
    finish(trainer)
    assert "RuntimeError: out of &lt;luck&gt;" in trainer.status.value
    assert trainer.base.fingerprint() == before and trainer.base.adapted_by is None
    monkeypatch.setattr(panels, "train", real)
    trainer.train_button.click()
    finish(trainer)
    assert trainer.status.value.startswith("done")


def test_a_base_in_use_is_refused_in_the_panel(trainer):
    import peftlab

    tuned = peftlab.attach(trainer.base, LoRA(r=2))
    trainer.train_button.click()
    finish(trainer)
    assert "RuntimeError" in trainer.status.value and "detach" in trainer.status.value
    assert trainer.base.adapted_by is tuned  # and the learner's adapter is still there


@pytest.mark.parametrize("pause, frames", [(0.0, 7), (1000.0, 1)])
def test_the_curve_is_drawn_no_more_often_than_the_eye_follows(trainer, monkeypatch, pause, frames):
    drawn = []
    monkeypatch.setattr(panels, "SECONDS_BETWEEN_FRAMES", pause)
    monkeypatch.setattr(panels, "_redraw", lambda plot, figure: drawn.append(figure))
    trainer.train_button.click()
    finish(trainer)
    assert len(drawn) == frames  # one a step, if at all, and one at the end


def test_the_trainer_shows_a_history_until_it_trains():
    table = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.5]})
    panel = panels.live_trainer(tiny("gpt2"), history=table)
    still = panel._repr_mimebundle_()[panels.STILL]
    assert still["layout"]["title"]["text"] == "LoRA: loss 1.500 after 2 steps"
    empty = panels.live_trainer(tiny("gpt2"))
    assert empty.describe() == "Live trainer: LoRA: not trained yet"
    assert len(empty.plot.data) == 1


def test_every_size_of_every_method_fits_a_small_base():
    panel = panels.live_trainer(tiny("llama"))
    for name in panels.CHOICES:
        panel.method.value = name
        assert panel.size.value in panel.size.options
        for size in panel.size.options:
            panels.build_method(name, size).parameters(panel.base.anatomy.shape)


def test_scores_are_listed_before_and_after():
    table = panels.scores_table({"exact_match": 0.1}, {"exact_match": 0.95})
    assert "<td>exact match</td><td>10.0%</td><td>95.0%</td>" in table
