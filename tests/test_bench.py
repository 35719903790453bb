"""The harness of comparisons: its search, its runs beside `train`'s, its verdicts and its files."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats

import peftlab as pl
from peftlab import tasks
from peftlab.bases.data import data_path
from peftlab.bench import results, search
from peftlab.bench.contest import HEAD_RATE, SEEDS, TUNING_SEEDS, Contest, Entry, Try
from peftlab.bench.replay import started
from peftlab.bench.runs import run_together
from peftlab.bench.tournament import Progress, Rows, play
from peftlab.bench.verdicts import comparisons, difference, level, pairs, verdicts
from peftlab.methods import AdaLoRA

# --- the search of a rate ----------------------------------------------------------------------


def walked(peak: float, guess: float) -> dict[float, tuple]:
    """A search on scores that fall with the distance from the peak, in decades."""
    merits = {rate: (-abs(math.log10(rate / peak)),) for rate in search.around(guess)}
    while (rate := search.further(merits)) is not None:
        merits[rate] = (-abs(math.log10(rate / peak)),)
    return merits


@pytest.mark.parametrize("guess", [1e-3, 3e-3, 1e-2, 0.1])
def test_a_search_ends_with_the_best_rate_inside(guess):
    merits = walked(1e-2, guess)
    assert search.best(merits) == 1e-2 and search.inside(merits)
    assert len(merits) <= search.MOST


def test_a_search_gives_up_and_says_so():
    merits = walked(10.0, 1e-3)
    assert len(merits) == search.MOST and not search.inside(merits)


def test_of_equal_rates_the_smaller_is_taken():
    assert search.best({1e-2: (1.0,), 3e-3: (1.0,), 1e-3: (0.0,)}) == 3e-3


@pytest.mark.parametrize("guess", [1e-9, 1e4])
def test_a_guess_off_the_ladder_is_refused(guess):
    with pytest.raises(ValueError, match="allowed is"):
        search.around(guess)


# --- runs side by side ---------------------------------------------------------------------------

STEPS = 4
MODELS = {
    "tiny-gpt": ("facts", None),
    "tiny-llama": ("facts", None),
    "tiny-bert": ("entities", 1e-2),
}
PAIRS = [
    ("tiny-gpt", [pl.LoRA(r=2, alpha=4, target_modules="all-linear")], 1e-2),
    ("tiny-gpt", [pl.PTuning(3)], 1e-3),
    ("tiny-gpt", [pl.Prune(0.5), pl.LoRA(r=2, alpha=4)], 1e-3),
    ("tiny-llama", [pl.FullFineTuning()], 1e-4),
    ("tiny-llama", [pl.PrefixTuning(3, prefix_projection=True)], 1e-3),
    ("tiny-bert", [pl.QLoRA(r=2, alpha=4)], 1e-3),
    ("tiny-bert", [pl.PTuningV2(3)], 1e-2),
    ("tiny-bert", [], 0.0),
]


def small(name: str):
    task = tasks.load(name)
    task.train = task.train[:20]
    return task


@pytest.mark.parametrize(
    "name, methods, lr", PAIRS, ids=lambda v: "+".join(m.name for m in v) if type(v) is list else v
)
def test_runs_side_by_side_are_those_of_train(name, methods, lr):
    """Two runs with seeds and rates of their own; the third epoch begins within the steps."""
    (task_name, head_lr), losses, weights = MODELS[name], [], []
    task, base = small(task_name), pl.load(name)
    head = getattr(task, "head", None)
    settings = [(1, lr, head_lr), (2, lr / 3, head_lr and head_lr / 3)]
    for seed, rate, head_rate in settings:
        with pl.attach(base, methods, seed=seed, head=head) as tuned:
            given = dict(steps=STEPS, batch_size=8, seed=seed, progress=False, evaluate=False)
            rates = dict(lr=rate or 1.0, head_lr=head_rate or 1.0)
            run = pl.train(tuned, task, **given, **rates)
            losses.append([record["loss"] for record in run.records])
            weights.append({n: p.detach().clone() for n, p in tuned.trainable.items()})
    jobs = [
        Try("", "", rate, head_rate, seed, "dev", STEPS, 8) for seed, rate, head_rate in settings
    ]
    before = base.fingerprint()
    with started(base, methods, head, task, jobs) as replay:
        while not replay.done:
            replay.step()
        replay.finish()
        torch.testing.assert_close(replay.losses, torch.tensor(losses), rtol=1e-4, atol=1e-4)
        for i, wanted in enumerate(weights):
            replay.put(i)
            moved = torch.cat([p.flatten() for p in replay.tuned.trainable.values()])
            expected = torch.cat([w.flatten() for w in wanted.values()])
            # Adam turns the rounding of a gradient near zero into a whole step, of any sign.
            far = (moved - expected).abs() > 1e-3 * max(lr, 1e-2)
            assert far.float().mean() < 0.01
    assert replay.problems == ["", ""]
    assert base.fingerprint() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("graphs", [True, False])
def test_recorded_steps_are_those_of_train_on_a_gpu(graphs, monkeypatch):
    """Batches of two lengths: the second is recorded while steps of the first are under way.

    In float32, where a step that is another one shows: in bfloat16 on an H200, two of these 60
    losses were more than 2% apart.
    """
    monkeypatch.setattr("peftlab.bench.replay.precision_for", lambda device: "fp32")
    task, base, losses = small("facts"), pl.load("tiny-gpt", device="cuda"), []
    task.train = [*task.train, tasks.Example(40 * " a", " b")]
    method = pl.LoRA(r=2, alpha=4)
    for seed in (1, 2):
        with pl.attach(base, method, seed=seed) as tuned:
            given = dict(steps=30, batch_size=4, seed=seed, progress=False, evaluate=False)
            run = pl.train(tuned, task, lr=1e-3, precision="fp32", **given)
            losses.append([record["loss"] for record in run.records])
    jobs = [Try("", "", 1e-3, None, seed, "dev", 30, 4) for seed in (1, 2)]
    with started(base, [method], None, task, jobs) as replay:
        replay.graphed = graphs
        lengths = {batch["input_ids"].shape[-1] for batch in replay.batches}
        while not replay.done:
            replay.step()
        replay.finish()
    assert len(lengths) > 1
    torch.testing.assert_close(replay.losses, torch.tensor(losses), rtol=1e-4, atol=1e-4)


def test_a_run_that_breaks_off_keeps_its_weights_and_harms_no_other():
    task, base = small("facts"), pl.load("tiny-gpt")
    method = pl.LoRA(r=2, alpha=4)
    jobs = [Try("", "", lr, None, 1, "dev", STEPS, 8) for lr in (1e-3, 1e28)]
    alone = []
    for job in ([jobs[0]], jobs):
        with started(base, [method], None, task, job) as replay:
            while not replay.done:
                replay.step()
            replay.finish()
            alone.append(replay.losses[0])
    torch.testing.assert_close(*alone, rtol=1e-4, atol=1e-4)
    assert replay.problems[0] == "" and "not finite, by step" in replay.problems[1]
    assert not replay.losses[1].isfinite().all()


def test_a_method_with_a_schedule_trains_alone():
    task, base = small("facts"), pl.load("tiny-gpt")
    jobs = [Try("", "", 1e-3, None, 1, "dev", STEPS, 8)]
    with (
        pytest.raises(ValueError, match="hears of every step"),
        started(base, [AdaLoRA()], None, task, jobs),
    ):
        pass
    assert base.adapted_by is None


def test_a_row_has_its_scores_its_size_and_its_curve():
    contest = Contest("permute", "letters", "tiny-gpt", 2, 4, (), {"skill": "permute"})
    entry = Entry("LayerNorm tuning", (pl.LayerNormTuning(),), 1e-2)
    job = Try("permute", entry.label, 1e-2, None, 0, "test", 2, 4)
    (row,) = run_together(contest, entry, [job], "cpu")
    with pl.attach(pl.load("tiny-gpt"), pl.LayerNormTuning()) as tuned:
        assert row["trained"] == tuned.count().parameters
        assert row["file_bytes"] == tuned.count().file_bytes
    assert {"exact", "plain_loss", "curve", "outputs"} <= row.keys() and len(row["blocks"]) == 20
    assert row["seed"] == 0 and row["split"] == "test" and row["problem"] == ""
    json.dumps(row, allow_nan=False)


# --- a contest from beginning to end -------------------------------------------------------------

CONTEST = Contest("wnut17", "wnut17", "minilm", 10, 4, ())
ENTRIES = (Entry("LoRA", (pl.LoRA(),), 1e-3), Entry("Head alone", (), 0.0))


class Played:
    """A runner without a model: best at a rate of 0.01 and a head's rate of 0.1."""

    def __init__(self, fails=()):
        self.calls, self.fails = 0, fails

    def __call__(self, contest, entry, jobs, device):
        self.calls += 1
        if self.calls in self.fails:
            raise RuntimeError("out of memory")
        return [
            {
                **vars(job),
                "f1": 0.9
                - 0.1 * abs(math.log10((job.lr or 1e-2) / 1e-2))
                - 0.05 * abs(math.log10(job.head_lr / 0.1)),
                "last_loss": 1.0,
                "problem": "",
                "train seconds": 0.0,
                "score seconds": 0.0,
            }
            for job in jobs
        ]


