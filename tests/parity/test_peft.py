"""Every method that Hugging Face PEFT has as well: logits, gradients, one step, tokens and text.

Tolerances. PEFT itself says how far float32 is from the truth here: E is the largest difference
between its float32 result and its float64 result, over all entries of the tensor compared. Ours
does the same operations, partly in another order, so its rounding error is of the same size; each
lies within about E of the truth and both within 2 E of each other. E is a sample and not a bound,
so it is doubled: 4 E. In float64 the errors are 2⁻²⁹ times as large, and so is the tolerance:
an error in a formula that float32 would hide is caught there.

A sample over one tensor of few entries varies more, so for gradients E is relative: the worst
E / max|g| over all trained tensors.

What PEFT does otherwise, or not at all, is in test_peft_differs.py.
"""

import copy
import functools

import peft
import pytest
import torch
from models import DECODERS, U32, U64, hf_model, padded, stir, tiny, token_ids
from torch.nn.functional import cross_entropy

import peftlab
from peftlab import IA3, LayerNormTuning, LoRA, PromptTuning, PTuning
from peftlab.bases import Base

from .twins import CachePrefix, fitting_t5, greedy, twins

ENCODER = {"sizes": "peft", "encoder_hidden_size": 7}
METHODS = {
    "lora q v": LoRA(r=3, alpha=5),
    "lora o up down": LoRA(r=2, alpha=8, target_modules=["o", "up", "down"]),
    "lora all": LoRA(r=2, alpha=3, target_modules="all-linear"),
    "ia3": IA3(),
    "ia3 fused": IA3(["q", "k", "v", "down"]),
    "layer norm": LayerNormTuning(),
    "prompt": PromptTuning(5),
    "prompt of one": PromptTuning(1, init="random"),
    "p lstm": PTuning(4, "lstm", **ENCODER),
    "p deep lstm": PTuning(3, "lstm", encoder_num_layers=3, **ENCODER),
    "p mlp": PTuning(4, "mlp", **ENCODER),
    "prefix": CachePrefix(4),
    "prefix of one": CachePrefix(1, init="random"),
    "prefix mlp": CachePrefix(4, prefix_projection=True, encoder_hidden_size=9),
}
SOFT = ["prompt", "p lstm", "p mlp"]
PREFIX = ["prefix", "prefix mlp"]
LORA = ["lora q v", "lora o up down", "lora all"]
SCALES = ["ia3", "layer norm"]
FUSED = ["ia3 fused", "layer norm"]  # PEFT scales all of a fused matrix
BASES = {
    "gpt2": [method for method in METHODS if method != "ia3"],
    "llama": [*LORA, *SCALES, *SOFT, *PREFIX],
    "bert": [*LORA, *SCALES, *SOFT, *PREFIX],
    "t5": [*LORA, *SCALES, *SOFT],  # its heads are of a width at which PEFT's prefix fails
    "fitting t5": ["prefix of one", *PREFIX],
    "tiny-gpt": ["lora q v", "lora all", *FUSED, *SOFT, *PREFIX],  # the base that ships is larger
}
PAIRS = [(family, method) for family, methods in BASES.items() for method in methods]
# PEFT generates from a T5 with as many layers in one stack as in the other.
GENERATING = [("fitting t5" if "t5" in base else base, m) for base, m in PAIRS if base != "bert"]
BATCHES = ("whole", "right", "left")
FLOAT32, FLOAT64 = torch.float32, torch.float64

every = pytest.mark.parametrize("family, method", PAIRS)


@functools.cache
def shipped() -> Base:
    return peftlab.load("tiny-gpt")


def two(family, dtype):
    """A base, and a second copy of its model for PEFT: random ones, or the one that ships."""
    if family == "fitting t5":
        return fitting_t5(dtype)
    if family != "tiny-gpt":
        return tiny(family, dtype), hf_model(family, dtype)
    first, second = (copy.deepcopy(shipped().model).to(dtype) for _ in range(2))
    return Base(family, first, shipped().tokenizer), second


def make(family, method, dtype):
    noise = 0.02 if family == "tiny-gpt" else 0.2  # trained weights are smaller than ours at random
    return twins(*two(family, dtype), METHODS[method], functools.partial(stir, size=noise))


def batch(kind):
    if kind == "whole":
        ids = token_ids(3, 9)
        return ids, torch.ones_like(ids)
    return padded([token_ids(1, length, seed=length)[0] for length in (9, 4, 6)], kind)


def forward(pair, kind):
    """Both logits at the real tokens of a batch, or at every token that T5's decoder reads."""
    ids, mask = batch(kind)
    ours, theirs = pair.logits(ids, mask)
    if pair.ours.kind == "encoder-decoder":
        return ours.flatten(0, 1), theirs.flatten(0, 1)
    return ours[mask.bool()], theirs[mask.bool()]


def batches(family, method):
    """On T5 PEFT's prompt stands before the padding on the left, and distances count it."""
    prompt = isinstance(METHODS[method], PromptTuning | PTuning)
    return BATCHES[:2] if family == "t5" and prompt else BATCHES


def backward(pair, kind):
    """The mean cross entropy of some labels through both: which ones, does not matter."""
    for parameter in (*pair.ours.trainable.values(), *(part.parameter for part in pair.parts)):
        parameter.grad = None
    for logits in forward(pair, kind):
        labels = torch.arange(len(logits)) * 37 % logits.shape[1]
        cross_entropy(logits, labels).backward()


