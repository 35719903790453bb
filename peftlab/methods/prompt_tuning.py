"""Prompt tuning: trainable vectors in front of the embedded input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftlab.bases import Base, Shape
from peftlab.methods.method import Method, require
from peftlab.sites import InputEmbeddings

INITS = ("vocabulary", "random", "text")


@dataclass(frozen=True)
class PromptTuning(Method):
    """Soft prompt tuning.

        x = [P; E(tokens)]      P (num_virtual_tokens, d_model) trains, all else is frozen

    Trained and stored: P, num_virtual_tokens · d_model numbers. The virtual tokens pass through
    every layer and cost context and time like real ones; only the input layer is touched.

    `init` is where P starts: "vocabulary" copies the embeddings of tokens drawn at random,
    "text" those of `init_text` (repeated or cut to length), "random" is uniform in ±0.5 as in the
    paper. Which of them trains is a question of scale: see the lesson.

    Lester et al. 2021, arXiv:2104.08691, sections 2 and 3.2.
    """

    num_virtual_tokens: int = 20
    init: str = "vocabulary"
    init_text: str | None = None

    name: ClassVar[str] = "prompt_tuning"
    title: ClassVar[str] = "Prompt tuning"
    learning_rate: ClassVar[float] = 0.1

    def __post_init__(self):
        require("num_virtual_tokens", self.num_virtual_tokens, 1)
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}: allowed is {', '.join(INITS)}")
        if (self.init == "text") != bool(self.init_text):
            raise ValueError('init="text" and a non-empty init_text go together')

    def reach(self, base, attachment, generator):
        self._check_length(base.anatomy.shape)
        embedding = base.anatomy.embedding
        weight = embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        prompt = nn.Parameter(self.initial(base, generator).to(weight.device, dtype))
        site = InputEmbeddings(base.model, embedding, prompt)
        attachment.sites.append(attachment.stack.enter_context(site))
        attachment.trainable["prompt_tuning.prompt"] = prompt
        attachment.virtual_tokens = self.num_virtual_tokens

    def initial(self, base: Base, generator: torch.Generator) -> Tensor:
        """P before training, (num_virtual_tokens, d_model), on the CPU."""
        table = base.anatomy.embedding.weight.detach().cpu()
        count, d_model = self.num_virtual_tokens, table.shape[1]
        if self.init == "random":
            return torch.rand(count, d_model, generator=generator) - 0.5
        if self.init == "vocabulary":
            known = min(len(base.tokenizer), len(table))
            ids = torch.randint(known, (count,), generator=generator)
        else:
            text = base.tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor((text * (count // len(text) + 1))[:count])
        return table[ids].clone()

    def parameters(self, shape: Shape) -> int:
        """num_virtual_tokens · d_model."""
        self._check_length(shape)
        return self.num_virtual_tokens * shape.d_model

    def _check_length(self, shape: Shape) -> None:
        if self.num_virtual_tokens >= shape.context:
            raise ValueError(
                f"num_virtual_tokens={self.num_virtual_tokens}: {shape.name} has {shape.context} "
                f"positions, so allowed is 1 to {shape.context - 1}, with one left for the input"
            )
