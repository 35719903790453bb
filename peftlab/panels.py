"""Sliders and live training over the other rooms: pure functions, and thin widgets around them.

A panel shows its widgets where a kernel runs. Its output also carries a figure of the same state,
`panel.static()`, for every place where none does: GitHub, a printed page, a preview.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go

from peftlab import accounting, figures, tasks
from peftlab.bases import Base
from peftlab.bases.shapes import Shape, as_shape, names
from peftlab.methods import FullFineTuning, LoRA, Method, PromptTuning
from peftlab.training import Run, train
from peftlab.tuned import attach

STILL = "application/vnd.peftlab.still+json"  # a Plotly figure that stands for the panel
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
TARGETS = ("q", "k", "v", "o", "up", "down", "gate")
SECONDS_BETWEEN_FRAMES = 0.3


@dataclass(frozen=True)
class Choice:
    """How a method is made from one size and a set of targets, as a slider offers them."""

    build: Callable[[int, tuple[str, ...]], Method]
    size_name: str
    sizes: tuple[int, ...]
    start: int
    targeted: bool = False


CHOICES = {
    "LoRA": Choice(
        lambda size, targets: LoRA(r=size, alpha=2 * size, target_modules=targets),
        "rank r",
        RANKS,
        8,
        targeted=True,
    ),
    "Prompt tuning": Choice(
        lambda size, _: PromptTuning(num_virtual_tokens=size), "virtual tokens P", LENGTHS, 20
    ),
    "Full fine-tuning": Choice(lambda *_: FullFineTuning(), "no size to choose", RANKS, 8),
}


def build_method(name: str, size: int, targets: Sequence[str] = ("q", "v")) -> Method:
    """The method that a panel's controls describe; it takes of size and targets what it has."""
    if name not in CHOICES:
        raise ValueError(f"unknown method {name!r}; allowed: {', '.join(CHOICES)}")
    return CHOICES[name].build(size, tuple(targets))


def allowed_sizes(name: str, targets: Sequence[str], model: str | Shape) -> tuple[int, ...]:
    """The sizes a slider offers: no rank above a target's smaller side, no prompt that fills it."""
    choice, shape = CHOICES[name], as_shape(model)
    most = shape.context - 1 if name == "Prompt tuning" else max(choice.sizes)
    if choice.targeted:
        most = min(min(i, o) for t in targets for _, i, o in shape.matrices(t))
    return tuple(size for size in choice.sizes if size <= most)


@lru_cache(maxsize=256)
def _counts(name: str, targets: tuple[str, ...], shape: Shape) -> dict[int, int]:
    """Trained parameters at every size that the slider offers."""
    sizes = allowed_sizes(name, targets, shape)
    return {size: accounting.count(build_method(name, size, targets), shape) for size in sizes}


@dataclass(frozen=True)
class CountView:
    """What the count explorer shows for one setting."""

    name: str
    model: str
    size: int
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    parameters: int
    base: int
    file_bytes: int

    @property
    def percent(self) -> float:
        return 100 * self.parameters / self.base

    @property
    def text(self) -> str:
        return (
            f"{self.parameters:,} parameters"
            f" · {accounting.readable_percent(self.parameters, self.base)} of {self.model}"
            f" · {accounting.readable_bytes(self.file_bytes)} in float32"
        )

    def figure(self) -> go.Figure:
        return figures.counts_figure(
            self.sizes,
            self.counts,
            self.size,
            self.model,
            self.base,
            size_name=CHOICES[self.name].size_name,
            label=self.name,
        )


def count_view(name: str, size: int, targets: Sequence[str], model: str | Shape) -> CountView:
    """Parameters, percentage and file size of one setting, and the counts at every other size.

    Raises ValueError for a size that the method does not allow on this model.
    """
    shape = as_shape(model)
    if CHOICES[name].targeted and not targets:
        raise ValueError("choose at least one target")
    method = build_method(name, size, targets)
    parameters = accounting.count(method, shape)
    counts = dict(sorted({**_counts(name, tuple(targets), shape), size: parameters}.items()))
    return CountView(
        name=name,
        model=shape.name,
        size=size,
        sizes=tuple(counts),
        counts=tuple(counts.values()),
        parameters=parameters,
        base=accounting.base_parameters(shape),
        file_bytes=accounting.file_bytes(method, shape),
    )


def curve(records: list[dict], label: str, title: str | None = None) -> go.Figure:
    """The loss over the steps so far; without a record, an empty figure that says so."""
    table = pd.DataFrame(records or [], columns=None if records else ["step", "loss"])
    if title is None and records:
        last = records[-1]
        title = f"{label}: loss {last['loss']:.3f} after {last['step']} steps"
    return figures.learning_curves({label: table}, title=title or f"{label}: not trained yet")


