"""What lesson 09 says of adapters, scales, biases and norms holds: its code, its derivations, the
runs that it reads, its drawings and its switch, and its PEFT section."""

import copy
import math
from pathlib import Path

import nbformat
import peft
import pytest
import torch
from models import U32, tiny, token_ids
from test_bases import specimen
from torch.nn.functional import relu

import peftlab
from peftlab import (
    IA3,
    BitFit,
    HoulsbyAdapter,
    LayerNormTuning,
    ParallelAdapter,
    PfeifferAdapter,
    attach,
    count,
    figures,
    load,
    panels,
    tasks,
)
from peftlab.bench import results
from peftlab.experiments import sweep_adapters, time_adapters
from peftlab.figures.sheet import alt_text, overlaps, pale

CELLS = nbformat.read(
    Path(__file__).parent.parent / "notebooks/09_adapters_and_scales.ipynb", 4
).cells
SIX = {
    "Houlsby": HoulsbyAdapter(3),
    "Pfeiffer": PfeifferAdapter(3),
    "parallel": ParallelAdapter(3),
    "(IA)³": IA3(),
    "BitFit": BitFit(),
    "LayerNorm tuning": LayerNormTuning(),
}


def run(*words: str, **given) -> dict:
    """What the cells with these words leave behind."""
    built = {"torch": torch, "pl": peftlab, "seed": 0, "device": "cpu", **given}
    for some in words:
        [source] = [c.source for c in CELLS if c.cell_type == "code" and some in c.source]
        exec(source, built)
    return built


@pytest.fixture(scope="module")
def base():
    return load("tiny-gpt")


@pytest.fixture(scope="module")
def ids(base):
    prompt = tasks.load("letters", skill="sort").train[0].prompt
    return base.tokenizer(prompt, return_tensors="pt").input_ids


# --- its code ----------------------------------------------------------------------------------


def test_the_adapter_of_the_lesson_is_the_packages(base, ids):
    """Outputs and gradients are sums of at most d_ff terms a layer; 4 roundings of each."""
    before = base.fingerprint()
    words = ("class Bottleneck", "def put_beside", "as theirs:", "mine, handles")
    built = run(*words, base=base, ids=ids, d=base.anatomy.shape.d_model)
    ours, theirs = built["my_logits"], built["their_logits"]
    assert (ours - theirs).abs().max() <= 4 * 768 * U32 * theirs.abs().max()
    assert len(built["mine"]) == 6
    gradient, wanted = built["mine"]["layers.0.mlp"].W_down.grad, built["their_gradient"]
    assert wanted.any() and (gradient - wanted).abs().max() <= 4 * 768 * U32 * wanted.abs().max()
    assert base.fingerprint() == before and base.adapted_by is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def test_the_gradients_that_decide_the_start():
    """∂L/∂W_up = g hᵀ and ∂L/∂W_down = (σ'(a) ⊙ W_upᵀ g) yᵀ, and who gets none."""
    generator = torch.Generator().manual_seed(0)
    y, g = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    drawn_down = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    drawn_up = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def gradients(down, up):
        down, up = down.clone().requires_grad_(), up.clone().requires_grad_()
        (g @ (up @ relu(down @ y))).backward()
        a = down.detach() @ y
        torch.testing.assert_close(up.grad, torch.outer(g, relu(a)))
        wanted = torch.outer((a > 0) * (up.detach().T @ g), y)
        torch.testing.assert_close(down.grad, wanted)
        return bool(down.grad.any()), bool(up.grad.any())

    assert gradients(drawn_down, drawn_up) == (True, True)
    assert gradients(0 * drawn_down, 0 * drawn_up) == (False, False)
    assert gradients(0 * drawn_down, drawn_up) == (False, False)
    assert gradients(drawn_down, 0 * drawn_up) == (False, True)


def test_how_near_the_identity_adapters_start(base, ids):
    phi, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    assert round(1 - 4 * phi / inside, 3) == 0.774 and round(math.sqrt(0.774), 2) == 0.88
    built = run("def size_at_the_start", base=base)
    for name, method in {"Houlsby": HoulsbyAdapter(16), "Pfeiffer": PfeifferAdapter(16)}.items():
        assert 2 / 3 < built["size_at_the_start"](method) / built["derived"][name] < 4 / 3


def test_a_norm_folds_into_the_next_weight(base):
    built = run("x_hat =", base=base, linears=base.anatomy.linears, d=192)
    through = built["through"]
    assert (built["folded"] - through).abs().max() <= 8 * 192 * U32 * through.abs().max()


