"""Prompt tuning drawn: virtual tokens on their way through the layers, their share of one softmax,
a batch in which each row has a prompt of its own; and two figures of results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from peftlab.figures.sheet import NORMAL, SMALL, Number, Sheet, width_of
from peftlab.figures.style import COLOURS, GREY, figure
from peftlab.tuned import Tuned

PROMPT = COLOURS["prompt_tuning"]


def prompt_layers(tuned: Tuned, tokens: Sequence[str], dark: bool | None = None) -> go.Figure:
    """Where a prompt is in tokens × layers, from what is attached: a column is a token, a row a
    layer, and lines show what two of the tokens read.

    Raises ValueError unless a prompt of 2 to 4 virtual tokens is attached to a decoder.
    """
    prompt = dict(tuned.trainable).get("prompt_tuning.prompt")
    if prompt is None or not 2 <= len(prompt) <= 4 or len(tuned.anatomy.stacks) != 1:
        raise ValueError("draw a prompt of 2 to 4 virtual tokens on a decoder: PromptTuning(3)")
    (P, d), layers, T = prompt.shape, tuned.anatomy.shape.layers, len(tokens)
    vocabulary = len(tuned.anatomy.embedding.weight)
    title = f"{P} × {d} numbers train; they enter once, and go through {layers} frozen layers"
    alt = (
        f"{P} virtual tokens in front of {T} tokens of text. At the bottom the virtual tokens have "
        f"vectors that train, {P} × {d}; the text has rows of the frozen table, {vocabulary} × {d}."
        f" Above are {layers} frozen layers. The last token reads all virtual tokens and all of "
        "the text; a virtual token reads only the virtual tokens up to itself. On top, the text "
        "has logits; what the virtual tokens put out is dropped."
    )
    row = 42
    sheet = Sheet(title, 126 + row * (layers + 1), alt, dark)
    t, left, w, gap = sheet.theme, 208, 62, 12
    base = 62 + row * layers  # the top of the row in which vectors enter

    def x(i: int) -> Number:
        return left + i * w + (gap if i >= P else 0)

    def y(layer: int) -> Number:
        return base - row * layer

    def states(layer: int) -> None:
        sheet.text(left - 12, y(layer) + 12, f"layer {layer}", SMALL, t.quiet, "right")
        for i in range(P + T):
            made = i < P
            fill = t.paper if made else t.frozen
            edge = t.line(PROMPT) if made else t.edge
            sheet.box(x(i), y(layer), w - 10, 24, fill, edge, "dot" if made else "solid")

    def reads(query: int, layer: int, colour: str) -> None:
        rail, middle = y(layer) + 35, w / 2 - 5
        sheet.line([(x(0) + middle, rail), (x(query) + middle, rail)], colour, 1.8)
        for key in range(query + 1):
            sheet.line([(x(key) + middle, rail), (x(key) + middle, y(layer - 1))], colour, 1.8)
        at = x(query) + middle
        sheet.arrow([(at, rail), (at, y(layer) + 24)], colour, 1.8)
        sheet.box(x(query), y(layer), w - 10, 24, t.paper if query < P else t.frozen, colour,
                  width=2.2)  # fmt: skip

    for layer in range(1, layers + 1):
        states(layer)
    reads(P + T - 1, 2, t.ink)
    reads(P - 1, min(4, layers), t.line(PROMPT))
    for i in range(P + T):
        name = f"P{i + 1}" if i < P else tokens[i - P].strip()
        fill = t.fill(PROMPT) if i < P else t.frozen
        sheet.box(x(i), y(0), w - 10, 24, fill, t.line(PROMPT) if i < P else t.edge)
        sheet.text(x(i) + w / 2 - 5, y(0) + 12, name, SMALL, t.on(fill), "center")
        top = y(layers) - 4
        sheet.arrow([(x(i) + w / 2 - 5, top), (x(i) + w / 2 - 5, top - 20)], t.edge)
    sheet.text(left - 12, y(0) + 12, "vectors that enter", SMALL, t.quiet, "right")
    if layers >= 4:
        words = (f"P{P} reads P1 to P{P}:", "it never sees the text")
        for i, line in enumerate(words):
            sheet.text(12, y(4) + 28 + 14 * i, line, SMALL, t.text(PROMPT))
    for i, line in enumerate((f"“{tokens[-1].strip()}” reads", "all that is in front of it")):
        sheet.text(12, y(2) + 28 + 14 * i, line, SMALL)
    middle, beyond = x(0) + (P * w - 10) / 2, x(P) + (T * w - 10) / 2
    sheet.text(middle, 18, "dropped", SMALL, t.text(PROMPT), "center")
    sheet.text(beyond, 18, "logits: what comes next", SMALL, t.quiet, "center")
    foot = y(0) + 40
    sheet.text(x(0), foot, f"<b>P</b> {P} × {d}: trained", SMALL, t.text(PROMPT))
    words = f"rows of the table <b>E</b> {vocabulary:,} × {d}: frozen"
    sheet.text(x(P) + 60, foot, words, SMALL, t.quiet)
    sheet.text(x(0), foot + 22, "dotted: computed by the frozen layers from the row below", SMALL,
               t.quiet)  # fmt: skip
    return sheet.done()


def share_strips(
    names: Sequence[str], weights: Sequence[Number], virtual: int, dark: bool | None = None
) -> go.Figure:
    """One softmax as a strip to scale: e^score of each key, without the first `virtual` keys and
    with them."""
    w, text = np.asarray(weights, dtype=float), list(range(virtual, len(names)))
    shares, alone = w / w.sum(), w[virtual:] / w[virtual:].sum()
    taken = shares[:virtual].sum()
    said = ", ".join(f"{n} {s:.2f}" for n, s in zip(names, shares, strict=True))
    before = ", ".join(f"{names[i]} {s:.2f}" for i, s in zip(text, alone, strict=True))
    alt = (
        f"Two strips of the same length, cut to scale. Without the prompt: {before}. With it: "
        f"{said}. The text keeps {1 - taken:.2f} of the strip, in the same proportions."
    )
    title = f"The prompt takes {taken:.0%}; the words share the rest as they did before"
    sheet = Sheet(title, 208, alt, dark)
    t, left, long, high = sheet.theme, 128, 650, 40
    tops = 24, 124
    sheet.text(left - 14, tops[0] + high / 2, "without prompt", NORMAL, align="right")
    sheet.text(left - 14, tops[1] + high / 2, "with prompt", NORMAL, align="right")

    def strip(top: Number, parts: Sequence[Number], first: int) -> Number:
        x = float(left)
        for i, part in enumerate(parts, first):
            mine, wide = i < virtual, part * long
            fill = t.fill(PROMPT) if mine else t.frozen
            edge = t.line(PROMPT) if mine else t.edge
            sheet.box(x, top, wide, high, fill, edge, hover=f"{names[i]}: {part:.3f}")
            number = f"{w[i]:g}"
            sheet.text(x + wide / 2, top + high / 2, number, NORMAL, t.on(fill), "center")
            ink = t.text(PROMPT) if mine else t.ink
            sheet.text(x + wide / 2, top - 11, names[i], SMALL, ink, "center")
            x += wide
        return x

    strip(tops[0], alone.tolist(), virtual)
    strip(tops[1], shares.tolist(), 0)
    start = left + taken * long
    for ends in ([(left, tops[0] + high), (start, tops[1] - 22)],
                 [(left + long, tops[0] + high), (left + long, tops[1] - 22)]):  # fmt: skip
        sheet.line(ends, t.edge, 1.2, "dot")
    words = f"in a box: e to the score; {w[virtual:].sum():g} in all above, {w.sum():g} below"
    sheet.text(left, tops[1] + high + 24, words, SMALL, t.quiet)
    return sheet.done()


def rows_with_prompts(
    rows: Sequence[tuple[str, str, str]], virtual: int, dark: bool | None = None
) -> go.Figure:
    """A batch whose rows are (prompt, text, answer): each row's prompt, its text, one frozen model,
    and the answer that comes out."""
    kinds = list(dict.fromkeys(prompt for prompt, _, _ in rows))
    listed = "; ".join(f"{text!r} behind the prompt {p!r}, out comes {a!r}" for p, text, a in rows)
    sheet = Sheet(
        f"One batch, one frozen model, {len(kinds)} prompts",
        len(rows) * 48 + 44,
        f"{len(rows)} rows enter one frozen model together: {listed}.",
        dark,
    )
    t, left, cell, high = sheet.theme, 14, 92, 30
    text_x, model_x, out_x = left + cell + 8, 486, 636
    for i, (prompt, text, answer) in enumerate(rows):
        y = 26 + i * 48
        solid = kinds.index(prompt) % 2 == 0
        fill = t.fill(PROMPT) if solid else t.tint(PROMPT)
        sheet.box(left, y, cell, high, fill, t.line(PROMPT), width=1.5)
        ink = t.on(fill)
        sheet.text(left + cell / 2, y + high / 2, f"<b>P</b> {prompt}", SMALL, ink, "center")
        sheet.box(text_x, y, model_x - text_x - 34, high, t.frozen, t.edge)
        sheet.text(text_x + 10, y + high / 2, text, SMALL, t.on(t.frozen))
        for start, end in ((model_x - 32, model_x - 2), (model_x + 118, out_x - 8)):
            sheet.arrow([(start, y + high / 2), (end, y + high / 2)], t.edge)
        sheet.text(out_x, y + high / 2, answer, NORMAL)
    tall = (len(rows) - 1) * 48 + high
    sheet.box(model_x, 26, 116, tall, t.frozen, t.edge)
    sheet.text(model_x + 58, 26 + tall / 2, "<b>the base</b><br>frozen,<br>loaded once", NORMAL,
               t.on(t.frozen), "center")  # fmt: skip
    words = f"trained, {virtual} vectors each"
    sheet.text(left, 10, words, SMALL, t.text(PROMPT))
    sheet.text(max(text_x, left + width_of(words, SMALL) + 24), 10, "text", SMALL, t.quiet)
    sheet.text(out_x, 10, "answer", SMALL, t.quiet)
    return sheet.done()


def seeds_by_rate(table: pd.DataFrame, panel: str, title: str) -> go.Figure:
    """The share right against the learning rate, one plot for each value of `panel`, side by side:
    each seed has its own line and marker."""
    panels, seeds = list(dict.fromkeys(table[panel])), sorted(table["seed"].unique())
    fig = figure(title, "", "share right", height=410, margin_t=96)
    ticks, width = sorted(table["lr"].unique()), 1 / len(panels)
    looks = (("diamond", "solid"), ("circle-open", "dash"), ("triangle-up-open", "dot"))
    for i, name in enumerate(panels, 1):
        axis = "x" if i == 1 else f"x{i}"
        for seed, (marker, dash) in zip(seeds, looks, strict=False):
            runs = table[(table[panel] == name) & (table["seed"] == seed)].sort_values("lr")
            look = dict(color=PROMPT, symbol=marker, size=9)
            fig.add_scatter(
                x=runs["lr"], y=runs["exact"], xaxis=axis, mode="lines+markers", marker=look,
                line=dict(color=PROMPT, dash=dash, width=1.5), name=f"seed {seed}",
                showlegend=i == 1,
            )  # fmt: skip
        place = dict(domain=[(i - 1) * width + 0.012, i * width - 0.012], anchor="y", type="log")
        marks = dict(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks], tickangle=-45)
        words = dict(title=dict(text="learning rate", font=dict(size=12), standoff=8))
        fig.add_annotation(text=f"<b>{name}</b>", x=(i - 0.5) * width, y=1, yanchor="bottom",
                           yshift=4, xref="paper", yref="paper", showarrow=False)  # fmt: skip
        look = fig.layout.xaxis.to_plotly_json() if i == 1 else {}
        fig.update_layout({f"xaxis{'' if i == 1 else i}": {**look, **place, **marks, **words}})
    fig.update_layout(legend=dict(orientation="h", x=0, y=-0.34))
    return fig.update_yaxes(range=[-0.06, 1.06])


def share_by_layer(shares: Mapping[str, Any], uniform: Number, title: str) -> go.Figure:
    """The share of attention that goes to the prompt, layer by layer: `shares` has (texts, layers)
    by label; every text is a point, and a line goes through the means. `uniform` is the share of a
    reader who looks at all tokens alike."""
    fig = figure(title, "layer", "share of attention on the prompt", height=400)
    looks = (("diamond-open", "dash"), ("diamond", "solid"))
    for (label, found), (marker, dash) in zip(shares.items(), looks, strict=False):
        values = np.asarray(found, dtype=float)
        layers = np.arange(1, values.shape[1] + 1)
        at = dict(x=np.tile(layers, len(values)), y=values.ravel(), opacity=0.45)
        look = dict(color=PROMPT, symbol=marker, size=8)
        fig.add_scatter(**at, mode="markers", marker=look, name=label, showlegend=False)
        fig.add_scatter(
            x=layers, y=values.mean(axis=0), mode="lines+markers", marker=look | dict(size=11),
            line=dict(color=PROMPT, dash=dash, width=2), name=label,
        )  # fmt: skip
    fig.add_hline(y=uniform, line=dict(color=GREY, dash="dot", width=1.5))
    fig.add_annotation(x=0.99, xref="paper", xanchor="right", y=uniform, yshift=11, showarrow=False,
                       text=f"a reader who looks at all tokens alike: {uniform:.0%}")  # fmt: skip
    fig.update_layout(legend=dict(orientation="h", x=0, y=-0.22))
    return fig.update_yaxes(range=[0, 1], tickformat=".0%").update_xaxes(dtick=1)
