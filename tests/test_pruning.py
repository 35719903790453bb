"""Pruning on a model: masks that hold, and structures that are really gone."""

import copy
import json
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from models import (
    DECODERS,
    FAMILIES,
    U64,
    adapted,
    call,
    hook_count,
    letters,
    put,
    stir,
    surroundings,
    tiny,
    token_ids,
)
from safetensors.torch import load_file, save_file
from test_masks import TEXTS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peftlab import (
    FullFineTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Prune,
    PruneStructures,
    accounting,
    attach,
    train,
)
from peftlab.bases import Shape
from peftlab.methods import Method, calibration
from peftlab.sites import MaskedWeight
from peftlab.training import move

FLOAT64 = torch.float64
ALL = "all-linear"
OUT = ("o", "down")


def weights(base):
    """W of every linear weight, by name."""
    return {name: x.weight.detach().clone() for name, x in base.anatomy.linears.items()}


def mask_sites(tuned):
    return [site for site in tuned._sites if isinstance(site, MaskedWeight)]


def zeros(tuned):
    """How many entries of the masked weights are zero in the model, and of how many."""
    held = [site.linear.weight for site in mask_sites(tuned)]
    return sum((W == 0).sum().item() for W in held), sum(W.numel() for W in held)


def learn(tuned, steps=6, **options):
    options = dict(lr=0.01, batch_size=4, progress=False, evaluate=False) | options
    return train(tuned, letters(), steps=steps, **options)


# Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["layer", "row", "global"])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 1])
def test_what_is_pruned_is_the_smallest(family, scope, sparsity):
    """W' is W where the mask is one and zero elsewhere; what is gone is no larger than the rest."""
    base = tiny(family)
    before = weights(base)
    tuned = attach(base, Prune(sparsity, scope=scope))
    sites = mask_sites(tuned)
    assert [site.linear.name for site in sites] == list(before)
    kept, gone = [], []
    for site in sites:
        W, mask = before[site.linear.name], site.mask
        assert torch.equal(site.linear.weight, torch.where(mask, W, 0.0))
        kept.append(W[mask].abs()), gone.append(W[~mask].abs())
        count = round(sparsity * (W.shape[1] if scope == "row" else W.numel()))
        if scope == "row":
            assert ((~mask).sum(dim=1) == count).all()
        if scope == "layer":
            assert (~mask).sum() == count
            assert not count or count == W.numel() or gone[-1].max() <= kept[-1].min()
    if scope == "global":
        total = sum(W.numel() for W in before.values())
        assert sum(map(len, gone)) == round(sparsity * total)
        if 0 < sparsity < 1:
            assert torch.cat(gone).max() <= torch.cat(kept).min()


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_by_hand(family):
    """|W_ij| ‖X_j‖ within each output's row, X from a forward of each text by itself."""
    base = tiny(family)
    linears = list(base.anatomy.linears.values())
    norms = calibration.input_norms(base, linears, TEXTS)  # against numpy in test_masks
    before = weights(base)
    tuned = attach(base, Prune(0.4, score="wanda", calibration=list(TEXTS)))
    for site in mask_sites(tuned):
        W = before[site.linear.name]
        for row, mask in zip(W, site.mask, strict=True):
            score = row.abs() * norms[site.linear.module].float()
            assert (~mask).sum() == round(0.4 * len(row))
            assert score[~mask].max() <= score[mask].min()
    magnitude = attach(tiny(family), Prune(0.4, scope="row"))
    both = zip(mask_sites(tuned), mask_sites(magnitude), strict=True)
    assert any(not torch.equal(a.mask, b.mask) for a, b in both)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "random"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_two_four_in_every_group(family, score):
    """Fours lie along the input of W (d_out, d_in), whether or not it is stored the other way."""
    targets = ["q", "k", "v", "up", "down"]  # the tiny Llama's o has 40 inputs, GPT-2's 24
    texts = TEXTS if score == "wanda" else ()
    tuned = attach(tiny(family), Prune(0.5, score, None, "2:4", targets, texts))
    for site in mask_sites(tuned):
        groups = (site.linear.weight != 0).unflatten(1, (-1, 4)).sum(dim=2)
        assert (groups == 2).all(), site.name
        stored = site.linear.module.weight  # GPT-2's is (d_in, d_out): fours down its columns
        if site.linear.transposed:
            columns = stored[:, site.linear.index]
            assert ((columns != 0).unflatten(0, (-1, 4)).sum(dim=1) == 2).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_after_every_step_of_full_fine_tuning_the_zeros_are_zeros(family):
    base = tiny(family)
    before = surroundings(base)
    tuned = attach(base, [Prune(0.5), FullFineTuning()])
    sites, start = mask_sites(tuned), weights(base)
    kept = [site.mask for site in sites]
    seen = []

    def look(record):
        for site, mask in zip(sites, kept, strict=True):
            assert not site.linear.weight[~mask].any()
            assert torch.equal(site.mask, mask)
        seen.append(record["step"])

    learn(tuned, steps=5, on_step=look)
    assert seen == [1, 2, 3, 4, 5]
    moved = [(start[s.linear.name] != s.linear.weight)[m] for s, m in zip(sites, kept, strict=True)]
    assert torch.cat(moved).float().mean() > 0.9  # the rest trains
    tuned.detach()
    assert surroundings(base) == before


