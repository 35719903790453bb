"""Adapters and BitFit against models rebuilt by hand: other modules in place of a family's own.

Here the blocks are changed as the papers draw them, with torch's own layers and no hook; the
places are written out for every family, not looked up in the anatomy. Outputs and the gradients
of every trained tensor are compared, at rounding (`closeness`).
"""

import pytest
import torch
from models import FAMILIES, U32, U64, call, loss_of, stir, tiny, token_ids
from torch import nn

from peftlab import BitFit, HoulsbyAdapter, ParallelAdapter, PfeifferAdapter, attach

from .closeness import check

SIGMA = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class After(nn.Module):
    """A linear map with a bottleneck behind it, around which the map's output also goes."""

    def __init__(self, last, bottleneck, scaling):
        super().__init__()
        self.last, self.bottleneck, self.scaling = last, bottleneck, scaling
        self.weight = last.weight  # T5 looks at its dtype

    def forward(self, x):
        y = self.last(x)
        return y + self.scaling * self.bottleneck(y)


class Beside(nn.Module):
    """An attention or MLP that takes its input first, with a bottleneck beside the whole of it."""

    def __init__(self, sublayer, bottleneck, scaling):
        super().__init__()
        self.sublayer, self.bottleneck, self.scaling = sublayer, bottleneck, scaling

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        out, added = self.sublayer(*args, **kwargs), self.scaling * self.bottleneck(x)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added


class BesideInBert(nn.Module):
    """BERT's last map, residual sum and norm; the residual is also what the sublayer has read."""

    def __init__(self, output, bottleneck, scaling):
        super().__init__()
        self.output, self.bottleneck, self.scaling = output, bottleneck, scaling

    def forward(self, hidden, residual):
        y = self.output.dense(hidden) + self.scaling * self.bottleneck(residual)
        return self.output.LayerNorm(y + residual)


def places(family, model):
    """name -> (the module that has the last map, its name there, the module to go beside)."""
    found = {}
    if family == "t5":
        for stack in ("encoder", "decoder"):
            for i, block in enumerate(getattr(model, stack).block):
                kinds = (
                    ["attention", "mlp"] if stack == "encoder" else ["attention", "cross", "mlp"]
                )
                for layer, kind in zip(block.layer, kinds, strict=True):
                    name = {"attention": "SelfAttention", "cross": "EncDecAttention"}.get(
                        kind, "DenseReluDense"
                    )
                    inner = getattr(layer, name)
                    last = "wo" if kind == "mlp" else "o"
                    found[f"{stack}.layers.{i}.{kind}"] = (inner, last, (layer, name))
        return found
    blocks = {
        "gpt2": lambda: model.transformer.h,
        "llama": lambda: model.model.layers,
        "bert": lambda: model.bert.encoder.layer,
    }[family]()
    for i, block in enumerate(blocks):
        where = {
            "gpt2": lambda b: {"attention": (b, "attn", "c_proj"), "mlp": (b, "mlp", "c_proj")},
            "llama": lambda b: {
                "attention": (b, "self_attn", "o_proj"),
                "mlp": (b, "mlp", "down_proj"),
            },
            "bert": lambda b: {
                "attention": (b.attention, "output", "dense"),
                "mlp": (b, "output", "dense"),
            },
        }[family](block)
        for kind, (parent, name, last) in where.items():
            found[f"layers.{i}.{kind}"] = (getattr(parent, name), last, (parent, name))
    return found


