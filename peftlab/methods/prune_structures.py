"""Structured pruning: take out heads, neurons and whole layers, so that the model is smaller."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlab.bases import Shape
from peftlab.bases.plain import has_numbers, plain
from peftlab.methods.calibration import sensitivity
from peftlab.methods.checks import check_texts, require
from peftlab.methods.method import Method
from peftlab.methods.structure_scores import first_of, importance, lowest_structures
from peftlab.sites.structures import KINDS, Removed, SmallerModel


@dataclass(frozen=True)
class PruneStructures(Method):
    r"""Structured pruning: the model with fewer heads, neurons and layers.

        MLP(x) = Σ_j down_:j act(up_j: x)      j over the neurons that stay
        Att(x) = Σ_h W_o,h head_h(x)           h over the heads that stay

    `heads` are key-value heads, each with every query head that reads it; `queries` are query
    heads of grouped attention alone, the same number from every group; `neurons` are an MLP's. Each
    is a fraction of every sublayer's, lowest `score` first, or a dict of names and indices, such as
    {"layers.0": [2, 5]}. `layers` is a fraction of each stack, or a list of names. By magnitude, a
    structure's score is Σ w² over its own weights (a layer's: its o and down, which write); by
    gradient, it is the mean of |∂L/∂ξ| over the `calibration` texts; ξ = 1 multiplies its output.

    Nothing trains; only the names of the structures taken out are stored. List it before a method
    that recovers the lost quality. T5's table of relative positions, and the first layers, which
    hold it, stay. `smaller(shape)` is the remaining shape, in closed form.

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

    name = "prune_structures"
    title = "Prune structures"
    choices = {"score": ("magnitude", "gradient", "random")}

    def __post_init__(self):
        super().__post_init__()
        texts = check_texts(self.calibration, self.score, "gradient")
        object.__setattr__(self, "calibration", texts)
        named = dict.fromkeys(KINDS, "a dict of indices, {'layers.0': [2, 5]}")
        for kind, otherwise in (named | {"layers": "a list of names, ['layers.3']"}).items():
            value = getattr(self, kind)
            if kind in KINDS and isinstance(value, dict):
                value = {str(name): tuple(dict.fromkeys(which)) for name, which in value.items()}
            elif kind == "layers" and isinstance(value, list | tuple):
                value = tuple(dict.fromkeys(value))
            elif isinstance(value, int | float):
                require(kind, value, 0.0, 1.0)
            else:
                raise ValueError(f"{kind}={value!r}: a fraction is needed, or {otherwise}")
            object.__setattr__(self, kind, value)

    def reach(self, base, attachment, generator):
        felt = sensitivity(base, self.calibration) if self.score == "gradient" else {}

        def score(kind: str, name: str, size: int) -> Tensor:
            if self.score == "random":
                return torch.rand(size, generator=generator)
            if self.score == "gradient":
                return felt[kind, name].cpu()
            return importance(base.anatomy, kind, name).view(-1)

        # Without numbers the first structures go: the same count, so the rest has the same size.
        known = has_numbers(base.anatomy.embedding.weight)
        with plain():
            removed = self.removed(base.anatomy.shape, score if known else first_of)
        attachment.enter(SmallerModel(base.anatomy, removed))
        attachment.chosen = PruneStructures(**vars(removed))

    def removed(self, shape: Shape, score: Callable = first_of) -> Removed:
        """The structures to take out: those with the lowest score(kind, name, size)."""
        fractions = {kind: getattr(self, kind) for kind in (*KINDS, "layers")}
        removed = lowest_structures(shape, fractions, score)
        removed.check(shape)
        return removed

    def smaller(self, shape: Shape) -> Shape:
        """The remaining shape."""
        return self.removed(shape).smaller(shape)

    def parameters(self, shape):
        return 0
