"""A keyboard moves a lesson's slider in a real JupyterLab, and the page shows the new number.

Of the lesson only the cells run that its panel needs, as they are stored. That all its cells run,
and what they answer, is compared without a browser.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
import torch
from browser.fixtures import cells_for
from playwright.sync_api import expect

from peftlab.panels import (
    LAB_ALPHAS,
    LAB_RANKS,
    ShowdownView,
    allowed_sizes,
    code_view,
    count_view,
    fits_view,
    memory_view,
    rank_lab_view,
)
from peftlab.sites.quantisation import bits_per_weight

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

SLIDER = """
import ipywidgets
slider = ipywidgets.IntSlider(value=4, min=1, max=8)
shown = ipywidgets.HTML("16 parameters")
slider.observe(lambda change: setattr(shown, "value", f"{change['new'] ** 2} parameters"), "value")
slider.add_class("peftlab-size")
shown.add_class("peftlab-count")
ipywidgets.VBox([slider, shown])
"""


def number(text: str) -> int:
    """The first whole number in a text: '1,234 parameters' is 1234."""
    return int(re.search(r"\d[\d,]*", text)[0].replace(",", ""))


def test_the_machinery_on_a_slider_that_squares(open_lesson, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLIDER.strip())])
    nbformat.write(notebook, tmp_path / "squares.ipynb")
    lesson = open_lesson(tmp_path / "squares.ipynb")
    lesson.run_all()
    count = lesson.page.locator(".peftlab-count")
    expect(count).to_contain_text("16 parameters")
    handle = lesson.page.locator(".peftlab-size [role=slider]")
    handle.focus()
    handle.press("ArrowRight")
    expect(count).to_contain_text("25 parameters")


def test_a_failing_cell_fails_the_test(open_lesson, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        open_lesson(tmp_path / "broken.ipynb").run_all()


def test_only_what_a_panel_needs_runs():
    sources = [
        "import math",
        "a = 2",
        "a = 3",
        "unused = 1 / 0",
        "def f(x):\n    return math.sqrt(x * a)",
        "b = [f(c) for c in (1, 4)]",
        "b = b[:1]",
        "b[0] = 2",
        "c, d = 5, 6",
        "for c in b:\n    print(c)\npanel(b)",
        "panels = 1",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells.insert(9, nbformat.v4.new_markdown_cell("Move it."))
    kept = [cell.source for cell in cells_for(cells, ["panel"])]
    assert kept == [sources[0], sources[2], *sources[4:8], "Move it.", sources[9]]
    with pytest.raises(AssertionError, match="no cell calls slider"):
        cells_for(cells, ["panel", "slider"])


def test_lesson_06_counts_what_the_slider_says(open_lesson, record_property):
    """One press of an arrow key changes rank, count and figure."""
    lesson = open_lesson(NOTEBOOKS / "06_lora.ipynb", "count_explorer")
    lesson.run_all()
    count = lesson.page.locator(".peftlab-count").first
    handle = lesson.page.locator(".peftlab-size [role=slider]").first
    readout = lesson.page.locator(".peftlab-size .widget-readout").first
    before, r = number(count.inner_text()), number(readout.inner_text())
    handle.focus()
    handle.press("ArrowRight")
    expect(count).not_to_contain_text(f"{before:,} parameters")
    now = number(readout.inner_text())
    assert now > r
    model = lesson.page.locator(".peftlab-model select").first.input_value()
    on = lesson.page.locator(".peftlab-targets").first.locator("button.mod-active:visible")
    targets = [button.inner_text() for button in on.all()]
    assert now in allowed_sizes("LoRA", targets, model)
    assert number(count.inner_text()) == count_view("LoRA", now, targets, model).parameters
    if path := os.environ.get("PEFTLAB_SCREENSHOT"):
        handle.scroll_into_view_if_needed()
        lesson.page.screenshot(path=path)


def test_lesson_07_trains_anew_at_every_move(open_lesson):
    lesson = open_lesson(NOTEBOOKS / "07_lora_family.ipynb", "rank_lab")
    lesson.run_all()
    trains_anew_at_every_move(lesson.page)


def test_lesson_08_quantises_at_the_block_size_that_the_slider_says(open_lesson):
    """One press of an arrow key changes block size, bits, error and figure."""
    lesson = open_lesson(NOTEBOOKS / "08_qlora.ipynb", "code_explorer")
    lesson.run_all()
    answer = lesson.page.locator(".peftlab-code-answer").first
    handle = lesson.page.locator(".peftlab-code-block [role=slider]").first
    readout = lesson.page.locator(".peftlab-code-block .widget-readout").first
    assert number(readout.inner_text()) == 64
    expect(answer).to_contain_text(f"{bits_per_weight(64):.3f} bits")
    handle.focus()
    handle.press("ArrowRight")
    expect(answer).to_contain_text(f"blocks of 128: {bits_per_weight(128):.3f} bits")
    kind = lesson.page.locator(".peftlab-code-type select").first
    kind.select_option("int4")
    expect(answer).to_contain_text("int4, blocks of 128")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(192, 768, generator=generator)
    expect(answer).to_contain_text(code_view(drawn, 128, "int4").text)


def test_lesson_09_counts_what_the_bottleneck_says(open_lesson):
    """An arrow key changes the bottleneck, another the strength, and a button the method drawn."""
    panels = ("method_switch", "count_explorer", "strength_explorer")
    lesson = open_lesson(NOTEBOOKS / "09_adapters_and_scales.ipynb", *panels)
    lesson.run_all()
    switched = lesson.page.locator(".peftlab-switch-text").first
    expect(switched).to_contain_text("Houlsby: ")
    lesson.page.locator(".peftlab-switch button", has_text="BitFit").first.press("Enter")
    expect(switched).to_contain_text("BitFit: 12,864 parameters train")
    title = lesson.page.locator(".js-plotly-plot .gtitle").first
    expect(title).to_contain_text("BitFit on tiny-gpt: 12,864")
    drawing = lesson.page.locator(".js-plotly-plot .main-svg").first
    wide = drawing.bounding_box()["width"]
    lesson.page.set_viewport_size(
        {"width": 900, "height": 1000}
    )  # a drawing has a width of its own
    lesson.page.wait_for_timeout(1000)
    room, now = switched.locator("xpath=..").bounding_box(), drawing.bounding_box()
    assert now["width"] < wide and now["x"] + now["width"] <= room["x"] + room["width"] + 1
    lesson.page.set_viewport_size({"width": 1300, "height": 1000})
    count = lesson.page.locator(".peftlab-count").first
    handle = lesson.page.locator(".peftlab-size [role=slider]").first
    readout = lesson.page.locator(".peftlab-size .widget-readout").first
    before, m = number(count.inner_text()), number(readout.inner_text())
    handle.focus()
    handle.press("ArrowRight")
    expect(count).not_to_contain_text(f"{before:,} parameters")
    now = number(readout.inner_text())
    assert now > m
    view = count_view("Houlsby adapter", now, ("q", "v"), "bert-base")
    assert number(count.inner_text()) == view.parameters
    text = lesson.page.locator(".peftlab-strength-text").first
    expect(text).to_contain_text("strength 1: ")
    strength = lesson.page.locator(".peftlab-strength [role=slider]").first
    strength.focus()
    strength.press("ArrowRight")
    expect(text).to_contain_text("strength 1.25: Parallel adapter ")


def trains_anew_at_every_move(page):
    """In the rank lab an arrow key moves r, then alpha: the answer is that of a run with both."""
    answer = page.locator(".peftlab-rank-answer").first
    setting = {"r": 4, "alpha": 4}
    for name, options in (("r", LAB_RANKS), ("alpha", LAB_ALPHAS)):
        handle = page.locator(f".peftlab-rank-{name} [role=slider]").first
        handle.focus()
        handle.press("ArrowRight")
        setting[name] = options[options.index(setting[name]) + 1]
        view = rank_lab_view(**setting)
        expect(answer).to_have_text(view.text)
        title = page.locator(".gtitle", has_text=f"r = {setting['r']}, α = {setting['alpha']}")
        expect(title.first).to_be_visible()


def test_lesson_01_weighs_what_the_slider_says(open_lesson):
    """One press of an arrow key doubles the rows, and the page shows the closed form's bytes."""
    lesson = open_lesson(NOTEBOOKS / "01_full_fine_tuning.ipynb", "memory_explorer")
    lesson.run_all()
    answer = lesson.page.locator(".peftlab-memory-answer").first
    handle = lesson.page.locator(".peftlab-memory-batch [role=slider]").first
    before = memory_view("gpt2", 8, 128).text
    expect(answer).to_contain_text(before)
    handle.focus()
    handle.press("ArrowRight")
    expect(answer).not_to_contain_text(before)
    expect(answer).to_contain_text(memory_view("gpt2", 16, 128).text)


