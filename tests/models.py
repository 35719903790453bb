"""Tiny random models, a tokenizer made in memory and a task on them: what the tests run on.

Nothing here is read from disk. The weights are drawn large enough that attention is sharp and
every bias matters, so that a wrong mask, position or row shows in the output.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from moulds import Mould
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peftlab import (
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
    Tuned,
    VeRA,
    attach,
    attention,
)
from peftlab.bases import CLASSES, Base, LanguageModel
from peftlab.bases import FAMILIES as KNOWN
from peftlab.methods import Method
from peftlab.methods.heads import Classification, Head, Spans, Tagging
from peftlab.sites import MaskedWeight
from peftlab.tasks import Example, Task

FAMILIES = ("gpt2", "llama", "bert", "t5")
DECODERS = ("gpt2", "llama")
GENERATING = ("gpt2", "llama", "t5")
CONTEXT = 48
U32, U64 = 2.0**-24, 2.0**-53  # unit roundoffs
ANCHOR = ">"  # every random row and every prompt has it, so that a placement finds its place

# Tokens behind the padding or end of text, which is 0, and the bytes, which are 1 to 256.
SPECIAL = {"bert": ("[CLS]", "[SEP]", "[MASK]"), "t5": ("</s>", "<extra_id_0>")}
FIRST = {"bert": "[PAD]", "t5": "<pad>"}


@functools.cache
def tokenizer_file(family: str) -> Tokenizer:
    """One token a byte, with this family's special tokens; BERT's and T5's put theirs around."""
    first, special = FIRST.get(family, "<|endoftext|>"), SPECIAL.get(family, ())
    words = [first, *sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    around = {"bert": "[CLS] $A [SEP]", "t5": "$A </s>"}.get(family)
    if around:
        ids = [(word, words.index(word)) for word in special if word in around]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return backend


def tokenizer(family: str = "gpt2") -> transformers.PreTrainedTokenizerFast:
    """One token a byte; a decoder's end of text is also its padding."""
    names = {
        "bert": dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"),
        "t5": dict(pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<extra_id_0>"]),
    }.get(family, dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>"))
    backend = copy.deepcopy(tokenizer_file(family))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


VOCABULARY = len(tokenizer())  # the padding and the bytes: the same numbers in every family
ANCHOR_ID = tokenizer()(ANCHOR)["input_ids"][0]


def config(family: str) -> transformers.PretrainedConfig:
    """GPT-2, BERT and T5 with their dropout; Llama with grouped heads, and as in T5 the width of
    the heads is not the model's. T5 has more layers in its encoder than in its decoder."""
    vocabulary = VOCABULARY + len(SPECIAL.get(family, ()))
    if family == "bert":
        return transformers.BertConfig(
            vocab_size=vocabulary,
            max_position_embeddings=CONTEXT,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            initializer_range=0.2,
            pad_token_id=0,
        )
    if family == "t5":
        return transformers.T5Config(
            vocab_size=vocabulary,
            n_positions=CONTEXT,
            d_model=24,
            d_kv=10,
            d_ff=40,
            num_layers=3,
            num_decoder_layers=2,  # transformers' own cache for generation breaks on more
            num_heads=3,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=VOCABULARY,
        )
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=CONTEXT,
            n_embd=24,
            n_layer=2,
            n_head=3,
            initializer_range=0.2,
            **ends,
        )
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
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
        model = CLASSES[KNOWN[family].kind].from_config(config(family))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and norms are drawn as well
                parameter.data += 0.1 * torch.randn_like(parameter)
            if "relative_attention_bias" in name:
                parameter.data = torch.randn_like(parameter)
    return model.eval()


@functools.cache
def _mould(family: str, dtype: torch.dtype, seed: int) -> Mould:
    """Llama's and T5's own norms work in float32 whatever they are given; torch's keeps float64."""
    model = copy.deepcopy(_prototype(family, seed)).to(dtype)
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if type(module).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
                norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
                norm.weight = module.weight
                model.set_submodule(name, norm)
    return Mould(model)


def hf_model(family: str, dtype=torch.float32, seed: int = 0) -> transformers.PreTrainedModel:
    """A fresh model of this family, the same for the same seed; float64 holds the same numbers."""
    return _mould(family, dtype, seed).cast()


def tiny(family: str, dtype=torch.float32, seed: int = 0) -> Base:
    """A fresh base of this family."""
    return Base(f"tiny-{family}", hf_model(family, dtype, seed), tokenizer(family))


@dataclass(frozen=True)
class Case:
    """One way to adapt a base, and what must hold for it: a new method is one line in `CASES`.

    `starts_equal`: at init the output is the base's. `merges`: it has a delta to merge.
    `restored`: the base's own parameters stay as they are while it is attached. `drawn`: another
    seed is another start. `plain` cases stand for their kind where a property is costly.
    """

    methods: list[Method]
    starts_equal: bool = False
    merges: bool = False
    restored: bool = True
    drawn: bool = True
    plain: bool = False
    head: Head | None = None
    families: tuple[str, ...] = field(default=FAMILIES, repr=False)

    @property
    def virtual(self) -> bool:
        """Whether it is soft prompts alone, which can be kept and swapped."""
        return bool(self.methods) and all(hasattr(m, "num_virtual_tokens") for m in self.methods)

    @property
    def anchored(self) -> bool:
        """Whether a virtual token stands inside the text."""
        places = [where for m in self.methods for _, where in getattr(m, "placement", None) or ()]
        return any(" " in where for where in places)


TEXT = {"init": "text", "init_text": "Sort:"}
AROUND = [(2, "front"), (1, f"before {ANCHOR}"), (2, f"after {ANCHOR}")]
ENCODING, BERT, BIASED = ("bert", "t5"), ("bert",), ("gpt2", "bert")
TAGS = Tagging(("O", "B", "I"))
SENSES = Classification(("bad", "good"))
FIRST_TOKEN = Classification(("bad", "good", "odd"), pool="first")

CASES = {
    "full": Case([FullFineTuning()], starts_equal=True, restored=False, drawn=False, plain=True),
    "lora": Case([LoRA(r=3, alpha=5)], starts_equal=True, merges=True, plain=True),
    "lora all": Case([LoRA(r=2, target_modules="all-linear")], starts_equal=True, merges=True),
    "lora dropout": Case([LoRA(r=4, dropout=0.5)], starts_equal=True, merges=True),
    "lora fused": Case(
        [LoRA(r=3, target_modules=["q", "k", "v"], fused=True)],
        starts_equal=True,
        merges=True,
        families=("gpt2",),
    ),
    "rslora plus": Case(
        [LoRA(r=3, alpha=2, use_rslora=True, loraplus_lr_ratio=4)], starts_equal=True, merges=True
    ),
    "dora": Case([DoRA(r=3, alpha=5)], starts_equal=True, merges=True, plain=True),
    "dora all": Case(
        [DoRA(r=2, target_modules="all-linear")],
        starts_equal=True,
        merges=True,
        families=("gpt2", "llama"),  # on the others the plain case stands for it
    ),
    "pissa": Case([PiSSA(r=3, alpha=5)], starts_equal=True, merges=True, drawn=False, plain=True),
    "pissa all": Case(
        [PiSSA(r=2, target_modules="all-linear")],
        starts_equal=True,
        merges=True,
        drawn=False,
        families=("gpt2", "llama"),
    ),
    "vera": Case([VeRA(r=7)], starts_equal=True, merges=True, drawn=False, plain=True),
    "vera all": Case(
        [VeRA(r=30, target_modules="all-linear")],
        starts_equal=True,
        merges=True,
        drawn=False,
        families=("gpt2", "llama"),
    ),
    "adalora": Case([AdaLoRA(init_r=4, target_r=2)], starts_equal=True, merges=True, plain=True),
    "qlora": Case([QLoRA(r=3, alpha=5, block_size=8)], restored=False, plain=True),
    "nf4 + lora": Case([NF4(12, False, "fp4", ["q", "up"]), LoRA(r=2)], restored=False),
    "nf4 + prefix": Case([NF4(4, quant_type="int4"), PrefixTuning(3)], restored=False),
    "prompt": Case([PromptTuning(5)], plain=True),
    "prompt random": Case([PromptTuning(1, init="random")]),
    "prompt normal": Case([PromptTuning(4, init="normal")]),
    "prompt zero": Case([PromptTuning(2, init="zero")], drawn=False),
    "prompt text": Case([PromptTuning(7, **TEXT)], drawn=False),
    "prefix": Case([PrefixTuning(5)], plain=True),
    "prefix random": Case([PrefixTuning(1, init="random")]),
    "prefix zero": Case([PrefixTuning(2, init="zero")], drawn=False),
    "prefix text": Case([PrefixTuning(7, **TEXT)], drawn=False),
    "prefix mlp": Case(
        [PrefixTuning(3, prefix_projection=True, encoder_hidden_size=5)], plain=True
    ),
    "prefix shifted": Case([PrefixTuning(4, shift_positions=True)], plain=True),
    "p lama": Case([PTuning(4)], plain=True),
    "p few-shot": Case([PTuning(2, sizes="few-shot", encoder_num_layers=1)]),
    "p peft": Case([PTuning(2, sizes="peft", encoder_hidden_size=5, encoder_num_layers=3)]),
    "p mlp": Case([PTuning(3, "mlp", init="random")]),
    "p mlp peft": Case([PTuning(3, "mlp", "peft", encoder_hidden_size=7)]),
    "p attention": Case([PTuning(3, "attention")]),
    "p around": Case([PTuning(5, "mlp", placement=AROUND)], plain=True),
    "p back": Case(
        [PTuning(4, "mlp", placement=[(3, "back"), (1, "front")])], families=ENCODING, plain=True
    ),
    "v2": Case([PTuningV2(3)]),
    "v2 depth": Case([PTuningV2(4, depth=1)], plain=True),
    "v2 mlp": Case([PTuningV2(3, depth=1, prefix_projection=True, encoder_hidden_size=4)]),
    "deep": Case([DeepPromptTuning(3)], plain=True),
    "prompt and prefix": Case([PromptAndPrefix(3, encoder_hidden_size=4)], plain=True),
    "prompt and prefix flat": Case([PromptAndPrefix(3, prefix_projection=False)]),
    "dora + prefix": Case([DoRA(r=2), PrefixTuning(3)], families=("gpt2",)),
    "lora + prompt": Case([LoRA(target_modules=["k", "down"]), PromptTuning(3)]),
    "lora + prefix": Case([LoRA(target_modules=["q", "v"]), PrefixTuning(3)], plain=True),
    "prompt + prefix": Case([PromptTuning(2), PrefixTuning(3)], plain=True),
    "houlsby": Case([HoulsbyAdapter(3)], plain=True),
    "houlsby all": Case(
        [HoulsbyAdapter(2, "tanh", 2.0, ["attention", "cross", "mlp"])], families=("t5",)
    ),
    "pfeiffer": Case([PfeifferAdapter(4)]),
    "parallel": Case([ParallelAdapter(5)], starts_equal=True),
    "parallel attention": Case(
        [ParallelAdapter(2, "silu", 0.5, ["attention"]), PfeifferAdapter(2, "gelu")]
    ),
    "ia3": Case([IA3()], starts_equal=True, merges=True, drawn=False, plain=True),
    "ia3 both": Case(
        [IA3(["q", "o", "up", "down"], ["o", "down"])],
        starts_equal=True,
        merges=True,
        drawn=False,
    ),
    "bitfit": Case(
        [BitFit()], starts_equal=True, restored=False, drawn=False, plain=True, families=BIASED
    ),
    "layer norm": Case(
        [LayerNormTuning()], starts_equal=True, restored=False, drawn=False, plain=True
    ),
    "mam": Case([PrefixTuning(3), ParallelAdapter(4)], plain=True),
    "adapter + lora": Case(
        [HoulsbyAdapter(2), LoRA(r=2, target_modules=["o", "down"]), LayerNormTuning()],
        restored=False,
    ),
    "lora + ia3": Case(
        [IA3(), LoRA(target_modules=["q", "o", "up"])], starts_equal=True, merges=True
    ),
    "ia3 + bitfit": Case(
        [IA3(), BitFit()],
        starts_equal=True,
        merges=True,
        restored=False,
        drawn=False,
        families=BIASED,
    ),
    "head adapter": Case([ParallelAdapter(3)], head=TAGS, starts_equal=True, families=BERT),
    "head bitfit": Case([BitFit()], head=SENSES, starts_equal=True, restored=False, families=BERT),
    "head layer norm": Case(
        [LayerNormTuning()], head=Spans(), starts_equal=True, restored=False, families=BERT
    ),
    "head ia3": Case([IA3()], head=Spans(), starts_equal=True, merges=True, families=BERT),
    "prune + lora": Case([Prune(0.5), LoRA(r=3)], merges=True, restored=False, plain=True),
    "prune + dense lora": Case(
        [Prune(0.4, scope="global", mask_deltas=False), LoRA(r=3, target_modules="all-linear")],
        merges=True,
        restored=False,
    ),
    "prune + full": Case([Prune(0.5), FullFineTuning()], restored=False, drawn=False),
    "smaller + lora": Case(
        [PruneStructures(heads=0.34, neurons=0.25, layers=0.34), LoRA(r=3)],
        merges=True,
        restored=False,
        plain=True,
    ),
    "smaller + full": Case(
        [PruneStructures(heads=0.34, neurons=0.25), FullFineTuning()], restored=False, drawn=False
    ),
    "head": Case([], head=TAGS, families=BERT, starts_equal=True),
    "head full": Case(
        [FullFineTuning()], head=SENSES, starts_equal=True, restored=False, families=BERT
    ),
    "head lora": Case([LoRA(r=3)], head=Spans(), starts_equal=True, merges=True, families=BERT),
    "head v2": Case([PTuningV2(4)], head=TAGS, families=BERT, plain=True),
    "head prompt": Case([PromptTuning(3)], head=SENSES, families=BERT, plain=True),
    "head p back": Case(
        [PTuning(3, "mlp", placement=[(1, "front"), (2, "back")])],
        head=FIRST_TOKEN,
        families=BERT,
        plain=True,
    ),
    "head deep": Case([DeepPromptTuning(2)], head=Spans(), families=BERT, plain=True),
}
PAIRS = [(family, name) for name, case in CASES.items() for family in case.families]
PLAIN = [(family, name) for family, name in PAIRS if CASES[name].plain]


def _kinds(name: str) -> tuple[type, ...]:
    return (*map(type, CASES[name].methods), type(CASES[name].head))


# Another setting of methods that have a plain case is an option. What it changes does not hang on
# the family, so an option is on one family, and they take turns. All else is on every family.
_PLAIN_KINDS = {_kinds(name) for _, name in PLAIN}
OPTIONS = [name for name, case in CASES.items() if not case.plain and _kinds(name) in _PLAIN_KINDS]
BY_TURNS = {
    name: c.families[turn % len(c.families)] for turn, (name, c) in enumerate(CASES.items())
}
EVERY = [(f, name) for f, name in PAIRS if name not in OPTIONS or f == BY_TURNS[name]]
ON_EVERY = pytest.mark.parametrize("family, case", EVERY)
ON_PLAIN = pytest.mark.parametrize("family, case", PLAIN)
ON_GENERATING = pytest.mark.parametrize("family, case", [p for p in PLAIN if p[0] in GENERATING])


def put(case: str, base: Base, seed: int = 0) -> Tuned:
    """This case attached to a base, as it starts."""
    return attach(base, CASES[case].methods, seed=seed, head=CASES[case].head)


def adapted(case: str, family: str, dtype=torch.float32, seed: int = 0) -> Tuned:
    """A tiny base with this case attached and every trained tensor moved away from its start."""
    return stir(put(case, tiny(family, dtype), seed), seed)


@torch.no_grad()
def stir(tuned: Tuned, seed: int = 0, size: float = 0.2) -> Tuned:
    """Add noise to every trained tensor, as training would: no factor is zero afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.trainable.values():
        parameter += size * torch.randn(parameter.shape, generator=generator)
    for site in tuned._sites:  # what a mask holds at zero stays there
        if isinstance(site, MaskedWeight):
            site.apply()
    return tuned


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them special, with the anchor somewhere in the first half of a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    where = torch.randint((length + 1) // 2, (batch,), generator=generator)
    ids[torch.arange(batch), where] = ANCHOR_ID
    return ids


def decoder_ids(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What T5's decoder reads: five tokens that follow from the row's real tokens alone."""
    mask = torch.ones_like(ids) if mask is None else mask
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        tokens = row[real].tolist()
        mixed = sum((i + 1) * token for i, token in enumerate(tokens)) % 256 + 1
        rows.append([0, tokens[0], mixed, tokens[-1], sum(tokens) % 256 + 1])
    return torch.tensor(rows, device=ids.device)


def call(model: LanguageModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Its logits; T5's decoder reads five tokens made of the row."""
    if model.kind != "encoder-decoder":
        return model(ids, mask)
    return model(ids, mask, decoder_ids(ids, mask))


def rows_of(model: LanguageModel, logits: Tensor, mask: Tensor) -> list[Tensor]:
    """The logits of each row that mean something: those of real tokens."""
    whole = model.kind == "encoder-decoder" or isinstance(model.head, Classification)
    return [row if whole else row[real] for row, real in zip(logits, mask.bool(), strict=True)]


def loss_of(
    model: LanguageModel, ids: Tensor, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """A loss that every logit of a real token takes part in, in the model's own precision."""
    mask = torch.ones_like(ids) if mask is None else mask
    logits, real = call(model, ids, mask), mask.bool()
    if model.head is not None:
        tokens = ids * mask
        if isinstance(model.head, Classification):
            labels = tokens.sum(dim=1) % model.head.classes
        elif isinstance(model.head, Tagging):
            labels = (tokens % model.head.classes).masked_fill(~real, -100)
        else:
            last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
            labels = torch.stack([mask.argmax(dim=1), last], dim=1)
            logits = logits.transpose(1, 2)
    elif model.kind == "decoder":
        labels = ids.masked_fill(~real, -100)
        labels[torch.arange(len(ids)), mask.argmax(dim=1)] = -100  # nothing predicts the first
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif model.kind == "encoder":
        labels = ids.masked_fill(~real, -100)
    else:
        labels = decoder_ids(ids, mask).roll(-1, dims=1)
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
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


def surroundings(base: Base) -> dict:
    """Everything of a base that attaching touches: equal before and after, or something stayed."""
    model = base.model
    return {
        "tensors": base.fingerprint(),
        "addresses": {name: p.data_ptr() for name, p in model.named_parameters()},
        "hooks": hook_count(model),
        "attention": [
            part.config._attn_implementation
            for part in model.modules()
            if isinstance(part, transformers.PreTrainedModel)
        ],
        "prefixes": [m for m in model.modules() if attention.PREFIX in vars(m)],
        "recorders": [m for m in model.modules() if attention.RECORDER in vars(m)],
        "trains": [name for name, p in model.named_parameters() if p.requires_grad],
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "dropout": any(module.training for module in model.modules()),
        "bare": base.anatomy.bare,
        "adapter": base.adapted_by,
    }


class Letters(Task):
    """Answer a letter with the next one: small enough to be learned in a few steps."""

    name = "letters"
    title = "The next letter"
    main = "exact"
    max_new_tokens = 2

    def score(self, model, examples=None, batch_size=64):
        if model.kind != "encoder":
            return super().score(model, examples, batch_size)
        examples = self.test if examples is None else examples
        batch = {k: t.to(model.device) for k, t in self._cloze(examples, model.tokenizer).items()}
        with torch.no_grad(), model._evaluating():
            logits, labels = model.aligned(batch)
        best = logits.argmax(dim=-1)[labels != -100]
        return self.grade(examples, [model.tokenizer.decode([token]) for token in best])

    def grade(self, examples, outputs):
        right = [
            output == example.target for example, output in zip(examples, outputs, strict=True)
        ]
        return {"exact": sum(right) / len(right)}


def letters() -> Letters:
    """Eleven examples to train on, three and three to look at."""
    examples = [Example(f"{chr(97 + i)}>", chr(98 + i)) for i in range(17)]
    return Letters(train=examples[:11], dev=examples[11:14], test=examples[14:])
