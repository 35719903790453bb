"""What the soft prompts share: where they start, what reads them, and what makes them.

A soft prompt is made by a module whose `forward()` returns its tensors by name: {"prompt": P} at
the input, {"P_k": …, "P_v": …} in attention. A flat module holds them as parameters. A
reparameterised one computes them, and only what it computes is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peftlab import attention
from peftlab.attention import AttentionSite
from peftlab.bases import Base
from peftlab.bases.tape import Tape, Value

PROMPT_INITS = ("vocabulary", "text", "random", "normal", "zero")
PREFIX_INITS = ("vocabulary", "text", "random", "zero")


class Source:
    """What a site reads at every forward: the tensors of a module, or others put in their place.

    Inside `held()` nothing trains, and the module is run once for all forwards.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.instead: dict[str, Tensor] | None = None
        self._made: dict[str, Tensor] | None = None

    def __call__(self) -> dict[str, Tensor]:
        if self.instead is not None:
            return self.instead
        return self.module() if self._made is None else self._made

    @contextlib.contextmanager
    def held(self):
        """Inside, what the module makes now is what every forward reads."""
        self._made = self.module()
        try:
            yield
        finally:
            self._made = None


class Flat(nn.Module):
    """Tensors that train as they are."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


class PrefixMLP(nn.Module):
    r"""Keys and values of every sublayer from one table, through one MLP.

    [P_k; P_v] = W₂ tanh(W₁ E + b₁) + b₂      E (P, d_model), W₁ (m, d_model), W₂ (2·S·d_kv, m)

    S is the number of attention sublayers. The table may be the virtual tokens of the input as
    well (`with_prompt`), which is then returned beside them.
    """

    def __init__(
        self, table: Tensor, m: int, sites: list[AttentionSite], with_prompt: bool = False
    ):
        super().__init__()
        self.size = (2, len(sites), sites[0].kv_heads, sites[0].head_dim)
        out = 2 * len(sites) * sites[0].kv_heads * sites[0].head_dim
        self.table = nn.Parameter(table)
        self.mlp = nn.Sequential(nn.Linear(table.shape[1], m), nn.Tanh(), nn.Linear(m, out))
        self.with_prompt = with_prompt

    def forward(self) -> dict[str, Tensor]:
        made = self.mlp(self.table).view(-1, *self.size)  # P 2 S kv_heads head_dim
        P_k, P_v = made.permute(1, 2, 3, 0, 4)  # 2 S kv_heads P head_dim
        prompt = {"prompt": self.table} if self.with_prompt else {}
        return {"P_k": P_k, "P_v": P_v, **prompt}


class PromptEncoder(nn.Module):
    """P = g(E): a table E (P, d_model) and the network g that makes the prompt of it.

    lstm       two directions, `layers` deep, then an MLP
    mlp        an MLP on each virtual token alone
    attention  one multi-head self-attention over the virtual tokens, then the MLP

    `sizes` says whose code: see `methods.PTuning`. The MLPs use ReLU.
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
        widths = mlp_widths(encoder, sizes, hidden, d)
        for i, (wide_in, wide_out) in enumerate(zip(widths, widths[1:], strict=False)):
            if i:
                self.mlp.append(nn.ReLU())
            self.mlp.append(nn.Linear(wide_in, wide_out))

    def train(self, mode: bool = True) -> PromptEncoder:
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


def encoder_footprint(tape: Tape, encoder: str, widths: tuple[int, ...], P: int, d: int) -> None:
    """What a `PromptEncoder` keeps on a tape. An LSTM's kernel has a workspace, not counted."""
    x = Value(P, d, True)  # the table itself is a parameter
    if encoder == "lstm":
        x = Value(P, widths[0], True)
    elif encoder == "attention":
        out = Value(P, d, True)
        tape.keep(Value(P, 3 * d), out, Value(P, 4 if d % 4 == 0 else 1))
        x = tape.linear(out, d, weight=True)
    for i, wide_out in enumerate(widths[1:]):
        x = tape.act(x, "relu") if i else x
        x = tape.linear(x, wide_out, weight=i > 0 or encoder != "mlp")


