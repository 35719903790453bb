"""Studies: which contests they are, what their draws and costs are, and what is read from them."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import peftlab as pl
from peftlab import accounting
from peftlab.bases.data import data_path
from peftlab.bench import results, search, trends
from peftlab.bench.contest import SEEDS, Contest, Entry, Try, drawn
from peftlab.bench.replay import started
from peftlab.bench.runs import run_together
from peftlab.bench.tournament import LADDER_SEEDS, Ladder, Progress, Rows, play
from peftlab.experiments import grow, memorising, studies, tournament

RNG = np.random.default_rng(0)
TRENDS = sorted(p.stem.removeprefix("trend_") for p in data_path("results").glob("trend_*.json"))


# --- so many examples, so many steps -------------------------------------------------------------


def test_a_draw_is_the_seeds_and_a_larger_one_has_the_smaller():
    examples = pl.tasks.load("facts").train
    small, large = (drawn(examples, n, 3) for n in (16, 64))
    assert len(small) == 16 and large[:16] == small and drawn(examples, 16, 4) != small
    assert drawn(examples, None, 3) is examples
    with pytest.raises(ValueError, match="701 examples of 700"):
        drawn(examples, 701, 0)


def test_a_run_sees_its_draw_alone():
    """The batches of a run are those of its own sixteen examples, and each is among them."""
    contest = Contest("few", "facts", "tiny-gpt", 4, 8, (), examples=16)
    task, base = contest.load_task(), pl.load("tiny-gpt")
    jobs = [Try("few", "LoRA", 1e-3, None, seed, "dev", 4, 8) for seed in (1, 2)]
    with started(base, [pl.LoRA(r=2, alpha=4)], None, task, jobs, contest.examples) as replay:
        batches = replay.batches
    for run, job in enumerate(jobs):
        mine = drawn(task.train, 16, job.seed)
        rows = {tuple(row.tolist()) for b in batches for row in b["input_ids"][run]}
        fill = base.tokenizer.pad_token_id
        texts = {base.tokenizer.decode([i for i in row if i != fill]).strip() for row in rows}
        assert texts == {(e.prompt + e.target).strip() for e in mine}  # two epochs: all sixteen
    assert contest.facts()["train examples"] == 16
    assert contest.facts()["train examples drawn"] == "by the seed"


def test_an_entry_may_have_steps_and_a_batch_of_its_own(tmp_path):
    contest = Contest("own", "letters", "tiny-gpt", 6, 8, (), {"skill": "sort"}, test=5)
    entry = Entry("LayerNorm tuning", (pl.LayerNormTuning(),), 1e-2, steps=2, batch_size=4)
    each = Progress(contest, entry, Rows(tmp_path / "rows.jsonl"), "exact", headed=False)
    job = each.job(1e-2, None, 0, "test")
    assert (job.steps, job.batch_size) == (2, 4)
    (row,) = run_together(contest, entry, [job], "cpu")
    assert row["steps"] == 2 and row["batch_size"] == 4 and len(contest.load_task().test) == 5


# --- which contests there are --------------------------------------------------------------------


@pytest.mark.parametrize("study", ["layers", "batch", "rates", "capacity", "scale"])
def test_a_study_has_names_of_its_own_and_guesses_on_the_ladder(study):
    contests = studies.made(study)
    assert len({contest.name for contest in contests}) == len(contests)
    for contest in contests:
        assert contest.name.startswith(f"{study}-") and len(contest.entries) > 1
        assert len({entry.label for entry in contest.entries}) == len(contest.entries)
        for entry in contest.entries:
            assert len(search.around(entry.lr)) == 3


def test_a_study_can_be_made_on_some_of_its_tasks():
    assert {c.task for c in studies.made("layers", tasks=("facts",))} == {"facts"}
    bases = {c.base for c in studies.made("scale", tasks=("slots",))}
    assert bases == {*grow.SIZES, "smollm2-135m"}


def test_every_size_of_the_data_is_there():
    found = {contest.name: contest.examples for contest in studies.data()}
    for task in ("pharmacy", "sst2-minilm", "sst2-smollm2"):
        sizes = [found[f"data-{task}-{size}"] for size in ("16", "64", "256", "all")]
        assert sizes == [16, 64, 256, None]


@pytest.mark.parametrize("base", ["tiny-gpt", "smollm2-135m", "bert-base"])
@pytest.mark.parametrize("name", studies.BUDGETS)
def test_sizes_are_near_the_budget_and_the_nearest(base, name):
    shape, budget = studies.shape_of(base), studies.BUDGETS[name]
    found = studies.sized(shape, budget)
    assert {"LoRA", "Prefix tuning (P-tuning v2)"} <= found.keys()
    for label, method in found.items():
        mine = accounting.count(method, shape)
        assert abs(mine - budget) <= studies.NEAR * budget
        given = method.to_dict()
        size = next(k for k in ("num_virtual_tokens", "r", "bottleneck") if k in given)
        given.pop("method")
        for other in (given[size] - 1, given[size] + 1):
            if other >= 1:
                another = accounting.count(type(method)(**given | {size: other}), shape)
                assert abs(another - budget) >= abs(mine - budget), label


def test_layers_are_compared_at_one_rank_and_at_one_count():
    for contest in studies.layers():
        shape = studies.shape_of(contest.base)
        counts = {e.label: accounting.count(e.methods[0], shape) for e in contest.entries}
        whole = counts["LoRA, all linear"]
        for where in ("attention", "MLP"):
            assert counts[f"LoRA, {where}"] < whole
            assert counts[f"LoRA, {where}, equal count"] == pytest.approx(whole, rel=0.05)


def test_batches_see_as_many_examples():
    assert {c.steps * c.batch_size for c in studies.batches()} == {studies.SEEN}


def test_what_fits_into_the_memory_of_full_fine_tuning():
    contest, tokens = studies.TASKS["permute"], 32
    limit = studies.peak(contest, contest.entry(studies.FULL), studies.ROWS, tokens)
    for label in ("LoRA", "Prompt tuning"):
        entry = contest.entry(label)
        rows = studies.fitting(contest, entry, limit, tokens)
        assert studies.peak(contest, entry, rows, tokens) <= limit
        assert studies.peak(contest, entry, rows + 2, tokens) > limit
    assert studies.fitting(contest, contest.entry(studies.FULL), limit, tokens) == studies.ROWS


def test_equal_time_is_equal_by_the_seconds_that_were_measured(tmp_path, monkeypatch):
    """Twice the seconds of a step are half of the steps; what was measured is kept."""
    asked = []

    def seconds(contest, entry, device, steps):
        asked.append(entry.label)
        return 0.02 if entry.label == studies.FULL else 0.01

    monkeypatch.setattr(studies, "step_seconds", seconds)
    monkeypatch.setattr(studies, "TASKS", dict.fromkeys(studies.TASKS, studies.TASKS["facts"]))
    (first, *_), calls = list(studies.times("cpu", tmp_path)), len(asked)
    steps = {entry.label: entry.steps for entry in first.entries}
    assert steps[studies.FULL] == 500 and steps["LoRA"] == 1000
    again = list(studies.times("cpu", tmp_path))
    assert len(asked) == calls and again[0] == first
    kept = json.loads((tmp_path / "study_seconds_pharmacy.json").read_text(encoding="utf-8"))
    assert kept["device"] == "cpu" and kept["torch"]


def test_a_step_is_timed():
    contest = studies.TASKS["permute"]
    assert 0 < studies.step_seconds(contest, contest.entry("(IA)³"), "cpu", steps=4) < 30


def test_a_plan_says_what_a_study_takes():
    (line,) = studies.plan([studies.named("rates", "facts")], Ladder)
    entries = len(studies.TASKS["facts"].entries)
    runs = entries * (7 * len(LADDER_SEEDS) + len(SEEDS))
    assert f"{entries} methods on tiny-gpt, at least {runs} runs of 500 steps of 16" in line


# --- a study from beginning to end ---------------------------------------------------------------


class Played:
    """A runner without a model: the best rate is 0.01 for LoRA, 0.001 for all else."""

    def __init__(self):
        self.calls = []

    def __call__(self, contest, entry, jobs, device):
        self.calls += jobs
        best = 1e-2 if entry.label.startswith("LoRA") else 1e-3
        return [
            {
                **vars(job),
                "exact": 0.9 - 0.1 * abs(math.log10(job.lr / best)),
                "last_loss": math.exp(math.log(job.lr / best) ** 2 / 10 + job.seed / 1e4),
                "problem": "",
                "blocks": [0.5] * 20,
                "trained": 10,
                "train seconds": 0.0,
                "score seconds": 0.0,
            }
            for job in jobs
        ]


@pytest.fixture
def ladder(tmp_path):
    contest = next(c for c in studies.rates() if c.name == "rates-permute")
    rows, runner = Rows(tmp_path / "rows.jsonl"), Played()
    found = [Ladder(contest, entry, rows, "exact", headed=False) for entry in contest.entries]
    with ThreadPoolExecutor(1) as pool:
        assert not play(found, runner, pool, "cpu", 1, lambda *_: 6, say=lambda text: None)
    return found, runner


def test_a_ladder_tries_every_rate_on_five_seeds(ladder):
    found, runner = ladder
    for each in found:
        tried = {(row["lr"], row["seed"]) for row in each.tried}
        assert len(tried) == 7 * len(LADDER_SEEDS) and {s for _, s in tried} == set(LADDER_SEEDS)
        assert each.inside["lr"] and not each.needed()
        assert each.lr == (1e-2 if each.entry.label.startswith("LoRA") else 1e-3)
    assert not set(LADDER_SEEDS) & set(SEEDS)
    assert len(runner.calls) == len(found) * (7 * len(LADDER_SEEDS) + len(SEEDS))


def test_the_ratio_and_the_power_are_those_of_the_ladder(ladder):
    found, _ = ladder
    facts = tournament.whole({"main": "exact"}, found)
    ratio = trends.ratio(facts, "LoRA, r = 4")
    assert ratio.mean == pytest.approx(10) and ratio.seeds == 5
    assert trends.by_rank(facts).mean == pytest.approx(0, abs=1e-9)
    table = trends.best_rates({"rates-permute": facts}).set_index("label")
    assert table.loc["LoRA, r = 16", "ratio"] == pytest.approx(10)
    assert table.loc[studies.FULL, "rate"] == pytest.approx(1e-3)
    for row in facts["tried"]:  # the same curves, a decade further for LoRA of rank 64
        if row["label"] == "LoRA, r = 64":
            row["lr"] *= 10
    assert trends.ratio(facts, "LoRA, r = 64").mean == pytest.approx(100)
    assert trends.by_rank(facts).mean > 0.3


def test_a_study_on_a_cpu_is_whole_and_can_be_read(tmp_path):
    """Two entries of a study, played by the command's own code in two steps a run."""
    contest = studies.smoke(next(iter(studies.batches())))
    contest = tournament.replace(contest, entries=contest.entries[:2], test=20)
    options = tournament.parser_of("", ()).parse_args(
        ["--device", "cpu", "--workers", "1", "--out", str(tmp_path)]
    )
    tournament.play_all([contest], options, "study", f"{studies.MODULE} batch")
    found = trends.recorded("batch", tmp_path)
    facts = found["batch-facts-8"]
    assert facts["command"].startswith("python -m peftlab.experiments.studies batch --contests")
    assert len(facts["runs"]) == 2 * len(SEEDS) and facts["pairs"]
    assert trends.penalties(found).n.tolist() == [5]
    assert trends.against(found).beside.tolist() == [studies.FULL]
    assert trends.levels(found).label.tolist() == [e.label for e in contest.entries]
    with pytest.raises(FileNotFoundError, match="was not run"):
        trends.recorded("capacity", tmp_path)