def test_factors_on_queries_say_what_those_on_keys_can(base, ids):
    built = run("def with_factors_on", base=base, ids=ids, d=192)
    on_keys, plain = built["on_keys"], base(ids)
    assert (built["on_queries"] - on_keys).abs().max() <= 1e-4 * on_keys.abs().max()
    assert (plain - on_keys).abs().max() > 0.1 * plain.abs().max()  # the factors do something
    assert built["idle"] == 9_216


@pytest.mark.parametrize("family, acts", [("gpt2", False), ("qwen2", True)])
def test_the_bias_of_the_keys_acts_under_rotary_positions_alone(family, acts):
    base, ids = specimen(family), token_ids(2, 9)
    with attach(base, BitFit()) as tuned, torch.no_grad():
        before = tuned(ids)
        for linear in base.anatomy.select(("k",)):
            noise = torch.randn(linear.d_out, generator=torch.Generator().manual_seed(0))
            linear.module.bias[linear.index] = 3 * noise
        apart = (tuned(ids) - before).abs().max() / before.abs().max()
    assert apart > 0.01 if acts else apart < 1e-4


# --- what it reads of the records --------------------------------------------------------------


def spans(rows, value):
    groups = rows.groupby("label", sort=False)[value]
    return groups.min().to_dict(), groups.max().to_dict()


def test_sorting_is_too_easy_to_tell_the_methods_apart():
    low, high = spans(sweep_adapters.at_one_budget("tiny-gpt"), "score")
    assert len(low) == 7 and min(low.values()) > 0.9
    bitfit = next(label for label in low if "BitFit" in label)
    assert sum(low[label] > high[bitfit] for label in low) == 5
    _, runs = sweep_adapters.read()
    ends = runs[runs["base"] == "tiny-gpt"].groupby("label")["at the end of its grid"].first()
    assert ends.sum() == 3


def test_new_facts_tell_them_apart():
    facts = results.read("facts")
    assert all(inside["lr"] for inside in facts.settled["inside"])
    means = facts.runs.groupby("label")["new_facts"].mean()
    assert (facts.runs.groupby("label").size() == 5).all()
    assert means["LoRA"] == means["Houlsby adapter"] == 1
    said = {"(IA)³": 3 / 4, "LayerNorm tuning": 1 / 4, "BitFit": 1 / 7}
    assert all(abs(means[label] - share) < 0.02 for label, share in said.items())
    better = facts.comparisons.set_index("label")["better_than"]
    order = ["Houlsby adapter", *said]
    assert all(b in better[a] for a, b in zip(order, order[1:], strict=False))
    sizes = facts.runs.groupby("label")["trained"].first()
    assert 1.8 < sizes["BitFit"] / sizes["(IA)³"] < 2
    assert sizes["Houlsby adapter"] > 40 * sizes["(IA)³"]
    assert 4.5 < means["(IA)³"] / means["BitFit"] < 5.5
    assert facts.settled.loc["Full fine-tuning", "lr"] == 0.001


def test_five_of_seven_tag_better_than_the_head_alone():
    rows = sweep_adapters.at_one_budget("tiny-bert")
    low, high = spans(rows, "score")
    alone = high.pop("Head alone, base frozen")
    above = {label.split(",")[0] for label in high if low[label] > alone}
    assert above == {"Houlsby adapter", "Pfeiffer adapter", "Parallel adapter", "(IA)³", "LoRA"}
    [ia3] = [label for label in high if "(IA)³" in label]
    assert all(low[ia3] > best for label, best in high.items() if label != ia3)
    assert figures.style.method_key("Head alone, base frozen") == "base"


def test_unmerged_lora_costs_most_and_merged_nearly_nothing():
    ratios = time_adapters.forwards().set_index(["label", "batch"])["ratio"]
    beside = {label for label, _ in ratios.index if "merged" not in label and label != "base"}
    for batch in (1, 32):
        costs = ratios.xs(batch, level="batch")
        assert costs.idxmax() == "LoRA, r = 8, all linear"
        assert costs[[label for label in costs.index if "merged" in label]].max() < 1.05
    assert all(ratios[label, 32] < ratios[label, 1] for label in beside)


# --- its drawings and its switch ---------------------------------------------------------------


