"""What learners write, and the sentence that they get for it.

An exercise's own table holds wrong answers too, but a fault in one of them changes what is given
and what it is compared with alike. These answers are written anew, as a learner would write them.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize, relu

from peftlab.exercises import (
    lesson_00,
    lesson_01,
    lesson_02,
    lesson_03,
    lesson_04,
    lesson_05,
    lesson_06,
    lesson_07,
    lesson_08,
    lesson_09,
    lesson_10,
    lesson_11,
    lesson_12,
    lesson_13,
    lesson_14,
)


def stray_name(before, model):
    state = model.state_dict()
    return [name for name in before if (state[name] != before[name]).any()] + ["weights"]


def two_places_a_token(prompt, embedded, mask):
    text = torch.cat([prompt.repeat(len(mask), 1, 1), embedded], dim=1)
    longer = torch.cat([torch.ones(len(mask), len(prompt), dtype=mask.dtype), mask], dim=1)
    return text, longer, 2 * (longer.cumsum(dim=1) - 1)


def third_of_a_prompt(budget, d_model, context):
    return max(1, math.floor(0.3 * min(budget // d_model, context - 1)))


def same_half_twice(prompt, embedded, masks):
    first, rows = prompt[: len(prompt) // 2], []
    for row, at in zip(embedded, masks.tolist(), strict=True):
        rows.append(torch.cat([first, row[:at], first, row[at:]]))
    return torch.stack(rows)


def without_heads(q, K, V, P_k, P_v, mask):
    return V[:, 0]


def bar_heads(query, key, value, mask, P_k, P_v):
    return value[:, 0]


def no_root(w, g, m, v, t, lr):
    m, v = m + (g - m) / 10, v + (g**2 - v) / 1000
    mean, square = m / (1 - 0.9**t), v / (1 - 0.999**t)
    return w - lr * mean / (square + 1e-8), m, v


def scales_of_one(weights, levels, block_size):
    rows = weights.reshape(-1, block_size)
    scaled = rows / rows.abs().max(dim=1, keepdim=True).values
    codes = torch.stack([(scaled - level).abs() for level in levels]).argmin(dim=0)
    return codes.flatten(), torch.full((rows.shape[0],), 1.0)


def to_the_lower_offset(quantile):
    top = 31 / 32
    above = [quantile(0.5 + (top - 0.5) * share / 8) for share in range(9)]
    below = [-quantile(0.5 + (top - 0.5) * share / 7) for share in range(7, 0, -1)]
    return [level / above[-1] for level in below + above]


def more_than_five_seeds(rows, methods):
    told = [row for row in rows if row["n"] > 5]
    beaten = {name for row in told for name in row["better_than"]}
    beaten |= {row["label"] for row in told if any(name in methods for name in row["worse_than"])}
    return [method for method in methods if method not in beaten]


# (exercise, what the learner writes, a piece of the sentence)
LEARNERS = [
    (lesson_00.same_model, stray_name, "nothing has changed yet, and you name weights"),
    (lesson_01.adam_step, no_root, "divide by the root of the mean square"),
    (
        lesson_01.block_numbers,
        lambda d, heads, trains: 10 * d + 4 + heads + (6 * d if trains else 0) - 4 * d,
        "the input of GELU is missing",
    ),
    (
        lesson_01.block_numbers,
        lambda d, heads, trains: 10 * d + 4 + heads + (6 * d if trains else 0) - 3 * d,
        "needs q, k and v",
    ),
    (
        lesson_02.prompt_for_a_budget,
        third_of_a_prompt,
        "117 tokens for 300,000 parameters on gpt2; 390 fit",
    ),
    (
        lesson_02.initialise,
        lambda embedding, first, length: nn.Parameter(
            torch.tensor([float(first + i) for i in range(length)])
        ),
        "the ids themselves",
    ),
    (lesson_02.put_in_front, two_places_a_token, "those of what is not padding are"),
    (lesson_03.place_the_prompt, same_half_twice, "you put the same half twice"),
    (lesson_04.attend, bar_heads, "the output is as the queries: its shape"),
    (lesson_05.write_the_attention, without_heads, "one row for each query: the shape"),
    (
        lesson_05.write_the_attention,
        lambda q, K, V, P_k, P_v, mask: V[0, 0],
        "one row for each query: the shape",
    ),
    (lesson_06.delta_weight, lambda A, B, alpha: B @ A * alpha / A.shape[-1], "alpha by d_in"),
    (
        lesson_06.forward,
        lambda x, W, A, B, alpha: x @ (W + (B @ A) * (alpha / A.shape[0])).mT,
        "forms the dense ΔW",
    ),
    (
        lesson_06.forward,
        lambda x, W, A, B, alpha: x @ W.mT - x @ A.mT @ B.mT * (alpha / A.shape[0]),
        "you subtracted the delta",
    ),
    (
        lesson_07.rank_for_budget,
        lambda budget, layers, matrices: budget // sum(sum(sizes) for sizes in matrices),
        "that is for one layer",
    ),
    (
        lesson_07.rank_for_budget,
        lambda budget, layers, matrices: budget // (layers * len(matrices) * sum(matrices[0])),
        "the matrices differ in size",
    ),
    (
        lesson_07.dora,
        lambda W, A, B, alpha, m: W + normalize(B @ A, dim=1) * m.unsqueeze(1),
        "you normalised the delta",
    ),
    (
        lesson_07.dora,
        lambda W, A, B, alpha, m: (
            (W + B @ A * (alpha / A.shape[0])) * (m / W.square().sum(dim=1).sqrt()).unsqueeze(1)
        ),
        "the norms of W alone",
    ),
    (lesson_08.encode, scales_of_one, "the scales are all 1"),
    (lesson_08.levels, to_the_lower_offset, "of another offset"),
    (lesson_08.bits, lambda block, group: 4 + 8 / block, "you left out the scale of scales"),
    (
        lesson_09.adapter,
        lambda y, down, b, up, c: relu(y @ down.mT + b) @ up.mT + c,
        "you forgot the way around it",
    ),
    (
        lesson_09.adapter,
        lambda y, down, b, up, c: y + (y @ down.mT + b) @ up.mT + c,
        "nothing bends",
    ),
    (
        lesson_09.count_adapters,
        lambda m, layers, d_model, a_block: layers * a_block * 2 * d_model * (m + 1),
        "the bias of W_down has m numbers",
    ),
    (
        lesson_09.start,
        lambda d, m: (torch.full((m, d), math.nan), torch.zeros(d, m)),
        "a number is infinite, or none at all",
    ),
    (
        lesson_10.wanda_score,
        lambda W, X: W.abs() * W.square().sum(dim=0).sqrt(),
        "X is what comes in",
    ),
    (
        lesson_10.merge_masked,
        lambda W, mask, A, B, alpha: mask * (W + alpha * (B @ A)),
        "did you divide alpha by r",
    ),
    (
        lesson_10.merge_masked,
        lambda W, mask, A, B, alpha: W + mask * (B @ A) * (alpha / A.shape[0]),
        "what was pruned from W came back",
    ),
    (
        lesson_11.positions,
        lambda mask, virtual: mask.cumsum(dim=-1) + virtual,
        "one too far",
    ),
    (
        lesson_12.first_step,
        lambda A, x, g, alpha, lr: -lr * torch.sign(torch.outer(g, A @ x)) @ A @ x,
        "the output of a LoRA is scaled",
    ),
    (
        lesson_12.labels,
        lambda prompt, target, end, length: (
            [-100] * len(prompt) + (target + [-100] * length)[: length - len(prompt)]
        ),
        "never learns to stop",
    ),
    (
        lesson_12.labels,
        lambda prompt, target, end, length: (
            [-100] * len(prompt) + target + [end] + [-100] * length
        )[1 : length + 1],
        "you shifted by one",
    ),
    (
        lesson_12.labels,
        lambda prompt, target, end, length: [-100 for _ in prompt] + [*target, end],
        "pad with −100",
    ),
    (
        lesson_13.held,
        lambda base, own, customers, shared: sum([own] * customers, base),
        "no base is shared",
    ),
    (
        lesson_14.floor,
        lambda parameters, trained, bits: parameters * bits / 8 + trained * 4,
        "two moments too",
    ),
    (lesson_14.not_beaten, more_than_five_seeds, "says who was beaten as well"),  # by five seeds
]


@pytest.mark.parametrize(
    "item, answer, words", LEARNERS, ids=[f"{e[0].name}-{n}" for n, e in enumerate(LEARNERS)]
)
def test_a_learner_is_told_what_is_wrong(item, answer, words):
    verdict = item(answer)
    assert verdict.status == "wrong" and words in verdict.message, verdict
