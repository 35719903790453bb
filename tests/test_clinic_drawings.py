"""The drawings of lesson 12: what they say is what they were given, and every word can be read."""

import pytest

from peftlab.figures import alt_text, counted_labels, decision_order, gradient_reach, stations
from peftlab.figures.clinic import ORDER
from peftlab.figures.sheet import overlaps, pale

FAULTS = {"text": ["one", "two"], "labels": ["three"], "file": ["four"], "service": []}
WAYS = {"all": [True] * 4, "answer": [False, False, True, True]}
DRAWN = {
    "stations": lambda dark: stations(FAULTS, dark),
    "labels": lambda dark: counted_labels(["a", "b", "c", "end"], WAYS, dark),
    "gradient": lambda dark: gradient_reach({"no": [False] * 6, "yes": [True] * 6}, dark),
    "order": lambda dark: decision_order(dark=dark),
}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_every_word_has_room_and_stands_out(name, dark):
    figure = DRAWN[name](dark)
    assert not overlaps(figure)
    assert not pale(figure)


def test_stations_count_their_faults():
    figure = stations(FAULTS)
    assert figure.layout.title.text.startswith("4 faults")
    assert "labels: three" in alt_text(figure)


def test_the_tokens_in_the_loss_are_coloured():
    figure = counted_labels(["a", "b", "c", "end"], WAYS)
    assert "answer: c, end" in alt_text(figure)
    fills = [shape.fillcolor for shape in figure.layout.shapes[:8]]
    assert len(set(fills[:4])) == 1 and fills[4] == fills[5] != fills[6] == fills[7] == fills[0]


def test_the_gradient_ends_where_it_ended():
    words = alt_text(gradient_reach({"half": [False, True, True], "none": [False] * 3}))
    assert "half: 2 of 3 blocks" in words and "none: 0 of 3 blocks" in words


def test_the_order_says_all_its_questions():
    words = alt_text(decision_order())
    assert all(asked in words and look in words and no in words for asked, look, no in ORDER)
