"""Memory, measured and predicted.

Three counts meet here: the parts, read off the tensors that they consist of; the total, followed
storage by storage; and the same of a model without numbers. Lesson 01's formulas stand beside them.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
import transformers
from models import (
    BY_TURNS,
    CASES,
    PAIRS,
    call,
    config,
    decoder_ids,
    surroundings,
    tiny,
    token_ids,
    tokenizer,
)
from models import FAMILIES as FOUR

from peftlab import (
    IA3,
    AdaLoRA,
    BitFit,
    DoRA,
    FullFineTuning,
    LayerNormTuning,
    LoRA,
    ParallelAdapter,
    PiSSA,
    PrefixTuning,
    PromptAndPrefix,
    PromptTuning,
    Prune,
    PruneStructures,
    PTuning,
    PTuningV2,
    VeRA,
    attach,
    count,
)
from peftlab.accounting import training_bytes
from peftlab.bases import CLASSES, FAMILIES, Base, Shape
from peftlab.bases.data import data_path
from peftlab.bases.shapes import named_config
from peftlab.memory import MOMENTS, Memory, measure, predict
from peftlab.methods import METHODS, Method
from peftlab.methods.heads import Classification, Spans, Tagging
from peftlab.training import move

BATCH, LENGTH, TARGETS = 3, 13, 5
EVERY_SITE = [FullFineTuning(), LoRA(target_modules="all-linear"), PromptTuning(4), PrefixTuning(3)]
OTHERS = (  # what no plain case has
    *("p attention", "v2 mlp", "lora + prompt", "lora fused", "houlsby all", "parallel attention"),
    *("ia3 both", "adapter + lora", "prune + dense lora", "prune + full", "smaller + full"),
)
MEASURED = [(family, case) for family, case in PAIRS if CASES[case].plain or CASES[case].head]
MEASURED += [(BY_TURNS[case], case) for case in OTHERS]
ALL = "all-linear"
COMPOSED = {  # beside the cases: masks over other deltas, over parts of a fused map, smaller models
    "dora under a mask": [Prune(0.5), DoRA(r=3, target_modules=ALL)],
    "vera under a mask": [Prune(0.5), VeRA(r=7)],
    "adalora under a mask": [Prune(0.5), AdaLoRA(init_r=4, target_r=2)],
    "a mask over one of three": [
        Prune(0.5, target_modules=["q"]),
        LoRA(r=3, target_modules=["q", "k", "v"], fused=True),
    ],
    "mask and factors": [Prune(0.5), IA3()],
    "mask and norms": [Prune(0.5), LayerNormTuning()],
    "smaller, with factors": [PruneStructures(heads=0.34), IA3()],
    "smaller, masked, lora": [
        PruneStructures(neurons=0.25),
        Prune(0.5),
        LoRA(r=3, target_modules=ALL),
    ],
    "fewer layers, all trained": [PruneStructures(0.34, layers=0.34), FullFineTuning()],
    "fewer queries": [PruneStructures(queries=0.5), LoRA(r=3, target_modules=ALL)],
    "pissa, prefix, adapter": [
        PiSSA(r=2, target_modules=ALL),
        PrefixTuning(2),
        ParallelAdapter(3, "silu", 1.0, ["attention", "mlp"]),
    ],
}
ONLY = {  # families that have it, or the two that differ most in how their maps are stored
    "dora under a mask": ("gpt2", "t5"),
    "vera under a mask": ("gpt2", "llama"),
    "adalora under a mask": ("gpt2", "bert"),
    "a mask over one of three": ("gpt2",),
    "mask and factors": ("gpt2", "llama"),
    "mask and norms": ("llama", "bert"),
    "smaller, with factors": ("gpt2", "t5"),
    "smaller, masked, lora": ("gpt2", "llama"),
    "fewer queries": ("llama",),
    "pissa, prefix, adapter": ("gpt2", "t5"),
}
COMPOSITIONS = [(family, name) for name in COMPOSED for family in ONLY.get(name, FOUR)]


def batch_of(model, batch: int = BATCH, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Full rows; nothing that training reads shares its storage with anything else."""
    ids = token_ids(batch, length)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if model.kind == "encoder-decoder":
        given |= {"decoder_input_ids": decoder_ids(ids), "labels": decoder_ids(ids)}
    if isinstance(model.head, Classification):
        given["labels"] = ids.sum(dim=1) % model.head.classes
    elif isinstance(model.head, Tagging):
        given["labels"] = ids % model.head.classes
    elif isinstance(model.head, Spans):
        given["labels"] = torch.zeros(batch, 2, dtype=torch.long)
    return given


