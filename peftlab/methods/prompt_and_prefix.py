"""A prompt and a prefix from one table, which one source calls P-tuning v2."""

from dataclasses import dataclass, replace

import torch

from peftlab.methods import soft
from peftlab.methods.checks import check_context, check_init
from peftlab.methods.method import Method
from peftlab.methods.prompt_networks import Flat, PrefixMLP, seeded
from peftlab.methods.prompt_starts import PROMPT_INITS, initial_prompt
from peftlab.sites import InputEmbeddings, KeysValues


@dataclass(frozen=True)
class PromptAndPrefix(Method):
    """One table Z is the virtual tokens at the input, and an MLP makes keys and values from it.

        x = [Z; E(tokens)],   [P_k; P_v] = tanh(Z W₁ᵀ + b₁) W₂ᵀ + b₂ in every attention

    Trained: the table (P, d_model) and the MLP. Stored: Z, P_k and P_v. Without
    `prefix_projection` all three train directly. One source calls this P-tuning v2; the paper of
    that name has neither the input tokens nor, by default, the MLP.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = True
    encoder_hidden_size: int = 512
    init: str = "vocabulary"
    init_text: str | None = None

    name = "prompt_and_prefix"
    title = "Prompt and prefix"
    limits = {"num_virtual_tokens": (1,), "encoder_hidden_size": (1, 2**16)}

    def __post_init__(self):
        super().__post_init__()
        check_init(self.init, self.init_text, PROMPT_INITS)

    @property
    def learning_rate(self) -> float:
        """The learning rate; smaller with an MLP, because an MLP magnifies its own steps."""
        return 3e-3 if self.prefix_projection else 0.1

    def reach(self, base, attachment, generator):
        count = self.num_virtual_tokens
        check_context(count, base.anatomy.shape)
        sites = soft.attentions(base, lambda layer, layers: True)
        table = initial_prompt(base, self.init, self.init_text, count, generator)
        with seeded(generator):
            module = PrefixMLP(table, self.encoder_hidden_size, sites, with_prompt=True)
        if not self.prefix_projection:
            with torch.no_grad():
                module = Flat({key: t.clone() for key, t in module.to(table)().items()})
        read = soft.put(attachment, module)
        attachment.enter(InputEmbeddings(base.anatomy, read, [(count, "front", None)]))
        attachment.enter(KeysValues(base.anatomy, sites, read, shift_positions=False))
        attachment.virtual_tokens = count

    def parameters(self, shape):
        check_context(self.num_virtual_tokens, shape)
        d, out = shape.d_model, 2 * shape.attentions * shape.d_kv
        if not self.prefix_projection:
            return self.num_virtual_tokens * (d + out)
        m = self.encoder_hidden_size
        return self.num_virtual_tokens * d + (d + 1) * m + (m + 1) * out

    def folded(self) -> Method:
        """The prompt and the flat prefix, without the MLP that makes it."""
        return replace(self, prefix_projection=False) if self.prefix_projection else self
