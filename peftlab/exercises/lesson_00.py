"""Lesson 00: three warm-ups on frozen models, and two predictions."""

import json

import torch
from torch import nn

from peftlab.accounting import percent
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.exercises import exercise, expect, question
from peftlab.exercises.forms import a_number, a_tensor, unlike
from peftlab.methods import LoRA
from peftlab.tasks import load as load_task
from peftlab.training import train
from peftlab.tuned import attach


# --- 1 · bit for bit ---------------------------------------------------------------------------
def changed_tensors(before, model):
    return [name for name, now in model.state_dict().items() if not torch.equal(now, before[name])]


def _close_enough(before, model):
    state = model.state_dict()
    return [name for name in state if not torch.allclose(state[name], before[name])]


def _parameters_only(before, model):
    return [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]


def _by_sum(before, model):
    state = model.state_dict()
    return [name for name in state if state[name].sum() != before[name].sum()]


def _the_unchanged(before, model):
    changed = changed_tensors(before, model)
    return [name for name in before if name not in changed]


def _miscounted(given, right):
    change = next(i for i in range(4) if given[i] != right[i])
    so_far = "nothing has changed yet" if change == 0 else f"{', '.join(right[change])} changed"
    return f"{so_far}, and you name {', '.join(given[change]) or 'nothing'}"


def _wrong_first_at(change):
    return lambda given, right: given[:change] == right[:change] and given[change] != right[change]


@exercise(
    "Is it still the same model?", solution=changed_tensors, difficulty=2, importance=5, minutes=5,
    hints=(
        "`model.state_dict()` names every tensor of a model, buffers included.",
        "`torch.equal(a, b)` is true only if every single number is the same."),
    mistakes=(
        (_the_unchanged, "nothing has changed yet and you name every tensor: these are the "
         "unchanged ones"),
        (_by_sum, "two rows changed places, and you missed it: other numbers can have the same "
         "sum", _wrong_first_at(1)),
        (_close_enough, "one weight changed by a millionth of itself, and you missed it: close is "
         "not the same", _wrong_first_at(2)),
        (_parameters_only, "a running mean changed, and you missed it. It is a buffer: no "
         "parameter, but part of what the model computes", _wrong_first_at(3))),
    otherwise=_miscounted, praise="every tensor is compared, bit for bit",
)  # fmt: skip
def same_model(answer):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.arange(8.0).view(2, 4))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        named = [answer(before, model)]
        model[2].weight.copy_(before["2.weight"].flip(0))
        named.append(answer(before, model))
        model[0].weight[0, 0] *= 1 + 1e-6
        named.append(answer(before, model))
        model[1].running_mean += 0.5
        named.append(answer(before, model))
    for names in named:
        words = f"return a list of names; yours is a {type(names).__name__}"
        expect(isinstance(names, (list, tuple, set)), words)
        expect(all(isinstance(name, str) for name in names), "your list has more than names in it")
    return [sorted(names) for names in named]


# --- 2 · two roads -----------------------------------------------------------------------------
def two_roads(x, W, A, B):
    return x @ W.T + (x @ A.T) @ B.T


@exercise(
    "Two roads", solution=two_roads, difficulty=1, importance=5, minutes=4,
    hints=(
        "x comes as rows, one for each token: W x on paper is x @ W.T in code.",
        "The second road has two steps. x @ A.T makes one number a token; then comes B.",
        "h has d_out numbers a token on both roads, so you can add them."),
    mistakes=(
        (lambda x, W, A, B: x @ W.T, "that is W x alone: the road through A and B is missing"),
        (lambda x, W, A, B: (x @ A.T) @ B.T, "that is B A x alone: you left out W x"),
        (lambda x, W, A, B: x @ W.T + x @ A.T,
         "you added A x, one number a token, to every output: B has to spread it first"),
        (lambda x, W, A, B: x @ W.T + B.T,
         "you added B itself: it has to be multiplied by A x, which differs from token to token"),
        (lambda x, W, A, B: x @ W.T - (x @ A.T) @ B.T, "you subtracted the change: it is added"),
        (lambda x, W, A, B: x @ W.T + x @ W.T @ B @ A,
         "the shapes do not fit. Perhaps the order is another: x goes through A first, then "
         "through B, and each product is x @ (matrix).T"),
        (lambda x, W, A, B: two_roads(x, W, A, B).T,
         "yours is transposed: one row for each token, as in x")),
    otherwise=unlike, again=(7, 4, 11), praise="both roads, added, for every token",
)  # fmt: skip
def small_road(answer, tokens=5, d_in=6, d_out=9):
    generator = torch.Generator().manual_seed(5)
    shapes = (tokens, d_in), (d_out, d_in), (1, d_in), (d_out, 1)
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return a_tensor(answer(*made))


