"""A prefix that the cache holds is the prefix that attention reads: both ways to the same text."""

import pytest
import torch
from models import CASES, DECODERS, PAIRS, adapted, padded, put, tiny, token_ids

from peftlab.bases.caches import Prefilled, cache_name
from peftlab.sites import KeysValues

PREFIXED = [
    (family, name)
    for family, name in PAIRS
    if family in DECODERS and any(isinstance(s, KeysValues) for s in put(name, tiny(family))._sites)
]
GREEDY = dict(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None)
GREEDY |= dict(return_dict_in_generate=True, output_logits=True)


def test_there_are_prefixes_of_all_kinds():
    kinds = {name for _, name in PREFIXED}
    assert {"prefix", "prefix shifted", "v2 depth", "prompt + prefix", "lora + prefix"} <= kinds


@pytest.mark.parametrize("family, case", PREFIXED)
def test_once_in_the_cache_it_is_what_each_pass_reads(case, family):
    """In float64, on a padded batch: the logits are equal, and so is what the cache counts."""
    tuned = adapted(case, family, torch.float64)
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in (9, 4, 6)], "left")
    cache = tuned._cache()
    held = cache[cache_name(tuned.model)]
    assert isinstance(held, Prefilled) and held.get_seq_length() == 0
    with torch.no_grad():
        page = tuned.model.generate(ids, attention_mask=mask, **GREEDY)
        fast = tuned.model.generate(ids, attention_mask=mask, **cache, **GREEDY)
    assert fast.sequences.tolist() == page.sequences.tolist()
    for ours, wanted in zip(fast.logits, page.logits, strict=True):
        assert (ours - wanted).abs().max() <= 2**-22 * wanted.abs().max()  # logits are float32
    (site,) = (site for site in tuned._sites if isinstance(site, KeysValues))
    virtual = sum(method.num_virtual_tokens for method in CASES[case].methods
                  if type(method).__name__ == "PromptTuning")  # fmt: skip
    for place in site.sites:
        layer = held.layers[place.layer]
        assert layer.keys.shape[2] == layer.get_seq_length() + site.count
        if virtual:
            assert layer.get_seq_length() == ids.shape[1] + 6 + virtual


def test_t5_and_a_sliding_window_read_the_prefix_in_each_pass():
    tuned = adapted("prefix", "t5")
    assert not any(isinstance(c, Prefilled) for c in tuned._cache().values())
    tuned = adapted("prefix", "llama")
    assert any(isinstance(c, Prefilled) for c in tuned._cache().values())
    config = tuned.model.config
    config.layer_types = ["sliding_attention", "full_attention"]
    config.sliding_window = 4
    assert tuned._cache() == {}
