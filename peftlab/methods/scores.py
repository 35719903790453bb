"""Scores of how much entries, heads, neurons and layers matter, and masks made of the scores.

>>> W = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
>>> lowest_out(magnitude(W).view(1, -1), 0.5).view(2, 3).int().tolist()
[[0, 0, 0], [1, 1, 1]]
>>> lowest_out(magnitude(W), 0.34).int().tolist()
[[0, 1, 1], [0, 1, 1]]
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import chain, groupby

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from peftlab.bases import Anatomy, LanguageModel, Linear, Shape
from peftlab.sites.structures import Removed, attentions, blocks

Matrix = Float[Tensor, "d_out d_in"]


def magnitude(W: Matrix) -> Matrix:
    """|W|: how far an entry is from zero."""
    return W.abs()


def wanda(W: Matrix, norms: Float[Tensor, " d_in"]) -> Matrix:
    """|W_ij| ‖X_j‖: an entry counts by its size times the usual size of its input."""
    return W.abs() * norms.to(W)


def lowest_out(
    scores: Float[Tensor, "groups n"], sparsity: int | float
) -> Bool[Tensor, "groups n"]:
    """The mask of each group: exactly the round(sparsity · n) lowest scores are False.

    Among equal scores the first goes first, so that the same scores give the same mask anywhere.
    """
    count = round(sparsity * scores.shape[1])
    order = scores.argsort(dim=1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


def choose(scores: list[Tensor], sparsity: int | float, within: str) -> list[Tensor]:
    """A mask for each matrix of scores (d_out, d_in).

    Entries are compared `within` a "row", a "layer" (one matrix), all matrices ("global"), or
    every four neighbours along the input ("2:4").
    """
    if within == "global":
        together = torch.cat([S.flatten() for S in scores])[None]
        parts = lowest_out(together, sparsity)[0].split([S.numel() for S in scores])
    else:
        width = {"layer": lambda S: S.numel(), "row": lambda S: S.shape[1], "2:4": lambda S: 4}
        parts = [lowest_out(S.reshape(-1, width[within](S)), sparsity) for S in scores]
    return [part.view(S.shape) for part, S in zip(parts, scores, strict=True)]


def is_two_four(mask: Bool[Tensor, "d_out d_in"]) -> bool:
    """Whether exactly two of every four neighbours along the input are held at zero."""
    return mask.shape[1] % 4 == 0 and bool((mask.view(-1, 4).sum(dim=1) == 2).all())


def cubic(sparsity: int | float, progress: int | float) -> float:
    """s (1 − (1 − t)³): fast at first, slow at the end (Zhu and Gupta 2017)."""
    return sparsity * (1 - (1 - min(progress, 1.0)) ** 3)


@torch.no_grad()
def input_norms(
    model: LanguageModel, linears: list[Linear], texts: tuple[str, ...], batch_size: int = 32
) -> dict[nn.Module, Float[Tensor, " d_in"]]:
    """‖X_j‖₂ of every input feature of these weights, over all real tokens of the texts.

    By module, because q, k and v of a fused one read the same input. An encoder reads the texts as
    they are; T5's decoder reads them after its start token. Raises ValueError if none has a token.
    """
    squares: dict[nn.Module, Tensor] = {}
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


@torch.no_grad()
def importance(anatomy: Anatomy, kind: str, name: str) -> Tensor:
    """Σ w² over all weights of each head, query or neuron of a sublayer, or of one block.

    A block counts only the weights that write to the residual stream: its o and down.
    """
    shape = anatomy.shape
    if kind == "layers":
        mine = [x for key, x in anatomy.linears.items() if key.startswith(f"{name}.")]
        return sum(x.weight.double().square().sum() for x in mine if x.target in ("o", "down"))
    count = {"heads": shape.kv_heads, "queries": shape.heads, "neurons": shape.d_ff}[kind]
    read = {"heads": "qkv", "queries": "q", "neurons": ("up", "gate")}[kind]
    write = "down" if kind == "neurons" else "o"
    total = torch.zeros(count, dtype=torch.float64)
    for target in (*read, write):
        if linear := anatomy.linears.get(f"{name}.{target}"):
            W = linear.weight.double().square().cpu()
            total += W.sum(dim=0 if target == write else 1).view(count, -1).sum(dim=1)
    return total


def sensitivity(
    model: LanguageModel, texts: tuple[str, ...], batch_size: int = 16
) -> dict[tuple[str, str], Tensor]:
    """The mean of |∂L/∂ξ| over the texts, where ξ = 1 multiplies the output of a structure: by
    (kind, name), for every head, query, neuron and layer at once. A layer has ξ on o and down.

    L is a text's own loss: a decoder predicts the next token, an encoder every seventh, masked, and
    T5 the text that it reads.
    """
    anatomy, gates, totals = model.anatomy, {}, {}
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
            own_loss(model, list(texts[start : start + batch_size])).sum().backward()
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


def first_of(kind: str, name: str, size: int) -> Tensor:
    """The same score for all, so that the first go first."""
    return torch.zeros(size)


def lowest_structures(shape: Shape, fractions: dict, score: Callable) -> Removed:
    """The heads, queries, neurons and layers to take out: the named ones, or of each kind the
    given fraction with the lowest score(kind, name, size)."""
    layers, gone, group = fractions["layers"], {}, shape.heads // shape.kv_heads
    if not isinstance(layers, tuple):
        stacks = groupby(blocks(shape), lambda name: name.rpartition("layers")[0])
        lowest = [_lowest_layers(list(names), layers, score) for _, names in stacks]
        layers = tuple(chain.from_iterable(lowest))
    if fractions["queries"] and group == 1:
        raise ValueError(f"queries: each head of {shape.name} has one query; give heads")
    sizes = {"heads": shape.kv_heads, "queries": group, "neurons": shape.d_ff}
    for kind, size in sizes.items():
        gone[kind] = value = fractions[kind]
        if isinstance(value, dict):
            continue
        places = blocks(shape) if kind == "neurons" else attentions(shape)
        gone[kind] = {}
        for name in places if round(value * size) else ():
            if name.removesuffix(".cross") not in layers:
                every = shape.heads if kind == "queries" else size
                keep = lowest_out(score(kind, name, every).view(-1, size), value)
                gone[kind][name] = tuple((~keep.flatten()).nonzero().flatten().tolist())
    return Removed(**gone, layers=layers)


def _lowest_layers(names: list[str], fraction: int | float, score: Callable) -> list[str]:
    """The lowest layers of one stack, without T5's first blocks, which have to stay."""
    count = round(fraction * len(names))
    free = names[1:] if "coder" in names[0] and count < len(names) else names
    scores = torch.cat([score("layers", name, 1) for name in free]) if free else torch.empty(0)
    lowest = scores.argsort(stable=True)[:count].tolist()
    return [free[i] for i in sorted(lowest)]
