"""`python -m peftlab start`: the learner's own copy, which nothing overwrites, and JupyterLab."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from peftlab import __main__ as front
from peftlab.experiments.run_notebooks import execute

ROOT = Path(__file__).parent.parent


@pytest.fixture
def lessons(tmp_path) -> Path:
    """A course of three lessons."""
    folder = tmp_path / "course"
    folder.mkdir()
    for name in ("00_start_here", "01_more", "02_most"):
        (folder / f"{name}.ipynb").write_text(f"{name}, first edition")
    return folder


def test_what_the_learner_changed_is_kept_and_the_rest_follows_the_course(lessons, tmp_path):
    mine = tmp_path / "mine"
    names = sorted(path.name for path in lessons.iterdir())
    assert front.copy_lessons(lessons, mine)["new"] == names
    assert front.copy_lessons(lessons, mine)["same"] == names

    (mine / names[1]).write_text("my answers")
    (mine / names[2]).unlink()
    for path in lessons.iterdir():
        path.write_text("second edition")
    for _ in range(2):  # the second time finds everything as the first left it
        became = front.copy_lessons(lessons, mine)
        assert became["kept"] == [names[1]]
        assert (mine / names[1]).read_text() == "my answers"
    assert became["same"] == [names[0], names[2]]
    assert (mine / names[0]).read_text() == (mine / names[2]).read_text().replace(
        "02_most", names[0][:-6]
    )


@pytest.mark.parametrize("record", [None, "", "[]", '{"00_start_here.ipynb": 3}', "\x00"])
def test_without_a_record_of_what_was_copied_everything_that_differs_is_kept(
    lessons, tmp_path, record
):
    mine = tmp_path / "mine"
    front.copy_lessons(lessons, mine)
    if record is None:
        (mine / front.COPIED).unlink()
    else:
        (mine / front.COPIED).write_text(record)
    first = lessons / front.FIRST
    first.write_text("second edition")
    became = front.copy_lessons(lessons, mine)
    assert became["kept"] == [front.FIRST] and not became["new"] and not became["newer"]
    assert "first edition" in (mine / front.FIRST).read_text()


def test_a_copy_that_is_cut_off_leaves_the_old_file_whole(lessons, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    front.copy_lessons(lessons, mine)
    (lessons / front.FIRST).write_text("second edition")

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", cut)
        front.copy_lessons(lessons, mine)
    assert "first edition" in (mine / front.FIRST).read_text()
    assert front.copy_lessons(lessons, mine)["newer"] == [front.FIRST]


def test_it_says_what_became_of_each_lesson(tmp_path, capsys):
    mine = tmp_path / "my course"
    stored = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert front.main(["start", str(mine), "--no-lab"]) == 0
    assert f"{len(stored)} lessons in {mine}, {len(stored)} of them new" in capsys.readouterr().out
    (mine / stored[-1]).write_text("mine")
    assert front.main(["start", str(mine), "--no-lab"]) == 0
    said = capsys.readouterr().out
    assert f"0 of them new\nkept as you changed them: {stored[-1]}\n" in said
    assert f'python -m peftlab start "{mine}"' in said


@pytest.mark.parametrize("folder", ["notebooks", "notebooks/mine", "README.md"])
def test_a_folder_that_cannot_be_the_learners_is_refused(folder, capsys):
    before = sorted((ROOT / "notebooks").iterdir())
    assert front.main(["start", str(ROOT / folder), "--no-lab"]) in (1, 2)
    assert "another folder" in capsys.readouterr().out.lower()
    assert sorted((ROOT / "notebooks").iterdir()) == before


def test_without_a_clone_it_says_where_the_lessons_are(tmp_path, capsys, monkeypatch):
    import peftlab

    monkeypatch.setattr(front, "CHECKOUT", tmp_path)
    assert front.main(["start", "--no-lab"]) == 2
    assert f"git clone {peftlab.REPOSITORY}," in capsys.readouterr().out


def test_the_root_holds_the_lessons_and_the_package(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr(front, "CHECKOUT", home / "code/peftlab")
    assert front.root_for(home / "code/peftlab/lessons") == home / "code/peftlab"
    assert front.root_for(home / "course") == home
    assert front.root_for(home / ".hidden/course") == home / ".hidden/course"
    monkeypatch.setattr(front, "CHECKOUT", Path(tmp_path.anchor) / "opt/peftlab")
    assert front.root_for(Path(tmp_path.anchor) / "home/me") == Path(tmp_path.anchor) / "home/me"


def test_jupyterlab_opens_the_copy_and_shows_the_package(tmp_path):
    """A real server over a course of one lesson, asked as its file browser asks."""
    course = tmp_path / "course"
    shutil.copytree(ROOT / "peftlab", course / "peftlab")
    (course / "data").symlink_to(ROOT / "data")
    (course / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / front.FIRST, course / "notebooks")
    # Tests run beside each other. Root may start it as well: a container has no other user.
    settings = {"ServerApp": {"port": 0, "token": "a-token"}}
    (tmp_path / "jupyter_server_config.json").write_text(json.dumps(settings))
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    environment["JUPYTER_RUNTIME_DIR"] = str(tmp_path / "runtime")
    said = tmp_path / "said.txt"
    with said.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "peftlab", "start", "--no-browser"],
            cwd=course,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        address = address_of(tmp_path / "runtime", server, said)
        for name in (f"lessons/{front.FIRST}", "peftlab/attention.py", "peftlab/methods/lora.py"):
            asked = f"{address}api/contents/{name}?content=0&token=a-token"
            with urllib.request.urlopen(asked) as answer:
                assert json.load(answer)["path"] == name
        opened = f"/lab/tree/lessons/{front.FIRST}"
        assert opened in said.read_text() and "is in peftlab, to be read" in said.read_text()
        end = urllib.request.Request(f"{address}api/shutdown?token=a-token", method="POST")
        urllib.request.urlopen(end).close()
        assert server.wait(60) == 0
    finally:
        server.terminate()


def address_of(runtime: Path, server: subprocess.Popen, said: Path) -> str:
    """The server's address, from the file that it writes when it listens."""
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        for found in runtime.glob("jpserver-*.json"):
            try:
                return json.loads(found.read_text())["url"]
            except ValueError:  # half written
                pass
        time.sleep(0.2)
    raise AssertionError(said.read_text())


