"""The places of an adapter, with what is stored at each; those of a folder without attaching it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from peftlab.bases import Base
from peftlab.bases.files import is_finite, read_json
from peftlab.tuned.layouts.patterns import matches
from peftlab.tuned.layouts.write import WHERE
from peftlab.tuned.saving import CONFIG, RECORD, WEIGHTS, _check_there, shape_facts

# What goes out of a narrow middle, and what leads into it: PEFT's names and ours.
FACTORS = (("lora_B.weight", "lora_A.weight"), ("lora_B", "lora_A"), ("B", "A"), ("W_up", "W_down"))
FACTOR = ("ia3_l", "l")  # a factor on an activation: 1 changes nothing
ENDINGS = {end for pair in FACTORS for end in pair} | {"ia3_l"}
ENDINGS |= {"lora_magnitude_vector", "lora_E", "vera_lambda_b", "vera_lambda_d"}
SMALL = 1e-6  # of the largest singular value


@dataclass(frozen=True)
class Place:
    """One place that an adapter acts on.

    `update` is ΔW, the product of two factors, or how far factors are from 1; None where nothing
    of that kind is stored. `weight` is W, `scale` alpha / r, and `own` says that it is the model's
    own parameter.
    """

    name: str
    tensors: dict[str, Tensor]
    update: Tensor | None = None
    weight: Tensor | None = None
    scale: int | float | None = None
    rank: int | None = None
    own: bool = False

    @classmethod
    def of_tensors(
        cls,
        name: str,
        tensors: dict[str, Tensor],
        weight: Tensor | None = None,
        scale: int | float | None = None,
    ) -> Place:
        """A place known by its tensors alone; `weight` counts if it has ΔW's shape."""
        own, update, rank = tensors, None, None
        for up, down in FACTORS:
            if up in own and down in own:
                middle = own.get("lora_E", torch.ones(len(own[down]), 1)).float()  # AdaLoRA's Λ
                rank, scaled = len(own[down]), middle * own[down].float()
                update = (1.0 if scale is None else scale) * own[up].float() @ scaled
        for key in FACTOR:
            if key in own:
                update, weight = own[key].float() - 1, torch.ones_like(own[key])
        fits = weight is not None and update is not None and weight.numel() == update.numel()
        return cls(name, own, update, weight if fits else None, scale, rank)

    @property
    def in_layer(self) -> bool:
        """Whether it changes what one layer computes: prompts and parameters reach further."""
        return self.update is not None and not self.own

    def row(self) -> dict:
        """The place as a row of a table; NaN is what does not apply."""
        kind, parts = self.name.rpartition(".")[2], self.name.split(".")
        found = {"place": self.name, "kind": kind}
        found["layer"] = next((int(part) for part in parts if part.isdigit()), math.nan)
        found["numbers"] = sum(tensor.numel() for tensor in self.tensors.values())
        found |= dict.fromkeys(("rank", "used", "norm", "share", "top"), math.nan)
        found |= {"scale": math.nan if self.scale is None else self.scale, "own": self.own}
        if self.update is None or not is_finite(self.update):
            return found
        update = self.update.detach().float()
        found["norm"] = norm = update.norm().item()
        if self.weight is not None and is_finite(self.weight):
            found["share"] = norm / (self.weight.float().norm().item() or math.nan)
        if self.rank is not None and update.dim() == 2 and norm > 0:
            values = torch.linalg.svdvals(update)
            found |= {"rank": self.rank, "used": int((values > SMALL * values[0]).sum())}
            found["top"] = (values[0] ** 2 / values.square().sum()).item()
        return found


def of_folder(folder: Path, base: Base | None) -> tuple[str, list[Place], list[tuple]]:
    """What the folder holds in words, its places, and what is wrong with the whole of it.

    Nothing is attached, so a folder is read that `attach` refuses: numbers that are not finite, a
    head beside it. Raises FileNotFoundError if no adapter is there and ValueError if a file cannot
    be read.
    """
    _check_there(folder)
    config = read_json(folder / CONFIG)
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else config
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise ValueError(f"{WEIGHTS} cannot be read: {error}") from error
    ours = [dict(method) for method in config.get("methods", ())]
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((end for end in ENDINGS if key.endswith(f".{end}")), key.rpartition(".")[2])
        name = key.removesuffix(f".{ending}").removeprefix(WHERE)
        for method in ours:
            name = name.removeprefix(f"{method['method']}.")
        groups.setdefault(name, {})[ending] = tensor
    weights = {} if base is None else _weights(base)
    places = [
        Place.of_tensors(name, own, weights.get(name), _scale(config, ours, name, own))
        for name, own in groups.items()
    ]
    wrong = []
    before, now = record.get("base_shape", {}).get("vocab"), base and shape_facts(base)["vocab"]
    if before and now and before != now:
        told = f"it was trained with {before:,} tokens, and the base has {now:,}"
        wrong.append((told, base.name, "add the same tokens, and their trained rows, to the base"))
    kind = config.get("peft_type") or " + ".join(method["method"] for method in ours)
    return f"{kind} in {folder.name}", places, wrong


def _weights(base: Base) -> dict[str, Tensor]:
    """The base's weights by the names of modules and by ours, as ΔW is laid out."""
    found = {name: linear.weight for name, linear in base.anatomy.linears.items()}
    for name, module in base.model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            found[name] = weight
    return found


def _scale(config: dict, ours: list[dict], name: str, own: dict[str, Tensor]) -> float | None:
    """alpha / r, or alpha / √r, of one place, from the configuration."""
    down = next((own[down] for _, down in FACTORS[:3] if down in own), None)
    if down is None:
        return None
    method = next((method for method in ours if "alpha" in method), {})
    alpha = config.get("lora_alpha", method.get("alpha"))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        alpha = value if matches(pattern, name) else alpha
    if not isinstance(alpha, (int, float)):
        return None
    root = config.get("use_rslora") or method.get("use_rslora")
    return alpha / (math.sqrt(len(down)) if root else len(down))
