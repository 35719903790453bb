"""The shape of a transformer as pure numbers: enough to count every parameter without weights.

    >>> Shape.named("gpt2").matrices("q")
    [(12, 768, 768)]
    >>> Shape.named("gpt2").parameters()
    124439808

The linear maps have logical names, the same in every family: `q k v o` in attention, `up` and
`down` in the MLP, and `gate` where the MLP is gated. Their storage does not matter here (GPT-2
fuses q, k and v into one matrix).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peftlab.bases.data import data_path

ATTENTION = ("q", "k", "v", "o")
MLP = ("up", "down")
GATED_MLP = ("up", "down", "gate")
ENCODERS = ("bert", "roberta", "distilbert")
RMS_NORMED = ("llama", "qwen2", "t5")
FUSING, FUSED = ("gpt2", "gpt_neox"), ("q", "k", "v")


@dataclass(frozen=True)
class Shape:
    """The numbers that fix the size of every tensor in a model.

    `layers` counts the blocks of a model with one stack, or of T5's encoder; `decoder_layers`
    counts those of T5's decoder and is 0 elsewhere. `biased` lists the linear maps with a bias.
    `positions`, `segments` and `buckets` count the rows of the learned position, segment and
    relative-position tables; they are 0 if a family has none.

    `head` is the module on the last hidden state: "lm", "masked_lm", "pooler" or "none". From a
    config alone, decoders and T5 have "lm", BERT and RoBERTa "pooler", DistilBERT "none".
    `activation` is transformers' name for the nonlinearity of the MLP.
    """

    name: str
    family: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab: int
    context: int
    gated: bool = False
    tied: bool = True
    biased: tuple[str, ...] = ()
    decoder_layers: int = 0
    positions: int = 0
    segments: int = 0
    buckets: int = 0
    head: str = "lm"
    activation: str = "gelu"

    @classmethod
    def named(cls, name: str) -> "Shape":
        """The shape of one of the models in `names()`."""
        return cls.from_config(named_config(name), name)

    @classmethod
    def from_config(cls, config: Any, name: str | None = None) -> "Shape":
        """Read a transformers config, or a dict with the same fields."""
        fields = config if isinstance(config, Mapping) else config.to_dict()
        family = fields.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
        name = name or fields.get("_name_or_path") or family
        return cls(name=name, family=family, vocab=fields["vocab_size"], **FAMILIES[family](fields))

    def without_head(self) -> "Shape":
        """The shape of the same model without its head."""
        return replace(self, head="none")

    @property
    def kind(self) -> str:
        """ "decoder", "encoder" or "encoder-decoder"."""
        if self.decoder_layers:
            return "encoder-decoder"
        return "encoder" if self.family in ENCODERS else "decoder"

    @property
    def targets(self) -> tuple[str, ...]:
        """The linear maps that an adapter can reach."""
        return ATTENTION + (GATED_MLP if self.gated else MLP)

    @property
    def fused(self) -> tuple[str, ...]:
        """The targets that this family stores in one matrix."""
        return FUSED if self.family in FUSING else ()

    @property
    def blocks(self) -> int:
        """The number of transformer blocks in all stacks."""
        return self.layers + self.decoder_layers

    @property
    def attentions(self) -> int:
        """The number of attention sublayers: one a block, two (self and cross) in T5's decoder."""
        return self.layers + 2 * self.decoder_layers

    def sublayers(self, kind: str) -> int:
        """The number of sublayers of a kind: "attention" (self), "cross" (T5's second) or "mlp"."""
        counts = {"attention": self.blocks, "mlp": self.blocks}
        if self.decoder_layers:
            counts["cross"] = self.decoder_layers
        if kind not in counts:
            raise ValueError(f"{self.name} has no sublayer {kind!r}; it has: {', '.join(counts)}")
        return counts[kind]

    @property
    def norms(self) -> int:
        """The number of norms: one for each sublayer and each stack, one in a masked-LM head."""
        stacks = 2 if self.decoder_layers else 1
        return self.attentions + self.blocks + stacks + (self.head == "masked_lm")

    @property
    def norm_size(self) -> int:
        """Parameters of one norm: LayerNorm has a scale and a shift, RMSNorm only a scale."""
        return (1 if self.family in RMS_NORMED else 2) * self.d_model

    @property
    def biases(self) -> int:
        """Numbers in all biases: those of linear maps, LayerNorms and the head."""
        maps = sum(n * d_out for t in self.biased for n, _, d_out in self.matrices(t))
        norms = self.norms * (self.norm_size - self.d_model)
        # A masked-LM head's decoder has two biases, which are usually tied.
        decoder = self.vocab * (1 if self.tied or self.family == "distilbert" else 2)
        head = {"pooler": self.d_model, "masked_lm": self.d_model + decoder}
        return maps + norms + head.get(self.head, 0)

    @property
    def d_kv(self) -> int:
        """Width of all keys of one token; with grouped heads it is smaller than the queries'."""
        return self.kv_heads * self.head_dim

    def matrices(self, target: str) -> list[tuple[int, int, int]]:
        """`(copies, d_in, d_out)` of a logical target, over the whole model."""
        if target not in self.targets:
            known = ", ".join(self.targets)
            raise ValueError(f"{self.name} has no target {target!r}; it has: {known}")
        d, inner = self.d_model, self.heads * self.head_dim
        copies = self.attentions if target in ATTENTION else self.blocks
        attention = {"q": (d, inner), "k": (d, self.d_kv), "v": (d, self.d_kv), "o": (inner, d)}
        mlp = {"up": (d, self.d_ff), "gate": (d, self.d_ff), "down": (self.d_ff, d)}
        return [(copies, *(attention | mlp)[target])]

    def modules(self, targets: tuple[str, ...]) -> list[tuple[int, int, str]]:
        """`(copies, weights, target)` of the whole modules that hold these targets; GPT-2 has one
        module for q, k and v."""
        found = []
        if set(self.fused) & set(targets):
            parts = [matrix for target in self.fused for matrix in self.matrices(target)]
            size = sum(d_in * d_out for _, d_in, d_out in parts)
            found.append((parts[0][0], size, self.fused[0]))
        alone = [target for target in targets if target not in self.fused]
        return found + [(n, d_in * d_out, t) for t in alone for n, d_in, d_out in self.matrices(t)]

    def parameters(self) -> int:
        """All parameters of the plain model: tables, linear maps, norms and the head.

        The classes counted from a config are GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM,
        GPTNeoXForCausalLM, BertModel and RobertaModel (with their poolers), DistilBertModel and
        T5ForConditionalGeneration.
        """
        d = self.d_model
        maps = sum(n * d_in * d_out for t in self.targets for n, d_in, d_out in self.matrices(t))
        tables = (self.vocab + self.positions + self.segments) * d
        tables += 2 * self.buckets * self.heads  # relative positions: a table in each stack of T5
        scales, untied = self.norms * d, 0 if self.tied else self.vocab * d
        head = {"lm": untied, "pooler": d * d, "masked_lm": d * d + untied}  # a dense layer first
        return tables + maps + scales + head.get(self.head, 0) + self.biases


