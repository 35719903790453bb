"""The set-up cell, run where only what a Colab has is installed.

The files in `colab` list it, of three runtimes. In the newest of them the cell is run whole: the
kernel and its widgets are installed as they are there. For the rest, a CUDA build of torch among
it, the environment has Colab's versions in its metadata, which is all that pip looks at, and behind
them the code of the environment that the tests run in. Of the others there is the metadata alone,
and pip says what it would install. What the cell adds is held at the newest of one day, so that the
tests end the same tomorrow.

What the kernel has imported before the cell runs must stay. transformers need not: no kernel
imports it before a lesson does, and the older runtimes have one below our bound, down to 4.57.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import peftlab
from peftlab.panels.panel import WIDGET

ROOT = Path(__file__).parent.parent


def listed(name: str) -> list[dict[str, str]]:
    """The versions in a list, by distribution, for each of its parts."""
    parts = (ROOT / f"tests/colab/{name}.txt").read_text(encoding="utf-8").split("\n\n")
    return [dict(x.split("==") for x in part.splitlines() if x[0] != "#") for part in parts]


*OLDER, RUNTIME = sorted(path.stem for path in (ROOT / "tests/colab").glob("20*.txt"))
KERNEL, REST = listed(RUNTIME)
[NEWEST] = listed("newest")
# What runs before the cell does, what Colab's own package names one version of, and what is large.
STAYS = {*KERNEL, "jupyter_server", "notebook", "numpy", "pandas", "requests", "torch"}

# Text is generated through the cache, whose name and place in transformers has changed before.
SAID = """
for method in (pl.PromptTuning(3), pl.PrefixTuning(3), pl.LoRA(r=2)):
    with pl.attach(base, method, seed=0) as tuned:
        print(ascii(tuned.generate(["The cat ", "A"], 6)))
"""
# What pip prints, older ones a bar although the cell asks for silence, ends here.
BEHIND_PIP = "-- installed --"


def cell() -> str:
    cells = json.loads((ROOT / "notebooks/00_start_here.ipynb").read_text())["cells"]
    return "".join(next(c for c in cells if c["cell_type"] == "code")["source"])


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> Path:
    """A virtual environment with the distributions of the newest runtime and a `google.colab`."""
    folder = environment(tmp_path_factory.mktemp("colab"))
    pins = [f"{name}=={version}" for name, version in KERNEL.items()]
    made = python(folder, "-m", "pip", "install", "-q", "--no-deps", *pins)
    assert made.returncode == 0, made.stderr
    code = folder / "code"
    (code / "google/colab").mkdir(parents=True)
    (code / "google/colab/__init__.py").touch()
    (code / "google/colab/output.py").write_text(
        "def enable_custom_widget_manager():\n    print('other widgets are on')\n"
    )
    [site] = (folder / "venv/lib").glob("python*/site-packages")
    (site / "code.pth").write_text(f"{code}\n")  # after what pip installs
    for name, version in REST.items():
        record(site, name, version)
        link(name, code)
    return folder


def environment(folder: Path) -> Path:
    """A folder with an empty virtual environment in it."""
    venv.create(folder / "venv", with_pip=True)
    if python(folder, "-m", "pip", "download", "-q", "--no-deps", "six").returncode:
        pytest.skip("no package index can be reached, and the set-up cell installs from one")
    python(folder, "-m", "pip", "uninstall", "-q", "-y", "setuptools")
    return folder


def record(site: Path, name: str, version: str) -> None:
    """For pip, the distribution is installed."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


def link(name: str, code: Path) -> None:
    """This environment's modules of a distribution, as links in a folder."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # of the notebook server, and not imported
        return
    for top in {file.parts[0] for file in distribution.files or ()}:
        place = code / top
        if top not in ("..", "__pycache__") and not top.endswith(".dist-info"):
            place.exists() or place.symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A git repository that holds the files of this checkout as they are."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, and Colab installs from one")
    folder = tmp_path_factory.mktemp("repository")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.split("\0"):
        if name.startswith(("peftlab", "data/", "pyproject", "README", "LICENSE")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    who = ["-c", "user.name=peftlab", "-c", "user.email=peftlab@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "As it is"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def python(colab: Path, *command: str, repository: Path | None = None):
    """Run the environment's Python; a repository stands in for what is at the project's address."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    if repository:
        newest = colab / "newest.txt"
        newest.write_text("".join(f"{name}=={version}\n" for name, version in NEWEST.items()))
        environment |= {
            "PIP_CONSTRAINT": str(newest),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
            "GIT_CONFIG_VALUE_0": peftlab.REPOSITORY,
        }
    program = [str(colab / "venv/bin/python"), *command]
    return subprocess.run(program, cwd=colab, env=environment, capture_output=True, text=True)


