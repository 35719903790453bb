"""An adapter that Hugging Face PEFT wrote: its method among ours, and its tensors in our names.

PEFT may adapt only some layers, or give each module its own rank and alpha. Here a method has one
setting for all its targets: a smaller rank is padded with rows that B does not read, a module that
was left out gets a delta of zero, and if scales differ, B carries the difference. PEFT has one
delta for a module that is q, k and v at once: so has our LoRA (`fused`); in the other methods each
part gets a copy of the shared factor.

Every size is checked against the base before anything is attached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlab.bases import TARGETS, Base, LanguageModel, Linear
from peftlab.methods import (
    IA3,
    AdaLoRA,
    DoRA,
    LayerNormTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    VeRA,
)
from peftlab.tuned.layouts.patterns import matches
from peftlab.tuned.layouts.write import (
    ADALORA_EPSILON,
    WHERE,
    Layout,
    check_size,
    no_prefix,
    whole_number,
)

Fill = Callable[[LanguageModel], dict[str, Tensor]]  # returns the state for an attached method
# Options that do not change the function, or that the tensors show.
ASIDE = (
    "peft_type task_type base_model_name_or_path inference_mode auto_mapping peft_version revision "
    "target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out "
    "feedforward_modules init_ia3_weights init_weights megatron_core qalora_group_size eva_config "
    "runtime_config merge_weights ensure_weight_tying megatron_config velora_config corda_config "
    "lora_ga_config loftq_config"
).split()
ASIDE += "lora_dtype lorap_lr_ratio lorap_emb_lr loraplus_lr_ratio".split()  # trainers' own notes
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # they keep the base's weights
CONVERTED = ("pissa", "corda", "olora", "lora_ga")  # starts that PEFT can convert


@dataclass
class Module:
    """The tensors of an adapter for one module, by short names, and our linear weights in it."""

    name: str
    linears: list[Linear]
    tensors: dict[str, Tensor]
    keys: dict[str, str]

    @property
    def d_in(self) -> int:
        return self.linears[0].d_in

    @property
    def d_out(self) -> int:
        return sum(linear.d_out for linear in self.linears)

    def check(self, **sizes: tuple[int, ...]) -> None:
        """Raise ValueError unless the tensors have these sizes."""
        for short, size in sizes.items():
            check_size(self.keys[short], self.tensors[short], size)


def read(base: Base, config: dict, tensors: dict[str, Tensor]) -> tuple[Method, Fill]:
    """The method, and a function that returns its tensors once it is attached.

    Raises ValueError for a PEFT type or an option that no method here has, and for tensors that
    do not fit the base.
    """
    kind = config["peft_type"]
    if kind not in READERS:
        raise ValueError(f"peft_type {kind!r} is not read: known are {', '.join(READERS)}")
    reader, options = READERS[kind]
    if config.get("modules_to_save"):
        raise ValueError(
            f"modules_to_save={config['modules_to_save']!r}: a head or another whole module that "
            "was trained beside the adapter is not read"
        )
    if config.get("bias") not in (None, "none"):
        raise ValueError(f"bias={config['bias']!r}: biases trained beside the adapter are not read")
    if (start := config.get("init_lora_weights")) not in STARTS:
        advice = (
            "load it in PEFT on its base, call merge_and_unload(), save that model with its "
            "tokenizer and give its folder to peftlab.load"
        )
        if str(start).startswith(CONVERTED):
            advice = (
                "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a "
                "LoRA for the base"
            )
        raise ValueError(
            f"init_lora_weights={start!r} starts by changing the base's weights: {advice}"
        )
    known = {*ASIDE, *options.split(), "modules_to_save", "bias", "init_lora_weights"}
    for key, value in config.items():
        if value and key not in known:
            raise ValueError(f"{key}={value!r} of {kind}: no method here does that")
    try:
        return reader(base, config, tensors)
    except ValueError as error:
        made_for = config.get("base_model_name_or_path")
        more = f" (it was made for {made_for!r})" if made_for and made_for != base.name else ""
        raise ValueError(f"PEFT's adapter cannot go on {base.name}{more}: {error}") from error


def _value(config: dict, key: str, kind: type, found=None):
    """A number in the configuration. Raises ValueError if it is not a valid number."""
    value = config[key] if found is None else found
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
        raise ValueError(f"{key}={value!r}: a {'whole ' if kind is int else ''}number is needed")
    if kind is int and value < 1:
        raise ValueError(f"{key}={value}: allowed is at least 1")
    return value


def _pattern(config: dict, patterns: str, key: str, kind: type, module: str):
    """The value of the first pattern that matches this module, or the value for all modules."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            found = matches(pattern, module)
        except ValueError as error:
            raise ValueError(f"{patterns} has {pattern!r:.60}: {error}") from None
        if found:
            return _value(config, patterns, kind, value)
    return _value(config, key, kind)


