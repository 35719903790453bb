"""Lesson 11: its drawings, what it says of recorded runs, and the TRL code that it shows."""

import ast
import dataclasses
import json
import re

import nbformat
import pandas as pd
import pytest
import transformers
from safetensors.torch import load_file

import peftlab as pl
from peftlab.experiments import compare_real, sst2_settings, time_pharmacy
from peftlab.figures import (
    alt_text,
    fused_adapter,
    names_and_form,
    paid_tokens,
    sure_of_names,
    told_and_asked,
    ways_out,
)
from peftlab.figures.sheet import overlaps, pale
from peftlab.tasks.pharmacy import TELLS, fields_of

TOKENS = ["Which", " is", " it", "?", "\n", "Drug", ":", " a", "\n", "Use", ":", " b", "<end>"]
PAID = [False] * 5 + [True] * 8
FOLDERS = (
    {"adapter_model.safetensors": 9_800_000, "adapter_config.json": 443},
    {"model.safetensors": 538_000_000, "config.json": 817, "tokenizer.json": 3_500_000},
)
OF_SFT = {"completion_only_loss", "max_length", "packing", "assistant_only_loss"}


def cards():
    """The card of a medicine of the task, and a question of each sort about it."""
    train = pl.tasks.load("pharmacy", medicines=20).train
    its = {q.sort: (q.prompt.strip(), TELLS[q.sort]) for q in train if q.drug == train[0].drug}
    return fields_of(train[0].target), its


@pytest.fixture(scope="module")
def separate():
    with pl.attach(pl.load("tiny-gpt"), pl.LoRA(r=4, target_modules=["q", "v"])) as tuned:
        yield tuned


@pytest.fixture(scope="module")
def shown(root):
    """The lesson's text cells, joined."""
    cells = nbformat.read(root / "notebooks" / "11_real_model.ipynb", as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("dark", [False, True])
def test_every_word_of_the_drawings_has_room_and_stands_out(dark, separate):
    drawn = (
        told_and_asked(*cards(), dark),
        paid_tokens(TOKENS, PAID, dark),
        paid_tokens([*TOKENS[:3] * 12, *TOKENS[3:]], [False] * 38 + [True] * 8, dark),
        fused_adapter(separate, dark=dark),
        ways_out(*FOLDERS, dark),
    )
    for figure in drawn:
        assert not overlaps(figure)
        assert not pale(figure)


def test_what_a_question_tells_is_grey():
    card, questions = cards()
    figure = told_and_asked(card, questions)
    boxes = [shape.fillcolor for shape in figure.layout.shapes[:-2]]
    grey, blue = (figure.layout.shapes[at].fillcolor for at in (-2, -1))
    told = [field in tells for _, tells in questions.values() for field in card]
    assert boxes == [grey if yes else blue for yes in told]
    assert "name: tells Drug, asks Class, Use, Effects, Caution" in alt_text(figure)


def test_the_tokens_with_a_loss_are_counted_and_escaped():
    figure = paid_tokens(TOKENS, PAID)
    assert figure.layout.title.text.startswith("8 of 13 tokens")
    words = [note.text for note in figure.layout.annotations]
    assert "&lt;end&gt;" in words and any("predict 'Drug'" in text for text in words)


def test_the_fused_adapter_has_the_sizes_that_are_saved(separate, tmp_path):
    figure = fused_adapter(separate)
    separate.save(tmp_path)
    numbers = sum(
        tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values()
    )
    layers = separate.anatomy.shape.layers
    ours = separate.count().parameters // layers
    assert f"{ours:,} numbers become one of {numbers // layers:,}" in figure.layout.title.text
    assert "one B of 576 by 8" in alt_text(figure) and "one A of 8 by 192" in alt_text(figure)
    with pytest.raises(KeyError):
        fused_adapter(separate, "layers.9")


def test_folders_are_compared_by_their_bytes():
    figure = ways_out(*FOLDERS)
    assert "one is 55 times as large" in figure.layout.title.text
    assert "9.8 MB in all" in alt_text(figure) and "541.5 MB in all" in alt_text(figure)


def test_every_answer_is_a_point_by_what_it_is():
    table = pd.DataFrame({"sure": [0.9, 0.4, 0.7], "right": [True, False, True]})
    figure = sure_of_names({"trained": table, "never trained": table.assign(right=False)}, "t")
    right, wrong = figure.data
    assert list(right.x) == [0.9, 0.7] and list(wrong.x) == [0.4, 0.9, 0.4, 0.7]


def test_recorded_names_are_drawn_run_by_run():
    runs = compare_real.recorded("pharmacy").runs
    columns = {"valid_format_new_wordings": "form", "drug_name_new_medicines": "strangers"}
    figure = names_and_form(runs, columns, "t")
    assert "n = 3 a row" in figure.layout.title.text
    assert sum(len(trace.x) for trace in figure.data) == 2 * len(runs)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["form", "strangers"]


def test_what_it_says_of_the_recorded_runs():
    """Levels that all three runs of a row have; the lesson ranks nothing."""
    runs = compare_real.recorded("pharmacy").runs
    assert len(runs) == 36 and runs["valid_format_new_wordings"].min() >= 0.8
    assert round(runs["drug_name_new_medicines"].max(), 2) == 0.06
    names = runs.groupby("label")["drug_name_new_wordings"].agg(["min", "max"])
    low = names.index[names["max"] < 0.1]
    high = names.index[names["min"] > 0.9]
    assert set(low) == {"Prompt tuning", "P-tuning"}
    assert set(high) == {"Full fine-tuning", "Houlsby adapter"} | {
        n for n in names.index if "oRA" in n
    }
    assert runs.groupby("label")["at_the_end_of_its_grid"].first().sum() == 9


def test_seeds_of_one_setting_differ_by_ten_points():
    path = pl.bases.data.data_path("results", "time_pharmacy.json")
    names = [run["after"]["drug_name"] for run in json.loads(path.read_text())["runs"]]
    assert round(max(names) - min(names), 3) == 0.1


def test_which_dev_set_promises_too_much():
    means = sst2_settings.read()[1].groupby(["change", "label", "lr"])[["dev", "test"]].mean()
    above = (means["dev"] - means["test"])[means["test"] > 0.8]
    assert above["as compared"].between(0.04, 0.091).all()
    assert above["dev of whole sentences"].abs().max() < 0.01


def called(code: ast.AST, name: str) -> ast.Call:
    """The call of this name in the code."""
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
    return next(call for call in calls if getattr(call.func, "id", "") == name)


def test_the_shown_code_of_trl_has_the_settings_of_the_run(shown):
    """What is shown and not run: its names are transformers' or TRL's, its values the lesson's."""
    [block] = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    code = ast.parse(block)
    given = {each.arg: ast.literal_eval(each.value) for each in called(code, "SFTConfig").keywords}
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert set(given) <= known | OF_SFT
    assert given["max_steps"] == time_pharmacy.STEPS
    assert given["learning_rate"] == time_pharmacy.RATE
    assert given["per_device_train_batch_size"] == time_pharmacy.BATCH_SIZE
    trainer = {each.arg for each in called(code, "SFTTrainer").keywords}
    assert trainer == {"model", "args", "train_dataset", "peft_config"}


def test_the_shown_code_of_trl_fits_trl(shown):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    [block] = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    given = {each.arg for each in called(ast.parse(block), "SFTConfig").keywords}
    assert given <= {field.name for field in dataclasses.fields(trl.SFTConfig)}
