"""The calculator against a GPU: `python -m peftlab.experiments.check_calculator`.

Models of random weights, built on the GPU from their published configurations, take two training
steps. What the allocator counted at the most stands beside what `memory.calculator` says without
weights. Each row is measured in a process of its own; as many run at once as fit. Rows are written
as they come, so the same command goes on where it was stopped. A row that does not fit this GPU is
named and left out. `--smoke` runs every method on small bases on a CPU, where storages are counted
one by one and `memory.predict` is what they are compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from torch import nn

from peftlab.bases import CLASSES, FAMILIES, Base
from peftlab.bases.data import data_path
from peftlab.bases.shapes import Shape, named_config
from peftlab.memory import measure, predict
from peftlab.memory.calculator import GIB, KINDS, Told, calculate, head_of
from peftlab.memory.step import How, take
from peftlab.memory.traced import Words, rows
from peftlab.methods import Method
from peftlab.tuned import attach

CONTEXT = GIB  # what a process on a GPU takes beside its tensors
SECONDS = 200  # a row that takes longer is stopped


@dataclass(frozen=True)
class Case:
    """One row: the settings of `calculate`."""

    model: str
    kind: str
    batch: int
    dtype: str = "bfloat16"
    checkpointing: bool = False
    size: int = 0  # 0: the usual one
    length: int = 512

    @property
    def method(self) -> Method:
        return KINDS[self.kind].make(self.size or KINDS[self.kind].usual)

    @property
    def name(self) -> str:
        size = f", {KINDS[self.kind].size} {self.size or KINDS[self.kind].usual}"
        return (
            f"{self.model}, {self.kind}{size if KINDS[self.kind].size else ''}, {self.batch} × "
            f"{self.length}, {self.dtype}{', checkpointing' * self.checkpointing}"
        )

    def predicted(self) -> Told:
        """What the calculator says."""
        options = dict(dtype=self.dtype, checkpointing=self.checkpointing)
        size = self.size or None
        return calculate(self.model, self.kind, size, self.batch, self.length, **options)


CASES = (
    Case("qwen2.5-32b", "LoRA", 1, checkpointing=True),
    Case("llama-2-13b", "QLoRA", 2, checkpointing=True),
    Case("qwen2.5-3b", "Full fine-tuning", 1, checkpointing=True),
    Case("llama-2-7b", "QLoRA", 2, checkpointing=True, size=64),
    Case("llama-3-8b", "QLoRA", 1),
    Case("llama-2-7b", "LoRA", 2),
    Case("llama-3-8b", "LoRA", 4, checkpointing=True),
    Case("llama-3-8b", "Prefix tuning", 2, checkpointing=True),
    Case("mistral-7b", "Houlsby adapter", 2, checkpointing=True),
    Case("qwen2.5-7b", "(IA)³", 2),
    Case("llama-3.2-1b", "Full fine-tuning", 4),
    Case("llama-3.2-1b", "Prompt tuning", 4),
    Case("llama-3.2-1b", "Prefix tuning", 4),
    Case("llama-3.2-1b", "QLoRA", 4),
    Case("smollm2-1.7b", "LoRA, q and v", 4, "float32"),
    Case("smollm2-1.7b", "DoRA", 2),
    Case("t5-large", "Houlsby adapter", 4, "float32"),
    Case("qwen2.5-0.5b", "LoRA", 8),
    Case("bert-large", "LoRA, q and v", 16, "float32"),
    Case("bert-large", "BitFit", 16),
    Case("smollm2-360m", "Full fine-tuning", 8, "float32", checkpointing=True),
    Case("smollm2-135m", "Full fine-tuning", 8),
    Case("smollm2-135m", "Prompt tuning", 8, "float32"),
    Case("llama-2-70b", "LoRA, q and v", 1, checkpointing=True),
)
SMOKE = (
    *(
        Case("tiny-llama", kind, 2, "bfloat16", True, length=32)
        for kind in KINDS
        if kind != "BitFit"
    ),
    Case("tiny-gpt", "BitFit", 2, length=32),  # a Llama has no biases
    Case("tiny-gpt", "QLoRA", 2, "float32", length=32),
    Case("tiny-t5", "LoRA", 2, "float32", length=32),
)


def built(name: str, dtype: torch.dtype, device: str) -> Base:
    """The model with random numbers, made where it runs."""
    fields, shape = named_config(name), Shape.named(name)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    lm = "lm" in shape.head
    kind = CLASSES[FAMILIES[config.model_type].kind] if lm else transformers.AutoModel
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    if not lm:
        model.pooler = None
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            # Whole numbers are places in a table: the first is always there.
            tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    return Base(name, model, Words(config.vocab_size))


def measured(case: Case, device: str) -> int:
    """The most bytes of two training steps, in a process that did nothing else."""
    wide = case.method.in_place  # a model that trains is in float32
    base = built(case.model, torch.float32 if wide else getattr(torch, case.dtype), device)
    with attach(base, case.method, head=head_of(case.model)) as tuned:
        batch = {key: x.to(device) for key, x in rows(tuned, case.batch, case.length).items()}
        how = dict(dtype=case.dtype, checkpointing=case.checkpointing)
        if device == "cpu":
            return measure(tuned, batch, **how).peak
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        take(tuned, batch, How(device, **how), steps=2)
        return torch.cuda.max_memory_allocated()


def row(case: Case, device: str) -> dict:
    """What was measured here, and on what."""
    start = time.perf_counter()
    return {
        "name": case.name,
        **asdict(case),
        "measured": measured(case, device),
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "1 CPU core",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def on_cpu(out: File) -> None:
    """Small bases, compared with what `predict` says of a CPU."""
    for case in SMOKE:
        if not out.has(case):
            how = dict(dtype=case.dtype, checkpointing=case.checkpointing)
            told = predict(case.method, case.model, case.batch, case.length, **how)
            out.add(row(case, "cpu") | {"predicted": told.peak})


class File:
    """The rows of one file, whole after each of them."""

    def __init__(self, path: Path, command: str):
        self.path, self.command = path, command
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        self.rows: list[dict] = old["rows"]

    def has(self, case: Case) -> bool:
        return any(row["name"] == case.name for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        report = {"command": self.command, "rows": self.rows}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        aside = self.path.with_suffix(".part")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, self.path)
        apart = row["predicted"] / row["measured"] - 1
        print(
            f"{row['name']:72} measured {row['measured'] / 1e9:8.3f} GB, "
            f"predicted {row['predicted'] / 1e9:8.3f} GB, {apart:+.2%}",
            flush=True,
        )


class Running:
    """A row in a fresh process, and the bytes of the GPU that it is expected to take."""

    def __init__(self, which: int, expected: int):
        self.which, self.expected, self.start = which, expected, time.perf_counter()
        command = [sys.executable, "-m", "peftlab.experiments.check_calculator", "--row"]
        self.process = subprocess.Popen(
            [*command, str(which)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def answer(self) -> dict | str | None:
        """The row, or in words why there is none; None while it runs."""
        if self.process.poll() is None:
            if time.perf_counter() - self.start < SECONDS:
                return None
            self.process.kill()
        out, error = self.process.communicate()
        if self.process.returncode:
            return (error.strip().splitlines() or ["stopped"])[-1]
        return json.loads(out.strip().splitlines()[-1])


def needed(case: Case, told: Told) -> int:
    """The bytes of a GPU that a row takes at any time: a coded model is built in 16 bits first."""
    whole = Shape.named(case.model).parameters() * (2 if case.dtype == "bfloat16" else 4)
    return max(told.peak_here, whole if told.codes else 0) + CONTEXT


def on_gpu(out: File, jobs: int, workers: int) -> None:
    """Predict all rows on the CPU, and measure each as soon as there is room for it."""
    room = torch.cuda.mem_get_info()[0]
    left = [which for which, case in enumerate(CASES) if not out.has(case)]
    running: list[Running] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        told = {which: pool.submit(CASES[which].predicted) for which in left}
        while left or running:
            for one in list(running):
                if (answer := one.answer()) is None:
                    continue
                running.remove(one)
                if isinstance(answer, str):
                    print(f"{CASES[one.which].name}: {answer}", flush=True)
                    continue
                said = told[one.which].result()
                sizes = {"predicted": said.peak_here, "of it kept aside": said.aside}
                out.add(answer | sizes | {"at": said.moment})
            for which in [which for which in left if told[which].done()]:
                case, taken = CASES[which], sum(one.expected for one in running)
                if error := told[which].exception():
                    print(f"{case.name}: {error}", flush=True)
                    left.remove(which)
                elif (need := needed(case, told[which].result())) > room:
                    print(f"{case.name}: {need / 1e9:.0f} GB do not fit", flush=True)
                    left.remove(which)
                elif len(running) < jobs and taken + need <= room:
                    running.append(Running(which, need))
                    left.remove(which)
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=data_path("results", "check_calculator.json"))
    parser.add_argument("--jobs", type=int, default=3, help="rows at a time on the GPU")
    parser.add_argument("--workers", type=int, default=8, help="predictions at a time")
    parser.add_argument("--smoke", action="store_true", help="small bases on the CPU")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(row(CASES[options.row], "cuda")))
        return
    command = "python -m peftlab.experiments.check_calculator" + " --smoke" * options.smoke
    out = File(options.out, command)
    if options.smoke:
        on_cpu(out)
    else:
        on_gpu(out, options.jobs, options.workers)
    far = [row for row in out.rows if abs(row["predicted"] / row["measured"] - 1) > 0.1]
    print(f"{len(out.rows)} rows, {len(far)} of them more than 10% apart")


if __name__ == "__main__":
    main()
