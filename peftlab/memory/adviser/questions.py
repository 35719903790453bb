"""The questions of the flow: each says why a method cannot meet a need, or "" if it can."""

from __future__ import annotations

from peftlab import accounting
from peftlab.bases.shapes import Shape
from peftlab.memory.adviser.need import Need
from peftlab.memory.adviser.recipes import RECIPES
from peftlab.memory.calculator import GIB, KINDS, RESERVE, calculate, room


def can_do(kind: str, need: Need) -> str:
    shape = Shape.named(need.model)
    if need.task == "generation" and shape.kind == "encoder":
        return f"{need.model} is an encoder and writes no text"
    virtual = size_of(kind, need) if KINDS[kind].size == "virtual tokens" else 0
    if need.length + virtual > shape.context:
        more = f" and {virtual} virtual ones" * bool(virtual)
        return f"{need.length} tokens{more} are more than {need.model} has room for"
    if kind == "BitFit" and not shape.biased:
        return f"{need.model} has no biases"
    return ""


def fits(kind: str, need: Need) -> str:
    again = need.serve == "own code" or not RECIPES[kind].keeps_all
    size, free = size_of(kind, need), room(need.gpu) - RESERVE
    method = KINDS[kind].make(size)
    dtype = "float32" if method.in_place else "bfloat16"
    stays = accounting.training_bytes(method, need.model, dtype)
    if stays.weights + stays.adam > free:  # no step needs less
        held = _gib(stays.weights + stays.adam)
        return (
            f"a step takes over {held} GiB for weights and AdamW alone, and {_gib(free)} are free"
        )
    try:
        told = calculate(need.model, kind, size, need.batch, need.length, checkpointing=again)
    except ValueError as error:  # the model does not take it at all
        return str(error)
    if told.fits(need.gpu):
        return ""
    how = "with" if again else "without"
    return f"a step takes {_gib(told.peak)} GiB, {how} checkpointing, and {_gib(free)} are free"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def codes(kind: str, need: Need) -> str:
    return "" if need.four_bits or kind != "QLoRA" else "it holds the base in four bits"


def weights(kind: str, need: Need) -> str:
    changes = RECIPES[kind].in_the_weights
    if changes and not need.weights_may_change:
        return "it changes the model's own weights"
    return "the base is lost, but for a second copy" if changes and need.keep else ""


def together(kind: str, need: Need) -> str:
    if need.together == 1 or need.serve in RECIPES[kind].mixes:
        return ""
    if RECIPES[kind].in_the_weights:
        return f"a batch has one set of weights, and {need.together} tasks"
    return f"{need.serve} does not mix tasks of it in a batch"


def delay(kind: str, need: Need) -> str:
    if not need.no_delay or RECIPES[kind].in_the_weights:
        return ""
    if not RECIPES[kind].merges:
        return "it adds work to every answer, and cannot be merged"
    if need.together > 1:
        return f"merged it adds no work, but then it serves one task, not {need.together}"
    return "" if need.weights_may_change else "it must be merged, and the weights may not change"


def file(kind: str, need: Need) -> str:
    size = megabytes(kind, need)
    if need.megabytes is None or size <= need.megabytes:
        return ""
    return f"its file has {size:,.1f} MB at the least"


def served(kind: str, need: Need) -> str:
    recipe = RECIPES[kind]
    if need.serve in recipe.served or recipe.in_the_weights:
        return ""
    if recipe.merges and need.together == 1 and need.weights_may_change and not need.keep:
        return ""  # merged, it is a model like any other
    return f"{need.serve} does not know it"


def megabytes(kind: str, need: Need) -> float:
    """A task's file in float32, at the size that the need allows."""
    return _file_bytes(kind, need.model, size_of(kind, need)) / 1e6


def _file_bytes(kind: str, model: str, size: int) -> int:
    return accounting.file_bytes(KINDS[kind].make(size), model)


def size_of(kind: str, need: Need) -> int:
    """The usual size, or the largest below it whose file is small enough."""
    usual, most = KINDS[kind].usual, need.megabytes
    smaller = [size for size in KINDS[kind].sizes if size <= usual]
    if most is None or not smaller:
        return usual
    fitting = [s for s in smaller if _file_bytes(kind, need.model, s) <= most * 1e6]
    return max(fitting, default=min(smaller))
