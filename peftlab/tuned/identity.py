"""By what an adapter recognises the weights of its base: numbers that loading cannot change.

A base may be loaded in float32, bfloat16 or float16, each of which rounds its numbers, and tokens
may be added to its table. So the record of an adapter has some numbers of the base, and they are
compared as closely as the coarsest of the three types allows.
"""

from __future__ import annotations

import math
import warnings
from itertools import chain

import torch
from torch import Tensor

from peftlab.bases import Base, rows_digest
from peftlab.bases.plain import has_numbers

TYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS = (0.6180339887498949, 0.7548776662466927)  # irrational: places are spread evenly
ROWS = 256  # of the table: those that a base has whatever tokens are added
# Rounded to bfloat16, a number moves by up to 2⁻⁹ of itself; below float16's smallest, by 2⁻²⁵.
RELATIVE, ABSOLUTE = 2**-8, 2**-24


def numbers_of(base: Base) -> dict[str, list[float]]:
    """A few numbers of the table and of every linear weight, to six digits; {} without numbers."""
    table = base.anatomy.embedding.weight
    if not has_numbers(table):
        return {}
    found = {"embedding": _spread(table[:ROWS], 32)}
    found |= {name: _spread(linear.weight, 2) for name, linear in base.anatomy.linears.items()}
    return found


@torch.no_grad()
def _spread(tensor: Tensor, count: int) -> list[float]:
    """Numbers at places spread over a matrix, the same places for the same size."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    at = [(steps * a % 1 * size).long() for a, size in zip(STEPS, tensor.shape, strict=True)]
    row, column = (places.to(tensor.device) for places in at)
    return [float(f"{x:.6g}") for x in tensor[row, column].double().tolist()]


def same_numbers(record: dict, base: Base) -> bool:
    """Whether these may be the weights that the record of a saved adapter describes."""
    if "base_numbers" not in record:
        return _same_digest(record["base_digest"], base)
    here = base.adapted_by.numbers if base.adapted_by else numbers_of(base)
    there = record["base_numbers"]
    if [(name, len(numbers)) for name, numbers in here.items()] != [
        (name, len(numbers)) for name, numbers in there.items()
    ]:
        return False
    pairs = zip(chain(*here.values()), chain(*there.values()), strict=True)
    return all(math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in pairs)


def _same_digest(digest: str, base: Base) -> bool:
    """As `same_numbers`, for a record of peftlab 0.1: a hash of 1,000 rows in the type at hand."""
    table = base.anatomy.embedding.weight
    if digest in [rows_digest(table, dtype) for dtype in TYPES]:
        return True
    if table.dtype == torch.float32:
        return False
    warnings.warn(
        f"the adapter was saved beside a base in another type than {table.dtype}: whether it was "
        f"{base.name} shows only if that is loaded in float32",
        stacklevel=2,
    )
    return True
