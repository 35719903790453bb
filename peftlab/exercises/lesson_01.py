"""Lesson 01, full fine-tuning: gradients of a linear layer and what they need, a step of Adam,
what a block keeps, four leaks."""

import math
from functools import lru_cache

import pandas as pd
import torch
from torch import nn

from peftlab.accounting import training_bytes
from peftlab.exercises import after, exercise, expect, question
from peftlab.exercises.clinic import Ward
from peftlab.exercises.forms import a_count, same, several, unlike
from peftlab.memory import Live, predict
from peftlab.methods import FullFineTuning, PromptTuning
from peftlab.panels.memory import memory_view


# --- predict first -----------------------------------------------------------------------------
@question(
    "Every parameter of Llama-3-8B trains, in float32 and with Adam. Activations apart, how many "
    "bytes does training hold?",
    {
        "a": ("32 GB", "Those are the weights alone. Each also has a gradient and Adam's moments."),
        "b": ("64 GB", "That is a weight and a gradient each. Adam remembers two more numbers."),
        "c": ("96 GB", "That has one moment a weight. Adam keeps a mean and a mean square."),
        "d": ("128 GB", "Four numbers a weight, four bytes each, and there are 8 billion of them."),
    },
)
def how_many_bytes():
    total = training_bytes(FullFineTuning(), "llama-3-8b").total
    guesses = {"a": 32e9, "b": 64e9, "c": 96e9, "d": 128e9}
    letter = min(guesses, key=lambda key: abs(guesses[key] - total))
    return letter, f"16 bytes × {total // 16:,} = {total / 1e9:.1f} GB."


@question(
    "GPT-2, 8 rows of 128 tokens. All of it is frozen, and only 20 vectors train that stand in "
    "front of the input: one number for every ten thousand of the model. Of the activations that "
    "the blocks keep when everything trains, they now keep:",
    {
        "a": ("less than 1%", "What trains is small. What a gradient passes on its way is not."),
        "b": ("about a tenth", "The gradient goes to the input, below the first block, and crosses "
              "all twelve."),
        "c": ("about seven tenths", "Frozen linear layers keep no inputs. All else is kept in "
              "every block, of 20 more tokens a row."),
        "d": ("all of them", "A linear layer that is frozen does not keep its input.")},
)  # fmt: skip
def what_a_prompt_keeps():
    full, prompt = (_in_blocks(m) for m in (FullFineTuning(), PromptTuning(20)))
    share = prompt / full
    guesses = {"a": 0.0, "b": 0.1, "c": 0.7, "d": 1.0}
    letter = min(guesses, key=lambda key: abs(guesses[key] - share))
    return letter, f"{prompt / 1e6:.0f} MB of {full / 1e6:.0f} MB: {share:.0%}."


@lru_cache
def _in_blocks(method) -> int:
    kept = predict(method, "gpt2", batch=8, length=128).parts["activations"]
    return sum(size for place, size in kept.items() if place.startswith("layers."))


@question(
    "You will read that full fine-tuning needs 7 times the memory of training 20 vectors in front "
    "of the input. GPT-2 trains on 64 rows of 512 tokens, in float32, without recomputing "
    "anything. How many times is it?",
    {
        "a": ("about 7 times", "That leaves out the activations, and counts the weights in 16 "
              "bits."),
        "b": ("about 4 times", "That is 16 bytes against 4: right, if there were no activations."),
        "c": ("1 to 1.5 times", "The activations of so many tokens are most of it in both."),
        "d": ("less than 1", "It would take more vectors than that: 20 beside 512 tokens are few."),
    },
)  # fmt: skip
def how_many_times():
    view = memory_view("gpt2", 64, 512)
    full, prompt = view.peak("Full fine-tuning"), view.peak("Prompt tuning")
    times = full / prompt
    letter = "d" if times < 1 else "c" if times <= 1.5 else "b" if times < 5.5 else "a"
    share = view.steps["Prompt tuning"].activations / prompt
    return letter, f"{times:.2f} times; {share:.0%} of the smaller one's bytes are activations."


# --- the gradients of a linear layer ------------------------------------------------------------
def linear_backward_solution(x, W, g):
    of_W = g.T @ x  # d_out d_in
    of_x = g @ W  # tokens d_in
    return of_W, of_x


def _layer(tokens=5, d_in=7, d_out=3):
    """x, W and g of a linear layer, with three sizes that differ."""
    draw = torch.Generator().manual_seed(tokens)
    shapes = (tokens, d_in), (d_out, d_in), (tokens, d_out)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def _autograd_of(*size):
    """Both gradients, as PyTorch's own backward pass has them."""
    x, W, g = _layer(*size)
    x.requires_grad_()
    W.requires_grad_()
    nn.functional.linear(x, W).backward(g)
    return W.grad, x.grad


