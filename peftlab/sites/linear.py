"""A delta beside one linear weight."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftlab.bases import Linear
from peftlab.sites.site import Shown, Site


class LinearWeight(Site):
    """A delta beside one linear weight:  y = W x + b + delta(x).

    The delta is a module with `forward(x)` and `delta_weight()` (d_out, d_in); if its `of_output`
    is True, it is called as `forward(x, W x)`. Merging writes W + delta_weight() into the model,
    keeps the original rows and removes the hook; unmerging puts both back. If a mask M holds
    entries of W at zero, it holds those of the delta at zero too: the delta is then (M ⊙ ΔW) x,
    which has no low-rank form.
    """

    can_merge = True

    def __init__(self, linear: Linear, delta: nn.Module):
        super().__init__(linear.name, [part.name for part in linear.parts])
        self.linear, self.delta = linear, delta
        self.of_output = getattr(delta, "of_output", False)

    def __enter__(self):
        self.unhook()
        self.hooks.append(self.linear.module.register_forward_hook(self._add))
        return self

    def frozen(self) -> Tensor:
        """W alone, even while the delta is merged into it."""
        if self.merged and self.linear.code is not None:
            raise RuntimeError(f"{self.name} is merged into codes: call unmerge() first")
        return self.original if self.merged else self.linear.weight

    def stored(self) -> dict[str, Tensor]:
        """The delta's persistent buffers: they do not train and cannot be recomputed."""
        trained = dict(self.delta.named_parameters())
        state = self.delta.state_dict(keep_vars=True)
        return {f"{self.name}.{key}": t for key, t in state.items() if key not in trained}

    def shown(self) -> list[Shown]:
        """The delta's tensors, those that train and those that are stored beside them."""
        prefix = f"{self.name}."
        tensors = dict(self.delta.named_parameters())
        tensors |= {name.removeprefix(prefix): t for name, t in self.stored().items()}
        return [Shown(name, tensor, self.name, "delta") for name, tensor in tensors.items()]

    def held(self) -> list[Tensor]:
        """The original rows, while the delta is merged."""
        return [self.original] if isinstance(self.original, Tensor) else []

    def _add(self, module, args, output):
        x = (args[0],)
        if self.of_output:
            x += (self.linear.product(output),)
        if self.instead is None:
            added = self.added(self.delta, *x)
        else:
            added = self.instead.apply(self, *x)
        return self.linear.add_to(output, added.to(output.dtype))

    def added(self, delta: Callable, x: Tensor, *product: Tensor) -> Tensor:
        """The output of one delta, under the mask if there is one."""
        if self.linear.mask is None:
            return delta(x, *product)
        weight = self._masked(delta.delta_weight())
        dropout = getattr(self.delta, "dropout", nn.Identity())
        return nn.functional.linear(dropout(x.to(weight.dtype)), weight)

    def _masked(self, delta: Tensor) -> Tensor:
        mask = self.linear.mask
        return delta if mask is None else torch.where(mask, delta, 0.0)

    @torch.no_grad()
    def merge(self) -> None:
        """Write W + ΔW into the model and keep the original. Codes are encoded again."""
        if not self.merged:
            code, weight = self.linear.code, self.linear.weight
            delta = self.delta if self.instead is None else self.instead
            summed = weight + self._masked(delta.delta_weight()).to(weight.dtype)
            self.original = weight.clone() if code is None else code.snapshot()
            self.unhook()  # a merged weight runs as a plain one
            self.linear.write(summed)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the kept original: restored, not subtracted."""
        if self.merged:
            if self.linear.code is not None:
                self.linear.code.restore(self.original)
            elif isinstance(self.original, Tensor):  # otherwise the codes are gone, and ΔW in them
                self.linear.write(self.original)  # `write` moves it to the model's device
            self.__enter__()
            self.original = None
