"""Panels draw every trace, also when messages between kernel and page are lost.

One page has the panels of several lessons, at the learner's own settings. A message is lost by a
hand between the page and the server, which reads the messages and keeps some back.
"""

import json
from functools import partial

import nbformat
import pytest
from browser.fixtures import soon
from browser.openings import busy
from playwright.sync_api import Page, WebSocketRoute, expect

pytestmark = pytest.mark.browser

PANELS = {  # the cell, the class of a slider, and what the slider moves
    "ranks": ("panels.rank_lab()", "peftlab-rank-r"),
    "count": ("panels.count_explorer()", "peftlab-size"),
    "memory": ("panels.memory_explorer('gpt2')", "peftlab-memory-batch"),
    "codes": ("panels.code_explorer({'w': torch.randn(64, 64)})", "peftlab-code-block"),
}


def content(message: bytes | str) -> tuple[str, dict]:
    """The type and the content of a kernel's message, in the binary protocol or in JSON."""
    if isinstance(message, str):
        told = json.loads(message)
        return told["header"]["msg_type"], told["content"]
    count = int.from_bytes(message[:8], "little")
    ends = [int.from_bytes(message[8 * i : 8 * i + 8], "little") for i in range(1, count + 1)]
    parts = [message[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    return json.loads(parts[1])["msg_type"], json.loads(parts[4])


class Lossy:
    """Loses the script, and the next update of every figure, once for each `arm`."""

    def __init__(self, page: Page):
        self.plots: set[str] = set()
        self.due: set[str] = set()
        self.lost: list[str] = []
        page.route_web_socket("**/api/kernels/**", self.between)

    def between(self, page: WebSocketRoute) -> None:
        server = page.connect_to_server()
        page.on_message(server.send)
        server.on_message(lambda message: None if self.keeps_back(message) else page.send(message))

    def arm(self) -> None:
        self.due, self.lost = set(self.plots), []

    def keeps_back(self, message: bytes | str) -> bool:
        kind, told = content(message)
        if kind == "comm_open":
            state = told["data"].get("state", {})
            if "figure" in state:
                self.plots.add(told["comm_id"])
                self.due.add(told["comm_id"])
            elif state.get("_model_name") == "WidgetModel":
                self.lost.append("script")
                return True
        elif kind == "comm_msg" and told["comm_id"] in self.due:
            if told["data"]["method"] == "update":
                self.due.remove(told["comm_id"])
                self.lost.append("update")
                return True
        return False


# How many traces each figure of the page shows; 0 where not a mark is drawn.
DRAWN = """[...document.querySelectorAll('.js-plotly-plot')].map(plot =>
    plot.querySelector('.barlayer path, .scatterlayer path, .heatmaplayer image')
        ? plot.data.length : 0)"""


def title(page: Page, at: int) -> str:
    return page.locator(".js-plotly-plot").nth(at).locator(".gtitle").text_content()


def open_panels(open_lesson, tmp_path, before):
    cells = ["import torch\nimport peftlab as pl\nfrom peftlab import panels\n\npl.setup()"]
    cells += [cell for cell, _ in PANELS.values()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "panels.ipynb")
    return open_lesson(tmp_path / "panels.ipynb", before=before)


def test_every_panel_is_right_though_messages_were_lost(open_lesson, tmp_path):
    """On a busy machine the script is lost, each figure's first update, and one more at a move;
    the page asks for them."""
    lines = []
    with busy(2):
        lesson = open_panels(open_lesson, tmp_path, lambda page: lines.append(Lossy(page)))
        lesson.run_all()
        page, line = lesson.page, lines[0]
        expect(page.locator(".js-plotly-plot .gtitle")).to_have_count(len(PANELS), timeout=30_000)
        page.wait_for_function(f"{DRAWN}.every(traces => traces > 0)")
        assert "script" in line.lost
        first = page.evaluate(DRAWN)
        line.arm()
        for at, (_, slider) in enumerate(PANELS.values()):
            before, plot = title(page, at), page.locator(".js-plotly-plot").nth(at)
            handle = page.locator(f".{slider} [role=slider]").first
            handle.focus()
            handle.press("ArrowRight")
            expect(plot.locator(".gtitle")).not_to_have_text(before, timeout=20_000)
            once = title(page, at)
            handle.press("ArrowRight")
            expect(plot.locator(".gtitle")).not_to_have_text(once)
        drawn = partial(page.evaluate, DRAWN)
        assert soon(page, drawn, lambda traces: traces == first) == first
        assert line.lost == ["update"] * len(PANELS)
