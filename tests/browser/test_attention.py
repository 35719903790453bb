"""The keyboard moves each slider of the attention explorer in a real JupyterLab, and it redraws."""

import re

import nbformat
import pytest
from browser.fixtures import soon
from playwright.sync_api import Locator, expect

pytestmark = pytest.mark.browser

# A prefix that nobody trained: noise takes the place of training, so that this takes no time.
PANEL = """
import peftlab as pl

pl.setup()
base = pl.load("tiny-gpt")
scenes = {}
for length in (2, 5):
    with pl.attach(base, pl.PrefixTuning(length, init="random")) as tuned:
        texts = ["in: d a c b", "in: z y"]
        before = [pl.probes.attention_map(tuned, text) for text in texts]
        for tensor in tuned.trainable.values():
            tensor.data.mul_(-1)
        after = [pl.probes.attention_map(tuned, text) for text in texts]
    pairs = zip(before, after, strict=True)
    scenes[length] = [pl.panels.attention_scene(*pair) for pair in pairs]
pl.panels.attention_explorer(scenes, length=2)
"""


def picture(plot: Locator) -> dict:
    """What the page has drawn: the text on the axes, the coloured squares, the bars."""
    return plot.evaluate(
        """node => ({
            axes: [...node.querySelectorAll('.xtick text, .x2tick text, .ytick text')]
                .map(t => t.textContent).join(' '),
            squares: [...node.querySelectorAll('.heatmaplayer image')]
                .map(i => i.getAttribute('href') || i.getAttribute('xlink:href')).join(' '),
            bars: [...node.querySelectorAll('.barlayer path')].map(p => p.getAttribute('d'))
                .join(' '),
            title: node.querySelector('.gtitle').textContent,
        })"""
    )


@pytest.fixture
def explorer(open_lesson, tmp_path):
    """A page with the panel alone."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PANEL.strip())])
    nbformat.write(notebook, tmp_path / "attention.ipynb")
    lesson = open_lesson(tmp_path / "attention.ipynb")
    lesson.run_all()
    expect(lesson.page.locator(".js-plotly-plot .barlayer path").first).to_be_attached()
    return lesson.page


def test_each_of_the_four_sliders_changes_the_picture(explorer):
    plot, text = explorer.locator(".js-plotly-plot"), explorer.locator(".peftlab-attention-text")
    moves = (
        ("layer", "layer 2, head 1", ("squares", "bars", "title")),
        ("head", "layer 2, head 2", ("squares", "bars", "title")),
        ("length", "prefix of 5", ("squares", "bars", "title", "axes")),
        ("example", "layer 2, head 2", ("squares", "bars", "title", "axes")),
    )
    for name, words, parts in moves:
        before, said = picture(plot), text.inner_text()
        assert before["squares"] and before["bars"]
        handle = explorer.locator(f".peftlab-attention-{name} [role=slider]")
        handle.focus()
        handle.press("ArrowRight")
        expect(text).not_to_have_text(said)
        expect(text).to_contain_text(words)
        title = text.inner_text()
        expect(plot.locator(".gtitle")).to_have_text(re.compile(re.escape(title[1:])))

        def same(before=before, parts=parts) -> list[str]:
            after = picture(plot)
            return [part for part in parts if after[part] == before[part]]

        assert soon(explorer, same, lambda parts: not parts) == [], f"{name} left them as they were"
    assert len(explorer.locator(".js-plotly-plot").all()) == 1  # one figure, updated
    said = explorer.get_by_role("figure", name=text.inner_text()[1:])  # what a screen reader says
    expect(said).to_be_visible()
