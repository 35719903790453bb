"""The attention explorer: what one head looks at, with a prefix as it started and trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go

from peftlab import figures
from peftlab.bases.probes import AttentionMap
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot


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
        self.plot = Plot(self.view.figure())
        self.text.value = f"<b>{escape(self.view.text)}</b>"
        rows = [widgets.HBox([self.length, self.example]), widgets.HBox([self.layer, self.head])]
        self.widget = widgets.VBox([*rows, self.text, self.plot])
        for widget in self.sliders.values():
            widget.observe(self._changed, "value")

    def _changed(self, _=None) -> None:
        chosen = {name: widget.value for name, widget in self.sliders.items()}
        self.view = attention_view(self.scenes, **chosen)
        self.text.value = f"<b>{escape(self.view.text)}</b>"
        self.plot.change(*figures.attention_parts(*self.view.shown))

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
