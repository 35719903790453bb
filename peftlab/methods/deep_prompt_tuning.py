"""Deep prompt tuning: new virtual tokens at the input of every layer."""

from dataclasses import dataclass

import torch

from peftlab.methods.checks import check_context
from peftlab.methods.prompt_networks import Flat
from peftlab.methods.prompt_starts import initial_prompt
from peftlab.methods.prompt_tuning import PromptTuning
from peftlab.methods.soft import put
from peftlab.sites import InputEmbeddings


@dataclass(frozen=True)
class DeepPromptTuning(PromptTuning):
    """Virtual tokens at the input, and new ones at the input of every layer.

        [h_l of the virtual tokens; h_l of the text] → [P_l; h_l of the text]      P_l (P, d_model)

    The frozen W_k and W_v make the keys and values of each P_l, so one vector replaces the two of
    prefix tuning: P · L · d_model numbers, trained and stored. The virtual tokens still cost
    queries and an MLP in every layer. The hyper-parameters are those of prompt tuning.

    Some sources call this prefix tuning or P-tuning v2. It is the "prefix-layer" baseline of Hu et
    al. 2021, arXiv:2106.09685, section 5.1, and the prompt-deep of vision transformers. On T5 it is
    only in the encoder.
    """

    name = "deep_prompt_tuning"
    title = "Deep prompt tuning"

    def reach(self, base, attachment, generator):
        count, layers = self.num_virtual_tokens, base.anatomy.shape.layers
        check_context(count, base.anatomy.shape)
        start = [
            initial_prompt(base, self.init, self.init_text, count, generator) for _ in range(layers)
        ]
        read = put(attachment, Flat({"prompt": torch.stack(start)}))
        place = [(count, "front", None)]
        attachment.enter(InputEmbeddings(base.anatomy, read, place, every_layer=True))
        attachment.virtual_tokens = count

    def parameters(self, shape):
        return shape.layers * super().parameters(shape)
