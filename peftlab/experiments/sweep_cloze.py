"""P-tuning where the paper probed it: facts that a frozen encoder knows, asked without a word.

    python -m peftlab.experiments.sweep_cloze              # minutes on one processor core
    python -m peftlab.experiments.sweep_cloze --smoke

Writes `data/results/p_tuning_cloze.json`, one row a run, all on tiny-bert with nine virtual tokens:

    place    nine vectors at five places without an encoder, and all in front with the LSTM
    encoder  eight ways to make them, of the paper's code, a library and two sources, in the
             paper's template

Each entry has the same number of tries: three learning rates, each run once with a seed that is
not used again and scored on dev; the best one is run on the seeds and scored on test.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from peftlab.bases import Base, load
from peftlab.bases.data import data_path
from peftlab.experiments.sweep_soft import NETWORK, TABLE, TUNING_SEED, best, write
from peftlab.methods import Method, PTuning
from peftlab.methods.prompt_networks import seeded
from peftlab.methods.prompt_starts import initial_prompt
from peftlab.methods.soft import blocks, put
from peftlab.sites import InputEmbeddings
from peftlab.tasks import Example, Task, share
from peftlab.training import train
from peftlab.tuned import attach

PATH = data_path("results", "p_tuning_cloze.json")
BASE, ATTRIBUTE, STEPS, SEEDS = "tiny-bert", "home", 100, (0, 1, 2, 3, 4)
COUNT = 9
TEMPLATE = [(3, "front"), (3, "before [MASK]"), (3, "after [MASK]")]
PLACES = {
    "template 3-3-3": TEMPLATE,
    "all in front": [(9, "front")],
    "all before the mask": [(9, "before [MASK]")],
    "all behind the mask": [(9, "after [MASK]")],
    "around the text": [(5, "front"), (4, "after [MASK]")],
}


class Probe(Task):
    """A person's name and a gap; the one right token is a fact that the base has read.

    As in LAMA, the people of train, dev and test are different, so nothing can be remembered:
    what is learned is how to ask.
    """

    name = "probe"
    title = "Asking for a fact"
    main = "exact"
    max_new_tokens = 1

    @classmethod
    def load(cls, attribute: str = ATTRIBUTE, words: str = "") -> Probe:
        """400 people to train on, 200 for dev, 600 for test; `words` stand behind the name."""
        people = json.loads(data_path("world", "world.json").read_text(encoding="utf-8"))["people"]
        made = [Example(p["name"] + words, f" {p[attribute]}") for p in people[:1200]]
        return cls(made[:400], made[400:600], made[600:])

    def answers(self, model, examples) -> list[str]:
        """The most probable token of all in each gap."""
        logits, wanted = model.aligned(self.batch_for(model, examples))  # (batch, n, vocab)
        return model.tokenizer.batch_decode(logits[wanted >= 0].argmax(dim=-1)[:, None])

    def grade(self, examples, outputs) -> dict[str, float]:
        """`exact`: the share of gaps with the right token."""
        return {"exact": share(e.target == o for e, o in zip(examples, outputs, strict=True))}


class _Hidden(nn.Module):
    """The outputs of one LSTM over a table: no second direction, no MLP."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table)
        self.lstm = nn.LSTM(table.shape[1], table.shape[1], batch_first=True)

    def forward(self) -> dict[str, Tensor]:
        return {"prompt": self.lstm(self.table[None])[0][0]}


@dataclass(frozen=True)
class BareLSTM(Method, listed=False):
    """A source's encoder, with the table that its code lacks: not a published method.

        P = LSTM(E)      E (num_virtual_tokens, d_model), hidden d_model, one direction, no MLP

    Every number of P lies between −1 and 1. The table has P·d numbers, the LSTM 8 d² + 8 d.
    """

    num_virtual_tokens: int = COUNT

    name: ClassVar[str] = "bare_lstm"
    title: ClassVar[str] = "Bare LSTM"
    learning_rate: ClassVar[float] = 3e-3

    def reach(self, base, attachment, generator):
        table = initial_prompt(base, "vocabulary", None, self.num_virtual_tokens, generator)
        with seeded(generator):
            module = _Hidden(table)
        read = put(attachment, module)
        placement = PTuning(self.num_virtual_tokens, placement=TEMPLATE).placement
        places = blocks(base, placement, self.num_virtual_tokens)
        attachment.enter(InputEmbeddings(base.anatomy, read, places))
        attachment.virtual_tokens = self.num_virtual_tokens

    def parameters(self, shape) -> int:
        """P·d + 8 d² + 8 d."""
        d = shape.d_model
        return self.num_virtual_tokens * d + 8 * d * d + 8 * d

    def stored(self, shape) -> int:
        """num_virtual_tokens · d_model."""
        return self.num_virtual_tokens * shape.d_model