def _of_either(given, right):
    which = 0 if not same(given[0], right[0]) else 1
    name = ("that of W", "that of x")[which]
    return f"{name} is another: {unlike(given[which], right[which])}"


@exercise(
    "The gradients of a linear layer", solution=linear_backward_solution,
    mistakes=(
        (after(linear_backward_solution, lambda W, x: (x, W)),
         "you return them in the other order: that of W comes first"),
        (after(linear_backward_solution, lambda W, x: (W.T, x)),
         "the gradient of W is transposed: it has the shape of W, (d_out, d_in)"),
        (lambda x, W, g: (g.T @ x / len(x), g @ W), "you took the mean over the tokens in that of "
         "W: each token adds its share, and g has the loss's own mean in it already"),
        (lambda x, W, g: (x.T @ x @ W.T, g @ W), "no g is in your gradient of W",
         lambda given, right: given[0].shape == right[0].T.shape),
        (lambda x, W, g: (g[:1].T @ x[:1], g @ W), "your gradient of W has one token in it: all "
         "of them used this W, so add up what each contributes"),
        (lambda x, W, g: (g.T @ x, g @ W / len(x)),
         "you divided that of x by the number of tokens: each token has a gradient of its own"),
        (lambda x, W, g: (g.T @ x, (x @ W.T) @ W), "your gradient of x is made of y: the gradient "
         "that arrives is g")),
    otherwise=_of_either, praise="gᵀ x and g W: the same as PyTorch's backward pass, at two sizes",
    right=_autograd_of, again=(9, 3, 11), difficulty=2, importance=5, minutes=6,
    hints=(
        "Each gradient has the shape of what it belongs to: W is (d_out, d_in), x (tokens, d_in).",
        "W[i, j] is multiplied by x[t, j] for every token t, and what comes out is weighed by "
        "g[t, i]. Add g[t, i] x[t, j] over the tokens.",
        "x[t, j] goes to every output i through W[i, j]. Add g[t, i] W[i, j] over the outputs."),
)  # fmt: skip
def linear_backward(answer, *size):
    """Both gradients of a layer; their shapes first."""
    x, W, g = _layer(*size)
    return tuple(several(answer(x, W, g), 2, "return two tensors: that of W, then that of x"))


# --- a step of Adam ----------------------------------------------------------------------------
def adam_step_solution(w, g, m, v, t, lr):
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g * g
    mean = m / (1 - 0.9**t)
    square = v / (1 - 0.999**t)
    return w - lr * mean / (square.sqrt() + 1e-8), m, v


def _rootless(w, g, m, v, t, lr):
    _, m, v = adam_step_solution(w, g, m, v, t, lr)
    return w - lr * m / (1 - 0.9**t) / (v / (1 - 0.999**t) + 1e-8), m, v


def _inside(w, g, m, v, t, lr):
    _, m, v = adam_step_solution(w, g, m, v, t, lr)
    return w - lr * m / (1 - 0.9**t) / (v / (1 - 0.999**t) + 1e-8).sqrt(), m, v


def _unsquared(w, g, m, v, t, lr):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.abs()
    return w - lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8), m, v


def _drawn(n=5, size=1.0):
    """A weight and three gradients, which are of this size."""
    generator = torch.Generator().manual_seed(1)
    w, *gradients = torch.randn(4, n, generator=generator, dtype=torch.float64)
    return w, *(size * gradient for gradient in gradients)


def _torch_adam(*size):
    """w, m and v after three steps of torch's own."""
    w, *gradients = _drawn(*size)
    w = nn.Parameter(w)
    optimizer = torch.optim.Adam([w], lr=0.1)
    for g in gradients:
        w.grad = g
        optimizer.step()
    return w.detach(), optimizer.state[w]["exp_avg"], optimizer.state[w]["exp_avg_sq"]


def _other_step(given, right):
    for name, a, b in zip(("m", "v"), given[1:], right[1:], strict=True):
        if not same(a, b):
            return f"after three steps {name} is another: {unlike(a, b)}"
    return f"m and v are right, w is another after three steps: {unlike(given[0], right[0])}"


