"""The module that makes a soft prompt, run once a forward pass."""

import contextlib

from torch import Tensor, nn

from peftlab.bases import Anatomy
from peftlab.sites.site import PerThread, Shown, Site


class Source(Site):
    """A module whose `forward()` returns a soft prompt's tensors by name, and its cached result.

    Sites may call it any number of times: the module runs once in a forward pass of the model, at
    the beginning. Hooks on the model and on its stacks find it, because a stack may be called
    alone. The tensors stay until the next pass: gradient checkpointing reads them again. Other
    tensors in `instead` replace the module's. Inside `once()` nothing trains, and the module runs
    once for all passes.
    """

    def __init__(self, name: str, anatomy: Anatomy, module: nn.Module):
        super().__init__(name, names=[])
        self.anatomy, self.module = anatomy, module
        self.instead: dict[str, Tensor] | None = None
        self._made, self._outermost = PerThread(), PerThread()
        self._once = False

    def __enter__(self):
        for module in dict.fromkeys([self.anatomy.model, *self.anatomy.stacks.values()]):
            self.hooks.append(module.register_forward_pre_hook(self._begin, prepend=True))
            self.hooks.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *_):
        super().__exit__()
        self._made.set(None)
        self._outermost.set(None)

    def __call__(self) -> dict[str, Tensor]:
        """The tensors of this forward pass."""
        if self.instead is not None:
            return self.instead
        if self._made.get() is None:
            self._made.set(self.module())
        return self._made.get()

    def now(self) -> dict[str, Tensor]:
        """The current tensors, whatever tensors the last forward pass has read."""
        return self.module() if self.instead is None else self.instead

    def shown(self) -> list[Shown]:
        """All that makes the prompt; what is itself read as the prompt is shown by who reads it."""
        return [Shown(name, p, "network", "network") for name, p in self.module.named_parameters()]

    def held(self) -> list[Tensor]:
        """The tensors of the last forward pass."""
        return list((self._made.get() or {}).values())

    @contextlib.contextmanager
    def once(self):
        """Inside, every forward pass reads the tensors that the module makes now."""
        self._made.set(self.module())
        self._once = True
        try:
            yield
        finally:
            self._once = False
            self._made.set(None)

    def _begin(self, module, args):
        if self._outermost.get() in (None, module) or module is self.anatomy.model:
            self._outermost.set(module)
            if self.instead is None and not self._once:
                self._made.set(self.module())

    def _end(self, module, args, output):
        if module is self._outermost.get():
            self._outermost.set(None)

    def __getstate__(self):
        """A copy makes its own tensors: the cached ones belong to the gradients of their pass."""
        return {**vars(self), "_once": False}