@contextlib.contextmanager
def seeded(generator: torch.Generator):
    """Inside, torch's own generator continues `generator`; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        yield


def token_ids(base: Base, init: str, text: str | None, count: int, generator) -> Tensor:
    """`count` tokens: those of a text, repeated or cut, or drawn from the vocabulary."""
    if init == "text":
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor((ids * (count // len(ids) + 1))[:count])
    known = min(len(base.tokenizer), base.anatomy.embedding.num_embeddings)
    return torch.randint(known, (count,), generator=generator)


def initial_prompt(
    base: Base, init: str, text: str | None, count: int, generator: torch.Generator
) -> Float[Tensor, "virtual d_model"]:
    """Where a prompt starts, on the CPU; see `PromptTuning` for what each `init` means."""
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
    base: Base,
    sites: list[AttentionSite],
    init: str,
    text: str | None,
    count: int,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "sites kv_heads virtual head_dim"]]:
    """Where a prefix starts, on the CPU; see `PrefixTuning` for what each `init` means."""
    weight = base.anatomy.embedding.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    size = (len(sites), sites[0].kv_heads, count, sites[0].head_dim)
    if init == "zero":
        return {name: torch.zeros(size, dtype=dtype) for name in ("P_k", "P_v")}
    if init == "random":
        drawn = torch.randn(2, *size, generator=generator, dtype=dtype)
        return {"P_k": drawn[0].clone(), "P_v": drawn[1].clone()}
    ids = token_ids(base, init, text, count, generator)
    return keys_values(base, sites, ids.to(weight.device))


@torch.no_grad()
def keys_values(
    base: Base, sites: list[AttentionSite], ids: Tensor
) -> dict[str, Float[Tensor, "sites kv_heads virtual head_dim"]]:
    """The keys and values of a text's tokens in every sublayer, positions from 0 on.

    An encoder-decoder reads the text on both sides. Virtual tokens of another method take no part.
    """
    ids = ids[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.kind == "encoder-decoder":
        given["decoder_input_ids"] = ids
    else:
        given["position_ids"] = base.anatomy.positions(given["attention_mask"])
    with (
        base._evaluating(),
        base.anatomy.alone(),
        attention.recorded(base.model, sites) as records,
    ):
        base.model(**given)
    made = {
        "P_k": torch.stack([records[site.name].key[0] for site in sites]),
        "P_v": torch.stack([records[site.name].value[0] for site in sites]),
    }
    dtype = torch.promote_types(base.anatomy.embedding.weight.dtype, torch.float32)
    return {name: tensor.to("cpu", dtype).clone() for name, tensor in made.items()}


def check_init(init: str, text: str | None, allowed: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown start, or a text without its start or the other way round."""
    if init not in allowed:
        raise ValueError(f"init={init!r}: allowed is {', '.join(allowed)}")
    if (init == "text") != bool(text):
        raise ValueError('init="text" and a non-empty init_text go together')


def check_placement(placement, total: int) -> tuple[tuple[int, str], ...] | None:
    """The blocks of a placement as (count, where) pairs, None for none.

    Raises ValueError unless they are such pairs, of places that exist, with `total` virtual tokens.
    """
    if placement is None:
        return None
    try:
        blocks = tuple((count, where) for count, where in placement)
        if not all(isinstance(where, str) for _, where in blocks):
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(
            f"placement={placement!r}: give (count, where) pairs, such as [(3, 'front')]"
        ) from None
    for count, where in blocks:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"a count of placement={count!r}: allowed is a whole number from 1 on")
        if where not in ("front", "back") and not where.startswith(("before ", "after ")):
            raise ValueError(f"{where!r}: allowed is front, back, 'before X', 'after X'")
    if (given := sum(count for count, _ in blocks)) != total:
        raise ValueError(f"placement has {given} virtual tokens, num_virtual_tokens={total}")
    return blocks


def put(base: Base, attachment, name: str, module: nn.Module) -> Callable[[], dict[str, Tensor]]:
    """Move a soft prompt to the base's device, name what trains, and return what a site reads."""
    weight = base.anatomy.embedding.weight
    module.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    made = "" if isinstance(module, Flat) else "encoder."
    for key, parameter in module.named_parameters():
        attachment.trainable[f"{name}.{made}{key}"] = parameter
    attachment.modules[name] = module
    source = Source(module)
    attachment.sources[name] = source
    return source
