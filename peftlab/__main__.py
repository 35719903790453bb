"""Whether this machine can run the course:  python -m peftlab doctor

One line a question, and what to do where the answer is no. The exit status is 1 if a lesson cannot
run here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from platform import python_version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

LEAST = 1e9  # bytes of disk: lesson 11 exports its model


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


def main(arguments: list[str]) -> int:
    """Print the answers; 0 if every lesson can run here."""
    if arguments != ["doctor"]:
        print("python -m peftlab doctor: whether this machine can run the course")
        return 2
    begun, whole = time.perf_counter(), True
    for good, told in answers():
        print(f"{'yes' if good else 'NO '}  {told}", flush=True)
        whole = whole and good
    end = "ready" if whole else "not ready: see the lines with NO"
    print(f"     {end}, after {time.perf_counter() - begun:.0f} s")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