@exercise(
    "One step of Adam", solution=adam_step_solution,
    mistakes=(
        (lambda w, g, m, v, t, lr: adam_step_solution(w, g, m, v, math.inf, lr),
         # at t = ∞ nothing is left to correct
         "correct the bias: both means start at zero, so divide by 1 − 0.9^t, 1 − 0.999^t"),
        (_rootless, "divide by the root of the mean square, not by the mean square"),
        (lambda w, g, m, v, t, lr: adam_step_solution(w, g, m, v, t, -lr),
         "your step goes uphill: subtract it"),
        (_inside, "your 1e-8 stands inside the root: there it outweighs a small gradient"),
        (_unsquared, "v is the mean of the gradient's squares, and you took its size"),
        (lambda w, g, m, v, t, lr: (adam_step_solution(w, g, m, v, t, lr)[0], m, v),
         "return the new m and v: yours never change, so every step is the first"),
        (lambda w, g, m, v, t, lr: (w - lr * g, *adam_step_solution(w, g, m, v, t, lr)[1:]),
         "that is gradient descent: the step is the corrected m over the root of v")),
    otherwise=_other_step, praise="three steps, and torch.optim.Adam is at the same place",
    right=_torch_adam, again=(7, 1e-5), difficulty=3, importance=4, minutes=8,
    hints=(
        "m is a running mean of the gradients, with 0.9 of the old one; v of their squares, 0.999.",
        "After one step m is a tenth of the gradient. Divide by 1 − 0.9^t to make up for the start "
        "at zero, and v by 1 − 0.999^t.",
        "The step is lr · mean / (√square + 1e-8)."),
)  # fmt: skip
def adam_step(answer, *size):
    """w, m and v after three steps on three gradients."""
    w, *gradients = _drawn(*size)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        w, m, v = several(answer(w, g, m, v, t, 0.1), 3, "return three tensors: w, m and v")
    return w, m, v


# --- what a linear layer keeps -----------------------------------------------------------------
def linear_keeps_solution(x_has_gradient, W_trains):
    kept = set()
    if W_trains:  # dL/dW = gᵀ x
        kept.add("x")
    if x_has_gradient:  # dL/dx = g W
        kept.add("W")
    return kept


