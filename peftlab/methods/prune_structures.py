"""Structured pruning: heads, neurons and whole layers taken out, so that the model is smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from peftlab.bases import Shape
from peftlab.masks import lowest_out
from peftlab.methods.method import Method, check_texts, require
from peftlab.structures import (
    KINDS,
    Removed,
    SmallerModel,
    attentions,
    blocks,
    importance,
    sensitivity,
)

SCORES = ("magnitude", "gradient", "random")
PREFIXES = ("prefix_tuning", "p_tuning_v2", "prompt_and_prefix")  # by name


@dataclass(frozen=True)
class PruneStructures(Method):
    r"""Structured pruning: the model with fewer heads, neurons and layers.

        MLP(x) = Σ_j down_:j act(up_j: x)      j over the neurons that stay
        Att(x) = Σ_h W_o,h head_h(x)           h over the heads that stay

    `heads` are key-value heads, each with every query head that reads it; `queries` are query
    heads of grouped attention alone, as many from every group; `neurons` are an MLP's. Each is a
    fraction of every sublayer's, the lowest by `score`, or a dict of names and indices, such as
    {"layers.0": [2, 5]}. `layers` is a fraction of each stack, or a list of names. By magnitude a
    structure's score is Σ w² over its own weights (a layer's: the o and down that it writes with);
    by gradient it is |∂L/∂ξ|, the mean over the `calibration` texts, ξ = 1 being a factor on what
    the structure adds.

    Nothing trains and nothing is stored but the names of what is gone: it stands before a method
    that recovers what was lost. T5's table of relative positions, and the first layers that hold
    it, stay. `smaller(shape)` is the shape that is left, in closed form.

    Michel et al. 2019, arXiv:1905.10650, equation 2 (heads, by gradient); Li et al. 2017,
    arXiv:1608.08710, section 3 (whole filters by their norm); Sajjad et al. 2020,
    arXiv:2004.03844 (layers).
    """

    heads: float | int | dict = 0.0
    queries: float | int | dict = 0.0
    neurons: float | int | dict = 0.0
    layers: float | int | tuple[str, ...] | list[str] = 0.0
    score: str = "magnitude"
    calibration: tuple[str, ...] | list[str] = ()

    name: ClassVar[str] = "prune_structures"
    title: ClassVar[str] = "Prune structures"

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r}: allowed is {', '.join(SCORES)}")
        check_texts(self, "gradient")
        for kind in KINDS:
            value = getattr(self, kind)
            if isinstance(value, dict):
                named = {str(name): tuple(dict.fromkeys(which)) for name, which in value.items()}
                object.__setattr__(self, kind, named)
            else:
                self._check_fraction(kind, value, "a dict of indices, {'layers.0': [2, 5]}")
        if isinstance(self.layers, list | tuple):
            object.__setattr__(self, "layers", tuple(dict.fromkeys(self.layers)))
        else:
            self._check_fraction("layers", self.layers, "a list of names, ['layers.3']")

    @staticmethod
    def _check_fraction(name: str, value, otherwise: str) -> None:
        if not isinstance(value, int | float):
            raise ValueError(f"{name}={value!r}: a fraction is needed, or {otherwise}")
        require(name, value, 0.0, 1.0)

    def objection(self, before, after):
        if before:
            return "it comes first, for the others are made to the sizes that are left"
        if any(method.name in PREFIXES for method in after):
            return "a prefix has as many heads in every layer, those of the whole model"
        return ""

    def reach(self, base, attachment, generator):
        felt = sensitivity(base, self.calibration) if self.score == "gradient" else {}

        def score(kind: str, name: str, size: int) -> torch.Tensor:
            if self.score == "random":
                return torch.rand(size, generator=generator)
            if self.score == "gradient":
                return felt[kind, name].cpu()
            return importance(base.anatomy, kind, name).view(-1)

        removed = self.removed(base.anatomy.shape, score)
        site = attachment.stack.enter_context(SmallerModel(base.anatomy, removed))
        attachment.sites.append(site)
        named = {kind: getattr(removed, kind) for kind in (*KINDS, "layers")}
        attachment.chosen = PruneStructures(**named)

    def removed(self, shape: Shape, score=lambda kind, name, size: torch.zeros(size)) -> Removed:
        """What goes, by name: the lowest by this score, which by default are the first."""
        layers, names = self.layers, blocks(shape)
        if not isinstance(layers, tuple):
            stacks: dict[str, list[str]] = {}
            for name in names:
                stacks.setdefault(name.rpartition("layers")[0], []).append(name)
            layers = tuple(
                name for every in stacks.values() for name in self._lowest_layers(every, score)
            )
        group, gone = shape.heads // shape.kv_heads, {}
        if self.queries and group == 1:
            raise ValueError(f"queries: each head of {shape.name} has one query; give heads")
        sizes = {"heads": shape.kv_heads, "queries": group, "neurons": shape.d_ff}
        for kind, size in sizes.items():
            gone[kind] = value = getattr(self, kind)
            if isinstance(value, dict):
                continue
            places = blocks(shape) if kind == "neurons" else attentions(shape)
            gone[kind] = {}
            for name in places if round(value * size) else ():
                if name.removesuffix(".cross") not in layers:
                    every = shape.heads if kind == "queries" else size
                    keep = lowest_out(score(kind, name, every).view(-1, size), value)
                    gone[kind][name] = tuple((~keep.flatten()).nonzero().flatten().tolist())
        removed = Removed(**gone, layers=layers)
        removed.check(shape)
        return removed

    def _lowest_layers(self, names: list[str], score) -> list[str]:
        """Of one stack; T5's first blocks cannot go, and are not chosen."""
        count = round(self.layers * len(names))
        free = names[1:] if "coder" in names[0] and count < len(names) else names
        scores = torch.cat([score("layers", name, 1) for name in free]) if free else torch.empty(0)
        lowest = scores.argsort(stable=True)[:count].tolist()
        return [free[i] for i in sorted(lowest)]

    def smaller(self, shape: Shape) -> Shape:
        """The shape that is left."""
        return self.removed(shape).smaller(shape)

    def parameters(self, shape: Shape) -> int:
        """None: what stays is frozen."""
        return 0

    def footprint(self, plan):
        """The walk goes through what is left. Aside: every changed tensor as it was."""
        removed = self.removed(plan.shape)
        plan.aside += removed.bytes_aside(plan.shape)
        plan.shape = removed.smaller(plan.shape)
