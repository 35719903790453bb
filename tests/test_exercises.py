"""Every exercise: its solution passes, each mistake is named, and the lesson asks it."""

import ast
import importlib
import json
import pkgutil
import re

import pytest
import torch

from peftlab import exercises, tasks
from peftlab.bases import load
from peftlab.exercises import (
    Exercise,
    Question,
    Verdict,
    Wrong,
    after,
    collect,
    exercise,
    expect,
    fill,
    question,
    same,
)
from peftlab.exercises.answers import Stopped, outcome
from peftlab.exercises.clinic import Ward
from peftlab.exercises.forms import a_number, a_tensor
from peftlab.experiments.course_table import other
from peftlab.experiments.sweep_v2 import GrowingPrompts
from peftlab.methods import DeepPromptTuning, PromptAndPrefix, PTuningV2
from peftlab.methods.scores import is_two_four
from peftlab.sites.quantisation import ABSMAX_BLOCK, quantise

MODULES = [
    importlib.import_module(f"peftlab.exercises.{info.name}")
    for info in pkgutil.iter_modules(exercises.__path__)
    if info.name.startswith("lesson_")
]
LESSON = {module.__name__.rsplit("_", 1)[1]: module for module in MODULES}
ITEMS = [(number, item) for number, module in LESSON.items() for item in collect(module)]
EXERCISES = [
    pytest.param(item, id=f"{number}-{item.name}")
    for number, item in ITEMS
    if isinstance(item, Exercise)
]
QUESTIONS = [
    pytest.param(item, id=f"{number}-{item.name}")
    for number, item in ITEMS
    if isinstance(item, Question)
]
MISTAKES = [
    pytest.param(item, row, id=f"{number}-{item.name}-{n}")
    for number, item in ITEMS
    if isinstance(item, Exercise)
    for n, row in enumerate(item.mistakes, 1)
]
MISFIT = re.compile(r"The size of tensor a .* must match|shapes cannot be multiplied")


def stub(*args, **kwargs):
    raise NotImplementedError


# --- exercises ---------------------------------------------------------------------------------


@pytest.mark.parametrize("item", EXERCISES)
def test_the_solution_passes(item):
    verdict = item(item.solution)
    assert verdict.status == "passed", verdict


@pytest.mark.parametrize("item", EXERCISES)
def test_an_untouched_stub_is_not_attempted_yet(item):
    untouched = [None, ...] + ([stub] if callable(item.solution) else [])
    for answer in untouched:
        verdict = item(answer)
        assert verdict.status == "open", verdict
        assert "not attempted yet" in verdict.message


def diagnosis(item, row) -> str:
    """The words of a row of an exercise's table: those that quote numbers are computed."""
    wrong, words, *_ = row
    quotes = callable(words) or "{" in words
    return fill(words, outcome(item.trial, wrong), item.wanted()) if quotes else words


@pytest.mark.parametrize("item, row", MISTAKES)
def test_a_mistake_is_told_its_name(item, row):
    verdict, words = item(row[0]), diagnosis(item, row)
    assert verdict.status == "wrong", verdict
    assert words in verdict.message
    assert "your code stopped" not in verdict.message or "your code stopped" in words


@pytest.mark.parametrize("item, row", MISTAKES)
def test_a_wrong_answer_runs_to_its_end_unless_its_shapes_do_not_fit(item, row):
    """To a trial two answers that stop with a TypeError are the same, whatever they were to do."""
    wrong, words, *_ = row
    for size in ((), item.again)[: 1 + bool(item.again)]:
        made = outcome(item.trial, wrong, size)
        stopped = isinstance(made, Stopped)
        assert stopped == str(words).startswith("the shapes do not fit")
        if stopped:
            assert isinstance(made.error, RuntimeError) and MISFIT.search(str(made.error))
        assert "has not the form that is asked for" not in str(made)