def installed(colab: Path) -> dict[str, str]:
    [site] = (colab / "venv/lib").glob("python*/site-packages")
    found = importlib.metadata.distributions(path=[str(site)])
    return {canonicalize_name(d.metadata["Name"]): d.version for d in found}


def test_the_set_up_cell_works_and_leaves_what_colab_runs_on_alone(colab, repository):
    before = installed(colab)
    assert before.items() >= {canonicalize_name(n): v for n, v in (KERNEL | REST).items()}.items()
    program = colab / "cell.py"
    program.write_text(f"""import google.colab.output
{cell()}
print("{BEHIND_PIP}")
print(pl.__file__)
print(len(pl.tasks.load("facts").test), pl.load("tiny-gpt").name)
base = pl.load("tiny-gpt")
{SAID}
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(display_pub_class=CapturingDisplayPublisher)
shell.run_cell("import peftlab as pl; pl.panels.count_explorer()")
print("", *(key for shown in shell.display_pub.outputs for key in shown["data"]), sep="\\n")
""")
    ran = python(colab, str(program), repository=repository)
    assert ran.returncode == 0, ran.stderr
    answers = ran.stdout.partition(f"{BEHIND_PIP}\n")[2].splitlines()
    assert Path(answers[0]).is_relative_to(colab / "venv")
    assert answers[1] == f"{len(peftlab.tasks.load('facts').test)} tiny-gpt"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(SAID, {"pl": peftlab, "base": peftlab.load("tiny-gpt")})
    assert answers[2:5] == said.getvalue().splitlines()  # under another transformers
    assert answers[5] == "other widgets are on"  # anywidget asked for it
    # Displayed, not returned: Colab puts to what is displayed what draws it.
    assert answers[-3:] == [WIDGET, "text/plain", peftlab.panels.STILL]
    after = installed(colab)
    changed = {name for name, version in before.items() if after[name] != version}
    assert {canonicalize_name(name) for name in NEWEST} >= changed
    assert "peftlab" in after and changed.isdisjoint(map(canonicalize_name, STAYS)), changed


def changes(folder: Path, repository: Path, has: dict[str, str]) -> dict[str, tuple[str, str]]:
    """What the cell would replace where this is installed: by name, the versions then and now."""
    environment(folder)
    [site] = (folder / "venv/lib").glob("python*/site-packages")
    for name, version in has.items():
        record(site, name, version)
    program = folder / "cell.py"
    installs, asked = cell().partition("\nimport peftlab")[0], '"install", "-q", address'
    assert asked in installs
    wish = f'"install", "-q", "--dry-run", "--report", {str(folder / "report.json")!r}, address'
    program.write_text(installs.replace(asked, wish))
    ran = python(folder, str(program), repository=repository)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((folder / "report.json").read_text())
    found = [item["metadata"] for item in report["install"]]
    would = {canonicalize_name(about["name"]): about["version"] for about in found}
    assert "peftlab" in would
    before = {canonicalize_name(name): version for name, version in has.items()}
    return {name: (before[name], would[name]) for name in before.keys() & would.keys()}


@pytest.mark.parametrize("runtime", OLDER)
def test_on_an_older_runtime_it_would_leave_what_the_kernel_has_imported_alone(
    runtime, repository, tmp_path
):
    kernel, rest = listed(runtime)
    assert kernel.keys() == KERNEL.keys()
    changed = changes(tmp_path, repository, kernel | rest)
    assert "transformers" in changed  # below our bound, and imported by nothing yet
    assert {canonicalize_name(name) for name in NEWEST} >= changed.keys()
    assert changed.keys().isdisjoint(map(canonicalize_name, {*STAYS, *kernel})), changed


def test_what_the_kernel_has_imported_would_be_seen_to_change(repository, tmp_path):
    """Under a Colab older than ours begin with, numpy 1.26 would be replaced."""
    kernel, rest = listed(OLDER[0])
    assert "numpy" in changes(tmp_path, repository, kernel | rest | {"numpy": "1.26.4"})
