"""What lesson 10 says of pruning holds: its code, its derivations, its runs, its PEFT section."""

import copy
from pathlib import Path

import nbformat
import pytest
import torch
from models import tiny
from peft import LoraConfig, get_peft_model
from torch.nn.utils import prune

import peftlab
from peftlab import LoRA, Prune, PruneStructures, attach, figures, load
from peftlab.exercises import lesson_10
from peftlab.experiments import sweep_pruning
from peftlab.figures.sheet import alt_text, extents, overlaps, pale
from peftlab.methods.calibration import input_norms
from peftlab.methods.scores import choose, magnitude, wanda
from peftlab.methods.structure_scores import importance

CELLS = nbformat.read(Path(__file__).parent.parent / "notebooks/10_pruning.ipynb", 4).cells
FACTS, TABLES = sweep_pruning.read()
CURVES = TABLES["curves"][TABLES["curves"].base == "tiny-gpt"]


def cell_with(words: str) -> str:
    """The source of the one code cell that has these words."""
    [source] = [c.source for c in CELLS if c.cell_type == "code" and words in c.source]
    return source


def run(*words: str, **given) -> dict:
    """What the cells with these words leave behind."""
    built = {"torch": torch, "pl": peftlab, "choose": choose, "wanda": wanda}
    built |= {"device": "cpu", "seed": 0, **given}
    for some in words:
        exec(cell_with(some), built)
    return built


@pytest.fixture(scope="module")
def base():
    return load("tiny-gpt")


@pytest.fixture(scope="module")
def read(base):
    """The lesson's texts, and what comes into each weight."""
    built = run("def inputs_of", base=base)
    built["linears"] = list(base.anatomy.linears.values())
    built["inputs"] = built["inputs_of"](built["linears"])
    return built


# --- masks by hand -----------------------------------------------------------------------------


def test_the_three_masks_by_hand_differ_as_the_text_says():
    built = run("masks = {", "figures.hand_masks(")
    W, masks = built["W"], dict(built["masks"])
    whole, row, fours = (masks[k] for k in list(masks)[1:])
    assert (~whole).sum(dim=1).tolist() == [3, 5] and (~row).sum(dim=1).tolist() == [4, 4]
    gone = [set(W[0][~mask[0]].tolist()) for mask in (whole, row, fours)]
    assert 3.0 not in gone[0] and 3.0 in gone[1] and 3.0 not in gone[2]
    assert 5.0 in gone[2] and 5.0 not in gone[1]
    assert row[1, 1] and W[1, 1] < 1  # 0.9 stays where 3 goes
    assert len({tuple(mask.flatten().tolist()) for mask in (whole, row, fours)}) == 3


def test_a_loud_input_saves_the_smallest_entry_of_the_first_row():
    built = run("X = torch.tensor([[3.0, 20.0")
    W, norms = built["W"], built["norms"]
    assert norms[0] == 5 and norms[1] >= 4 * norms[[0, 2, 3]].max()
    assert not built["by_size"][0, 1] and built["by_wanda"][0, 1]
    assert built["by_size"][0, 2] and not built["by_wanda"][0, 2]
    assert W[0].abs().argmin() == 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_drawings_have_their_numbers_and_can_be_read(dark):
    W = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    norms = torch.rand(8, generator=torch.Generator().manual_seed(2)) + 0.1
    masks = {within: choose([W.abs()], 0.5, within)[0] for within in ("layer", "row", "2:4")}
    (by_wanda,) = choose([wanda(W, norms)], 0.5, "row")
    up, down = (tiny("gpt2").anatomy.linears[f"layers.0.{target}"] for target in ("up", "down"))
    drawn = [
        figures.hand_masks(W, masks, dark),
        figures.loud_inputs(W, norms, masks["row"], by_wanda, dark),
        figures.neurons_out(up, down, [0, 3, 3, up.d_out - 1], dark),
    ]
    for figure in drawn:
        assert overlaps(figure) == [] and pale(figure) == [] and len(alt_text(figure)) > 60
        sizes = [note.font.size for note in figure.layout.annotations if note.text]
        assert min(sizes) >= 11 and figure.layout.height <= 600
    words = [[text for *_, text in extents(figure)] for figure in drawn]
    struck = [sum("<s>" in text for text in some) for some in words]
    assert struck[:2] == [3 * 12, 2 * 12]
    for i, j in (~masks["layer"]).nonzero().tolist():
        assert f"<s>{W[i, j].item():.3g}</s>".replace("-", "−") in words[0]
    assert f"<b>up</b> {up.d_out - 3} × {up.d_in}" in words[2]
    fewer = 3 * (2 * up.d_in + 1)
    with attach(tiny("gpt2"), PruneStructures(neurons={"layers.0": [0, 3, up.d_out - 1]})) as cut:
        left = sum(p.numel() for p in cut.model.parameters())
    assert sum(p.numel() for p in tiny("gpt2").model.parameters()) - left == fewer
    assert f"{fewer:,} parameters fewer" in drawn[2].layout.title.text


