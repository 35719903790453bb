"""What lesson 03 says of P-tuning holds: its drawings, a step through a network, chance, PEFT.

Tolerances. u is float32's unit roundoff, 2⁻²⁴. A sum over n terms errs by about n u times the
largest number; the bounds below are 100 times that, for n of at most 768, a few layers deep.
"""

import copy
import json
import statistics

import nbformat
import numpy as np
import pandas as pd
import peft
import pytest
import torch
from drawn import readable
from scipy import stats
from torch import nn

import peftlab
from peftlab import figures
from peftlab.bases import probes
from peftlab.bases.data import data_path
from peftlab.exercises import lesson_03 as lesson
from peftlab.experiments import sweep_cloze, sweep_soft
from peftlab.experiments.claims import evidence

BOUND = 100 * 768 * 2**-24
MADE_BY = {"no encoder": "embedding", "MLP": "mlp", "LSTM": "lstm", "attention": "attention"}
H, W = [[1, 0], [2, 0]], [[1, 2], [0, 1]]
G = [[-1, 0], [0, 0]]


@pytest.fixture(scope="module")
def base():
    return peftlab.load("tiny-gpt")


@pytest.fixture(scope="module")
def ten():
    runs = sweep_soft.read("spread")[1]
    return {kind: runs[runs.label == kind].exact.tolist() for kind in MADE_BY}


def network(base, kind, count=8):
    with peftlab.attach(base, peftlab.PTuning(count, encoder=MADE_BY[kind]), seed=0) as tuned:
        return tuned.sources["p_tuning"].module