def test_lesson_14_says_what_fits_at_the_rows_that_the_slider_says(open_lesson):
    """One press of an arrow key doubles the rows; another model has its own peak."""
    lesson = open_lesson(NOTEBOOKS / "14_which_method.ipynb", "panels.fits")
    lesson.run_all()
    answer = lesson.page.locator(".peftlab-fits-answer").first
    handle = lesson.page.locator(".peftlab-fits-batch [role=slider]").first
    expect(answer).to_contain_text(fits_view("llama-3-8b", "QLoRA").text)
    handle.focus()
    handle.press("ArrowRight")
    expect(answer).to_contain_text(fits_view("llama-3-8b", "QLoRA", batch=2).text)
    lesson.page.locator(".peftlab-fits-kind select").first.select_option("LoRA")
    expect(answer).to_contain_text(fits_view("llama-3-8b", "LoRA", batch=2).text)


# Where a point stands on the page: of the method that it names, its mean and no single seed.
PLACE = """name => {
    const plot = document.querySelector('.js-plotly-plot');
    const trace = plot.data.find(t => t.name === name && t.marker?.size === 12);
    const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
    return [box.x + xaxis._offset + xaxis.d2p(trace.x[0]),
            box.y + yaxis._offset + yaxis.d2p(trace.y[0])];
}"""


