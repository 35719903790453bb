"""A sweep over a lesson or a task: what runs, what is kept, and what is not run again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from peftlab.experiments import sweep_lesson
from peftlab.methods import METHODS, LoRA, PrefixTuning

CELLS = ['method = "lora"\nsize = 1\nseed = 0', 'print(method, size * 10 + seed)\n"shown"']


def write_lesson(path: Path, *more: str) -> Path:
    """A lesson of two quick cells, and more."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (*CELLS, *more)]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def lesson(tmp_path) -> Path:
    return write_lesson(tmp_path / "lesson.ipynb")


@pytest.fixture
def ran(monkeypatch) -> list:
    """Runs that take no time and happen here; the jobs that were run."""
    seen = []

    def results(missing, workers, dask):
        for job in missing:
            seen.append(job)
            error = "it broke" if job.parameters["seed"] == 13 else None
            yield job, {"error": error, "version": job.version, "wall seconds": 0.0}

    monkeypatch.setattr(sweep_lesson, "results", results)
    return seen


def main(*arguments) -> int:
    return sweep_lesson.main([str(argument) for argument in arguments])


def test_a_lesson_runs_with_its_parameters_and_leaves_a_file_a_run(lesson, tmp_path, capsys):
    """Through joblib and papermill, in two processes."""
    out = tmp_path / "runs"
    assert main(lesson, "--sizes", 2, "--seeds", 0, 1, "--workers", 2, "--out", out) == 0
    files = sorted(out.iterdir())
    assert [path.name.rpartition("-")[0] for path in files] == [
        "lesson-size=2-seed=0",
        "lesson-size=2-seed=1",
    ]
    for seed, path in enumerate(files):
        record = json.loads(path.read_text())
        assert record["parameters"] == {"size": 2, "seed": seed} and record["error"] is None
        assert [entry["text"] for entry in record["said"]] == [f"lora {20 + seed}\n'shown'\n"]
        assert record["peak process bytes"] > 10**7 and record["wall seconds"] > 0
        assert record["device"].startswith("CPU") and record["peak gpu bytes"] is None
    assert "2 runs, 0 of them done" in capsys.readouterr().out
    assert main(lesson, "--sizes", 2, "--seeds", 0, 1, "--out", out) == 0
    assert capsys.readouterr().out == "2 runs, 2 of them done\n"


def test_a_cell_that_fails_leaves_its_error(tmp_path, capsys):
    lesson = write_lesson(tmp_path / "broken.ipynb", "1 / 0")
    assert main(lesson, "--gpu-gigabytes", 15, "--out", tmp_path) == 1
    [path] = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert "ZeroDivisionError: division by zero" in record["error"]
    assert "failed" in capsys.readouterr().out


def test_only_what_is_missing_is_run(lesson, ran, tmp_path):
    def seeds_run(*seeds) -> list[int]:
        ran.clear()
        main(lesson, "--seeds", *seeds, "--out", tmp_path / "runs")
        return [job.parameters["seed"] for job in ran]

    assert seeds_run(0, 1) == [0, 1]
    assert seeds_run(0, 1, 2) == [2]
    assert seeds_run(0, 1, 2) == []
    assert seeds_run(0, 13) == [13]
    assert seeds_run(0, 13) == [13]  # it failed
    files = sorted((tmp_path / "runs").iterdir())
    files[0].write_text(files[0].read_text()[:20])  # cut off
    assert len(seeds_run(0, 1, 2)) == 1
    assert seeds_run(0, 1, 2) == []
    write_lesson(lesson, "2")  # the lesson is another one now
    assert seeds_run(0, 1, 2) == [0, 1, 2]


