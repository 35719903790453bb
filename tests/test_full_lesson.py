"""What lesson 01 says: its drawings, what it keeps, its numbers."""

import math
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

import peftlab as pl
from peftlab import figures
from peftlab.bases.shapes import Shape
from peftlab.exercises import lesson_01
from peftlab.experiments import forget_rates, memory_table
from peftlab.figures.sheet import alt_text, overlaps, pale
from peftlab.memory import MOMENTS, measure, predict
from peftlab.panels import LiveLooks

LESSON = Path(__file__).parent.parent / "notebooks" / "01_full_fine_tuning.ipynb"
X = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
W = torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]])
G = torch.tensor([[1.0, 0.0], [2.0, -1.0]])


def cell_with(words: str) -> str:
    """The source of the one code cell that has these words."""
    cells = nbformat.read(LESSON, 4).cells
    [source] = [c.source for c in cells if c.cell_type == "code" and words in c.source]
    return source


def tokens_of(base, rows=4, length=64) -> dict:
    ids = torch.arange(rows * length).view(rows, length) % 500
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


# --- drawings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True])
def test_every_drawing_can_be_read_and_has_words_for_those_who_cannot_see_it(dark):
    shapes = [pl.load("tiny-gpt").anatomy.shape, Shape.named("gpt2")]
    drawn = [figures.kept_in_block(shape, dark) for shape in shapes]
    drawn.append(figures.linear_backward(X, W, G, dark))
    drawn.append(
        figures.linear_backward(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 3), dark)
    )
    for weight in (0.1, 0.5, -0.02):
        drawn.append(figures.rounded_steps(weight, (1e-3, 1e-4, 1e-5), dark=dark))
    for figure in drawn:
        assert overlaps(figure) == [] and pale(figure) == []
        assert len(alt_text(figure)) > 60 and figure.layout.width <= 900


def test_the_layer_is_drawn_with_autograds_gradients():
    x, weight = X.clone().requires_grad_(), W.clone().requires_grad_()
    (x @ weight.T).backward(G)
    words = alt_text(figures.linear_backward(X, W, G))
    for name, gradient in (("W", weight.grad), ("x", x.grad)):
        rows = "; ".join(", ".join(f"{n:g}" for n in row) for row in gradient.tolist())
        assert f"That of {name}, {rows}, is" in words


@pytest.mark.parametrize("name", ["tiny-gpt", "gpt2"])
def test_a_block_is_drawn_with_what_it_keeps(name):
    base = pl.load("tiny-gpt") if name == "tiny-gpt" else name
    shape = base.anatomy.shape if name == "tiny-gpt" else Shape.named(name)
    trains, frozen = (
        lesson_01.block_numbers_solution(shape.d_model, shape.heads, on) for on in (True, False)
    )
    title = figures.kept_in_block(shape).layout.title.text
    assert f"{trains:,} numbers a token if it trains, {frozen:,} if frozen" in title
    kept = predict(pl.FullFineTuning(), base, 2, 16).parts["activations"]["layers.1"]
    if name == "tiny-gpt":  # whose GELU is one operation, as it is drawn
        assert kept == 4 * 2 * 16 * trains


def test_a_block_of_another_family_is_refused():
    with pytest.raises(ValueError, match="llama"):
        figures.kept_in_block(pl.load("tiny-llama").anatomy.shape)


def test_steps_are_rounded_as_torch_rounds():
    figure = figures.rounded_steps(0.1, (1e-3, 1e-4))
    start = torch.tensor(0.1).bfloat16()
    moved = [(start.float() - rate).bfloat16().item() for rate in (1e-3, 1e-4)]
    assert moved[0] != start.item() == moved[1]
    words = alt_text(figure)
    assert (
        f"step of 0.001 lands at {start.item() - 1e-3:.6f} and is stored as {moved[0]:.6f}" in words
    )
    assert "1 of 2 steps are rounded away" in figure.layout.title.text


# --- memory ------------------------------------------------------------------------------------


def test_a_step_without_the_originals_is_smaller_by_them():
    base = pl.load("tiny-gpt")
    with pl.attach(base, pl.FullFineTuning()) as tuned:
        memory = measure(tuned, tokens_of(base))
    less, size = memory.without("aside"), memory.bytes("aside")
    assert size == base.anatomy.shape.parameters() * 4
    assert less.peak == memory.peak - size and "aside" not in less.parts
    for moment in MOMENTS:
        assert less.total[moment] == memory.total[moment] - size
        assert less.sum(moment) == memory.sum(moment) - size
    for part in ("activations", "gradients", "nothing"):
        with pytest.raises(ValueError, match="allowed is weights, "):
            memory.without(part)


def test_the_hook_of_the_lesson_counts_what_the_package_counts():
    built = {"torch": torch}
    exec(cell_with("def kept_bytes"), built)
    base = pl.load("tiny-gpt")
    for method in (pl.FullFineTuning(), pl.LoRA(r=4)):
        with pl.attach(base, method) as tuned:
            counted = built["kept_bytes"](tuned, tokens_of(base))
            assert counted == measure(tuned, tokens_of(base)).bytes("activations")


def test_what_trains_below_decides_what_is_kept():
    """The lesson's three panels: everything, the position table, the last two blocks."""
    built = {"pl": pl, "base": pl.load("tiny-gpt"), "rows": tokens_of(None, 8, 128)}
    exec(cell_with("def memory_if"), built)
    everything, low, high = (
        built["memory_if"](words) for words in (("",), ("wpe",), ("h.4.", "h.5.", "ln_f"))
    )
    for at in range(6):
        whole, part = (m.parts["activations"][f"layers.{at}"] for m in (everything, low))
        assert 0.6 < part / whole < 0.65  # 10 d + 10 of 16 d + 10
        assert high.parts["activations"].get(f"layers.{at}", 0) == (whole if at > 3 else 0)
    assert low.bytes("gradients") < high.bytes("gradients") < everything.bytes("gradients")
    assert high.peak < low.peak < 0.65 * everything.peak
    assert all(p.requires_grad is False for p in built["base"].model.parameters())


