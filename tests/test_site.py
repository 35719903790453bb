"""The site: built whole, every link held, every figure drawn, and panels that agree with Python."""

import functools
import http.server
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from browser.fixtures import SECONDS, browser_page
from playwright.sync_api import Page, expect

import peftlab
from peftlab import accounting, memory, panels
from peftlab.bases.shapes import Shape, names
from peftlab.exercises import Exercise, collect, lesson_06
from peftlab.experiments import claims
from peftlab.experiments.run_notebooks import PNG, figure_in, outputs
from peftlab.panels import CHOICES
from peftlab.panels.codes import HashedWeight
from peftlab.sites.quantisation import QUANT_TYPES, quantise

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SETTINGS = 200
# How many of them are traced anew, which takes a third of a second each.
PREDICTED = int(os.environ.get("PEFTLAB_PREDICTED", 20))
ALIVE = {  # what a panel says of itself where it is stored
    "Count explorer": "count",
    "Memory explorer": "memory",
    "Code explorer": "codes",
    "Rank lab": "rank",
}

sys.path.append(str(ROOT / "notebooks/site"))
import docstrings  # noqa: E402
import lessons  # noqa: E402
import panels_data  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder with the site, built by the command that its own file names."""
    folder = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "notebooks/site/build.py", str(folder)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert not re.search("warning|error", said, re.IGNORECASE), said
    return folder


def pages_of(site: Path) -> list[Path]:
    """All pages; the theme leaves templates of its own among what pages load."""
    return [p for p in sorted(site.rglob("*.html")) if p.relative_to(site).parts[0] != "_static"]


class Parsed(HTMLParser):
    """The links, the names that links can reach, and what is loaded."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "preload"):
            self.loaded.append(found["href"])
        elif found.get("src"):
            self.loaded.append(found["src"])


@pytest.fixture(scope="module")
def parsed(site) -> dict[Path, Parsed]:
    return {path: Parsed(path) for path in pages_of(site)}


# --- pages -------------------------------------------------------------------------------------


def test_every_lesson_is_a_page_in_the_order_of_the_course(site, parsed):
    expected = [f"lessons/{path.stem}.html" for path in NOTEBOOKS]
    listed = [link for link in parsed[site / "index.html"].links if link in expected]
    assert list(dict.fromkeys(listed)) == expected
    for path, target in zip(NOTEBOOKS, expected, strict=True):
        text = (site / target).read_text(encoding="utf-8")
        assert f"<title>{lessons.title(path).split('?')[0]}" in text.replace("’", "'")


def test_every_link_and_anchor_holds(site, parsed):
    checked = 0
    for path, page in parsed.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            there = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            assert there.is_file(), f"{path.relative_to(site)}: {link}"
            anchor = unquote(parts.fragment)
            if anchor and there.suffix == ".html":
                assert anchor in parsed[there].anchors, f"{path.relative_to(site)}: {link}"
            checked += 1
    assert checked > 1000


def test_nothing_is_loaded_from_elsewhere(site, parsed):
    for path, page in parsed.items():
        outside = [name for name in page.loaded if urlsplit(name).scheme not in ("", "data")]
        assert not outside, path.relative_to(site)


def test_every_heading_of_a_lesson_has_a_link_of_its_own(site, parsed):
    for path in NOTEBOOKS:
        text = "\n".join(
            cell.source
            for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "markdown"
        )
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r"^#{1,6} ", text, re.MULTILINE)
        html = (site / f"lessons/{path.stem}.html").read_text(encoding="utf-8")
        assert len(re.findall('class="headerlink"', html)) == len(headings)


def test_the_reference_has_what_the_package_offers(site):
    text = (site / "genindex.html").read_text(encoding="utf-8")
    for name in peftlab.__all__:
        if name not in peftlab._ROOMS:
            assert f"#peftlab.{name}" in text, name
    for name in panels.__all__:
        if inspect.isclass(getattr(panels, name)) or inspect.isfunction(getattr(panels, name)):
            assert f"#peftlab.panels.{name}" in text, name


