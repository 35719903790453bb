"""What training new facts costs of the old ones, step by step and by learning rate:
`python -m peftlab.experiments.forget_rates`.

Full fine-tuning and LoRA with a small and with a large step for the same rate (alpha = 2 r and
16 r), each at four learning rates, three seeds each. At every look: the loss on texts of the world
that the base was trained on, drawn anew, and the share of new facts that it answers, on a fifth of
dev. Into `data/results/forget_rates.json`.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.bases.probes import forgetting
from peftlab.experiments.documents import Writer
from peftlab.methods import FullFineTuning, LoRA, Method
from peftlab.tasks import load as load_task
from peftlab.training import train
from peftlab.tuned import attach

RUNS = [(FullFineTuning(), rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3)]
for alpha, rates in ((16, (6e-4, 2e-3, 6e-3, 2e-2)), (128, (2e-4, 6e-4, 2e-3, 6e-3))):
    RUNS += [(LoRA(r=8, alpha=alpha, target_modules="all-linear"), rate) for rate in rates]
STEPS, LOOK_EVERY, SEEDS = 200, 20, (0, 1, 2)
TEXTS_OF_A_KIND, TEXT_SEED = 4, 20_002  # another seed than the training texts'


def old_texts() -> list[str]:
    """Texts of every kind that the base was trained on, none of which it has read."""
    writer = Writer(seed=TEXT_SEED)
    return [getattr(writer, kind)() for kind in writer.kinds for _ in range(TEXTS_OF_A_KIND)]


def look(tuned, task, texts, before: float) -> dict:
    """How much of the old is lost, and how much of the new is there."""
    known = task.score(tuned, task.dev[::5])
    return {
        "forgotten": round(forgetting(tuned, texts, before), 5),
        "new_facts": round(known["new_facts"], 4),
        "known_facts": round(known["known_facts"], 4),
    }


def run(method: Method, rate: float, seed: int, device: str) -> dict:
    """One training run with its looks."""
    torch.set_num_threads(1)
    base, task, texts = load(device=device), load_task("facts"), old_texts()
    before, looks = base.loss(texts), []

    def on_step(record: dict) -> None:
        if record["step"] % LOOK_EVERY == 0:
            looks.append({"step": record["step"], "loss": round(record["loss"], 4)})
            looks[-1] |= look(tuned, task, texts, before)
            tuned.train(True)

    with attach(base, method, seed=seed) as tuned:
        first = {"step": 0, **look(tuned, task, texts, before)}
        options = dict(steps=STEPS, lr=rate, seed=seed, evaluate=False, progress=False)
        train(tuned, task, on_step=on_step, **options)
    return {
        "title": method.title,
        "method": method.to_dict(),
        "lr": rate,
        "seed": seed,
        "before": round(before, 5),
        "looks": [first, *looks],
    }


def read() -> tuple[dict, pd.DataFrame]:
    """The result as it was written: when and where it was made, and one row for each run."""
    result = json.loads(data_path("results", "forget_rates.json").read_text(encoding="utf-8"))
    return result, pd.DataFrame(result.pop("runs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=data_path("results", "forget_rates.json"))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    cpu = f"CPU, {options.workers} of {os.cpu_count()} cores"
    runs = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        wanted = [(*pair, seed, options.device) for pair in RUNS for seed in SEEDS]
        for found in pool.map(run, *zip(*wanted, strict=True)):
            runs.append(found)
            print(found["title"], found["lr"], found["seed"], found["looks"][-1], flush=True)
    report = {
        "command": "python -m peftlab.experiments.forget_rates"
        + f" --device {options.device} --workers {options.workers}",
        "date": date.today().isoformat(),
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(options.device),
        "torch": torch.__version__,
        "steps": STEPS,
        "batch size": 16,
        "texts": len(old_texts()),
        "runs": runs,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
