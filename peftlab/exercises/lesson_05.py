"""Lesson 05, P-tuning v2: write its attention, count it, tell four definitions apart, debug it."""

import pandas as pd
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from peftlab import attention
from peftlab.accounting import count
from peftlab.bases import Base
from peftlab.bases.shapes import Shape
from peftlab.exercises import Wrong, exercise, expect, match, question, swapped
from peftlab.heads import Classification
from peftlab.methods import PrefixTuning, PTuningV2
from peftlab.tuned import attach

# --- 1 · the attention of P-tuning v2 ----------------------------------------------------------


def attend_with_prefix(q, K, V, P_k, P_v, mask):
    batch, count = len(q), P_k.shape[1]
    K = torch.cat([P_k.expand(batch, -1, -1, -1), K], dim=2)
    V = torch.cat([P_v.expand(batch, -1, -1, -1), V], dim=2)
    mask = torch.cat([mask.new_ones(batch, count), mask], dim=1)
    scores = q @ K.transpose(2, 3) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
    return scores.softmax(dim=-1) @ V


def _queries_too(q, K, V, P_k, P_v, mask):
    q = torch.cat([P_k.expand(len(q), -1, -1, -1), q], dim=2)
    return attend_with_prefix(q, K, V, P_k, P_v, mask)


