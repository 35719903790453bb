"""A Plotly figure in the page that is always sent, and drawn, whole."""

import functools
import gzip
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import anywidget
import plotly
import plotly.graph_objects as go
import traitlets
from ipywidgets import Widget, widget_serialization

from peftlab.figures import spoken

LOOKS = Path(__file__).with_suffix(".css")
# What draws, and what says the controls beside it to those who hear the page.
CODE = (Path(__file__).with_name("controls.js"), Path(__file__).with_suffix(".js"))


class Script(Widget):
    """Plotly's own script, packed with gzip; one for all the figures of a kernel."""

    packed = traitlets.Bytes().tag(sync=True)


@functools.cache
def _packed() -> bytes:
    script = resources.files(plotly) / "package_data" / "plotly.min.js"
    return gzip.compress(script.read_bytes(), compresslevel=1, mtime=0)


_script: Script | None = None


def script() -> Script:
    """The one `Script`; a new one if somebody closed it."""
    global _script
    if _script is None or _script.comm is None:
        _script = Script(packed=_packed())
    return _script


class Plot(anywidget.AnyWidget):
    """A figure in the page. `shown` is what it shows; change it with `draw` or `change`.

    Every message has the whole figure, so one that is lost is made good by the next one. The page
    asks again soon after the figure has appeared and after the panel around it was touched.
    """

    _esm = "".join(path.read_text(encoding="utf-8") for path in CODE)
    _css = LOOKS.read_text(encoding="utf-8")
    figure = traitlets.Unicode().tag(sync=True)
    words = traitlets.Unicode().tag(sync=True)  # for those who cannot see it
    version = traitlets.Int().tag(sync=True)
    script = traitlets.Instance(Script).tag(sync=True, **widget_serialization)

    def __init__(self, figure: go.Figure):
        self.shown, self._listeners = figure, []
        super().__init__(figure=figure.to_json(), words=spoken(figure), script=script())
        self.on_msg(self._answer)

    @property
    def data(self) -> tuple:
        """The traces that are shown."""
        return self.shown.data

    @property
    def layout(self) -> go.Layout:
        """The layout that is shown."""
        return self.shown.layout

    def draw(self, figure: go.Figure) -> None:
        """Show another figure."""
        self.shown = figure
        with self.hold_sync():  # one message
            self.figure, self.words = figure.to_json(), spoken(figure)
            self.version += 1

    def change(self, traces: Sequence[dict], layout: dict) -> None:
        """Show what differs between two states of one figure."""
        for old, new in zip(self.shown.data, traces, strict=True):
            old.update(new)
        self.shown.layout.update(layout)
        self.draw(self.shown)

    def on_click(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the `customdata` of each point that is clicked and has some."""
        self._listeners.append(listener)

    def _answer(self, _, content: dict, __) -> None:
        match content:
            case {"ask": "script"}:
                self.send({"answer": "script"}, [_packed()])
            case {"ask": "figure", "have": have} if have != self.version:
                self.send_state(["figure", "words", "version"])
            case {"clicked": name}:
                for listener in self._listeners:
                    listener(name)
