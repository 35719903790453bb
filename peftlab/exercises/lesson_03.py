"""Lesson 03, P-tuning: write the encoder, place the prompt, count, throw away, find the fault."""

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from peftlab.accounting import count, stored
from peftlab.bases.shapes import Shape
from peftlab.exercises import Wrong, exercise, expect, match, question, swapped
from peftlab.methods import PTuning
from peftlab.soft import PromptEncoder
from peftlab.tuned import attach

# --- 1 · write the encoder -----------------------------------------------------------------------


def encode(table, lstm, first, second):
    outputs, _ = lstm(table[None])  # 1 P 2h: the virtual tokens are one sequence
    return second(torch.relu(first(outputs[0])))  # P d


def _no_relu(table, lstm, first, second):
    return second(first(lstm(table[None])[0][0]))


def _relu_last(table, lstm, first, second):
    return torch.relu(encode(table, lstm, first, second))


def _each_alone(table, lstm, first, second):
    return second(torch.relu(first(lstm(table[:, None])[0][:, 0])))


def _last_state(table, lstm, first, second):
    outputs, _ = lstm(table[None])
    return second(torch.relu(first(outputs[:, -1].expand(len(table), -1))))


def _no_lstm(table, lstm, first, second):
    return second(torch.relu(first(torch.cat([table, table], dim=1)[:, : first.in_features])))