def _hidden(q, K, V, P_k, P_v, mask):
    scores = (q @ K.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(
        mask[:, None, None] == 0, float("-inf")
    )
    return scores.softmax(dim=-1) @ V


def _mask_behind(q, K, V, P_k, P_v, mask):
    batch, count = len(q), P_k.shape[1]
    K = torch.cat([P_k.expand(batch, -1, -1, -1), K], dim=2)
    V = torch.cat([P_v.expand(batch, -1, -1, -1), V], dim=2)
    mask = torch.cat([mask, mask.new_ones(batch, count)], dim=1)
    scores = q @ K.transpose(2, 3) / q.shape[-1] ** 0.5
    return scores.masked_fill(mask[:, None, None] == 0, float("-inf")).softmax(dim=-1) @ V


def _unscaled(q, K, V, P_k, P_v, mask):
    return attend_with_prefix(q * q.shape[-1] ** 0.5, K, V, P_k, P_v, mask)


def _swapped(q, K, V, P_k, P_v, mask):
    return attend_with_prefix(q, K, V, P_v, P_k, mask)


def _unmasked(q, K, V, P_k, P_v, mask):
    return attend_with_prefix(q, K, V, P_k, P_v, torch.ones_like(mask))


@exercise(
    "Write the attention of P-tuning v2",
    solution=attend_with_prefix,
    difficulty=3,
    importance=5,
    minutes=10,
    hints=(
        "Keys and values get P rows in front. The queries stay as they are.",
        "`P_k.expand(batch, -1, -1, -1)` gives every text of the batch the same prefix.",
        "The mask gets P columns as well, on the same side, and they are ones: every query may "
        "see the prefix.",
    ),
    mistakes=(
        (_queries_too, "more output rows than queries"),
        (_hidden, "as if there were no prefix"),
        (_mask_behind, "the other end"),
        (_unscaled, "the square root"),
        (_swapped, "in each other's place"),
        (_unmasked, "padding"),
    ),
)
def write_the_attention(answer):
    generator = torch.Generator().manual_seed(0)
    batch, heads, T, P, head_dim = 2, 2, 4, 3, 8
    q, K, V = (torch.randn(batch, heads, T, head_dim, generator=generator) for _ in range(3))
    P_k, P_v = (torch.randn(heads, P, head_dim, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    wanted = attend_with_prefix(q, K, V, P_k, P_v, mask)
    given = answer(q, K, V, P_k, P_v, mask)
    expect(torch.is_tensor(given), f"return a tensor; yours is a {type(given).__name__}")
    expect(
        given.ndim != 4 or given.shape[2] <= T,
        f"{given.shape[2] if given.ndim == 4 else 0} rows for {T} tokens: you have more output "
        "rows than queries. A source puts a prefix on the queries as well; nobody reads those rows",
    )
    expect(
        given.shape == wanted.shape,
        f"your output is {tuple(given.shape)}; one row for each query is {tuple(wanted.shape)}",
    )
    if not torch.allclose(given, wanted, atol=1e-5):
        for wrong, diagnosis in (
            (_hidden, "your output is as if there were no prefix: is it masked out, or left out?"),
            (_mask_behind, "keys grew in front and the mask at the other end: a real token is "
             "hidden for each that is not, where a text is padded"),
            (_unscaled, "the scores are too large: divide by the square root of head_dim"),
            (_swapped, "P_k and P_v stand in each other's place"),
            (_unmasked, "right for the text without padding; the other one looks at its padding"),
        ):  # fmt: skip
            same = torch.allclose(given, wrong(q, K, V, P_k, P_v, mask), atol=1e-5)
            expect(not same, diagnosis)
        raise Wrong("these are not the weighted sums over [P_v; V]")
    return "keys, values and mask grow together, and the queries stay"


# --- 2 · count ---------------------------------------------------------------------------------


def numbers_trained(P, depth, d_kv, d_model, classes):
    return 2 * P * d_kv * depth + (d_model + 1) * classes


def _one_vector(P, depth, d_kv, d_model, classes):
    return P * d_kv * depth + (d_model + 1) * classes


def _by_model(P, depth, d_kv, d_model, classes):
    return 2 * P * d_model * depth + (d_model + 1) * classes


def _no_head(P, depth, d_kv, d_model, classes):
    return 2 * P * d_kv * depth


def _no_bias(P, depth, d_kv, d_model, classes):
    return 2 * P * d_kv * depth + d_model * classes


def _input_too(P, depth, d_kv, d_model, classes):
    return P * d_model + numbers_trained(P, depth, d_kv, d_model, classes)


@exercise(
    "Count it with a depth and a head",
    solution=numbers_trained,
    difficulty=2,
    importance=4,
    minutes=5,
    hints=(
        "A virtual token is one key and one value in each of `depth` layers.",
        "Keys and values are d_kv wide, which is d_model only without grouped heads.",
        "A linear head has d_model weights and one bias for each class.",
    ),
    mistakes=(
        (_one_vector, "a key and a value"),
        (_by_model, "grouped heads"),
        (_no_head, "left out the head"),
        (_no_bias, "a bias for each class"),
        (_input_too, "nothing at the input"),
    ),
)
def count_with_depth(answer):
    for name in ("bert-base", "bert-large", "llama-3-8b"):
        shape = Shape.named(name)
        for P, depth, classes in ((20, shape.layers, 9), (100, 4, 2)):
            sizes = (P, depth, shape.d_kv, shape.d_model, classes)
            head = Classification(tuple(map(str, range(classes)))).parameters(shape.d_model)
            wanted = count(PTuningV2(P, depth=depth), shape) + head
            given, case = answer(*sizes), f"{P} tokens, {depth} layers, {classes} classes, {name}"
            expect(isinstance(given, int), f"a count is a whole number; yours is {given!r}")
            for wrong, diagnosis in (
                (_one_vector, "a virtual token is two vectors in each layer, a key and a value"),
                (_by_model, "keys and values are d_kv wide: this model has grouped heads"),
                (_no_head, "you left out the head, which trains too"),
                (_no_bias, "a linear head has a bias for each class"),
                (_input_too, "you counted tokens at the input: the paper's method puts "
                 "nothing at the input"),
            ):  # fmt: skip
                expect(given != wrong(*sizes) or given == wanted, f"{case}: {diagnosis}")
            expect(given == wanted, f"{case}: yours is {given:,}, the package counts {wanted:,}")
    return "the closed form holds on three models"


# --- 3 · which definition is it? ---------------------------------------------------------------

DEFINITIONS = {
    "paper": "keys and values in every layer",
    "both": "tokens at the input, and keys and values",
    "replaced": "tokens at the input, replaced in every layer",
    "growing": "tokens put in front of every layer's output",
}
UNKNOWN = {"A": "replaced", "B": "growing", "C": "paper", "D": "both"}


@torch.no_grad()
def observe(base, methods: dict, text: str, seed: int = 0) -> pd.DataFrame:
    """What can be seen of the four definitions under their letters: queries and keys by layer.

    `methods` has the names of `DEFINITIONS`. One text, no head.
    """
    encoded = base.tokenizer([text], return_tensors="pt").to(base.device)
    rows = {}
    for letter, name in UNKNOWN.items():
        with attach(base, methods[name], seed=seed) as tuned:
            anatomy = base.anatomy
            with attention.recorded(base.model, anatomy.attentions) as records:
                tuned(encoded["input_ids"], encoded["attention_mask"])
            first, last = (records[anatomy.attentions[i].name] for i in (0, -1))
            rows[letter] = {
                "queries, layer 1": first.query.shape[2],
                "keys, layer 1": first.key.shape[2],
                "queries, last layer": last.query.shape[2],
                "keys, last layer": last.key.shape[2],
                "numbers trained": f"{tuned.count().parameters:,}",
            }
    return pd.DataFrame(rows).T


_SIGNS = {
    "paper": "as many queries as the text has tokens and P keys more, in every layer",
    "both": "P more queries than the text has tokens, and P more keys than that",
    "replaced": "P more queries and P more keys than the text has tokens, in every layer",
    "growing": "nothing in layer 1, and in the last layer several times P more of both",
}


@exercise(
    "Which definition is it?",
    solution=dict(UNKNOWN),
    difficulty=2,
    importance=4,
    minutes=5,
    hints=(
        "Virtual keys and values add keys and no queries. A virtual token is a token: it asks too.",
        "Look at the first and the last layer of one row. Does the number of keys grow?",
    ),
    mistakes=(
        (swapped(UNKNOWN, "A", "C"), "Look again at A"),
        (swapped(UNKNOWN, "B", "D"), "Look again at B"),
        (UNKNOWN | {"A": "paper"}, "twice"),
        (UNKNOWN | {"D": "prefix tuning"}, "none of the four definitions"),
        ({"A": "replaced"}, "has no name yet"),
    ),
)
def name_the_definition(answer):
    signs = {name: f"It has {sign}" for name, sign in _SIGNS.items()}
    return match(answer, UNKNOWN, DEFINITIONS, signs, where="", what="definition", word="name")


# --- 4 · debug the broken adapter --------------------------------------------------------------

FAULTS = {
    "head": "the head is frozen at its random start",
    "cut": "the prefix was cut off from the graph",
    "optimiser": "the optimiser was never given the prefix",
    "shift": "each state is held against the label of the token before",
}
WARD = {"A": "optimiser", "B": "shift", "C": "head", "D": "cut"}


def clinic(base, task, steps: int = 8, batch_size: int = 4, seed: int = 0) -> pd.DataFrame:
    """Train one sound P-tuning v2 and the four patients, and write down what can be seen.

    One row a step: patient, step, loss, prefix gradient (its norm; NaN: there is none), and how
    far prefix and head have moved (norms).
    """
    patients = {"sound": None, **WARD}
    rows = [
        row
        for name, fault in patients.items()
        for row in _examine(name, fault, base, task, steps, batch_size, seed)
    ]
    columns = ["patient", "step", "loss", "prefix gradient", "prefix moved", "head moved"]
    return pd.DataFrame(rows, columns=columns)


def _examine(patient, fault, base, task, steps, batch_size, seed):
    rows, order = [], torch.Generator().manual_seed(seed)
    with attach(base, PTuningV2(8), seed=seed, head=task.head) as tuned:
        parts = {"prefix": list(tuned.prefix), "head": list(tuned.linear.parameters())}
        if fault == "cut":
            source = tuned.sources[PTuningV2.name]
            source.instead = {key: t.detach() for key, t in source.module().items()}
        start = {name: [p.detach().clone() for p in part] for name, part in parts.items()}
        groups = [
            {"params": [p.detach().clone() for p in parts["prefix"]] if fault == "optimiser"
             else parts["prefix"], "lr": 0.1},
            {"params": parts["head"], "lr": 0.0 if fault == "head" else 5e-3},
        ]  # fmt: skip
        optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        for step in range(1, steps + 1):
            chosen = torch.randperm(len(task.train), generator=order)[:batch_size].tolist()
            batch = task.batch_for(tuned, [task.train[i] for i in chosen])
            if fault == "shift":
                batch["labels"] = F.pad(batch["labels"], (1, -1), value=-100)
            loss = tuned.batch_loss(batch)
            loss.backward()
            gradients = [p.grad for p in parts["prefix"] if p.grad is not None]
            gradient = (
                torch.stack([g.norm() for g in gradients]).norm().item()
                if gradients
                else float("nan")
            )
            optimiser.step()
            for p in tuned.trainable.values():
                p.grad = None
            moved = [_distance(part, start[name]) for name, part in parts.items()]
            rows.append((patient, step, loss.item(), gradient, *moved))
    return rows


def _distance(now, before) -> float:
    """The Euclidean distance between two lists of tensors."""
    return (
        sum((a.detach() - b).square().sum().item() for a, b in zip(now, before, strict=True)) ** 0.5
    )


_SYMPTOMS = {
    "optimiser": "a prefix with a gradient that does not move at all: the gradient is computed "
    "and nobody uses it",
    "cut": "a prefix without any gradient, and a head that learns: no path leads back to it",
    "head": "a prefix that moves and a head that does not move at all",
    "shift": "a prefix and a head that move as in the sound one, and a loss that stays behind: "
    "they learn, and not what was asked",
}


@exercise(
    "Debug the broken adapter",
    solution=dict(WARD),
    difficulty=3,
    importance=5,
    minutes=10,
    hints=(
        "Look at what does not move. A frozen head, a prefix without a gradient and a prefix that "
        "the optimiser does not know have three different rows.",
        "One patient has nothing wrong with gradients or steps. Then look at the labels.",
    ),
    mistakes=(
        (swapped(WARD, "A", "D"), "Look again at patient A"),
        (swapped(WARD, "B", "C"), "Look again at patient B"),
        (WARD | {"C": "shift"}, "twice"),
        (WARD | {"B": "too few steps"}, "none of the four faults"),
        ({"A": "optimiser"}, "has no diagnosis yet"),
    ),
)
def diagnose(answer):
    signs = {fault: f"It has {sign}" for fault, sign in _SYMPTOMS.items()}
    return match(answer, WARD, FAULTS, signs)


# --- predict first -----------------------------------------------------------------------------


def _small(layers: int = 3) -> Base:
    """A small random BERT without a tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Base("a small BERT", BertForMaskedLM(config), None)


@question(
    "Prefix tuning without its MLP, and P-tuning v2 at full depth: the same length, the same seed. "
    "How far apart are the two outputs?",
    {
        "a": ("0, exactly", "They hold the same tensors, and put them in the same places."),
        "b": ("a little: P-tuning v2 puts tokens at the input as well",
              "A source says so. The paper and its code leave the input alone."),
        "c": ("a lot: the approach is completely different", "A source says so. Both put trained "
              "keys and values into every attention."),
    },
)  # fmt: skip
def predict_difference():
    base, ids, outputs = _small(), torch.arange(5, 15)[None], []
    for method in (PrefixTuning(6, init="random"), PTuningV2(6, init="random")):
        with attach(base, method, seed=0) as tuned, torch.no_grad():
            outputs.append(tuned(ids))
    with torch.no_grad():
        plain = base(ids)
    apart, away = ((outputs[0] - other).abs().max().item() for other in (outputs[1], plain))
    right = "a" if apart == 0 else "b" if apart < away / 2 else "c"
    return right, (
        f"On a small BERT the largest difference is {apart}; from the plain model both are "
        f"{away:.2f} away."
    )


@question(
    "BERT-base for classification in two classes, 20 virtual tokens in every layer, made by an MLP "
    "with 512 numbers in the middle. A source prints 245,760 trainable parameters for it. "
    "What does it print in truth?",
    {
        "a": ("245,760", "That is 10 · 24 · 1,024: another model, and one vector for each token."),
        "b": ("370,178", "That is without the MLP. While it trains, the MLP trains."),
        "c": ("9,866,242", "The table, the MLP and the head all train."),
        "d": ("9,864,704", "You left out the head: it trains too."),
    },
)
def predict_count():
    shape = Shape.named("bert-base")
    head = Classification(("no", "yes")).parameters(shape.d_model)
    made = count(PTuningV2(20, prefix_projection=True), shape)
    flat = count(PTuningV2(20), shape)
    by_letter = {"a": 10 * 24 * 1024, "b": flat + head, "c": made + head, "d": made}
    right = next(letter for letter, number in by_letter.items() if number == made + head)
    return right, (
        f"{made:,} for table and MLP and {head:,} for the head make {made + head:,}. "
        f"Afterwards {flat:,} are kept, and the head."
    )


@question(
    "A source's code puts P = 20 vectors in front of the output of each layer. BERT-base has 12 "
    "layers and reads 40 tokens. How many vectors come out, and which of them is the first?",
    {
        "a": ("40: the first token's", "Nothing takes the vectors out again."),
        "b": ("60: a virtual token's", "Each layer adds 20 more to what the one before added."),
        "c": ("280: a vector of the last layer's prompt, the same for every text",
              "Each of the 12 layers adds 20, and no layer comes after the last 20."),
    },
)  # fmt: skip
def predict_growth():
    layers, P, T = Shape.named("bert-base").layers, 20, 40
    base = _small(layers)
    prompts = torch.randn(layers, P, base.anatomy.shape.d_model)
    (blocks,) = base.anatomy.layers.values()
    hooks = [
        block.register_forward_hook(
            lambda m, a, h, p=p: torch.cat([p.expand(len(h), -1, -1), h], 1)
        )
        for block, p in zip(blocks, prompts, strict=True)
    ]
    with torch.no_grad():
        texts = torch.randint(100, (2, T))
        out = base.anatomy.backbone(input_ids=texts).last_hidden_state
    for hook in hooks:
        hook.remove()
    by_letter = {"a": T, "b": T + P, "c": T + layers * P}
    right = next(letter for letter, number in by_letter.items() if number == out.shape[1])
    same = torch.equal(out[0, 0], out[1, 0])
    return right, (
        f"{T} + {layers} · {P} = {out.shape[1]} come out of a small model of as many layers; "
        f"the first is the same for two different texts: {same}."
    )
