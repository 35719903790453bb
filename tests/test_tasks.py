"""The tasks: what is disjoint from what, what a batch holds, and how an answer is scored."""

import json

import pytest

import peftlab
from peftlab._data import data_path
from peftlab.tasks import IGNORED, NAMES, SPLITS, Example, facts, load, slots

every_task = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def base():
    return peftlab.load("tiny-gpt")


@every_task
def test_no_prompt_is_in_two_splits(name):
    task = load(name)
    prompts = [{example.prompt for example in getattr(task, split)} for split in SPLITS]
    assert all(prompts)
    for i, one in enumerate(prompts):
        for other in prompts[i + 1 :]:
            assert not one & other


@every_task
def test_every_example_fits_and_uses_well_trained_tokens(name, base):
    counts = json.loads(data_path("bases", "tiny-gpt", "token_counts.json").read_text())
    task = load(name)
    for split in SPLITS:
        for example in getattr(task, split):
            tokens = base.tokenizer.tokenize(example.prompt + example.target)
            assert len(tokens) < base.context - 100  # and leaves room for a hundred virtual tokens
            assert min(counts[token] for token in tokens) >= 100, example
            split_there = base.tokenizer.tokenize(example.prompt), example.target
            assert split_there[0] + base.tokenizer.tokenize(split_there[1]) == tokens, example


def test_the_facts_are_what_the_task_says():
    task = load("facts")
    world = json.loads(data_path("world", "world.json").read_text())
    new = {person["name"] for person in world["held_out"]}
    known = {person["name"] for person in world["people"]}
    assert not new & known

    def people(split, group, names):
        texts = [e.prompt for e in getattr(task, split) if e.group == group]
        found = {name for name in names for text in texts if name in text}
        return texts, found

    trained, taught = people("train", "new facts", new)
    assert len(taught) == 50 and len(trained) == 3 * 200
    for split in ("dev", "test"):
        for group in ("new facts", "new wordings"):
            texts, asked = people(split, group, new)
            assert asked == taught and len(texts) == 200
    apart = [people(split, "known facts", known)[1] for split in SPLITS]
    assert [len(names) for names in apart] == [100, 110, 110]
    assert not apart[0] & apart[1] and not apart[0] & apart[2] and not apart[1] & apart[2]


def test_new_wordings_are_in_no_training_example():
    task = load("facts")
    unused = [
        q for wordings in facts.QUESTIONS.values() for q in wordings[facts.TRAINED_WORDINGS :]
    ]
    shapes = [question.split("{n}") for question in unused]

    def has(prompt, shape):
        question = prompt.removesuffix("\n>>")
        return question.startswith(shape[0]) and question.endswith(shape[1])

    for example in task.train:
        assert not any(has(example.prompt, shape) for shape in shapes), example
    for example in task.test:
        if example.group == "new wordings":
            assert any(has(example.prompt, shape) for shape in shapes), example


def test_facts_are_graded_by_exact_match_and_by_form():
    task = load("facts")
    asked = [
        Example("a", " [home] Harwick", "new facts"),
        Example("b", " [job] cook", "new facts"),
        Example("c", " [pet] hen", "known facts"),
    ]
    scores = task.grade(asked, [" [home] Harwick", " [job] mason", " a hen"])
    assert scores == {"new_facts": 0.5, "known_facts": 0.0, "valid_format": pytest.approx(2 / 3)}


def test_slots_report_style_and_mapping_apart():
    task = load("slots")
    example = task.test[0]
    assert task.grade([example], [example.target]) == {"style": 1, "mapping": 1, "exact": 1}
    plain = example.target
    for old, new in slots.NEW_WORDS.items():
        plain = plain.replace(f" {new}", f" {old}")
    assert plain != example.target
    assert task.grade([example], [plain]) == {"style": 1, "mapping": 0, "exact": 0}


def test_sentiment_is_balanced_and_its_labels_are_single_tokens(base):
    task = load("sentiment")
    for split in SPLITS:
        labels = [example.target for example in getattr(task, split)]
        assert labels.count(" great") == labels.count(" awful")
    assert all(len(base.tokenizer.tokenize(label)) == 1 for label in (" great", " awful"))


@every_task
def test_a_batch_counts_the_target_and_its_end_only(name, base):
    task = load(name)
    examples = task.train[:5]
    batch = task.batch(examples, base.tokenizer)
    for row, example in enumerate(examples):
        labels = batch["labels"][row]
        kept = labels[labels != IGNORED].tolist()
        assert kept[-1] == base.tokenizer.eos_token_id
        assert base.tokenizer.decode(kept[:-1]) == example.target
        assert batch["input_ids"][row][labels != IGNORED].tolist() == kept
        real = batch["attention_mask"][row].sum().item()
        text = base.tokenizer.decode(batch["input_ids"][row][: real - 1])
        assert text == example.prompt + example.target
    with pytest.raises(ValueError, match="only 3 fit"):
        task.batch(examples, base.tokenizer, context=3)


@every_task
def test_the_untuned_base_is_near_chance_or_at_zero(name, base):
    scores = load(name).score(base)
    if name == "sentiment":
        # 240 balanced reviews: chance is 0.5 with a standard error of 0.032; four of them allowed
        assert abs(scores["accuracy"] - 0.5) < 0.13
    else:
        assert max(scores.values()) < 0.1


def test_an_unknown_task_is_refused_by_name():
    with pytest.raises(ValueError, match="sentiment, facts, slots"):
        load("chess")
