"""What other sources call P-tuning v2 or prefix tuning, each under the name of what it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from peftlab.bases import Shape
from peftlab.bases.tape import Value
from peftlab.methods.method import Method, require
from peftlab.methods.prompt_tuning import check_context
from peftlab.sites import InputEmbeddings, KeysValues
from peftlab.soft import (
    PROMPT_INITS,
    Flat,
    PrefixMLP,
    check_init,
    initial_prompt,
    put,
    seeded,
)


@dataclass(frozen=True)
class DeepPromptTuning(Method):
    """Virtual tokens at the input, and anew at the input of every layer.

        [h_l of the virtual tokens; h_l of the text] → [P_l; h_l of the text]      P_l (P, d_model)

    The frozen W_k and W_v make keys and values of each P_l, so one vector stands where prefix
    tuning has two: P · L · d_model numbers, trained and stored. The virtual tokens still cost
    queries and an MLP in every layer.

    Sources call this prefix tuning or P-tuning v2. It is the "prefix-layer" baseline of Hu et al.
    2021, arXiv:2106.09685, section 5.1, and the prompt-deep of vision transformers. T5: in the
    encoder alone.
    """

    num_virtual_tokens: int = 20
    init: str = "vocabulary"
    init_text: str | None = None

    name: ClassVar[str] = "deep_prompt_tuning"
    title: ClassVar[str] = "Deep prompt tuning"
    learning_rate: ClassVar[float] = 0.1

    def __post_init__(self):
        require("num_virtual_tokens", self.num_virtual_tokens, 1)
        check_init(self.init, self.init_text, PROMPT_INITS)

    def reach(self, base, attachment, generator):
        count, layers = self.num_virtual_tokens, base.anatomy.shape.layers
        check_context(count, base.anatomy.shape)
        start = [
            initial_prompt(base, self.init, self.init_text, count, generator) for _ in range(layers)
        ]
        read = put(base, attachment, self.name, Flat({"prompt": torch.stack(start)}))
        site = InputEmbeddings(base.anatomy, read, [(count, "front", None)], every_layer=True)
        attachment.sites.append(attachment.stack.enter_context(site))
        attachment.virtual_tokens = count

    def footprint(self, plan):
        """As prompt tuning, and the places of the vectors that are written over at each layer."""
        plan.prompt += self.num_virtual_tokens
        plan.every_layer = True

    def parameters(self, shape: Shape) -> int:
        """P · L · d_model."""
        check_context(self.num_virtual_tokens, shape)
        return self.num_virtual_tokens * shape.layers * shape.d_model


@dataclass(frozen=True)
class PromptAndPrefix(Method):
    """One table E, as virtual tokens at the input and through an MLP as keys and values.

        x = [E; E(tokens)],   [P_k; P_v] = W₂ tanh(W₁ E + b₁) + b₂ in every attention

    Trained: the table (P, d_model) and the MLP. Stored: E, P_k and P_v. Without
    `prefix_projection` all three train as they are. A source calls this P-tuning v2; the paper of
    that name has neither the input tokens nor, by default, the MLP.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = True
    encoder_hidden_size: int = 512
    init: str = "vocabulary"
    init_text: str | None = None

    name: ClassVar[str] = "prompt_and_prefix"
    title: ClassVar[str] = "Prompt and prefix"

    def __post_init__(self):
        require("num_virtual_tokens", self.num_virtual_tokens, 1)
        require("encoder_hidden_size", self.encoder_hidden_size, 1)
        check_init(self.init, self.init_text, PROMPT_INITS)

    @property
    def learning_rate(self) -> float:
        """The step size that works: an MLP magnifies its own steps, so it takes smaller ones."""
        return 3e-3 if self.prefix_projection else 0.1

    def reach(self, base, attachment, generator):
        count, sites = self.num_virtual_tokens, base.anatomy.attentions
        check_context(count, base.anatomy.shape)
        if not sites:
            raise ValueError(f"{base.name} computes attention in a way that no prefix reaches")
        table = initial_prompt(base, self.init, self.init_text, count, generator)
        with seeded(generator):
            module = PrefixMLP(table, self.encoder_hidden_size, sites, with_prompt=True)
        if not self.prefix_projection:
            with torch.no_grad():
                module = Flat({key: t.clone() for key, t in module.to(table)().items()})
        read = put(base, attachment, self.name, module)
        for site in (
            InputEmbeddings(base.anatomy, read, [(count, "front", None)]),
            KeysValues(base.anatomy, sites, read, shift_positions=False),
        ):
            attachment.sites.append(attachment.stack.enter_context(site))
        attachment.virtual_tokens = count

    def footprint(self, plan):
        """Both at once: virtual tokens in the sequence, and keys and values that no token wrote."""
        plan.prompt += self.num_virtual_tokens
        plan.prefixes.append((self.num_virtual_tokens, lambda stack, layer: True))
        if self.prefix_projection:
            middle = self.num_virtual_tokens, self.encoder_hidden_size
            plan.prefix_makers.append(lambda tape: tape.keep(Value(*middle)))

    def parameters(self, shape: Shape) -> int:
        """The table and the MLP, or the table, P_k and P_v."""
        check_context(self.num_virtual_tokens, shape)
        d, out = shape.d_model, 2 * shape.attentions * shape.d_kv
        if not self.prefix_projection:
            return self.num_virtual_tokens * (d + out)
        m = self.encoder_hidden_size
        return self.num_virtual_tokens * d + (d + 1) * m + (m + 1) * out

    def stored(self, shape: Shape) -> int:
        """P · d_model at the input, and 2 · P · d_kv for each attention sublayer."""
        return self.folded().parameters(shape)

    def folded(self) -> Method:
        """The prompt and the flat prefix that the MLP makes."""
        return replace(self, prefix_projection=False) if self.prefix_projection else self