@pytest.mark.parametrize("item", EXERCISES)
def test_at_least_three_mistakes_each_with_a_diagnosis_of_its_own(item):
    diagnoses = [item(wrong).message for wrong, *_ in item.mistakes]
    assert len(diagnoses) >= 3
    assert len(set(diagnoses)) == len(diagnoses)
    for i, row in enumerate(item.mistakes):
        words, others = diagnosis(item, row), diagnoses[:i] + diagnoses[i + 1 :]
        assert not any(words in other for other in others), words


@pytest.mark.parametrize("item", EXERCISES)
def test_code_that_fails_is_reported_and_never_raised(item):
    if callable(item.solution):
        verdict = item(lambda *args, **kwargs: 1 / 0)
    else:
        verdict = item(object())
    assert verdict.status == "wrong", verdict


@pytest.mark.parametrize("item", EXERCISES)
def test_an_unusual_mistake_is_told_that_it_is_wrong(item):
    if callable(item.solution):
        verdict = item(lambda *args: other(item.solution(*args)))
        assert verdict.status == "wrong", verdict
        assert "your code stopped" not in verdict.message, verdict


@pytest.mark.parametrize("item", EXERCISES)
def test_the_card_folds_hints_and_solution(item):
    card = item._repr_html_()
    assert item.hints, "an exercise has at least one hint"
    assert card.count("<details>") == len(item.hints) + 1
    assert 1 <= item.difficulty <= 5 and 1 <= item.importance <= 5 and item.minutes >= 1
    for what, number in (("difficulty", item.difficulty), ("importance", item.importance)):
        assert f"{what} {'●●●●●'[:number]}{'○○○○○'[number:]} &nbsp;" in card


# --- questions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("item", QUESTIONS)
def test_exactly_one_letter_is_right_and_every_wrong_one_is_explained(item):
    right, found = item.compute()
    assert right in item.choices and len(item.choices) >= 3 and found
    for letter, (_, why_wrong) in item.choices.items():
        verdict = item(letter)
        assert verdict.status == ("passed" if letter == right else "wrong"), verdict
        assert found in verdict.message
        if letter != right:
            assert len(why_wrong) > 20 and why_wrong in verdict.message
    wrong = [why for letter, (_, why) in item.choices.items() if letter != right]
    assert len(set(wrong)) == len(wrong)


@pytest.mark.parametrize("item", QUESTIONS)
def test_a_question_waits_for_a_letter(item):
    assert item().status == item(...).status == "open"
    verdict = item("no such letter")
    assert verdict.status == "wrong" and all(letter in verdict.message for letter in item.choices)
    assert item(f" {item.compute()[0].upper()} ").passed


# --- lessons -----------------------------------------------------------------------------------


def called_names(notebook: dict) -> set[str]:
    """The names of everything that the code cells of a notebook call."""
    names = set()
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.Call):
                    names.add(getattr(node.func, "attr", getattr(node.func, "id", None)))
    return names


@pytest.mark.parametrize("number", LESSON)
def test_the_lesson_asks_every_exercise_and_question_of_its_module(number, root):
    (path,) = (root / "notebooks").glob(f"{number}_*.ipynb")
    called = called_names(json.loads(path.read_text(encoding="utf-8")))
    asked = {item.name for item in collect(LESSON[number])}
    assert asked <= called, f"{path.name} never asks {', '.join(sorted(asked - called))}"


@pytest.mark.parametrize("number", LESSON)
def test_a_lesson_has_three_to_five_exercises_and_two_or_three_questions(number):
    items = collect(LESSON[number])
    most = 6 if number == "06" else 5  # 06 builds its method step by step
    assert 3 <= sum(isinstance(item, Exercise) for item in items) <= most
    assert 2 <= sum(isinstance(item, Question) for item in items) <= 3