def test_half_a_file_is_never_in_its_place(lesson, ran, tmp_path, monkeypatch):
    def die(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        main(lesson, "--out", tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*.json"))


def test_every_combination_has_a_file_of_its_own(lesson, ran, tmp_path):
    grid = ["--methods", "lora", "ia3", "--sizes", 1, 2, "--seeds", 0, 1]
    main(lesson, *grid, "--out", tmp_path / "runs")
    assert len(ran) == 8 == len(list((tmp_path / "runs").glob("*.json")))
    main(lesson, *grid, "--gpu-gigabytes", 15, "--out", tmp_path / "runs")  # another measurement
    assert len(ran) == 16


def test_a_task_trains_a_method_at_a_size(tmp_path):
    arguments = ["--methods", "prefix_tuning", "--sizes", 3, "--set", "steps=2", "model=tiny-gpt"]
    assert main("sentiment", *arguments, "--out", tmp_path) == 0
    [path] = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["method"]["num_virtual_tokens"] == 3 and len(record["loss"]) == 2
    assert record["base"]["source"] == "peftlab itself" and 0 <= record["metrics"]["accuracy"] <= 1


def test_a_task_takes_what_its_loading_takes(tmp_path):
    options = ["--methods", "lora", "--set", "steps=1", "skill=reverse,upper", "--out", tmp_path]
    assert main("letters", *options) == 0
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(record["parameters"]["skill"] for record in records) == ["reverse", "upper"]


def test_a_method_without_a_size_is_run_once(ran, tmp_path):
    main("facts", "--methods", "lora", "ia3", "--sizes", 4, 8, "--out", tmp_path)
    assert [job.parameters for job in ran] == [
        {"method": "lora", "size": 4, "seed": 0},
        {"method": "lora", "size": 8, "seed": 0},
        {"method": "ia3", "seed": 0},
    ]


def test_the_scale_of_a_delta_stays_when_its_size_changes():
    plain = LoRA()
    assert sweep_lesson.sized("lora", 32) == LoRA(r=32, alpha=plain.alpha / plain.r * 32)
    assert sweep_lesson.sized("prefix_tuning", 5) == PrefixTuning(num_virtual_tokens=5)
    assert sweep_lesson.sized("ia3", None) == METHODS["ia3"]()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["facts", "--methods", "lore"], "method 'lore': allowed is adalora, bitfit"),
        (["facts"], "method 'none': allowed is adalora"),
        (["fact", "--methods", "lora"], "'fact' is neither a notebook nor a task: sentiment"),
        (["facts", "--methods", "lora", "--set", "stesp=1"], "facts has no parameter 'stesp': it"),
        (["facts", "--methods", "lora", "--set", "steps"], "--set 'steps': NAME=VALUE or"),
        (["LESSON", "--set", "steps=3"], "has no parameter 'steps': it has method, size, seed"),
        (["missing.ipynb"], "No such file"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(arguments, told, lesson, ran, capsys):
    with pytest.raises(SystemExit):
        main(*[lesson if argument == "LESSON" else argument for argument in arguments])
    assert told in capsys.readouterr().err and ran == []


def on_dask(processes: bool, workers: int, *arguments) -> subprocess.CompletedProcess:
    """A sweep on a scheduler and workers of this machine, started by a process of their own."""
    program = (
        "import sys; from distributed import LocalCluster; "
        "from peftlab.experiments.sweep_lesson import main\n"
        "if __name__ == '__main__':\n"
        f"    with LocalCluster(n_workers={workers}, threads_per_worker=1, processes={processes}, "
        "dashboard_address=None, host='127.0.0.1', protocol='tcp') as cluster:\n"
        "        sys.exit(main([*sys.argv[1:], '--dask', cluster.scheduler_address]))\n"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_on_a_dask_cluster(lesson, tmp_path):
    pytest.importorskip("distributed", reason="pip install '.[sweep]'")
    child = on_dask(False, 2, lesson, "--seeds", 0, 1, "--out", tmp_path / "o")
    assert child.returncode == 0, child.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "o").iterdir()]
    assert [record["error"] for record in records] == [None, None]


DEADLY = """
import os, pathlib, signal
begun = pathlib.Path(FOLDER, f"begun-{seed}")
begun.write_text(begun.read_text() + "x" if begun.exists() else "x")
if seed in ALWAYS or (seed in ONCE and begun.read_text() == "x"):
    os.kill(os.getppid(), signal.SIGKILL)  # the worker whose kernel this is
    os._exit(1)
"""


def deadly(tmp_path: Path, once=(), always=()) -> tuple[Path, Path]:
    """A lesson that kills its worker for some seeds; where it notes each run that it begins."""
    noted = tmp_path / "noted"
    noted.mkdir()
    text = DEADLY.replace("FOLDER", repr(str(noted)))
    text = text.replace("ALWAYS", repr(always)).replace("ONCE", repr(once))
    return write_lesson(tmp_path / "deadly.ipynb", text), noted


def test_a_killed_worker_loses_nothing_and_doubles_nothing(tmp_path):
    """One of two workers dies in the middle of a run: the other runs it, and no other again."""
    pytest.importorskip("distributed", reason="pip install '.[sweep]'")
    lesson, noted = deadly(tmp_path, once=(1,))
    out = tmp_path / "runs"
    child = on_dask(True, 2, lesson, "--seeds", 0, 1, 2, 3, "--out", out)
    assert child.returncode == 0, child.stderr
    records = [json.loads(path.read_text()) for path in out.iterdir()]
    assert sorted(record["parameters"]["seed"] for record in records) == [0, 1, 2, 3]
    assert [record["error"] for record in records] == [None] * 4
    assert child.stdout.count("done, ") == 4
    begun = {path.name: len(path.read_text()) for path in noted.iterdir()}
    assert begun == {"begun-0": 1, "begun-1": 2, "begun-2": 1, "begun-3": 1}


def test_a_run_that_kills_every_worker_fails_alone(tmp_path, monkeypatch):
    """The scheduler gives up after as many as it is told; the same command tries it again."""
    pytest.importorskip("distributed", reason="pip install '.[sweep]'")
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    lesson, _ = deadly(tmp_path, always=(1,))
    out = tmp_path / "runs"
    child = on_dask(True, 2, lesson, "--seeds", 0, 1, "--out", out)
    assert child.returncode == 1 and child.stdout.count("failed, None s") == 1, child.stderr
    records = {
        r["parameters"]["seed"]: r for r in (json.loads(p.read_text()) for p in out.iterdir())
    }
    assert "KilledWorker" in records[1]["error"]
    assert records[0]["error"] is None
