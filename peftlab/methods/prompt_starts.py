"""The initial values of soft prompts and prefixes."""

import torch
from jaxtyping import Float
from torch import Tensor

from peftlab.attention import AttentionSite, recorded
from peftlab.bases import Base

PROMPT_INITS = ("vocabulary", "text", "random", "normal", "zero")
PREFIX_INITS = ("vocabulary", "text", "random", "zero")


def token_ids(base: Base, init: str, text: str | None, count: int, generator) -> Tensor:
    """`count` token ids: those of a text, repeated or cut, or ids drawn from the vocabulary."""
    if init == "text":
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"init_text={text!r} has no token of {base.name}")
        base.check_ids(torch.tensor(ids))
        return torch.tensor((ids * (count // len(ids) + 1))[:count])
    known = min(len(base.tokenizer), base.anatomy.embedding.num_embeddings)
    return torch.randint(known, (count,), generator=generator)


def initial_prompt(
    base: Base, init: str, text: str | None, count: int, generator: torch.Generator
) -> Float[Tensor, "virtual d_model"]:
    """The initial values of a prompt, on the CPU; `PromptTuning` describes each `init`."""
    table = base.anatomy.embedding.weight.detach().cpu()
    size = (count, table.shape[1])
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    if init == "zero":
        return torch.zeros(size, dtype=table.dtype)
    if init == "random":
        return torch.rand(size, generator=generator, dtype=table.dtype) - 0.5
    if init == "normal":
        return table.std() * torch.randn(size, generator=generator, dtype=table.dtype)
    return table[token_ids(base, init, text, count, generator)].clone()


def initial_prefix(
    base: Base, sites: list[AttentionSite], init: str, text: str | None, count: int, generator
) -> dict[str, Float[Tensor, "sites kv_heads virtual head_dim"]]:
    """The initial values of a prefix, on the CPU; `PrefixTuning` describes each `init`."""
    weight = base.anatomy.embedding.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    size = (2, len(sites), sites[0].kv_heads, count, sites[0].head_dim)
    if init == "zero":
        made = torch.zeros(size, dtype=dtype)
    elif init == "random":
        made = torch.randn(size, generator=generator, dtype=dtype)
    else:
        ids = token_ids(base, init, text, count, generator).to(weight.device)
        pieces = ids.split(base.anatomy.shape.context)  # each has positions from 0 on
        made = [keys_values(base, sites, piece) for piece in pieces]
        made = torch.cat(made, dim=-2).to("cpu", dtype)
    return {"P_k": made[0].clone(), "P_v": made[1].clone()}


@torch.no_grad()
def keys_values(
    base: Base, sites: list[AttentionSite], ids: Tensor
) -> Float[Tensor, "2 sites kv_heads virtual head_dim"]:
    """The keys and values of a text's tokens in every sublayer, with positions from 0 on.

    An encoder-decoder reads the text on both sides. Virtual tokens of another method are left out.
    """
    ids = ids[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.kind == "encoder-decoder":
        given["decoder_input_ids"] = ids
    else:
        given["position_ids"] = base.anatomy.positions(given["attention_mask"])
    with base._evaluating(), base.anatomy.alone(), recorded(base.model, sites) as records:
        base.model(**given)
    read = [records[site.name] for site in sites]
    return torch.stack([torch.stack([x.key[0], x.value[0]]) for x in read], dim=1)
