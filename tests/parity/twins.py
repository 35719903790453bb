"""The same adapter twice: ours, and Hugging Face PEFT's with our numbers copied in.

PEFT adapts GPT-2's `c_attn` as one matrix. Our separate deltas on some of q, k and v, n of rank r,
are one of its deltas of rank n·r: the factors A stacked, the factors B on the diagonal of a block
matrix, alpha n times as large so that alpha / r stays. `blocks` says where our tensors are in it.

PEFT ignores position_ids under prompt tuning and counts positions through the padding, so with
padding on the left ours is called with those positions given.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass

import peft
import torch
from torch import nn

from peftlab import LoRA, PromptTuning, Tuned, attach


@dataclass
class Twins:
    """Our adapted base, PEFT's model, and our trained tensors as (parameter, index) of PEFT's."""

    ours: Tuned
    theirs: peft.PeftModel
    blocks: dict[str, tuple[nn.Parameter, tuple]]

    def logits(self, ids, mask=None, positions=None):
        """Both logits, of the real tokens. PEFT returns those of the virtual tokens as well."""
        mask = torch.ones_like(ids) if mask is None else mask
        if positions is None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        given = (
            {} if self.theirs.active_peft_config.is_prompt_learning else {"position_ids": positions}
        )
        ours = self.ours.model(ids, attention_mask=mask, position_ids=positions).logits
        theirs = self.theirs(input_ids=ids, attention_mask=mask, **given).logits
        return ours, theirs[:, -ids.shape[1] :]

    def tensors(self):
        """(name, ours, theirs) of every trained tensor, values."""
        for name, (parameter, index) in self.blocks.items():
            yield name, self.ours.trainable[name].detach(), parameter.detach()[index]

    def gradients(self):
        """(name, ours, theirs) of every trained tensor, gradients."""
        for name, (parameter, index) in self.blocks.items():
            yield name, self.ours.trainable[name].grad, parameter.grad[index]


def twins(base, model, method, stir) -> Twins:
    """`model` is a second copy of the base's weights, for PEFT to change in place."""
    ours = stir(attach(base, method))
    make = {LoRA: _lora, PromptTuning: _prompt}[type(method)]
    theirs, blocks = make(ours, model, method)
    assert blocks.keys() == ours.trainable.keys()
    with torch.no_grad():
        for name, (parameter, index) in blocks.items():
            parameter[index] = ours.trainable[name]
    return Twins(ours, theirs.eval(), blocks)


def _prompt(ours, model, method):
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=method.num_virtual_tokens
    )
    theirs = peft.get_peft_model(model, config)
    embedding = theirs.prompt_encoder["default"].embedding
    embedding.to(ours.prompt.dtype)
    return theirs, {"prompt_tuning.prompt": (embedding.weight, (slice(None),))}


def _lora(ours, model, method):
    parts = defaultdict(list)  # module's name -> the deltas on it
    names = {module: name for name, module in ours.model.named_modules()}
    for name in ours.deltas:
        parts[names[ours.anatomy.linears[name].module]].append(name)
    ranks = {module: method.r * len(deltas) for module, deltas in parts.items()}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=list(parts),
        rank_pattern=ranks,
        alpha_pattern={m: method.alpha * len(deltas) for m, deltas in parts.items()},
        fan_in_fan_out=ours.anatomy.family == "gpt2",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out
        theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    theirs.to(ours.anatomy.embedding.weight.dtype)
    blocks = {}
    for module, deltas in parts.items():
        layer = theirs.base_model.model.get_submodule(module)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.shape[0] == B.shape[1] == ranks[module]
        nn.init.zeros_(B)
        for i, name in enumerate(deltas):
            middle = slice(i * method.r, (i + 1) * method.r)
            rows = slice(*ours.anatomy.linears[name].rows)
            blocks[f"lora.{name}.A"] = (A, (middle,))
            blocks[f"lora.{name}.B"] = (B, (rows, middle))
    return theirs, blocks
