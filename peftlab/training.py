"""One training loop for a CPU, one GPU and many.

`train` trains the adapter of an adapted base on a task and returns a `Run`. The loop is plain:
AdamW, a short warm-up, a cosine to zero, gradients clipped at norm 1. `accelerate` supplies devices
and precision. After an interrupt, from the keyboard or a stop button, the adapter keeps what it
has learned so far. A loss or a gradient that is not finite ends the run before it reaches a weight.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, repeat

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from peftlab.bases.draws import drawing
from peftlab.tasks import IGNORED, Task
from peftlab.tuned import Tuned
from peftlab.tuned.compiled import CompiledLoss
from peftlab.tuned.loops import follow
from peftlab.tuned.module import TunedModule

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
HEAD_RATE = 5e-3
HIGHEST_RATE = 1e30  # a step of AdamW moves a weight by a few of these: still a float32


@dataclass
class Run:
    """The record of a training run.

    `history` has one row a step (step, loss in nats per target token, lr, seconds since the
    start), with the metrics at the steps that were evaluated. `seconds` is the training time until
    the last step. All seconds are without evaluation. `interrupted` says that the run ended early:
    it was stopped, or `problem` is the sentence that says what was not finite and why. `best_step`
    is the step whose state the adapter has, where `patience` chose one.
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
    problem: str = ""
    best_step: int | None = None
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


def train(
    tuned: Tuned,
    task: Task,
    steps: int = 200,
    lr: float | None = None,
    head_lr: float = HEAD_RATE,
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
    epochs: int | float | None = None,
    patience: int = 0,
    compile: bool = False,
) -> Run:
    """Train the adapter on `task.train`.

    With `epochs` the examples are passed so often, in place of `steps`; a batch that would not be
    full is left out. With `patience` the run ends early once the main score on dev has not risen in
    so many evaluations, one every `eval_every` steps, and the adapter gets back the state of the
    best one, the first of equals: `run.best_step`.

    `lr` defaults to the rate of the first method that trains; a head uses `head_lr`. The dev set
    is scored every `eval_every` steps (0: never); with `evaluate`, the test set is scored before
    and after. `stop`, once set, ends the run before the next step. The same seed on the same
    machine gives the same result, and leaves torch's own random numbers alone, in any thread (on a
    GPU, those that another thread draws there meanwhile change). At the first loss or gradient that
    is not finite the run ends with a warning, `run.problem`, and the weights of the last step.

    With `compile` the loss and its gradients are compiled by `torch.compile`: a minute for each
    length of a batch, so rows are padded to powers of two, and then fewer and faster kernels, on a
    GPU in one launch. The results are equal up to rounding, but dropout draws other numbers. The
    compiled code, and any other that this process has compiled, is dropped at the end.

    Raises ValueError for a setting out of range, a split without examples, a batch that does not
    fit the context, and for `compile` with an LSTM, a weight held as codes or several processes,
    or without a C++ compiler.
    """
    least = {"steps": 1, "batch_size": 1, "eval_every": 0, "warmup": 0, "patience": 0}
    for name, value in zip(least, (steps, batch_size, eval_every, warmup, patience), strict=True):
        if value < least[name]:
            raise ValueError(f"{name}={value}: allowed is at least {least[name]}")
    if patience and not eval_every:
        raise ValueError("patience counts evaluations: set eval_every, the steps between two")
    if epochs is not None:
        full = len(task.split("train")) // min(batch_size, len(task.train))  # batches in a pass
        if not 1 / full <= epochs < math.inf:
            raise ValueError(f"epochs={epochs}: allowed is at least {1 / full:.3g}, one batch")
        steps = round(epochs * full)
    for split, needed in {"train": True, "dev": eval_every, "test": evaluate}.items():
        if needed:
            task.split(split)
    if compile:
        made = (part for module in tuned.modules.values() for part in module.modules())
        lstm = any(isinstance(part, torch.nn.LSTM) for part in made)
        if lstm or tuned.codes:
            what = "an LSTM" if lstm else "a weight held as codes"
            raise ValueError(f"compile=True: torch.compile cannot follow {what}; train without it")
    module = tuned.as_module()
    if device is not None:
        move(tuned, device)
    if lr is None:
        lr, _ = _default_rate(tuned, head_lr)
    for name, rate in (("lr", lr), ("head_lr", head_lr)):
        if not 0 < rate < HIGHEST_RATE:
            raise ValueError(f"{name}={rate}: allowed is a number above 0 and below {HIGHEST_RATE}")
    precision, batch_size = precision_for(tuned.device, precision), min(batch_size, len(task.train))
    run = Run(tuned.label, task.name, seed, str(tuned.device), precision, lr, batch_size)
    if tuned.head:
        run.head_lr = head_lr
    if evaluate:
        run.before = task.score(tuned)
    objective, optimizer, loader, accelerator = _prepare(module, task, run)
    if compile and accelerator.num_processes > 1:
        raise ValueError("compile=True: one process at a time, because gradients would not be sent")
    compiled = CompiledLoss(tuned, accelerator) if compile else None
    batches = chain.from_iterable(repeat(loader))  # epoch after epoch, without end
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_cosine(step, warmup, steps)
    )
    bar = tqdm(total=steps, disable=not progress, desc=f"{tuned.label} on {task.name}")
    tuned.train(True)
    start, skipped, best, waited = time.perf_counter(), 0, -math.inf, 0
    try:
        with drawing(seed, tuned.device, dropout=True):
            for step, batch in zip(range(1, steps + 1), batches, strict=False):
                if stop is not None and stop.is_set():
                    run.interrupted = True
                    break
                if compiled is None:
                    loss = objective(**batch, with_logits=False).loss
                else:
                    loss = compiled(batch)
                accelerator.backward(loss)
                accelerator.unscale_gradients()
                gradients = {n: p.grad for n, p in tuned.trainable.items() if p.grad is not None}
                norm = get_total_norm(gradients.values())
                record = {"step": step, "loss": accelerator.reduce(loss.detach(), "mean").item()}
                if bad := _not_finite(record["loss"], norm, gradients, accelerator.scaler):
                    run.interrupted, run.problem = True, _explained(bad, step, run, tuned, batch)
                    break
                clip_grads_with_norm_(tuned.trainable.values(), 1.0, norm)
                optimizer.step()
                if accelerator.optimizer_step_was_skipped:  # fp16 overflowed: the scale is halved
                    skipped += 1
                else:
                    module.after_step(step - skipped, steps - skipped)
                optimizer.zero_grad(set_to_none=True)
                record["lr"] = schedule.get_last_lr()[0]
                record["seconds"] = run.seconds = time.perf_counter() - start
                run.steps = step
                run.records.append(record)
                schedule.step()
                if eval_every and (step % eval_every == 0 or step == steps):
                    record |= task.score(tuned, task.dev)
                    waited += 1
                    if patience and record[task.main] > best:
                        best, waited, run.best_step = record[task.main], 0, step
                        places = tuned.trainable | tuned.frozen
                        kept = {name: t.detach().clone() for name, t in places.items()}
                    tuned.train(True)
                    start = time.perf_counter() - run.seconds  # the clock stood still meanwhile
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                if on_step is not None:
                    on_step(record)
                if patience and waited >= patience:
                    break
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        if compiled is not None:
            torch.compiler.reset()
        bar.close()
        tuned.train(False)
        for parameter in tuned.trainable.values():
            parameter.grad = None
        if run.best_step is not None:
            tuned.load_state(kept)
    if run.problem:
        warnings.warn(run.problem, RuntimeWarning, stacklevel=2)
    if evaluate:
        run.metrics = task.score(tuned)
    return run


