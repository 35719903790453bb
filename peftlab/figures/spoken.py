"""What a figure shows, in words: for those who cannot see it, and for where it cannot be drawn."""

import base64
import re
from collections.abc import Iterable, Mapping

import numpy as np
import plotly.graph_objects as go

NAMED = 12  # traces that are told one by one; of more, the names alone
LISTED = 8  # bars that are told one by one
PALE = 0.5  # a trace paler than this is the background of another


def spoken(figure: go.Figure | Mapping) -> str:
    """A drawing's own text, or the title, the axes and what each trace does.

    `figure` may be a figure or what it is stored as.
    """
    told = figure.to_plotly_json() if isinstance(figure, go.Figure) else figure
    layout = told.get("layout", {})
    if alt := layout.get("meta", {}).get("alt"):
        return alt
    title = _words(layout.get("title", {}).get("text", ""))
    parts = [title, *_axes(layout), *_traces(told, layout)]
    return " ".join(p if p.endswith((".", "?", "!")) else f"{p}." for p in parts if p)


def _words(text: str) -> str:
    """A text of Plotly's without its tags."""
    text = re.sub(r"<br>(?=<su[bp]>)", ". ", text or "")
    return " ".join(re.sub(r"<[^>]*>", " ", text).split()).replace(" . ", ". ")


def _axes(layout: Mapping) -> Iterable[str]:
    for letter, where in (("x", "Across"), ("y", "Up")):
        axes = [v for k, v in layout.items() if re.fullmatch(rf"{letter}axis\d*", k)]
        titles = [_words(axis.get("title", {}).get("text", "")) for axis in axes]
        if titles := list(dict.fromkeys(title for title in titles if title)):
            yield f"{where}: {', '.join(titles)}"


def _traces(told: Mapping, layout: Mapping) -> Iterable[str]:
    """One part for each trace that has something to say, those of one name together."""
    groups: dict[str, list[Mapping]] = {}
    for trace in told.get("data", []):
        if trace.get("opacity", 1) > 0 and trace.get("visible", True) is True:
            groups.setdefault(_words(trace.get("name", "")), []).append(trace)
    if len(groups) > NAMED:
        yield f"Shown: {', '.join(name for name in groups if name)}"
        return
    for name, traces in groups.items():
        clear = [t for t in traces if t.get("opacity", 1) > PALE] or traces
        if said := _trace(clear, layout):
            yield f"{name}: {said}" if name else said


def _trace(traces: list[Mapping], layout: Mapping) -> str:
    """What the traces of one name show."""
    first = traces[0]
    match first.get("type", "scatter"):
        case "heatmap":
            z = _numbers(first.get("z"))
            if z.ndim == 2 and z.size:
                return f"a map of {z.shape[0]} by {z.shape[1]}, {_span(z)}"
        case "table":
            rows = max((len(column) for column in first["cells"]["values"]), default=0)
            head = ", ".join(_words(str(word)) for word in first["header"]["values"])
            return f"a table of {rows} rows: {head}"
        case _:
            return _series(traces, layout)
    return ""


def _series(traces: list[Mapping], layout: Mapping) -> str:
    """Named places one by one, a line by its ends, other points by their range."""
    first = traces[0]
    place, value = "x", "y"
    if first.get("orientation") == "h" or _is_counted_across(first, layout):
        place, value = "y", "x"
    places, values = (_all(traces, key) for key in (place, value))
    if len(places) != len(values):
        return ""
    names = _ticks(layout.get(_axis(first, place), {}))
    pairs = [(_name(a, names), b) for a, b in zip(places, values, strict=True) if _is_number(b)]
    if not pairs:
        return ""
    own = _words(first.get("name", ""))
    if own in names.values():  # its own row, in which the points are spread
        return _span([number for _, number in pairs])
    if all(isinstance(name, str) for name, _ in pairs):
        at: dict[str, list] = {}
        for name, number in pairs:
            at.setdefault(name, []).append(number)
        if len(at) <= LISTED:
            return "; ".join(_span(v) + (f" at {k}" if k != own else "") for k, v in at.items())
    elif "lines" in first.get("mode", "") or first.get("line") or len(pairs) == 1:
        ends = pairs[:1] + pairs[1:][-1:]
        return ", ".join(f"{_short(number)} at {_short(where)}" for where, number in ends)
    return f"{len(pairs)} values, {_span([number for _, number in pairs])}"


def _axis(trace: Mapping, letter: str) -> str:
    """The layout's name of a trace's axis: "yaxis2"."""
    return f"{letter}axis{trace.get(f'{letter}axis', letter)[1:]}"


def _is_counted_across(trace: Mapping, layout: Mapping) -> bool:
    """Whether the rows have names and the numbers lie across."""
    across, up = (layout.get(_axis(trace, letter), {}) for letter in "xy")
    titles = [_words(axis.get("title", {}).get("text", "")) for axis in (across, up)]
    return bool(titles[0] and not titles[1]) or not any(map(_is_number, _all([trace], "y")))


def _ticks(axis: Mapping) -> dict[int | float, str]:
    """The words that stand at numbers of an axis."""
    words = axis.get("ticktext") or []
    places = _numbers(axis.get("tickvals")).ravel().tolist()
    named = len(words) == len(places) and all(map(_is_number, places))
    return {a: _words(str(b)) for a, b in zip(places, words, strict=True)} if named else {}


def _name(place, names: Mapping[int | float, str]):
    """A place in words where it has some: its own, or those of the nearest tick."""
    if isinstance(place, str):
        return _words(place)
    if not names or not _is_number(place):
        return place
    nearest = min(names, key=lambda tick: abs(tick - place))
    return names[nearest] if abs(nearest - place) < 0.5 else place


def _is_number(value) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _span(values: Iterable) -> str:
    low, high = (_short(end(values).item()) for end in (np.nanmin, np.nanmax))
    return low if low == high else f"{low} to {high}"


def _short(value):
    """A number with three digits, everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{round(value):,}"
    return f"{value:.3g}".replace("-", "−")


def _all(traces: list[Mapping], key: str) -> list:
    return [value for trace in traces for value in _numbers(trace.get(key)).ravel().tolist()]


def _numbers(values) -> np.ndarray:
    """An array of a figure: a list, or the bytes that Plotly stores an array as."""
    if isinstance(values, Mapping):
        array = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
        shape = str(values.get("shape", "")) or str(array.size)
        return array.reshape([int(size) for size in shape.split(",")])
    if values is None:
        return np.array([])
    try:
        return np.array(values)
    except ValueError:  # rows of several lengths
        return np.array([])
