"""What can be found in an adapter without training it: its places, its sizes, its faults.

print(examine(tuned))                      # attached
print(examine("adapters/mine", base))      # a folder, ours or PEFT's
print(examine(get_peft_model(...)))        # a Hugging Face model with PEFT's modules
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from peftlab.bases import Base
from peftlab.bases.files import is_finite
from peftlab.sites import Source
from peftlab.tuned.stored import Place, of_folder
from peftlab.tuned.tuned import Tuned

HEADS = ("classifier", "score", "qa_outputs")  # what transformers puts on a model for a new task
LOW, HIGH = 0.25, 16  # the usual alpha / r is 1 or 2
LAYER = re.compile(r"^(.*?\.)?\d+(?=\.|$)")  # "base_model.model.h.3" of "base_model.model.h.3.mlp"


@dataclass(frozen=True)
class Finding:
    """Something that looks like a fault: what is seen, where, and what to do."""

    symptom: str
    place: str
    cure: str

    def __str__(self) -> str:
        return f"{self.symptom}\n    where: {self.place}\n    do:    {self.cure}"


@dataclass(frozen=True, repr=False)
class Examination:
    """What an adapter is made of, and what looks wrong with it.

    `reach` maps a kind of place ("q", "c_attn") to how many the adapter acts on and how many of
    that kind there are (0: not known). `table` has a row for each place: kind, layer, numbers,
    rank, scale (alpha / r), norm of the update ‖ΔW‖, its share ‖ΔW‖ / ‖W‖ where W is known, and
    top, the share of the largest direction in ‖ΔW‖². Numbers that do not apply are NaN.
    """

    what: str
    reach: dict[str, tuple[int, int]]
    table: pd.DataFrame
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        acts = ", ".join(
            f"{kind} {n} of {of}" if of else f"{kind} {n}" for kind, (n, of) in self.reach.items()
        )
        numbers = int(self.table["numbers"].sum()) if len(self.table) else 0
        lines = [self.what, f"acts on {acts or 'nothing'}; {numbers:,} numbers"]
        for name, words in {"scale": "alpha / r", "share": "|ΔW| / |W|"}.items():
            known = self.table[name].dropna() if len(self.table) else []
            if len(known):
                lines.append(f"{words} from {known.min():.2g} to {known.max():.2g}")
        lines += [str(finding) for finding in self.findings] or ["nothing found"]
        return "\n".join(lines)

    __repr__ = __str__


@dataclass
class Patient:
    """What all three kinds of adapters come down to before they are judged."""

    what: str
    places: list[Place]
    kinds: Counter = field(default_factory=Counter)  # how many of each kind the model has
    layers: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)


def examine(what: Tuned | str | Path | nn.Module, base: Base | None = None) -> Examination:
    """Look at an adapter without running or training it.

    `what` is an attached `Tuned`, the folder of an adapter (ours or PEFT's; `base` adds the norms
    of its weights), or a Hugging Face model with PEFT's modules inside. Raises FileNotFoundError
    and ValueError for a folder without a readable adapter, and RuntimeError after detach().
    """
    with torch.no_grad():
        if isinstance(what, Tuned):
            patient = _of_tuned(what)
        elif isinstance(what, nn.Module):
            patient = _of_model(what)
        else:
            title, places, more = of_folder(Path(what), base)
            whole = base is not None and "prune_structures" not in title  # which takes layers out
            model = base.model if whole else nn.Module()
            patient = Patient(title, places, *_kinds(n for n, _ in model.named_modules()))
            patient.findings += [Finding(*each) for each in more]
        rows = [place.row() for place in patient.places]
        found = patient.findings + list(_judge(patient, rows))
    hit = Counter(row["kind"] for row in rows)
    reach = {kind: (count, patient.kinds[kind]) for kind, count in hit.items()}
    return Examination(patient.what, reach, pd.DataFrame(rows), tuple(found))


def _kinds(names: Iterable[str]) -> tuple[Counter, set[str]]:
    """How many modules have each last name, and the layers they are in."""
    names = list(names)
    layers = {match[0] for name in names if (match := LAYER.match(name))}
    return Counter(name.rpartition(".")[2] for name in names), layers


def _of_tuned(tuned: Tuned) -> Patient:
    tuned._check_attached()
    places = [p for each in tuned.attachments for site in each.sites for p in _of_site(site, each)]
    if tuned.linear is not None:
        places.append(Place("head", dict(tuned.linear.named_parameters())))
    anatomy = tuned.anatomy
    names = [*anatomy.linears, *(sublayer.name for sublayer in anatomy.sublayers)]
    return Patient(f"{tuned.label} on {tuned.name}", places, *_kinds(names))


def _of_site(site, attachment) -> Iterator[Place]:
    """The places of one site: deltas, factors, small modules, the model's own parameters."""
    if site.delta is not None:
        delta, rank = site.delta, None
        own = dict(delta.named_parameters())
        if "A" in own and "m" not in own:  # DoRA's magnitudes make its ΔW one of full rank
            rank = len(own["A"]) + len(getattr(delta, "A0", ()))
        scale = getattr(delta, "scale", None)
        yield Place(site.name, own, delta.delta_weight(), site.frozen(), scale, rank)
    elif site.in_the_weight and site.parameters:
        for (name, now), before in zip(site.parameters.items(), site.held(), strict=True):
            yield Place(name, {name: now}, now - before.to(now.device), before, own=True)
    elif isinstance(site, Source):
        yield Place(site.name, dict(site.now()))
    elif site.name in attachment.modules:
        own = dict(attachment.modules[site.name].named_parameters())
        yield Place.of_tensors(site.name, own)