def kernel(module, count=16):
    """J Jᵀ from row to row, as the lesson has it."""
    found, d = 0, module()["prompt"].shape[1]
    for k in range(0, d, d // count):
        J = []
        for number in module()["prompt"][:, k]:
            grads = torch.autograd.grad(number, [*module.parameters()], retain_graph=True)
            J.append(torch.cat([g.flatten() for g in grads]))
        found = found + torch.stack(J) @ torch.stack(J).T / count
    return found


# --- drawings ------------------------------------------------------------------------------------


def drawings(base, dark):
    text = ["[CLS]", "Ada", "[MASK]", "[SEP]"]
    with peftlab.attach(base, peftlab.PTuning(4), seed=0) as tuned:
        maker = figures.prompt_maker(tuned, [" the", " old", " mill"], dark)
    with peftlab.attach(base, peftlab.PTuning(20), seed=0) as tuned:
        kept = figures.kept_of_encoder(tuned, dark)
    kernels = {kind: torch.eye(8) if kind == "no encoder" else torch.ones(8, 8) for kind in MADE_BY}
    rows = {"all in front": ["◆"] * 9 + text, "before": text[:2] + ["◆"] * 9 + text[2:]}
    return {
        "maker": maker,
        "hand": figures.hand_step(H, G, W, dark),
        "kernels": figures.row_kernels(kernels, dark),
        "kept": kept,
        "places": figures.template_places(rows, dark),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_drawings_can_be_read(base, dark):
    readable(drawings(base, dark))


def test_the_drawings_of_the_encoder_count_what_is_attached(base):
    for draw, size in (("prompt_maker", 4), ("kept_of_encoder", 20)):
        words = [[" the"]] if draw == "prompt_maker" else []
        with peftlab.attach(base, peftlab.PTuning(size), seed=0) as tuned:
            figure, count = getattr(figures, draw)(tuned, *words), tuned.count()
        title = figure.layout.title.text
        assert f"{count.parameters:,}" in title and f"{count.stored:,}" in title
        for method in (peftlab.PromptTuning(4), peftlab.PTuning(4, encoder="mlp")):
            with (
                peftlab.attach(base, method) as tuned,
                pytest.raises(ValueError, match="P-tuning with an LSTM"),
            ):
                getattr(figures, draw)(tuned, *words)
    with (
        peftlab.attach(base, peftlab.PTuning(20)) as tuned,
        pytest.raises(ValueError, match="2 to 5"),
    ):
        figures.prompt_maker(tuned, [" the"])


def test_a_step_by_hand_shows_the_numbers_of_both_steps():
    figure = figures.hand_step(H, G, W)
    shown = [note.text for note in figure.layout.annotations if note.text]
    numbers = [int(text.replace("−", "-")) for text in shown if text.strip("−").isdigit()]
    h, w, g = (torch.tensor(m) for m in (H, W, G))
    for k, matrix in enumerate((torch.eye(2, dtype=int), h @ h.T)):
        step = -matrix @ g
        wanted = [matrix, g, step, h @ w, h @ w + step]
        assert numbers[20 * k : 20 * k + 20] == torch.cat([m.flatten() for m in wanted]).tolist()
    assert torch.equal(lesson.step_through(h, g, 1), -h @ h.T @ g)
    assert figure.layout.title.text.endswith("through W₂ rows 1 and 2 move")


def test_a_grid_says_what_its_kernel_says():
    kernel = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    figure = figures.row_kernels({"a": torch.eye(2), "b": kernel})
    texts = [note.text for note in figure.layout.annotations]
    assert [t for t in texts if t.startswith("own row")] == ["own row: 1.0", "own row: 3.0"]
    assert [t for t in texts if t.startswith("another")][1] == "another row: 0.33 of that"
    fills = [s.fillcolor for s in figure.layout.shapes]
    assert fills[0] == fills[3] == fills[4] != fills[7] and fills[5] == fills[6]


def test_every_run_is_a_point_and_equal_ones_do_not_hide_each_other(ten):
    runs = sweep_soft.read("spread")[1]
    figure = figures.seeds_in_rows(runs, "exact", "label", "t", "share")
    points = [(x, round(y, 6)) for t in figure.data for x, y in zip(t.x, t.y, strict=True)]
    assert len(points) == len(runs) == len(set(points))
    means = [shape.x0 for shape in figure.layout.shapes]
    assert means == pytest.approx(runs.groupby("label", sort=False).exact.mean().tolist())
    low = figure.layout.yaxis.range[1]
    assert all(low < y for _, y in points)


@pytest.mark.parametrize("equal", [1, 9, 30])
def test_a_stack_of_equal_runs_ends_below_the_row_above(equal):
    runs = pd.DataFrame({"kind": ["above"] + ["below"] * equal, "exact": 1.0})
    figure = figures.seeds_in_rows(runs, "exact", "kind", "t", "share")
    heights = [y for trace in figure.data if trace.name == "below" for y in trace.y]
    assert len(set(heights)) == equal and all(0.39 < y <= 1 for y in heights)
    assert figure.layout.height / 2 * min([1, *-np.diff(heights)]) > 5  # pixels that one rises


# --- a step through a network --------------------------------------------------------------------


def test_the_first_step_of_gradient_descent_is_the_kernel_times_the_gradient(base):
    module, lr = network(base, "MLP", 4), 1e-3
    before = module()["prompt"]
    d = before.shape[1]
    gradient = torch.randn(4, d, generator=torch.Generator().manual_seed(0)) / d
    J = []
    for number in before[:, :3].flatten():
        grads = torch.autograd.grad(number, [*module.parameters()], retain_graph=True)
        J.append(torch.cat([g.flatten() for g in grads]))
    (before * gradient).sum().backward()
    kept = torch.cat([p.grad.flatten() for p in module.parameters()])
    with torch.no_grad():
        for p in module.parameters():
            p -= lr * p.grad
        moved = (module()["prompt"] - before)[:, :3].flatten()
    wanted = -lr * torch.stack(J) @ kept  # Jᵀ G is what reaches the weights
    assert (moved - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_what_the_text_reads_in_the_kernels(base):
    ratio, own = {}, {}
    for kind in MADE_BY:
        found = kernel(network(base, kind))
        own[kind] = found.diagonal().mean().item()
        off = found[~torch.eye(8, dtype=bool)]
        ratio[kind] = off.mean().item() / own[kind]
        assert (off.abs() > 1e-6).all() == (kind != "no encoder")
    assert own["no encoder"] == 1 and ratio["no encoder"] == 0
    assert 0.2 < ratio["MLP"] < 0.6 and min(ratio["LSTM"], ratio["attention"]) > 0.9


def test_who_looks_at_whom(base):
    """The LSTM at its neighbours, attention at all alike, the MLP at its own row alone."""
    seen = {}
    for kind in ("MLP", "LSTM", "attention"):
        module = network(base, kind)
        found = 0
        for number in module()["prompt"][3, ::12]:
            (grad,) = torch.autograd.grad(number, module.table, retain_graph=True)
            found = found + grad.square().sum(dim=1)
        seen[kind] = (found / found[3]).sqrt()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert (seen["MLP"][others] == 0).all()
    assert (seen["attention"] - 1).abs().max() < 0.1
    near, far = seen["LSTM"][[2, 4]], seen["LSTM"][[0, 7]]
    assert 0.4 < near.min() and far.max() < 0.5 * near.min() + 0.05 < 1


def test_adams_steps_are_as_long_as_guessed(base):
    task = peftlab.tasks.load("letters", skill="sort")
    far, guess = {}, {}
    for kind, encoder in MADE_BY.items():
        with peftlab.attach(base, peftlab.PTuning(20, encoder=encoder), seed=0) as tuned:
            seen = []
            if encoder != "embedding":
                last = tuned.sources["p_tuning"].module.mlp[-1]
                last.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            start = tuned.prompt.detach().clone()
            peftlab.train(
                tuned, task, 1, lr=1e-3, warmup=0, batch_size=8, seed=0, progress=False,
                evaluate=False,
            )  # fmt: skip
            far[kind] = (tuned.prompt.detach() - start).square().mean().sqrt().item() / 1e-3
        guess[kind] = 1 + (seen[0].abs().sum(-1).mean().item() if seen else 0)
    assert far["no encoder"] == pytest.approx(1, rel=0.01)
    assert 1 < far["MLP"] / guess["MLP"] < 1.4
    for kind in ("LSTM", "attention"):
        assert 1.7 < far[kind] / guess[kind] < 2.7


def test_the_untrained_lstm_makes_one_short_vector_many_times(base):
    made = network(base, "LSTM", 20)()["prompt"].detach()
    tokens = network(base, "no encoder", 20)()["prompt"].detach()
    unit = nn.functional.normalize(made, dim=1)
    assert ((unit @ unit.T).sum() - 20) / (20 * 19) > 0.9
    assert made.norm(dim=1).mean() < 0.3 * tokens.norm(dim=1).mean()


# --- counts --------------------------------------------------------------------------------------


def test_the_counts_in_the_text():
    count = peftlab.count
    for P, d, model in ((20, 768, "gpt2"), (9, 1024, "bert-large")):
        assert count(peftlab.PTuning(P), model) == P * d + 14 * d * d + 18 * d
    bare = count(peftlab.PromptTuning(20), "gpt2")
    kinds = [dict(encoder="mlp"), {}, dict(sizes="peft")]
    ratios = [round(count(peftlab.PTuning(20, **kind), "gpt2") / bare) for kind in kinds]
    assert ratios == [78, 540, 1769]
    mlp = peftlab.PTuning(20, encoder="mlp", sizes="peft")
    assert count(mlp, "llama-3.2-3b") == 28_382_208


# --- the grids and the seeds ---------------------------------------------------------------------


def test_what_the_text_reads_in_the_grid_of_rates():
    lab = sweep_soft.read("lab")[1]
    labels = {"none": "prompt, vocabulary"} | {
        k: f"prompt, {k}" for k in ("lstm", "mlp", "attention")
    }
    at = {k: lab[lab.label == label].groupby("lr").exact for k, label in labels.items()}
    low, high, mean = ({k: getattr(v, f)() for k, v in at.items()} for f in ("min", "max", "mean"))
    assert low["none"][low["none"] > 0.95].index.tolist() == [0.03, 0.1]
    assert low["mlp"][low["mlp"] > 0.95].index.tolist() == [0.001, 0.003, 0.01, 0.03]
    assert all(mean[kind].idxmax() == 0.01 for kind in ("lstm", "attention"))
    assert all((low[kind] > 0.95).any() for kind in labels)
    assert high["none"][0.001] < 0.05 and low["none"][0.03] > high["lstm"][0.03]
    assert max(high[kind][3e-4] for kind in ("lstm", "mlp")) < 0.5
    assert low["none"][0.1] > 0.985
    assert peftlab.PTuning(9).learning_rate == 0.01
    assert peftlab.PTuning(9, encoder="embedding").learning_rate == 0.1


def test_the_exercise_gives_the_p_of_scipys_permutation_test(ten):
    def gap(a, b, axis):
        return abs(a.mean(axis=axis) - b.mean(axis=axis))

    for a, b in ((ten["MLP"][:5], ten["LSTM"][:5]), ([1.0, 2.0, 5.0], [0.0, 0.5, 1.0, 3.0])):
        theirs = stats.permutation_test((a, b), gap, n_resamples=1e6, alternative="greater")
        assert lesson.p_value(a, b) == pytest.approx(theirs.pvalue, abs=1e-9)


def test_what_the_text_reads_in_the_ten_seeds(ten):
    none = ten["no encoder"]
    p = {kind: lesson.p_value(ten[kind], none) for kind in ("MLP", "LSTM", "attention")}
    assert 0.004 < p["MLP"] < 0.006 < 0.05 / 3
    assert min(p["LSTM"], p["attention"]) > 0.05
    gap = statistics.fmean(ten["MLP"]) - statistics.fmean(none)
    assert 0.01 < gap < statistics.stdev(none)  # so the rule of one deviation misses it
    assert sum(score == 1 for score in ten["MLP"]) == 9
    assert min(min(scores) for scores in ten.values()) > 0.5
    far = {k: [abs(x - statistics.median(v)) for x in v] for k, v in ten.items()}
    assert lesson.p_value(far["LSTM"], far["no encoder"]) > 0.1
    assert lesson.p_value(far["MLP"], far["no encoder"]) < 0.01
    runs = sweep_soft.read("spread")[1].groupby("label")["at the end of its grid"].first()
    assert runs.sum() == 3 and not runs["LSTM"]


def test_what_the_text_reads_in_the_probe():
    runs = sweep_cloze.read()[1]
    bare = runs[runs.encoder.str.startswith("none")]
    at = {place: rows.exact.tolist() for place, rows in bare.groupby("place")}
    front = at["all in front"]
    for place in ("all before the mask", "all behind the mask"):
        assert min(at[place]) > max(front)
        assert lesson.p_value(at[place], front) == pytest.approx(2 / 252)
    means = {place: statistics.fmean(scores) for place, scores in at.items()}
    assert means["all in front"] < means["template 3-3-3"] < means["all behind the mask"]
    assert bare.groupby("place")["at the end of its grid"].first().sum() == 4  # of five

    paper = runs[runs.place == "template 3-3-3"].groupby("encoder")
    assert paper["at the end of its grid"].first().sum() == 6 and len(paper) == 8
    scores = {name: rows.exact.tolist() for name, rows in paper}
    none = scores.pop("none (prompt tuning)")
    p = {name: lesson.p_value(found, none) for name, found in scores.items()}
    ahead = [n for n, found in scores.items() if statistics.fmean(found) > statistics.fmean(none)]
    assert all(p[name] > 0.3 for name in ahead)
    assert max(scores["attention, source S0-05"]) < min(none)
    assert p["LSTM, paper's few-shot code"] == pytest.approx(8 / 252)
    assert p["bare LSTM, source S4-36"] > 0.3


def test_on_real_data_every_seed_lies_below_loras():
    assert len(evidence.REAL) == 5
    for name in evidence.REAL:
        file = f"real_{name}"
        metric = evidence.read(file)["main"]
        ours, theirs = (
            evidence.scores(file, {"label": label}, metric) for label in ("P-tuning", "LoRA")
        )
        assert len(ours) == len(theirs) == 3 and max(ours) < min(theirs)


# --- places --------------------------------------------------------------------------------------


def test_the_drawn_places_are_those_that_the_model_reads():
    bert = peftlab.load("tiny-bert")
    text = "Gideon Waverly[MASK]"
    tokens = bert.tokenizer.tokenize("[CLS]" + text + "[SEP]")
    ids = bert.tokenizer([text], return_tensors="pt").input_ids
    first = next(m for m in bert.model.modules() if type(m).__name__ == "BertLayer")
    for placement in sweep_cloze.PLACES.values():
        row = list(tokens)
        for size, where in placement:  # as the lesson draws it
            side, _, token = where.partition(" ")
            at = 0 if side == "front" else row.index(token) + (side == "after")
            row[at:at] = ["◆"] * size
        method = peftlab.PTuning(9, encoder="embedding", placement=placement)
        read = []
        hook = first.register_forward_pre_hook(lambda _, given, read=read: read.append(given[0]))
        with peftlab.attach(bert, method, seed=0) as tuned, torch.no_grad():
            for turn in (1, -1):
                tuned.prompt.data.mul_(turn)
                tuned(ids, torch.ones_like(ids))
        hook.remove()
        longer = [states for states in read if states.shape[1] == len(row)]
        changed = (longer[0] - longer[1]).abs().amax(dim=-1)[0] > 1e-3
        assert changed.tolist() == [token == "◆" for token in row]


def test_the_vectors_go_in_once_and_no_layer_gets_keys():
    bert = peftlab.load("tiny-bert")
    method = peftlab.PTuning(9, placement=sweep_cloze.TEMPLATE)
    with peftlab.attach(bert, method, seed=0) as tuned:
        seen = probes.attention_map(tuned, "Gideon Waverly[MASK]")
    found = {(record.virtual, record.key.shape[2]) for record in seen.records.values()}
    assert found == {(0, len(seen.tokens) + 9)} and len(seen.records) == 6


# --- which network -------------------------------------------------------------------------------


def test_a_bare_lstm_refuses_numbers_and_stays_within_one():
    with pytest.raises(TypeError, match="input_size"):
        nn.LSTM(hidden_size=8)
    with pytest.raises(ValueError, match="2D or 3D"):
        nn.LSTM(8, hidden_size=8)(torch.arange(5))
    made = nn.LSTM(8, hidden_size=8)(1e4 * torch.randn(20, 8))[0]
    assert made.abs().max() <= 1


# --- the clinic ----------------------------------------------------------------------------------


def test_what_the_patients_show(base):
    records = lesson.clinic(base, peftlab.tasks.load("letters", skill="sort"), steps=2)
    first, last = (records[records.step == step].set_index("patient") for step in (1, 2))
    gradients, fault = first[["gradient table", "gradient network"]].isna(), lesson.CLINIC.right
    by = {name: letter for letter, name in fault.items()}
    assert gradients.loc[by["outside"]].all() and not gradients.loc["sound"].any()
    assert gradients.loc[by["table"]].tolist() == [True, False]
    assert (
        last.loc[by["optimiser"], "moved network"] == 0 < last.loc[by["optimiser"], "moved table"]
    )
    assert (last.twice > 0.01).to_dict() == {name: name == by["dropout"] for name in last.index}


# --- PEFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "MLP"])
def test_the_peft_cell(base, kind, tmp_path):
    """Our network in PEFT's place gives our logits, and what PEFT stores is the prompt alone."""
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_reparameterization_type=kind
    )
    theirs = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    inside = theirs.prompt_encoder["default"]
    assert inside.embedding.weight.std().item() == pytest.approx(1, abs=0.05)
    batch = base.tokenizer(
        [" the old mill near the garden", " the old"], return_tensors="pt", padding=True,
        padding_side="right",
    )  # fmt: skip
    ids, mask = batch["input_ids"], batch["attention_mask"]
    method = peftlab.PTuning(20, encoder=kind.lower(), sizes="peft")
    with peftlab.attach(base, method, seed=0) as tuned, torch.no_grad():
        moved = {}
        for key, tensor in tuned.sources["p_tuning"].module.state_dict().items():
            key = key.replace("table", "embedding.weight").replace("mix.", "lstm_head.")
            moved[key.replace("mlp.", "mlp_head.")] = tensor
        inside.load_state_dict(moved)
        wanted = theirs(input_ids=ids, attention_mask=mask).logits[:, 20:]
        off = (tuned(ids, mask) - wanted)[mask.bool()].abs().max()
        assert off <= BOUND * wanted.abs().max()
        assert sum(p.numel() for p in inside.parameters()) == tuned.count().parameters
    theirs.save_pretrained(tmp_path)
    stored = peft.get_peft_model_state_dict(theirs)
    assert [tuple(tensor.shape) for tensor in stored.values()] == [(20, base.anatomy.shape.d_model)]
    with pytest.raises(ValueError, match="trainable"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path, is_trainable=True)
    with peftlab.attach(base, tmp_path) as loaded:
        assert loaded.count().parameters == 20 * base.anatomy.shape.d_model


def test_what_the_text_says_of_pefts_config(base):
    fields = peft.PromptEncoderConfig.__dataclass_fields__
    assert fields["encoder_reparameterization_type"].default == "MLP"
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_num_layers=3, encoder_dropout=0.5
    )
    with pytest.warns(UserWarning, match="encoder_num_layers"):
        theirs = peft.get_peft_model(copy.deepcopy(base.model), config)
    head = theirs.prompt_encoder["default"].mlp_head
    assert [type(part) for part in head].count(nn.Linear) == 3
    assert not any(isinstance(part, nn.Dropout) for part in head)
    assert head[0].out_features == base.anatomy.shape.d_model


def test_the_lesson_names_no_claim_and_links_to_the_next():
    path = data_path().parent / "notebooks" / "03_p_tuning.ipynb"
    text = json.dumps([cell.source for cell in nbformat.read(path, as_version=4).cells])
    assert "04_prefix_tuning.ipynb" in text and "assert " not in text
