"""Write every drawing as PNG, light and dark: `python -m peftlab.experiments.draw_gallery FOLDER`.

They are made of the bases that ship, so that an eye can look at all of them at once.
"""

import argparse
import base64
import json
from collections.abc import Iterator
from pathlib import Path

import plotly.graph_objects as go

import peftlab as pl
from peftlab import figures
from peftlab.bases.probes import attention_map
from peftlab.experiments.run_notebooks import camera
from peftlab.memory import predict
from peftlab.sites.quantisation import quantise

TEXT = "The old mill by the river"
METHODS = [
    pl.FullFineTuning(), pl.BitFit(), pl.LayerNormTuning(), pl.PromptTuning(12), pl.PTuning(6),
    pl.DeepPromptTuning(6), pl.PrefixTuning(6), pl.PTuningV2(6, depth=2), pl.LoRA(r=8),
    pl.DoRA(r=8), pl.PiSSA(r=8), pl.VeRA(r=64), pl.AdaLoRA(), pl.QLoRA(r=8),
    pl.HoulsbyAdapter(24), pl.ParallelAdapter(48), pl.IA3(), pl.Prune(0.5),
]  # fmt: skip


def drawings(dark: bool) -> Iterator[tuple[str, go.Figure]]:
    """Every drawing by its name."""
    base = pl.load("tiny-gpt")
    yield "site_map", figures.site_map(base, dark=dark)
    with pl.attach(base, pl.LoRA(r=8)) as tuned:
        yield "narrow_road", figures.narrow_road(tuned, tuned.sites[0], dark)
    with pl.attach(base, pl.HoulsbyAdapter(32)) as tuned:
        name = tuned.sites[0]
        yield "bottleneck", figures.bottleneck(tuned.modules[name], name, "houlsby", dark)
    with pl.attach(base, pl.PrefixTuning(4)) as tuned:
        records = attention_map(tuned, TEXT)
    name = "layers.2"
    shares, keys, queries = records.weights(name)[1], records.keys(name), records.queries(name)
    yield "score_matrix", figures.score_matrix(queries, 4, dark=dark)
    yield "shares", figures.score_matrix(queries, 4, shares=shares, dark=dark)
    yield "gate_road", figures.gate_road(keys, shares[-1], 4, queries[-1], dark)
    described = {}
    for method in (
        pl.PromptTuning(),
        pl.DeepPromptTuning(),
        pl.PrefixTuning(),
        pl.PTuningV2(depth=3),
    ):
        with pl.attach(base, method) as tuned:
            described[method.title] = figures.describe(tuned)
    yield "soft_definitions", figures.soft_definitions(described, dark)
    W = base.anatomy.linears["layers.0.up"].weight
    yield "bell", figures.bell(float(W[0, 7]), float(W[0, :64].abs().max()), dark=dark)
    yield "block_of_weights", figures.block_of_weights(W, quantise(W), 37, dark)
    yield "quantile_steps", figures.quantile_steps(dark)
    yield "coded_road", figures.coded_road(quantise(W), 8, "layers.0.up", dark)
    stays = {"weights": 34 * 10**9, "adapter": 3 * 10**9, "gradients": 3 * 10**9}
    batches = {"two short texts": 10**9, "two long texts": 5 * 10**9}
    yield "pages", figures.pages(stays, 6 * 10**9, batches, 48 * 10**9, dark)
    yield "masked_matrix", figures.masked_matrix(W, figures.usual_masks(W), dark=dark)
    up, down = (base.anatomy.linears[f"layers.0.{target}"] for target in ("up", "down"))
    yield "neurons_out", figures.neurons_out(up, down, [100, 230, 250, 420, 600, 700], dark)
    steps = {
        method.title: predict(method, "gpt2", 4, 128) for method in (pl.FullFineTuning(), pl.LoRA())
    }
    yield "step_timeline", figures.step_timeline(steps, dark)
    for family in ("tiny-gpt", "tiny-llama", "tiny-bert", "tiny-t5"):
        base = pl.load(family)
        for method in METHODS:
            if method.name != "bitfit" or base.anatomy.shape.biases:
                with pl.attach(base, method) as tuned:
                    yield f"draw_{method.name}_{family}", figures.draw(tuned, dark)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    with camera() as picture:
        for theme, dark in (("light", False), ("dark", True)):
            for name, figure in drawings(dark):
                drawn = picture(json.loads(figure.to_json()))
                (folder / f"{name}_{theme}.png").write_bytes(base64.b64decode(drawn))


if __name__ == "__main__":
    main()