def _of_model(model: nn.Module) -> Patient:
    """PEFT's modules are known by what they offer: the package itself is not asked."""
    places, off, saved = [], [], set()
    for name, module in model.named_modules():
        if hasattr(type(module), "get_base_layer"):
            for adapter in module.active_adapters:
                own = {
                    key: part[adapter]
                    for key in module.adapter_layer_names
                    if adapter in (part := getattr(module, key))
                }
                own = {k: getattr(t, "weight", t) for k, t in own.items()}
                scale = dict(getattr(module, "scaling", {})).get(adapter)
                if "lora_E" in own:  # AdaLoRA divides its alpha in the forward pass
                    scale /= len(own["lora_E"])
                delta = hasattr(module, "get_delta_weight")
                update = module.get_delta_weight(adapter) if delta else None
                weight = getattr(module.get_base_layer(), "weight", None)
                rank = module.r.get(adapter) if isinstance(getattr(module, "r", None), dict) else 0
                made = Place(name, own, update, weight, scale, rank or None)
                places.append(made if delta else Place.of_tensors(name, own, weight))
            off += [name] * bool(module.disable_adapters)
        if hasattr(module, "modules_to_save"):
            saved |= {f"{name}.{key}" for key, _ in module.named_parameters()}
    for adapter, encoder in dict(getattr(model, "prompt_encoder", {})).items():
        places.append(Place(f"prompt_encoder.{adapter}", dict(encoder.named_parameters())))
    names = [name for name, _ in model.named_modules() if ".base_layer" not in name]
    patient = Patient(f"PEFT in {type(model).__name__}", places, *_kinds(names))
    if off:
        patient.findings.append(
            Finding("the adapter is switched off: the model answers as its base", f"{len(off)} "
                    "places", "leave disable_adapter(), or call set_adapter(name)")
        )  # fmt: skip
    known = {id(t) for place in places for t in place.tensors.values()}
    for name, p in model.named_parameters():
        inside = id(p) in known or name in saved or "token_adapter" in name
        if p.requires_grad and not inside:
            patient.findings.append(
                Finding("it trains, and the adapter's folder will not have it", name, "for new "
                        "tokens give trainable_token_indices, for a head modules_to_save")
            )  # fmt: skip
        if p.requires_grad and p.dtype == torch.float16:
            patient.findings.append(
                Finding("it trains in float16, whose small steps are rounded to nothing", name,
                        "keep what trains in float32, beside a base in 16 bits")
            )  # fmt: skip
        if not p.requires_grad and set(name.split(".")) & set(HEADS) and name not in saved:
            patient.findings.append(
                Finding("a new head that is frozen, and not saved", name, "give task_type="
                        '"SEQ_CLS" or "TOKEN_CLS", or name it in modules_to_save')
            )  # fmt: skip
    return patient


def _judge(patient: Patient, rows: list[dict]) -> Iterator[Finding]:
    """What can be said of the places together, then of each."""
    places = patient.places
    if not places:
        yield Finding("no adapter: nothing acts", patient.what, "compare target_modules with the "
                      "names in model.named_modules()")  # fmt: skip
        return
    within = {m[0] for place in places if place.in_layer and (m := LAYER.match(place.name))}
    if within and patient.layers and len(within) <= len(patient.layers) / 2:
        share = len(within) / len(patient.layers)
        yield Finding(
            f"it acts in {len(within)} of {len(patient.layers)} layers ({share:.0%})",
            ", ".join(sorted(within)[:3]),
            "compare target_modules and layers_to_transform with the names of the model",
        )
    for place in places:
        if bad := [key for key, tensor in place.tensors.items() if not is_finite(tensor)]:
            yield Finding("numbers that are not finite", f"{place.name}: {bad[0]}", "go back to an "
                          "earlier checkpoint; train in float32, with a lower rate")  # fmt: skip
    sized = [row for row in rows if row["norm"] == row["norm"] and not row["own"]]
    still = [row["place"] for row in sized if row["norm"] == 0]
    off = [row["place"] for row in rows if row["scale"] == 0]
    if off:
        yield Finding("the scale is 0", _some(off), "set alpha above 0")
    elif sized and len(still) == len(sized):
        yield Finding("every update is zero: it computes what the base computes", _some(still),
                      "look whether it was trained, got gradients, and was loaded")  # fmt: skip
    elif still:
        yield Finding("the update is zero here, and not elsewhere", _some(still), "look for "
                      "missing keys of the file, and at the gradients of these places")  # fmt: skip
    for row in rows:
        dead = row["used"] < row["rank"] and row["norm"] > 0
        if dead:
            yield Finding(f"{row['used']:.0f} of {row['rank']:.0f} directions are used",
                          row["place"], "look for rows of zeros in A and B")  # fmt: skip
        if row["share"] > 1 and not row["own"]:
            yield Finding(f"the update is {row['share']:.1f} times as large as the weight",
                          row["place"], "lower the learning rate or alpha")  # fmt: skip
    odd = [row for row in rows if 0 < row["scale"] < LOW or row["scale"] > HIGH]
    if odd:
        how = "small" if odd[0]["scale"] < LOW else "large"
        yield Finding(f"alpha / r = {odd[0]['scale']:.3g} is {how}: the usual is 1 or 2",
                      _some([row["place"] for row in odd]), "set alpha when you set r, or use "
                      "rsLoRA")  # fmt: skip


def _some(names: list[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