def test_the_page_of_claims_has_all_that_do_not_simply_hold(site):
    html = (site / "claims.html").read_text(encoding="utf-8")
    shown = [claim for claim in claims.load() if claim.verdict != "true"]
    for verdict in {claim.verdict for claim in shown}:
        count = sum(claim.verdict == verdict for claim in shown)
        assert html.count(f"<em>{verdict.capitalize()}:") == count
    assert all(f'id="claim-{claim.id.lower()}"' in html for claim in shown)
    assert not re.search(r"\bS\d-\d\d\b", re.sub("<[^>]*>", "", html))


def test_the_instructors_page_has_every_line_and_parameter(site):
    text = re.sub("<[^>]*>", "", (site / "instructors.html").read_text(encoding="utf-8"))
    for path in NOTEBOOKS:
        assert f"papermill --cwd notebooks notebooks/{path.name}" in text
    assert "sweep_lesson" in text
    assert lessons.parameters(NOTEBOOKS[6])["steps"] == 220
    assert "steps = 220" in text


def test_the_program_for_nbgrader_makes_an_assignment_that_can_be_passed(tmp_path, monkeypatch):
    """Of what it writes, every check fails on the empty cell and passes on the solution."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "source/lesson_06").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "notebooks/site/pages/instructors.md").read_text(encoding="utf-8")
    [program] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(program, {})
    made = nbformat.read("source/lesson_06/lora.ipynb", as_version=4)
    nbformat.validate(made)
    cells = {c.metadata["nbgrader"]["grade_id"]: c for c in made.cells if "nbgrader" in c.metadata}
    exercises = [e for e in collect(lesson_06) if isinstance(e, Exercise) and e.name in cells]
    assert len(exercises) >= 5 and len(cells) == 2 * len(exercises)
    for exercise in exercises:
        place, check = cells[exercise.name], cells[f"{exercise.name}_test"]
        assert place.metadata["nbgrader"]["solution"] and check.metadata["nbgrader"]["locked"]
        assert check.metadata["nbgrader"]["points"] == exercise.minutes
        assert "### BEGIN SOLUTION\n    ### END SOLUTION" in place.source
        names: dict = {"lesson": lesson_06, exercise.name: None}
        with pytest.raises(AssertionError, match="not attempted yet"):
            exec(check.source, names)
        exec(check.source, names | {exercise.name: exercise.solution})


def test_the_image_for_a_hub_installs_what_the_readme_does():
    page = (ROOT / "notebooks/site/pages/instructors.md").read_text(encoding="utf-8")
    [image] = re.findall(r"^```dockerfile\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [start] = re.findall(r"^pip install .*python -m peftlab start$", readme, re.MULTILINE)
    for command in start.split(" && ")[:2]:
        assert command in " ".join(image.replace("--no-cache-dir ", "").split())
    assert f"git clone --depth 1 {peftlab.REPOSITORY} " in image


def test_a_docstring_is_shown_as_it_is_meant():
    lines = [
        "Holds `x*` and *args; $a_b$ too.",
        "",
        "    h = W x",
        "Then:",
        "    >>> f(1)",
        "    2",
    ]
    assert docstrings.restructured(lines) == [
        r"Holds ``x*``\  and \*args; :math:`a_b`\  too.",
        "",
        ".. code-block:: text",
        "",
        "   h = W x",
        "",
        "Then:",
        "",
        ".. code-block:: python",
        "",
        "   >>> f(1)",
        "   2",
        "",
    ]


def test_a_link_to_a_file_goes_to_the_repository():
    text = "[a](06_lora.ipynb#x) [b](../data/README.md) [c](https://d.e) [f](#g)"
    there = f"{peftlab.REPOSITORY}/blob/main/data/README.md"
    assert lessons.linked(text) == text.replace("../data/README.md", there)


def test_the_workflow_publishes_what_the_command_builds():
    workflow = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text(encoding="utf-8"))
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert commands[-1] == "python notebooks/site/build.py build/site"
    [upload] = [s for s in build["steps"] if "upload-pages-artifact" in s.get("uses", "")]
    assert upload["with"]["path"] == "build/site"
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "[lab,site]" in commands[-2] and "site" in project["optional-dependencies"]


# --- in a browser ------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def opened(site) -> Iterator[tuple[Page, str, list[str]]]:
    """A page in Chromium without a network, the site's address, and what the page complains of."""
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    complaints: list[str] = []
    with browser_page() as (page, outside):
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
        try:
            yield page, f"http://127.0.0.1:{server.server_port}", complaints
        finally:
            server.shutdown()
        assert not outside, f"the pages asked other machines for {sorted(outside)}"


