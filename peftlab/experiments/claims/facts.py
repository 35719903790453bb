"""Facts about models and methods, each looked at on a tiny base: whether it holds, and the numbers.

Every function returns an answer and a sentence. Names and arguments stand in `data/claims`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab import attention
from peftlab.bases import Base, LanguageModel, load, probes
from peftlab.experiments.claims.quantities import made
from peftlab.experiments.sweep_v2 import GrowingPrompts
from peftlab.methods import (
    FullFineTuning,
    PrefixTuning,
    PromptTuning,
    Prune,
    PTuning,
)
from peftlab.tuned import Tuned, attach

P = 4  # virtual tokens, where the method does not say
# Half the distance from 1 to the next number. One function computed in two orders: a sum of n terms
# is rounded n times at most, by as much of the largest. The tiny bases have six layers and no sum
# of more than 768 terms, so logits, as a share of the largest, differ by CLOSE at most.
U32, U64 = 2.0**-24, 2.0**-53
CLOSE = 6 * 768 * U32

Answer = tuple[bool, str]
base_named = functools.cache(load)


def ids(base: LanguageModel, rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """Random tokens that are no special ones, (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, 2000, (rows, length), generator=generator)


def given(base: LanguageModel, seed: int = 0) -> dict[str, Tensor]:
    """A batch of full rows, each token its own label."""
    tokens = ids(base, seed=seed)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if base.kind == "encoder-decoder":
        batch["decoder_input_ids"] = tokens.clone()
    return batch


@contextlib.contextmanager
def attached(method, base: str = "tiny-gpt", moved: bool = False, **options) -> Iterator[Tuned]:
    """The method on a tiny base; `moved`: away from its start, by the same noise every time."""
    method = made(method, **options) if isinstance(method, str) else method
    with attach(base_named(base), method) as tuned:
        if moved:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for tensor in tuned.trainable.values():
                    tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        yield tuned


@torch.no_grad()
def logits(model: LanguageModel, seed: int = 0) -> Tensor:
    batch = given(model, seed)
    batch.pop("labels")
    return model(**batch)


def step(tuned: Tuned, lr: float = 0.01, rates: dict[str, float] | None = None) -> None:
    """One step of Adam on everything that trains; `rates` multiply it by the end of a name."""
    groups = [
        {"params": [tensor], "lr": lr * (rates or {}).get(name[-1], 1.0)}
        for name, tensor in tuned.trainable.items()
    ]
    optimiser = torch.optim.Adam(groups, lr=lr, eps=1e-16)
    optimiser.zero_grad()
    tuned.batch_loss(given(tuned)).backward()
    optimiser.step()


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


# --- what trains, what is touched ----------------------------------------------------------------


def leaves_the_base(method: str, base: str = "tiny-gpt", **options) -> Answer:
    """A training step changes the method's own numbers and no other."""
    plain = base_named(base)
    before = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    with attached(method, base, **options) as tuned:
        start = {name: tensor.detach().clone() for name, tensor in tuned.trainable.items()}
        step(tuned)
        now = plain.model.state_dict()
        still = all(torch.equal(now[name], tensor) for name, tensor in before.items())
        moved = sum(not torch.equal(t, start[name]) for name, t in tuned.trainable.items())
        count = sum(tensor.numel() for tensor in tuned.trainable.values())
    return still and moved > 0, (
        f"{method} on {base}: a step moved {moved} of {len(start)} tensors, {count:,} numbers; the "
        f"base's {len(before)} tensors are {'bit for bit what they were' if still else 'changed'}."
    )


def updates_all(base: str = "tiny-gpt") -> Answer:
    """A step of full fine-tuning moves every tensor of the model."""
    with attached(FullFineTuning(), base) as tuned:
        before = {name: tensor.detach().clone() for name, tensor in tuned.trainable.items()}
        step(tuned)
        moved = sum(not torch.equal(t, before[name]) for name, t in tuned.trainable.items())
    return moved == len(before), f"Full fine-tuning moved {moved} of {len(before)} tensors."


