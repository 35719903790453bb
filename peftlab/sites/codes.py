"""The weight of one linear module held as codes of four bits."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from peftlab.bases import Linear
from peftlab.bases.anatomy import CODES
from peftlab.sites.quantisation import Quantised, quantise
from peftlab.sites.site import Shown, Site

PACKED = "peftlab_packed"  # the codes as a parameter of the module, while processes share them out


class CodedProduct(torch.autograd.Function):
    """y = W̃ x, with W̃ decoded for this product and again for its gradient: x̄ = W̃ᵀ ȳ.

    Between the two only the codes exist. A weight held as codes has no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, codes: Quantised) -> Tensor:
        ctx.codes = codes  # the site holds them anyway: the step keeps nothing more
        return nn.functional.linear(x, codes.dequantise(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ ctx.codes.dequantise(gradient.dtype), None


class CodedWeight(Site):
    """The weight of a whole linear module held as codes:  y = W̃ x + b,  W̃ = m · T[c].

    `linear` is the whole module: in GPT-2 q, k and v together. The codes are made of W in the
    layout (d_out, d_in), row by row, however the module stores it. The original is kept on the CPU
    and put back on leaving. A view of a single NaN, which takes no memory, replaces it: code that
    bypasses the codes reads NaN. The model's `state_dict` has W̃.
    """

    in_the_weight = True

    def __init__(self, linear: Linear, **options):
        super().__init__(f"{linear.name}.codes")
        self.linear, self.options = linear, options
        self.module, self.transposed = linear.module, linear.transposed

    @property
    def codes(self) -> Quantised:
        packed = self.module._parameters.get(PACKED)
        return self._codes if packed is None else replace(self._codes, packed=packed)

    @codes.setter
    def codes(self, codes: Quantised) -> None:
        self._codes = codes

    def share(self) -> None:
        """Let the codes lie in the module as a parameter, for FSDP to cut and to put together."""
        packed = self.codes.packed
        self.module.register_parameter(PACKED, nn.Parameter(packed, requires_grad=False))
        self.codes = replace(self.codes, packed=packed[:0].clone())

    def __enter__(self):
        if self.linear.code is not None:
            raise ValueError(f"two methods want the same site, {self.name}")
        weight = self.module.weight
        self.encode(weight)
        self.original = weight.data.cpu()
        setattr(self.module, CODES, self)
        hook = self.module.register_state_dict_post_hook(partial(self._decoded))
        self.hooks.append(hook)
        self._leave_a_view(weight.device)
        self.module.forward = self._forward
        return self

    def __exit__(self, *_):
        if self.linear.code is self:
            weight = self.module.weight
            weight.data = self.original.to(weight.device, weight.dtype)
            vars(self.module).pop("forward", None)
            self.unhook()
            del vars(self.module)[CODES]

    def shown(self) -> list[Shown]:
        """The codes, one a weight."""
        return [Shown("c", self.codes.codes, self.linear.name, "codes")]

    def held(self) -> list[Tensor]:
        """The original, on the CPU."""
        return [self.original]

    def _leave_a_view(self, device: torch.device | str) -> None:
        nothing = self.original.new_full((), torch.nan, device=device)
        self.module.weight.data = nothing.expand(self.original.shape)

    def _forward(self, x: Tensor) -> Tensor:
        kind, bias = x.device.type, self.module.bias
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else self.module.weight.dtype
        output = CodedProduct.apply(x.to(dtype), self.codes)
        return output if bias is None else output + bias.to(dtype)

    def _decoded(self, module, state: dict[str, Tensor], prefix: str, metadata) -> None:
        """Whoever saves the model saves W̃, in plain numbers."""
        state[f"{prefix}weight"] = self.decode().contiguous()

    def decode(self) -> Tensor:
        """W̃ in the module's layout and the dtype of the original."""
        weight = self.codes.dequantise(self.module.weight.dtype)
        return weight.T if self.transposed else weight

    def encode(self, weight: Tensor) -> None:
        """Replace the codes by those of this weight, given in the module's layout."""
        self.codes = quantise(weight.T if self.transposed else weight, **self.options)

    def snapshot(self) -> Quantised:
        """The codes as they are now."""
        return self.codes

    def restore(self, snapshot: Quantised) -> None:
        """Put these codes back, on the module's device."""
        self.codes = snapshot.to(self.module.weight.device)

    def to(self, device: torch.device | str) -> None:
        """Move the codes with the model; the original stays where it is."""
        self.codes = self.codes.to(device)
        self._leave_a_view(device)
