"""The calculator's check against a GPU: its rows, its file, its packing. The GPU is played."""

import json
from concurrent.futures import Future

import pytest
import torch

from peftlab.experiments import check_calculator as check
from peftlab.memory import calculator

GB = 10**9


def test_the_rows_are_many_and_of_every_kind():
    cases = set(check.CASES)
    assert len(cases) == len(check.CASES) >= 14
    assert {case.kind for case in cases} == set(calculator.KINDS)
    assert {case.dtype for case in cases} == set(calculator.DTYPES)
    assert {case.checkpointing for case in cases} == {True, False}
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.model in calculator.MODELS, case.model


def test_a_row_on_a_cpu_is_what_is_predicted(tmp_path):
    """The smallest of them: the code that measures is run, not played."""
    case = check.Case("tiny-llama", "LoRA", 2, "bfloat16", checkpointing=True, length=32)
    told = check.predict(case.method, case.model, 2, 32, dtype="bfloat16", checkpointing=True)
    found = check.row(case, "cpu")
    assert found["measured"] == told.peak
    assert found["device"] == "1 CPU core" and found["torch"] == torch.__version__


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GB: rows take 30 GB, but for one that fails, one too large, one untold."""
    at_once = []

    class Played(check.Running):
        now: list = []

        def __init__(self, which, expected):
            self.which, self.expected, self.asked = which, expected, 0
            Played.now.append(self)
            at_once.append(sum(one.expected for one in Played.now))

        def answer(self):
            self.asked += 1
            if self.asked < 2:
                return None
            Played.now.remove(self)
            case = check.CASES[self.which]
            return "no memory" if self.which == 1 else {"name": case.name, "measured": 30 * GB}

    def predicted(case):
        which = check.CASES.index(case)
        if which == 3:
            raise ValueError("no such method")
        size = 90 * GB if which == 2 else 30 * GB
        return calculator.Told(case.model, case.kind, size, 0, 0, 0, 0, 0, 0, size, 0)

    class Here:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *given):
            future = Future()
            try:
                future.set_result(function(*given))
            except ValueError as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(check, "Running", Played)
    monkeypatch.setattr(check.Case, "predicted", predicted)
    monkeypatch.setattr(check, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(check.time, "sleep", lambda _: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * GB, 80 * GB))
    return at_once


def test_as_many_run_at_once_as_fit_and_the_file_goes_on(gpu, tmp_path, capsys):
    path = tmp_path / "rows.json"
    check.on_gpu(check.File(path, "the command"), jobs=3, workers=1)
    said = capsys.readouterr().out
    assert max(gpu) == 2 * (30 * GB + check.CONTEXT)  # two fit, three do not
    names = [row["name"] for row in json.loads(path.read_text())["rows"]]
    missing = [check.CASES[which].name for which in (1, 2, 3)]
    assert sorted(names + missing) == sorted(case.name for case in check.CASES)
    for name, why in zip(missing, ("no memory", "91 GB do not fit", "no such method"), strict=True):
        assert f"{name}: {why}" in said
    gpu.clear()
    check.on_gpu(check.File(path, "the command"), jobs=3, workers=1)  # only the failed one again
    assert len(gpu) == 1


def test_a_coded_model_needs_room_for_its_numbers_first():
    told = calculator.Told("llama-2-7b", "QLoRA", 4 * GB, 3 * GB, 0, 0, 0, 0, 0, 6 * GB, 5 * GB)
    need = check.needed(check.Case("llama-2-7b", "QLoRA", 2), told)
    assert need == 2 * 6_738_415_616 + check.CONTEXT
    told = calculator.Told("llama-2-7b", "LoRA", 4 * GB, 0, 0, 0, 0, 0, 0, 6 * GB, 5 * GB)
    assert check.needed(check.Case("llama-2-7b", "LoRA", 2), told) == 6 * GB + check.CONTEXT
