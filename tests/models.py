"""Tiny random models, a tokenizer made in memory and a task on them: what the tests run on.

Nothing here is read from disk. The weights are drawn large enough that attention is sharp and
every bias matters, so that a wrong mask, position or row shows in the output.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from peftlab import FullFineTuning, LoRA, PromptTuning, Tuned, attach
from peftlab.bases import Base
from peftlab.methods import Method
from peftlab.tasks import Example, Task

FAMILIES = ("gpt2", "llama")
CONTEXT = 48
U32, U64 = 2.0**-24, 2.0**-53  # unit roundoffs


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token that is also the padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: 1 + i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


VOCABULARY = len(tokenizer())


def config(family: str) -> transformers.PretrainedConfig:
    """GPT-2 with its dropout; Llama with grouped heads whose width is not the model's."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=24,
            n_layer=2,
            n_head=3,
            initializer_range=0.2,
            **ends,
        )
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=44,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **ends,
    )


@functools.cache
def _prototype(family: str, seed: int) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config(family))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms are drawn as well
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def hf_model(family: str, dtype=torch.float32, seed: int = 0) -> transformers.PreTrainedModel:
    """A fresh model of this family, the same for the same seed; float64 holds the same numbers.

    Llama's own RMSNorm works in float32 whatever it is given; torch's keeps float64.
    """
    model = copy.deepcopy(_prototype(family, seed)).to(dtype)
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
                norm.weight = module.weight
                model.set_submodule(name, norm)
    return model


def tiny(family: str, dtype=torch.float32, seed: int = 0) -> Base:
    """A fresh base of this family."""
    return Base(f"tiny-{family}", hf_model(family, dtype, seed), tokenizer())


@dataclass(frozen=True)
class Case:
    """One way to adapt a base, and what must hold for it: a new method is one line in `CASES`."""

    methods: list[Method]
    starts_equal: bool  # at init the output is the base's
    merges: bool = False
    restored: bool = True  # False: the base's own parameters train while it is attached


CASES = {
    "full": Case([FullFineTuning()], starts_equal=True, restored=False),
    "lora": Case([LoRA(r=3, alpha=5)], starts_equal=True, merges=True),
    "lora all": Case([LoRA(r=2, target_modules="all-linear")], starts_equal=True, merges=True),
    "lora dropout": Case([LoRA(r=4, dropout=0.5)], starts_equal=True, merges=True),
    "prompt": Case([PromptTuning(5)], starts_equal=False),
    "prompt random": Case([PromptTuning(1, init="random")], starts_equal=False),
    "prompt text": Case([PromptTuning(7, init="text", init_text="Sort:")], starts_equal=False),
    "lora + prompt": Case([LoRA(target_modules=["k", "down"]), PromptTuning(3)], False),
}


def adapted(case: str, family: str, dtype=torch.float32, seed: int = 0) -> Tuned:
    """A tiny base with this case attached and every trained tensor moved away from its start."""
    tuned = attach(tiny(family, dtype), CASES[case].methods, seed=seed)
    return stir(tuned, seed)


@torch.no_grad()
def stir(tuned: Tuned, seed: int = 0, size: float = 0.2) -> Tuned:
    """Add noise to every trained tensor, as training would: no factor is zero afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.trainable.values():
        parameter += size * torch.randn(parameter.shape, generator=generator)
    return tuned


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch with its mask, padded on this side."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        where = slice(longest - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    return ids, mask


def hook_count(model: nn.Module) -> int:
    """Hooks of every kind on every module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class Letters(Task):
    """Answer a letter with the next one: small enough to be learned in a few steps."""

    name = "letters"
    title = "The next letter"
    main = "exact"
    max_new_tokens = 2

    def grade(self, examples, outputs):
        right = [
            output == example.target for example, output in zip(examples, outputs, strict=True)
        ]
        return {"exact": sum(right) / len(right)}


def letters() -> Letters:
    """Eleven examples to train on, three and three to look at."""
    examples = [Example(f"{chr(97 + i)}>", chr(98 + i)) for i in range(17)]
    return Letters(train=examples[:11], dev=examples[11:14], test=examples[14:])
