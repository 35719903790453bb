"""The bases of this folder: the tiny random ones of four families, and the one that ships."""

from __future__ import annotations

import copy
import functools

import models
import torch

import peftlab
from peftlab import Tuned, attach
from peftlab.bases import Base

DECODERS = ("gpt2", "llama", "tiny-gpt")
EVERY = (*models.FAMILIES, "tiny-gpt")
BOTH = (torch.float32, torch.float64)


@functools.cache
def shipped() -> Base:
    return peftlab.load("tiny-gpt")


def base_of(family: str, dtype: torch.dtype = torch.float32) -> Base:
    """A fresh base; float64 holds the same numbers as float32."""
    if family != "tiny-gpt":
        return models.tiny(family, dtype)
    return Base(family, copy.deepcopy(shipped().model).to(dtype), shipped().tokenizer)


def adapted(family: str, method, dtype: torch.dtype = torch.float32) -> Tuned:
    """A base with this method attached, moved away from its start."""
    size = 0.02 if family == "tiny-gpt" else 0.2  # trained weights are smaller than random ones
    return models.stir(attach(base_of(family, dtype), method), size=size)


@torch.no_grad()
def fill(tuned: Tuned, **tensors: torch.Tensor) -> Tuned:
    """Put these numbers into the trained tensors of this name."""
    for name, values in tensors.items():
        (trained,) = (p for key, p in tuned.trainable.items() if key.endswith(f".{name}"))
        trained.copy_(values)
    return tuned