def _not_finite(
    loss: float, norm: Tensor, gradients: dict[str, Tensor], scaler: torch.amp.GradScaler | None
) -> str:
    """What is not finite in this step, or "". A scaler skips a step whose gradients overflow."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if math.isfinite(norm.item()) or (scaler is not None and scaler.get_scale() > 1):
        return ""
    named = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return f"the gradient of {named[0] if named else 'all tensors together'} is not finite"


def _explained(bad: str, step: int, run: Run, tuned: Tuned, batch: dict[str, Tensor]) -> str:
    """The sentence for `Run.problem`: the step, what was not finite, and the likely cause."""
    labels, causes = batch["labels"], []
    if (tuned._align(labels, labels)[1] == IGNORED).all():
        causes.append("every label of the batch is −100, so there is nothing to predict")
    else:
        if step > 1:
            rate, whose = _default_rate(tuned)
            times = f"{run.lr / rate:.3g} times the default of {whose}, {rate:g}"
            causes.append(f"lr={run.lr:g} is {times}")
        if run.precision == "fp16" or tuned.anatomy.embedding.weight.dtype == torch.float16:
            causes.append("float16 ends at 65,504, which float32 and bfloat16 do not")
        causes = causes or ["no step was taken yet, so it is in the weights or in the batch"]
    return (
        f"training ended at step {step}, where {bad}; the weights of step {step - 1} are kept. "
        f"The likely cause: {', and '.join(causes)}"
    )


def _default_rate(tuned: Tuned, head_lr: float = HEAD_RATE) -> tuple[float, str]:
    """The learning rate of the first method that trains, and its title; else that of a head."""
    for each in tuned.attachments:
        if each.trainable:
            return each.method.learning_rate, each.method.title
    return head_lr, "a head"


def move(tuned: Tuned, device: str | torch.device) -> None:
    """Move a base and its attached methods to a device, keeping the same Parameter objects."""
    tuned.base.to(device)
    for module in (*tuned.modules.values(), tuned.linear):
        if module is not None:
            module.to(device)
    follow(tuned)


def _prepare(module: TunedModule, task: Task, run: Run):
    """Let accelerate prepare the module, the optimizer and the batches of an epoch."""
    tuned = module.tuned
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
    return *accelerator.prepare(module, optimizer, loader), accelerator


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