# --- Wanda, derived ----------------------------------------------------------------------------


def test_the_score_is_the_distance_of_one_entry_and_two_have_a_cross_term(base, read):
    linear = base.anatomy.linears["layers.0.up"]
    W, X = linear.weight.detach().double(), read["inputs"][linear.name].double()
    S = W.abs() * X.norm(dim=0)
    for i, j in ((5, 7), (0, 0), (700, 100)):
        without = W.clone()
        without[i, j] = 0
        assert (X @ (W - without).T).norm().item() == pytest.approx(S[i, j].item(), rel=1e-9)
    i, j, k = 5, 7, 8
    moved = (W[i, j] * X[:, j] + W[i, k] * X[:, k]).square().sum()
    cross = 2 * W[i, j] * W[i, k] * X[:, j] @ X[:, k]
    assert moved.item() == pytest.approx((S[i, j] ** 2 + S[i, k] ** 2 + cross).item())


def test_the_norms_of_the_lesson_are_the_packages(base, read):
    theirs = input_norms(base, read["linears"], read["calibration"])
    for linear in read["linears"]:
        mine = read["inputs"][linear.name].double().norm(dim=0)
        assert torch.allclose(mine, theirs[linear.module], rtol=1e-4)  # two orders, float32


def test_wanda_is_nearer_in_every_matrix(read):
    built = run("wins, error", **read)
    assert built["wins"] == {0.5: 36, 0.7: 36} and len(built["linears"]) == 36


def test_the_mask_of_the_lesson_is_the_packages(base):
    mask_of = run("def mask_of", base=base, untouched="")["mask_of"]
    for share in (0.0, 0.3, 0.5, 1.0):
        for linear in base.anatomy.linears.values():
            S = magnitude(linear.weight.detach())
            assert torch.equal(mask_of(S, share), choose([S], share, "layer")[0])


# --- the small loud neurons --------------------------------------------------------------------


@pytest.fixture(scope="module")
def neurons(base, read):
    built = run("def without(layer", **read | {"base": base, "steps": 1, "lab": sweep_pruning})
    order = importance(base.anatomy, "neurons", "layers.0").argsort().tolist()
    return built | {"order": order}


def test_size_hurts_in_the_first_mlp_only_and_chance_in_none(neurons):
    before = neurons["before"]
    for row in neurons["found"]:
        hurts = row["layer"] == 0 and row["which"] == "the 128 smallest"
        assert row["loss"] - before > 3 if hurts else row["loss"] - before < 0.1, row
    assert len(neurons["found"]) == 24


def test_thirty_two_carry_it_together_and_none_alone(neurons):
    without, order, before = (neurons[k] for k in ("without", "order", "before"))
    first, second, both = (without(0, order[a:b]) - before for a, b in ((0, 16), (16, 32), (0, 32)))
    assert both > 3 and both > 1.8 * (first + second)
    assert without(0, order[32:128]) - before < 0.02
    assert max(without(0, [j]) for j in order[:32:4]) - before < 0.05


