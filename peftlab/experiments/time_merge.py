"""What an adapter costs when the model runs, merged and not:
`python -m peftlab.experiments.time_merge`.

Whole forward passes of tiny-gpt, 32 tokens a row, at batch 1 and 32, into
`data/results/time_merge.json`. In every round each model runs once, in an order drawn anew, and its
time is divided by the plain base's of that round, so that whatever else the machine does falls on
all alike. A second copy of the plain base runs along: how far its ratio is from 1 is the noise.
Blocks of rounds give a median each; a row holds them all.
"""

import argparse
import json
import os
import random
import statistics
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.methods import AdaLoRA, DoRA, LoRA, PiSSA, VeRA
from peftlab.tuned import attach

LENGTH, BATCHES, WARMUP, SEED = 32, (1, 32), 3, 0
PLAIN, TWIN = "plain", "plain, second copy"
ALL = {"target_modules": "all-linear"}
METHODS = {
    "LoRA, q and v": LoRA(r=8),
    "LoRA": LoRA(r=8, **ALL),
    "PiSSA": PiSSA(r=8, **ALL),
    "VeRA": VeRA(r=256, **ALL),
    "AdaLoRA": AdaLoRA(**ALL),
    "DoRA": DoRA(r=8, **ALL),
}
FILE = data_path("results", "time_merge.json")


def models(device: str) -> dict:
    """The plain base twice, each method beside its weights, and LoRA and DoRA merged into them."""
    made = {PLAIN: load(device=device), TWIN: load(device=device)}
    for name, method in METHODS.items():
        for merged in (False, True) if name in ("LoRA", "DoRA") else (False,):
            tuned = attach(load(device=device), method, seed=SEED)
            with torch.no_grad():
                for parameter in tuned.trainable.values():
                    parameter += 0.01 * torch.randn_like(parameter)
            if merged:
                tuned.merge()
            made[f"{name}, merged" if merged else name] = tuned
    return made


def seconds(model, ids) -> float:
    """One forward pass."""
    start = time.perf_counter()
    model(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(made: dict, batch: int, blocks: int, rounds: int, device: str) -> list[dict]:
    """A row for each model: its milliseconds, and its ratios to the plain base by block."""
    ids = torch.randint(2048, (batch, LENGTH), device=device)
    order, dice = list(made), random.Random(SEED)
    times = {name: [] for name in made}
    for turn in range(-WARMUP, blocks * rounds):
        dice.shuffle(order)
        taken = {name: seconds(made[name], ids) for name in order}
        if turn >= 0:
            for name, value in taken.items():
                times[name].append(value)
    rows = []
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[PLAIN], strict=True)]
        medians = [statistics.median(ratios[i : i + rounds]) for i in range(0, len(ratios), rounds)]
        rows.append(
            {
                "model": name,
                "batch": batch,
                "milliseconds": round(1000 * statistics.median(values), 3),
                "ratio": round(statistics.median(ratios), 4),
                "ratio by block": [round(value, 4) for value in medians],
            }
        )
    return rows


def read(path: Path = FILE) -> tuple[dict, pd.DataFrame]:
    """What was measured: how, and a row for each model and batch."""
    made = json.loads(path.read_text(encoding="utf-8"))
    return made, pd.DataFrame(made.pop("rows"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    cpu = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    made, rows = models(options.device), []
    for batch in BATCHES:
        rows += measure(made, batch, options.blocks, options.rounds, options.device)
    report = {
        "command": f"python -m peftlab.experiments.time_merge --device {options.device}",
        "date": date.today().isoformat(),
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(options.device),
        "torch": torch.__version__,
        "tokens a row": LENGTH,
        "rounds a block": options.rounds,
        "methods": {name: method.to_dict() for name, method in METHODS.items()},
        "rows": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
