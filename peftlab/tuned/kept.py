"""Several adapters on one base: kept by name, and put in place for a batch or row by row."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peftlab.bases import LanguageModel
from peftlab.methods.lora import LowRankDelta
from peftlab.sites import Site
from peftlab.tuned import layouts, saving

Names = str | list[str] | tuple[str, ...] | dict[str, int | float] | None


def keep(tuned: LanguageModel, name: str, folder: str | Path | None = None) -> None:
    """See `Tuned.keep`."""
    for attachment in tuned.attachments:
        swapped = attachment.sources or all(site.delta is not None for site in attachment.sites)
        if attachment.trainable and not swapped:
            raise ValueError(
                f"{attachment.method.title} cannot be kept and swapped: soft prompts and deltas can"
            )
    state = tuned.state()
    if folder is not None:
        config, fill = saving.read(folder, tuned.base)
        saving.check_kind(config, tuned)
        wanted, state = state, fill(tuned)
        layouts.check_shapes(state, wanted)
    tuned.kept[name] = {key: tensor.to(tuned.device) for key, tensor in state.items()}


def use(tuned: LanguageModel, names: Names) -> None:
    """See `Tuned.use`."""
    wanted = [names] if isinstance(names, str) else list(names or [])
    _check(tuned, names, wanted)
    rows = wanted if isinstance(names, (list, tuple)) else None
    weights = names if isinstance(names, dict) else dict.fromkeys(wanted, 1.0)
    instead: dict[Site, object] = dict.fromkeys(tuned.sources.values())
    for place, source in tuned.sources.items():
        if wanted:
            prompts = [_below(f"{place}.", tuned.kept[name]) for name in wanted]
            stacked = {key: torch.stack([each[key] for each in prompts]) for key in prompts[0]}
            instead[source] = stacked if rows else prompts[0]
    for attachment in tuned.attachments:
        for site in attachment.sites:
            if site.delta is not None:
                place = f"{attachment.method.name}.{site.name}."
                kept = {name: Kept(site.delta, _below(place, tuned.kept[name])) for name in wanted}
                instead[site] = Deltas(kept, weights, rows) if wanted else None
    linear = tuned.linear
    if wanted and tuned.head is not None:
        linear = copy.deepcopy(tuned.linear).requires_grad_(False)
        linear.load_state_dict(_below("head.", tuned.kept[names]))
    for site, what in instead.items():  # all of it is made before anything is replaced
        site.instead = what
    tuned.using, tuned._linear_now = names if wanted else None, linear


def _check(tuned: LanguageModel, names: Names, wanted: list[str]) -> None:
    """Raise KeyError or ValueError unless these can be put in place."""
    if unknown := [name for name in wanted if name not in tuned.kept]:
        raise KeyError(f"nothing was kept as {unknown[0]!r}: there are {sorted(tuned.kept)}")
    if tuned.merged:
        raise ValueError("the deltas are merged: call unmerge() before use()")
    if wanted and not isinstance(names, str) and tuned.head is not None:
        raise ValueError("a head is one for the whole batch: use one name")
    if isinstance(names, dict):
        if tuned.sources:
            raise ValueError("soft prompts have no weighted sum: name one, or one for each row")
        for name, weight in names.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} is {weight!r}: a number is needed")


def _below(start: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start so, by the rest of their names."""
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}


@dataclass
class Kept:
    """A delta that runs with kept tensors in place of those that train."""

    delta: nn.Module
    tensors: dict[str, Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.delta, self.tensors, inputs)

    def delta_weight(self) -> Tensor:
        """ΔW of the kept tensors."""
        names = {f"delta.{name}": tensor for name, tensor in self.tensors.items()}
        return torch.func.functional_call(_Weight(self.delta), names, ())


class _Weight(nn.Module):
    """A delta whose `forward` returns ΔW, because `functional_call` calls no other method."""

    def __init__(self, delta: nn.Module):
        super().__init__()
        self.delta = delta

    def forward(self) -> Tensor:
        return self.delta.delta_weight()


@dataclass
class Deltas:
    """Several kept deltas beside one weight: Σ w_i ΔW_i, or one delta for each row of the batch.

    The weights multiply the deltas, not their factors: a sum of factors, (B₁ + B₂)(A₁ + A₂), would
    contain products of one adapter's A with another's B.

    For rows with LoRA's deltas `factors` has the A of every row, (batch, r, d_in), and its B.
    """

    deltas: dict[str, Kept]
    weights: dict[str, int | float]
    rows: list[str] | None

    def __post_init__(self):
        self.factors: dict[str, Tensor] = {}
        if self.rows and all(type(kept.delta) is LowRankDelta for kept in self.deltas.values()):
            each = [self.deltas[name].tensors for name in self.rows]
            self.factors = {key: torch.stack([tensors[key] for tensors in each]) for key in "AB"}

    def apply(self, site: Site, *inputs: Tensor) -> Tensor:
        """The output of all deltas, (batch, seq, d_out), where the site knows that of one."""
        if self.rows is None:
            return sum(w * site.added(self.deltas[k], *inputs) for k, w in self.weights.items())
        if len(self.rows) != len(inputs[0]):
            raise ValueError(f"{len(self.rows)} deltas for a batch of {len(inputs[0])} rows")
        if self.factors and site.linear.mask is None and inputs[0].ndim == 3:
            return low_rank_rows(site.delta, *inputs, **self.factors)
        return self.one_by_one(site, *inputs)

    def one_by_one(self, site: Site, *inputs: Tensor) -> Tensor:
        """The output for rows of different deltas: each delta runs once, on its own rows."""
        parts, order = [], []
        for name, delta in self.deltas.items():
            its = [i for i, row in enumerate(self.rows) if row == name]
            parts.append(site.added(delta, *(tensor[its] for tensor in inputs)))
            order += its
        return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]

    def delta_weight(self) -> Tensor:
        """Σ w_i ΔW_i. Raises ValueError if rows have different deltas."""
        if self.rows is not None:
            raise ValueError("rows with deltas of their own cannot be merged into one weight")
        return sum(w * self.deltas[name].delta_weight() for name, w in self.weights.items())


def low_rank_rows(
    delta: LowRankDelta,
    x: Float[Tensor, "batch seq d_in"],
    A: Float[Tensor, "batch r d_in"],
    B: Float[Tensor, "batch d_out r"],
) -> Float[Tensor, "batch seq d_out"]:
    """s B (A x) with an A and a B for every row: two batched products, however many adapters."""
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(A.dtype)
    low = delta.dropout(x) @ A.mT * delta.scale  # batch seq r
    return low @ B.mT