def test_they_are_loud_and_write_one_vector(base, neurons):
    a, few = neurons["inputs"]["layers.0.down"], neurons["order"][:32]
    write = base.anatomy.linears["layers.0.down"].weight.detach()
    loud = a.norm(dim=0)
    assert len(set(loud.argsort()[-20:].tolist()) & set(few)) > 10
    wrote = a[:, few] @ write[:, few].T
    assert wrote.mean(dim=0).norm() > 0.95 * wrote.norm(dim=1).mean()
    by_added = (loud * write.norm(dim=0)).argsort()[:384].tolist()
    assert neurons["without"](0, by_added) - neurons["before"] < 0.1


def test_held_at_their_mean_they_are_hardly_missed(base, neurons):
    down = base.anatomy.linears["layers.0.down"]
    built = run("def fixed(", **neurons | {"base": base, "down": down, "print": lambda *_: None})
    hook = down.module.register_forward_pre_hook(built["fixed"])
    held = built["task"].score(base)["loss"]
    hook.remove()
    missed = built["without"](0, built["few"]) - built["before"]
    assert held - built["before"] < 0.1 * missed
    assert len(down.module._forward_pre_hooks) == 0


def test_the_question_asks_where_it_hurts():
    assert lesson_10.where_it_hurts("b").passed
    assert not any(lesson_10.where_it_hurts(letter).passed for letter in "acd")


# --- what was recorded -------------------------------------------------------------------------


def ends(rows):
    groups = rows.groupby(["label", "amount"]).loss
    return groups.min(), groups.max()


def test_half_of_the_entries_hold_six_percent_of_the_squared_size(base):
    W = base.anatomy.linears["layers.0.up"].weight.detach()
    size = {k: W.square()[~m].sum() / W.square().sum() for k, m in figures.usual_masks(W).items()}
    free, fours, rows = (share.item() for share in size.values())
    assert round(free, 2) == 0.06 and 1.8 < fours / free < 2.3 and 6 < rows / free < 7.5


def test_wanda_wins_at_a_half_and_loses_from_sixty_percent_on():
    low, high = ends(CURVES[CURVES.group == "mask"])
    plain, untouched = "magnitude, layer", FACTS["untouched"]["tiny-gpt"]
    assert high["Wanda", 0.5] < low[plain, 0.5]
    assert all(low["Wanda", s] > high[plain, s] for s in (0.6, 0.7, 0.8))
    assert low["random", 0.3] > max(high["Wanda", 0.6], high[plain, 0.6])
    assert max(high["Wanda", 0.3], high[plain, 0.3]) - untouched < 0.02
    assert min(low["Wanda", 0.7], low[plain, 0.7]) - untouched > 1
    chance = CURVES[(CURVES.label == "random") & (CURVES.group == "mask")]
    assert abs(chance[chance.amount == 0.6].loss.mean() - torch.tensor(2048.0).log()) < 0.5
    fours = CURVES[CURVES.group == "2:4"].groupby("label").loss.mean().round(2)
    assert (fours[plain], fours["Wanda"]) == (1.33, 1.45)
    assert 0.4 < fours[plain] - low[plain, 0.5] and fours["Wanda"] - high["Wanda", 0.5] < 0.6


def test_one_cut_for_all_depends_on_the_model():
    masks = TABLES["curves"][TABLES["curves"].group == "mask"]
    loss = masks.groupby(["base", "label", "amount"]).loss.mean()
    gain = {
        name: loss[name]["magnitude, layer"] - loss[name]["magnitude, global"]
        for name in ("tiny-gpt", "tiny-bert")
    }
    assert (gain["tiny-gpt"].loc[0.5:0.7] < 0).all()
    assert (gain["tiny-bert"].loc[0.5:0.6] > 0).all()


def test_the_gradient_is_safest_for_heads_and_neurons_and_not_for_layers():
    for kind in ("heads", "neurons", "layers"):
        rows = CURVES[(CURVES.group == kind) & (CURVES.amount < 0.2)].groupby("label").loss
        low, high = rows.min(), rows.max()
        if kind == "layers":
            assert low["random"] <= high["by gradient"] and low["by gradient"] <= high["random"]
            assert low["by magnitude"] > torch.tensor(2048.0).log()
        else:
            assert high["by gradient"] < min(low["by magnitude"], low["random"])


