"""Whether a base is again what it was before something was attached to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftlab.attention import PREFIX
from peftlab.bases import Base
from peftlab.bases.anatomy import CODES
from peftlab.bases.plain import has_numbers

# Of the largest logit. A GPU may take another kernel for the same product: TF32 rounds a number by
# up to 2⁻¹¹, a type of 16 bits by half of its eps, and a few layers add up.
TF32, LAYERS = 2**-11, 4


@dataclass
class Seen:
    """A base at one moment: its parameters, and its logits for two tokens on its device."""

    sizes: dict[str, torch.Size]
    trains: set[str]
    types: set[torch.dtype]
    device: torch.device
    logits: Tensor | None

    @classmethod
    def of(cls, base: Base, run: bool = True) -> Seen:
        """The base as it is now; without `run` it has no logits."""
        parameters = dict(base.model.named_parameters())
        run = run and has_numbers(base.anatomy.embedding.weight)
        return cls(
            sizes={name: p.shape for name, p in parameters.items()},
            trains={name for name, p in parameters.items() if p.requires_grad},
            types={p.dtype for p in parameters.values()},
            device=base.device,
            logits=_logits(base) if run else None,
        )

    def compare(self, base: Base) -> None:
        """Raise RuntimeError, saying what differs, unless the base is again as it was here.

        Logits are compared only if it was neither moved nor cast in the meantime.
        """
        now, what = Seen.of(base, run=False), ""
        if different := now.sizes.items() ^ self.sizes.items():
            what = f"{min(different)[0]} has another size"
        elif different := now.trains ^ self.trains:
            what = f"{min(different)} wants a gradient"
        elif len(now.types) > len(self.types):
            what = f"its parameters have the types {', '.join(map(str, now.types))}"
        elif held := [n for n, m in base.model.named_modules() if {PREFIX, CODES} & vars(m).keys()]:
            what = f"{held[0]} still has codes or a prefix"
        elif (now.device, now.types) == (self.device, self.types) and self.logits is not None:
            rounding = LAYERS * max(TF32, torch.finfo(self.logits.dtype).eps)
            most = rounding * self.logits.nan_to_num().abs().max().item()
            if not torch.allclose(_logits(base), self.logits, rtol=0, atol=most, equal_nan=True):
                what = "its logits differ"
        if what:
            raise RuntimeError(f"{base.name} is not what it was before attaching: {what}")


@torch.no_grad()
def _logits(base: Base) -> Tensor:
    """The model's first output for two tokens, on the CPU."""
    ids = torch.arange(2, device=base.device)[None]  # two of one kind would attend to one value
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.kind == "encoder-decoder":
        given["decoder_input_ids"] = ids
    with base._evaluating():
        return base.model(**given)[0].cpu()
