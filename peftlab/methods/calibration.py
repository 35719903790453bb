"""What a model shows when it runs calibration texts: the sizes of its inputs, and its gradients."""

from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peftlab.bases import LanguageModel, Linear, listed


@torch.no_grad()
def input_norms(
    model: LanguageModel, linears: list[Linear], texts: tuple[str, ...], batch_size: int = 32
) -> dict[nn.Module, Float[Tensor, " d_in"]]:
    """‖X_j‖₂ of every input feature of these weights, over all real tokens of the texts.

    By module, because q, k and v of a fused one read the same input. An encoder reads the texts as
    they are; T5's decoder reads them after its start token. Raises ValueError if none has a token.
    """
    texts, squares = listed(texts), {}
    mask = torch.zeros(0)

    def collect(module, args):
        x = args[0][mask].double()  # only real tokens, (tokens, d_in)
        squares[module] = squares.get(module, 0) + x.square().sum(dim=0)

    with ExitStack() as stack, model._evaluating():
        for module in dict.fromkeys(linear.module for linear in linears):
            stack.enter_context(module.register_forward_pre_hook(collect))
        for start in range(0, len(texts), batch_size):
            batch = _tokens(model, texts[start : start + batch_size])
            mask = batch["attention_mask"].bool()
            if mask.any():
                model(**batch)
    if not squares:
        raise ValueError("no token in the calibration texts: Wanda needs the inputs of W")
    return {module: total.sqrt() for module, total in squares.items()}


def _tokens(model: LanguageModel, texts: tuple[str, ...] | list[str]) -> dict[str, Tensor]:
    """The tokens of these texts and their mask, and for T5's decoder the same tokens once more."""
    batch = model.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    batch = batch.to(model.device)
    ids = batch["input_ids"].long()
    read = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    if model.kind == "encoder-decoder":
        first = torch.full_like(ids[:, :1], model.decoder_start[0])
        read["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
    return read


def sensitivity(
    model: LanguageModel, texts: tuple[str, ...], batch_size: int = 16
) -> dict[tuple[str, str], Tensor]:
    """The mean of |∂L/∂ξ| over the texts, where ξ = 1 multiplies the output of a structure: by
    (kind, name), for every head, query, neuron and layer at once. A layer has ξ on o and down.

    L is a text's own loss: a decoder predicts the next token, an encoder every seventh, masked, and
    T5 the text that it reads.
    """
    texts, anatomy, gates, totals = listed(texts), model.anatomy, {}, {}
    counts = {"heads": anatomy.shape.kv_heads, "queries": anatomy.shape.heads}

    def gate(key: tuple[str, str], x: Tensor, count: int) -> Tensor:
        """A factor for each text and structure, repeated over features: (batch, 1, features)."""
        if key not in gates:
            gates[key] = torch.ones(len(x), count, dtype=x.dtype, device=x.device).requires_grad_()
        return gates[key].repeat_interleave(x.shape[-1] // count, dim=1)[:, None]

    def inside(name: str, kinds: tuple[str, ...], module, args):
        (x,) = args
        for kind in kinds:
            x = x * gate((kind, name), x, counts.get(kind, x.shape[-1]))
        return (x,)

    def outside(name: str, module, args, y):
        return y * gate(("layers", name.removesuffix(".cross")), y, 1)

    with ExitStack() as stack, torch.enable_grad(), model._evaluating():
        for key, linear in anatomy.linears.items():
            name, module = key.rsplit(".", 1)[0], linear.module
            if linear.target in ("o", "down"):
                kinds = ("heads", "queries") if linear.target == "o" else ("neurons",)
                stack.enter_context(module.register_forward_pre_hook(partial(inside, name, kinds)))
                stack.enter_context(module.register_forward_hook(partial(outside, name)))
        for start in range(0, len(texts), batch_size):
            gates.clear()
            own_loss(model, texts[start : start + batch_size]).sum().backward()
            for key, factor in gates.items():
                totals[key] = totals.get(key, 0) + factor.grad.abs().sum(dim=0) / len(texts)
    return totals


def own_batch(model: LanguageModel, texts: list[str]) -> dict[str, Tensor]:
    """The batch with which these texts would train the model; `sensitivity` has the labels."""
    batch = _tokens(model, texts)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    if model.kind == "encoder":
        hidden = torch.arange(ids.shape[1], device=ids.device) % 7 == 3
        labels = labels.masked_fill(~hidden, -100)
        batch["input_ids"] = ids.masked_fill(hidden & mask.bool(), model.tokenizer.mask_token_id)
    return batch | {"labels": labels}


def own_loss(model: LanguageModel, texts: list[str]) -> Tensor:
    """The mean cross entropy of each text, (batch,)."""
    logits, labels = model.aligned(own_batch(model, texts))
    if not (labels != -100).any(dim=1).all():
        raise ValueError("a calibration text is too short: none of its tokens is predicted")
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return loss.view(labels.shape).sum(dim=1) / (labels != -100).sum(dim=1)