def played(path, runner):
    rows = Rows(path)
    found = [Progress(CONTEST, entry, rows, "f1", headed=True) for entry in ENTRIES]
    with ThreadPoolExecutor(1) as pool:
        said = play(found, runner, pool, "cpu", 1, lambda *_: 6, say=lambda text: None)
    return found, said


def test_a_contest_finds_both_rates_and_reads_the_test_once_a_seed(tmp_path):
    found, problems = played(tmp_path / "rows.jsonl", Played(fails=(2,)))
    assert not problems  # what failed once was made again
    for each in found:
        assert each.head_lr == 0.1 and all(each.inside.values()) and not each.needed()
        assert {row["seed"] for row in each.tried} == set(TUNING_SEEDS)
        tested = [row for row in each.rows.found.values() if row["split"] == "test"]
        assert {row["label"] for row in tested} == {"LoRA", "Head alone"}
    assert found[0].lr == 1e-2
    assert len([r for r in found[0].rows.found.values() if r["split"] == "test"]) == 2 * len(SEEDS)


def test_a_contest_goes_on_where_it_was_stopped_and_makes_nothing_twice(tmp_path):
    path = tmp_path / "rows.jsonl"
    _, problems = played(path, Played(fails=(3, 4, 5, 6, 7, 8)))
    assert problems
    made = path.read_text(encoding="utf-8").splitlines()
    found, problems = played(path, Played())
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not problems and lines[: len(made)] == made
    keys = [
        tuple(json.loads(line)[k] for k in ("label", "lr", "head_lr", "seed", "split"))
        for line in lines
    ]
    assert len(set(keys)) == len(keys)
    again = Played()
    played(path, again)
    assert again.calls == 0