def encoders() -> dict[str, Method]:
    """Who describes which network; all in the paper's template."""
    kinds = {
        "none (prompt tuning)": {"encoder": "embedding"},
        "LSTM, paper's LAMA code": {},
        "MLP, paper's LAMA sizes": {"encoder": "mlp"},
        "LSTM, paper's few-shot code": {"sizes": "few-shot"},
        "LSTM, PEFT": {"sizes": "peft"},
        "MLP, PEFT": {"encoder": "mlp", "sizes": "peft"},
        "attention, source S0-05": {"encoder": "attention"},
    }
    made = {label: PTuning(COUNT, placement=TEMPLATE, **kind) for label, kind in kinds.items()}
    return {**made, "bare LSTM, source S4-36": BareLSTM()}


def entries() -> list[tuple[str, str, Method]]:
    """(place, encoder, method) of everything that is measured."""
    template, *others = PLACES
    none, lstm, *_ = encoders()
    elsewhere = [
        (place, none, PTuning(COUNT, "embedding", placement=PLACES[place])) for place in others
    ]
    in_front = [(others[0], lstm, PTuning(COUNT, placement=PLACES[others[0]]))]
    return [(template, label, m) for label, m in encoders().items()] + elsewhere + in_front


@lru_cache
def base_once() -> Base:
    """The base, loaded once a process."""
    return load(BASE)


def one(place: str, encoder: str, method: Method, lr: float, seed: int, split: str, steps: int):
    """One run: train, and score on the split."""
    torch.set_num_threads(1)
    base, task = base_once(), Probe.load()
    with attach(base, method, seed=seed) as tuned:
        run = train(
            tuned, task, steps=steps, lr=lr, seed=seed, precision="fp32", progress=False,
            evaluate=False,
        )  # fmt: skip
        scores, count = task.score(tuned, getattr(task, split)), tuned.count()
    found = {**scores, "loss_last": run.history.loss.tail(10).mean()}
    return {
        "place": place,
        "encoder": encoder,
        "metric": task.main,
        "trained": count.parameters,
        "stored": count.stored,
        "steps": steps,
        "lr": lr,
        "seed": seed,
        **{key: float(f"{value:.4g}") for key, value in found.items()},
    }


def read(path: Path = PATH) -> tuple[dict, pd.DataFrame]:
    """When and how it was made, and one row for each final run."""
    made = json.loads(path.read_text(encoding="utf-8"))
    runs = pd.DataFrame(made.pop("runs"))
    return made, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two steps a run")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    begun, steps = time.perf_counter(), 2 if options.smoke else STEPS
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting = [
            [pool.submit(one, *entry, lr, TUNING_SEED, "dev", steps) for lr in rates(entry[2])]
            for entry in entries()
        ]
        tried = [[future.result() for future in row] for row in waiting]
        chosen = [best(rows) for rows in tried]
        final = [
            pool.submit(one, *entry, lr, seed, "test", steps)
            for entry, lr in zip(entries(), chosen, strict=True)
            for seed in SEEDS
        ]
        runs = [future.result() for future in final]
    for row, tries in zip(runs, [rows for rows in tried for _ in SEEDS], strict=True):
        grid = [attempt["lr"] for attempt in tries]
        row["at the end of its grid"] = row["lr"] in (min(grid), max(grid))
    facts = {
        "command": "python -m peftlab.experiments.sweep_cloze",
        "base": load(BASE).digest,
        "device": f"CPU, {platform.machine()}",
        "steps": steps,
        "batch size": 16,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "tuning seed": TUNING_SEED,
        "seconds": round(time.perf_counter() - begun),
    }
    write(options.out, facts, {"tried": sum(tried, []), "runs": runs})


def rates(method: Method) -> tuple[float, ...]:
    """The three learning rates: of vectors, or of a network that makes them."""
    return TABLE if method.learning_rate >= 0.03 else NETWORK


if __name__ == "__main__":
    main()
