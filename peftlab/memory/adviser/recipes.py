"""What stands at the end of each path: exact properties, code to copy, defaults, what comes next.

What a server knows was read in the documentation of PEFT 0.21 (one batch with several adapters:
LoRA), of vLLM (`vllm/lora/peft_helper.py` takes LoRA and refuses DoRA) and of llama.cpp
(`convert_lora_to_gguf.py`; its server puts requests with different adapters into different
batches). "own code" is a loop of your own over what the method's formula allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftlab.bases.shapes import Shape, named_config

if TYPE_CHECKING:
    from peftlab.memory.adviser.flow import Need

EVERY = frozenset({"peft", "vllm", "llama.cpp", "own code"})
OWN, PEFT = frozenset({"own code"}), frozenset({"peft", "own code"})
AUTO = {  # by kind of base and task: transformers' class, and PEFT's name of the task
    ("decoder", "generation"): ("AutoModelForCausalLM", "CAUSAL_LM"),
    ("decoder", "classification"): ("AutoModelForSequenceClassification", "SEQ_CLS"),
    ("decoder", "tagging"): ("AutoModelForTokenClassification", "TOKEN_CLS"),
    ("encoder", "classification"): ("AutoModelForSequenceClassification", "SEQ_CLS"),
    ("encoder", "tagging"): ("AutoModelForTokenClassification", "TOKEN_CLS"),
}
SEQ2SEQ = ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")  # writes the label as text


@dataclass(frozen=True)
class Default:
    """A setting to begin with, why, and where that is from."""

    setting: str
    value: str
    reason: str


@dataclass(frozen=True)
class Recipe:
    """One method. `in_the_weights`: it trains tensors of the model itself. `merges`: its change can
    be added to them. `soft`: it only puts vectors in front. `keeps_all`: PEFT refuses checkpointing
    with it, because both want the cache of keys and values. `mixes`: servers that take rows of
    several tasks in one batch; `served`: servers that load its file."""

    because: str
    config: Callable[[Need, int], str]
    defaults: tuple[Default, ...]
    otherwise: str
    in_the_weights: bool = False
    merges: bool = False
    soft: bool = False
    keeps_all: bool = False
    mixes: frozenset[str] = frozenset()
    served: frozenset[str] = PEFT

    @property
    def doors(self) -> int:
        """How much it leaves open: it can be switched off, it need not slow an answer, the servers
        that mix it and those that load it."""
        quick = self.in_the_weights or self.merges
        return (not self.in_the_weights) + quick + len(self.mixes) + len(self.served)

    def code(self, need: Need, size: int) -> str:
        """Lines to copy: a model is loaded and made ready to train."""
        return self.config(need, size)


def auto(need: Need) -> tuple[str, str]:
    """transformers' class for this base and task, and PEFT's name of the task."""
    return AUTO.get((Shape.named(need.model).kind, need.task), SEQ2SEQ)


def hub(model: str) -> str:
    """The model's name on the Hugging Face hub, from the source of its configuration."""
    return named_config(model)["source"].split("huggingface.co/")[1].split(" ")[0]


def _loaded(need: Need, more: str = "") -> str:
    kind, _ = auto(need)
    labels = "" if need.task == "generation" or kind == SEQ2SEQ[0] else ", num_labels=2"
    return (
        f'model = {kind}.from_pretrained(\n    "{hub(need.model)}", dtype=torch.bfloat16'
        f"{labels}{more}\n)\n"
    )


def _peft(config: str, need: Need, load: str = "", names: str = "get_peft_model") -> str:
    kind, task = auto(need)
    used, _, fields = config.replace("'", '"').removesuffix(")").partition("(")
    fields = fields or "inference_mode=False"
    return (
        f"import torch\nfrom peft import {', '.join(sorted([used, *names.split(', ')]))}\n"
        f"from transformers import {kind}{', BitsAndBytesConfig' if load else ''}\n\n"
        + (load or _loaded(need))
        + f'config = {used}(\n    task_type="{task}", {fields},\n)\n'
        + "model = get_peft_model(model, config)\n"
        + "model.gradient_checkpointing_enable()\nmodel.enable_input_require_grads()\n"
    )


def _low_rank(need: Need, r: int, more: str = "") -> str:
    # PEFT leaves the head of SEQ_CLS out of "all-linear", and takes that of TOKEN_CLS for a layer.
    if auto(need)[1] == "TOKEN_CLS":
        more += ",\n    exclude_modules=['score', 'classifier']"
    return f"LoraConfig(r={r}, lora_alpha={2 * r}, target_modules='all-linear'{more})"


def _lora(need: Need, r: int) -> str:
    return _peft(_low_rank(need, r), need)


def _dora(need: Need, r: int) -> str:
    return _peft(_low_rank(need, r, ", use_dora=True"), need)


def _qlora(need: Need, r: int) -> str:
    load = (
        'codes = BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type="nf4",\n'
        "    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,\n)\n"
        + _loaded(need, ", quantization_config=codes")
        + "model = prepare_model_for_kbit_training(model)\n"
    )
    return _peft(_low_rank(need, r), need, load, "get_peft_model, prepare_model_for_kbit_training")


def _prompt(need: Need, tokens: int) -> str:
    code = _peft(f"PromptTuningConfig(num_virtual_tokens={tokens})", need)
    if auto(need)[1] == "TOKEN_CLS":
        code += (
            f"# Virtual tokens have logits too: put {tokens} × -100 before the labels of a row.\n"
        )
    return code


