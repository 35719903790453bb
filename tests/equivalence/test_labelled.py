"""The loss with logits only where a label is, against the loss of all logits."""

from threading import Thread

import pytest
import torch
from models import CASES, EVERY, FAMILIES, U32, adapted, decoder_ids, padded, tiny, token_ids

from peftlab import LoRA, attach
from peftlab.bases import FAMILIES as KNOWN

from .closeness import check, part

WORDED = [(family, case) for family, case in EVERY if CASES[case].head is None]


def some_labels(model):
    """Two rows of different length, four labels of the longer and one of the shorter."""
    rows = list(token_ids(2, 9))
    ids, mask = padded([rows[0], rows[1][:6]], "right")
    read = decoder_ids(ids, mask) if model.kind == "encoder-decoder" else ids
    labels = torch.full_like(read, -100)
    labels[0, 1:5], labels[1, 4] = read[0, 1:5], read[1, 4]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return batch | ({"decoder_input_ids": read} if model.kind == "encoder-decoder" else {})


def losses(tuned, batch):
    """The loss of few logits and of all, with the gradients of each."""
    labels = batch["labels"]
    given = {key: tensor for key, tensor in batch.items() if key != "labels"}
    ways = (
        lambda: tuned.batch_loss(batch),
        lambda: tuned.label_loss(tuned(**given), labels),
    )
    for loss in ways:
        value = loss()
        found = torch.autograd.grad(value, list(tuned.trainable.values()), allow_unused=True)
        yield value, [torch.zeros(1) if g is None else g for g in found]


@pytest.mark.parametrize("family, case", WORDED)
def test_the_loss_and_its_gradients(case, family):
    found = {}
    for dtype in (torch.float32, torch.float64):
        tuned = adapted(case, family, dtype)
        (few, few_gradients), (whole, gradients) = losses(tuned, some_labels(tuned))
        # Both are means of five numbers in float32, added in another order.
        assert (few - whole).abs() <= 2 * 5 * U32 * whole
        found[dtype] = list(zip(few_gradients, gradients, strict=True))
    pairs = list(zip(tuned.trainable, *found.values(), strict=True))
    rounding = max(part(*both) for _, *both in pairs)
    for name, single, double in pairs:
        check(single, double, name, rounding=rounding)


def head_of(base):
    path = KNOWN[base.anatomy.family].head
    return base.model.get_submodule(path) if path else base.model.get_output_embeddings()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_reads_the_places_with_a_label_alone(family):
    base, seen = tiny(family), []
    batch = some_labels(base)
    head_of(base).register_forward_hook(lambda head, args, output: seen.append(args[0].shape))
    base.batch_loss(batch)
    assert seen == [(5, base.anatomy.shape.d_model)]
    assert not head_of(base)._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_label_everywhere_it_is_the_plain_loss(family):
    base = tiny(family)
    batch = some_labels(base)
    batch["labels"] = batch["labels"].clamp(min=7)
    given = {key: tensor for key, tensor in batch.items() if key != "labels"}
    assert torch.equal(base.batch_loss(batch), base.label_loss(base(**given), batch["labels"]))


def test_another_thread_gets_all_its_logits():
    base, found, ids = tiny("gpt2"), [], token_ids(2, 5)
    wanted, batch = base(ids), some_labels(base)
    alone = base.batch_loss(batch)

    def meanwhile(*_):  # the body has run, and the head is about to
        handle.remove()
        other = Thread(target=lambda: found.append(base(ids)))
        other.start()
        other.join()

    handle = base.anatomy.backbone.register_forward_hook(meanwhile)
    assert torch.equal(base.batch_loss(batch), alone)
    assert torch.equal(found[0], wanted)


def test_what_is_no_loss():
    base = tiny("gpt2")
    batch = some_labels(base)
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert base.batch_loss(nothing).isnan()
    with pytest.raises(ValueError, match=r"labels \(2, 8\): the tokens are \(2, 9\)"):
        base.batch_loss(batch | {"labels": batch["labels"][:, 1:]})


def test_an_error_leaves_no_hook_on_the_head():
    with attach(tiny("gpt2"), LoRA()) as tuned:
        block = tuned.anatomy.layers[""][0]

        def stop(*_):
            raise KeyboardInterrupt

        handle = block.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            tuned.batch_loss(some_labels(tuned))
        handle.remove()
        assert not head_of(tuned)._forward_pre_hooks