def test_lesson_02_shows_what_tells_its_patients_apart():
    lesson, base, task = LESSON["02"], load("tiny-gpt"), tasks.load("sentiment")
    records = lesson.clinic(base, task, steps=1)
    seen = records.set_index("patient")
    by_fault = {fault: patient for patient, fault in lesson.WARD.items()}
    sound, slow = seen.loc["sound"], seen.loc[by_fault["rate"]]
    assert sound.gradient > 0 and slow.gradient == sound.gradient
    assert 0 < slow.moved < sound.moved / 100
    assert seen.gradient[by_fault["mask"]] == 0 and seen.loss[by_fault["mask"]] != sound.loss
    assert seen.gradient[by_fault["optimiser"]] > 0 == seen.moved[by_fault["optimiser"]]
    assert seen.gradient.isna().tolist() == (seen.index == by_fault["detached"]).tolist()


def test_lesson_05_shows_what_tells_its_patients_and_its_definitions_apart():
    lesson, base, task = LESSON["05"], load("tiny-bert"), tasks.load("entities")
    seen = lesson.clinic(base, task, steps=2, batch_size=2).groupby("patient").last()
    moved = seen[["prefix moved", "head moved"]] > 0
    by_fault = {fault: patient for patient, fault in lesson.WARD.items()}
    assert moved.loc["sound"].all() and moved.loc[by_fault["shift"]].all()
    assert moved.loc[by_fault["head"]].tolist() == [True, False]
    assert moved.loc[by_fault["cut"]].tolist() == [False, True]
    assert moved.loc[by_fault["optimiser"]].tolist() == [False, True]
    assert seen["prefix gradient"].isna().tolist() == (seen.index == by_fault["cut"]).tolist()
    methods = [PTuningV2(4), PromptAndPrefix(4), DeepPromptTuning(4), GrowingPrompts(4)]
    table = lesson.observe(base, dict(zip(lesson.DEFINITIONS, methods, strict=True)), "A cat .")
    signs = table.drop(columns="numbers trained").astype(int)
    text = signs.loc["C", "queries, layer 1"]  # the paper's: as many queries as tokens
    more = {letter: (row - text).tolist() for letter, row in signs.iterrows()}
    assert more == {"A": [4] * 4, "B": [0, 0, 20, 20], "C": [0, 4, 0, 4], "D": [4, 8, 4, 8]}


def test_solutions_do_what_they_are_for():
    """The solutions with which no other computation is compared."""
    draw = torch.Generator().manual_seed(0)
    held = quantise(torch.randn(64, 2048, generator=draw), 32)  # groups of ABSMAX_BLOCK blocks
    mean = 32 / held.shape.numel()  # of a whole tensor, which `bits` leaves out
    assert LESSON["08"].bits_solution(32, ABSMAX_BLOCK) == held.bits - mean

    W, b, x, factors = (torch.randn(*s, generator=draw) for s in ((4, 4), (4,), (6, 4), (4,)))
    for_outputs, for_inputs = (
        x @ W_.T + b_
        for W_, b_ in (LESSON["09"].merge_factors_solution(W, b, factors, i) for i in (False, True))
    )
    assert same(for_outputs, factors * (x @ W.T + b))
    assert same(for_inputs, (x * factors) @ W.T + b)

    up, bias, down = (torch.randn(*size, generator=draw) for size in ((8, 5), (8,), (5, 8)))
    rows = torch.randn(3, 5, generator=draw)
    whole = torch.relu(rows @ up.T + bias)
    whole[:, [1, 4, 6]] = 0
    up_, bias_, down_ = LESSON["10"].cut_neurons_solution(up, bias, down, (1, 4, 6))
    assert same(torch.relu(rows @ up_.T + bias_) @ down_.T, whole @ down.T)
    assert is_two_four(LESSON["10"].two_four_solution(torch.rand(8, 12, generator=draw)))


# --- the machinery -----------------------------------------------------------------------------


def test_an_exercise_is_built_from_its_check():
    @exercise("Double it", solution=lambda x: 2 * x)
    def double(answer):
        expect(answer(3) == 6, f"3 doubled is 6, yours is {answer(3)}")

    assert double.name == "double"
    assert double(lambda x: 2 * x) == Verdict("passed", "Double it: correct")
    assert repr(double(lambda x: x**2)) == "✗ Double it: 3 doubled is 6, yours is 9"
    assert "ZeroDivisionError" in double(lambda x: x / 0).message


