"""Several adapters on one base: kept by name, and put in place for a batch or row by row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from peftlab.bases import LanguageModel
from peftlab.tuned import saving

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
        saving.check_base(config, tuned.base)
        saving.check_kind(config, tuned)
        saved = fill(tuned)
        saving.check_shapes(saved, state)
        state = saved
    tuned.kept[name] = {key: tensor.to(tuned.device) for key, tensor in state.items()}


def use(tuned: LanguageModel, names: Names) -> None:
    """See `Tuned.use`."""
    wanted = [names] if isinstance(names, str) else list(names or [])
    several, weights = not isinstance(names, str), names if isinstance(names, dict) else None
    _check(tuned, wanted, several, weights)
    tuned.using = names if wanted else None
    for name, source in tuned.sources.items():
        source.instead = None
        if wanted:
            rows = [_of_source(tuned, name, row) for row in wanted]
            stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            source.instead = stacked if several else rows[0]
    rows = wanted if several and weights is None else None
    if rows is None and weights is None:
        weights = dict.fromkeys(wanted, 1.0)
    for site in tuned._sites:
        if site.delta is not None:
            kept = {name: _of_delta(tuned, site.delta, name) for name in wanted}
            site.instead = Deltas(kept, weights, rows) if wanted else None
    tuned._linear_now = tuned.linear
    if wanted and tuned.head is not None:
        tuned._linear_now = copy.deepcopy(tuned.linear).requires_grad_(False)
        kept = {key: tuned.kept[names][f"head.{key}"] for key in ("weight", "bias")}
        tuned._linear_now.load_state_dict(kept)


def _check(tuned: LanguageModel, wanted: list[str], several: bool, weights: dict | None) -> None:
    """Raise KeyError or ValueError unless these can be put in place."""
    if unknown := [name for name in wanted if name not in tuned.kept]:
        raise KeyError(f"nothing was kept as {unknown[0]!r}: there are {sorted(tuned.kept)}")
    if tuned.merged:
        raise ValueError("the deltas are merged: call unmerge() before use()")
    if wanted and several and tuned.head is not None:
        raise ValueError("a head is one for the whole batch: use one name")
    if weights is not None and tuned.sources:
        raise ValueError("soft prompts have no weighted sum: name one, or one for each row")
    for name, weight in (weights or {}).items():
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} is {weight!r}: a number is needed")


def _of_delta(tuned: LanguageModel, delta: nn.Module, name: str) -> Kept:
    """The kept tensors of this delta, by the delta's own names for them."""
    own = {id(t): key for key, t in (*delta.named_parameters(), *delta.named_buffers())}
    places = tuned.trainable | tuned.frozen
    its = {key: own[id(place)] for key, place in places.items() if id(place) in own}
    return Kept(delta, {own_name: tuned.kept[name][key] for key, own_name in its.items()})


def _of_source(tuned: LanguageModel, source: str, row: str) -> dict[str, Tensor]:
    start = f"{source}."
    kept = tuned.kept[row].items()
    return {key.removeprefix(start): t for key, t in kept if key.startswith(start)}


class Kept:
    """A delta that runs with kept tensors in place of those that train."""

    def __init__(self, delta: nn.Module, tensors: dict[str, Tensor]):
        self.delta, self.tensors = delta, tensors

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


class Deltas:
    """Several kept deltas beside one weight: Σ w_i ΔW_i, or one delta for each row of the batch.

    The weights multiply the deltas, not their factors: a sum of factors, (B₁ + B₂)(A₁ + A₂), would
    contain products of one adapter's A with another's B.
    """

    def __init__(
        self,
        deltas: dict[str, Kept],
        weights: dict[str, float] | None = None,
        rows: list[str] | None = None,
    ):
        self.deltas, self.weights, self.rows = deltas, weights, rows

    def apply(self, added: Callable, *inputs: Tensor) -> Tensor:
        """The output of all deltas, where `added(delta, *inputs)` is the output of one."""
        if self.rows is None:
            return sum(w * added(self.deltas[name], *inputs) for name, w in self.weights.items())
        if len(self.rows) != len(inputs[0]):
            raise ValueError(f"{len(self.rows)} deltas for a batch of {len(inputs[0])} rows")
        parts, order = [], []
        for name, delta in self.deltas.items():  # each delta runs once, on its own rows
            its = [i for i, row in enumerate(self.rows) if row == name]
            parts.append(added(delta, *(tensor[its] for tensor in inputs)))
            order += its
        where = torch.tensor(order, device=parts[0].device).argsort()
        return torch.cat(parts)[where]

    def delta_weight(self) -> Tensor:
        """Σ w_i ΔW_i. Raises ValueError if rows have different deltas."""
        if self.rows is not None:
            raise ValueError("rows with deltas of their own cannot be merged into one weight")
        return sum(w * self.deltas[name].delta_weight() for name, w in self.weights.items())
