"""The same adapter twice: ours, and Hugging Face PEFT's with our numbers copied in.

Every tensor that PEFT trains holds our numbers in another arrangement. `Part.read` says which: it
takes a tensor of PEFT's and gives ours, by moving entries and nothing else, so that its transpose
carries our numbers (and our gradients) back. What it does not read is not compared.

LoRA. PEFT adapts GPT-2's `c_attn` as one matrix. Our separate deltas on some of q, k and v, n of
rank r, are one of its deltas of rank n·r: the factors A stacked, the factors B on the diagonal of
a block matrix, alpha n times as large so that alpha / r stays.

(IA)³ and norms. Factor by factor the same; GPT-2's fused matrix is compared where ours scales all
of it, for what ours does not scale has no zero but a one in PEFT.

Prompts and P-tuning. PEFT drops position_ids and counts positions through the padding, so there
ours is called with those positions given. On T5 its prompt is asked for the encoder alone, as
`num_transformer_submodules=1`.

Prefixes. PEFT's reaches what a cache reaches, `CachePrefix` here: every attention of a decoder or
an encoder alone, and of T5 the decoder's attention to itself. Its table is as wide as the keys.
Under grouped heads that is less than ours, d_model, and the columns beyond are zero here. On T5
its layer l reads the prefix of layer 2 l mod L, of L in all: see test_peft_differs.py.

Text. Where PEFT's `generate` writes other tokens behind a prompt or a prefix than its own logits
say (not `GENERATES`: see test_peft_differs.py), the tokens are those of its logits.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import models
import peft
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import T5ForConditionalGeneration

from peftlab import (
    IA3,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Tuned,
    attach,
)
from peftlab.bases import Base

GENERATES = Version(transformers.__version__) < Version("5.24")

TASKS = {
    "decoder": "CAUSAL_LM",
    "encoder": "FEATURE_EXTRACTION",  # passes on whatever it is given, a masked-LM head included
    "encoder-decoder": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class CachePrefix(PrefixTuning, listed=False):
    """Prefix tuning where a cache can bring it, with the positions that a cache gives."""

    shift_positions: bool = True
    name = "cache_prefix"

    def reaches(self, site, layers):
        return site.stack != "encoder" and not site.cross

    def sublayers(self, shape):
        return shape.decoder_layers or shape.layers


@dataclass
class Part:
    """One tensor that PEFT trains, and our tensors as they stand in it."""

    name: str
    parameter: nn.Parameter
    read: Callable[[Tensor], dict[str, Tensor]]

    def carry(self, ours: dict[str, Tensor]) -> Tensor:
        """Our numbers where PEFT has them, zeros elsewhere: the transpose of `read`."""
        start = torch.zeros_like(self.parameter, requires_grad=True)
        with torch.enable_grad():
            made = self.read(start)
        return torch.autograd.grad(
            list(made.values()), start, [ours[name] for name in made], retain_graph=True
        )[0]

    @property
    def where(self) -> Tensor:
        """The entries that ours has as well."""
        with torch.no_grad():
            ones = {k: torch.ones_like(t) for k, t in self.read(self.parameter.detach()).items()}
        return self.carry(ones) != 0


@dataclass
class Twins:
    """Our adapted base, PEFT's model, and how the tensors of the two correspond."""

    ours: Tuned
    theirs: peft.PeftModel
    parts: list[Part]

    def logits(self, ids, mask=None):
        """Both logits, of the real tokens, or of what T5's decoder reads."""
        mask = torch.ones_like(ids) if mask is None else mask
        config, given = self.theirs.active_peft_config, {}
        prompt = isinstance(config, peft.PromptTuningConfig | peft.PromptEncoderConfig)
        if self.ours.kind == "encoder-decoder":
            given["decoder_input_ids"] = models.decoder_ids(ids, mask)
        elif prompt:
            given["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
        else:
            given["position_ids"] = self.ours.anatomy.positions(mask)
        ours = self.ours.model(ids, attention_mask=mask, **given).logits
        if prompt:
            given.pop("position_ids", None)
        theirs = self.theirs(input_ids=ids, attention_mask=mask, **given).logits
        return ours, theirs[:, -ours.shape[1] :]  # PEFT's have the virtual tokens' before them

    def tensors(self):
        """(name, ours, theirs) of every trained tensor: the values that both have."""
        now = {name: parameter.detach() for name, parameter in self.ours.trainable.items()}
        for part in self.parts:
            yield part.name, part.carry(now)[part.where], part.parameter.detach()[part.where]

    def gradients(self):
        """(name, ours, theirs) of every trained tensor: the gradients."""
        now = {name: parameter.grad for name, parameter in self.ours.trainable.items()}
        for part in self.parts:
            yield part.name, part.carry(now)[part.where], part.parameter.grad[part.where]


@torch.no_grad()
def twins(base, model, method, stir) -> Twins:
    """`model` is a second copy of the base's weights, for PEFT to change in place."""
    ours = stir(attach(base, method))
    make = {
        LoRA: _lora,
        IA3: _ia3,
        LayerNormTuning: _norms,
        PromptTuning: _prompt,
        PTuning: _p_tuning,
        CachePrefix: _prefix,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out
        theirs, parts = make[type(method)](ours, model, method)
    values = {name: parameter.detach().clone() for name, parameter in ours.trainable.items()}
    for part in parts:  # there and back: ours then has zeros where PEFT has nothing
        part.parameter.copy_(part.carry(values))
        for name, tensor in part.read(part.parameter).items():
            values.pop(name)
            ours.trainable[name].copy_(tensor)
            values[name] = tensor
    read = {name for part in parts for name in part.read(part.parameter)}
    assert read == ours.trainable.keys()
    trained = {id(p) for p in theirs.parameters() if p.requires_grad}
    assert trained == {id(part.parameter) for part in parts}
    return Twins(ours, theirs.eval(), parts)


def _wrap(ours, model, config):
    config.task_type = TASKS[ours.kind]
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    return theirs.to(ours.anatomy.embedding.weight.dtype)


def _same(prefix: str, pairs: dict[str, nn.Parameter]) -> list[Part]:
    """Tensors that are ours as they are."""

    def named(name):
        return lambda tensor: {f"{prefix}.{name}": tensor}

    return [Part(name, parameter, named(name)) for name, parameter in pairs.items()]


def _prompt(ours, model, method):
    config = peft.PromptTuningConfig(
        num_virtual_tokens=method.num_virtual_tokens, num_transformer_submodules=1
    )
    theirs = _wrap(ours, model, config)
    table = theirs.prompt_encoder["default"].embedding.weight
    return theirs, _same("prompt_tuning", {"prompt": table})


def _p_tuning(ours, model, method):
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=method.num_virtual_tokens,
        num_transformer_submodules=1,
        encoder_reparameterization_type=method.encoder.upper(),
        encoder_hidden_size=method.encoder_hidden_size,
        encoder_num_layers=method.encoder_num_layers,
    )
    theirs = _wrap(ours, model, config)
    names = {"embedding.weight": "table"}
    pairs = {}
    for name, parameter in theirs.prompt_encoder["default"].named_parameters():
        name = names.get(name, name).replace("lstm_head", "mix").replace("mlp_head", "mlp")
        pairs[name] = parameter
    return theirs, _same("p_tuning.encoder", pairs)


def _prefix(ours, model, method):
    P, hidden = method.num_virtual_tokens, method.encoder_hidden_size
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=P,
        prefix_projection=method.prefix_projection,
        encoder_hidden_size=hidden,
    )
    theirs = _wrap(ours, model, config)
    encoder = theirs.prompt_encoder["default"]
    layers, heads, _, size = ours.prefix[0].shape
    order = torch.arange(layers)
    if ours.kind == "encoder-decoder":
        order = 2 * order % layers

    def sublayers(tensor, *rest):
        """(…, layers · 2 · heads · size) as keys and values: 2 layers heads size, then the rest."""
        made = tensor.view(layers, 2, heads, size, *rest)[order]
        return made.transpose(0, 1)

    if not method.prefix_projection:

        def flat(tensor):
            P_k, P_v = sublayers(tensor.T, P).transpose(3, 4)
            return {"cache_prefix.P_k": P_k, "cache_prefix.P_v": P_v}

        return theirs, [Part("embedding", encoder.embedding.weight, flat)]
    wide = ours.anatomy.shape.d_model - encoder.embedding.weight.shape[1]
    first, last = encoder.transform[0], encoder.transform[2]
    start = "cache_prefix.encoder"
    reads = {
        "table": (encoder.embedding.weight, lambda t: pad(t, (0, wide))),
        "mlp.0.weight": (first.weight, lambda t: pad(t, (0, wide))),
        "mlp.0.bias": (first.bias, lambda t: t),
        "mlp.2.weight": (last.weight, lambda t: sublayers(t, hidden).reshape(-1, hidden)),
        "mlp.2.bias": (last.bias, lambda t: sublayers(t).flatten()),
    }

    def named(name, read):
        return lambda tensor: {f"{start}.{name}": read(tensor)}

    return theirs, [Part(name, p, named(name, read)) for name, (p, read) in reads.items()]