# --- what is read --------------------------------------------------------------------------------


def contest_of(scores, **more):
    """A contest with these scores by label, and as last losses what is missing to one."""
    runs = [
        {"label": label, "seed": i, "f1": s, "last_loss": 1 - s, "trained": 4}
        | {"blocks": [s] * 20, "steps": 2, "batch_size": 8}
        for label, several in scores.items()
        for i, s in enumerate(several)
    ]
    given = {"main": "f1", "train examples": 16, "batch size": 8, **more}
    return {**given, "entries": dict.fromkeys(scores), "runs": runs}


HIGH, LOW = RNG.normal(0.9, 0.01, 5).tolist(), RNG.normal(0.5, 0.01, 5).tolist()


def test_levels_and_verdicts_are_corrected_for_the_table():
    both = {studies.FULL: HIGH, "LoRA": LOW}
    found = trends.levels({"data-a-16": contest_of(both), "data-a-64": contest_of(both)})
    assert found.score.tolist() == pytest.approx([np.mean(HIGH), np.mean(LOW)] * 2)
    assert (
        found.verdict.fillna("").tolist() == ["", "worse"] * 2 and (found.low < found.score).all()
    )
    alone = trends.against({"a": contest_of(both)}).p[0]
    assert trends.against({"a": contest_of(both), "b": contest_of(both)}).p[0] == min(1, 2 * alone)
    other = trends.against({"a": contest_of({"LoRA": HIGH, "(IA)³": LOW})})
    assert other.beside.tolist() == ["LoRA"] and other.verdict.tolist() == ["worse"]
    assert other.batch_size.tolist() == [8] and other.trained.tolist() == [4]


