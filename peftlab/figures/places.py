"""Where in a transformer each of the model's own tensors sits, as one forward pass shows it."""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import nn

from peftlab.bases import Linear, fused
from peftlab.tuned import Tuned


@dataclass
class Places:
    """The plan of a model.

    own       the place and the letter of each parameter of the model, by its identity: a linear
              weight's ("layers.3.q", "W"), a norm's ("layers.3.mlp.norm", "g"), one elsewhere in a
              block ("layers.3.other", its name), or one around the blocks ("input", "output")
    first     whether the norms of a block come before their sublayers (else after the sum)
    """

    own: dict[int, tuple[str, str]] = field(default_factory=dict)
    first: bool = True


def places(tuned: Tuned) -> Places:
    """Run two tokens through the model, note the order in which its modules are called, and give
    each parameter its place by that order."""
    anatomy, found = tuned.anatomy, Places()
    linears = list(anatomy.linears.values())
    for whole in fused(linears):
        for name, letter in (("weight", "W"), ("bias", "b")):
            if (tensor := whole.module._parameters.get(name)) is not None:
                found.own[id(tensor)] = (whole.name, letter)
    found.own[id(anatomy.embedding.weight)] = ("input", "E")
    order = _called(tuned)
    blocks = {module: _prefix(block, linears) for b in anatomy.layers.values() for block in b
              for module in block.modules()}  # fmt: skip
    edges = _edges(linears)
    inside = [module for module in order if module in blocks]
    found.first = bool(inside) and _is_norm(inside[0])
    started = next((i for i, module in enumerate(order) if module in blocks), len(order))
    for name, module in tuned.model.named_modules():
        for key, tensor in module.named_parameters(recurse=False):
            if id(tensor) in found.own:
                continue
            own = {"weight": "g", "bias": "b"}.get(key, key) if _is_norm(module) else key
            if module in blocks:
                where = _in_block(module, blocks[module], order, edges, found.first)
            elif module in order and order.index(module) < started:
                where = "input"
            else:
                where = _after(name, tuned)
            plain = where.endswith("norm")
            label = own if plain else _short(name, key)
            found.own[id(tensor)] = (where, label)
    return found


def _called(tuned: Tuned) -> list[nn.Module]:
    """The modules that hold parameters of their own, in the order of a forward pass."""
    order: dict[nn.Module, None] = {}
    model, anatomy = tuned.model, tuned.anatomy
    tokens = torch.zeros(1, 2, dtype=torch.long, device=tuned.device)
    given = {"decoder_input_ids": tokens[:, :1]} if model.config.is_encoder_decoder else {}
    training = model.training
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hook = module.register_forward_hook(lambda module, *_: order.setdefault(module))
                stack.callback(hook.remove)
        stack.callback(model.train, training)
        stack.enter_context(anatomy.alone())
        stack.enter_context(torch.no_grad())
        model.eval()
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given)
    return list(order)


def _prefix(block: nn.Module, linears: list[Linear]) -> str:
    """The name of a block, "layers.3": that of the linear weights in it."""
    modules = set(block.modules())
    name = next(linear.name for linear in linears if linear.module in modules)
    parts = name.split(".")
    return ".".join(parts[: parts.index("layers") + 2])


def _edges(linears: list[Linear]) -> dict[nn.Module, tuple[str, bool]]:
    """The first and the last linear map of each sublayer: its name, and whether it is the first."""
    found = {}
    for linear in linears:
        where, _, target = linear.name.rpartition(".")
        kind = "mlp" if target in ("up", "gate", "down") else "attention"
        kind = where.removesuffix(".cross") + (".cross" if where.endswith("cross") else f".{kind}")
        found.setdefault(linear.module, (kind, target not in ("o", "down")))
    return found


def _in_block(module, block: str, order: list, edges: dict, first: bool) -> str:
    """A norm belongs to the sublayer that follows it, or that it follows."""
    if module not in order or not _is_norm(module):
        return f"{block}.other"
    at = order.index(module)
    near = order[at + 1 :] if first else order[at - 1 :: -1]
    name = next(edges[m][0] for m in near if m in edges and edges[m][1] == first)
    return f"{name}.norm"


def _after(name: str, tuned: Tuned) -> str:
    """Behind the blocks: in T5 each stack has its own norm there."""
    stacks = [stack for stack in tuned.anatomy.stacks if stack and name.startswith(stack)]
    return f"{stacks[0]}.output" if len(tuned.anatomy.stacks) > 1 and stacks else "output"


def _short(name: str, key: str) -> str:
    """The last words of a parameter's name that tell it from its neighbours."""
    short = name.rpartition(".")[2]
    return short if key == "weight" else f"{short}.{key}"


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
