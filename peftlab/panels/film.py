"""A film: drawings that follow each other, with a slider and a button that plays."""

from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go

from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot

MILLISECONDS = 1800  # a frame


class Film(Panel):
    """See `film`."""

    def __init__(self, frames: Sequence[tuple[str, go.Figure]], still: int = -1):
        if not frames:
            raise ValueError("a film needs at least one frame, a caption and a figure")
        self.frames, self.at = list(frames), range(len(frames))[still]
        counted = dict(value=1, min=1, max=len(self.frames))
        self.play = widgets.Play(**counted, interval=MILLISECONDS, description="play")
        self.slider = widgets.IntSlider(
            **counted, description="picture", style={"description_width": "60px"}
        )
        widgets.jslink((self.play, "value"), (self.slider, "value"))
        self.play.add_class("peftlab-film-play")
        self.slider.add_class("peftlab-film-picture")
        self.caption = widgets.HTML()
        self.caption.add_class("peftlab-film-caption")
        self.plot = Plot(self.frames[0][1])
        controls = widgets.HBox([self.play, self.slider])
        self.widget = widgets.VBox([controls, self.caption, self.plot])
        self.slider.observe(self._changed, "value")
        self._show(0)

    def _changed(self, change: dict) -> None:
        self._show(change["new"] - 1)
        self.plot.draw(self.frames[change["new"] - 1][1])

    def _show(self, at: int) -> None:
        words = self.frames[at][0]
        self.caption.value = f"<b>{at + 1} of {len(self.frames)}.</b> {escape(words)}"

    def static(self) -> go.Figure:
        """The frame that stands for the film where nothing can move."""
        return self.frames[self.at][1]

    def describe(self) -> str:
        """All captions, for where the film is not shown."""
        return "Film: " + "; ".join(words for words, _ in self.frames)


def film(frames: Sequence[tuple[str, go.Figure]], still: int = -1) -> Film:
    """A panel that shows drawings one by one, each with its caption; nothing moves by itself.

    `still` says which frame stands for it where no kernel runs.
    """
    return Film(frames, still)
