"""The rank lab of lesson 07: every setting of its sliders, and the widgets around it."""

from itertools import product

import pytest

from peftlab import panels

SETTINGS = list(product(panels.LAB_RANKS, panels.LAB_ALPHAS, panels.LAB_SCALES))


def test_every_setting_of_the_sliders():
    """Rank r is all that is learned, and no more than the best matrix of rank r has."""
    for r, alpha, scale in SETTINGS:
        view = panels.rank_lab_view(r, alpha, scale)
        assert len(view.learned) == r and len(view.wanted) == panels.LAB_SIZE
        assert len(view.loss) == panels.LAB_STEPS + 1
        assert view.loss[0] == pytest.approx(1)  # B is zero at the start
        # Eckart and Young; 1e-5 is float32 in sums of 48² squares, relative to their sum.
        assert view.loss[-1] >= view.floor - 1e-5
        assert f"r = {r}, α = {alpha}, {scale}: {1 - view.loss[-1]:.0%} of" in view.text
        figure = view.figure()
        assert figure.layout.title.text == view.text
        assert [len(trace.x) for trace in figure.data] == [r, panels.LAB_SIZE]


def test_the_trap_is_there_and_the_root_helps():
    """With α = 4 fixed, rank 48 learns hardly more than 16 by α / r, and much more by α / √r."""
    by_r, by_root = (
        [panels.rank_lab_view(r, 4, scale).loss[-1] for r in (4, 16, 48)]
        for scale in panels.LAB_SCALES
    )
    assert by_r[1] - by_r[2] < 0.03 and by_r[2] > 0.2
    assert by_root[0] > 2 * by_root[1] > 4 * by_root[2]
    assert panels.rank_lab_view(1, 4, "α / r").loss == panels.rank_lab_view(1, 4, "α / √r").loss


def test_moving_the_widgets_trains_anew():
    panel = panels.rank_lab()
    for name, options in (
        ("r", panels.LAB_RANKS),
        ("alpha", panels.LAB_ALPHAS),
        ("scale", panels.LAB_SCALES),
    ):
        for value in options:
            panel.choices[name].value = value
            chosen = {key: widget.value for key, widget in panel.choices.items()}
            assert panel.view == panels.rank_lab_view(**chosen)
            assert panel.view.text in panel.answer.value
            wanted = panel.view.figure()
            assert panel.plot.layout.title.text == wanted.layout.title.text
            for shown, made in zip(panel.plot.data, wanted.data, strict=True):
                assert list(shown.y) == list(made.y) and list(shown.x) == list(made.x)


def test_the_still_is_the_same_every_time():
    panels.rank_lab_view.cache_clear()
    first = panels.rank_lab(4, 4).static().to_json()
    panels.rank_lab_view.cache_clear()
    assert panels.rank_lab(4, 4).static().to_json() == first
    assert panels.rank_lab(4, 4).describe().startswith("Rank lab: r = 4, α = 4, α / r: ")


@pytest.mark.parametrize("setting", [(3, 4, "α / r"), (4, 5, "α / r"), (4, 4, "alpha")])
def test_other_settings_are_refused(setting):
    with pytest.raises(ValueError, match="allowed is"):
        panels.rank_lab_view(*setting)
