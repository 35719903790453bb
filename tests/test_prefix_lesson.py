"""What lesson 04 says of prefix tuning holds: its drawings, its gate, its faults, its PEFT cell.

Tolerances. u is float32's unit roundoff, 2⁻²⁴. A softmax and a sum over n terms err by about n u
times the largest number; the bounds below are 100 times that for n of at most 64.
"""

import copy
import math

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from drawn import readable

import peftlab
from peftlab import figures, panels
from peftlab.bases import probes
from peftlab.bases.shapes import Shape
from peftlab.exercises import lesson_04 as lesson
from peftlab.experiments import limits, sweep_soft
from peftlab.experiments.forget_rates import old_texts
from peftlab.figures.style import COLOURS
from peftlab.panels.gate import PREFIX_VALUE, TEXT_SUM, TEXT_VALUES

BOUND = 100 * 64 * 2**-24
WORDS = " the old mill near the garden"


@pytest.fixture(scope="module")
def base():
    return peftlab.load("tiny-gpt")


@pytest.fixture(scope="module")
def seen(base):
    with peftlab.attach(base, peftlab.PrefixTuning(3), seed=0) as tuned:
        return probes.attention_map(tuned, WORDS)


# --- drawings ----------------------------------------------------------------------------------


def drawings(base, dark):
    with peftlab.attach(base, peftlab.PrefixTuning(3), seed=0) as tuned:
        seen = probes.attention_map(tuned, WORDS)
    name = next(iter(seen.records))
    parts = seen.weights(name)[0], seen.queries(name), seen.keys(name)
    with peftlab.attach(base, peftlab.PrefixTuning(9, prefix_projection=True)) as tuned:
        network = figures.thrown_away(tuned, dark)
    return {
        "scores": figures.prefix_shares(*parts, dark),
        "network": network,
        "shapes": figures.prefix_shapes(6, 3, 32, dark),
        "positions": figures.positions(seen.tokens[:3], 9, dark),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_drawings_can_be_read(base, dark):
    readable(drawings(base, dark))


def test_the_score_matrix_shows_the_shares_that_the_model_computed(seen):
    name = next(iter(seen.records))
    weights = seen.weights(name)[0]
    figure = figures.prefix_shares(weights, seen.queries(name), seen.keys(name))
    texts = [note.text for note in figure.layout.annotations if note.text]
    T, shown = len(weights), [int(text) for text in texts if text.isdigit()]
    visible = weights[torch.ones(T, 3 + T).tril(3).bool()]
    assert shown == [round(100 * share) for share in visible.tolist()]
    assert (weights.triu(4) == 0).all() and (weights[:, :3] > 0).all()
    gates = [f"{gate:.0%}" for gate in seen.gate(name)[0].tolist()]
    assert [text for text in texts if text.endswith("%")] == gates
    assert all(gate in figures.alt_text(figure) for gate in gates)


def test_the_drawing_of_the_network_counts_what_is_attached(base):
    method = peftlab.PrefixTuning(9, prefix_projection=True)
    with peftlab.attach(base, method) as tuned:
        title, count = figures.thrown_away(tuned).layout.title.text, tuned.count()
    assert title == f"{count.parameters:,} numbers train; {count.stored:,} are kept"
    assert round(count.parameters / count.stored) == 62  # as the lesson says
    with (
        peftlab.attach(base, peftlab.PrefixTuning(9)) as tuned,
        pytest.raises(ValueError, match="prefix_projection=True"),
    ):
        figures.thrown_away(tuned)


def test_results_carry_every_run():
    forms = {"prefix, MLP": "MLP prefix", "prefix, vocabulary": "flat prefix"}
    lab = sweep_soft.read("lab")[1].query("num_virtual_tokens == 20 and label in @forms")
    lab = lab.assign(form=lab.label.map(forms))
    figure = figures.rates(lab, "t")
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in points) == len(lab)
    assert {note.text for note in figure.layout.annotations} == set(forms.values())
    runs = pd.concat([limits.read(name)[1] for name in ("limits", "limits_long")])
    race = figures.runs_by_row(runs, "exact", "skill", "t", "share right")
    assert sum(len(trace.x) for trace in race.data) == len(runs)
    assert [trace.marker.color for trace in race.data] == [
        COLOURS["prefix_tuning"], COLOURS["lora"]
    ]  # fmt: skip
    assert list(race.layout.yaxis.ticktext) == list(dict.fromkeys(runs.skill))
    layers = figures.within_and_through([0, 0.5], [2, 32], 2, 32, "t")
    assert list(layers.data[0].y) == [0, 0.5] and list(layers.data[1].y) == [2, 32]


