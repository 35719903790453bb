"""Figures carry the numbers they were given, a title, axes with names, and the course's colours."""

import colorsys
import json
import re
from itertools import combinations

import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from test_project import ROOT

from peftlab import figures
from peftlab.experiments.run_notebooks import figure_in, outputs_with_data
from peftlab.figures import memory, theme
from peftlab.figures.calculator import STEP_PARTS
from peftlab.figures.style import GREY
from peftlab.figures.theme import contrast
from peftlab.methods import METHODS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LABELS = [key.replace("_", " ") for key in figures.COLOURS]  # a label that each method's key finds


def history(seed=0, steps=5):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"step": range(1, steps + 1), "loss": rng.random(steps)})


def attention(virtual=2):
    weights = np.full((3, virtual + 3), 1 / (virtual + 3))
    maps, gates = ({"start": w, "trained": w} for w in (weights, weights[:, :virtual].sum(1)))
    keys = [*(f"P{i + 1}" for i in range(virtual)), " a", "\n", " a"]
    return figures.attention_pair(maps, gates, keys, keys[virtual:], virtual, "t")


def multiples():
    rows = [
        (label, skill, steps, seed / 2)
        for label in ("LoRA", "Prefix tuning")
        for skill in ("sort", "count")
        for steps in (100, 300)
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows, columns=["label", "skill", "steps", "exact"])
    return figures.small_multiples(table, "steps", "exact", "skill", "t", "steps", "share right")


def arriving():
    table = pd.DataFrame({"size": [0.01, 0.1, 1.0], "along": [0.0, 0.8, 1.0], "off": [1.0, 0.8, 0]})
    return figures.what_arrives(table, {"a tenth": 0.1}, "t")


def lost():
    ways = [("codes", 0.5), ("original", 0.1), ("decoded", 0.0)]
    rows = [(b, way, s, worse) for b in "ab" for way, worse in ways for s in (0, 1)]
    return figures.lost_by_way(pd.DataFrame(rows, columns=["base", "way", "seed", "worse"]), "t")


def every_figure():
    table = pd.DataFrame({"method": ["lora", "lora", "base"], "em": [0.9, 0.8, 0.1]})
    return {
        "five_sites": figures.five_sites("linear_weights"),
        "learning_curves": figures.learning_curves({"LoRA": [history(0), history(1)]}),
        "bars": figures.bars_by_method(table, "em", "LoRA learns it", "exact match"),
        "counts": figures.counts_figure([1, 2, 4], [10, 20, 40], 2, "toy", 1000),
        "heat_map": figures.heat_map(np.eye(3), title="t", x_title="x", y_title="y"),
        "spectrum": figures.spectrum({"lora": [1.0, 3.0, 2.0]}, "t"),
        "attention_pair": attention(),
        "small_multiples": multiples(),
        "token_bars": figures.token_bars(["a", "a"], [1, 2], "t", "cosine"),
        "code_shares": figures.code_shares({"nf4": [1 / 16] * 16, "int4": [1 / 15] * 15}, "t"),
        "what_arrives": arriving(),
        "lost_by_way": lost(),
    }


@pytest.mark.parametrize("name", every_figure())
def test_each_has_a_title_named_axes_and_no_script(name):
    figure = every_figure()[name]
    assert figure.layout.title.text
    if name != "five_sites":
        assert figure.layout.xaxis.title.text or figure.layout.yaxis.title.text
    assert figure.layout.template.layout.plot_bgcolor == "white"
    text = figure.to_json()
    assert "http" not in text and len(text) < 20_000


def test_the_template_is_the_default_and_figures_show_from_data_alone():
    figures.use_template()
    assert pio.templates.default == "peftlab"
    assert pio.renderers.default == "plotly_mimetype"


def test_a_method_is_told_apart_by_colour_and_marker():
    assert set(METHODS) <= set(figures.COLOURS)
    pairs = {(figures.COLOURS[key], figures.MARKERS[key]) for key in figures.COLOURS}
    assert len(pairs) == len(figures.COLOURS)


@pytest.mark.parametrize(
    "label, key",
    [
        ("LoRA, r=8", "lora"),
        ("QLoRA", "qlora"),
        ("Full fine-tuning", "full_fine_tuning"),
        ("P-tuning v2", "p_tuning_v2"),
        ("Prompt tuning (20)", "prompt_tuning"),
        ("something", None),
    ],
)
def test_labels_find_their_method(label, key):
    assert figures.method_key(label) == key


@pytest.mark.parametrize("site", figures.SITES)
def test_a_lit_site_shows_in_its_colour(site):
    colour = figures.SITES[site][0]
    fills = [shape.fillcolor for shape in figures.five_sites(site).layout.shapes]
    assert fills.count(colour) >= 2  # in the drawing and in the key
    assert colour not in [shape.fillcolor for shape in figures.five_sites().layout.shapes]


def test_five_sites_refuses_a_sixth():
    with pytest.raises(ValueError, match="unknown site 'optimizer'; the five are input_embeddings"):
        figures.five_sites(["optimizer"])


