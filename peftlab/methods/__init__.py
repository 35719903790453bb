"""One file per method: its mathematics and the sites it uses, and nothing else."""

from peftlab.methods.full_fine_tuning import FullFineTuning
from peftlab.methods.lora import LoRA
from peftlab.methods.method import METHODS, Attachment, Method
from peftlab.methods.prompt_tuning import PromptTuning

__all__ = ["METHODS", "Attachment", "FullFineTuning", "LoRA", "Method", "PromptTuning"]
