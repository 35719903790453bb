"""Lesson 02, prompt tuning: prepend, count, initialise, nearest tokens, and what is broken."""

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from peftlab.accounting import count
from peftlab.bases.shapes import Shape
from peftlab.exercises import after, exercise, expect, question
from peftlab.exercises.clinic import Ward, course
from peftlab.exercises.forms import a_count, a_tensor, digits, same, several
from peftlab.methods import PromptTuning
from peftlab.training import target_loss
from peftlab.tuned import attach

# --- 1 · in front ------------------------------------------------------------------------------
P = 3  # virtual tokens


def prepend(prompt, embedded, mask):
    batch, count = embedded.shape[0], prompt.shape[0]
    x = torch.cat([prompt.expand(batch, -1, -1), embedded], dim=1)
    longer = torch.cat([mask.new_ones(batch, count), mask], dim=1)
    positions = (longer.cumsum(dim=1) - 1).clamp(min=0)
    return x, longer, positions


@exercise(
    "Put the prompt in front", solution=prepend, difficulty=3, importance=5, minutes=10,
    hints=(
        "Three things get longer by P along the sequence: the vectors, the mask, the positions.",
        "The virtual tokens are there for everybody: their part of the mask is ones.",
        "The position of a token is the number of unmasked tokens before it. On the longer mask, "
        "that is a cumulative sum less one; clamp it, so that padding does not get −1."),
    mistakes=(
        (after(prepend, lambda x, mask, at: (x.roll(-P, 1), mask.roll(-P, 1), at)), "you put the "
         "prompt behind the input. A causal model reads from left to right: no real token would "
         "ever see it", lambda given, right: same(given[0][:, :-P], right[0][:, P:])),
        (after(prepend, lambda x, mask, at: (x.flip(1), mask, at)),
         "the vectors are not [P; E], prompt rows first, in order",
         lambda given, right: not same(given[0], right[0])),
        (after(prepend, lambda x, mask, at: (x, mask[:, P:], at)), "the mask grows with"),
        (after(prepend, lambda x, mask, at: (x, F.pad(mask[:, P:], (P, 0)), at)),
         "your mask hides the virtual tokens: attention would pass them by, and they would get no "
         "gradient. Their part of the mask is ones",
         lambda given, right: not given[1][:, :P].all()),
        (after(prepend, lambda x, mask, at: (x, torch.ones_like(mask), at)),
         "the real tokens' part of the mask has changed",
         lambda given, right: not same(given[1], right[1])),
        (after(prepend, lambda x, mask, at: (x, mask, torch.cat([at[:, :P], at[:, P:] - P], 1))),
         "your real tokens start again at 0: two tokens would share each of the first positions. "
         "The real ones come after the virtual ones, from P on",
         lambda given, right: given[2][0, P] == 0),
        (after(prepend, lambda x, mask, at: (x, mask, torch.arange(x.shape[1]).expand_as(mask))),
         "right for the row without padding, but in the padded row you counted through the "
         "padding. A position counts the unmasked tokens before it",
         lambda given, right: same(given[2][0], right[2][0])),
        (after(prepend, lambda x, mask, at: (x, mask, at + 1)),
         "your positions begin at 1: the first is 0, so take one off the cumulative sum",
         lambda given, right: given[2][0, 0] == 1)),
    otherwise="the positions are {given[2]}; those of what is not padding are {right[2]}",
    praise="vectors, mask and positions are right, with padding on the left as well", again=(7, 9),
)  # fmt: skip
def put_in_front(answer, T=4, d=5):
    """Vectors, mask, and positions: those of padding, which may have any, are set to 0."""
    generator = torch.Generator().manual_seed(0)
    prompt, embedded = (torch.randn(*s, generator=generator) for s in ((P, d), (2, T, d)))
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, : T // 2] = 0  # padded on the left
    real = F.pad(mask, (P, 0), value=1)
    given = answer(prompt, embedded, mask)
    words = "return three tensors: the vectors, the mask, the positions"
    x, longer, positions = several(given, 3, words)
    a_tensor(x, (2, P + T, d), "batch first, joined along the sequence, the vectors' shape")
    a_tensor(longer, (2, P + T), "the mask grows with the vectors: its shape")
    return x, longer, (positions.expand_as(real) * real).long()


