"""Run a lesson, or the training of a task, many times over: methods, sizes, seeds, anything else.

    python -m peftlab.experiments.sweep_lesson notebooks/06_lora.ipynb --set steps=9,90 --seeds 0 1
    python -m peftlab.experiments.sweep_lesson facts --methods lora ia3 --sizes 4 8 --seeds 0 1 2

A notebook runs through papermill with `method`, `size`, `seed` and whatever `--set` names as its
parameters; each must be one of those in its cell tagged `parameters`. A task trains a method on a
base: `size` is the method's r, num_virtual_tokens or bottleneck (α / r stays), and `--set` takes
model, steps, lr, batch_size and device, and what `tasks.load` takes for this task. A method without
a size is run once.

Runs go to `--workers` processes here, through joblib, or with `--dask ADDRESS` to a Dask cluster. A
worker there may be lost: what it had begun is run by another, and a run that has lost several
workers has failed, while the others go on. Each run leaves one file in `--out`, written when it is
whole: run the same command again, after an interrupt or with more seeds, and only what is missing
is run. A run that failed leaves its error, and is tried again. A notebook that has changed since is
run anew.

`--gpu-gigabytes 15` lets a process take no more of a GPU than that, which is what a free Colab has.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path

from peftlab.methods import METHODS, Method
from peftlab.tasks import NAMES, PUBLIC

SIZES = ("r", "num_virtual_tokens", "bottleneck")  # what a size is, by method
TASK_OPTIONS = {"model": "tiny-gpt", "steps": 200, "lr": None, "batch_size": 16, "device": "auto"}
# What `tasks.load` takes besides the name.
LOAD_OPTIONS = {"letters": ("skill",)} | dict.fromkeys(PUBLIC, ("train", "dev", "test"))
LOAD_OPTIONS["sst2"] += ("answer",)
# The last cell of a lesson, added here: what its process took.
MEASURE = """
import json as _json, platform as _platform, resource as _resource, sys as _sys
_torch, _most = _sys.modules.get("torch"), _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss
_gpu = _torch is not None and _torch.cuda.is_available()
if _gpu:  # `measure` sets torch's counters back, and remembers
    from peftlab.memory import gpu_peak as _peak
print(_json.dumps({
    "device": _torch.cuda.get_device_name() if _gpu else f"CPU, {_platform.machine()}",
    "peak process bytes": _most * (1 if _sys.platform == "darwin" else 1024),
    "peak gpu bytes": _peak() if _gpu else None,
    "peak gpu bytes reserved": _peak("reserved") if _gpu else None,
}))
"""
LIMIT = """
import torch
if torch.cuda.is_available():
    _all = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, {gigabytes} * 2**30 / _all))
