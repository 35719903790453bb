"""The rank lab: LoRA trained anew at every move of a slider."""

from dataclasses import dataclass
from functools import lru_cache
from html import escape

import ipywidgets as widgets
import plotly.graph_objects as go
import torch

from peftlab import figures
from peftlab.panels.panel import Panel
from peftlab.panels.plot import Plot

LAB_SIZE, LAB_STEPS, LAB_RATE = 48, 40, 5e-3
LAB_RANKS, LAB_ALPHAS = (1, 2, 4, 8, 16, 32, 48), (1, 2, 4, 8, 16, 32, 64, 128)
LAB_SCALES = ("α / r", "α / √r")


@dataclass(frozen=True)
class RankLabView:
    """What LoRA learned of one known update: its singular values, the update's, and the loss.

    `loss` is ‖ΔW − s B A‖² / ‖ΔW‖² along the steps, `floor` what the best matrix of rank r leaves.
    """

    r: int
    alpha: int
    scale: str
    loss: tuple[float, ...]
    learned: tuple[float, ...]
    wanted: tuple[float, ...]

    @property
    def floor(self) -> float:
        left = sum(value**2 for value in self.wanted[self.r :])
        return left / sum(value**2 for value in self.wanted)

    @property
    def text(self) -> str:
        """What came of it, in one line."""
        end, start = self.loss[-1], self.loss[0]
        if not end <= start:
            found = "the steps are too large: it ended worse than it began"
        else:
            found = (
                f"{1 - end:.0%} of the update learned, rank {self.r} allows {1 - self.floor:.0%}"
            )
        return f"r = {self.r}, α = {self.alpha}, {self.scale}: {found}"

    def figure(self) -> go.Figure:
        """Both spectra; the title says how much was learned."""
        tiny = 1e-4  # what is below is drawn here: a logarithmic axis has no zero
        values = {
            "LoRA": [max(v, tiny) for v in self.learned],
            "wanted": [max(v, tiny) for v in self.wanted],
        }
        fig = figures.spectrum(values, self.text)
        return fig.update_yaxes(range=[-4.2, 2]).update_layout(height=400)


@lru_cache(maxsize=256)
def rank_lab_view(r: int, alpha: int, scale: str = "α / r") -> RankLabView:
    """Train LoRA to be a known update ΔW, 48 × 48, whose singular values are 3 / i.

    The loss is ‖ΔW − s B A‖², the one of a linear layer with random input; 40 steps of Adam at
    one rate, whatever r and α are. Raises ValueError for a setting that the sliders do not have.
    """

    from peftlab.methods.lora import LowRankDelta

    for name, value, allowed in (
        ("r", r, LAB_RANKS),
        ("alpha", alpha, LAB_ALPHAS),
        ("scale", scale, LAB_SCALES),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: allowed is {', '.join(map(str, allowed))}")
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(LAB_SIZE, LAB_SIZE, generator=generator)).Q for _ in range(2)
    )
    wanted = 3 / torch.arange(1, LAB_SIZE + 1)
    target = left * wanted @ right.T
    delta = LowRankDelta(LAB_SIZE, LAB_SIZE, r, alpha, use_rslora=scale == LAB_SCALES[1])
    delta.initialise(generator)
    optimizer = torch.optim.Adam(delta.parameters(), lr=LAB_RATE)
    loss = []
    for _ in range(LAB_STEPS):
        optimizer.zero_grad()
        error = (target - delta.delta_weight()).square().sum()
        error.backward()
        optimizer.step()
        loss.append(error.item() / target.square().sum().item())
    with torch.no_grad():
        last = (target - delta.delta_weight()).square().sum() / target.square().sum()
        learned = torch.linalg.svdvals(delta.delta_weight())[:r]
    return RankLabView(
        r, alpha, scale, (*loss, last.item()), tuple(learned.tolist()), tuple(wanted.tolist())
    )


class RankLab(Panel):
    """See `rank_lab`."""

    def __init__(self, r: int, alpha: int, scale: str):
        self.view = rank_lab_view(r, alpha, scale)
        style, layout = {"description_width": "70px"}, widgets.Layout(width="420px")
        self.choices = {
            "r": widgets.SelectionSlider(
                options=LAB_RANKS, value=r, description="rank r", style=style, layout=layout
            ),
            "alpha": widgets.SelectionSlider(
                options=LAB_ALPHAS, value=alpha, description="alpha", style=style, layout=layout
            ),
            "scale": widgets.Dropdown(
                options=LAB_SCALES, value=scale, description="scale", style=style
            ),
        }
        self.answer = widgets.HTML(f"<b>{escape(self.view.text)}</b>")
        self.answer.add_class("peftlab-rank-answer")
        for name, widget in self.choices.items():
            widget.add_class(f"peftlab-rank-{name}")
            widget.observe(self._changed, "value")
        self.plot = Plot(self.view.figure())
        self.widget = widgets.VBox([*self.choices.values(), self.answer, self.plot])

    def _changed(self, _=None) -> None:
        self.view = rank_lab_view(**{name: w.value for name, w in self.choices.items()})
        self.answer.value = f"<b>{escape(self.view.text)}</b>"
        self.plot.draw(self.view.figure())

    def static(self) -> go.Figure:
        return self.view.figure()

    def describe(self) -> str:
        return f"Rank lab: {self.view.text}"


def rank_lab(r: int = 4, alpha: int = 8, scale: str = "α / r") -> RankLab:
    """A panel that trains LoRA anew at every move: choose r, alpha and what divides alpha."""
    return RankLab(r, alpha, scale)
