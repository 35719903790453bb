"""Attention with a prefix: which scores there are, and how much of each row the prefix gets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from peftlab.figures.sheet import NORMAL, SMALL, WIDTH, Sheet, width_of
from peftlab.figures.style import COLOURS
from peftlab.figures.theme import mixed


def score_matrix(
    tokens: Sequence[str], virtual: int, causal: bool = True, shares: Any = None,
    dark: bool | None = None,
) -> go.Figure:  # fmt: skip
    """The T × (P + T) scores of one head: a row is a query, a column a key; the prefix's block is
    seen by every query, and a causal model keeps its triangle.

    With `shares` (T, P + T), one head's attention weights, a cell is as dark as its share, and the
    gate λ stands beside each row: what the prefix gets of it.
    """
    T, P = len(tokens), virtual
    words = [shown(token) for token in tokens]
    weights = None if shares is None else np.asarray(shares, dtype=float)
    if weights is not None and weights.shape != (T, P + T):
        raise ValueError(f"shares {weights.shape}: {T} queries and {P} + {T} keys are needed")
    head = "may read" if causal else "reads, as every token does"
    title = f"A prefix of {P} adds {P} columns that every query {head}"
    title += "; nobody reads the future" if causal else ""
    if not P:
        title = "Without a prefix: each query reads itself and the past" if causal else "All to all"
    rows = "; ".join(_row(words, i, P, causal, weights) for i in range(T))
    alt = f"A matrix of scores, {T} queries by {P} virtual and {T} real keys. {rows}."
    cell = min(44.0, 330 / T, 480 / (P + T))
    tilt = max(width_of(word, SMALL) for word in words) > cell
    left, top = 16 + max(width_of(word, NORMAL) for word in words), 76 if tilt else 36
    left += max(0, (WIDTH - left - (P + T) * cell - 215) / 2)
    sheet = Sheet(title, top + T * cell + 62, alt, dark)
    t, colour = sheet.theme, COLOURS["prefix_tuning"]
    gap = 6 if P else 0
    for i, query in enumerate(words):
        y = top + i * cell
        sheet.text(left - 6, y + cell / 2, query, NORMAL, align="right")
        for j in range(P + T):
            key = j - P
            x = left + j * cell + (gap if key >= 0 else 0)
            seen = key < 0 or not causal or key <= i
            own = colour if key < 0 else ""
            fill = (t.fill(colour) if own else t.frozen) if seen else t.paper
            if weights is not None and seen:
                ink = t.fill(colour) if own else t.ink
                fill = mixed(t.paper, ink, float(weights[i, j]) ** 0.5)
            edge = t.paper if seen and weights is None else t.faint
            hover = (
                "" if weights is None else f"{query} reads {_key(words, j, P)}: {weights[i, j]:.3f}"
            )
            sheet.box(x, y, cell, cell, fill, edge, hover=hover)
    for j in range(P + T):
        x = left + (j + 0.5) * cell + (gap if j >= P else 0)
        if j >= P or cell >= 22 or j in (0, P - 1):
            ink = t.text(colour) if j < P else t.ink
            angle = -90 if tilt and j >= P else 0
            sheet.text(x, top - 5, _key(words, j, P), SMALL, ink, "center", "bottom", angle)
    bottom = top + T * cell + 8
    if P:
        middle = max(left + P * cell / 2, 76)
        under = f"<b>{P} virtual keys</b><br>trained; no token wrote them"
        sheet.text(middle, bottom, under, SMALL, t.text(colour), "center", "top")
    x = left + (P + T / 2) * cell + gap
    x = max(x, left + 190 if P else 0)
    sheet.text(
        x,
        bottom,
        f"<b>{T} keys of the text</b><br>frozen W_k times each token",
        SMALL,
        t.quiet,
        "center",
        "top",
    )
    right = left + (P + T) * cell + gap + 22
    if weights is None:
        lines = [
            "A row is one query.",
            "Its softmax runs over all",
            "coloured cells of the row,",
            "which sum to one.",
        ]
        lines += [f"The part of the first {P}", "is the gate λ."] if P else []
        sheet.text(right, top + T * cell / 2, "<br>".join(lines), NORMAL, t.quiet)
    elif P:
        sheet.text(right, top - 5, "λ: what the prefix gets", SMALL, t.text(colour), at="bottom")
        for i, share in enumerate(weights[:, :P].sum(axis=1)):
            y = top + i * cell + cell * 0.2
            sheet.box(right, y, 100, cell * 0.6, t.frozen, t.edge, hover=f"λ = {share:.3f}")
            sheet.box(right, y, 100 * share, cell * 0.6, t.fill(colour), t.line(colour))
            sheet.text(right + 108, y + cell * 0.3, f"{share:.2f}", NORMAL, t.text(colour))
    return sheet.done()


def _row(words, i: int, P: int, causal: bool, weights) -> str:
    if weights is not None:
        return f"{words[i]} gives the prefix {weights[i, :P].sum():.2f}"
    seen = i + 1 if causal else len(words)
    return f"{words[i]} reads {P} virtual and {seen} real keys"


def _key(words: Sequence[str], j: int, P: int) -> str:
    return f"P{j + 1}" if j < P else words[j - P]


def shown(token: str) -> str:
    """A token as it is told apart on an axis."""
    return token.strip().replace("\n", "⏎") or "␣"
