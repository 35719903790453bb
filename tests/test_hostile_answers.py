"""Answers that do harm get a sentence, right ones pass however they are written, and none stays."""

import json
import math
import signal
import threading

import pytest
import torch

from peftlab.bases.data import data_path
from peftlab.exercises import answers, exercise
from peftlab.exercises.forms import a_count, digits, same, unlike
from peftlab.experiments.hostile_answers import HOSTILE, RIGHT, every, run, trials

EXERCISES = every()


def test_a_sample_of_all_answers_gets_the_right_verdict_and_leaves_nothing_behind():
    assert run(trials(seed=1)[:150]) == []


def test_what_was_measured_has_no_fault_and_leaves_no_exercise_out():
    made = json.loads(data_path("results", "hostile_answers.json").read_text())
    assert made["exercises"] == len(EXERCISES) and len(HOSTILE) >= 40
    assert made["hostile answers"] == len(EXERCISES) * len(HOSTILE)
    assert made["faults"] == []


@exercise("Double it", solution=lambda x: 2 * x, praise="doubled")
def double(answer):
    return answer(torch.tensor(3.0))


@pytest.fixture
def heard():
    """Ctrl-C as Python hears it, also where a shell started the tests in the background: there it
    is ignored from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("swallow", [False, True])
def test_a_learner_who_presses_ctrl_c_stops_the_cell(swallow, heard):
    def pressed(x):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if not swallow:
                raise
        return 2 * x

    with pytest.raises(KeyboardInterrupt):
        double(pressed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert double(double.solution).passed


def test_an_answer_cannot_pretend_that_ctrl_c_was_pressed():
    def interrupts(x):
        raise KeyboardInterrupt

    assert double(interrupts).message.endswith("your code stopped with KeyboardInterrupt")


def test_a_loop_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 0.1)

    def loops(x):
        while True:
            x = x + 1

    assert "took longer than 0.1 s" in double(loops).message
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_an_answer_is_tried_in_a_thread_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(double(double.solution)))
    thread.start()
    thread.join()
    assert found[0].passed


@pytest.mark.parametrize("name", ["06-initialise", "02-initialise", "08-backward", "01-adam_step"])
def test_what_the_notebook_has_set_does_not_matter(name):
    item = EXERCISES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            assert item(item.solution).passed
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_a_notimplementederror_of_pytorchs_is_no_stub():
    def wrong(*args):
        return torch.softmax(torch.tensor([1, 2]), 0)

    def stub(*args):
        raise NotImplementedError

    assert double(wrong).status == "wrong" and double(stub).status == "open"


def test_two_numbers_are_shown_with_the_digits_that_tell_them_apart():
    assert digits(1.0, 2.0) == ("1", "2")
    assert digits(1280.01, 1280.02) == ("1280.01", "1280.02")
    assert digits(0.1, math.nextafter(0.1, 1)) == ("0.10000000000000001", "0.10000000000000002")
    given, right = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-4])
    assert unlike(given, right) == "the number at [1] should be 2.0001; yours is 2"
    assert unlike(given, right[:1]) == "the shape should be (1,); yours is (2,)"


def test_tensors_are_the_same_as_far_as_the_coarser_dtype_can_tell():
    right = torch.randn(7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert same(right.to(dtype), right)
    assert not same(right + 1e-4, right) and not same(right.half() + 0.1, right)


def test_a_count_is_a_whole_number_however_it_is_written():
    assert a_count(3) == a_count(3.0) == a_count(torch.tensor([[3]])) == 3
    for wrong in (3.5, True, float("nan"), float("inf")):
        with pytest.raises(answers.Wrong, match="a count is a whole number"):
            a_count(wrong)


def test_every_rewriting_has_a_name_of_its_own():
    assert len(RIGHT) + len(HOSTILE) == len(RIGHT.keys() | HOSTILE.keys())


def test_a_loop_is_ended_where_ctrl_c_is_ignored_as_in_the_background(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        test_a_loop_without_end_is_ended(monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)