def _sizes(c: Mapping, layers: str, d_model: str, heads: str, d_ff: str, context: str) -> dict:
    """The sizes in the fields of these names; every head has its own keys and values."""
    d, n = c[d_model], c[heads]
    attention = dict(d_model=d, heads=n, kv_heads=n, head_dim=d // n)
    return attention | dict(layers=c[layers], d_ff=c[d_ff], context=c[context])


HIDDEN = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
NAMES = (*HIDDEN, "max_position_embeddings")  # the fields of most families


def _gpt2(c: Mapping) -> dict:
    c = {**c, "n_inner": c.get("n_inner") or 4 * c["n_embd"]}
    return _sizes(c, "n_layer", "n_embd", "n_head", "n_inner", "n_positions") | dict(
        positions=c["n_positions"],
        tied=c.get("tie_word_embeddings", True),
        biased=ATTENTION + MLP,
        activation=c.get("activation_function", "gelu_new"),
    )


def _llama(c: Mapping) -> dict:
    sizes = _sizes(c, *NAMES)
    biased = ATTENTION if c.get("attention_bias") else ()
    return sizes | dict(
        kv_heads=c.get("num_key_value_heads") or sizes["heads"],
        head_dim=c.get("head_dim") or sizes["head_dim"],
        gated=True,
        tied=c.get("tie_word_embeddings", False),
        biased=biased + (GATED_MLP if c.get("mlp_bias") else ()),
        activation=c.get("hidden_act", "silu"),
    )


def _qwen2(c: Mapping) -> dict:
    return _llama(c) | dict(biased=("q", "k", "v"))  # always: the config has no option for it


def _gpt_neox(c: Mapping) -> dict:
    return _sizes(c, *NAMES) | dict(
        tied=c.get("tie_word_embeddings", False),
        biased=(ATTENTION if c.get("attention_bias", True) else ()) + MLP,
        activation=c.get("hidden_act", "gelu"),
    )


def _bert(c: Mapping) -> dict:
    return _sizes(c, *NAMES) | dict(
        positions=c["max_position_embeddings"],
        segments=c.get("type_vocab_size", 2),
        tied=c.get("tie_word_embeddings", True),
        biased=ATTENTION + MLP,
        activation=c.get("hidden_act", "gelu"),
        head="pooler",
    )


def _roberta(c: Mapping) -> dict:
    padding = c.get("pad_token_id", 1)  # positions start after it: 512 of 514 rows are used
    return _bert(c) | dict(context=c["max_position_embeddings"] - padding - 1)


def _distilbert(c: Mapping) -> dict:
    names = ("n_layers", "dim", "n_heads", "hidden_dim", "max_position_embeddings")
    return _sizes(c, *names) | dict(
        positions=c["max_position_embeddings"],
        tied=c.get("tie_word_embeddings", True),
        biased=ATTENTION + MLP,
        activation=c.get("activation", "gelu"),
        head="none",
    )


def _t5(c: Mapping) -> dict:
    act = c.get("feed_forward_proj", "relu").removeprefix("gated-")
    gated = c.get("feed_forward_proj", "relu").startswith("gated-")
    return dict(
        layers=c["num_layers"],
        decoder_layers=c.get("num_decoder_layers") or c["num_layers"],
        d_model=c["d_model"],
        heads=c["num_heads"],
        kv_heads=c["num_heads"],
        head_dim=c["d_kv"],
        d_ff=c["d_ff"],
        context=c.get("n_positions") or 512,  # trained on 512; relative positions set no limit
        gated=gated,
        activation="gelu_new" if gated and act == "gelu" else act,
        tied=c.get("tie_word_embeddings", True),
        buckets=c.get("relative_attention_num_buckets", 32),
    )


FAMILIES = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
    "gpt_neox": _gpt_neox,
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "t5": _t5,
}


def _files() -> dict:
    """name -> config file: published models in `data/configs`, our own in `data/bases`."""
    bases = {path.parent.name: path for path in data_path("bases").glob("*/config.json")}
    return bases | {path.stem: path for path in data_path("configs").glob("*.json")}


def names() -> list[str]:
    """The names of all models whose shape is known."""
    return sorted(_files())


def named_config(name: str) -> dict:
    """The config of one of the models in `names()`, as transformers writes it."""
    path = _files().get(name)
    if path is None:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(names())}")
    return json.loads(path.read_text(encoding="utf-8"))


def as_shape(model: Any) -> Shape:
    """A `Shape` from a name, a shape, a config, or anything with an anatomy (a base, a tuned)."""
    if isinstance(model, Shape):
        return model
    if isinstance(model, str):
        return Shape.named(model)
    if hasattr(model, "anatomy"):
        return model.anatomy.shape
    return Shape.from_config(model)