def _prefix(need: Need, tokens: int) -> str:
    code = _peft(f"PrefixTuningConfig(num_virtual_tokens={tokens})", need)
    return code.split("model.gradient_checkpointing_enable")[0]


def _ia3(need: Need, _: int) -> str:
    return _peft("IA3Config()", need)


def _full(need: Need, _: int) -> str:
    kind, _ = auto(need)
    load = _loaded(need).replace("bfloat16", "float32")
    return (
        f"import torch\nfrom transformers import {kind}\n\n{load}"
        "model.gradient_checkpointing_enable()  # and bf16=True in TrainingArguments\n"
    )


def _bitfit(need: Need, size: int) -> str:
    return _full(need, size) + (
        "for name, parameter in model.named_parameters():\n"
        '    parameter.requires_grad = name.endswith("bias") or "classifier" in name\n'
    )


def _houlsby(need: Need, m: int) -> str:
    return (
        "import peftlab  # PEFT has no bottleneck adapters; the library `adapters` has\n\n"
        f'base = peftlab.load("{hub(need.model)}")\n'
        f"tuned = peftlab.attach(base, peftlab.HoulsbyAdapter(bottleneck={m}))\n"
    )


_RATE = "three rates a factor of three apart, more if the best is at an end"
RECIPES = {
    "Full fine-tuning": Recipe(
        "Full fine-tuning: nothing is added to an answer, and any server loads it.",
        _full,
        (
            Default("learning rate", "2e-5", f"Llama 2's (arXiv:2307.09288, 3.1); try {_RATE}"),
            Default("weights", "float32", "in bfloat16 a step of 2e-5 is rounded away"),
        ),
        "LoRA on all linear weights, at ten times the rate",
        in_the_weights=True,
        served=EVERY,
    ),
    "LoRA": Recipe(
        "LoRA: it can be merged, or swapped, or mixed in a batch, and every server loads its file.",
        _lora,
        (
            Default("target_modules", "all-linear", "QLoRA paper (arXiv:2305.14314, figure 2)"),
            Default("lora_alpha", "2 r", "a scale of 2; what matters is its product with the rate"),
            Default("learning rate", "2e-4", f"about ten times that of all weights; try {_RATE}"),
        ),
        "a higher rate, then a higher rank, then full fine-tuning if it fits",
        merges=True,
        mixes=EVERY - {"llama.cpp"},
        served=EVERY,
    ),
    "QLoRA": Recipe(
        "QLoRA: LoRA beside a base in four bits, which fits where 16 bits do not.",
        _qlora,
        (
            Default("quant_type", "nf4", "the paper's, with the scales coded too: 4.13 bits"),
            Default("learning rate", "2e-4", f"its table 9, to 13B; 1e-4 above; try {_RATE}"),
            Default(
                "merging",
                "into the 16-bit base",
                "then score it again: it trained beside the rounded one",
            ),
        ),
        "a GPU on which LoRA fits: decoding costs time in every step",
        merges=True,
        mixes=EVERY - {"llama.cpp"},
        served=EVERY,
    ),  # fmt: skip
    "DoRA": Recipe(
        "DoRA: a LoRA whose columns have lengths of their own; it can be merged.",
        _dora,
        (
            Default("learning rate", "2e-4", f"as LoRA; try {_RATE}"),
            Default(
                "r", "half of LoRA's", "its paper's claim (arXiv:2402.09353), at a longer step"
            ),
        ),
        "LoRA: more servers load it, and a step is shorter",
        merges=True,
        mixes=OWN,
    ),
    "Prompt tuning": Recipe(
        "Prompt tuning: the smallest file; rows of many tasks share a batch.",
        _prompt,
        (
            Default("num_virtual_tokens", "20 to 100", "Lester et al. (arXiv:2104.08691, 3.2)"),
            Default("learning rate", "0.3", f"its paper's, with Adafactor; try {_RATE}"),
            Default("start", "words of the task", "prompt_tuning_init='TEXT': random starts stall"),
        ),
        "a rate ten times higher, then prefix tuning, then LoRA",
        soft=True,
        mixes=OWN,
    ),
    "Prefix tuning": Recipe(
        "Prefix tuning: vectors in front in every layer; a few megabytes a task.",
        _prefix,
        (
            Default(
                "num_virtual_tokens",
                "10",
                "Li and Liang (arXiv:2101.00190, 7.2): 10 for table-to-text, 200 for summaries",
            ),
            Default("learning rate", "5e-5 to 1e-2", f"flat prefixes want the higher; try {_RATE}"),
        ),
        "prefix_projection=True, then LoRA",
        soft=True,
        keeps_all=True,
        mixes=OWN,
    ),  # fmt: skip
    "Houlsby adapter": Recipe(
        "Houlsby adapters: small layers in the road of every block.",
        _houlsby,
        (Default("learning rate", "3e-4", f"of the paper's grid (arXiv:1902.00751); try {_RATE}"),),
        "LoRA: it can be merged, and servers know it",
        mixes=OWN,
        served=OWN,
    ),
    "(IA)³": Recipe(
        "(IA)³: three scales a layer; the file is small, and it can be merged.",
        _ia3,
        (Default("learning rate", "3e-3", f"its paper's (arXiv:2205.05638, 3.3); try {_RATE}"),),
        "LoRA with a small rank",
        merges=True,
        mixes=OWN,
    ),
    "BitFit": Recipe(
        "BitFit: the model's own biases; the file is small, and any server loads the model.",
        _bitfit,
        (Default("learning rate", "1e-3", f"higher than for all weights; try {_RATE}"),),
        "LoRA with a small rank",
        in_the_weights=True,
        served=EVERY,
    ),
}