def drawings(dark):
    q, k = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    W, c = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([1.0, 0.0, -1.0])
    down, up = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), W.clone()
    y, g, b = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    return {
        "bend": figures.hand_bend(down, up, y, dark),
        "places": figures.reads_and_adds(dark),
        "idle": figures.idle_bias(q, k, b, dark),
        "norm": figures.norm_folded(W, c, g, b, dark),
    }


def words_of(figure):
    return [note.text for note in figure.layout.annotations if note.text]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_drawings_are_legible_and_have_words(dark):
    for name, figure in drawings(dark).items():
        assert overlaps(figure) == [] and pale(figure) == [], name
        sizes = [note.font.size for note in figure.layout.annotations if note.text]
        assert min(sizes) >= 11 and figure.layout.width <= 900 and figure.layout.height <= 600
        assert len(alt_text(figure)) > 60 and figure.layout.title.text


def test_the_numbers_of_the_drawings_are_those_of_the_tensors():
    drawn = drawings(False)
    assert "[-2.0, -1.0], bent [0.0, 0.0]" in alt_text(drawn["bend"])
    shares = [text for text in words_of(drawn["idle"]) if text.endswith("%")]
    assert shares == ["27%", "73%", "73%", "27%"]  # softmax of (1, 2) and of (1, 0)
    folded = [text for text in words_of(drawn["norm"]) if text in ("8", "−2", "6")]
    assert sorted(folded) == ["6", "8", "−2"]


def test_the_factors_are_drawn_by_layer_and_place():
    with attach(tiny("gpt2"), IA3()) as tuned:
        factors = {name: module.l.detach() * 2 for name, module in tuned.modules.items()}
    boxes = {trace.name: trace for trace in figures.factors_by_layer(factors, "it").data}
    assert list(boxes) == ["keys", "values", "inside the MLP"]
    for name, d in (("keys", 24), ("values", 24), ("inside the MLP", 96)):
        assert list(boxes[name].x) == [0] * d + [1] * d and set(boxes[name].y) == {2.0}


def test_the_switch_draws_what_is_attached_at_every_position():
    base = tiny("gpt2")
    before, seen = base.fingerprint(), set()
    panel = panels.method_switch(base, SIX)
    assert panel.switch.options == tuple(SIX)
    for label, method in SIX.items():
        panel.switch.value = label
        assert panel.view.parameters == count(method, base.anatomy.shape)
        assert f"{panel.view.parameters:,} parameters train" in panel.text.value
        assert panel.plot.layout.title.text == panel.static().layout.title.text
        seen.add(panel.static().layout.title.text)
    assert len(seen) == len(SIX)
    assert base.fingerprint() == before and base.adapted_by is None
    with pytest.raises(ValueError, match="one method or more"):
        panels.switch_views(base, {})


# --- in PEFT -----------------------------------------------------------------------------------


def trained(base, config):
    return peft.get_peft_model(copy.deepcopy(base.model), config).get_nb_trainable_parameters()[0]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_peft_computes_what_the_lesson_says(base, ids):
    sort = tasks.load("letters", skill="sort")
    library = IA3(["q", "k", "v", "down"])
    words = ("from peft import IA3Config", "places = [module.ia3_l")
    built = run(*words, base=base, sort=sort, library=library)
    assert built["theirs"].get_nb_trainable_parameters()[0] == count(library, base) == 8_064
    assert trained(base, built["norms"]) == count(LayerNormTuning(), base) == 4_992
    mine = built["mine"][built["real"]]
    assert built["apart"] <= 1e-4 * mine.abs().max() and not torch.equal(mine, mine * 0)
    plain = base(built["batch"]["input_ids"], built["batch"]["attention_mask"])[built["real"]]
    assert (mine - plain).abs().max() > 0.1 * plain.abs().max()  # the factors do something


def test_peft_has_no_bottleneck_and_brings_biases_to_llama():
    names = {kind.value for kind in peft.PeftType}
    assert not [name for name in names if "BOTTLENECK" in name or "HOULSBY" in name]
    llama = load("tiny-llama")
    shape = llama.anatomy.shape
    config = peft.BeftConfig(target_modules=["v_proj"])
    assert trained(llama, config) == shape.layers * shape.d_kv and shape.biases == 0


def test_what_bitfit_needs_of_pytorch_is_what_bitfit_trains(base):
    named = copy.deepcopy(base.model).named_parameters()
    assert sum(p.numel() for name, p in named if name.endswith("bias")) == count(BitFit(), base)
