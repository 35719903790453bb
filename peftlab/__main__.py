"""What one types first: whether this machine can run the course, and the course itself.

    python -m peftlab doctor            one line a question, and what to do where the answer is no
    python -m peftlab start [FOLDER]    the lessons, copied to a folder of your own, in JupyterLab

The exit status of `doctor` is 1 if a lesson cannot run here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from platform import python_version
from urllib.parse import quote

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

LEAST = 1e9  # bytes of disk: lesson 11 exports its model
CHECKOUT = Path(__file__).resolve().parent.parent
FIRST = "00_start_here.ipynb"
COPIED = ".peftlab.json"  # in the learner's folder: a digest of each lesson as it was copied

# --- doctor ------------------------------------------------------------------------------------


def packages() -> tuple[bool, str]:
    """Whether what the lessons need is installed, in versions that they were run with."""
    wrong = []
    for line in importlib.metadata.requires("peftlab") or ():
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": "lab"}):
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} is not {wanted.specifier}")
    if wrong:
        return False, f"{'; '.join(wrong)}: pip install -c constraints.txt -e '.[lab]'"
    return True, "all packages of the lessons, in versions that fit"


def python() -> tuple[bool, str]:
    """The version of Python."""
    wanted, found = importlib.metadata.metadata("peftlab")["Requires-Python"], python_version()
    good = SpecifierSet(wanted).contains(found, prereleases=True)
    return good, f"Python {found}; {wanted} is needed"


def kernel() -> tuple[bool, str]:
    """Whether Jupyter's kernel is this very environment."""
    from jupyter_client.kernelspec import KernelSpecManager

    found = KernelSpecManager().get_kernel_spec("python3").argv[0]  # "python" is the one that asks
    if not os.path.isabs(found) or os.path.realpath(found) == os.path.realpath(sys.executable):
        return True, "Jupyter's kernel python3 runs this environment"
    return False, f"Jupyter's kernel python3 runs {found}: python -m ipykernel install --sys-prefix"


def base() -> tuple[bool, str]:
    """Whether a base loads, and how long a training step takes."""
    import torch

    import peftlab

    torch.manual_seed(0)
    task = peftlab.tasks.load("facts")
    with peftlab.attach(peftlab.load("tiny-gpt"), peftlab.LoRA()) as tuned:
        run = peftlab.train(tuned, task, steps=12, evaluate=False, progress=False)
    seconds = (run.records[-1]["seconds"] - run.records[1]["seconds"]) / 10
    where = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return True, f"tiny-gpt loads and trains: {1000 * seconds:.0f} ms a step of LoRA on {where}"


def memory() -> tuple[bool, str]:
    """Whether the largest lesson fits."""
    import psutil

    from peftlab.bases.data import data_path

    rows = json.loads(data_path("results", "lessons_cpu.json").read_text(encoding="utf-8"))
    most = max(rows["lessons"], key=lambda row: row["peak process bytes"])
    free, need = psutil.virtual_memory().available, most["peak process bytes"]
    told = f"{free / 1e9:.1f} GB of memory free; {most['lesson']} takes {need / 1e9:.1f} GB"
    return free > need, told + ("" if free > need else ": close other programs")


def disk() -> tuple[bool, str]:
    """Whether temporary files have room."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return free > LEAST, f"{free / 1e9:.0f} GB free in {tempfile.gettempdir()}"


def gpu() -> tuple[bool, str]:
    """What a GPU is used for, if there is one."""
    import torch

    from peftlab.training import precision_for

    if not torch.cuda.is_available():
        return True, "no GPU: every lesson runs without, lesson 11 takes its time"
    size = torch.cuda.get_device_properties(0).total_memory / 1e9
    name = torch.cuda.get_device_name(0)
    return True, f"{name}, {size:.0f} GB, in {precision_for('cuda')}: device='cuda' uses it"


def real() -> tuple[bool, str]:
    """Whether the real models of lesson 11 are there; the other lessons do without."""
    from peftlab.bases.real import REAL

    missing = []
    for known in REAL.values():
        try:
            importlib.metadata.version(known.package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(known.install)
    if missing:
        return True, f"without the real models of lesson 11, unless a hub has them: {missing[0]}"
    return True, f"the real models of lesson 11: {', '.join(REAL)}"


def peft() -> tuple[bool, str]:
    """Whether adapters can be taken to PEFT here."""
    try:
        found = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return True, "without PEFT: adapters are written for it all the same; pip install peft"
    return True, f"PEFT {found}, for the lessons' comparison with it"


def writable() -> tuple[bool, str]:
    """Whether adapters can be saved in the working folder."""
    here = os.access(os.getcwd(), os.W_OK)
    return here, f"{os.getcwd()} {'can' if here else 'cannot'} be written to"


QUESTIONS = (python, packages, kernel, base, memory, disk, writable, gpu, real, peft)


def answers(questions: tuple[Callable, ...] = QUESTIONS) -> Iterator[tuple[bool, str]]:
    """The answer to each question; what cannot even be asked is a no."""
    for question in questions:
        try:
            yield question()
        except Exception as error:
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            yield False, f"{question.__name__}: {told}"


def examine() -> int:
    """Print the answers; 0 if every lesson can run here."""
    begun, whole = time.perf_counter(), True
    for good, told in answers():
        print(f"{'yes' if good else 'NO '}  {told}", flush=True)
        whole = whole and good
    end = "ready" if whole else "not ready: see the lines with NO"
    print(f"     {end}, after {time.perf_counter() - begun:.0f} s")
    return 0 if whole else 1


# --- start -------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copied(folder: Path) -> dict[str, str]:
    """The digest of each lesson as it was last copied there, as far as that is known."""
    try:
        known = json.loads((folder / COPIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {name: value for name, value in entries if isinstance(value, str)}


def put(data: bytes, path: Path) -> None:
    """Write a file whole: what stands there is replaced in one step, or not at all."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_bytes(data)
    os.replace(aside, path)


