"""Every slider over its whole range, as pure functions and as widgets; training in a panel."""

import gzip
import json
import re
import sys
import time
from itertools import combinations, product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from ipywidgets.widgets.widget import Widget
from models import letters, tiny

import peftlab
from peftlab import accounting, figures, panels
from peftlab.bases import probes
from peftlab.bases.shapes import Shape, names
from peftlab.experiments import sweep_soft
from peftlab.methods import FullFineTuning, LoRA, PrefixTuning, PromptTuning
from peftlab.panels import plot
from peftlab.panels.plot import Plot

WIDGET = "application/vnd.jupyter.widget-view+json"

try:
    from ipywidgets.widgets.widget import _instances
except ImportError:  # ipywidgets 7
    _instances = Widget.widgets


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
    if name.endswith(" adapter"):  # two matrices and two biases, in Houlsby's twice a block
        a_block = 2 if name.startswith("Houlsby") else 1
        d = shape.d_model
        return a_block * (shape.layers + shape.decoder_layers) * (2 * size * d + size + d)
    if name in ("Prefix tuning", "P-tuning v2"):  # a decoder layer of T5 attends twice
        return (
            2 * size * (shape.layers + 2 * shape.decoder_layers) * shape.kv_heads * shape.head_dim
        )
    if name == "P-tuning, LSTM":  # PEFT's sizes: an LSTM of d_model in each direction
        d = shape.d_model
        return size * d + 16 * d * d + 16 * d + 24 * d * d + 16 * d + 6 * d * d + 3 * d
    if name == "P-tuning, MLP":
        return size * shape.d_model + 3 * (shape.d_model**2 + shape.d_model)
    return sum(n * size * (i + o) for t in targets for n, i, o in shape.matrices(t))


def kept(name, size, targets, shape):
    """What is stored: P-tuning throws its network away."""
    if name.startswith("P-tuning, "):
        return size * shape.d_model
    return by_hand(name, size, targets, shape)


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
            assert view.file_bytes == 4 * kept(name, size, targets, shape)
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
    assert panels.allowed_sizes("Prefix tuning", (), "gpt2") == panels.LENGTHS


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
    assert panels.build_method("Prefix tuning", 9) == PrefixTuning(num_virtual_tokens=9)
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


def test_colab_draws_what_is_displayed_and_others_what_is_returned(monkeypatch, capsys):
    panel = panels.count_explorer()
    with pytest.raises(NotImplementedError):  # IPython goes on to the bundle
        panel._ipython_display_()
    monkeypatch.setitem(sys.modules, "google.colab", object())
    panel._ipython_display_()
    assert panel.describe() in capsys.readouterr().out


def test_the_still_follows_the_widgets():
    panel = panels.count_explorer()
    panel.size.value = 64
    title = panel._repr_mimebundle_()[panels.STILL]["layout"]["title"]["text"]
    assert title == "LoRA: 2,359,296 parameters, 1.90% of gpt2"


@pytest.fixture
def trainer(monkeypatch):
    """A trainer on a tiny random GPT-2 and a task of letters."""
    monkeypatch.setattr(panels.live.tasks, "load", lambda name: letters())
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
    real = panels.live.train

    def broken(tuned, task, on_step, **options):
        def fail(record):
            raise RuntimeError("out of <luck>")

        return real(tuned, task, on_step=fail, **options)

    monkeypatch.setattr(panels.live, "train", broken)
    trainer.method.value = "Full fine-tuning"
    trainer.train_button.click()
    finish(trainer)
    assert "RuntimeError: out of &lt;luck&gt;" in trainer.status.value
    assert trainer.base.fingerprint() == before and trainer.base.adapted_by is None
    monkeypatch.setattr(panels.live, "train", real)
    trainer.train_button.click()
    finish(trainer)
    assert trainer.status.value.startswith("done")


def test_a_base_in_use_is_refused_in_the_panel(trainer):
    tuned = peftlab.attach(trainer.base, LoRA(r=2))
    trainer.train_button.click()
    finish(trainer)
    assert "RuntimeError" in trainer.status.value and "detach" in trainer.status.value
    assert trainer.base.adapted_by is tuned  # and the learner's adapter is still there


@pytest.mark.parametrize("pause, frames", [(0.0, 7), (1000.0, 1)])
def test_the_curve_is_drawn_no_more_often_than_the_eye_follows(trainer, monkeypatch, pause, frames):
    drawn = []
    monkeypatch.setattr(panels.live, "SECONDS_BETWEEN_FRAMES", pause)
    monkeypatch.setattr(trainer.plot, "draw", drawn.append)
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