# --- 3 · the trainable share -------------------------------------------------------------------
def trainable_percent(model):
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 100 * trained / sum(p.numel() for p in model.parameters())


def _tensors(model):
    parameters = list(model.parameters())
    return 100 * sum(p.requires_grad for p in parameters) / len(parameters)


def _of_frozen(model):
    share = trainable_percent(model)
    return 100 * share / (100 - share)


@exercise(
    "How much of a model trains?", solution=trainable_percent,
    difficulty=1, importance=4, minutes=3,
    hints=(
        "`model.parameters()` gives tensors; `p.numel()` is how many numbers one holds.",
        "A parameter trains if `p.requires_grad` is true."),
    mistakes=(
        (lambda model: trainable_percent(model) / 100,
         "{given:.3f} is a fraction; for a percentage, multiply by 100"),
        (_tensors,
         "{given:.1f}% is the share of the tensors, large and small alike. Count their numbers"),
        (_of_frozen, "you divided by the frozen ones; divide by all"),
        (lambda model: 100 - trainable_percent(model),
         "{given:.1f}% is the frozen share; take the other one")),
    otherwise="420 of 1,660 numbers train, {right:.2f}%; yours says {given:.2f}%",
    praise="{right:.2f}% of this little network trains",
)  # fmt: skip
def share_that_trains(answer):
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 10, bias=False), nn.LayerNorm(10))
    model[0].requires_grad_(False)  # 1,240 numbers frozen, 400 and 20 train
    return a_number(answer(model))


# --- predict first -----------------------------------------------------------------------------
@question(
    "LoRA with rank 8 on the query and value projections trains "
    f"{percent(LoRA(r=8), 'llama-3-8b'):.2f}% of Llama-3-8B and {percent(LoRA(r=8), 'gpt2'):.2f}% "
    "of GPT-2. Which share of tiny-gpt is it?",
    {
        "a": ("about the same as of GPT-2", "The share depends on the width: LoRA grows with the "
              "width, the base with its square."),
        "b": ("more than twice as large a share", "A narrow base has few numbers of its own, and "
              "the adapter stands out among them."),
        "c": ("less than half of it, since the model is small", "Both shrink, but the base shrinks "
              "faster: its matrices have the width squared.")},
)  # fmt: skip
def predict_share():
    shares = {name: percent(LoRA(r=8), name) for name in ("llama-3-8b", "gpt2", "tiny-gpt")}
    times = shares["tiny-gpt"] / shares["gpt2"]
    right = "b" if times > 2 else "c" if times < 0.5 else "a"
    return right, ", ".join(f"{name} {share:.2g}%" for name, share in shares.items()) + "."


@question(
    "The base is frozen and LoRA trains beside it, at a high learning rate. How well does the "
    "model then predict the text that it was pre-trained on?",
    {
        "a": ("as well as before: what is frozen cannot forget", "The weights are safe. What you "
              "run is base plus adapter: another function."),
        "b": ("worse while the adapter is on, and exactly as before once it is off", "Freezing "
              "protects the base, not the sum of base and adapter."),
        "c": ("worse, and it stays worse after the adapter is off", "Detaching gives the base back "
              "bit for bit: nothing in it was ever written to.")},
)  # fmt: skip
def predict_forgetting():
    base, task = load("tiny-gpt"), load_task("sentiment")
    people = json.loads(data_path("world", "world.json").read_text(encoding="utf-8"))["people"][:16]
    texts = [f"Q: Where does {p['name']} live?\nA: {p['home']}" for p in people]
    before = base.loss(texts)
    with attach(base, LoRA()) as tuned:
        train(
            tuned, task, steps=12, lr=1e-2, batch_size=8, warmup=2, progress=False, evaluate=False
        )
        on = tuned.loss(texts)
    off = base.loss(texts)
    right = "a" if abs(on - before) < 0.01 else "b" if off == before else "c"
    words = "the same number" if off == before else f"{off:.2f}"
    return (
        right,
        f"Loss on {len(texts)} old texts: {before:.1f} before, {on:.1f} with it, {words} without.",
    )