def test_without_the_word_behind_each_step_the_zeros_are_gone():
    """What `after_step` is for: Adam moves a masked entry at once."""
    tuned = attach(tiny("gpt2"), [Prune(0.5), FullFineTuning()])
    tuned.after_step = lambda step, steps: None
    learn(tuned, steps=1)
    count, total = zeros(tuned)
    assert count < 0.01 * total


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_a_lora_keeps_the_zeros_or_destroys_them(family):
    """Held at zero with the mask; dense without it, where it was merged. Unmerged they are back."""
    for mask_deltas in (True, False):
        methods = [Prune(0.5, mask_deltas=mask_deltas), LoRA(r=2, target_modules=ALL)]
        tuned = attach(tiny(family), methods)
        count, total = zeros(tuned)
        learn(tuned)
        assert zeros(tuned)[0] == count  # beside W, nothing is written into it
        tuned.merge()
        if mask_deltas:
            assert zeros(tuned)[0] == count
            for site in mask_sites(tuned):
                assert not site.linear.weight[~site.mask].any()
        else:
            assert zeros(tuned)[0] < 0.01 * total
        tuned.unmerge()
        assert zeros(tuned)[0] == count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_delta_is_the_masked_product(family):
    """(M ⊙ W + M ⊙ s B A) x, written out, is what comes out of the module."""
    tuned = stir(attach(tiny(family, FLOAT64), [Prune(0.5), LoRA(r=2, target_modules=ALL)]))
    before = weights(tiny(family, FLOAT64))
    for site in mask_sites(tuned):
        linear, delta = site.linear, tuned.deltas[site.linear.name]
        x = torch.randn(3, linear.d_in, dtype=FLOAT64)
        W = before[linear.name] + delta.scale * delta.B @ delta.A
        wanted = x @ (W * site.mask).T
        if linear.module.bias is not None:
            wanted = wanted + linear.module.bias[linear.index]
        ours = linear.module(x)[:, linear.index]
        # Sums of d_in products each in two orders, and the delta's own product of r.
        close = 4 * (linear.d_in + 4) * U64 * (x.abs() @ W.abs().T + wanted.abs()).max()
        assert (ours - wanted).abs().max() <= close


def test_dropout_reaches_a_masked_delta():
    tuned = stir(attach(tiny("gpt2"), [Prune(0.5), LoRA(r=2, dropout=0.5)]))
    (linear,) = [x for x in tuned.anatomy.linears.values() if x.name == "layers.0.q"]
    x = torch.randn(3, linear.d_in)
    assert torch.equal(linear.module(x), linear.module(x))
    tuned.deltas["layers.0.q"].train()
    outputs = [linear.module(x)[:, linear.index] for _ in range(2)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(r=2, target_modules=ALL)])
def test_gradual_pruning_follows_its_schedule(method):
    """s_t at every fourth step, the target at 60% of the way; what is pruned stays pruned."""
    tuned = attach(
        tiny("llama"), [Prune(0.8, scope="global", schedule="gradual", end=0.6, every=4), method]
    )
    assert zeros(tuned)[0] == 0
    total, found, gone = zeros(tuned)[1], [], {}

    def look(record):
        found.append(zeros(tuned)[0])
        for site in mask_sites(tuned):
            now = ~site.mask
            assert not (gone.get(site.name, now) & ~now).any()
            gone[site.name] = now

    learn(tuned, steps=20, on_step=look)
    sparsity = 0.0
    for step, count in enumerate(found, start=1):
        if step in (4, 8, 12):
            sparsity = 0.8 * (1 - (1 - step / 12) ** 3)
        assert count == round(sparsity * total)
    assert found[-1] == round(0.8 * total)