def test_the_head_is_searched_from_the_same_guess_for_every_entry():
    for entry in ENTRIES:
        each = Progress(CONTEST, entry, Rows(data_path("nothing.jsonl")), "f1", headed=True)
        assert HEAD_RATE in {job.head_lr for job in each.needed()}


# --- verdicts ------------------------------------------------------------------------------------


def rows_of(scores, blocks=None):
    blocks = blocks or [[score] * 20 for score in scores]
    return [
        {"seed": i, "f1": score, "blocks": each}
        for i, (score, each) in enumerate(zip(scores, blocks, strict=True))
    ]


def test_without_variance_over_the_examples_it_is_the_paired_t_test():
    a, b = [0.81, 0.84, 0.80, 0.86, 0.83], [0.80, 0.81, 0.80, 0.82, 0.80]
    found, wanted = difference(rows_of(a), rows_of(b), "f1"), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(wanted.pvalue)
    low, high = wanted.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_examples_widen_the_interval():
    """Their part is the variance of a mean of independent examples."""
    rng = np.random.default_rng(0)
    right = rng.random((5, 200)) < 0.7  # seeds, examples
    score = right.mean(axis=1)
    blocks = [[np.delete(row, slice(i, None, 20)).mean() for i in range(20)] for row in right]
    found = level(rows_of(score.tolist(), blocks), "f1")
    narrow = level(rows_of(score.tolist()), "f1")
    assert found.high - found.low > narrow.high - narrow.low
    wrong = [b[:-1] for b in blocks]
    with pytest.raises(ValueError, match="blocks"):
        difference(rows_of(score.tolist(), blocks), rows_of(score.tolist(), wrong), "f1")


def test_a_verdict_needs_five_seeds():
    with pytest.raises(ValueError, match="at least 5"):
        difference(rows_of([1.0] * 4), rows_of([0.0] * 4), "f1")


