"""What the panels of the site compute with: numbers of models, traces, tables, drawings to fill."""

import base64
import json
from dataclasses import replace

import torch

import peftlab
from peftlab import accounting
from peftlab.bases.shapes import Shape, names
from peftlab.methods.lora import LowRankDelta
from peftlab.panels import (
    BATCHES,
    BESIDE_FULL,
    BLOCK_SIZES,
    CHOICES,
    LAB_ALPHAS,
    LAB_RANKS,
    LAB_RATE,
    LAB_SCALES,
    LAB_SIZE,
    LAB_STEPS,
    TOKENS,
    build_method,
    code_view,
    count_view,
    memory_models,
    memory_view,
    rank_lab_view,
)
from peftlab.panels.memory import VIRTUAL, _traces
from peftlab.sites.quantisation import ABSMAX_BLOCK, QUANT_TYPES, dynamic_table, table


def packed(tensor: torch.Tensor) -> dict:
    """A tensor's numbers in base64, in 16 bits where those are exact."""
    values = tensor.detach().cpu().float()
    short = values.half()
    kept = short if torch.equal(short.float(), values) else values
    name = str(kept.dtype).removeprefix("torch.")
    return {"dtype": name, "base64": base64.b64encode(kept.numpy().tobytes()).decode()}


def mould(figure) -> dict:
    """A figure whose numbers the page replaces."""
    return json.loads(figure.to_json())


def count() -> dict:
    """Shapes of all models, the formula of each method, and a drawing of each."""
    models, methods, moulds = {}, {}, {}
    for name in sorted(names(), key=accounting.base_parameters):
        shape = Shape.named(name)
        kinds = ["attention", "mlp"] + (["cross"] if shape.decoder_layers else [])
        models[name] = {
            "parameters": shape.parameters(),
            "d_model": shape.d_model,
            "d_kv": shape.d_kv,
            "attentions": shape.attentions,
            "context": shape.context,
            "sublayers": {kind: shape.sublayers(kind) for kind in kinds},
            "matrices": {target: shape.matrices(target) for target in shape.targets},
        }
    for name, choice in CHOICES.items():
        formula, options = formula_of(build_method(name, choice.start))
        methods[name] = {
            "formula": formula,
            "options": options,
            "size_name": choice.size_name,
            "sizes": choice.sizes,
            "start": choice.start,
            "targeted": choice.targeted,
            "in_context": choice.in_context,
            "sized": formula != "full",
        }
        moulds[name] = mould(count_view(name, choice.start, ["q", "v"], "gpt2").figure())
    width = accounting.BYTES["float32"]
    return {"models": models, "methods": methods, "moulds": moulds, "width": width}


def formula_of(method) -> tuple[str, dict]:
    """The name of the formula in `count.js`, and what it needs to know of the method."""
    match method:
        case peftlab.LoRA():
            return "lora", {}
        case peftlab.PrefixTuning():
            return "prefix", {}
        case peftlab.PTuning():
            return "network", {"encoder": method.encoder, "layers": method.encoder_num_layers}
        case peftlab.PromptTuning():
            return "prompt", {}
        case peftlab.FullFineTuning():
            return "full", {}
    return "bottleneck", {"sublayers": method.sublayers}


def memory() -> dict:
    """The recorded traces, and a drawing."""
    models = {
        name: {"context": Shape.named(name).context, "traces": _traces()[name]}
        for name in memory_models()
    }
    return {
        "models": models,
        "rows": BATCHES,
        "tokens": TOKENS,
        "virtual": VIRTUAL,
        "full": next(iter(BESIDE_FULL)),
        "shown": [
            {"label": "LoRA, q and v", "word": "LoRA"},
            {"label": "Prompt tuning", "word": "prompt tuning"},
        ],
        "mould": mould(memory_view("gpt2", 8, 128).figure()),
    }


def weights() -> dict[str, torch.Tensor]:
    """Those of lesson 08: a drawn normal, and three matrices of the small GPT."""
    generator = torch.Generator().manual_seed(0)
    found = {"a drawn normal": torch.randn(192, 768, generator=generator)}
    base = peftlab.load("tiny-gpt")
    for name in ("layers.0.q", "layers.3.up", "layers.5.down"):
        found[name] = base.anatomy.linears[name].weight.detach().float().contiguous()
    return found


def codes() -> dict:
    """Weights, the levels of each data type, and a drawing for each that is chosen."""
    found = weights()
    first = next(iter(found.values()))
    moulds = {kind: mould(code_view(first, 64, kind).figure()) for kind in QUANT_TYPES}
    sizes = moulds["nf4"]["data"][0]["marker"]["size"]
    return {
        "weights": {name: packed(values) for name, values in found.items()},
        "levels": {kind: table(kind).tolist() for kind in QUANT_TYPES},
        "dynamic": dynamic_table().tolist(),
        "group": ABSMAX_BLOCK,
        "tiny": torch.finfo(torch.float32).tiny,
        "blocks": BLOCK_SIZES,
        "marks": [min(sizes), max(sizes)],
        "moulds": moulds,
    }


def rank() -> dict:
    """The update that is to be learned, where each rank starts, and a drawing."""
    starts = {}
    for r in LAB_RANKS:
        generator = torch.Generator().manual_seed(0)
        left, right = (
            torch.linalg.qr(torch.randn(LAB_SIZE, LAB_SIZE, generator=generator)).Q
            for _ in range(2)
        )
        delta = LowRankDelta(LAB_SIZE, LAB_SIZE, r, 1)
        delta.initialise(generator)
        starts[r] = packed(delta.A)
    view = rank_lab_view(4, 8)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]).defaults
    figure = view.figure()
    shown = mould(figure)
    for trace, values in zip(shown["data"], figure.data, strict=True):
        trace["x"], trace["y"] = list(map(int, values.x)), list(map(float, values.y))
    return {
        "size": LAB_SIZE,
        "steps": LAB_STEPS,
        "rate": LAB_RATE,
        "ranks": LAB_RANKS,
        "alphas": LAB_ALPHAS,
        "scales": LAB_SCALES,
        "adam": {"beta1": adam["betas"][0], "beta2": adam["betas"][1], "eps": adam["eps"]},
        "wanted": view.wanted,
        "target": packed(left * torch.tensor(view.wanted) @ right.T),
        "starts": starts,
        "least": replace(view, learned=(0.0,)).figure().data[0].y[0],
        "mould": shown,
    }


PANELS = {"count": count, "memory": memory, "codes": codes, "rank": rank}


def script(name: str) -> str:
    """The panel's data as a script, which a page can read where it may not fetch a file."""
    text = json.dumps(PANELS[name](), ensure_ascii=False, separators=(",", ":"))
    head = "peftlab.data = peftlab.data ?? {};\n"
    return f"{head}peftlab.data.{name} = {text};\n"
