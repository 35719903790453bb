"""The showdown's panel: score against cost, and behind each point its search, curve and answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go

from peftlab import figures
from peftlab.bases.data import data_path
from peftlab.bench import results
from peftlab.bench.results import Result
from peftlab.figures.showdown import WORDS
from peftlab.figures.style import GREY, figure, styles
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot
from peftlab.tasks import load

COSTS = ("stored", "trained", "file_bytes")
SHOWN = 3  # answers


@lru_cache(maxsize=8)
def _read(name: str) -> Result:
    return results.read(name)


def _offered(values) -> list[tuple[str, str]]:
    """Values as a menu shows them."""
    return [(value.replace("_", " "), value) for value in values]


@dataclass(frozen=True)
class ShowdownView:
    """What the panel shows for one choice; `peaks` are bytes by label, None where not computed."""

    name: str
    score: str
    cost: str
    opened: str
    peaks: Mapping[str, int] | None = field(default=None, compare=False)

    def __post_init__(self):
        allowed = {
            "name": results.names(),
            "score": self.result.scores,
            "cost": (*COSTS, *(["peak"] if self.peaks else [])),
            "opened": list(self.result.facts["entries"]),
        }
        for what, values in allowed.items():
            if getattr(self, what) not in values:
                given = getattr(self, what)
                raise ValueError(f"{what}={given!r}: allowed is {', '.join(values)}")

    @property
    def result(self) -> Result:
        if self.name not in results.names():
            known = ", ".join(results.names())
            raise ValueError(f"no contest {self.name!r} is recorded; there are {known}")
        return _read(self.name)

    @property
    def front(self) -> list[str]:
        """Who is not beaten, cheap ones first."""
        return self._pareto()[1]

    def _pareto(self):
        costs = self.peaks if self.cost == "peak" else None
        return figures.pareto(self.result, self.cost, self.score, costs)

    @property
    def text(self) -> str:
        return (
            f"{self.name}, {self.score.replace('_', ' ')}: not beaten are {', '.join(self.front)}"
        )

    def figure(self) -> go.Figure:
        """Above, score against cost; below, the search of the opened entry and its five runs."""
        result, opened = self.result, self.opened
        traces, best = self._pareto()
        fig = figure(f"Not beaten: {', '.join(best)}", WORDS[self.cost], "", height=780)
        fig.add_traces(traces)
        look = styles(result.facts["entries"])[opened]
        mark = dict(color=look["colour"], symbol=look["marker"])
        tried = result.search(opened)
        fig.add_scatter(
            x=tried.rate, y=tried[result.main], mode="markers", marker=mark | dict(size=9),
            xaxis="x2", yaxis="y2", showlegend=False, hovertemplate="rate %{x}: %{y:.0%}",
        )  # fmt: skip
        rate = result.rate(opened)
        fig.add_shape(
            type="line", x0=rate, x1=rate, y0=0, y1=1, xref="x2", yref="y2 domain",
            line=dict(color=GREY, dash="dot"),
        )  # fmt: skip
        runs = result.runs[result.runs.label == opened]
        for seed, curve in zip(runs.seed, runs.curve, strict=True):
            steps = (np.arange(len(curve)) + 0.5) * result.facts["steps"] / len(curve)
            fig.add_scatter(
                x=steps, y=np.maximum(curve, 1e-4), mode="lines", showlegend=False, opacity=0.7,
                line=dict(color=look["colour"], width=1.5), xaxis="x3", yaxis="y3",
                hovertemplate=f"seed {seed}, step %{{x:.0f}}: %{{y:.3g}}<extra></extra>",
            )  # fmt: skip
        for score in self._references().values():
            fig.add_shape(
                type="line", x0=0, x1=1, xref="x domain", y0=score, y1=score, yref="y",
                line=dict(color=GREY, dash="dash", width=1),
            )  # fmt: skip
        return fig.update_layout(**self._axes(rate, sorted(set(tried.rate))))

    def _axes(self, rate: float, rates: list[float]) -> dict:
        shares = dict(tickformat=".0%", range=[-0.06, 1.08])
        lowest = self.result.runs[self.score].min()
        near = min([lowest, *self._references().values()]) > 0.5  # all of them in the upper half
        above = dict(range=[lowest - 0.05, 1.02 * self.result.runs[self.score].max()] if near
                     else shares["range"], tickformat=".0%")  # fmt: skip
        small = dict(font=dict(size=13))
        return dict(
            xaxis=dict(type="log", domain=[0, 0.76], anchor="y", title=small),
            yaxis=above | dict(domain=[0.44, 1], title=dict(text=self.score.replace("_", " "))),
            xaxis2=dict(
                type="log", domain=[0, 0.44], anchor="y2", tickvals=rates,
                ticktext=[f"{each:g}" for each in rates],
                title=small | dict(text=f"learning rate; taken: {rate:g}"),
            ),
            yaxis2=shares | dict(
                domain=[0, 0.27], anchor="x2", title=small | dict(text="score on dev")
            ),
            xaxis3=dict(domain=[0.56, 1], anchor="y3", title=small | dict(text="step")),
            yaxis3=dict(
                type="log", domain=[0, 0.27], anchor="x3",
                tickvals=[1e-4, 1e-3, 1e-2, 0.1, 1, 10],
                ticktext=["0.0001", "0.001", "0.01", "0.1", "1", "10"],
                title=small | dict(text="training loss, five seeds", standoff=4),
            ),
            annotations=self._notes(),
            legend=dict(x=0.79, y=1, xanchor="left", yanchor="top", font=dict(size=11)),
            margin=dict(t=60, b=60),
        )  # fmt: skip

    def _references(self) -> dict[str, float]:
        """What nobody was trained for: the mean score by label."""
        known = self.result.references
        return known.groupby("label")[self.score].mean().to_dict() if len(known) else {}

    def _notes(self) -> list[dict]:
        """The line over the two lower plots, and the names of the references."""
        lines = sorted(self._references().items(), key=lambda pair: pair[1])
        beside = [  # the lowest has its name below it: two lines may lie close
            dict(
                x=1 - 0.24 * (at % 3), xref="x domain", y=score, yref="y", text=label.lower(),
                showarrow=False, xanchor="right", yanchor="bottom" if at else "top", borderpad=0,
                font=dict(size=11, color=GREY),
            )
            for at, (label, score) in enumerate(lines)
        ]  # fmt: skip
        head = dict(
            x=0, xref="paper", y=0.31, yref="paper", xanchor="left", yanchor="middle",
            showarrow=False, text=f"<b>{self.opened}</b>: its search, and its runs on the test",
            font=dict(size=14),
        )  # fmt: skip
        return [*beside, head]

    def html(self) -> str:
        """The opened entry: what it costs and scores, and three answers of its first seed."""
        result = self.result
        mine = result.runs[result.runs.label == self.opened]
        first = mine[mine.seed == 0].iloc[0]
        said = "".join(
            f"<tr><td style='text-align:left'>{escape(example.prompt)}</td>"
            f"<td>{escape(example.target.strip())}</td><td>{escape(answer.strip())}</td></tr>"
            for example, answer in zip(_test(self.name), first.outputs, strict=False)
        )
        table = (
            "<table><tr><th>asked</th><th>wanted</th><th>answered by seed 0</th></tr>"
            f"{said}</table>"
        )
        if not said:
            table = (
                f"<p>The examples of {escape(result.facts['task'])} do not ship with peftlab.</p>"
            )
        shares = ", ".join(f"{s.replace('_', ' ')} {mine[s].mean():.0%}" for s in result.scores)
        return (
            f"<p><b>{escape(self.opened)}</b>: {shares}; trained {first.trained:,} numbers, "
            f"stored {first.stored:,}.</p>{table}"
        )


@lru_cache(maxsize=8)
def _test(name: str) -> tuple:
    """The first examples of a contest's test; none of a data set that does not ship."""
    facts = _read(name).facts
    if not data_path("tasks", facts["task"]).is_dir():
        return ()
    return tuple(load(facts["task"], **facts["options"]).test[:SHOWN])