def _ia3(ours, model, method):
    places = defaultdict(list)  # module's name -> the scaled weights in it
    names = {module: name for name, module in ours.model.named_modules()}
    for name in ours.modules:
        places[names[ours.anatomy.linears[name].module]].append(name)
    inner = [m for m, (first, *_) in places.items() if first.endswith("down")]
    config = peft.IA3Config(target_modules=list(places), feedforward_modules=inner)
    theirs = _wrap(ours, model, config)
    parts = []
    for module, scaled in places.items():

        def read(tensor, scaled=scaled, inner=module in inner):
            whole = tensor.flatten()
            where = {n: slice(None) if inner else ours.anatomy.linears[n].index for n in scaled}
            return {f"ia3.{name}.l": whole[index] for name, index in where.items()}

        layer = theirs.base_model.model.get_submodule(module)
        parts.append(Part(f"{module}.l", layer.ia3_l["default"], read))
    return theirs, parts


def _norms(ours, model, method):
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in ours.trainable))
    theirs = _wrap(ours, model, peft.LNTuningConfig(target_modules=modules))
    parts = []
    for module in modules:
        norm = theirs.base_model.model.get_submodule(module).ln_tuning_layers["default"]
        parts += _same(module, dict(norm.named_parameters()))
    return theirs, parts


