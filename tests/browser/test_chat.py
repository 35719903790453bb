"""A question is typed and a button pressed by keyboard; the page shows that adapter's answer."""

import nbformat
import pytest
from playwright.sync_api import expect

import peftlab
from peftlab.panels.chat import ALONE, reply

pytestmark = pytest.mark.browser

CHAT = """
import peftlab
from peftlab.panels.chat import chat
base = peftlab.load("tiny-gpt")
with peftlab.attach(base, peftlab.PrefixTuning(4), seed=1) as tuned:
    tuned.save("adapter")
chat(base, {"a prefix": "adapter"}, "Where does Mina live?", 8)
"""


def test_the_chat_answers_under_the_adapter_whose_button_is_pressed(open_lesson, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CHAT.strip())])
    nbformat.write(notebook, tmp_path / "chat.ipynb")
    base = peftlab.load("tiny-gpt")
    with peftlab.attach(base, peftlab.PrefixTuning(4), seed=1) as tuned:
        folder = tuned.save(tmp_path / "adapter")
    lesson = open_lesson(tmp_path / "chat.ipynb")
    lesson.run_all()
    box = lesson.page.locator(".peftlab-chat-question input").first
    box.fill("Who owns a cat?")
    log = lesson.page.locator(".peftlab-chat-log").first
    for name in ("a prefix", ALONE):
        button = lesson.page.locator("button.peftlab-chat-ask", has_text=name).first
        button.focus()
        button.press("Enter")
        turn = reply(base, "Who owns a cat?", name, {"a prefix": folder}, 8)
        expect(log.locator("p").first).to_contain_text(name)
        expect(log.locator("p").first).to_contain_text(turn.question)
        assert log.locator("pre").first.inner_text().split() == turn.answer.split()
