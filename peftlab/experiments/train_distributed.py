"""Train one adapter on several devices: each process reads a part of every batch.

    accelerate launch --multi_gpu --num_processes 2 -m peftlab.experiments.train_distributed \\
        facts --methods lora --steps 100 --out runs/lora

Two processes take two GPUs, one each. Without a GPU (or with `--cpu`) the same line starts two
processes on the CPU. Do not write `accelerate launch --cpu`: that starts a single process, and says
nothing. `--processes 2` makes the script look.

The batch of a step is cut twice: into a share for every process, and each share into `--accumulate`
parts, which run one after the other. The loss is the mean over all labels of the whole batch, so
the cuts change nothing: one process learns the same. `--save-every 10` writes checkpoints, and
`--resume` goes on from the last one. A checkpoint has the optimiser in a pickle file, so resume
only from your own. The first process writes the adapter into `--out`.

`--shard` is for a base that one GPU does not hold: each process keeps a share of every block's
weights, and borrows the others' for the moment that the block runs (FSDP2).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader

import peftlab
from peftlab.methods import METHODS
from peftlab.tasks import NAMES, Task
from peftlab.tuned import Tuned
from peftlab.tuned.devices import check_together, shard


def train(
    tuned: Tuned,
    task: Task,
    steps: int = 100,
    batch_size: int = 16,
    lr: float | None = None,
    seed: int = 0,
    accumulate: int = 1,
    checkpointing: bool = False,
    sharded: bool = False,
    save_every: int = 0,
    out: Path | None = None,
    resume: bool = False,
    cpu: bool = False,
) -> list[float]:
    """The loss of every step, in nats a label; the same in every process.

    `batch_size` counts the examples of a step, in all parts and processes. `checkpointing` computes
    the blocks twice and keeps less. With `out`, the first process writes the adapter there, and
    every `save_every` steps a checkpoint, from which `resume` goes on. Raises ValueError if the
    batch cannot be cut evenly, if the processes do not hold the same base, or if there is no
    checkpoint.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training in this program
    # A batch of the loader is cut into shares, and its order follows from the seed and the epoch.
    data = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed)
    accelerator = Accelerator(cpu=cpu or not torch.cuda.is_available(), dataloader_config=data)
    processes = accelerator.num_processes
    if batch_size % (accumulate * processes) or batch_size > len(task.train):
        raise ValueError(
            f"batch_size={batch_size}: it is cut into {accumulate} parts for {processes} processes "
            f"and has at most {len(task.train)} examples, so a multiple of "
            f"{accumulate * processes} is needed"
        )
    check_together(tuned, accelerator)
    module = tuned.as_module()
    if checkpointing:
        tuned.model.activation_checkpointing_enable({"use_reentrant": False})
    if sharded:
        shard(tuned, accelerator.device)
    rate = tuned.methods[0].learning_rate if lr is None else lr
    optimizer = torch.optim.AdamW(tuned.trainable.values(), lr=rate, weight_decay=0.0)
    loader = DataLoader(
        task.train,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda examples: task.batch_for(tuned, examples),
    )
    wrapped, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    losses = []
    if resume:
        losses = last_checkpoint(out, accelerator)
    batches = batches_of(loader, len(losses), accelerator)
    tuned.train(True)
    torch.manual_seed(seed + 1000 * accelerator.process_index + len(losses))  # dropout
    for step, batch in zip(range(len(losses) + 1, steps + 1), batches, strict=False):
        # How many labels the whole batch has: in the share of this process, and in the others'.
        labels = accelerator.reduce(module.labels_in(batch["labels"]))
        loss = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(parts_of(batch, accumulate), start=1):
            # Gradients travel between the processes once a step, behind the last part.
            with nullcontext() if number == accumulate else accelerator.no_sync(wrapped):
                share = wrapped(**part, num_items_in_batch=labels).loss
                # DDP takes the mean over the processes; the sum is needed.
                accelerator.backward(share * processes)
            loss = loss + share.detach()
        if idle := [name for name, p in tuned.trainable.items() if p.grad is None]:
            raise ValueError(f"{idle[0]} took no part in the loss, and DDP waits for its gradient")
        torch.nn.utils.clip_grad_norm_(tuned.trainable.values(), 1.0)
        optimizer.step()
        module.after_step(step, steps)
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss).item())
        if out and save_every and step % save_every == 0:
            save_checkpoint(out, step, losses, accelerator)
    tuned.train(False)
    if out and accelerator.is_main_process:
        tuned.save(out)
    accelerator.wait_for_everyone()
    return losses


def batches_of(loader: DataLoader, done: int, accelerator: Accelerator) -> Iterator[dict]:
    """This process's share of every batch behind the first `done`, epoch after epoch."""
    epoch, skipped = divmod(done, len(loader))
    while True:
        loader.set_epoch(epoch)  # the order of the examples follows from it
        yield from accelerator.skip_first_batches(loader, skipped)
        epoch, skipped = epoch + 1, 0


def parts_of(share: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The rows of a share in `count` equal parts."""
    cut = {key: tensor.chunk(count) for key, tensor in share.items()}
    return [{key: parts[i] for key, parts in cut.items()} for i in range(count)]


def save_checkpoint(out: Path, step: int, losses: list[float], accelerator: Accelerator) -> None:
    """The adapter, the optimiser and the losses so far."""
    folder = out / "checkpoints" / f"{step:06}"
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:  # last, so that a folder without it is not whole
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    accelerator.wait_for_everyone()


def last_checkpoint(out: Path, accelerator: Accelerator) -> list[float]:
    """Go back to the last whole checkpoint; the losses until there."""
    found = sorted(Path(out, "checkpoints").glob("*/losses.json"))
    if not found:
        raise ValueError(f"{out} has no checkpoint to resume from: train with save_every first")
    accelerator.load_state(str(found[-1].parent))
    return json.loads(found[-1].read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--model", default="tiny-gpt")
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=sorted(METHODS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16, help="of a step, on all devices")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--processes", type=int, help="refuse to start with another number")
    parser.add_argument("--out", type=Path, required=True)
    options = vars(parser.parse_args(arguments))
    wanted, state = options.pop("processes"), Accelerator(cpu=options["cpu"])
    if wanted is not None and state.num_processes != wanted:
        parser.error(
            f"{state.num_processes} of {wanted} processes started: on a CPU too, write "
            f"accelerate launch --multi_gpu --num_processes {wanted}"
        )
    base = peftlab.load(options.pop("model"))
    task = peftlab.tasks.load(options.pop("task"))
    methods = [METHODS[name]() for name in options.pop("methods")]
    tuned = peftlab.attach(base, methods, seed=options["seed"], head=task.head)
    losses = train(tuned, task, sharded=options.pop("shard"), **options)
    if state.is_main_process:
        record = {"processes": state.num_processes, "labels": tuned.label, "losses": losses}
        (options["out"] / "training.json").write_text(json.dumps(record), encoding="utf-8")
        print(f"{len(losses)} steps in {state.num_processes} processes: {losses[-1]:.2f} nats")


if __name__ == "__main__":
    main()
