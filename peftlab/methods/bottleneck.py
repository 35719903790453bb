"""The small module that all adapters share, and how it is attached to a base."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.bases import Shape
from peftlab.methods.method import Method
from peftlab.sites import SublayerOutput

NON_LINEARITIES = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
SUBLAYERS = ("attention", "cross", "mlp")


class Bottleneck(nn.Module):
    r"""The formula:  $f(x) = s \, (W_{up}\, \sigma(W_{down}\, x + b_{down}) + b_{up})$.

    W_down (m, d_model) and b_down (m,) lead into m dimensions, W_up (d_model, m) and b_up
    (d_model,) out of them; s is `scaling`, σ the non-linearity. Both biases start at zero.
    """

    def __init__(self, d_model: int, m: int, non_linearity: str, scaling: int | float):
        super().__init__()
        self.W_down = nn.Parameter(torch.empty(m, d_model))
        self.b_down = nn.Parameter(torch.zeros(m))
        self.W_up = nn.Parameter(torch.empty(d_model, m))
        self.b_up = nn.Parameter(torch.zeros(d_model))
        self.non_linearity, self.scaling = non_linearity, scaling

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        x = x.to(self.W_down.dtype)  # a base in 16 bits still trains adapters in 32
        low = F.linear(x, self.W_down, self.b_down)  # *batch m
        hidden = NON_LINEARITIES[self.non_linearity](low)
        return self.scaling * F.linear(hidden, self.W_up, self.b_up)


@dataclass(frozen=True)
class Adapter(Method, listed=False):
    """The common part of the adapters.

    They differ in their sublayers, in their input and in their initial values.
    `non_linearity`: relu, gelu, silu (also called swish) or tanh. `sublayers`: any of attention,
    mlp, and cross, the attention of T5's decoder to its encoder. Two adapters can be combined at
    different sublayers.
    """

    bottleneck: int
    non_linearity: str = "relu"
    scaling: int | float = 1.0
    sublayers: tuple[str, ...] | list[str] = ("mlp",)

    beside = False  # True: f reads the input of the sublayer, not its output
    limits = {"bottleneck": (1,), "scaling": (0.0,)}
    choices = {"non_linearity": tuple(NON_LINEARITIES)}

    def __post_init__(self):
        super().__post_init__()
        kinds = self.sublayers
        if not isinstance(kinds, list | tuple) or not kinds or set(kinds) - set(SUBLAYERS):
            needed = f"give a list of some of {', '.join(SUBLAYERS)}, such as ['mlp']"
            raise ValueError(f"sublayers={kinds!r}: {needed}")
        object.__setattr__(self, "sublayers", tuple(dict.fromkeys(kinds)))  # once each

    def initialise(self, f: Bottleneck, generator: torch.Generator) -> None:
        """Draw W_down and W_up."""
        raise NotImplementedError

    def reach(self, base, attachment, generator):
        shape = base.anatomy.shape
        self.parameters(shape)  # raises for a sublayer that the base does not have
        for sublayer in base.anatomy.sublayers:
            if sublayer.kind in self.sublayers:
                f = Bottleneck(shape.d_model, self.bottleneck, self.non_linearity, self.scaling)
                self.initialise(f, generator)
                attachment.enter(SublayerOutput(sublayer, f, self.beside), f)

    def parameters(self, shape: Shape) -> int:
        """2 m d_model + m + d_model for every sublayer with an adapter."""
        m, d = self.bottleneck, shape.d_model
        return sum(map(shape.sublayers, self.sublayers)) * (2 * m * d + m + d)
