"""Full fine-tuning: every parameter of the base trains."""

from dataclasses import dataclass

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

    name = "full_fine_tuning"
    title = "Full fine-tuning"
    learning_rate = 5e-4
    in_place = True

    def reach(self, base, attachment, generator):
        attachment.enter(ExistingParameters(*attachment.own()))

    def parameters(self, shape):
        return shape.parameters()
