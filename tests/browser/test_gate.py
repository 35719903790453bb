"""The keyboard moves both sliders of the gate lab in a real JupyterLab, and the points move."""

import nbformat
import pytest
from browser.fixtures import soon
from playwright.sync_api import expect

from peftlab.panels import gate_view

pytestmark = pytest.mark.browser

PANEL = """
import peftlab as pl

pl.setup()
pl.panels.gate_lab()
"""
POINTS = """node => [...node.querySelectorAll('.scatterlayer .point')]
    .map(p => p.getAttribute('transform'))"""


def test_each_slider_moves_its_point_and_no_other(open_lesson, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PANEL.strip())])
    nbformat.write(notebook, tmp_path / "gate.ipynb")
    lesson = open_lesson(tmp_path / "gate.ipynb")
    lesson.run_all()
    page = lesson.page
    plot, text = page.locator(".js-plotly-plot"), page.locator(".peftlab-gate-text")
    expect(plot.locator(".scatterlayer .point")).to_have_count(5)
    expect(text).to_have_text(gate_view().text)
    # The points: two words, the text alone, the prefix, the output.
    for name, view, moved in (
        ("prefix-sum", gate_view(8), [4]),
        ("split", gate_view(8, 0.75), [2, 4]),
    ):
        before = plot.evaluate(POINTS)
        handle = page.locator(f".peftlab-gate-{name} [role=slider]")
        handle.focus()
        handle.press("ArrowRight")
        expect(text).to_have_text(view.text)
        expect(plot.locator(".gtitle")).to_contain_text(f"λ = {view.gate:.2f}")

        def other(before=before) -> list[int]:
            after = plot.evaluate(POINTS)
            return [i for i in range(5) if after[i] != before[i]]

        assert soon(page, other, lambda now, moved=moved: now == moved) == moved, name