@pytest.fixture
def clone(tmp_path) -> Path:
    """A git repository of its own that has what this checkout has."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("this is no git checkout")
    folder = tmp_path / "peftlab"
    for name in filter(None, found.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    who = ("-c", "user.name=peftlab", "-c", "user.email=peftlab@example.org")
    git(folder, *who, "commit", "-q", "-m", "As it is")
    return folder


def git(folder: Path, *command: str) -> str:
    ran = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
    return ran.stdout


def test_a_lesson_that_ran_changes_nothing_that_git_has(clone, monkeypatch):
    """Run from the first cell to the last and saved, in the folder where `start` puts it."""
    monkeypatch.setenv("PYTHONPATH", str(clone), prepend=os.pathsep)
    command = [sys.executable, "-m", "peftlab", "start", "--no-lab"]
    subprocess.run(command, cwd=clone, check=True, capture_output=True)
    rows = json.loads((clone / "data/results/lessons_cpu.json").read_text())["lessons"]
    shortest = min(rows, key=lambda row: row["wall seconds"])["lesson"] + ".ipynb"
    mine, theirs = clone / "lessons" / shortest, clone / "notebooks" / shortest
    assert mine.read_bytes() == theirs.read_bytes()
    lesson = nbformat.read(mine, as_version=4)
    lesson.cells.append(nbformat.v4.new_code_cell("pl.__file__"))
    execute(lesson, mine.parent)
    assert str(clone / "peftlab") in lesson.cells.pop().outputs[0].data["text/plain"]
    nbformat.write(lesson, mine)
    assert mine.read_bytes() != theirs.read_bytes()
    assert git(clone, "status", "--porcelain") == ""
    shutil.copy(mine, theirs)  # as it was before there was `start`
    assert git(clone, "status", "--porcelain") == f" M notebooks/{shortest}\n"