def _lora(ours, model, method):
    places = defaultdict(list)  # module's name -> the deltas on it
    names = {module: name for name, module in ours.model.named_modules()}
    for name in ours.deltas:
        places[names[ours.anatomy.linears[name].module]].append(name)
    ranks = {module: method.r * len(deltas) for module, deltas in places.items()}
    config = peft.LoraConfig(
        target_modules=list(places),
        rank_pattern=ranks,
        alpha_pattern={m: method.alpha * len(deltas) for m, deltas in places.items()},
        fan_in_fan_out=ours.anatomy.family == "gpt2",
    )
    theirs = _wrap(ours, model, config)
    parts = []
    for module, deltas in places.items():
        layer = theirs.base_model.model.get_submodule(module)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.shape[0] == B.shape[1] == ranks[module]

        def read_A(tensor, deltas=deltas):
            return {
                f"lora.{name}.A": tensor[i * method.r : (i + 1) * method.r]
                for i, name in enumerate(deltas)
            }

        def read_B(tensor, deltas=deltas):
            return {
                f"lora.{name}.B": tensor[ours.anatomy.linears[name].index][
                    :, i * method.r : (i + 1) * method.r
                ]
                for i, name in enumerate(deltas)
            }

        parts += [Part(f"{module}.A", A, read_A), Part(f"{module}.B", B, read_B)]
    return theirs, parts


def fitting_t5(dtype, **sizes) -> tuple[Base, T5ForConditionalGeneration]:
    """A T5 on which PEFT's prefix tuning runs, twice: heads as wide as d_model / heads, and as
    many layers in one stack as in the other. `sizes` may say otherwise."""
    config = models.config("t5")
    for name, value in {"d_kv": 8, "num_layers": 3, "num_decoder_layers": 3, **sizes}.items():
        setattr(config, name, value)
    made = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = T5ForConditionalGeneration(config).eval()
        model.to(dtype)
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "T5LayerNorm":  # its own works in float32 whatever it gets
                norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
                norm.weight = module.weight
                model.set_submodule(name, norm)
        made.append(model)
    return Base("fitting-t5", made[0], models.tokenizer("t5")), made[1]


def greedy(model: nn.Module, given: dict[str, Tensor], steps: int, eos: int | None) -> Tensor:
    """The tokens that PEFT's model writes behind one prompt, the prompt's (the decoder's) in front:
    by `generate`, or one after another from the logits of all so far. (1, T + at most `steps`)"""
    if GENERATES:
        options = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
        return model.generate(**given, **options, eos_token_id=eos)
    key = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    for _ in range(steps):
        with torch.no_grad():
            token = model(**given).logits[:, -1:].argmax(dim=-1)
        given = given | {key: torch.cat([given[key], token], dim=1)}
        if key == "input_ids":
            given["attention_mask"] = torch.ones_like(given[key])
        if token.item() == eos:
            break
    return given[key]
