"""Measurements inside a model: attention and its gate, what stands in front of a text, the nearest
tokens of a prompt, the spectrum of an update, forgetting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from peftlab.attention import Record, attention_weights, recorded, weighted_sum
from peftlab.bases import Base, LanguageModel, listed


@dataclass
class AttentionMap:
    """Attention of one text in every sublayer: `records` by sublayer, and the tokens as text.

    The rows of `weights(name)` are the queries: `tokens`, or `targets` in T5's decoder. The columns
    are the virtual tokens, if any, and then the real ones: `keys(name)` names them all.
    """

    records: dict[str, Record]
    tokens: list[str]
    targets: list[str]

    def weights(self, name: str) -> Float[Tensor, "heads queries keys"]:
        """Attention weights of one sublayer; each row sums to 1."""
        return self.records[name].weights[0]

    def queries(self, name: str) -> list[str]:
        """The tokens that this sublayer computes queries for."""
        return self.targets if name.startswith("decoder.") else self.tokens

    def keys(self, name: str) -> list[str]:
        """The names of the columns: P1, P2, … and then the real tokens."""
        record, inner = self.records[name], name.startswith("decoder.")
        real = self.targets if inner and not name.endswith(".cross") else self.tokens
        more = record.key.shape[2] - record.virtual - len(real)  # virtual tokens of the input
        return [f"P{i + 1}" for i in range(record.virtual + more)] + list(real)

    def gate(self, name: str) -> Float[Tensor, "heads queries"]:
        """λ: the share of each query's attention that goes to the prefix, from 0 to 1."""
        record = self.records[name]
        return record.weights[0, :, :, : record.virtual].sum(dim=-1)


@torch.no_grad()
def attention_map(model: LanguageModel, text: str, target: str = "") -> AttentionMap:
    """Run one text and record every attention sublayer that a prefix can reach.

    An encoder-decoder reads `target` in its decoder. Raises ValueError for an empty text.
    """
    [text, target] = listed([text, target])
    encoded = model.tokenizer([text], return_tensors="pt").to(model.device)
    ids = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("an empty text: there is nothing to attend to")
    given, targets = {}, []
    if model.kind == "encoder-decoder":
        answer = model.tokenizer(target, add_special_tokens=False)["input_ids"]
        answer = torch.tensor([model.decoder_start + answer], device=model.device)
        given, targets = {"decoder_input_ids": answer}, _pieces(model, answer[0])
    with model._evaluating(), recorded(model.model, model.anatomy.attentions) as records:
        model(ids, encoded["attention_mask"], **given)
    return AttentionMap(dict(records), _pieces(model, ids[0]), targets)


def _pieces(model: LanguageModel, ids: Tensor) -> list[str]:
    return [model.tokenizer.decode([i]) for i in ids.tolist()]


@dataclass
class Gate:
    """One attention sublayer taken apart: output = (1 − λ) · text + λ · prefix.

    `gate` is λ (batch, heads, queries, 1); the others are (batch, heads, queries, head_dim). The
    model computed `output`; `text` is attention over the text alone and `prefix` attention over
    the virtual keys alone, both from the same queries.
    """

    gate: Tensor
    output: Tensor
    text: Tensor
    prefix: Tensor

    @property
    def error(self) -> float:
        """The largest absolute difference between the two sides of the equation."""
        mixed = (1 - self.gate) * self.text + self.gate * self.prefix
        return (self.output - mixed).abs().max().item()


def gate(record: Record) -> Gate:
    """Take apart one recorded attention with a prefix.

    He et al. 2022, arXiv:2110.04366, equation 7. Raises ValueError if there is no prefix.
    """
    count = record.virtual
    if count == 0:
        raise ValueError("no prefix was attended to here")

    def alone(part: slice) -> Tensor:
        added = None if record.mask is None else record.mask[..., part]
        weights = attention_weights(record.query, record.key[:, :, part], added, record.scaling)
        return weighted_sum(weights, record.value[:, :, part])

    share = record.weights[..., :count].sum(dim=-1, keepdim=True)
    return Gate(share, record.output, alone(slice(count, None)), alone(slice(count)))


@dataclass(frozen=True)
class InFront:
    """What stands in front of the text in one layer of an encoder.

    Of its virtual states `enter` are vectors that trained and come in here, and `computed` are what
    the layer below made; `keys` are virtual keys, and values, that belong to no state.
    """

    enter: int
    computed: int
    keys: int

    @property
    def states(self) -> int:
        """Virtual states, which have queries as well as keys."""
        return self.enter + self.computed


@torch.no_grad()
def in_front(tuned, ids: Int[Tensor, "texts seq"]) -> list[InFront]:
    """Measure what stands in front of two different texts, in each layer and behind the last.

    A virtual state that is the same for both texts enters there; one that differs was computed.
    `tuned` is an adapted encoder without padding in `ids`. Raises ValueError if it is no encoder,
    and unless there are two texts.
    """
    if tuned.kind != "encoder" or len(ids) != 2:
        raise ValueError("two texts of one length, and an encoder: a decoder's states do not tell")
    ((_, blocks),) = tuned.anatomy.layers.items()
    states: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda m, args: states.append(args[0])) for block in blocks
    ]
    hooks.append(blocks[-1].register_forward_hook(lambda m, args, out: states.append(out)))
    try:
        with tuned._evaluating(), recorded(tuned.model, tuned.anatomy.attentions) as records:
            tuned(ids, torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    keys = [record.key.shape[2] for record in records.values()]
    keys.append(states[-1].shape[1])  # behind the last layer nobody asks
    found = []
    for state, count in zip(states, keys, strict=True):
        virtual = state.shape[1] - ids.shape[1]
        enter = int((state[0, :virtual] == state[1, :virtual]).all(dim=-1).sum())
        found.append(InFront(enter, virtual - enter, count - state.shape[1]))
    return found


def nearest_tokens(
    prompt: Float[Tensor, "virtual d_model"], base: Base, k: int = 3
) -> list[list[tuple[str, float]]]:
    """The k vocabulary tokens whose embeddings are closest in direction to each vector.

    Returns, for each virtual token, (token text, cosine similarity) pairs, best first. A near
    token is a neighbour, not a translation: vectors far from every token have neighbours too.
    """
    table = base.anatomy.embedding.weight.detach()
    cosine = F.normalize(prompt.detach().to(table), dim=1) @ F.normalize(table, dim=1).T
    values, ids = cosine[:, : len(base.tokenizer)].topk(k, dim=1)
    return [
        [(base.tokenizer.decode([i]), v) for i, v in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def spectrum(delta_weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " rank"]:
    """Singular values of an update ΔW, largest first, in float64 and on the CPU."""
    return torch.linalg.svdvals(delta_weight.detach().double().cpu())


def energy(singular_values: Float[Tensor, " rank"], r: int) -> float:
    """The share of ‖ΔW‖² that the best rank-r approximation keeps, from 0 to 1."""
    squares = singular_values.square()
    return (squares[:r].sum() / squares.sum()).item()


def numerical_rank(delta_weight: Float[Tensor, "d_out d_in"]) -> int:
    """How many singular values exceed float32 rounding: σ > σ₁ · max(d_out, d_in) · ε."""
    values = spectrum(delta_weight)
    threshold = values[0] * max(delta_weight.shape) * torch.finfo(torch.float32).eps
    return int((values > threshold).sum())


def forgetting(model: LanguageModel, texts: list[str], before: float) -> float:
    """How much worse the model predicts its old text: loss now − loss before, nats per token."""
    return model.loss(texts) - before