"""


@dataclass(frozen=True)
class Job:
    """One run: of the notebook with this text, or of a task if there is none."""

    name: str
    parameters: dict
    notebook: str = ""  # its JSON, so that a worker on another machine needs no file
    folder: str = ""  # to run it in, where that exists
    gigabytes: float | None = None

    @property
    def version(self) -> str:
        """Changes with the notebook's code, not with its outputs and its prose."""
        if not self.notebook:
            return ""
        cells = json.loads(self.notebook)["cells"]
        said = [["".join(c["source"]), c["metadata"]] for c in cells if c["cell_type"] == "code"]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """A name that can be read, and a mark of what is too long or too strange for one."""
        mark = json.dumps([self.parameters, self.gigabytes], sort_keys=True)
        said = "-".join(f"{key}={value}" for key, value in self.parameters.items())
        said = "".join(sign if sign.isalnum() or sign in "-=._" else "_" for sign in said)[:120]
        return f"{self.name}-{said}-{hashlib.sha256(mark.encode()).hexdigest()[:8]}.json"

    def done(self, out: Path) -> bool:
        """Whether the file of this very run is there, and of a run that came to its end."""
        try:
            found = json.loads((out / self.file).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        return found.get("error") is None and found.get("version") == self.version


def run(job: Job) -> dict:
    """What a run gave, or the error that ended it."""
    begun = time.perf_counter()
    try:
        result = run_notebook(job) if job.notebook else run_task(job)
        error = None
    except Exception as problem:  # kept with the run; the others go on
        result, error = {}, said_of(problem)
    return record_of(job, error, time.perf_counter() - begun) | result


def said_of(problem: BaseException) -> str:
    """The last lines of an error."""
    return "".join(traceback.format_exception_only(problem))[-4000:]


def record_of(job: Job, error: str | None, seconds: float | None) -> dict:
    """What is kept of every run."""
    return {
        "name": job.name,
        "parameters": job.parameters,
        "version": job.version,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "gpu gigabytes allowed": job.gigabytes,
        "wall seconds": None if seconds is None else round(seconds, 2),
        "error": error,
    }


def run_notebook(job: Job) -> dict:
    """What the cells said, in order, with time and memory of the kernel."""
    import nbformat
    import papermill

    notebook = nbformat.reads(job.notebook, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    if job.gigabytes:
        limit = LIMIT.format(gigabytes=job.gigabytes)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(limit))
    with tempfile.TemporaryDirectory() as scratch:
        given, ran = Path(scratch, "given.ipynb"), Path(scratch, "ran.ipynb")
        nbformat.write(notebook, given)
        executed = papermill.execute_notebook(
            given,
            ran,
            parameters=job.parameters,
            kernel_name="python3",
            cwd=job.folder if Path(job.folder).is_dir() else scratch,
            progress_bar=False,
        )
    said = [
        {"cell": number, "text": text}
        for number, cell in enumerate(executed.cells)
        if (text := "".join(map(text_of, cell.get("outputs", []))))
    ]
    return {**json.loads(said.pop()["text"]), "said": said}


def text_of(output: dict) -> str:
    """What an output says in plain text; nothing of figures and widgets."""
    if output["output_type"] == "stream":
        return output["text"]
    data = output.get("data", {})
    pictured = any(key.startswith(("image/", "application/vnd")) for key in data)
    return "" if pictured else data.get("text/plain", "") + "\n" * ("text/plain" in data)


def run_task(job: Job) -> dict:
    """Train one method on the task and score it."""
    import torch

    import peftlab

    options = TASK_OPTIONS | job.parameters
    device, cuda = options["device"], torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if str(device).startswith("cuda"):
        if job.gigabytes:
            most = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, job.gigabytes * 2**30 / most))
        torch.cuda.reset_peak_memory_stats()
    with contextlib.redirect_stdout(io.StringIO()):  # it goes into the file
        base = peftlab.load(options["model"], device=device)
    chosen = LOAD_OPTIONS.get(job.name, ())
    task = peftlab.tasks.load(job.name, **{k: v for k, v in options.items() if k in chosen})
    method = sized(options["method"], options.get("size"))
    seed = options.get("seed", 0)
    with peftlab.attach(base, method, seed=seed, head=task.head) as tuned:
        trained = peftlab.train(
            tuned,
            task,
            steps=options["steps"],
            lr=options["lr"],
            batch_size=options["batch_size"],
            seed=seed,
            progress=False,
        )
        count = tuned.count()
    gpu = str(device).startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {platform.machine()}",
        "peak gpu bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "base": {"source": base.source, "digest": base.digest},
        "method": method.to_dict(),
        "trained": count.parameters,
        "stored": count.stored,
        "lr": trained.lr,
        "precision": trained.precision,
        "train seconds": round(trained.seconds, 2),
        "before": trained.before,
        "metrics": trained.metrics,
        "loss": [record["loss"] for record in trained.records],
    }


def size_of(method: str) -> str | None:
    """The hyper-parameter that is this method's size, if it has one."""
    names = [field.name for field in fields(METHODS[method])]
    return next((name for name in SIZES if name in names), None)