def touches(method: str, *sites: str, base: str = "tiny-gpt", **options) -> Answer:
    """The method uses sites of these classes and of no other."""
    with attached(method, base, **options) as tuned:
        kinds = {type(site).__name__ for each in tuned.attachments for site in each.sites}
        kinds -= {"Source"}
    return kinds == set(sites), f"{method} touches {', '.join(sorted(kinds))}."


def reaches_layers(method: str, base: str = "tiny-gpt", **options) -> Answer:
    """The method has keys and values in every attention of the base: as many sets as layers."""
    with attached(method, base, **options) as tuned:
        sets, layers = tuned.prefix[0].shape[0], tuned.anatomy.shape.attentions
    return sets == layers, f"{method}: {sets} sets of keys and values for {layers} attentions."


def starts_as_the_base(method: str, base: str = "tiny-gpt", **options) -> Answer:
    """Before training the logits are the base's own."""
    plain = logits(base_named(base))
    with attached(method, base, **options) as tuned:
        difference = apart(logits(tuned), plain)
    return difference == 0, f"{method} before training: logits differ by {difference:.2g}."


def composes(*methods: str) -> Answer:
    """The methods go on one base together, and their counts add up."""
    parts = [made(name) for name in methods]
    with attach(base_named("tiny-gpt"), parts) as tuned:
        total = tuned.count().parameters
        wanted = sum(each.parameters(tuned.anatomy.shape) for each in parts)
        finite = bool(logits(tuned).isfinite().all())
    return finite and total == wanted, f"{' + '.join(methods)}: {total:,} numbers train together."


def gradient_crosses_the_base(method: str, base: str = "tiny-gpt", **options) -> Answer:
    """The gradient of the lowest trained tensor has passed back through every frozen layer above,
    and no frozen weight has one."""
    with attached(method, base, **options) as tuned:
        outputs = []
        block = next(iter(tuned.anatomy.layers.values()))[0]
        keep = block.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
        try:
            loss = tuned.batch_loss(given(tuned))
        finally:
            keep.remove()
        (hidden,) = outputs
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        (back,) = torch.autograd.grad(loss, [hidden], retain_graph=True)
        loss.backward()
        frozen = sum(parameter.grad is not None for parameter in tuned.model.parameters())
        owned = sum(parameter.grad is not None for parameter in tuned.trainable.values())
        size = back.abs().max().item()
    return size > 0 and owned > 0 and frozen == 0, (
        f"{method}: behind the first layer the gradient is up to {size:.2g}, so it has crossed the "
        f"layers above; {owned} tensors of the method have a gradient, {frozen} of the base."
    )


# --- soft prompts --------------------------------------------------------------------------------


def prompt_is_prepended(base: str = "tiny-gpt") -> Answer:
    """Prompt tuning is the prompt in front of the embedded text, joined by hand: same logits, and
    the text's own embeddings are all still there."""
    with attached(PromptTuning(P), base, moved=True) as tuned:
        tokens = ids(tuned)
        inside = logits(tuned)
        prompt = tuned.prompt.detach().expand(len(tokens), -1, -1)
    plain = base_named(base)
    embedded = plain.model.get_input_embeddings()(tokens)
    with torch.no_grad():
        joined = torch.cat([prompt, embedded], dim=1)
        by_hand = plain.model(inputs_embeds=joined).logits
    difference = apart(by_hand[:, P:], inside)
    return difference < CLOSE, (
        f"{P} vectors before {tokens.shape[1]} embedded tokens make {joined.shape[1]}; the logits "
        f"differ from prompt tuning's by {difference:.1g}."
    )


