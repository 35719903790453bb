"""peftlab: parameter-efficient fine-tuning, from scratch, in view.

base  = peftlab.load("tiny-gpt")
tuned = peftlab.attach(base, peftlab.LoRA(r=8, alpha=16))
run   = peftlab.train(tuned, peftlab.tasks.load("facts"))
tuned.detach()
"""

import importlib
import logging
import warnings

from peftlab.accounting import count
from peftlab.bases import load
from peftlab.methods import (
    IA3,
    NF4,
    AdaLoRA,
    BitFit,
    DeepPromptTuning,
    DoRA,
    FullFineTuning,
    HoulsbyAdapter,
    LayerNormTuning,
    LoRA,
    ParallelAdapter,
    PfeifferAdapter,
    PiSSA,
    PrefixTuning,
    PromptAndPrefix,
    PromptTuning,
    Prune,
    PruneStructures,
    PTuning,
    PTuningV2,
    QLoRA,
    VeRA,
)
from peftlab.training import train
from peftlab.tuned import Tuned, attach
from peftlab.tuned.by_task import TaskAdapters
from peftlab.tuned.examine import examine

__version__ = "0.1.0"
REPOSITORY = "https://github.com/peftlab/peftlab"

_ROOMS = {
    "accounting": "accounting",
    "adviser": "memory.adviser",
    "claims": "experiments.claims",
    "exercises": "exercises",
    "figures": "figures",
    "heads": "methods.heads",
    "interop": "tuned.interop",
    "memory": "memory",
    "panels": "panels",
    "probes": "bases.probes",
    "quantisation": "sites.quantisation",
    "scores": "methods.scores",
    "tasks": "tasks",
}

__all__ = [
    "AdaLoRA",
    "BitFit",
    "NF4",
    "DeepPromptTuning",
    "DoRA",
    "FullFineTuning",
    "HoulsbyAdapter",
    "IA3",
    "LayerNormTuning",
    "LoRA",
    "PTuning",
    "PTuningV2",
    "ParallelAdapter",
    "PfeifferAdapter",
    "PiSSA",
    "PrefixTuning",
    "PromptAndPrefix",
    "PromptTuning",
    "Prune",
    "PruneStructures",
    "QLoRA",
    "TaskAdapters",
    "Tuned",
    "VeRA",
    "attach",
    "count",
    "examine",
    "load",
    "setup",
    "train",
    *_ROOMS,
]


def __getattr__(name: str):
    """Rooms that need plotting or widgets are imported when they are first used."""
    if name in _ROOMS:
        return importlib.import_module(f"peftlab.{_ROOMS[name]}")
    raise AttributeError(f"peftlab has no {name!r}")


def setup(seed: int = 0) -> str:
    """Prepare a notebook: one figure style, one seed, no library chatter. Says what it runs on."""
    import torch

    from peftlab import figures

    figures.use_template()
    torch.manual_seed(seed)
    for chatty in ("transformers", "bitsandbytes"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return f"peftlab {__version__} is ready"