@pytest.mark.parametrize("name", ["Prompt tuning", "Prefix tuning"])
def test_a_soft_prompt_starts_where_the_panel_says(trainer, monkeypatch, name):
    attached = []
    monkeypatch.setattr(
        panels.live, "attach", lambda b, m: attached.append(m) or peftlab.attach(b, m)
    )
    trainer.method.value, trainer.steps.value = name, 1
    assert trainer.init.value == panels.build_method(name, 20).init == trainer.init.options[0]
    for init in trainer.init.options:
        trainer.init.value = init
        trainer.train_button.click()
        finish(trainer)
        assert attached[-1].init == init
    assert len(attached) == len(trainer.init.options) >= 3


@pytest.mark.parametrize("name", sorted({*panels.CHOICES} - {"Prompt tuning", "Prefix tuning"}))
def test_other_methods_have_no_start_to_choose(trainer, name):
    trainer.method.value = "Prompt tuning"
    trainer.method.value = name
    assert trainer.init.layout.display == "none" and trainer.init.value is None


def test_scores_are_listed_before_and_after():
    table = panels.scores_table({"exact_match": 0.1}, {"exact_match": 0.95})
    assert "<td>exact match</td><td>10.0%</td><td>95.0%</td>" in table


# --- attention ---------------------------------------------------------------------------------

TEXTS = ("a b", "b c a")


def attention_scenes(family="gpt2", lengths=(1, 3)):
    """Maps of two texts with prefixes as they start, and after noise in place of training."""
    base, scenes = tiny(family), {}
    for length in lengths:
        with peftlab.attach(base, PrefixTuning(length, init="random")) as tuned:
            before = [probes.attention_map(tuned, text) for text in TEXTS]
            for tensor in tuned.trainable.values():
                tensor.data.mul_(-2)
            after = [probes.attention_map(tuned, text) for text in TEXTS]
        pairs = zip(before, after, strict=True)
        scenes[length] = [panels.attention_scene(*pair) for pair in pairs]
    return scenes


@pytest.fixture(scope="module")
def scenes():
    return attention_scenes()


@pytest.fixture(scope="module")
def looking(scenes):
    return panels.attention_explorer(scenes)


def every_place(scenes):
    """Every position of the four sliders."""
    for length, row in scenes.items():
        layers, heads = row[0].after.shape[:2]
        for place in product([length], range(1, layers + 1), range(1, heads + 1), (1, 2)):
            yield dict(zip(("length", "layer", "head", "example"), place, strict=True))


def test_the_attention_of_every_place(scenes):
    for place in every_place(scenes):
        view = panels.attention_view(scenes, **place)
        scene = scenes[place["length"]][place["example"] - 1]
        here = place["layer"] - 1, place["head"] - 1
        for label, stored in (("start", scene.before), ("trained", scene.after)):
            np.testing.assert_array_equal(view.maps[label], stored[here])
            np.testing.assert_allclose(view.maps[label].sum(axis=1), 1, atol=1e-5)
            share = view.maps[label][:, : place["length"]].sum(axis=1)
            np.testing.assert_allclose(view.gates[label], share)
            future = np.triu(view.maps[label][:, place["length"] :], 1)
            assert not future.any()  # in the right place: the text's columns begin after the prefix
        assert len(view.keys) == place["length"] + len(view.queries)
        assert f"layer {place['layer']}, head {place['head']}" in view.text


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_other_families_have_maps_too(family):
    scenes = attention_scenes(family, lengths=(2,))
    view = panels.attention_view(scenes, 2, 1, 1, 1)
    np.testing.assert_allclose(view.maps["trained"].sum(axis=1), 1, atol=1e-5)


def test_maps_of_two_stacks_are_refused():
    with pytest.raises(ValueError, match="of one stack"):
        attention_scenes("t5", lengths=(2,))


def test_moving_the_attention_sliders(looking, scenes):
    """At every place the one figure that stands shows what a new one would show."""
    plot = looking.plot
    for place in every_place(scenes):
        for name, value in place.items():
            looking.sliders[name].value = value
        view = panels.attention_view(scenes, **place)
        assert looking.plot is plot and looking.view.text == view.text
        assert view.text in looking.text.value
        wanted = view.figure()
        assert plot.layout.to_plotly_json() == wanted.layout.to_plotly_json()
        for shown, new in zip(plot.data, wanted.data, strict=True):
            for part in ("z", "customdata") if shown.type == "heatmap" else ("x", "y"):
                np.testing.assert_array_equal(shown[part], new[part])


