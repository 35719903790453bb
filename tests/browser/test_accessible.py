"""Panels for those who hear the page, or move by keyboard, or ask for less motion.

One page has every kind of panel. Of its page only the outputs are looked at: the menus, tool bars
and cells around them are JupyterLab's own.
"""

import inspect
import re

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser.fixtures import soon
from playwright.sync_api import Page, expect

from peftlab import panels
from peftlab.panels.film import MILLISECONDS

pytestmark = pytest.mark.browser

SETUP = """import numpy as np
import pandas as pd
import torch
import peftlab as pl
from peftlab import figures, panels

pl.setup()
base = pl.load("tiny-gpt")
texts = ["Mina lives in Rome."] * 4
maps = np.full((2, 2, 3, 5), 0.2, dtype=np.float32)
scene = panels.AttentionScene(maps, maps, 2, tuple("abc"), ("P1", "P2", *"abc"))
history = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.5]})
weights = torch.linspace(-0.31, 0.17, 16)"""
PANELS = {  # the class, and the cell that shows one
    "CountExplorer": "panels.count_explorer()",
    "MemoryExplorer": "panels.memory_explorer('gpt2')",
    "RankLab": "panels.rank_lab()",
    "SoftPromptLab": "panels.soft_prompt_lab()",
    "GateLab": "panels.gate_lab()",
    "CodeExplorer": "panels.code_explorer({'w': torch.randn(64, 64)})",
    "StrengthExplorer": "panels.strength_explorer({'LoRA': {0.0: 3.0, 0.5: 2.0, 1.0: 1.0}}, 0.5)",
    "PruningLab": "panels.pruning_lab(base, texts, texts)",
    "AttentionExplorer": "panels.attention_explorer({2: [scene] * 2, 4: [scene] * 2})",
    "MethodSwitch": "panels.method_switch(base, {'LoRA': pl.LoRA(r=2), 'BitFit': pl.BitFit()})",
    "LiveTrainer": "panels.live_trainer(base, history=history)",
    "Chat": "panels.chat(base, {}, 'Where does Mina live?', 2)",
    "Film": "panels.film(figures.weight_to_code(weights, 3))",
    "AdviserPanel": "panels.which_method()",
    "FitsPanel": "panels.fits()",
    "Showdown": "panels.showdown()",
}
OUTPUT = ".jp-OutputArea-output"
# What a learner moves, in the order of the page, by how it is called and what it says.
CONTROLS = f"""() => [...document.querySelectorAll('{OUTPUT}')].map(output => [...
    output.querySelectorAll('select, input, textarea, [role=slider], [role=textbox], button')]
    .filter(control => control.checkVisibility() && !control.closest('.modebar')))"""
SLIDERS = f"""[...document.querySelectorAll('{OUTPUT} [role=slider]')].map(handle => [
    handle.closest('.widget-slider').querySelector('.widget-label').textContent.trim(),
    handle.closest('.widget-slider').querySelector('.widget-readout').textContent.trim(),
    handle.getAttribute('aria-label'), handle.getAttribute('aria-valuetext')])"""


def opened(open_lesson, folder, *names: str, before=lambda page: None):
    """The page of a notebook with these panels, drawn."""
    sources = [SETUP, *(PANELS[name] for name in names)]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "panels.ipynb")
    lesson = open_lesson(folder / "panels.ipynb", before=before)
    lesson.run_all()
    drawn = len(set(names) - {"Chat"})
    expect(lesson.page.locator(".js-plotly-plot .gtitle")).to_have_count(drawn, timeout=60_000)
    return lesson.page


def violations(page: Page) -> str:
    """What axe finds in the outputs, all its rules on."""
    found = Axe().run(page, {"include": [[OUTPUT]]})
    assert found.response["passes"]  # it looked
    return found.generate_report() if found.violations_count else ""


def choose_theme(page: Page, name: str) -> None:
    """Take one of JupyterLab's themes from its menu."""
    page.locator(".lm-MenuBar-itemLabel", has_text="Settings").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Theme").first.click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$")).first.click()
    light = str(name == "JupyterLab Light").lower()
    expect(page.locator("body")).to_have_attribute("data-jp-theme-light", light)
    page.wait_for_timeout(1000)  # its colours are faded in


