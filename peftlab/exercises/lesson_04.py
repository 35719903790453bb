"""Lesson 04, prefix tuning: the mask, the gate, attention with a prefix, fold, diagnose."""

import math

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.masking_utils import eager_mask

from peftlab.accounting import count
from peftlab.bases.caches import cache_name
from peftlab.bases.shapes import Shape
from peftlab.exercises import after, exercise, expect, question
from peftlab.exercises.clinic import Ward, course, distance
from peftlab.exercises.forms import a_tensor, same, several, unlike
from peftlab.methods import DeepPromptTuning, PrefixTuning
from peftlab.methods.prompt_starts import initial_prefix
from peftlab.training import target_loss


# --- 1 · the mask ------------------------------------------------------------------------------
def may_see(mask, P):
    batch, T = mask.shape
    text = torch.ones(T, T, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    prefix = torch.ones(batch, 1, T, P, dtype=torch.bool)
    return torch.cat([prefix, text], dim=-1)


def _prefix(seen):
    return seen[..., : seen.shape[-1] - seen.shape[-2]]


def _plain_triangle(mask, P):
    whole = F.pad(mask, (P, 0), value=1)[:, None, None, :].bool()
    return torch.ones(mask.shape[1], P + mask.shape[1], dtype=torch.bool).tril() & whole


@exercise(
    "Let the mask see the prefix", solution=may_see, difficulty=3, importance=5, minutes=8,
    hints=(
        "The result has a row for each of the T queries and a column for each of the P + T keys.",
        "The left block, T × P, is True throughout: every query sees the whole prefix.",
        "The right block is the usual one: not the future (`tril`), and no padding."),
    mistakes=(
        (_plain_triangle, "your triangle begins at the first column: the first query sees one "
         "virtual key, and the last tokens are seen by nobody. The triangle belongs to the text's "
         "columns"),
        (lambda mask, P: torch.zeros(may_see(mask, P).shape).masked_fill(
            ~may_see(mask, P), -math.inf), "your mask is one to be added to scores, 0 and −∞: here "
         "it says True where a query may see", lambda given, right: given.min() < 0),
        (lambda mask, P: F.pad(may_see(mask, 0), (P, 0)), "your mask hides the prefix: it would "
         "never be read, and never train", lambda given, right: not _prefix(given).any()),
        (after(may_see, lambda seen: seen & (torch.arange(seen.shape[-1]) > 0)),
         "some queries do not see all of the prefix",
         lambda given, right: not _prefix(given).all()),
        (lambda mask, P: may_see(mask, P) | F.pad(mask[:, None, None], (P, 0), value=1).bool(),
         "a token sees the future: the text's columns need the causal triangle",
         lambda given, right: given[0, 0, :, -len(right[0, 0]) :].triu(1).any()),
        (lambda mask, P: may_see(torch.ones_like(mask), P), "the second row is padded, and its "
         "padding is seen", lambda given, right: (given & ~right)[1].any()),
        (lambda mask, P: may_see(mask, 0), "there are 7 keys")),
    otherwise="the text's columns have changed",
    praise="every query sees the prefix, nobody sees padding or the future", again=(5, 7),
)  # fmt: skip
def mask_for(answer, P=3, T=4):
    mask, batch = torch.ones(2, T, dtype=torch.long), 2
    mask[1, : T // 2] = 0  # padded on the left
    given = a_tensor(answer(mask, P))
    expect(
        given.ndim == 4 and given.shape[-1] == P + T,
        f"there are {P + T} keys, {P} of them virtual, and your mask has {given.shape[-1]} columns "
        f"in a shape of {tuple(given.shape)}; wanted is {(batch, 1, T, P + T)}",
    )
    return (given if (given < 0).any() else given.bool()).expand(batch, 1, T, P + T)


# --- 2 · the gate ------------------------------------------------------------------------------
def gate_of(p, t):
    return torch.sigmoid(p.logsumexp(dim=-1) - t.logsumexp(dim=-1))


@exercise(
    "Compute the gate", solution=gate_of, difficulty=2, importance=5, minutes=6,
    hints=(
        "λ = Z_P / (Z_P + Z_T). Each Z is a sum of exponentials over the last axis.",
        "Some scores here are above 100, and e to that power is infinite in float32. "
        "Stay with the logarithms: `p.logsumexp(dim=-1)` is log Z_P.",
        "a / (a + b) is 1 / (1 + b / a), and b / a is e to the power log b − log a: a sigmoid."),
    mistakes=(
        (lambda p, t: p.exp().sum(-1) / (p.exp().sum(-1) + t.exp().sum(-1)),
         "the formula is right and the numbers are not: e to the power of the largest scores "
         "overflows. Compute with log Z: `logsumexp`",
         lambda given, right: not given.isfinite().all()),
        (lambda p, t: torch.sigmoid(t.logsumexp(-1) - p.logsumexp(-1)),
         "that is 1 − λ, the part of the text"),
        (lambda p, t: torch.sigmoid(p.mean(-1) - t.mean(-1)), "you compare mean scores: a softmax "
         "adds up exponentials, so one large score outweighs many small ones"),
        (lambda p, t: torch.sigmoid(p.amax(-1) - t.amax(-1)), "you compare the largest scores "
         "alone: every key adds its part to Z"),
        (lambda p, t: p.logsumexp(-1) / (p.logsumexp(-1) + t.logsumexp(-1)),
         "that is a ratio of logarithms: λ is a ratio of the sums themselves"),
        (lambda p, t: torch.cat([p, t], -1).softmax(-1)[..., 0], "that is the share of the first "
         "virtual token alone: λ is that of all of them"),
        (lambda p, t: torch.cat([p, t], -1).softmax(-1)[..., : p.shape[-1]],
         "that is a share for each virtual token: add them up, one λ for each query",
         lambda given, right: given.ndim == right.ndim + 1)),
    otherwise=unlike, again=(5, 7, 4), atol=1e-5,
    praise="one number between 0 and 1 for each query, however large the scores are",
)  # fmt: skip
def gate(answer, queries=4, P=3, T=5):
    draw = torch.Generator().manual_seed(0)
    p, t = (torch.randn(queries, n, generator=draw) for n in (P, T))
    p[1], t[1] = p[1] + 120, t[1] + 120  # too large for exp in float32
    t[0, 1:] = -math.inf  # the first query sees one token of the text
    given = a_tensor(answer(p, t))
    return given[:, 0] if given.shape == (queries, 1) else given


# --- 3 · attention with a prefix ---------------------------------------------------------------
def attend_with_prefix(query, key, value, mask, P_k, P_v):
    key = torch.cat([P_k.expand(len(key), -1, -1, -1), key], dim=2)
    value = torch.cat([P_v.expand(len(value), -1, -1, -1), value], dim=2)
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    weights = (scores + F.pad(mask, (P_k.shape[1], 0))).softmax(dim=-1)
    return weights @ value


def _two_softmaxes(query, key, value, mask, P_k, P_v):
    scale = math.sqrt(query.shape[-1])
    text = (query @ key.transpose(2, 3) / scale + mask).softmax(-1) @ value
    return text + (query @ P_k.transpose(1, 2) / scale).softmax(-1) @ P_v


def _wrong_side(query, key, value, mask, P_k, P_v):
    key = torch.cat([P_k.expand(len(key), -1, -1, -1), key], dim=2)
    value = torch.cat([P_v.expand(len(value), -1, -1, -1), value], dim=2)
    mask = F.pad(mask, (0, P_k.shape[1]))
    return attend_with_prefix(query, key, value, mask, P_k[:, :0], P_v[:, :0])


def _prefix_behind(query, key, value, mask, P_k, P_v):
    key = torch.cat([key, P_k.expand(len(key), -1, -1, -1)], dim=2)
    value = torch.cat([value, P_v.expand(len(value), -1, -1, -1)], dim=2)
    mask = F.pad(mask, (P_k.shape[1], 0))
    return attend_with_prefix(query, key, value, mask, P_k[:, :0], P_v[:, :0])


@exercise(
    "Attend with a prefix", solution=attend_with_prefix, difficulty=3, importance=5, minutes=12,
    hints=(
        "Keys and values get P rows more, along the axis of the sequence (dim 2). Queries do not.",
        "`P_k.expand(batch, -1, -1, -1)` gives each row of the batch the same prefix.",
        "The mask is added to the scores, so it needs P columns more, on the left, of zeros: "
        "`F.pad(mask, (P, 0))`.",
        "One softmax over all P + T scores. Two of them would give the prefix a weight of 1."),
    mistakes=(
        (_two_softmaxes, "you took two softmaxes and added the results: prefix and text must "
         "share one softmax, so that what the prefix takes, the text loses"),
        (lambda q, k, v, mask, P_k, P_v: attend_with_prefix(
            torch.cat([P_k.expand(len(k), -1, -1, -1), q], dim=2), k, v,
            F.pad(mask, (0, 0, P_k.shape[1], 0)), P_k, P_v), "rows of output"),
        (lambda q, *others: attend_with_prefix(q * math.sqrt(q.shape[-1]), *others),
         "the scores are too large: divide them by the square root of head_dim"),
        (lambda q, k, v, mask, P_k, P_v: attend_with_prefix(q, k, v, mask, P_k[:, :0], P_v[:, :0]),
         "the output is as if there were no prefix: its columns of the mask must be 0, and a very "
         "negative number hides it"),
        (_wrong_side, "you lengthened the mask on the right. The prefix's columns are the first "
         "ones, so the causal triangle must move to the right: pad on the left"),
        (_prefix_behind, "your keys are [K; P_k] and the mask is padded on the left: prefix and "
         "mask must grow at the same end"),
        (lambda q, k, v, mask, P_k, P_v: attend_with_prefix(q, k, v, 0 * mask, P_k, P_v),
         "the mask is not added to the scores: every token sees the future"),
        (lambda q, k, v, mask, P_k, P_v: attend_with_prefix(q, k, v, mask, P_v, P_k),
         "P_k and P_v stand in each other's place"),
        (lambda q, k, v, mask, P_k, P_v: attend_with_prefix(
            q * math.sqrt(q.shape[-1] / (k.shape[2] + P_k.shape[1])), k, v, mask, P_k, P_v),
         "you divide by the square root of the number of keys: head_dim is query.shape[-1]")),
    otherwise=unlike, again=(3, 7, 5, 9),
    praise="one softmax over prefix and text, and the causal mask holds", atol=1e-5,
)  # fmt: skip
def attend(answer, heads=3, T=4, P=2, d=8):
    draw, batch = torch.Generator().manual_seed(0), 2
    query, key, value = (torch.randn(batch, heads, T, d, generator=draw) for _ in range(3))
    P_k, P_v = (torch.randn(heads, P, d, generator=draw) for _ in range(2))
    blocked = torch.ones(T, T).triu(1).bool()
    mask = torch.zeros(batch, 1, T, T).masked_fill(blocked, torch.finfo(torch.float32).min)
    given = a_tensor(answer(query, key, value, mask, P_k, P_v))
    expect(
        given.ndim != 4 or given.shape[2] != T + P,
        f"{T + P} rows of output for {T} tokens: you gave the prefix queries as well. It is read; "
        "it asks nothing",
    )
    return a_tensor(given, tuple(query.shape), "the output is as the queries: its shape")


# --- 4 · fold the MLP away ---------------------------------------------------------------------
def fold(table, mlp, layers, kv_heads):
    with torch.no_grad():
        made = mlp(table).view(len(table), 2, layers, kv_heads, -1)
    P_k, P_v = made.permute(1, 2, 3, 0, 4)
    return P_k.clone(), P_v.clone()


@exercise(
    "Fold the MLP away", solution=fold, difficulty=4, importance=3, minutes=10,
    hints=(
        "Run the MLP once: `mlp(table)` is (P, 2 · layers · kv_heads · head_dim).",
        "A virtual token's row holds first all its keys, then all its values, layer by layer, head "
        "by head: `.view(P, 2, layers, kv_heads, -1)`.",
        "Now the axes stand in the wrong order. `permute` moves them; `view` alone would mix the "
        "numbers of different virtual tokens."),
    mistakes=(
        (lambda table, *_: (table, table), "that is the table itself: its rows go through the MLP "
         "before anything reads them", lambda given, right: given[0].ndim == 2),
        (after(fold, lambda P_k, P_v: (P_k.transpose(1, 2), P_v.transpose(1, 2))), "the axes of "
         "heads and virtual tokens are exchanged; wanted is (layers, kv_heads, P, head_dim)",
         lambda given, right: given[0].shape == right[0].transpose(1, 2).shape),
        (after(fold, lambda P_k, P_v: (P_v, P_k)), "you return the values where the keys belong: "
         "the first half of a row is the keys", lambda given, right: same(given[0], right[1])),
        (lambda table, mlp, layers, heads:
         mlp(table).view(len(table), 2, layers, heads, -1).permute(1, 2, 3, 0, 4),
         "the result still hangs on the MLP: it has a gradient, and cannot be stored without the "
         "graph. Detach it", lambda given, right: given[2]),
        (lambda table, mlp, layers, heads:
         mlp(table).detach().reshape(2, layers, heads, len(table), -1),
         "the shape is right, but you mixed the virtual tokens: one key has numbers of several "
         "rows. Give each row its axes first, then permute",
         lambda given, right: same(*(torch.cat([*map(torch.flatten, made[:2])]).sort().values
                                     for made in (given, right))))),
    otherwise=lambda given, right: "keys and values are (layers, kv_heads, P, head_dim): "
        f"{unlike(given, right)}",
    praise="keys and values of every layer, and the MLP is not needed any more",
    again=(7, 9, 5, 3, 5),
)  # fmt: skip
def fold_the_mlp(answer, P=5, d=6, layers=3, kv_heads=2, head_dim=4):
    """Keys, values, and whether they hang on the MLP."""
    m, out = 7, 2 * layers * kv_heads * head_dim
    table = nn.Parameter(torch.randn(P, d))
    mlp = nn.Sequential(nn.Linear(d, m), nn.Tanh(), nn.Linear(m, out))
    given = answer(table, mlp, layers, kv_heads)
    given = [*given] if isinstance(given, torch.Tensor) and given.ndim else given
    P_k, P_v = several(given, 2, "return two tensors: keys, values")
    return P_k, P_v, P_k.requires_grad or P_v.requires_grad


# --- 5 · debug the broken adapter --------------------------------------------------------------
CLINIC = Ward({
    "mask": ("C", "the mask is −∞ over the prefix's columns",
        "Its prefix has a gradient of zero, keys and values alike: nothing that reads the text "
        "reads it"),
    "optimiser": ("D", "the optimiser was never given the prefix",
        "Its prefix has a gradient like the sound one's and does not move: it is computed, and "
        "nobody uses it"),
    "values": ("A", "the values were cut off from the graph, the keys were not",
        "Its prefix has keys with a gradient and values without: only one half is in the graph"),
    "rate": ("B", "the learning rate is the MLP's, and there is no MLP",
        "Its prefix has a gradient like the sound one's and moves, but far less in as many steps"),
})  # fmt: skip
RATE = PrefixTuning().learning_rate
MLP_RATE = PrefixTuning(prefix_projection=True).learning_rate


def clinic(base, task, steps: int = 8, seed: int = 0) -> pd.DataFrame:
    """Train one sound prefix of 8 and the four patients A to D, and write down what can be seen.

    One row a step: patient, step, loss, the norms of the gradients of P_k and P_v, and how far the
    two have moved from where they started (root mean square of a number).
    """
    seen = CLINIC.examine(lambda fault: _examine(fault, base, task, steps, seed))
    return seen.fillna(0.0)  # where a half is cut off from the graph


def _examine(fault, base, task, steps, seed) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    sites = base.anatomy.attentions
    start = initial_prefix(base, sites, "vocabulary", None, 8, generator)
    P_k, P_v = (nn.Parameter(start[name].clone().to(base.device)) for name in ("P_k", "P_v"))
    layer = {site.module: i for i, site in enumerate(sites)}

    def attention(module, query, key, value, attention_mask, **kwargs):
        i, groups = layer[module], query.shape[1] // key.shape[1]
        read_v = P_v.detach() if fault == "values" else P_v
        key, value, k, v = (
            t.repeat_interleave(groups, dim=-3) for t in (key, value, P_k[i], read_v[i])
        )
        if fault == "mask":  # the prefix's columns are padded with what hides a key
            hidden = torch.finfo(query.dtype).min
            k = torch.cat([k.expand(len(key), -1, -1, -1), key], dim=2)
            v = torch.cat([v.expand(len(key), -1, -1, -1), value], dim=2)
            mask = F.pad(attention_mask, (P_k.shape[2], 0), value=hidden)
            weights = (query @ k.transpose(2, 3) / math.sqrt(k.shape[-1]) + mask).softmax(-1)
            output = weights @ v
        else:
            output = attend_with_prefix(query, key, value, attention_mask, k, v)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("peftlab-clinic", attention)
    AttentionMaskInterface.register("peftlab-clinic", eager_mask)
    before = base.model.config._attn_implementation
    base.model.set_attn_implementation("peftlab-clinic")
    trained = [t.detach().clone() for t in (P_k, P_v)] if fault == "optimiser" else [P_k, P_v]
    rate = MLP_RATE if fault == "rate" else RATE
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)

    def loss_of(examples):
        batch = task.batch(examples, base.tokenizer, base.device)
        return target_loss(base(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def moved(tensors, start):
        return distance(tensors, start) / math.sqrt(tensors[0].numel())

    parts = {"{}_k": [P_k], "{}_v": [P_v]}
    try:
        return [*course(parts, optimiser, loss_of, task, steps, 8, seed, moved)]
    finally:
        base.model.set_attn_implementation(before)


diagnose = CLINIC.exercise(
    "diagnose", "Debug the broken adapter", confused=("AC", "BD"), unknown="too short a prefix",
    difficulty=3, importance=5, minutes=10,
    hints=(
        "Look at the two gradients first. Zero in both and zero in one have different causes.",
        "Two patients have both gradients. Ask whether they moved, and how far."),
)  # fmt: skip


# --- predict first -----------------------------------------------------------------------------
def _small(layers: int = 2) -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=layers, n_embd=64, n_head=4, n_positions=64, vocab_size=100,
            bos_token_id=None, eos_token_id=None, attn_implementation="eager",
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval().requires_grad_(False)


@question(
    "All keys and values of a prefix are zero, and nothing is trained. "
    "What happens to the output of the text?",
    {
        "a": ("nothing: the values add zero", "The values add zero, but the keys take a share all "
              "the same: a score of 0 is a weight of e⁰ = 1 before the softmax divides. What the "
              "text adds becomes smaller."),
        "b": ("it changes: the text loses a share of the attention to keys of zero",
              "A key of zeros has a score of 0, and the softmax gives a score of 0 a weight."),
        "c": ("nothing: a zero key has the lowest score of all, so the softmax leaves it out",
              "Zero is not the lowest score: scores are negative as often as not, and no score but "
              "−∞ is left out by a softmax.")},
)  # fmt: skip
def predict_zero_prefix():
    model, ids = _small(), torch.arange(10)[None]
    shape = (1, 4, 5, 16)
    from transformers import DynamicCache

    with torch.no_grad():
        plain = model(input_ids=ids).logits
        cache = DynamicCache()
        for layer in range(2):
            cache.update(torch.zeros(shape), torch.zeros(shape), layer)
        mask, positions = torch.ones(1, 15, dtype=torch.long), torch.arange(10)[None]
        given = dict(attention_mask=mask, position_ids=positions, **{cache_name(model): cache})
        changed = (model(input_ids=ids, **given).logits - plain).abs().max() / plain.abs().max()
    right = "a" if changed < 1e-5 else "b"
    return right, (
        "On a small GPT, with the positions as they were, five zero keys move the logits by up to "
        f"{changed:.0%} of the largest."
    )


@question(
    "A causal GPT reads two different texts behind the same prefix. "
    "Do the prefix's keys in its last layer differ between the two?",
    {
        "a": ("yes: by the last layer the prefix has read the text", "A prefix has no queries and "
              "passes through no layer. What stands in the last layer is what was trained for the "
              "last layer."),
        "b": ("no, and those of a soft prompt in front of the text would not differ either",
              "A causal model reads from left to right, so what stands in front never sees the "
              "text."),
        "c": ("no, but those of a soft prompt in front of the text would: it goes through the "
              "layers", "It does go through the layers, but in a causal model it stands in front "
              "and sees only what is further to the left. In an encoder you would be right.")},
)  # fmt: skip
def predict_who_reads():
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 3, 64, generator=draw)
    texts = torch.randint(100, (2, 1, 8), generator=draw)
    config = BertConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=64,
        vocab_size=100,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = BertModel(config).eval()
    moved = {}
    for name, model in (("a causal GPT", _small()), ("a BERT", encoder)):
        states = []
        for ids in texts:
            x = torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)
            with torch.no_grad():
                found = model(inputs_embeds=x, output_hidden_states=True).hidden_states
            states.append(found[-2][:, :3])  # what the last layer makes its keys of
        moved[name] = (states[0] - states[1]).abs().max().item()
    causal, other = moved.values()
    right = "b" if causal < 1e-6 and other > 1e-3 else "c"
    return right, (
        "A prefix is the same trained tensor for every text. A soft prompt's states before the "
        f"last layer differ by {causal:.0f} between two texts in a small causal GPT, and by up to "
        f"{other:.2f} in a small BERT, which reads in both directions."
    )


@question(
    "Llama-3-8B: 32 layers, d_model 4,096, 32 heads that share 8 key-value heads of 128. Which has "
    "more numbers: a prefix of 20, a key and a value in each layer; or 20 vectors as wide as the "
    "model at each layer's input?",
    {
        "a": ("the prefix, twice as many: a key and a value against one vector",
              "That holds where each head has its own keys. Here four heads share one, so a key "
              "and a value together are half as wide as one vector of the model."),
        "b": ("they are equal: both stand in every layer", "The layers are the same, the widths "
              "are not: 2 · 1,024 against 4,096."),
        "c": ("the vectors at the input of each layer, twice as many",
              "2 · d_kv is 2,048, half of d_model.")},
)  # fmt: skip
def predict_larger():
    shape = Shape.named("llama-3-8b")
    prefix, vectors = count(PrefixTuning(20), shape), count(DeepPromptTuning(20), shape)
    right = "a" if prefix > vectors else "b" if prefix == vectors else "c"
    medium = Shape.named("gpt2-medium")
    same = count(PrefixTuning(20), medium) / count(DeepPromptTuning(20), medium)
    return right, (
        f"Prefix: 2 · 20 · {shape.layers} · {shape.d_kv:,} = {prefix:,}. Vectors: 20 · "
        f"{shape.layers} · {shape.d_model:,} = {vectors:,}. On GPT-2 medium, which does not group "
        f"its heads, the prefix has {same:.0f} times as many."
    )