# Brings each figure and panel into view until it is drawn; returns what the page then has.
DRAWN = """async () => {
    const waiting = () => document.querySelector(
        '.peftlab-figure:not([data-drawn]), .peftlab-panel:not([data-drawn])');
    for (let tries = 0; waiting() && tries < 600; tries++) {
        waiting().scrollIntoView({behavior: 'instant'});
        await new Promise((resume) => setTimeout(resume, 50));
    }
    await globalThis.MathJax?.startup?.promise;
    const all = (where) => [...document.querySelectorAll(where)];
    const marks = ':is(.trace, .shapelayer path, .annotation, .heatmaplayer image, .cell-text)';
    return {
        figures: all('.peftlab-figure[data-drawn]').length,
        panels: all('.peftlab-panel[data-drawn]').map((panel) => [
            panel.dataset.panel, panel.querySelector('.peftlab-answer').textContent]),
        empty: all('.peftlab-figure, .peftlab-panel').filter(
            (place) => !place.querySelector(`svg.main-svg ${marks}`)).length,
        broken: all('img').filter((image) => image.complete && !image.naturalWidth)
            .map((image) => image.src),
        raw: all('span.math, div.math').filter(
            (formula) => !formula.querySelector('mjx-container')).length,
        faulty: all('[data-mjx-error], mjx-merror').map((formula) => formula.textContent),
        named: all('.peftlab-figure').every((figure) => figure.ariaLabel),
    };
}"""


# As the theme's own switch does it; what is faded from one colour to the other has to arrive.
DARK_OR_LIGHT = """async (mode) => {
    Object.assign(document.documentElement.dataset, {mode, theme: mode});
    await Promise.all(document.getAnimations().map((moving) => moving.finished));
}"""

# Style sheets are read again for one rule alone, an experimental one that is off by default, and
# what they import is asked for at a wrong address.
AXE = {"resultTypes": ["violations"], "preload": False}


def faults(page: Page) -> str:
    """What axe finds on the page: in light with all its rules on, in dark, where nothing but
    colours is different, with the rule for those."""
    told = []
    for mode, rules in {"light": {}, "dark": {"runOnly": ["color-contrast"]}}.items():
        page.evaluate(DARK_OR_LIGHT, mode)
        found = Axe().run(page, options=AXE | rules)
        assert found.response["passes"]  # it looked
        if found.violations_count:
            told.append(f"{mode}: {found.generate_report()}")
    page.evaluate(DARK_OR_LIGHT, "light")
    return "\n".join(told)


@pytest.mark.browser
def test_axe_sees_a_fault(opened):
    page, address, _ = opened
    page.goto(f"{address}/index.html")
    assert faults(page) == ""
    page.evaluate("document.querySelector('.bd-links summary').removeAttribute('aria-label')")
    page.add_style_tag(content="html[data-theme=dark] article p {color: #333}")
    light, _, dark = faults(page).partition("dark: ")
    assert "summary-name" in light and "color-contrast" in dark
    assert "color-contrast" not in light


@pytest.mark.browser
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_lesson_draws_its_figures_panels_and_formulas(opened, path):
    page, address, complaints = opened
    complaints.clear()
    page.goto(f"{address}/lessons/{path.stem}.html")
    found = page.evaluate(DRAWN)
    stored = list(outputs(nbformat.read(path, as_version=4)))
    pictured = [o.data for o in stored if figure_in(o.data) and PNG in o.data]
    alive = [d["text/plain"].split(": ", 1) for d in pictured if "text/plain" in d]
    expected = [[ALIVE[name], said] for name, said in alive if name in ALIVE]
    assert len(found["panels"]) == len(expected)
    for (kind, answer), (name, said) in zip(found["panels"], expected, strict=True):
        assert kind == name and said.endswith(answer)  # a name may stand before it
    assert found["figures"] == len(pictured) - len(expected) > 0
    assert found["empty"] == found["raw"] == 0 and found["named"]
    assert not found["broken"] and not found["faulty"] and not complaints
    assert faults(page) == ""


