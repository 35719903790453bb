"""Lesson 09's sliders: the bottleneck counts and trains, the strength reads what was measured."""

import pytest
from models import letters, tiny

from peftlab import accounting, panels
from peftlab.methods import HoulsbyAdapter, ParallelAdapter, PfeifferAdapter

KINDS = {
    "Houlsby adapter": HoulsbyAdapter,
    "Pfeiffer adapter": PfeifferAdapter,
    "Parallel adapter": ParallelAdapter,
}
STRENGTHS = (0.0, 0.5, 1.0, 2.0)
CURVES = {
    "Parallel adapter": dict(zip(STRENGTHS, (3.0, 2.0, 0.5, 4.0), strict=True)),
    "(IA)³": dict(zip(STRENGTHS, (3.0, 1.5, 1.0, 2.5), strict=True)),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_whole_range_of_the_bottleneck(name):
    panel = panels.count_explorer("bert-base", name)
    for size in panel.size.options:
        panel.size.value = size
        assert panel.view.parameters == accounting.count(KINDS[name](size), "bert-base")
        assert f"{panel.view.parameters:,} parameters" in panel.answer.value
    assert panel.size.description == "bottleneck m" and panel.size.options[-1] == 256


@pytest.mark.parametrize("name", KINDS)
def test_the_bottleneck_trains_at_both_ends(name, monkeypatch):
    monkeypatch.setattr(panels.live.tasks, "load", lambda _: letters())
    base = tiny("gpt2")
    before = base.fingerprint()
    trainer = panels.live_trainer(base, tasks=["letters"], methods=[name], steps=2)
    for size in (trainer.size.options[0], trainer.size.options[-1]):
        trainer.size.value = size
        trainer.start()
        trainer.thread.join(60)
        assert trainer.run.steps == 2
        assert trainer.run.method == name
        assert trainer.status.value and "Error" not in trainer.status.value
        assert base.fingerprint() == before and base.adapted_by is None


def test_the_whole_range_of_the_strength():
    panel = panels.strength_explorer(CURVES, y_title="loss")
    seen = set()
    for strength in STRENGTHS:
        panel.strength.value = strength
        for name, at in CURVES.items():
            assert f"{name} {at[strength]:.3g}" in panel.view.text
        marks = [trace for trace in panel.plot.data if trace.mode == "markers"]
        assert [mark.y[0] for mark in marks] == [at[strength] for at in CURVES.values()]
        assert all(mark.x[0] == strength for mark in marks)
        assert panel.text.value == f"<b>{panel.view.text}</b>"
        seen.add(panel.describe())
    assert len(seen) == len(STRENGTHS)
    assert panel.static().layout.title.text.startswith("Strength 2: ")


def test_a_strength_that_was_not_measured():
    with pytest.raises(ValueError, match="strength 3 was not measured; there are 0, 0.5, 1, 2"):
        panels.strength_view(CURVES, 3.0, "loss")
    for curves in ({}, CURVES | {"other": {0.0: 1.0}}):
        with pytest.raises(ValueError, match="measured at the same strengths"):
            panels.strength_view(curves, 1.0, "loss")
