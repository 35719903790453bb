"""The pruning lab's controls over their whole range, and what the measured file has to show."""

import json

import pytest
import torch
from models import surroundings, tiny

from peftlab import Prune, attach, panels
from peftlab.bases import load
from peftlab.experiments import sweep_pruning
from peftlab.experiments.sweep_pruning import SEEDS, WorldText, world_texts
from peftlab.methods import calibration

TEXTS = ("the first text of some", "another one, longer than that")
CALIBRATION = ("what is read to choose", "and a second text")
SETTINGS = [
    (family, what, share)
    for family in ("gpt2", "llama", "bert")
    for what in panels.PRUNINGS
    for _, share in panels.pruning_shares(what, tiny(family))
]


@pytest.fixture(scope="module")
def bases():
    return {family: tiny(family) for family in ("gpt2", "llama", "bert")}


@pytest.mark.parametrize("family, what, share", SETTINGS)
def test_every_setting_of_the_lab(bases, family, what, share):
    """Zeros or parameters go as the slider says, the loss is the model's, the base is untouched."""
    base = bases[family]
    before, shape = surroundings(base), base.anatomy.shape
    linear = sum(x.weight.numel() for x in base.anatomy.linears.values())
    view = panels.pruning_view(base, TEXTS, what, share, CALIBRATION)
    assert surroundings(base) == before
    kind, score = panels.PRUNINGS[what]
    with torch.no_grad():
        untouched = calibration.own_loss(base, list(TEXTS)).mean().item()
    assert view.untouched == round(untouched, 3)
    if kind is None:
        assert view.parameters == shape.parameters()
        rows = 6 * 2 * 44 if score == "wanda" else len(base.anatomy.linears)  # rounded in each
        assert abs(view.zeros - share * linear) <= rows
    else:
        assert view.zeros == 0
        wanted = panels.pruned(what, share, CALIBRATION)
        left = wanted.smaller(shape).parameters() if wanted else shape.parameters()
        assert view.parameters == left
        assert (left < shape.parameters()) == (share > 0)
    assert view.file_bytes == 2 * view.parameters
    assert view.loss == dict(view.points)[share]
    if method := panels.pruned(what, share, CALIBRATION):
        with attach(base, method) as tuned, torch.no_grad():
            assert view.loss == round(calibration.own_loss(tuned, list(TEXTS)).mean().item(), 3)
    else:
        assert view.loss == view.untouched
    assert view.said in view.text and f"{view.loss:.2f}" in view.text
    figure = view.figure()
    assert list(figure.data[1].x) == [share] and list(figure.data[1].y) == [view.loss]


def test_the_widget_follows_its_controls():
    base = tiny("gpt2")
    before = surroundings(base)
    lab = panels.pruning_lab(base, TEXTS, CALIBRATION, share=0.2)
    for what in panels.PRUNINGS:
        lab.what.value = what
        for _, share in panels.pruning_shares(what, base):
            lab.share.value = share
            assert lab.view.what == what and lab.view.share == share
            assert f"{lab.view.loss:.2f}" in lab.text.value
            assert list(lab.plot.data[1].y) == [lab.view.loss]
            assert lab.plot.layout.title.text == lab.static().layout.title.text
            assert len(lab.plot.data[0].x) == len(lab.view.points)
    assert surroundings(base) == before
    assert lab.describe() == f"Pruning lab: {lab.view.text}"
    bundle = lab._repr_mimebundle_()
    assert json.dumps(bundle[panels.STILL])


@pytest.mark.parametrize(
    "what, share", [("weights, by magnitude", 0.55), ("heads, by gradient", 1)]
)
def test_a_share_that_the_slider_does_not_have(what, share):
    with pytest.raises(ValueError, match="share=.*: allowed is 0.0, "):
        panels.pruning_view(tiny("gpt2"), TEXTS, what, share, CALIBRATION)


def test_an_unknown_pruning():
    with pytest.raises(ValueError, match="unknown pruning 'all'; allowed: weights, by magnitude"):
        panels.pruned("all", 0.5, ())


# What was measured ----------------------------------------------------------------------------

FACTS, TABLES = sweep_pruning.read()


def test_the_file_is_of_these_bases():
    assert FACTS["seeds"] == list(SEEDS)
    for name, digest in FACTS["bases"].items():
        assert load(name).digest == digest


def test_a_row_of_the_file_comes_out_again():
    """Magnitude at 50% on tiny-gpt, to the digits that are stored and the processor's rounding."""
    task, base = WorldText.load(1), load("tiny-gpt")
    rows = TABLES["curves"]
    row = rows[
        (rows.base == "tiny-gpt") & (rows.label == "magnitude, layer") & (rows.amount == 0.5)
    ]
    with attach(base, Prune(0.5)) as tuned:
        loss = task.score(tuned)["loss"]
    assert loss == pytest.approx(row[row.group == "mask"].loss.item(), abs=1e-3)


def test_calibration_is_read_in_no_test():
    test = set(world_texts(32, "test"))
    for seed in SEEDS:
        assert not test & set(world_texts(16, f"calibration {seed}"))
    assert not test & set(world_texts(1000, "train"))


def test_every_way_beats_chance():
    """Masks: the worst seed of a score is below the best of chance, at every sparsity and base."""
    rows = TABLES["curves"]
    for (_, group, _), some in rows[rows.group.isin(["mask", "2:4"])].groupby(
        ["base", "group", "amount"]
    ):
        chance = some[some.label == "random"].loss
        assert len(chance) == len(SEEDS)
        for label, mine in some.groupby("label"):
            if label != "random":
                assert mine.loss.max() < chance.min(), (group, label)


def test_recovery_recovers_and_zeros_stay():
    rows = TABLES["recovery"]
    assert rows.groupby(["base", "label"]).size().unique().tolist() == [len(SEEDS)]
    at_once = rows[~rows.label.str.contains("gradual")]
    gained = (at_once.before - at_once.loss).groupby([at_once.base, at_once.label])
    spread = at_once.groupby(["base", "label"]).loss.agg(lambda x: x.max() - x.min())
    assert (gained.min() > spread).all()
    assert (rows[rows.label.str.startswith("70%")].zeros == 0.7).all()
    merged = rows.set_index("label")["zeros merged"]
    assert (merged["70%, LoRA, masked"] == 0.7).all()
    assert (merged["70%, LoRA, dense"] < 0.001).all()


def test_bytes_and_time_of_a_mask_and_of_a_cut():
    """A mask changes neither; a cut changes both in the share of the linear weights that is left.

    Times are told apart by what two runs of the dense model show: their quarters' distance.
    """
    stored, times = (TABLES[part].set_index("label") for part in ("bytes", "times"))
    assert stored.dense[["as it is", "50% zeros", "75% zeros", "90% zeros"]].nunique() == 1
    assert stored.dense["half of heads and neurons gone"] * 2 == stored.dense["as it is"]
    dense, noise = times.ms["dense"], times.high["dense"] - times.low["dense"]
    for label in ("dense again", "50% zeros", "2:4", "90% zeros"):
        assert abs(times.ms[label] - dense) < noise
    for label in times.index[times["linear weights"] < times["linear weights"]["dense"]]:
        share = times["linear weights"][label] / times["linear weights"]["dense"]
        assert abs(times.ms[label] - share * dense) < noise
        assert dense - times.ms[label] > noise
