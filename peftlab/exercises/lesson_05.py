"""Lesson 05, P-tuning v2: write its attention, tell four definitions apart, count it, send a
gradient through its head, debug it."""

import pandas as pd
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from peftlab import attention
from peftlab.accounting import count
from peftlab.bases import Base
from peftlab.bases.shapes import Shape
from peftlab.exercises import exercise, expect, question
from peftlab.exercises.clinic import Ward, course
from peftlab.exercises.forms import a_count, a_tensor, unlike
from peftlab.methods import PrefixTuning, PTuningV2
from peftlab.methods.heads import Classification
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


def _mask_behind(q, K, V, P_k, P_v, mask):
    K = torch.cat([P_k.expand(len(K), -1, -1, -1), K], dim=2)
    V = torch.cat([P_v.expand(len(V), -1, -1, -1), V], dim=2)
    mask = F.pad(mask, (0, P_k.shape[1]), value=1)
    return attend_with_prefix(q, K, V, P_k[:, :0], P_v[:, :0], mask)


def _weighed(hide):
    """The attention with another way to hide: `hide(scores, mask)` gives the weights."""

    def wrong(q, K, V, P_k, P_v, mask):
        K, V = (torch.cat([p.expand(len(q), -1, -1, -1), x], 2) for p, x in ((P_k, K), (P_v, V)))
        mask = F.pad(mask, (P_k.shape[1], 0), value=1)[:, None, None]
        return hide(q @ K.transpose(2, 3) / q.shape[-1] ** 0.5, mask) @ V

    return wrong


_added = _weighed(lambda scores, mask: (scores + mask).softmax(-1))
_after_softmax = _weighed(lambda scores, mask: scores.softmax(-1) * mask)
_causal = _weighed(lambda scores, mask: scores.masked_fill(
    (mask == 0) | torch.ones(scores.shape[2:]).triu(scores.shape[3] - scores.shape[2] + 1).bool(),
    float("-inf")).softmax(-1))  # fmt: skip