def agree(
    base: Base, methods: list[Method], head=None, lstm: bool = False, few: bool = False, **how
) -> None:
    """Parts, totals and the most at any time: of a step that is taken, and of one that is told.

    With `few` the last tokens of a row have labels and the others none.
    """
    targets = TARGETS if few or base.kind == "encoder-decoder" else None
    said = predict(methods, base, BATCH, LENGTH, targets=targets, head=head, **how)
    with attach(base, methods, head=head) as tuned:
        batch = batch_of(tuned)
        if few:
            batch["labels"][:, :-TARGETS] = -100
        found = measure(tuned, batch, **how)
        if (
            how.get("optimiser") is None
            and type(methods[0] if methods else None) in METHODS.values()
        ):
            check_formulas(tuned, found)
    # With checkpointing a block keeps its mask and positions too, which autograd does not see.
    for moment in MOMENTS if not how.get("checkpointing") else ():
        # What is left over is the loss and positions that a site makes anew: below 2%, not below 0.
        rest = found.total[moment] - found.sum(moment)
        assert 0 <= rest <= 0.02 * found.total[moment], (moment, rest)
    assert found.peak >= max(found.total.values())
    if lstm:  # its kernel has a workspace of the library's own size, and copies of its weights
        first = next(iter(said.parts["activations"]))
        extra = found.parts["activations"].pop(first) - said.parts["activations"].pop(first)
        assert extra > 0 and found.parts == said.parts
        for moment in MOMENTS:  # it is all that sets the two apart
            assert found.total[moment] - said.total[moment] in (0, extra)
            assert found.most[moment] - said.most[moment] in (0, extra)
        return
    if any(isinstance(method, PruneStructures) for method in methods):
        for memory in (found, said):  # other blocks may have stayed, with their names
            sums = {part: {"": memory.bytes(part)} for part in memory.parts}
            memory.parts = sums | {"activations": memory.parts["activations"]}
    assert found.parts == said.parts  # to the byte, in every layer
    indices = (
        any(isinstance(m, PruneStructures) for m in methods) and base.kind == "encoder-decoder"
    )
    if (
        few or indices or base.anatomy.family == "gpt_neox"
    ):  # numbers of rows: without numbers, twice
        for moment in MOMENTS:
            assert 0 <= said.total[moment] - found.total[moment] < 1024
            assert 0 <= said.most[moment] - found.most[moment] < 1024
    else:
        assert found == said  # and at every moment


def check_formulas(tuned, found: Memory) -> None:
    """Lesson 01: 4 bytes a weight, and 12 more for each that trains."""
    (method, *others), head = tuned.methods or [None], tuned.head
    if method is None or others or head or not tuned.trainable or found.bytes("activations") == 0:
        return
    if tuned.model.dtype != torch.float32:
        return
    told = training_bytes(method, tuned)
    own = [*tuned.model.buffers(), *(b for m in tuned.modules.values() for b in m.buffers())]
    buffers = {b.untyped_storage().data_ptr(): b.nbytes for b in own}
    assert told.weights <= found.bytes("weights") <= told.weights + sum(buffers.values())
    assert found.bytes("gradients") == told.gradients
    assert found.bytes("optimiser") == told.adam + 4 * len(tuned.trainable)  # Adam counts steps
    if isinstance(method, FullFineTuning):
        assert found.bytes("aside") == found.bytes("gradients")


