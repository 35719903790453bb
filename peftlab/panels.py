"""Sliders and live training over the other rooms: pure functions, and thin widgets around them.

A panel shows its widgets where a kernel runs. Its output also carries a figure of the same state,
`panel.static()`, for every place where none does: GitHub, a printed page, a preview.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from peftlab import accounting, figures, structures, tasks
from peftlab._data import data_path
from peftlab.bases import Base
from peftlab.bases.shapes import Shape, as_shape, names
from peftlab.methods import (
    FullFineTuning,
    HoulsbyAdapter,
    LoRA,
    Method,
    ParallelAdapter,
    PfeifferAdapter,
    PrefixTuning,
    PromptTuning,
    Prune,
    PruneStructures,
    PTuning,
    PTuningV2,
)
from peftlab.probes import AttentionMap
from peftlab.quantisation import QUANT_TYPES, bits_per_weight, check_block_size, quantise, table
from peftlab.soft import PREFIX_INITS, PROMPT_INITS
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
    """How a method is made from one size and a set of targets, as a slider offers them.

    `in_context` says that the virtual tokens take places of the model's context.
    """

    build: Callable[[int, tuple[str, ...]], Method]
    size_name: str
    sizes: tuple[int, ...]
    start: int
    targeted: bool = False
    in_context: bool = False


CHOICES = {
    "LoRA": Choice(
        lambda size, targets: LoRA(r=size, alpha=2 * size, target_modules=targets),
        "rank r",
        RANKS,
        8,
        targeted=True,
    ),
    "Prompt tuning": Choice(
        lambda size, _: PromptTuning(num_virtual_tokens=size),
        "virtual tokens P",
        LENGTHS,
        20,
        in_context=True,
    ),
    "Prefix tuning": Choice(
        lambda size, _: PrefixTuning(num_virtual_tokens=size), "virtual tokens P", LENGTHS, 20
    ),
    "P-tuning v2": Choice(
        lambda size, _: PTuningV2(num_virtual_tokens=size), "virtual tokens P", LENGTHS, 20
    ),
    "P-tuning, LSTM": Choice(
        lambda size, _: PTuning(num_virtual_tokens=size, sizes="peft"),
        "virtual tokens P",
        LENGTHS,
        20,
        in_context=True,
    ),
    "P-tuning, MLP": Choice(
        lambda size, _: PTuning(num_virtual_tokens=size, encoder="mlp", sizes="peft"),
        "virtual tokens P",
        LENGTHS,
        20,
        in_context=True,
    ),
    **{
        name: Choice(lambda size, _, kind=kind: kind(size), "bottleneck m", RANKS, 8)
        for name, kind in (
            ("Houlsby adapter", HoulsbyAdapter),
            ("Pfeiffer adapter", PfeifferAdapter),
            ("Parallel adapter", ParallelAdapter),
        )
    },
    "Full fine-tuning": Choice(lambda *_: FullFineTuning(), "no size to choose", RANKS, 8),
}


def build_method(name: str, size: int, targets: Sequence[str] = ("q", "v")) -> Method:
    """The method that a panel's controls describe; it takes of size and targets what it has."""
    if name not in CHOICES:
        raise ValueError(f"unknown method {name!r}; allowed: {', '.join(CHOICES)}")
    return CHOICES[name].build(size, tuple(targets))


def starts(method: Method) -> tuple[str, ...]:
    """Where a soft prompt may start, its own default first; none for other methods.

    A start from a text is left out: a slider cannot say which text.
    """
    known = {PromptTuning: PROMPT_INITS, PrefixTuning: PREFIX_INITS}.get(type(method), ())
    return tuple(init for init in known if init != "text")


def allowed_sizes(name: str, targets: Sequence[str], model: str | Shape) -> tuple[int, ...]:
    """The sizes a slider offers: no rank above a target's smaller side, no prompt that fills it."""
    choice, shape = CHOICES[name], as_shape(model)
    most = shape.context - 1 if choice.in_context else max(choice.sizes)
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


