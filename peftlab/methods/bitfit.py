"""BitFit: only the biases train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftlab.bases import Shape
from peftlab.methods.method import Method
from peftlab.sites import ExistingParameters


@dataclass(frozen=True)
class BitFit(Method):
    r"""Bias-term fine-tuning: train every bias b of the base, and nothing else.

        y = W x + b,  LN(x) = g ⊙ x̂ + b        W, g frozen,  b (d_out,) or (d_model,) trained

    Trained and stored: the biases of linear maps, of LayerNorms, and of the model's own head; a
    new head's bias counts with that head. Under a new head, only those of the backbone. BERT-base
    has 11 L d + 2 d of them, GPT-2 11 L d + d. Llama and T5 have no bias, so the method is refused
    there; Qwen2 has biases of q, k and v.

    The bias of the keys does nothing: q·(k + b_k) adds the same number to every score of a query,
    and the softmax ignores it. It acts only with virtual keys, because it does not shift them.

    Ben Zaken et al. 2022, arXiv:2106.10199, section 2. The original tensors are kept aside.
    """

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    learning_rate: ClassVar[float] = 1e-2
    in_place: ClassVar[bool] = True

    def reach(self, base, attachment, generator):
        module = base.anatomy.backbone if attachment.headless else base.model
        names = [
            name
            for name, _ in module.named_parameters()
            if name.split(".")[-1] == "bias"
            and not (attachment.headless and name.startswith("pooler"))  # unused, like the old head
        ]
        if not names:
            raise ValueError(
                f"BitFit trains biases, and {base.name} has none: no linear map or norm of "
                f"{base.anatomy.family} carries one. LayerNormTuning or IA3 are of the same size"
            )
        attachment.enter(ExistingParameters(module, names))

    def parameters(self, shape: Shape) -> int:
        """The number of all biases; 0 if there are none."""
        return shape.biases
