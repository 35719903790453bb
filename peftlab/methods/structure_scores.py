"""Scores of how much heads, queries, neurons and layers matter, and the lowest of them."""

from collections.abc import Callable
from itertools import chain, groupby

import torch
from torch import Tensor

from peftlab.bases import Anatomy, Shape
from peftlab.methods.scores import lowest_out
from peftlab.sites.structures import Removed, attentions, blocks


@torch.no_grad()
def importance(anatomy: Anatomy, kind: str, name: str) -> Tensor:
    """Σ w² over all weights of each head, query or neuron of a sublayer, or of one block.

    A block counts only the weights that write to the residual stream: its o and down.
    """
    shape = anatomy.shape
    if kind == "layers":
        mine = [x for key, x in anatomy.linears.items() if key.startswith(f"{name}.")]
        return sum(x.weight.double().square().sum() for x in mine if x.target in ("o", "down"))
    count = {"heads": shape.kv_heads, "queries": shape.heads, "neurons": shape.d_ff}[kind]
    read = {"heads": "qkv", "queries": "q", "neurons": ("up", "gate")}[kind]
    write = "down" if kind == "neurons" else "o"
    total = torch.zeros(count, dtype=torch.float64)
    for target in (*read, write):
        if linear := anatomy.linears.get(f"{name}.{target}"):
            W = linear.weight.double().square().cpu()
            total += W.sum(dim=0 if target == write else 1).view(count, -1).sum(dim=1)
    return total


def first_of(kind: str, name: str, size: int) -> Tensor:
    """The same score for all, so that the first go first."""
    return torch.zeros(size)


def lowest_structures(shape: Shape, fractions: dict, score: Callable) -> Removed:
    """The heads, queries, neurons and layers to take out: the named ones, or of each kind the
    given fraction with the lowest score(kind, name, size)."""
    layers, gone, group = fractions["layers"], {}, shape.heads // shape.kv_heads
    if not isinstance(layers, tuple):
        stacks = groupby(blocks(shape), lambda name: name.rpartition("layers")[0])
        lowest = [_lowest_layers(list(names), layers, score) for _, names in stacks]
        layers = tuple(chain.from_iterable(lowest))
    if fractions["queries"] and group == 1:
        raise ValueError(f"queries: each head of {shape.name} has one query; give heads")
    sizes = {"heads": shape.kv_heads, "queries": group, "neurons": shape.d_ff}
    for kind, size in sizes.items():
        gone[kind] = value = fractions[kind]
        if isinstance(value, dict):
            continue
        places = blocks(shape) if kind == "neurons" else attentions(shape)
        gone[kind] = {}
        for name in places if round(value * size) else ():
            if name.removesuffix(".cross") not in layers:
                every = shape.heads if kind == "queries" else size
                keep = lowest_out(score(kind, name, every).view(-1, size), value)
                gone[kind][name] = tuple((~keep.flatten()).nonzero().flatten().tolist())
    return Removed(**gone, layers=layers)


def _lowest_layers(names: list[str], fraction: int | float, score: Callable) -> list[str]:
    """The lowest layers of one stack, without T5's first blocks, which have to stay."""
    count = round(fraction * len(names))
    free = names[1:] if "coder" in names[0] and count < len(names) else names
    scores = torch.cat([score("layers", name, 1) for name in free]) if free else torch.empty(0)
    lowest = scores.argsort(stable=True)[:count].tolist()
    return [free[i] for i in sorted(lowest)]
