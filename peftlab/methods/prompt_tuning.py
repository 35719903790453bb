"""Prompt tuning: trainable vectors in front of the embedded input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftlab.bases import Shape
from peftlab.methods.method import Method, require
from peftlab.sites import InputEmbeddings
from peftlab.soft import PROMPT_INITS, Flat, check_init, initial_prompt, put


@dataclass(frozen=True)
class PromptTuning(Method):
    """Soft prompt tuning.

        x = [P; E(tokens)]      P (num_virtual_tokens, d_model) trains, all else is frozen

    Trained and stored: P, num_virtual_tokens · d_model numbers. The virtual tokens pass through
    every layer and cost context and time like real ones; only the input layer is touched. On an
    encoder-decoder they stand before the encoder's input alone, as in the paper.

    `init` is where P starts: "vocabulary" copies the embeddings of tokens drawn at random,
    "text" those of `init_text` (repeated or cut to length; the class words make a good text),
    "random" is uniform in ±0.5 as in the paper, "normal" is drawn with the table's own spread,
    "zero" is all zeros. Which of them trains is a question of scale: see the lesson.

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
        check_init(self.init, self.init_text, PROMPT_INITS)

    def reach(self, base, attachment, generator):
        self._check_length(base.anatomy.shape)
        start = initial_prompt(base, self.init, self.init_text, self.num_virtual_tokens, generator)
        read = put(base, attachment, self.name, Flat({"prompt": start}))
        site = InputEmbeddings(base.anatomy, read, [(self.num_virtual_tokens, "front", None)])
        attachment.sites.append(attachment.stack.enter_context(site))
        attachment.virtual_tokens = self.num_virtual_tokens

    def footprint(self, plan):
        """The sequence is longer, and a gradient enters below the first layer."""
        plan.prompt += self.num_virtual_tokens

    def parameters(self, shape: Shape) -> int:
        """num_virtual_tokens · d_model."""
        self._check_length(shape)
        return self.num_virtual_tokens * shape.d_model

    def _check_length(self, shape: Shape) -> None:
        check_context(self.num_virtual_tokens, shape)


def check_context(count: int, shape: Shape) -> None:
    """Raise ValueError unless a token of the input fits beside `count` virtual ones."""
    if count >= shape.context:
        raise ValueError(
            f"num_virtual_tokens={count}: {shape.name} has {shape.context} "
            f"positions, so allowed is 1 to {shape.context - 1}, with one left for the input"
        )
