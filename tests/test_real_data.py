"""Public data sets: from a folder or the hub the same task, and one clear error from neither.

The files are written here, in the formats of the data sets; nothing is copied out of them.
"""

import importlib.machinery
import math
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from models import tiny, tokenizer

import peftlab
from peftlab.methods.heads import Classification, Tagging
from peftlab.tasks import PUBLIC, e2e, public, sst2, wnut17

TRAIN = [(f"film {i} is {word} .", i % 2) for i, word in enumerate(["dull", "fine"] * 20)]
DEV = [("a long row of jokes .", 0), ("warm and clever .", 1), ("so bad it is sad .", 0)]
WNUT = {
    "train": [(["@ada", "lives", "in", "New", "Harwick"], "O O O B-location I-location")],
    "dev": [(["so", "long", ":-)"], "O O O"), (["\ufe0f", "it's"], "O O")],
    "test": [(["Ada", "Abbott", "sings", "The", "Owl"], "B-person I-person O B-group,B-person O")],
}
MEANINGS = [f"name : The Owl {i} | Type : pub | family friendly : no" for i in range(16)]


def write_folder(folder: Path) -> None:
    """The three data sets, as their files are."""
    for name in PUBLIC:
        (folder / name).mkdir(parents=True)
    rows = [("label", "sentence"), *((label, text) for text, label in TRAIN)]
    text = "".join(f"{label}\t{sentence}\r\n" for label, sentence in rows)
    (folder / "sst2/train.tsv").write_text(text, newline="")
    rows = [("label", "content"), *((label, text) for text, label in DEV)]
    (folder / "sst2/dev.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    for split, sentences in WNUT.items():
        text = "\n \n".join(
            "\n".join(f"{w}\t{t}" for w, t in zip(words, tags.split(), strict=True))
            for words, tags in sentences
        )
        (folder / f"wnut17/{split}.conll").write_text(text + "\n\n", encoding="utf-8")
    for split, meanings in {"train": MEANINGS[:12], "valid": MEANINGS[12:]}.items():
        texts = [f"{m}||It is 'The Owl {i}' , a pub .\n" for i, m in enumerate(meanings)]
        (folder / f"e2e/{split}.txt").write_text("".join(texts))
    (folder / "e2e/test.txt").write_text(
        "name : The Red Oak | price : £ 20 - 25||The Red Oak costs £ 20 - 25 .\n"
        "name : The Red Oak | price : £ 20 - 25||Is n't The Red Oak child - friendly ?\n",
        encoding="utf-8",
    )


def hub_rows(name: str) -> dict[str, list[dict]]:
    """The same as the hub gives them."""
    if name == "stanfordnlp/sst2":
        splits = {"train": TRAIN, "validation": DEV, "test": [("no label .", -1)]}
        return {
            split: [{"idx": 0, "sentence": f"{text} ", "label": label} for text, label in rows]
            for split, rows in splits.items()
        }
    if name == "leondz/wnut_17":
        return {
            {"dev": "validation"}.get(split, split): [
                {"tokens": words, "ner_tags": [wnut17.LABELS.index(t.split(",")[0]) for t in tags]}
                for words, tags in ((words, tags.split()) for words, tags in rows)
            ]
            for split, rows in WNUT.items()
        }
    parts = {"train": range(12), "validation": range(12, 16)}
    found = {
        split: [
            {
                "meaning_representation": f"name[The Owl {i}], eatType[pub], familyFriendly[no]",
                "target": f"It is 'The Owl {i - numbers[0]}', a pub.",
                "references": [],
            }
            for i in numbers
        ]
        for split, numbers in parts.items()
    }
    references = ["The Red Oak costs £20-25.", "Isn't The Red Oak child-friendly?"]
    meaning = "name[The Red Oak], priceRange[£20-25]"
    row = {"meaning_representation": meaning, "target": references[0], "references": references}
    return found | {"test": [row]}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.setenv("PEFTLAB_DATASETS", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(monkeypatch) -> list:
    """A stand-in for the library `datasets`; what it was asked for."""
    asked, module = [], types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)

    def load_dataset(name, revision=None):
        asked.append((name, revision, module.config.HF_HUB_OFFLINE))
        return hub_rows(name)

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    return asked


# One task from two places ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_the_folder_and_the_hub_give_the_same_task(name, folder, hub, monkeypatch, capsys):
    ours = peftlab.tasks.load(name)
    assert asked_nobody(hub, capsys)
    monkeypatch.delenv("PEFTLAB_DATASETS")
    theirs = peftlab.tasks.load(name)
    assert type(ours) is type(theirs) and ours.name == name
    assert (ours.train, ours.dev, ours.test) == (theirs.train, theirs.dev, theirs.test)
    repository = sys.modules[f"peftlab.tasks.{name}"].SOURCE.hub
    assert [entry[0] for entry in hub] == [repository]
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: downloading {repository} from {huggingface_hub.constants.ENDPOINT}",
        f"{name}: {repository}, in this machine's cache of data sets",
    ]