def prompt_is_its_own_prefix(base: str = "tiny-gpt") -> Answer:
    """On a decoder, the keys and values that a soft prompt makes, kept as a prefix, do as much."""
    plain = base_named(base)
    with attached(PromptTuning(P), base, moved=True) as tuned:
        wanted, prompt = logits(tuned), tuned.prompt.detach()[None]
    with torch.no_grad(), attention.recorded(plain.model, plain.anatomy.attentions) as records:
        plain.model(inputs_embeds=prompt)
        P_k, P_v = (torch.stack([getattr(r, part)[0] for r in records.values()]) for part in KV)
    with attached(PrefixTuning(P, shift_positions=True), base) as tuned:
        tuned.load_state({"prefix_tuning.P_k": P_k, "prefix_tuning.P_v": P_v})
        difference = apart(logits(tuned), wanted)
    return difference < CLOSE, (
        f"A prompt's keys and values kept as a prefix give its logits to {difference:.1g}."
    )


KV = ("key", "value")


def two_names(one: str, other: str, base: str = "tiny-gpt") -> Answer:
    """Two methods are one: same tensors, logits and gradients from one seed, bit for bit."""
    seen = []
    for name in (one, other):
        with attached(name, base, num_virtual_tokens=P) as tuned:
            tuned.batch_loss(given(tuned)).backward()
            tensors = list(tuned.trainable.values())
            seen.append([logits(tuned), *tensors, *(tensor.grad for tensor in tensors)])
    same = all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    return same, f"{one} and {other}: tensors, logits, gradients {'equal' if same else 'differ'}."


def network_can_go(method: str, **options) -> Answer:
    """Without the network, the tensors that it made give the same logits, bit for bit."""
    with attached(method, moved=True, **options) as tuned:
        wanted, state, trained = logits(tuned), tuned.state(), tuned.count().parameters
        flat = tuned.folded
    with attach(base_named("tiny-gpt"), flat) as tuned:
        tuned.load_state(state)
        same, left = torch.equal(logits(tuned), wanted), tuned.count().parameters
    return same, f"{method}: {trained:,} numbers train, {left:,} are left, logits equal: {same}."


def can_be_placed() -> Answer:
    """Virtual tokens of P-tuning stand where a template puts them, still at the input alone."""
    found = []
    for places in ([(4, "front")], [(2, "front"), (2, "before [MASK]")]):
        method = PTuning(4, "embedding", placement=places)
        with attached(method, "tiny-bert", moved=True) as tuned:
            tokens = ids(tuned)
            tokens[:, 4] = tuned.tokenizer.mask_token_id
            with torch.no_grad():
                found.append(tuned(tokens))
            kinds = {type(site).__name__ for each in tuned.attachments for site in each.sites}
    difference = apart(*found)
    return difference > CLOSE and "InputEmbeddings" in kinds and "KeysValues" not in kinds, (
        f"The same four vectors, all in front or two of them before the mask: logits differ by "
        f"{difference:.2g}, and both reach the input embeddings only."
    )


def prompt_changes_attention(base: str = "tiny-bert") -> Answer:
    """Under a soft prompt the text's attention to itself changes in every layer above the first,
    also in proportion, and the virtual tokens take a share of it in all."""
    plain, tokens = base_named(base), None
    tokens = ids(plain)
    with torch.no_grad(), attention.recorded(plain.model, plain.anatomy.attentions) as before:
        plain(tokens)
        before = dict(before)
    with attached(PromptTuning(P), base) as tuned, torch.no_grad():
        with attention.recorded(tuned.model, tuned.anatomy.attentions) as after:
            tuned(tokens)
            after = dict(after)
    moved, share = [], []
    for name, record in after.items():
        text = record.weights[:, :, P:, P:]
        share.append((1 - text.sum(dim=-1)).mean().item())
        text = text / text.sum(dim=-1, keepdim=True)
        moved.append((text - before[name].weights).abs().max().item())
    holds = min(share) > 0 and min(moved[1:]) > 0.01
    return holds, (
        f"Of the text's attention {min(share):.0%} to {max(share):.0%} goes to the virtual tokens; "
        f"its proportions over the text move by up to {max(moved[1:]):.2f} from layer 2 on."
    )


