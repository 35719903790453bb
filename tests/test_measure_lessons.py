"""What a lesson takes is measured, kept while the lesson is the same, and measured anew after."""

import json
from pathlib import Path

import nbformat
import pytest

from peftlab import memory
from peftlab._data import data_path
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


def test_the_readme_says_what_the_lessons_took():
    rows = json.loads(data_path("results", "lessons_cpu.json").read_text())["lessons"]
    assert [row["lesson"] for row in rows] == sorted(
        p.stem for p in (ROOT / "notebooks").glob("*.ipynb")
    )
    assert all(row["error"] is None for row in rows)
    *small, real = [(row["wall seconds"], row["peak process bytes"] / 1e9) for row in rows]
    seconds, memory = zip(*small, strict=True)
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"ran in {min(seconds):.0f} to {max(seconds):.0f} seconds" in said
    assert f"at most {max(memory):.1f} GB of memory" in said
    assert f"took {real[0]:.0f} seconds and {real[1]:.1f} GB" in said


def test_the_readme_says_what_the_lessons_took_of_a_gpu():
    rows = json.loads(data_path("results", "lessons_cuda.json").read_text())["lessons"]
    assert [row["lesson"] for row in rows] == sorted(
        p.stem for p in (ROOT / "notebooks").glob("*.ipynb")
    )
    for row in rows:
        assert row["error"] is None and row["gpu gigabytes allowed"] == 15
        assert 0 < row["peak gpu bytes"] <= row["peak gpu bytes reserved"] < 15 * 2**30
    *small, real = [(row["wall seconds"], row["peak gpu bytes"] / 1e9) for row in rows]
    seconds, memory = zip(*small, strict=True)
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"took {min(seconds):.0f} to {max(seconds):.0f} seconds beside each other" in said
    assert f"at most {max(memory):.2f} GB of the GPU" in said
    assert f"{real[0]:.0f} seconds and {real[1]:.1f} GB (`data/results/lessons_cuda" in said


def test_every_lesson_says_what_it_took_of_a_gpu():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cell = nbformat.read(path, 4).cells[-2]
        said = "".join(output.get("text", "") for output in cell.outputs)
        assert f'lesson_on_gpu("{path.stem}")' in cell.source
        assert said.strip() == memory.lesson_on_gpu(path.stem)
        assert "GB of GPU memory at the peak, of 15 GiB" in said
    assert "no run of 99_none" in memory.lesson_on_gpu("99_none")
