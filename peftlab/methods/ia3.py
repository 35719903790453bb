"""(IA)³: a learned factor on every key, value and inner activation."""

from dataclasses import dataclass

import torch
from torch import nn

from peftlab.methods.method import Method
from peftlab.sites import Scale


class Factors(nn.Module):
    """The formula's l: one factor for each column, initially 1."""

    def __init__(self, size: int):
        super().__init__()
        self.l = nn.Parameter(torch.ones(size))


@dataclass(frozen=True)
class IA3(Method):
    r"""Infused adapter by inhibiting and amplifying inner activations.

        softmax(q (l_k ⊙ k)ᵀ / √d) (l_v ⊙ v)      l_k, l_v (d_kv,)
        W_down (l_ff ⊙ σ(W_up x))                  l_ff (d_ff,)

    Trained and stored: one vector for each scaled weight, as long as the scaled input or output.
    It starts at 1, so the output starts exactly as the base's. `target_modules` are logical. The
    factors scale the input of those that are also in `feedforward_modules`, and the output, bias
    included, of the others. The defaults scale keys, values and the input of `down`. Merging scales
    rows or columns of the weights, and the biases of scaled outputs.

    Liu et al. 2022, arXiv:2205.05638, section 3.3. On GPT-2, PEFT scales the whole fused `c_attn`,
    queries included: 64,512 numbers on the small GPT-2 instead of the paper's 55,296. That is
    `IA3(target_modules=["q", "k", "v", "down"])`.
    """

    target_modules: tuple[str, ...] | list[str] = ("k", "v", "down")
    feedforward_modules: tuple[str, ...] | list[str] = ("down",)

    name = "ia3"
    title = "(IA)³"
    learning_rate = 1e-1

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

    def parameters(self, shape):
        return sum(
            copies * (d_in if target in self.feedforward_modules else d_out)
            for target in self.target_modules
            for copies, d_in, d_out in shape.matrices(target)
        )
