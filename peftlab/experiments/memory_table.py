"""Where the memory of one training step goes, for every method: `python -m
peftlab.experiments.memory_table --device cuda`.

A GPT-2 of 101 million parameters with random weights: what is predicted, and what was measured on
the device, each row in a process of its own, into `data/results/memory_table_cuda.json` (or
`_cpu`). `--dtype bfloat16` and `--checkpointing` write files of their own, and `--all` writes all
three. Rows are written as they come. On a CPU the batch is small, so that the table takes minutes.
`--predict-again FILE` puts what `predict` says now beside what is measured in a file.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import pandas as pd
import torch
import transformers

from peftlab import accounting
from peftlab.bases import Base, load
from peftlab.bases.data import data_path
from peftlab.memory import Memory, measure, predict
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


def model(dtype: torch.dtype = torch.float32) -> Base:
    """The model with the tokenizer of `tiny-gpt`; what a tensor holds changes no size."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**CONFIG, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    network = transformers.GPT2LMHeadModel(config).to(dtype)
    return Base("gpt-101m", network, load("tiny-gpt").tokenizer)


def listed() -> list[list[Method]]:
    """Every method that can be made without a setting, and `MORE`."""
    plain = []
    for kind in METHODS.values():
        try:
            plain.append([kind()])
        except TypeError:  # it has a setting without a default
            continue
    return plain + [more if isinstance(more, list) else [more] for more in MORE]


def numbers(memory: Memory) -> dict:
    """What a row says of a step."""
    parts = {part: memory.bytes(part) for part in memory.parts}
    facts = {"total": memory.total, "most": memory.most, "peak": memory.peak}
    return parts | facts | {"elsewhere": memory.elsewhere, "by layer": memory.parts["activations"]}


def row(which: int, device: str, dtype: str, checkpointing: bool) -> dict | str:
    """One of `listed()`: predicted, then measured in this process. A string says why not."""
    torch.set_num_threads(1)
    methods, (batch, length) = listed()[which], BATCHES[device]
    options = dict(dtype=dtype, checkpointing=checkpointing)
    # What trains is in float32, and so is the whole of a model whose own parameters train.
    width = "float32" if any(method.in_place for method in methods) else dtype
    base = model(getattr(torch, width)).to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 2000, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    try:
        with attach(base, methods) as tuned:
            if not tuned.trainable:
                return f"{tuned.label} trains nothing"
            move(tuned, device)
            memory = measure(tuned, given, **options)
            trained = tuned.count().parameters
    except ValueError as error:  # a method that this base or device does not take
        return f"{methods[0].title} is left out: {error}"
    config = {"model_type": "gpt2"} | CONFIG
    try:
        said = numbers(predict(methods, config, batch, length, device=device, **options))
    except Exception as error:  # what was measured counts, whatever this version of torch lacks
        said = {"unknown": f"{type(error).__name__}: {error}"}
    return {
        "label": memory.method,
        "methods": [method.to_dict() for method in methods],
        "trained": trained,
        "predicted": said,
        "measured": numbers(memory),
    }


def record(device: str, dtype: str, checkpointing: bool, workers: int, out: Path | None) -> None:
    """All rows of one setting into a file, which is whole after each of them."""
    flags = f" --dtype {dtype}" * (dtype != "float32") + " --checkpointing" * checkpointing
    name = f"memory_table_{device}" + f"_{dtype}" * (dtype != "float32")
    out = out or data_path("results", name + "_checkpointing" * checkpointing + ".json")
    batch, length = BATCHES[device]
    report = {
        "command": f"python -m peftlab.experiments.memory_table --device {device}{flags}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "1 CPU core",
        "seconds": 0,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": accounting.base_parameters({"model_type": "gpt2"} | CONFIG),
        "config": CONFIG,
        "batch": batch,
        "length": length,
        "dtype": dtype,
        "checkpointing": checkpointing,
        "rows": [],
    }
    start = time.perf_counter()
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=fresh, max_tasks_per_child=1) as pool:
        settings = (device, dtype, checkpointing)
        tasks = [pool.submit(row, which, *settings) for which in range(len(listed()))]
        for task in tasks:
            found = task.result()
            if isinstance(found, str):
                print(found, flush=True)
                continue
            report["rows"].append(found)
            report["seconds"] = round(time.perf_counter() - start)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            peak, said = found["measured"]["peak"], found["predicted"].get("peak")
            apart = "unknown" if said is None else f"{said / peak - 1:+.2%}"
            print(f"{found['label']:32} peak {peak:>14,}  predicted {apart}", flush=True)


def predict_again(path: Path) -> None:
    """Put what `predict` says now into a file of rows; what was measured stays."""
    report = json.loads(path.read_text(encoding="utf-8"))
    options = {key: report[key] for key in ("dtype", "checkpointing") if key in report}
    options["device"] = "cuda" if "cuda" in report["command"] else "cpu"
    config = {"model_type": "gpt2"} | report["config"]
    for found in report["rows"]:
        methods = [Method.from_dict(method) for method in found["methods"]]
        found["predicted"] = numbers(
            predict(methods, config, report["batch"], report["length"], **options)
        )
        print(f"{found['label']:32} {found['predicted']['peak']:>14,}", flush=True)
    report["predicted again"] = {
        "command": f"python -m peftlab.experiments.memory_table --predict-again {path.name}",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read(device: str) -> tuple[dict, pd.DataFrame]:
    """The float32 result of a device as it was written: when and where it was made, and for each
    row its label and both peaks in bytes, without what is kept aside."""
    path = data_path("results", f"memory_table_{device}.json")
    made = json.loads(path.read_text(encoding="utf-8"))
    found = [
        {"label": row["label"]}
        | {f"{k} peak": row[k]["peak"] - row[k]["aside"] for k in ("measured", "predicted")}
        for row in made.pop("rows")
    ]
    return made, pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--all", action="store_true", help="float32, bfloat16, both of the latter")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time")
    parser.add_argument("--out", type=Path, help="a file, or with --all a folder")
    parser.add_argument("--predict-again", type=Path, help="a file of rows in data/results")
    options = parser.parse_args()
    if options.predict_again:
        return predict_again(data_path("results", options.predict_again.name))
    settings = [(options.dtype, options.checkpointing)]
    if options.all:
        settings = [("float32", False), ("bfloat16", False), ("bfloat16", True)]
    for dtype, checkpointing in settings:
        out = options.out
        if options.all and out is not None:
            out = out / f"{dtype}{'_checkpointing' * checkpointing}.json"
        record(options.device, dtype, checkpointing, options.workers, out)


if __name__ == "__main__":
    main()