def _replace_parts(plot: go.FigureWidget, traces: Sequence[dict], layout: dict) -> None:
    """Show what differs between two states of one figure, in one message to the page."""
    with plot.batch_update():
        for old, new in zip(plot.data, traces, strict=True):
            old.update(new)
        plot.layout.update(layout)


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
        self.init = widgets.Dropdown(description="start")
        self.steps = widgets.BoundedIntText(steps, min=1, max=100_000, description="steps")
        self.lr = widgets.SelectionSlider(options=RATES, description="lr")
        self.train_button = widgets.Button(description="Train", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.progress = widgets.IntProgress(layout=widgets.Layout(width="260px"))
        self.status = widgets.HTML("Choose, then press Train.")
        self.scores = widgets.HTML()
        self._choose_method()
        self.plot = go.FigureWidget(curve(self.records, self.method.value))
        for name in ("method", "task", "size", "init", "steps", "lr", "status", "scores"):
            getattr(self, name).add_class(f"peftlab-trainer-{name}")
        self.train_button.add_class("peftlab-train")
        self.stop_button.add_class("peftlab-stop")
        rows = (
            [self.method, self.task, self.size],
            [self.steps, self.lr, self.init],
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
        method = build_method(self.method.value, self.size.value, self.target_set)
        self.init.options = starts(method)
        self.init.value = next(iter(self.init.options), None)
        self.init.layout.display = None if self.init.options else "none"
        rate = method.learning_rate
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
        if self.init.value is not None:
            method = replace(method, init=self.init.value)
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
    tasks: Sequence[str] = tasks.WITHOUT_HEAD,
    methods: Sequence[str] = tuple(CHOICES),
    steps: int = 200,
    targets: Sequence[str] = ("q", "v"),
    history: pd.DataFrame | None = None,
) -> LiveTrainer:
    """A panel that trains: choose, press Train, watch the curve, stop. The base stays as it was.

    `history` (a Run's table) is shown until the first training, and in the stored picture.
    """
    return LiveTrainer(base, tasks, methods, steps, targets, history)


@dataclass(frozen=True)
class StrengthView:
    """What the strength explorer shows for one setting; a curve maps a strength to a number."""

    strength: float
    curves: Mapping[str, Mapping[float, float]]
    y_title: str

    @property
    def text(self) -> str:
        here = ", ".join(f"{name} {at[self.strength]:.3g}" for name, at in self.curves.items())
        return f"strength {self.strength:g}: {here}"

    def figure(self) -> go.Figure:
        title = f"{self.text[0].upper()}{self.text[1:]}"
        return figures.strengths(self.curves, self.strength, title, self.y_title)


def strength_view(
    curves: Mapping[str, Mapping[float, float]], strength: float, y_title: str
) -> StrengthView:
    """Every curve at one strength. Raises ValueError for a strength that none was measured at."""
    if not curves or len({tuple(at) for at in curves.values()}) > 1:
        raise ValueError("give one curve or more, all measured at the same strengths")
    measured = next(iter(curves.values()))
    if strength not in measured:
        known = ", ".join(f"{s:g}" for s in measured)
        raise ValueError(f"strength {strength:g} was not measured; there are {known}")
    return StrengthView(strength, curves, y_title)


class StrengthExplorer(Panel):
    """See `strength_explorer`."""

    def __init__(self, curves: Mapping[str, Mapping[float, float]], strength: float, y_title: str):
        self.curves, self.y_title = {k: dict(v) for k, v in curves.items()}, y_title
        self.view = strength_view(self.curves, strength, y_title)
        self.strength = widgets.SelectionSlider(
            options=[(f"{s:g}", s) for s in next(iter(self.curves.values()))],
            value=strength,
            description="strength t",
            style={"description_width": "110px"},
            layout=widgets.Layout(width="460px"),
        )
        self.text = widgets.HTML(f"<b>{escape(self.view.text)}</b>")
        self.strength.add_class("peftlab-strength")
        self.text.add_class("peftlab-strength-text")
        self.plot = go.FigureWidget(self.view.figure())
        self.widget = widgets.VBox([self.strength, self.text, self.plot])
        self.strength.observe(self._changed, "value")

    def _changed(self, _=None) -> None:
        self.view = strength_view(self.curves, self.strength.value, self.y_title)
        self.text.value = f"<b>{escape(self.view.text)}</b>"
        _redraw(self.plot, self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Strength explorer: {self.view.text}"


def strength_explorer(
    curves: Mapping[str, Mapping[float, float]], strength: float = 1.0, y_title: str = "loss (nats)"
) -> StrengthExplorer:
    """A panel that turns a trained change up and down: 0 is the base, 1 is as trained.

    `curves` maps a label to {strength: what was measured there}, computed beforehand.
    """
    return StrengthExplorer(curves, strength, y_title)


SOFT_LAB = {  # what varies: a row's name in the heat map, its label in soft_lab.json
    ("prompt", "start"): {
        "tokens": "prompt, vocabulary",
        "text": "prompt, text",
        "uniform ±0.5": "prompt, random",
        "normal": "prompt, normal",
        "zeros": "prompt, zero",
    },
    ("prefix", "start"): {
        "tokens": "prefix, vocabulary",
        "text": "prefix, text",
        "N(0, 1)": "prefix, random",
        "zeros": "prefix, zero",
    },
    **{
        (method, "length"): {
            f"P = {P}": f"{method}, vocabulary" if P == 20 else f"{method}, P = {P}"
            for P in (1, 5, 20, 50, 100)
        }
        for method in ("prompt", "prefix")
    },
    ("prompt", "maker"): {
        "none": "prompt, vocabulary",
        "LSTM": "prompt, lstm",
        "MLP": "prompt, mlp",
        "attention": "prompt, attention",
    },
    ("prefix", "maker"): {"none": "prefix, vocabulary", "MLP": "prefix, MLP"},
}
SOFT_METRICS = {  # column of the file, how the seeds become a colour, what counts as trained
    "exact match, mean": ("exact", "mean", 0.95),
    "exact match, worst seed": ("exact", "min", 0.95),
    "loss at the end": ("loss_last", "mean", 0.05),
}


@lru_cache(maxsize=1)
def _soft_runs() -> pd.DataFrame:
    """The lab's runs: mean, min and max over the seeds for each label and learning rate."""
    lab = json.loads(data_path("results", "soft_lab.json").read_text())
    runs = pd.DataFrame(lab["runs"])
    groups = runs.groupby(["label", "lr"])[["exact", "loss_last"]]
    return groups.agg(["mean", "min", "max", "count"]).round(6)  # alike on every processor


@dataclass(frozen=True)
class SoftLabView:
    """What the lab shows for one choice; `values` is (rows, rates), NaN where nothing was run."""

    method: str
    vary: str
    metric: str
    rows: tuple[str, ...]
    rates: tuple[float, ...]
    values: np.ndarray
    texts: np.ndarray
    seeds: int

    @property
    def trained(self) -> int:
        """How many settings pass the metric's bar."""
        column, _, bar = SOFT_METRICS[self.metric]
        return int((self.values <= bar if column == "loss_last" else self.values >= bar).sum())

    @property
    def text(self) -> str:
        column, _, bar = SOFT_METRICS[self.metric]
        goal = f"end below {bar:g} nats" if column == "loss_last" else f"reach {bar:.0%}"
        run = int(np.isfinite(self.values).sum())
        return f"{self.method} by {self.vary}: {self.trained} of {run} settings {goal}"

    def parts(self) -> tuple[dict, dict]:
        """What differs between two views: of the trace, and of the layout."""
        loss = SOFT_METRICS[self.metric][0] == "loss_last"
        ticks = dict(tickvals=[0, 0.5, 1], ticktext=["0", "0.5", "1"], title_text="share")
        scale = dict(zmin=0, zmax=1, reversescale=False)
        if loss:
            ticks = dict(tickvals=[-3, -2, -1, 0], ticktext=["0.001", "0.01", "0.1", "1"])
            ticks["title_text"] = "nats"
            scale = dict(zmin=-3.7, zmax=1, reversescale=True)
        trace = dict(
            z=np.log10(self.values).round(4) if loss else self.values,
            x=[f"{rate:g}" for rate in self.rates],
            y=list(self.rows),
            text=self.texts,
            colorbar=ticks,
            **scale,
        )
        title = f"{self.text[0].upper()}{self.text[1:]} ({self.metric})"
        rates = f"learning rate ({self.seeds} seeds a cell)"
        return trace, dict(title_text=title, xaxis_title_text=rates)

    def figure(self) -> go.Figure:
        """A heat map in which bright is good; losses on a logarithmic scale of colours."""
        trace, layout = self.parts()
        fig = figures.heat_map(trace["z"])
        fig.update_traces(trace | dict(texttemplate="%{text}", textfont_size=12, hoverinfo="skip"))
        category = dict(xaxis_type="category", yaxis_type="category")
        return fig.update_layout(layout | category, margin_l=110, height=420)


def soft_lab_view(method: str, vary: str, metric: str) -> SoftLabView:
    """One table of the lab in data/results/soft_lab.json: sorting letters, 150 steps, tiny-gpt.

    Raises ValueError for a choice that the lab does not have.
    """
    if (method, vary) not in SOFT_LAB:
        raise ValueError(f"no lab of a {method} by {vary}; there are {list(SOFT_LAB)}")
    if metric not in SOFT_METRICS:
        raise ValueError(f"unknown metric {metric!r}; allowed: {', '.join(SOFT_METRICS)}")
    labels, (column, how, _) = SOFT_LAB[method, vary], SOFT_METRICS[metric]
    found = _soft_runs().loc[list(labels.values()), column]
    table = {part: found[part].unstack().loc[list(labels.values())] for part in found}
    low, high = table["min"].to_numpy(), table["max"].to_numpy()
    values = table[how].to_numpy()
    texts = [
        "" if np.isnan(v) else f"{v:.2g}" if how == "min" else f"{v:.2g}<br>{lo:.2g} – {hi:.2g}"
        for v, lo, hi in zip(values.flat, low.flat, high.flat, strict=True)
    ]
    return SoftLabView(
        method,
        vary,
        metric,
        tuple(labels),
        tuple(table["mean"].columns),
        values,
        np.array(texts, dtype=object).reshape(values.shape),
        int(found["count"].min()),
    )


class SoftPromptLab(Panel):
    """See `soft_prompt_lab`."""

    def __init__(self, method: str, vary: str, metric: str):
        self.view = soft_lab_view(method, vary, metric)
        style = {"description_width": "60px"}
        offered = {
            "method": (list(dict.fromkeys(m for m, _ in SOFT_LAB)), method),
            "vary": (list(dict.fromkeys(v for _, v in SOFT_LAB)), vary),
            "metric": (list(SOFT_METRICS), metric),
        }
        self.choices = {
            name: widgets.Dropdown(options=options, value=value, description=name, style=style)
            for name, (options, value) in offered.items()
        }
        for name, widget in self.choices.items():
            widget.add_class(f"peftlab-lab-{name}")
            widget.observe(self._changed, "value")
        self.plot = go.FigureWidget(self.view.figure())
        self.widget = widgets.VBox([widgets.HBox(list(self.choices.values())), self.plot])

    def _changed(self, _=None) -> None:
        self.view = soft_lab_view(**{name: w.value for name, w in self.choices.items()})
        trace, layout = self.view.parts()
        _replace_parts(self.plot, [trace], layout)

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Soft prompt lab: {self.view.text} ({self.view.metric})"


def soft_prompt_lab(
    method: str = "prompt", vary: str = "start", metric: str = "exact match, mean"
) -> SoftPromptLab:
    """A panel over the stored lab: what lets a prompt or a prefix train, at which learning rate."""
    return SoftPromptLab(method, vary, metric)


@dataclass(frozen=True)
class AttentionScene:
    """Attention of one text in every layer and head, with a prefix as it started and trained.

    `before` and `after` are (layers, heads, queries, virtual + keys); the first `virtual` of
    `keys` are the prefix.
    """

    before: np.ndarray
    after: np.ndarray
    virtual: int
    queries: tuple[str, ...]
    keys: tuple[str, ...]


def attention_scene(before: AttentionMap, after: AttentionMap) -> AttentionScene:
    """What two `probes.attention_map` of one text show, with the same virtual tokens attached.

    Raises ValueError for two texts, two lengths, a text without a prefix, or a model of two stacks.
    """
    if before.records.keys() != after.records.keys() or before.tokens != after.tokens:
        raise ValueError("before and after are maps of two different texts or models")
    names = [name for name in before.records if before.records[name].virtual]
    if not names:
        raise ValueError("no prefix was attended to here")
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        raise ValueError("the explorer shows the maps of one stack; this model has two")
    name = names[0]
    maps = [
        np.stack([m.weights(n).float().cpu().numpy() for n in names]).astype(np.float32)
        for m in (before, after)
    ]
    if maps[0].shape != maps[1].shape:
        raise ValueError(f"before has the shape {maps[0].shape}, after {maps[1].shape}")
    return AttentionScene(
        *maps,
        virtual=before.records[name].virtual,
        queries=tuple(before.queries(name)),
        keys=tuple(before.keys(name)),
    )


@dataclass(frozen=True)
class AttentionView:
    """What the attention explorer shows for one setting; maps (queries, keys), gates (queries)."""

    virtual: int
    layer: int
    head: int
    example: int
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    maps: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]

    @property
    def text(self) -> str:
        before, after = (gate.mean() for gate in self.gates.values())
        return (
            f"layer {self.layer}, head {self.head}: {before:.0%} of the attention goes to the "
            f"prefix of {self.virtual} at the start, {after:.0%} once it is trained"
        )

    @property
    def shown(self) -> tuple:
        """What `figures.attention_pair` and `figures.attention_parts` take."""
        title = self.text[0].upper() + self.text[1:]
        return self.maps, self.gates, self.keys, self.queries, self.virtual, title

    def figure(self) -> go.Figure:
        return figures.attention_pair(*self.shown)


Scenes = Mapping[int, Sequence[AttentionScene]]  # by prefix length, one scene an example


def attention_view(
    scenes: Scenes, length: int, layer: int, head: int, example: int
) -> AttentionView:
    """One head's attention from the stored maps; layer, head and example count from 1.

    Raises ValueError for a place that the maps do not have.
    """
    if length not in scenes:
        raise ValueError(f"no maps with a prefix of {length}; there are {sorted(scenes)}")
    if not 1 <= example <= len(scenes[length]):
        raise ValueError(f"example {example}: there are 1 to {len(scenes[length])}")
    scene = scenes[length][example - 1]
    layers, heads = scene.after.shape[:2]
    for name, value, most in (("layer", layer, layers), ("head", head, heads)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} {value}: there are 1 to {most}")
    maps = {
        "start": scene.before[layer - 1, head - 1],
        "trained": scene.after[layer - 1, head - 1],
    }
    gates = {label: weights[:, : scene.virtual].sum(axis=1) for label, weights in maps.items()}
    return AttentionView(
        scene.virtual, layer, head, example, scene.queries, scene.keys, maps, gates
    )


class AttentionExplorer(Panel):
    """See `attention_explorer`."""

    def __init__(self, scenes: Scenes, length: int | None, layer: int, head: int, example: int):
        self.scenes = {length: tuple(scenes[length]) for length in sorted(scenes)}
        if not self.scenes or not all(self.scenes.values()):
            raise ValueError("no maps to show: each prefix length needs at least one scene")
        shapes = {scene.after.shape[:2] for row in self.scenes.values() for scene in row}
        if len(shapes) > 1 or len({len(row) for row in self.scenes.values()}) > 1:
            raise ValueError("every prefix length needs the same examples, layers and heads")
        (layers, heads), examples = shapes.pop(), len(next(iter(self.scenes.values())))
        length = max(self.scenes) if length is None else length
        self.view = attention_view(self.scenes, length, layer, head, example)
        style, width = {"description_width": "110px"}, widgets.Layout(width="380px")
        options = dict(style=style, layout=width)
        self.length = widgets.SelectionSlider(
            options=list(self.scenes), value=length, description="prefix P", **options
        )
        self.layer, self.head, self.example = (
            widgets.IntSlider(value=value, min=1, max=most, description=name, **options)
            for name, value, most in (
                ("layer", layer, layers), ("head", head, heads), ("example", example, examples),
            )
        )  # fmt: skip
        self.text = widgets.HTML()
        self.sliders = {
            "length": self.length,
            "layer": self.layer,
            "head": self.head,
            "example": self.example,
        }
        for name, widget in {**self.sliders, "text": self.text}.items():
            widget.add_class(f"peftlab-attention-{name}")
        self.plot = go.FigureWidget(self.view.figure())
        self.text.value = f"<b>{escape(self.view.text)}</b>"
        rows = [widgets.HBox([self.length, self.example]), widgets.HBox([self.layer, self.head])]
        self.widget = widgets.VBox([*rows, self.text, self.plot])
        for widget in self.sliders.values():
            widget.observe(self._changed, "value")

    def _changed(self, _=None) -> None:
        chosen = {name: widget.value for name, widget in self.sliders.items()}
        self.view = attention_view(self.scenes, **chosen)
        self.text.value = f"<b>{escape(self.view.text)}</b>"
        _replace_parts(self.plot, *figures.attention_parts(*self.view.shown))

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Attention explorer: {self.view.text}"


def attention_explorer(
    scenes: Scenes, length: int | None = None, layer: int = 1, head: int = 1, example: int = 1
) -> AttentionExplorer:
    """A panel that looks inside: one head's attention over [prefix | text], as the prefix started
    and trained, with the gate λ of every query.

    `scenes` maps a prefix length to one `attention_scene` an example. They are computed beforehand,
    so that a redraw reads stored numbers and runs no model.
    """
    return AttentionExplorer(scenes, length, layer, head, example)


BLOCK_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class HashedWeight:
    """A weight that a cache can hold: the same one is itself alone."""

    values: torch.Tensor


@lru_cache(maxsize=8)
def _code_errors(weight: HashedWeight, double_quant: bool) -> dict[str, dict[int, float]]:
    """RMS error over RMS weight, by data type and block size."""
    values = weight.values

    def error(kind: str, block: int) -> float:
        off = quantise(values, block, kind, double_quant).dequantise() - values
        return (off.norm() / values.norm()).item()

    sizes = block_sizes(values)
    return {kind: {block: error(kind, block) for block in sizes} for kind in QUANT_TYPES}


def block_sizes(weight: torch.Tensor) -> tuple[int, ...]:
    """The block sizes that a slider offers: those that divide the number of weights."""
    return tuple(size for size in BLOCK_SIZES if weight.numel() % size == 0)


@dataclass(frozen=True)
class CodeView:
    """What the code explorer shows for one setting; `errors` by data type and block size."""

    name: str
    quant_type: str
    block_size: int
    double_quant: bool
    bits: float
    errors: Mapping[str, Mapping[int, float]]

    @property
    def error(self) -> float:
        """RMS error as a part of the RMS of the weights."""
        return self.errors[self.quant_type][self.block_size]

    @property
    def text(self) -> str:
        return (
            f"{self.quant_type}, blocks of {self.block_size}: {self.bits:.3f} bits a weight,"
            f" error {self.error:.1%} of the weights' size"
        )

    def figure(self) -> go.Figure:
        sizes = self.errors[self.quant_type]
        bits = {size: bits_per_weight(size, self.double_quant) for size in sizes}
        now = (self.quant_type, self.block_size)
        return figures.code_errors(self.errors, bits, now, f"{self.name}: {self.text}")


def code_view(
    weight: torch.Tensor | HashedWeight,
    block_size: int = 64,
    quant_type: str = "nf4",
    double_quant: bool = True,
    name: str = "weights",
) -> CodeView:
    """Bits and error of one weight in codes, and the errors at every other setting.

    Raises ValueError for a block size that does not divide, and for an unknown data type.
    """
    weight = weight if isinstance(weight, HashedWeight) else HashedWeight(weight)
    check_block_size(block_size, weight.values.numel(), name)
    table(quant_type)
    errors = _code_errors(weight, double_quant)
    bits = bits_per_weight(block_size, double_quant)
    return CodeView(name, quant_type, block_size, double_quant, bits, errors)


class CodeExplorer(Panel):
    """See `code_explorer`."""

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self.weights = {name: HashedWeight(w.detach().float()) for name, w in weights.items()}
        first = next(iter(self.weights))
        wide = {"description_width": "110px"}
        self.weight = widgets.Dropdown(options=list(weights), description="weight", style=wide)
        self.quant_type = widgets.Dropdown(
            options=list(QUANT_TYPES), description="data type", style=wide
        )
        self.block_size = widgets.SelectionSlider(
            options=block_sizes(self.weights[first].values),
            value=64,
            description="block size",
            style=wide,
            layout=widgets.Layout(width="460px"),
        )
        self.double_quant = widgets.Checkbox(value=True, description="scales in 8 bits too")
        self.answer = widgets.HTML()
        self.controls = {
            "weight": self.weight,
            "type": self.quant_type,
            "block": self.block_size,
            "double": self.double_quant,
        }
        for name, widget in (*self.controls.items(), ("answer", self.answer)):
            widget.add_class(f"peftlab-code-{name}")
        self.view = self._view()
        self.plot = go.FigureWidget(self.view.figure())
        top = widgets.HBox([self.weight, self.quant_type])
        below = widgets.HBox([self.block_size, self.double_quant])
        self.widget = widgets.VBox([top, below, self.answer, self.plot])
        for widget in self.controls.values():
            widget.observe(self._changed, "value")
        self._changed()

    def _view(self) -> CodeView:
        name = self.weight.value
        return code_view(
            self.weights[name],
            self.block_size.value,
            self.quant_type.value,
            self.double_quant.value,
            name,
        )

    def _changed(self, _=None) -> None:
        sizes = block_sizes(self.weights[self.weight.value].values)
        if self.block_size.options != sizes:  # another weight, which other sizes divide
            size = self.block_size.value
            self.block_size.options = sizes
            self.block_size.value = max((s for s in sizes if s <= size), default=sizes[0])
        self.view = self._view()
        self.answer.value = f"<b style='font-size:1.25em'>{self.view.text}</b>"
        _redraw(self.plot, self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Code explorer: {self.view.name}, {self.view.text}"


def code_explorer(weights: Mapping[str, torch.Tensor]) -> CodeExplorer:
    """A panel that quantises: choose a weight, a data type and a block size, and read the error."""
    return CodeExplorer(weights)


LAB_SIZE, LAB_STEPS, LAB_RATE = 48, 40, 5e-3
LAB_RANKS, LAB_ALPHAS = (1, 2, 4, 8, 16, 32, 48), (1, 2, 4, 8, 16, 32, 64, 128)
LAB_SCALES = ("α / r", "α / √r")


@dataclass(frozen=True)
class RankLabView:
    """What LoRA learned of one known update: its singular values, the update's, and the loss.

    `loss` is ‖ΔW − s B A‖² / ‖ΔW‖² along the steps, `floor` what the best matrix of rank r leaves.
    """

    r: int
    alpha: int
    scale: str
    loss: tuple[float, ...]
    learned: tuple[float, ...]
    wanted: tuple[float, ...]

    @property
    def floor(self) -> float:
        left = sum(value**2 for value in self.wanted[self.r :])
        return left / sum(value**2 for value in self.wanted)

    @property
    def text(self) -> str:
        """What came of it, in one line."""
        end, start = self.loss[-1], self.loss[0]
        if not end <= start:
            found = "the steps are too large: it ended worse than it began"
        else:
            found = (
                f"{1 - end:.0%} of the update learned, rank {self.r} allows {1 - self.floor:.0%}"
            )
        return f"r = {self.r}, α = {self.alpha}, {self.scale}: {found}"

    def figure(self) -> go.Figure:
        """Both spectra; the title says how much was learned."""
        tiny = 1e-4  # what is below is drawn here: a logarithmic axis has no zero
        values = {
            "LoRA": [max(v, tiny) for v in self.learned],
            "wanted": [max(v, tiny) for v in self.wanted],
        }
        fig = figures.spectrum(values, self.text)
        return fig.update_yaxes(range=[-4.2, 2]).update_layout(height=400)


@lru_cache(maxsize=256)
def rank_lab_view(r: int, alpha: int, scale: str = "α / r") -> RankLabView:
    """Train LoRA to be a known update ΔW, 48 × 48, whose singular values are 3 / i.

    The loss is ‖ΔW − s B A‖², the one of a linear layer with random input; 40 steps of Adam at
    one rate, whatever r and α are. Raises ValueError for a setting that the sliders do not have.
    """
    import torch

    from peftlab.methods.lora import LowRankDelta

    for name, value, allowed in (
        ("r", r, LAB_RANKS),
        ("alpha", alpha, LAB_ALPHAS),
        ("scale", scale, LAB_SCALES),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: allowed is {', '.join(map(str, allowed))}")
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(LAB_SIZE, LAB_SIZE, generator=generator)).Q for _ in range(2)
    )
    wanted = 3 / torch.arange(1, LAB_SIZE + 1)
    target = left * wanted @ right.T
    delta = LowRankDelta(LAB_SIZE, LAB_SIZE, r, alpha, use_rslora=scale == LAB_SCALES[1])
    delta.initialise(generator)
    optimizer = torch.optim.Adam(delta.parameters(), lr=LAB_RATE)
    loss = []
    for _ in range(LAB_STEPS):
        optimizer.zero_grad()
        error = (target - delta.delta_weight()).square().sum()
        error.backward()
        optimizer.step()
        loss.append(error.item() / target.square().sum().item())
    with torch.no_grad():
        last = (target - delta.delta_weight()).square().sum() / target.square().sum()
        learned = torch.linalg.svdvals(delta.delta_weight())[:r]
    return RankLabView(
        r, alpha, scale, (*loss, last.item()), tuple(learned.tolist()), tuple(wanted.tolist())
    )


class RankLab(Panel):
    """See `rank_lab`."""

    def __init__(self, r: int, alpha: int, scale: str):
        self.view = rank_lab_view(r, alpha, scale)
        style, layout = {"description_width": "70px"}, widgets.Layout(width="420px")
        self.choices = {
            "r": widgets.SelectionSlider(
                options=LAB_RANKS, value=r, description="rank r", style=style, layout=layout
            ),
            "alpha": widgets.SelectionSlider(
                options=LAB_ALPHAS, value=alpha, description="alpha", style=style, layout=layout
            ),
            "scale": widgets.Dropdown(
                options=LAB_SCALES, value=scale, description="scale", style=style
            ),
        }
        self.answer = widgets.HTML(f"<b>{escape(self.view.text)}</b>")
        self.answer.add_class("peftlab-rank-answer")
        for name, widget in self.choices.items():
            widget.add_class(f"peftlab-rank-{name}")
            widget.observe(self._changed, "value")
        self.plot = go.FigureWidget(self.view.figure())
        self.widget = widgets.VBox([*self.choices.values(), self.answer, self.plot])

    def _changed(self, _=None) -> None:
        self.view = rank_lab_view(**{name: w.value for name, w in self.choices.items()})
        self.answer.value = f"<b>{escape(self.view.text)}</b>"
        _redraw(self.plot, self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Rank lab: {self.view.text}"


def rank_lab(r: int = 4, alpha: int = 8, scale: str = "α / r") -> RankLab:
    """A panel that trains LoRA anew at every move: choose r, alpha and what divides alpha."""
    return RankLab(r, alpha, scale)


PRUNINGS = {  # what a lab's slider takes away: the option of PruneStructures, if any, and its score
    "weights, by magnitude": (None, "magnitude"),
    "weights, by Wanda": (None, "wanda"),
    "weights, at random": (None, "random"),
    "heads, by gradient": ("heads", "gradient"),
    "neurons, by gradient": ("neurons", "gradient"),
    "neurons, by magnitude": ("neurons", "magnitude"),
    "layers, by gradient": ("layers", "gradient"),
}


def pruning_shares(what: str, model: str | Shape | Base) -> tuple[tuple[str, float], ...]:
    """What the slider offers, (text, share): tenths, or one head or layer after the other."""
    kind, shape = PRUNINGS[what][0], as_shape(model)
    if kind in ("heads", "layers"):
        count = shape.kv_heads if kind == "heads" else shape.layers
        return tuple((f"{i} of {count}", i / count) for i in range(count))
    return tuple((f"{tenth}0%" if tenth else "0%", tenth / 10) for tenth in range(10))


@dataclass(frozen=True)
class PruningView:
    """What a pruning lab shows for one setting; `points` are the shares seen so far, with losses.

    `file_bytes` is the model in 16 bits as it is stored, zeros and all.
    """

    what: str
    share: float
    said: str
    loss: float
    untouched: float
    zeros: int
    parameters: int
    points: tuple[tuple[float, float], ...]

    @property
    def file_bytes(self) -> int:
        return 2 * self.parameters

    @property
    def text(self) -> str:
        size = accounting.readable_bytes(self.file_bytes)
        return (
            f"{self.said} gone of the {self.what}: loss {self.loss:.2f}, untouched "
            f"{self.untouched:.2f}; {self.zeros:,} zeros in a file of {size}"
        )

    @property
    def shown(self) -> tuple:
        """What `figures.pruning_curve` takes."""
        title = f"{self.said} of the {self.what}: loss {self.loss:.2f}"
        return self.points, self.share, self.untouched, self.what, title

    def figure(self) -> go.Figure:
        return figures.pruning_curve(*self.shown)


def pruned(what: str, share: int | float, calibration: Sequence[str]) -> Method | None:
    """The method that a lab's controls describe; none where nothing goes."""
    if what not in PRUNINGS:
        raise ValueError(f"unknown pruning {what!r}; allowed: {', '.join(PRUNINGS)}")
    kind, score = PRUNINGS[what]
    texts = tuple(calibration) if score in ("wanda", "gradient") else ()
    if not share:
        return None
    if kind is None:
        return Prune(share, score=score, calibration=texts)
    return PruneStructures(**{kind: share}, score=score, calibration=texts)


def pruning_view(
    base: Base,
    texts: Sequence[str],
    what: str,
    share: int | float,
    calibration: Sequence[str] = (),
    points: Mapping[float, float] | None = None,
) -> PruningView:
    """The loss of the base on these texts, the mean over them, with this share of it gone.

    The base is as before when this returns. `points` are other shares and their losses, to be
    drawn. Raises ValueError for a share that leaves nothing, or that the slider does not have.
    """
    said = {share: text for text, share in pruning_shares(what, base)}
    if share not in said:
        raise ValueError(f"share={share}: allowed is {', '.join(map(str, said))}")
    method, points = pruned(what, share, calibration), dict(points or {})
    linears = base.anatomy.linears
    if 0.0 not in points:
        points[0.0] = _loss_on(base, texts)
    with attach(base, method) if method else nullcontext(base) as model:
        loss = _loss_on(model, texts) if method else points[0.0]
        weights = [linear.weight for linear in base.anatomy.linears.values()]
        zeros = sum(int((W == 0).sum()) for W in weights)
        left = base.anatomy.shape.parameters()
    assert base.anatomy.linears is linears
    points[share] = loss
    found = tuple(sorted(points.items()))
    return PruningView(what, share, said[share], loss, points[0.0], zeros, left, found)


def _loss_on(model, texts: Sequence[str]) -> float:
    with torch.no_grad():
        return round(structures.own_loss(model, list(texts)).mean().item(), 3)


class PruningLab(Panel):
    """See `pruning_lab`."""

    def __init__(self, base: Base, texts, calibration, what: str, share: float):
        self.base, self.texts, self.calibration = base, tuple(texts), tuple(calibration)
        self.seen: dict[str, dict[float, float]] = {}
        style = {"description_width": "70px"}
        self.what = widgets.Dropdown(
            options=list(PRUNINGS), value=what, description="what goes", style=style
        )
        self.share = widgets.SelectionSlider(
            options=pruning_shares(what, base),
            value=share,
            description="how much",
            style=style,
            continuous_update=False,
            layout=widgets.Layout(width="460px"),
        )
        self.text = widgets.HTML()
        names = {"what": self.what, "share": self.share, "text": self.text}
        for name, widget in names.items():
            widget.add_class(f"peftlab-pruning-{name}")
        self._look()
        self.plot = go.FigureWidget(self.view.figure())
        self.widget = widgets.VBox([widgets.HBox([self.what, self.share]), self.text, self.plot])
        self._busy = False
        for widget in (self.what, self.share):
            widget.observe(self._changed, "value")

    def _look(self) -> None:
        what, share = self.what.value, self.share.value
        seen = self.seen.setdefault(what, {})
        for _, step in pruning_shares(what, self.base):  # the curve up to here, each point once
            if step <= share and step not in seen:
                view = pruning_view(self.base, self.texts, what, step, self.calibration, seen)
                seen.update(view.points)
        self.view = pruning_view(self.base, self.texts, what, share, self.calibration, seen)
        self.text.value = f"<b>{escape(self.view.text)}</b>"

    def _changed(self, change) -> None:
        if self._busy:  # the changes that this function makes itself
            return
        self._busy = True
        try:
            if change["owner"] is self.what:
                wanted, options = self.share.value, pruning_shares(self.what.value, self.base)
                self.share.options = options
                self.share.value = max(share for _, share in options if share <= wanted)
            self._look()
        finally:
            self._busy = False
        _replace_parts(self.plot, *figures.pruning_parts(*self.view.shown))

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Pruning lab: {self.view.text}"


def pruning_lab(
    base: Base,
    texts: Sequence[str],
    calibration: Sequence[str],
    what: str = "weights, by magnitude",
    share: int | float = 0.5,
) -> PruningLab:
    """A panel that prunes the base as you move a slider, and reads the loss on `texts` anew.

    `calibration` are the texts that Wanda and the gradient are taken from. Each setting is
    attached, measured and taken off again; a setting that was seen is not measured twice.
    """
    return PruningLab(base, texts, calibration, what, share)


BATCHES = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BESIDE_FULL = {  # what full fine-tuning is compared with; the last name is the legend's
    "Full fine-tuning": FullFineTuning(),
    "LoRA, q and v": LoRA(r=8),
    "LoRA, all linear": LoRA(r=8, target_modules="all-linear"),
    "Prompt tuning": PromptTuning(20),
    "Prefix tuning": PrefixTuning(20),
}


@dataclass(frozen=True)
class MemoryView:
    """What the memory explorer shows: the bytes of a step for every method, in float32.

    `steps` are `accounting.Step`s; what is kept aside to undo full fine-tuning is not shown.
    """

    model: str
    batch: int
    length: int
    steps: dict[str, accounting.Step]

    def peak(self, label: str) -> int:
        """The most bytes at any time of the step, without what is kept aside."""
        return self.steps[label].peak - self.steps[label].aside

    @property
    def ratios(self) -> dict[str, float]:
        """How many times a method's peak goes into that of full fine-tuning."""
        full = self.peak("Full fine-tuning")
        return {label: full / self.peak(label) for label in self.steps}

    @property
    def text(self) -> str:
        full = accounting.readable_bytes(self.peak("Full fine-tuning"))
        lora, prompt = (self.ratios[name] for name in ("LoRA, q and v", "Prompt tuning"))
        return (
            f"{full} for full fine-tuning of {self.model} at {self.batch} × {self.length} tokens: "
            f"{lora:.2f} times LoRA, {prompt:.2f} times prompt tuning"
        )

    def moments(self) -> dict[str, dict[str, dict[str, int]]]:
        """Bytes by part at the two moments that can be the peak."""
        shown = {}
        for label, step in self.steps.items():
            standing = {"weights": step.weights, "Adam's moments": step.adam}
            loss = {"activations": step.activations, "around the loss": step.around_it}
            shown[label] = {
                "loss": standing | loss,
                "update": standing | {"gradients": step.gradients},
            }
        return shown

    def figure(self) -> go.Figure:
        return figures.memory_bars(self.moments(), self.text)


def memory_models() -> tuple[str, ...]:
    """Models whose training steps the closed form knows and that have a head of their own."""
    known = [name for name in names() if Shape.named(name).head == "lm"]
    return tuple(sorted(known, key=accounting.base_parameters))


def memory_lengths(model: str | Shape) -> tuple[int, ...]:
    """Tokens that fit beside the virtual ones."""
    most = as_shape(model).context - 20
    return tuple(length for length in TOKENS if length <= most)


@lru_cache(maxsize=256)
def memory_view(model: str | Shape, batch: int, length: int) -> MemoryView:
    """The bytes of one training step on `batch` rows of `length` tokens, for `BESIDE_FULL`.

    Raises ValueError for a model without a walk or a batch that does not fit.
    """
    shape = as_shape(model)
    steps = {
        label: accounting.step_bytes(method, shape, batch, length)
        for label, method in BESIDE_FULL.items()
    }
    return MemoryView(shape.name, batch, length, steps)


class MemoryExplorer(Panel):
    """See `memory_explorer`."""

    def __init__(self, model: str, batch: int, length: int):
        wide = dict(style={"description_width": "110px"}, layout=widgets.Layout(width="460px"))
        self.model = widgets.Dropdown(
            options=memory_models(), value=model, description="model", **wide
        )
        self.batch = widgets.SelectionSlider(
            options=BATCHES, value=batch, description="rows", **wide
        )
        self.length = widgets.SelectionSlider(
            options=memory_lengths(model), value=length, description="tokens a row", **wide
        )
        self.answer = widgets.HTML()
        for name in ("model", "batch", "length", "answer"):
            getattr(self, name).add_class(f"peftlab-memory-{name}")
        self.view = memory_view(model, batch, length)
        self.plot = go.FigureWidget(self.view.figure())
        controls = [self.model, self.batch, self.length, self.answer]
        self.widget = widgets.VBox([*controls, self.plot])
        for control in controls[:3]:
            control.observe(self._changed, "value")
        self._changed()

    def _changed(self, _=None) -> None:
        lengths = memory_lengths(self.model.value)
        if self.length.options != lengths:
            now = max(length for length in lengths if length <= max(self.length.value, lengths[0]))
            self.length.unobserve(self._changed, "value")
            self.length.options, self.length.value = lengths, now
            self.length.observe(self._changed, "value")
        self.view = memory_view(self.model.value, self.batch.value, self.length.value)
        self.answer.value = f"<b style='font-size:1.25em'>{self.view.text}</b>"
        traces = figures.memory_traces(self.view.moments())
        _replace_parts(self.plot, traces, {"title_text": self.view.text})

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Memory explorer: {self.view.text}"


def memory_explorer(model: str = "gpt2", batch: int = 8, length: int = 128) -> MemoryExplorer:
    """A panel of what a training step holds, for five methods: choose model, rows and tokens."""
    return MemoryExplorer(model, batch, length)
