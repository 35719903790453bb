"""What every drawing of a lesson must be."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.figures.sheet import alt_text, overlaps, pale


def readable(drawings: Mapping[str, go.Figure]) -> None:
    """No word on another, none pale or tiny, no sheet wider than a small page, and a text."""
    for name, figure in drawings.items():
        assert overlaps(figure) == [] and pale(figure) == [], name
        assert figure.layout.width <= 900 and len(alt_text(figure)) > 100, name
        sizes = [note.font.size for note in figure.layout.annotations if note.text]
        assert min(sizes) >= 11, name
