"""Which versions peftlab installs with, and whether it works with them. Needs `pip install uv`.

    python tests/versions.py resolve                   what each platform and Python would install
    python tests/versions.py lowest --python 3.11      the oldest that pyproject.toml lets in
    python tests/versions.py newest --python 3.13      the newest that it lets in

`resolve` installs nothing. It asks the package index for four sets of versions, wheels only: what a
learner gets with the pins of constraints.txt, everything with the pins, the lowest, and the newest.
The answers, with the megabytes to download, go to `resolved.json` beside this file. uv gives them
because pip takes the markers of a requirement (`platform_system == "Linux"`) from the machine that
it runs on, also when it is asked about another platform.

`lowest` and `newest` make a new virtual environment, install into it and run the tests named in
`TESTS`, or those given. In both, what peftlab does not require itself is the newest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_name("resolved.json")
PYTHONS = ("3.11", "3.12", "3.13")
# uv's name of the platform, and for a Mac the system that it has.
PLATFORMS = {
    "Linux x86_64": ("x86_64-manylinux_2_28", None),
    "Linux arm64": ("aarch64-manylinux_2_28", None),
    "Windows x64": ("x86_64-pc-windows-msvc", None),
    "Windows arm64": ("aarch64-pc-windows-msvc", None),
    "macOS 14 arm64": ("aarch64-apple-darwin", "14.0"),
    "macOS 13 arm64": ("aarch64-apple-darwin", "13.0"),
    "macOS 14 Intel": ("x86_64-apple-darwin", "14.0"),
}
PINNED = ("--constraints", "constraints.txt")
EVERYTHING = ("--extra", "test", "--extra", "real", "--extra", "sweep")
SETS = {
    "learner": (*PINNED, "--extra", "lab"),
    "pins": (*PINNED, *EVERYTHING),
    "lowest": ("--resolution", "lowest-direct", *EVERYTHING),
    "newest": ("--resolution", "highest", *EVERYTHING),
}
# torch and what its build with CUDA brings.
TORCH = re.compile("torch|triton|nvidia-|cuda-")
TESTS = (
    "tests/parity",
    "tests/properties",
    "tests/test_tuned.py",
    "tests/test_adapters.py",
    "tests/test_panels.py",
    "tests/test_figures.py",
    "tests/test_start.py",
)


def uv(*command: str, system: str | None = None) -> subprocess.CompletedProcess:
    """Run uv in the checkout; `system` is the macOS that it resolves for."""
    environment = os.environ | ({"MACOSX_DEPLOYMENT_TARGET": system} if system else {})
    return subprocess.run(
        [sys.executable, "-m", "uv", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def compiled(versions: str, python: str, platform: str | None = None) -> tuple[list[dict], str]:
    """The packages that would be installed, as a lock file lists them; or none, and why."""
    target, system = PLATFORMS[platform] if platform else (None, None)
    answer = uv(
        *("pip", "compile", "--quiet", "--no-config", "--no-header", "--format", "pylock.toml"),
        *("--only-binary", ":all:", "--python-version", python),
        *(["--python-platform", target] if target else []),
        *SETS[versions],
        "pyproject.toml",
        system=system,
    )
    if answer.returncode:
        return [], re.sub(r"\s+", " ", answer.stderr).strip()
    return tomllib.loads(answer.stdout)["packages"], ""


def megabytes(packages: list[dict]) -> int:
    """What there is to download: a wheel of each."""
    return round(sum(package["wheels"][0]["size"] for package in packages) / 1e6)


def direct() -> set[str]:
    """The names of what pyproject.toml requires itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {canonicalize_name(re.match(r"[\w.-]+", line)[0]) for group in groups for line in group}


def resolve() -> int:
    """Ask about every platform, Python and set of versions, and record the answers."""
    rows, names = [], direct()
    for platform, python, versions in product(PLATFORMS, PYTHONS, SETS):
        found, why = compiled(versions, python, platform)
        row = {"platform": platform, "python": python, "versions": versions, "why": why}
        row |= {"packages": len(found), "megabytes": megabytes(found)}
        row["torch megabytes"] = megabytes([p for p in found if TORCH.match(p["name"])])
        if versions in ("lowest", "newest"):
            row["direct"] = {p["name"]: p["version"] for p in found if p["name"] in names}
        rows.append(row)
        told = f"{len(found)} packages, {row['megabytes']} MB" if found else why[:200]
        print(f"{platform:15} {python} {versions:7} {told}", flush=True)
    head = {
        "command": "python tests/versions.py resolve",
        "date": date.today().isoformat(),
        "uv": version("uv"),
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n'
    RECORD.write_text(text, encoding="utf-8")
    return 0


def install(versions: str, python: str, folder: Path) -> Path:
    """A virtual environment with this checkout and those versions; returns its interpreter."""
    wanted, why = compiled(versions, python)
    if not wanted:
        raise SystemExit(f"{versions} does not resolve for Python {python}: {why}")
    listed = folder / f"{versions}.txt"
    lines = [f"{package['name']}=={package['version']}" for package in wanted]
    listed.write_text("\n".join(lines), encoding="utf-8")
    made = folder / "venv"
    interpreter = made / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    into = ("pip", "install", "--quiet", "--no-config", "--python", str(interpreter))
    for command in (
        ("venv", "--quiet", "--no-config", "--seed", "--python", python, str(made)),
        (*into, "--no-deps", "--requirements", str(listed)),
        (*into, "--no-deps", "--editable", "."),
    ):
        if (ran := uv(*command)).returncode:
            raise SystemExit(ran.stderr)
    print(*(line for line in lines if line.split("==")[0] in direct()), sep=", ", flush=True)
    return interpreter


def run(versions: str, python: str, folder: Path, tests: list[str]) -> int:
    """Install those versions and run the tests with them; returns pytest's status."""
    folder.mkdir(parents=True, exist_ok=True)
    interpreter = install(versions, python, folder.resolve())
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PYTHONPYCACHEPREFIX"] = str(folder.resolve() / "pycache")
    command = [str(interpreter), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["resolve", "lowest", "newest"])
    parser.add_argument("tests", nargs="*", default=TESTS, help="instead of those in TESTS")
    parser.add_argument("--python", default=PYTHONS[0], choices=PYTHONS)
    parser.add_argument("--folder", type=Path, help="where the environment is made, and stays")
    options = parser.parse_intermixed_args()
    if options.what == "resolve":
        return resolve()
    if options.folder:
        return run(options.what, options.python, options.folder, options.tests)
    with tempfile.TemporaryDirectory() as folder:
        return run(options.what, options.python, Path(folder), options.tests)


if __name__ == "__main__":
    sys.exit(main())
