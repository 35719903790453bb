"""The common parts of soft prompts: their initial values, their readers and their modules.

A module makes a soft prompt: its `forward()` returns tensors by name, {"prompt": P} at the input,
{"P_k": …, "P_v": …} in attention. A flat module holds them as parameters; of one that computes them
only the results are stored.
"""

import contextlib
import math
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peftlab.attention import AttentionSite, recorded
from peftlab.bases import Base
from peftlab.bases.plain import plain
from peftlab.methods.method import Attachment
from peftlab.sites import Source

PROMPT_INITS = ("vocabulary", "text", "random", "normal", "zero")
PREFIX_INITS = ("vocabulary", "text", "random", "zero")


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

    [P_k; P_v] = W₂ tanh(W₁ E + b₁) + b₂      E (P, d_model), W₁ (m, d_model), W₂ (2·S·d_kv, m)

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
    """P = g(E): a table E (P, d_model) and the network g that makes the prompt from it.

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


@contextlib.contextmanager
def seeded(generator: torch.Generator):
    """Inside, torch's own generator continues `generator`; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        with plain():
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        yield


def token_ids(base: Base, init: str, text: str | None, count: int, generator) -> Tensor:
    """`count` token ids: those of a text, repeated or cut, or ids drawn from the vocabulary."""
    if init == "text":
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor((ids * (count // len(ids) + 1))[:count])
    known = min(len(base.tokenizer), base.anatomy.embedding.num_embeddings)
    return torch.randint(known, (count,), generator=generator)


def initial_prompt(
    base: Base, init: str, text: str | None, count: int, generator: torch.Generator
) -> Float[Tensor, "virtual d_model"]:
    """The initial values of a prompt, on the CPU; `PromptTuning` describes each `init`."""
    table = base.anatomy.embedding.weight.detach().cpu()
    size = (count, table.shape[1])
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    if init == "zero":
        return torch.zeros(size, dtype=table.dtype)
    if init == "random":
        return torch.rand(size, generator=generator, dtype=table.dtype) - 0.5
    if init == "normal":
        return table.std() * torch.randn(size, generator=generator, dtype=table.dtype)
    return table[token_ids(base, init, text, count, generator)].clone()


def initial_prefix(
    base: Base, sites: list[AttentionSite], init: str, text: str | None, count: int, generator
) -> dict[str, Float[Tensor, "sites kv_heads virtual head_dim"]]:
    """The initial values of a prefix, on the CPU; `PrefixTuning` describes each `init`."""
    weight = base.anatomy.embedding.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    size = (2, len(sites), sites[0].kv_heads, count, sites[0].head_dim)
    if init == "zero":
        made = torch.zeros(size, dtype=dtype)
    elif init == "random":
        made = torch.randn(size, generator=generator, dtype=dtype)
    else:
        ids = token_ids(base, init, text, count, generator).to(weight.device)
        made = keys_values(base, sites, ids).to("cpu", dtype)
    return {"P_k": made[0].clone(), "P_v": made[1].clone()}


@torch.no_grad()
def keys_values(
    base: Base, sites: list[AttentionSite], ids: Tensor
) -> Float[Tensor, "2 sites kv_heads virtual head_dim"]:
    """The keys and values of a text's tokens in every sublayer, with positions from 0 on.

    An encoder-decoder reads the text on both sides. Virtual tokens of another method are left out.
    """
    ids = ids[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.kind == "encoder-decoder":
        given["decoder_input_ids"] = ids
    else:
        given["position_ids"] = base.anatomy.positions(given["attention_mask"])
    with base._evaluating(), base.anatomy.alone(), recorded(base.model, sites) as records:
        base.model(**given)
    read = [records[site.name] for site in sites]
    return torch.stack([torch.stack([x.key[0], x.value[0]]) for x in read], dim=1)


def attentions(base: Base, reaches: Callable[[AttentionSite, int], bool]) -> list[AttentionSite]:
    """The attention sublayers that get a prefix: those with reaches(sublayer, layers of its stack).

    Raises ValueError if the base has none.
    """
    shape = base.anatomy.shape
    layers = {"decoder": shape.decoder_layers}
    sites = [s for s in base.anatomy.attentions if reaches(s, layers.get(s.stack, shape.layers))]
    if not sites:
        why = "its family does not use transformers' attention registry"
        raise ValueError(f"{base.name} computes attention in a way that no prefix reaches: {why}")
    return sites


def put(attachment: Attachment, module: nn.Module) -> Source:
    """Enter the source of a soft prompt, name its trainable parameters, and return it."""
    name = attachment.method.name
    attachment.hold(module, name)
    made = "" if isinstance(module, Flat) else "encoder."
    for key, parameter in module.named_parameters():
        attachment.trainable[f"{name}.{made}{key}"] = parameter
    source = Source(name, attachment.base.anatomy, module)
    attachment.sources[name] = attachment.enter(source)
    return source


def blocks(base: Base, placement: tuple | None, count: int) -> list[tuple[int, str, int | None]]:
    """The placement with token ids. Raises ValueError for a text that is not one token."""
    resolved = []
    for size, where in placement or [(count, "front")]:
        (side, _, text), token = where.partition(" "), None
        if text:
            ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(f"{text!r} is {len(ids)} tokens of {base.name}: one is needed")
            token = ids[0]
        elif side == "back" and base.kind == "decoder":
            raise ValueError("on a decoder nothing can stand behind a text that goes on")
        resolved.append((size, side, token))
    return resolved