def test_a_step_of_adam_may_be_taken_in_place():
    def in_place(w, g, m, v, t, lr):
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.999).add_(0.001 * g * g)
        w -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        return w, m, v

    assert LESSON["01"].adam_step(in_place).passed


@exercise(
    "Square it",
    solution=lambda x: x * x,
    mistakes=(
        (lambda x: 2 * x, "{given} is the double"),
        (lambda x: x / 2, lambda given, right: f"the half of it is {given:.1f}"),
        (lambda x: -x * x, "it is negative", lambda given, right: given < 0),
        (lambda x: x @ x, "a number has no @"),
        (lambda x: str(x * x), "give a number"),
    ),
    praise="{right} it is",
    otherwise=lambda given, right: f"{given} for {right}",
)
def square(answer):
    given = answer(3)
    expect(not isinstance(given, str), f"give a number, not {given!r}")
    return given


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda x: 9.0, "9 it is"),
        (lambda x: torch.tensor(9), "9 it is"),
        (lambda x: x + 3, "6 is the double"),
        (lambda x: 1.5, "the half of it is 1.5"),
        (lambda x: -1, "it is negative"),
        (lambda x: x[0], "a number has no @"),
        (lambda x: "9", "give a number, not '9'"),
        (lambda x: 7, "7 for 9"),
        (lambda x: 1 / 0, "your code stopped with ZeroDivisionError: division by zero"),
    ],
)
def test_a_trial_is_compared_with_the_solution_and_then_with_each_mistake(answer, words):
    assert square(answer).message == f"Square it: {words}"
    assert square(answer).passed == ("it is" in words and words[0] == "9")


def test_what_a_mistake_gives_is_computed_when_an_answer_is_wrong_and_no_further_than_needed():
    tried = []

    @exercise(
        "One",
        solution=1,
        mistakes=((2, "two"), (3, "three"), (4, "four")),
        praise="one",
    )
    def one(answer):
        tried.append(answer)
        return answer

    assert one(1).passed and tried == [1, 1]
    tried.clear()
    assert one(3).message == "One: three" and tried == [3, 1, 2, 3]


def test_words_quote_the_first_case_that_is_wrong():
    words = "{case} squared is {right}, not {given}"
    assert fill(words, {1: 1, 2: 5, 3: 6}, {1: 1, 2: 4, 3: 9}) == "2 squared is 4, not 5"
    assert fill("{right[2]:.1f}, all of them", {2: 4}, {2: 4}) == "4.0, all of them"
    assert fill("{given[0]} for {right[0]}", [1], [2]) == "1 for 2"
    assert fill("{given} for {right}", 3, {1: 1}) == "3 for {1: 1}"


NAN = float("nan")


@pytest.mark.parametrize(
    "a, b, equal",
    [
        (1, 1, True),
        (1, 1.0, True),
        (10**18, 10**18 + 1, False),
        (0.1 + 0.2, 0.3, True),
        (NAN, NAN, True),
        (NAN, 0.0, False),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN], dtype=torch.float64), True),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.ones(2), torch.ones(2) + 1e-3, False),
        (torch.ones(2), torch.tensor([1, 1.03], dtype=torch.bfloat16), True),
        (torch.ones(2), torch.tensor([1, 1.1], dtype=torch.bfloat16), False),
        (torch.ones(2), torch.tensor([1, 1.005], dtype=torch.float16), True),
        (torch.ones(2), torch.tensor([1, 1.03], dtype=torch.float16), False),
        (torch.ones(1), "1", False),
        (torch.tensor(2), 2, True),
        ("a", "b", False),
        ({"x"}, {"x"}, True),
        ({"x": 1.0}, {"x": 1}, True),
        ({"x": 1}, {"y": 1}, False),
        ([1, (2, torch.ones(1))], (1, [2.0, torch.ones(1)]), True),
        ([1], [1, 2], False),
        (None, 0, False),
        (ValueError("a"), ValueError("b"), True),
        (ValueError("a"), TypeError("a"), False),
    ],
)
def test_what_is_the_same_answer(a, b, equal):
    assert same(a, b) == same(b, a) == equal


