"""Runs trained side by side: one forward pass for all of them, and one launch a step on a GPU.

A step of a small model is some thousand kernels, too small to fill a GPU and launched more slowly
than they are computed. Here runs of one entry, with seeds and rates of their own, are computed by
the same kernels: `torch.vmap` runs the model once over a stack of adapters and a stack of batches,
and a CUDA graph launches the whole step. What is computed for each run is a step of
`peftlab.train`: the same batches in the same order, AdamW, warm-up and cosine, gradients clipped at
norm 1, bf16 where that is `train`'s choice. Four things differ, none of them in exact arithmetic:
batches are padded to a few lengths, logits are computed only where a label is, codes of 4 bits are
decoded once and not at every step, and dropout draws other random numbers.

Without a GPU the same step runs as it is, which is how the tests hold it equal to `train`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from itertools import chain, islice, repeat
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from peftlab.bases import Base
from peftlab.bench.contest import Try, drawn
from peftlab.methods import FullFineTuning, Method, Prune
from peftlab.methods.heads import Head
from peftlab.tasks import IGNORED, Task
from peftlab.training import _warm_cosine, precision_for
from peftlab.tuned import Tuned, attach

ROUND = 32  # lengths of batches are padded to a multiple of this
WARMUP = 10  # as in `train`
BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, as in `train`


def order(size: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The examples of each step, in the order of `train`'s loader."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        range(size), batch_size, shuffle=True, drop_last=True, generator=generator, collate_fn=list
    )
    return list(islice(chain.from_iterable(repeat(loader)), steps))


def padded(batch: dict[str, Tensor], length: int, fill: int, decoder: bool) -> dict[str, Tensor]:
    """The batch with rows of `length` tokens; of a decoder with `places` in place of its labels.

    `places` (batch, length) are the positions of a row, first those whose next token has a label;
    `targets` are these labels, −100 at all other positions.
    """
    rows, now = batch["input_ids"].shape
    fills = {"input_ids": fill, "attention_mask": 0, "labels": IGNORED}
    made = {
        key: F.pad(tensor, (0, length - now), value=fills[key])
        if tensor.shape == (rows, now)
        else tensor
        for key, tensor in batch.items()
    }
    if decoder:
        wanted = F.pad(made.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        made["places"] = (wanted == IGNORED).to(torch.int8).argsort(dim=1, stable=True)
        made["targets"] = wanted.gather(1, made["places"])
    return made


def stacked(
    tuned: Tuned, task: Task, jobs: list[Try], examples: int | None = None
) -> list[dict[str, Tensor]]:
    """For each step a batch of every run, (runs, batch, …), padded to a few lengths; out of so many
    examples as the seed draws."""
    number = len(task.train) if examples is None else examples
    size = min(jobs[0].batch_size, number)
    decoder = tuned.kind == "decoder" and tuned.head is None
    given = {"context": tuned.context, "kind": tuned.kind}
    made: dict[int, list[dict[str, Tensor]]] = {}
    for seed in {job.seed for job in jobs}:
        chosen, train = order(number, size, jobs[0].steps, seed), drawn(task.train, examples, seed)
        parts = ([train[i] for i in each] for each in chosen)
        made[seed] = [task.batch(part, tuned.tokenizer, **given) for part in parts]
    steps = []
    for at in range(jobs[0].steps):
        longest = max(batches[at]["input_ids"].shape[1] for batches in made.values())
        length = min(math.ceil(longest / ROUND) * ROUND, tuned.context)
        fill = tuned.tokenizer.pad_token_id
        runs = [padded(made[job.seed][at], length, fill, decoder) for job in jobs]
        steps.append({key: torch.stack([run[key] for run in runs]) for key in runs[0]})
    if decoder:  # in all batches of one length as many places as the most that a row needs
        most: dict[int, int] = {}
        for step in steps:
            labelled = (step["targets"] != IGNORED).sum(dim=-1).max()
            length = step["input_ids"].shape[-1]
            most[length] = max(most.get(length, 1), int(labelled))
        for step in steps:
            kept = most[step["input_ids"].shape[-1]]
            step |= {key: step[key][..., :kept] for key in ("places", "targets")}
    return [{key: tensor.to(tuned.device) for key, tensor in step.items()} for step in steps]


class Loss(nn.Module):
    """`tuned.batch_loss` as a module, with the logits of a decoder only where a label is."""

    def __init__(self, tuned: Tuned):
        super().__init__()
        self.module = tuned.as_module()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tuned = self.module.tuned
        if "places" not in batch:
            return tuned.batch_loss(batch)
        mask = batch["attention_mask"]
        given = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
        if tuned.anatomy.takes_positions:
            given["position_ids"] = tuned.anatomy.positions(mask)
        hidden = tuned.anatomy.backbone(**given).last_hidden_state
        kept = hidden.take_along_dim(batch["places"].unsqueeze(-1), dim=1)
        logits = tuned.model.get_output_embeddings()(kept)
        return F.cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten())


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale q kᵀ + mask) v, in products that `vmap` can stack: it cannot the fused ones."""
    if (groups := query.shape[-3] // key.shape[-3]) > 1:
        key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.float()
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = F.dropout(scores.softmax(dim=-1), dropout_p) if dropout_p else scores.softmax(dim=-1)
    return weights.to(value.dtype) @ value


class Unread:
    """Inside, a forward pass looks at no number, and reads decoded weights in place of codes."""

    def __init__(self, tuned: Tuned):
        dtype = torch.bfloat16 if precision_for(tuned.device) == "bf16" else torch.float32
        coded = [site for site in tuned._sites if site.codes is not None]
        self.decoded = {site.linear.module: site.codes.dequantise(dtype) for site in coded}
        self.forwards: dict[nn.Module, Callable] = {}
        made = chain.from_iterable(module.modules() for module in tuned.modules.values())
        self.lstms = [module for module in made if isinstance(module, nn.LSTM)]

    def __enter__(self):
        for module, weight in self.decoded.items():
            self.forwards[module] = vars(module)["forward"]
            module.forward = partial(_linear, weight, module.bias)
        for lstm in self.lstms:
            lstm.forward = partial(_lstm, lstm)
        self.patches = [
            mock.patch("transformers.masking_utils.is_tracing", lambda *_: True),
            mock.patch("torch.nn.functional.scaled_dot_product_attention", plain_attention),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()
        for module, forward in self.forwards.items():
            module.forward = forward
        for lstm in self.lstms:
            del lstm.forward


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def _lstm(module: nn.LSTM, x: Tensor) -> tuple[Tensor, None]:
    """The states of an LSTM on one sequence, (1, tokens, d_in) to (1, tokens, d_out), token by
    token: torch's own kernel knows no stack of weights."""
    x = x[0]
    for layer in range(module.num_layers):
        ways = []
        for way in ("", "_reverse")[: 1 + module.bidirectional]:
            W, U, b, c = (
                getattr(module, f"{name}_l{layer}{way}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            inputs = F.linear(x, W, b + c)
            h = cell = torch.zeros_like(inputs[0, : module.hidden_size])
            states = []
            for now in (inputs.flip(0) if way else inputs).unbind():
                i, f, g, o = (now + F.linear(h, U)).chunk(4)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                h = o.sigmoid() * cell.tanh()
                states.append(h)
            ways.append(torch.stack(states).flip(0) if way else torch.stack(states))
        x = torch.cat(ways, dim=-1)
    return x[None], None


class Replay:
    """Training runs of one entry, step by step: `step()` until `done`, then `finish()`.

    `jobs` differ in seed and rates alone. `losses` (runs, steps) and, after `finish`, `problems`, a
    sentence for each run whose loss or gradient was not finite: from that step on its weights have
    not moved. `put(i)` gives the adapted base the weights of a run. Use `started` to make one.

    Raises ValueError for methods that need to hear of every step: their runs have to be alone.
    """

    def __init__(
        self,
        tuned: Tuned,
        task: Task,
        jobs: list[Try],
        starts: list[dict[str, Tensor]],
        examples: int | None = None,
    ):
        _check(tuned.methods)
        self.tuned, self.jobs, self.device, self.at = tuned, jobs, tuned.device, 0
        self.problems = [""] * len(jobs)
        self.graphed = self.device.type == "cuda"
        self.bf16 = precision_for(self.device) == "bf16"
        self.batches = stacked(tuned, task, jobs, examples)
        self.loss, self.unread = Loss(tuned), Unread(tuned)
        self._lay_out(starts)
        steps, place = jobs[0].steps, {"device": self.device}
        factors = [_warm_cosine(i, WARMUP, steps) for i in range(steps)]
        self.factors = torch.tensor([*factors, 0.0, 0.0, 0.0], **place)  # a step is tried thrice
        self.number = torch.zeros(1, dtype=torch.long, **place)
        self.losses = torch.zeros(steps + 3, len(jobs), **place)
        self.bad = torch.zeros(len(jobs), dtype=torch.bool, **place)
        self.stream = torch.cuda.Stream(self.device) if self.graphed else None
        self.recorded: dict[int, torch.cuda.CUDAGraph] = {}
        self.given: dict[int, dict[str, Tensor]] = {}
        tuned.train(True)

    def _lay_out(self, starts: list[dict[str, Tensor]]) -> None:
        """All that trains in one table, (runs, numbers), which the parameters are views of."""
        tuned, runs = self.tuned, len(starts)
        ratios = {name: e.method.rate(name) for e in tuned.attachments for name in e.trainable}
        by_rate: dict[float | None, list[str]] = {}  # None: the head's
        for name in tuned.trainable:
            by_rate.setdefault(ratios.get(name), []).append(name)
        numbers = sum(parameter.numel() for parameter in tuned.trainable.values())
        self.flat = torch.zeros(runs, numbers, device=self.device)
        self.gradient, self.m, self.v = (torch.zeros_like(self.flat) for _ in range(3))
        self.parts: list[tuple[slice, Tensor]] = []  # columns and their rates, (runs, 1)
        self.views: dict[str, Tensor] = {}
        at = 0
        for ratio, names in by_rate.items():
            begin = at
            for name in names:
                shape = tuned.trainable[name].shape
                columns = slice(at, at := at + shape.numel())
                view = self.flat[:, columns].view(runs, *shape)
                view.copy_(torch.stack([start[name] for start in starts]))
                self.views[name] = view.detach().requires_grad_()
                self.views[name].grad = self.gradient[:, columns].view(runs, *shape)
            rates = [job.head_lr if ratio is None else job.lr * ratio for job in self.jobs]
            self.parts.append((slice(begin, at), torch.tensor(rates, device=self.device)[:, None]))
        places: dict[int, list[str]] = {}
        for name, parameter in self.loss.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name)
        self.names = {
            place: name for name, p in tuned.trainable.items() for place in places[id(p)]
        }  # where the loss has a parameter: its name among those that train

    @property
    def done(self) -> bool:
        return self.at == self.jobs[0].steps

    def _once(self, batch: dict[str, Tensor]) -> None:
        """One step of every run, without a look at any number."""

        def one(parameters: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
            given = {place: parameters[name] for place, name in self.names.items()}
            return functional_call(self.loss, given, (batch,))

        self.gradient.zero_()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = torch.vmap(one, randomness="different")(self.views, batch)  # (runs,)
        losses.sum().backward()
        losses = losses.detach()
        self.losses.index_copy_(0, self.number, losses[None].float())
        norm = self.gradient.norm(dim=1)
        self.bad |= ~(losses.isfinite() & norm.isfinite())
        self.number += 1
        self._move(self.gradient * (1 / (norm + 1e-6)).clamp(max=1.0)[:, None])

    def _move(self, g: Tensor) -> None:
        """AdamW without decay, a rate for each run; a run that is bad stays where it is."""
        t, (b1, b2) = self.number.float(), BETAS
        self.m.lerp_(g, 1 - b1)
        self.v.mul_(b2).addcmul_(g, g, value=1 - b2)
        factor = self.factors.index_select(0, self.number - 1) / (1 - b1**t)
        spread = (1 - b2**t).sqrt()
        for columns, rates in self.parts:
            update = self.m[:, columns] / (self.v[:, columns].sqrt() / spread + EPS)
            update.mul_(rates * factor).masked_fill_(self.bad[:, None], 0.0)
            self.flat[:, columns] -= update

    def _record(self, batch: dict[str, Tensor]) -> None:
        """Record the step for batches of this length, without changing anything that is trained."""
        length = batch["input_ids"].shape[-1]
        given = self.given[length] = {key: tensor.clone() for key, tensor in batch.items()}
        moved = (self.flat, self.m, self.v, self.number, self.losses, self.bad)
        torch.cuda.synchronize()  # steps that were launched are to be done before they are kept
        before = [tensor.clone() for tensor in moved]
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # libraries set themselves up in a first pass
                self._once(given)
        graph, pool = torch.cuda.CUDAGraph(), next(iter(self.recorded.values()), None)
        pool = pool and pool.pool()
        with torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"):
            self._once(given)
        self.recorded[length] = graph
        for tensor, was in zip(moved, before, strict=True):
            tensor.copy_(was)
        torch.cuda.synchronize()

    def step(self) -> None:
        """Do the next step, or on a GPU launch it."""
        batch = self.batches[self.at]
        with self.unread:
            if not self.graphed:
                self._once(batch)
            elif (length := batch["input_ids"].shape[-1]) not in self.recorded:
                self._record(batch)
        if self.graphed:
            with torch.cuda.stream(self.stream):
                for key, tensor in self.given[length].items():
                    tensor.copy_(batch[key])
                self.recorded[length].replay()
        self.at += 1

    def finish(self) -> None:
        """Wait for the last step, and switch dropout off."""
        if self.stream is not None:
            self.stream.synchronize()
        for kept in (self.recorded, self.given, self.batches):
            kept.clear()
        self.tuned.train(False)
        self.gradient = self.m = self.v = None
        for view in self.views.values():
            view.grad = None
        self.losses = self.losses[: self.at].T.cpu()
        for i in self.bad.nonzero().flatten().tolist():
            finite = self.losses[i].isfinite()
            step = int(finite.int().argmin()) + 1 if not finite.all() else self.at
            self.problems[i] = f"a loss or a gradient was not finite, by step {step} at the latest"

    @torch.no_grad()
    def put(self, run: int) -> None:
        """Give the adapted base the weights of this run."""
        for name, parameter in self.tuned.trainable.items():
            parameter.copy_(self.views[name][run])


def _check(methods: list[Method]) -> None:
    scheduled = [m for m in methods if type(m).after_step != Method.after_step]
    idle = all(isinstance(m, Prune) for m in scheduled)
    if scheduled and not (idle and not any(isinstance(m, FullFineTuning) for m in methods)):
        raise ValueError(f"{scheduled[0].title} hears of every step: it trains with `train` alone")


@contextlib.contextmanager
def started(
    base: Base,
    methods: list[Method],
    head: Head | None,
    task: Task,
    jobs: list[Try],
    examples: int | None = None,
):
    """The runs of these jobs, attached to one base and ready for their first step; each has so many
    training examples as its seed draws, or all."""
    starts, frozen = {}, {}
    for seed in sorted({job.seed for job in jobs}):
        base.detach()
        tuned = attach(base, methods, seed=seed, head=head)
        starts[seed] = {name: p.detach().clone() for name, p in tuned.trainable.items()}
        frozen[seed] = {name: t.detach().clone() for name, t in tuned.frozen.items()}
    with tuned:
        first = next(iter(frozen.values()))
        for other in frozen.values():
            if not all(torch.equal(other[name], tensor) for name, tensor in first.items()):
                raise ValueError("what does not train depends on the seed: one seed at a time")
        yield Replay(tuned, task, jobs, [starts[job.seed] for job in jobs], examples)
