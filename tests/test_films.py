"""Films: their numbers are those of the tensors, every frame can be read, and a move shows one."""

import math

import pytest
import torch
from models import tiny

import peftlab as pl
from peftlab import figures, panels
from peftlab.figures.sheet import alt_text, overlaps, pale
from peftlab.sites.quantisation import table


def through_lora(seed=0, **options):
    draw = torch.Generator().manual_seed(seed)
    with pl.attach(tiny("gpt2"), pl.LoRA(r=3, alpha=6, target_modules=["q"])) as tuned:
        delta = tuned.deltas["layers.0.q"]
        x, g = (
            torch.randn(delta.A.shape[1], generator=draw),
            torch.randn(len(delta.B), generator=draw),
        )
        before = delta.A.detach().clone(), delta.B.detach().clone()
        frames = figures.lora_step(tuned, "layers.0.q", x, g, **options)
        assert torch.equal(delta.A, before[0]) and torch.equal(delta.B, before[1])
        return frames, x, g, *before, delta.scale


def backward(words, blocks=6):
    base = pl.load("tiny-gpt")
    with pl.attach(base, pl.FullFineTuning()) as tuned:
        for name, parameter in tuned.trainable.items():
            parameter.requires_grad_(any(word in name for word in words))
        ids = torch.arange(8)[None] + 10
        tuned.batch_loss(dict(input_ids=ids, attention_mask=ids * 0 + 1, labels=ids)).backward()
        return figures.frozen_backward(tuned)


BLOCK = torch.linspace(-0.31, 0.17, 16)


@pytest.mark.parametrize("dark", [False, True])
def test_every_frame_can_be_read_and_has_words(dark):
    with pl.attach(tiny("gpt2"), pl.LoRA(r=2)) as tuned:
        films = [through_lora(dark=dark)[0], figures.weight_to_code(BLOCK, 3, dark),
                 figures.frozen_backward(tuned, dark)]  # fmt: skip
    for frames in films:
        sizes = {(figure.layout.width, figure.layout.height) for _, figure in frames}
        assert len(sizes) == 1  # nothing jumps
        for caption, figure in frames:
            assert not overlaps(figure) and not pale(figure), caption
            assert len(alt_text(figure)) > 40


def test_the_lengths_of_a_step_are_those_of_autograd():
    frames, x, g, A, B, scale = through_lora(lr=0.25)
    captions = [caption for caption, _ in frames]
    assert len(frames) == 14
    for turn in (0, 7):
        A, B = (tensor.clone().requires_grad_() for tensor in (A, B))
        (scale * (B @ (A @ x)) @ g).backward()  # the loss whose gradient at h is g
        wanted = {1: (A @ x), 2: scale * (B @ (A @ x)), 4: B.grad, 5: A.grad}
        for stage, tensor in wanted.items():
            length = f"{tensor.norm().item():.2f}"
            assert captions[turn + stage].endswith(f"length {length}"), (turn, stage)
        A, B = (tensor.detach() - 0.25 * tensor.grad for tensor in (A, B))
    assert "A stays" in captions[6] and captions[13] == "the step: both move"
    moves = [[n.text for n in figure.layout.annotations].count("moves") for _, figure in frames]
    assert moves == [0] * 6 + [1] + [0] * 6 + [2]


@pytest.mark.parametrize("at", [0, 7, 15])
def test_a_weight_comes_back_as_its_level(at):
    captions = [caption for caption, _ in figures.weight_to_code(BLOCK, at)]
    scale = BLOCK.abs().max()
    code = int((BLOCK[at] / scale - table("nf4")).abs().argmin())
    assert f"number {code}" in captions[3] and f"{code:04b}" in captions[4]
    back = (scale * table("nf4")[code]).item()
    assert f"= {back:.4f}".replace("-", "−") in captions[5]


def test_the_gradient_stops_where_nothing_trains():
    top = [caption for caption, _ in backward(["h.4.", "h.5."])]
    assert len(top) == 4 and "blocks 0 to 3 are not entered" in top[-1]
    assert top[1].startswith("block 5: 12 trained tensors")
    table_alone = [caption for caption, _ in backward(["wpe"])]
    assert len(table_alone) == 8 and "below all blocks" in table_alone[-1]
    assert all("nothing trains here" in caption for caption in table_alone[1:7])
    everything = [caption for caption, _ in backward([""])]
    assert len(everything) == 8 and "nothing" not in " ".join(everything[1:7])


def test_a_film_shows_the_picture_that_the_slider_says():
    frames = figures.weight_to_code(BLOCK, 3)
    film = panels.film(frames, still=2)
    assert film.static() is frames[2][1] and frames[5][0] in film.describe()
    for at in (3, 0, 5):
        film.slider.value = at + 1
        assert film.plot.shown is frames[at][1]
        assert f"<b>{at + 1} of 6.</b>" in film.caption.value
        assert frames[at][0].split(":")[0] in film.caption.value
    assert film.play.max == film.slider.max == 6 and math.isclose(film.play.interval, 1800)
    film.close()
    with pytest.raises(ValueError, match="at least one frame"):
        panels.film([])