@functools.cache
def _double(base: str) -> Base:
    plain = base_named(base)
    return Base(base, copy.deepcopy(plain.model).double(), plain.tokenizer)


def prefix_is_a_gate(base: str = "tiny-gpt") -> Answer:
    """In each attention: output = (1 − λ) · attention over the text + λ · that over the prefix.

    In the first layer the proportions over the text cannot change; in later ones they do.
    """
    double = _double(base)
    tokens = ids(double)
    with torch.no_grad():
        with attention.recorded(double.model, double.anatomy.attentions) as records:
            double(tokens)
            before = list(dict(records).values())
        with attach(double, PrefixTuning(P)) as tuned:
            with attention.recorded(tuned.model, tuned.anatomy.attentions) as records:
                tuned(tokens)
                after = list(dict(records).values())
    error = max(probes.gate(record).error for record in after)
    moved = []
    for plain, record in zip(before, after, strict=True):
        text = record.weights[..., P:]
        text = text / text.sum(dim=-1, keepdim=True)
        moved.append((text - plain.weights).abs().max().item())
    within = 6 * 768 * U64  # as CLOSE; values and weights are of the order of 1
    return error < within and moved[0] < within and min(moved[1:]) > 1e-3, (
        f"The gate's equation holds to {error:.0e}; the proportions over the text move by "
        f"{moved[0]:.0e} in layer 1 and by {min(moved[1:]):.2g} or more in each later one."
    )


def attention_is_scaled(base: str = "tiny-gpt") -> Answer:
    """The model's attention is the softmax of the scores times 1/√head_dim, per head and with a
    mask; without that factor it is another function."""
    plain = base_named(base)
    with torch.no_grad(), attention.recorded(plain.model, plain.anatomy.attentions) as records:
        plain(ids(plain))
        record = next(iter(records.values()))
    right, bare = (
        attention.attention_weights(record.query, record.key, record.mask, scale)
        for scale in (record.query.shape[-1] ** -0.5, 1.0)
    )
    good, bad = ((made_ - record.weights).abs().max().item() for made_ in (right, bare))
    within = 2 * record.query.shape[-1] * U32 * record.query.abs().max().item() ** 2  # of a score
    return good <= within < bad, (
        f"Weights with 1/√head_dim and the mask differ from the model's by {good:.0e}, without the "
        f"factor by up to {bad:.2f}; there are {record.query.shape[1]} heads."
    )


def queries_take_no_prefix() -> Answer:
    """Rows put before Q add outputs and change none of the text's: nobody would read them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 8, generator=generator) for _ in range(3))
    P_q, P_k, P_v = (torch.randn(P, 8, generator=generator) for _ in range(3))
    key, value = torch.cat([P_k, k]), torch.cat([P_v, v])
    plain = F.scaled_dot_product_attention(q, key, value)
    longer = F.scaled_dot_product_attention(torch.cat([P_q, q]), key, value)
    most = 2 * (q.shape[1] + len(key)) * U32 * value.abs().max().item()
    same = (longer[P:] - plain).abs().max().item() <= most
    return same and len(longer) == P + len(q), (
        f"With {P} rows before Q, {len(q)} tokens have {len(longer)} outputs, and those of "
        f"the text are {'the same' if same else 'others'}."
    )


def prompt_leaves_the_vocabulary() -> Answer:
    """A prompt that started as tokens' embeddings is, after a step, the embedding of none."""
    with attached(PromptTuning(P)) as tuned:
        table = tuned.model.get_input_embeddings().weight.detach()

        def nearest() -> float:
            return torch.cdist(tuned.prompt.detach(), table).min().item()

        before = nearest()
        step(tuned)
        after, width = nearest(), tuned.prompt.shape[1]
    return after > before and width == table.shape[1], (
        f"Each vector has the table's {width} numbers; the nearest row is {before:.1g} away at the "
        f"start and {after:.2g} after one step."
    )


