"""What lesson 02 says of prompt tuning holds: its drawings, its grids, its nearest tokens, PEFT.

Tolerances. u is float32's unit roundoff, 2⁻²⁴. A softmax and a sum over n terms err by about n u
times the largest number; the bound below is 100 times that for n of at most 64.
"""

import copy

import peft
import pytest
import torch
from drawn import readable
from torch.nn import functional as F
from transformers import TrainingArguments

import peftlab
from peftlab import figures
from peftlab.bases import probes
from peftlab.exercises import lesson_02 as lesson
from peftlab.experiments import sweep_prompt, sweep_soft
from peftlab.figures.style import COLOURS

BOUND = 100 * 64 * 2**-24
WORDS = " the old mill near the garden"
BY_HAND = ["virtual 1", "virtual 2", "the", "old", "mill"], [8, 16, 2, 2, 4]
ROWS = [("sort", "in: b a ⏎ out:", "a b"), ("sentiment", "It was good. ⏎ In the end:", "great")] * 2


@pytest.fixture(scope="module")
def base():
    return peftlab.load("tiny-gpt")


@pytest.fixture(scope="module")
def lab():
    return sweep_soft.read("lab")[1]


# --- drawings ----------------------------------------------------------------------------------


def drawings(base, dark):
    tokens = [base.tokenizer.decode([i]) for i in base.tokenizer(WORDS).input_ids]
    with peftlab.attach(base, peftlab.PromptTuning(3)) as tuned:
        layers = figures.prompt_layers(tuned, tokens, dark)
    return {
        "layers": layers,
        "strips": figures.share_strips(*BY_HAND, 2, dark),
        "rows": figures.rows_with_prompts(ROWS, 20, dark),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_drawings_can_be_read(base, dark):
    readable(drawings(base, dark))


def test_the_drawing_of_the_layers_has_what_is_attached(base):
    shape = base.anatomy.shape
    title = drawings(base, False)["layers"].layout.title.text
    assert title.startswith(f"3 × {shape.d_model} numbers train")
    assert f"{shape.layers} frozen layers" in title
    for method in (peftlab.PromptTuning(20), peftlab.PrefixTuning(3)):
        with (
            peftlab.attach(base, method) as tuned,
            pytest.raises(ValueError, match=r"PromptTuning\(3\)"),
        ):
            figures.prompt_layers(tuned, ["the"])


def test_a_strip_is_cut_to_scale():
    figure = figures.share_strips(*BY_HAND, 2)
    boxes = [s for s in figure.layout.shapes if s.type == "rect"]
    parts = [[box.x1 - box.x0 for box in boxes[i:j]] for i, j in ((0, 3), (3, 8))]
    assert sum(parts[0]) == pytest.approx(sum(parts[1]))
    for part, weights in zip(parts, (BY_HAND[1][2:], BY_HAND[1]), strict=True):
        shares = [w / sum(weights) for w in weights]
        assert [p / sum(part) for p in part] == pytest.approx(shares)
    assert figure.layout.title.text.startswith("The prompt takes 75%")


def test_a_batch_shows_each_rows_prompt_text_and_answer():
    figure = figures.rows_with_prompts(ROWS, 20)
    texts = [note.text for note in figure.layout.annotations if note.text]
    for prompt, text, answer in ROWS:
        assert f"<b>P</b> {prompt}" in texts and text in texts and answer in texts
    fills = [s.fillcolor for s in figure.layout.shapes if s.type == "rect"]
    assert fills[0] == fills[4] == COLOURS["prompt_tuning"] != fills[2] == fills[6]


def test_results_carry_every_run(lab):
    runs = lab[lab.label.isin(["prompt, zero", "prompt, random"])]
    figure = figures.seeds_by_rate(runs, "label", "t")
    assert sum(len(trace.x) for trace in figure.data) == len(runs)
    assert {note.text for note in figure.layout.annotations} == {
        "<b>prompt, zero</b>", "<b>prompt, random</b>"
    }  # fmt: skip
    shares = figures.share_by_layer({"a": [[0.1, 0.2], [0.3, 0.4]], "b": [[0.5, 0.6]]}, 0.7, "t")
    points, means = shares.data[0::2], shares.data[1::2]
    assert list(points[0].y) == [0.1, 0.2, 0.3, 0.4] and list(points[0].x) == [1, 2, 1, 2]
    assert list(means[0].y) == pytest.approx([0.2, 0.3])
    assert shares.layout.shapes[0].y0 == 0.7


# --- the share -----------------------------------------------------------------------------------


def test_the_share_of_a_prompt_in_a_real_head(base):
    """In layer 1 a prompt leaves the words' proportions; in layer 2 it does not."""
    P = 3
    with peftlab.attach(base, peftlab.PromptTuning(P), seed=0) as tuned, torch.no_grad():
        seen = probes.attention_map(tuned, WORDS)
    T = len(seen.tokens)
    ids = base.tokenizer([WORDS], return_tensors="pt").input_ids
    positions = torch.arange(P, P + T)[None]
    with (
        torch.no_grad(),
        peftlab.attention.recorded(base.model, base.anatomy.attentions) as records,
    ):
        base.model(input_ids=ids, position_ids=positions)
    apart = []
    for name in list(seen.records)[:2]:
        words = seen.weights(name)[:, P:, P:]
        words = words / words.sum(-1, keepdim=True)
        apart.append((words - records[name].weights[0]).abs().max().item())
        virtual = seen.weights(name)[:, :P]
        assert (virtual[..., P:] == 0).all()  # a virtual token never reads the text
    assert apart[0] <= BOUND < 0.01 < apart[1]


# --- the grids -----------------------------------------------------------------------------------


def exact(lab, label):
    return lab[lab.label == label].groupby("lr").exact.agg(["min", "max"])


def test_what_the_text_reads_in_the_grid_of_starts(lab):
    starts = ["vocabulary", "text", "random", "normal", "zero"]
    assert max(exact(lab, f"prompt, {start}")["max"][1e-3] for start in starts) < 0.05
    draws = lab[lab.label == "prompt, random"].pivot(index="lr", columns="seed", values="exact")
    assert draws[0].max() == 0.65 and draws[[1, 2]].loc[0.029:].min().min() > 0.95
    zero = exact(lab, "prompt, zero")["min"]
    assert zero.loc[0.009:].min() > 0.95 and zero.loc[:0.004].max() < 0.1
    tokens = exact(lab, "prompt, vocabulary")["min"]
    assert tokens.loc[0.029:0.11].min() > 0.95 and tokens.loc[0.29:].max() < 0.9


def test_what_the_text_reads_in_the_grid_of_lengths(lab):
    labels = {1: "prompt, P = 1", 5: "prompt, P = 5", 20: "prompt, vocabulary"}
    labels |= {50: "prompt, P = 50", 100: "prompt, P = 100"}
    found = {P: exact(lab, label).loc[0.009:] for P, label in labels.items()}
    assert {len(table) for table in found.values()} == {5}
    assert [(table["min"] > 0.9).sum() for table in found.values()] == [0, 1, 2, 3, 4]
    assert found[1]["max"].max() < 0.5
    at = found[50].loc[[0.1, 0.3]]
    assert at["min"].tolist() == [0, pytest.approx(0.92, abs=0.01)] and at["max"].iloc[0] == 1


def test_the_random_draws_are_alike_in_length(base):
    lengths = []
    for seed in range(3):
        with peftlab.attach(base, peftlab.PromptTuning(20, init="random"), seed=seed) as tuned:
            lengths.append(tuned.prompt.detach().norm(dim=1).mean().item())
    assert max(lengths) / min(lengths) < 1.02


def test_what_the_text_reads_in_the_runs_on_sentiment():
    runs = sweep_prompt.read()[1].query("task == 'sentiment' and length == 20")
    tokens = runs.query("init == 'vocabulary'")
    slow = tokens.query("lr == 3e-4 and steps == 2400").loss_last
    assert slow.min() > tokens.query("lr == 0.1 and steps == 200").loss_last.max()
    better = []
    for rate in (0.01, 0.03, 0.1, 0.3, 1.0):
        at = runs[(runs.steps == 200) & (runs.lr == rate)].groupby("init").accuracy
        better.append(at.min()["text"] > at.max()["vocabulary"])
        assert at.min()["vocabulary"] < at.max()["text"]
    assert better == [False, True, True, False, False]


# --- the reach -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [3e-4, 0.1])
def test_no_number_goes_much_further_than_its_reach(base, rate):
    task = peftlab.tasks.load("letters", skill="sort")
    with peftlab.attach(base, peftlab.PromptTuning(4), seed=0) as tuned:
        start = tuned.prompt.detach().clone()
        run = peftlab.train(
            tuned, task, 12, lr=rate, warmup=2, batch_size=2, progress=False, evaluate=False
        )
        most = (tuned.prompt.detach() - start).abs().max().item()
    reach = run.history.lr.sum()
    assert reach == pytest.approx(rate * 12 / 2, rel=0.25)
    assert 0.3 * reach < most < 1.2 * reach


# --- nearest tokens ------------------------------------------------------------------------------


def test_the_exercise_names_the_tokens_that_the_probe_names(base):
    table = base.anatomy.embedding.weight.detach()
    prompt = torch.randn(4, table.shape[1], generator=torch.Generator().manual_seed(0))
    ids = lesson.nearest(prompt, table[: len(base.tokenizer)], 3)
    words = [[base.tokenizer.decode([i]) for i in row] for row in ids.tolist()]
    assert words == [[w for w, _ in row] for row in probes.nearest_tokens(prompt, base, 3)]


# --- PEFT ----------------------------------------------------------------------------------------


def test_the_peft_cell(base):
    """Our prompt in PEFT's table gives our logits, unless the padding is on the left."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    theirs = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    inside = theirs.prompt_encoder["default"].embedding.weight
    tokens = base.anatomy.embedding.weight
    assert inside.std().item() == pytest.approx(1, abs=0.05)  # whatever the tokens are
    assert 3.5 < (inside.norm(dim=1).mean() / tokens.norm(dim=1).mean()).item() < 4.5
    off, largest = {}, {}
    with peftlab.attach(base, peftlab.PromptTuning(20), seed=0) as tuned, torch.no_grad():
        inside.data.copy_(tuned.prompt)
        for side in ("right", "left"):
            given = base.tokenizer(
                [WORDS, " the old"], return_tensors="pt", padding=True, padding_side=side
            )
            ids, mask = given["input_ids"], given["attention_mask"]
            wanted = theirs(input_ids=ids, attention_mask=mask).logits[:, 20:]
            off[side] = (tuned(ids, mask) - wanted)[mask.bool()].abs().max().item()
            largest[side] = wanted.abs().max().item()
    assert off["right"] <= BOUND * largest["right"]
    assert off["left"] > 0.05 * largest["left"]


def test_what_the_text_says_of_peft_and_the_trainer():
    fields = peft.PromptTuningConfig.__dataclass_fields__
    assert {"prompt_tuning_init_text", "tokenizer_name_or_path"} <= set(fields)
    assert "init_text" not in fields
    assert fields["prompt_tuning_init"].default == peft.PromptTuningInit.RANDOM
    assert "SAMPLE_VOCAB" in peft.PromptTuningInit.__members__
    assert TrainingArguments.__dataclass_fields__["learning_rate"].default == 5e-5


def test_cosines_do_not_see_lengths(base):
    """A nearest token stays the nearest when the vector grows, as trained ones do."""
    table = base.anatomy.embedding.weight.detach()
    vectors = torch.randn(5, table.shape[1], generator=torch.Generator().manual_seed(1))
    assert lesson.nearest(vectors, table, 3).equal(lesson.nearest(4 * vectors, 2 * table, 3))
    directions = F.normalize(table, dim=1)
    assert lesson.nearest(vectors, table, 1).flatten().equal((vectors @ directions.T).argmax(1))
