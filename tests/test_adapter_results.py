"""What `sweep_adapters` and `time_adapters` measured, as lesson 09 tells it."""

import json

import pandas as pd
import pytest

from peftlab.bases import load
from peftlab.experiments import sweep_adapters, time_adapters
from peftlab.experiments.sweep_soft import SEEDS

MADE = json.loads(sweep_adapters.PATH.read_text())
RUNS, TRIED = pd.DataFrame(MADE["runs"]), pd.DataFrame(MADE["tried"])
TIMES = pd.DataFrame(json.loads(time_adapters.PATH.read_text())["runs"])
ON_GPT = RUNS[RUNS.base == "tiny-gpt"]
LABELS = [label for label, (method, _) in sweep_adapters.METHODS.items() if method is not None]


def test_the_runs_are_those_of_the_experiment():
    """Every entry with every seed, on the bases that ship, at the rates that it was given."""
    for entry in sweep_adapters.entries():
        mine = RUNS[(RUNS.base == entry.base) & (RUNS.label == entry.label)]
        assert sorted(mine.seed) == list(SEEDS) and set(mine.lr) <= set(entry.rates)
        if entry.method is not None:
            shape = load(entry.base).anatomy.shape
            shape = shape.without_head() if entry.task == "speech" else shape
            assert set(mine.trained) == {entry.method.parameters(shape)}
    assert MADE["bases"] == {name: load(name).digest for name in sweep_adapters.TASKS}


@pytest.mark.parametrize("label", LABELS)
def test_every_method_beats_the_untrained_base_at_one_budget(label):
    """The worst seed is further above the base than the seeds are apart."""
    ours = ON_GPT[ON_GPT.label == label].exact
    untrained = MADE["untrained"]["tiny-gpt letters:sort"]["exact"]
    assert ours.min() - untrained > ours.max() - ours.min()


@pytest.mark.parametrize("label", LABELS)
def test_the_default_rate_is_one_that_was_tried_and_chosen_or_near_it(label):
    """Within a factor of about three of the best on either base; LoRA's is another lesson's."""
    default = sweep_adapters.METHODS[label][0].learning_rate
    chosen = RUNS[RUNS.label == label].lr.unique()
    assert any(rate / 3.4 <= default <= rate * 3.4 for rate in chosen)


def test_merged_costs_nothing_that_the_clock_can_see_and_unmerged_does():
    forward = TIMES[TIMES.what == "forward"].set_index(["label", "batch"])
    for batch in (1, 32):
        noise = forward.loc[("base", batch)]
        assert noise.low < 1 < noise.high
        for label in ("(IA)³", "LoRA, r = 8, all linear"):
            merged, beside = forward.loc[(f"{label}, merged", batch)], forward.loc[(label, batch)]
            assert merged.low <= noise.high and merged.high < beside.low
        for label in ("Houlsby adapter, m = 8", "Houlsby adapter, m = 64"):
            assert forward.loc[(label, batch)].low > noise.high