def scores_table(before: dict[str, float], after: dict[str, float]) -> str:
    """An HTML table of every metric before and after."""
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{before[name]:.1%}</td>"
        f"<td>{after[name]:.1%}</td></tr>"
        for name in after
    )
    return f"<table><tr><th>test metric</th><th>before</th><th>after</th></tr>{rows}</table>"


class Panel:
    """A widget, and a figure of its state for where no kernel runs."""

    widget: widgets.Widget
    plot: go.FigureWidget

    def static(self) -> go.Figure:
        """The figure that stands for the panel."""
        raise NotImplementedError

    def describe(self) -> str:
        """The panel in one line of text."""
        raise NotImplementedError

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        self.plot._repr_mimebundle_()  # hands the figure's latest state to the browser's copy
        still = json.loads(self.static().to_json())
        return {**self.widget._repr_mimebundle_(), "text/plain": self.describe(), STILL: still}


class CountExplorer(Panel):
    """See `count_explorer`."""

    def __init__(self, model: str, method: str, targets: Sequence[str]):
        choice = CHOICES[method]
        wide = {"description_width": "110px"}
        self.method = widgets.Dropdown(
            options=list(CHOICES), value=method, description="method", style=wide
        )
        models = sorted(names(), key=accounting.base_parameters)
        self.model = widgets.Dropdown(options=models, value=model, description="model", style=wide)
        self.size = widgets.SelectionSlider(
            options=allowed_sizes(method, targets, model),
            value=choice.start,
            description=choice.size_name,
            style=wide,
            layout=widgets.Layout(width="460px"),
        )
        self.targets = {
            target: widgets.ToggleButton(
                value=target in targets,
                description=target,
                tooltip=f"adapt the {target} matrices",
                layout=widgets.Layout(width="62px"),
            )
            for target in TARGETS
        }
        row = widgets.HBox(list(self.targets.values()))
        self.answer = widgets.HTML()
        for widget, name in (
            (self.method, "method"),
            (self.model, "model"),
            (self.size, "size"),
            (row, "targets"),
            (self.answer, "count"),
        ):
            widget.add_class(f"peftlab-{name}")
        self.view = count_view(method, choice.start, targets, model)
        self.plot = go.FigureWidget(self.view.figure())
        top = widgets.HBox([self.method, self.model])
        self.widget = widgets.VBox([top, self.size, row, self.answer, self.plot])
        self._busy = False
        for widget in (self.method, self.model, self.size, *self.targets.values()):
            widget.observe(self._changed, "value")
        self._changed()

    @property
    def chosen(self) -> list[str]:
        """The targets that are on and that the model has."""
        available = as_shape(self.model.value).targets
        return [t for t in TARGETS if self.targets[t].value and t in available]

    def _changed(self, _=None) -> None:
        if self._busy:  # the changes that this function makes itself
            return
        self._busy = True
        try:
            self._update()
        finally:
            self._busy = False

    def _update(self) -> None:
        name, model, choice = self.method.value, self.model.value, CHOICES[self.method.value]
        for target, button in self.targets.items():
            shown = choice.targeted and target in as_shape(model).targets
            button.layout.display = None if shown else "none"
        if choice.targeted and not self.chosen:
            self.answer.value = "<b>choose at least one target</b>"
            return
        sizes = allowed_sizes(name, self.chosen, model)
        if self.size.description != choice.size_name:  # another method: start anew
            self.size.description = choice.size_name
            size = choice.start
        else:
            size = self.size.value
        if self.size.options != sizes:
            self.size.options = sizes
        self.size.value = max((s for s in sizes if s <= size), default=sizes[0])
        self.size.disabled = name == "Full fine-tuning"
        self.view = count_view(name, self.size.value, self.chosen, model)
        self.answer.value = f"<b style='font-size:1.25em'>{self.view.text}</b>"
        _redraw(self.plot, self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Count explorer: {self.view.name}, {self.view.text}"


def _redraw(plot: go.FigureWidget, figure: go.Figure) -> None:
    """Give `plot` the traces and titles of `figure`, in one message and without a flicker."""
    with plot.batch_update():
        for old, new in zip(plot.data, figure.data, strict=True):
            old.update(new.to_plotly_json(), overwrite=False)
        plot.layout.update(
            title=figure.layout.title,
            annotations=figure.layout.annotations,
            xaxis=figure.layout.xaxis,
            yaxis=figure.layout.yaxis,
        )


def count_explorer(
    model: str = "gpt2", method: str = "LoRA", targets: Sequence[str] = ("q", "v")
) -> CountExplorer:
    """A panel that counts: choose method, size, targets and model, and read what it costs."""
    return CountExplorer(model, method, targets)


class LiveTrainer(Panel):
    """See `live_trainer`. `run` is the latest training's Run, `thread` the one that trains."""

    run: Run | None = None
    thread: threading.Thread | None = None

    def __init__(self, base: Base, task_names, method_names, steps: int, targets, history):
        self.base, self.target_set = base, tuple(targets)
        self.stop_flag = threading.Event()
        self.records: list[dict] = [] if history is None else history.to_dict("records")
        self.method = widgets.Dropdown(options=list(method_names), description="method")
        self.task = widgets.Dropdown(options=list(task_names), description="task")
        self.size = widgets.SelectionSlider(options=RANKS, description="rank r")
        self.steps = widgets.BoundedIntText(steps, min=1, max=100_000, description="steps")
        self.lr = widgets.SelectionSlider(options=RATES, description="lr")
        self.train_button = widgets.Button(description="Train", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.progress = widgets.IntProgress(layout=widgets.Layout(width="260px"))
        self.status = widgets.HTML("Choose, then press Train.")
        self.scores = widgets.HTML()
        self._choose_method()
        self.plot = go.FigureWidget(curve(self.records, self.method.value))
        for name in ("method", "task", "size", "steps", "lr", "status", "scores"):
            getattr(self, name).add_class(f"peftlab-trainer-{name}")
        self.train_button.add_class("peftlab-train")
        self.stop_button.add_class("peftlab-stop")
        rows = (
            [self.method, self.task, self.size],
            [self.steps, self.lr],
            [self.train_button, self.stop_button, self.progress, self.status],
        )
        boxes = [widgets.HBox(row) for row in rows]
        self.widget = widgets.VBox([*boxes, self.plot, self.scores])
        self.method.observe(self._choose_method, "value")
        self.train_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())

    def _choose_method(self, _=None) -> None:
        """Offer the sizes of the method and its own learning rate."""
        choice, shape = CHOICES[self.method.value], self.base.anatomy.shape
        self.size.description = choice.size_name
        self.size.options = allowed_sizes(self.method.value, self.target_set, shape)
        self.size.value = max(s for s in self.size.options if s <= choice.start)
        self.size.disabled = self.method.value == "Full fine-tuning"
        rate = build_method(self.method.value, self.size.value, self.target_set).learning_rate
        self.lr.options = sorted({*RATES, rate})
        self.lr.value = rate

    def start(self) -> None:
        """Train in the background; the notebook stays usable."""
        if self.thread is not None and self.thread.is_alive():
            return
        self.stop_flag.clear()
        self.records, self.scores.value = [], ""
        self.progress.max, self.progress.value = self.steps.value, 0
        self.train_button.disabled, self.stop_button.disabled = True, False
        self.status.value = "scoring the base before training …"
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the training after the current step and keep what was learned so far."""
        self.stop_flag.set()
        self.status.value = "stopping …"

    def _work(self) -> None:
        try:
            self.run = self._train()
        except Exception as error:  # a thread has nowhere else to show it
            message = f"{type(error).__name__}: {escape(str(error))}"
            self.status.value = f"<b style='color:{figures.VERMILLION}'>{message}</b>"
        else:
            self._show_run(self.run)
        finally:
            self.train_button.disabled, self.stop_button.disabled = False, True

    def _train(self) -> Run:
        method = build_method(self.method.value, self.size.value, self.target_set)
        task, steps, drawn = tasks.load(self.task.value), self.steps.value, [time.monotonic()]

        def on_step(record: dict) -> None:
            self.records.append(record)
            if time.monotonic() - drawn[0] >= SECONDS_BETWEEN_FRAMES:
                drawn[0] = time.monotonic()
                self._show_step(record, steps)

        tuned = attach(self.base, method)
        try:
            return train(
                tuned,
                task,
                steps=steps,
                lr=self.lr.value,
                on_step=on_step,
                stop=self.stop_flag,
                progress=False,
            )
        finally:
            tuned.detach()

    def _show_step(self, record: dict, steps: int) -> None:
        self.progress.value = record["step"]
        self.status.value = f"step {record['step']} of {steps}, loss {record['loss']:.3f}"
        _redraw(self.plot, curve(self.records, self.method.value))

    def _show_run(self, run: Run) -> None:
        self.progress.value = run.steps
        how = "stopped" if run.interrupted else "done"
        self.status.value = f"{how}: {run.steps} steps in {run.seconds:.1f} s; adapter detached"
        self.scores.value = scores_table(run.before, run.metrics)
        _redraw(self.plot, curve(self.records, self.method.value))

    def static(self) -> go.Figure:
        return curve(self.records, self.method.value)

    def describe(self) -> str:
        return f"Live trainer: {self.static().layout.title.text}"


def live_trainer(
    base: Base,
    tasks: Sequence[str] = tasks.NAMES,
    methods: Sequence[str] = tuple(CHOICES),
    steps: int = 200,
    targets: Sequence[str] = ("q", "v"),
    history: pd.DataFrame | None = None,
) -> LiveTrainer:
    """A panel that trains: choose, press Train, watch the curve, stop. The base stays as it was.

    `history` (a Run's table) is shown until the first training, and in the stored picture.
    """
    return LiveTrainer(base, tasks, methods, steps, targets, history)
