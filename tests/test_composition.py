"""One table says which methods do not go together; here the same is said of every pair."""

import pytest

from peftlab import Prune, PruneStructures
from peftlab.methods import METHODS, check_composition
from peftlab.methods.composition import RULES

MADE = {name: method() for name, method in METHODS.items() if name != "prune_structures"}
MADE["prune_structures"] = PruneStructures(heads=0.5)
PREFIXES = {"prefix_tuning", "p_tuning_v2", "prompt_and_prefix"}


def refused(first: str, second: str) -> bool:
    """By hand: nothing stands behind full fine-tuning or before pruning, and six pairs besides."""
    if first == "full_fine_tuning":
        return True
    if second == "full_fine_tuning":
        return first not in {"prune", "prune_structures"}
    if second == "prune":
        return first != "prune_structures"
    if first == "prune":
        return second in {"pissa", "nf4", "qlora", "prune_structures"}
    return second == "prune_structures" or (first == "prune_structures" and second in PREFIXES)


@pytest.mark.parametrize("first", METHODS)
def test_every_pair(first):
    for second in METHODS:
        pair = [MADE[first], MADE[second]]
        if refused(first, second):
            with pytest.raises(ValueError, match="does not go with"):
                check_composition(pair)
        else:
            check_composition(pair)


def test_the_table_names_methods_that_exist_and_says_why():
    for rule in RULES:
        named = {rule.method, *(rule.before or ()), *(rule.after or ()), *rule.but}
        assert named <= METHODS.keys() and len(rule.reason) > 20


def test_three_methods_are_told_the_first_rule_that_they_break():
    with pytest.raises(ValueError, match="Prune does not go with LoRA, .IA.*: it comes first"):
        check_composition([MADE["lora"], Prune(0.5), MADE["ia3"]])