def masks_after(tuned, **options):
    """The masks after each step of a run, all matrices together."""
    seen = []

    def look(record):
        seen.append(torch.cat([site.mask.flatten() for site in mask_sites(tuned)]))

    learn(tuned, on_step=look, **options)
    return seen


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize(
    "prune, method",
    [
        (Prune(0.5, schedule="gradual", every=2), LoRA(r=2)),
        (Prune(0.3, scope="row", schedule="gradual", every=1, end=1.0), LoRA(r=2)),
        (Prune(0.6, scope="global", schedule="gradual", every=3), FullFineTuning()),
        (Prune(0.77, scope="layer", schedule="gradual", every=2), PromptTuning(2)),
    ],
    ids=str,
)
def test_a_second_run_opens_no_mask_again(prune, method, family, tmp_path):
    """Nor does one that was stopped, one of a copy, and one of a saved and loaded adapter."""
    tuned = attach(tiny(family), [prune, method])
    first = masks_after(tuned, steps=8)
    stopped = attach(tiny(family), [prune, method])
    half = masks_after(stopped, steps=3)
    loaded = attach(tiny(family), tuned.save(tmp_path))
    for other, before in ((copy.deepcopy(tuned), first), (tuned, first), (stopped, half)):
        seen = [before[-1], *masks_after(other, steps=8)]
        assert not any((b & ~a).any() for a, b in zip(seen, seen[1:], strict=False))
        assert torch.equal(seen[-1], first[-1]) or other is stopped
    assert (~seen[-1]).sum() >= (~first[-1]).sum()  # what was stopped comes to its end
    assert all(torch.equal(mask, first[-1]) for mask in masks_after(loaded, steps=4))


