"""The sites and parameters that a method has put on a base."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftlab.bases import Base
from peftlab.methods.watch import unwatch
from peftlab.sites import Site, Source

if TYPE_CHECKING:
    from peftlab.methods.method import Method


@dataclass
class Attachment:
    """The sites that a method reached on a base, and the parameters that train.

    `modules` holds the modules that change the base, by place, and `sources` the sources of soft
    prompts. `headless`: a head replaces the model's own. `chosen`: the method, its choices named.
    """

    method: Method
    base: Base
    headless: bool = False
    sites: list[Site] = field(default_factory=list)
    trainable: dict[str, nn.Parameter] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    virtual_tokens: int = 0
    chosen: Method | None = None

    def enter(self, site: Site, module: nn.Module | None = None) -> Site:
        """Enter a site and list what trains there: `module` or the model's own parameters."""
        if module is not None:
            self.hold(module, site.name)
            for key, parameter in module.named_parameters():
                self.trainable[f"{self.method.name}.{site.name}.{key}"] = parameter
        site.__enter__()
        self.sites.append(site)
        self.trainable |= site.parameters
        return site

    def hold(self, module: nn.Module, place: str) -> None:
        """Move a module to the base's device, in at least 32 bits, and keep it by its place."""
        weight = self.base.anatomy.embedding.weight
        module.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        self.modules[place] = module

    def own(self) -> tuple[nn.Module, list[str]]:
        """The module whose own parameters may train, and their names, those of tied ones once.

        A head reads the backbone: a pooler is then as unused as the language model's own head.
        """
        module = self.base.anatomy.backbone if self.headless else self.base.model
        names = [name for name, _ in module.named_parameters()]
        return module, [n for n in names if not (self.headless and n.startswith("pooler."))]

    def leave(self) -> None:
        """Leave every site, in reverse order."""
        unwatch(self.base)
        with ExitStack() as stack:
            for site in self.sites:
                stack.push(site)