def test_attention_is_redrawn_within_150_ms_wherever_the_sliders_are(record_property):
    """On maps as large as the lesson's: the longest prefix and text, every layer and head."""
    rng = np.random.default_rng(0)
    scenes = {
        length: [
            panels.AttentionScene(
                *rng.dirichlet(np.ones(length + 20), (2, 6, 6, 20)),
                length, tuple(" abcdefghijklmnopqrs"), tuple("p" * length + "abcdefghijklmnopqrst"),
            )
            for _ in range(4)
        ]
        for length in (2, 9, 20)
    }  # fmt: skip
    panel = panels.attention_explorer(scenes)
    slowest = 0.0
    for place in product(scenes, range(1, 7), range(1, 7), (1, 2, 3, 4)):
        moves = list(zip(("length", "layer", "head", "example"), place, strict=True))
        for name, value in moves:
            slider = panel.sliders[name]
            if slider.value == value:
                continue
            before, times = slider.value, []
            while len(times) < 3 and min(times, default=1) >= 0.15:  # a collector may pass by once
                slider.value = before
                start = time.process_time()  # other work on this machine is not the panel's
                slider.value = value
                times.append(time.process_time() - start)
            slowest = max(slowest, min(times))
    record_property("slowest redraw, ms", round(1000 * slowest))
    assert slowest < 0.15


def test_attention_sliders_end_where_the_maps_do(looking, scenes):
    layers, heads = scenes[1][0].after.shape[:2]
    assert looking.length.options == (1, 3)
    assert (looking.layer.min, looking.layer.max) == (1, layers)
    assert (looking.head.min, looking.head.max) == (1, heads)
    assert (looking.example.min, looking.example.max) == (1, len(TEXTS))


def test_attention_of_a_place_that_is_not_there_is_refused(scenes):
    place = dict(length=1, layer=1, head=1, example=1)
    for change, words in (
        ({"length": 2}, "no maps with a prefix of 2"),
        ({"layer": 0}, "layer 0: there are 1 to"),
        ({"head": 99}, "head 99: there are 1 to"),
        ({"example": 3}, "example 3: there are 1 to 2"),
    ):
        with pytest.raises(ValueError, match=words):
            panels.attention_view(scenes, **(place | change))
    with pytest.raises(ValueError, match="no maps to show"):
        panels.attention_explorer({})
    with pytest.raises(ValueError, match="the same examples"):
        panels.attention_explorer({1: scenes[1], 3: scenes[3][:1]})


def test_maps_that_do_not_belong_together_are_refused():
    base = tiny("gpt2")
    plain = probes.attention_map(base, TEXTS[0])
    with pytest.raises(ValueError, match="no prefix"):
        panels.attention_scene(plain, plain)
    found = []
    for length in (1, 2):
        with peftlab.attach(base, PrefixTuning(length)) as tuned:
            found += [probes.attention_map(tuned, text) for text in TEXTS]
    with pytest.raises(ValueError, match="two different texts"):
        panels.attention_scene(found[0], found[1])
    with pytest.raises(ValueError, match="before has the shape"):
        panels.attention_scene(found[0], found[2])


def test_the_attention_panel_has_a_still(looking):
    bundle = looking._repr_mimebundle_()
    assert bundle["text/plain"].startswith("Attention explorer: layer ")
    assert go.Figure(bundle[panels.STILL]) == looking.static()
    assert len(json.dumps(bundle[panels.STILL])) < 300_000


# --- the lab of soft prompts -------------------------------------------------------------------

LAB = list(product(panels.SOFT_LAB, panels.SOFT_METRICS))


@pytest.mark.parametrize("place, metric", LAB)
def test_every_table_of_the_lab_is_what_the_file_says(place, metric):
    _, runs = sweep_soft.read("lab")
    view = panels.soft_lab_view(*place, metric)
    labels = panels.SOFT_LAB[place]
    column = "loss_last" if "loss" in metric else "exact"
    found = 0
    for (row, name), (j, rate) in product(enumerate(view.rows), enumerate(view.rates)):
        seeds = runs[(runs.label == labels[name]) & (runs.lr == rate)][column]
        if seeds.empty:
            assert np.isnan(view.values[row, j]) and view.texts[row, j] == ""
            continue
        found += 1
        assert len(seeds) == view.seeds == len(sweep_soft.SEEDS)
        expected = seeds.min() if "worst" in metric else seeds.mean()
        assert view.values[row, j] == pytest.approx(expected, abs=1e-6)
        said = float(view.texts[row, j].split("<br>")[0])  # two digits of it
        assert said == pytest.approx(expected, rel=0.05)
    assert found == runs.label.isin(labels.values()).sum() / view.seeds
    assert f"{view.trained} of {found} settings" in view.figure().layout.title.text


def test_the_lab_leaves_no_run_out():
    _, runs = sweep_soft.read("lab")
    assert {label for rows in panels.SOFT_LAB.values() for label in rows.values()} == set(
        runs.label
    )


