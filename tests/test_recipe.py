"""The README of the package is right: its reading order, and its recipe, followed to the letter."""

import os
import re
import shutil
import subprocess
import sys

import pytest

ORDER = r"## Read it in an afternoon\n(.*?)\n## "
RECIPE = r"## Add a method\n(.*?)\n## "
BLOCK = re.compile(r"^```(python|diff) (\S+)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "peftlab/README.md").read_text(encoding="utf-8")


def test_the_reading_order_is_about_two_thousand_lines(readme, root):
    (order,) = re.findall(ORDER, readme, re.S)
    named = re.findall(r"`([\w/]+\.py)`", order)
    assert len(named) == len(set(named)) >= 10
    lines = sum(len((root / "peftlab" / name).read_text().splitlines()) for name in named)
    assert 1_800 <= lines <= 2_200, lines


def follow(recipe: str, folder) -> list[str]:
    """Make the files that the recipe gives, and add its lines behind the line that it names."""
    changed = []
    for kind, name, text in BLOCK.findall(recipe):
        path = folder / name
        changed.append(name)
        if kind == "python":
            assert not path.exists()
            path.write_text(text, encoding="utf-8")
            continue
        before, *added = text.splitlines()
        assert before.startswith(" ") and added and all(line.startswith("+") for line in added)
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines.count(before[1:]) == 1, f"{name} has not exactly one line {before[1:]!r}"
        at = lines.index(before[1:]) + 1
        lines[at:at] = [line[1:] for line in added]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return changed


def test_the_recipe_gives_a_method_every_proof(readme, root, tmp_path):
    """A toy method in a copy of the package: collected by every proof of VeRA, and it holds."""
    for name in ("peftlab", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "browser", "benchmarks")
        shutil.copytree(root / name, tmp_path / name, ignore=ignored)
    for name in ("data", "notebooks", "README.md", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(root / name)
    (recipe,) = re.findall(RECIPE, readme, re.S)
    assert len(set(follow(recipe, tmp_path))) == 5

    def pytest_in_the_copy(*options: str) -> str:
        proofs = ("tests/properties", "tests/test_memory.py")
        shown = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *proofs],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stdout[-3000:] + shown.stderr[-1000:]
        return shown.stdout

    collected = pytest_in_the_copy("--collect-only", "-n", "0").splitlines()
    own = "test_several_deltas"  # it lists deltas of its own choice
    collected = [line for line in collected if own not in line]
    of_vera = {line.replace("-vera]", "-rank one]") for line in collected if "-vera]" in line}
    assert len({line.split("[")[0] for line in of_vera}) > 20  # proofs, each on its families
    assert of_vera == {line for line in collected if "-rank one]" in line}
    ran = pytest_in_the_copy("-k", "rank and one and (gpt2 or t5)", "-n", "0")
    assert re.search(r"^\d+ passed, \d+ deselected", ran.splitlines()[-1]), ran[-500:]
