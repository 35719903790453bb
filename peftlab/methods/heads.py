"""Heads: small trained layers on the last hidden states, in place of the language model's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.bases.draws import drawing
from peftlab.methods.checks import described


@dataclass(frozen=True)
class Head:
    """A linear layer from d_model to a few classes, drawn at random as in P-tuning v2.

    It reads only the real tokens. Its parameters are counted apart from the method's.
    """

    kind: ClassVar[str]
    classes: ClassVar[int]  # the number of outputs for each token, or for each text

    def parameters(self, d_model: int) -> int:
        """d_model · classes + classes."""
        return (d_model + 1) * self.classes

    def build(self, d_model: int, generator: torch.Generator) -> nn.Linear:
        """The layer: weights normal with σ = 0.02, biases zero."""
        with drawing(0):  # torch draws numbers of its own first
            linear = nn.Linear(d_model, self.classes)
        nn.init.normal_(linear.weight, std=0.02, generator=generator)
        nn.init.zeros_(linear.bias)
        return linear

    def logits(
        self, linear, hidden: Float[Tensor, "batch seq d_model"], mask: Int[Tensor, "batch seq"]
    ) -> Tensor:
        """(batch, seq, classes), or (batch, classes) if the head reads the whole text."""
        return linear(hidden.to(linear.weight.dtype))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the labels that are not −100, in nats."""
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())

    def to_dict(self) -> dict:
        """The kind and the fields, ready for JSON."""
        return {"head": self.kind, **asdict(self)}

    @staticmethod
    def from_dict(config: dict) -> Head:
        """The inverse of `to_dict`. Raises ValueError for an unknown head, and for bad options."""
        return described(config, "head", HEADS)


@dataclass(frozen=True)
class _Labelled(Head):
    labels: tuple[str, ...] | list[str]

    def __post_init__(self):
        one = isinstance(self.labels, str)
        object.__setattr__(self, "labels", (self.labels,) if one else tuple(self.labels))
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={self.labels}: two or more different labels are needed")

    @property
    def classes(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Tagging(_Labelled):
    """A label for each token. Labels of a batch are (batch, seq), −100 at unlabelled tokens."""

    kind = "tagging"


@dataclass(frozen=True)
class Classification(_Labelled):
    """One label for a text, from the mean of its hidden states or the first: labels (batch,)."""

    pool: str = "mean"
    kind = "classification"

    def __post_init__(self):
        super().__post_init__()
        if self.pool not in ("mean", "first"):
            raise ValueError(f"pool={self.pool!r}: allowed is mean, first")

    def logits(self, linear, hidden, mask):
        if self.pool == "mean":
            weight = mask.to(hidden).unsqueeze(-1)
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        else:
            pooled = hidden.take_along_dim(mask.int().argmax(dim=1)[:, None, None], dim=1)[:, 0]
        return linear(pooled.to(linear.weight.dtype))


@dataclass(frozen=True)
class Spans(Head):
    """Start and end of an answer: two numbers a token. Labels of a batch are (batch, 2)."""

    kind = "spans"
    classes = 2

    def logits(self, linear, hidden, mask):
        scores = super().logits(linear, hidden, mask)
        return scores.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(scores.dtype).min)

    def loss(self, logits, labels):
        """The mean of the two cross entropies over the tokens of the text."""
        return F.cross_entropy(logits.float().transpose(1, 2).flatten(0, 1), labels.flatten())


HEADS = {head.kind: head for head in (Tagging, Classification, Spans)}