def copy_lessons(lessons: Path, folder: Path) -> dict[str, list[str]]:
    """Copy each lesson that the folder lacks, or still has as it was copied.

    A lesson that the learner changed stays as it is, and so does one that was not copied from here.
    Returns the lessons by what became of them: "new", "newer", "same" or "kept".
    """
    folder.mkdir(parents=True, exist_ok=True)
    known, became = copied(folder), {"new": [], "newer": [], "same": [], "kept": []}
    for lesson in sorted(lessons.glob("*.ipynb")):
        mine, theirs = folder / lesson.name, digest(lesson)
        if not mine.exists():
            happened = "new"
        elif (now := digest(mine)) == theirs:
            happened = "same"
        else:
            happened = "newer" if now == known.get(lesson.name) else "kept"
        if happened in ("new", "newer"):
            put(lesson.read_bytes(), mine)
        if happened != "kept":
            known[lesson.name] = theirs
        became[happened].append(lesson.name)
    put(json.dumps(known, indent=1).encode(), folder / COPIED)
    return became


def root_for(folder: Path) -> Path:
    """The folder that JupyterLab opens: the one that holds both the lessons and the package.

    It is the learner's folder where only the whole disk holds both, where they lie on two disks,
    and where JupyterLab, which shows nothing hidden, would not show the lessons.
    """
    try:
        common = Path(os.path.commonpath([CHECKOUT, folder]))
    except ValueError:  # two drives
        return folder
    hidden = any(part.startswith(".") for part in folder.relative_to(common).parts)
    return folder if hidden or common == Path(common.anchor) else common


def open_lab(root: Path, lesson: Path, browser: bool) -> int:
    """JupyterLab until it ends, which it asks about at Ctrl+C; returns its status."""
    address = quote(f"/lab/tree/{lesson.relative_to(root).as_posix()}")
    options = [f"--ServerApp.root_dir={root}", f"--LabApp.default_url={address}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # as in a container, which has no other user
        options.append("--ServerApp.allow_root=True")
    command = [sys.executable, "-m", "jupyterlab", *options]
    process = subprocess.Popen(command if browser else [*command, "--no-browser"])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # JupyterLab has it too
            pass


def start(folder: Path, lab: bool = True, browser: bool = True) -> int:
    """Copy the lessons to a folder, say what became of each, and open the first in JupyterLab."""
    lessons, folder = CHECKOUT / "notebooks", folder.resolve()
    if not lessons.is_dir():
        _, address = importlib.metadata.metadata("peftlab")["Project-URL"].split(", ")
        print(f"The lessons come with a clone: git clone {address}, and start there.")
        return 2
    if folder == lessons or lessons in folder.parents:
        print(f"The course keeps its own copy in {lessons}: choose another folder.")
        return 2
    try:
        became = copy_lessons(lessons, folder)
    except OSError as error:
        print(f"The lessons cannot be copied to {folder}: {error.strerror}. Choose another folder.")
        return 1
    print(f"{sum(map(len, became.values()))} lessons in {folder}, {len(became['new'])} of them new")
    if became["newer"]:
        print(f"newer than before, because you had not changed them: {', '.join(became['newer'])}")
    if became["kept"]:
        print(f"kept as you changed them: {', '.join(became['kept'])}")
        print("Rename one and start again, and the course's version lies beside it.")
    again = f'python -m peftlab start "{folder}"'
    if not lab:
        print(f"Go on with {again}, or open the folder in your editor.")
        return 0
    if importlib.util.find_spec("jupyterlab") is None:
        print("JupyterLab is missing: pip install -c constraints.txt -e '.[lab]'")
        return 1
    good, told = next(answers((kernel,)))
    if not good:
        print(f"NO   {told}")
    root, package = root_for(folder), CHECKOUT / "peftlab"
    shown = package.relative_to(root).as_posix() if root in package.parents else package
    print(f"JupyterLab opens {FIRST}: choose Run > Run All Cells.")
    print(f"The package that the lessons use is in {shown}, to be read.")
    print(f"Ctrl+C here ends JupyterLab. To go on another day: {again}", flush=True)
    return open_lab(root, folder / FIRST, browser)


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; 2 where it asks for nothing that there is."""
    parser = argparse.ArgumentParser(
        "python -m peftlab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("doctor", help="whether this machine can run the course")
    begin = commands.add_parser("start", help="copy the lessons, and open them in JupyterLab")
    begin.add_argument("folder", nargs="?", type=Path, help="lessons, in the clone")
    begin.add_argument("--no-browser", action="store_true", help="only say where JupyterLab is")
    begin.add_argument("--no-lab", action="store_true", help="only copy")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return examine()
    if options.command == "start":
        folder = options.folder or CHECKOUT / "lessons"
        return start(folder, not options.no_lab, not options.no_browser)
    parser.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
