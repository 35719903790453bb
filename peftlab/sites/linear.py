"""A delta beside one linear weight, and several that were kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftlab.bases import Linear


class LinearWeight:
    """A delta beside one linear weight:  y = W x + b + delta(x).

    The delta is a module with `forward(x)` and `delta_weight()` (d_out, d_in); one with
    `of_output` True is called as `forward(x, W x)`. Merging writes W + delta_weight() into the
    model, keeps the original rows and takes the hook away; unmerging puts those back. Where
    entries of W are held at zero by a mask M, so are the delta's: it is then (M ⊙ ΔW) x, which has
    no low-rank form. `instead` are other deltas in its place, weighed or row by row.
    """

    def __init__(self, linear: Linear, delta: nn.Module):
        self.name, self.linear, self.delta = linear.name, linear, delta
        self.names = [part.name for part in getattr(linear, "parts", [linear])]
        self.original: object | None = None  # the rows, or codes, that merging replaced
        self.instead: Deltas | None = None

    @property
    def merged(self) -> bool:
        return self.original is not None

    def __enter__(self):
        self.hook = self.linear.module.register_forward_hook(self._add)
        return self

    def __exit__(self, *_):
        self.unmerge()
        self.hook.remove()

    def frozen(self) -> Tensor:
        """W alone, also while the delta is merged into it."""
        if self.merged and self.linear.code is not None:
            raise RuntimeError(f"{self.name} is merged into codes: call unmerge() first")
        return self.original if self.merged else self.linear.weight

    def _add(self, module, args, output):
        x = (args[0],)
        if getattr(self.delta, "of_output", False):
            x += (self.linear.product(output),)
        if self.instead is None:
            added = self._added(self.delta, *x)
        else:
            added = self.instead.apply(self._added, *x)
        return self.linear.add_to(output, added.to(output.dtype))

    def _added(self, delta: Callable, x: Tensor, *product: Tensor) -> Tensor:
        """What one delta adds to the output."""
        if self.linear.mask is None:
            return delta(x, *product)
        weight = self._masked(delta.delta_weight())
        return nn.functional.linear(self._dropout(x.to(weight.dtype)), weight)

    @property
    def _dropout(self) -> Callable[[Tensor], Tensor]:
        """What the delta does to x before its own product, where it has that."""
        return getattr(self.delta, "dropout", nn.Identity())

    def _masked(self, delta: Tensor) -> Tensor:
        mask = self.linear.mask
        return delta if mask is None else torch.where(mask, delta, 0.0)

    @torch.no_grad()
    def merge(self) -> None:
        """Write W + ΔW into the model and keep the original. Codes are encoded anew."""
        if not self.merged:
            code, weight = self.linear.code, self.linear.weight
            delta = self.delta if self.instead is None else self.instead
            summed = weight + self._masked(delta.delta_weight()).to(weight.dtype)
            self.original = weight.clone() if code is None else code.snapshot()
            self.linear.write(summed)
            self.hook.remove()  # a merged weight runs as a plain one

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept original back: restored, not subtracted."""
        if self.merged:
            if self.linear.code is not None:
                self.linear.code.restore(self.original)
            elif isinstance(self.original, Tensor):  # or the codes went, and what was in them
                self.linear.write(self.original)  # follows the model to its device
            self.original = None
            self.hook = self.linear.module.register_forward_hook(self._add)


class Kept:
    """A delta with other tensors in it: what was kept, in the module that trains."""

    def __init__(self, delta: nn.Module, tensors: dict[str, Tensor]):
        self.delta, self.tensors = delta, tensors

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.delta, self.tensors, inputs)

    def delta_weight(self) -> Tensor:
        """ΔW of the kept tensors."""
        names = {f"delta.{name}": tensor for name, tensor in self.tensors.items()}
        return torch.func.functional_call(_Weight(self.delta), names, ())


class _Weight(nn.Module):
    """A delta whose `forward` gives ΔW, for `functional_call` knows no other method."""

    def __init__(self, delta: nn.Module):
        super().__init__()
        self.delta = delta

    def forward(self) -> Tensor:
        return self.delta.delta_weight()


class Deltas:
    """Several kept deltas beside one weight: Σ w_i ΔW_i, or another for each row of the batch.

    The deltas are weighed, not their factors: with factors summed, (B₁ + B₂)(A₁ + A₂) would have
    the products of one adapter's A and another's B in it.
    """

    def __init__(
        self,
        deltas: dict[str, Kept],
        weights: dict[str, float] | None = None,
        rows: list[str] | None = None,
    ):
        self.deltas, self.weights, self.rows = deltas, weights, rows

    def apply(self, added: Callable, *inputs: Tensor) -> Tensor:
        """What they add, `added(delta, *inputs)` being what one of them adds."""
        if self.rows is None:
            return sum(w * added(self.deltas[name], *inputs) for name, w in self.weights.items())
        if len(self.rows) != len(inputs[0]):
            raise ValueError(f"{len(self.rows)} deltas for a batch of {len(inputs[0])} rows")
        parts, order = [], []
        for name, delta in self.deltas.items():  # each delta runs once, on the rows that are its
            its = [i for i, row in enumerate(self.rows) if row == name]
            parts.append(added(delta, *(tensor[its] for tensor in inputs)))
            order += its
        where = torch.tensor(order, device=parts[0].device).argsort()
        return torch.cat(parts)[where]

    def delta_weight(self) -> Tensor:
        """Σ w_i ΔW_i. Raises ValueError where rows differ."""
        if self.rows is not None:
            raise ValueError("rows with deltas of their own cannot be merged into one weight")
        return sum(w * self.deltas[name].delta_weight() for name, w in self.weights.items())
