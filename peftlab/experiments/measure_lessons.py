"""Every lesson once on one device, and what it took: wall time, memory of its process, of the GPU.

    python -m peftlab.experiments.measure_lessons --device cpu
    python -m peftlab.experiments.measure_lessons --device cuda --gpu-gigabytes 15

Writes `data/results/lessons_cpu.json` or `lessons_cuda.json`, one row a lesson. A lesson runs as it
is, through papermill, with its own parameters and `device`; with `--gpu-gigabytes` its process can
take no more of the GPU than that, and fails if it needs more. A row is kept as long as its notebook
is the same: the same command runs what is missing or has changed, and drops what is gone. With
`--jobs` several run side by side, each in a process of its own, and take longer for it.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from peftlab.bases.data import data_path
from peftlab.experiments.sweep_lesson import Job, run, save

KEPT = ("version", "date", "device", "python", "gpu gigabytes allowed", "wall seconds", "error")


def row_of(path: Path, device: str, gigabytes: float | None, before: dict[str, dict]) -> dict:
    """The lesson's row, as it was if nothing has changed, or of a new run."""
    text = path.read_text(encoding="utf-8")
    job = Job(path.stem, {"device": device}, text, str(path.parent.resolve()), gigabytes)
    old = before.get(path.stem)
    if old and (old["version"], old["gpu gigabytes allowed"]) == (job.version, gigabytes):
        if old["error"] is None:
            return old
    record = run(job)
    peaks = {name: value for name, value in record.items() if name.startswith("peak ")}
    return {"lesson": path.stem, **{name: record.get(name) for name in KEPT}, **peaks}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpu-gigabytes", type=float, help="the most that a process may take")
    parser.add_argument("--jobs", type=int, default=1, help="lessons at a time")
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    out = options.out or data_path("results") / f"lessons_{options.device}.json"
    lessons = sorted(options.notebooks.glob("[0-9]*.ipynb"))
    if not lessons:
        parser.error(f"{options.notebooks} has no lessons")
    before = json.loads(out.read_text(encoding="utf-8"))["lessons"] if out.exists() else []
    rows = {row["lesson"]: row for row in before if row["lesson"] in {p.stem for p in lessons}}
    command = f"python -m peftlab.experiments.measure_lessons --device {options.device}"
    if options.gpu_gigabytes:
        command += f" --gpu-gigabytes {options.gpu_gigabytes:g}"
    if options.jobs > 1:
        command += f" --jobs {options.jobs}"
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        last_first = reversed(lessons)  # the last takes longest
        given = options.device, options.gpu_gigabytes, dict(rows)
        for done in as_completed([pool.submit(row_of, path, *given) for path in last_first]):
            row = done.result()
            rows[row["lesson"]] = row
            found = [rows[path.stem] for path in lessons if path.stem in rows]
            save({"command": command, "cores": os.cpu_count(), "lessons": found}, out)
            print(f"{row['lesson']}: {row['error'] or 'done'}, {row['wall seconds']} s", flush=True)
    return int(any(row["error"] for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