def test_what_brings_it_back():
    rows = TABLES["recovery"][TABLES["recovery"].base == "tiny-gpt"]
    low, high = (getattr(rows.groupby("label").loss, kind)() for kind in ("min", "max"))
    assert high["70%, LoRA, dense"] < low["70%, LoRA, masked"]
    assert low["80%, full, gradual"] > high["80%, full, one-shot"]
    assert low.min() > FACTS["untouched"]["tiny-gpt"]
    before = rows.groupby("label").before.mean().round(2)
    assert (before["70%, LoRA, masked"], before["80%, full, one-shot"]) == (2.42, 4.02)
    assert abs(before["a third of the neurons, LoRA"] - 1) < 0.05


def test_csr_pays_from_two_thirds_on():
    stored = TABLES["bytes"].set_index("label")
    assert stored.CSR["50% zeros"] > stored.dense["50% zeros"] > stored.CSR["75% zeros"]
    # an index of four bytes and a value of two for each entry that stays: even at 1 − 2 / 6
    assert 1 - 2 / (2 + 4) == pytest.approx(2 / 3)


def test_the_figures_have_every_run():
    runs, marks = sweep_pruning.by_sparsity(), {"nothing pruned": 0.79}
    fig = figures.loss_by_sparsity(runs, marks, "t")
    points = [trace for trace in fig.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in points) == len(runs) == 40
    for rows, places in ((sweep_pruning.by_structure(), 3), (sweep_pruning.by_recovery(), 3)):
        fig = figures.runs_in_rows(rows, marks, "t", "nats")
        points = [trace for trace in fig.data if trace.name != "mean"]
        assert sorted(x for trace in points for x in trace.x) == sorted(rows.loss)
        assert len(fig.layout.yaxis.ticktext) == places
        left, right = (10**end for end in fig.layout.xaxis.range)
        assert left < min(0.79, rows.loss.min()) and right > rows.loss.max()
        for trace in points:  # a line of points for each label within its row
            assert {round(y) for y in trace.y} <= set(range(places))
    fig = figures.times_by_row(TABLES["times"], "t")
    median, expected = fig.data
    assert list(median.x) == TABLES["times"].ms.tolist() and len(expected.x) == 8
    part = TABLES["times"]["linear weights"] / TABLES["times"]["linear weights"][0]
    assert list(expected.x) == pytest.approx((part * TABLES["times"].ms[0]).tolist())


def test_named_tables_hold_the_recorded_runs():
    rows = TABLES["recovery"].query("base == 'tiny-gpt'")
    assert sorted(sweep_pruning.by_recovery().loss) == sorted(rows.loss)
    whole = CURVES[CURVES.group.isin(["heads", "neurons", "layers"]) & (CURVES.amount < 0.2)]
    assert sorted(sweep_pruning.by_structure().loss) == sorted(whole.loss)
    assert sweep_pruning.by_structure(amount=0.5).loss.max() > 10
    form = sweep_pruning.by_form()
    assert form.loc["50% zeros", "dense"] == 1 and form.loc["as it is", "dense"] == 1
    assert form.loc["50% zeros", "bits and values"] == pytest.approx(1 / 2 + 1 / 16)
    assert sweep_pruning.untouched("tiny-bert") == FACTS["untouched"]["tiny-bert"]


# --- movement ----------------------------------------------------------------------------------