# --- 2 · count ---------------------------------------------------------------------------------
def affordable(budget, d_model, context):
    return min(budget // d_model, context - 1)


BUDGETS = {
    f"for {budget:,} parameters on {name}": (budget, shape.d_model, shape.context)
    for name, shape in ((name, Shape.named(name)) for name in ("gpt2", "gpt2-medium", "llama-3-8b"))
    for budget in (shape.d_model, 300_000, 1_000_000, 10**8)
}


@exercise(
    "How long a prompt can you afford?", solution=affordable, difficulty=2, importance=3, minutes=5,
    hints=(
        "Turn the closed form around: P · d_model numbers train.",
        "Two limits hold: the budget, and the context, where at least one real token must fit."),
    mistakes=(
        (lambda budget, d, context: affordable(budget // 24, d, context),
         "{given} tokens {case} is too short. Did you pay for every layer? Prompt tuning adds "
         "vectors to the input alone",
         lambda given, right: any(given[case] < right[case] / 4 for case in right)),
        (lambda budget, d, context: affordable(budget, d, context + 1),
         "{given} virtual tokens fill gpt2's context: no room for a single real one"),
        (lambda budget, d, context: budget // d,
         "{given} tokens {case} is longer than the context of 1024"),
        (lambda budget, d, context: affordable(budget + d - 1, d, context),
         "{given} tokens {case} are 300,288 numbers: over the budget"),
        (lambda budget, d, context: budget / d, "how many tokens a prompt has is a whole number")),
    otherwise="{given} tokens {case}; {right} fit", praise="the budget and the context both hold",
)  # fmt: skip
def prompt_for_a_budget(answer):
    what = "how many tokens a prompt has"
    return {case: a_count(answer(*sizes), what) for case, sizes in BUDGETS.items()}


# --- 3 · start from the vocabulary -------------------------------------------------------------
def start_from_vocabulary(embedding, first, length):
    return nn.Parameter(embedding.weight[first : first + length].detach().clone())


@exercise(
    "Start from the vocabulary", solution=start_from_vocabulary,
    difficulty=2, importance=4, minutes=5, again=(7, 5, 9),
    hints=(
        "Row i of `embedding.weight` is the vector of token i.",
        "A slice of a tensor is a window onto the same numbers: whoever trains the slice, trains "
        "the table.",
        "`nn.Parameter` says that a tensor is to be trained. It does not copy it."),
    mistakes=(
        (lambda embedding, i, n: nn.Parameter(embedding.weight[i : i + n]), "shares its storage"),
        (lambda embedding, i, n: nn.Parameter(torch.randn(n, embedding.embedding_dim)), "noise"),
        (lambda embedding, i, n: start_from_vocabulary(embedding, i + 1, n), "begin with row"),
        (lambda embedding, i, n: nn.Parameter(torch.arange(i, i + n).float()),
         "the ids themselves"),
        (lambda embedding, i, n: embedding.weight[i : i + n].clone(), "would not train")),
)  # fmt: skip
def initialise(answer, first=10, length=4, d=8):
    embedding = nn.Embedding(50, d)
    nn.init.normal_(embedding.weight, std=0.02)
    embedding.requires_grad_(False)
    before = embedding.weight.clone()
    prompt = a_tensor(answer(embedding, first, length))
    wanted, last = before[first : first + length], first + length - 1
    expect(
        prompt.shape == wanted.shape,
        f"the prompt should be {tuple(wanted.shape)}, one vector a token; yours is "
        f"{tuple(prompt.shape)}" + ": these are the ids themselves?" * (prompt.ndim == 1),
    )
    expect(
        same(prompt, wanted),
        f"these are not rows {first} to {last} of the table: {_whose(prompt.detach(), before)}",
    )
    expect(
        prompt.requires_grad and prompt.is_leaf,
        "the numbers are right, but they would not train: the table is frozen and so is your "
        "copy of it. Make it an nn.Parameter",
    )
    handed = getattr(answer, "handed", [embedding])[0]
    expect(
        prompt.untyped_storage().data_ptr() != handed.weight.untyped_storage().data_ptr(),
        "your prompt shares its storage with the table: one step of training would change the "
        "frozen model's own tokens. Copy the slice",
    )
    return "the vocabulary's vectors, trainable, and the table left alone"


def _whose(vectors, table):
    vectors = vectors.to(table)
    rows = [*(table[None] == vectors[:, None]).all(dim=-1).int().argmax(dim=1).tolist()]
    if torch.equal(table[rows], vectors):
        return f"they begin with row {rows[0]} of it"
    mine, wanted = digits(*(rows.norm(dim=1).mean().item() for rows in (vectors, table)))
    return f"they have a mean norm of {mine}, the table's rows {wanted}. Is it noise?"


# --- 4 · the nearest tokens --------------------------------------------------------------------
def nearest(prompt, table, k):
    cosine = F.normalize(prompt, dim=1) @ F.normalize(table, dim=1).T
    return cosine.topk(k, dim=1).indices


def _cosines(prompt, table):
    return F.normalize(prompt, dim=1) @ F.normalize(table, dim=1).T


@exercise(
    "The nearest tokens", solution=nearest, difficulty=2, importance=3, minutes=5, again=(3, 31, 9),
    hints=(
        "`F.normalize(x, dim=1)` divides each row by its length. A matrix product then has all "
        "cosines at once.",
        "`topk(k, dim=1)` returns the values and the indices, the largest first."),
    mistakes=(
        (lambda prompt, table, k: (prompt @ table.T).topk(k, dim=1).indices,
         "you ranked by the dot product, so long tokens win. Divide each row of the table by its "
         "length first"),
        (lambda prompt, table, k: torch.cdist(prompt, table).topk(k, dim=1, largest=False).indices,
         "you ranked by distance. A trained vector is longer than any token, and then the distance "
         "says more of lengths than of directions. Use the cosine"),
        (lambda prompt, table, k: _cosines(prompt, table).topk(k, dim=1, largest=False).indices,
         "these are the tokens farthest away: the largest cosine is the nearest"),
        (lambda prompt, table, k: _cosines(prompt, table).topk(k, dim=1, sorted=True).values,
         "these are the cosines. Return the ids of the tokens, the indices of `topk`"),
        (lambda prompt, table, k: nearest(prompt, table, k).flip(1),
         "the right tokens, but the nearest comes last"),
        (lambda prompt, table, k: (F.normalize(prompt, dim=0) @ F.normalize(table, dim=0).T)
         .topk(k, dim=1).indices,
         "you divided columns by their lengths. A vector is a row: normalise with dim=1"),
        (lambda prompt, table, k: nearest(prompt, table, k).T,
         "one row for each virtual token, its k tokens along the row: the shape")),
    otherwise="{given} are not the nearest; those are {right}",
    praise="ids by cosine, the nearest first",
)  # fmt: skip
def nearest_ids(answer, P=5, tokens=23, d=7, k=3):
    """The ids of the k nearest tokens: a vector's length must not matter, nor a token's."""
    generator = torch.Generator().manual_seed(P)
    table = torch.randn(tokens, d, generator=generator)
    table *= 1 + 4 * torch.rand(tokens, 1, generator=generator)
    prompt = 3 * torch.randn(P, d, generator=generator)
    words = "one row for each virtual token, its k tokens along the row: the shape"
    return a_tensor(answer(prompt, table, k), (P, k), words)


# --- 5 · debug the broken adapter --------------------------------------------------------------
CLINIC = Ward({
    "optimiser": (
        "C", "the optimiser was never given the prompt",
        "Its prompt has a gradient like the sound one and does not move at all: the gradient is "
        "computed and nobody uses it"),
    "mask": (
        "B", "the mask is zero over the virtual tokens",
        "Its prompt has a gradient of exactly zero: the prompt is in the graph, but no real token "
        "looks at it"),
    "detached": (
        "D", "the prompt was cut off from the graph",
        "Its prompt has no gradient at all: the path from the loss back to the prompt is cut"),
    "rate": (
        "A", "the learning rate is a thousand times too small",
        "Its prompt has a gradient and moves, but by a thousandth of what the sound one does"),
})  # fmt: skip
WARD = CLINIC.right


def clinic(base, task, steps: int = 10, lr: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """Train one sound prompt and the four patients A to D, and write down what can be seen.

    One row a step: patient, step, loss, gradient (norm of the prompt's; NaN: there is none) and
    moved (how far the prompt is from where it started, per vector).
    """
    return CLINIC.examine(lambda fault: _examine(fault, base, task, steps, lr, seed))


def _examine(fault, base, task, steps, lr, seed):
    def disturb(model, args, kwargs):
        if fault == "mask":
            mask = kwargs["attention_mask"].clone()
            mask[:, :8] = 0
            return args, kwargs | {"attention_mask": mask}
        if fault == "detached":
            return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"].detach()}

    def loss_of(examples):
        batch = task.batch(examples, base.tokenizer, base.device)
        return target_loss(tuned(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def moved(prompt, start):
        return (prompt[0].detach() - start[0]).norm(dim=1).mean().item()

    with attach(base, PromptTuning(8), seed=seed) as tuned:
        stack = next(iter(base.anatomy.stacks.values()))  # behind the hook that puts the prompt in
        hook = stack.register_forward_pre_hook(disturb, with_kwargs=True)
        prompt = tuned.prompt
        trained = prompt.detach().clone() if fault == "optimiser" else prompt
        rate = lr / 1000 if fault == "rate" else lr
        optimiser = torch.optim.AdamW([trained], lr=rate, weight_decay=0.0)
        rows = [*course({"{}": [prompt]}, optimiser, loss_of, task, steps, 16, seed, moved)]
        hook.remove()
    return rows


diagnose = CLINIC.exercise(
    "diagnose", "Debug the broken adapter", confused=("AC", "BD"), unknown="too few virtual tokens",
    difficulty=3, importance=5, minutes=10,
    hints=(
        "Look at the gradient first. None, exactly zero and an ordinary number have three "
        "different causes.",
        "Two patients have an ordinary gradient. Ask whether their prompts moved, and how far."),
)  # fmt: skip


# --- predict first -----------------------------------------------------------------------------
def _small(layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=64, n_head=4, n_positions=128, vocab_size=100,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@question(
    "20 virtual tokens on Llama-3-70B (80 layers, d_model 8,192). How many numbers train?",
    {
        "a": ("163,840", "That is one vector a virtual token, at the input."),
        "b": ("13,107,200", "You counted one vector a layer and token: that is a prompt in every "
              "layer."),
        "c": ("26,214,400", "You counted a key and a value in every layer: that is prefix tuning "
              "with full heads."),
        "d": ("1,000,000,000", "More layers make the base larger, not the prompt: its size depends "
              "on d_model alone.")},
)  # fmt: skip
def predict_count():
    shape = Shape.named("llama-3-70b")
    measured = count(PromptTuning(20), shape)
    by_letter = {
        "a": 20 * shape.d_model,
        "b": 20 * shape.layers * shape.d_model,
        "c": 2 * 20 * shape.layers * shape.d_model,
    }
    right = next(letter for letter, number in by_letter.items() if number == measured)
    return right, f"P · d_model = 20 · {shape.d_model:,} = {measured:,}, on {shape.layers} layers."


@question(
    "You put one virtual token of zeros in front of the input, and train nothing. "
    "What happens to the output of the real tokens?",
    {
        "a": ("nothing: a zero vector adds nothing", "A zero vector is still a token: it gets a "
              "position, a key and a value, and softmax gives it a share of the attention that the "
              "others lose."),
        "b": ("it changes", "There is one more token to attend to, and every position has moved by "
              "one."),
        "c": ("it changes only if the token is trained", "Training changes the vector. The place "
              "that the vector takes is there before.")},
)  # fmt: skip
def predict_zero_prompt():
    model = _small()
    ids = torch.arange(10)[None]
    embedded = model.transformer.wte(ids)
    zeros = torch.zeros(1, 1, embedded.shape[-1])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        longer = model(inputs_embeds=torch.cat([zeros, embedded], dim=1)).logits[:, 1:]
        positions = torch.cat([torch.zeros(1, 1), torch.arange(10)[None]], dim=1).long()
        in_place = model(
            inputs_embeds=torch.cat([zeros, embedded], dim=1), position_ids=positions
        ).logits[:, 1:]
    changed = (longer - plain).abs().max().item()
    still = (in_place - plain).abs().max().item()
    right = "a" if changed < 1e-5 else "b"
    return right, (
        f"On a small GPT the logits move by up to {changed:.2f}, and by {still:.2f} "
        "when the real tokens keep their old positions."
    )


@question(
    "20 virtual tokens in front of 40 real ones. How much more work is one forward pass?",
    {
        "a": ("under 1%: the prompt is under 1% of the parameters", "Work does not follow the "
              "trained parameters. Each virtual token runs through every frozen weight, like a "
              "real token."),
        "b": ("about 50%", "There are 60 tokens to compute instead of 40."),
        "c": ("none: the prompt can be merged into the weights after training",
              "There is no ΔW to merge. The virtual tokens are there in every call.")},
)  # fmt: skip
def predict_work():
    model = _small()
    flops = {}
    for tokens in (40, 60):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        flops[tokens] = counter.get_total_flops()
    more = flops[60] / flops[40] - 1
    right = "a" if more < 0.01 else "b" if 0.3 < more < 0.8 else "c"
    return right, (
        f"Counted on a small GPT: {flops[40] / 1e6:.1f} million floating-point operations "
        f"without, {flops[60] / 1e6:.1f} million with the prompt, {more:.0%} more."
    )
