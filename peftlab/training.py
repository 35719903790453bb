"""One training loop for a CPU, one GPU and many.

`train` trains the adapter of an adapted base on a task and returns a `Run`. The loop is plain:
AdamW, a short warm-up, a cosine to zero, gradients clipped at norm 1. `accelerate` supplies devices
and precision. After an interrupt, from the keyboard or a stop button, the adapter keeps what it
has learned so far.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, repeat

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from peftlab.tasks import Task
from peftlab.tuned import Tuned

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass
class Run:
    """The record of a training run.

    `history` has one row a step (step, loss in nats per target token, lr, seconds since the
    start), with the metrics at the steps that were evaluated. `seconds` is the training time until
    the last step. All seconds are without evaluation.
    """

    method: str
    task: str
    seed: int
    device: str
    precision: str
    lr: float
    batch_size: int
    head_lr: float | None = None
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    before: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list, repr=False)

    @property
    def history(self) -> pd.DataFrame:
        """The records as a table, one row a step."""
        return pd.DataFrame(self.records)


def precision_for(device: torch.device | str, precision: str = "auto") -> str:
    """The arithmetic: fp32 on a CPU; bf16 on a GPU that has it, else fp16 with scaling."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: allowed is {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def target_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of a decoder's next token over the labels that are not −100."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


class _Objective(nn.Module):
    """The adapted model and its loss as one module, which accelerate prepares."""

    def __init__(self, tuned: Tuned):
        super().__init__()
        self.tuned = tuned
        self.model = tuned.model
        self.trainable = nn.ParameterList(tuned.trainable.values())

    def forward(self, **batch: Tensor) -> Tensor:
        return self.tuned.batch_loss(batch)


def train(
    tuned: Tuned,
    task: Task,
    steps: int = 200,
    lr: float | None = None,
    head_lr: float = 5e-3,
    batch_size: int = 16,
    seed: int = 0,
    eval_every: int = 0,
    device: str | torch.device | None = None,
    precision: str = "auto",
    warmup: int = 10,
    progress: bool = True,
    on_step: Callable[[dict], None] | None = None,
    stop: threading.Event | None = None,
    evaluate: bool = True,
) -> Run:
    """Train the adapter on `task.train`.

    `lr` defaults to the rate of the first method that trains; a head uses `head_lr`. The dev set
    is scored every `eval_every` steps (0: never); with `evaluate`, the test set is scored before
    and after. `stop`, once set, ends the run before the next step. The same seed on the same
    machine gives the same result. Raises ValueError for a setting out of range or a batch that
    does not fit the context.
    """
    least = {"steps": 1, "batch_size": 1, "eval_every": 0, "warmup": 0}
    for name, value in zip(least, (steps, batch_size, eval_every, warmup), strict=True):
        if value < least[name]:
            raise ValueError(f"{name}={value}: allowed is at least {least[name]}")
    tuned._check_attached()
    if tuned.merged:
        raise ValueError("the deltas are merged: call unmerge() before training")
    if not tuned.trainable:
        raise ValueError(f"{tuned.label} has no parameter to train: attach LoRA beside it")
    if tuned.using is not None:
        raise ValueError("kept adapters are in use: call use(None) before training")
    if device is not None:
        move(tuned, device)
    if lr is None:
        training = [each.method.learning_rate for each in tuned.attachments if each.trainable]
        lr = training[0] if training else head_lr
    for name, rate in (("lr", lr), ("head_lr", head_lr)):
        if not 0 < rate < math.inf:
            raise ValueError(f"{name}={rate}: allowed is a number above 0")
    precision, batch_size = precision_for(tuned.device, precision), min(batch_size, len(task.train))
    run = Run(tuned.label, task.name, seed, str(tuned.device), precision, lr, batch_size)
    if tuned.head:
        run.head_lr = head_lr
    if evaluate:
        run.before = task.score(tuned)
    objective, optimizer, loader, accelerator = _prepare(tuned, task, run)
    batches = chain.from_iterable(repeat(loader))  # epoch after epoch, without end
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_cosine(step, warmup, steps)
    )
    bar = tqdm(total=steps, disable=not progress, desc=f"{tuned.label} on {task.name}")
    tuned.train(True)
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[tuned.device] if tuned.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for step, batch in zip(range(1, steps + 1), batches, strict=False):
                if stop is not None and stop.is_set():
                    run.interrupted = True
                    break
                loss = objective(**batch)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(tuned.trainable.values(), 1.0)
                optimizer.step()
                tuned.after_step(step, steps)
                optimizer.zero_grad(set_to_none=True)
                record = {"step": step, "loss": loss.item(), "lr": schedule.get_last_lr()[0]}
                record["seconds"] = run.seconds = time.perf_counter() - start
                run.steps = step
                run.records.append(record)
                schedule.step()
                if eval_every and (step % eval_every == 0 or step == steps):
                    record |= task.score(tuned, task.dev)
                    tuned.train(True)
                    start = time.perf_counter() - run.seconds  # the clock stood still meanwhile
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                if on_step is not None:
                    on_step(record)
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        bar.close()
        tuned.train(False)
        for parameter in tuned.trainable.values():
            parameter.grad = None
    if evaluate:
        run.metrics = task.score(tuned)
    return run


def move(tuned: Tuned, device: str | torch.device) -> None:
    """Move a base and its attached methods to a device, keeping the same Parameter objects."""
    tuned.base.to(device)
    for module in (*tuned.modules.values(), tuned.linear):
        if module is not None:
            module.to(device)
    for site in tuned._sites:
        site.to(device)
    for kept in tuned.kept.values():
        kept.update({key: tensor.to(device) for key, tensor in kept.items()})
    if tuned.using is not None:
        tuned.use(tuned.using)  # the kept adapters in use move as well


def _prepare(tuned: Tuned, task: Task, run: Run):
    """Let accelerate prepare the objective, the optimizer and the batches of an epoch."""
    AcceleratorState._reset_state(reset_partial_state=True)  # clear an earlier device or precision
    on_cpu, mixed = tuned.device.type == "cpu", "no" if run.precision == "fp32" else run.precision
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed)
    # On a CPU the default loops over the tensors, and LoRA has many small ones.
    fused = True if on_cpu else None
    optimizer = torch.optim.AdamW(_groups(tuned, run), weight_decay=0.0, fused=fused)
    loader = DataLoader(
        task.train,
        batch_size=run.batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(run.seed),
        collate_fn=lambda examples: task.batch_for(tuned, examples),
    )
    return *accelerator.prepare(_Objective(tuned), optimizer, loader), accelerator


def _groups(tuned: Tuned, run: Run) -> list[dict]:
    """The parameters grouped by learning rate: a head has its own, a method may have several."""
    rates = {name: each.method.rate(name) for each in tuned.attachments for name in each.trainable}
    groups: dict[float, list] = {}
    for name, parameter in tuned.trainable.items():
        lr = run.lr * rates[name] if name in rates else run.head_lr
        groups.setdefault(lr, []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def _warm_cosine(step: int, warmup: int, steps: int) -> float:
    """The factor of the learning rate: a linear rise for `warmup` steps, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
