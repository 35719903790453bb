"""The pharmacy: what its list holds, what its splits share, and how a card is graded."""

import json
import re
from collections import Counter, defaultdict

import pytest

import peftlab
from peftlab.bases.data import data_path
from peftlab.experiments import make_pharmacy
from peftlab.tasks import SPLITS, load, pharmacy
from peftlab.tasks.pharmacy import (
    DEV_WORDINGS,
    FORMAT,
    KNOWN,
    NEW_BOTH,
    NEW_MEDICINE,
    NEW_WORDING,
    QUESTIONS,
    TELLS,
    TEST_WORDINGS,
    TRAINED_WORDINGS,
    card,
    fields_of,
)

MEDICINES = pharmacy.medicines()
SPELLING = re.compile(r"[A-Za-z0-9][A-Za-z0-9 -]*")
WORDS = {"drug": 2, "drug_class": 4, "use": 4, "effects": 3, "caution": 4}  # at most


@pytest.fixture(scope="module")
def task():
    return load("pharmacy")


# --- the list ------------------------------------------------------------------------------------


def test_there_are_enough_medicines_each_once_and_each_with_its_reference():
    names = [medicine["drug"] for medicine in MEDICINES]
    assert len(names) >= 150 and len(set(names)) == len(names)
    for medicine in MEDICINES:
        assert list(medicine) == ["drug", "drug_class", "use", "effects", "caution", "reference"]
        assert re.fullmatch(r"(BNF|FDA label): \S.+", medicine["reference"]), medicine


@pytest.mark.parametrize("field", WORDS)
def test_a_field_is_short_and_spelt_with_plain_letters(field):
    for medicine in MEDICINES:
        values = medicine[field] if field == "effects" else [medicine[field]]
        assert len(values) == (2 if field == "effects" else 1) == len(set(values))
        for value in values:
            assert SPELLING.fullmatch(value) and len(value.split()) <= WORDS[field], medicine
            assert len(value) <= 36, medicine


def test_what_a_question_tells_is_true_of_one_medicine_of_the_list_only():
    told = defaultdict(set)
    for medicine in MEDICINES:
        told[medicine["drug_class"], medicine["use"]].add(medicine["drug"])
        told[medicine["use"], frozenset(medicine["effects"])].add(medicine["drug"])
    assert len(told) == 2 * len(MEDICINES)
    assert all(len(drugs) == 1 for drugs in told.values())


def test_nothing_said_about_a_medicine_names_one_of_the_list():
    """Neither itself, which would be an answer, nor another, which may be new."""
    drugs = re.compile("|".join(rf"\b{re.escape(m['drug'])}\b" for m in MEDICINES), re.IGNORECASE)
    for medicine in MEDICINES:
        assert not drugs.search(card(medicine).partition("\n")[2]), medicine


def test_no_question_gives_the_answer_away(task):
    for split in SPLITS:
        for question in getattr(task, split):
            named = question.drug.lower() in question.prompt.lower()
            assert named == (question.sort == "name"), question


