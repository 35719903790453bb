"""What one setting changes on SST-2: the splits by sentence, the plan, and the recorded runs."""

from dataclasses import asdict

import pytest
from test_real_results import SHAPES

from peftlab.accounting import count
from peftlab.bases import load
from peftlab.experiments import sst2_settings
from peftlab.experiments.compare_real import SEEDS
from peftlab.experiments.sst2_settings import BOTH, CHANGES, FROZEN, FULL, LORA, RATES, Job
from peftlab.tasks import Example
from peftlab.tuned import attach


def examples(*texts: str) -> list[Example]:
    return [Example(text, "positive") for text in texts]


def texts(found: list[Example]) -> list[str]:
    return [example.prompt for example in found]


def test_spans_are_every_run_of_words_but_the_whole():
    assert sst2_settings.spans("a good film") == {"a", "good", "film", "a good", "good film"}
    assert sst2_settings.spans("good") == set()


def test_a_sentence_is_in_no_longer_row():
    rows = examples("a good film", "good film", "good", "goo", "a film")
    assert texts(sst2_settings.sentences(rows)) == ["a good film", "goo", "a film"]


def test_no_phrase_of_a_held_out_sentence_stays():
    rows = examples("a good film", "good film", "film", "a bad film", "bad")
    assert texts(sst2_settings.without(rows, rows[:1])) == ["a bad film", "bad"]


def test_every_change_is_one_thing_at_the_same_rate():
    jobs = sst2_settings.jobs("cpu")
    default = {key: field.default for key, field in Job.__dataclass_fields__.items()}
    for change, (_, given) in CHANGES.items():
        for job in (job for job in jobs if job.change == change):
            other = {k for k, v in asdict(job).items() if k in given and v == given[k]}
            assert other == set(given)
            assert all(
                value == default[key] or key in given
                for key, value in asdict(job).items()
                if key in ("batch_size", "warmup", "pool", "data", "precision", "r")
            )
            chosen = sst2_settings.chosen()[job.label]
            assert job.lr == pytest.approx(chosen * RATES[1], rel=0.1)
    assert len(set(jobs)) == len(jobs)


def test_but_the_embeddings_leaves_them_alone():
    base = load("tiny-bert")
    with attach(base, sst2_settings.ButEmbeddings()) as tuned:
        names = set(tuned.trainable)
    assert names and not any("embeddings." in name for name in names)
    every = {name for name, _ in base.anatomy.backbone.named_parameters()}
    assert len(names) == len({n for n in every if not n.startswith(("embeddings.", "pooler."))})


@pytest.fixture(scope="module")
def recorded():
    return sst2_settings.read()


def test_every_run_of_the_plan_is_there(recorded):
    report, runs = recorded
    fields = list(Job.__dataclass_fields__)
    planned = {tuple(asdict(job).values()) for job in sst2_settings.jobs("cuda")}
    assert set(runs[fields].itertuples(index=False, name=None)) == planned
    assert len(runs) == len(planned) and "H100" in report["device"]
    assert (runs.groupby(["change", "label", "lr"])["seed"].nunique() == len(SEEDS)).all()


def test_what_was_trained(recorded):
    runs, shape = recorded[1], SHAPES["minilm"]
    for job in sst2_settings.jobs("cuda"):
        if job.label != FROZEN:
            its = runs[(runs["label"] == job.label) & (runs["r"] == job.r)]
            assert set(its["trained"]) == {count(sst2_settings.method_of(job), shape)}
    embeddings = (30522 + 512 + 2 + 2) * 384  # words, positions, kinds, the norm
    frozen = runs[runs["label"] == FROZEN]["trained"]
    assert set(frozen) == {shape.parameters() - embeddings}


def test_what_was_found(recorded):
    means = recorded[1].groupby(["change", "label", "lr"])[["dev", "test"]].mean()
    test = means["test"]
    more = ("ten epochs", "rank 64", "five epochs, warm-up of 500 steps")
    more = [test[change, LORA].iloc[0] for change in (*more, "batches of 64, as many examples")]
    plain = test["as compared", LORA]
    assert min(more) > plain.max() and 0.9014 - max(more) < 0.005
    for label in BOTH:
        whole = test["whole sentences alone, ten epochs", label].iloc[0]
        assert whole < test["as compared", label].iloc[1] - 0.005
    usual, honest = means.loc["as compared"], means.loc["dev of whole sentences"]
    assert honest.loc[LORA]["dev"].idxmax() == pytest.approx(1e-3)
    assert usual.loc[LORA]["dev"].idxmax() == pytest.approx(3e-3)
    assert abs(test["embeddings frozen", FROZEN].iloc[0] - test["as compared", FULL, 1e-4]) < 0.005
