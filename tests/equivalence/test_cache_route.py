"""Virtual keys and values through the attention function and through a cache: the same model."""

import copy

import pytest
import torch
from models import config as t5_config
from models import decoder_ids, padded, stir, tiny, token_ids, tokenizer
from torch.nn.functional import cross_entropy
from transformers import T5ForConditionalGeneration

from peftlab import PrefixTuning, attach
from peftlab.bases import Base

from . import cache_route
from .closeness import check


class OfDecoder(PrefixTuning, listed=False):
    """In the decoder's attention to itself alone: what a cache reaches in T5."""

    name = "of_decoder"

    def reaches(self, site, layers):
        return site.stack != "encoder" and not site.cross

    def sublayers(self, shape):
        return shape.decoder_layers or shape.layers


FAMILIES = ("gpt2", "llama", "t5")
P = 4


def prefixed(family, dtype):
    return stir(attach(tiny(family, dtype), OfDecoder(P, shift_positions=True)))


def both(family, dtype, side):
    """Logits of the real tokens and gradients of the prefix, by our route and through the cache."""
    tuned, found = prefixed(family, dtype), []
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in (9, 4, 6)], side)
    read, real = {}, mask.bool()
    if family == "t5":
        read = {"decoder_input_ids": decoder_ids(ids, mask)}
        real = torch.ones_like(read["decoder_input_ids"], dtype=torch.bool)
    bare = tiny(family, dtype).model
    prefix = [t.detach().clone().requires_grad_() for t in tuned.prefix]
    ours = tuned(ids, mask, **read)
    theirs = cache_route.logits(bare, *prefix, ids, mask, **read)
    for logits, trained in ((ours, tuned.prefix), (theirs, prefix)):
        labels = torch.arange(int(real.sum())) * 37 % logits.shape[-1]
        cross_entropy(logits[real], labels).backward()
        found.append([logits.detach()[real], *(t.grad for t in trained)])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_gradients(family, side):
    """On padded batches. Of the prefix's gradient every entry is compared."""
    single, double = both(family, torch.float32, side), both(family, torch.float64, side)
    for name, one, other in zip(("logits", "P_k", "P_v"), single, double, strict=True):
        check(one, other, name, within=1e-5 if name == "logits" else None)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_greedy_continuation(family):
    """Ours generates from a padded batch with a growing cache; the other reads all anew."""
    tuned, bare = prefixed(family, torch.float64), tiny(family, torch.float64).model
    rows = [token_ids(1, n, seed=n)[0] for n in (9, 3, 6)]
    ids, mask = padded(rows, "left")
    out = tuned.model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    for row, tokens in zip(out, rows, strict=True):
        wanted = cache_route.continued(bare, *(t.detach() for t in tuned.prefix), tokens[None], 8)
        assert row[-8:].tolist() == wanted[0].tolist()


@pytest.mark.parametrize("layers, decoder_layers", [(2, 3), (3, 2)])
def test_the_same_greedy_answer_of_t5(layers, decoder_layers):
    """Ours generates from a padded batch; the other reads all anew. transformers' own generation
    fails where the decoder has more layers: its cache has as many as the encoder."""
    config = t5_config("t5")
    config.num_layers, config.num_decoder_layers = layers, decoder_layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bare = T5ForConditionalGeneration(config).eval().to(torch.float64)
    base = Base("t5", copy.deepcopy(bare), tokenizer("t5"))
    tuned = stir(attach(base, OfDecoder(P, shift_positions=True)))
    texts = ["ab>", "the longest> one", "q>"]
    prefix = [t.detach() for t in tuned.prefix]
    for text, answer in zip(texts, tuned.generate(texts, max_new_tokens=8), strict=True):
        read = tuned.tokenizer([text + tuned.sentinel], return_tensors="pt")["input_ids"]
        start = torch.tensor([tuned.decoder_start])
        tokens = cache_route.continued(bare, *prefix, start, 8, read)[0].tolist()
        end = tuned.tokenizer.eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        assert answer == tuned.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_the_shift_the_two_are_different_models(family):
    """Positions from 0 on, as we leave them unless asked, and positions after the prefix."""
    tuned, ids = prefixed(family, torch.float64), token_ids(2, 6)
    unshifted = attach(tiny(family, torch.float64), PrefixTuning(P))
    with torch.no_grad():
        for ours, theirs in zip(unshifted.prefix, tuned.prefix, strict=True):
            ours.copy_(theirs)
        apart = (unshifted(ids) - tuned(ids)).abs().max()
    assert apart > 0.1
