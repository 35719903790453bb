"""What reads a soft prompt: its source, its sublayers, its places among the tokens."""

from collections.abc import Callable

from torch import nn

from peftlab.attention import AttentionSite
from peftlab.bases import Base
from peftlab.methods.attachment import Attachment
from peftlab.methods.prompt_networks import Flat
from peftlab.sites import Source


def attentions(base: Base, reaches: Callable[[AttentionSite, int], bool]) -> list[AttentionSite]:
    """The attention sublayers that get a prefix: those with reaches(sublayer, layers of its stack).

    Raises ValueError if the base has none.
    """
    shape = base.anatomy.shape
    layers = {"decoder": shape.decoder_layers}
    sites = [s for s in base.anatomy.attentions if reaches(s, layers.get(s.stack, shape.layers))]
    if not sites:
        why = "its family does not use transformers' attention registry"
        raise ValueError(f"{base.name} computes attention in a way that no prefix reaches: {why}")
    return sites


def put(attachment: Attachment, module: nn.Module) -> Source:
    """Enter the source of a soft prompt, name its trainable parameters, and return it."""
    name = attachment.method.name
    attachment.hold(module, name)
    made = "" if isinstance(module, Flat) else "encoder."
    for key, parameter in module.named_parameters():
        attachment.trainable[f"{name}.{made}{key}"] = parameter
    source = Source(name, attachment.base.anatomy, module)
    attachment.sources[name] = attachment.enter(source)
    return source


def blocks(base: Base, placement: tuple | None, count: int) -> list[tuple[int, str, int | None]]:
    """The placement with token ids. Raises ValueError for a text that is not one token."""
    resolved = []
    for size, where in placement or [(count, "front")]:
        (side, _, text), token = where.partition(" "), None
        if text:
            ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(f"{text!r} is {len(ids)} tokens of {base.name}: one is needed")
            token = ids[0]
        elif side == "back" and base.kind == "decoder":
            raise ValueError("on a decoder nothing can stand behind a text that goes on")
        resolved.append((size, side, token))
    return resolved
