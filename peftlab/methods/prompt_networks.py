"""The modules that make a soft prompt.

`forward()` returns the prompt's tensors by name: {"prompt": P} at the input, {"P_k": …, "P_v": …}
in attention. A flat module holds them as parameters; of one that computes them only the results
are stored.
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peftlab.attention import AttentionSite
from peftlab.bases.draws import drawing
from peftlab.bases.plain import plain


class Flat(nn.Module):
    """Tensors that train directly."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


class PrefixMLP(nn.Module):
    r"""One MLP makes the keys and values of every sublayer from one table.

    [P_k; P_v] = tanh(Z W₁ᵀ + b₁) W₂ᵀ + b₂    Z (P, d_model), W₁ (m, d_model), W₂ (2·S·d_kv, m)

    S is the number of attention sublayers. With `with_prompt` the table is also the virtual tokens
    of the input and is returned as the prompt.
    """

    def __init__(self, table: Tensor, m: int, sites: list[AttentionSite], with_prompt=False):
        super().__init__()
        self.size = (2, len(sites), sites[0].kv_heads, sites[0].head_dim)
        W_1, W_2 = nn.Linear(table.shape[1], m), nn.Linear(m, math.prod(self.size))
        self.table, self.mlp = nn.Parameter(table), nn.Sequential(W_1, nn.Tanh(), W_2)
        self.with_prompt = with_prompt

    def forward(self) -> dict[str, Tensor]:
        made = self.mlp(self.table).view(-1, *self.size)  # P 2 S kv_heads head_dim
        P_k, P_v = made.permute(1, 2, 3, 0, 4)  # 2 S kv_heads P head_dim
        prompt = {"prompt": self.table} if self.with_prompt else {}
        return {"P_k": P_k, "P_v": P_v, **prompt}


class PromptEncoder(nn.Module):
    """P = g(Z): a table Z (P, d_model) and the network g that makes the prompt from it.

    lstm       two directions, `layers` deep, then an MLP
    mlp        an MLP on each virtual token alone
    attention  one multi-head self-attention over the virtual tokens, then the MLP

    `sizes` says whose code the widths follow. The MLPs use ReLU.
    """

    def __init__(self, table: Tensor, encoder: str, sizes: str, hidden: int, layers: int):
        super().__init__()
        d = table.shape[1]
        self.table = nn.Parameter(table)
        self.mix: nn.Module | None = None
        if encoder == "lstm":
            self.mix = nn.LSTM(d, hidden, layers, bidirectional=True, batch_first=True)
        elif encoder == "attention":
            self.mix = nn.MultiheadAttention(d, 4 if d % 4 == 0 else 1, batch_first=True)
        self.mlp = nn.Sequential()
        for widths in pairwise(mlp_widths(encoder, sizes, hidden, d)):
            self.mlp.extend([nn.Linear(*widths), nn.ReLU()])
        del self.mlp[-1]  # no ReLU on the prompt itself

    def train(self, mode: bool = True) -> nn.Module:
        """Nothing here depends on `mode`, but a GPU's LSTM has no gradient unless it trains."""
        super().train(mode)
        if isinstance(self.mix, nn.LSTM):
            self.mix.train()
        return self

    def forward(self) -> dict[str, Float[Tensor, "virtual d_model"]]:
        x = self.table[None]
        if isinstance(self.mix, nn.LSTM):
            x, _ = self.mix(x)
        elif self.mix is not None:
            x, _ = self.mix(x, x, x, need_weights=False)
        return {"prompt": self.mlp(x)[0]}


def mlp_widths(encoder: str, sizes: str, hidden: int, d: int) -> tuple[int, ...]:
    """The widths of the MLP from its input to d_model."""
    if sizes == "peft":
        return (2 * hidden, 2 * hidden, d) if encoder == "lstm" else (d, hidden, hidden, d)
    return (2 * hidden if encoder == "lstm" else d, d, d)


def seeded(generator: torch.Generator):
    """A context in which torch draws what continues `generator`."""
    with plain():
        return drawing(int(torch.randint(2**31, (1,), generator=generator)))
