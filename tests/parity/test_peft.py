"""LoRA and prompt tuning against Hugging Face PEFT: logits, gradients, one step, tokens and text.

Tolerances. PEFT itself says how far float32 is from the truth here: E is the largest difference
between its float32 result and its float64 result, over all entries of the tensor compared. Ours
does the same operations, partly in another order, so its rounding error is of the same size; each
lies within about E of the truth and both within 2 E of each other. E is a sample and not a bound,
so it is doubled: 4 E. In float64 the errors are 2⁻²⁹ times as large, and so is the tolerance:
an error in a formula that float32 would hide is caught there.

A sample over one tensor of few entries varies more, so for gradients E is relative: the worst
E / max|g| over all trained tensors.
"""

import copy
import functools

import peft
import pytest
import torch
from models import FAMILIES, U32, U64, hf_model, padded, stir, tiny, token_ids
from torch.nn.functional import cross_entropy

import peftlab
from peftlab import LoRA, PromptTuning
from peftlab.bases import Base

from .twins import twins

METHODS = {
    "lora q v": LoRA(r=3, alpha=5),
    "lora o up down": LoRA(r=2, alpha=8, target_modules=["o", "up", "down"]),
    "lora all": LoRA(r=2, alpha=3, target_modules="all-linear"),
    "prompt": PromptTuning(5),
    "prompt of one": PromptTuning(1, init="random"),
}
# The base that ships is larger: three methods on it are enough.
BASES = {**dict.fromkeys(FAMILIES, list(METHODS)), "tiny-gpt": ["lora q v", "lora all", "prompt"]}
BATCHES = ("whole", "right", "left")
FLOAT32, FLOAT64 = torch.float32, torch.float64

every = pytest.mark.parametrize(
    "family, method", [(family, method) for family, methods in BASES.items() for method in methods]
)


@functools.cache
def shipped() -> Base:
    return peftlab.load("tiny-gpt")


def two(family, dtype):
    """A base, and a second copy of its model for PEFT: random ones, or the one that ships."""
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
    """Both logits at the real tokens of a batch; positions as PEFT counts them."""
    ids, mask = batch(kind)
    prompt = pair.theirs.active_peft_config.is_prompt_learning
    positions = torch.arange(ids.shape[1]).expand_as(ids) if prompt else None
    ours, theirs = pair.logits(ids, mask, positions)
    return ours[mask.bool()], theirs[mask.bool()]