def worst(pairs) -> float:
    """The largest |a − b| / max|b| over tensors."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for _, a, b in pairs)


@every
def test_count_logits_gradients_and_a_step(family, method):
    single, double = make(family, method, FLOAT32), make(family, method, FLOAT64)
    check_count(family, method, single)
    for kind in batches(family, method):
        (ours32, theirs32), (ours64, theirs64) = forward(single, kind), forward(double, kind)
        E = (theirs32.double() - theirs64).abs().max()
        assert (ours32 - theirs32).abs().max() <= 4 * E, kind
        assert (ours64 - theirs64).abs().max() <= 4 * E * U64 / U32, kind
        for pair in (single, double):
            backward(pair, kind)
        truth = {name: theirs for name, _, theirs in double.gradients()}
        E = worst((name, theirs, truth[name]) for name, _, theirs in single.gradients())
        assert worst(single.gradients()) <= 4 * E, kind
        assert worst(double.gradients()) <= 4 * E * U64 / U32, kind
    check_adamw_step(single, U32)
    check_adamw_step(double, U64)


def check_adamw_step(pair, u):
    """From equal tensors, the step taken on our gradient is the step taken on PEFT's.

    Adam's first step is η f(g) with f(g) = g / (|g| + ε), so f' = ε / (|g| + ε)². Gradients that
    differ by δ move it by at most η δ ε / (max(|g| − δ, 0) + ε)², and never by more than 2 η:
    where |g| is below δ not even its sign is known. The update itself rounds: 8 u (|θ| + η) for
    its few operations.
    """
    backward(pair, "right")
    before = {name: ours.clone() for name, ours, _ in pair.tensors()}
    gradients = {name: (ours.clone(), theirs.clone()) for name, ours, theirs in pair.gradients()}
    lr, eps = 0.01, 1e-8
    for parameters in (pair.ours.trainable.values(), [part.parameter for part in pair.parts]):
        torch.optim.AdamW(list(parameters), lr=lr, eps=eps, weight_decay=0.0).step()
    unknown = total = 0
    for name, ours, theirs in pair.tensors():
        g, other = gradients[name]
        delta = (g - other).abs().max()  # held small by the comparison of the gradients
        slope = eps / ((g.abs() - delta).clamp(min=0) + eps) ** 2
        moved = (lr * delta * slope).clamp(max=2 * lr)
        assert ((ours - theirs).abs() <= moved + 8 * u * (before[name].abs() + lr)).all()
        assert not torch.equal(ours, before[name])
        unknown += ((g.abs() <= delta) & (g != other)).sum()
        total += g.numel()
    assert unknown / total < 0.01  # almost every entry's step is decided


def check_count(family, method, pair):
    """PEFT's own number; where it has numbers beside ours, those are counted and named."""
    theirs, _ = pair.theirs.get_nb_trainable_parameters()
    shared = sum(int(part.where.sum()) for part in pair.parts)
    shape = pair.ours.anatomy.shape
    fuses = shape.family == "gpt2" and method in ("lora q v", "lora all")
    if not fuses:  # else PEFT's one B also has the rows and blocks that are zero here
        assert theirs == shared
    # The table and W₁ of ours are as wide as the model, PEFT's as wide as the keys.
    more = 0
    if (family, method) == ("llama", "prefix mlp"):
        more = (shape.d_model - shape.d_kv) * (4 + 9)
    assert pair.ours.count().parameters == shared + more


@pytest.mark.parametrize("family", DECODERS)
def test_lora_on_a_fused_matrix_is_counted_as_ours_on_its_parts(family):
    """On PEFT's own terms: one delta on fused c_attn has the size of ours on q and v."""
    base, model = two(family, FLOAT32)
    fuses = base.anatomy.family == "gpt2"
    targets = ["c_attn"] if fuses else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=3, target_modules=targets, fan_in_fan_out=fuses)
    theirs, _ = peft.get_peft_model(model, config).get_nb_trainable_parameters()
    assert theirs == LoRA(r=3).parameters(base.anatomy.shape)


@pytest.mark.parametrize("family, method", GENERATING)
def test_tokens_and_text(family, method):
    """Greedy: our padded batch against PEFT on each prompt alone, in float64."""
    pair = make(family, method, FLOAT64)
    ours, side = pair.ours, "left" if pair.ours.kind == "decoder" else "right"
    texts = [text + ours.sentinel for text in ("ab>", "the longest> one", "q>")]
    shown = ours.generate(["ab>", "the longest> one", "q>"], max_new_tokens=8)
    start = [] if ours.kind == "decoder" else ours.decoder_start

    def given(texts):
        found = dict(ours.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side))
        found = {key: found[key] for key in ("input_ids", "attention_mask")}
        if start:
            found["decoder_input_ids"] = torch.tensor([start]).expand(len(texts), -1)
        return found

    batch, eos = given(texts), pair.theirs.generation_config.eos_token_id
    out = ours.model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
    new = out[:, len(start) or batch["input_ids"].shape[1] :].tolist()
    for text, tokens, words in zip(texts, new, shown, strict=True):
        alone = given([text])
        theirs = greedy(pair.theirs, alone, 8, eos)[0]
        theirs = theirs[len(start) or alone["input_ids"].shape[1] :].tolist()
        assert tokens[: len(theirs)] == theirs
        assert words == ours.tokenizer.decode(theirs, skip_special_tokens=True)
