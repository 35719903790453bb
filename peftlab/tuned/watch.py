"""A word when an optimiser steps without what trains.

What a method trains is mostly no parameter of the model, so a loop over `model.parameters()`, such
as Trainer's, would run to its end and train nothing. While something is attached, each step of an
optimiser of torch asks whether it holds only parameters of the model, although others have a
gradient; that is said once. The model carries no hook for it.
"""

import warnings
import weakref
from dataclasses import dataclass, field

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from peftlab.bases import Base


@dataclass
class Watched:
    """What the optimisers that have stepped so far held, and how often one of ours did."""

    seen: set[int] = field(default_factory=set)  # ids of parameters
    steps: int = 0
    told: bool = False


_watched: weakref.WeakKeyDictionary[Base, Watched] = weakref.WeakKeyDictionary()
_hooks: list = []  # one while a base is watched


def watch(base: Base) -> None:
    """Say it once if an optimiser leaves out what is attached to this base."""
    _watched.setdefault(base, Watched())
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def unwatch(base: Base) -> None:
    """The opposite; nothing stays behind."""
    _watched.pop(base, None)
    if not _watched:
        while _hooks:
            _hooks.pop().remove()


def steps_of(base: Base) -> int | None:
    """How often an optimiser of what is attached has stepped; None if nobody watches."""
    return _watched[base].steps if base in _watched else None


def _look(optimizer: Optimizer, args, kwargs) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for base, watched in list(_watched.items()):
        tuned, again, known = base.adapted_by, held <= watched.seen, held | watched.seen
        watched.seen = known
        if tuned is None:
            continue
        ours = not held.isdisjoint(map(id, tuned.trainable.values()))
        watched.steps += ours
        missing = [
            n for n, p in tuned.trainable.items() if p.grad is not None and id(p) not in known
        ]
        if watched.told or not missing or (ours and not again):
            continue
        if held <= set(map(id, base.model.parameters())):
            watched.told = True
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            warnings.warn(
                f"the optimiser steps without {missing[0]}{more}, which {tuned.label} trains: no "
                "parameter of the model. Give the loop tuned.as_module(), or the optimiser "
                "tuned.trainable.values()",
                stacklevel=3,
            )