def _modules(base: Base, tensors: dict[str, Tensor], endings: dict[str, str]) -> list[Module]:
    """The tensors by module; `endings` gives the short name of each kind.

    Names match with and without the backbone's own name, because PEFT may have had the model
    without its head or with another head. Raises ValueError for an unknown tensor or module, and
    if one of the kinds is missing.
    """
    names = {module: name for name, module in base.model.named_modules()}
    backbone, linears = f"{base.model.base_model_prefix}.", {}
    for linear in base.anatomy.linears.values():
        name = names[linear.module].removeprefix(backbone)
        linears.setdefault(name, []).append(linear)
    found: dict[str, Module] = {}
    for key, tensor in tensors.items():
        ending = next((e for e in endings if key.endswith(f".{e}")), None)
        if ending is None:
            raise ValueError(f"{key} is no tensor that is read")
        name = key.removesuffix(f".{ending}").removeprefix(WHERE)
        there = linears.get(name.removeprefix(backbone))
        if there is None:
            raise ValueError(f"{name!r} is no linear weight of {base.name} that a method reaches")
        module = found.setdefault(name, Module(name, there, {}, {}))
        module.tensors[endings[ending]], module.keys[endings[ending]] = tensor, key
    for module in found.values():
        for ending, short in endings.items():
            if short not in module.tensors:
                raise ValueError(f"{WHERE}{module.name}.{ending} is missing")
    if not found:
        raise ValueError("there is no tensor in it")
    return list(found.values())


def _targets(modules: list[Module]) -> tuple[str, ...]:
    roles = {linear.target for module in modules for linear in module.linears}
    return tuple(target for target in TARGETS if target in roles)


def _places(tuned: LanguageModel, modules: list[Module]):
    """Every site with the tensors of its module, or with None if the adapter has none."""
    of = {module.linears[0].module: module for module in modules}
    return [(site, of.get(site.linear.module)) for site in tuned.attachments[-1].sites]


def _lora(base: Base, config: dict, tensors: dict[str, Tensor]) -> tuple[Method, Fill]:
    dora, rslora = bool(config.get("use_dora")), bool(config.get("use_rslora"))
    endings = {"lora_A.weight": "A", "lora_B.weight": "B"}
    modules = _modules(base, tensors, endings | ({"lora_magnitude_vector": "m"} if dora else {}))
    ranks, alphas, scales = {}, {}, {}
    for module in modules:
        ranks[module.name] = r = _pattern(config, "rank_pattern", "r", int, module.name)
        alpha = _pattern(config, "alpha_pattern", "lora_alpha", float, module.name)
        sizes = {"A": (r, module.d_in), "B": (module.d_out, r), "m": (module.d_out,)}
        module.check(**{short: sizes[short] for short in module.tensors})
        alphas[module.name] = alpha
        scales[module.name] = alpha / (math.sqrt(r) if rslora else r)
    r, scale = max(ranks.values()), next((s for s in scales.values() if s), 0.0)
    same = len(set(ranks.values())) == len(set(alphas.values())) == 1
    alpha = alphas[modules[0].name] if same and not (dora and rslora) else scale * r
    given = dict(
        r=r,
        alpha=whole_number(alpha),
        target_modules=_targets(modules),
        dropout=config.get("lora_dropout") or 0.0,
    )
    fuses = any(len(module.linears) > 1 for module in modules)
    method = DoRA(**given) if dora else LoRA(**given, use_rslora=rslora and same, fused=fuses)

    def fill(tuned: LanguageModel) -> dict[str, Tensor]:
        state = tuned.state()
        for site, module in _places(tuned, modules):
            name = f"{method.name}.{site.name}"
            state[f"{name}.B"].zero_()
            if dora and module is None:
                state[f"{name}.m"].copy_(site.frozen().norm(dim=1))
            if module is None:
                continue
            rank, rows = ranks[module.name], site.linear.index
            state[f"{name}.A"][:rank] = module.tensors["A"]
            more = 1.0 if scales[module.name] == scale else scales[module.name] / scale
            state[f"{name}.B"][:, :rank] = module.tensors["B"][rows] * more
            if dora:
                state[f"{name}.m"].copy_(module.tensors["m"][rows])
        return state

    return method, fill