@exercise(
    "Write the attention of P-tuning v2", solution=attend_with_prefix,
    difficulty=3, importance=5, minutes=10,
    hints=(
        "Keys and values get P rows in front. The queries stay as they are.",
        "`P_k.expand(batch, -1, -1, -1)` gives every text of the batch the same prefix.",
        "The mask gets P columns as well, on the same side, and they are ones: every query may "
        "see the prefix."),
    mistakes=(
        (lambda q, K, V, P_k, *others: attend_with_prefix(
            torch.cat([P_k.expand(len(q), -1, -1, -1), q], dim=2), K, V, P_k, *others),
         "more output rows than queries"),
        (lambda q, K, V, P_k, P_v, mask: attend_with_prefix(q, K, V, P_k[:, :0], P_v[:, :0], mask),
         "your output is as if there were no prefix: is it masked out, or left out?"),
        (_mask_behind, "keys grew in front and the mask at the other end: a real token is hidden "
         "for each that is not, where a text is padded"),
        (lambda q, *others: attend_with_prefix(q * q.shape[-1] ** 0.5, *others),
         "the scores are too large: divide by the square root of head_dim"),
        (lambda q, K, V, P_k, P_v, mask: attend_with_prefix(q, K, V, P_v, P_k, mask),
         "P_k and P_v stand in each other's place"),
        (lambda *tensors: attend_with_prefix(*tensors[:-1], torch.ones_like(tensors[-1])),
         "right for the text without padding; the other one looks at its padding"),
        (_causal, "no token sees a later one: this encoder reads in both directions, and only "
         "padding is hidden"),
        (_added, "you added a mask of 0 and 1 to the scores: what is hidden needs a score of −∞"),
        (_after_softmax, "you hide after the softmax: the weights that are left do not sum to 1")),
    otherwise=unlike, again=(3, 7, 5, 9),
    praise="keys, values and mask grow together, and the queries stay", atol=1e-5,
)  # fmt: skip
def write_the_attention(answer, heads=2, T=4, P=3, head_dim=8):
    generator, batch = torch.Generator().manual_seed(0), 2
    q, K, V = (torch.randn(batch, heads, T, head_dim, generator=generator) for _ in range(3))
    P_k, P_v = (torch.randn(heads, P, head_dim, generator=generator) for _ in range(2))
    mask = torch.ones(batch, T, dtype=torch.long)
    mask[1, -(T // 2) :] = 0  # padded on the right
    given = a_tensor(answer(q, K, V, P_k, P_v, mask))
    expect(
        given.ndim != 4 or given.shape[2] <= T,
        f"{given.shape[2] if given.ndim == 4 else 0} rows for {T} tokens: you have more output "
        "rows than queries. A prefix of the queries would make outputs that nobody reads",
    )
    return a_tensor(given, (batch, heads, T, head_dim), "one row for each query: the shape")


# --- 2 · count ---------------------------------------------------------------------------------
def numbers_trained(P, depth, d_kv, d_model, classes):
    return 2 * P * d_kv * depth + (d_model + 1) * classes


COUNTED = {
    f"{P} tokens, {depth} layers, {classes} classes, {name}": (name, P, depth, classes)
    for name in ("bert-base", "bert-large", "llama-3-8b")
    for P, depth, classes in ((20, Shape.named(name).layers, 9), (100, 4, 2))
}


def _count(name, P, depth, classes):
    head = Classification(tuple(map(str, range(classes))))
    return count(PTuningV2(P, depth=depth), name) + head.parameters(Shape.named(name).d_model)


@exercise(
    "Count it with a depth and a head", solution=numbers_trained,
    difficulty=2, importance=4, minutes=5,
    hints=(
        "A virtual token is one key and one value in each of `depth` layers.",
        "Keys and values are d_kv wide, which is d_model only without grouped heads.",
        "A linear head has d_model weights and one bias for each class."),
    mistakes=(
        (lambda P, depth, d_kv, d_model, classes: P * d_kv * depth + (d_model + 1) * classes,
         "{case}: a virtual token is two vectors in each layer, a key and a value"),
        (lambda P, depth, d_kv, d_model, classes: 2 * P * d_model * depth + (d_model + 1) * classes,
         "{case}: keys and values are d_kv wide: this model has grouped heads"),
        (lambda P, depth, d_kv, d_model, classes: 2 * P * d_kv * depth,
         "{case}: you left out the head, which trains too"),
        (lambda P, depth, d_kv, d_model, classes: 2 * P * d_kv * depth + d_model * classes,
         "{case}: a linear head has a bias for each class"),
        (lambda P, depth, d_kv, d_model, classes:
         P * d_model + numbers_trained(P, depth, d_kv, d_model, classes),
         "{case}: you counted tokens at the input: the paper's method puts nothing at the input")),
    otherwise="{case}: yours is {given:,}, the package counts {right:,}",
    praise="the closed form holds on three models",
    right=lambda: {case: _count(*sizes) for case, sizes in COUNTED.items()},
)  # fmt: skip
def count_with_depth(answer):
    made = {}
    for case, (name, P, depth, classes) in COUNTED.items():
        shape = Shape.named(name)
        made[case] = a_count(answer(P, depth, shape.d_kv, shape.d_model, classes))
    return made


# --- 3 · which definition is it? ---------------------------------------------------------------
LETTERS = Ward({
    "paper": ("C", "keys and values in every layer",
        "It has as many queries as the text has tokens and P keys more, in every layer"),
    "both": ("D", "tokens at the input, and keys and values",
        "It has P more queries than the text has tokens, and P more keys than that"),
    "replaced": ("A", "tokens at the input, replaced in every layer",
        "It has P more queries and P more keys than the text has tokens, in every layer"),
    "growing": ("B", "tokens put in front of every layer's output",
        "It has nothing in layer 1, and in the last layer several times P more of both"),
}, where="", what="definition", word="name")  # fmt: skip
DEFINITIONS = LETTERS.faults


@torch.no_grad()
def observe(base, methods: dict, text: str, seed: int = 0) -> pd.DataFrame:
    """What can be seen of the four definitions under their letters: queries and keys by layer.

    `methods` has the names of `DEFINITIONS`. One text, no head.
    """
    encoded = base.tokenizer([text], return_tensors="pt").to(base.device)
    rows = {}
    for letter, name in LETTERS.right.items():
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


name_the_definition = LETTERS.exercise(
    "name_the_definition", "Which definition is it?",
    confused=("AC", "BD"), unknown="prefix tuning", difficulty=2, importance=4, minutes=5,
    hints=(
        "Virtual keys and values add keys and no queries. A virtual token is a token: it asks too.",
        "Look at the first and the last layer of one row. Does the number of keys grow?"),
)  # fmt: skip


# --- 4 · the gradient that a prefix gets through the head -----------------------------------------
def gradient_at_state(W, b, h, tag):
    p = (W @ h + b).softmax(dim=0)
    p[tag] -= 1
    return W.T @ p


def _through(change):
    """W transposed times what `change(scores, y)` makes of the scores and of the one-hot tag."""

    def wrong(W, b, h, tag):
        return W.T @ change(W @ h + b, F.one_hot(torch.tensor(tag), len(W)).to(h))

    return wrong


@exercise(
    "Send the gradient through the head", solution=gradient_at_state,
    difficulty=3, importance=4, minutes=8,
    hints=(
        "Begin with the probabilities: a softmax over the scores W h + b.",
        "∂L/∂s is p − y. y is 1 at the right tag and 0 elsewhere, so take 1 away in one place.",
        "s = W h + b, so a change of h reaches s through W, and the gradient comes back through W "
        "transposed."),
    mistakes=(
        (_through(lambda s, y: s.softmax(0)), "you left the right tag out: p − y, not p"),
        (_through(lambda s, y: y - s.softmax(0)), "the sign is turned round: that points to a "
         "smaller loss, and the gradient points to a larger one"),
        (_through(lambda s, y: s - y), "p is the softmax of the scores, and you took the scores "
         "themselves"),
        (lambda W, b, h, tag: gradient_at_state(W, torch.zeros_like(b), h, tag),
         "you left the bias out of the scores"),
        (lambda W, b, h, tag: (W @ h + b).softmax(0) - F.one_hot(torch.tensor(tag), len(W)),
         "that is ∂L/∂s, a number for each tag: W transposed takes it to the numbers of the state",
         lambda given, right: given.shape != right.shape and given.ndim == 1),
        (lambda W, b, h, tag: torch.outer(
            (W @ h + b).softmax(0) - F.one_hot(torch.tensor(tag), len(W)), h),
         "that is ∂L/∂W, which the head learns from: asked is what goes on to the state",
         lambda given, right: given.ndim == 2)),
    otherwise=unlike, again=(7, 4),
    praise="all that a prefix learns comes through W", atol=1e-6,
)  # fmt: skip
def through_the_head(answer, classes=5, d=3):
    generator = torch.Generator().manual_seed(0)
    W, b, h = (torch.randn(*n, generator=generator) for n in ((classes, d), (classes,), (d,)))
    return a_tensor(answer(W.clone(), b.clone(), h.clone(), classes - 2))


# --- 5 · debug the broken adapter --------------------------------------------------------------
CLINIC = Ward({
    "head": ("C", "the head is frozen at its random start",
        "It has a prefix that moves and a head that does not move at all"),
    "cut": ("D", "the prefix was cut off from the graph",
        "It has a prefix without any gradient, and a head that learns: no path leads back to it"),
    "optimiser": ("A", "the optimiser was never given the prefix",
        "It has a prefix with a gradient that does not move at all: the gradient is computed and "
        "nobody uses it"),
    "shift": ("B", "each state is held against the label of the token before",
        "It has a prefix and a head that move as in the sound one, and a loss that stays behind: "
        "they learn, and not what was asked"),
})  # fmt: skip
WARD = CLINIC.right


def clinic(base, task, steps: int = 8, batch_size: int = 4, seed: int = 0) -> pd.DataFrame:
    """Train one sound P-tuning v2 and the four patients, and write down what can be seen.

    One row a step: patient, step, loss, the norms of the gradients of prefix and head (NaN: there
    is none), and how far the two have moved (norms).
    """
    return CLINIC.examine(lambda fault: _examine(fault, base, task, steps, batch_size, seed))


def _examine(fault, base, task, steps, batch_size, seed):
    def loss_of(examples):
        batch = task.batch_for(tuned, examples)
        if fault == "shift":
            batch["labels"] = F.pad(batch["labels"], (1, -1), value=-100)
        return tuned.batch_loss(batch)

    with attach(base, PTuningV2(8), seed=seed, head=task.head) as tuned:
        prefix, head = list(tuned.prefix), list(tuned.linear.parameters())
        if fault == "cut":
            source = tuned.sources[PTuningV2.name]
            source.instead = {key: t.detach() for key, t in source.module().items()}
        trained = [p.detach().clone() for p in prefix] if fault == "optimiser" else prefix
        groups = [
            {"params": trained, "lr": 0.1},
            {"params": head, "lr": 0.0 if fault == "head" else 5e-3},
        ]
        optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        parts = {"prefix {}": prefix, "head {}": head}
        return [*course(parts, optimiser, loss_of, task, steps, batch_size, seed)]


diagnose = CLINIC.exercise(
    "diagnose", "Debug the broken adapter", confused=("AD", "BC"), unknown="too few steps",
    difficulty=3, importance=5, minutes=10,
    hints=(
        "Look at what does not move. A frozen head, a prefix without a gradient and a prefix that "
        "the optimiser does not know have three different rows.",
        "One patient has nothing wrong with gradients or steps. Then look at the labels."),
)  # fmt: skip


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
              "You will read that. The paper and its code leave the input alone."),
        "c": ("a lot: the approach is completely different", "You will read that too. Both put "
              "trained keys and values into every attention.")},
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
    "with 512 numbers in the middle. You will read that 245,760 numbers train. How many do?",
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
    "You will find code that puts P = 20 vectors in front of the output of each layer. BERT-base "
    "has 12 layers and reads 40 tokens. How many vectors come out, and which is the first?",
    {
        "a": ("40: the first token's", "Nothing takes the vectors out again."),
        "b": ("60: a virtual token's", "Each layer adds 20 more to what the one before added."),
        "c": ("280: a vector of the last layer's prompt, the same for every text",
              "Each of the 12 layers adds 20, and no layer comes after the last 20.")},
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