def _autograd_keeps(x_has_gradient: bool, W_trains: bool) -> set[str]:
    """What torch keeps of y = x Wᵀ."""
    x = torch.randn(3, 4, requires_grad=x_has_gradient)
    W = torch.randn(5, 4, requires_grad=W_trains)
    names = {x.data_ptr(): "x", W.data_ptr(): "W"}
    kept: set[str] = set()

    def note(tensor):
        kept.add(names.get(tensor.untyped_storage().data_ptr(), "y"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        nn.functional.linear(x, W)
    return kept


@exercise(
    "What a linear layer keeps", solution=linear_keeps_solution,
    mistakes=(
        (lambda x, W: {"x", "W"}, "nothing has a gradient in the first case: nothing is kept",
         lambda given, right: given[False, False]),
        (lambda x, W: ({"x"} if x else set()) | ({"W"} if W else set()), "it is the other way "
         "round: the gradient of W is made of x, and that of x of W"),
        (lambda x, W: {"x"} if x or W else set(), "a frozen W needs x for nothing: dL/dx = g W has "
         "no x in it", lambda given, right: given[True, False] == {"x"}),
        (lambda x, W: {"x", "W"} if x or W else set(), "where only one of the two derivatives is "
         "asked for, only one of the two tensors is kept",
         lambda given, right: given[True, False] == {"x", "W"}),
        (lambda x, W: {"x"} if W else set(), "what reaches x is g W: W is kept where x has a "
         "gradient", lambda given, right: "W" not in given[True, False])),
    otherwise="for x_has_gradient, W_trains = {case} it is {right}, yours {given}",
    praise="checked against autograd in all four cases: a frozen W does not need its input",
    right=lambda: linear_keeps.trial(_autograd_keeps),
    difficulty=2, importance=5, minutes=5,
    hints=(
        "y = x Wᵀ, and g is the gradient of y. Then dL/dW = gᵀ x and dL/dx = g W.",
        "Which of the two derivatives is asked for, and what stands in it beside g?"),
)  # fmt: skip
def linear_keeps(answer):
    kept = {(x, W): answer(x, W) for x in (False, True) for W in (False, True)}
    for names in kept.values():
        expect(isinstance(names, (set, list, tuple)), 'return a set, such as {"x"}')
    return {case: set(names) for case, names in kept.items()}


# --- what a block keeps ------------------------------------------------------------------------
def block_numbers_solution(d, heads, trains):
    norms = 2 * (d + 2)  # x, its mean and its deviation
    attention = 3 * d + heads + d  # q, k, v; one number a head; the output
    gelu = 4 * d  # its input
    inputs = d + d + 4 * d  # of c_attn, c_fc and the MLP's c_proj; that of attention's is counted
    return norms + attention + gelu + (inputs if trains else 0)


@lru_cache
def _numbers_kept(d: int, heads: int, trains: bool) -> int:
    """Numbers a token that the second block of a GPT-2 of this width keeps."""
    config = dict(model_type="gpt2", n_layer=2, n_embd=d, n_head=heads, vocab_size=50)
    config["activation_function"] = "gelu_pytorch_tanh"  # GELU as one operation
    method, tokens = (FullFineTuning(), 8) if trains else (PromptTuning(1), 9)
    kept = predict(method, config | {"n_positions": 64}, batch=1, length=8).parts["activations"]
    return kept["layers.1"] // (4 * tokens)


@exercise(
    "What one block of GPT-2 keeps", solution=block_numbers_solution,
    mistakes=(
        (lambda d, h, trains: 6 * d if trains else 0, "you say that a frozen block keeps nothing: "
         "a gradient still passes through its norms, its attention and its GELU",
         lambda given, right: not any(frozen for _, frozen in given.values())),
        (lambda d, h, trains: block_numbers_solution(d, h, True), "that is the same for both: "
         "frozen linear layers do not keep their inputs"),
        (lambda d, h, trains: block_numbers_solution(d, h, trains) - 3 * d,
         "attention's backward pass needs q, k and v"),
        (lambda d, h, trains: block_numbers_solution(d, h, trains) - 4 * d,
         "the input of GELU is missing, which is four times as wide as the block"),
        (lambda d, h, trains: block_numbers_solution(d, h, trains) - 4,
         "each norm keeps two numbers for every token: its mean and deviation"),
        (lambda d, h, trains: block_numbers_solution(d, h, trains) - h,
         "attention keeps one number a head: the logarithm of its softmax's sum"),
        (lambda d, h, trains: block_numbers_solution(d, h, trains) + d,
         "you have d too many: attention's output is its c_proj's input, counted twice")),
    otherwise="for d = {case[0]}, {case[1]} heads: {right[0]} if it trains and {right[1]} if not; "
              "{given}",
    praise="16 d + 4 + heads numbers a token if it trains, 10 d + 4 + heads if it is frozen",
    right=lambda: block_numbers.trial(_numbers_kept),
    difficulty=4, importance=3, minutes=12,
    hints=(
        "Go through the block in order: norm, c_attn, attention, c_proj, norm, c_fc, GELU, c_proj. "
        "A linear layer keeps its input if it trains.",
        "A norm keeps its input and two numbers, GELU its input, which is four times as wide. "
        "Attention keeps q, k, v, its output, and one number a head.",
        "The output of attention is the input of its c_proj: one tensor."),
)  # fmt: skip
def block_numbers(answer):
    cases = (24, 3), (768, 12)
    return {c: tuple(a_count(answer(*c, trains)) for trains in (True, False)) for c in cases}


# --- four leaks --------------------------------------------------------------------------------
LEAKS = Ward({
    "losses": ("D", "every step's loss is put into a list with its graph",
        "It ends every step with more than the step before, by the same amount each time: "
        "something of every step stays."),
    "gradients": ("A", "the gradients are never taken away",
        "Its first step starts as the sound one's, and from the second on its forward pass ends "
        "higher by as much as a backward pass adds."),
    "everything": ("C", "the frozen layers were not frozen",
        "It is larger than the sound one from the first forward pass on, and after every step by "
        "the moments of layers that should have none."),
    "evaluation": ("B", "the evaluation builds a graph, and its result is kept",
        "Its steps are the sound one's but for what is left when the next one begins: after the "
        "evaluation it holds what a forward pass keeps."),
})  # fmt: skip
FAULTS = LEAKS.faults
MOMENTS = ("forward", "backward", "step", "evaluation")


def _charted(fault: str | None, steps: int = 4) -> pd.DataFrame:
    """Bytes at the end of each part of every step. Of six layers the last two are to train."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(5)]
    model = nn.Sequential(*layers, nn.Linear(64, 1))
    if fault != "everything":
        model[:4].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x, held, scores, rows = torch.randn(128, 64), [], [], []
    with Live() as live:
        live.follow([*model.parameters(), x])
        optimizer = torch.optim.Adam(trained, lr=1e-3)
        for step in range(1, steps + 1):
            scores.clear()
            row = {"number": step}
            loss = model(x).square().mean()
            row["forward"] = live.bytes
            loss.backward(retain_graph=fault == "losses")
            row["backward"] = live.bytes
            held.append(loss if fault == "losses" else loss.item())
            del loss
            optimizer.step()
            if fault != "gradients":
                optimizer.zero_grad(set_to_none=True)
            row["step"] = live.bytes
            with torch.set_grad_enabled(fault == "evaluation"):
                scores.append(model(x).mean())
            row["evaluation"] = live.bytes
            rows.append(row)
    return pd.DataFrame(rows)


def clinic() -> pd.DataFrame:
    """Bytes held by a sound training and by four patients, at four moments of four steps."""
    return LEAKS.examine(_charted, name="patient ")


find_the_leak = LEAKS.exercise(
    "find_the_leak", "Find the leak", confused=("AD", "BC", "CD"), unknown="too large",
    difficulty=3, importance=5, minutes=8,
    hints=(
        "Compare the first steps with the sound training, then the later ones.",
        "Does it grow from step to step, or is it larger once and stays so? At which moment?"),
)  # fmt: skip
