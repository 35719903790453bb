"""Pruning: some entries of the weights held at zero."""

import math
from dataclasses import dataclass, replace

import torch

from peftlab.bases import Shape
from peftlab.methods.calibration import input_norms
from peftlab.methods.checks import check_texts
from peftlab.methods.deltas import Targeted
from peftlab.methods.method import Method
from peftlab.methods.scores import choose, cubic, magnitude, wanda
from peftlab.sites import MaskedWeight


@dataclass(frozen=True)
class Prune(Targeted):
    r"""Unstructured pruning: the entries of W with the lowest scores are zero.

        W' = M ⊙ W,   M = 0 for the round(s · n) of every n entries with the lowest score S
        magnitude  S_ij = |W_ij|        wanda  S_ij = |W_ij| ‖X_j‖₂        W (d_out, d_in)

    X_j is input feature j over all tokens of the `calibration` texts, run through the dense base
    (the paper prunes layer by layer and runs each layer on the output of the pruned ones). `scope`
    is the group in which entries are compared: an output's "row" (Wanda's own), a matrix ("layer"),
    or all matrices ("global"). `pattern="2:4"` zeroes two of every four neighbours along the input.
    `schedule="gradual"` starts dense and prunes while the methods listed after it train, every
    `every` steps until the share `end` of the steps is done: s_t = s (1 − (1 − t / end)³).

    Nothing trains. Stored: M, one bit an entry, but not the scores behind it. W' is a dense tensor
    with zeros, no smaller and no faster. The same entries of a LoRA listed after it are held at
    zero, unless `mask_deltas=False`; after full fine-tuning the zeros are still zeros.

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

    name = "prune"
    title = "Prune"
    limits = {"sparsity": (0.0, 1.0), "end": (0.0, 1.0), "every": (1,)}
    choices = {
        "score": ("magnitude", "wanda", "random", "stored"),
        "scope": (None, "row", "layer", "global"),
        "pattern": (None, "2:4"),
        "schedule": ("one-shot", "gradual"),
    }
    stored_width = 1

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "calibration", check_texts(self.calibration, self.score, "wanda"))
        if self.pattern and (self.sparsity != 0.5 or self.scope):
            raise ValueError("pattern='2:4' is sparsity=0.5 of every four, and no scope")
        if self.schedule == "gradual" and (self.pattern or self.score != "magnitude"):
            raise ValueError("schedule='gradual' goes by magnitude, taken anew, and has no pattern")

    def folded(self) -> Method:
        """The method with a stored mask, without the scores that chose it."""
        return replace(self, score="stored", calibration=(), schedule="one-shot")

    def reach(self, base, attachment, generator):
        linears = self.places(base)
        if self.pattern and (odd := [linear for linear in linears if linear.d_in % 4]):
            raise ValueError(f"pattern='2:4' at {odd[0].name}: {odd[0].d_in} inputs are no fours")
        norms = input_norms(base, linears, self.calibration) if self.score == "wanda" else {}
        scores, now = {}, self.score != "stored" and self.schedule == "one-shot"
        for linear in linears:
            site = attachment.enter(MaskedWeight(linear, self.mask_deltas))
            if self.score == "wanda":
                scores[site] = wanda(site.original, norms[linear.module])
            elif self.score == "random":
                scores[site] = torch.rand(site.original.shape, generator=generator).to(base.device)
            else:
                scores[site] = magnitude(site.original)
        self.hold(scores, self.sparsity if now else 0.0)

    def hold(self, scores: dict[MaskedWeight, torch.Tensor], sparsity: int | float) -> None:
        """Choose the masks of all weights by their scores. What is zero stays so."""
        scope = self.scope or ("row" if self.score == "wanda" else "layer")
        groups = self.pattern if self.pattern and sparsity else scope
        masks = choose(list(scores.values()), sparsity, groups)
        for site, mask in zip(scores, masks, strict=True):
            site.hold(mask & site.mask)

    def after_step(self, attachment, step, steps):
        until = max(1, math.ceil(self.end * steps))
        due = step <= until and (step % self.every == 0 or step == until)
        if self.schedule == "gradual" and due:
            scores = {  # pruned entries stay pruned: their score is below all others
                site: magnitude(site.now).masked_fill(~site.mask, -1) for site in attachment.sites
            }
            self.hold(scores, cubic(self.sparsity, step / until))
        for site in attachment.sites:
            if site.trains:
                site.apply()

    def parameters(self, shape):
        return 0

    def stored(self, shape: Shape) -> int:
        """One bit an entry, in whole bytes: Σ ⌈d_in d_out / 8⌉ over the target matrices."""
        return sum(n * -(-d_in * d_out // 8) for n, d_in, d_out in self.matrices(shape))
