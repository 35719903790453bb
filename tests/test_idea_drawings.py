"""Drawings of one idea: their numbers are those of the objects they were given."""

import copy
import json
from itertools import pairwise

import nbformat
import numpy as np
import plotly.io as pio
import pytest
import torch
from models import tiny

import peftlab as pl
from peftlab import figures
from peftlab.accounting import readable_bytes
from peftlab.bases.probes import attention_map, gate
from peftlab.experiments.run_notebooks import FIGURE, PLOTLY, PNG, WIDTH, add_pictures
from peftlab.figures.described import describe
from peftlab.figures.sheet import alt_text, extents, overlaps, pale
from peftlab.figures.theme import DARK, LIGHT, contrast
from peftlab.figures.timeline import course
from peftlab.memory import measure, predict
from peftlab.memory.traced import rows
from peftlab.sites.quantisation import ABSMAX_BLOCK, NF4_OFFSET, QUANT_TYPES, quantise, table

SOFT = {
    "Prompt tuning": pl.PromptTuning(3),
    "Deep prompts": pl.DeepPromptTuning(3),
    "Prefix tuning": pl.PrefixTuning(3),
    "P-tuning v2": pl.PTuningV2(3, depth=1),
}
ADAPTERS = {
    "Houlsby": pl.HoulsbyAdapter(3),
    "Pfeiffer": pl.PfeifferAdapter(3),
    "Parallel": pl.ParallelAdapter(3),
    "(IA)³": pl.IA3(),
}
STAYS = {"weights": 36 * 10**9, "adapter": 2 * 10**9, "gradients": 2 * 10**9}
BATCHES = {"two short texts": 10**9, "two long texts": 5 * 10**9}