@pytest.mark.browser
def test_the_other_pages_are_without_fault(opened, site):
    page, address, complaints = opened
    complaints.clear()
    others = [path for path in pages_of(site) if path.parent.name != "lessons"]
    assert len(others) > 15
    for path in others:
        page.goto(f"{address}/{path.relative_to(site).as_posix()}")
        found = page.evaluate(DRAWN)
        assert len(found["panels"]) == (4 if path == site / "panels.html" else 0)
        assert found["empty"] == found["raw"] == 0
        assert not found["broken"] and not found["faulty"] and not complaints, path
        if path.parent.name != "reference" or path.stem in ("index", "methods"):  # one of a kind
            assert faults(page) == "", path


@pytest.mark.browser
def test_a_search_finds_the_lesson(opened):
    page, address, complaints = opened
    complaints.clear()
    page.goto(f"{address}/search.html?q=quantiles")
    hits = page.locator("#search-results li a")
    expect(hits.first).to_be_visible(timeout=20 * SECONDS)
    page.wait_for_timeout(500)
    assert any("08_qlora" in link.get_attribute("href") for link in hits.all())
    assert faults(page) == "" and not complaints


# --- panels ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panel_page(opened) -> Page:
    """The page of the four panels, with nothing moved."""
    page, address, _ = opened
    page.goto(f"{address}/panels.html")
    page.evaluate(DRAWN)
    return page


def asked(page: Page, panel: str, states: list[dict], answer: str) -> list:
    """What a panel's JavaScript makes of each state; `answer` is an expression of p and s."""
    code = f"async ([name, states]) => {{const p = await peftlab.panel(name);\
        return states.map((s) => ({answer}));}}"
    return page.evaluate(code, [panel, states])


def drawn_settings() -> list[dict]:
    """Settings of the count explorer: every method, models, sizes and targets by chance."""
    draw = random.Random(0)
    found = []
    while len(found) < SETTINGS:
        method, model = list(CHOICES)[len(found) % len(CHOICES)], draw.choice(names())
        has = Shape.named(model).targets
        targets = [t for t in has if draw.random() < 0.5] or [draw.choice(has)]
        size = draw.choice(panels.allowed_sizes(method, targets, model))
        found.append({"method": method, "model": model, "targets": targets, "size": size})
    return found


@pytest.mark.browser
def test_the_count_panel_is_count(panel_page):
    states = drawn_settings()
    assert len({json.dumps(state) for state in states}) > SETTINGS * 0.8
    answer = "[p.parameters(s), p.fileBytes(s), p.text(s), p.sizes(s), p.figure(s)]"
    found = asked(panel_page, "count", states, answer)
    for state, (trained, file_bytes, text, sizes, figure) in zip(states, found, strict=True):
        name, size, targets, model = (state[k] for k in ("method", "size", "targets", "model"))
        method = panels.build_method(name, size, targets)
        assert trained == accounting.count(method, model), state
        assert file_bytes == accounting.file_bytes(method, model), state
        assert tuple(sizes) == panels.allowed_sizes(name, targets, model)
        view = panels.count_view(name, size, targets, model)
        assert text == view.text
        wanted = json.loads(view.figure().to_json())
        assert figure["data"] == wanted["data"]
        assert figure["layout"]["title"] == wanted["layout"]["title"]
        assert figure["layout"]["yaxis"]["range"] == pytest.approx(
            wanted["layout"]["yaxis"]["range"]
        )


