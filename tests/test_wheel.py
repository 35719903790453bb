"""A wheel, built from an sdist of the tree, works away from the checkout, its data included."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with an sdist of the tree, and a wheel made from it."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


def test_the_sdist_is_the_checkout(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    tree = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert names == tree | {"PKG-INFO"}


def test_it_carries_the_package_and_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"peftlab"}
    stored = {p.relative_to(ROOT).as_posix() for p in (ROOT / "data").rglob("*") if p.is_file()}
    carried = {name.removeprefix("peftlab/") for name in names if name.startswith("peftlab/data/")}
    assert carried == stored
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_outside_the_checkout(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(site), str(wheel)], check=True)
    code = f"""
from pathlib import Path
import peftlab
assert Path(peftlab.__file__).is_relative_to({str(site)!r}), peftlab.__file__
from peftlab.bases.data import data_path
assert data_path().is_relative_to({str(site)!r}), data_path()
base = peftlab.load("tiny-gpt")
task = peftlab.tasks.load("facts")
tuned = peftlab.attach(base, peftlab.LoRA(r=2))
closed = peftlab.count(peftlab.LoRA(r=2), base.anatomy.shape)
print(tuned.count().parameters, closed, len(task.test))
"""
    path = os.pathsep.join([str(site), os.environ["PYTHONPATH"]])
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    measured, closed_form, examples = map(int, child.stdout.split())
    assert measured == closed_form > 0
    assert examples > 0
