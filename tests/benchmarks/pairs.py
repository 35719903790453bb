"""Two ways to do one thing, timed in turns, so that what else the machine does falls on both.

On a CPU processor time is counted, on a GPU the time until all is done.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers

import peftlab
from peftlab.bases import CLASSES, Base
from peftlab.bases.shapes import named_config
from peftlab.memory.traced import Words


def arguments(description: str, **defaults) -> argparse.Namespace:
    """The command's options: those that all commands here have, and their defaults."""
    parser = argparse.ArgumentParser(description=description)
    given = {"pairs": 30, "base": "tiny-gpt", "device": "cpu", "batch": 16, "length": 32}
    given |= {"dtype": "float32", "only": ""} | defaults
    for name, value in given.items():
        parser.add_argument(f"--{name}", default=value, type=type(value))
    return parser.parse_args()


def base_of(name: str, device: str) -> Base:
    """The base that ships, or one of random weights in the shape of a known model."""
    if name.startswith("tiny-"):
        return peftlab.load(name).to(device)
    config = named_config(name)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    torch.manual_seed(0)
    kind = CLASSES["encoder-decoder" if config.is_encoder_decoder else "decoder"]
    return Base(name, kind.from_config(config).to(device), Words(config.vocab_size))


def both_clocks(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds that pass, and of the processor, until all that one call left to a GPU is done."""
    start = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def seconds(work: Callable[[], object], device: str) -> float:
    """The one of the two clocks that counts on this device."""
    return both_clocks(work, device)[0 if device == "cuda" else 1]


def command(script: str, arguments: list[str]) -> str:
    """The line that measures it again, without the place where the figures were put."""
    words = ["python", f"tests/benchmarks/{script}", *arguments]
    at = words.index("--out") if "--out" in words else len(words)
    return " ".join(words[:at] + words[at + 2 :])


def compare(
    name: str, ours: Callable, theirs: Callable, args: argparse.Namespace, peer: str = "PEFT"
) -> None:
    """Print the median of the ratio of each pair, with quartiles, and the two medians."""
    for _ in range(5):
        seconds(ours, args.device), seconds(theirs, args.device)
    times = [(seconds(ours, args.device), seconds(theirs, args.device)) for _ in range(args.pairs)]
    low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
    mine, other = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{name}: {mine:.1f} ms, {peer} {other:.1f} ms; ratio {middle:.2f} "
        f"(quartiles {low:.2f} to {high:.2f}, {args.pairs} pairs)",
        flush=True,
    )
