"""A small module after or beside a sublayer, and factors on a linear weight."""

import torch
from torch import Tensor, nn

from peftlab.bases import Linear, Sublayer
from peftlab.sites.site import PerThread, Shown, Site


class SublayerOutput(Site):
    """A small module f after one sublayer, or beside it.

        after    y ← y + f(y)      y: what the last linear map gives, before dropout and residual
        beside   y ← y + f(x)      x: what the first linear map reads

    The site has only hooks on those two maps, so f runs wherever the sublayer does: with a cache,
    in a recomputed block, under a prefix. Deltas and scales of the last map act before f reads y,
    whatever the order of attaching: `settle` is called after all methods are attached.
    """

    alone = "two at one sublayer would have to say which reads the other's output"

    def __init__(self, sublayer: Sublayer, f: nn.Module, beside: bool = False):
        super().__init__(sublayer.name)
        self.sublayer, self.f, self.beside = sublayer, f, beside
        self.x = PerThread()  # kept between the first map and the last

    def __enter__(self):
        self.hooks = [self.sublayer.last.module.register_forward_hook(self._add)]
        if self.beside:  # before other hooks, so that no scale on the first map changes x
            first = self.sublayer.first.module
            self.hooks.append(first.register_forward_pre_hook(self._read, prepend=True))
        return self

    def settle(self) -> None:
        """Move the hook behind all other hooks on the last map."""
        self.hooks[0].remove()
        self.hooks[0] = self.sublayer.last.module.register_forward_hook(self._add)

    def shown(self) -> list[Shown]:
        """The tensors of f."""
        how = "beside" if self.beside else "after"
        return [Shown(name, p, self.name, how) for name, p in self.f.named_parameters()]

    def _read(self, module, args):
        self.x.set(args[0])

    def _add(self, module, args, output):
        x = self.x.get() if self.beside else output
        self.x.set(None)
        return output + self.f(x).to(output.dtype)


class Scale(Site):
    """Factors l on the output of one linear weight, including its bias, or on its input.

        y = l ⊙ (W x + b)    l (d_out,)    merged:  W ← diag(l) W,  b ← l ⊙ b
        y = W (l ⊙ x) + b    l (d_in,)     merged:  W ← W diag(l)

    `module.l` holds l. The weights of a fused module share one input, so only their outputs can
    be scaled. Merging keeps the original rows; unmerging puts them back.
    """

    can_merge = True
    alone = "l ⊙ (W + ΔW) x and l ⊙ W x + ΔW x differ, and a list does not say which is meant"

    def __init__(self, linear: Linear, module: nn.Module, of_input: bool = False):
        if of_input and not linear.whole:
            raise ValueError(
                f"{linear.name} is part of a fused weight and shares its input: "
                "only its output can be scaled"
            )
        super().__init__(linear.name)
        self.linear, self.module, self.of_input = linear, module, of_input

    def __enter__(self):
        module = self.linear.module
        if self.of_input:
            self.hooks = [module.register_forward_pre_hook(self._scale_input)]
        else:
            self.hooks = [module.register_forward_hook(self._scale_output)]
        return self

    def shown(self) -> list[Shown]:
        """The factors l."""
        return [Shown("l", self.module.l, self.name, "input" if self.of_input else "output")]

    def held(self) -> list[Tensor]:
        """The original weight and bias, while the factors are merged."""
        return [t for t in self.original or () if isinstance(t, Tensor)]

    def _scale_input(self, module, args):
        x = args[0] if self.merged else (args[0] * self.module.l).to(args[0].dtype)
        return (x, *args[1:])

    def _scale_output(self, module, args, output):
        return output if self.merged else self.linear.scale(output, self.module.l)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the scaled weight, and bias, into the model and keep the originals."""
        if self.merged:
            return
        linear, factors = self.linear, self.module.l
        code, weight, bias = linear.code, linear.weight, linear.bias
        kept = weight.clone() if code is None else code.snapshot()
        self.original = (kept, None if bias is None or self.of_input else bias.clone())
        linear.write(weight * (factors if self.of_input else factors[:, None]))
        if self.original[1] is not None:
            linear.module.bias[linear.index] = (bias * factors).to(bias.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the kept originals: restored, not divided."""
        if not self.merged:
            return
        linear, (kept, bias) = self.linear, self.original
        if linear.code is not None:
            linear.code.restore(kept)
        elif isinstance(kept, Tensor):  # otherwise the codes are gone, and the factors in them
            linear.write(kept)
        if bias is not None:
            linear.module.bias[linear.index] = bias.to(linear.module.bias.device)
        self.original = None
