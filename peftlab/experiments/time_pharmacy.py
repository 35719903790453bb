"""How long LoRA takes to make SmolLM2-135M answer about twenty medicines on this machine:
`python -m peftlab.experiments.time_pharmacy`.

Three seeds with the settings of lesson 11, scored on the test before and after, into
`data/results/time_pharmacy.json`. Only the training is timed, scoring is not.
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

BASE, MEDICINES = "smollm2-135m", 20
METHOD = LoRA(r=8, alpha=16, target_modules="all-linear")
STEPS, RATE, BATCH_SIZE = 50, 4e-3, 8
SEEDS = (0, 1, 2)


def run(base, task, seed: int) -> dict:
    """One training run and its scores."""
    with attach(base, METHOD, seed=seed) as tuned:
        given = dict(steps=STEPS, lr=RATE, batch_size=BATCH_SIZE, seed=seed)
        done = train(tuned, task, **given, progress=False, evaluate=False)
        scores = task.score(tuned)
    row = {
        "seed": seed,
        "seconds": round(done.seconds, 1),
        "last_loss": round(sum(record["loss"] for record in done.records[-10:]) / 10, 4),
        "after": {name: round(value, 4) for name, value in scores.items()},
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=data_path("results", "time_pharmacy.json"))
    options = parser.parse_args()
    cpu = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    base, task = load(BASE, options.device), load_task("pharmacy", medicines=MEDICINES)
    report = {
        "command": f"python -m peftlab.experiments.time_pharmacy --device {options.device}",
        "date": date.today().isoformat(),
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(options.device),
        "torch": torch.__version__,
        "base": BASE,
        "medicines": MEDICINES,
        "questions": {split: len(getattr(task, split)) for split in ("train", "test")},
        "method": METHOD.to_dict(),
        "steps": STEPS,
        "lr": RATE,
        "batch size": BATCH_SIZE,
        "others at work": round(os.getloadavg()[0], 1),
        "before": {name: round(value, 4) for name, value in task.score(base).items()},
        "runs": [run(base, task, seed) for seed in SEEDS],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
