"""LayerNorm tuning: only the norms train."""

from dataclasses import dataclass

from peftlab.methods.method import Method
from peftlab.sites import ExistingParameters


@dataclass(frozen=True)
class LayerNormTuning(Method):
    r"""Train the scale and the shift of every norm of the base, and nothing else.

        LN(x) = g ⊙ (x − mean) / √(var + ε) + b        g, b (d_model,) trained
        RMSNorm(x) = g ⊙ x / √(mean(x²) + ε)           g (d_model,) trained: there is no shift

    Trained and stored: 2 d_model numbers a LayerNorm, d_model an RMSNorm (Llama, Qwen2, T5); every
    norm of the model, including the last one and that of a masked-LM head. Under a head, only those
    of the backbone. The original tensors are kept aside.

    Zhao et al. 2023, arXiv:2312.11420; PEFT's LNTuning. Houlsby et al. 2019, arXiv:1902.00751, use
    it as a baseline, and train the norms together with their adapters.
    """

    name = "layer_norm"
    title = "LayerNorm tuning"
    learning_rate = 1e-2
    in_place = True

    def reach(self, base, attachment, generator):
        module, _ = attachment.own()
        names = [
            f"{where}.{name}"
            for where, norm in module.named_modules()
            if "norm" in type(norm).__name__.lower()
            for name, _ in norm.named_parameters()
        ]
        attachment.enter(ExistingParameters(module, names))

    def parameters(self, shape):
        return shape.norms * shape.norm_size
