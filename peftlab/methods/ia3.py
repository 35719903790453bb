"""(IA)³: a learned factor on every key, value and inner activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peftlab.bases import Shape
from peftlab.methods.method import Method
from peftlab.sites import Scale


class Factors(nn.Module):
    """The formula's l: one factor for each column, all of them 1 at the start."""

    def __init__(self, size: int):
        super().__init__()
        self.l = nn.Parameter(torch.ones(size))


@dataclass(frozen=True)
class IA3(Method):
    r"""Infused adapter by inhibiting and amplifying inner activations.

        softmax(q (l_k ⊙ k)ᵀ / √d) (l_v ⊙ v)      l_k, l_v (d_kv,)
        W_down (l_ff ⊙ σ(W_up x))                  l_ff (d_ff,)

    Trained and stored: one vector for each scaled weight, as long as what it scales, 1 at the
    start, so the output at the start is the base's exactly. `target_modules` are logical; those
    that are also in `feedforward_modules` have their input scaled, the others their output, bias
    included. By the defaults: keys, values, and what `down` reads. Merging scales rows or columns
    of the weights, and the biases of scaled outputs.

    Liu et al. 2022, arXiv:2205.05638, section 3.3. On GPT-2, PEFT scales all of the fused
    `c_attn`, the queries too: 64,512 numbers for the small one in place of the paper's 55,296.
    `IA3(target_modules=["q", "k", "v", "down"])` is that.
    """

    target_modules: tuple[str, ...] | list[str] = ("k", "v", "down")
    feedforward_modules: tuple[str, ...] | list[str] = ("down",)

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "(IA)³"
    learning_rate: ClassVar[float] = 1e-1

    def __post_init__(self):
        for field in ("target_modules", "feedforward_modules"):
            given = getattr(self, field)
            if not isinstance(given, list | tuple) or not (given or field[0] == "f"):
                raise ValueError(f"{field}={given!r}: give a list of targets, such as ['k', 'v']")
            object.__setattr__(self, field, tuple(dict.fromkeys(given)))  # once each
        for target in self.feedforward_modules:
            if target not in self.target_modules:
                raise ValueError(
                    f"feedforward_modules has {target!r}, which is not among target_modules, "
                    f"{', '.join(self.target_modules)}"
                )

    def reach(self, base, attachment, generator):
        for linear in base.anatomy.select(self.target_modules):
            of_input = linear.target in self.feedforward_modules
            factors = Factors(linear.d_in if of_input else linear.d_out)
            attachment.enter(Scale(linear, factors, of_input), factors)

    def parameters(self, shape: Shape) -> int:
        """The width of what is scaled, over all scaled weights."""
        return sum(
            copies * (d_in if target in self.feedforward_modules else d_out)
            for target in self.target_modules
            for copies, d_in, d_out in shape.matrices(target)
        )