def _adalora(base: Base, config: dict, tensors: dict[str, Tensor]) -> tuple[Method, Fill]:
    modules = _modules(base, tensors, {"lora_A": "Q", "lora_B": "P", "lora_E": "L"})
    init_r, alpha = _value(config, "init_r", int), _value(config, "lora_alpha", float)
    for module in modules:
        r = min(init_r, len(module.tensors["L"]))  # PEFT leaves out triplets that are off
        module.check(Q=(r, module.d_in), P=(module.d_out, r), L=(r, 1))
    method = AdaLoRA(
        init_r=init_r,
        target_r=min(_value(config, "target_r", int), init_r),
        alpha=(alpha if alpha > 0 else init_r) / (init_r + ADALORA_EPSILON) * init_r,
        target_modules=_targets(modules),
        dropout=config.get("lora_dropout") or 0.0,
    )

    def fill(tuned: LanguageModel) -> dict[str, Tensor]:
        state = tuned.state()
        for site, module in _places(tuned, modules):
            name = f"adalora.{site.name}"
            state[f"{name}.L"].zero_()
            if module is not None:
                r = len(module.tensors["L"])
                state[f"{name}.L"][:r] = module.tensors["L"][:, 0]
                state[f"{name}.Q"][:r] = module.tensors["Q"]
                state[f"{name}.P"][:, :r] = module.tensors["P"][site.linear.index]
        return state

    return method, fill


def _vera(base: Base, config: dict, tensors: dict[str, Tensor]) -> tuple[Method, Fill]:
    own = {k: t for k, t in tensors.items() if k not in ("base_model.vera_A", "base_model.vera_B")}
    modules = _modules(base, own, {"vera_lambda_d": "d", "vera_lambda_b": "b"})
    r = _value(config, "r", int)
    for module in modules:
        module.check(d=(r,), b=(module.d_out,))
        if len(module.linears) > 1:
            raise ValueError(
                f"{module.name} is {', '.join(x.target for x in module.linears)} at once, and "
                "VeRA's projections are as high as all of it there: here each has its own rows"
            )
    method = VeRA(
        r=r,
        target_modules=_targets(modules),
        projection_prng_key=config.get("projection_prng_key", 0),
        d_initial=config.get("d_initial", 0.1),
        dropout=config.get("vera_dropout") or 0.0,
    )

    def fill(tuned: LanguageModel) -> dict[str, Tensor]:
        shared, state = tuned.modules["vera.projections"], tuned.state()
        for short, drawn in (("A", shared.A), ("B", shared.B)):
            stored = tensors.get(f"base_model.vera_{short}")
            if stored is not None and not torch.equal(stored, drawn.cpu().to(stored.dtype)):
                raise ValueError(
                    f"base_model.vera_{short} is not what projection_prng_key="
                    f"{method.projection_prng_key} draws for these targets"
                )
        for site, module in _places(tuned, modules):
            state[f"vera.{site.name}.b"].zero_()
            if module is not None:
                for short, tensor in module.tensors.items():
                    state[f"vera.{site.name}.{short}"].copy_(tensor)
        return state

    return method, fill


def _ia3(base: Base, config: dict, tensors: dict[str, Tensor]) -> tuple[Method, Fill]:
    modules = _modules(base, tensors, {"ia3_l": "l"})
    inner: dict[str, bool] = {}  # whether a target's input is scaled
    for module in modules:
        of_input = module.tensors["l"].shape[:1] == (1,)
        module.check(l=(1, module.d_in) if of_input else (module.d_out, 1))
        for linear in module.linears:
            if inner.setdefault(linear.target, of_input) != of_input:
                raise ValueError(f"{linear.target!r} is scaled before and after, layer by layer")
    targets = _targets(modules)
    method = IA3(targets, tuple(target for target in targets if inner[target]))

    def fill(tuned: LanguageModel) -> dict[str, Tensor]:
        state = tuned.state()
        for site, module in _places(tuned, modules):
            factors = state[f"ia3.{site.linear.name}.l"].fill_(1)
            if module is not None:
                whole = module.tensors["l"].flatten()
                factors.copy_(whole if site.of_input else whole[site.linear.index])
        return state

    return method, fill