def test_learning_curves_show_each_seed_and_the_mean():
    runs = [history(0), history(1)]
    figure = figures.learning_curves({"LoRA": runs, "thing": history(2)})
    lora = [trace for trace in figure.data if trace.name.startswith("LoRA")]
    assert len(lora) == 3 and lora[-1].name == "LoRA (mean of 2 seeds)"
    np.testing.assert_array_equal(lora[-1].y, (runs[0].loss + runs[1].loss) / 2)
    assert {trace.line.color for trace in lora} == {figures.COLOURS["lora"]}


def test_learning_curves_skip_the_steps_without_the_metric():
    run = history().assign(em=[None, None, 0.5, None, 0.9])
    figure = figures.learning_curves({"LoRA": run}, metric="em")
    assert list(figure.data[0].x) == [3, 5] and list(figure.data[0].y) == [0.5, 0.9]


def test_a_curve_that_lies_under_others_is_wider_than_they_are():
    same, apart = history(0), history(0).assign(loss=history(0).loss + 3)
    drawn = figures.learning_curves({"a": same, "b": apart, "c": same, "d": same}).data
    a, b, c, d = (trace.line.width for trace in drawn)
    assert a > c > d == b
    a, b, c, d = (trace.marker.size for trace in drawn)
    assert a > c > d == b


