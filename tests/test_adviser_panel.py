"""The adviser's panel and its drawing: what is drawn is the path, every control leads on."""

import json
import time
from dataclasses import replace

import pytest

from peftlab import figures, panels
from peftlab.figures.sheet import overlaps, pale
from peftlab.memory.adviser import FLOW, RECIPES, Need, advise, comparisons
from peftlab.memory.calculator import MODELS
from peftlab.panels.adviser import MEGABYTES, OPTIONS, TICKS, outcome

NEEDS = [
    dict(),
    dict(gpu="T4 16 GB", four_bits=False),
    dict(together=5, no_delay=True, serve="vllm"),
    dict(megabytes=1, skill="knowledge"),
]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_the_drawing_is_the_path(need, dark):
    advice = advise(Need(**need), [])
    figure = panels.flow_figure(advice, dark)
    assert not overlaps(figure) and not pale(figure)
    assert figure.layout.title.text == outcome(advice)
    ends = [point for point in figure.data[0].hovertext if "meets every" not in point]
    told = {kind: why for step in advice.path for kind, why in step.out.items()}
    assert sorted(ends) == sorted(f"{kind}: {why}" for kind, why in told.items())
    for kind in RECIPES:
        assert f"{kind}: {told.get(kind, 'comes through')}" in figures.alt_text(figure)
    questions = {note.text for note in figure.layout.annotations}
    assert {asked for asked, _ in FLOW.values()} <= questions


def test_the_answer_says_all():
    advice = advise(Need(gpu="T4 16 GB"), [])
    html = panels.advice_html(advice)
    assert (
        "Take QLoRA" in html
        and "BitsAndBytesConfig" in html
        and "Recorded comparisons: none" in html
    )
    for default in advice.recipe.defaults:
        assert default.setting in html
    nothing = panels.advice_html(advise(Need(gpu="T4 16 GB", four_bits=False), []))
    assert "Nothing fits" in nothing and "<li>May the base be in four bits? Then" in nothing
    row = dict(task="e2e", base="smollm2-135m", label="LoRA", better_than=["DoRA"], worse_than=[])
    html = panels.advice_html(advise(Need(), [row | dict(n=5, interval=[0.25, 0.5])]))
    assert "n = 5, 0.25 to 0.5" in html and "yours has 59.7 times as many" in html


def test_what_is_recorded_can_be_shown_for_every_model():
    """Also where the contest was held on a base that is none of these models."""
    rows, advice = comparisons(), advise(Need(), [])
    assert not {row["base"] for row in rows} <= set(MODELS)
    for model in MODELS:
        html = panels.advice_html(replace(advice, need=Need(model=model), rows=tuple(rows)))
        assert all(f"{row['label']} on {row['task']}, {row['base']}" in html for row in rows)


def test_every_control_is_a_constraint():
    asked = set(OPTIONS) | set(TICKS)
    assert set(Need.__dataclass_fields__) - asked == {"batch", "length"}
    for name, (_, options) in OPTIONS.items():
        values = MEGABYTES.values() if name == "megabytes" else options
        assert getattr(Need(), name) in values


def test_every_menu_shows_what_is_chosen():
    """None stands for "any" size; a menu without a choice would be empty."""
    menus = [c for c in panels.which_method().choices.values() if hasattr(c, "label")]
    assert len(menus) == len(OPTIONS) and all(menu.label for menu in menus)
    assert panels.which_method(megabytes=None).choices["megabytes"].label == "any"
    assert panels.which_method(megabytes=1).choices["megabytes"].label == "1 MB"


def test_moving_the_controls():
    panel = panels.which_method()
    assert "Take LoRA" in panel.describe()
    times = []
    for name, value, word in (
        ("gpu", "T4 16 GB", "Take QLoRA"),
        ("no_delay", True, "Take QLoRA"),
        ("together", 5, "Nothing fits"),
        ("no_delay", False, "Take QLoRA"),
        ("four_bits", False, "Nothing fits"),
    ):
        start = time.process_time()
        panel.choices[name].value = value
        times.append(time.process_time() - start)
        assert word in panel.describe() and word in panel.answer.value
        assert panel.plot.layout.title.text == outcome(panel.advice)
    assert min(times) < 0.3, times
    assert json.dumps(panel._repr_mimebundle_()[panels.STILL])
    panel.close()
