"""A chat with one base under several adapters: a pure function, and a thin widget around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab.bases import Base, listed
from peftlab.panels.panel import Panel
from peftlab.tuned import attach

ALONE = "base alone"
LONGEST = 400  # characters of a question


@dataclass(frozen=True)
class Turn:
    """One question and the answer of the base under one adapter."""

    question: str
    adapter: str
    answer: str


def reply(
    base: Base,
    question: str,
    adapter: str,
    adapters: Mapping[str, str | Path],
    max_new_tokens: int = 48,
) -> Turn:
    """What the base answers with the adapter of this name, or with none for `ALONE`.

    `adapters` maps a name to the folder that `tuned.save` wrote. The adapter is attached for the
    answer and taken off again, also after an error. Raises ValueError for an unknown name and for a
    question that is empty or too long.
    """
    [question] = listed([question], "question")
    question = " ".join(question.split())
    if not question or len(question) > LONGEST:
        raise ValueError(f"a question has 1 to {LONGEST} characters, this one {len(question)}")
    if adapter != ALONE and adapter not in adapters:
        raise ValueError(f"no adapter {adapter!r}: there are {', '.join((ALONE, *adapters))}")
    prompt = [f"{question}\n"]
    if adapter == ALONE:
        [answer] = base.generate(prompt, max_new_tokens)
    else:
        with attach(base, adapters[adapter]) as tuned:
            [answer] = tuned.generate(prompt, max_new_tokens)
    return Turn(question, adapter, answer.strip())


def transcript(turns: list[Turn]) -> go.Figure:
    """The turns as a table, the latest last: what stands for the chat where no kernel runs."""
    cells = [
        [turn.question for turn in turns],
        [turn.adapter for turn in turns],
        [escape(turn.answer).replace("\n", "<br>") for turn in turns],
    ]
    title = f"{len(turns)} answers of one base: the adapter that is on decides"
    lines = sum(max(2, turn.answer.count("\n") + 1 + len(turn.answer) // 60) for turn in turns)
    table = go.Table(
        columnwidth=[30, 20, 50],
        header=dict(values=["question", "adapter", "answer"], align="left"),
        cells=dict(values=cells, align="left", height=22),
    )
    return go.Figure(table, layout=dict(title_text=title, height=140 + 22 * lines))


class Chat(Panel):
    """See `chat`."""

    def __init__(self, base, adapters, question: str, max_new_tokens: int):
        self.base, self.adapters = base, dict(adapters)
        self.max_new_tokens, self.turns = max_new_tokens, []
        self.question = widgets.Text(
            value=question, description="question", layout=widgets.Layout(width="560px")
        )
        self.question.add_class("peftlab-chat-question")
        self.buttons = {name: widgets.Button(description=name) for name in (ALONE, *self.adapters)}
        for name, button in self.buttons.items():
            button.layout.width = "auto"
            button.add_class("peftlab-chat-ask")
            button.on_click(lambda _, name=name: self.ask(name))
        self.log, self.status = widgets.HTML(), widgets.HTML()
        self.log.add_class("peftlab-chat-log")
        self.status.add_class("peftlab-chat-status")
        row = widgets.HBox([widgets.Label("ask"), *self.buttons.values()])
        self.widget = widgets.VBox([self.question, row, self.status, self.log])

    def ask(self, adapter: str) -> None:
        """Put the question in the box to one adapter, or say what is wrong with it."""
        self.status.value = f"{escape(adapter)} is answering"
        for button in self.buttons.values():
            button.disabled = True
        try:
            turn = reply(
                self.base, self.question.value, adapter, self.adapters, self.max_new_tokens
            )
            self.turns.append(turn)
            self.status.value = ""
        except (ValueError, RuntimeError) as error:
            self.status.value = escape(str(error))
        finally:
            for button in self.buttons.values():
                button.disabled = False
        self.log.value = "".join(
            f"<p><b>{escape(turn.question)}</b> &nbsp; <i>{escape(turn.adapter)}</i></p>"
            f"<pre>{escape(turn.answer)}</pre>"
            for turn in reversed(self.turns)
        )

    def static(self) -> go.Figure:
        return transcript(self.turns)

    def describe(self) -> str:
        said = "; ".join(f"{turn.adapter}: {turn.answer!r}" for turn in self.turns)
        return f"Chat: {said or 'nothing asked yet'}"


def chat(
    base: Base,
    adapters: Mapping[str, str | Path],
    question: str,
    max_new_tokens: int = 48,
) -> Chat:
    """A text box, and a button for each adapter and for the base alone.

    `adapters` maps a name to a folder. The first question is put to all of them at once.
    """
    panel = Chat(base, adapters, question, max_new_tokens)
    for name in panel.buttons:
        panel.ask(name)
    return panel
