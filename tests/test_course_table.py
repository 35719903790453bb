"""What the course says is what it said when it was last read."""

import pytest
import torch

from peftlab.experiments.course_table import ROUNDING, alike, every, kept, summary

KEPT = kept()
ALL = list(every())
COURSE = {name: (make, given) for name, make, given in ALL}


@pytest.mark.parametrize("name", KEPT)
def test_the_course_says_what_it_said(name, untyped):
    make, given = COURSE[name]
    assert alike(KEPT[name], made := make(*given)), made


def test_all_of_the_course_is_kept():
    assert sorted(KEPT) == sorted(COURSE) and len(COURSE) == len(ALL)


@pytest.mark.parametrize(
    "one, another, same",
    [
        ("3.20 of 5", "3.201 of 5", True),
        ("3.2 of 5", "3.3 of 5", False),
        ("3.2 of 5", "3.2 off 5", False),
        ([1, "a"], [1, "a"], True),
        ([1, "a"], [1], False),
        (40, 39, False),
        (True, 1, False),
        (2.0, 2.0 * (1 + ROUNDING / 2), True),
        (2.0, 2.0 * (1 + 2 * ROUNDING), False),
        ({"x": 1.0}, {"x": 1.1}, False),
        ({"x": 1.0}, {"y": 1.0}, False),
        (float("nan"), float("nan"), True),
        (float("nan"), 1.0, False),
        (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00001]), True),
        ({3, 1}, {1, 3}, True),
        (ValueError("no"), ValueError("yes"), False),
    ],
)
def test_what_is_said_is_compared_but_for_rounding(one, another, same):
    assert alike(summary(one), summary(another)) == alike(summary(another), summary(one)) == same