def test_lesson_13_opens_the_point_that_is_clicked(open_lesson, tmp_path):
    source = "from peftlab import panels\n\npanels.showdown()"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, tmp_path / "showdown.ipynb")
    lesson = open_lesson(tmp_path / "showdown.ipynb")
    lesson.run_all()
    page = lesson.page
    opened = page.locator(".peftlab-showdown-opened select")
    expect(opened.locator("option:checked")).to_have_text("LoRA")
    plot = page.locator(".js-plotly-plot")
    expect(plot.locator(".annotation-text").last).to_contain_text("LoRA: its search")
    plot.scroll_into_view_if_needed()
    page.mouse.click(*page.evaluate(PLACE, "(IA)³"))
    expect(opened.locator("option:checked")).to_have_text("(IA)³")
    expect(plot.locator(".annotation-text").last).to_contain_text("(IA)³: its search")
    page.locator(".peftlab-showdown-score select").select_option("known facts")
    kept = ShowdownView("facts", "known_facts", "stored", "(IA)³")
    expect(plot.locator(".gtitle")).to_have_text(f"Not beaten: {', '.join(kept.front)}")


def test_a_film_moves_by_its_slider_and_plays(open_lesson, tmp_path):
    source = "import torch\nfrom peftlab import figures, panels\n\n"
    source += "panels.film(figures.weight_to_code(torch.linspace(-0.31, 0.17, 16), 3))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, tmp_path / "film.ipynb")
    lesson = open_lesson(tmp_path / "film.ipynb")
    lesson.run_all()
    page = lesson.page
    caption, title = page.locator(".peftlab-film-caption"), page.locator(".js-plotly-plot .gtitle")
    expect(caption).to_contain_text("1 of 6.")
    expect(title).to_have_text("A block of weights")
    handle = page.locator(".peftlab-film-picture [role=slider]")
    handle.focus()
    handle.press("ArrowRight")
    expect(caption).to_contain_text("2 of 6.")
    expect(title).to_have_text("Its scale")
    page.locator(".jupyter-widgets.widget-play button").first.click()
    expect(caption).to_contain_text("3 of 6.", timeout=10_000)
    if path := os.environ.get("PEFTLAB_SCREENSHOT"):
        page.screenshot(path=path)
