"""What a forward pass costs with an adapter on, merged or not:
`python -m peftlab.experiments.time_adapters`.

Writes `data/results/time_adapters.json`: for batches of 1 and 32, and for one step of training at
batch 16, the processor time of one thread with each method divided by the plain base's; a step is
divided by one of full fine-tuning. The two are taken in turn on the same tokens, so that whatever
else the machine does falls on both; the median of the ratios of the pairs is kept with its
quartiles. "base" is the base against itself: what two equal things differ by here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from peftlab.bases import Base, load
from peftlab.bases.data import data_path
from peftlab.methods import IA3, FullFineTuning, HoulsbyAdapter, LoRA, Method, ParallelAdapter
from peftlab.tuned import attach

PATH = data_path("results", "time_adapters.json")
LENGTH, WARMUP = 32, 3
METHODS: dict[str, Method | None] = {
    "base": None,
    "Houlsby adapter, m = 8": HoulsbyAdapter(8),
    "Houlsby adapter, m = 64": HoulsbyAdapter(64),
    "Parallel adapter, m = 64": ParallelAdapter(64),
    "(IA)³": IA3(),
    "LoRA, r = 8, all linear": LoRA(r=8, target_modules="all-linear"),
}


def ratios(
    ours: Callable[[], object], plain: Callable[[], object], pairs: int
) -> tuple[float, float, float]:
    """Quartiles of the ratio of two times, taken in turn; the order changes from pair to pair."""

    def seconds(act: Callable[[], object]) -> float:
        start = time.process_time()  # without what waits for other programs
        act()
        return time.process_time() - start

    for _ in range(WARMUP):
        ours(), plain()
    found = []
    for i in range(pairs):
        if i % 2:
            first, second = seconds(ours), seconds(plain)
        else:
            second, first = seconds(plain), seconds(ours)
        found.append(first / second)
    low, middle, high = statistics.quantiles(found, n=4)
    return low, middle, high


def forward(model, ids: torch.Tensor) -> Callable[[], object]:
    """A call of the model without gradients."""

    @torch.inference_mode()
    def act():
        return model(ids)

    return act


def step(model, ids: torch.Tensor) -> Callable[[], object]:
    """One step of AdamW on the next token."""
    optimizer = torch.optim.AdamW(list(model.trainable.values()), lr=1e-6)

    def act():
        logits = model(ids)
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return act


def measure(name: str, pairs: int, only: str | None = None) -> list[dict]:
    """Every method against the base; what is trained is measured against full fine-tuning."""
    base, other, rows = load(name), load(name), []
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(base.tokenizer), (32, LENGTH), generator=generator)

    def note(label: str, what: str, model, plain: Base, batch: int, make) -> None:
        times = pairs * (10 if batch == 1 else 1)  # short ones vary more
        low, middle, high = ratios(make(model, ids[:batch]), make(plain, ids[:batch]), times)
        row = {"label": label, "what": what, "batch": batch, "pairs": times}
        numbers = {"ratio": middle, "low": low, "high": high}
        rows.append(row | {key: round(value, 3) for key, value in numbers.items()})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)

    full = attach(load(name), FullFineTuning())
    for label, method in METHODS.items():
        if only is not None and not label.startswith(only):
            continue
        model = base if method is None else attach(base, method)
        for batch in (1, 32):
            note(label, "forward", model, other, batch, forward)
        if method is not None:
            note(label, "step", model, full, 16, step)
        if isinstance(method, IA3 | LoRA):
            model.merge()
            for batch in (1, 32):
                note(f"{label}, merged", "forward", model, other, batch, forward)
        base.detach()
    return rows


def read() -> tuple[dict, pd.DataFrame]:
    """What was measured: the facts of the file, and a row for each ratio with its quartiles."""
    made = json.loads(PATH.read_text(encoding="utf-8"))
    return made, pd.DataFrame(made.pop("runs"))


def forwards() -> pd.DataFrame:
    """The forward passes: "label", "batch", and the quartiles "low", "ratio" and "high"."""
    _, rows = read()
    return rows[rows["what"] == "forward"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", default="tiny-gpt")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    begun = time.perf_counter()
    torch.set_num_threads(1)
    rows = measure(options.base, options.pairs)
    facts = {
        "command": f"python -m peftlab.experiments.time_adapters --pairs {options.pairs}",
        "base": options.base,
        "device": f"CPU, 1 of {os.cpu_count()} cores, processor time",
        "torch": torch.__version__,
        "tokens a row": LENGTH,
        "date": date.today().isoformat(),
        "seconds": round(time.perf_counter() - begun),
    }
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps(facts, indent=1, ensure_ascii=False)[:-2]
    options.out.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(f"{options.out}: {len(rows)} ratios in {facts['seconds']} s")


if __name__ == "__main__":
    main()
