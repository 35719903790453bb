"""Every figure is said in words: a drawing's own, or those that its data give."""

import json
import re

import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from test_project import ROOT

from peftlab import figures
from peftlab.experiments.run_notebooks import PNG, figure_in, outputs

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def stored(figure: go.Figure) -> dict:
    return json.loads(figure.to_json())


def test_a_drawing_says_its_own_words():
    figure = figures.weight_to_code(torch.linspace(-0.3, 0.2, 16), 3)[0][1]
    assert figures.spoken(figure) == figures.spoken(stored(figure)) == figures.alt_text(figure)


def test_a_curve_says_where_it_starts_and_ends():
    run = pd.DataFrame({"step": [1, 2, 30], "loss": [2.5, 1.0, 0.0312]})
    figure = figures.learning_curves({"LoRA, r = 8": run}, title="It <b>learns</b>")
    words = (
        "It learns. Across: step. Up: loss (nats per token). LoRA, r = 8: 2.5 at 1, 0.0312 at 30."
    )
    assert figures.spoken(figure) == figures.spoken(stored(figure)) == words


def test_bars_are_said_one_by_one_whichever_way_they_lie():
    upright = go.Figure(go.Bar(x=["LoRA", "full"], y=[12000, -0.5], name="bytes"))
    lying = go.Figure(go.Bar(y=["LoRA", "full"], x=[12000, -0.5], name="bytes", orientation="h"))
    assert (
        figures.spoken(upright) == figures.spoken(lying) == "bytes: 12,000 at LoRA; −0.5 at full."
    )


def test_points_of_a_named_row_say_their_range():
    """They are spread above and below their row, which is no number."""
    figure = go.Figure(layout=dict(xaxis_title="share right"))
    figure.add_scatter(x=[0.9, 0.7, 0.8], y=[0.9, 1, 1.1], mode="markers", name="LoRA")
    figure.add_scatter(x=[0.1, 0.8], y=[0, 1], mode="markers", name="mean")
    figure.update_yaxes(tickvals=[0, 1], ticktext=["base", "LoRA"])
    said = "Across: share right. LoRA: 0.7 to 0.9. mean: 0.1 at base; 0.8 at LoRA."
    assert figures.spoken(figure) == said


def test_a_map_and_a_table_say_what_they_have():
    heat = figures.heat_map(np.array([[0, 1, 2], [3, 4, 5]]), title="t", x_title="head", y_title="")
    assert figures.spoken(stored(heat)).endswith("Across: head. a map of 2 by 3, 0 to 5.")
    table = go.Table(header=dict(values=["a", "<b>b</b>"]), cells=dict(values=[[1, 2], [3, 4]]))
    assert figures.spoken(go.Figure(table)) == "a table of 2 rows: a, b."


def test_of_many_traces_the_names_are_said_and_what_is_hidden_is_not():
    figure = go.Figure([go.Scatter(x=[1], y=[2], name=f"n{i}") for i in range(20)])
    assert figures.spoken(figure) == f"Shown: {', '.join(f'n{i}' for i in range(20))}."
    figure.data = figure.data[:2]
    figure.data[0].opacity = 0
    figure.data[1].visible = "legendonly"
    assert figures.spoken(figure) == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_stored_picture_has_words(path):
    """They begin with the title that is seen, or are a drawing's own."""
    pictures = [o for o in outputs(nbformat.read(path, as_version=4)) if PNG in o.data]
    assert len(pictures) >= 3
    for output in pictures:
        alt, figure = output.metadata[PNG].get("alt", ""), figure_in(output.data)
        assert alt == figures.spoken(figure) and "\n" not in alt
        assert 60 <= len(alt) <= 2000 and not re.search(r"<\w|nan|None|bdata", alt), alt
        if not figure["layout"].get("meta", {}).get("alt"):
            title = re.split("<", figure["layout"]["title"]["text"])[0]
            assert alt.startswith(title), alt
