"""What the calculator knows of real models: `python -m peftlab.experiments.trace_calculator`.

For every model, method, type and checkpointing the polynomials of a training step, see
`memory.calculator`; on tensors without numbers, so any machine gives the same. The file is whole
after each of them, and the same command goes on where it was stopped.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

from peftlab.bases.data import data_path
from peftlab.memory.calculator import KINDS, MODELS, key, trace

MODES = (("bfloat16", True), ("bfloat16", False), ("float32", False), ("float32", True))


def wanted(models: list[str], kinds: list[str], modes: int) -> list[tuple]:
    """Settings in the order in which they are most asked for. Float32 is seldom coded."""
    found = [(model, kind, *mode) for mode, kind, model in product(MODES[:modes], kinds, models)]
    return [one for one in found if not (one[1] == "QLoRA" and one[2] == "float32")]


def traced(setting: tuple) -> tuple[str, dict | str]:
    """A trace under its key; a string says why there is none."""
    torch.set_num_threads(1)
    try:
        return key(*setting), trace(*setting)
    except ValueError as error:  # a method that this model does not take
        return key(*setting), str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--modes", type=int, default=len(MODES), help="the first of them")
    parser.add_argument("--checked", action="store_true", help="those of check_calculator first")
    parser.add_argument("--only", nargs="+", help="keys, as the file has them")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="start none after these")
    parser.add_argument("--out", type=Path, default=data_path("results", "calculator_traces.json"))
    options = parser.parse_args()
    start = time.perf_counter()
    report = {"seconds": 0, "traces": {}, "none": {}}
    if options.out.exists():
        report |= json.loads(options.out.read_text(encoding="utf-8"))
    before = report["seconds"]
    settings = wanted(options.models, options.kinds, options.modes)
    if options.checked:
        from peftlab.experiments.check_calculator import CASES

        settings = [(c.model, c.kind, c.dtype, c.checkpointing) for c in CASES]
    if options.only:
        parts = [name.split(" | ") for name in options.only]
        settings = [(*part[:3], len(part) > 3) for part in parts]
    done = report["traces"].keys() | report["none"].keys()
    settings = [setting for setting in dict.fromkeys(settings) if key(*setting) not in done]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(traced, setting) for setting in settings]
        for task in as_completed(tasks):
            if task.cancelled():
                continue
            name, found = task.result()
            report["traces" if isinstance(found, dict) else "none"][name] = found
            report |= {
                "command": "python -m peftlab.experiments.trace_calculator",
                "date": date.today().isoformat(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "seconds": round(before + time.perf_counter() - start),
            }
            aside = options.out.with_suffix(".part")
            text = json.dumps(report, separators=(",", ":"), ensure_ascii=False)
            aside.write_text(text + "\n", encoding="utf-8")
            os.replace(aside, options.out)
            print(f"{time.perf_counter() - start:6.0f} s  {name}", flush=True)
            if time.perf_counter() - start > options.seconds:
                for other in tasks:
                    other.cancel()


if __name__ == "__main__":
    main()