class Showdown(Panel):
    """See `showdown`."""

    def __init__(self, view: ShowdownView):
        self.view, self.peaks, self.measured = view, view.peaks, view.result
        offered = {
            "name": ("contest", results.names()),
            "score": ("score", _offered(view.result.scores)),
            "cost": ("cost", self._costs(view.result)),
            "opened": ("open", _offered(view.result.facts["entries"])),
        }
        wide = dict(style={"description_width": "60px"}, layout=widgets.Layout(width="340px"))
        self.choices = {
            key: widgets.Dropdown(
                options=options, value=getattr(view, key), description=words, **wide
            )
            for key, (words, options) in offered.items()
        }
        for key, control in self.choices.items():
            control.add_class(f"peftlab-showdown-{key}")
            control.observe(self._changed, "value")
        self._busy = False
        self.plot = Plot(view.figure())
        self.plot.on_click(self._clicked)
        self.answers = widgets.HTML(view.html())
        grid = widgets.Layout(grid_template_columns="350px 350px", grid_gap="2px 12px")
        asked = widgets.GridBox(list(self.choices.values()), layout=grid)
        self.widget = widgets.VBox([asked, self.plot, self.answers])

    def _peaks(self, result: Result) -> Mapping[str, int] | None:
        """The peaks, if they hold for this contest: the same base and batch."""
        same = all(result.facts[k] == self.measured.facts[k] for k in ("base", "batch size"))
        there = self.peaks and set(result.facts["entries"]) <= set(self.peaks)
        return self.peaks if same and there else None

    def _costs(self, result: Result) -> list[tuple[str, str]]:
        """The costs that a contest can be seen by, as the menu shows them."""
        kinds = (*COSTS, "peak") if self._peaks(result) else COSTS
        return [(WORDS[kind], kind) for kind in kinds]

    def _clicked(self, label: str) -> None:
        if label in self.view.result.facts["entries"]:
            self.choices["opened"].value = label

    def _changed(self, change: dict) -> None:
        if self._busy:
            return
        given = {key: control.value for key, control in self.choices.items()}
        if given["name"] != self.view.name:  # another contest has scores and entries of its own
            self._busy = True
            other = _read(given["name"])
            known = {
                "score": _offered(other.scores),
                "cost": self._costs(other),
                "opened": _offered(other.facts["entries"]),
            }
            for key, offered in known.items():
                values = [value for _, value in offered]
                kept = given[key] if given[key] in values else values[0]
                self.choices[key].options = offered
                self.choices[key].value = given[key] = kept
            self._busy = False
        self.view = ShowdownView(**given, peaks=self._peaks(_read(given["name"])))
        self.answers.value = self.view.html()
        self.plot.draw(self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Showdown: {self.view.text}"


def showdown(
    name: str = "facts",
    score: str = "",
    cost: str = "stored",
    opened: str = "LoRA",
    peaks: Mapping[str, int] | None = None,
) -> Showdown:
    """A panel over the recorded contests: score against cost, every seed a point.

    A click on a point, or the menu, opens an entry: its search, its curves and its answers.
    `peaks` offers peak memory as a cost: bytes by entry, as `bench.results` computes them.
    """
    score = score or _read(name).main
    return Showdown(ShowdownView(name, score, cost, opened, peaks))
