"""What the lessons on LoRA and its family say: their drawings, their code, their numbers."""

import json
import math
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from peftlab import FullFineTuning, LoRA, attach, figures, load, tasks, train
from peftlab.accounting import training_bytes
from peftlab.bases.data import data_path
from peftlab.experiments import compare_facts, forget_rates, forget_sizes, sweep_lora
from peftlab.figures.relatives import WORDS
from peftlab.figures.sheet import overlaps, pale
from peftlab.memory import measure
from peftlab.methods.lora import LowRankDelta
from peftlab.panels import LiveShares

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def cell_with(lesson: str, words: str) -> str:
    """The source of the one code cell of a lesson that has these words."""
    cells = nbformat.read(NOTEBOOKS / f"{lesson}.ipynb", 4).cells
    [source] = [c.source for c in cells if c.cell_type == "code" and words in c.source]
    return source


# --- drawings ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps():
    """A and B before and after two steps of Adam."""
    draw = torch.Generator().manual_seed(0)
    A = torch.nn.Parameter(torch.rand(2, 6, generator=draw) - 0.5)
    B = torch.nn.Parameter(torch.zeros(5, 2))
    x, wanted = (torch.randn(8, n, generator=draw) for n in (6, 5))
    adam, states = torch.optim.Adam([A, B], lr=0.1), [(A.detach().clone(), B.detach().clone())]
    for _ in range(2):
        adam.zero_grad()
        (x @ A.T @ B.T - wanted).square().mean().backward()
        adam.step()
        states.append((A.detach().clone(), B.detach().clone()))
    return states


