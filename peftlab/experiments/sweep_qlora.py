"""LoRA beside a base in 32 bits and in four: what is learned, held, and lost in merging.

    python -m peftlab.experiments.sweep_qlora                     # minutes on one processor core
    python -m peftlab.experiments.sweep_qlora --base smollm2-135m --steps 120 --batch 8 --test 96
    python -m peftlab.experiments.sweep_qlora --smoke

Writes `data/results/qlora.json`, one row a run: LoRA and QLoRA with the same rank, alpha, targets,
learning rate, seeds and batches on tiny-gpt and tiny-llama, learning new facts. Each QLoRA is then
tested four ways: beside its codes, as it was trained; merged into the codes; merged into the dense
weights that the codes decode to; and moved beside the original weights, which it never saw.
`loss` is the mean cross entropy of a target token of the test set, in nats.

With `--base` the rows of one more base are put beside those that the file has. It has alpha = 2 r,
and a rate of its own, with which LoRA reached the least loss on dev in a run with another seed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from peftlab.bases import Base, load
from peftlab.bases.anatomy import CODES
from peftlab.bases.data import data_path
from peftlab.experiments import compare_real
from peftlab.methods import NF4, LoRA, QLoRA
from peftlab.tasks import Task
from peftlab.tasks import load as load_task
from peftlab.training import Run, train
from peftlab.tuned import Tuned, attach

PATH = data_path("results", "qlora.json")
BASES = ("tiny-gpt", "tiny-llama")
SEEDS = (0, 1, 2)
STEPS, RATE, BATCH = 150, 2e-3, 16
RATES, TUNING_SEED = (3e-4, 1e-3, 3e-3), 100  # tried with one more base


def methods(alpha: int = 128) -> dict[str, LoRA]:
    """The two that are compared: the same but for the base beneath."""
    adapter = dict(r=8, alpha=alpha, target_modules="all-linear")
    return {"LoRA": LoRA(**adapter), "QLoRA": QLoRA(**adapter)}


METHODS = methods()


@torch.no_grad()
def loss(model, task: Task, examples: list | None = None, size: int = 64) -> float:
    """Mean cross entropy of a target token over the test set or these examples, in nats."""
    total, tokens, examples = 0.0, 0.0, task.test if examples is None else examples
    for start in range(0, len(examples), size):
        batch = task.batch_for(model, examples[start : start + size])
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
        modules = [module for module in base.model.modules() if CODES in vars(module)]
        return {module: vars(module)[CODES].decode().clone() for module in modules}


def merged_ways(
    base: Base, pair: dict[str, LoRA], state: dict, task: Task, generate: bool
) -> dict[str, dict]:
    """A trained QLoRA merged into codes, into decoded weights, or beside the original weights."""
    plain = {f"lora.{name.removeprefix('qlora.')}": tensor for name, tensor in state.items()}
    with attach(base, pair["QLoRA"]) as tuned:
        tuned.load_state(state)
        tuned.merge(requantise=True)
        ways = {"into the codes": tested(tuned, task, generate)}
    with attach(base, pair["LoRA"]) as tuned:
        tuned.load_state(plain)
        ways["on the original weights"] = tested(tuned, task, generate)
    dense = decoded(base)
    originals = {module: module.weight.data for module in dense}
    try:
        for module, weight in dense.items():
            module.weight.data = weight
        with attach(base, pair["LoRA"]) as tuned:
            tuned.load_state(plain)
            tuned.merge()
            ways["into decoded weights"] = tested(tuned, task, generate)
    finally:
        for module, weight in originals.items():
            module.weight.data = weight
    return ways


def one(base: Base, label: str, seed: int, rate: float, task: Task, options) -> dict:
    """One run, and what became of it."""
    generate, pair = not options.base, methods(options.alpha)
    with attach(base, pair[label], seed=seed) as tuned:
        before = loss(tuned, task)
        run = trained(tuned, task, rate, seed, options)
        row = {
            "base": Path(base.name).name,
            "method": label,
            "seed": seed,
            "lr": rate,
            "trained": tuned.count().parameters,
            "seconds": run.seconds,
            "loss before": before,
            **tested(tuned, task, generate=True),
            **({"codes": held(tuned)} if tuned.codes else {}),
        }
        state = tuned.state()
    if label == "QLoRA":
        row["merged"] = merged_ways(base, pair, state, task, generate)
    print({k: v for k, v in row.items() if k not in ("codes", "merged")}, flush=True)
    return _rounded(row)


def trained(tuned: Tuned, task: Task, rate: float, seed: int, options) -> Run:
    """The run that every row is of."""
    given = dict(steps=options.steps, batch_size=options.batch, progress=False, evaluate=False)
    return train(tuned, task, lr=rate, seed=seed, **given)


def tried(options) -> list[dict]:
    """What LoRA reaches on dev with each rate."""
    base, task, found = load(options.base, options.device), load_task("facts"), []
    for rate in RATES:
        with attach(base, methods(options.alpha)["LoRA"], seed=TUNING_SEED) as tuned:
            trained(tuned, task, rate, TUNING_SEED, options)
            found.append({"lr": rate, "dev loss": round(loss(tuned, task, task.dev), 4)})
        print(found[-1], flush=True)
    return found


def of_seed(seed: int, name: str, rate: float, options) -> list[dict]:
    """Both methods on one base with one seed."""
    torch.set_num_threads(1)
    base, task = load(name, options.device), load_task("facts")
    task.test = task.test[: options.test]
    return [one(base, label, seed, rate, task, options) for label in METHODS]


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(path: Path = PATH) -> tuple[dict, pd.DataFrame]:
    """When and how it was made, and one row a run."""
    made = json.loads(path.read_text(encoding="utf-8"))
    return made, pd.DataFrame(made.pop("runs"))


def by_base() -> pd.DataFrame:
    """One row a run of LoRA and of QLoRA, its "label" the base and the method."""
    _, runs = read()
    runs["label"] = runs["base"] + ": " + runs["method"]
    runs["base"] = pd.Categorical(runs["base"], runs["base"].unique())  # in this order
    return runs.sort_values(["base", "method", "seed"])


def by_way() -> pd.DataFrame:
    """One row for each QLoRA and each way to use it after training.

    "worse" is the loss above that of the same adapter beside its codes, in nats.
    """
    _, runs = read()
    rows = []
    for _, run in runs[runs["method"] == "QLoRA"].iterrows():
        for way, scores in run["merged"].items():
            loss = scores["loss"]
            row = {"base": run["base"], "way": way, "seed": run["seed"]}
            rows.append({**row, "loss": loss, "worse": loss - run["loss"]})
    return pd.DataFrame(rows)


def beside_full() -> pd.DataFrame:
    """LoRA and QLoRA on five recorded tasks of small real models, one row a run.

    "part" is the main score over the mean of full fine-tuning there; "end" says whether the rate
    was the first or the last of those tried.
    """
    rows = []
    for name in compare_real.SETTINGS:
        found = compare_real.recorded(name)
        full = found.runs[found.runs["label"] == "Full fine-tuning"][found.main].mean()
        for label in METHODS:
            for _, run in found.runs[found.runs["label"] == label].iterrows():
                part, end = run[found.main] / full, bool(run["at_the_end_of_its_grid"])
                rows.append({"task": name, "label": f"{name}: {label}", "part": part, "end": end})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", help="one more base: a name or a folder")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, default=1, help="seeds at a time")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--test", type=int, help="test examples, from the first on")
    parser.add_argument("--smoke", action="store_true", help="two steps a run")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    options.steps = 2 if options.smoke else options.steps
    options.alpha = 16 if options.base else 128
    torch.set_num_threads(1)
    begun, runs = time.perf_counter(), []
    tries = tried(options) if options.base else []
    rate = min(tries, key=lambda row: row["dev loss"])["lr"] if tries else RATE
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for name in [options.base] if options.base else BASES:
            seeded = partial(of_seed, name=name, rate=rate, options=options)
            runs += [row for rows in pool.map(seeded, SEEDS) for row in rows]
    cpu = f"CPU, {options.workers} of {os.cpu_count()} cores"
    facts = {
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "task": "facts",
        "steps": options.steps,
        "batch size": options.batch,
        "test examples": len(load_task("facts").test[: options.test]),
        "lr": rate,
        **({"tried": tries} if tries else {}),
        "methods": {k: method.to_dict() for k, method in methods(options.alpha).items()},
        "seeds": SEEDS,
        "seconds": round(time.perf_counter() - begun),
    }
    command = "python -m peftlab.experiments.sweep_qlora"
    if options.base:
        made = json.loads(options.out.read_text(encoding="utf-8"))
        name = Path(options.base).name
        made["runs"] = [row for row in made["runs"] if row["base"] != name] + runs
        more = f" --base {name} --device {options.device} --steps {options.steps}"
        more += f" --batch {options.batch}" + (f" --test {options.test}" if options.test else "")
        made.setdefault("more", {})[name] = {"command": f"{command}{more}", **facts}
    else:
        made = {"command": command, **facts, "runs": runs}
    options.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