def test_growth_has_a_row_a_size_and_the_slope_of_the_gap():
    """A gap that shrinks by 0.1 with every tenfold size, in each seed on its own."""
    sizes, full = {"a": 10**5, "b": 10**6, "c": 10**7}, [0.9, 0.8, 0.9, 0.7, 0.9]
    contests = {}
    for at, (base, size) in enumerate(sizes.items()):
        scores = {studies.FULL: full, "Prompt tuning": [s - 0.4 + 0.1 * at for s in full]}
        contests[f"scale-{base}-slots"] = contest_of(scores, base=base, **{"base parameters": size})
    found = trends.growth(contests).set_index(["label", "base"])
    assert found.loc[studies.FULL].parameters.tolist() == [*sizes.values()]
    assert found.score["Prompt tuning", "b"] == pytest.approx(np.mean(full) - 0.3)
    slope = found.loc["Prompt tuning", "sizes"]
    assert (slope.score, slope.low, slope.high) == pytest.approx((0.1, 0.1, 0.1)) and slope.n == 5
    assert found.loc["Prompt tuning"].index[-1] == "sizes" and slope.task == "slots"


def test_a_penalty_is_the_paired_gap_of_the_losses():
    near = [s - 0.1 for s in HIGH]
    table = trends.penalties(
        {
            "batch-a-8": contest_of({studies.FULL: HIGH, "LoRA, r = 8": HIGH}),
            "batch-a-32": contest_of(
                {studies.FULL: HIGH, "LoRA, r = 8": near}, **{"batch size": 32}
            ),
        }
    )
    assert table.batch.tolist() == [8, 32]
    assert table["mean"].tolist() == pytest.approx([0, 0.1])
    assert table.verdict.tolist() == ["not told apart", "worse"]  # a loss higher by 0.1


