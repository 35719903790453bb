"""Where Hugging Face PEFT keeps the tensors of an adapter, and the places of our tensors in them.

PEFT writes two files, a configuration and tensors. `Layout.of` gives both for the methods on a
base, and raises `Unknown` if PEFT has no such method, or a different one of that name. One
description serves both ways: a `Part` is one tensor of PEFT's with the places of our tensors in
it, so that reading reverses writing and moves every bit unchanged.

LoRA and its family. PEFT adapts a module, and GPT-2 has q, k and v in one. n deltas of rank r on
its rows are one of rank n r: the factors A stacked, the factors B on the diagonal of a block
matrix, and alpha n times as large, so that alpha / r stays the same (√n times with rsLoRA).

    ΔW = s [B_q 0; 0 0; 0 B_v] [A_q; A_v]

In DoRA the rows that are not ours get the norms of W as their magnitudes, which leave these rows
unchanged. PiSSA, s (B A − B₀ A₀), is a LoRA of rank 2 r on the original base, [B, −B₀] [A; A₀].
PEFT's AdaLoRA divides alpha by its rank + 10⁻⁵, so a larger alpha is written to make up for it.
PEFT draws VeRA's random factors as we do; only if they have to be blocks are they written.

Prompts and prefixes. One table: P (P, d_model), or for each virtual token the key and the value of
every layer. PEFT passes a prefix as a cache, and the text's positions begin after it. With rotary
positions only the distance counts: a prefix without that shift equals one with it if the keys are
rotated by the same number of positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from peftlab.bases import LanguageModel, Linear
from peftlab.bases.caches import cache_name
from peftlab.bases.files import FLOATS, is_finite
from peftlab.methods import (
    IA3,
    NF4,
    AdaLoRA,
    Attachment,
    DoRA,
    LayerNormTuning,
    LoRA,
    Method,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    QLoRA,
    VeRA,
)
from peftlab.sites import LinearWeight

WHERE = "base_model.model."  # PEFT's prefix to a module's name
TASKS = {"decoder": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION", "encoder-decoder": "SEQ_2_SEQ_LM"}
KNOWN = (
    "LoRA (rsLoRA, QLoRA's factors), DoRA, PiSSA, AdaLoRA, VeRA, (IA)³, LayerNorm tuning, "
    "prompt tuning, P-tuning, prefix tuning, P-tuning v2"
)
# Options that may differ if another library rewrote the file: they do not change the function.
FREE = {"base_model_name_or_path", "task_type", "inference_mode", "target_modules"}
FREE |= {"feedforward_modules", "total_step"}
ADALORA_EPSILON = 1e-5  # PEFT adds it to the rank


CODES = "base_weights_in_codes"  # key in PEFT's configuration: how the base was held


class Unknown(ValueError):
    """PEFT has no layout for this."""


def check_size(
    name: str, tensor: Tensor, size: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Raise ValueError unless the tensor has this size and type; any float stands for another."""
    if tuple(tensor.shape) != tuple(size):
        raise ValueError(f"{name} is {tuple(tensor.shape)}; {tuple(size)} is needed")
    if tensor.dtype != dtype and not {tensor.dtype, dtype} <= set(FLOATS):
        raise ValueError(f"{name} holds {tensor.dtype}; {dtype} is needed")


