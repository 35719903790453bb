"""The recorded comparisons on real models: equal tries, the best rate, three seeds, true counts."""

import json

import pytest
from transformers import BertConfig

from peftlab.accounting import count
from peftlab.bases import Shape
from peftlab.experiments import compare_real
from peftlab.experiments.compare_real import METHODS, SEEDS, SETTINGS, TUNING_SEED, recorded

WHOLE = tuple(SETTINGS)
MINILM = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, vocab_size=30522)
SHAPES = {
    "minilm": Shape.from_config(BertConfig(**MINILM, num_attention_heads=12)).without_head(),
    "smollm2-135m": Shape.named("smollm2-135m"),
}
COLUMNS = {"trained", "file_bytes", "peak_bytes", "seconds", "forgotten", "last_loss"}


def labels(setting: str) -> set[str]:
    """Every method, but no biases where the base has none."""
    return set(METHODS) - ({"BitFit"} if SETTINGS[setting].base == "smollm2-135m" else set())


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_method_had_its_three_tries(setting):
    tried = recorded(setting).tried
    assert set(tried["label"]) == labels(setting) and set(tried["seed"]) == {TUNING_SEED}
    for label, its in tried.groupby("label"):
        assert sorted(its["lr"]) == sorted(METHODS[label][1]) and set(its["split"]) == {"dev"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_rate_on_test_was_the_best_on_dev(setting):
    found = recorded(setting)
    chosen = found.best.set_index("label")["lr"]
    assert set(chosen.index) == labels(setting)
    for label, its in found.tried.groupby("label"):
        assert its.set_index("lr")[found.main][chosen[label]] == its[found.main].max()
    assert all(row.lr == chosen[row.label] for row in found.runs.itertuples())
    assert set(found.runs["split"]) == {"test"}


@pytest.mark.parametrize("setting", WHOLE)
def test_every_method_has_three_seeds(setting):
    found = recorded(setting)
    assert found.whole and found.report["steps"] == SETTINGS[setting].steps
    assert "H100" in found.report["device"] and "compare_real" in found.report["command"]
    for label in labels(setting):
        assert sorted(found.runs[found.runs["label"] == label]["seed"]) == list(SEEDS)
    assert len(found.shown) == 3 * len(labels(setting)) and found.where == "test, 3 seeds"


def test_what_is_not_whole_is_shown_by_its_tries(tmp_path, monkeypatch):
    found, folder = recorded("pharmacy"), tmp_path / "results"
    folder.mkdir()
    rows = [*found.tried.to_dict("records"), *found.runs[:5].to_dict("records")]
    lines = [json.dumps(row) for row in rows]
    (folder / "real_pharmacy.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(compare_real, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    part = recorded("pharmacy")
    assert not part.whole and len(part.runs) == 5 and part.where.startswith("dev, one seed")
    assert part.shown["label"].tolist() == found.best["label"].tolist()
    assert set(part.shown["split"]) == {"dev"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_was_trained_is_what_is_counted(setting):
    found, shape = recorded(setting), SHAPES[SETTINGS[setting].base]
    for row in (*found.tried.itertuples(), *found.runs.itertuples()):
        methods = METHODS[row.label][0]
        assert row.methods == json.loads(json.dumps([m.to_dict() for m in methods]))
        assert row.steps == SETTINGS[setting].steps and row.precision == "bf16"
        assert row.trained == sum(count(method, shape) for method in methods)
    assert COLUMNS <= set(found.runs) and (found.runs["peak_bytes"] > 0).all()


def test_a_comparison_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_real, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(FileNotFoundError, match="real_pharmacy"):
        recorded("pharmacy")