def test_an_answer_that_goes_wrong_at_its_end():
    assert after(lambda x: 2 * x, lambda made: made + 1)(3) == 7
    assert after(lambda x: (x, 2 * x), lambda one, two: two - one)(3) == 3


def test_a_ward_is_written_once():
    table = {
        "late": ("B", "it comes too late", "Look at the clock."),
        "cold": ("A", "it is too cold", "Touch it."),
        "small": ("D", "it is too small", "Measure it."),
        "empty": ("C", "there is nothing in it", "Open it."),
    }
    ward = Ward(table, where="box ")
    assert list(ward.faults) == ["late", "cold", "small", "empty"]
    assert ward.right == {"A": "cold", "B": "late", "C": "empty", "D": "small"}
    seen = ward.examine(lambda fault: [{"step": 1, "cold": fault == "cold"}], name="box ")
    assert seen["patient"].tolist() == ["sound", "box A", "box B", "box C", "box D"]
    assert seen["cold"].tolist() == [False, True, False, False, False]
    find = ward.exercise("find", "Find it", confused=("AC", "CD"), unknown="large")
    assert find.name == "find" and len(find.mistakes) == 5
    assert find(ward.right).message.startswith("Find it: A: it is too cold; B: it comes too late")
    assert find({letter: ... for letter in "ABCD"}).status == "open"
    for wrong, words, *_ in find.mistakes:
        assert words in find(wrong).message
    assert (
        find(ward.swapped("B", "D")).message == "Find it: Look again at box B. Look at the clock."
    )
    assert 'such as {"A": "late", ...}' in find("late").message  # which is not A's


def test_a_ward_that_tells_the_sign_of_what_was_said():
    table = {"vwxyz"[i]: ("ABCDE"[i], "", f"It is {'vwxyz'[i]}.") for i in range(5)}
    ward = Ward(table, where="", again="{letter} is not {said!r}. {sign_of_said}")
    find = ward.exercise("find", "Find", confused=("AC",), unknown="u", praise="found")
    assert find(ward.right).message == "Find: found"
    assert find(ward.swapped("B", "D")).message == "Find: B is not 'y'. It is y."
    assert "'u' is none of the five faults" in find(ward.right | {"C": "u"}).message


def test_an_object_that_may_lie_is_refused_by_its_type():
    class Odd:
        def __eq__(self, other):
            return True

    @exercise("One", solution=lambda: 1, praise="one")
    def one(answer):
        return answer()

    assert one(lambda: 1).passed
    assert "of the type Odd" in one(lambda: Odd()).message


def test_a_tensor_or_a_number_is_demanded():
    assert a_tensor(made := torch.ones(2)) is made
    assert a_number(3) == 3 and a_number(torch.tensor(3)) == 3
    with pytest.raises(Wrong, match="return a number; yours is Tensor"):
        a_number(made)
    with pytest.raises(Wrong, match="return a tensor; yours is str"):
        a_tensor("1.0")
    for made in ([1.0, 2.0], (torch.tensor(1.0), torch.tensor(2.0))):
        assert a_tensor(made).tolist() == [1.0, 2.0]


def test_a_question_computes_its_answer():
    @question("Is 2 + 2 even?", {"a": ("yes", ""), "b": ("no", "It leaves no rest.")})
    def even():
        return ("a" if (2 + 2) % 2 == 0 else "b"), f"2 + 2 = {2 + 2}."

    assert even("a").passed
    assert even("B") == Verdict("wrong", "Prediction: not b. It leaves no rest. 2 + 2 = 4.")
    assert even("c").message == "Prediction: 'c' is none of a, b"