def prompt_starts_with_words(text: str = "home") -> Answer:
    """Each vector of the prompt is a token's embedding at the start: of tokens that are drawn, and
    of those of a text, in its order."""
    with attached(PromptTuning(P, init="vocabulary")) as tuned:
        table = tuned.model.get_input_embeddings().weight.detach()
        drawn = (tuned.prompt.detach()[:, None] == table).all(dim=-1).any(dim=-1).all().item()
    wanted = table[base_named("tiny-gpt").tokenizer(text)["input_ids"]]
    with attached(PromptTuning(len(wanted), init="text", init_text=text)) as tuned:
        written = torch.equal(tuned.prompt.detach(), wanted)
    return drawn and written, (
        f"Of {P} drawn vectors each is a row of the table: {drawn}; those of {text!r} are its "
        f"{len(wanted)} tokens' rows: {written}."
    )


def rows_mix(method: str, **options) -> Answer:
    """Adapters of different tasks serve the rows of one batch: each row as if alone."""
    with attached(method, **options) as tuned:
        alone, start = [], tuned.state()
        generator = torch.Generator().manual_seed(2)
        for name in "ab":
            noise = {k: 0.05 * torch.randn(t.shape, generator=generator) for k, t in start.items()}
            tuned.load_state({key: tensor + noise[key] for key, tensor in start.items()})
            tuned.keep(name)
            alone.append(logits(tuned))
        tuned.use(["a", "b"])
        mixed = logits(tuned)
    difference = max(apart(mixed[row], alone[row][row]) for row in (0, 1))
    return difference < CLOSE, (
        f"{method}: two adapters in one batch, each row as under its own to {difference:.1g}."
    )


def saves_and_fits_its_base(method: str) -> Answer:
    """A saved adapter brings the same logits back on its base, and is refused by another."""
    with tempfile.TemporaryDirectory() as folder:
        with attached(method, moved=True) as tuned:
            wanted = logits(tuned)
            tuned.save(folder)
        with attach(base_named("tiny-gpt"), folder) as tuned:
            same = torch.equal(logits(tuned), wanted)
        try:
            attach(base_named("tiny-llama"), folder).detach()
            refused = False
        except ValueError:
            refused = True
    return same and refused, (
        f"{method}: loaded, the logits are {'equal' if same else 'others'}; another base "
        f"{'refuses' if refused else 'takes'} it."
    )


# --- LoRA ----------------------------------------------------------------------------------------


def _delta(tuned: Tuned):
    return next(iter(tuned.deltas.values()))


def lora_starts_with_b() -> Answer:
    """B starts at zero and A does not; at the first step only B has a gradient."""
    with attached("lora") as tuned:
        tuned.batch_loss(given(tuned)).backward()
        delta = _delta(tuned)
        zero = [tensor.abs().max().item() == 0 for tensor in (delta.B, delta.A)]
        slopes = [tensor.grad.abs().max().item() for tensor in (delta.A, delta.B)]
    return zero == [True, False] and slopes[0] == 0 < slopes[1], (
        f"B starts at zero, A does not; at the first step A's gradient is {slopes[0]:.0f} and B's "
        f"up to {slopes[1]:.2g}."
    )


def lora_product_of_shapes() -> Answer:
    """A (r, d_in) times B (d_out, r), in this order, has r rows and r columns."""
    with attached("lora") as tuned:
        delta = _delta(tuned)
        ab, ba = (tuple(m.shape) for m in (delta.A @ delta.B, delta.B @ delta.A))
        weight = tuple(delta.delta_weight().shape)
    return ab != weight == ba, f"A B is {ab}, B A is {ba}, the weight {weight}."


