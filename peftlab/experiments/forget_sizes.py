"""What was forgotten against the size of the update: `python -m peftlab.experiments.forget_sizes`.

The small task of `sweep_lora`, 40 steps, one seed: full fine-tuning, LoRA with α = 2 r and LoRA
with α = 16 r, each at three learning rates. Every ten steps a run is looked at: ‖ΔW‖ over ‖W‖, all
linear weights together; nats per token forgotten, on questions and answers of the old text; and the
share of new answers right, on test. Into `data/results/forget_sizes.json`, in under a minute of one
core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.experiments import sweep_lora
from peftlab.experiments.sweep_soft import write
from peftlab.methods import FullFineTuning, LoRA, Method
from peftlab.training import train
from peftlab.tuned import Tuned, attach

SEED, STEPS, LOOK_EVERY = 0, 40, 10
ALL = {"target_modules": "all-linear"}
RUNS: list[tuple[str, Method, tuple[float, ...]]] = [
    ("Full fine-tuning", FullFineTuning(), (3e-4, 1e-3, 3e-3)),
    ("LoRA, α = 2r", LoRA(r=8, alpha=16, **ALL), (2e-3, 6e-3, 2e-2)),
    ("LoRA, α = 16r", LoRA(r=8, alpha=128, **ALL), (5e-4, 2e-3, 4e-3)),
]


@torch.no_grad()
def size(tuned: Tuned, originals: dict[str, torch.Tensor]) -> float:
    """‖ΔW‖ over all linear weights together, for deltas beside W and for W that was trained."""
    if tuned.deltas:
        changes = [delta.delta_weight() for delta in tuned.deltas.values()]
    else:
        linears = tuned.anatomy.linears
        changes = [linears[name].weight - W for name, W in originals.items()]
    return math.sqrt(sum(change.square().sum().item() for change in changes))


def run(label: str, method: Method, lr: float, steps: int) -> list[dict]:
    """One training run, a row for each look."""
    base, task, old = load("tiny-gpt"), sweep_lora.facts(), sweep_lora.old_texts()
    before = base.loss(old)
    originals = {name: each.weight.detach().clone() for name, each in base.anatomy.linears.items()}
    whole = math.sqrt(sum(W.square().sum().item() for W in originals.values()))
    rows: list[dict] = []

    def look(record: dict) -> None:
        if record["step"] % LOOK_EVERY and record["step"] != steps:
            return
        found = {"size": size(tuned, originals) / whole, "forgotten": tuned.loss(old) - before}
        found |= sweep_lora.answers(tuned, task, "test")
        found = {key: float(f"{value:.4g}") for key, value in found.items()}
        rows.append({"label": label, "lr": lr, "step": record["step"], **found})
        tuned.train(True)

    with attach(base, method, seed=SEED) as tuned:
        train(
            tuned, task, steps=steps, lr=lr, batch_size=sweep_lora.BATCH, seed=SEED,
            precision="fp32", evaluate=False, progress=False, on_step=look,
        )  # fmt: skip
    return rows


def read() -> tuple[dict, pd.DataFrame]:
    """The result as it was written: when and where it was made, and one row for each look."""
    result = json.loads(data_path("results", "forget_sizes.json").read_text(encoding="utf-8"))
    return result, pd.DataFrame(result.pop("runs"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="two steps a run")
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args(arguments)
    begun, steps = time.process_time(), 2 if options.smoke else STEPS
    torch.set_num_threads(1)
    rows = [row for label, method, rates in RUNS for lr in rates
            for row in run(label, method, lr, steps)]  # fmt: skip
    base = load("tiny-gpt")
    report = {
        "command": "python -m peftlab.experiments.forget_sizes",
        "device": f"CPU, 1 of {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "base": base.digest,
        "steps": steps,
        "batch size": sweep_lora.BATCH,
        "seed": SEED,
        "old text": base.loss(sweep_lora.old_texts()),
        "vocabulary": base.anatomy.shape.vocab,
        "methods": {label: method.to_dict() for label, method, _ in RUNS},
        "cpu seconds": round(time.process_time() - begun),
    }
    write(options.out / "forget_sizes.json", report, {"runs": rows})
    print(f"{len(rows)} looks, {report['cpu seconds']} s of processor")


if __name__ == "__main__":
    main()
