"""Several processes that train one adapter: they start alike, and may share out the base."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed import is_initialized
from torch.distributed.device_mesh import init_device_mesh

from peftlab.tuned.tuned import Tuned


def check_together(tuned: Tuned, accelerator: Accelerator) -> None:
    """Raise ValueError unless every process holds the same base and the same adapter.

    DDP would take the first process's adapter and every process's own base, and train on.
    """
    mine = (tuned.label, tuned.base.digest, {n: tuple(p.shape) for n, p in tuned.trainable.items()})
    theirs = gather_object([mine])
    for number, other in enumerate(theirs):
        for what, one, two in zip(("methods", "base", "sizes"), theirs[0], other, strict=True):
            if one != two:
                raise ValueError(
                    f"process {number} differs from process 0 in its {what}: load the same base "
                    "and attach the same methods in each"
                )


def shard(tuned: Tuned, device: torch.device | str) -> None:
    """Cut the weights of every block into one share a process; the adapter stays whole in each.

    A block's weights come together for the moment that it runs, forward and backward (FSDP2, by
    torch's `fully_shard`). Weights that are held as codes are shared out as codes. Embeddings and
    head stay whole. Call it before the optimiser is made and DDP wraps `as_module()`: what trains
    is not touched. The base stays in shares until the process ends, so save the adapter and attach
    it to a fresh base for anything but training. Raises ValueError if what trains is the base's
    own, and RuntimeError if this process is alone.
    """
    from torch.distributed.fsdp import fully_shard

    if not is_initialized():
        raise RuntimeError("there is one process: `accelerate launch --multi_gpu` starts several")
    own = {id(parameter): name for name, parameter in tuned.model.named_parameters()}
    trains = [own[id(p)] for p in tuned.trainable.values() if id(p) in own]
    if trains:
        raise ValueError(
            f"{tuned.label} trains {trains[0]} of the base, and only a frozen base is cut into "
            "shares: use LoRA or another method that trains tensors of its own"
        )
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for site in tuned._sites:
        if site.codes is not None:
            site.share()
    for blocks in tuned.anatomy.layers.values():
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=views(block))


def views(block: nn.Module) -> set[nn.Parameter]:
    """Weights without memory of their own: in the place of those held as codes."""
    return {p for p in block.parameters() if p.numel() > 1 and not any(p.stride())}
