"""What lesson 08 says of QLoRA holds: its code, its derivations, its runs, and its PEFT section."""

import math
import tempfile
from pathlib import Path

import nbformat
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.training_args import OptimizerNames

import peftlab
from peftlab import NF4, LoRA, QLoRA, accounting, attach, load, quantisation, tasks, train
from peftlab.experiments import sweep_qlora
from peftlab.sites.quantisation import quantise, table

CELLS = nbformat.read(Path(__file__).parent.parent / "notebooks/08_qlora.ipynb", 4).cells
U = 2**-24  # float32's unit roundoff


def cell_with(words: str) -> str:
    """The source of the one code cell that has these words."""
    [source] = [c.source for c in CELLS if c.cell_type == "code" and words in c.source]
    return source


def run(*words: str, **given) -> dict:
    """What the cells with these words leave behind."""
    built = {"torch": torch, "pl": peftlab, "quantisation": quantisation, **given}
    for some in words:
        exec(cell_with(some), built)
    return built


@pytest.fixture(scope="module")
def base():
    return load("tiny-gpt")


# --- its code ----------------------------------------------------------------------------------


def test_the_product_of_the_lesson_is_the_packages_and_has_the_gradient_of_autograd(base):
    product = run("class CodedProduct")["CodedProduct"]
    site = base.anatomy.linears["layers.0.up"]
    codes = quantise(site.weight.detach())
    x = torch.randn(5, site.d_in, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = product.apply(x, codes)
    y.square().sum().backward()
    mine, x.grad = x.grad, None
    dense = x @ codes.dequantise().T
    dense.square().sum().backward()
    with torch.no_grad(), attach(base, NF4()):
        theirs = site.module(x) - site.bias
    for a, b, terms in ((y, dense, 192), (y, theirs, 192), (mine, x.grad, 192 + 768)):
        assert (a - b).abs().max() <= 2 * terms * U * b.abs().max()


def test_the_table_of_the_lesson_is_the_packages_and_the_papers_formula_is_not():
    built = run("(Q(i / 17)", "above = Q(")
    assert torch.equal(built["T"], table("nf4"))
    paper = built["q"]
    assert paper[0] == -math.inf and torch.allclose(paper[1:], -paper[1:].flip(0))
    scaled = paper[1:] / paper[1:].max()
    assert abs(scaled[1].item() - table("nf4")[1].item()) > 0.05


def test_one_weight_leaves_its_block_five_codes(base):
    W = base.anatomy.linears["layers.3.up"].weight.detach()
    blocks = W.reshape(-1, 64)
    lonely = int((blocks.abs().amax(dim=1) / blocks.abs().mean(dim=1)).argmax())
    used = quantise(W).codes.reshape(-1, 64)[lonely].tolist()
    assert used.count(15) == 1 and set(used) == {5, 6, 7, 8, 9, 15}


def test_nf4_has_the_least_error_and_fp4_the_largest_on_the_lessons_matrices(base):
    built = run("matrices = {", seed=0, base=base)
    assert len(built["matrices"]) == 4
    for W in built["matrices"].values():
        error = {k: (quantise(W, 64, k).dequantise() - W).norm() for k in ("nf4", "int4", "e2m1")}
        worst = (quantise(W, 64, "fp4").dequantise() - W).norm()
        assert error["nf4"] < min(error["int4"], error["e2m1"]) and worst > max(error.values())


# --- what fits ---------------------------------------------------------------------------------


def test_a_65b_model_on_48_gb():
    built = run("llama_65b = dict", lora_64=lora())
    shape, card = built["llama_65b"], 48 * 2**30
    assert 2 < built["sixteen"].total / card < 3  # at least three cards
    methods = {double: QLoRA(r=64, double_quant=double) for double in (False, True)}
    held = {k: accounting.training_bytes(m, shape, "bfloat16") for k, m in methods.items()}
    left = {double: card - ledger.total for double, ledger in held.items()}
    assert 3 < left[True] / left[False] < 4
    per_token = 2 * shape["num_hidden_layers"] * shape["hidden_size"]
    assert 2 * 512 * per_token < left[True] < 2 * 2048 * per_token


def lora(r=64):
    return LoRA(r=r, target_modules="all-linear")


# --- what was recorded -------------------------------------------------------------------------


def ranges(rows, value):
    groups = rows.groupby("label", sort=False)[value]
    assert (groups.count() == 3).all()
    return groups.min().to_dict(), groups.max().to_dict()


def apart(rows, value):
    """The places where all runs of one method are above all of the other."""
    low, high = ranges(rows, value)
    places = {label.split(":")[0] for label in low}
    pairs = {place: (f"{place}: LoRA", f"{place}: QLoRA") for place in places}
    return {
        place
        for place, (a, b) in pairs.items()
        if low[a] > high[b] or low[b] > high[a]
    }  # fmt: skip


def test_three_seeds_tell_lora_and_qlora_apart_on_no_base():
    rows = sweep_qlora.by_base()
    assert len(rows) == 18 and apart(rows, "loss") == set()
    llama = rows[rows["base"] == "tiny-llama"].pivot(index="seed", columns="method", values="loss")
    assert (llama["QLoRA"] > llama["LoRA"]).all()


def test_beside_full_fine_tuning_the_means_are_within_five_percent():
    rows = sweep_qlora.beside_full()
    means = rows.groupby("label", sort=False)["part"].mean()
    assert len(means) == 10 and means.min() > 0.95
    qlora = [part for label, part in means.items() if "QLoRA" in label]
    assert (round(min(qlora), 3), round(max(qlora), 3)) == (0.965, 1.019)
    assert sorted(rows[rows["part"] < 0.95]["label"]) == ["wnut17: LoRA", "wnut17: QLoRA"]
    assert apart(rows, "part") == {"sst2-smollm2"}
    assert rows.groupby("label")["end"].first().sum() == 7


def test_merging_into_codes_costs_smollm2_a_nat_and_decoded_weights_cost_nobody():
    rows = sweep_qlora.by_way()
    assert len(rows) == 27
    into = rows[rows["way"] == "into the codes"].groupby("base")["worse"]
    assert 0.9 < into.mean()["smollm2-135m"] < 1.1
    assert into.max()[["tiny-gpt", "tiny-llama"]].max() < 0.05
    assert rows[rows["way"] == "into decoded weights"]["worse"].abs().max() < 2e-4


# --- the merge trap ----------------------------------------------------------------------------


def test_an_update_arrives_in_codes_from_a_tenth_of_the_weights_on(base):
    W = base.anatomy.linears["layers.3.up"].weight.detach()
    codes, site = quantise(W), base.anatomy.linears["layers.3.up"]
    assert round(table("nf4").diff().min().item(), 2) == 0.08
    assert 2.5 < (codes.scales.mean() / W.std()).item() < 2.7
    source = cell_with("A, B = torch.randn(8, site.d_in").split("title =")[0]
    built = {"torch": torch, "quantisation": quantisation, "codes": codes, "site": site, "seed": 0}
    exec(source, built)
    rows = {row["size"]: row for row in built["rows"]}
    assert rows[0.03]["along"] < 0.1 and rows[0.03]["off"] > 1
    assert 0.5 < rows[0.07]["along"] < rows[0.1]["along"] < 0.9
    assert rows[0.2]["along"] > 0.95 and 0.05 < 0.2 * rows[0.2]["off"] < 0.15


def test_merged_after_two_steps_almost_nothing_is_left(base):
    facts = tasks.load("facts")
    some = facts.test[::8]
    with attach(base, QLoRA(r=8, alpha=128), seed=0) as early:
        untrained = sweep_qlora.loss(early, facts, some)
        train(early, facts, steps=2, lr=2e-3, seed=0, evaluate=False, progress=False)
        learned = untrained - sweep_qlora.loss(early, facts, some)
        early.merge(requantise=True)
        left = untrained - sweep_qlora.loss(early, facts, some)
    assert learned > 2 and abs(left) < learned / 10


# --- in PEFT -----------------------------------------------------------------------------------


def in_codes(base):
    """A base in bitsandbytes' codes, with PEFT's LoRA beside it."""
    usual = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        base.model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=usual, device_map="cpu", dtype=torch.float32
        )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


