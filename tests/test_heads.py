"""Heads: their size, their logits and losses against hand-written ones, and what they read."""

import pytest
import torch
import transformers
from models import CASES, U32, adapted, config, padded, put, stir, surroundings, tiny, token_ids
from models import tokenizer as tokenizer_of
from torch.nn.functional import cross_entropy

from peftlab import FullFineTuning, PTuningV2, attach
from peftlab.bases import Base
from peftlab.methods.heads import Classification, Head, Spans, Tagging

HEADS = [
    Tagging(("O", "B", "I")),
    Classification(("no", "yes")),
    Spans(),
    Classification(("a", "b", "c"), pool="first"),
]


@pytest.mark.parametrize("head", HEADS)
def test_size_and_start(head):
    linear = head.build(24, torch.Generator().manual_seed(0))
    assert head.parameters(24) == sum(p.numel() for p in linear.parameters())
    assert head.parameters(768) == 768 * head.classes + head.classes
    assert not linear.bias.any()
    # σ = 0.02: of 48 to 72 draws none lies beyond 6 σ, and not all are small.
    assert 0.01 < linear.weight.abs().max() < 0.12


@pytest.mark.parametrize("head", HEADS)
def test_a_head_survives_its_description(head):
    import json

    assert Head.from_dict(json.loads(json.dumps(head.to_dict()))) == head


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_losses_by_hand(side):
    """Sums of 24 products and means of a few numbers: some 50 roundings of numbers near one."""
    close = 50 * U32 * 4
    _, mask = padded([torch.ones(n, dtype=torch.long) for n in (5, 2, 3)], side)
    hidden = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    real = [hidden[row][mask[row].bool()] for row in range(3)]
    for head in HEADS:
        linear = head.build(24, torch.Generator().manual_seed(0))
        torch.nn.init.normal_(linear.bias, generator=torch.Generator().manual_seed(2))
        logits = head.logits(linear, hidden, mask)
        if isinstance(head, Classification):
            pooled = [r.mean(dim=0) if head.pool == "mean" else r[0] for r in real]
            wanted = torch.stack([linear(p) for p in pooled])
            assert (logits - wanted).abs().max() <= close
            labels = torch.tensor([0, 1, 1])
            loss = -wanted.log_softmax(dim=1)[range(3), labels].mean()
        elif isinstance(head, Tagging):
            assert torch.equal(logits, linear(hidden))
            labels = torch.full((3, 5), -100)
            labels[mask.bool()] = torch.arange(10) % 3
            every = torch.cat([linear(r) for r in real]).log_softmax(dim=1)
            loss = -every[range(10), torch.arange(10) % 3].mean()
        else:
            first = mask.argmax(dim=1)
            labels = torch.stack([first + 1, first], dim=1)
            parts = []
            for row, (start, end) in enumerate(labels):
                scores = linear(real[row]).log_softmax(dim=0)
                parts += [-scores[start - first[row], 0], -scores[end - first[row], 1]]
            loss = torch.stack(parts).mean()
            outside = logits[mask == 0]
            assert (outside == torch.finfo(torch.float32).min).all()
        assert abs(head.loss(logits, labels) - loss) <= close


def test_double_precision_is_kept_out_of_infinity():
    head = Spans()
    linear = head.build(24, torch.Generator()).double()
    _, mask = padded([torch.ones(4, dtype=torch.long), torch.ones(2, dtype=torch.long)], "right")
    logits = head.logits(linear, torch.randn(2, 4, 24, dtype=torch.float64), mask)
    loss = head.loss(logits, torch.tensor([[0, 3], [1, 1]]))
    loss.backward()
    assert loss.isfinite() and linear.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Tagging(()), "two or more different labels are needed"),
        (lambda: Tagging(("O",)), "two or more different labels are needed"),
        (lambda: Classification(("a", "b", "a")), "two or more different labels are needed"),
        (lambda: Classification(("a", "b"), pool="max"), "pool='max': allowed is mean, first"),
        (lambda: Head.from_dict({"head": "oracle"}), "unknown head 'oracle': known are tagging"),
        (lambda: Head.from_dict({}), "unknown head None"),
    ],
)
def test_what_a_head_refuses(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_head_goes_on_an_encoder(family):
    base = tiny(family)
    before = surroundings(base)
    with pytest.raises(ValueError, match=f"a head goes on an encoder; tiny-{family} is a"):
        attach(base, PTuningV2(2), head=Tagging(("O", "B")))
    assert surroundings(base) == before


def test_the_head_reads_the_real_tokens_alone():
    """Virtual tokens are neither pooled nor tagged nor part of an answer."""
    ids = token_ids(2, 6)
    for case in ("head prompt", "head p back", "head deep", "head v2"):
        tuned = adapted(case, "bert")
        seen = []
        handle = tuned.linear.register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            tuned(ids)
            hidden = tuned.anatomy.backbone(input_ids=ids).last_hidden_state
        handle.remove()
        assert hidden.shape[1] == 6
        pooled = {"mean": hidden.mean(dim=1), "first": hidden[:, 0]}
        wanted = pooled.get(getattr(tuned.head, "pool", None), hidden)
        # Sums of six in two orders.
        assert (seen[0] - wanted).abs().max() <= 20 * U32 * hidden.abs().max()


def test_the_head_is_counted_apart():
    tuned = put("head v2", tiny("bert"))
    count = tuned.count()
    assert (count.parameters, count.head) == (2 * 4 * 24 * 2, 24 * 3 + 3)
    assert count.file_bytes == 4 * (count.parameters + count.head)
    assert "75 of a head" in repr(count)
    assert {"head.weight", "head.bias"} < tuned.trainable.keys()
    alone = put("head", tiny("bert"))
    assert alone.count().parameters == 0 and alone.label == "Head alone"
    assert set(alone.trainable) == {"head.weight", "head.bias"}


def test_full_fine_tuning_under_a_head_trains_the_backbone():
    tuned = put("head full", tiny("bert"))
    names = {n for n, p in tuned.model.named_parameters() if p.requires_grad}
    assert names and not any(name.startswith("cls") for name in names - {"cls"})
    assert tuned.count().parameters == sum(p.numel() for p in tuned.anatomy.backbone.parameters())


def test_batch_loss_is_the_heads():
    tuned = stir(put("head prompt", tiny("bert")))
    ids = token_ids(2, 5)
    labels = torch.tensor([1, 0])
    loss = tuned.batch_loss(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    )
    assert torch.equal(loss, cross_entropy(tuned(ids), labels))
    assert CASES["head prompt"].head == tuned.head


def test_a_headless_encoder_asks_for_one():
    import transformers
    from models import config, tokenizer

    from peftlab.bases import Base

    base = Base("bare", transformers.BertModel(config("bert")), tokenizer("bert"))
    with pytest.raises(ValueError, match="bare has no head of its own: attach it with one"):
        base(token_ids(1, 4))
    tuned = attach(base, PTuningV2(2), head=Tagging(("O", "B")))
    assert tuned(token_ids(1, 4)).shape == (1, 4, 2)


def test_a_pooler_that_a_head_replaces_does_not_train():
    """An encoder as it comes without a language model's head: its pooler is out of use."""
    base = Base("pooled", transformers.BertModel(config("bert")).eval(), tokenizer_of("bert"))
    before = base.fingerprint()
    tuned = attach(base, FullFineTuning(), head=HEADS[0])
    count = tuned.count()  # closed form and measured, asserted equal
    assert count.parameters == base.anatomy.shape.without_head().parameters()
    assert not any("pooler" in name for name in tuned.trainable)
    tuned.detach()
    assert base.fingerprint() == before
