"""Lesson 12, why it does not learn: targets, the first step, decay, labels, a clinic."""

from __future__ import annotations

import re
from functools import cache

import pandas as pd
import torch

from peftlab import tasks
from peftlab.bases import load
from peftlab.exercises import exercise, expect, question
from peftlab.exercises.clinic import Ward
from peftlab.exercises.forms import a_count, a_number, a_tensor, unlike
from peftlab.methods import LoRA
from peftlab.tuned import attach

SORT = {"name": "letters", "skill": "sort"}


# --- predict first -----------------------------------------------------------------------------
@question(
    "A GPT-2 has 12 blocks, h.0 to h.11. You want the second one alone and write the pattern "
    r"'.*h\.1.*c_attn'. How many blocks does it reach?",
    {
        "a": ("1", "Nothing ends the number: h.1 is also how h.10 begins."),
        "b": ("3", "h.1, h.10 and h.11 all begin with h.1."),
        "c": ("12", "h.0 has no h.1 in it."),
        "d": ("none", "The dots and stars reach any name in front and in between."),
    },
)
def pattern():
    names = [f"transformer.h.{layer}.attn.c_attn" for layer in range(12)]
    hit = [name for name in names if re.fullmatch(r".*h\.1.*c_attn", name)]
    letter = {1: "a", 3: "b", 12: "c", 0: "d"}[len(hit)]
    layers = ", ".join(name.split(".")[2] for name in hit)
    return letter, f"It reaches {len(hit)} of 12 blocks: {layers}."


@question(
    "Every training text reads 'in: c a b⏎out: a b c'. The prompt in training ended with 'out:'. "
    "Your service sends 'out: ', with a space behind it. What does the model read?",
    {
        "a": ("the same tokens", "A tokenizer like this one keeps every space."),
        "b": ("one token more at the end", "The space belongs to ' a' in training, and is alone."),
        "c": ("other tokens throughout", "The tokens in front of the space do not change."),
    },
)
def space():
    tokenizer = load("tiny-gpt").tokenizer
    short, long = (tokenizer(f"in: c a b\nout:{end}")["input_ids"] for end in ("", " "))
    letter = "a" if long == short else "b" if long[:-1] == short else "c"
    answer = tokenizer("in: c a b\nout: a")["input_ids"]
    last = tokenizer.convert_ids_to_tokens([short[-1], long[-1], answer[-1]])
    return letter, f"Last tokens: {last[0]!r} and {last[1]!r}; the answer begins with {last[2]!r}."


@question(
    "A classifier for two classes was trained with a frozen random head that was never saved. It "
    "is right in 99 of 100 cases. The service starts, draws another random head and loads the "
    "adapter. How often is it right now?",
    {
        "a": ("99 in 100", "The features were shaped for one head, and it is gone."),
        "b": ("50 in 100, always", "50 is the mean over heads. One head turns most cases alike."),
        "c": ("anything from 0 to 100", "Each start draws a new direction, and it may point back."),
    },
)
def another_head():
    generator = torch.Generator().manual_seed(0)
    old, heads = (torch.randn(n, 64, generator=generator) for n in (1, 200))
    side = torch.tensor([-1.0, 1.0]).repeat(50)[:, None]
    features = side * old + torch.randn(100, 64, generator=generator)
    right = ((features @ heads.T).sign() == side).float().mean(dim=0)
    low, high = right.min().item(), right.max().item()
    wide = high - low > 0.8
    letter = "c" if wide else "a" if low > 0.9 else "b"
    return letter, f"200 random heads, 64 features: from {low:.0%} to {high:.0%} right."


# --- targets -----------------------------------------------------------------------------------
def module_names(layers: int = 12, every: int = 4) -> list[str]:
    """The linear layers of a hybrid model: attention in every fourth layer, something else in the
    others."""
    names = []
    for layer in range(layers):
        whole = layer % every == every - 1
        inner = ["q_proj", "k_proj", "v_proj"] if whole else ["in_q_proj", "out_proj"]
        names += [f"layers.{layer}.attn.{name}" for name in inner]
        names += [f"layers.{layer}.mlp.{name}" for name in ("up_proj", "down_proj")]
    return names


def layers_hit_solution(targets, names):
    layers = {name.split(".")[1] for name in names}
    hit = {name.split(".")[1] for name in names if name.split(".")[-1] in targets}
    return len(hit) / len(layers)


