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

    Trained and stored: the biases of linear maps, of LayerNorms, and of the head on the model; of
    a bias of its own for the task nothing is known here. Under a head, those of the backbone. On
    BERT-base that is 11 L d + 2 d, on GPT-2 11 L d + d. Llama and T5 have no bias at all, so the
    method cannot go there, and is refused; Qwen2 has those of q, k and v.

    Of all of them the key's is idle: q·(k + b_k) adds the same to every score of a query, and
    the softmax takes no notice. Only under virtual keys, which it does not shift, does it act.

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
            and not (attachment.headless and name.startswith("pooler"))  # out of use, as a head
        ]
        if not names:
            raise ValueError(
                f"BitFit trains biases, and {base.name} has none: no linear map or norm of "
                f"{base.anatomy.family} carries one. LayerNormTuning or IA3 are of the same size"
            )
        attachment.enter(ExistingParameters(module, names))

    def parameters(self, shape: Shape) -> int:
        """All biases; 0 where there are none."""
        return shape.biases