def check_shapes(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise ValueError unless these are the wanted tensors, by name, size and kind of number, and
    every number is finite."""
    if missing := wanted.keys() ^ tensors.keys():
        raise ValueError(f"the adapter's tensors do not match: {sorted(missing)[0]}")
    for name, tensor in tensors.items():
        check_size(name, tensor, wanted[name].shape, wanted[name].dtype)
        if not is_finite(tensor):
            raise ValueError(f"{name} has numbers that are not finite")


@dataclass
class Part:
    """One tensor of PEFT's, and the places of ours in it; everywhere else it equals `rest`.

    `see` returns a view of it, `pieces` the index of each of ours in it, `negative` those negated.
    """

    key: str
    rest: Tensor
    pieces: dict[str, tuple] = field(default_factory=dict)
    see: Callable[[Tensor], Tensor] = lambda tensor: tensor
    negative: frozenset[str] = frozenset()

    def write(self, ours: dict[str, Tensor]) -> Tensor:
        """PEFT's tensor, made from ours."""
        made = self.rest.clone()
        for name, index in self.pieces.items():
            made = made.to(ours[name].dtype)
            self.see(made)[index] = -ours[name] if name in self.negative else ours[name]
        return made

    def read(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our tensors, read from PEFT's."""
        seen = self.see(theirs)
        found = {name: seen[index].clone() for name, index in self.pieces.items()}
        return {name: -t if name in self.negative else t for name, t in found.items()}


@dataclass
class Layout:
    """PEFT's two files. `method` gives the meaning of the tensors, and `whole` says whether they
    are exactly what was stored, bit for bit."""

    config: dict
    parts: list[Part]
    method: Method
    state: dict[str, Tensor]
    whole: bool = True

    @staticmethod
    def of(tuned: LanguageModel) -> Layout:
        """The layout of the attached method. Raises `Unknown` if PEFT has none."""
        if tuned.head is not None:
            raise Unknown(
                "PEFT's layout of a head is not written: the adapter stands with its head"
            )
        trained = [each for each in tuned.attachments if not isinstance(each.method, NF4)]
        if len(trained) != 1:
            raise Unknown(f"PEFT's layout holds one method, not {tuned.label}")
        attachment, method = trained[0], trained[0].method
        if type(method) not in WRITERS:
            raise Unknown(f"PEFT does not know {method.title}: it knows {KNOWN}")
        layout = WRITERS[type(method)](tuned, method.folded(), attachment)
        layout.config = {
            "peft_type": layout.config.pop("peft_type"),
            "task_type": TASKS[tuned.kind],
            "base_model_name_or_path": tuned.name,
            "inference_mode": True,
            **layout.config,
        }
        if codes := [each.method.codes for each in tuned.attachments if each.method.codes]:
            described = json.loads(json.dumps(codes[0].to_dict()))  # as it will be read again
            layout.config[CODES] = described  # PEFT ignores it and says so
        return layout

    @property
    def tensors(self) -> dict[str, Tensor]:
        """PEFT's tensors by its names, on the CPU."""
        return {part.key: part.write(self.state).contiguous() for part in self.parts}

    def read(self, config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors, from files that this layout wrote.

        Raises ValueError if this layout would write them differently: then another library has
        changed them, and its changes may have no place here.
        """
        check_shapes(tensors, {part.key: part.rest for part in self.parts})
        changed = [k for k, v in self.config.items() if k not in FREE and config.get(k) != v]
        state: dict[str, Tensor] = {}
        for part in self.parts:
            theirs, found = tensors[part.key], part.read(tensors[part.key])
            # Another machine may sum a norm of W in another order; a zero stays a zero.
            again = part.write(found).to(theirs.dtype)
            if not torch.allclose(again, theirs, rtol=1e-5, atol=0):
                changed.append(part.key)
            state |= found
        if changed:
            raise ValueError(
                f"{changed[0]} is not as peftlab wrote it: another library changed the adapter. "
                "Without peftlab.json it is read as PEFT's alone"
            )
        return state


# Writing ---------------------------------------------------------------------------------------


def _names(tuned: LanguageModel) -> dict[nn.Module, str]:
    return {module: name for name, module in tuned.model.named_modules()}


def shortest(wanted: list[str], every: list[str]) -> list[str]:
    """The shortest endings of names that select exactly these modules among all."""
    ends, those = set(), set(wanted)
    for name in wanted:
        words = name.split(".")
        for count in range(1, len(words) + 1):
            end = ".".join(words[-count:])
            if all(n in those for n in every if n == end or n.endswith(f".{end}")):
                break
        ends.add(end)
    return sorted(ends)


def whole_number(value: int | float) -> int | float:
    """The value as an int if it is whole, as alpha is in most files."""
    return int(value) if float(value).is_integer() else value


def _modules(tuned: LanguageModel, sites: list) -> dict[str, list]:
    """The sites on linear weights, grouped by the name of their module."""
    names, found = _names(tuned), {}
    for site in sites:
        found.setdefault(names[site.linear.module], []).append(site)
    return found


def _stored_otherwise(tuned: LanguageModel) -> bool:
    """Whether the family stores weights with d_in first, as GPT-2 does."""
    return any(linear.transposed for linear in tuned.anatomy.linears.values())


def _rows(linear: Linear) -> int:
    """The number of rows of the whole module."""
    return linear.module.weight.shape[1 if linear.transposed else 0]


def _targets(tuned: LanguageModel, modules: dict[str, list]) -> dict:
    return {
        "target_modules": shortest(list(modules), list(_names(tuned).values())),
        "fan_in_fan_out": _stored_otherwise(tuned),
    }


def _linear_sites(attachment: Attachment) -> list[LinearWeight]:
    return [site for site in attachment.sites if isinstance(site, LinearWeight)]


def _low_rank(tuned: LanguageModel, method: Method, attachment: Attachment) -> Layout:
    """LoRA, QLoRA, DoRA and PiSSA: factors, and magnitudes."""
    sites, state = _linear_sites(attachment), tuned.state()
    modules, parts, ranks = _modules(tuned, sites), [], {}
    factors = [("A", "B"), ("A0", "B0")] if isinstance(method, PiSSA) else [("A", "B")]
    for module, deltas in modules.items():
        first, r = deltas[0].linear, method.r
        ranks[module] = rank = r * len(deltas) * len(factors)
        blank = state[f"{method.name}.{deltas[0].name}.A"].new_zeros
        A = Part(f"{WHERE}{module}.lora_A.weight", blank(rank, first.d_in))
        B = Part(f"{WHERE}{module}.lora_B.weight", blank(_rows(first), rank))
        start = 0
        for site in deltas:
            for a, b in factors:
                block = slice(start, start := start + r)
                A.pieces[f"{method.name}.{site.name}.{a}"] = (block,)
                B.pieces[f"{method.name}.{site.name}.{b}"] = (site.linear.index, block)
        B.negative = frozenset(name for name in B.pieces if name.endswith(".B0"))
        parts += [A, B]
        if isinstance(method, DoRA):
            parts.append(_magnitudes(tuned, module, deltas))
    rslora = getattr(method, "use_rslora", False)
    least = min(ranks.values())  # the rank of the modules that are not fused
    alphas = {
        module: whole_number(
            method.alpha * (math.sqrt(rank / method.r) if rslora else rank / method.r)
        )
        for module, rank in ranks.items()
    }
    usual = next(module for module, rank in ranks.items() if rank == least)
    other = [module for module, rank in ranks.items() if rank != least]
    ends = shortest(other, list(_names(tuned).values()))
    of = {end: next(m for m in other if m == end or m.endswith(f".{end}")) for end in ends}
    config = {
        "peft_type": "LORA",
        "r": least,
        "lora_alpha": alphas[usual],
        "lora_dropout": getattr(method, "dropout", 0.0),
        "use_rslora": rslora,
        "use_dora": isinstance(method, DoRA),
        "bias": "none",
        "rank_pattern": {end: ranks[module] for end, module in of.items()},
        "alpha_pattern": {end: alphas[module] for end, module in of.items()},
        **_targets(tuned, modules),
    }
    return Layout(config, parts, method, state)


@torch.no_grad()
def _magnitudes(tuned: LanguageModel, module: str, deltas: list[LinearWeight]) -> Part:
    """DoRA's m: ours in our rows, and the norms of W in the others, which leave them unchanged."""
    inside, names = deltas[0].linear.module, [f"dora.{site.name}.m" for site in deltas]
    norms = tuned.trainable[names[0]].new_empty(_rows(deltas[0].linear), device="cpu")
    for linear in tuned.anatomy.linears.values():
        if linear.module is inside:
            norms[linear.index] = linear.weight.to(norms.dtype).norm(dim=1).cpu()
    pieces = {name: (site.linear.index,) for name, site in zip(names, deltas, strict=True)}
    return Part(f"{WHERE}{module}.lora_magnitude_vector", norms, pieces)


def _adalora(tuned: LanguageModel, method: Method, attachment: Attachment) -> Layout:
    """P Λ Q. PEFT has one rank for all modules: triplets that are off pad a smaller rank."""
    sites, state, parts = _linear_sites(attachment), tuned.state(), []
    if method.alpha == 0:
        raise Unknown("alpha=0: PEFT takes AdaLoRA's alpha for its rank then")
    modules = _modules(tuned, sites)
    rank = method.init_r * max(map(len, modules.values()))
    for module, deltas in modules.items():
        first = deltas[0].linear
        blank = state[f"adalora.{deltas[0].name}.L"].new_zeros
        Q = Part(f"{WHERE}{module}.lora_A", blank(rank, first.d_in))
        P = Part(f"{WHERE}{module}.lora_B", blank(_rows(first), rank))
        E = Part(f"{WHERE}{module}.lora_E", blank(rank, 1))
        for i, site in enumerate(deltas):
            block = slice(i * method.init_r, (i + 1) * method.init_r)
            Q.pieces[f"adalora.{site.name}.Q"] = (block,)
            P.pieces[f"adalora.{site.name}.P"] = (site.linear.index, block)
            E.pieces[f"adalora.{site.name}.L"] = (block, 0)
        parts += [Q, P, E]
    config = {
        "peft_type": "ADALORA",
        "init_r": rank,
        "target_r": method.target_r,
        "lora_alpha": method.alpha / method.init_r * (rank + ADALORA_EPSILON),
        "lora_dropout": method.dropout,
        "bias": "none",
        "total_step": 1,  # PEFT requires a number of steps even if it trains no step
        **_targets(tuned, modules),
    }
    return Layout(config, parts, method, state)


def _vera(tuned: LanguageModel, method: Method, attachment: Attachment) -> Layout:
    """The vectors d and b, and the projections if they have to be blocks."""
    sites, state, parts = _linear_sites(attachment), tuned.state(), []
    modules = _modules(tuned, sites)
    shared = attachment.modules["vera.projections"]
    A, B, r = shared.A.cpu(), shared.B.cpu(), method.r
    # One block for each part of a fused module, and one for all whole modules.
    kinds = ["" if site.linear.whole else site.linear.target for site in sites]
    blocks = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    starts = {s.name: r * blocks[kind] for s, kind in zip(sites, kinds, strict=True)}
    fused, rank = set(blocks) != {""}, r * len(blocks)
    for module, deltas in modules.items():
        blank = state[f"vera.{deltas[0].name}.d"].new_zeros
        d = Part(f"{WHERE}{module}.vera_lambda_d", blank(rank))
        b = Part(f"{WHERE}{module}.vera_lambda_b", blank(_rows(deltas[0].linear)))
        for site in deltas:
            d.pieces[f"vera.{site.name}.d"] = (slice(starts[site.name], starts[site.name] + r),)
            b.pieces[f"vera.{site.name}.b"] = (site.linear.index,)
        parts += [b, d]
    if fused:
        whole_B = B.new_zeros(max(_rows(site.linear) for site in sites), rank)
        for site in sites:
            block = slice(starts[site.name], starts[site.name] + r)
            whole_B[site.linear.index, block] = B[: site.linear.d_out]
        parts.append(Part("base_model.vera_A", A.repeat(len(blocks), 1)))
        parts.append(Part("base_model.vera_B", whole_B))
    config = {
        "peft_type": "VERA",
        "r": rank,
        "projection_prng_key": method.projection_prng_key,
        "save_projection": fused,
        "d_initial": method.d_initial,
        "vera_dropout": method.dropout,
        "bias": "none",
        **_targets(tuned, modules),
    }
    return Layout(config, parts, method, state, whole=not fused)


def _ia3(tuned: LanguageModel, method: Method, attachment: Attachment) -> Layout:
    """l, as a column if it scales the output, and as a row if it scales the input."""
    modules, state, parts, inner = _modules(tuned, attachment.sites), tuned.state(), [], []
    for module, scales in modules.items():
        ones = state[f"ia3.{scales[0].linear.name}.l"].new_ones
        if scales[0].of_input:
            inner.append(module)
            part = Part(f"{WHERE}{module}.ia3_l", ones(1, scales[0].linear.d_in))
            part.pieces[f"ia3.{scales[0].linear.name}.l"] = (0,)
        else:
            part = Part(f"{WHERE}{module}.ia3_l", ones(_rows(scales[0].linear), 1))
            for site in scales:
                part.pieces[f"ia3.{site.linear.name}.l"] = (site.linear.index, 0)
        parts.append(part)
    every = list(_names(tuned).values())
    config = {"peft_type": "IA3", "feedforward_modules": shortest(inner, every)}
    return Layout(config | _targets(tuned, modules), parts, method, state)


def _norms(tuned: LanguageModel, method: Method, attachment: Attachment) -> Layout:
    """Every norm's own parameters."""
    state, parts = tuned.state(), []
    modules = dict.fromkeys(name.rpartition(".")[0] for name in attachment.trainable)
    for name in attachment.trainable:
        module, _, parameter = name.rpartition(".")
        key = f"{WHERE}{module}.ln_tuning_layers.{parameter}"
        parts.append(Part(key, torch.zeros_like(state[name]), {name: (...,)}))
    every = list(_names(tuned).values())
    config = {"peft_type": "LN_TUNING", "target_modules": shortest(list(modules), every)}
    return Layout(config, parts, method, state)


def _soft(tuned: LanguageModel, method: Method, token_dim: int, heads: int) -> dict:
    shape = tuned.anatomy.shape
    return {
        "num_virtual_tokens": method.num_virtual_tokens,
        "token_dim": token_dim,
        "num_layers": shape.layers,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }


def _prompt(tuned: LanguageModel, method: Method, attachment: Attachment) -> Layout:
    """P. A prompt that a network made is stored like any other."""
    if any(where != "front" for _, where in getattr(method, "placement", None) or ()):
        raise Unknown("PEFT puts all virtual tokens in front; here some stand elsewhere")
    state, shape, name = tuned.state(), tuned.anatomy.shape, f"{method.name}.prompt"
    part = Part("prompt_embeddings", torch.zeros_like(state[name]), {name: (...,)})
    config = {"peft_type": "PROMPT_TUNING", **_soft(tuned, method, shape.d_model, shape.heads)}
    return Layout(config, [part], method, state)


def no_prefix(model: LanguageModel) -> str:
    """The reason why PEFT's prefix differs from ours on this model; "" if it does not."""
    if "sliding_attention" in (getattr(model.model.config, "layer_types", None) or ()):
        return "PEFT's prefix leaves the window of sliding layers, and here every token reads it"
    if model.kind == "encoder-decoder":
        return "PEFT's prefix is in the decoder's attention to itself alone, and here in all three"
    if not cache_name(model.anatomy.backbone):
        return f"PEFT passes a prefix as a cache, and {model.anatomy.family} takes none"
    return ""


def _prefix(tuned: LanguageModel, method: Method, attachment: Attachment) -> Layout:
    """P_k and P_v: for each virtual token, layer by layer, its key and then its value."""
    family, shape, state = tuned.anatomy.family, tuned.anatomy.shape, tuned.state()
    names = f"{method.name}.P_k", f"{method.name}.P_v"
    if reason := no_prefix(tuned):
        raise Unknown(reason)
    if len(state[names[0]]) < shape.layers:
        raise Unknown("PEFT puts a prefix into every layer; here it is in the upper ones alone")
    whole = method.shift_positions
    if not whole:
        if family not in ("llama", "qwen2"):
            raise Unknown(
                "PEFT's positions begin behind the prefix, and here at 0: train it with "
                "shift_positions=True"
            )
        state[names[0]] = turned(tuned, state[names[0]], method.num_virtual_tokens)
        method = replace(method, shift_positions=True)
    layers, heads, P, size = state[names[0]].shape

    def see(tensor: Tensor) -> Tensor:
        """(P, layers · 2 · heads · size) as (2, layers, heads, P, size)."""
        return tensor.view(P, layers, 2, heads, size).permute(2, 1, 3, 0, 4)

    blank = state[names[0]].new_zeros(P, layers * 2 * heads * size)
    part = Part("prompt_embeddings", blank, {names[0]: (0,), names[1]: (1,)}, see)
    config = {
        "peft_type": "PREFIX_TUNING",
        **_soft(tuned, method, heads * size, heads),
        "prefix_projection": False,
        "encoder_hidden_size": heads * size,
    }
    return Layout(config, [part], method, state, whole)


def turned(tuned: LanguageModel, keys: Tensor, positions: int) -> Tensor:
    """The keys as a rotary model rotates them if they come `positions` positions later.

    R(t)ᵀ k = R(t + p)ᵀ R(p) k      the same product with a query that stands p later
    """
    rotary = tuned.anatomy.backbone.rotary_emb
    if getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
        raise Unknown(
            f"{tuned.name} turns its keys by angles that depend on the length: train the prefix "
            "with shift_positions=True"
        )
    angle = positions * rotary.inv_freq.double().cpu()
    cos, sin = torch.cat([angle, angle]).cos(), torch.cat([angle, angle]).sin()
    first, second = keys.double().chunk(2, dim=-1)
    return (keys * cos + torch.cat([-second, first], dim=-1) * sin).to(keys.dtype)


WRITERS: dict[type[Method], Callable] = {
    LoRA: _low_rank,
    QLoRA: _low_rank,
    DoRA: _low_rank,
    PiSSA: _low_rank,
    AdaLoRA: _adalora,
    VeRA: _vera,
    IA3: _ia3,
    LayerNormTuning: _norms,
    PromptTuning: _prompt,
    PTuning: _prompt,
    PrefixTuning: _prefix,
    PTuningV2: _prefix,
}