def merged_by(scale: str | int) -> Answer:
    """The merged weight is W + s B A with this s: `alpha/r`, or `1`."""
    with attached("lora", moved=True) as tuned:
        linear = tuned.attachments[0].sites[0].linear
        before, delta = linear.weight.detach().clone(), _delta(tuned)
        s = tuned.methods[0].alpha / tuned.methods[0].r if scale == "alpha/r" else float(scale)
        by_hand = before + s * (delta.B @ delta.A).detach()
        tuned.merge()
        difference = apart(linear.weight.detach(), by_hand)
        tuned.unmerge()
        back = torch.equal(linear.weight, before)
    return difference <= 2 * (8 + 2) * U32 and back, (  # r = 8 products, a factor, a sum
        f"The merged weight and W + {scale} · B A differ by a share of {difference:.1g}; unmerged, "
        f"W is {'bit for bit what it was' if back else 'another'}."
    )


def merging_keeps_the_output() -> Answer:
    """Merged, the model has one matrix where there were three, and the same logits."""
    with attached("lora", moved=True) as tuned:
        wanted = logits(tuned)
        tuned.merge()
        difference = apart(logits(tuned), wanted)
    return (
        difference < CLOSE,
        f"Merged and beside the weight, the logits agree to {difference:.1g}.",
    )


def rank_is_at_most(r: int = 8) -> Answer:
    """The change of a weight has rank r, whatever its size."""
    with attached("lora", moved=True, r=r) as tuned:
        weight = _delta(tuned).delta_weight().detach()
        rank = probes.numerical_rank(weight)
    return rank == r, f"The change of a {tuple(weight.shape)} weight with r = {r} has rank {rank}."


def alpha_is_a_rate() -> Answer:
    """At the first step of Adam, twice alpha is twice the rate of B: the same change of W."""
    found = []
    for alpha, rates in ((32, {}), (16, {"B": 2.0})):
        with attached("lora", alpha=alpha) as tuned:
            step(tuned, rates=rates)
            found.append(_delta(tuned).delta_weight().detach())
    difference = apart(*found)
    return difference <= CLOSE, (
        f"Alpha 32, and alpha 16 with twice the rate of B: after a step of Adam the change of W is "
        f"the same to {difference:.1g}."
    )


