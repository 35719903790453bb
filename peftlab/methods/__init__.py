"""One file per method: its mathematics and the sites it uses, and nothing else."""

from peftlab.methods.full_fine_tuning import FullFineTuning
from peftlab.methods.lora import LoRA
from peftlab.methods.method import METHODS, Attachment, Method
from peftlab.methods.p_tuning import PTuning
from peftlab.methods.p_tuning_v2 import PTuningV2
from peftlab.methods.prefix_tuning import PrefixTuning
from peftlab.methods.prompt_tuning import PromptTuning
from peftlab.methods.variants import DeepPromptTuning, PromptAndPrefix

__all__ = [
    "METHODS",
    "Attachment",
    "DeepPromptTuning",
    "FullFineTuning",
    "LoRA",
    "Method",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptAndPrefix",
    "PromptTuning",
]