@exercise(
    "How many layers are hit?", solution=layers_hit_solution, difficulty=1, importance=5, minutes=5,
    mistakes=(
        (lambda targets, names: sum(n.split(".")[-1] in targets for n in names) / len(names),
         "that is the share of the modules; a layer has several"),
        (lambda targets, names: len({n.split(".")[1] for n in names
                                     if n.endswith(tuple(targets))})
         / len({n.split(".")[1] for n in names}),
         "in_q_proj is not q_proj: the whole last name has to be equal"),
        (lambda targets, names: sum(n.split(".")[-1] in targets for n in names)
         / len({n.split(".")[1] for n in names}),
         "a layer with two hits is one layer: count each once"),
        (lambda targets, names: len({n.split(".")[1] for n in names
                                     if n.split(".")[-1] in targets}),
         "that is the number of layers that are hit; divide by how many there are")),
    praise="{right:.0%} of the layers: the others have no module of that name",
    otherwise="the share of the layers is not {given:.3g}", again=(15, 5),
    hints=(
        "The layer is the second part of a name, the module's own name the last.",
        "A set keeps each layer once."),
)  # fmt: skip
def layers_hit(answer, *size):
    return float(a_number(answer(["q_proj", "v_proj"], module_names(*size))))


# --- the first step of Adam --------------------------------------------------------------------
def step_parts(r: int = 5, d: int = 7, d_out: int = 3) -> list[torch.Tensor]:
    """Random A (r, d), x (d,) and g (d_out,), the same at every call."""
    generator = torch.Generator().manual_seed(4)
    sizes = (r, d), (d,), (d_out,)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def first_step_solution(A, x, g, alpha, lr):
    s = alpha / len(A)
    B = -lr * torch.sign(s * torch.outer(g, A @ x))
    return s * B @ A @ x


def _sgd(A, x, g, alpha, lr):
    s = alpha / len(A)
    return s * (-lr * s * torch.outer(g, A @ x)) @ A @ x


@exercise(
    "The first step", solution=first_step_solution, difficulty=3, importance=4, minutes=8,
    mistakes=(
        (_sgd, "that is a step of plain gradient descent; Adam's first step is the sign"),
        (lambda A, x, g, alpha, lr: -first_step_solution(A, x, g, alpha, lr),
         "the sign: a step goes against the gradient"),
        (lambda A, x, g, alpha, lr: len(A) * first_step_solution(A, x, g, alpha, lr),
         "the scale is α / r, and r is the number of rows of A"),
        (lambda A, x, g, alpha, lr: first_step_solution(A, x, g, alpha, lr) * len(A) / alpha,
         "the output of a LoRA is scaled: α / r times B A x")),
    praise="the r terms all have one sign, so α / r times r of them is α times their mean",
    otherwise=unlike, again=(9, 4, 6),
    hints=(
        "h = W x + s B A x, and g is the gradient of h. The gradient of B is s g (A x)ᵀ.",
        "With B at zero before, B is −lr times the sign of its gradient after the step."),
)  # fmt: skip
def first_step(answer, *sizes):
    A, x, g = step_parts(*sizes)
    return a_tensor(answer(A, x, g, 11.0, 0.01), tuple(g.shape), "Δh has one number an output: it")


# --- weight decay ------------------------------------------------------------------------------
def survives_solution(lr, weight_decay, steps):
    return (1 - lr * weight_decay) ** steps


@exercise(
    "What decay leaves", solution=survives_solution, difficulty=1, importance=3, minutes=3,
    mistakes=(
        (lambda lr, decay, steps: (1 - decay) ** steps,
         "AdamW multiplies its decay with the learning rate"),
        (lambda lr, decay, steps: 1 - lr * decay * steps,
         "each step takes its share of what is left, not of the start"),
        (lambda lr, decay, steps: 1 - (1 - lr * decay) ** steps,
         "that is what is gone; asked is what is left"),
        (lambda lr, decay, steps: (1 - lr * decay) * steps,
         "the factors of the steps are multiplied: a power")),
    praise="a LoRA at 0.0003 hardly notices, a soft prompt at 0.3 is nearly gone",
    otherwise="at lr = {case[0]}, decay {case[1]}, {case[2]} steps it is {right:.3g}, not "
              "{given:.3g}",
    hints=(
        "One step: w ← w − lr · decay · w.",
        "So each step multiplies by 1 − lr · decay."),
)  # fmt: skip
def survives(answer):
    cases = ((0.3, 0.01, 1000), (3e-4, 0.01, 1000), (0.1, 0.1, 37))
    return {case: float(a_number(answer(*case))) for case in cases}


# --- labels ------------------------------------------------------------------------------------
def labels_solution(prompt, target, end, length):
    labels = [-100] * len(prompt) + target + [end]
    return labels + [-100] * (length - len(labels))


