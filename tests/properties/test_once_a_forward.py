"""The network that makes a soft prompt runs once in a forward pass, however many sites read it."""

import pytest
import torch
from models import CASES, FAMILIES, GENERATING, PAIRS, call, loss_of, put, tiny, token_ids

from peftlab.sites import Source

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
MADE = [
    (family, name)
    for family, name in PAIRS
    if any(method.folded() != method for method in CASES[name].methods if CASES[name].virtual)
]
ON_MADE = pytest.mark.parametrize("family, case", MADE)


def counted(tuned) -> list[int]:
    """A list that grows by one item at each run of a network that makes a soft prompt."""
    runs: list[int] = []
    for source in tuned.sources.values():
        source.module.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_every_family_has_a_network_at_each_place():
    """At the input, in attention, and at both, on every family."""
    for family in FAMILIES:
        names = {name for where, name in MADE if where == family}
        assert {"p lama", "prefix mlp", "prompt and prefix"} <= names


@ON_MADE
def test_one_run_a_forward(case, family):
    tuned = put(case, tiny(family))
    runs, ids = counted(tuned), token_ids(2, 7)
    for n in (1, 2, 3):
        call(tuned, ids)
        assert len(runs) == n


@ON_MADE
def test_one_run_a_training_step_also_with_checkpointing(case, family):
    tuned = put(case, tiny(family))
    tuned.model.gradient_checkpointing_enable()
    tuned.train()
    runs, ids = counted(tuned), token_ids(2, 7)
    for n in (1, 2):
        loss_of(tuned, ids).backward()
        assert len(runs) == n
    assert all(parameter.grad is not None for parameter in tuned.trainable.values())


@pytest.mark.parametrize("family, case", [pair for pair in MADE if pair[0] in GENERATING])
def test_one_run_for_all_tokens_of_an_answer(case, family):
    tuned = put(case, tiny(family))
    runs = counted(tuned)
    tuned.generate(["a>b", "cd>"], max_new_tokens=4)
    assert len(runs) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_was_interrupted_leaves_nothing(family):
    """The next pass makes its own prompt, of the values that are there then."""
    tuned = put("prompt and prefix", tiny(family))
    runs, ids = counted(tuned), token_ids(2, 7)
    last = list(tuned.anatomy.layers.values())[-1][-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(tuned, ids)
    hook.remove()
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter.zero_()
        call(tuned, ids)
    (source,) = tuned.sources.values()
    assert isinstance(source, Source) and len(runs) == 2
    assert all((tensor == 0).all() for tensor in source().values())
