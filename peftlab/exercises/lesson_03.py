"""Lesson 03, P-tuning: the encoder, a step through it, chance, places, and a fault."""

from itertools import combinations

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from peftlab.accounting import count, stored
from peftlab.bases.shapes import Shape
from peftlab.exercises import after, exercise, question
from peftlab.exercises.clinic import Ward, course
from peftlab.exercises.forms import a_number, a_tensor, same, unlike
from peftlab.methods import PTuning
from peftlab.methods.prompt_networks import PromptEncoder
from peftlab.tuned import attach


# --- 1 · write the encoder -----------------------------------------------------------------------
def encode(table, lstm, first, second):
    outputs, _ = lstm(table[None])  # 1 P 2h: the virtual tokens are one sequence
    return second(torch.relu(first(outputs[0])))  # P d


def _last_state(table, lstm, first, second):
    outputs, _ = lstm(table[None])
    return second(torch.relu(first(outputs[:, -1].expand(len(table), -1))))


@exercise(
    "Write the encoder", solution=encode, difficulty=2, importance=5, minutes=10,
    hints=(
        "The virtual tokens are one sequence: a batch of one, P long. `table[None]` has that "
        "shape.",
        "`lstm(x)` returns two things. The first holds an output for every place, both directions "
        "side by side.",
        "Between the two linear layers there is a ReLU, and nothing behind the second: a prompt "
        "needs negative numbers too."),
    mistakes=(
        (lambda table, lstm, first, second: second(first(lstm(table[None])[0][0])),
         "there is no ReLU between the linear layers: the MLP is linear"),
        (after(encode, torch.relu), "with a ReLU at the end a prompt cannot be negative anywhere"),
        (lambda Z, lstm, first, second: second(torch.relu(first(lstm(Z[:, None])[0][:, 0]))),
         "each virtual token is a sequence of its own: you put them on the batch axis, so no one "
         "sees its neighbours. Check batch_first"),
        (_last_state, "every virtual token is the same row: you took one state for all. The LSTM "
         "has an output for each place"),
        (lambda table, lstm, first, second: second(torch.relu(first(table))),
         "another LSTM makes the same prompt: the table did not go through the LSTM",
         lambda given, right: given[1])),
    otherwise=lambda given, right: f"{unlike(given[0], right[0])}. Is the order LSTM, linear, "
        "ReLU, linear?",
    again=(7, 10), praise="table, LSTM, linear, ReLU, linear: P = g(Z)",
)  # fmt: skip
def write_the_encoder(answer, P=5, d=6):
    """The prompt, and whether another LSTM makes the same."""
    table = torch.randn(P, d)
    lstm, other = (nn.LSTM(d, d // 2, 2, bidirectional=True, batch_first=True) for _ in range(2))
    first, second = nn.Linear(d, d), nn.Linear(d, d)
    words = f"{P} virtual tokens, and no batch of one any more: the shape"
    given = a_tensor(answer(table, lstm, first, second), (P, d), words)
    return given, same(given, a_tensor(answer(table, other, first, second)))


# --- 2 · a step on W moves P ---------------------------------------------------------------------
def step_through(H, G, lr):
    of_W = H.T @ G  # h d: the gradient of W
    return -lr * H @ of_W  # P d


@exercise(
    "How far does P move?", solution=step_through, difficulty=2, importance=5, minutes=5,
    hints=(
        "First find the gradient of W from G. The formula is above, and its shape is that of W.",
        "W moves by the learning rate times its gradient, against it. What does that do to H W?"),
    mistakes=(
        (lambda H, G, lr: lr * H @ H.T @ G,
         "P moves the wrong way: gradient descent goes against the gradient"),
        (lambda H, G, lr: -lr * G, "that is a step on P itself: each row moves by its own gradient "
         "and by no other's. Here W moves"),
        (lambda H, G, lr: -lr * H.T @ G,
         "that is how far W moves, (h, d). P = H W moves by H times that"),
        (lambda H, G, lr: -H @ H.T @ G, "the learning rate is missing"),
        (lambda H, G, lr: -lr * H @ H.T, "H Hᵀ is what mixes the rows. Now let it mix the "
         "gradients: multiply it by G")),
    otherwise=unlike, again=(7, 6, 3),
    praise="each row of the step is a mixture of all rows of G, and H Hᵀ is the recipe",
)  # fmt: skip
def move_the_rows(answer, P=5, h=4, d=3, lr=0.5):
    generator = torch.Generator().manual_seed(0)
    H, G = (torch.randn(P, n, generator=generator) for n in (h, d))
    return a_tensor(answer(H, G, lr))


# --- 3 · told apart, or chance? ------------------------------------------------------------------
def p_value(a, b):
    scores = [*a, *b]
    n, total = len(a), sum(scores)

    def gap(group):  # between the mean of a group and the mean of the others
        return abs(sum(group) / n - (total - sum(group)) / (len(scores) - n))

    gaps = [gap(group) for group in combinations(scores, n)]
    return sum(g >= gap(a) - 1e-9 for g in gaps) / len(gaps)


def _splits(a, b, counts, most=None):
    """The share of splits for which counts(gap of the split, gap of a and b), gaps with a sign."""
    scores, n = [*a, *b], len(a)

    def gap(group):
        return sum(group) / n - (sum(scores) - sum(group)) / (len(scores) - n)

    found = [counts(gap(group), gap(a)) for group in combinations(scores, n)]
    return sum(found) / (most or len(found))


@exercise(
    "Could it be chance?", solution=p_value, difficulty=3, importance=5, minutes=10,
    hints=(
        "`itertools.combinations(scores, n)` gives every way to take n of the scores. What is left "
        "is the other group.",
        "For each split: the mean of one group minus the mean of the other, without its sign.",
        "Count the splits whose difference is at least that of a and b, and divide by all splits. "
        "The split into a and b is one of them, so the share is never zero."),
    mistakes=(
        (lambda a, b: _splits(a, b, lambda g, seen: g >= seen - 1e-9),
         "you counted the splits in one direction. Without knowing which is better, a difference "
         "the other way round would have surprised you as much: compare without the sign"),
        (lambda a, b: _splits(a, b, lambda g, seen: abs(g) > abs(seen) + 1e-9),
         "you left out the splits that are exactly as far apart as a and b. Ours is one of them"),
        (lambda a, b: _splits(a, b, lambda g, seen: abs(g) >= abs(seen) - 1e-9, most=1),
         "that is how many splits there are; divide by the number of all splits"),
        (lambda a, b: 1 - p_value(a, b), "that is the share of the splits that lie closer"),
        (lambda a, b: p_value(a, b) + 1e-3,
         "near, but not it. Did you draw splits at random? Here there are few enough to take all",
         lambda given, right: abs(given - right) < 0.06)),
    otherwise=lambda given, right: f"the share should be {right:.3f}; yours is {given:.3f}",
    again=(2, 6), praise="the share of all splits that are at least as far apart",
)  # fmt: skip
def chance(answer, n=4, m=4):
    generator = torch.Generator().manual_seed(35)
    scores = torch.randint(40, 73, (n + m,), generator=generator) / 64
    scores[:n] += 0.25  # 64ths: their sums are exact, and so are the means
    return a_number(answer(scores[:n].tolist(), scores[n:].tolist()))


# --- 4 · place the prompt ------------------------------------------------------------------------
def place(prompt, embedded, masks):
    half = len(prompt) // 2
    rows = [
        torch.cat([prompt[:half], row[:at], prompt[half:], row[at:]])
        for row, at in zip(embedded, masks.tolist(), strict=True)
    ]
    return torch.stack(rows)


@exercise(
    "Place the prompt", solution=place, difficulty=3, importance=4, minutes=10,
    hints=(
        "Names have different lengths, so the mask stands elsewhere in each row: do one row at a "
        "time.",
        "A row is four pieces in order: half of the prompt, the text up to the mask, the other "
        "half, the mask and the rest."),
    mistakes=(
        (lambda prompt, x, masks: torch.cat([prompt.expand(len(x), -1, -1), x], dim=1),
         "the virtual tokens are all in front: the second half belongs to the mask"),
        (lambda prompt, x, masks: place(prompt, x, masks[:1].expand(len(masks))), "right for the "
         "first row; in the others the block stands where the first row's mask is. Every row has a "
         "place of its own"),
        (lambda prompt, x, masks: place(prompt, x, masks + 1),
         "your second block stands behind the mask. It belongs right before it"),
        (lambda prompt, x, masks: place(prompt, x, masks - len(prompt) // 2), "the first half has "
         "moved the mask along, and you counted its place from the start of the longer row"),
        (lambda prompt, x, masks: place(prompt[: len(prompt) // 2].repeat(2, 1), x, masks),
         "you put the same half twice: the first half belongs in front, the other later")),
    otherwise=unlike,
    praise="two rows, two places, each with all virtual tokens", again=(8, 9, (7, 3)),
)  # fmt: skip
def place_the_prompt(answer, P=4, T=6, masks=(2, 4)):
    generator = torch.Generator().manual_seed(0)
    prompt, embedded = (torch.randn(*s, generator=generator) for s in ((P, 3), (2, T, 3)))
    given = answer(prompt, embedded, torch.tensor(masks))
    return a_tensor(given, (2, P + T, 3), f"each row of {T} gets {P} more vectors: the shape")


# --- 5 · debug the broken adapter ----------------------------------------------------------------
CLINIC = Ward({
    "outside": ("B", "the encoder was run once, before the loop, and its output kept",
        "It has no gradient anywhere, in the table or the network: the path from the loss ends at "
        "a prompt that was made before"),
    "optimiser": ("D", "the optimiser was given the table and not the network",
        "It has both gradients, and only the table moves: nobody steps the network"),
    "table": ("A", "the table is frozen",
        "It has a gradient in the network and none in the table"),
    "dropout": ("C", "dropout in the encoder stays on when the prompt is used",
        "It moves in both parts, but makes two different prompts in evaluation"),
})  # fmt: skip


def clinic(base, task, steps: int = 8, lr: float = 3e-3, seed: int = 0) -> pd.DataFrame:
    """Train one sound P-tuning and the four patients A to D, and write down what can be seen.

    One row a step: patient, step, loss, and for the table and for the network the length of the
    gradient (NaN: there is none) and how far they have moved; `twice` is how much the prompt
    differs when it is made twice in evaluation.
    """
    return CLINIC.examine(lambda fault: _examine(fault, base, task, steps, lr, seed))


def _examine(fault, base, task, steps, lr, seed):
    method = PTuning(8, init="normal")
    with attach(base, method, seed=seed) as tuned:
        source = tuned.sources[method.name]
        encoder = source.module
        parts = {"{} table": [encoder.table], "{} network": [*encoder.mix.parameters()]}
        if fault == "outside":
            source.instead = {k: v.detach() for k, v in encoder().items()}
        if fault == "table":
            encoder.table.requires_grad_(False)
        if fault == "dropout":
            encoder.mlp.register_forward_hook(lambda _, __, made: F.dropout(made, 0.3))
        given = [encoder.table] if fault == "optimiser" else [*encoder.parameters()]
        optimiser = torch.optim.AdamW(given, lr=lr, weight_decay=0.0)

        def loss_of(examples):
            encoder.zero_grad()
            return tuned.batch_loss(task.batch_for(tuned, examples))

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            rows = [*course(parts, optimiser, loss_of, task, steps, 16, seed)]
            tuned.train(False)
            with torch.no_grad():
                made = [source.now()["prompt"] for _ in range(2)]
                rows[-1]["twice"] = (made[0] - made[1]).abs().max().item()
    return rows


diagnose = CLINIC.exercise(
    "diagnose", "Debug the broken adapter",
    confused=("AB", "BD", "CD"), unknown="too few virtual tokens",
    difficulty=3, importance=5, minutes=10,
    hints=(
        "Ask first whether there is a gradient, in the table and in the network.",
        "A gradient that nobody uses moves nothing. Compare the two columns that moved."),
)  # fmt: skip


# --- predict first -------------------------------------------------------------------------------
def _encoder(kind: str) -> PromptEncoder:
    torch.manual_seed(0)
    return PromptEncoder(torch.randn(6, 16), kind, "lama", 8 if kind == "lstm" else 16, 2)


@question(
    "The prompt is made by an MLP, each virtual token alone: row i of P from row i of Z. A step of "
    "gradient descent is taken to change row 1 of P, and no other. Which rows of P change?",
    {
        "a": ("row 1 alone", "Row 1 of the table is its own. The network is not: every row goes "
              "through the same weights, and they moved."),
        "b": ("all of them", "They share the network's weights, and those moved."),
        "c": ("row 1 and its neighbours", "An MLP knows no neighbours; what they share is the "
              "weights, and all rows share them.")},
)  # fmt: skip
def predict_rows():
    encoder = _encoder("mlp")
    before = encoder()["prompt"]
    before[1].sum().backward()
    with torch.no_grad():
        for tensor in encoder.parameters():
            tensor -= 0.01 * tensor.grad
        moved = (encoder()["prompt"] - before).norm(dim=1)
    rows = [i for i, m in enumerate(moved.tolist()) if m > 1e-6]
    right = {1: "a", 3: "c", len(moved): "b"}[len(rows)]
    return right, (
        f"Measured on six rows: {len(rows)} of {len(moved)} moved, row 1 by {moved[1]:.3f}, the "
        f"others by {moved[[0, 2, 3, 4, 5]].min():.3f} to {moved[[0, 2, 3, 4, 5]].max():.3f}."
    )


@question(
    "P-tuning with 20 virtual tokens on GPT-2, with the LSTM encoder as a library builds it. How "
    "many numbers train, and how many are stored?",
    {
        "a": ("15,360 train, 15,360 are stored", "That is prompt tuning. The encoder's weights "
              "train as well."),
        "b": ("27,174,144 train, 27,174,144 are stored", "Nobody needs the encoder after training: "
              "its output is always the same."),
        "c": ("27,174,144 train, 15,360 are stored", "The encoder is thrown away."),
        "d": ("15,360 train, 27,174,144 are stored", "Turn it round: what is large here is what "
              "trains.")},
)  # fmt: skip
def predict_count():
    method = PTuning(20, sizes="peft")
    number = {"trained": count(method, "gpt2"), "stored": stored(method, "gpt2")}
    flat = 20 * Shape.named("gpt2").d_model
    right = {
        (False, False): "a", (True, True): "b", (True, False): "c", (False, True): "d",
    }[number["trained"] > flat, number["stored"] > flat]  # fmt: skip
    return right, f"{number['trained']:,} train and {number['stored']:,} are stored."