@exercise(
    "Label a row", solution=labels_solution, difficulty=2, importance=5, minutes=6,
    mistakes=(
        (lambda p, t, e, n: p + t + [e] + [-100] * (n - len(p) - len(t) - 1),
         "the prompt has labels: the loss then pays for guessing the question"),
        (lambda p, t, e, n: [-100] * len(p) + t + [-100] * (n - len(p) - len(t)),
         "no label is the end token, so the model never learns to stop"),
        (lambda p, t, e, n: [-100] * len(p) + t + [e] * (n - len(p) - len(t)),
         "padding has labels: it is the end token again and again, once is enough"),
        (lambda p, t, e, n: [-100] * (len(p) - 1) + t + [e] + [-100] * (n - len(p) - len(t)),
         "you shifted by one: the model's loss does that itself"),
        (lambda p, t, e, n: [-100] * len(p) + t + [e],
         "a row of a batch has the length of the longest one: pad with −100")),
    praise="the answer and one end token, nothing else",
    otherwise="the labels should be {right}; yours are {given}", again=(4, 3, 13),
    hints=(
        "Three parts: the prompt, the answer with its end, the padding.",
        "Labels stand under their own tokens; −100 leaves a place out."),
)  # fmt: skip
def labels(answer, prompt=5, target=4, length=12):
    ids = list(range(11, 11 + prompt + target))
    made = answer(ids[:prompt], ids[prompt:], 0, length)
    made = made.tolist() if isinstance(made, torch.Tensor) else made
    expect(isinstance(made, (list, tuple)), "return the labels as a list, one for each token")
    return [a_count(label, "a label") for label in made]


# --- a clinic ----------------------------------------------------------------------------------
WARD = Ward({
    "healthy": ("B", "nothing is wrong",
        "Its B moved, its loss is near zero, and it answers and stops."),
    "padding in the loss": ("D", "padding has labels too",
        "Every row has as many labels as tokens."),
    "no end": ("A", "no label is the end token",
        "It knows the answers, and is never right once the end has to be there too."),
    "optimiser": ("E", "the optimiser does not hold the adapter",
        "Its B did not move at all, and its loss did not fall."),
    "rate": ("C", "the learning rate is a hundred times too small",
        "Its B moved, a hundredth of the way of the healthy one."),
})  # fmt: skip
FAULTS = WARD.faults


def batch_of(fault: str | None, base, task, rows: list) -> dict[str, torch.Tensor]:
    """A batch as this patient labels it, padded to 40 tokens if padding counts."""
    batch = task.batch_for(base, rows)
    if fault == "no end":
        end = batch["labels"] == base.tokenizer.eos_token_id
        batch["labels"] = batch["labels"].masked_fill(end, tasks.IGNORED)
    if fault == "padding in the loss":
        more = 40 - batch["labels"].shape[1]
        batch = {key: torch.nn.functional.pad(t, (0, more)) for key, t in batch.items()}
        batch["labels"] = batch["input_ids"].clone()
    return batch


@cache
def clinic(steps: int = 30) -> pd.DataFrame:
    """What five runs of one LoRA show, by their letters."""
    task, rows = tasks.load(**SORT), {}
    for letter, fault in WARD.right.items():
        base = load("tiny-gpt")
        tuned = attach(base, LoRA(r=8, alpha=16), seed=0)
        module, adapter = tuned.as_module(), list(tuned.trainable.values())
        held = (
            [p.detach().clone().requires_grad_() for p in adapter]
            if fault == "optimiser"
            else adapter
        )
        lr = 5e-5 if fault == "rate" else 5e-3
        optimiser = torch.optim.AdamW(held, lr=lr, weight_decay=0.0)
        generator, losses, count = torch.Generator().manual_seed(0), [], 0.0
        for _ in range(steps):
            chosen = torch.randint(len(task.train), (8,), generator=generator).tolist()
            batch = batch_of(fault, base, task, [task.train[i] for i in chosen])
            count = (batch["labels"] != tasks.IGNORED).sum().item() / len(chosen)
            loss = module(**batch).loss
            loss.backward()
            optimiser.step()
            for parameter in (*adapter, *held):
                parameter.grad = None
            losses.append(loss.item())
        moved = sum(delta.B.norm().item() ** 2 for delta in tuned.deltas.values()) ** 0.5
        answers, whole = right_answers(tuned, task)
        rows[letter] = {
            "labels a row": count,
            "loss at the start": losses[0],
            "loss at the end": losses[-1],
            "B moved by": moved,
            "answers right": answers,
            "and stopped": whole,
        }
        tuned.detach()
    return pd.DataFrame(rows).T.rename_axis("patient")


@torch.no_grad()
def right_answers(tuned, task, count: int = 50) -> tuple[float, float]:
    """The share of test answers with every letter right, and of those with the end right too."""
    batch = task.batch_for(tuned, task.test[:count])
    logits, wanted = tuned.aligned(batch)
    left, end = wanted == tasks.IGNORED, wanted == tuned.tokenizer.eos_token_id
    same = logits.argmax(dim=-1) == wanted
    answers, whole = ((same | out).all(dim=1).float().mean() for out in (left | end, left))
    return answers.item(), whole.item()


debug = WARD.exercise(
    "debug", "Five runs, four of them ill", confused=("BD", "CE", "AB"), unknown="overfitting",
    difficulty=3, importance=5, minutes=8,
    hints=(
        "Begin with what moved: a B that stayed at zero was never trained.",
        "Then the labels: how many does a row of three to six letters and an end have?"),
)  # fmt: skip
