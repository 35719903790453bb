"""The default learning rates are the ones that the lab found: see data/results/soft_lab.json."""

import pytest

from peftlab.experiments import sweep_soft
from peftlab.methods import PrefixTuning, PromptTuning, PTuning

DEFAULTS = {
    "prompt, vocabulary": PromptTuning(20),
    "prefix, vocabulary": PrefixTuning(20),
    "prefix, MLP": PrefixTuning(20, prefix_projection=True),
    "prompt, lstm": PTuning(20),
    "prompt, mlp": PTuning(20, encoder="mlp"),
    "prompt, attention": PTuning(20, encoder="attention"),
}


@pytest.mark.parametrize("label", DEFAULTS)
def test_no_rate_of_the_lab_beats_the_default_in_every_seed(label):
    """The worst seed at any other rate is no better than the best seed at the default."""
    _, runs = sweep_soft.read("lab")
    runs = runs[runs.label == label]
    ours = runs[runs.lr == DEFAULTS[label].learning_rate]
    assert len(ours) == len(sweep_soft.SEEDS)
    assert runs.groupby("lr").exact.min().max() <= ours.exact.max()
    assert ours.exact.mean() >= 0.95
