"""Where the memory of one training step goes, for every method: `python -m
peftlab.experiments.memory_table --device cuda`.

A GPT-2 of 101 million parameters with random weights, in float32; predicted in closed form and
measured on the device, into `data/results/memory_table_cuda.json` (or `_cpu`). On a CPU the batch
is small, so that the table takes two minutes.
"""

import argparse
import gc
import json
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
import transformers

from peftlab import accounting
from peftlab.bases import Base, load
from peftlab.bases.data import data_path
from peftlab.memory import measure
from peftlab.methods import (
    IA3,
    METHODS,
    NF4,
    FullFineTuning,
    LoRA,
    Method,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    Prune,
    PruneStructures,
    PTuningV2,
)
from peftlab.training import move
from peftlab.tuned import attach

CONFIG = dict(
    vocab_size=20_000,
    n_positions=1024,
    n_embd=768,
    n_layer=12,
    n_head=12,
    activation_function="gelu_pytorch_tanh",
    attn_pdrop=0.0,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
)
BATCHES = {"cpu": (2, 128), "cuda": (8, 512)}  # rows and tokens
MORE = (  # beside every method as it comes
    LoRA(target_modules="all-linear"),
    LoRA(r=64, target_modules="all-linear"),
    PromptTuning(128),
    PrefixTuning(128),
    PTuningV2(depth=2),
    LoRA(target_modules=["q", "k", "v"], fused=True),
    IA3(["o", "up", "down"], ["o", "up", "down"]),
    [Prune(), LoRA()],
    [Prune(mask_deltas=False), LoRA()],
    [Prune(), FullFineTuning()],
    [PruneStructures(heads=0.25, neurons=0.25), LoRA()],
    [PruneStructures(layers=0.25), FullFineTuning()],
    [NF4(), LoRA()],
    [PrefixTuning(30), ParallelAdapter()],
)


def model() -> Base:
    """The model with the tokenizer of `tiny-gpt`; what a tensor holds changes no size."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**CONFIG, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return Base("gpt-101m", transformers.GPT2LMHeadModel(config), load("tiny-gpt").tokenizer)


def listed() -> list[list[Method]]:
    """Every method that can be made without a setting, and `MORE`."""
    plain = []
    for kind in METHODS.values():
        try:
            plain.append([kind()])
        except TypeError:  # it has a setting without a default
            continue
    return plain + [more if isinstance(more, list) else [more] for more in MORE]


def row(base: Base, methods: list[Method], device: str, batch: int, length: int) -> dict:
    """One method: what the closed form says, and what was measured."""
    try:
        step = accounting.step_bytes(methods, base, batch, length, device=device)
        kept = accounting.saved_activations(methods, base, batch, length)
        closed = asdict(step) | {"peak": step.peak, "by layer": kept}
    except ValueError as error:
        closed = {"unknown": str(error)}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 2000, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    with attach(base, methods) as tuned:
        if not tuned.trainable:
            return {}
        move(tuned, device)
        memory = measure(tuned, given)
        trained = tuned.count().parameters
    return {
        "label": memory.method,
        "methods": [method.to_dict() for method in methods],
        "trained": trained,
        "predicted": closed,
        "measured": {part: memory.bytes(part) for part in memory.parts}
        | {"total": memory.total, "peak": memory.peak, "elsewhere": memory.elsewhere}
        | {"by layer": memory.parts["activations"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, (batch, length) = options.device, BATCHES[options.device]
    out = options.out or data_path("results", f"memory_table_{device}.json")
    base, rows, start = model(), [], time.perf_counter()
    base.to(device)
    for methods in listed():
        try:
            rows.append(row(base, methods, device, batch, length))
        except ValueError as error:  # a method that this base or device does not take
            print(f"{methods[0].title}: left out, {error}")
        finally:
            base.detach()
            gc.collect()
        if rows and rows[-1]:
            measured, said = rows[-1]["measured"], rows[-1]["predicted"].get("peak")
            print(f"{rows[-1]['label']:24} peak {measured['peak']:>14,}  said {said}", flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else "1 CPU core"
    report = {
        "command": f"python -m peftlab.experiments.memory_table --device {device}",
        "date": date.today().isoformat(),
        "device": name,
        "seconds": round(time.perf_counter() - start),
        "torch": torch.__version__,
        "parameters": accounting.base_parameters(base),
        "config": CONFIG,
        "batch": batch,
        "length": length,
        "rows": [found for found in rows if found],
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
