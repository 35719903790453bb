"""Recomputing a block in the backward pass changes no gradient of a soft prompt or an adapter.

The block is run again with the same numbers in the same order, so the gradients are equal bit for
bit but where their sums are taken in another order; `check` allows rounding.
"""

import pytest
import torch
from models import FAMILIES, loss_of, padded, stir, tiny, token_ids
from torch import nn

from peftlab import (
    IA3,
    DeepPromptTuning,
    HoulsbyAdapter,
    ParallelAdapter,
    PrefixTuning,
    PromptAndPrefix,
    PromptTuning,
    PTuning,
    attach,
)

from .closeness import check

METHODS = {
    "prompt": PromptTuning(4),
    "p mlp": PTuning(4, "mlp"),
    "p lstm": PTuning(4),
    "prefix": PrefixTuning(4),
    "prefix shifted": PrefixTuning(4, shift_positions=True),
    "prefix mlp": PrefixTuning(4, prefix_projection=True, encoder_hidden_size=8),
    "deep": DeepPromptTuning(4),
    "prompt and prefix": PromptAndPrefix(4, encoder_hidden_size=8),
    "houlsby": HoulsbyAdapter(3),
    "parallel": ParallelAdapter(3, sublayers=["attention", "mlp"]),
    "ia3": IA3(),
}

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


def gradients(family, method, dtype, checkpointing):
    """In training mode, for only there is anything recomputed, with dropout at zero."""
    tuned = stir(attach(tiny(family, dtype), METHODS[method]))
    if checkpointing:
        tuned.model.gradient_checkpointing_enable()
    tuned.train()
    for module in tuned.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_rate", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    blocks = [block for stack in tuned.anatomy.layers.values() for block in stack]
    runs = []
    for block in blocks:
        first = next(m for m in block.modules() if not list(m.children()))
        first.register_forward_hook(lambda *_: runs.append(1))
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in (8, 5)], "right")
    loss_of(tuned, ids, mask).backward()
    assert len(runs) == len(blocks) * (2 if checkpointing else 1)
    return {name: p.grad for name, p in tuned.trainable.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_gradients(family, method):
    single, double = (
        [gradients(family, method, dtype, on) for on in (False, True)]
        for dtype in (torch.float32, torch.float64)
    )
    for name in single[0]:
        check(*([g[name] for g in both] for both in (single, double)), name)