# --- the gate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_sum", panels.GATE_SUMS)
@pytest.mark.parametrize("split", panels.GATE_SPLITS)
def test_every_setting_of_the_gate_lab_is_a_softmax(prefix_sum, split):
    view = panels.gate_view(prefix_sum, split)
    sums = torch.tensor([prefix_sum, split * TEXT_SUM, (1 - split) * TEXT_SUM])
    shares = sums.log().softmax(0)
    output = shares @ torch.tensor([PREFIX_VALUE, *TEXT_VALUES])
    assert view.gate == pytest.approx(shares[0].item(), abs=1e-6)
    assert view.output == pytest.approx(output.tolist(), abs=1e-5)
    assert f"({view.output[0]:.2f}, {view.output[1]:.2f})" in view.text
    *_, text, prefix, mixed = view.figure().data
    assert (mixed.x[0], mixed.y[0]) == pytest.approx(view.output)
    assert (text.x[0], text.y[0]) == view.alone and (prefix.x[0], prefix.y[0]) == PREFIX_VALUE
    assert sum(view.alone) == 4  # on the line between the two words, whatever the prefix


def test_the_gate_lab_moves_and_refuses_what_it_has_not():
    lab = panels.gate_lab()
    before = [list(trace.x) for trace in lab.plot.data]
    lab.prefix_sum.value = 64
    assert lab.view == panels.gate_view(64) and "94%" in lab.text.value
    assert [list(trace.x) for trace in lab.plot.data] != before
    lab.split.value = 1
    assert lab.view.alone == (4, 0)
    assert lab.describe().startswith("Gate lab: λ") and lab.static().layout.title.text
    lab.close()
    with pytest.raises(ValueError, match="prefix_sum=3: allowed are 0, 0.25"):
        panels.gate_view(3)
    with pytest.raises(ValueError, match="split=2"):
        panels.gate_view(4, 2)


def test_the_gate_from_two_log_sum_exps_in_every_layer(seen):
    for name, record in seen.records.items():
        scores = record.query @ record.key.transpose(2, 3) * record.scaling + record.mask
        p, t = scores.split([3, len(seen.tokens)], dim=-1)
        assert (lesson.gate_of(p, t)[0] - seen.gate(name)).abs().max() <= BOUND
        parts = probes.gate(record)
        assert parts.error <= BOUND * parts.output.abs().max()


def test_within_a_layer_and_through_the_layers(base):
    """Layer 1 keeps the words' proportions and gets rank 2 of a prefix of 2; layer 2 neither."""
    texts = [WORDS, " the garden near the old tower", "in: d a c b\nout:"]
    plain = [probes.attention_map(base, text) for text in texts]
    with peftlab.attach(base, peftlab.PrefixTuning(2), seed=0) as tuned:
        read = [probes.attention_map(tuned, text) for text in texts]
    ranks, apart = [], []
    for name in list(plain[0].records)[:2]:
        left, far = [], 0.0
        for a, b in zip(read, plain, strict=True):
            keep = 1 - a.gate(name)[..., None]
            left.append(a.records[name].output[0] - keep * b.records[name].output[0])
            words = a.weights(name)[..., 2:]
            far = max(far, (words / words.sum(-1, keepdim=True) - b.weights(name)).abs().max())
        ranks.append(int(torch.linalg.matrix_rank(torch.cat(left, dim=1), rtol=1e-4).max()))
        apart.append(float(far))
    assert ranks[0] <= 2 < ranks[1]
    assert apart[0] <= BOUND < 0.01 < apart[1]


# --- what the text says ------------------------------------------------------------------------


def test_the_counts_in_the_text():
    medium = Shape.named("gpt2-medium")
    ten, five = (peftlab.count(peftlab.PrefixTuning(P), medium) for P in (10, 5))
    assert 10 * 24 * 1024 == 245_760 == five == ten // 2
    assert Shape.named("t5-base").attentions == 12 + 2 * 12
    llama = Shape.named("llama-3-8b")
    assert llama.d_kv * 4 == llama.d_model


