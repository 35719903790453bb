"""What the stored runs of QLoRA say, and that prose may say it."""

import pytest

from peftlab.bases import Shape
from peftlab.experiments import sweep_qlora
from peftlab.methods import Method

MADE, RUNS = sweep_qlora.read()
LARGER = "smollm2-135m"
ON_BASES = pytest.mark.parametrize("base", sweep_qlora.BASES)
ON_ALL = pytest.mark.parametrize("base", [*sweep_qlora.BASES, LARGER])


def runs(base, method):
    return RUNS[(RUNS["base"] == base) & (RUNS["method"] == method)].set_index("seed")


@ON_ALL
def test_both_methods_had_the_same_settings(base):
    methods = MADE["more"].get(base, MADE)["methods"]
    lora, qlora = (Method.from_dict(methods[name]) for name in ("LoRA", "QLoRA"))
    assert (lora.r, lora.alpha, lora.target_modules) == (qlora.r, qlora.alpha, qlora.target_modules)
    assert runs(base, "LoRA").index.tolist() == runs(base, "QLoRA").index.tolist() == [0, 1, 2]
    assert runs(base, "LoRA")["trained"].tolist() == runs(base, "QLoRA")["trained"].tolist()


def test_the_larger_base_had_the_best_of_the_rates_tried_on_dev():
    more = MADE["more"][LARGER]
    assert more["lr"] == min(more["tried"], key=lambda tried: tried["dev loss"])["lr"]
    assert set(RUNS[RUNS["base"] == LARGER]["lr"]) == {more["lr"]}


@ON_ALL
def test_qlora_is_within_the_spread_of_lora(base):
    """The means are no farther apart than twice the larger standard deviation over the seeds, and
    the ranges overlap."""
    for score in ("loss", "new_facts"):
        lora, qlora = runs(base, "LoRA")[score], runs(base, "QLoRA")[score]
        assert abs(lora.mean() - qlora.mean()) <= 2 * max(lora.std(), qlora.std())
        assert lora.min() <= qlora.max() and qlora.min() <= lora.max()


@ON_ALL
def test_both_have_learned(base):
    for method in ("LoRA", "QLoRA"):
        table = runs(base, method)
        assert (table["loss"] < table["loss before"] / 10).all()
        assert (table["new_facts"] > (0.05 if base == LARGER else 0.5)).all()  # of 0 before


@ON_ALL
def test_the_coded_matrices_hold_at_most_three_tenths_of_sixteen_bits(base):
    for held in runs(base, "QLoRA")["codes"]:
        assert held["bytes in 16 bits"] == 2 * held["weights"]
        assert held["bytes"] / held["bytes in 16 bits"] <= 0.30
        method = Method.from_dict(MADE["methods"]["QLoRA"])
        assert method.coded(Shape.named(base)) == (held["weights"], held["bytes"])


@ON_ALL
def test_merging_into_decoded_weights_is_exact_and_into_codes_is_not(base):
    for _, row in runs(base, "QLoRA").iterrows():
        ways = row["merged"]
        # Stored to five digits.
        assert abs(ways["into decoded weights"]["loss"] - row["loss"]) <= 2e-4
        assert abs(ways["into the codes"]["loss"] - row["loss"]) > 2e-3
