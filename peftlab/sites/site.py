"""What a site must do, on one page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftlab.bases import Linear

if TYPE_CHECKING:
    from peftlab.sites.quantisation import Quantised


class Site:
    """One place, or several, where a method changes what a frozen model computes.

        with site:      the model is changed
            ...
                        and is what it was before, bit for bit

    A site writes `__enter__` and `__exit__`. All else has a default that holds for most sites.

    name, names    what the place is called; a name for each where it is several. Two methods that
                   reach a place of the same name are refused, and `alone` says why
    linear         the linear weight that it is at, if it is at one
    delta          the module that adds to that weight's output, if one does; `instead` stands in
                   its place while kept adapters are in use
    codes          what the weight is held as, if it is held as codes
    parameters     the model's own parameters that it unfreezes, by name
    in_the_weight  its change is in the model's own tensors: there is nothing to merge
    can_merge      `merge` can write its change into the model's own tensors; `merged` once it has
    """

    alone = ""
    linear: Linear | None = None
    delta: nn.Module | None = None
    instead = None
    codes: Quantised | None = None
    in_the_weight = False
    can_merge = False
    merged = False

    def __init__(self, name: str, names: list[str] | None = None):
        self.name, self.names = name, [name] if names is None else names
        self.parameters: dict[str, nn.Parameter] = {}

    def __enter__(self):
        """Change the model. On an error nothing is changed."""
        raise NotImplementedError

    def __exit__(self, *_):
        """Take everything back, merged or not."""
        raise NotImplementedError

    def settle(self) -> None:
        """All methods are attached now: go behind the others, where that matters."""

    def merge(self) -> None:
        """Write the change into the model's own tensors, and keep the originals."""

    def unmerge(self) -> None:
        """Put the originals back: restored, not subtracted."""

    def stored(self) -> dict[str, Tensor]:
        """What is saved beside the tensors that train, by name."""
        return {}

    def refresh(self) -> None:
        """Other tensors were copied into what is stored: act on them."""

    def held(self) -> Iterator[Tensor]:
        """What it keeps beside the model: originals that it will put back, masks."""
        return iter(())

    def to(self, device: torch.device | str) -> None:
        """Move what it keeps to the model's device."""