# --- forgetting --------------------------------------------------------------------------------


def ends() -> pd.DataFrame:
    """The last look at each recorded run of full fine-tuning."""
    _, runs = forget_rates.read()
    rows = [{**run, **run["looks"][-1]} for run in runs.to_dict("records")]
    every = pd.DataFrame(rows)
    return every[every["title"] == "Full fine-tuning"]


def test_the_larger_the_rate_the_more_is_forgotten():
    found = ends().groupby("lr")["forgotten"].agg(["min", "max", "count"])
    assert list(found.index) == [1e-4, 3e-4, 1e-3, 3e-3] and set(found["count"]) == {3}
    assert (found["max"].iloc[:-1].to_numpy() < found["min"].iloc[1:].to_numpy()).all()
    assert found["max"].iloc[1] < 0.15 and found["min"].iloc[2] > 5 * found["max"].iloc[1]


def test_the_largest_rate_is_no_better_than_a_uniform_guess_in_two_of_three_seeds():
    last = ends()
    loss = (last["before"] + last["forgotten"])[last["lr"] == 3e-3]
    assert sorted(loss > math.log(2048)) == [False, True, True] and loss.min() > 7.3
    assert set(last["new_facts"][last["lr"] >= 1e-3]) == {1.0}
    assert last["new_facts"][last["lr"] == 1e-4].max() <= 0.2
    assert last["new_facts"][last["lr"] == 3e-4].agg(["min", "max"]).tolist() == [0.75, 0.85]
    assert last["loss"][last["lr"] >= 1e-3].max() < 0.002


def test_looks_are_drawn_one_after_the_other(monkeypatch):
    drawn = []
    monkeypatch.setattr("peftlab.panels.live_curve.display", drawn.append)
    monkeypatch.setattr("peftlab.panels.live_curve.clear_output", lambda wait: None)
    live = LiveLooks(lambda step: {"old": 10 * step}, len, every=2, first={"step": 0, "old": 0})
    for step in range(1, 6):
        live({"step": step, "loss": float(step)})
    assert drawn == [2, 3] and live.table["old"].tolist() == [0, 20, 40]
    assert live.table["loss"].tolist()[1:] == [1.5, 3.5]


def test_both_figures_of_forgetting_have_the_line_of_a_uniform_guess():
    table = pd.DataFrame({"step": [0, 1], "loss": [3.0, 1.0], "old": [1.0, 2.0]})
    table = table.assign(new_facts=0.5, known_facts=0.1, lr=1e-3, seed=0)
    for figure in (
        figures.learned_and_lost(table, 7.5, "It loses"),
        figures.forgetting_by_rate(table, 7.5, "It loses"),
    ):
        assert [shape.y0 for shape in figure.layout.shapes] == [7.5]
        assert "uniform guess" in [note.text for note in figure.layout.annotations]


def test_a_chart_of_leaks_has_a_panel_for_each_patient():
    charts = lesson_01.clinic()
    figure = figures.leaks(charts, lesson_01.MOMENTS, "Four leaks")
    patients = [name for name in charts["patient"].unique() if name != "sound"]
    assert len(figure.data) == 2 * len(patients)
    for name, trace in zip(patients, figure.data[1::2], strict=True):
        mine = charts[charts["patient"] == name][list(lesson_01.MOMENTS)].to_numpy().ravel() / 1e3
        assert list(trace.y) == list(mine)


# --- what the lesson says in words -------------------------------------------------------------


def test_a_gpu_takes_a_little_more_than_predicted():
    made, table = memory_table.read("cuda")
    off = table["measured peak"] / table["predicted peak"] - 1
    assert len(table) == table["label"].count() == 33 and "H100" in made["device"]
    assert off.min() > 0 and off.max() < 0.015


def test_what_full_fine_tuning_costs_beside_a_frozen_model_depends_on_the_batch():
    one, many = (pl.panels.memory_view("gpt2", *at).ratios for at in ((1, 128), (64, 512)))
    for label in one.keys() - {"Full fine-tuning"}:
        assert 3 < one[label] < 3.5 and 1 < many[label] < 1.2


def test_freezing_saves_the_product_that_makes_the_gradient_of_a_weight():
    built = {"pl": pl, "base": pl.load("tiny-gpt"), "rows": tokens_of(None, 2, 32)}
    built["parts"] = {"everything": [""], "positions": ["wpe"], "top": ["h.4.", "h.5.", "ln_f"]}
    exec(cell_with("def backward_work"), built)
    everything, low, top = (built["backward_work"](words) for words in built["parts"].values())
    assert everything == pytest.approx(2, abs=0.02) and low == pytest.approx(1, abs=0.02)
    assert top < low


def test_the_first_step_of_the_lesson_is_adams():
    built = {"torch": torch}
    exec(cell_with("def first_step"), built)
    draw = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 9, generator=draw, dtype=torch.float64)
    parameter = torch.nn.Parameter(w.clone())
    parameter.grad = g.clone()
    torch.optim.Adam([parameter], lr=0.1).step()
    assert torch.allclose(built["first_step"]({"w": w}, {"w": g}, 0.1)["w"], parameter, atol=1e-12)
