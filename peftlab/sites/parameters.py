"""Some of the model's own parameters, unfrozen."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class ExistingParameters:
    """Some of the model's own parameters, unfrozen. The originals are kept aside.

    Training happens on copies inside the same `Parameter` objects; leaving puts the original
    tensors themselves back, so that not even their addresses have changed.
    """

    name = "parameters"
    in_the_weight = True  # there is nothing to merge
    alone = "both would train it"

    def __init__(self, model: nn.Module, names: Iterable[str]):
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in names}
        self.names = [f"parameters: {name}" for name in self.parameters]

    def __enter__(self):
        self.originals = {name: p.data for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *_):
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self.originals[name].to(parameter.device)
