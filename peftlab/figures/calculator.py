"""Whether a training step fits: its parts beside the memory of usual GPUs."""

from collections.abc import Mapping

import plotly.graph_objects as go

from peftlab.figures.sheet import NORMAL, SMALL, WIDTH, Sheet, width_of
from peftlab.figures.style import BLUE, GREY, OLIVE, ORANGE, PURPLE, SKY, VERMILLION, figure
from peftlab.figures.theme import theme

STEP_PARTS = {
    "weights": GREY,
    "codes": BLUE,
    "adapters": ORANGE,
    "optimiser": PURPLE,
    "activations": SKY,
    "gradients": VERMILLION,
    "buffers": OLIVE,
}
MOMENTS = {"update": "when the update is made", "loss": "around the loss"}
GB = 1e9


def fits_bars(
    moments: Mapping[str, Mapping[str, int]], gpus: Mapping[str, int], title: str
) -> go.Figure:
    """The bytes of a step by part at its two moments, and how many each GPU has free."""
    most = max(sum(parts.values()) for parts in moments.values()) / GB
    fig = figure(title, "GB", "", barmode="stack", height=330)
    for part, colour in STEP_PARTS.items():
        held = [moments[moment].get(part, 0) / GB for moment in MOMENTS]
        fig.add_bar(
            x=held, y=list(MOMENTS.values()), name=part, marker_color=colour, orientation="h",
            hovertemplate=f"{part}: %{{x:.2f}} GB<extra></extra>",
        )  # fmt: skip
    sizes = sorted(gpus.items(), key=lambda item: item[1])
    roomy = [size / GB for _, size in sizes if size / GB >= most]
    right = 1.08 * max(most, roomy[0] if roomy else sizes[-1][1] / GB)
    shown = [(name, size / GB) for name, size in sizes if size / GB < right]
    for at, (name, size) in enumerate(shown):
        dash = "solid" if size >= most else "dot"
        fig.add_vline(x=size, line=dict(color=theme().ink, width=1, dash=dash))
        fig.add_annotation(
            x=size, y=1 + 0.1 * (at % 4), yref="paper", showarrow=False, font_size=11,
            text=name, xanchor="right" if size > 0.85 * right else "center", yanchor="bottom",
        )  # fmt: skip
    fig.update_layout(
        margin=dict(l=190, r=30, t=135, b=100),
        title=dict(x=0.02, xref="container", y=0.96, yanchor="top", font_size=15),
    )
    fig.update_layout(legend=dict(orientation="h", y=-0.5, x=0, traceorder="normal"))
    return fig.update_xaxes(range=[0, right], title_standoff=5).update_layout(height=380)


def step_parts(
    rows: Mapping[str, Mapping[str, int]], gpus: Mapping[str, int], title: str,
    dark: bool | None = None,
) -> go.Figure:  # fmt: skip
    """The bytes of a step by part, a row of boxes to scale for each method, and GPUs as lines.

    `rows` are bytes by part, for each method; `gpus` the bytes that each GPU has free.
    """
    left, row, top = 136, 44, 30
    most = max(*(sum(parts.values()) for parts in rows.values()), *gpus.values())
    scale = (WIDTH - left - 76) / most
    told = "; ".join(
        f"{kind} {sum(parts.values()) / GB:.1f} GB, "
        + ", ".join(f"{part} {size / GB:.1f}" for part, size in parts.items() if size >= GB / 20)
        for kind, parts in rows.items()
    )
    fits = "; ".join(f"{name} has {size / GB:.1f} GB" for name, size in gpus.items())
    s = Sheet(title, top + row * len(rows) + 36, f"{title}. {told}. {fits}.", dark)
    end = top + row * len(rows)
    for name, size in gpus.items():
        x = left + size * scale
        s.line([(x, 22), (x, end)], s.theme.ink, 1.2, "dot")
        s.text(x, 12, name, SMALL, align="center")
    for at, (kind, parts) in enumerate(rows.items()):
        x, y = left, top + at * row + 4
        s.text(14, y + 14, kind, NORMAL)
        for part, colour in STEP_PARTS.items():
            wide = parts.get(part, 0) * scale
            if wide >= 1:
                fill = "" if part == "weights" else colour
                s.box(x, y, wide, 28, s.theme.fill(fill) if fill else "",
                      hover=f"{kind}, {part}: {parts[part] / GB:.2f} GB")  # fmt: skip
                x += wide
        words, x = f"<b>{sum(parts.values()) / GB:.1f} GB</b>", x + 8
        for size in sorted(gpus.values()):  # behind a line that would go through it
            if x - 4 < left + size * scale < x + width_of(words, NORMAL) + 4:
                x = left + size * scale + 8
        s.text(x, y + 14, words, NORMAL)
    shown = [p for p in STEP_PARTS if any(parts.get(p, 0) * scale >= 1 for parts in rows.values())]
    s.key(14, end + 20, [("" if p == "weights" else STEP_PARTS[p], p) for p in shown])
    return s.done()