def asked_nobody(hub, capsys) -> bool:
    return hub == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", PUBLIC)
def test_no_example_is_in_two_splits(name, folder):
    task = peftlab.tasks.load(name)
    splits = [{(e.prompt, e.target) for e in split} for split in (task.train, task.dev, task.test)]
    assert all(splits)
    assert sum(map(len, splits)) == len(set.union(*splits))


def test_a_copy_in_the_cache_needs_no_network(hub, monkeypatch, capsys):
    def fail(self, name, timeout):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.delenv("PEFTLAB_DATASETS", raising=False)
    assert peftlab.tasks.load("sst2").test
    assert hub == [("stanfordnlp/sst2", None, True)]  # it was told to ask nobody
    assert not sys.modules["datasets"].config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert "downloading" not in capsys.readouterr().out


def test_without_a_network_and_a_copy_there_is_one_error(hub, monkeypatch, tmp_path):
    def fail(self, name, timeout):
        raise ConnectionError("no route\nto the host")

    def nothing(name, revision=None):
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", nothing)
    monkeypatch.setenv("PEFTLAB_DATASETS", str(tmp_path))
    told = (
        rf"^no data set 'wnut17': PEFTLAB_DATASETS \({tmp_path}\) has no folder wnut17, and "
        r"leondz/wnut_17 cannot be had from the hub: ConnectionError: no route\. Put train.conll, "
        r"dev.conll, test.conll into a folder wnut17 and name the folder above it in "
        r"PEFTLAB_DATASETS; or, with a network, pip install datasets$"
    )
    with pytest.raises(FileNotFoundError, match=told):
        peftlab.tasks.load("wnut17")


@pytest.mark.parametrize("name", PUBLIC)
def test_neither_a_folder_nor_the_library(name, monkeypatch):
    monkeypatch.delenv("PEFTLAB_DATASETS", raising=False)
    monkeypatch.setattr(public.importlib.util, "find_spec", lambda name: None)
    told = f"no data set '{name}': PEFTLAB_DATASETS is not set, .* datasets is not installed"
    with pytest.raises(FileNotFoundError, match=told):
        peftlab.tasks.load(name)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        (
            "sst2/train.tsv",
            "label\tsentence\n1 fine\n",
            r"train.tsv: line 2 has no '\\t': '1 fine'",
        ),
        ("sst2/dev.tsv", "label\tsentence\n2\tx\n", "dev.tsv: line 2 has the label '2': allowed"),
        ("sst2/train.tsv", "label\tsentence\n", "train.tsv: no rows"),
        ("wnut17/dev.conll", "Ada O\n", r"dev.conll: line 1 has no '\\t': 'Ada O'"),
        (
            "wnut17/test.conll",
            "Ada\tO\n\nAda\tB-cat\n",
            "test.conll: line 3: unknown tag 'B-cat': known are O, B-corporation",
        ),
        ("wnut17/test.conll", "Ada\tO\tx\n", "test.conll: line 1: unknown tag"),
        ("sst2/train.tsv", "label\tsentence\n1\tonly one\n", "1 examples are too few"),
        ("e2e/test.txt", "name : x|fine\n", r"test.txt: line 1 has no '\|\|'"),
        ("e2e/test.txt", "name x||fine\n", "test.txt: line 1 has a slot without ' : ': 'name x'"),
    ],
)
def test_a_file_of_another_format_is_refused_with_its_line(file, text, told, folder):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=told):
        peftlab.tasks.load(file.split("/")[0])


