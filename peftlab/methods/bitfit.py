"""BitFit: only the biases train."""

from dataclasses import dataclass

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
    and the softmax ignores it. It acts with virtual keys, because it does not shift them, and under
    rotary positions (Qwen2), because a key is turned by its position after the bias is added.

    Ben Zaken et al. 2022, arXiv:2106.10199, section 2. The original tensors are kept aside.
    """

    name = "bitfit"
    title = "BitFit"
    learning_rate = 1e-2
    in_place = True

    def reach(self, base, attachment, generator):
        module, names = attachment.own()
        names = [name for name in names if name.split(".")[-1] == "bias"]
        if not names:
            raise ValueError(
                f"BitFit trains biases, and {base.name} has none: no linear map or norm of "
                f"{base.anatomy.family} carries one. LayerNormTuning or IA3 are of the same size"
            )
        attachment.enter(ExistingParameters(module, names))

    def parameters(self, shape):
        return shape.biases
