"""The live trainer: choose, press Train, watch the curve, stop."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go

from peftlab import figures, tasks
from peftlab.bases import Base
from peftlab.panels.choices import CHOICES, RANKS, allowed_sizes, build_method, starts
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot
from peftlab.training import Run, train
from peftlab.tuned import attach

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SECONDS_BETWEEN_FRAMES = 0.3


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
        self.plot = Plot(curve(self.records, self.method.value))
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
        self.plot.draw(curve(self.records, self.method.value))

    def _show_run(self, run: Run) -> None:
        self.progress.value = run.steps
        how = "stopped" if run.interrupted else "done"
        self.status.value = f"{how}: {run.steps} steps in {run.seconds:.1f} s; adapter detached"
        if run.problem:
            self.status.value += f"<br>{escape(run.problem)}"
        self.scores.value = scores_table(run.before, run.metrics)
        self.plot.draw(curve(self.records, self.method.value))

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
