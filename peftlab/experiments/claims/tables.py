"""The sources' comparison tables, joined: each cell with the verdicts of its claims.

`cells()` reads `data/claims/tables/sources.yaml`; `joined()` is the table, methods down and aspects
across. A cell's verdict is the worst of its claims', in the order of `WORST`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import yaml

from peftlab.bases.data import data_path
from peftlab.experiments import claims

WORST = ("wrong", "imprecise", "disputed", "not tested", "depends", "true")
METHODS = (
    *("Full fine-tuning", "Prompt tuning", "P-tuning", "Prefix tuning", "P-tuning v2"),
    *("LoRA", "QLoRA", "Adapters", "Pruning", "all PEFT"),
)
ASPECTS = (
    *("how it works", "parameters", "memory and files", "speed", "quality"),
    *("strengths", "weaknesses", "when to use"),
)


@dataclass(frozen=True)
class Cell:
    """What one source's table says of one method, in our words, and the claims that judge it."""

    method: str
    aspect: str
    source: str
    says: str
    claims: tuple[str, ...]

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One a claim."""
        known = {claim.id: claim.verdict for claim in claims.load()}
        return tuple(known[name] for name in self.claims)

    @property
    def verdict(self) -> str:
        """The worst of them."""
        return min(self.verdicts, key=WORST.index)


def cells() -> list[Cell]:
    """All cells, in the order of the sources. Raises ValueError for an unknown method or aspect."""
    text = data_path("claims", "tables", "sources.yaml").read_text(encoding="utf-8")
    found = []
    for method, aspect, source, says, judged in yaml.safe_load(text):
        if method not in METHODS or aspect not in ASPECTS:
            raise ValueError(f"no method {method!r} or no aspect {aspect!r}")
        found.append(Cell(method, aspect, source, says, tuple(judged)))
    return found


def joined(aspects: tuple[str, ...] = ASPECTS) -> pd.DataFrame:
    """Methods down, aspects across; each entry is what is said, and its verdict in brackets."""
    rows: dict[str, dict[str, list[str]]] = {}
    for cell in cells():
        if cell.aspect in aspects:
            words = rows.setdefault(cell.method, {}).setdefault(cell.aspect, [])
            words.append(f"{cell.says} [{cell.verdict}]")
    shown = {
        method: {aspect: "; ".join(rows[method].get(aspect, [])) for aspect in aspects}
        for method in METHODS
        if method in rows
    }
    return pd.DataFrame(shown).T