def test_chance_is_corrected_for():
    """Among 8 entries that differ by noise alone nobody is better, in 10 draws at most twice."""
    wrong = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        runs = {str(i): rows_of(rng.normal(0.8, 0.01, 5).tolist()) for i in range(8)}
        wrong += (verdicts(runs, "f1", against="0").verdict != "not told apart").any()
    assert wrong <= 2


def test_a_verdict_has_its_sign():
    rng = np.random.default_rng(0)
    high, low = rng.normal(0.9, 0.01, 5).tolist(), rng.normal(0.5, 0.01, 5).tolist()
    table = verdicts({"a": rows_of(high), "b": rows_of(low), "c": rows_of(high)}, "f1")
    assert table.verdict.tolist() == ["better", "not told apart", "worse"]


def test_an_answer_without_training_stands_beside_every_seed():
    answer = [{"seed": None, "f1": 0.5, "blocks": [0.5] * 20}]
    found = difference(rows_of([0.6, 0.61, 0.62, 0.6, 0.61]), answer, "f1")
    assert found.seeds == 5 and found.low > 0


# --- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", results.names())
def test_no_chosen_rate_lies_at_the_end_of_those_tried(name):
    found = results.read(name)
    for label, chosen in found.facts["entries"].items():
        tried = found.tried[found.tried.label == label]
        for rate in ("lr", "head_lr"):
            if chosen[rate]:
                assert tried[rate].min() < chosen[rate] < tried[rate].max(), (label, rate)
        runs = found.runs[found.runs.label == label]
        assert set(runs.lr) == {chosen["lr"]} and (runs.split == "test").all()
        assert runs.seed.nunique() >= 5 and runs.seed.nunique() == len(runs)
        assert set(tried.seed).isdisjoint(runs.seed) and (tried.split == "dev").all()


@pytest.mark.parametrize("name", results.names())
def test_the_chosen_rate_is_the_best_on_dev(name):
    found = results.read(name)
    for label, chosen in found.facts["entries"].items():
        tried = found.tried[(found.tried.label == label) & (found.tried.problem == "")]
        if found.tried.head_lr.notna().any():
            tried = tried[tried.head_lr == chosen["head_lr"]]
        means = tried.groupby("lr")[found.main].mean()
        assert means[chosen["lr"]] == pytest.approx(means.max())


@pytest.mark.parametrize("name", results.names())
def test_the_verdicts_follow_from_the_runs(name):
    path = data_path("results", f"bench_{name}.json")
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert comparisons(facts, facts["runs"]) == facts["comparisons"]
    again = pairs(facts, facts["runs"])
    assert [row["verdict"] for row in again] == [row["verdict"] for row in facts["pairs"]]
    for mine, theirs in zip(again, facts["pairs"], strict=True):
        assert mine == pytest.approx(theirs)
    assert all(facts[f"{split} examples"] for split in ("train", "dev", "test"))
    for field in ("command", "device", "date", "torch", "rule", "batch size", "steps"):
        assert facts[field]


def test_a_difference_reads_the_same_from_either_side():
    found = results.read("facts")
    one, other = found.difference("LoRA", "(IA)³"), found.difference("(IA)³", "LoRA")
    assert (one["mean"], one.low, one.high) == (-other["mean"], -other.high, -other.low)
    assert (one.verdict, other.verdict) == ("better", "worse") and one.p == other.p
    with pytest.raises(ValueError, match="no verdict on 'LoRA' and 'none'"):
        found.difference("LoRA", "none")


def test_a_file_says_what_its_runs_were_made_with_wherever_it_was_written():
    """Rows of one GPU and a file of a CPU: both stand there, and no row says it again."""
    from peftlab.experiments.tournament import made

    gpu = {"device": "a GPU", "precision": "bf16", "torch": "2", "transformers": "5"}
    cpu = gpu | {"device": "a CPU", "precision": "fp32"}
    rows = [{"seed": 0} | gpu, {"seed": 1} | gpu]
    told = {"device": "a GPU", "precision": "bf16"}
    told |= {"references device": "a CPU", "references precision": "fp32"}
    assert made(cpu, rows) == told and rows == [{"seed": 0}, {"seed": 1}]
    assert (
        made(gpu, [{"seed": 0} | gpu]) == {} == made(gpu, [{"seed": 0}])
    )  # older rows say nothing
    assert made(gpu, [dict(gpu), dict(cpu)])["device"] == "a CPU, a GPU"