def test_the_ranges_of_learning_rates_in_the_text():
    lab = sweep_soft.read("lab")[1].query("num_virtual_tokens == 20")
    mean = lab.groupby(["label", "lr"]).exact.mean()
    for label, works, fails in (
        ("prefix, MLP", (3e-4, 1e-3, 3e-3), (1e-2,)),
        ("prefix, vocabulary", (1e-2, 3e-2, 0.1, 0.3), (1e-3, 3e-3, 1)),
    ):
        assert all(mean[label, lr] > 0.9 for lr in works)
        assert all(mean[label, lr] < 0.1 for lr in fails)
    assert min(lr for label, lr in mean.index if label == "prefix, MLP") == 3e-4


def test_the_race_in_the_text():
    runs = pd.concat([limits.read(name)[1] for name in ("limits", "limits_long")])
    assert set(runs.trained) == {20_736} and set(runs.seed) == {0, 1, 2}
    at = runs.groupby(["skill", "steps", "label"]).exact
    low, high, P, L = at.min(), at.max(), "Prefix tuning", "LoRA"
    assert min(low["sort", 40, P], low["sort", 40, L]) > 0.95
    assert high["permute", 360, P] < 0.1 and low["permute", 360, L] > 0.95
    for steps in (240, 360):  # ahead in every seed, and near
        assert 0 < low["double_histogram", steps, L] - high["double_histogram", steps, P] < 0.05
    assert at.mean()["double_histogram", 360, P] > at.mean()["double_histogram", 240, P]
    early, first = limits.read("limits_first")
    assert early["batch size"] == 8 and first[first.skill == "permute"].exact.max() == 0
    assert set(first[first.skill == "permute"].steps) == {120}
    assert first[first.label == L].lr.max() > runs[runs.label == L].lr.max()


def test_the_guess_of_one_step_through_the_network(base):
    """512 weights of about 0.4 move together, and nine virtual tokens share them."""
    task = peftlab.tasks.load("letters", skill="sort")
    moved = {}
    for projection in (False, True):
        method = peftlab.PrefixTuning(9, prefix_projection=projection)
        with peftlab.attach(base, method, seed=0) as tuned:
            start = tuned.prefix[0].detach().clone()
            if projection:
                t = {name.rpartition("encoder.")[2]: x for name, x in tuned.trainable.items()}
                hidden = torch.tanh(t["table"] @ t["mlp.0.weight"].T + t["mlp.0.bias"])
                guess = 512 * hidden.abs().mean().item() / math.sqrt(9)
            peftlab.train(
                tuned, task, 1, lr=1e-3, warmup=0, batch_size=8, progress=False, evaluate=False
            )
            moved[projection] = (tuned.prefix[0].detach() - start).square().mean().sqrt().item()
    assert moved[False] == pytest.approx(1e-3, rel=0.02)
    assert guess == pytest.approx(68, abs=3)
    assert 0.7 < moved[True] / moved[False] / guess < 1.5


