"""What stands between an adapted base and another library's loop: its steps, its device."""

from __future__ import annotations

import warnings

from peftlab.bases import LanguageModel
from peftlab.methods import Method
from peftlab.tuned.watch import steps_of, watch

# What loops ask of a transformers model beside `forward`; TRL's makes the loss of the first two.
ASKED = ("base_model", "get_output_embeddings", "enable_input_require_grads", "add_model_tags")
ASKED += ("gradient_checkpointing_enable", "activation_checkpointing_enable")


class Steps:
    """Tells the methods of every step of an optimiser, and warns once if nobody tells them.

    AdaLoRA and gradual pruning have a schedule, and pruning before full fine-tuning holds its
    zeros after each step. `callback` makes transformers' Trainer tell them.
    """

    def __init__(self, tuned: LanguageModel):
        watch(tuned.base)
        self.tuned, self.heard = tuned, steps_of(tuned.base)
        self.deaf = [m.title for m in tuned.methods if type(m).after_step != Method.after_step]

    def tell(self, step: int, steps: int) -> None:
        """Step 1 … `steps` is done; the gradients are still there."""
        self.tuned.after_step(step, steps)
        self.heard = steps_of(self.tuned.base)

    def check(self) -> None:
        """Called before each forward pass of training."""
        if self.deaf and steps_of(self.tuned.base) not in (None, self.heard):
            warnings.warn(
                f"{self.deaf[0]} did not hear of the optimiser's step: call "
                "module.after_step(step, steps) behind optimizer.step(), or give Trainer "
                "callbacks=[module.callback]",
                stacklevel=5,
            )
            self.deaf = []


def callback(steps: Steps):
    """What Trainer calls after a step, also after one that its scaler skipped."""
    from transformers import TrainerCallback  # it imports every library that Trainer may use

    class Callback(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **_):
            if steps.heard is None or steps.heard != steps_of(steps.tuned.base):
                steps.tell(state.global_step + 1, state.max_steps)

    return Callback()


def follow(tuned: LanguageModel) -> None:
    """Move what the sites keep, and the kept adapters, to where the model is."""
    for site in tuned._sites:
        site.to(tuned.device)
    for kept in tuned.kept.values():
        kept.update({key: tensor.to(tuned.device) for key, tensor in kept.items()})
    if tuned.using is not None:
        tuned.use(tuned.using)  # the kept adapters in use move as well