@exercise(
    "Write the encoder",
    solution=encode,
    difficulty=2,
    importance=5,
    minutes=10,
    hints=(
        "The virtual tokens are one sequence: a batch of one, P long. `table[None]` has that "
        "shape.",
        "`lstm(x)` returns two things. The first holds an output for every place, both directions "
        "side by side.",
        "Between the two linear layers there is a ReLU, and nothing behind the second: a prompt "
        "needs negative numbers too.",
    ),
    mistakes=(
        (_no_relu, "no ReLU between"),
        (_relu_last, "cannot be negative"),
        (_each_alone, "a sequence of its own"),
        (_last_state, "the same row"),
        (_no_lstm, "did not go through the LSTM"),
    ),
)
def write_the_encoder(answer):
    torch.manual_seed(0)
    P, d = 4, 6
    table = torch.randn(P, d)
    lstm = nn.LSTM(d, d // 2, 2, bidirectional=True, batch_first=True)
    first, second = nn.Linear(d, d), nn.Linear(d, d)
    given = answer(table, lstm, first, second)
    expect(torch.is_tensor(given), f"return a tensor; yours is a {type(given).__name__}")
    wanted = encode(table, lstm, first, second)
    expect(
        given.shape == wanted.shape,
        f"a prompt of {P} virtual tokens is {(P, d)}; yours is {tuple(given.shape)}. "
        "Did you leave the batch of one on?",
    )

    def is_like(mistake):
        return torch.allclose(given, mistake(table, lstm, first, second), atol=1e-6)

    expect(not is_like(_no_relu), "there is no ReLU between the linear layers: the MLP is linear")
    expect(not is_like(_relu_last), "with a ReLU at the end a prompt cannot be negative anywhere")
    expect(
        not is_like(_each_alone),
        "each virtual token is a sequence of its own: you put them on the batch axis, so no one "
        "sees its neighbours. Check batch_first",
    )
    expect(
        not is_like(_last_state),
        "every virtual token is the same row: you took one state for all. The LSTM has an output "
        "for each place",
    )
    if not torch.allclose(given, wanted, atol=1e-6):
        moved = answer(table, nn.LSTM(d, d // 2, 2, bidirectional=True, batch_first=True),
                       first, second)  # fmt: skip
        expect(
            not torch.equal(moved, given),
            "another LSTM makes the same prompt: the table did not go through the LSTM",
        )
        raise Wrong("the right shape and other numbers; the order is LSTM, linear, ReLU, linear")
    return "table, LSTM, linear, ReLU, linear: P = g(E)"


# --- 2 · place the prompt ------------------------------------------------------------------------


def place(prompt, embedded, masks):
    half = len(prompt) // 2
    rows = [
        torch.cat([prompt[:half], row[:at], prompt[half:], row[at:]])
        for row, at in zip(embedded, masks.tolist(), strict=True)
    ]
    return torch.stack(rows)


def _all_in_front(prompt, embedded, masks):
    return torch.cat([prompt.expand(len(embedded), -1, -1), embedded], dim=1)


def _first_rows_place(prompt, embedded, masks):
    return place(prompt, embedded, masks[:1].expand(len(masks)))


def _behind(prompt, embedded, masks):
    return place(prompt, embedded, masks + 1)


def _half_late(prompt, embedded, masks):
    half = len(prompt) // 2
    x = torch.cat([prompt[:half].expand(len(embedded), -1, -1), embedded], dim=1)
    rows = [torch.cat([r[:at], prompt[half:], r[at:]]) for r, at in zip(x, masks, strict=True)]
    return torch.stack(rows)


def _same_half(prompt, embedded, masks):
    half = len(prompt) // 2
    return place(torch.cat([prompt[:half], prompt[:half]]), embedded, masks)


@exercise(
    "Place the prompt",
    solution=place,
    difficulty=3,
    importance=4,
    minutes=10,
    hints=(
        "Names have different lengths, so the mask stands elsewhere in each row: do one row at a "
        "time.",
        "A row is four pieces in order: half of the prompt, the text up to the mask, the other "
        "half, the mask and the rest.",
    ),
    mistakes=(
        (_all_in_front, "all in front"),
        (_first_rows_place, "the first row's mask"),
        (_behind, "behind the mask"),
        (_half_late, "moved the mask along"),
        (_same_half, "the same half twice"),
    ),
)
def place_the_prompt(answer):
    generator = torch.Generator().manual_seed(0)
    prompt, embedded = (torch.randn(*s, generator=generator) for s in ((4, 3), (2, 6, 3)))
    masks = torch.tensor([2, 4])
    given = answer(prompt, embedded, masks)
    expect(torch.is_tensor(given), f"return a tensor; yours is a {type(given).__name__}")
    wanted = place(prompt, embedded, masks)
    expect(
        given.shape == wanted.shape,
        f"each row of {embedded.shape[1]} gets {len(prompt)} more vectors, so {tuple(wanted.shape)}"
        f"; yours is {tuple(given.shape)}",
    )
    for mistake, diagnosis in (
        (_all_in_front, "the virtual tokens are all in front: the second half belongs to the mask"),
        (
            _first_rows_place,
            "right for the first row; in the others the block stands where the first row's mask "
            "is. Every row has a place of its own",
        ),
        (_behind, "your second block stands behind the mask. It belongs right before it"),
        (
            _half_late,
            "the first half has moved the mask along, and you counted its place from the start "
            "of the longer row",
        ),
        (_same_half, "you put the same half twice: rows 0 and 1 in front, rows 2 and 3 later"),
    ):
        expect(not torch.equal(given, mistake(prompt, embedded, masks)), diagnosis)
    expect(torch.equal(given, wanted), "the vectors are there, in another order than asked for")
    return "two rows, two places, four virtual tokens each"


# --- 3 · count -----------------------------------------------------------------------------------


def trained(P, d):
    h = d // 2
    layer = 2 * (4 * h * (d + h) + 8 * h)  # two directions; the second layer reads 2 h = d as well
    return P * d + 2 * layer + 2 * (d * d + d)


def _one_direction(P, d):
    h = d // 2
    return P * d + 2 * (4 * h * (d + h) + 8 * h) + 2 * (d * d + d)


def _one_bias(P, d):
    h = d // 2
    return P * d + 4 * (4 * h * (d + h) + 4 * h) + 2 * (d * d + d)


def _wide(P, d):
    return P * d + 2 * (4 * d * (d + d) + 8 * d) + 2 * (4 * d * 3 * d + 8 * d) + 3 * d * d + 2 * d


@exercise(
    "Count what trains",
    solution=trained,
    difficulty=4,
    importance=3,
    minutes=10,
    hints=(
        "One direction of one LSTM layer with input i and hidden h: four gates, each with a matrix "
        "for the input (h · i), one for the state (h · h), and in PyTorch two biases (2 h).",
        "Here h = d / 2. The second layer reads both directions of the first, so its input is "
        "2 h = d.",
        "Do not forget the table, nor the MLP: d → d → d, with biases.",
    ),
    mistakes=(
        (_one_direction, "one direction"),
        (_one_bias, "two biases"),
        (_wide, "d / 2 in each direction"),
        (lambda P, d: trained(P, d) - P * d, "forgot the table"),
        (lambda P, d: P * d, "stored"),
    ),
)
def count_what_trains(answer):
    for name, P in (("bert-base", 9), ("gpt2", 20), ("bert-large", 3)):
        d = Shape.named(name).d_model
        given, wanted = answer(P, d), count(PTuning(P), name)
        case = f"{P} virtual tokens on {name}: yours is {given:,}"
        expect(given != P * d, f"{case}. That is what is stored. More than that trains")
        expect(given != wanted - P * d, f"{case}. You forgot the table E")
        expect(given != _one_direction(P, d), f"{case}. The LSTM of one direction has so many")
        expect(given != _one_bias(P, d), f"{case}. PyTorch's LSTM has two biases for every gate")
        expect(
            given < 2 * wanted,
            f"{case}. That is far too many: is your hidden size d / 2 in each direction?",
        )
        expect(given == wanted, f"{case}, {wanted:,} train")
    return "P · d + 14 d² + 18 d, and so says the package"


# --- 4 · throw it away ---------------------------------------------------------------------------


def fold(encoder):
    encoder.eval()
    with torch.no_grad():
        return {"prompt": encoder()["prompt"].clone()}


def _the_table(encoder):
    return {"prompt": encoder.table.detach().clone()}


def _with_graph(encoder):
    encoder.eval()
    return {"prompt": encoder()["prompt"]}


def _noisy(encoder):
    encoder.train()
    with torch.no_grad():
        return {"prompt": encoder()["prompt"].clone()}


def _everything(encoder):
    return {**fold(encoder), **{k: v.detach().clone() for k, v in encoder.state_dict().items()}}


@exercise(
    "Throw it away",
    solution=fold,
    difficulty=2,
    importance=5,
    minutes=5,
    hints=(
        "`encoder()` returns a dictionary with the prompt that it makes now.",
        "This encoder has dropout. In which mode should it make its last prompt?",
        "What is stored needs no gradient, and no network.",
    ),
    mistakes=(
        (_the_table, "what goes into the network"),
        (_with_graph, "still hangs on the graph"),
        (_noisy, "with dropout on"),
        (_everything, "the network is in it"),
        (lambda encoder: encoder()["prompt"], "a dictionary"),
    ),
)
def throw_it_away(answer):
    torch.manual_seed(0)
    encoder = PromptEncoder(torch.randn(5, 8), "mlp", "lama", 8, 1)
    encoder.mlp.insert(2, nn.Dropout(0.5))
    encoder.train()
    given = answer(encoder)
    expect(
        isinstance(given, dict) and "prompt" in given,
        'return a dictionary with the tensor under "prompt"',
    )
    numbers = sum(tensor.numel() for tensor in given.values())
    expect(
        numbers == 40,
        f"you store {numbers:,} numbers and 5 · 8 = 40 are needed: the network is in it",
    )
    prompt, wanted = given["prompt"], fold(encoder)["prompt"]
    expect(
        not torch.equal(prompt.detach(), encoder.table.detach()),
        "you stored the table E. It is what goes into the network; the model reads what comes out",
    )
    expect(
        torch.allclose(prompt.detach(), wanted, atol=1e-6),
        "these are not the numbers that the finished encoder makes: was it run with dropout on?",
    )
    expect(not prompt.requires_grad, "the right numbers, but the tensor still hangs on the graph")
    return "40 numbers, no network, no gradient"


# --- 5 · debug the broken adapter ----------------------------------------------------------------

FAULTS = {
    "outside": "the encoder was run once, before the loop, and its output kept",
    "optimiser": "the optimiser was given the table and not the network",
    "table": "the table is frozen",
    "dropout": "dropout in the encoder stays on when the prompt is used",
}
WARD = {"A": "table", "B": "outside", "C": "dropout", "D": "optimiser"}


def clinic(base, task, steps: int = 8, lr: float = 3e-3, seed: int = 0) -> pd.DataFrame:
    """Train one sound P-tuning and the four patients A to D, and write down what can be seen.

    One row a step: patient, step, loss, and for the table and for the network the length of the
    gradient (NaN: there is none) and how far they have moved; `twice` is how much the prompt
    differs when it is made twice in evaluation.
    """
    patients = {"sound": None, **WARD}
    return pd.concat(
        [_examine(name, fault, base, task, steps, lr, seed) for name, fault in patients.items()],
        ignore_index=True,
    )


def _examine(patient, fault, base, task, steps, lr, seed):
    method = PTuning(8, init="normal")
    with attach(base, method, seed=seed) as tuned:
        source = tuned.sources[method.name]
        encoder = source.module
        parts = {"table": [encoder.table], "network": [*encoder.mix.parameters()]}
        start = {part: [p.detach().clone() for p in tensors] for part, tensors in parts.items()}
        if fault == "outside":
            source.instead = {k: v.detach() for k, v in encoder().items()}
        if fault == "table":
            encoder.table.requires_grad_(False)
        if fault == "dropout":
            encoder.mlp.register_forward_hook(lambda _, __, made: F.dropout(made, 0.3))
        given = parts["table"] if fault == "optimiser" else [*encoder.parameters()]
        optimiser = torch.optim.AdamW(given, lr=lr, weight_decay=0.0)
        order, rows = torch.Generator().manual_seed(seed), []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for step in range(1, steps + 1):
                chosen = torch.randperm(len(task.train), generator=order)[:16].tolist()
                loss = tuned.batch_loss(task.batch_for(tuned, [task.train[i] for i in chosen]))
                if loss.requires_grad:  # else PyTorch would refuse to go backwards
                    loss.backward()
                seen = {f"gradient {part}": _gradient(ts) for part, ts in parts.items()}
                optimiser.step()
                for tensor in encoder.parameters():
                    tensor.grad = None
                seen |= {f"moved {part}": _distance(ts, start[part]) for part, ts in parts.items()}
                rows.append({"patient": patient, "step": step, "loss": loss.item(), **seen})
            tuned.train(False)
            with torch.no_grad():
                rows[-1]["twice"] = (source()["prompt"] - source()["prompt"]).abs().max().item()
    return pd.DataFrame(rows)


def _gradient(tensors):
    found = [tensor.grad.norm() for tensor in tensors if tensor.grad is not None]
    return torch.stack(found).norm().item() if found else float("nan")


def _distance(tensors, start):
    gaps = [(now.detach() - then).norm() for now, then in zip(tensors, start, strict=True)]
    return torch.stack(gaps).norm().item()


SYMPTOMS = {
    "outside": "has no gradient anywhere, in the table or the network: the path from the loss "
    "ends at a prompt that was made before",
    "optimiser": "has both gradients, and only the table moves: nobody steps the network",
    "table": "has a gradient in the network and none in the table",
    "dropout": "moves in both parts, but makes two different prompts in evaluation",
}


@exercise(
    "Debug the broken adapter",
    solution=dict(WARD),
    difficulty=3,
    importance=5,
    minutes=10,
    hints=(
        "Ask first whether there is a gradient, in the table and in the network.",
        "A gradient that nobody uses moves nothing. Compare the two columns that moved.",
    ),
    mistakes=(
        (swapped(WARD, "A", "B"), "Look again at patient A"),
        (swapped(WARD, "B", "D"), "Look again at patient B"),
        (swapped(WARD, "C", "D"), "Look again at patient C"),
        (WARD | {"A": "outside"}, "twice"),
        (WARD | {"D": "too few virtual tokens"}, "none of the four faults"),
        ({"A": "table"}, "has no diagnosis yet"),
    ),
)
def diagnose(answer):
    signs = {fault: f"It {sign}" for fault, sign in SYMPTOMS.items()}
    return match(answer, WARD, FAULTS, signs)


# --- predict first -------------------------------------------------------------------------------


def _encoder(kind: str) -> PromptEncoder:
    torch.manual_seed(0)
    return PromptEncoder(torch.randn(6, 16), kind, "lama", 8 if kind == "lstm" else 16, 2)


@question(
    "The prompt is made by an MLP, each virtual token alone: row i of P from row i of E. A step of "
    "gradient descent is taken to change row 1 of P, and no other. Which rows of P change?",
    {
        "a": ("row 1 alone", "Row 1 of the table is its own. The network is not: every row goes "
              "through the same weights, and they moved."),
        "b": ("all of them", "They share the network's weights, and those moved."),
        "c": ("row 1 and its neighbours", "An MLP knows no neighbours; what they share is the "
              "weights, and all rows share them."),
    },
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
              "trains."),
    },
)  # fmt: skip
def predict_count():
    method = PTuning(20, sizes="peft")
    number = {"trained": count(method, "gpt2"), "stored": stored(method, "gpt2")}
    flat = 20 * Shape.named("gpt2").d_model
    right = {
        (False, False): "a", (True, True): "b", (True, False): "c", (False, True): "d",
    }[number["trained"] > flat, number["stored"] > flat]  # fmt: skip
    return right, f"{number['trained']:,} train and {number['stored']:,} are stored."


@question(
    "You generate 50 tokens for one text, right after training, with the encoder still attached. "
    "How often must the encoder run?",
    {
        "a": ("50 times, once a token", "Its input is a table that no longer changes. What it "
              "makes is the same for every token, so once is enough."),
        "b": ("once", "What it makes is the same for every token and every text."),
        "c": ("once for every layer and token", "The prompt enters at the input. No layer above "
              "asks for it again."),
    },
)  # fmt: skip
def predict_runs():
    from peftlab.soft import Source

    encoder, runs = _encoder("lstm"), []
    encoder.register_forward_hook(lambda *_: runs.append(1))
    source = Source(encoder)
    with torch.no_grad(), source.held():
        made = [source()["prompt"] for _ in range(50)]
    same = all(torch.equal(made[0], other) for other in made)
    right = "b" if same and len(runs) == 1 else "a"
    return right, f"Counted: {len(runs)} run for {len(made)} tokens, and one prompt for all."
