"""What a training step takes, for every model of the memory explorer: `python -m
peftlab.experiments.trace_memory`.

A step on B rows of T tokens is traced at two batches and three lengths, on models of two and three
layers. Every size in it is a polynomial in B, T and the number of layers, of the first degree in B
and in the layers and of the second in T: six coefficients for each, fitted exactly and written for
the model's own depth. Of the bytes alive after each allocation those are written that are the most
somewhere; `panels.memory` takes the largest of them. A seventh size checks.
"""

import argparse
import json
import time
from collections.abc import Iterator
from datetime import date
from fractions import Fraction
from itertools import product
from pathlib import Path

import torch
import transformers

from peftlab.bases.data import data_path
from peftlab.bases.shapes import named_config
from peftlab.memory.step import MOMENTS, Counter, How, Live, followed, warm
from peftlab.memory.traced import blank, rows
from peftlab.methods import Method
from peftlab.panels.memory import BESIDE_FULL, memory_models, value

BATCHES, LENGTHS, DEPTHS = (2, 3), (16, 24, 40), (2, 3)
CHECK = (5, 31)
WHERE = list(product([2**i for i in range(13)], [2**i for i in range(17)]))  # rows, tokens
DEPTH = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers")
PARTS = ("weights", "aside", "optimiser", "gradients", "activations", "batch")


class _Named(Live):
    """Remembers how many bytes are alive after each allocation, and what allocated."""

    def __init__(self):
        super().__init__()
        self.curve: list[tuple[str, int]] = []
        self.name = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.name = str(function)
        return super().__torch_dispatch__(function, types, args, kwargs)

    def _follow(self, storage):
        before = self.bytes
        super()._follow(storage)
        if self.bytes != before:
            self.curve.append((self.name, self.bytes))


class _Curves(Counter):
    """A counter that keeps the curve of each part of the step."""

    def __init__(self):
        self.live, self.curves = _Named(), []

    def most(self) -> int:
        self.curves.append([("", self.live.blocks), *self.live.curve])
        self.live.curve = []
        return super().most()


def points() -> list[tuple[int, int]]:
    return [*product(BATCHES, LENGTHS), CHECK]


def traces(method: Method, config: dict) -> Iterator[dict]:
    """At every point: the parts, and the curve of each part of the step."""
    how = How()
    with blank(method, config, how) as tuned:
        optimizer = warm(tuned, rows(tuned, *CHECK), how)
        for point in points():
            counter = _Curves()
            memory = followed(tuned, rows(tuned, *point), how, counter, optimizer)
            yield {part: memory.bytes(part) for part in PARTS} | {"curves": counter.curves[1:]}


def fitted(sizes: list[int], what: str) -> tuple[Fraction, ...]:
    """The polynomial through the sizes at `points`, which the last of them checks."""
    known = dict(zip(points(), sizes, strict=True))
    coefficients = [Fraction(0)] * 6  # of B^i T^j at 3 i + j
    for (b, t), size in list(known.items())[:-1]:
        (other,) = (x for x in BATCHES if x != b)
        p, q = (x for x in LENGTHS if x != t)
        in_b = [Fraction(-other, b - other), Fraction(1, b - other)]
        in_t = [Fraction(c, (t - p) * (t - q)) for c in (p * q, -p - q, 1)]
        for i, j in product(range(2), range(3)):
            coefficients[3 * i + j] += size * in_b[i] * in_t[j]
    if value(coefficients, *CHECK) != known[CHECK]:
        raise ValueError(f"{what} is no polynomial of rows and tokens")
    return tuple(coefficients)


def highest(curves: list[list[tuple[str, int]]], what: str) -> list[tuple[str, tuple]]:
    """Of one part of the step, where the most bytes are alive: by allocation, in their order."""
    lines: dict[tuple, str] = {}
    for events in zip(*curves, strict=True):
        (name,) = {name for name, _ in events}
        lines.setdefault(fitted([size for _, size in events], what), name)
    best = {max(lines, key=lambda line: value(line, *where)) for where in WHERE}
    return [(name, line) for line, name in lines.items() if line in best]


def of_depth(method: Method, config: dict, depth: int, what: str) -> dict:
    """Polynomials of the parts, and of the most of each part of the step, at this many layers."""
    found = list(traces(method, config | {key: depth for key in DEPTH if key in config}))
    parts = {part: fitted([at[part] for at in found], f"{what}, {part}") for part in PARTS}
    for index, moment in enumerate(MOMENTS):
        parts[moment] = highest([at["curves"][index] for at in found], f"{what}, {moment}")
    return parts


def of_model(name: str, label: str) -> dict:
    """The same at the model's own depth, from two small ones."""
    method, config, what = BESIDE_FULL[label], named_config(name), f"{name}, {label}"
    (layers,) = {config[key] for key in DEPTH if key in config}
    low, high = (of_depth(method, config, depth, what) for depth in DEPTHS)

    def deep(one: tuple, more: tuple) -> list[int]:
        grown = [a + (b - a) * (layers - DEPTHS[0]) for a, b in zip(one, more, strict=True)]
        if any(number.denominator != 1 for number in grown):
            raise ValueError(f"{what}: no whole number of bytes")
        return [int(number) for number in grown]

    told: dict = {part: deep(low[part], high[part]) for part in PARTS}
    for moment in MOMENTS:
        names, others = ([name for name, _ in found[moment]] for found in (low, high))
        if names != others:
            raise ValueError(f"{what}, {moment}: the most is elsewhere in a deeper model")
        pairs = zip(low[moment], high[moment], strict=True)
        told[moment] = [deep(one, more) for (_, one), (_, more) in pairs]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=memory_models())
    parser.add_argument("--out", type=Path, default=data_path("results", "memory_traces.json"))
    options = parser.parse_args()
    start, models = time.perf_counter(), {}
    for name in options.models:
        models[name] = {label: of_model(name, label) for label in BESIDE_FULL}
        print(f"{name:16} {time.perf_counter() - start:6.0f} s", flush=True)
        report = {
            "command": "python -m peftlab.experiments.trace_memory",
            "date": date.today().isoformat(),
            "seconds": round(time.perf_counter() - start),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "coefficients": ["1", "T", "T²", "B", "B T", "B T²"],
            "models": models,
        }
        options.out.write_text(json.dumps(report, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
