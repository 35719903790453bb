"""The learner's function inside the model: as its attention, or in the hooks of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from peftlab.attention import Dispatched, explicit_mask
from peftlab.bases import Base
from peftlab.exercises import Exercise
from peftlab.exercises.answers import describe

NAME = "peftlab-learner"


def run(exercise: Exercise, answer: Any, compute: Callable[[Callable], Any]) -> Any:
    """`compute(answer)` if the answer passes; else `compute` of the solution. Prints which it was.

    An answer that stops with an error in the model is replaced by the solution too.
    """
    verdict = exercise(answer)
    why = "not attempted yet" if verdict.status == "open" else "not right yet"
    if verdict.passed:
        try:
            made = compute(answer)
        except Exception as error:
            why = f"right on the grader's tensors and stopped here with {describe(error)}"
        else:
            print("In the model: your function.")
            return made
    print(f"In the model: the lesson's solution, because yours is {why}.")
    return compute(exercise.solution)


@contextmanager
def attention(base: Base, function: Callable, P_k: Tensor, P_v: Tensor) -> Iterator[None]:
    """Inside, every attention of the base is `function(query, key, value, mask, P_k, P_v)`.

    P_k and P_v are (layers, kv_heads, P, d_head). The function gets those of its layer, and keys,
    values and prefix with one head for each head of the queries. Afterwards the base computes as
    before, and the function's name is not registered any more.
    """
    layer = {site.module: i for i, site in enumerate(base.anatomy.attentions)}

    def attend(module, query, key, value, attention_mask, **_):
        given = key, value, P_k[layer[module]], P_v[layer[module]]
        groups = query.shape[1] // key.shape[1]  # query heads that share a key head
        key, value, k, v = (t.repeat_interleave(groups, dim=-3) for t in given)
        return function(query, key, value, attention_mask, k, v).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, explicit_mask)
    try:
        with Dispatched(base.model, NAME):
            yield
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(NAME, None)


@contextmanager
def linears(
    base: Base, function: Callable, deltas: dict[str, nn.Module], alpha: int | float, put: Callable
) -> Iterator[None]:
    """Inside, each named weight of the base computes `function(x, W, A, B, alpha)`.

    `deltas` have A (r, d_in) and B (d_out, r). `put(linear, delta)` makes a hook that adds
    delta(x) to W x, and returns its handle. The function's result has W x in it already, so the
    delta is the function's result less W x. Afterwards no hook is left.
    """
    with ExitStack() as hooks:
        for name, factors in deltas.items():
            linear = base.anatomy.linears[name]
            W = linear.weight.detach()  # (d_out, d_in)

            def delta(x, W=W, A=factors.A, B=factors.B):
                rows = x.flatten(0, -2)  # tokens d_in
                added = function(rows, W, A, B, alpha) - rows @ W.T
                return added.unflatten(0, x.shape[:-1])

            hooks.callback(put(linear, delta).remove)
        yield
