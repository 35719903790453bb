"""A keyboard moves the sparsity slider of lesson 10 in a real JupyterLab: the loss is read anew."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from peftlab.bases import load
from peftlab.experiments.sweep_pruning import world_texts
from peftlab.panels import pruning_view

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_lesson_10_prunes_what_the_slider_says(open_lesson):
    """One press of an arrow key prunes more, and the text says the loss."""
    lesson = open_lesson(NOTEBOOKS / "10_pruning.ipynb", "pruning_lab")
    lesson.run_all()
    text = lesson.page.locator(".peftlab-pruning-text").first
    expect(text).to_contain_text("50% gone of the weights, by magnitude")
    handle = lesson.page.locator(".peftlab-pruning-share [role=slider]").first
    handle.focus()
    handle.press("ArrowRight")
    expect(text).to_contain_text("60% gone of the weights, by magnitude", timeout=30_000)
    texts = world_texts(24, "lesson")[:12]
    view = pruning_view(load("tiny-gpt"), texts, "weights, by magnitude", 0.6)
    shown = float(re.search(r"loss (\d+\.\d+)", text.inner_text())[1])
    assert abs(shown - view.loss) <= 0.011  # two digits are shown, of a loss rounded to three
    expect(text).to_contain_text(f"{view.zeros:,} zeros")