@pytest.mark.parametrize("family, case", MEASURED)
def test_what_is_predicted_is_what_is_measured(case, family):
    """Every method on every family, in its plain case. The others are options and companies of
    these methods, which ask for no other map of a family: each is on one family, by turns."""
    methods, head = CASES[case].methods, CASES[case].head
    lstm = any(isinstance(m, PTuning) and m.encoder == "lstm" for m in methods)
    agree(tiny(family), methods, head, lstm)


@pytest.mark.parametrize("case", ["full", "lora all", "prefix mlp", "bitfit"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_with_few_labels_too(family, case):
    if family in CASES[case].families:
        agree(tiny(family), CASES[case].methods, few=True)


def test_what_few_labels_save():
    """What is made of logits, in proportion to the labels: the first token of a row needs none."""
    whole, quarter = (
        predict(LoRA(), shallow("llama-3-8b", 1), 2, 32, targets=targets) for targets in (None, 8)
    )
    logits = 4 * 128256 * 2
    saved = whole.bytes("activations") - quarter.bytes("activations")
    labels, places = 8 * 2, 8 * 2  # bytes of one in each of the two rows
    assert saved == 31 * (logits + labels) - 8 * (logits + labels + places)


@pytest.mark.parametrize("family, composed", COMPOSITIONS)
def test_methods_together_keep_what_is_predicted(composed, family):
    agree(tiny(family), COMPOSED[composed])


SHORT = [LoRA(r=3, target_modules=ALL), PromptAndPrefix(3, prefix_projection=False)]


def loaded(family: str, method: Method, dtype: str) -> Base:
    """A base as it is loaded in 16 bits: rotary tables stay in float32."""
    width = torch.float32 if method.in_place else getattr(torch, dtype)
    model = CLASSES[FAMILIES[family].kind].from_config(config(family), dtype=width)
    return Base(f"tiny-{family}", model, tokenizer(family))


OTHERWISE = [("float32", True), ("bfloat16", False), ("bfloat16", True)]
OTHERWISE_ON = [
    pytest.param(family, method, *OTHERWISE[(row + column) % 3], id=f"{family}-{method.name}")
    for row, method in enumerate([FullFineTuning(), *SHORT])
    for column, family in enumerate(FOUR)
]


@pytest.mark.parametrize("family, method, dtype, checkpointing", OTHERWISE_ON)
def test_in_16_bits_and_with_checkpointing(family, method, dtype, checkpointing):
    """What trains is in float32, and so is the whole of a model whose own parameters train.

    The cells are chosen so that each method meets each family, and both meet each setting.
    """
    agree(loaded(family, method, dtype), [method], dtype=dtype, checkpointing=checkpointing)


@pytest.mark.parametrize("method", [FullFineTuning(), *SHORT], ids=lambda m: m.name)
def test_float16_scales_its_gradients(method):
    agree(loaded("gpt2", method, "float16"), [method], dtype="float16")


@pytest.mark.parametrize("case", ["qlora", "adapter + lora", "prune + lora", "smaller + lora"])
def test_checkpointing_under_what_changes_a_block(case):
    agree(tiny("gpt2"), CASES[case].methods, dtype="bfloat16", checkpointing=True)


def test_checkpointing_keeps_the_inputs_of_the_blocks():
    config = shallow("gpt2", 4) | dict(n_embd=32, n_head=4)
    whole, less = (
        predict(FullFineTuning(), config, 2, 16, checkpointing=on).parts["activations"]
        for on in (False, True)
    )
    assert {less[f"layers.{layer}"] for layer in range(1, 4)} == {4 * 2 * 16 * 32}
    assert less["output"] == whole["output"]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_base_without_moments(family):
    agree(tiny(family), [LoRA(r=2)], optimiser="sgd")
    assert predict(LoRA(r=2), tiny(family), 2, 8, optimiser="sgd").bytes("optimiser") == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_measuring_leaves_the_base_and_what_is_attached_as_they_were(family, checkpointing):
    base = tiny(family)
    before = surroundings(base)
    modules = [vars(module).keys() for module in base.model.modules()]
    tuned = attach(base, LoRA(r=2))
    start = {name: p.detach().clone() for name, p in tuned.trainable.items()}
    output = call(tuned, token_ids(2, 6))
    tuned.train(True)
    measure(tuned, batch_of(tuned), checkpointing=checkpointing)
    assert all(module.training for module in tuned.model.modules())
    tuned.train(False)
    assert all(torch.equal(p, start[name]) for name, p in tuned.trainable.items())
    assert all(p.grad is None for p in tuned.trainable.values())
    assert torch.equal(call(tuned, token_ids(2, 6)), output)
    tuned.detach()
    assert surroundings(base) == before
    assert [vars(module).keys() for module in base.model.modules()] == modules


def test_an_error_inside_leaves_no_hook_and_no_gradient():
    base = tiny("gpt2")
    before = surroundings(base)
    tuned = attach(base, LoRA(r=2))
    batch = batch_of(tuned)
    batch["labels"] = torch.full_like(batch["labels"], 10_000)  # beyond the vocabulary
    with pytest.raises(IndexError):
        measure(tuned, batch)
    tuned.detach()
    assert surroundings(base) == before


@dataclass(frozen=True)
class Raising(LoRA, listed=False):
    """Attaches, and fails in the middle of the second block."""

    def delta(self, linear, attachment, generator):
        if linear.layer:
            raise KeyboardInterrupt
        return super().delta(linear, attachment, generator)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_predicting_leaves_torch_and_transformers_as_they_were(device):
    """Also where it is interrupted; the next prediction of the same model is right again."""
    before = transformers.masking_utils.is_tracing, torch.nn.Module.to, torch.nn.init.trunc_normal_
    base = tiny("gpt2")
    fingerprint, first = surroundings(base), predict(LoRA(r=2), base, 2, 8, device=device)
    with pytest.raises(KeyboardInterrupt):
        predict(Raising(), base, 2, 8, device=device)
    assert predict(LoRA(r=2), base, 2, 8, device=device) == first
    assert surroundings(base) == fingerprint
    after = transformers.masking_utils.is_tracing, torch.nn.Module.to, torch.nn.init.trunc_normal_
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert torch.ones(2, requires_grad=True).sum().item() == 2  # tensors have numbers again


def test_a_base_can_be_predicted_while_something_is_attached_to_it():
    base = tiny("llama")
    alone = predict(PrefixTuning(3), base, 2, 8)
    with attach(base, PrefixTuning(2)) as tuned:
        assert predict(PrefixTuning(3), base, 2, 8) == alone
        assert predict(PrefixTuning(3), tuned, 2, 8) == alone


@dataclass(frozen=True)
class UpperLoRA(LoRA, listed=False):
    """LoRA from a layer on."""

    lowest: int = 1

    def reach(self, base, attachment, generator):
        every = base.anatomy.linears
        base.anatomy.linears = {n: v for n, v in every.items() if v.layer >= self.lowest}
        try:
            super().reach(base, attachment, generator)
        finally:
            base.anatomy.linears = every


@pytest.mark.parametrize("trains", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("kind", ["linear", "LayerNorm", "llama", "t5"])
def test_what_a_linear_map_and_a_norm_keep_hangs_on_what_trains(kind, carries, trains):
    """A bias needs nothing: a linear map with only b training keeps nothing, whatever x carries.
    LayerNorm keeps x and its statistics for any of the three, for b alone too, as torch has it;
    a norm built out of parts keeps x for x's gradient, and x̂ for its weight's."""
    base = tiny(kind if kind in FAMILIES else "bert")
    module = {
        "linear": lambda: torch.nn.Linear(24, 24),
        "LayerNorm": lambda: torch.nn.LayerNorm(24),
        "llama": lambda: base.model.model.norm,
        "t5": lambda: base.model.encoder.final_layer_norm,
    }[kind]()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trains)
    x = torch.randn(5, 24, requires_grad=carries) * 1.0
    own, found = {p.data_ptr() for p in module.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(x)
    rows, whole = 5 * 4, 5 * 24 * 4  # bytes of a number a row, and of x
    trained = [name for name in trains if hasattr(module, name)]  # an RMSNorm has no bias
    kept = {
        "linear": whole * ("weight" in trained),
        "LayerNorm": (whole + 2 * rows) * bool(carries or trained),
    }.get(kind, (whole + rows) * carries + whole * ("weight" in trained))
    assert output.requires_grad == bool(carries or trained)
    assert sum(n for at, n in found.items() if at not in own) == kept


def test_training_biases_alone_keeps_no_input_of_a_linear_map():
    """Full fine-tuning keeps every x that a matrix reads; BitFit keeps those alone that something
    else needs: a norm, the nonlinearity, attention."""
    options = dict(batch=2, length=64, head=Tagging(("O", "B")))
    config = Shape.named("bert-base")
    full, bias = (in_blocks(m, "bert-base", **options) for m in (FullFineTuning(), BitFit()))
    rows, d = 2 * 64, config.d_model
    # x of q, k, v and up, which a norm made; gelu's output. The output of attention is kept anyway.
    assert full - bias == config.layers * 4 * rows * (2 * d + config.d_ff)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_below_the_first_trained_tensor_nothing_is_kept(family):
    base = tiny(family)
    agree(base, [UpperLoRA(r=2)])
    kept = predict(UpperLoRA(r=2), base, BATCH, LENGTH).parts["activations"]
    assert kept.keys() == {"layers.1", "output"}
    kept = predict(PromptTuning(1), base, BATCH, LENGTH).parts["activations"]
    assert {"layers.0", "layers.1", "output"} <= kept.keys()


def in_blocks(methods, model, **options) -> int:
    kept = predict(methods, model, **options).parts["activations"]
    return sum(size for place, size in kept.items() if place.startswith("layers."))


def shallow(name: str, layers: int = 2) -> dict:
    """The config of a published model with a few of its layers."""
    config = named_config(name)
    depth = ("n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers")
    return config | {key: layers for key in depth if key in config}


@pytest.mark.parametrize("name", ["gpt2", "llama-3-8b", "bert-base"])
def test_prompt_tuning_can_keep_more_than_lora(name):
    """A prompt makes every layer keep P more tokens. LoRA's A and B keep x, which a frozen layer
    does not, and r numbers a token: which is more depends on P / T alone, not on the size."""
    options = dict(batch=2, length=64, head=Tagging(("O", "B")) if name == "bert-base" else None)
    config = shallow(name, 2)
    lora = in_blocks(LoRA(r=8), config, **options)
    one, many = (in_blocks(PromptTuning(P), config, **options) for P in (1, 64))
    assert one < lora < many
    # P = T doubles what every layer keeps but for what q and v of LoRA keep beside it.
    assert many == pytest.approx(2 * one * 64 / 65, rel=3e-3)
    upper = in_blocks(PTuningV2(16, depth=1), config, **options)
    assert 2 * upper <= in_blocks(PTuningV2(16), config, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama-3-8b", "t5-base"])
@pytest.mark.parametrize(
    "method", [FullFineTuning(), LoRA(), PromptTuning(4), PrefixTuning(4)], ids=lambda m: m.name
)
def test_what_is_kept_grows_in_proportion_to_the_batch(name, method):
    """From two rows on: of a single row, shifted logits need no copy."""
    one, two, three, four = (
        predict(method, shallow(name, 1), b, 32).bytes("activations") for b in (1, 2, 3, 4)
    )
    assert four - three == three - two  # all else, such as T5's position bias, is there once
    assert one <= two - (three - two) and four <= 2 * two


def test_the_step_of_a_published_shape():
    """16 bytes a parameter, the originals, and the activations on top."""
    step = predict(FullFineTuning(), "gpt2", batch=8, length=128)
    n, tensors = count(FullFineTuning(), "gpt2"), 148
    standing = [step.bytes(part) for part in ("weights", "aside", "gradients", "optimiser")]
    assert standing == [4 * n, 4 * n, 4 * n, 8 * n + 4 * tensors]
    logits = 8 * 127 * 50257 * 4
    assert step.bytes("activations") > logits
    lora = predict(LoRA(r=8), "gpt2", batch=8, length=128)
    assert lora.bytes("weights") == 4 * n + 4 * count(LoRA(r=8), "gpt2")
    assert lora.bytes("aside") == 0
    assert 1 > lora.bytes("activations") / step.bytes("activations") > 0.5
    gpu = predict(FullFineTuning(), shallow("gpt2"), batch=8, length=128, device="cuda")
    cpu = predict(FullFineTuning(), shallow("gpt2"), batch=8, length=128)
    assert gpu.bytes("gradients") == cpu.bytes("gradients")
    # On a GPU Adam makes the roots of all second moments first; on a CPU it works in place.
    assert gpu.most["step"] - cpu.most["step"] == pytest.approx(gpu.bytes("gradients"), rel=0.01)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="batch=0: allowed is at least 1"):
        predict(LoRA(), "gpt2", batch=0)
    with pytest.raises(ValueError, match="1020 tokens do not fit: .* 1004 after 20 virtual"):
        predict(PromptTuning(20), shallow("gpt2"), length=1020)
    with pytest.raises(ValueError, match="unknown family 'mamba'; known: gpt2, llama"):
        predict(LoRA(), {"model_type": "mamba"}, length=8)
    with pytest.raises(ValueError, match="bert has no head of its own: attach it with one"):
        predict(LoRA(), {"model_type": "bert"} | RELATIVES["roberta"], length=8)
    with pytest.raises(ValueError, match="unknown model 'gpt9'"):
        predict(LoRA(), "gpt9")
    for name in ("dtype", "optimiser", "device"):
        with pytest.raises(ValueError, match=f"{name}='x': allowed is "):
            predict(LoRA(), "gpt2", **{name: "x"})


NEOX = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    vocab_size=258,
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method",
    [FullFineTuning(), LoRA(), PromptTuning(20), PrefixTuning(20)],
    ids=lambda m: m.name,
)
def test_on_a_gpu_the_allocator_agrees(method, dtype):
    """Parts within 2% of what is allocated, the predicted peak within 5% of the measured one."""
    config = transformers.GPT2Config(
        vocab_size=8000,
        n_positions=256,
        n_embd=512,
        n_layer=8,
        n_head=8,
        activation_function="gelu_pytorch_tanh",
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    gc.collect()
    base = Base("gpu", transformers.GPT2LMHeadModel(config), tokenizer())
    tuned = attach(base, method)
    move(tuned, "cuda")
    memory: Memory = measure(tuned, batch_of(tuned, batch=16, length=128), dtype=dtype)
    assert memory.elsewhere <= 0.02 * memory.peak
    for moment in MOMENTS:
        assert abs(memory.total[moment] - memory.sum(moment)) <= 0.02 * memory.total[moment]
    said = predict(method, base, batch=16, length=128, dtype=dtype, device="cuda")
    assert abs(said.peak - memory.peak) <= 0.05 * memory.peak


RELATIVES = {  # the other architectures that share a walk, and T5 as it was first published
    "qwen2": dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=44)
    | dict(num_key_value_heads=2, max_position_embeddings=48, vocab_size=257, pad_token_id=0),
    "roberta": dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, vocab_size=260)
    | dict(intermediate_size=40, max_position_embeddings=50, pad_token_id=1),
    "t5": dict(d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, vocab_size=259)
    | dict(n_positions=48, pad_token_id=0, decoder_start_token_id=0, feed_forward_proj="relu"),
    "gpt_neox": NEOX,
    "distilbert": dict(dim=24, n_layers=2, n_heads=3, hidden_dim=40, vocab_size=260)
    | dict(max_position_embeddings=48, pad_token_id=0),
}


@pytest.mark.parametrize("method", EVERY_SITE, ids=lambda m: m.name)
@pytest.mark.parametrize("family", RELATIVES)
def test_every_family(family, method):
    config = transformers.AutoConfig.for_model(family, **RELATIVES[family])
    model = CLASSES[FAMILIES[family].kind].from_config(config)
    words = {"roberta": "bert", "distilbert": "bert", "t5": "t5"}.get(family, "gpt2")
    agree(Base(family, model, tokenizer(words)), [method])


@pytest.mark.parametrize("method", [LoRA(), PromptAndPrefix(3)], ids=lambda m: m.name)
def test_nothing_measured_stays_alive(method):
    with attach(tiny("gpt2"), method) as tuned:
        measure(tuned, batch_of(tuned))
        trained = [weakref.ref(parameter) for parameter in tuned.trainable.values()]
    del tuned
    gc.collect()
    assert not [reference for reference in trained if reference() is not None]


TABLES = {
    name: json.loads(data_path("results", f"memory_table_{name}.json").read_text())
    for name in ("cuda", "cuda_bfloat16", "cuda_bfloat16_checkpointing")
}
RECORDED = [(name, row) for name, table in TABLES.items() for row in range(len(table["rows"]))]


def test_every_method_was_recorded_on_a_gpu():
    assert all(len(table["rows"]) >= 33 for table in TABLES.values())


@pytest.mark.parametrize("name, row", RECORDED)
def test_a_recorded_gpu_and_what_is_predicted_are_within_5_percent(name, row):
    measured, said = (TABLES[name]["rows"][row][key] for key in ("measured", "predicted"))
    assert abs(said["peak"] - measured["peak"]) <= 0.05 * measured["peak"]
    assert said["activations"] == pytest.approx(measured["activations"], rel=1e-3)
    for part in ("weights", "gradients", "aside"):
        assert said[part] == measured[part]


@pytest.mark.parametrize("name", TABLES)
def test_what_was_predicted_beside_a_recorded_row_is_predicted_still(name):
    table = TABLES[name]
    row = next(row for row in table["rows"] if row["label"] == "LoRA")
    how = {key: table[key] for key in ("dtype", "checkpointing") if key in table}
    methods = [Method.from_dict(method) for method in row["methods"]]
    config = {"model_type": "gpt2"} | table["config"]
    now = predict(methods, config, table["batch"], table["length"], device="cuda", **how)
    said = row["predicted"]
    assert now.bytes("activations") == pytest.approx(said["activations"], rel=1e-3)
    assert now.peak == pytest.approx(said["peak"], rel=0.01)


@dataclass(frozen=True)
class Idle(LoRA, listed=False):
    """LoRA, and a tensor that nothing reads."""

    def reach(self, base, attachment, generator):
        super().reach(base, attachment, generator)
        attachment.trainable["idle"] = torch.nn.Parameter(torch.zeros(1000))


def test_what_has_no_gradient_has_no_states():
    base = tiny("gpt2")
    plain, said = (predict(method, base, BATCH, LENGTH) for method in (LoRA(), Idle()))
    with attach(base, Idle()) as tuned:
        found = measure(tuned, batch_of(tuned))
    assert found == said
    assert found.bytes("optimiser") == plain.bytes("optimiser")
    assert found.bytes("weights") == plain.bytes("weights") + 4000
    assert found.peak == plain.peak + 4000


def test_a_prediction_leaves_no_table_without_numbers():
    """What is computed once and kept is there for models with numbers as well."""
    config = shallow("gpt2", 1)
    program = (
        "import torch\n"
        "from peftlab import QLoRA, memory, quantisation\n"
        f"memory.predict(QLoRA(r=2), {config}, 1, 8)\n"
        "codes = quantisation.quantise(torch.eye(8), 8)\n"
        "assert torch.equal(codes.dequantise(), torch.eye(8))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
