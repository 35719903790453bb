"""Pruning: some entries of the weights held at zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from peftlab.bases import Shape
from peftlab.masks import choose, cubic, input_norms, magnitude, wanda
from peftlab.methods.lora import LoRA
from peftlab.methods.method import Method, check_texts, require
from peftlab.sites import MaskedWeight

OPTIONS = {
    "score": ("magnitude", "wanda", "random", "stored"),
    "scope": (None, "row", "layer", "global"),
    "pattern": (None, "2:4"),
    "schedule": ("one-shot", "gradual"),
}
CODES = "codes are made anew for whole blocks, and a mask is not kept through that"
APART = {"pissa": "it splits W into two parts, both dense", "nf4": CODES, "qlora": CODES}  # by name


@dataclass(frozen=True)
class Prune(Method):
    r"""Unstructured pruning: the entries of W that seem to matter least are zero.

        W' = M ⊙ W,   M = 0 for the round(s · n) of every n entries with the lowest score S
        magnitude  S_ij = |W_ij|        wanda  S_ij = |W_ij| ‖X_j‖₂        W (d_out, d_in)

    X_j is input feature j over all tokens of the `calibration` texts, run through the dense base
    (the paper prunes layer by layer and runs each on the pruned ones before). `scope` is what the
    entries of a group are compared within: an output's "row" (Wanda's own), a matrix ("layer"),
    or all of them ("global"). `pattern="2:4"` takes two of every four neighbours along the input.
    `schedule="gradual"` starts dense and prunes while what is attached behind it trains, every
    `every` steps until `end` of them are done: s_t = s (1 − (1 − t / end)³).

    Nothing trains. Stored: M, one bit an entry; how it was found is left behind. W' is a dense
    tensor with zeros, no smaller and no faster. A LoRA behind it is held at zero in the same
    places, unless `mask_deltas=False`; after full fine-tuning the zeros are still zeros.

    Han et al. 2015, arXiv:1506.02626 (magnitude); Sun et al. 2023, arXiv:2306.11695, section 3
    (Wanda); Zhu and Gupta 2017, arXiv:1710.01878, equation 1 (gradual); Mishra et al. 2021,
    arXiv:2104.08378 (2:4).
    """

    sparsity: int | float = 0.5
    score: str = "magnitude"
    scope: str | None = None
    pattern: str | None = None
    target_modules: tuple[str, ...] | list[str] | str = "all-linear"
    calibration: tuple[str, ...] | list[str] = ()
    mask_deltas: bool = True
    schedule: str = "one-shot"
    end: int | float = 0.5
    every: int = 10

    name: ClassVar[str] = "prune"
    title: ClassVar[str] = "Prune"

    def __post_init__(self):
        require("sparsity", self.sparsity, 0.0, 1.0)
        require("end", self.end, 0.0, 1.0)
        require("every", self.every, 1)
        for option, allowed in OPTIONS.items():
            if (value := getattr(self, option)) not in allowed:
                raise ValueError(f"{option}={value!r}: allowed is {', '.join(map(repr, allowed))}")
        named = LoRA(target_modules=self.target_modules).target_modules  # refused as LoRA does
        object.__setattr__(self, "target_modules", named)
        check_texts(self, "wanda")
        if self.pattern and (self.sparsity != 0.5 or self.scope):
            raise ValueError(
                f"pattern={self.pattern!r} is sparsity=0.5 of every four, and no scope"
            )
        if self.schedule == "gradual" and (self.pattern or self.score != "magnitude"):
            raise ValueError("schedule='gradual' goes by magnitude, taken anew, and has no pattern")

    def objection(self, before, after):
        if any(method.name != "prune_structures" for method in before):
            return "it comes first, for the mask is chosen on W as the base has it"
        return next((APART[method.name] for method in after if method.name in APART), "")

    def folded(self) -> Method:
        """The mask as it is stored, whatever found it."""
        return replace(self, score="stored", calibration=(), schedule="one-shot")

    def targets(self, available: tuple[str, ...]) -> tuple[str, ...]:
        """The targets on a model that has these; ValueError for one that it has not."""
        return LoRA(target_modules=self.target_modules).targets(available)

    def reach(self, base, attachment, generator):
        linears = base.anatomy.select(self.targets(base.anatomy.targets))
        if self.pattern and (odd := [linear for linear in linears if linear.d_in % 4]):
            raise ValueError(f"pattern='2:4' at {odd[0].name}: {odd[0].d_in} inputs are no fours")
        norms = input_norms(base, linears, self.calibration) if self.score == "wanda" else {}
        scores, now = {}, self.score != "stored" and self.schedule == "one-shot"
        for linear in linears:
            site = attachment.stack.enter_context(MaskedWeight(linear, self.mask_deltas))
            attachment.sites.append(site)
            attachment.frozen[f"prune.{linear.name}.mask"] = lambda site=site: site.bits
            if self.score == "wanda":
                scores[site] = wanda(site.original, norms[linear.module])
            elif self.score == "random":
                scores[site] = torch.rand(site.original.shape, generator=generator).to(base.device)
            else:
                scores[site] = magnitude(site.original)
        self.hold(scores, self.sparsity if now else 0.0)

    def hold(self, scores: dict[MaskedWeight, Tensor], sparsity: int | float) -> None:
        """Choose the masks of all weights by their scores."""
        scope = self.scope or ("row" if self.score == "wanda" else "layer")
        groups = self.pattern if self.pattern and sparsity else scope
        masks = choose(list(scores.values()), sparsity, groups)
        for site, mask in zip(scores, masks, strict=True):
            site.hold(mask)

    def after_step(self, attachment, step, steps):
        until = max(1, math.ceil(self.end * steps))
        due = step <= until and (step % self.every == 0 or step == until)
        if self.schedule == "gradual" and due:
            scores = {  # what was pruned stays so: its score is below all others
                site: magnitude(site.now).masked_fill(~site.mask, -1) for site in attachment.sites
            }
            self.hold(scores, cubic(self.sparsity, step / until))
        for site in attachment.sites:
            if site.trains:
                site.apply()

    def parameters(self, shape: Shape) -> int:
        """None: a mask is chosen and does not train."""
        return 0

    def stored(self, shape: Shape) -> int:
        """One bit an entry, in whole bytes: Σ ⌈d_in d_out / 8⌉ over the target matrices."""
        return sum(copies * -(-size // 8) for copies, size in self._sizes(shape))

    def _sizes(self, shape: Shape) -> list[tuple[int, int]]:
        """(copies, entries) of every target matrix."""
        matrices = [m for t in self.targets(shape.targets) for m in shape.matrices(t)]
        return [(copies, d_in * d_out) for copies, d_in, d_out in matrices]

    def file_bytes(self, shape: Shape, width: int = 4) -> int:
        """The packed bits, whatever a trained number takes."""
        return self.stored(shape)

    def footprint(self, plan):
        """Aside: the original rows, one bit an entry, and for the deltas held at zero a byte."""
        targets = self.targets(plan.shape.targets)
        entries = sum(copies * size for copies, size in self._sizes(plan.shape))
        plan.aside += 4 * entries + self.stored(plan.shape)
        if self.mask_deltas:
            plan.aside += entries
            plan.masked.append(lambda name: name.rsplit(".", 1)[-1] in targets)
