"""The adviser's panel: constraints on the left hand, the flow and its answer below."""

from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab import figures
from peftlab.bases.shapes import Shape
from peftlab.memory.adviser import GOALS, RECIPES, SERVERS, SKILLS, TASKS, Advice, Need, advise
from peftlab.memory.adviser.evidence import size
from peftlab.memory.calculator import GPUS, MODELS
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot

TOGETHER, EXAMPLES = (1, 2, 5, 20, 100), (10, 100, 1000, 10_000, 100_000)
MEGABYTES = {"any": None, "100 MB": 100, "10 MB": 10, "1 MB": 1, "0.1 MB": 0.1}
OPTIONS = {  # of a choice: what is asked, and the answers
    "model": ("model", MODELS),
    "task": ("task", TASKS),
    "gpu": ("GPU that trains it", tuple(GPUS)),
    "together": ("tasks in one batch", TOGETHER),
    "megabytes": ("a task's file, at most", tuple(MEGABYTES.items())),
    "examples": ("examples", EXAMPLES),
    "skill": ("what is new", SKILLS),
    "serve": ("what serves it", SERVERS),
    "goal": ("what counts", GOALS),
}
TICKS = {
    "four_bits": "the base may be in four bits",
    "weights_may_change": "the served weights may change",
    "no_delay": "an answer may take no longer",
    "keep": "nothing may be forgotten",
}


def outcome(advice: Advice) -> str:
    """The advice in one line."""
    words = {
        "method": f"Take {advice.method}",
        "not enough evidence": f"Not enough evidence; begin with {advice.method}",
        "nothing fits": "Nothing fits",
    }
    return f"{words[advice.outcome]}: {advice.need.model}, {advice.need.task}"


def flow_figure(advice: Advice, dark: bool | None = None) -> go.Figure:
    """The path to an advice, drawn: lanes that come through, and where the others end."""
    steps = [(step.question, step.out) for step in advice.path]
    return figures.decision_lanes(steps, list(RECIPES), advice.method, outcome(advice), dark)


def advice_html(advice: Advice) -> str:
    """The answer at the end of the path: why, what to relax, what was recorded, code, defaults."""
    parts = [f"<p style='font-size:1.25em'><b>{escape(outcome(advice))}</b></p>"]
    parts += [f"<p>{escape(why)}</p>" for why in advice.why]
    if advice.relax:
        changes = "".join(f"<li>{escape(change)}</li>" for change in advice.relax)
        parts.append(f"<p>The least that has to be answered otherwise:</p><ul>{changes}</ul>")
    if advice.recipe:
        parts.append(f"<pre>{escape(advice.code)}</pre>")
        parts.append(_table([(d.setting, d.value, d.reason) for d in advice.recipe.defaults]))
        parts.append(f"<p>If it fails: {escape(advice.recipe.otherwise)}.</p>")
    parts.append(_recorded(advice))
    return "".join(parts)


def _recorded(advice: Advice) -> str:
    if not advice.rows:
        return "<p>Recorded comparisons: none, so this rests on what is exact.</p>"
    own = Shape.named(advice.need.model).parameters()
    rows = []
    for row in advice.rows:
        times = own / size(row)
        low, high = row["interval"]
        better = ", ".join(row["better_than"]) or "none"
        about = (
            f"{row['label']} on {row['task']}, {row['base']} (yours has {times:.1f} times as many)"
        )
        rows.append((about, f"n = {row['n']}, {low:g} to {high:g}", f"better than {better}"))
    return "<p>Recorded comparisons:</p>" + _table(rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    cells = "".join(
        "<tr>" + "".join(f"<td style='padding-right:1em'>{escape(cell)}</td>" for cell in row)
        + "</tr>" for row in rows
    )  # fmt: skip
    return f"<table>{cells}</table>"


def _place(options: Sequence, value) -> int:
    """Where a value stands among the options; a value of None would choose nothing."""
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    return values.index(value)


class AdviserPanel(Panel):
    """See `which_method`."""

    def __init__(self, need: Need):
        wide = dict(style={"description_width": "150px"}, layout=widgets.Layout(width="400px"))
        self.advice = advise(need)
        self.choices = {
            name: widgets.Dropdown(
                options=options,
                index=_place(options, getattr(need, name)),
                description=words,
                **wide,
            )
            for name, (words, options) in OPTIONS.items()
        }
        self.choices |= {
            name: widgets.Checkbox(value=getattr(need, name), description=words, indent=False)
            for name, words in TICKS.items()
        }
        for name, control in self.choices.items():
            control.add_class(f"peftlab-adviser-{name}")
            control.observe(self._changed, "value")
        self.answer = widgets.HTML()
        self.answer.add_class("peftlab-adviser-answer")
        self.plot = Plot(flow_figure(self.advice))
        grid = widgets.Layout(grid_template_columns="410px 410px", grid_gap="2px 12px")
        asked = widgets.GridBox(list(self.choices.values()), layout=grid)
        self.widget = widgets.VBox([asked, self.plot, self.answer])
        self._shown()

    def _changed(self, _=None) -> None:
        given = {name: control.value for name, control in self.choices.items()}
        self.answer.value = "steps of this model are traced first, which may last a minute ..."
        self.advice = advise(Need(**given))
        self._shown()

    def _shown(self) -> None:
        self.answer.value = advice_html(self.advice)
        self.plot.draw(flow_figure(self.advice))

    def static(self) -> go.Figure:
        return flow_figure(self.advice)

    def describe(self) -> str:
        return f"Adviser: {outcome(self.advice)}"


def which_method(**need) -> AdviserPanel:
    """A panel that asks for your constraints and leads to a method, or says why none is left."""
    return AdviserPanel(Need(**need))
