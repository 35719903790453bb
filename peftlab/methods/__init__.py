"""One file per method: its mathematics and the sites it uses, and nothing else."""

from peftlab.methods.bitfit import BitFit
from peftlab.methods.bottleneck import Adapter
from peftlab.methods.full_fine_tuning import FullFineTuning
from peftlab.methods.houlsby import HoulsbyAdapter
from peftlab.methods.ia3 import IA3
from peftlab.methods.layer_norm import LayerNormTuning
from peftlab.methods.lora import LoRA
from peftlab.methods.method import METHODS, Attachment, Method
from peftlab.methods.p_tuning import PTuning
from peftlab.methods.p_tuning_v2 import PTuningV2
from peftlab.methods.parallel import ParallelAdapter
from peftlab.methods.pfeiffer import PfeifferAdapter
from peftlab.methods.prefix_tuning import PrefixTuning
from peftlab.methods.prompt_tuning import PromptTuning
from peftlab.methods.variants import DeepPromptTuning, PromptAndPrefix

__all__ = [
    "IA3",
    "METHODS",
    "Adapter",
    "Attachment",
    "BitFit",
    "DeepPromptTuning",
    "FullFineTuning",
    "HoulsbyAdapter",
    "LayerNormTuning",
    "LoRA",
    "Method",
    "PTuning",
    "PTuningV2",
    "ParallelAdapter",
    "PfeifferAdapter",
    "PrefixTuning",
    "PromptAndPrefix",
    "PromptTuning",
]
