"""Training steps that a GPU replays: one step is recorded as a CUDA graph and launched as a whole.

A step of a small model is some thousand kernels, and Python launches them more slowly than the GPU
computes them. Recorded once, they are launched together; several runs are replayed side by side,
each on a stream of its own. What is computed is a step of `peftlab.train`: the same batches in the
same order, AdamW, warm-up and cosine, gradients clipped at norm 1, bf16 where that is `train`'s
choice. Three things differ, none of them in exact arithmetic: batches are padded to a few lengths,
logits are computed only where a label is, and dropout draws other random numbers.

Without a GPU the same step runs as it is, which is how the tests hold it equal to `train`.
"""

from __future__ import annotations

import contextlib
import math
from itertools import chain, islice, repeat

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from peftlab.bench.contest import Try
from peftlab.tasks import IGNORED, Task
from peftlab.training import _groups, _warm_cosine, precision_for
from peftlab.tuned import Tuned

ROUND = 32  # lengths of batches are padded to a multiple of this
WARMUP = 10  # as in `train`


def order(size: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The examples of each step, in the order of `train`'s loader."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        range(size), batch_size, shuffle=True, drop_last=True, generator=generator, collate_fn=list
    )
    return list(islice(chain.from_iterable(repeat(loader)), steps))


def padded(batch: dict[str, Tensor], length: int, fill: int, decoder: bool) -> dict[str, Tensor]:
    """The batch with rows of `length` tokens; a decoder's labels moved to where they are predicted.

    Adds for a decoder `places` (batch, n) and `targets` (batch, n): the positions whose next token
    has a label, in front of others that are filled up with the label −100.
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


def labelled_loss(tuned: Tuned, batch: dict[str, Tensor]) -> Tensor:
    """`tuned.batch_loss`, with the logits of a decoder only where a label is."""
    if "places" not in batch:
        return tuned.batch_loss(batch)
    mask = batch["attention_mask"]
    given = {"input_ids": batch["input_ids"], "attention_mask": mask}
    if tuned.anatomy.takes_positions:
        given["position_ids"] = tuned.anatomy.positions(mask)
    hidden = tuned.anatomy.backbone(**given, use_cache=False).last_hidden_state
    kept = hidden.take_along_dim(batch["places"].unsqueeze(-1), dim=1)
    logits = tuned.model.get_output_embeddings()(kept)
    return F.cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten())


class Replay:
    """One training run, step by step: `step()` until `done`, then `finish()`.

    `losses` has the loss of each step; `problem` says, after `finish`, that a loss or gradient was
    not finite, and at which step. From that step on nothing has moved.
    """

    def __init__(self, tuned: Tuned, task: Task, job: Try):
        self.tuned, self.job, self.problem, self.at = tuned, job, "", 0
        self.device, self.module = tuned.device, tuned.as_module()
        self.graphed = self.device.type == "cuda"
        self.bf16 = precision_for(self.device) == "bf16"
        self.stream = torch.cuda.Stream(self.device) if self.graphed else None
        self.batches = self._batches(task)
        self.parameters = list(tuned.trainable.values())
        rates = _Rates(job.lr, job.head_lr)
        groups = _groups(tuned, rates)
        room = job.steps + 3  # a step is run three times while it is recorded
        factors = [_warm_cosine(i, WARMUP, job.steps) for i in range(job.steps)]
        self.scale = torch.tensor([*factors, 0.0, 0.0, 0.0], device=self.device)
        self.number = torch.zeros(1, dtype=torch.long, device=self.device)
        self.losses = torch.zeros(room, device=self.device)
        self.bad = torch.zeros((), device=self.device)
        self.rates = [torch.tensor(group["lr"], device=self.device) for group in groups]
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=self.device)
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=0.0, fused=True, capturable=self.graphed
        )
        self.recorded: dict[int, torch.cuda.CUDAGraph] = {}
        self.given: dict[int, dict[str, Tensor]] = {}
        self.pool = None
        tuned.train(True)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def _batches(self, task: Task) -> list[dict[str, Tensor]]:
        """All batches on the device, padded to a few lengths."""
        tuned, job = self.tuned, self.job
        size = min(job.batch_size, len(task.train))
        made = []
        decoder = tuned.kind == "decoder" and tuned.head is None
        for chosen in order(len(task.train), size, job.steps, job.seed):
            examples = [task.train[i] for i in chosen]
            batch = task.batch(examples, tuned.tokenizer, context=tuned.context, kind=tuned.kind)
            length = math.ceil(batch["input_ids"].shape[1] / ROUND) * ROUND
            length = min(length, tuned.context)
            made.append(padded(batch, length, tuned.tokenizer.pad_token_id, decoder))
        if decoder:  # as many places in all batches of a length as the most that one has
            most: dict[int, int] = {}
            for batch in made:
                length, here = (
                    batch["input_ids"].shape[1],
                    (batch["targets"] != IGNORED).sum(1).max(),
                )
                most[length] = max(most.get(length, 1), int(here))
            for batch in made:
                for key in ("places", "targets"):
                    batch[key] = batch[key][:, : most[batch["input_ids"].shape[1]]]
        return [{key: t.to(self.device) for key, t in batch.items()} for batch in made]

    @property
    def done(self) -> bool:
        return self.at == self.job.steps

    def _once(self, batch: dict[str, Tensor]) -> None:
        """One step, without a look at any number."""
        torch._foreach_zero_([p.grad for p in self.parameters])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = labelled_loss(self.tuned, batch)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        fine = (loss.detach().isfinite() & norm.isfinite()).float()
        torch.maximum(self.bad, 1 - fine, out=self.bad)
        self.losses.index_copy_(0, self.number, loss.detach().float().view(1))
        factor = self.scale.index_select(0, self.number).squeeze()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"].copy_(rate * factor)
        self.optimizer.grad_scale = ((norm + 1e-6) / 1.0).clamp(min=1.0).float()
        self.optimizer.found_inf = self.bad
        self.optimizer.step()
        self.number += 1

    def _record(self, batch: dict[str, Tensor]) -> None:
        """Record the step for batches of this length, without changing anything that is trained."""
        length = batch["input_ids"].shape[1]
        self.given[length] = {key: tensor.clone() for key, tensor in batch.items()}
        kept = [self.number.clone(), self.bad.clone(), self.losses.clone()]
        moving = [t for state in self.optimizer.state.values() for t in state.values()]
        saved = [t.detach().clone() for t in (*self.parameters, *moving)]
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # libraries set themselves up in a first pass
                self._once(self.given[length])
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            self._once(self.given[length])
        self.pool, self.recorded[length] = graph.pool(), graph
        with torch.no_grad():
            for tensor, before in zip((self.number, self.bad, self.losses), kept, strict=True):
                tensor.copy_(before)
            now = [t for state in self.optimizer.state.values() for t in state.values()]
            if not moving:  # the first time the optimiser had no state yet: it starts at zero
                saved += [torch.zeros_like(t) for t in now]
            for tensor, before in zip((*self.parameters, *now), saved, strict=True):
                tensor.copy_(before)
        torch.cuda.synchronize()

    def step(self) -> None:
        """Do the next step, or on a GPU launch it."""
        batch = self.batches[self.at]
        if not self.graphed:
            self._once(batch)
        else:
            length = batch["input_ids"].shape[1]
            if length not in self.recorded:
                torch.cuda.synchronize()
                self._record(batch)
            with torch.cuda.stream(self.stream):
                for key, tensor in self.given[length].items():
                    tensor.copy_(batch[key])
                self.recorded[length].replay()
        self.at += 1
        with torch.cuda.stream(self.stream) if self.graphed else contextlib.nullcontext():
            self.module.after_step(self.at, self.job.steps)

    def finish(self) -> None:
        """Wait for the last step; take the gradients off and switch dropout off."""
        if self.graphed:
            self.stream.synchronize()
        self.recorded.clear()
        self.given.clear()
        self.batches.clear()
        for parameter in self.parameters:
            parameter.grad = None
        self.tuned.train(False)
        self.losses = self.losses[: self.at].cpu()
        if self.bad.item():
            where = int((~self.losses.isfinite()).int().argmax()) + 1
            self.problem = f"a loss or a gradient was not finite, by step {where} at the latest"


class _Rates:
    """The two rates of a run, by the names that `_groups` reads."""

    def __init__(self, lr: float, head_lr: float | None):
        self.lr, self.head_lr = lr, head_lr
