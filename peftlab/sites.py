"""The five sites: each one changes what a frozen model computes, and undoes it bit for bit.

Each site is a context manager. Entering it reaches into the model, leaving it takes everything
back, whatever happened in between. Nothing here knows any method. Three sites are here so far:

    InputEmbeddings     virtual tokens before the input
    LinearWeight        a delta beside one linear weight W
    ExistingParameters  some of the model's own parameters unfrozen
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peftlab.bases import Linear


class InputEmbeddings:
    """Virtual tokens P (P, d_model) in front of the embedded input of a causal language model.

        x = [P; E(tokens)]        positions 0 … P−1 for the virtual tokens, P … for the real ones

    A hook before the model's forward puts them in, and one behind it drops their logits, so that
    the output has the shape of the input. While decoding with a cache, the virtual tokens are
    already inside the cache: only the mask and the positions are extended.
    """

    name = "input_embeddings"

    def __init__(self, model: nn.Module, embedding: nn.Embedding, prompt: nn.Parameter):
        self.model, self.embedding, self.prompt = model, embedding, prompt

    def __enter__(self):
        self.hooks = [
            self.model.register_forward_pre_hook(self._put_in_front, with_kwargs=True),
            self.model.register_forward_hook(self._drop_logits, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _put_in_front(self, model, args, kwargs):
        if args:  # the first positional argument of every causal model is input_ids
            kwargs = {**kwargs, "input_ids": args[0]}
        count = self.prompt.shape[0]
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        batch, length = ids.shape
        cache = kwargs.get("past_key_values")
        cached = cache.get_seq_length() if cache is not None else 0
        if mask is None:
            mask = ids.new_ones(batch, length + max(cached - count, 0))
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        kwargs = {key: value for key, value in kwargs.items() if key != "cache_position"}
        kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, count), mask], dim=1)
        kwargs["position_ids"] = positions + count
        if cached == 0:
            embedded = self.embedding(ids)  # batch seq d_model
            prompt = self.prompt.to(embedded.dtype).expand(batch, -1, -1)
            first = torch.arange(count, device=ids.device).expand(positions.shape[0], -1)
            kwargs["inputs_embeds"] = torch.cat([prompt, embedded], dim=1)
            kwargs["position_ids"] = torch.cat([first, kwargs["position_ids"]], dim=1)
            kwargs["input_ids"] = None
            if kwargs.get("labels") is not None:
                labels = kwargs["labels"]
                kwargs["labels"] = torch.cat([labels.new_full((batch, count), -100), labels], dim=1)
        return (), kwargs

    def _drop_logits(self, model, args, kwargs, output):
        if kwargs.get("inputs_embeds") is not None:
            full = kwargs["inputs_embeds"].shape[1]
            if output.logits.shape[1] == full:  # generation may ask for the last logits only
                output.logits = output.logits[:, self.prompt.shape[0] :]
        return output


class LinearWeight:
    """A delta beside one linear weight:  y = W x + b + delta(x).

    The delta is a module with `forward(x)` and `delta_weight()` (d_out, d_in). Merging writes
    W + delta_weight() into the model and keeps the original rows; unmerging puts those back.
    """

    def __init__(self, linear: Linear, delta: nn.Module):
        self.name, self.linear, self.delta = linear.name, linear, delta
        self.original: Tensor | None = None

    @property
    def merged(self) -> bool:
        return self.original is not None

    def __enter__(self):
        self.hook = self.linear.module.register_forward_hook(self._add)
        return self

    def __exit__(self, *_):
        self.unmerge()
        self.hook.remove()

    def _add(self, module, args, output):
        if self.merged:
            return output
        return self.linear.add_to(output, self.delta(args[0]).to(output.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Write W + ΔW into the model and keep the original."""
        if not self.merged:
            weight = self.linear.weight
            self.original = weight.clone()
            self.linear.write(weight + self.delta.delta_weight().to(weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept original back: restored, not subtracted."""
        if self.merged:
            self.linear.write(self.original)  # follows the model to its device
            self.original = None


class ExistingParameters:
    """Some of the model's own parameters, unfrozen. The originals are kept aside.

    Training happens on copies inside the same `Parameter` objects; leaving puts the original
    tensors themselves back, so that not even their addresses have changed.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in names}

    def __enter__(self):
        self.originals = {name: p.data for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        return self

    def __exit__(self, *_):
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self.originals[name].to(parameter.device)
