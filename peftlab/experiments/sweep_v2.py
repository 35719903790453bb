"""P-tuning v2 on entities: how deep, and what becomes of it where the sequence grows instead.

    python -m peftlab.experiments.sweep_v2 --workers 14                            # one GPU
    python -m peftlab.experiments.sweep_v2 --part depth --seeds 2 --device cpu     # or less of it

Writes `data/results/v2_apart.json`, one row a run; a part that is run again replaces its rows:

    growing  virtual tokens put in front of every layer's output, so that the sequence grows:
             three learning rates on dev, then the seeds, as in `sweep_soft`'s families
    depth    the upper 1, 2, … 6 layers
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from torch.nn import functional as F

from peftlab import tasks
from peftlab.bases import Anatomy, load
from peftlab.bases.data import data_path
from peftlab.experiments.sweep_soft import SEEDS, TABLE, TUNING_SEED, best, write
from peftlab.methods import Method, PTuningV2
from peftlab.methods.prompt_networks import Flat
from peftlab.methods.prompt_starts import initial_prompt
from peftlab.methods.soft import put
from peftlab.sites import Site, Source
from peftlab.training import train
from peftlab.tuned import attach

PATH = data_path("results", "v2_apart.json")
STEPS = 120  # as in the families of `sweep_soft`
PARTS = ("growing", "depth")


@dataclass(frozen=True)
class GrowingPrompts(Method, listed=False):
    """Prompts in front of each layer's output, as in the sources' code: not a published method.

        h ← [P_l; h] after layer l,   so that T tokens have become T + L · P at the end

    P_l (P, d_model), L of them: P · L · d_model numbers. Layer 1 sees no prompt, and P_L is seen
    by nobody. The code as it stands fails on a padded batch: here the mask grows as well, and the
    head reads the last T states, those of the text. BERT alone.
    """

    num_virtual_tokens: int = 20

    name: ClassVar[str] = "growing_prompts"
    title: ClassVar[str] = "Growing prompts"
    learning_rate: ClassVar[float] = 0.1

    def reach(self, base, attachment, generator):
        count, layers = self.num_virtual_tokens, base.anatomy.shape.layers
        drawn = [initial_prompt(base, "vocabulary", None, count, generator) for _ in range(layers)]
        read = put(attachment, Flat({"prompt": torch.stack(drawn)}))
        attachment.enter(Growing(base.anatomy, read))

    def parameters(self, shape):
        """P · L · d_model."""
        return self.num_virtual_tokens * shape.layers * shape.d_model


class Growing(Site):
    """Behind each layer, `read()["prompt"][layer]` (P, d_model) in front of its output."""

    def __init__(self, anatomy: Anatomy, read: Source):
        super().__init__("growing")
        self.anatomy, self.read = anatomy, read

    def __enter__(self):
        ((_, blocks),) = self.anatomy.layers.items()
        self.hooks = [self.anatomy.backbone.register_forward_hook(self._cut)]
        for layer, block in enumerate(blocks):
            self.hooks.append(block.register_forward_pre_hook(self._widen, with_kwargs=True))
            self.hooks.append(block.register_forward_hook(partial(self._grow, layer)))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _widen(self, block, args, kwargs):
        hidden, mask, *rest = args
        if mask is not None:  # an encoder's rows are alike: which keys are padding
            missing = hidden.shape[1] - mask.shape[-1]
            seen = True if mask.dtype == torch.bool else 0
            mask = F.pad(mask[:, :, :1], (missing, 0), value=seen)
        return (hidden, mask, *rest), kwargs

    def _grow(self, layer, block, args, hidden):
        prompt = self.read()["prompt"][layer].to(hidden.dtype)
        return torch.cat([prompt.expand(len(hidden), -1, -1), hidden], dim=1)

    def _cut(self, stack, args, output):
        added = sum(map(len, self.read()["prompt"]))
        output.last_hidden_state = output.last_hidden_state[:, added:]
        return output


@dataclass(frozen=True)
class Job:
    """One run of `STEPS` steps at a batch of 16."""

    part: str
    setting: float
    method: Method
    lr: float
    seed: int
    split: str = "test"


def jobs(part: str, seeds: tuple[int, ...]) -> list[Job]:
    """The runs of one part; those of `growing` that choose its rate."""
    if part == "growing":
        return growing_jobs(TABLE, (TUNING_SEED,), "dev")
    return [Job(part, d, PTuningV2(20, depth=d), 0.1, seed) for d in range(1, 7) for seed in seeds]


def growing_jobs(rates, seeds, split) -> list[Job]:
    """The growing sequence under these rates and seeds."""
    return [
        Job("growing", lr, GrowingPrompts(20), lr, seed, split) for lr in rates for seed in seeds
    ]


_bases = {}


def one(job: Job, device: str, steps: int | None) -> dict:
    """Train, and score on the split."""
    torch.set_num_threads(1)
    if device not in _bases:
        _bases[device] = load("tiny-bert", device=device)
    task = tasks.load("entities")
    with attach(_bases[device], job.method, seed=job.seed, head=task.head) as tuned:
        run = train(
            tuned, task, steps=steps or STEPS, lr=job.lr, seed=job.seed,
            precision="fp32", progress=False, evaluate=False,
        )  # fmt: skip
        examples = getattr(task, job.split)
        scores = task.score(tuned, examples[:20] if steps else examples)
        count, label = tuned.count(), tuned.label
    found = scores | {"loss_last": run.history["loss"].tail(10).mean(), "seconds": run.seconds}
    return {
        "part": job.part,
        "setting": job.setting,
        "label": label,
        "steps": steps or STEPS,
        "lr": job.lr,
        "seed": job.seed,
        "metric": task.main,
        "trained": count.parameters,
        **{key: float(f"{value:.4g}") for key, value in found.items()},
    }


def measure(part: str, seeds, device: str, workers: int, steps: int | None) -> dict:
    """One part; the growing sequence in two rounds, the second at the rate that was best on dev."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:

        def submit(wanted: list[Job]) -> list[dict]:
            futures = [pool.submit(one, job, device, steps) for job in wanted]
            return [future.result() for future in futures]

        rows = submit(jobs(part, seeds))
        if part != "growing":
            return {"tried": [], "runs": rows}
        return {"tried": rows, "runs": submit(growing_jobs((best(rows),), seeds, "test"))}


def read(path: Path = PATH) -> tuple[dict, pd.DataFrame]:
    """When and where each part was made, and one row for each final run."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return result["parts"], pd.DataFrame(result["runs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--smoke", action="store_true", help="two steps a run")
    parser.add_argument("--out", type=Path, default=PATH.parent)
    options = parser.parse_args()
    path, seeds = options.out / PATH.name, tuple(range(options.seeds))
    for part in options.part:  # each is written when it is ready; the others stay
        begun = time.perf_counter()
        made = measure(part, seeds, options.device, options.workers, 2 if options.smoke else None)
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        facts = {
            "command": f"python -m peftlab.experiments.sweep_v2 --part {part!r} "
            f"--seeds {options.seeds} --workers {options.workers}",
            "base": load("tiny-bert").digest,
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "seconds": round(time.perf_counter() - begun),
        }
        kept = {
            key: [row for row in stored.get(key, []) if row["part"] != part] + rows
            for key, rows in made.items()
        }
        write(path, {"parts": stored.get("parts", {}) | {part: facts}}, kept)
        print(f"{part}: {len(made['runs'])} runs, {facts['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
