"""How long LoRA takes to learn the new facts on this machine:
`python -m peftlab.experiments.time_facts`.

Three seeds with the settings of lesson 06, scored before and after, into
`data/results/time_facts.json`. Only the training is timed, scoring is not.
"""

import argparse
import json
import os
from datetime import date
from pathlib import Path

import torch

from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.methods import LoRA
from peftlab.tasks import load as load_task
from peftlab.training import train
from peftlab.tuned import attach

METHOD = LoRA(r=8, alpha=128, target_modules="all-linear")
STEPS, RATE = 220, 2e-3
SEEDS = (0, 1, 2)


def run(seed: int, device: str) -> dict:
    """One training run and its scores."""
    base, task = load(device=device), load_task("facts")
    with attach(base, METHOD, seed=seed) as tuned:
        done = train(tuned, task, steps=STEPS, lr=RATE, seed=seed, progress=False)
    return {
        "seed": seed,
        "seconds": round(done.seconds, 1),
        "precision": done.precision,
        "before": {name: round(value, 4) for name, value in done.before.items()},
        "after": {name: round(value, 4) for name, value in done.metrics.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=data_path("results", "time_facts.json"))
    options = parser.parse_args()
    cpu = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    report = {
        "command": f"python -m peftlab.experiments.time_facts --device {options.device}",
        "date": date.today().isoformat(),
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(options.device),
        "torch": torch.__version__,
        "method": METHOD.to_dict(),
        "steps": STEPS,
        "lr": RATE,
        "batch size": 16,
        "runs": [run(seed, options.device) for seed in SEEDS],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in report["runs"]:
        print(row)


if __name__ == "__main__":
    main()
