"""The way out to PEFT and back on SmolLM2 and MiniLM themselves, where their packages are there.

Tolerance. E is the largest difference between the base's float32 and float64 outputs on the same
tokens, and 4 E is allowed between ours and PEFT's, as in test_peft.py; the adapters are moved far
enough that their own factors round no worse than the thirty layers beside them.
"""

import copy
import functools
import importlib.util
import warnings

import peft
import pytest
import torch
from models import stir

import peftlab
from peftlab import (
    IA3,
    AdaLoRA,
    DoRA,
    LayerNormTuning,
    LoRA,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    VeRA,
    attach,
)
from peftlab.bases.real import REAL
from peftlab.tuned.interop import from_peft, to_peft

TEXT = "The capital of France is"
SHIFTED = {"shift_positions": True}
METHODS = {
    "lora": LoRA(r=4, target_modules="all-linear"),
    "dora": DoRA(r=4),
    "pissa": PiSSA(r=4, target_modules=["v"]),
    "adalora": AdaLoRA(init_r=6, target_r=3),
    "vera": VeRA(r=64),
    "ia3": IA3(),
    "layer norm": LayerNormTuning(),
    "prompt": PromptTuning(10),
    "p mlp": PTuning(6, "mlp"),
    "prefix": PrefixTuning(6, **SHIFTED),
    "prefix unshifted": PrefixTuning(6),
}


@functools.cache
def real(name):
    """A real base, tokens for it, and E."""
    base = peftlab.load(name)
    double = copy.deepcopy(base.model).double()
    ids = base.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    return base, ids, (output(base.model, ids).double() - output(double, ids)).abs().max()


@torch.no_grad()
def output(model, ids):
    """Logits, or hidden states where there are none, of the real tokens."""
    made = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return (made.logits if "logits" in made else made.last_hidden_state)[:, -ids.shape[1] :]


# A decoder with rotary positions and an encoder with learned ones take turns; test_interop.py has
# every method on tiny bases of both families.
TURNS = [(sorted(REAL, reverse=True)[turn % 2], method) for turn, method in enumerate(METHODS)]


@pytest.mark.parametrize("name, method", TURNS)
def test_there_and_back_on_a_real_model(name, method, tmp_path):
    known = REAL[name]
    modules = [known.package.replace("-", "_"), *known.needs.split()]
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed: {known.install}")
    base, ids, E = real(name)
    tuned = stir(attach(base, METHODS[method]), size=0.02)
    wanted = output(tuned.model, ids)
    folder = to_peft(tuned, tmp_path)
    if base.kind == "decoder":
        text = tuned.generate([TEXT], max_new_tokens=4)[0]
    tuned.detach()
    assert (wanted - output(base.model, ids)).abs().max() > 100 * E  # an adapter worth moving
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()
    assert (wanted - output(theirs, ids)).abs().max() <= 4 * E
    if base.kind == "decoder":
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        end = base.tokenizer.pad_token_id
        out = theirs.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=end)
        assert base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text
    with from_peft(base, folder) as back:
        difference = (output(back.model, ids) - wanted).abs().max()
    assert difference <= 4 * E if method == "prefix unshifted" else difference == 0
