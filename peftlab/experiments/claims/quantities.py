"""Numbers that follow from shapes and methods alone, by name, for `data/claims`."""

from __future__ import annotations

import functools
import json

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from peftlab import accounting
from peftlab.bases.data import data_path
from peftlab.bases.shapes import Shape, named_config, names
from peftlab.experiments.claims.evidence import entry, rate, result
from peftlab.memory.step import How
from peftlab.memory.traced import blank, rows
from peftlab.methods import METHODS, Method
from peftlab.sites import quantisation

__all__ = ["entry", "rate", "result"]

ATEN = torch.ops.aten
DEPTH = {"n_layer", "num_hidden_layers"}  # in the configs of models with one stack


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(above, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(above, query, key, value)


CPU_ATTENTION = {  # torch's counter knows the GPU's kernels alone
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def made(name: str, **options) -> Method:
    """The method of this name; a list of targets is written with commas."""
    targets = options.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        options["target_modules"] = tuple(targets.split(","))
    return METHODS[name](**options)


@functools.cache
def shape(model: str) -> Shape:
    """The shape of a model that ships, or of one in `data/claims/shapes.json`."""
    if model in names():
        return Shape.named(model)
    more = json.loads(data_path("claims", "shapes.json").read_text(encoding="utf-8"))
    return Shape.from_config(more[model], model)


def size(model: str, field: str) -> int:
    """One number of a model's shape: `d_model`, `layers`, `d_kv`, …"""
    return getattr(shape(model), field)


def parameters(model: str) -> int:
    """The parameters of a model; tied ones count once."""
    return accounting.base_parameters(shape(model))


def weight_bytes(model: str, width: int) -> int:
    """The bytes of a model whose every number takes `width`."""
    return width * parameters(model)


def count(method: str, model: str, **options) -> int:
    """How many numbers the method trains on the model."""
    return accounting.count(made(method, **options), shape(model))


def stored(method: str, model: str, **options) -> int:
    """How many numbers the saved adapter holds."""
    return accounting.stored(made(method, **options), shape(model))


def percent(method: str, model: str, **options) -> float:
    """Trained parameters in percent of the model's."""
    return accounting.percent(made(method, **options), shape(model))


def file_bytes(method: str, model: str, dtype: str = "float32", **options) -> int:
    """Bytes of the stored tensors."""
    return accounting.file_bytes(made(method, **options), shape(model), dtype)


def training_bytes(method: str, model: str, part: str = "total", dtype="float32", **options) -> int:
    """Bytes that training holds from step to step, or one part of them: weights, gradients, adam;
    activations are not among them."""
    return getattr(accounting.training_bytes(made(method, **options), shape(model), dtype), part)


def flops(method: str, model: str, what: str = "step", length: int = 128, **options) -> int:
    """Floating-point operations of one row of `length` tokens: a training step, or the forward
    pass. Matrix products and attention, which is nearly all.

    They are of the first degree in the number of layers, so two small models tell of the whole.
    """
    config, layers = named_config(model), size(model, "layers")
    one, two = (
        _flops(
            method,
            json.dumps(config | dict.fromkeys(DEPTH & set(config), n)),
            what,
            length,
            **options,
        )
        for n in (1, 2)
    )
    return one + (layers - 1) * (two - one)


@functools.cache
def _flops(method: str, config: str, what: str, length: int, **options) -> int:
    with blank(made(method, **options), json.loads(config), How()) as tuned:
        given = rows(tuned, 1, length)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            with torch.set_grad_enabled(what == "step"):
                loss = tuned.batch_loss(given)
            if what == "step":
                loss.backward()
        return counter.get_total_flops()


def bits(block_size: int = 64, double_quant: bool = True) -> float:
    """Bits of a weight in NF4, its scales included."""
    return quantisation.bits_per_weight(block_size, double_quant)