def step_settings() -> list[dict]:
    """Settings of the memory explorer, those of the small models first."""
    draw = random.Random(1)
    found = []
    for i in range(SETTINGS):
        small = ("tiny-gpt", "tiny-llama", "tiny-t5", "gpt2")
        model = draw.choice(small if i < SETTINGS // 2 else panels.memory_models())
        tokens = draw.choice(panels.memory_lengths(model))
        # One row is a case of its own: see `memory_view`.
        found.append({"model": model, "rows": draw.choice(panels.BATCHES[1:]), "tokens": tokens})
    return found


PARTS = ("weights", "aside", "optimiser", "gradients", "activations")


@pytest.mark.browser
def test_the_memory_panel_is_the_memory_explorer(panel_page):
    states = step_settings()
    found = asked(panel_page, "memory", states, "[p.steps(s), p.text(s), p.figure(s)]")
    for state, (steps, text, figure) in zip(states, found, strict=True):
        view = panels.memory_view(*state.values())
        assert {label: vars(step) for label, step in view.steps.items()} == steps
        assert text == view.text
        assert figure == json.loads(view.figure().to_json())


@pytest.mark.browser
def test_the_memory_panel_is_predict(panel_page):
    """To the byte, each setting for one method. PEFTLAB_PREDICTED=200 asks about all settings."""
    states = step_settings()[:PREDICTED]
    found = asked(panel_page, "memory", states, "p.steps(s)")
    labels = list(panels.BESIDE_FULL)
    for i, (state, steps) in enumerate(zip(states, found, strict=True)):
        label = labels[i % len(labels)]
        told = memory.predict(panels.BESIDE_FULL[label], *state.values())
        assert {part: steps[label][part] for part in PARTS} == {p: told.bytes(p) for p in PARTS}
        assert steps[label]["at_loss"] == max(told.most["forward"], told.most["backward"])
        assert steps[label]["at_update"] == told.most["step"]


@pytest.mark.browser
def test_the_codes_panel_is_the_code_explorer(panel_page):
    """The errors at every setting, and weights that come back bit for bit."""
    for name in ("a drawn normal", "layers.0.q"):
        values = panels_data.weights()[name]
        weight = HashedWeight(values)
        states = [
            {"weight": name, "type": kind, "block": block, "double": double}
            for kind in QUANT_TYPES
            for block in panels.block_sizes(values)
            for double in (False, True)
        ]
        found = asked(panel_page, "codes", states, "[p.error(s), p.bits(s), p.text(s)]")
        for state, (error, bits, text) in zip(states, found, strict=True):
            _, kind, block, double = state.values()
            view = panels.code_view(weight, block, kind, double, name)
            assert bits == view.bits
            assert error == pytest.approx(view.error, rel=1e-5)
            assert text == view.text or abs(1000 * view.error % 1 - 0.5) < 0.01
        some = [s for s in states if s["block"] == 64 and not s["double"]]
        unpacked = "[...p.decoded(p.weights(s.weight), s).slice(-4096)]"
        for state, back in zip(some, asked(panel_page, "codes", some, unpacked), strict=True):
            wanted = quantise(values, 64, state["type"], False).dequantise().flatten()[-4096:]
            assert np.array_equal(np.float32(back), wanted.numpy())


@pytest.mark.browser
def test_the_rank_panel_is_the_rank_lab(panel_page):
    states = [
        {"r": r, "alpha": alpha, "scale": scale}
        for r in panels.LAB_RANKS
        for alpha in panels.LAB_ALPHAS[r % 2 :: 2]
        for scale in panels.LAB_SCALES
    ]
    found = asked(panel_page, "rank", states, "[p.view(s), p.floor(s.r), p.text(s)]")
    for state, (view, floor, text) in zip(states, found, strict=True):
        wanted = panels.rank_lab_view(**state)
        assert view["loss"] == pytest.approx(wanted.loss, rel=1e-3, abs=1e-6), state
        assert view["learned"] == pytest.approx(wanted.learned, rel=1e-3, abs=1e-5), state
        assert floor == pytest.approx(wanted.floor)
        assert text == wanted.text


@pytest.mark.browser
def test_a_panel_answers_to_the_keyboard(opened):
    page, address, complaints = opened
    page.goto(f"{address}/panels.html")
    page.evaluate(DRAWN)
    count = page.locator(".peftlab-panel[data-panel=count]")
    answer = count.locator(".peftlab-answer")
    slider = count.get_by_label("rank r")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(answer).to_have_text(panels.count_view("LoRA", 16, ["q", "v"], "gpt2").text)
    assert slider.get_attribute("aria-valuetext") == "16"
    page.keyboard.press("ArrowRight")  # it kept the focus
    expect(answer).to_have_text(panels.count_view("LoRA", 32, ["q", "v"], "gpt2").text)
    count.get_by_label("up").check()
    expect(answer).to_have_text(panels.count_view("LoRA", 32, ["q", "v", "up"], "gpt2").text)
    count.get_by_label("model").select_option("bert-base")
    count.get_by_label("method").select_option("Houlsby adapter")
    expect(answer).to_have_text(panels.count_view("Houlsby adapter", 8, [], "bert-base").text)
    assert not complaints
