"""Prefix tuning: trainable keys and values in front of those of the text, in every layer."""

from dataclasses import dataclass, replace

import torch

from peftlab.attention import AttentionSite
from peftlab.bases import Shape
from peftlab.methods import soft
from peftlab.methods.checks import check_init
from peftlab.methods.method import Method
from peftlab.methods.prompt_networks import Flat, PrefixMLP, seeded
from peftlab.methods.prompt_starts import PREFIX_INITS, initial_prefix
from peftlab.sites import KeysValues


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Prefix tuning.

        h = softmax(q [P_k; K]ᵀ / √d) [P_v; V]      P_k, P_v (P, d_kv) in every attention

    `attention.with_prefix` computes [P_k; K] and [P_v; V]; nothing else in the base changes.

    Trained: P_k and P_v, 2 · P · d_kv numbers for each attention sublayer; T5's decoder has two
    in each layer. With `prefix_projection` an MLP makes them from a table Z (P, d_model):
    tanh(Z W₁ᵀ + b₁) W₂ᵀ + b₂ with hidden width `encoder_hidden_size`. It trains in their place and
    is thrown away afterwards. Stored: P_k and P_v either way.

    `init` chooses the initial values of a flat prefix: "text" uses the keys and values of
    `init_text` (repeated or cut to length), "vocabulary" those of tokens drawn at random, "random"
    draws from N(0, 1), "zero" uses zeros, which still change the output: a key of zeros takes its
    share of the softmax. With the MLP, torch's initial MLP computes the start from a N(0, 1) table.

    `shift_positions`: the text's positions begin after the prefix, as when it is passed as a cache.

    Li and Liang 2021, arXiv:2101.00190, sections 4.1 to 4.3.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int = 512
    init: str = "vocabulary"
    init_text: str | None = None
    shift_positions: bool = False

    name = "prefix_tuning"
    title = "Prefix tuning"
    limits = {"num_virtual_tokens": (1,), "encoder_hidden_size": (1,)}

    def __post_init__(self):
        super().__post_init__()
        check_init(self.init, self.init_text, PREFIX_INITS)
        if self.prefix_projection and self.init == "text":
            raise ValueError('init="text" needs prefix_projection=False: the MLP makes the start')

    @property
    def learning_rate(self) -> float:
        """The learning rate; smaller with an MLP, because an MLP magnifies its own steps."""
        return 1e-3 if self.prefix_projection else 0.1

    def reach(self, base, attachment, generator):
        self.parameters(base.anatomy.shape)  # raises if the prefix does not fit
        sites, count = soft.attentions(base, self.reaches), self.num_virtual_tokens
        if self.prefix_projection:
            table = torch.randn(count, base.anatomy.shape.d_model, generator=generator)
            with seeded(generator):
                module = PrefixMLP(table, self.encoder_hidden_size, sites)
        else:
            start = (self.init, self.init_text, count, generator)
            module = Flat(initial_prefix(base, sites, *start))
        read = soft.put(attachment, module)
        attachment.enter(KeysValues(base.anatomy, sites, read, self.shift_positions))
        attachment.virtual_tokens = count if self.shift_positions else 0

    def reaches(self, site: AttentionSite, layers: int) -> bool:
        """Whether this sublayer, in a stack of `layers` layers, gets a prefix: here always."""
        return True

    def sublayers(self, shape: Shape) -> int:
        """How many attention sublayers get a prefix."""
        return shape.attentions

    def parameters(self, shape):
        if self.shift_positions and self.num_virtual_tokens >= shape.context:
            raise ValueError(
                f"num_virtual_tokens={self.num_virtual_tokens} with shift_positions: "
                f"{shape.name} has {shape.context} positions, one at least for the input"
            )
        out = 2 * self.sublayers(shape) * shape.d_kv
        if not self.prefix_projection:
            return self.num_virtual_tokens * out
        m, d = self.encoder_hidden_size, shape.d_model
        return self.num_virtual_tokens * d + (d + 1) * m + (m + 1) * out

    def folded(self) -> Method:
        """The flat prefix that the MLP makes."""
        return replace(self, prefix_projection=False) if self.prefix_projection else self
