"""The pruning lab: prune at every move of a slider, and read the loss anew."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go
import torch

from peftlab import accounting, figures
from peftlab.bases import Base
from peftlab.bases.shapes import Shape, as_shape
from peftlab.methods import (
    Method,
    Prune,
    PruneStructures,
    calibration,
)
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot
from peftlab.tuned import attach

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
        return round(calibration.own_loss(model, list(texts)).mean().item(), 3)


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
        self.plot = Plot(self.view.figure())
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
        self.plot.change(*figures.pruning_parts(*self.view.shown))

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
