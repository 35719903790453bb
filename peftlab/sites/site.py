"""The interface of all sites."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftlab.bases import Linear
from peftlab.sites.quantisation import Quantised


class PerThread:
    """A value of the forward pass that this thread runs, so that two threads may run one model.

    A thread that has set none sees the last one set: autograd recomputes blocks in its own threads.
    A copy has no value.
    """

    def __init__(self):
        self._own, self._last = threading.local(), None

    def get(self):
        return getattr(self._own, "value", self._last)

    def set(self, value) -> None:
        self._own.value = self._last = value

    def __getstate__(self):
        return {}

    def __setstate__(self, state):
        self.__init__()


@dataclass(frozen=True)
class Shown:
    """A tensor that a site brings to the model, or trains in it, and where it acts.

    name    its letter: "A", "P_k"; a parameter of the model has its own name there
    place   the name of a linear weight ("layers.3.q"), of a sublayer ("layers.3.mlp"), of the keys
            and values of an attention ("layers.3.kv"), of what enters a block ("layers.3.input");
            "input" in front of all blocks, "network" for what makes a soft prompt, "" for the
            model's own
    how     "delta" beside W; "output" or "input", a factor; "after" or "beside" a sublayer;
            "token", "key" or "value"; "mask" and "codes" of W; "network"; "own"
    index   if only tensor[index] acts at this place
    """

    name: str
    tensor: Tensor
    place: str
    how: str
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of what acts at this place."""
        return tuple(self.tensor.shape if self.index is None else self.tensor.shape[1:])


def sweep(model: nn.Module) -> None:
    """Remove every hook of a site, also one that an interrupt kept off the site's own list."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_hooks):
            for key, hook in list(hooks.items()):
                if (getattr(hook, "func", hook).__module__ or "").startswith("peftlab.sites."):
                    del hooks[key]


class Site:
    """One place, or several, where a method changes what a frozen model computes.

        with site:      the model is changed
            ...
                        and is what it was before, bit for bit

    A site implements `__enter__`. All else has a default that fits most sites. `__exit__` may be
    called in any state and again after it failed: it undoes what is left, and forgets an original
    only after putting it back.

    name, names    the site's name, and the name of each of its places. Two methods may not reach a
                   place of the same name, and `alone` says why
    linear         the linear weight at this site, if there is one
    delta          the module that adds to that weight's output, if there is one; `instead`
                   replaces it while kept adapters are in use
    codes          the codes that hold the weight, if codes hold it
    parameters     the model's own parameters that the site unfreezes, by name
    in_the_weight  the change is in the model's own tensors: there is nothing to merge
    can_merge      `merge` can write the change into the model's own tensors, and keeps what it
                   replaced as `original`; `merged` says it has
    hooks          the site's hooks on modules, which `__exit__` removes
    """

    alone = ""
    linear: Linear | None = None
    delta: nn.Module | None = None
    instead = None
    codes: Quantised | None = None
    in_the_weight = False
    can_merge = False
    original: object = None

    def __init__(self, name: str, names: list[str] | None = None):
        self.name, self.names = name, [name] if names is None else names
        self.parameters: dict[str, nn.Parameter] = {}
        self.hooks: list[RemovableHandle] = []

    @property
    def merged(self) -> bool:
        return self.can_merge and self.original is not None

    def __enter__(self):
        """Change the model. After an error `__exit__` undoes the part that was changed."""
        raise NotImplementedError

    def __exit__(self, *_):
        """Undo every change, merged or not."""
        self.unmerge()
        self.unhook()

    def unhook(self) -> None:
        """Remove the site's hooks."""
        while self.hooks:
            self.hooks[-1].remove()
            self.hooks.pop()

    def settle(self) -> None:
        """Called after all methods are attached: move hooks behind the others, if that matters."""

    def merge(self) -> None:
        """Write the change into the model's own tensors, and keep the originals."""

    def unmerge(self) -> None:
        """Put back the originals: restored, not subtracted."""

    def stored(self) -> dict[str, Tensor]:
        """The tensors that are saved beside those that train, by name."""
        return {}

    def refresh(self) -> None:
        """Called after values were copied into the stored tensors: apply them."""

    def shown(self) -> list[Shown]:
        """The tensors that the site brings or trains, each with its place: what a drawing shows."""
        return [Shown(name, tensor, "", "own") for name, tensor in self.parameters.items()]

    def held(self) -> list[Tensor]:
        """The tensors that the site keeps beside the model: originals to put back, masks."""
        return []

    def to(self, device: torch.device | str) -> None:
        """Move the kept tensors to the model's device."""