def backward(pair, kind):
    """The mean loss of the next token through both."""
    ids, mask = batch(kind)
    labels = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], dim=1)
    labels[:, :-1].masked_fill_((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
    for logits in forward(pair, kind):
        cross_entropy(logits, labels[mask.bool()]).backward()


def worst(pairs) -> float:
    """The largest |a − b| / max|b| over tensors."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for _, a, b in pairs)


@every
@pytest.mark.parametrize("kind", BATCHES)
def test_logits(family, method, kind):
    single, double = make(family, method, FLOAT32), make(family, method, FLOAT64)
    with torch.no_grad():
        (ours32, theirs32), (ours64, theirs64) = forward(single, kind), forward(double, kind)
    E = (theirs32.double() - theirs64).abs().max()
    assert (ours32 - theirs32).abs().max() <= 4 * E
    assert (ours64 - theirs64).abs().max() <= 4 * E * U64 / U32


@every
@pytest.mark.parametrize("kind", BATCHES)
def test_gradients_of_every_trained_tensor(family, method, kind):
    single, double = make(family, method, FLOAT32), make(family, method, FLOAT64)
    backward(single, kind)
    backward(double, kind)
    truth = {name: theirs for name, _, theirs in double.gradients()}
    assert truth.keys() == single.ours.trainable.keys()
    E = worst((name, theirs, truth[name]) for name, _, theirs in single.gradients())
    assert worst(single.gradients()) <= 4 * E
    assert worst(double.gradients()) <= 4 * E * U64 / U32


@every
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_one_optimiser_step(family, method, optimizer, dtype):
    """From equal tensors, the step taken on our gradient is the step taken on PEFT's.

    A gradient that differs by δ moves SGD's step by η δ. Adam's first step is η f(g) with
    f(g) = g / (|g| + ε), so f' = ε / (|g| + ε)² and the step moves by at most
    η δ ε / (max(|g| − δ, 0) + ε)², and never by more than 2 η: where |g| is below δ not even its
    sign is known. The update itself rounds: 8 u (|θ| + η) for its few operations.
    """
    pair = make(family, method, dtype)
    before = {name: ours.clone() for name, ours, _ in pair.tensors()}
    backward(pair, "right")
    gradients = {name: (ours.clone(), theirs.clone()) for name, ours, theirs in pair.gradients()}
    lr, eps, u = 0.01, 1e-8, U32 if dtype == FLOAT32 else U64
    options = {"eps": eps, "weight_decay": 0.0} if optimizer == "AdamW" else {}
    for parameters in (pair.ours.trainable.values(), {p for p, _ in pair.blocks.values()}):
        getattr(torch.optim, optimizer)(list(parameters), lr=lr, **options).step()
    unknown = total = 0
    for name, ours, theirs in pair.tensors():
        g, other = gradients[name]
        delta = (g - other).abs().max()  # held small by the test of the gradients
        if optimizer == "AdamW":
            slope = eps / ((g.abs() - delta).clamp(min=0) + eps) ** 2
            moved = (lr * delta * slope).clamp(max=2 * lr)
        else:
            moved = lr * delta
        size = lr * (1 if optimizer == "AdamW" else g.abs())
        assert ((ours - theirs).abs() <= moved + 8 * u * (before[name].abs() + size)).all()
        assert not torch.equal(ours, before[name])
        unknown += ((g.abs() <= delta) & (g != other)).sum()
        total += g.numel()
    assert unknown / total < 0.01  # almost every entry's step is decided


@pytest.mark.parametrize("family", BASES)
def test_the_number_of_trained_parameters(family):
    """On PEFT's own terms: one delta on fused c_attn has the size of ours on q and v."""
    base, model = two(family, FLOAT32)
    fuses = base.anatomy.family == "gpt2"
    targets = ["c_attn"] if fuses else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=3, target_modules=targets, fan_in_fan_out=fuses)
    theirs, _ = peft.get_peft_model(model, config).get_nb_trainable_parameters()
    assert theirs == LoRA(r=3).parameters(base.anatomy.shape)
    for name in BASES[family]:
        pair = make(family, name, FLOAT32)
        measured = sum(parameter[index].numel() for parameter, index in pair.blocks.values())
        assert measured == pair.ours.count().parameters
        fused = fuses and name in ("lora q v", "lora all")
        if not fused:  # else PEFT's one B also has the rows and blocks that are zero here
            assert pair.theirs.get_nb_trainable_parameters()[0] == measured


@every
def test_tokens_and_text(family, method):
    """Greedy: our left-padded batch against PEFT on each prompt alone, in float64."""
    pair = make(family, method, FLOAT64)
    prompts = ["ab", "the longest one", "q"]
    text = pair.ours.generate(prompts, max_new_tokens=8)
    letters = pair.ours.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    batched = pair.ours.model.generate(**letters, max_new_tokens=8, do_sample=False)
    for prompt, row, shown in zip(prompts, batched, text, strict=True):
        alone = pair.ours.tokenizer([prompt], return_tensors="pt")
        length = alone["input_ids"].shape[1]
        theirs = pair.theirs.generate(
            input_ids=alone["input_ids"],
            attention_mask=alone["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=pair.ours.tokenizer.pad_token_id,
        )[0, length:]
        ours = row[letters["input_ids"].shape[1] :][: len(theirs)]
        assert ours.tolist() == theirs.tolist()
        assert shown == pair.ours.tokenizer.decode(theirs, skip_special_tokens=True)