def test_the_interval_of_a_mean_is_students():
    values = [1.0, 2.0, 4.0, 3.0, 2.5]
    found = trends.spread(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert trends.spread([2.0, 2.0]).p == 0.0 and trends.spread([0.0, 0.0]).p == 1.0
    with pytest.raises(ValueError, match="two seeds"):
        trends.spread([1.0])


@pytest.mark.parametrize("peak", [2e-3, 4e-3, 1e-2])
def test_an_optimum_between_the_rungs_is_found(peak):
    losses = {rate: math.log(rate / peak) ** 2 for rate in (1e-3, 3e-3, 1e-2, 3e-2)}
    assert trends.optimum(losses) == pytest.approx(peak)


def test_an_optimum_at_an_end_or_on_a_plateau_is_a_rung():
    assert trends.optimum({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}) == 1e-3
    assert trends.optimum({1e-3: 1.0, 3e-3: 1.0, 1e-2: 1.0}) == 1e-3


def test_a_run_that_broke_off_is_the_worst_of_its_seed():
    tried = [
        {"label": "LoRA", "seed": 100, "lr": lr, "last_loss": loss, "problem": problem}
        for lr, loss, problem in ((1e-3, 1.0, ""), (3e-3, 0.5, ""), (1e-2, 0.1, "not finite"))
    ]
    assert 1e-3 < trends.optima({"tried": tried}, "LoRA")[100] < 1e-2


def test_bits_are_none_for_a_guess_and_all_for_a_certain_label():
    guess = math.log(16) / trends.SCORED  # the label at random, the end of text for certain
    assert trends.bits(guess, 100, 16) == pytest.approx(0)
    assert trends.bits(0.0, 100, 16) == 400 and trends.bits(9.9, 100, 16) == 0
    assert trends.bits(guess / 2, 100, 16) == pytest.approx(200)


def test_capacity_counts_bits_for_each_trained_number():
    facts = contest_of({"LoRA, r = 1": HIGH}, options={"number": 10, "classes": 16})
    for row in facts["runs"]:
        row["last_loss"] = 0.0
    (row,) = trends.capacity({"capacity-10": facts}).to_dict("records")
    assert row["bits"] == 40 and row["bits a number"] == 10 and row["n"] == 5


# --- random labels -------------------------------------------------------------------------------


def test_labels_are_random_single_tokens_and_asked_again():
    task = memorising.Labels.load(number=2000)
    tokens = pl.load("tiny-gpt").tokenizer
    assert len({e.prompt for e in task.train}) == 2000 and task.test == task.train[:512]
    lengths = {len(tokens(e.target)["input_ids"]) for e in task.train}
    assert lengths == {trends.SCORED - 1}
    counts = np.unique([e.target for e in task.train], return_counts=True)[1]
    assert len(counts) == memorising.CLASSES and stats.chisquare(counts).pvalue > 0.001
    assert task.grade(task.test, [e.target for e in task.test]) == {"exact": 1.0}
    assert task.grade(task.test, [""] * 512) == {"exact": 0.0}
    with pytest.raises(ValueError, match="allowed is"):
        memorising.Labels.load(number=0)


def test_the_base_foretells_no_label():
    """Its loss on the labels is no lower than that of a guess among them."""
    task, base = memorising.Labels.load(number=64), pl.load("tiny-gpt")
    with pl.attach(base, pl.LoRA()) as tuned:
        loss = tuned.batch_loss(task.batch_for(base, task.train)).item()
    assert trends.bits(loss, 64, memorising.CLASSES) == 0


def test_an_unknown_contest_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["studies", "rates", "--contests", "facts-1"])
    with pytest.raises(SystemExit):
        studies.main()
    told = capsys.readouterr().err
    assert "no contest facts-1: there are rates-" in told


@pytest.mark.parametrize("study", TRENDS)
def test_a_recorded_trend_follows_from_its_contests(study):
    derived = studies.STUDIES[study].read(trends.recorded(study, data_path("results")))
    recorded = results.trend(study)
    assert [*recorded] == [*derived] and len(recorded) == len(derived)
    for name, column in recorded.items():
        ours = derived[name].to_numpy()
        if column.dtype.kind == "f":
            assert column.to_numpy() == pytest.approx(ours.astype(float), abs=2e-6, nan_ok=True)
        else:
            assert [v if pd.notna(v) else None for v in column] == [
                v if pd.notna(v) else None for v in ours
            ]
