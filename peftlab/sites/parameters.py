"""Some of the model's own parameters, unfrozen."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peftlab.sites.site import Site


class ExistingParameters(Site):
    """Some of the model's own parameters, unfrozen. The originals are kept aside.

    Training changes copies inside the same `Parameter` objects. Leaving puts back the original
    tensors themselves, so even their addresses are unchanged. Raises ValueError for parameters in
    float16, because steps of training overflow or vanish there.
    """

    in_the_weight = True
    alone = "both would train it"

    def __init__(self, model: nn.Module, names: Iterable[str]):
        names, parameters = list(names), dict(model.named_parameters())
        super().__init__("parameters", [f"parameters: {name}" for name in names])
        self.parameters = {name: parameters[name] for name in names}
        self.originals: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float16:
                raise ValueError(
                    f"{name} is in float16, in which steps of training overflow or vanish: load "
                    "the base in float32 or bfloat16 to train its own parameters"
                )

    def __enter__(self):
        for name, parameter in self.parameters.items():
            copy = parameter.data.clone()
            self.originals[name] = parameter.data
            parameter.data = copy
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *_):
        for name, original in self.originals.items():
            parameter = self.parameters[name]
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = original.to(parameter.device, parameter.dtype)
        self.originals = {}

    def held(self) -> list[Tensor]:
        return list(self.originals.values())