def test_movement_is_the_growth_of_the_square():
    """Under plain descent with small steps, Σ −w ∂L/∂w is (w_T² − w_0²) / 2η."""
    w = torch.tensor([2.0, 0.1, -0.7], dtype=torch.float64, requires_grad=True)
    wanted, rate, S = torch.tensor([0.3, 0.9, -1.4], dtype=torch.float64), 1e-4, torch.zeros(3)
    first = w.detach().clone()
    for _ in range(3000):
        (gradient,) = torch.autograd.grad(0.5 * (w - wanted).square().sum(), w)
        S = S - w.detach() * gradient
        w = (w.detach() - rate * gradient).requires_grad_()
    growth = (w.detach() ** 2 - first**2) / (2 * rate)
    assert torch.allclose(S, growth, rtol=2e-3)
    built = run("gradient, rate = ", print=lambda *_: None)
    assert built["after"].abs().argmax() == 0 and (-built["w"] * built["gradient"]).argmax() == 1


def test_after_a_short_training_movement_loses_the_form_and_magnitude_keeps_it(base):
    said, before = [], base.fingerprint()
    built = run("def mask_of", base=base, untouched="", print=lambda *_: None)
    built |= {"linears": list(base.anatomy.linears.values()), "print": said.append}
    exec(cell_with("scored, handles"), built)
    assert [words.split(": ")[1].split("%")[0] for words in said] == ["100", "0"]
    assert base.fingerprint() == before


# --- PEFT --------------------------------------------------------------------------------------


def peft_on_pruned(base, finish):
    theirs = copy.deepcopy(base.model)
    for block in theirs.transformer.h:
        prune.l1_unstructured(block.mlp.c_fc, "weight", amount=0.5)
        if finish:
            prune.remove(block.mlp.c_fc, "weight")
    plan = dict(r=4, target_modules=["c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(theirs, LoraConfig(lora_alpha=8, **plan)).eval()
    torch.manual_seed(0)
    for module in theirs.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.02)
    return theirs


@pytest.mark.parametrize("finish", [True, False], ids=["removed", "not removed"])
def test_merging_onto_torchs_mask_loses_the_zeros_or_loses_lora(base, finish):
    ids = torch.arange(5, 45)[None]
    theirs = peft_on_pruned(base, finish)
    with torch.no_grad():
        beside = theirs(ids).logits
        with theirs.disable_adapter():
            pruned = theirs(ids).logits
        merged = theirs.merge_and_unload()
        after = merged(ids).logits
    share = (merged.transformer.h[0].mlp.c_fc.weight == 0).float().mean().item()
    assert (beside - pruned).abs().max() > 0.5
    if finish:
        assert (after - beside).abs().max() < 1e-3 and share < 0.001
    else:
        assert torch.equal(after, pruned) and share == pytest.approx(0.5)


def test_torch_takes_other_entries_of_the_same_size(base):
    """The package takes the first of equal ones, torch others: 22 entries differ in one matrix."""
    linear = base.anatomy.linears["layers.0.up"]
    (mine,) = choose([magnitude(linear.weight.detach())], 0.5, "layer")
    theirs = torch.nn.Linear(linear.d_in, linear.d_out)
    theirs.weight.data.copy_(linear.weight)
    prune.l1_unstructured(theirs, "weight", amount=0.5)
    other = theirs.weight_mask.bool() != mine
    assert other.any() and len(linear.weight[other].abs().unique()) == 1


def test_until_removed_torch_holds_each_matrix_twice():
    linear = torch.nn.Linear(7, 5)
    prune.l1_unstructured(linear, "weight", amount=0.5)
    held = [*linear.named_parameters(), *linear.named_buffers()]
    assert {name for name, _ in held} == {"bias", "weight_orig", "weight_mask"}
    assert linear.weight_mask.dtype == torch.float32


def test_the_lessons_two_prunings_are_one_model(base):
    ids = torch.arange(5, 45)[None]
    with attach(base, [Prune(0.5, target_modules=["up"], mask_deltas=False), LoRA(r=8)]) as ours:
        with torch.no_grad():
            mine = ours(ids)
        masks = [x.weight != 0 for x in base.anatomy.linears.values() if x.target == "up"]
    theirs = copy.deepcopy(base.model)
    for block, mask in zip(theirs.transformer.h, masks, strict=True):
        prune.custom_from_mask(block.mlp.c_fc, "weight", mask.T)
    with torch.no_grad():
        assert (theirs(ids).logits - mine).abs().max() < 1e-3