def _norms(base: Base, config: dict, tensors: dict[str, Tensor]) -> tuple[Method, Fill]:
    backbone, mark = f"{base.model.base_model_prefix}.", "ln_tuning_layers."

    def plain(name: str) -> str:
        return name.removeprefix(WHERE).removeprefix(backbone)

    named = {plain(key.replace(mark, "")): (key, tensor) for key, tensor in tensors.items()}
    norms = {
        plain(f"{where}.{name}"): tuple(parameter.shape)
        for where, module in base.model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters()
    }
    for name, (key, tensor) in named.items():
        if name not in norms or mark not in key:
            raise ValueError(f"{key} is no part of a norm of {base.name}")
        check_size(key, tensor, norms[name])
    if not named:
        raise ValueError("there is no tensor in it")

    def fill(tuned: LanguageModel) -> dict[str, Tensor]:
        state = tuned.state()
        return state | {n: named[plain(n)][1] for n in state if plain(n) in named}

    return LayerNormTuning(), fill


def _table(config: dict, tensors: dict[str, Tensor]) -> tuple[int, Tensor]:
    """The number of virtual tokens, and their table."""
    if tensors.keys() != {"prompt_embeddings"}:
        wrong = sorted(tensors.keys() ^ {"prompt_embeddings"})[0]
        there = "is no tensor that is read" if wrong in tensors else "is missing"
        raise ValueError(f"{wrong} {there}")
    return _value(config, "num_virtual_tokens", int), tensors["prompt_embeddings"]


def _prompt(base: Base, config: dict, tensors: dict[str, Tensor]) -> tuple[Method, Fill]:
    P, table = _table(config, tensors)
    # PEFT may store a second table for a decoder, but never reads it.
    copies = 2 if base.kind == "encoder-decoder" and len(table) == 2 * P else 1
    check_size("prompt_embeddings", table, (copies * P, base.anatomy.shape.d_model))
    if config["peft_type"] == "P_TUNING":
        method = PTuning(P, encoder="embedding", init="zero")
    else:
        method = PromptTuning(P, init="zero")
    return method, lambda tuned: {f"{method.name}.prompt": table[:P].clone()}


def _prefix(base: Base, config: dict, tensors: dict[str, Tensor]) -> tuple[Method, Fill]:
    P, table = _table(config, tensors)
    if reason := no_prefix(base):
        raise ValueError(reason)
    sites = base.anatomy.attentions
    wide = 2 * sum(site.kv_heads * site.head_dim for site in sites)
    check_size("prompt_embeddings", table, (P, wide))
    method = PrefixTuning(P, init="zero", shift_positions=True)
    return method, lambda tuned: Layout.of(tuned).parts[0].read(table)


LORA = "r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern"
ADALORA = "init_r target_r beta1 beta2 deltaT tinit tfinal orth_reg_weight total_step"
SOFT = "num_virtual_tokens token_dim num_layers num_attention_heads num_transformer_submodules "
READERS: dict[str, tuple[Callable, str]] = {
    "LORA": (_lora, LORA),
    "ADALORA": (_adalora, f"{ADALORA} r lora_alpha lora_dropout rank_pattern"),
    "VERA": (_vera, "r projection_prng_key save_projection d_initial vera_dropout"),
    "IA3": (_ia3, ""),
    "LN_TUNING": (_norms, ""),
    "PROMPT_TUNING": (
        _prompt,
        f"{SOFT} prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path "
        "tokenizer_kwargs",
    ),
    "P_TUNING": (
        _prompt,
        f"{SOFT} encoder_reparameterization_type encoder_hidden_size encoder_num_layers "
        "encoder_dropout",
    ),
    "PREFIX_TUNING": (_prefix, f"{SOFT} prefix_projection encoder_hidden_size"),
}
