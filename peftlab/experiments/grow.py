"""Pre-train five decoders of 0.2 to 58 million parameters on the same documents, for the study of
scale: `python -m peftlab.experiments.grow --bases FOLDER --device cuda`.

All have the architecture of `tiny-gpt`, its tokenizer and its world, read as many tokens, and
differ in width and depth alone. The learning rate of each is the best of short trials. Writes the
bases to FOLDER, which is to be named in `PEFTLAB_BASES` afterwards, and what they are to
`data/results/grown.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from peftlab.bases.data import data_path
from peftlab.experiments import pretrain

# name: layers, width, heads, learning rates to try
SIZES = {
    "grown-0.2m": (3, 48, 3, (8e-3, 1.6e-2, 3.2e-2)),
    "grown-0.8m": (5, 96, 6, (4e-3, 8e-3, 1.6e-2)),
    "grown-3m": (6, 192, 6, (2e-3, 4e-3, 8e-3)),
    "grown-13m": (7, 384, 12, (1e-3, 2e-3, 4e-3)),
    "grown-58m": (8, 768, 12, (2.5e-4, 5e-4, 1e-3)),
}
TOKENS = 4e7  # read by each, out of as many that were written
KEPT = (
    *("parameters", "device", "seed", "date", "versions", "distinct tokens", "tokens trained"),
    *("training", "loss curve", "held-out loss", "known facts"),
)


def options_of(name: str, options) -> list[str]:
    """The arguments of `pretrain` for one size."""
    layers, width, heads, rates = SIZES[name]
    given = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "tokens": options.tokens,
        "distinct": options.tokens,
        "corpus": options.bases / "corpus.pickle",
        "device": options.device,
        "trial-steps": options.trial_steps,
        "out": options.bases / name,
    }
    listed = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
    return [*listed, "--lr", *map(str, rates)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bases", type=Path, required=True, help="the folder to write them to")
    parser.add_argument("--tokens", type=float, default=TOKENS)
    parser.add_argument("--trial-steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=data_path("results", "grown.json"))
    options = parser.parse_args()
    options.bases.mkdir(parents=True, exist_ok=True)
    pretrain.written(pretrain.parse(options_of(next(iter(SIZES)), options)), print)
    module = [sys.executable, "-m", "peftlab.experiments.pretrain"]
    running = {
        name: subprocess.Popen([*module, *options_of(name, options)]) for name in reversed(SIZES)
    }
    if failed := [name for name, process in running.items() if process.wait()]:
        raise SystemExit(f"{', '.join(failed)}: not trained")
    found = {}
    for name in SIZES:
        text = (options.bases / name / "datasheet.json").read_text(encoding="utf-8")
        found[name] = {key: value for key, value in json.loads(text).items() if key in KEPT}
    command = f"python -m peftlab.experiments.grow --bases FOLDER --device {options.device}"
    text = json.dumps({"command": command, "bases": found}, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