def test_axe_finds_nothing_in_any_panel(open_lesson, tmp_path):
    """In the light theme and in the dark one; sliders say their name and their value."""
    kinds = {name for name, kind in vars(panels).items() if inspect.isclass(kind)}
    assert set(PANELS) == {
        name for name in kinds if issubclass(getattr(panels, name), panels.Panel)
    } - {"Panel"}
    page = opened(open_lesson, tmp_path, *PANELS)
    sliders = page.evaluate(SLIDERS)
    assert len(sliders) >= 20
    for label, readout, name, value in sliders:
        assert (name, value) == (label, readout) and name and value
    assert violations(page) == ""
    try:
        choose_theme(page, "JupyterLab Dark")
        assert violations(page) == ""
    finally:  # the other tests have the same JupyterLab
        choose_theme(page, "JupyterLab Light")


# Which of the controls of one output has the focus; −1 once it has left them.
FOCUSED = f"at => ({CONTROLS})()[at].indexOf(document.activeElement)"


def test_every_control_is_reached_and_moved_by_keyboard(open_lesson, tmp_path):
    """Tab goes through a panel's controls in the order of the page; arrows move each slider."""
    page = opened(open_lesson, tmp_path, *PANELS)
    counts = page.evaluate(f"({CONTROLS})().map(controls => controls.length)")
    reached = 0
    for at, count in enumerate(counts):
        if not count:
            continue
        page.evaluate(f"at => ({CONTROLS})()[at][0].focus()", at)
        enabled = page.evaluate(f"at => ({CONTROLS})()[at].map(c => !c.disabled)", at)
        for wanted in [i for i, works in enumerate(enabled) if works]:
            assert page.evaluate(FOCUSED, at) == wanted, (at, wanted)
            page.keyboard.press("Tab")
            reached += 1
        assert page.evaluate(FOCUSED, at) == -1  # and out again
    assert reached > 80
    for handle in page.locator(f"{OUTPUT} [role=slider]").all():
        before = handle.get_attribute("aria-valuetext")
        last = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        handle.press("ArrowLeft" if last else "ArrowRight")
        expect(handle).not_to_have_attribute("aria-valuetext", before)

    def untrue() -> list:
        return [slider for slider in page.evaluate(SLIDERS) if slider[:2] != slider[2:]]

    assert soon(page, untrue, lambda sliders: not sliders) == []


def test_a_button_that_stays_down_says_so(open_lesson, tmp_path):
    page = opened(open_lesson, tmp_path, "CountExplorer", "MethodSwitch")
    k = page.locator(".peftlab-targets").get_by_role("button", name="k", exact=True)
    expect(k).to_have_attribute("aria-pressed", "false")
    k.press("Enter")
    expect(k).to_have_attribute("aria-pressed", "true")
    switch = page.get_by_role("group", name="method")
    switch.get_by_role("button", name="BitFit").press("Enter")
    expect(switch.get_by_role("button", pressed=True)).to_have_text("BitFit")


def test_a_film_plays_and_stops_by_keyboard(open_lesson, tmp_path):
    page = opened(open_lesson, tmp_path, "Film")
    caption = page.locator(".peftlab-film-caption")
    page.get_by_role("button", name="play", exact=True).press("Enter")
    expect(caption).to_contain_text("2 of 6.", timeout=10_000)
    page.get_by_role("button", name="pause", exact=True).press("Enter")
    stopped = caption.text_content()
    page.wait_for_timeout(2 * MILLISECONDS)
    assert caption.text_content() == stopped
    page.get_by_role("button", name="back to the first picture").press("Enter")
    expect(caption).to_contain_text("1 of 6.")
    figure = page.get_by_role("figure")
    expect(figure).to_have_attribute("aria-label", re.compile("neighbours|block|weights"))


# From here on, each transition that starts inside an output is counted.
COUNTED = f"""document.querySelectorAll('{OUTPUT}').forEach(output =>
    output.addEventListener('transitionrun', () => window.moved = (window.moved || 0) + 1))"""


@pytest.mark.parametrize("wish", ["no-preference", "reduce"])
def test_who_wants_less_motion_gets_a_film_picture_by_picture(open_lesson, tmp_path, wish):
    """Nothing plays, and a slider that is clicked far away does not glide there."""
    page = opened(
        open_lesson, tmp_path, "Film", before=lambda page: page.emulate_media(reduced_motion=wish)
    )
    play = page.get_by_role("button", name="play", exact=True)
    expect(play).to_be_visible(visible=wish == "no-preference")
    track = page.locator(".peftlab-film-picture .noUi-target")
    box = track.bounding_box()
    page.evaluate(COUNTED)
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    expect(page.locator(".peftlab-film-caption")).to_contain_text("6 of 6.")
    moved = page.evaluate("window.moved || 0")
    assert moved == 0 if wish == "reduce" else moved > 0