def test_zeros_are_no_neutral_start_here_nor_in_peft(base):
    ids = base.tokenizer([WORDS], return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    plain = base(ids, mask)
    with peftlab.attach(base, peftlab.PrefixTuning(9, init="zero", shift_positions=True)) as zero:
        ours = zero(ids, mask).detach()
    with peftlab.attach(base, peftlab.PrefixTuning(9, init="zero")) as zero:
        beside = zero(ids, mask).detach()
    help_text = peft.PrefixTuningConfig.__dataclass_fields__["init_weights"].metadata["help"]
    assert "no-op" in help_text
    theirs = wrapped(base, init_weights="zero")
    with torch.no_grad():
        made = theirs(input_ids=ids, attention_mask=mask).logits
    assert (made - ours).abs().max() <= BOUND * ours.abs().max()
    assert (beside - plain).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize("model, low, high", [("tiny-gpt", 0.5, 0.9), ("tiny-llama", 0.01, 0.1)])
def test_what_one_key_of_zeros_takes_depends_on_the_model(model, low, high):
    text = old_texts()[0]
    with peftlab.attach(peftlab.load(model), peftlab.PrefixTuning(1, init="zero")) as zero:
        seen = probes.attention_map(zero, text)
    for record in seen.records.values():  # λ = P / (P + Z_T), with P = 1
        key = record.key.repeat_interleave(record.query.shape[1] // record.key.shape[1], dim=1)
        scores = record.query @ key.transpose(2, 3) * record.scaling + record.mask
        Z_T = scores[..., 1:].exp().sum(-1)
        assert (record.weights[..., 0] - 1 / (1 + Z_T)).abs().max() <= BOUND
    share = torch.stack([seen.gate(name).mean() for name in seen.records]).mean().item()
    assert low < share < high


# --- PEFT --------------------------------------------------------------------------------------


def wrapped(base, **options):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9, **options)
    return peft.get_peft_model(copy.deepcopy(base.model), config).eval()


def test_the_peft_cell(base):
    """Our numbers in PEFT's table give our logits, if the text begins behind the prefix."""
    theirs = wrapped(base)
    table = theirs.prompt_encoder["default"].embedding.weight
    generator = torch.Generator().manual_seed(0)
    with peftlab.attach(base, peftlab.PrefixTuning(9), seed=1) as tuned:
        state = {k: t.clone() for k, t in tuned.state().items()}
    for tensor in state.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    ours = torch.stack([state["prefix_tuning.P_k"], state["prefix_tuning.P_v"]], dim=1)
    table.data = ours.permute(3, 0, 1, 2, 4).flatten(1)
    batch = base.tokenizer([WORDS, " the old tower"], return_tensors="pt", padding=True)
    ids, mask = batch.input_ids, batch.attention_mask
    real, off = mask.bool(), {}
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask).logits
    for shift in (False, True):
        with (
            peftlab.attach(base, peftlab.PrefixTuning(9, shift_positions=shift)) as tuned,
            torch.no_grad(),
        ):
            tuned.load_state(state)
            off[shift] = (tuned(ids, mask) - wanted)[real].abs().max().item()
    largest = wanted.abs().max().item()
    assert off[True] <= BOUND * largest < 0.05 * largest < off[False]
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == peftlab.count(peftlab.PrefixTuning(9), base.anatomy.shape) == 20_736


def test_peft_folds_the_network_when_it_saves(base):
    theirs = wrapped(base, prefix_projection=True, encoder_hidden_size=16)
    stored = peft.get_peft_model_state_dict(theirs)
    assert [tuple(tensor.shape) for tensor in stored.values()] == [(9, 2 * 6 * 192)]


def test_the_curve_grows_while_it_trains(monkeypatch):
    shown = []
    monkeypatch.setattr("peftlab.panels.live_curve.display", shown.append)
    monkeypatch.setattr("peftlab.panels.live_curve.clear_output", lambda wait: None)
    first = pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0]})
    live = panels.LiveCurve("Prefix tuning", 12, "t", beside={"LoRA": first}, every=5)
    for step in range(1, 13):
        live({"step": step, "loss": 1 / step})
    assert len(shown) == 3  # steps 5, 10 and the last
    old, new = shown[-1].data
    assert old.name == "LoRA" and new.name == "Prefix tuning" and len(new.x) == 12
    assert np.allclose(new.y, 1 / np.arange(1, 13)) and set(live.histories) == {old.name, new.name}


def test_an_encoder_along_the_prefix_has_keys_that_are_too_short(base):
    """Of P numbers it makes one output for all places, so a key is P times too short."""
    shape = base.anatomy.shape
    out = 2 * shape.layers * shape.d_kv
    for P, fits in ((8, True), (9, False)):
        made = torch.nn.Linear(P, out)(torch.rand(P))
        assert made.numel() / (2 * shape.layers * P) == shape.d_kv / P < shape.d_kv
        if fits:
            assert made.view(shape.layers, 2, P, -1).shape[-1] == 24
        else:
            with pytest.raises(RuntimeError, match="invalid for input of size"):
                made.view(shape.layers, 2, P, -1)
    rows = torch.nn.Linear(shape.d_model, out)(torch.rand(9, shape.d_model))
    assert rows.view(9, shape.layers, 2, -1).shape[-1] == shape.d_kv == 192
