"""Tasks with methods of their own on one base: each comes back as it was, the base stays."""

import pytest
import torch
from models import CASES, call, letters, stir, tiny, token_ids

from peftlab import FullFineTuning, LoRA, PromptTuning, TaskAdapters, attach, train


def logits(tuned, family="gpt2"):
    with torch.no_grad():
        return call(tuned, token_ids(2, 7))


# One family a case: what is kept is a question of the method.
ON_ITS_FIRST = [(case.families[0], name) for name, case in CASES.items()]


@pytest.mark.parametrize("family, case", ON_ITS_FIRST)
def test_every_method_comes_back_as_it_was(case, family):
    base, made = tiny(family), CASES[case]
    untouched = base.fingerprint()
    adapters = TaskAdapters(base)
    tuned = adapters.add("one", made.methods, head=made.head)
    stir(tuned)
    wanted, state = logits(tuned), tuned.state()
    other = adapters.add("two", PromptTuning(3), seed=1)
    assert not tuned.attached and other.attached and adapters.current == "two"
    again = adapters.use("one")
    assert not other.attached and torch.equal(logits(again), wanted)
    kept = again.state()
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)
    assert adapters.close().fingerprint() == untouched
    assert torch.equal(logits(adapters.use("one")), wanted)
    adapters.close()


def test_a_swap_trains_each_as_if_it_were_alone():
    options = dict(steps=4, batch_size=4, progress=False, evaluate=False)
    methods = {"all": FullFineTuning(), "some": LoRA(r=2), "prompt": PromptTuning(2)}
    adapters, alone = TaskAdapters(tiny("gpt2")), {}
    for name, method in methods.items():
        with attach(tiny("gpt2"), method) as tuned:
            train(tuned, letters(), **options)
            alone[name] = logits(tuned)
    for name, method in methods.items():
        train(adapters.add(name, method), letters(), **options)
    for name in ("some", "all", "prompt", "all", "some"):
        assert torch.equal(logits(adapters.use(name)), alone[name])
        assert adapters.use(name) is adapters.tuned  # in place, once it is attached
    adapters.close()


def test_what_cannot_be_attached_leaves_the_one_before():
    adapters = TaskAdapters(tiny("gpt2"))
    stir(adapters.add("some", LoRA(r=2)))
    wanted = logits(adapters.tuned)
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        adapters.add("prompt", PromptTuning(100_000))
    assert adapters.current == "some" and torch.equal(logits(adapters.tuned), wanted)
    assert adapters.names == ["some"]
    with pytest.raises(ValueError, match="'some' has an adapter already"):
        adapters.add("some", PromptTuning(2))
    with pytest.raises(ValueError, match="no adapter for 'other'; there are some"):
        adapters.use("other")
    assert "some*" in repr(adapters)


def test_merged_weights_come_off_and_a_detached_one_is_said():
    base = tiny("gpt2")
    untouched = base.fingerprint()
    adapters = TaskAdapters(base)
    stir(adapters.add("some", LoRA(r=2)))
    wanted = logits(adapters.tuned)
    adapters.tuned.merge()
    adapters.close()
    assert base.fingerprint() == untouched
    assert torch.equal(logits(adapters.use("some")), wanted)
    adapters.tuned.detach()
    with pytest.raises(RuntimeError, match="'some' was detached elsewhere"):
        adapters.close()
    assert torch.equal(logits(adapters.use("some")), wanted)  # as it was kept before
    adapters.close()
