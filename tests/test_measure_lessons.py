"""What a lesson takes is measured, kept while the lesson is the same, and measured anew after."""

import json
from pathlib import Path

import nbformat
import pytest
import torch

from peftlab import memory
from peftlab.bases.data import data_path
from peftlab.experiments import measure_lessons

ROOT = Path(__file__).parent.parent


def lesson(folder, name: str, source: str) -> None:
    cells = [nbformat.v4.new_code_cell('device = "auto"'), nbformat.v4.new_code_cell(source)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def measured(folder) -> dict[str, dict]:
    out = folder / "lessons.json"
    ended = measure_lessons.main(["--notebooks", str(folder), "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["command"].endswith("--device cpu") and found["cores"] >= 1
    rows = {row["lesson"]: row for row in found["lessons"]}
    assert ended == any(row["error"] for row in rows.values())
    return rows


def test_rows_follow_the_lessons(tmp_path, capsys):
    lesson(tmp_path, "00_large", 'held = bytes(300_000_000); assert device == "cpu"')
    lesson(tmp_path, "01_wrong", "1 / 0")
    first = measured(tmp_path)
    assert first["00_large"]["peak process bytes"] > 300_000_000
    assert first["00_large"]["peak gpu bytes"] is None and first["00_large"]["wall seconds"] > 0
    assert first["01_wrong"]["error"].rstrip().endswith("division by zero")
    lesson(tmp_path, "01_wrong", "1 / 1")
    lesson(tmp_path, "02_more", "2")
    again = measured(tmp_path)
    assert again["00_large"] == first["00_large"]  # the same to the hundredth of a second
    assert again.keys() == {"00_large", "01_wrong", "02_more"}
    assert all(row["error"] is None for row in again.values())
    assert "01_wrong: done" in capsys.readouterr().out
    (tmp_path / "02_more.ipynb").unlink()
    assert measured(tmp_path).keys() == {"00_large", "01_wrong"}


def test_no_lessons_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        measure_lessons.main(["--notebooks", str(tmp_path)])
    assert "has no lessons" in capsys.readouterr().err


UNMEASURED = {  # new since the lessons were measured on this device
    "cpu": set(),
    "cuda": {"07_lora_family", "12_when_it_fails", "13_showdown", "14_which_method"},
}
REAL = "11_real_model"


def recorded(device: str, memory: str) -> dict[str, tuple[float, float]]:
    """Seconds and gigabytes of each lesson, of the record that is there; none had an error."""
    rows = json.loads(data_path("results", f"lessons_{device}.json").read_text())["lessons"]
    lessons = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert [row["lesson"] for row in rows] == sorted(lessons - UNMEASURED[device])
    assert all(row["error"] is None for row in rows)
    return {row["lesson"]: (row["wall seconds"], row[memory] / 1e9) for row in rows}


@pytest.mark.parametrize(
    "device, memory, small, real",
    [
        (
            "cpu",
            "peak process bytes",
            "lesson ran in {:.0f} to {:.0f} seconds, with at most {:.1f} GB of memory",
            "took {:.0f} seconds and {:.1f} GB",
        ),
        (
            "cuda",
            "peak gpu bytes",
            "held to the 15 GiB of a free T4, they took {:.0f} to {:.0f} seconds;",
            "trains every method there, {:.0f} seconds and {:.1f} GB",
        ),
    ],
)
def test_the_readme_says_what_the_lessons_took(device, memory, small, real):
    took = recorded(device, memory)
    last = took.pop(REAL)
    seconds, gigabytes = zip(*took.values(), strict=True)
    said = " ".join((ROOT / "README.md").read_text().split())
    assert small.format(min(seconds), max(seconds), max(gigabytes)) in said
    assert real.format(*last) in said


def test_every_lesson_fits_a_free_gpu():
    rows = json.loads(data_path("results", "lessons_cuda.json").read_text())["lessons"]
    for row in rows:
        assert row["gpu gigabytes allowed"] == 15  # of which it ran without an error
        assert 0 < row["peak gpu bytes"] < 15 * 2**30


def test_the_peak_outlives_a_measurement(monkeypatch):
    """`measure` sets torch's counters back; what was higher before it is remembered."""
    counters = {"allocated": 70, "reserved": 90}
    for kind in counters:
        monkeypatch.setattr(
            torch.cuda, f"max_memory_{kind}", lambda device=None, k=kind: counters[k]
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    back = dict(allocated=10, reserved=20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: counters.update(back))
    monkeypatch.setattr(memory.step, "_highest", {"allocated": 0, "reserved": 0})
    allocator = memory.step.Allocator(torch.device("cuda"))
    monkeypatch.setattr(allocator, "now", lambda: 5)
    allocator.start({})
    assert torch.cuda.max_memory_allocated() == 10
    assert (memory.gpu_peak(), memory.gpu_peak("reserved")) == (70, 90)
    counters["allocated"] = 80
    assert memory.gpu_peak() == 80


def test_every_lesson_says_what_it_took_of_a_gpu():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cell = nbformat.read(path, 4).cells[-2]
        if path.stem in UNMEASURED["cuda"]:  # a lesson quotes no run that is not there
            assert "lesson_on_gpu" not in cell.source
            continue
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert f'lesson_on_gpu("{path.stem}")' in cell.source
        assert said.strip() == memory.lesson_on_gpu(path.stem)
        assert "GB of GPU memory at the peak, of 15 GiB" in said
        assert max(map(len, said.splitlines())) <= 83  # a page of 900 pixels breaks inside a word
    assert "no run of 99_none" in memory.lesson_on_gpu("99_none")


def test_all_lessons_together_are_short_enough():
    """On two CPU cores: twelve minutes in all, and none but the real model above 90 seconds."""
    found = recorded("cpu", "peak process bytes")
    took = {lesson: seconds for lesson, (seconds, _) in found.items()}
    assert sum(took.values()) <= 12 * 60
    assert max(seconds for lesson, seconds in took.items() if lesson != REAL) <= 90