def weight(rows=24, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def described(base, methods):
    found = {}
    for label, method in methods.items():
        with pl.attach(base, method) as tuned:
            found[label] = describe(tuned)
    return found


def attended():
    with pl.attach(tiny("gpt2"), pl.PrefixTuning(4)) as tuned:
        return attention_map(tuned, "an old mill")


def every_drawing(dark=False):
    base = tiny("gpt2")
    W, records = weight(), attended()
    shares = records.weights("layers.1")[0]
    with pl.attach(base, pl.LoRA(r=3, target_modules=["up"])) as tuned:
        road = figures.narrow_road(tuned, "layers.0.up", dark)
        timeline = figures.step_timeline({"LoRA": measure(tuned, rows(tuned, 2, 8))}, dark)
    with pl.attach(base, pl.HoulsbyAdapter(3)) as tuned:
        small = figures.bottleneck(tuned.modules[tuned.sites[0]], tuned.sites[0], "houlsby", dark)
    return {
        "site_map": figures.site_map(base, dark=dark),
        "one site": figures.site_map(base, "keys_values", dark=dark),
        "score_matrix": figures.score_matrix(["the", "cat", "sat"], 2, dark=dark),
        "no prefix": figures.score_matrix(["the", "cat"], 0, causal=False, dark=dark),
        "shares": figures.score_matrix(records.tokens, 4, shares=shares, dark=dark),
        "gate": figures.gate_road(records.keys("layers.1"), shares[-1], 4, "l", dark),
        "road": road,
        "definitions": figures.soft_definitions(described(base, SOFT), dark),
        "bell": figures.bell(0.3, 0.7, dark=dark),
        "block": figures.block_of_weights(W, quantise(W), 2, dark),
        "block, one scale": figures.block_of_weights(W, quantise(W, double_quant=False), 0, dark),
        "steps of probability": figures.quantile_steps(dark),
        "coded road": figures.coded_road(quantise(W), 8, "layers.0.up", dark),
        "pages": figures.pages(STAYS, 6 * 10**9, BATCHES, 48 * 10**9, dark),
        "pages not needed": figures.pages(STAYS, 10**9, BATCHES, 48 * 10**9, dark),
        "masks": figures.masked_matrix(W, figures.usual_masks(W), dark=dark),
        "bottleneck": small,
        "timeline": timeline,
        **figures.adapter_places(base, ADAPTERS, dark),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_drawing_is_legible_and_has_words_for_who_cannot_see_it(dark):
    theme = DARK if dark else LIGHT
    for name, figure in every_drawing(dark).items():
        assert overlaps(figure) == [] and pale(figure) == [], name
        sizes = [note.font.size for note in figure.layout.annotations if note.text]
        assert min(sizes) >= 11 and figure.layout.height <= 600 and figure.layout.width <= 900, name
        assert len(alt_text(figure)) > 60 and figure.layout.title.text, name
        assert figure.layout.template.layout.paper_bgcolor in (theme.paper, "white"), name
        text = figure.to_json()
        assert "http" not in text and len(text) < 100_000, name


def test_words_and_lines_stand_out_in_both_themes():
    for theme in (LIGHT, DARK):
        assert contrast(theme.ink, theme.paper) >= 4.5 <= contrast(theme.quiet, theme.paper)
        assert contrast(theme.edge, theme.paper) >= 3
        for colour in figures.COLOURS.values():
            assert contrast(theme.line(colour), theme.paper) >= 3
            assert contrast(theme.text(colour), theme.paper) >= 4.5
            fill = theme.fill(colour)
            assert contrast(theme.on(fill), fill) >= 4.5


def test_the_template_in_use_decides_between_light_and_dark():
    before = pio.templates.default
    try:
        figures.use_template(dark=True)
        assert figures.bell(0.1, 1).layout.template.layout.paper_bgcolor == DARK.paper
        assert figures.heat_map(np.eye(2), title="t").layout.template.layout.font.color == DARK.ink
        figures.use_template()
        assert figures.bell(0.1, 1).layout.template.layout.paper_bgcolor == "white"
    finally:
        pio.templates.default = before


def words_of(figure):
    return [text for *_, text in extents(figure)]


def fills(figure, colour):
    return [s for s in figure.layout.shapes if s.type == "rect" and s.fillcolor == colour]


@pytest.mark.parametrize("tokens, virtual", [(3, 2), (5, 0), (4, 7)])
def test_the_scores_have_the_prefix_and_the_triangle(tokens, virtual):
    figure = figures.score_matrix([f"t{i}" for i in range(tokens)], virtual)
    assert len(fills(figure, figures.COLOURS["prefix_tuning"])) == tokens * virtual
    assert len(fills(figure, LIGHT.frozen)) == tokens * (tokens + 1) // 2
    assert len(fills(figure, LIGHT.paper)) == tokens * (tokens - 1) // 2


def test_the_gate_of_each_row_is_the_measured_one():
    records = attended()
    figure = figures.score_matrix(records.tokens, 4, shares=records.weights("layers.1")[2])
    measured = [f"{share:.2f}" for share in records.gate("layers.1")[2].tolist()]
    assert [text for text in words_of(figure) if text in measured] == measured
    with pytest.raises(ValueError, match="3 queries and 1 \\+ 3 keys"):
        figures.score_matrix(["a", "b", "c"], 1, shares=np.eye(3))


def test_the_parts_of_the_gate_are_those_of_the_equation():
    records = attended()
    record = records.records["layers.1"]
    share = float(gate(record).gate[0, 0, -1])
    shares = records.weights("layers.1")[0, -1]
    figure = figures.gate_road(records.keys("layers.1"), shares, 4, records.tokens[-1])
    assert f"λ = {share:.2f}" in words_of(figure) and f"1 − λ = {1 - share:.2f}" in words_of(figure)
    hover = figure.data[-1].hovertext
    values = [float(text.rpartition(" ")[2]) for text in hover]
    whole, prefix, text = np.split(np.array(values), [len(shares), len(shares) + 4])
    np.testing.assert_allclose(whole, shares, atol=6e-4)
    np.testing.assert_allclose(prefix, shares[:4] / share, atol=6e-4)
    np.testing.assert_allclose(text, shares[4:] / (1 - share), atol=6e-4)


def test_definitions_show_where_numbers_enter():
    base = tiny("gpt2")
    layers = base.anatomy.shape.layers
    drawings = described(base, SOFT)
    figure = figures.soft_definitions(drawings)
    orange = fills(figure, figures.COLOURS["prompt_tuning"])
    green = [s for s in fills(figure, figures.COLOURS["prefix_tuning"]) if s.x0 > 20]
    assert len(orange) == 3 + 3 * layers
    assert len(green) == 2 * 3 * layers + 2 * 3 * 1 + 3 - 1  # and the legend's, the first at x = 14
    assert [text for text in words_of(figure) if text.endswith("numbers train")] == [
        f"{drawing.numbers:,} numbers train" for drawing in drawings.values()
    ]
    with pytest.raises(ValueError, match="no virtual token"):
        figures.soft_definitions(described(base, {"LoRA": pl.LoRA(r=2)}))


@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_the_bell_has_the_bins_of_its_table(kind):
    levels = table(kind)
    for value in (-0.9, -0.01, 0.3, 1.0):
        figure = figures.bell(value, 1.0, kind)
        code = int((levels - value).abs().argmin())
        assert f"<b>{code}</b>" in words_of(figure)
        assert f"becomes code {code}:" in figure.layout.title.text
        areas = [s for s in figure.layout.shapes if s.type == "path" and s.fillcolor]
        assert len(areas) == len(levels)
    with pytest.raises(ValueError, match="allowed is"):
        figures.bell(1.1, 1.0, kind)


def test_steps_of_probability_end_at_the_levels():
    figure = figures.quantile_steps()
    lines = [s for s in figure.layout.shapes if s.type == "path" and s.path.count("L") == 2]
    points = [[tuple(map(float, p.split(","))) for p in s.path[1:].split("L")] for s in lines]
    steps = [y for (_, y), _, _ in points]  # on the axis of probability, the lowest level first
    rises = [low - high for low, high in pairwise(steps)]
    assert rises[:7] == pytest.approx([320 * (NF4_OFFSET - 0.5) / 7] * 7, abs=0.11)
    assert rises[7:] == pytest.approx([320 * (NF4_OFFSET - 0.5) / 8] * 8, abs=0.11)
    ends = [x for _, _, (x, _) in points]
    zero, one = ends[7], ends[15]
    levels = [(x - zero) / (one - zero) for x in ends]
    assert levels == pytest.approx(table("nf4").tolist(), abs=1e-3)


def test_a_coded_road_has_areas_to_the_scale_of_bytes():
    codes = quantise(weight(80, 256))
    figure = figures.coded_road(codes, 4, "here")
    boxes = [s for s in figure.layout.shapes if s.type == "rect" and s.x1 - s.x0 == 104]
    first, last, held = sorted(boxes, key=lambda s: s.y0 - s.y1)
    assert first.y1 - first.y0 == last.y1 - last.y0 == 104 and first.line.dash == "dot"
    assert (held.y1 - held.y0) / 104 == pytest.approx(codes.bytes / (4 * 80 * 256))
    assert f"{readable_bytes(codes.bytes)} stay" in figure.layout.title.text


def test_pages_lend_what_is_missing_and_no_more():
    gb = 10**9
    figure = figures.pages(STAYS, 6 * gb, BATCHES, 48 * gb)
    unit = 640 / (48 * gb)  # 40 + 6 + 5 − 48: 3 GB do not fit
    assert "misses the card by 3.0 GB" in figure.layout.title.text
    boxes = [s for s in figure.layout.shapes if s.type == "rect" and s.y1 - s.y0 == 34]
    ends = {y: max(s.x1 for s in boxes if s.y0 == y and s.x0 < 656) for y in (34, 116, 198)}
    assert [round((x - 16) / unit / gb, 6) for x in ends.values()] == [47, 51, 48]
    [host] = [s for s in boxes if s.x0 > 656 and s.y0 == 198]
    assert (host.x1 - host.x0) / unit == pytest.approx(3 * gb)
    assert "2.0 GB are left" in figures.pages(STAYS, gb, BATCHES, 48 * gb).layout.title.text


def test_a_block_shows_its_codes_and_scales():
    W = weight(80, 256)
    codes = quantise(W)
    block = ABSMAX_BLOCK + 3
    figure = figures.block_of_weights(W, codes, block)
    numbers = codes.codes.view(-1)[block * 64 : (block + 1) * 64].tolist()
    drawn = [text for text in words_of(figure) if text.isdigit()]
    assert drawn == [str(code) for code in numbers]
    left = len(codes.scales) - ABSMAX_BLOCK
    assert any(text.startswith(f"{left} scales m less their mean") for text in words_of(figure))
    assert f"m = {float(codes.scales[block]):.4f}" in figure.layout.title.text
    with pytest.raises(IndexError, match="there are 320"):
        figures.block_of_weights(W, codes, 320)


def test_masks_take_what_they_say():
    W = weight()
    masks = figures.usual_masks(W)
    figure = figures.masked_matrix(W, masks)
    for trace, mask in zip(figure.data, masks.values(), strict=True):
        np.testing.assert_array_equal(np.isnan(np.array(trace.z, dtype=float)), ~mask.numpy())
        np.testing.assert_allclose(trace.customdata, W)
    lost = [float(W[~mask].square().sum() / W.square().sum()) for mask in masks.values()]
    assert all(f"{share:.0%}" in figure.layout.title.text for share in lost)
    assert lost == sorted(lost)
    assert "a smaller matrix: 12 × 32" in words_of(figure)
    with pytest.raises(ValueError, match="a mask \\(2, 2\\)"):
        figures.masked_matrix(W, {"small": torch.ones(2, 2, dtype=torch.bool)})


def test_adapters_move_through_the_block():
    base = tiny("gpt2")
    pictures = figures.adapter_places(base, ADAPTERS)
    assert base.adapted_by is None and list(pictures) == list(ADAPTERS)
    plus = {}
    for label, figure in pictures.items():
        plus[label] = sum(t.startswith("W_down") for t in words_of(figure))
    assert plus == {"Houlsby": 2, "Pfeiffer": 1, "Parallel": 1, "(IA)³": 0}


@pytest.mark.parametrize("method", [pl.LoRA(r=3), pl.FullFineTuning(), pl.PrefixTuning(3)])
def test_the_course_of_a_step_is_the_measured_memory(method):
    with pl.attach(tiny("gpt2"), method) as tuned:
        memory = measure(tuned, rows(tuned, 3, 12))
    states = course(memory)
    ends = {name: sum(state.values()) for name, state in states}  # the last of each
    batch = memory.bytes("batch")
    for name, total in ends.items():
        assert total + batch == memory.sum(name)
    highest = max(sum(state.values()) for _, state in states)
    assert highest + batch <= memory.peak
    figure = figures.step_timeline({"it": memory})
    dots = [text for text in figure.data[-1].hovertext if text.startswith("it, after")]
    assert len(dots) == 3


def test_gradients_of_full_fine_tuning_belong_to_their_layers():
    memory = predict(pl.FullFineTuning(), "gpt2", 1, 8)
    assert memory.parts["gradients"].keys() == memory.parts["weights"].keys()


def test_the_map_lights_what_it_is_asked_to():
    base = tiny("gpt2")
    before = copy.deepcopy(base.fingerprint())
    whole = figures.site_map(base)
    for colour, *_ in figures.SITES.values():
        assert len(fills(whole, colour)) >= 2
    one = figures.site_map(base, ["sublayer_outputs"])
    for site, (colour, *_) in figures.SITES.items():
        assert bool(fills(one, colour)) is (site == "sublayer_outputs")
    assert base.fingerprint() == before and base.adapted_by is None
    with pytest.raises(ValueError, match="unknown site 'optimizer'"):
        figures.site_map(base, "optimizer")


def test_a_stored_drawing_has_its_words_beside_its_picture():
    figure = figures.bell(0.1, 1)
    data = {PLOTLY: json.loads(figure.to_json())}
    plain = {PLOTLY: {"data": [], "layout": {}}}
    made = [nbformat.v4.new_output("display_data", data=each) for each in (data, plain)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=made)])
    add_pictures(notebook, lambda figure: "cGl4ZWxz", {})
    first, second = notebook.cells[0].outputs
    assert first["data"][PNG] == "cGl4ZWxz" == second["data"][PNG]
    assert first["metadata"][PNG]["alt"] == alt_text(figure)
    assert second["metadata"][PNG] == {"width": WIDTH} and set(second["data"]) == {FIGURE, PNG}
    nbformat.validate(notebook)
