"""Prompt tuning: trainable vectors in front of the embedded input."""

from dataclasses import dataclass

from peftlab.methods.checks import check_context, check_init
from peftlab.methods.method import Method
from peftlab.methods.prompt_networks import Flat
from peftlab.methods.prompt_starts import PROMPT_INITS, initial_prompt
from peftlab.methods.soft import put
from peftlab.sites import InputEmbeddings


@dataclass(frozen=True)
class PromptTuning(Method):
    """Soft prompt tuning.

        x = [P; E(tokens)]      P (num_virtual_tokens, d_model) trains, all else is frozen

    Trained and stored: P, num_virtual_tokens · d_model numbers. The virtual tokens pass through
    every layer and cost context and time like real ones; only the input layer changes. On an
    encoder-decoder they are in front of the encoder's input alone, as in the paper.

    `init` chooses the initial P: "vocabulary" copies the embeddings of tokens drawn at random,
    "text" those of `init_text` (repeated or cut to length; the class words make a good text),
    "random" draws uniformly from ±0.5 as in the paper, "normal" draws with the table's own standard
    deviation, "zero" is all zeros. The scale decides which of them trains: see the lesson.

    Lester et al. 2021, arXiv:2104.08691, sections 2 and 3.2.
    """

    num_virtual_tokens: int = 20
    init: str = "vocabulary"
    init_text: str | None = None

    name = "prompt_tuning"
    title = "Prompt tuning"
    learning_rate = 0.1
    limits = {"num_virtual_tokens": (1,)}

    def __post_init__(self):
        super().__post_init__()
        check_init(self.init, self.init_text, PROMPT_INITS)

    def reach(self, base, attachment, generator):
        count = self.num_virtual_tokens
        check_context(count, base.anatomy.shape)
        start = initial_prompt(base, self.init, self.init_text, count, generator)
        read = put(attachment, Flat({"prompt": start}))
        attachment.enter(InputEmbeddings(base.anatomy, read, [(count, "front", None)]))
        attachment.virtual_tokens = count

    def parameters(self, shape):
        check_context(self.num_virtual_tokens, shape)
        return self.num_virtual_tokens * shape.d_model
