"""How long one training step takes, today's against an earlier commit's.

    python tests/benchmarks/step_since.py 735d68b --pairs 40

Not collected by pytest: a time is no test. The package of the commit is read from git, under the
name `peftlab_then`, so that both are in one process and take steps in turn, each on one thread. The
median of the ratio of each pair is kept with its quartiles in `data/results/step_since.json`, and
what the first loss of both is.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import warnings
from datetime import date
from pathlib import Path

import torch
from pairs import seconds

import peftlab
from peftlab.bases.data import data_path
from peftlab.experiments.sweep_soft import write

CHECKOUT = Path(__file__).parents[2]
THEN = "peftlab_then"
METHODS = {
    "full fine-tuning": lambda package: package.FullFineTuning(),
    "LoRA": lambda package: package.LoRA(r=8, alpha=16),
    "QLoRA": lambda package: package.QLoRA(r=8, alpha=16),
    "Houlsby adapter": lambda package: package.HoulsbyAdapter(16),
    "(IA)³": lambda package: package.IA3(),
    "prompt tuning": lambda package: package.PromptTuning(20),
    "P-tuning": lambda package: package.PTuning(20),
    "prefix tuning": lambda package: package.PrefixTuning(20),
}
BASES = {"tiny-gpt": "facts", "tiny-llama": "facts", "tiny-bert": "sentiment", "tiny-t5": "facts"}


def package_of(commit: str, folder: Path):
    """The package as it was, under another name."""
    parts = ["git", "archive", commit, "peftlab", "data/bases", "data/tasks", "data/configs"]
    packed = subprocess.run(parts, cwd=CHECKOUT, capture_output=True, check=True).stdout
    tarfile.open(fileobj=io.BytesIO(packed)).extractall(folder, filter="data")
    (folder / "peftlab").rename(folder / THEN)
    for path in (folder / THEN).rglob("*.py"):
        text = re.sub(r"\bpeftlab(?=\b|_adapted|_prefix)", THEN, path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    return __import__(THEN)


def stepper(package, base: str, method, task: str):
    """A function that takes one step and gives its loss."""
    tuned = package.attach(package.load(base), method, seed=0)
    batch = package.tasks.load(task)
    batch = batch.batch_for(tuned, batch.train[:16])
    optimiser = torch.optim.AdamW(list(tuned.trainable.values()), lr=1e-4)
    tuned.train()

    def step() -> float:
        loss = tuned.batch_loss(batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=data_path("results"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        then = package_of(options.commit, Path(folder))
        for base, task in BASES.items():
            for name, make in METHODS.items():
                both = [stepper(p, base, make(p), task) for p in (peftlab, then)]
                first = [step() for step in both]
                for _ in range(4):
                    both[0](), both[1]()
                times = [[seconds(step, "cpu") for step in both] for _ in range(options.pairs)]
                low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
                rows.append(
                    {"base": base, "method": name, "ratio": round(middle, 3)}
                    | {"quartiles": [round(low, 3), round(high, 3)], "pairs": options.pairs}
                    | {"first loss": round(first[0], 4), "first loss then": round(first[1], 4)}
                )
                print(rows[-1], flush=True)
    facts = {
        "command": f"python tests/benchmarks/step_since.py {options.commit}",
        "device": f"1 thread of {os.cpu_count()} CPU cores, processor time",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "geometric mean": round(statistics.geometric_mean(row["ratio"] for row in rows), 3),
        "highest": max(row["ratio"] for row in rows),
    }
    write(options.out / "step_since.json", facts, {"steps": rows})


if __name__ == "__main__":
    main()
