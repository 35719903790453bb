"""One file per method: its mathematics and the sites it uses, and nothing else.

Shared parts are in files beside them: `method` has the interface, `checks` the refusals,
`composition` the methods that do not combine. Soft prompts share `prompt_starts`,
`prompt_networks` and `soft`; deltas `deltas`; adapters `bottleneck`; pruning `scores`,
`structure_scores` and `calibration`. `heads` are trained layers over an encoder.
"""

from peftlab.methods.adalora import AdaLoRA
from peftlab.methods.bitfit import BitFit
from peftlab.methods.bottleneck import Adapter
from peftlab.methods.composition import check_composition
from peftlab.methods.deep_prompt_tuning import DeepPromptTuning
from peftlab.methods.dora import DoRA
from peftlab.methods.full_fine_tuning import FullFineTuning
from peftlab.methods.houlsby import HoulsbyAdapter
from peftlab.methods.ia3 import IA3
from peftlab.methods.layer_norm import LayerNormTuning
from peftlab.methods.lora import LoRA
from peftlab.methods.method import METHODS, Attachment, Method
from peftlab.methods.nf4 import NF4
from peftlab.methods.p_tuning import PTuning
from peftlab.methods.p_tuning_v2 import PTuningV2
from peftlab.methods.parallel import ParallelAdapter
from peftlab.methods.pfeiffer import PfeifferAdapter
from peftlab.methods.pissa import PiSSA
from peftlab.methods.prefix_tuning import PrefixTuning
from peftlab.methods.prompt_and_prefix import PromptAndPrefix
from peftlab.methods.prompt_tuning import PromptTuning
from peftlab.methods.prune import Prune
from peftlab.methods.prune_structures import PruneStructures
from peftlab.methods.qlora import QLoRA
from peftlab.methods.vera import VeRA
