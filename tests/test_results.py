"""What the measured results have to show: every soft prompt beats what it starts from.

The rows are runs that `peftlab.experiments.sweep_soft` made and that lessons quote. The floor of a
task without a head is the untrained base; under a head, which starts at random, it is the head
trained alone with as many tries. Chance lies below both: no base sorts a list, and the most
frequent tag of each word is worth less than a head.
"""

from collections import Counter

import pytest

from peftlab import tasks
from peftlab.bases import load
from peftlab.experiments import limits, sweep_cloze, sweep_lora, sweep_soft, time_merge

META, RUNS = sweep_soft.read("families")
METHODS = [
    "Prompt tuning",
    "Prefix tuning",
    "Prefix tuning, MLP",
    "P-tuning v2",
    "Deep prompt tuning",
    "Prompt and prefix, MLP",
]
ENCODED = ["P-tuning, LSTM", "P-tuning, MLP", "P-tuning, attention"]


def scores(base: str, task: str, label: str):
    """The test scores of the three seeds, in the task's own metric."""
    rows = RUNS[(RUNS.base == base) & (RUNS.task == task) & (RUNS.label == label)]
    assert sorted(rows.seed) == list(sweep_soft.SEEDS)
    return rows[rows.metric.iloc[0]]


@pytest.mark.parametrize("label", METHODS + ENCODED)
@pytest.mark.parametrize("base", ["tiny-gpt", "tiny-llama", "tiny-t5"])
def test_every_soft_prompt_beats_the_untrained_base(base, label):
    """The worst seed is further above the base than the seeds are apart."""
    ours = scores(base, "letters:sort", label)
    untrained = META["untrained"][f"{base} letters:sort"]["exact"]
    assert ours.min() - untrained > ours.max() - ours.min()


@pytest.mark.parametrize("label", METHODS)
def test_soft_prompts_tag_better_than_the_head_alone(label):
    """No seed of one reaches into the seeds of the other, nor is nearer than they are wide."""
    ours, head = (scores("tiny-bert", "entities", name) for name in (label, "Head alone"))
    spread = max(ours.max() - ours.min(), head.max() - head.min())
    assert ours.min() - head.max() > spread
    assert head.min() > tasks.load("entities").baseline()["f1"]


def test_a_prefix_elicits_at_once_and_learns_what_is_new_behind_lora():
    """At one count of parameters: level on a known skill, behind in every seed on new ones."""
    made, short = limits.read()
    _, long = limits.read("limits_long")
    assert made["cpu seconds"] <= 300  # five minutes of one core
    scores = {
        key: sorted(rows.exact)
        for runs in (short, long)
        for key, rows in runs.groupby(["skill", "steps", "label"])
    }
    assert {*short.trained, *long.trained} == {20_736}
    assert scores["sort", 40, "Prefix tuning"][0] > 0.95
    for skill, steps in (("double_histogram", 240), ("double_histogram", 360), ("permute", 360)):
        prefix, lora = (scores[skill, steps, name] for name in ("Prefix tuning", "LoRA"))
        assert len(prefix) == len(lora) == 3
        assert lora[0] > prefix[-1]


@pytest.mark.parametrize("encoder", ["LSTM, paper's", "MLP, paper's", "attention"])
def test_p_tuning_asks_an_encoder_better_than_no_prompt(encoder):
    """On a cloze, which P-tuning was made for: above the untrained base and the commonest town."""
    made, runs = sweep_cloze.read()
    base, task = load(sweep_cloze.BASE), sweep_cloze.Probe.load()
    assert made["base"] == base.digest
    untrained = task.score(base)["exact"]
    commonest = max(Counter(e.target for e in task.test).values()) / len(task.test)
    ours = runs[runs.encoder.str.startswith(encoder)].exact
    assert len(ours) >= 5
    assert ours.min() - max(untrained, commonest) > ours.max() - ours.min()


@pytest.mark.parametrize("batch", time_merge.BATCHES)
def test_a_merged_adapter_costs_nothing_and_the_others_something(batch):
    """No further from the plain base than a second plain base was in some block; what is not
    merged is above that in every block."""
    _, rows = time_merge.read()
    rows = rows[rows.batch == batch].set_index("model")
    noise = max(abs(ratio - 1) for ratio in rows["ratio by block"][time_merge.TWIN])
    assert noise < 0.1
    for name in ("LoRA, merged", "DoRA, merged"):
        assert abs(rows.ratio[name] - 1) <= noise, name
    for name in time_merge.METHODS:
        assert min(rows["ratio by block"][name]) > 1 + noise, name


def test_every_relative_of_lora_learns_facts_that_the_base_does_not_know():
    """All seeds of every method, and every matrix but q and k, above the untrained base."""
    made, runs = sweep_lora.read()
    assert made["base"] == load("tiny-gpt").digest
    assert made["untrained"]["right"] == 0
    family = runs[runs.part == "family"]
    assert sorted(family.label.unique()) == sorted(sweep_lora.FAMILY)
    assert (family.groupby("label").seed.nunique() == len(sweep_lora.SEEDS)).all()
    assert family.right.min() > 0.2
    spent = runs[runs.part == "matrices"]
    equal = spent[spent.label != "all linear"]
    assert set(equal.trained) == {sweep_lora.BUDGET}
    assert equal[~equal.label.isin(["q", "k"])].right.min() > 0
    assert spent.loss.max() < made["untrained"]["loss"] / 2
