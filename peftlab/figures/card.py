"""Lesson 11: a card and what a question tells of it, what has a loss, two adapters as one, the ways
out, and what was recorded about names and form."""

from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go

from peftlab.accounting import readable_bytes
from peftlab.figures.sheet import LARGE, NORMAL, SMALL, WIDTH, Number, Sheet, width_of
from peftlab.figures.style import BLACK, COLOURS, GREY, figure, styles
from peftlab.figures.theme import theme
from peftlab.tuned import Tuned

BLUE = COLOURS["lora"]
LEFT = 14

SMALL_FILE = 100_000  # bytes


def told_and_asked(
    fields: Mapping[str, str],
    questions: Mapping[str, tuple[str, Sequence[str]]],
    dark: bool | None = None,
) -> go.Figure:
    """One card for each sort of question: grey what the question tells, blue what it asks for.

    `fields` are the lines of the card; `questions` maps a sort to its question and to the fields
    that the question tells.
    """
    gap, row = 16, 30
    wide = (WIDTH - 2 * LEFT - gap * (len(questions) - 1)) / len(questions)
    told = "; ".join(
        f"{sort}: tells {' and '.join(told)}, asks {', '.join(f for f in fields if f not in told)}"
        for sort, (_, told) in questions.items()
    )
    title = "The same card is asked for in three ways; grey is told, blue has to be known"
    high = 76 + row * len(fields)
    s = Sheet(title, high + 26, f"Cards with {len(fields)} lines. {told}.", dark)
    t = s.theme
    for at, (sort, (question, tells)) in enumerate(questions.items()):
        x = LEFT + at * (wide + gap)
        s.text(x, 10, f"<b>{sort}</b>", NORMAL)
        s.text(x, 42, "<br>".join(_wrapped(question, wide, SMALL)), SMALL, t.quiet)
        for line, (field, value) in enumerate(fields.items()):
            y, known = 70 + line * row, field not in tells
            s.matrix(x, y, wide, row - 4, colour=BLUE if known else "")
            ink = t.on(t.fill(BLUE) if known else t.frozen)
            s.text(x + 8, y + (row - 4) / 2, f"<b>{field}</b>  {value}", SMALL, ink)
    s.key(LEFT, high + 8, [("", "told by the question"), (BLUE, "asked for, and graded")])
    return s.done()


