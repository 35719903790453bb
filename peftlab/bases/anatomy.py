"""Where things are inside a frozen model: the embedding, and every linear weight by its role.

A family is described once, by module paths. Sizes are read off the modules themselves, never
guessed from a configuration. The logical targets are the same everywhere:

    q k v o      the four projections of self-attention
    up down gate the projections of the MLP (gate only where the MLP is gated)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peftlab.bases.shapes import Shape

TARGETS = ("q", "k", "v", "o", "up", "down", "gate")


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture. (path, part, of) names one part of a fused matrix."""

    embedding: str
    layers: str
    linears: dict[str, tuple[str, int, int]]


FAMILIES = {
    "gpt2": Family(
        embedding="transformer.wte",
        layers="transformer.h",
        linears={
            "q": ("attn.c_attn", 0, 3),  # one fused matrix computes q, k and v
            "k": ("attn.c_attn", 1, 3),
            "v": ("attn.c_attn", 2, 3),
            "o": ("attn.c_proj", 0, 1),
            "up": ("mlp.c_fc", 0, 1),
            "down": ("mlp.c_proj", 0, 1),
        },
    ),
    "llama": Family(
        embedding="model.embed_tokens",
        layers="model.layers",
        linears={
            "q": ("self_attn.q_proj", 0, 1),
            "k": ("self_attn.k_proj", 0, 1),
            "v": ("self_attn.v_proj", 0, 1),
            "o": ("self_attn.o_proj", 0, 1),
            "up": ("mlp.up_proj", 0, 1),
            "down": ("mlp.down_proj", 0, 1),
            "gate": ("mlp.gate_proj", 0, 1),
        },
    ),
}


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear weight W of shape (d_out, d_in), or the rows of a fused one that play this role.

    GPT-2 stores its weights transposed (`Conv1D`, d_in first), and GPT-NeoX shuffles the rows of
    q, k and v head by head; `weight` is always (d_out, d_in), with the rows in their own order.
    """

    name: str  # "layers.3.q", "decoder.layers.3.cross.q"
    target: str
    layer: int
    module: nn.Module
    rows: tuple[int, int] | Int[Tensor, " d_out"]  # start and stop, or every row by its number
    transposed: bool

    @property
    def index(self) -> slice | Int[Tensor, " d_out"]:
        """What picks the rows out of the module's weight, bias or output."""
        return self.rows if isinstance(self.rows, Tensor) else slice(*self.rows)

    @property
    def whole(self) -> bool:
        """Whether the module plays this one role and no other."""
        return self.d_out == self._stored.shape[0]

    @property
    def _stored(self) -> Float[Tensor, "all_rows d_in"]:
        return self.module.weight.T if self.transposed else self.module.weight

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """W: a view of the model's own storage, or a copy where the rows lie scattered.

        Only `write` reaches the model in every family.
        """
        return self._stored[self.index]

    @torch.no_grad()
    def write(self, values: Float[Tensor, "d_out d_in"]) -> None:
        """Put these values into the model, on its device and in its dtype.

        Raises ValueError if they are not of the shape of W.
        """
        stored = self._stored
        if values.shape != (self.d_out, self.d_in):
            raise ValueError(
                f"{self.name} is {self.d_out}×{self.d_in}, not {'×'.join(map(str, values.shape))}"
            )
        stored[self.index] = values.to(stored.device, stored.dtype)

    def add_to(
        self, output: Float[Tensor, "*batch all_rows"], delta: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch all_rows"]:
        """The module's output plus delta in the columns that this weight computes.

        A fused output is changed in place, so that q, k and v can be added one after the other.
        """
        if self.whole:
            return output + delta
        if isinstance(self.rows, Tensor):
            return output.index_add_(-1, self.rows.to(output.device), delta)
        output[..., self.index] += delta
        return output

    @property
    def d_out(self) -> int:
        return len(self.rows) if isinstance(self.rows, Tensor) else self.rows[1] - self.rows[0]

    @property
    def d_in(self) -> int:
        return self._stored.shape[1]


class Anatomy:
    """The parts of one model that methods reach: `shape`, `embedding`, `linears`."""

    def __init__(self, model: nn.Module, name: str):
        family = FAMILIES[model.config.model_type]
        self.family = model.config.model_type
        self.shape = Shape.from_config(model.config, name=name)
        self.embedding: nn.Embedding = model.get_submodule(family.embedding)
        self.linears: dict[str, Linear] = {}
        for layer, block in enumerate(model.get_submodule(family.layers)):
            for target, (path, part, of) in family.linears.items():
                module = block.get_submodule(path)
                transposed = not isinstance(module, nn.Linear)
                size = module.weight.shape[1 if transposed else 0] // of
                rows = (part * size, (part + 1) * size)
                site = f"layers.{layer}.{target}"
                self.linears[site] = Linear(site, target, layer, module, rows, transposed)

    @property
    def targets(self) -> tuple[str, ...]:
        """The logical targets that this family has."""
        return tuple(t for t in TARGETS if t in FAMILIES[self.family].linears)

    def select(self, targets: tuple[str, ...]) -> list[Linear]:
        """The linear weights with one of these roles, layer by layer.

        Raises ValueError for a role that this family does not have.
        """
        unknown = [t for t in targets if t not in self.targets]
        if unknown:
            raise ValueError(
                f"unknown target {unknown[0]!r}: {self.family} has {', '.join(self.targets)}"
            )
        return [linear for linear in self.linears.values() if linear.target in targets]