def rebuilt(family, dtype, method, ours):
    """A base changed by hand, and its bottlenecks by the name of their sublayer."""
    base, made = tiny(family, dtype), {}
    for name, (inner, last, (parent, attribute)) in places(family, base.model).items():
        if name not in ours.modules:
            continue
        f = ours.modules[name]
        down, up = nn.Linear(24, method.bottleneck), nn.Linear(method.bottleneck, 24)
        bottleneck = nn.Sequential(down, SIGMA[method.non_linearity](), up).to(dtype)
        with torch.no_grad():
            for linear, W, b in ((down, f.W_down, f.b_down), (up, f.W_up, f.b_up)):
                linear.weight.copy_(W)
                linear.bias.copy_(b)
        made[name] = bottleneck
        if not method.beside:
            setattr(inner, last, After(getattr(inner, last), bottleneck, method.scaling))
        else:
            kind = BesideInBert if family == "bert" else Beside
            setattr(parent, attribute, kind(inner, bottleneck, method.scaling))
    assert made.keys() == ours.modules.keys()
    return base, made


ATTENTION = ["attention"]
METHODS = {
    "houlsby": HoulsbyAdapter(3),
    "houlsby tanh": HoulsbyAdapter(5, "tanh", 2.0),
    "pfeiffer": PfeifferAdapter(4),
    "parallel": ParallelAdapter(5),
    "parallel attention": ParallelAdapter(4, "silu", 0.5, ATTENTION),
}
CROSS = {
    "houlsby cross": HoulsbyAdapter(3, sublayers=["attention", "cross", "mlp"]),
    "parallel cross": ParallelAdapter(3, sublayers=["cross"]),
}
PAIRS = [(family, name) for family in FAMILIES for name in METHODS]
PAIRS += [("t5", name) for name in CROSS]


@pytest.mark.parametrize("family, name", PAIRS)
def test_an_adapter_is_the_module_put_there_by_hand(family, name):
    method, ids = (METHODS | CROSS)[name], token_ids(3, 8)
    logits, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        ours = stir(attach(tiny(family, dtype), method))
        theirs, made = rebuilt(family, dtype, method, ours)
        with torch.no_grad():
            logits.append((call(ours, ids), call(theirs, ids)))
        loss_of(ours, ids).backward()
        loss_of(theirs, ids).backward()
        pairs = {}
        for where, bottleneck in made.items():
            down, _, up = bottleneck
            f = ours.modules[where]
            pairs |= {
                f"{where}.W_down": (f.W_down.grad, down.weight.grad),
                f"{where}.b_down": (f.b_down.grad, down.bias.grad),
                f"{where}.W_up": (f.W_up.grad, up.weight.grad),
                f"{where}.b_up": (f.b_up.grad, up.bias.grad),
            }
        gradients.append(pairs)
    check(*logits, name, within=1e-5)
    # One E over all tensors, as a part of the largest entry: a bias is too small a sample.
    E = max(relative(s.double(), d) for s, d in each(*gradients))
    assert max(relative(a, b) for a, b in gradients[0].values()) <= 4 * E
    assert max(relative(a, b) for a, b in gradients[1].values()) <= 4 * E * U64 / U32


def each(single, double):
    """(in float32, in float64) of every gradient, of ours and of the other."""
    return [pair for name in single for pair in zip(single[name], double[name], strict=True)]


def relative(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_bitfit_is_torch_with_all_but_the_biases_frozen(family):
    """The same operations in the same order: equal bit for bit, three steps of AdamW long."""
    ids = token_ids(3, 8)
    ours = attach(tiny(family), BitFit())
    plain = tiny(family)
    names = [name for name, _ in plain.model.named_parameters() if name.endswith(".bias")]
    assert list(ours.trainable) == names
    for name, parameter in plain.model.named_parameters():
        parameter.requires_grad_(name in names)
    theirs = {name: p for name, p in plain.model.named_parameters() if p.requires_grad}
    optimizers = [torch.optim.AdamW(list(p.values()), lr=0.01) for p in (ours.trainable, theirs)]
    for _ in range(3):
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, ids).backward()
            optimizer.step()
        for name, parameter in ours.trainable.items():
            assert torch.equal(parameter.grad, theirs[name].grad)
            assert torch.equal(parameter, theirs[name])
    with torch.no_grad():
        assert torch.equal(call(ours, ids), call(plain, ids))
