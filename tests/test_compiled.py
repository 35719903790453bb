"""Training with `compile=True`, against training without.

A real compile by inductor takes some ten seconds, so few cases have one. The kinds of methods are
traced whole, without a break, by the same front end with an eager back end.
"""

import shutil

import pytest
import torch
from models import CASES, PLAIN, U32, adapted, letters, put, surroundings, tiny

from peftlab import LoRA, PTuning, QLoRA, attach, train
from peftlab.methods.heads import Classification, Spans
from peftlab.tuned.compiled import padded

FLOAT32, FLOAT64 = torch.float32, torch.float64
TRACED = [(family, case) for family, case in PLAIN if "qlora" not in case]
SHORT = ("lora", "prefix", "prompt", "full", "ia3", "houlsby", "p around", "adalora", "head prompt")


def batch_of(tuned):
    batch = letters().batch_for(tuned, letters().train[:3])
    if tuned.head is not None:
        batch["labels"] = batch["input_ids"] % tuned.head.classes
        if isinstance(tuned.head, Classification):
            batch["labels"] = batch["labels"][:, 0]
        elif isinstance(tuned.head, Spans):
            batch["labels"] = torch.zeros_like(batch["labels"][:, :2])
    return batch


@pytest.mark.parametrize(
    "family, case", [(f, c) for f, c in TRACED if c in SHORT and (f != "t5" or c == "lora")]
)
def test_it_is_traced_whole_and_equal(case, family):
    """One graph, the same loss and the same gradients; padding moves them by rounding alone."""
    torch.compiler.reset()
    tuned = adapted(case, family)
    batch = padded(batch_of(tuned), tuned.tokenizer.pad_token_id, tuned.context)
    whole = not CASES[case].anchored  # else every row is asked for its token, outside the graph
    loss = torch.compile(tuned.batch_loss, backend="eager", fullgraph=whole, dynamic=False)
    found = []
    for way in (loss, tuned.batch_loss):
        value = way(batch)
        gradients = torch.autograd.grad(value, list(tuned.trainable.values()), allow_unused=True)
        found.append([value, *(g for g in gradients if g is not None)])
    for ours, theirs in zip(*found, strict=True):
        # All logits here, and there those with a label: some hundred sums of numbers of this size.
        assert (ours - theirs).abs().max() <= 1000 * U32 * max(1.0, theirs.abs().max())
    torch.compiler.reset()


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))),
    reason="no C++ compiler, which torch.compile needs",
)
@pytest.mark.parametrize("case", ["lora", "prefix"])
def test_a_compiled_run_is_the_plain_one(case):
    """Through inductor, on a family without dropout. Each loss is as near to the plain one as 4 E,
    with E how far the plain run in float32 is from that in float64. The base is as it was."""
    losses = {}
    for dtype, compiled in ((FLOAT32, True), (FLOAT32, False), (FLOAT64, False)):
        base = tiny("llama", dtype)
        before = surroundings(base)
        tuned = put(case, base)
        how = dict(steps=4, batch_size=4, lr=1e-2, progress=False, evaluate=False)
        losses[dtype, compiled] = train(tuned, letters(), compile=compiled, **how).history["loss"]
        assert type(tuned.model.forward).__name__ == "method"  # no compiled code stays on the model
        if CASES[case].merges:
            tuned.merge()
            tuned.unmerge()
        tuned.keep("a")
        tuned.use("a")
        tuned.use(None)
        tuned.detach()
        assert surroundings(base) == before
    compiled, plain, double = losses.values()
    assert (compiled - plain).abs().max() <= 4 * (plain - double).abs().max()


def test_what_is_padded_is_not_read():
    tuned = adapted("lora", "t5")
    batch = batch_of(tuned)
    longer = padded(batch, 0, tuned.context)
    assert {tensor.shape[1] for tensor in longer.values()} == {32}
    assert torch.allclose(tuned.batch_loss(longer), tuned.batch_loss(batch), rtol=100 * U32)
    assert padded(batch, 0, 5)["input_ids"].shape[1] == max(5, batch["input_ids"].shape[1])


@pytest.mark.parametrize(
    "method, what",
    [(QLoRA(r=2, block_size=8), "a weight held as codes"), (PTuning(2), "an LSTM")],
)
def test_what_is_refused(method, what):
    with attach(tiny("gpt2"), method) as tuned:
        with pytest.raises(ValueError, match=f"torch.compile cannot follow {what}"):
            train(tuned, letters(), steps=1, compile=True)


def test_without_a_compiler_it_says_what_to_install():
    torch.compiler.reset()
    nowhere = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with torch._inductor.config.patch(nowhere), attach(tiny("llama"), LoRA(r=2)) as tuned:
        with pytest.raises(ValueError, match=r"install one \(on Linux g\+\+\), or train without"):
            train(tuned, letters(), steps=1, compile=True, progress=False, evaluate=False)
