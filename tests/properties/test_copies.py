"""A copy of a base, or of a base with any method attached, is as good as the original, and apart.

`copy.deepcopy` and `pickle` both copy tensors bit for bit, and the copy computes with the same
operations: everything here is equal exactly.
"""

import copy
import pickle

import pytest
import torch
from models import (
    CASES,
    FAMILIES,
    ON_EVERY,
    call,
    loss_of,
    put,
    stir,
    surroundings,
    tiny,
    token_ids,
)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])


def frozen(model, ids):
    with torch.no_grad():
        return call(model, ids)


def held(tuned) -> dict[str, torch.Tensor]:
    return tuned.trainable | tuned.frozen


def storages(model) -> set[int]:
    return {t.data_ptr() for t in (*model.parameters(), *model.buffers())} - {0}


@COPIES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base(family, copied):
    base, ids = tiny(family), token_ids(2, 7)
    other = copied(base)
    assert other.fingerprint() == base.fingerprint()
    assert torch.equal(frozen(other, ids), frozen(base, ids))
    assert not storages(other.model) & storages(base.model)
    next(other.model.parameters()).data.add_(1.0)
    assert other.fingerprint() != base.fingerprint() == tiny(family).fingerprint()


@ON_EVERY
def test_a_base_with_something_attached(case, family):
    """The same logits and the same verbs; what happens to one does not happen to the other."""
    ids, bare = token_ids(2, 7), tiny(family)
    tuned = stir(put(case, tiny(family)))
    between = copy.deepcopy(tuned)
    assert not storages(between.model) & storages(tuned.model)
    assert not {p.data_ptr() for p in held(between).values()} & {
        p.data_ptr() for p in held(tuned).values()
    }
    other = pickled(between)
    logits = frozen(tuned, ids)
    assert torch.equal(frozen(other, ids), logits)
    assert other.base is not tuned.base and other.base.adapted_by is other
    assert other.sites == tuned.sites and repr(other) == repr(tuned)
    state = tuned.state()
    assert other.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state().items())

    if other.trainable:  # a step of the copy
        optimizer = torch.optim.AdamW(other.trainable.values(), lr=0.1)
        loss_of(other, ids).backward()
        optimizer.step()
        other.after_step(1, 1)
        assert not torch.equal(frozen(other, ids), logits)
    assert torch.equal(frozen(tuned, ids), logits)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tuned.state().items())

    if CASES[case].merges:
        trained = frozen(other, ids)
        other.merge()
        assert other.merged and not tuned.merged
        other.unmerge()
        assert torch.equal(frozen(other, ids), trained)
    other.load_state({name: t.detach().clone() for name, t in held(tuned).items()})
    assert torch.equal(frozen(other, ids), logits)
    other.detach()
    assert torch.equal(frozen(tuned, ids), logits)
    for base in (other.base, tuned.detach()):
        assert base.fingerprint() == bare.fingerprint()
        here, wanted = surroundings(base), surroundings(bare)
        assert {**here, "addresses": None} == {**wanted, "addresses": None}
        assert torch.equal(frozen(base, ids), frozen(bare, ids))