def test_gradual_pruning_is_done_however_few_the_steps():
    tuned = attach(tiny("gpt2"), [Prune(0.5, schedule="gradual"), LoRA(r=2)])
    learn(tuned, steps=3)
    count, total = zeros(tuned)
    assert count == total / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [
        Prune(0.3, score="wanda", calibration=TEXTS),
        Prune(0.6, score="random", target_modules=["v", "up"]),
        Prune(0.7, scope="global"),
        Prune(0.4, schedule="gradual"),
    ],
    ids=lambda method: f"{method.score} {method.schedule}",
)
def test_a_mask_is_stored_as_bits_and_found_again(family, method, tmp_path):
    """One bit an entry; how it was found is told in `trained_as` alone."""
    base = tiny(family)
    before, ids = surroundings(base), token_ids(2, 6)
    tuned = attach(base, [method, LoRA(r=2)], seed=3)
    learn(tuned)
    wanted, kept = call(tuned, ids), [site.mask for site in mask_sites(tuned)]
    size = sum(-(-mask.numel() // 8) for mask in kept)
    lora = accounting.count(LoRA(r=2), base)
    assert tuned.count().file_bytes == size + 4 * lora
    assert accounting.file_bytes(method, base) == accounting.file_bytes(method, base, "float16")
    folder = tuned.save(tmp_path)
    assert sum(t.nbytes for t in load_file(folder / "adapter_model.safetensors").values()) == (
        size + 4 * lora
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["methods"][0]["score"] == "stored" and not config["methods"][0]["calibration"]
    assert config["trained_as"][0]["score"] == method.score
    tuned.detach()
    loaded = attach(base, folder)
    assert torch.equal(call(loaded, ids), wanted)
    for site, mask in zip(mask_sites(loaded), kept, strict=True):
        assert torch.equal(site.mask, mask)
    loaded.detach()
    assert surroundings(base) == before


def test_a_mask_alone_changes_the_output_and_trains_nothing():
    base = tiny("gpt2")
    ids, before = token_ids(2, 6), surroundings(base)
    tuned = attach(base, Prune(0.5))
    assert tuned.count().parameters == tuned.count().measured == 0
    assert not torch.equal(call(tuned, ids), call(tiny("gpt2"), ids))
    with pytest.raises(ValueError, match="no parameter to train: attach LoRA beside it"):
        learn(tuned)
    with pytest.raises(ValueError, match="layers.0.q.mask cannot be merged"):
        tuned.merge()
    move(tuned, "cpu")
    tuned.detach()
    assert surroundings(base) == before


def test_a_mask_changes_neither_bytes_nor_work(tmp_path):
    """The file of a model half of zeros is as long, and its forward does as many products."""
    base = tiny("llama")
    sizes, work = [], []
    for methods in ([LoRA(r=2)], [Prune(0.5, mask_deltas=False), LoRA(r=2)]):
        with attach(base, methods) as tuned:
            save_file(contiguous(base.model), tmp_path / "model.safetensors")
            sizes.append((tmp_path / "model.safetensors").stat().st_size)
            work.append(products(tuned))
    assert sizes[0] == sizes[1] and work[0] == work[1]


# Structures -----------------------------------------------------------------------------------


def contiguous(model):
    return {name: t.clone().contiguous() for name, t in model.state_dict().items()}


def products(model, length=7):
    """Floating-point operations of one forward, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(model, token_ids(2, length))
    return counter.get_total_flops()


CUTS = {
    "heads": PruneStructures(heads=0.5),
    "neurons": PruneStructures(neurons=0.4),
    "layers": PruneStructures(layers=0.4),
    "all": PruneStructures(heads=0.34, neurons=0.2, layers=0.4),
    "random": PruneStructures(heads=0.4, neurons=0.7, score="random"),
}
NAMED = {
    "gpt2": PruneStructures(heads={"layers.1": [0, 2]}, neurons={"layers.0": [39, 3, 7]}),
    "llama": PruneStructures(
        heads={"layers.0": [1]}, queries={"layers.1": [0, 3]}, neurons={"layers.1": [5]}
    ),
    "bert": PruneStructures(heads={"layers.0": [1]}, layers=["layers.1"]),
    "t5": PruneStructures(
        heads={
            "encoder.layers.0": [0],
            "encoder.layers.2": [1, 2],
            "decoder.layers.0": [2],
            "decoder.layers.0.cross": [1],
            "decoder.layers.1.cross": [0, 1],
        },
        neurons={"decoder.layers.1": [0, 1, 2]},
        layers=["encoder.layers.1"],
    ),
}
WAYS = [(family, cut) for family in FAMILIES for cut in (*CUTS, "named")]
ON_CUTS = pytest.mark.parametrize("family, cut", WAYS)


def method_of(family, cut):
    return NAMED[family] if cut == "named" else CUTS[cut]


class PassedBy(nn.Module):
    """A block that changes nothing; T5's also hands on the position biases that it was given."""

    def forward(self, hidden, *args, **kwargs):
        if len(args) < 5 or not self.biased:
            return hidden
        return hidden, args[1], args[4]


def masked_by_hand(family, removed):
    """The full-size model with what a head or neuron writes set to zero, and blocks passed by."""
    base = tiny(family, FLOAT64)
    shape = base.anatomy.shape
    group = shape.heads // shape.kv_heads
    with torch.no_grad():
        for name, heads in removed.heads.items():
            W = base.anatomy.linears[f"{name}.o"].weight.view(shape.d_model, shape.kv_heads, -1)
            W[:, list(heads)] = 0
        for name, queries in removed.queries.items():
            W = base.anatomy.linears[f"{name}.o"].weight.view(shape.d_model, shape.heads, -1)
            W[:, list(queries)] = 0
        for name, neurons in removed.neurons.items():
            base.anatomy.linears[f"{name}.down"].weight[:, list(neurons)] = 0
    assert group >= 1
    path = {"gpt2": "h", "llama": "layers", "bert": "encoder.layer", "t5": "block"}[family]
    for name in removed.layers:
        stack, _, number = name.rpartition("layers.")
        parent = base.anatomy.stacks[stack.removesuffix(".")]
        passed = PassedBy()
        passed.biased = family == "t5"
        parent.get_submodule(path)[int(number)] = passed
    return base


@ON_CUTS
def test_the_smaller_model_computes_what_the_masked_one_does(family, cut):
    base = tiny(family, FLOAT64)
    tuned = attach(base, method_of(family, cut), seed=1)
    reference = masked_by_hand(family, tuned._sites[0].removed)
    for length in (1, 9):
        ids = token_ids(3, length)
        with torch.no_grad():
            ours, theirs = call(tuned, ids), call(reference, ids)
        # Zeros drop out of sums of at most d_ff products, in two or three layers and the logits.
        assert (ours - theirs).abs().max() <= 1000 * U64 * (1 + theirs.abs().max())


@ON_CUTS
def test_it_is_smaller_in_closed_form_and_on_disk(family, cut, tmp_path):
    """Parameters as counted without weights, and bytes and products that go down with them."""
    base, method = tiny(family), method_of(family, cut)
    whole = base.anatomy.shape
    sizes = []
    for attached in (False, True):
        model = attach(base, method, seed=1) if attached else base
        tensors = contiguous(base.model)
        save_file(tensors, tmp_path / "model.safetensors")
        header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
        size = (tmp_path / "model.safetensors").stat().st_size - header - 8
        numbers = sum(tensor.numel() for tensor in tensors.values())
        assert size == 4 * numbers
        measured = sum(p.numel() for p in base.model.parameters())
        sizes.append((measured, numbers, products(model)))
    (full, *_), (left, *_) = sizes
    assert full == whole.parameters()
    assert left == base.anatomy.shape.parameters() < full
    if cut != "random":
        assert left == method.smaller(whole).parameters()
    assert sizes[0][1] - sizes[1][1] == full - left  # on disk: the same numbers, and no others
    assert sizes[1][2] < sizes[0][2]
    # Of a matrix's weights each stands for one product a token: two operations.
    if family in (*DECODERS, "bert") and cut == "neurons":
        weights_gone = sum(
            c * i * o - c2 * i2 * o2
            for t in base.anatomy.targets
            for (c, i, o), (c2, i2, o2) in zip(
                whole.matrices(t), base.anatomy.shape.matrices(t), strict=True
            )
        )
        assert sizes[0][2] - sizes[1][2] == 2 * weights_gone * 2 * 7


def attributes(model):
    """Every number, flag and name that a module keeps beside its tensors."""
    kinds = (int, float, bool, str, tuple, type(None))
    return {
        (path, key): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, kinds)
    }


def anatomy_of(base):
    anatomy = base.anatomy
    return {
        "shape": anatomy.shape,
        "layers": {stack: list(blocks) for stack, blocks in anatomy.layers.items()},
        "rows": {name: str(x.rows) for name, x in anatomy.linears.items()},
        "attentions": list(anatomy.attentions),
        "modules": [id(m) for m in base.model.modules()],
        "parameters": [id(p) for p in base.model.parameters()],
    }


@ON_CUTS
def test_everything_is_put_back(family, cut):
    """Modules, their attributes, the same Parameter objects, the anatomy; whatever went wrong."""
    base, ids = tiny(family), token_ids(2, 6)
    facts = (surroundings(base), attributes(base.model), anatomy_of(base))
    output, method = call(base, ids), method_of(family, cut)

    def check():
        assert (surroundings(base), attributes(base.model), anatomy_of(base)) == facts
        assert torch.equal(call(base, ids), output)

    tuned = attach(base, [method, LoRA(r=2)], seed=1)
    assert attributes(base.model) != facts[1] or anatomy_of(base) != facts[2]
    learn(tuned, steps=2)
    move(tuned, "cpu")
    tuned.detach()
    check()
    with pytest.raises(ValueError, match="allowed is"):  # the second method cannot be attached
        attach(base, [method, LoRA(r=25, target_modules=["v"])])
    check()
    tuned = attach(base, [method, FullFineTuning()], seed=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    blocks = next(iter(base.anatomy.layers.values()))
    hook = blocks[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(tuned, ids)
    hook.remove()
    stir(tuned)
    tuned.detach()
    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_in_the_middle_of_cutting_is_undone(family, monkeypatch):
    """At every tensor that is to be replaced, one after another."""
    base = tiny(family)
    facts = (surroundings(base), attributes(base.model), anatomy_of(base))
    from peftlab.sites.structures import SmallerModel

    original = SmallerModel._replace
    for at in range(4):
        calls = []

        def failing(self, *args, calls=calls, at=at):
            calls.append(args)
            if len(calls) > at:
                raise RuntimeError("now")
            original(self, *args)

        monkeypatch.setattr(SmallerModel, "_replace", failing)
        with pytest.raises(RuntimeError, match="now"):
            attach(base, CUTS["all"])
        assert (surroundings(base), attributes(base.model), anatomy_of(base)) == facts


def test_the_lowest_go():
    """Heads by the squares of their rows in q, k, v and columns in o; neurons and layers alike."""
    base = tiny("gpt2")
    shape, x = base.anatomy.shape, base.anatomy.linears
    wanted_heads, wanted_neurons, blocks = {}, {}, []
    for layer in range(2):
        name = f"layers.{layer}"
        q, k, v, o = (x[f"{name}.{t}"].weight.double() for t in "qkvo")
        squares = [
            sum((W[h * 8 : h * 8 + 8] ** 2).sum() for W in (q, k, v))
            + (o[:, h * 8 : h * 8 + 8] ** 2).sum()
            for h in range(3)
        ]
        wanted_heads[name] = (squares.index(min(squares)),)
        up, down = (x[f"{name}.{t}"].weight.double() for t in ("up", "down"))
        of = (up**2).sum(dim=1) + (down**2).sum(dim=0)
        wanted_neurons[name] = tuple(sorted(of.argsort()[: round(0.1 * shape.d_ff)].tolist()))
        blocks.append((o**2).sum() + (down**2).sum())
    tuned = attach(base, PruneStructures(heads=0.34, neurons=0.1))
    assert tuned._sites[0].removed.heads == wanted_heads
    assert tuned._sites[0].removed.neurons == wanted_neurons
    tuned.detach()
    tuned = attach(base, PruneStructures(layers=0.5))
    assert tuned._sites[0].removed.layers == (f"layers.{blocks.index(min(blocks))}",)


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivity_is_the_slope_of_the_loss(family):
    """Every score against a central difference in float64: what the structure adds, times 1 ± h.

    Its errors, h² of the third derivative and the roundings over h, are far below 10⁻⁵ of it.
    """
    texts, h = ("the first text of two", "a second one>>"), 1e-5
    base = tiny(family, FLOAT64)
    shape, linears = base.anatomy.shape, base.anatomy.linears
    before = base.fingerprint()
    felt = calibration.sensitivity(base, texts, batch_size=2)
    assert base.fingerprint() == before and hook_count(base.model) == 0
    counts = {"heads": shape.kv_heads, "queries": shape.heads, "neurons": shape.d_ff, "layers": 1}
    assert {kind for kind, _ in felt} == set(counts)
    for (kind, name), found in felt.items():
        assert found.shape == (counts[kind],)
        at, ends = counts[kind] // 2, [f"{name}.down" if kind == "neurons" else f"{name}.o"]
        if kind == "layers":
            ends = [k for k, x in linears.items() if k.startswith(f"{name}.") and x.target in OUT]
        losses = []
        for factor in (1 + h, 1 - h):
            with scaled([linears[end] for end in ends], counts[kind], at, factor):
                losses.append(calibration.own_loss(base, list(texts)))
        slope = ((losses[0] - losses[1]) / (2 * h)).abs().mean()
        assert found[at] == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


@contextmanager
def scaled(linears, count, at, factor):
    """Inside, one of `count` equal parts of the inputs is scaled; where it is all, the bias too."""
    kept = [copy.deepcopy(linear.module.state_dict()) for linear in linears]
    with torch.no_grad():
        for linear in linears:
            W = linear.weight.clone().unflatten(1, (count, -1))
            W[:, at] *= factor
            linear.write(W.flatten(1))
            if count == 1 and linear.module.bias is not None:
                linear.module.bias *= factor
        yield
        for linear, state in zip(linears, kept, strict=True):
            linear.module.load_state_dict(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_least_felt_go_by_gradient(family, tmp_path):
    base, texts = tiny(family), ("the first text of two", "a second one>>")
    felt = calibration.sensitivity(base, texts)
    method = PruneStructures(heads=0.34, neurons=0.2, score="gradient", calibration=texts)
    tuned = attach(base, [method, LoRA(r=2)])
    removed = tuned._sites[0].removed
    for kind in ("heads", "neurons"):
        for name, gone in getattr(removed, kind).items():
            stay = [i for i in range(len(felt[kind, name])) if i not in gone]
            assert max(felt[kind, name][list(gone)]) <= min(felt[kind, name][stay])
    config = json.loads((tuned.save(tmp_path) / "adapter_config.json").read_text())
    assert config["methods"][0]["calibration"] == []  # the names are enough
    tuned.detach()
    assert attach(base, tmp_path)._sites[0].removed == removed


def test_a_text_that_says_nothing_is_refused():
    base = tiny("gpt2")
    before = surroundings(base)
    with pytest.raises(ValueError, match="a calibration text is too short"):
        attach(base, PruneStructures(heads=0.5, score="gradient", calibration=["ab", "a"]))
    assert surroundings(base) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_chosen_is_saved_by_name(family, tmp_path):
    """A random choice is another's next time: the file says which it was."""
    base, ids = tiny(family), token_ids(2, 6)
    tuned = attach(base, [CUTS["random"], LoRA(r=2)], seed=7)
    wanted, removed = call(stir(tuned), ids), tuned._sites[0].removed
    folder = tuned.save(tmp_path)
    tuned.detach()
    loaded = attach(base, folder)
    assert loaded._sites[0].removed == removed
    assert torch.equal(call(loaded, ids), wanted)
    assert loaded.count().measured == loaded.count().stored


def test_queries_of_a_group():
    """Llama's key heads serve two queries each: with one query a group, no key head goes."""
    base = tiny("llama")
    tuned = attach(base, PruneStructures(queries=0.5))
    shape = tuned.anatomy.shape
    assert shape.attention == ((2, 2), (2, 2))
    assert {len(gone) for gone in tuned._sites[0].removed.queries.values()} == {2}
    tuned.detach()
    tuned = attach(base, PruneStructures(heads=0.5, queries=0.5))
    assert tuned.anatomy.shape.attention == ((1, 1), (1, 1))
    call(tuned, token_ids(2, 5))


def test_smaller_masked_and_adapted_at_once():
    base = tiny("bert")
    before = surroundings(base)
    tuned = attach(base, [PruneStructures(heads=0.34), Prune(0.5), LoRA(r=2, target_modules=ALL)])
    learn(tuned)
    tuned.merge()
    assert zeros(tuned)[0] == round(zeros(tuned)[1] / 2)
    tuned.detach()
    assert surroundings(base) == before


def test_virtual_tokens_in_front_of_a_smaller_model():
    for family in FAMILIES:
        base = tiny(family)
        before = surroundings(base)
        with attach(base, [CUTS["all"], PromptTuning(3)]) as tuned:
            learn(tuned)
            if family != "bert":
                tuned.generate(["ab", "c"], max_new_tokens=3)
        assert surroundings(base) == before


def test_closed_form_on_published_shapes():
    """A quarter of Llama-3-8B's neurons: 3 matrices of 4096 × 3584 less in each of 32 layers."""
    shape = Shape.named("llama-3-8b")
    left = PruneStructures(neurons=0.25).smaller(shape)
    assert shape.parameters() - left.parameters() == 32 * 3 * 4096 * (14336 // 4)
    assert left.matrices("up") == [(32, 4096, 10752)]
    left = PruneStructures(layers=0.5).smaller(Shape.named("t5-base"))
    assert (left.layers, left.decoder_layers) == (6, 6)
    assert accounting.count(LoRA(r=8), left) == 8 * 2 * 18 * (768 + 768)


# Refused --------------------------------------------------------------------------------------


@pytest.fixture
def untyped():
    """What a user meets: the checks of annotations, which only the tests switch on, are off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sparsity": -0.1}, "sparsity=-0.1: allowed is 0.0 to 1.0"),
        ({"sparsity": 1.01}, "sparsity=1.01: allowed is 0.0 to 1.0"),
        ({"sparsity": 50}, "sparsity=50: allowed is 0.0 to 1.0"),
        ({"sparsity": "half"}, "sparsity='half': a number is needed"),
        ({"sparsity": float("nan")}, "sparsity=nan: allowed is 0.0 to 1.0"),
        ({"score": "l1"}, "score='l1': allowed is magnitude, wanda, random, stored"),
        ({"scope": "model"}, "scope='model': allowed is None, row, layer, global"),
        ({"pattern": "3:4"}, "pattern='3:4': allowed is None, 2:4"),
        ({"pattern": "2:4", "sparsity": 0.6}, "pattern='2:4' is sparsity=0.5 of every four"),
        ({"pattern": "2:4", "scope": "global"}, "pattern='2:4' is sparsity=0.5 of every four"),
        ({"score": "wanda"}, "calibration: score='wanda' needs texts"),
        (
            {"calibration": ["a text"]},
            "calibration: score='wanda' needs texts .*, and no other does",
        ),
        ({"score": "wanda", "calibration": "a text"}, "calibration='a text': a list of texts"),
        ({"score": "wanda", "calibration": [3]}, r"calibration=\[3\]: a list of texts"),
        ({"schedule": "slow"}, "schedule='slow': allowed is one-shot, gradual"),
        ({"schedule": "gradual", "pattern": "2:4"}, "gradual.* goes by magnitude"),
        ({"schedule": "gradual", "score": "random"}, "gradual.* goes by magnitude"),
        ({"end": 1.5}, "end=1.5: allowed is 0.0 to 1.0"),
        ({"every": 0}, "every=0: allowed is at least 1"),
        ({"target_modules": "q"}, "target_modules='q': give a list"),
    ],
)
def test_bad_settings_of_a_mask(untyped, options, words):
    with pytest.raises(ValueError, match=words):
        Prune(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"heads": 1.2}, "heads=1.2: allowed is 0.0 to 1.0"),
        ({"neurons": -1}, "neurons=-1: allowed is 0.0 to 1.0"),
        ({"layers": 2}, "layers=2: allowed is 0.0 to 1.0"),
        ({"layers": "layers.1"}, "layers='layers.1': a fraction is needed, or a list"),
        ({"heads": [1, 2]}, r"heads=\[1, 2\]: a fraction is needed, or a dict"),
        ({"score": "wanda"}, "score='wanda': allowed is magnitude, gradient, random"),
        ({"heads": 0.5, "score": "gradient"}, "calibration: score='gradient' needs texts"),
        ({"heads": 0.5, "calibration": ["a"]}, "calibration: score='gradient' needs texts"),
    ],
)
def test_bad_settings_of_a_cut(untyped, options, words):
    with pytest.raises(ValueError, match=words):
        PruneStructures(**options)


class SplitsWeights(Method, listed=False):
    """Stands for PiSSA here, whichever it is."""

    name, title = "pissa", "PiSSA"


GPT, LLAMA, T5 = ("gpt2",), ("llama",), ("t5",)


@pytest.mark.parametrize(
    "families, methods, words",
    [
        (FAMILIES, [LoRA(), Prune()], "Prune does not go with LoRA: it comes first"),
        (FAMILIES, [FullFineTuning(), Prune()], "Full fine-tuning does not go with Prune"),
        (FAMILIES, [Prune(), Prune()], "Prune does not go with Prune: it comes first"),
        (FAMILIES, [Prune(), SplitsWeights()], "Prune .* PiSSA: it splits W into two parts"),
        (FAMILIES, [Prune(), PruneStructures(heads=0.5)], "Prune structures .* it comes first"),
        (FAMILIES, [LoRA(), PruneStructures(heads=0.5)], "it comes first, for the others are made"),
        (FAMILIES, [PruneStructures(heads=0.5), PrefixTuning(2)], "a prefix has as many heads"),
        (FAMILIES, Prune(target_modules=["x"]), "unknown target 'x'"),
        (FAMILIES, Prune(score="wanda", calibration=[""]), "no token in the calibration|"),
        (T5, Prune(pattern="2:4"), r"pattern='2:4' at encoder.layers.0.o: 30 inputs are no fours"),
        (FAMILIES, PruneStructures(), "nothing would go"),
        (FAMILIES, PruneStructures(heads=0.1), "nothing would go: of . key-value heads"),
        (FAMILIES, PruneStructures(heads=1), "every one of the heads of .* would go"),
        (FAMILIES, PruneStructures(heads=0.9), "every one of the heads of .* would go"),
        (FAMILIES, PruneStructures(neurons=1.0), "every one of the neurons of .* would go"),
        (FAMILIES, PruneStructures(layers=1.0), "every block of .* would go|holds the table"),
        (GPT, PruneStructures(layers=["layers.0", "layers.1"]), "every block of .* would go"),
        (GPT, PruneStructures(layers=["layers.2"]), "no block 'layers.2': .* layers.0 to layers.1"),
        (GPT, PruneStructures(heads={"layers.0": [0, 1, 2]}), "every one of the heads"),
        (GPT, PruneStructures(heads={"layers.0": [3]}), "heads of layers.0: 3 is not in 0 to 2"),
        (GPT, PruneStructures(neurons={"layers.7": [3]}), "neurons: no 'layers.7' here"),
        (
            GPT,
            PruneStructures(heads={"layers.0": [1]}, layers=["layers.0"]),
            "heads: no 'layers.0' here",
        ),
        (GPT, PruneStructures(queries=0.5), "queries: each head of .* has one query"),
        (LLAMA, PruneStructures(queries={"layers.0": [0]}), "each group must keep as many"),
        (LLAMA, PruneStructures(queries={"layers.0": [0, 1]}), "each group must keep as many"),
        (T5, PruneStructures(layers=["decoder.layers.0"]), "holds the table of positions"),
    ],
)
def test_refused_and_the_base_untouched(families, methods, words):
    for family in families:
        base = tiny(family)
        facts = (surroundings(base), attributes(base.model), anatomy_of(base))
        if "no token" in words and family in ("bert", "t5"):
            continue  # there the empty text has the tokens around it
        with pytest.raises(ValueError, match=words):
            attach(base, methods)
        assert (surroundings(base), attributes(base.model), anatomy_of(base)) == facts


def test_a_damaged_mask_is_refused(tmp_path):
    base = tiny("gpt2")
    before = surroundings(base)
    tuned = attach(base, [Prune(0.5), LoRA(r=2)])
    folder = tuned.save(tmp_path)
    tuned.detach()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["prune.layers.0.q.mask"] = tensors["prune.layers.0.q.mask"][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"prune.layers.0.q.mask is \(71,\); \(72,\) is needed"):
        attach(base, folder)
    assert surroundings(base) == before


def test_cases_hold_what_they_say():
    """The property cases of this method prune what they name."""
    tuned = put("prune + lora", tiny("t5"))
    count, total = zeros(tuned)
    assert count == total / 2
    smaller = adapted("smaller + lora", "t5")
    assert smaller.anatomy.shape.parameters() < smaller.facts["parameters"]
    assert copy.deepcopy(smaller.anatomy.shape) == smaller.anatomy.shape