def test_five_curves_of_no_method_have_five_hues():
    figure = figures.learning_curves({name: history() for name in "ABCDE"})
    hues = []
    for trace in figure.data:
        rgb = (int(trace.line.color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        hues.append(360 * colorsys.rgb_to_hsv(*rgb)[0])
    apart = [abs((a - b + 180) % 360 - 180) for a, b in combinations(hues, 2)]
    assert len(hues) == 5 and min(apart) > 25


def test_two_settings_of_one_method_differ_in_dash():
    figure = figures.learning_curves({"LoRA r=1": history(0), "LoRA r=8": history(1)})
    assert figure.data[0].line.color == figure.data[1].line.color
    assert figure.data[0].line.dash != figure.data[1].line.dash


def test_bars_show_mean_spread_points_and_n():
    table = pd.DataFrame({"method": ["lora"] * 3 + ["base"], "em": [0.7, 0.8, 0.9, 0.1]})
    lora, points, base, _ = figures.bars_by_method(table, "em", "t", "exact match").data
    assert lora.x == ("lora<br>n = 3",) and lora.y[0] == pytest.approx(0.8)
    assert lora.error_y.array[0] == pytest.approx(0.1)  # one standard deviation of .7 .8 .9
    assert list(points.y) == [0.7, 0.8, 0.9]
    assert base.error_y.visible is False


def test_counts_mark_the_current_setting_and_the_base():
    figure = figures.counts_figure([1, 8], [36864, 294912], 8, "gpt2", 124439808)
    line, current, base = figure.data
    assert list(line.y) == [36864, 294912]
    assert (current.x[0], current.y[0], current.text[0]) == (8, 294912, "294,912")
    assert list(base.y) == [124439808] * 2
    assert figure.layout.title.text == "LoRA: 294,912 parameters, 0.237% of gpt2"
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")


def test_heat_map_centres_a_signed_matrix():
    heat = figures.heat_map([[-1, 4]], diverging=True).data[0]
    assert (heat.zmin, heat.zmax) == (-4, 4)


def test_spectrum_sorts_the_largest_first():
    trace = figures.spectrum({"lora": [1.0, 3.0, 2.0]}, "t").data[0]
    assert list(trace.y) == [3, 2, 1] and list(trace.x) == [1, 2, 3]


def test_attention_shows_two_maps_the_gates_and_where_the_text_begins():
    figure = attention()
    left, right, start, trained = figure.data
    np.testing.assert_allclose(left.customdata, 0.2)  # the share; the colour is its root
    np.testing.assert_allclose(left.z, 0.2**0.5)
    np.testing.assert_allclose(trained.x, 0.4)
    assert {trace.name for trace in (left, start)} == {"start"}
    assert [line.x0 for line in figure.layout.shapes] == [1.5, 1.5]
    assert (
        figure.layout.yaxis.ticktext == ("␣a", "⏎", "␣a") and len(figure.layout.yaxis.tickvals) == 3
    )
    assert figure.layout.xaxis2.ticktext == ("P1", "a", "⏎", "a")  # two names would run together
    assert trained.marker.color == figures.COLOURS["prefix_tuning"]


def test_attention_names_the_ends_of_a_long_prefix():
    axis = attention(20).layout.xaxis
    assert axis.ticktext == ("P1", "P20", "a", "⏎", "a")
    assert axis.tickvals[2] - axis.tickvals[1] > 1  # so wide is a name of the prefix's end


def test_small_multiples_show_every_seed_and_the_mean():
    figure = multiples()
    assert len(figure.data) == 2 * 2 * 2
    points, line = figure.data[:2]
    assert sorted(points.y) == [0, 0, 0.5, 0.5] and list(line.y) == [0.25, 0.25]
    assert {trace.xaxis for trace in figure.data} == {"x", "x2"}
    assert [t.name for t in figure.data if t.showlegend] == ["LoRA", "Prefix tuning"]
    assert "sort" in figure.layout.xaxis.title.text and "count" in figure.layout.xaxis2.title.text


def test_token_bars_keep_equal_tokens_apart():
    figure = figures.token_bars([" the", " the"], [0.5, 0.4], "t", "cosine")
    assert list(figure.data[0].y) == [0, 1]
    assert list(figure.layout.yaxis.ticktext) == ["' the'", "' the'"]


def test_code_shares_have_a_point_a_code_and_the_even_share():
    fig = figures.code_shares({"nf4": [1 / 16] * 16, "int4": [1 / 15] * 15}, "t")
    assert {line.name: len(line.y) for line in fig.data} == {"nf4": 16, "int4": 15}
    assert [line.y0 for line in fig.layout.shapes] == [1 / 16]


def test_what_arrives_has_both_parts_and_the_sizes_that_were_named():
    along, off, mark = arriving().data
    assert list(along.y) == [0.0, 0.8, 1.0] and list(off.y) == [1.0, 0.8, 0.0]
    assert list(mark.x) == [0.1, 0.1] and "a tenth" in mark.text


def test_every_run_of_a_merged_adapter_is_a_point_beside_its_base():
    fig = lost()
    for trace, worse in zip(fig.data, (0.5, 0.1, 0.0), strict=True):
        assert list(trace.x) == [worse] * 4
        assert [round(y) for y in trace.y] == [0, 0, 1, 1]
    assert list(fig.layout.yaxis.ticktext) == ["a", "b"] and "2 seeds" in fig.layout.title.text


def test_figures_survive_json():
    for figure in every_figure().values():
        assert json.loads(figure.to_json())["layout"]["title"]["text"]


# --- can an eye tell it from the paper ---------------------------------------------------------


def faint(figure: go.Figure | dict) -> list:
    """Lines and marks that stand out from the paper by less than 3, words by less than 4.5."""
    told = json.loads(figure.to_json()) if isinstance(figure, go.Figure) else figure
    layout = told["layout"]
    paper = layout.get("template", {}).get("layout", {}).get("paper_bgcolor", "white")
    paper = {"white": "#ffffff"}.get(paper, paper)
    seen = []
    for trace in told["data"]:
        if trace.get("opacity", 1) > 0.5:  # what is paler lies behind what it belongs to
            for part, least in (("line", 3), ("marker", 3), ("textfont", 4.5)):
                hidden = trace.get(part, {}).get("opacity", 1) == 0
                seen += [] if hidden else [(trace.get(part, {}).get("color"), least)]
    if not layout.get("meta", {}).get("paper"):  # a drawing's words may stand in a box: `pale`
        for note in layout.get("annotations", []):
            seen.append((note.get("font", {}).get("color"), 4.5 if note.get("text") else 3))
    plain = [(c, least) for c, least in seen if isinstance(c, str) and re.fullmatch("#.{6}", c)]
    return [(c, least) for c, least in plain if contrast(c, paper) < least]


@pytest.mark.parametrize("paper", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_the_palette_stands_out_from_the_paper(paper):
    """Every method's line and words, and the ink; on white the colours as they are."""
    for colour in {*figures.COLOURS.values(), *memory.PARTS.values(), *STEP_PARTS.values()}:
        assert contrast(paper.line(colour), paper.paper) >= 3
        assert contrast(paper.text(colour), paper.paper) >= 4.5
        assert paper.name == "dark" or contrast(colour, paper.paper) >= 3
    for words in (paper.ink, paper.quiet, GREY if paper.name == "light" else paper.ink):
        assert contrast(words, paper.paper) >= 4.5
    assert contrast(paper.edge, paper.paper) >= 3
    for fill in (paper.frozen, *map(paper.fill, figures.COLOURS.values())):
        assert contrast(paper.on(fill), fill) >= 4.5


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_curves_stand_out_from_the_paper(dark):
    try:
        figures.use_template(dark)
        labels = {label: history() for label in (*LABELS, "something", "else")}
        drawn = [figures.learning_curves({k: v}) for k, v in labels.items()]
        drawn += [figures.learning_curves(labels), multiples(), arriving(), lost(), attention()]
        assert [faint(figure) for figure in drawn] == [[]] * len(drawn)
    finally:
        figures.use_template()


def test_what_is_faint_is_found():
    figure = figures.learning_curves({"LoRA": history()})
    figure.data[0].line.color = "#eeeeee"
    figure.add_annotation(text="pale", font_color="#888888")
    assert faint(figure) == [("#eeeeee", 3), ("#888888", 4.5)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_figures_stand_out_from_the_paper(path):
    found = [figure_in(data) for data in outputs_with_data(nbformat.read(path, as_version=4))]
    shown = [figure for figure in found if figure]
    assert shown and [faint(figure) for figure in shown] == [[]] * len(shown)
