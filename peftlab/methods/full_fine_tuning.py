"""Full fine-tuning: every parameter of the base trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftlab.bases import Shape
from peftlab.methods.method import Method
from peftlab.sites import ExistingParameters


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train every parameter of the base.

        θ ← θ − η · g(∇L(θ))        θ: all parameters, tied ones once

    Trained: all of θ. Stored: all of θ, one full model for every task. Under a head, θ is the
    backbone: the language model's own head is unused and does not change.
    The original tensors are kept aside while it is attached, so detaching restores them.
    Every parameter-efficient method is measured against it.
    """

    name: ClassVar[str] = "full_fine_tuning"
    title: ClassVar[str] = "Full fine-tuning"
    learning_rate: ClassVar[float] = 5e-4
    in_place: ClassVar[bool] = True

    def reach(self, base, attachment, generator):
        module = base.anatomy.backbone if attachment.headless else base.model
        names = [  # a tied tensor comes once; a pooler under a head is as unused as the old head
            name
            for name, _ in module.named_parameters()
            if not (attachment.headless and name.startswith("pooler."))
        ]
        attachment.enter(ExistingParameters(module, names))

    def parameters(self, shape: Shape) -> int:
        """The number of all parameters of the base."""
        return shape.parameters()