def factors_are_renamed(r: int = 3) -> Answer:
    """A Bᵀ with A (d_out, r) and B (d_in, r) is a product B A under other names."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(d, r, generator=generator) for d in (7, 5))
    product = a @ b.T
    rank = torch.linalg.matrix_rank(product).item()
    return product.shape == (7, 5) and rank == r, (
        f"A Bᵀ of (7, {r}) and (5, {r}) is {tuple(product.shape)} and has rank {rank}, as B A."
    )


# --- pruning -------------------------------------------------------------------------------------


def mask_is_a_product() -> Answer:
    """A pruned weight is W times a mask of zeros and ones, entry by entry, half of them zero."""
    plain = logits(base_named("tiny-gpt"))
    with attached(Prune(0.5)) as tuned:
        site = tuned.attachments[0].sites[0]
        mask, now = site.mask, site.linear.weight
        same = torch.equal(now, site.original * mask)
        share = 1 - mask.float().mean().item()
        changed = apart(logits(tuned), plain)
        trained = tuned.count().parameters
    return same and changed > 0 and trained == 0, (
        f"W' is W ⊙ M with {share:.0%} zeros; the logits move by {changed:.2g} and nothing trains."
    )


def mask_saves_nothing() -> Answer:
    """With half of the weights at zero the tensors have the same bytes."""
    plain = base_named("tiny-gpt")
    before = sum(p.numel() * p.element_size() for p in plain.model.parameters())
    with attached(Prune(0.5)) as tuned:
        after = sum(p.numel() * p.element_size() for p in tuned.model.parameters())
    return before == after, f"Dense: {before:,} bytes. Half of it zeros: {after:,} bytes."


# --- code of the sources, in our own words -------------------------------------------------------


def lstm_refuses_indices() -> Answer:
    """An LSTM given integers raises: it reads vectors."""
    try:
        nn.LSTM(8, 8)(torch.arange(5))
    except (RuntimeError, ValueError) as error:
        return True, f"nn.LSTM on integers raises {type(error).__name__}."
    return False, "nn.LSTM took integers."


def encoder_over_the_length(P: int = 16, d: int = 768, layers: int = 12, m: int = 64) -> Answer:
    """An MLP whose input is a vector of P numbers makes 2 L d numbers for all P places together, so
    a place gets d / P numbers, not d, and a P that does not divide them fails."""
    out = nn.Linear(m, layers * 2 * d)(torch.tanh(nn.Linear(P, m)(torch.zeros(P))))
    width = out.view(layers, 2, P, -1).shape[-1]
    try:
        out.view(layers, 2, 20, -1)
        fails = False
    except RuntimeError:
        fails = True

    class Bare(nn.Module):
        def __init__(self):
            self.mlp = nn.Linear(2, 2)

    try:
        Bare()
        raises = False
    except AttributeError:
        raises = True
    return width < d and raises and fails, (
        f"A place of {P} gets {width} numbers where {d} are needed; without its parent's __init__ "
        f"the module {'cannot' if raises else 'can'} be made; 20 places fit: {not fails}."
    )


def growing_prompts_are_blind() -> Answer:
    """Prompts put before each layer's output: T + L P tokens at the end, no prompt in the first
    layer, none of the last layer's prompts is read by the text, and the first state of every row is
    the same."""
    base = base_named("tiny-bert")
    with attach(base, GrowingPrompts(P)) as tuned:
        lengths, firsts = [], []

        def seen(module, args, output):
            lengths.append(output.shape[1])
            firsts.append(output[:, 0].detach())

        blocks = next(iter(tuned.anatomy.layers.values()))
        hooks = [block.register_forward_hook(seen) for block in blocks]
        try:
            loss = tuned.batch_loss(given(tuned))
        finally:
            for hook in hooks:
                hook.remove()
        loss.backward()
        slopes = next(iter(tuned.trainable.values())).grad.abs().amax(dim=(1, 2)).tolist()
        layers = len(blocks)
    rows_alike = torch.equal(firsts[-1][0], firsts[-1][1])
    T = ids(base).shape[1]
    holds = lengths[-1] == T + layers * P and slopes[-1] == 0 < slopes[0] and rows_alike
    return holds, (
        f"{T} tokens are {lengths[-1]} behind {layers} layers with P = {P}; the last prompts' "
        f"gradient is {slopes[-1]:.0f}, the first ones' {slopes[0]:.2g}; two different texts have "
        f"{'the same' if rows_alike else 'different'} first state."
    )


def layers_return_tensors() -> Answer:
    """A layer of transformers' BERT returns a tensor: what takes its output for a tuple fails."""
    base = base_named("tiny-bert")
    block, kinds = next(iter(base.anatomy.layers.values()))[0], []
    hook = block.register_forward_hook(lambda *seen: kinds.append(type(seen[-1]).__name__))
    with torch.no_grad():
        base(ids(base))
    hook.remove()
    return kinds == ["Tensor"], f"A layer of BERT returns a {kinds[0]}."