def test_a_folder_that_lacks_a_file(folder):
    (folder / "sst2/dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="has no dev.tsv, which is the validation split"):
        peftlab.tasks.load("sst2")


@pytest.mark.parametrize("name", PUBLIC)
def test_some_examples_are_drawn_by_the_seed(name, folder):
    every, one = peftlab.tasks.load(name), peftlab.tasks.load(name, train=1, dev=1, test=1)
    assert [len(split) for split in (one.train, one.dev, one.test)] == [1, 1, 1]
    assert one.train == peftlab.tasks.load(name, train=1).train
    assert one.train[0] in every.train and one.dev[0] in every.dev and one.test[0] in every.test
    for number in (0, len(every.train) + 1):
        with pytest.raises(ValueError, match=f"train={number}: allowed is 1 to"):
            peftlab.tasks.load(name, train=number)


def test_another_seed_draws_others_and_keeps_the_order(folder):
    every = peftlab.tasks.load("sst2").train
    drawn = [peftlab.tasks.load("sst2", train=12, seed=seed) for seed in (0, 1)]
    assert drawn[0].train != drawn[1].train
    assert drawn[0].dev == drawn[1].dev and drawn[0].test == drawn[1].test
    for task in drawn:
        assert [e for e in every if e in task.train] == task.train


# SST-2 -----------------------------------------------------------------------------------------


def test_sst2_reads_the_public_dev_as_its_test(folder):
    task = peftlab.tasks.load("sst2")
    assert [(e.prompt, e.target) for e in task.test] == [
        ("a long row of jokes . It was", " terrible"),
        ("warm and clever . It was", " great"),
        ("so bad it is sad . It was", " terrible"),
    ]
    assert len(task.train) == 36 and len(task.dev) == 4  # a tenth


def test_sst2_drops_from_training_what_is_there_twice_or_in_the_test(folder):
    with (folder / "sst2/train.tsv").open("a") as file:
        file.write(f"1\t{TRAIN[0][0]}\n1\t{DEV[0][0]} \n")
    task = peftlab.tasks.load("sst2")
    both = task.train + task.dev
    assert len(both) == 40 and len({e.prompt for e in both}) == 40
    assert {e.prompt: e.target for e in both}[f"{TRAIN[0][0]} It was"] == " terrible"  # the first


def test_sst2_in_words_picks_the_more_probable_word():
    """With one token a byte the words differ in none: ' '. So the first bytes are given here."""
    task = sst2.Sst2([], [], [sst2.example({"sentence": "x", "positive": i == 0}) for i in (0, 1)])
    task.words = {True: "g", False: "t"}
    task.test = [peftlab.tasks.Example(e.prompt, e.target.strip()[0]) for e in task.test]
    base = tiny("gpt2")
    [ids] = base.tokenizer([task.test[0].prompt])["input_ids"]
    logits = base(torch.tensor([ids]))[0, -1]
    g, t = (logits[base.tokenizer(letter)["input_ids"][0]] for letter in "gt")
    assert g != t
    assert task.score(base, task.test[:1]) == {"accuracy": float(g > t)}
    assert task.score(base, task.test[1:]) == {"accuracy": float(t > g)}


def test_sst2_in_classes_is_learned_under_a_head(folder):
    task = peftlab.tasks.load("sst2", answer="class", train=8)
    assert isinstance(task.head, Classification) and task.head.labels == ("negative", "positive")
    assert {e.target for e in task.train} == {"negative", "positive"}
    base = tiny("bert")
    with peftlab.attach(base, peftlab.LoRA(), head=task.head) as tuned:
        batch = task.batch_for(tuned, task.train)
        assert batch["labels"].tolist() == [int(e.target == "positive") for e in task.train]
        peftlab.train(tuned, task, steps=60, batch_size=8, progress=False, evaluate=False)
        assert task.score(tuned, task.train) == {"accuracy": 1.0}
    with pytest.raises(ValueError, match="the classes of SST-2 goes on encoders"):
        task.batch_for(tiny("gpt2"), task.train)


def test_sst2_has_two_kinds_of_answers(folder):
    with pytest.raises(ValueError, match="answer='text': allowed is word, class"):
        peftlab.tasks.load("sst2", answer="text")


# WNUT-17 ---------------------------------------------------------------------------------------


def test_wnut17_reads_words_as_they_are(folder):
    task = peftlab.tasks.load("wnut17")
    assert isinstance(task.head, Tagging) and len(task.head.labels) == 13
    assert [e.prompt for e in task.train + task.dev + task.test] == [
        "@ada lives in New Harwick",
        "so long :-)",
        "* it's",  # nothing was to be seen of the first word
        "Ada Abbott sings The Owl",
    ]
    assert task.test[0].target == "B-person I-person O B-group O"  # the first of two tags
    batch = task.batch(task.train, tokenizer("bert"))
    marked = (batch["labels"][0] != -100).nonzero().flatten()
    text = [tokenizer("bert").decode(batch["input_ids"][0, i]) for i in marked]
    assert "".join(text).replace(" ", "") == "@liNH"  # one place a word: its first byte or so


def test_wnut17_scores_whole_entities(folder):
    task = peftlab.tasks.load("wnut17")
    assert task.grade(task.test, ["B-person I-person O B-group O"])["f1"] == 1.0
    half = task.grade(task.test, ["B-person O O B-group O"])
    assert half == {"f1": 0.5, "accuracy": 0.8}
    assert task.baseline()["f1"] == 0.0  # no entity of the test is in training
    with peftlab.attach(tiny("bert"), peftlab.LoRA(), head=task.head) as tuned:
        assert task.score(tuned).keys() == {"f1", "accuracy"}


# E2E -------------------------------------------------------------------------------------------


def test_e2e_has_all_references_of_a_set_of_facts(folder):
    task = peftlab.tasks.load("e2e")
    assert len(task.train) == 12 and len(task.dev) == 4
    assert task.train[3].prompt == "name: The Owl 3 | type: pub | family friendly: no\n"
    assert task.train[3].target == "It is 'The Owl 3', a pub."
    [example] = task.test
    assert example.prompt == "name: The Red Oak | price: £20-25\n"
    assert example.target == example.references[0] == "The Red Oak costs £20-25."
    assert example.references[1:] == ("Isn't The Red Oak child-friendly?",)
    assert e2e.slots_of(example.prompt) == {"name": "The Red Oak", "price": "£20-25"}
    assert (task.batch(task.train[:2], tokenizer())["labels"] != -100).any()


def test_e2e_without_a_train_split_parts_its_dev(folder):
    (folder / "e2e/train.txt").unlink()
    valid = "".join(f"{m}||One .\n{m}||Two .\n" for m in MEANINGS)
    (folder / "e2e/valid.txt").write_text(valid)
    task = peftlab.tasks.load("e2e")
    assert len(task.train) == 28 and len(task.dev) == 2  # of 16 sets of facts an eighth
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.dev}
    assert all(e.references == ("One.", "Two.") for e in task.dev)