def _wrapped(text: str, wide: Number, size: Number) -> list[str]:
    """The words in lines no wider than `wide` pixels."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if width_of(longer, size) <= wide else [*lines, word]
    return lines


def paid_tokens(tokens: Sequence[str], paid: Sequence[bool], dark: bool | None = None) -> go.Figure:
    """A question and its card token by token, a new row behind each line break: blue has a loss."""
    row, high, x, y, rows = 38, 26, float(LEFT), 6.0, 1
    places = []
    for token in tokens:
        shown = escape(token.replace("\n", "⏎").strip()) or "␣"
        wide = width_of(shown, SMALL) + 14
        if x + wide > WIDTH - LEFT:
            x, y, rows = float(LEFT), y + row, rows + 1
        places.append((x, y, wide, shown))
        x += wide + 3
        if "\n" in token:
            x, y, rows = float(LEFT), y + row, rows + 1
    first = next(i for i, yes in enumerate(paid) if yes)
    title = f"{sum(paid)} of {len(tokens)} tokens have a loss: the card and the end, nothing else"
    alt = (
        f"Tokens without a loss: {' '.join(p[3] for p in places[:first])}. "
        f"With a loss: {' '.join(p[3] for p in places[first:])}."
    )
    s = Sheet(title, rows * row + 34, alt, dark)
    for (x, y, wide, shown), yes in zip(places, paid, strict=True):
        s.matrix(x, y, wide, high, colour=BLUE if yes else "")
        ink = s.theme.on(s.theme.fill(BLUE) if yes else s.theme.frozen)
        s.text(x + wide / 2, y + high / 2, shown, SMALL, ink, "center")
    (x0, y0, w0, _), (x1, y1, w1, _) = places[first - 1], places[first]
    ink = s.theme.text(BLUE)
    s.arrow([(x0 + w0 / 2, y0 + high), (x0 + w0 / 2, y1 - 6), (x1 + w1 / 2, y1 - 6),
             (x1 + w1 / 2, y1)], s.theme.line(BLUE))  # fmt: skip
    s.text(x0 + w0 + 10, y0 + high / 2, f"← it has to predict {places[first][3]!r}", SMALL, ink)
    last = places[-1]
    s.text(last[0] + last[2] + 10, last[1] + high / 2, "← here it learns to stop", SMALL, ink)
    s.key(LEFT, rows * row + 20, [("", "label −100: left out"), (BLUE, "its label is itself")])
    return s.done()


def fused_adapter(tuned: Tuned, layer: str = "layers.0", dark: bool | None = None) -> go.Figure:
    """The adapters of q and v of one layer, and the one adapter of the fused module that computes
    the same: A is both, one above the other, B has a block for each and zeros elsewhere.

    The sizes are those of the attached factors. Raises KeyError if q or v has none.
    """
    of_q, of_v = (tuned.deltas[f"{layer}.{role}"] for role in "qv")
    (r, d_in), d = of_q.A.shape, len(of_q.B)
    unit = 78 / d
    thin, wide, tall = max(6.0, r * unit * 1.6), d_in * unit, d * unit
    s = Sheet("", 10, "", dark)
    t, ink = s.theme, s.theme.text(BLUE)
    pale = t.tint(BLUE)

    def part(x: Number, y: Number, w: Number, h: Number, fill: str) -> None:
        s.box(x, y, w, h, fill, t.line(BLUE) if fill != t.paper else t.edge)

    strong = t.fill(BLUE)
    s.text(LEFT, 14, "<b>two adapters</b>, as they were trained", NORMAL)
    for y, name, fill in ((58, "q", strong), (58 + tall + 62, "v", pale)):
        x = 90
        s.text(x - 12, y + tall / 2, f"<b>{name}</b>", LARGE, align="right")
        part(x, y, thin, tall, fill)
        part(x + thin + 26, y + (tall - thin) / 2, wide, thin, fill)
        s.text(x + thin + 13, y + tall / 2, "×", LARGE, align="center")
        s.text(x + thin / 2, y + tall + 12, f"B<sub>{name}</sub> {d} × {r}", SMALL, ink, "center")
        s.text(x + thin + 26 + wide / 2, y + (tall + thin) / 2 + 12,
               f"A<sub>{name}</sub> {r} × {d_in}", SMALL, ink, "center")  # fmt: skip
    x, y = 400, 58
    s.text(x - 30, 14, "<b>one adapter</b> on the module of q, k and v, as PEFT wants it", NORMAL)
    for i, name in enumerate("qkv"):
        s.text(x - 12, y + (i + 0.5) * tall, f"<b>{name}</b>", LARGE, align="right")
        for j, fill in enumerate((strong, pale)):
            here = (i, j) in ((0, 0), (2, 1))
            part(x + j * thin, y + i * tall, thin, tall, fill if here else t.paper)
    s.text(x + thin, y + 3 * tall + 13, f"B {3 * d} × {2 * r}", SMALL, ink, "center")
    a, middle = x + 2 * thin + 40, y + 1.5 * tall
    part(a, middle - thin, wide, thin, strong)
    part(a, middle, wide, thin, pale)
    s.text(a + wide / 2, middle + thin + 12, f"A {2 * r} × {d_in}", SMALL, ink, "center")
    s.text(x + 2 * thin + 20, middle, "×", LARGE, align="center")
    s.text(a + wide + 20, middle - 8, "an empty block is zero: q reads", SMALL, t.quiet)
    s.text(a + wide + 20, middle + 8, f"the first {r} numbers, v the last {r}", SMALL, t.quiet)
    ours, theirs = 2 * r * (d_in + d), 2 * r * (d_in + 3 * d)
    title = f"Two adapters of {ours:,} numbers become one of {theirs:,}"
    alt = (
        f"Left: q and v each have B, {d} by {r}, and A, {r} by {d_in}. Right: one B of {3 * d} by "
        f"{2 * r}; the rows of q have B of q in the first {r} columns, the rows of v have B of v "
        f"in the last {r}, all else is zero; one A of {2 * r} by {d_in}, A of q above A of v."
    )
    s.figure.update_layout(meta=dict(alt=alt, paper=t.paper))
    return s.resized(title, max(y + 3 * tall + 30, 58 + 2 * tall + 62 + 30)).done()


def ways_out(
    adapter: Mapping[str, int], merged: Mapping[str, int], dark: bool | None = None
) -> go.Figure:
    """What `save` and `merge_and_export` write, with the bytes of each file, and who reads it.

    A small file holds settings, whose length differs with the library that writes them.
    """
    s, top, wide, line = Sheet("", 10, "", dark), 40, 300, 19
    t, ink = s.theme, s.theme.text(BLUE)
    sides = (
        ("tuned.save(folder)", adapter, ("needs the base beside it", ""),
         ("peftlab: attach(base, folder)", "PEFT: PeftModel.from_pretrained",
          "vLLM: --enable-lora --lora-modules", "llama.cpp: convert_lora_to_gguf.py")),
        ("tuned.merge_and_export(folder)", merged, ("is a whole model", "made"),
         ("transformers: from_pretrained", "vLLM: as any other model",
          "llama.cpp: convert_hf_to_gguf.py")),
    )  # fmt: skip
    lowest, told = 0.0, []
    for at, (call, files, (words, made), readers) in enumerate(sides):
        x, y = LEFT + at * (WIDTH / 2), float(top)
        total = sum(files.values())
        s.text(x, 16, f"<b>{call}</b>", NORMAL, ink)
        high = 34 + line * len(files)
        s.matrix(x, y, wide + 60, high, colour=BLUE, made=bool(made))
        fill = t.tint(BLUE) if made else t.fill(BLUE)
        s.text(x + 10, y + 15, f"<b>{readable_bytes(total)}</b>, {words}", NORMAL, t.on(fill))
        for n, (name, size) in enumerate(files.items()):
            s.text(x + 10, y + 36 + line * n, name, SMALL, t.on(fill))
            said = readable_bytes(size) if size >= SMALL_FILE else "small"
            s.text(x + wide + 50, y + 36 + line * n, said, SMALL, t.on(fill), "right")
        below = top + 34 + line * max(len(adapter), len(merged)) + 20
        s.arrow([(x + 24, y + high), (x + 24, below + 4)], t.line(BLUE))
        for n, reader in enumerate(readers):
            s.text(x + 10, below + 16 + 22 * n, reader, NORMAL)
        lowest = max(lowest, below + 16 + 22 * len(readers))
        told.append(f"{call} writes {', '.join(files)}, {readable_bytes(total)} in all, for "
                    f"{'; '.join(readers)}")  # fmt: skip
    s.figure.update_layout(meta=dict(alt=". ".join(told) + ".", paper=t.paper))
    times = sum(merged.values()) / sum(adapter.values())
    title = f"Two folders leave the house; one is {times:.0f} times as large as the other"
    return s.resized(title, lowest + 6).done()


def names_and_form(runs: pd.DataFrame, columns: Mapping[str, str], title: str) -> go.Figure:
    """A row for each method, and on it every run's point of several shares.

    `runs` has "label" and the columns, whose words are the values of `columns`; the rows are in the
    order of their first appearance.
    """
    n = sorted({len(its) for _, its in runs.groupby("label")})
    seeds = " or ".join(map(str, n))
    fig = figure(f"{title}<br><sup>every run's point, n = {seeds} a row</sup>", "share", "")
    labels = list(dict.fromkeys(runs["label"]))
    looks = styles(labels)
    for at, (column, words) in enumerate(columns.items()):
        symbol = ("line-ns-open", "circle", "x-thin-open")[at]
        for label in labels:
            values = runs.loc[runs["label"] == label, column]
            colour = GREY if at == 0 else theme().line(BLACK) if at == 2 else looks[label]["colour"]
            marker = dict(symbol=symbol, size=11, color=colour, line=dict(width=2, color=colour))
            fig.add_scatter(
                x=values, y=[label] * len(values), mode="markers", marker=marker, name=words,
                showlegend=label == labels[0],
            )  # fmt: skip
    fig.update_yaxes(autorange="reversed", type="category", ticks="")
    fig.update_xaxes(tickformat=".0%", range=[-0.03, 1.05])
    return fig.update_layout(
        height=190 + 30 * len(labels), margin=dict(l=170, t=76, b=110),
        legend=dict(orientation="h", x=0, y=-0.19, yanchor="top"),
    )  # fmt: skip


def sure_of_names(groups: Mapping[str, pd.DataFrame], title: str) -> go.Figure:
    """How likely a model found the name that it gave, a point for each answer, by group.

    Each group has "sure" (a probability) and "right" (whether the name was the right one).
    """
    fig = figure(title, "probability of the name that it gave", "")
    looks = {True: (BLUE, "circle", "right"), False: (COLOURS["prune"], "x", "wrong")}
    for right, (colour, symbol, words) in looks.items():
        x, y = [], []
        for at, table in enumerate(groups.values()):
            some = table[table["right"] == right].reset_index(drop=True)
            x += some["sure"].tolist()
            y += [at + 0.09 * (i % 5 - 2) for i in range(len(some))]
        marker = dict(color=colour, symbol=symbol, size=9)
        fig.add_scatter(x=x, y=y, mode="markers", marker=marker, name=words)
    ticks = dict(tickvals=list(range(len(groups))), ticktext=list(groups), zeroline=False)
    fig.update_yaxes(**ticks, range=[len(groups) - 0.5, -0.5], ticks="")
    fig.update_xaxes(range=[-0.03, 1.03], tickformat=".0%")
    legend = dict(orientation="h", x=0, y=1, yanchor="bottom")
    return fig.update_layout(height=280, margin=dict(l=190, t=90), legend=legend)