class Wrapper(nn.Module):
    """A prompt beside a model that it holds as a part of itself."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.prompt = model.requires_grad_(False), nn.Parameter(torch.zeros(P, 8))


def loop_piles_up_gradients(mended: bool = False) -> Answer:
    """A loop that trains a prompt beside a model as it was loaded: every weight of the model gets a
    gradient that nobody uses, and without `zero_grad` that of the second step has the first one's
    in it. `mended`: the model is frozen, and gradients are set to nothing after each step."""
    base = base_named("tiny-gpt")
    model, tokens = copy.deepcopy(base.model).requires_grad_(not mended), ids(base)
    generator = torch.Generator().manual_seed(0)
    prompt = nn.Parameter(torch.randn(P, base.anatomy.shape.d_model, generator=generator))
    optimiser = torch.optim.SGD([prompt], lr=0.0)  # the prompt stays, so both gradients are one
    norms = []
    for _ in range(2):
        embedded = model.get_input_embeddings()(tokens)
        joined = torch.cat([prompt.expand(len(tokens), -1, -1), embedded], dim=1)
        logits = model(inputs_embeds=joined).logits[:, P:-1]  # the prompt's own predict nothing
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        norms.append(prompt.grad.norm().item())
        optimiser.step()
        if mended:
            optimiser.zero_grad()
    times = norms[1] / norms[0]
    kept = sum(parameter.grad is not None for parameter in model.parameters())
    return kept > 0 and abs(times - 2) < CLOSE, (
        f"After two steps {kept} tensors of the model have a gradient; the second step's is "
        f"{times:.2f} times the first one's, from the same batch and prompt."
    )


def hooked_prompts_outgrow_the_mask(mended: bool = False) -> Answer:
    """Prompts that a hook puts before a layer's output meet a mask as long as the text: with
    padding in the batch the next layer stops. `mended`: the mask has a place for each."""
    base = base_named("tiny-bert")
    tokens, grown = ids(base), torch.zeros(2, P, base.anatomy.shape.d_model)
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[0, -2:] = False
    first, second = next(iter(base.anatomy.layers.values()))[:2]
    with torch.no_grad():
        hidden = first(base.anatomy.backbone.embeddings(tokens), mask[:, None, None])
        hidden = torch.cat([grown, hidden], dim=1)
        if mended:
            mask = F.pad(mask, (P, 0), value=True)
        try:
            second(hidden, mask[:, None, None])
            stops = False
        except RuntimeError:
            stops = True
    return stops, (
        f"{hidden.shape[1]} states and a mask of {mask.shape[1]}: the next layer "
        f"{'stops' if stops else 'runs'}."
    )


def plain_class_hides_its_prompts(mended: bool = False) -> Answer:
    """Prompts in a class that is no module cannot be called, moved or given to an optimiser.
    `mended`: the class is one."""

    class Tasks(nn.Module if mended else object):
        def __init__(self):
            super().__init__()
            self.prompts = nn.ParameterDict({"a": torch.zeros(P, 8)})

        def forward(self, task: str) -> Tensor:
            return self.prompts[task]

    made_ = Tasks()
    able = [name for name in ("__call__", "parameters", "to", "state_dict") if name in dir(made_)]
    return not able, f"Of calling, parameters, moving and saving it has {len(able)}."


def wrapper_wakes_dropout() -> Answer:
    """`train()` on a module that holds the frozen model puts the model itself in training mode."""
    wrapper = Wrapper(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval())
    wrapper.train()
    awake = wrapper.model[1].training
    return awake, f"After train() on the wrapper, the frozen model's dropout is on: {awake}."


def wrappers_store_the_base_each(tasks: int = 3) -> Answer:
    """One wrapper a task around one model: shared in memory, written once a task by state_dict."""
    model = nn.Linear(8, 8)
    wrappers = nn.ModuleDict({f"task {i}": Wrapper(model) for i in range(tasks)})
    memory = sum(p.numel() for p in wrappers.parameters())
    written = sum(t.numel() for t in wrappers.state_dict().values())
    base, prompts = 8 * 8 + 8, tasks * P * 8
    return memory == base + prompts and written == tasks * base + prompts, (
        f"{tasks} tasks: {memory} numbers in memory, {written} in the state dict, of a base of "
        f"{base}."
    )


def peft_has(config: str, *fields: str) -> Answer:
    """PEFT's config of this name takes these arguments. Its files are read, not run."""
    spec = importlib.util.find_spec("peft")
    if spec is None:
        raise ModuleNotFoundError("this fact is about peft, which is not installed")
    taken = set()
    folder = Path(spec.submodule_search_locations[0])
    for path in (folder / "config.py", *folder.glob("tuners/*/config.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in (config, "PromptLearningConfig"):
                taken |= {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
    missing = [field for field in fields if field not in taken]
    return not missing, (
        f"PEFT's {config} has no {', '.join(missing)}."
        if missing
        else f"PEFT's {config} has {', '.join(fields)}."
    )