def test_moving_the_lab_draws_what_a_new_one_would():
    panel = panels.soft_prompt_lab()
    for (method, vary), metric in LAB:
        for name, value in (("method", method), ("vary", vary), ("metric", metric)):
            panel.choices[name].value = value
        assert panel.view.method == method and panel.view.metric == metric
        ours, fresh = (figure.data[0].to_plotly_json() for figure in (panel.plot, panel.static()))
        assert set(ours) - {"uid"} == set(fresh)
        assert np.array_equal(ours["z"], fresh["z"], equal_nan=True)
        assert np.isfinite(ours["z"]).any()
        for key in ("x", "y", "text", "zmin", "zmax", "reversescale", "colorbar"):
            assert np.array_equal(np.array(ours[key]), np.array(fresh[key])), key
        assert panel.plot.layout == panel.static().layout
        assert panel.plot.layout.title.text.lower().startswith(panel.view.text.lower())


def test_the_lab_is_redrawn_within_150_ms():
    panel, times = panels.soft_prompt_lab(), []
    for metric in [*panels.SOFT_METRICS][1:] + [*panels.SOFT_METRICS][:1]:
        start = time.perf_counter()
        panel.choices["metric"].value = metric
        times.append(time.perf_counter() - start)
    assert min(times) < 0.15  # the smallest: other work on this machine is not the panel's


def test_the_lab_has_a_still_that_repeats_exactly():
    first, second = (panels.soft_prompt_lab()._repr_mimebundle_() for _ in range(2))
    assert set(first) == {"text/plain", WIDGET, panels.STILL}
    assert json.dumps(first[panels.STILL]) == json.dumps(second[panels.STILL])  # as nbval needs
    assert first["text/plain"].startswith("Soft prompt lab: prompt by start: ")


def test_a_lab_that_was_not_run_is_refused():
    with pytest.raises(ValueError, match="no lab of a prompt by colour"):
        panels.soft_lab_view("prompt", "colour", "exact match, mean")
    with pytest.raises(ValueError, match="unknown metric 'speed'; allowed: exact match, mean"):
        panels.soft_lab_view("prompt", "start", "speed")


MAKERS = {
    "count": panels.count_explorer,
    "memory": panels.memory_explorer,
    "ranks": panels.rank_lab,
    "soft prompts": panels.soft_prompt_lab,
    "trainer": lambda: panels.live_trainer(peftlab.load("tiny-gpt")),
}


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


def test_the_channel_opens_with_all_that_is_drawn(maker, monkeypatch):
    """A page that draws before a second message comes has the whole figure, and the script."""
    opened, real = {}, Widget.open

    def opening(widget):
        if widget.comm is None:
            for kind in (Plot, plot.Script):
                if isinstance(widget, kind):
                    opened[kind] = widget.get_state()
        real(widget)

    monkeypatch.setattr(Widget, "open", opening)
    monkeypatch.setattr(plot, "_script", None)
    panel = maker()
    drawn = json.loads(opened[Plot]["figure"])
    assert len(drawn["data"]) == len(panel.plot.data) > 0
    assert drawn["layout"] == json.loads(panel.static().to_json())["layout"]
    assert gzip.decompress(opened[plot.Script]["packed"]).startswith(b"/**\n* plotly.js v")


def test_the_script_travels_once_a_kernel():
    first, second = panels.rank_lab(), panels.count_explorer()
    assert first.plot.script is second.plot.script
    first.close()
    assert second.plot.script.comm is not None


def answers(plot: Plot, content: dict, monkeypatch) -> list:
    """What the kernel sends when the page asks."""
    sent = []
    with monkeypatch.context() as patch:
        patch.setattr(plot, "send", lambda *message: sent.append(message))
        patch.setattr(plot, "send_state", sent.append)
        plot._handle_custom_msg(content, [])
    return sent


def test_the_kernel_sends_again_what_the_page_lacks(monkeypatch):
    panel = panels.rank_lab()
    panel.choices["r"].value = 8
    assert panel.plot.version == 1
    for have, sent in ((0, [["figure", "words", "version"]]), (1, [])):
        assert answers(panel.plot, {"ask": "figure", "have": have}, monkeypatch) == sent
    (message,) = answers(panel.plot, {"ask": "script"}, monkeypatch)
    assert message == ({"answer": "script"}, [panel.plot.script.packed])
    for strange in ({}, {"ask": "a cake"}, {"ask": "figure"}):
        assert answers(panel.plot, strange, monkeypatch) == []


MAKERS_OF_TEXT = {**MAKERS, "chat": lambda: panels.chat(tiny("gpt2"), {}, "who?", 2)}


@pytest.mark.parametrize("maker", MAKERS_OF_TEXT.values(), ids=MAKERS_OF_TEXT)
def test_a_closed_panel_leaves_no_widget(maker):
    plot.script()  # what all panels share stays
    before = set(_instances)
    panel = maker()
    assert set(_instances) > before
    panel.close()
    assert set(_instances) == before
