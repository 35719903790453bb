"""What makes a prompt train: initialisation, learning rate, length and steps, over seeds.

    python -m peftlab.experiments.sweep_prompt --workers 14    # all of it: a GPU, a few minutes
    python -m peftlab.experiments.sweep_prompt --smoke         # the same, two steps a run

Writes `data/results/sweep_prompt.json`: one row a run, with where and when it was made. Lesson 02
draws its heat maps from that file. Four parts, each over the same seeds:

    budget   sentiment, vocabulary initialisation: steps × learning rates
    init     sentiment, 20 virtual tokens, 200 steps: five initialisations × learning rates
    facts    the same on facts, with three initialisations
    length   sentiment, vocabulary initialisation: lengths × learning rates
"""

import argparse
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from peftlab import tasks
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.methods import PromptTuning
from peftlab.training import train
from peftlab.tuned import Tuned, attach

SEEDS = (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
LENGTHS = (1, 5, 20, 50, 100)
STEPS = 200
BUDGETS = {2400: (3e-4, 1e-1), 600: (3e-4, 3e-3, 3e-2, 1e-1, 3e-1), 60: RATES}
WORDS = " great awful"  # for init="text": the two labels of sentiment
INITS = ("vocabulary", "text", "uniform ±0.5", "normal 0.5", "normal like the table")
FACTS_INITS, FACTS_RATES = (
    ("vocabulary", "uniform ±0.5", "normal 0.5"),
    (3e-4, 1e-2, 3e-2, 1e-1, 3e-1),
)


def start(base, init: str, length: int, seed: int) -> Tuned:
    """A base with an untrained prompt that starts as `init`, one of `INITS`, says."""
    if init == "vocabulary":
        return attach(base, PromptTuning(length), seed)
    if init == "text":
        return attach(base, PromptTuning(length, init="text", init_text=WORDS), seed)
    tuned = attach(base, PromptTuning(length, init="random"), seed)
    if init != "uniform ±0.5":
        scale = 0.5 if init == "normal 0.5" else base.anatomy.embedding.weight.std().item()
        noise = torch.randn(tuned.prompt.shape, generator=torch.Generator().manual_seed(seed))
        tuned.prompt.data.copy_(scale * noise)
    return tuned


def plan(steps: int | None = None) -> list[dict]:
    """Every run, none of them twice; `steps` replaces the number of steps of each."""
    runs = []
    for budget, rates in BUDGETS.items():
        runs += grid("sentiment", "vocabulary", 20, budget, rates)
    for init in INITS:
        runs += grid("sentiment", init, 20, STEPS, RATES)
    for init in FACTS_INITS:
        runs += grid("facts", init, 20, STEPS, FACTS_RATES)
    for length in LENGTHS:
        runs += grid("sentiment", "vocabulary", length, STEPS, RATES)
    if steps is not None:
        runs = [run | {"steps": steps} for run in runs]
    return list({json.dumps(run): run for run in runs}.values())


def grid(task: str, init: str, length: int, steps: int, rates) -> list[dict]:
    return [
        dict(task=task, init=init, length=length, steps=steps, lr=lr, seed=seed)
        for lr, seed in itertools.product(rates, SEEDS)
    ]


def read(path: Path | None = None) -> tuple[dict, pd.DataFrame]:
    """What was written: where and when it was made, and a table with one row a run."""
    result = json.loads(
        (path or data_path("results", "sweep_prompt.json")).read_text(encoding="utf-8")
    )
    runs = pd.DataFrame(result.pop("runs"))
    return result, runs


_bases = {}


def one(setting: dict, device: str) -> dict:
    """One run: its setting, scores, mean loss of the first and last ten steps, and norms."""
    if device not in _bases:
        torch.set_num_threads(1)
        _bases[device] = load("tiny-gpt", device=device)
    base, task = _bases[device], tasks.load(setting["task"])
    init, length, seed = setting["init"], setting["length"], setting["seed"]
    with start(base, init, length, seed) as tuned:
        begun = tuned.prompt.detach().clone()
        run = train(
            tuned, task, steps=setting["steps"], lr=setting["lr"], seed=seed,
            precision="fp32", progress=False, evaluate=False,
        )  # fmt: skip
        scores = task.score(tuned)
        prompt = tuned.prompt.detach()
    loss = run.history["loss"]
    found = dict(
        loss_first=loss.head(10).mean(),
        loss_last=loss.tail(10).mean(),
        norm_before=begun.norm(dim=1).mean().item(),
        norm_after=prompt.norm(dim=1).mean().item(),
        moved=(prompt - begun).norm(dim=1).mean().item(),
        seconds=run.seconds,
    )
    rounded = {k: float(f"{v:.4g}") for k, v in {**scores, **found}.items()}
    return setting | rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--smoke", action="store_true", help="two steps a run, the first 30 runs")
    parser.add_argument("--out", type=Path, default=data_path("results", "sweep_prompt.json"))
    options = parser.parse_args()

    runs, begun = plan(2)[:30] if options.smoke else plan(), time.perf_counter()
    print(f"{len(runs)} runs, {sum(run['steps'] for run in runs):,} steps", flush=True)
    base = load("tiny-gpt")
    facts = {
        "command": f"python -m peftlab.experiments.sweep_prompt --workers {options.workers}",
        "base": f"tiny-gpt {base.digest}",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "seeds": list(SEEDS),
        "norm of the table": round(base.anatomy.embedding.weight.norm(dim=1).mean().item(), 3),
        "untrained": {name: tasks.load(name).score(base) for name in ("sentiment", "facts")},
    }
    rows = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for row in pool.map(one, runs, [options.device] * len(runs)):
            rows.append(row)
            if len(rows) % 20 == 0 or len(rows) == len(runs):
                facts["seconds"] = round(time.perf_counter() - begun)
                write(options.out, facts, rows)
                print(f"{len(rows)} runs, {facts['seconds']} s", flush=True)


def write(path: Path, facts: dict, rows: list[dict]) -> None:
    """One row a line, so that a new run changes few lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps(facts, indent=1, ensure_ascii=False)[:-2]
    path.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