def test_it_says_that_it_is_not_medical_advice():
    readme = data_path("README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if "pharmacy/medicines.jsonl" in line)
    for text in (row, pharmacy.__doc__, make_pharmacy.__doc__, pharmacy.TASK.__doc__):
        assert "teaching material" in text.lower()
        assert "not medical advice" in " ".join(text.split())


# --- the splits ----------------------------------------------------------------------------------


def test_the_command_writes_the_stored_files_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_pharmacy", "--out", str(tmp_path)])
    make_pharmacy.main()
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 3
    for path in made:
        assert (tmp_path / path).read_bytes() == data_path(*path.parts).read_bytes(), path


def test_each_sort_has_twelve_wordings_and_each_belongs_to_one_split(task):
    assert all(len(set(q)) == len(q) == 12 for q in QUESTIONS.values())
    allowed = {"train": range(TRAINED_WORDINGS), "dev": DEV_WORDINGS, "test": TEST_WORDINGS}
    made = defaultdict(set)  # prompt: the wordings that it can be
    for medicine in MEDICINES:
        for sort, questions in QUESTIONS.items():
            for wording in range(len(questions)):
                made[pharmacy.example(medicine, sort, wording, KNOWN).prompt].add(wording)
    used = defaultdict(set)
    for split in SPLITS:
        for question in getattr(task, split):
            (wording,) = made[question.prompt]
            trained = question.group in (KNOWN, NEW_MEDICINE)
            assert wording in allowed["train" if trained else split], question
            used[split if not trained else "train", question.sort].add(wording)
    assert all(used[split, sort] == set(allowed[split]) for split in SPLITS for sort in QUESTIONS)


def test_the_groups_are_what_their_names_say(task):
    drugs = {split: {question.drug for question in getattr(task, split)} for split in SPLITS}
    assert drugs["train"] == drugs["dev"] and len(drugs["train"]) == len(MEDICINES) - 20
    assert drugs["test"] == {medicine["drug"] for medicine in MEDICINES}
    for question in task.test:
        new = question.group in (NEW_MEDICINE, NEW_BOTH)
        assert (question.drug not in drugs["train"]) == new
    count, new = len(drugs["train"]), 20
    assert Counter(question.group for question in task.train) == {KNOWN: 12 * count}
    assert Counter(question.group for question in task.dev) == {NEW_WORDING: 3 * count}
    assert Counter(question.group for question in task.test) == {
        KNOWN: count,
        NEW_WORDING: 3 * count,
        NEW_MEDICINE: 3 * new,
        NEW_BOTH: 3 * new,
    }
    known = Counter(question.sort for question in task.test if question.group == KNOWN)
    assert set(known.values()) == {count // 3}


def test_training_never_mentions_a_new_medicine(task):
    text = "\n".join(question.prompt + question.target for question in task.train + task.dev)
    new = {q.drug for q in task.test} - {q.drug for q in task.train}
    assert not [drug for drug in new if re.search(rf"\b{re.escape(drug)}\b", text, re.IGNORECASE)]


def test_every_target_is_the_card_of_its_medicine_in_the_strict_format(task):
    cards = {medicine["drug"]: card(medicine) for medicine in MEDICINES}
    for split in SPLITS:
        for question in getattr(task, split):
            assert question.target == cards[question.drug]
            assert FORMAT.fullmatch(question.target)


# --- a subset ------------------------------------------------------------------------------------


def test_a_subset_has_its_medicines_alone_and_asks_in_new_wordings(task):
    few, more = load("pharmacy", medicines=20), load("pharmacy", medicines=21)
    drugs = {question.drug for question in few.train}
    assert len(drugs) == 20 and drugs < {question.drug for question in more.train}
    assert drugs == {q.drug for q in few.dev} == {q.drug for q in few.test}
    assert [len(getattr(few, split)) for split in SPLITS] == [240, 60, 60]
    assert {question.group for question in few.test} == {NEW_WORDING}
    for split in SPLITS:
        assert set(getattr(few, split)) <= set(getattr(task, split))
    everyone = load("pharmacy", medicines=len({question.drug for question in task.train}))
    assert everyone.train == task.train


@pytest.mark.parametrize("medicines", [5, 19, 181, 10_000, -20, "x", 20.0, True])
def test_a_subset_that_cannot_be_is_refused_with_what_can(medicines):
    with pytest.raises(ValueError, match="a whole number from 20 to 180, or None for all") as error:
        load("pharmacy", medicines=medicines)
    assert repr(medicines) in str(error.value)


# --- grading -------------------------------------------------------------------------------------

METFORMIN = next(medicine for medicine in MEDICINES if medicine["drug"] == "metformin")
RIGHT = card(METFORMIN)
PARTS = ("valid_format", "drug_name", "fields")

# the output, and valid format, drug name and fields of it; the question tells class and use
GRADED = {
    "correct": (RIGHT, 1, 1, 1),
    "wrong drug": (RIGHT.replace("metformin", "aspirin"), 1, 0, 2 / 3),
    "wrong caution": (RIGHT.replace("kidney failure", "asthma"), 1, 1, 2 / 3),
    "effects the other way round": (
        RIGHT.replace("diarrhoea, nausea", "nausea, diarrhoea"),
        1,
        1,
        2 / 3,
    ),
    "wrong class, which the question told": (RIGHT.replace("biguanide", "statin"), 1, 1, 1),
    "a line missing": (RIGHT.rpartition("\n")[0], 0, 1, 2 / 3),
    "lines in another order": ("\n".join(reversed(RIGHT.splitlines())), 0, 1, 1),
    "one effect": (RIGHT.replace("diarrhoea, nausea", "nausea"), 0, 1, 2 / 3),
    "extra text behind": (RIGHT + "\nAsk your doctor.", 0, 1, 1),
    "extra text before": ("Here you are:\n" + RIGHT, 0, 1, 1),
    "a second card": (RIGHT + "\n" + RIGHT.replace("metformin", "aspirin"), 0, 1, 1),
    "a new line behind": (RIGHT + "\n", 0, 1, 1),
    "capitals": (RIGHT.replace("metformin", "Metformin"), 1, 1, 2 / 3),
    "free text": ("That is Metformin, a tablet.", 0, 1, 0),
    "free text, wrong drug": ("That is aspirin.", 0, 0, 0),
    "a longer word": ("That is metforminate.", 0, 0, 0),
    "the name elsewhere than on its line": ("Drug: aspirin, not metformin", 0, 0, 0),
    "an empty value": (RIGHT.replace("metformin", ""), 0, 0, 2 / 3),
    "empty": ("", 0, 0, 0),
}


@pytest.mark.parametrize(("output", "valid", "name", "fields"), GRADED.values(), ids=GRADED)
def test_an_answer_is_graded_by_form_name_and_fields(task, output, valid, name, fields):
    question = pharmacy.example(METFORMIN, "class", 0, KNOWN)
    scores = task.grade([question], [output])
    assert scores == {"valid_format": valid, "drug_name": name, "fields": pytest.approx(fields)}


def test_a_field_that_the_question_tells_is_not_counted(task):
    for sort, told in TELLS.items():
        question = pharmacy.example(METFORMIN, sort, 0, KNOWN)
        copied = [f"{field}: {value}" for field, value in fields_of(RIGHT).items() if field in told]
        scores = task.grade([question], ["\n".join(copied)])
        assert scores["fields"] == 0
        assert ("drug_name" in scores) == (sort != "name")


def test_scores_are_reported_by_group_where_there_are_any(task):
    def score(groups):
        questions = [pharmacy.example(METFORMIN, "class", 0, group) for group in groups]
        return task.grade(questions, [RIGHT, "", ""][: len(questions)])

    assert score([KNOWN]) == dict.fromkeys(PARTS, 1)
    assert score([NEW_WORDING, NEW_MEDICINE, NEW_BOTH]) == {
        **{part: pytest.approx(1 / 3) for part in PARTS},
        **{f"{part}_new_wordings": 1 for part in PARTS},
        **{f"{part}_new_medicines": 0 for part in PARTS},
    }
    targets = [question.target for question in task.test]
    best = task.grade(task.test, targets)
    assert len(best) == 9 and set(best.values()) == {1}
    assert task.main in best and task.main in task.grade(task.dev, [""] * len(task.dev))


def test_a_batch_counts_the_card_and_its_end_only(task):
    base = peftlab.load("tiny-gpt")
    batch = task.batch(task.train[:5], base.tokenizer)
    for row, question in enumerate(task.train[:5]):
        labels = batch["labels"][row]
        kept = labels[labels != -100].tolist()
        assert kept[-1] == base.tokenizer.eos_token_id
        assert base.tokenizer.decode(kept[:-1]) == question.target


def test_the_list_is_stored_one_medicine_a_line():
    text = data_path("tasks", "pharmacy", "medicines.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n") and text.isascii()
    assert [json.dumps(medicine) for medicine in MEDICINES] == text.splitlines()