def sized(method: str, size: int | None) -> Method:
    """The method with its defaults and this size; α is scaled along, so that α / r stays."""
    plain = METHODS[method]()
    if size is None:
        return plain
    name = size_of(method)
    change = {name: size}
    if name == "r" and hasattr(plain, "alpha"):
        change["alpha"] = plain.alpha * size / plain.r
    return replace(plain, **change)


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every combination. Raises ValueError for what the notebook or the task does not take."""
    grid: dict[str, list] = {}
    for name, values in (("method", options.methods), ("size", options.sizes)):
        if values:
            grid[name] = values
    grid |= dict(setting(text) for text in options.set)
    grid["seed"] = options.seeds
    path = Path(options.what)
    if path.suffix == ".ipynb":
        notebook, taken = path.read_text(encoding="utf-8"), parameters_of(path)
        common = {"notebook": notebook, "folder": str(path.parent.resolve())}
    elif options.what in (*NAMES, *PUBLIC):
        taken = ["method", "size", "seed", *TASK_OPTIONS, *LOAD_OPTIONS.get(options.what, ())]
        common = {}
        unknown = [name for name in grid.get("method", ["none"]) if name not in METHODS]
        if unknown:
            raise ValueError(f"method {unknown[0]!r}: allowed is {', '.join(sorted(METHODS))}")
    else:
        raise ValueError(f"{options.what!r} is neither a notebook nor a task: {', '.join(NAMES)}")
    if foreign := [name for name in grid if name not in taken]:
        raise ValueError(
            f"{options.what} has no parameter {foreign[0]!r}: it has {', '.join(taken)}"
        )
    found = {}
    for values in itertools.product(*grid.values()):
        parameters = dict(zip(grid, values, strict=True))
        if not common and size_of(parameters["method"]) is None:
            parameters.pop("size", None)
        job = Job(path.stem, parameters, gigabytes=options.gpu_gigabytes, **common)
        found[job.file] = job
    return list(found.values())


def parameters_of(path: Path) -> list[str]:
    """Names in the notebook's cell tagged `parameters`."""
    import papermill

    with contextlib.redirect_stderr(io.StringIO()):
        return list(papermill.inspect_notebook(path))


def setting(text: str) -> tuple[str, list]:
    """'steps=20,60' as a name and its values: numbers where they are ones."""
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise ValueError(f"--set {text!r}: NAME=VALUE or NAME=VALUE,VALUE is needed")
    return name, [value_of(value) for value in values.split(",")]


def value_of(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def save(record: dict, path: Path) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def results(missing: list[Job], workers: int, dask: str | None) -> Iterator[tuple[Job, dict]]:
    """Each job with its result, as they come in."""
    try:
        yield from on_cluster(missing, dask) if dask else in_processes(missing, workers)
    except ImportError as error:
        raise SystemExit("a sweep needs more packages: pip install 'peftlab[sweep]'") from error


def in_processes(missing: list[Job], workers: int) -> Iterator[tuple[Job, dict]]:
    """Runs on this machine."""
    import joblib

    with joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        calls = (joblib.delayed(numbered)(i, job) for i, job in enumerate(missing))
        for number, record in joblib.Parallel(return_as="generator_unordered")(calls):
            yield missing[number], record


def on_cluster(missing: list[Job], address: str) -> Iterator[tuple[Job, dict]]:
    """Runs on a Dask cluster, whose scheduler gives a lost worker's run to another."""
    from distributed import Client, as_completed

    with Client(address) as client:
        begun = {client.submit(run, job, pure=False): job for job in missing}
        for future in as_completed(begun):
            lost = future.exception()  # `run` raises nothing itself
            job = begun.pop(future)
            yield job, future.result() if lost is None else record_of(job, said_of(lost), None)


def numbered(number: int, job: Job) -> tuple[int, dict]:
    return number, run(job)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", help="a notebook, or the name of a task")
    parser.add_argument("--methods", nargs="+", help="such as lora prefix_tuning")
    parser.add_argument("--sizes", nargs="+", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--dask", metavar="ADDRESS", help="of a scheduler, such as tcp://host:8786")
    parser.add_argument("--gpu-gigabytes", type=float, help="the most that a process may take")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    try:
        every = jobs(options)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    missing = [job for job in every if not job.done(options.out)]
    print(f"{len(every)} runs, {len(every) - len(missing)} of them done", flush=True)
    failed = 0
    for job, record in results(missing, options.workers, options.dask):
        save(record, options.out / job.file)
        failed += record["error"] is not None
        state = "failed" if record["error"] else "done"
        print(f"{job.file}: {state}, {record['wall seconds']} s", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