@pytest.fixture
def held(base):
    return in_codes(base)


def first_gradient(model) -> float:
    """Of B in the lowest layer, after one backward pass."""
    ids = torch.arange(40)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    place = next(module for module in model.modules() if hasattr(module, "lora_B"))
    return place.lora_B["default"].weight.grad.abs().max().item()


def test_what_the_settings_are_unless_you_say():
    usual = BitsAndBytesConfig(load_in_4bit=True)
    assert usual.bnb_4bit_quant_type == "fp4" and not usual.bnb_4bit_use_double_quant
    assert usual.bnb_4bit_compute_dtype == torch.float32
    assert {"paged_adamw_32bit", "paged_adamw_8bit"} <= {name.value for name in OptimizerNames}


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel:UserWarning")
def test_a_call_in_evaluation_mode_first_stops_the_gradient_on_some_cpus():
    llama = load("tiny-llama")
    assert first_gradient(in_codes(llama).train()) > 0
    if not has_avx512bf16():
        pytest.skip("this processor has no product in bfloat16, so nothing is repacked")
    evaluated = in_codes(llama).eval()
    with torch.no_grad():
        evaluated(input_ids=torch.arange(40)[None])  # repacks
    assert first_gradient(evaluated.train()) == 0


def test_pefts_merge_writes_into_the_codes_and_warns(held):
    place = held.base_model.model.transformer.h[0].attn.c_attn
    torch.nn.init.normal_(place.lora_B["default"].weight, std=0.1)
    before = place.base_layer.weight.data.clone()
    with pytest.warns(UserWarning, match="rounding errors"):
        merged = held.merge_and_unload()
    weight = merged.transformer.h[0].attn.c_attn.weight
    assert weight.dtype == torch.uint8 and not torch.equal(weight.data, before)


def test_decoded_weights_can_be_had_before_anything_is_attached(held):
    model = held.unload().dequantize()
    weight = model.transformer.h[0].attn.c_attn.weight
    assert weight.is_floating_point() and weight.shape == (576, 192)