def drawings(steps, dark):
    W, A, B = torch.eye(3, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    yield figures.hand_product(W, A, B, 2.0, dark)
    yield figures.first_steps(steps, 1.0, dark)
    yield figures.merge_and_swap({"facts": 890_680, "silent": 148_968}, dark)
    counts = dict.fromkeys(WORDS, 3_072)
    yield figures.relatives(counts, dark)
    yield figures.sum_of_factors(dark)
    with attach(load("tiny-gpt"), LoRA(r=8, target_modules=["q", "up", "down"])) as tuned:
        for name in ("layers.0.q", "layers.0.up", "layers.5.down"):
            yield figures.narrow_road(tuned, name, dark)
            yield figures.gradient_road(tuned, name, dark)


@pytest.mark.parametrize("dark", [False, True])
def test_every_drawing_can_be_read_and_has_words_for_those_who_cannot_see_it(steps, dark):
    for drawn in drawings(steps, dark):
        assert overlaps(drawn) == [] and pale(drawn) == []
        assert len(figures.alt_text(drawn)) > 60 and drawn.layout.width <= 900


def test_the_narrow_road_says_the_sizes_of_what_is_attached():
    with attach(load("tiny-gpt"), LoRA(r=3, target_modules=["up"])) as tuned:
        drawn = figures.narrow_road(tuned, "layers.0.up")
        each = tuned.count().parameters // 6
    words = {note.text for note in drawn.layout.annotations}
    assert f"{each:,} parameters train beside the {192 * 768:,} of W" in drawn.layout.title.text
    assert {"<b>A</b>  3 × 192", "<b>B</b>  768 × 3", "768 × 192", "<b>3 numbers</b>"} <= words


def test_a_product_by_hand_has_every_number():
    W, A, B = torch.zeros(3, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    drawn = figures.hand_product(W, A, B, 2.0)
    numbers = [note.text for note in drawn.layout.annotations]
    assert numbers.count("4") == numbers.count("−4") == 2  # in ΔW, and in 0 + ΔW
    assert "5 numbers make 6" in drawn.layout.title.text


def test_the_first_steps_say_what_moved(steps):
    words = [note.text for note in figures.first_steps(steps, 1.0).layout.annotations]
    assert "moved: B" in words and "moved: A and B" in words
    assert "<b>ΔW</b>, size 0.00" in words


def test_scores_grow_only_when_dev_was_scored(monkeypatch):
    drawn = []
    monkeypatch.setattr("peftlab.panels.live_curve.display", drawn.append)
    monkeypatch.setattr("peftlab.panels.live_curve.clear_output", lambda wait: None)
    live = LiveShares(("new_facts",), "They rise", "share of 10 answers")
    for step in range(1, 5):
        live({"step": step, "loss": 1.0} | ({"new_facts": step / 10} if step % 2 == 0 else {}))
    assert [look["step"] for look in live.looks] == [2, 4]
    assert len(drawn) == 2 and list(drawn[-1].data[0].y) == [0.2, 0.4]


# --- lesson 06 ---------------------------------------------------------------------------------


def test_the_code_of_lesson_06_is_the_packages_lora():
    """The class that a learner builds, and its place, at every matrix of a real sentence."""
    built = {"torch": torch}
    exec(cell_with("06_lora", "class Delta"), built)
    exec(cell_with("06_lora", "def put_beside"), built)
    base, ids = load("tiny-gpt"), torch.arange(40)[None]
    with attach(base, LoRA(r=4, alpha=12, target_modules="all-linear"), seed=1) as tuned:
        for delta in tuned.deltas.values():
            torch.nn.init.normal_(delta.B, std=0.1)
        states = {name: delta.state_dict() for name, delta in tuned.deltas.items()}
        with torch.no_grad():
            theirs = tuned(ids)
    handles = []
    for name, state in states.items():
        linear = base.anatomy.linears[name]
        mine = built["Delta"](linear.d_in, linear.d_out, r=4, alpha=12)
        assert mine.state_dict().keys() == LowRankDelta(4, 4, 2, 2).state_dict().keys()
        mine.load_state_dict(state)
        handles.append(built["put_beside"](linear, mine))
    with torch.no_grad():
        ours = base.model(ids).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("r", [1, 4, 16])
def test_the_first_step_moves_b_alone_and_as_far_as_derived(r):
    """s η √(d_out r / 3): the random signs of r rows leave it uncertain by less than a tenth."""
    method = LoRA(r=r, alpha=3 * r, target_modules=["up", "o"])
    with attach(load("tiny-gpt"), method, seed=0) as tuned:
        before = tuned.state()
        facts = tasks.load("facts")
        train(
            tuned, facts, steps=1, warmup=0, lr=2e-3, seed=0, precision="fp32",
            evaluate=False, progress=False,
        )  # fmt: skip
        after, deltas = tuned.state(), tuned.deltas
        for name, delta in deltas.items():
            size = delta.delta_weight().norm().item()
            assert size == pytest.approx(3 * 2e-3 * math.sqrt(len(delta.B) * r / 3), rel=0.1), name
    for name, tensor in after.items():
        moved = (tensor - before[name]).abs()
        if name.endswith(".A"):
            assert not moved.any()
        else:  # η g / (|g| + ε): the gradients are far above ε = 1e-8
            assert moved.max().item() == pytest.approx(2e-3, rel=1e-3)


def test_full_updates_use_every_direction_and_few_of_them_do_the_work():
    spectra, cuts = compare_facts.updates()
    for values in spectra.values():
        assert int((values > values[0] * 192 * 2**-23).sum()) > 180
    left = cuts.groupby("r")[["new facts", "energy"]].agg(["min", "max"])
    assert left["new facts"]["max"][0] == 0 and left["new facts"]["max"][1] < 0.1
    assert 0.35 < left["new facts"]["min"][8] < left["new facts"]["max"][8] < 0.65  # about half
    assert left["new facts"]["min"][16] >= 0.85 and left["energy"]["max"][16] < 0.8
    assert left["new facts"]["min"][32] >= 0.99


def trained_on_facts(steps: int) -> pd.DataFrame:
    _, runs = compare_facts.read()
    return runs[(runs["part"] == "methods") & (runs["steps"] == steps)]


def test_lora_at_rank_8_learns_what_a_cut_to_rank_8_loses():
    _, cuts = compare_facts.updates()
    short = trained_on_facts(compare_facts.SHORT)
    lora = short[short["method"] == "lora"]["new_facts"]
    assert len(lora) == 3 and lora.min() > 0.95
    assert lora.min() > cuts[cuts["r"] == 8]["new facts"].max() + 0.3


def test_the_settings_of_lesson_06_teach_the_facts_on_three_seeds():
    made = json.loads(data_path("results", "time_facts.json").read_text(encoding="utf-8"))
    assert len(made["runs"]) == 3
    for run in made["runs"]:
        assert run["before"]["new_facts"] < 0.1
        assert run["after"]["new_facts"] >= 0.95
        assert run["after"]["new_wordings"] < run["after"]["new_facts"]


# --- lesson 07 ---------------------------------------------------------------------------------


def extremes(rows: pd.DataFrame, value: str) -> tuple[pd.Series, pd.Series]:
    """The lowest and the highest of three seeds, by label."""
    groups = rows.groupby("label")[value]
    assert (groups.count() == 3).all()
    return groups.min(), groups.max()


def test_at_rank_64_the_scale_decides():
    low, high = extremes(sweep_lora.ranked(), "right")
    assert high["LoRA, r = 64, α / r"] < low["LoRA, r = 8, α / r"]
    assert low["LoRA, r = 64, α / √r"] > high["LoRA, r = 64, α / r"]
    assert low["LoRA, r = 64, α / √r"] <= high["LoRA, r = 8, α / √r"]  # not told apart


def test_o_and_the_mlp_leave_less_loss_than_q_and_v():
    rows = sweep_lora.spent()
    low, high = extremes(rows, "loss")
    for name in ("o", "up", "down"):
        assert high[f"LoRA, {name}"] < low["LoRA, q, v"]
    assert rows[rows["label"].isin(["LoRA, q", "LoRA, k"])]["right"].max() == 0
    assert rows["label"].iloc[0] == "LoRA, o" and rows["label"].iloc[-1] == "LoRA, q"


def test_at_equal_size_every_matrix_has_the_facts_that_q_and_v_have_not():
    _, runs = compare_facts.read()
    lora = runs[(runs["method"] == "lora") & (runs["steps"] == compare_facts.SHORT)]
    everywhere = lora[lora["part"] == "methods"]
    queries = lora[lora["part"] == "targets"]
    wide = lora[(lora["part"] == "ranks") & (lora["r"] == 32)]
    assert set(everywhere["trained"]) == set(queries["trained"]) == {165_888}
    assert everywhere["new_facts"].min() >= 0.995
    assert queries["new_facts"].agg(["min", "max"]).round(2).tolist() == [0.18, 0.4]
    assert set(queries["lr"]) == {0.004} and queries["at_the_end_of_its_grid"].all()
    # Rank 32: first steps a quarter as large, as many new facts, far more of the known ones.
    step = [128 / r["r"] * r["lr"] * r["r"] ** 0.5 for r in (wide.iloc[0], everywhere.iloc[0])]
    assert step[0] / step[1] == pytest.approx(0.25)
    assert wide["new_facts"].min() >= 0.98
    assert wide["known_facts"].agg(["min", "max"]).round(2).tolist() == [0.74, 0.79]
    assert everywhere["known_facts"].agg(["min", "max"]).round(2).tolist() == [0.2, 0.32]


def test_for_every_run_of_lora_full_fine_tuning_has_one_that_forgot_less():
    _, runs = forget_rates.read()
    ends = pd.DataFrame([{**run, **run["looks"][-1]} for run in runs.to_dict("records")])
    free, lora = (ends[ends["title"] == title] for title in ("Full fine-tuning", "LoRA"))
    assert len(free) == 12 and len(lora) == 24
    for _, run in lora.iterrows():
        as_much = free[free["new_facts"] >= run["new_facts"]]
        assert as_much["forgotten"].min() < run["forgotten"]


def test_what_is_forgotten_goes_with_the_size_of_the_update():
    """Over all looks at nine runs; and at equal size full fine-tuning has more right."""
    made, looks = forget_sizes.read()
    assert made["base"] == load("tiny-gpt").digest and len(looks) == 36
    ranks = looks[["size", "forgotten"]].rank()
    assert ranks["size"].corr(ranks["forgotten"]) > 0.85
    ends = looks[looks["step"] == made["steps"]].set_index(["label", "lr"])
    full, half = ends.loc["Full fine-tuning", 1e-3], ends.loc["LoRA, α = 2r", 2e-3]
    assert full["size"] == pytest.approx(half["size"], rel=0.1)
    assert full["right"] > 0.4 and half["right"] < 0.15 and full["forgotten"] < half["forgotten"]
    much, lora = ends.loc["Full fine-tuning", 3e-3], ends.loc["LoRA, α = 16r", 2e-3]
    assert min(much["right"], lora["right"]) >= 0.75 and lora["size"] > 1.5 * much["size"]


def test_a_size_is_that_of_the_change(tmp_path):
    base = load("tiny-gpt")
    originals = {name: each.weight.detach().clone() for name, each in base.anatomy.linears.items()}
    with attach(base, LoRA(r=2, alpha=4, target_modules=["q", "up"])) as tuned:
        for delta in tuned.deltas.values():
            torch.nn.init.normal_(delta.B)
        beside = forget_sizes.size(tuned, originals)
        updates = [delta.delta_weight().double() for delta in tuned.deltas.values()]
        expected = math.sqrt(sum(update.square().sum().item() for update in updates))
    assert beside == pytest.approx(expected, rel=1e-5)
    with attach(base, FullFineTuning()) as tuned, torch.no_grad():
        assert forget_sizes.size(tuned, originals) == 0
        for each in tuned.anatomy.linears.values():
            each.module.weight.data += 1  # q, k and v: three parts of one
        ones = sum(W.numel() for W in originals.values())
        assert forget_sizes.size(tuned, originals) > 0.99 * math.sqrt(ones)


def test_no_relative_is_ahead_of_lora_and_two_are_behind():
    rows, costs = sweep_lora.family()
    low, high = extremes(rows, "right")
    for title in ("DoRA", "PiSSA", "LoRA+", "LoRA, one A", "Full fine-tuning"):
        assert low[title] <= high["LoRA"] and high[title] >= low["LoRA"], title
    for title in ("VeRA", "AdaLoRA"):
        assert high[title] < low["LoRA"], title
    assert costs["trained"]["VeRA"] < costs["trained"]["LoRA"] / 8
    assert costs["stored"]["PiSSA"] == 2 * costs["trained"]["PiSSA"]
    _, forgotten = extremes(rows, "forgotten")
    room = math.log(2048) - sweep_lora.read()[0]["untrained"]["old text"]
    assert (forgotten.drop("Full fine-tuning") > room).all()
    assert forgotten["Full fine-tuning"] < room


def test_a_unit_of_rank_costs_the_same_at_every_rank():
    for targets in (["q", "v"], "all-linear"):
        total = {
            r: training_bytes(LoRA(r=r, target_modules=targets), "llama-2-7b", "bfloat16").total
            for r in (8, 9, 63, 64, 65, 256, 257)
        }
        assert len({total[r + 1] - total[r] for r in (8, 63, 64, 256)}) == 1


def test_a_step_holds_sixteen_bytes_for_each_number_of_lora_at_every_rank():
    """Measured: weights, gradients and moments; activations grow by the same for each rank."""
    facts, kept = tasks.load("facts"), {}
    base = load("tiny-gpt")
    for r in (1, 33, 65):
        batch = facts.batch(facts.train[:1], base.tokenizer, "cpu")
        with attach(base, LoRA(r=r, target_modules="all-linear")) as tuned:
            step, count = measure(tuned, batch), tuned.count().parameters
            held = sum(step.bytes(part) for part in ("gradients", "optimiser"))
            assert held >= 12 * count
            assert held < 12 * count + 10_000  # a step counter for each tensor
            kept[r] = step.bytes("activations")
    assert kept[65] - kept[33] == pytest.approx(kept[33] - kept[1], rel=0.01)


def test_factors_summed_are_not_updates_summed():
    draw = torch.Generator().manual_seed(0)
    A1, A2 = (torch.randn(2, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    B1, B2 = (torch.randn(5, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    whole, cross = (B1 + B2) @ (A1 + A2), B1 @ A2 + B2 @ A1
    assert torch.allclose(whole - (B1 @ A1 + B2 @ A2), cross, atol=1e-12)
    assert cross.norm() > 1


@pytest.mark.parametrize("form", ["learned", "size", "rows"])
def test_the_figures_of_runs_show_every_run(form):
    if form == "learned":
        _, runs = forget_rates.read()
        ends = pd.DataFrame([{**run, **run["looks"][-1]} for run in runs.to_dict("records")])
        drawn = figures.learned_and_forgotten({"LoRA": ends}, 6.8, "A title")
        assert len(drawn.data[0].x) == len(ends) == 36
    elif form == "size":
        _, looks = forget_sizes.read()
        looks["run"] = looks["label"] + looks["lr"].astype(str)
        drawn = figures.forgotten_by_size(looks, 6.7, "A title")
        assert len(drawn.data) == 9 and sum(len(line.x) for line in drawn.data) == 36
    else:
        rows, _ = sweep_lora.family()
        drawn = figures.seeds_by_row(rows, "right", "A title", "right")
        assert "n = 3 a row" in drawn.layout.title.text
        assert [len(trace.x) for trace in drawn.data] == [3, 1] * 8


# --- what the lessons no longer show -------------------------------------------------------------


def test_one_update_has_many_factors_and_adam_tells_them_apart():
    """B G and G⁻¹ A make the same ΔW; Adam's step from B c and A / c is another for each c."""
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    B = torch.randn(6, 3, generator=draw, dtype=torch.float64)
    G = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    assert torch.allclose((B @ G) @ (torch.linalg.inv(G) @ A), B @ A, atol=1e-10)
    moved = []
    for c in (0.1, 1.0, 10.0):
        left, right = (B * c).requires_grad_(), (A / c).requires_grad_()
        adam = torch.optim.Adam([left, right], lr=1e-3)
        (left @ right - 1).square().mean().backward()
        adam.step()
        moved.append((left @ right - B @ A).norm().item())
    assert min(moved[0], moved[2]) > 1.5 * moved[1]


def test_lora_everywhere_keeps_nearly_the_activations_of_full_fine_tuning():
    facts, base, kept = tasks.load("facts"), load("tiny-gpt"), {}
    batch = facts.batch(facts.train[:2], base.tokenizer, "cpu")
    ways = {
        "full": FullFineTuning(),
        "all": LoRA(r=8, target_modules="all-linear"),
        "q, v": LoRA(r=8, target_modules=["q", "v"]),
    }
    for name, method in ways.items():
        with attach(base, method) as tuned:
            kept[name] = measure(tuned, batch).bytes("activations")
    assert kept["all"] > 0.95 * kept["full"] and kept["q, v"] < 0.8 * kept["full"]


def test_an_update_that_is_subtracted_again_leaves_rounding_behind():
    """... while unmerging gives back every bit."""
    base = load("tiny-gpt")
    before, W = base.fingerprint(), base.anatomy.linears["layers.3.up"].weight.clone()
    with attach(base, LoRA(r=8, alpha=128, target_modules=["up"])) as tuned:
        for delta in tuned.deltas.values():
            torch.nn.init.normal_(delta.B, std=0.02)
        update = tuned.deltas["layers.3.up"].delta_weight().detach()
        tuned.merge()
        tuned.unmerge()
        assert base.fingerprint() == before
    assert not torch.equal((W + update) - update, W)