def test_bleu_by_hand():
    """Papineni's second example, and one worked out on paper."""
    the = [["the"] * 7], [[["the", "cat", "is", "on", "the", "mat"]]]
    assert e2e.bleu(*the, longest=1) == pytest.approx(2 / 7)
    output, one, two = "a b c d e".split(), "a b c d f".split(), "x d e y z w".split()
    # Unigrams a b c d e: 5 of 5 in one or the other; pairs ab bc cd de: 4 of 4; triples abc bcd,
    # not cde: 2 of 3; fours abcd, not bcde: 1 of 2. The nearest reference is as long.
    assert e2e.bleu([output], [[one, two]]) == pytest.approx((1 * 1 * 2 / 3 * 1 / 2) ** 0.25)
    short = "a b c d".split()  # against five words: e^(1 - 5/4)
    assert e2e.bleu([short], [[one]]) == pytest.approx(math.exp(-0.25))
    assert e2e.bleu([short], [[one, short + ["g", "h"]]]) == pytest.approx(math.exp(-0.25))
    assert e2e.bleu([["q"]], [[one]]) == 0.0 and e2e.bleu([[]], [[one]]) == 0.0
    both = e2e.bleu([output, short], [[one], [one]])  # counts are added up, not scores averaged
    assert both == pytest.approx(math.exp(1 - 10 / 9) * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25)


def test_e2e_scores(folder):
    task = peftlab.tasks.load("e2e")
    right = task.grade(task.test, ["Isn't The Red Oak child-friendly?"])
    assert right["bleu"] == right["f1"] == 1.0 and right["coverage"] == 0.5  # no price
    assert task.grade(task.test, ["the red oak costs £20-25."])["coverage"] == 1.0
    assert task.grade(task.test, [""]) == {"bleu": 0.0, "f1": 0.0, "coverage": 0.0}
    slots = {"name": "The Owl", "family friendly": "no", "price": "cheap"}
    assert e2e.coverage(slots, "the Owls are cheap, no?") == [False, True]
