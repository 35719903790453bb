"""The chat: who answers, what is refused, and that nothing stays attached."""

import json

import pytest
import torch
from models import tiny

import peftlab
from peftlab.panels import STILL
from peftlab.panels.chat import ALONE, LONGEST, Turn, chat, reply, transcript


@pytest.fixture
def base():
    return tiny("gpt2")


@pytest.fixture
def adapters(base, tmp_path) -> dict:
    """Two folders, LoRA with a change that shows, and a prefix."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for name, method in {
        "LoRA": peftlab.LoRA(r=2, target_modules="all-linear"),
        "prefix": peftlab.PrefixTuning(2),
    }.items():
        with peftlab.attach(base, method) as tuned:
            for tensor in tuned.trainable.values():
                tensor.data.normal_(std=2.0, generator=generator)
            made[name] = tuned.save(tmp_path / name)
    return made


def test_each_adapter_answers_as_it_does_alone(base, adapters):
    before = base.fingerprint()
    asked = {name: reply(base, "the  cat ", name, adapters, 6) for name in (ALONE, *adapters)}
    assert asked[ALONE].answer == base.generate(["the cat\n"], 6)[0].strip()
    for name, folder in adapters.items():
        with peftlab.attach(base, folder) as tuned:
            assert asked[name].answer == tuned.generate(["the cat\n"], 6)[0].strip()
    assert len({turn.answer for turn in asked.values()}) == 3
    assert base.fingerprint() == before and base.adapted_by is None


@pytest.mark.parametrize(
    "question, adapter, words",
    [
        ("", ALONE, "1 to 400 characters"),
        (" \n ", "LoRA", "1 to 400 characters"),
        ("a" * (LONGEST + 1), ALONE, "this one 401"),
        ("the cat", "QLoRA", "no adapter 'QLoRA': there are base alone, LoRA, prefix"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(base, adapters, question, adapter, words):
    with pytest.raises(ValueError, match=words):
        reply(base, question, adapter, adapters, 4)


def test_an_adapter_that_fails_leaves_the_base_alone(base, adapters):
    for name in adapters:
        with pytest.raises(ValueError, match="do not fit"):
            reply(base, "the cat", name, adapters, 10_000)
    assert base.adapted_by is None


def test_the_panel_asks_all_once_then_by_button(base, adapters):
    panel = chat(base, adapters, "the cat", 4)
    assert [turn.adapter for turn in panel.turns] == [ALONE, "LoRA", "prefix"]
    panel.question.value = "a mill"
    panel.buttons["prefix"].click()
    latest = panel.turns[-1]
    assert latest == reply(base, "a mill", "prefix", adapters, 4)
    assert panel.log.value.startswith("<p><b>a mill</b>")
    panel.question.value = ""
    panel.buttons[ALONE].click()
    assert "1 to 400 characters" in panel.status.value and len(panel.turns) == 4
    assert not any(button.disabled for button in panel.buttons.values())


def test_the_still_picture_has_every_turn_and_no_markup_of_the_model():
    turns = [Turn("the cat", ALONE, "<b>old</b>\nmill"), Turn("the cat", "LoRA", "Drug: x")]
    table = transcript(turns).data[0]
    assert list(table.cells.values[1]) == [ALONE, "LoRA"]
    assert table.cells.values[2][0] == "&lt;b&gt;old&lt;/b&gt;<br>mill"


def test_it_is_stored_with_its_picture(base, adapters):
    bundle = chat(base, adapters, "the cat", 4)._repr_mimebundle_()
    assert "Chat: base alone: " in bundle["text/plain"]
    assert json.loads(json.dumps(bundle[STILL]))["data"][0]["type"] == "table"
