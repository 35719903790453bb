"""What pruning takes from a real matrix: single entries, two of four, whole rows."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from peftlab.figures.sheet import NORMAL, SMALL, Sheet
from peftlab.figures.style import COLOURS
from peftlab.methods.scores import choose, lowest_out, magnitude


def usual_masks(weight: Tensor, sparsity: int | float = 0.5) -> dict[str, Tensor]:
    """Three masks of one matrix (d_out, d_in) by magnitude: single entries, 2:4 (always a half),
    and whole rows by their length. True stays."""
    scores = magnitude(weight.detach())
    rows = lowest_out(scores.square().sum(dim=1)[None], sparsity)[0]
    return {
        "single entries": choose([scores], sparsity, "layer")[0],
        "2:4, two of four neighbours": choose([scores], 0.5, "2:4")[0],
        "whole rows": rows[:, None].expand_as(scores),
    }


def masked_matrix(
    weight: Tensor, masks: Mapping[str, Tensor], rows: int = 24, columns: int = 32,
    dark: bool | None = None,
) -> go.Figure:  # fmt: skip
    """The upper left corner of a real matrix under each mask: the darker an entry, the larger; what
    the mask takes is blank. Below each: the share of the whole matrix that is gone, and the share
    of its squared size.

    Raises ValueError for a mask of another size.
    """
    W = weight.detach().float().cpu()
    for label, mask in masks.items():
        if mask.shape != W.shape:
            raise ValueError(f"{label}: a mask {tuple(mask.shape)} for W {tuple(W.shape)}")
    rows, columns = min(rows, len(W)), min(columns, W.shape[1])
    width = (776 - 16 * (len(masks) - 1)) / len(masks)
    cell = min(width / columns, 300 / rows)
    facts = {label: _facts(W, mask.cpu()) for label, mask in masks.items()}
    listed = "; ".join(f"{label}: {gone:.0%} of the entries, {size:.0%} of the squared size"
                       for label, (gone, size) in facts.items())  # fmt: skip
    title = "The same matrix, other zeros: " + ", ".join(
        f"{size:.0%}" for _, size in facts.values()
    )
    title += " of its squared size is gone"
    alt = f"The first {rows} rows and {columns} columns of one weight under masks. {listed}."
    sheet = Sheet(title, 96 + cell * rows, alt, dark)
    t, colour = sheet.theme, COLOURS["prune"]
    corner = W[:rows, :columns]
    top = float(corner.abs().max()) or 1.0
    for i, (label, mask) in enumerate(masks.items()):
        x = 12 + i * (width + 16)
        sheet.text(x, 12, f"<b>{label}</b>", NORMAL, t.text(colour))
        sheet.box(x, 26, cell * columns, cell * rows, t.paper, t.edge, under=True)
        kept = torch.where(mask.cpu()[:rows, :columns], corner.abs() / top, torch.nan)
        sheet.figure.add_heatmap(
            z=np.asarray(kept.sqrt()), x0=x + cell / 2, dx=cell, y0=26 + cell / 2, dy=cell,
            customdata=np.asarray(corner), colorscale=[[0, t.frozen], [1, t.ink]], zmin=0, zmax=1,
            xgap=0.8, ygap=0.8, showscale=False, hoverongaps=False, name=label,
            hovertemplate="w = %{customdata:.3f}<extra></extra>",
        )  # fmt: skip
        gone, size = facts[label]
        y = 26 + cell * rows + 16
        sheet.text(x, y, f"{gone:.0%} of the {W.numel():,} entries gone,", SMALL, t.quiet)
        sheet.text(x, y + 15, f"{size:.0%} of the squared size", SMALL, t.quiet)
        sheet.text(x, y + 32, _cost(mask.cpu()), SMALL, t.quiet)
    return sheet.done()


def _facts(W: Tensor, mask: Tensor) -> tuple[float, float]:
    """The shares of the entries, and of the sum of their squares, that a mask takes."""
    lost = W.square()[~mask].sum() / W.square().sum()
    return float((~mask).float().mean()), float(lost)


def _cost(mask: Tensor) -> str:
    """What becomes smaller: only whole rows leave the matrix."""
    rows = int(mask.any(dim=1).sum())
    if rows < len(mask):
        return f"a smaller matrix: {rows} × {mask.shape[1]}"
    return f"still {len(mask)} × {mask.shape[1]}, with zeros"
