"""LoRA beside a base in 32 bits and in four: what is learned, held, and lost in merging.

    python -m peftlab.experiments.sweep_qlora                     # minutes on one processor core
    python -m peftlab.experiments.sweep_qlora --base FOLDER --steps 12 --batch 4 --test 64
    python -m peftlab.experiments.sweep_qlora --smoke

Writes `data/results/qlora.json`, one row a run: LoRA and QLoRA with the same rank, alpha, targets,
learning rate, seeds and batches on tiny-gpt and tiny-llama, learning new facts. Each QLoRA is then
tested four ways: beside its codes, as it was trained; merged into the codes; merged into the dense
weights that the codes decode to; and moved beside the original weights, which it never saw.
`loss` is the mean cross entropy of a target token of the test set, in nats.

With `--base` the rows of one more base are put beside those that the file has.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from peftlab._data import data_path
from peftlab.bases import Base, load
from peftlab.bases.anatomy import CODED
from peftlab.methods import NF4, LoRA, QLoRA
from peftlab.tasks import Task
from peftlab.tasks import load as load_task
from peftlab.training import train
from peftlab.tuned import Tuned, attach

PATH = data_path("results", "qlora.json")
BASES = ("tiny-gpt", "tiny-llama")
SEEDS = (0, 1, 2)
STEPS, RATE, BATCH = 150, 2e-3, 16
ADAPTER = dict(r=8, alpha=128, target_modules="all-linear")
METHODS = {"LoRA": LoRA(**ADAPTER), "QLoRA": QLoRA(**ADAPTER)}


@torch.no_grad()
def loss(model, task: Task, size: int = 64) -> float:
    """Mean cross entropy of a target token over the test set, in nats."""
    total = tokens = 0.0
    for start in range(0, len(task.test), size):
        batch = task.batch_for(model, task.test[start : start + size])
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        count = int((batch["labels"][:, 1:] >= 0).sum())
        total += model.batch_loss(batch).item() * count
        tokens += count
    return total / tokens


def tested(model, task: Task, generate: bool) -> dict[str, float]:
    """Loss on the test set, and what it answers where that does not take too long."""
    scores = task.score(model) if generate else {}
    return {"loss": loss(model, task), **scores}


def held(tuned: Tuned) -> dict[str, float]:
    """The codes: how many weights, bytes really held, and what 16 bits would take."""
    weights = sum(codes.shape.numel() for codes in tuned.codes.values())
    size = sum(codes.bytes for codes in tuned.codes.values())
    return {
        "weights": weights,
        "bytes": size,
        "bytes in 16 bits": 2 * weights,
        "share": size / (2 * weights),
    }


@torch.no_grad()
def decoded(base: Base) -> dict[torch.nn.Module, torch.Tensor]:
    """What the codes of every module decode to, as the module stores it."""
    with attach(base, NF4()):
        return {m: CODED[m].decode().clone() for m in base.model.modules() if m in CODED}


def merged_ways(base: Base, state: dict, task: Task, generate: bool) -> dict[str, dict]:
    """A trained QLoRA merged into codes, into decoded weights, or beside the original weights."""
    plain = {f"lora.{name.removeprefix('qlora.')}": tensor for name, tensor in state.items()}
    with attach(base, METHODS["QLoRA"]) as tuned:
        tuned.load_state(state)
        tuned.merge(requantise=True)
        ways = {"into the codes": tested(tuned, task, generate)}
    with attach(base, METHODS["LoRA"]) as tuned:
        tuned.load_state(plain)
        ways["on the original weights"] = tested(tuned, task, generate)
    dense = decoded(base)
    originals = {module: module.weight.data for module in dense}
    try:
        for module, weight in dense.items():
            module.weight.data = weight
        with attach(base, METHODS["LoRA"]) as tuned:
            tuned.load_state(plain)
            tuned.merge()
            ways["into decoded weights"] = tested(tuned, task, generate)
    finally:
        for module, weight in originals.items():
            module.weight.data = weight
    return ways


def one(base: Base, label: str, seed: int, task: Task, options) -> dict:
    """One run, and what became of it."""
    generate = not options.base
    with attach(base, METHODS[label], seed=seed) as tuned:
        before = loss(tuned, task)
        run = train(
            tuned, task, steps=options.steps, lr=RATE, batch_size=options.batch, seed=seed,
            progress=False, evaluate=False,
        )  # fmt: skip
        row = {
            "base": Path(base.name).name,
            "method": label,
            "seed": seed,
            "trained": tuned.count().parameters,
            "seconds": run.seconds,
            "loss before": before,
            **tested(tuned, task, generate),
            **({"codes": held(tuned)} if tuned.codes else {}),
        }
        state = tuned.state()
    if label == "QLoRA":
        row["merged"] = merged_ways(base, state, task, generate)
    return _rounded(row)


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(path: Path = PATH) -> tuple[dict, pd.DataFrame]:
    """When and how it was made, and one row a run."""
    made = json.loads(path.read_text())
    return made, pd.DataFrame(made.pop("runs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", help="a folder with one more base")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--test", type=int, help="test examples, from the first on")
    parser.add_argument("--smoke", action="store_true", help="two steps a run")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    options.steps = 2 if options.smoke else options.steps
    torch.set_num_threads(1)
    begun, runs = time.perf_counter(), []
    for name in [options.base] if options.base else BASES:
        base, task = load(name), load_task("facts")
        task.test = task.test[: options.test]
        for seed in SEEDS:
            for label in METHODS:
                runs.append(one(base, label, seed, task, options))
                print({k: v for k, v in runs[-1].items() if k not in ("codes", "merged")})
    facts = {
        "device": f"CPU, 1 of {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "task": "facts",
        "steps": options.steps,
        "batch size": options.batch,
        "test examples": len(task.test),
        "lr": RATE,
        "methods": {label: method.to_dict() for label, method in METHODS.items()},
        "seeds": SEEDS,
        "seconds": round(time.perf_counter() - begun),
    }
    command = "python -m peftlab.experiments.sweep_qlora"
    if options.base:
        made = json.loads(options.out.read_text())
        name = Path(options.base).name
        made["runs"] = [row for row in made["runs"] if row["base"] != name] + runs
        more = f" --base {name} --steps {options.steps} --batch {options.batch}"
        made.setdefault("more", {})[name] = {"command": f"{command}{more}", **facts}
    else:
        made = {"command": command, **facts, "runs": runs}
    options.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
