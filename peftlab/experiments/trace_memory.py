"""What a training step takes, for every model of the memory explorer: `python -m
peftlab.experiments.trace_memory`.

A step on B rows of T tokens is traced at two batches and three lengths. Every size in it is a
polynomial, of the first degree in B and of the second in T: six coefficients, fitted exactly; a
seventh trace checks them. Every size is of the first degree in the number of layers as well, so
models of three and four layers tell of one as deep as the model is. The most bytes alive at any
time are those after one of many allocations: of these polynomials those are written that are the
largest somewhere, and `panels.memory` takes the largest of them.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from datetime import date
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import torch
import transformers

from peftlab.bases.data import data_path
from peftlab.bases.shapes import named_config
from peftlab.memory.curves import DEPTH, DEPTHS, Curves, alike
from peftlab.memory.step import MOMENTS, How, followed
from peftlab.memory.traced import blank, rows
from peftlab.methods import Method
from peftlab.panels.memory import BESIDE_FULL, memory_models, value

BATCHES, LENGTHS = (2, 3), (16, 24, 40)
CHECK = (5, 31)
WHERE = list(product([2**i for i in range(13)], [2**i for i in range(15)]))  # rows, tokens
PARTS = ("weights", "aside", "optimiser", "gradients", "activations", "batch")


def points() -> list[tuple[int, int]]:
    return [*product(BATCHES, LENGTHS), CHECK]


def traces(method: Method, config: dict) -> Iterator[dict]:
    """At every point: the parts, and the curve of each part of the step."""
    how = How()
    for point in points():
        with blank(method, config, how) as tuned:
            counter = Curves()
            memory = followed(tuned, rows(tuned, *point), how, counter)
        yield {part: memory.bytes(part) for part in PARTS} | {"curves": counter.curves[1:]}


@cache
def _fitted(sizes: tuple[int, ...]) -> tuple[Fraction, ...]:
    """The polynomial through these sizes, at all points but the last."""
    coefficients = [Fraction(0)] * 6  # of B^i T^j at 3 i + j
    for (b, t), size in zip(points(), sizes, strict=False):
        (other,) = (x for x in BATCHES if x != b)
        p, q = (x for x in LENGTHS if x != t)
        in_b = [Fraction(-other, b - other), Fraction(1, b - other)]
        in_t = [Fraction(c, (t - p) * (t - q)) for c in (p * q, -p - q, 1)]
        for i, j in product(range(2), range(3)):
            coefficients[3 * i + j] += size * in_b[i] * in_t[j]
    return tuple(coefficients)


def fitted(sizes: Sequence[int], what: str) -> tuple[Fraction, ...]:
    """The polynomial through the sizes at `points`, the last of which checks it."""
    coefficients = _fitted(tuple(sizes[:-1]))
    if value(coefficients, *CHECK) != sizes[-1]:
        raise ValueError(f"{what}: no polynomial of rows and tokens")
    return coefficients


def of_depth(method: Method, config: dict, depth: int, what: str) -> dict:
    """At this many layers: polynomials of the parts, and every allocation of each part of the step,
    as what made it, its sizes at all points, and the polynomial of what is alive."""
    found = list(traces(method, config | {key: depth for key in DEPTH if key in config}))
    told: dict = {part: fitted([at[part] for at in found], f"{what}, {part}") for part in PARTS}
    for index, moment in enumerate(MOMENTS):
        told[moment] = []
        for events in zip(*(at["curves"][index] for at in found), strict=True):
            names, sizes, alive = zip(*events, strict=True)
            told[moment].append(((names, sizes), fitted(alive, f"{what}, {moment}, {names[0]}")))
    return told


def of_model(name: str, label: str) -> dict:
    """The polynomials at the model's own depth, from two small ones."""
    method, config, what = BESIDE_FULL[label], named_config(name), f"{name}, {label}"
    (layers,) = {config[key] for key in DEPTH if key in config}
    low, high = (of_depth(method, config, depth, what) for depth in DEPTHS)

    def deep(one: tuple, more: tuple) -> tuple[int, ...]:
        grown = [a + (b - a) * (layers - DEPTHS[0]) for a, b in zip(one, more, strict=True)]
        if any(number.denominator != 1 for number in grown):
            raise ValueError(f"{what}: no whole number of bytes")
        return tuple(int(number) for number in grown)

    told: dict = {part: deep(low[part], high[part]) for part in PARTS}
    for moment in MOMENTS:
        lines = sorted({deep(*pair) for pair in alike(low[moment], high[moment])})
        told[moment] = sorted({max(lines, key=lambda line: value(line, *at)) for at in WHERE})
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
        options.out.write_text(json.dumps(report, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
