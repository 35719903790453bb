"""Some entries of a linear weight held at zero."""

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn

from peftlab.bases import Linear
from peftlab.sites.site import Shown, Site


class MaskedWeight(Site):
    """Some entries of one linear weight held at zero:  y = (M ⊙ W) x + b.

    The mask M is stored as bits, one an entry; `mask` unpacks them. At first all are ones. The
    zeros are in the model's own dense tensor, whose size and speed do not change. The original
    rows are kept, and put back on leaving. If W itself trains, `apply` zeroes the entries that a
    step has moved. With `mask_deltas`, the same entries of a delta beside W are held at zero.
    """

    in_the_weight = True

    def __init__(self, linear: Linear, mask_deltas: bool = True):
        if linear.code is not None:
            raise ValueError(f"{linear.name} is held as codes: a mask is put on before them")
        super().__init__(f"{linear.name}.mask")
        self.linear, self.mask_deltas = linear, mask_deltas

    def __enter__(self):
        self.original = self.linear.weight.detach().clone()
        self.bits = pack(torch.ones_like(self.original, dtype=torch.bool))
        return self

    def __exit__(self, *_):
        if self.original is not None:
            self.linear.mask = None
            self.linear.write(self.original)  # `write` moves it to the model's device
            self.original = None

    @property
    def mask(self) -> Tensor:
        """M (d_out, d_in), False where W is held at zero."""
        return unpack(self.bits, self.linear.d_out, self.linear.d_in)

    @property
    def trains(self) -> bool:
        """Whether the weight itself is being trained."""
        return self.linear.module.weight.requires_grad

    @property
    def now(self) -> Tensor:
        """W (d_out, d_in) before masking: the current weight if it trains, else the original."""
        return self.linear.weight.detach() if self.trains else self.original

    def hold(self, mask: Tensor) -> None:
        """Use this mask from now on."""
        self.bits.copy_(pack(mask))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Write M ⊙ W."""
        mask = self.mask
        self.linear.write(self.now.masked_fill(~mask, 0))
        self.linear.mask = mask if self.mask_deltas else None

    refresh = apply

    def stored(self) -> dict[str, Tensor]:
        """The mask, one bit an entry."""
        return {self.name: self.bits}

    def shown(self) -> list[Shown]:
        """The mask."""
        return [Shown("M", self.mask, self.linear.name, "mask")]

    def held(self) -> list[Tensor]:
        """The original rows, the bits, and the mask on the deltas."""
        held = [self.original, self.bits, self.linear.mask]
        return [tensor for tensor in held if tensor is not None]

    def to(self, device) -> None:
        self.bits, self.original = self.bits.to(device), self.original.to(device)
        if self.linear.mask is not None:
            self.linear.mask = self.linear.mask.to(device)


def pack(mask: Bool[Tensor, "d_out d_in"]) -> UInt8[Tensor, " bytes"]:
    """Eight entries a byte, row by row, the first in the lowest bit; the last byte is padded."""
    bits = nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits * 2 ** torch.arange(8, device=mask.device)).sum(dim=1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, " bytes"], rows: int, columns: int) -> Bool[Tensor, "rows cols"]:
    """The inverse of `pack`."""
    bits = packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
    return bits.flatten()[: rows * columns].view(rows, columns).bool()
