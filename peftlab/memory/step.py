"""One training step, followed storage by storage.

The parts are read off the tensors that they consist of: parameters, their gradients, the
optimiser's states, and what autograd keeps (`torch.autograd.graph.saved_tensors_hooks`), each
storage once. The total is measured without them: on a GPU the allocator counts; on a CPU every
storage that an operation of the step makes is followed until it dies.
"""

from __future__ import annotations

import contextlib
import json
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from peftlab.bases.data import data_path
from peftlab.tuned import Tuned

MOMENTS = ("forward", "backward", "step")  # the end of each
# Which parts are there at the end of the forward pass, of the backward pass, of the step.
PRESENT = {
    "weights": MOMENTS,
    "aside": MOMENTS,
    "optimiser": MOMENTS,
    "batch": MOMENTS,
    "activations": ("forward",),
    "gradients": ("backward", "step"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMISERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass
class Memory:
    """Bytes of one training step, the optimiser's states made before.

    `parts` has the bytes of each part by layer: "layers.3", "encoder.layers.0", "input" and
    "output" around them, "method" for tensors of no one layer. `aside` is what waits to be put
    back on `detach`: the originals under full fine-tuning. `total` is what was alive at the end
    of the forward pass, of the backward pass and of the step; `most` is the most at any time up to
    then, from the moment before, and `peak` the most of all. On a GPU `elsewhere` is what was
    there before and is no part of the step: it is left out of all of these.
    """

    method: str
    device: str
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    elsewhere: int = 0

    @property
    def peak(self) -> int:
        """The most bytes at any time of the step."""
        return max(self.most.values())

    def bytes(self, part: str) -> int:
        """One part, all layers together."""
        return sum(self.parts[part].values())

    def sum(self, moment: str) -> int:
        """What the parts that are there at this moment add up to."""
        return sum(self.bytes(part) for part in self.parts if moment in PRESENT[part])

    def without(self, part: str) -> Memory:
        """The same step without one part, which has to be there all the time, as "aside" is.

        Raises ValueError for a part that comes and goes, and for one that is not there.
        """
        if PRESENT.get(part) != MOMENTS or part not in self.parts:
            always = ", ".join(name for name in self.parts if PRESENT[name] == MOMENTS)
            raise ValueError(f"{part!r} is not there all the time: allowed is {always}")
        size, parts = self.bytes(part), {k: v for k, v in self.parts.items() if k != part}
        total, most = (
            {moment: held - size for moment, held in found.items()}
            for found in (self.total, self.most)
        )
        return replace(self, parts=parts, total=total, most=most)


@dataclass(frozen=True)
class How:
    """How a step is taken: the settings of `measure` and `predict` that they share.

    `dtype` is that of the arithmetic: below float32 the forward pass runs under autocast, and
    float16 scales its gradients, as in `training.train`. On a GPU the optimiser works on all
    tensors together (`foreach`), on a CPU on each in place (`fused`). Raises ValueError for a value
    that is not allowed.
    """

    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False
    optimiser: str = "adamw"
    lr: float = 0.0
    again: Callable = contextlib.nullcontext  # what a block is computed in for the second time

    def __post_init__(self):
        known = {"dtype": DTYPES, "optimiser": OPTIMISERS, "device": ("cpu", "cuda")}
        for name, allowed in known.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r}: allowed is {', '.join(allowed)}")

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A new one; with the rate 0 no weight changes, and its states are as large as at any."""
        kind, gpu = OPTIMISERS[self.optimiser], self.device == "cuda"
        return kind(parameters, lr=self.lr, weight_decay=0.0, foreach=gpu, fused=not gpu)


def measure(
    tuned: Tuned,
    batch: dict[str, Tensor],
    lr: float = 0.0,
    *,
    dtype: str = "float32",
    checkpointing: bool = False,
    optimiser: str = "adamw",
) -> Memory:
    """A training step on one batch, of an optimiser that has its states. Dropout is off.

    The weights stay in the type that they have; `dtype` is that of the arithmetic, see `How`.
    `checkpointing` keeps the input of each block alone and computes the rest again in the backward
    pass. Raises ValueError for a setting that is not allowed.
    """
    device = tuned.device
    how = How(device.type, dtype, checkpointing, optimiser, lr)
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    counter = Counter() if device.type == "cpu" else Allocator(device)
    return followed(tuned, batch, how, counter)


def followed(
    tuned: Tuned,
    batch: dict[str, Tensor],
    how: How,
    counter: Counter | Allocator,
    optimizer: torch.optim.Optimizer | None = None,
) -> Memory:
    """A step that the counter sees, of an optimiser that has its states. Nothing stays of it."""
    memory, kept = Memory(tuned.label, how.device), {}
    try:
        with _running(tuned, how):
            optimizer = optimizer or warm(tuned, batch, how)
            place = _places_of(tuned)
            parts = _standing(tuned, batch, optimizer, how, place)
            standing = {at: what for part in parts.values() for at, what in part.items()}
            known = standing | _storages((place(n), t) for n, t in _held(tuned, how))
            counter.start(known)
            memory.elsewhere = counter.elsewhere
            with counter, _places(tuned) as now:

                def keep(tensor: Tensor) -> Tensor:
                    counter.see(tensor)
                    _note(tensor, known, kept, now[0])
                    # A node that kept its own output would never be freed.
                    return tensor.detach().requires_grad_(tensor.requires_grad)

                for moment in _step(tuned, batch, optimizer, how, keep):
                    memory.total[moment], memory.most[moment] = counter.now(), counter.most()
                    if moment == "forward":  # what is not used is gone with its graph
                        kept = {at: what for at, what in kept.items() if what.alive}
                        parts["activations"] = kept.copy()
            gradients = {name: p.grad for name, p in tuned.trainable.items() if p.grad is not None}
            layers = {name: place(name, tuned.trainable[name]) for name in gradients}
            parts["gradients"] = _storages((layers[n], g) for n, g in gradients.items())
            _without(tuned.trainable.keys() - gradients.keys(), tuned, optimizer, parts, memory)
            held = _storages((place(n), t) for n, t in _held(tuned, how))
            other = standing.keys() | parts["activations"].keys()
            parts["aside"] = {at: what for at, what in held.items() if at not in other}
    finally:
        for parameter in tuned.trainable.values():
            parameter.grad = None
    memory.parts = {part: _summed(found.values()) for part, found in parts.items()}
    return memory


def _without(names: Iterable[str], tuned: Tuned, optimizer, parts: dict, memory: Memory) -> None:
    """What has no gradient in this step has no states either: take those of `warm` off again."""
    states = [(name, t) for name in names for t in optimizer.state[tuned.trainable[name]].values()]
    for at in _storages(states).keys() & parts["optimiser"].keys():
        size = parts["optimiser"].pop(at).bytes
        for moment in MOMENTS:
            memory.total[moment] -= size
            memory.most[moment] -= size


def warm(tuned: Tuned, batch: dict[str, Tensor], how: How) -> torch.optim.Optimizer:
    """An optimiser that has its states. On a GPU a step is taken, so that its libraries have theirs
    as well; elsewhere gradients of zero are enough."""
    if tuned.device.type == "cuda":
        return take(tuned, batch, how)
    optimizer = how.optimizer(list(tuned.trainable.values()))
    for parameter in tuned.trainable.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def take(tuned: Tuned, batch: dict[str, Tensor], how: How, steps: int = 1) -> torch.optim.Optimizer:
    """Training steps that nothing follows; the new optimiser that took them."""
    optimizer = how.optimizer(list(tuned.trainable.values()))
    with _running(tuned, how):
        for _ in range(steps):
            for _ in _step(tuned, batch, optimizer, how):
                pass
            optimizer.zero_grad(set_to_none=True)
    return optimizer


def _step(
    tuned: Tuned,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    how: How,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[str]:
    """A training step, which says when each part of it is done; `keep` sees what autograd keeps."""
    kind, dtype, gpu = tuned.device.type, DTYPES[how.dtype], how.device == "cuda"
    scaler = torch.amp.GradScaler(kind, enabled=how.dtype == "float16")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(kind, dtype, enabled=how.dtype != "float32"))
        if keep is not None:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            stack.enter_context(hooks)
        loss = tuned.batch_loss(batch)
    yield "forward"
    scaler.scale(loss).backward()
    del loss
    yield "backward"
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(tuned.trainable.values(), 1.0, foreach=gpu)
    optimizer.step()
    yield "step"


@contextlib.contextmanager
def _running(tuned: Tuned, how: How) -> Iterator[None]:
    """Inside, dropout is off. With checkpointing the blocks are told so, and they alone are in
    training, for only there are they computed again; the model's own switch leaves a hook behind.
    """
    stacks = tuned.anatomy.layers.values() if how.checkpointing else ()
    options = dict(use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), how.again()))
    told = {
        "training": True,
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": partial(checkpoint, **options),
    }
    with tuned._evaluating():
        before = {block: vars(block).copy() for stack in stacks for block in stack}
        try:
            for block in before:
                vars(block).update(told)
            yield
        finally:
            for block, values in before.items():
                for name in told:
                    vars(block).pop(name, None)
                vars(block).update({name: values[name] for name in told if name in values})


# --- parts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A storage that was found: the place that it belongs to, and its bytes."""

    place: str
    bytes: int
    reference: weakref.ref

    @property
    def alive(self) -> bool:
        return self.reference() is not None


Found = dict[int, Piece]  # by the storage's identity, which another may have once it is gone


def _standing(
    tuned: Tuned, batch: dict[str, Tensor], optimizer, how: How, place: Callable
) -> dict[str, Found]:
    """The parts that are there before, during and after a step; each storage in one of them."""
    model = {**dict(tuned.model.named_parameters()), **dict(tuned.model.named_buffers())}
    if tuned.codes:  # where those are, the model has views of a single number
        model = {n: t for n, t in model.items() if t.untyped_storage().nbytes() >= t.nbytes}
    modules = {
        f"{name}.{key}": tensor
        for name, module in tuned.modules.items()
        for key, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    codes = {
        f"{name}.{key}": tensor
        for name, held in tuned.codes.items()
        for key, tensor in held.tensors.items()
    }
    states = [
        (place(name, parameter), tensor)
        for name, parameter in tuned.trainable.items()
        for key, tensor in optimizer.state.get(parameter, {}).items()
        if isinstance(tensor, Tensor) and (key != "step" or how.device == "cpu")
    ]
    every = {**modules, **tuned.trainable, **model, **codes}
    parts = {
        "weights": _storages((place(name, tensor), tensor) for name, tensor in every.items()),
        "optimiser": _storages(states),
        "batch": _storages(("input", tensor) for tensor in batch.values()),
    }
    seen: set[int] = set()
    for part, found in parts.items():
        parts[part] = {at: what for at, what in found.items() if at not in seen}
        seen |= parts[part].keys()
    return parts


def _held(tuned: Tuned, how: How) -> Iterator[tuple[str, Tensor]]:
    """Tensors that the sites hold: originals that they will put back, masks. On a GPU the
    originals of coded weights are elsewhere, and not counted."""
    for site in tuned._sites:
        if how.device == "cpu" or site.codes is None:
            yield from ((site.name, tensor) for tensor in site.held())


def _places_of(tuned: Tuned) -> Callable[[str, Tensor | None], str]:
    """The layer of a tensor: by where it is in the model, or of a method's own by its name."""
    found = {}
    for stack, blocks in tuned.anatomy.layers.items():
        for layer, block in enumerate(blocks):
            for tensor in (*block.parameters(), *block.buffers()):
                found[id(tensor)] = f"{stack}.layers.{layer}".removeprefix(".")
    for tensor in (*tuned.model.parameters(), *tuned.model.buffers()):
        found.setdefault(id(tensor), "around")

    def place(name: str, tensor: Tensor | None = None) -> str:
        match = re.search(r"(?:encoder\.|decoder\.)?layers\.\d+", name)
        return found.get(id(tensor)) or (match[0] if match else "method")

    return place


def _storages(tensors: Iterable[tuple[str, Tensor]]) -> Found:
    found: Found = {}
    for place, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage._cdata, Piece(place, storage.nbytes(), weakref.ref(storage)))
    return found


def _summed(found: Iterable[Piece]) -> dict[str, int]:
    places: dict[str, int] = {}
    for piece in found:
        places[piece.place] = places.get(piece.place, 0) + piece.bytes
    return places


def _note(tensor: Tensor, known: Found, kept: Found, place: str) -> None:
    """A tensor is kept for the backward pass: count its storage, unless it is a part already."""
    for at, piece in _storages([(place, tensor)]).items():
        if not any(at in found and found[at].alive for found in (known, kept)):
            kept[at] = piece


@contextlib.contextmanager
def _places(tuned: Tuned):
    """Inside, the one item of the list yielded says where the forward pass is."""
    stacks = list(tuned.anatomy.stacks)
    place, hooks = [f"{stacks[0]}.input".removeprefix(".")], []

    def say(module: nn.Module, name: str, before: bool) -> None:
        add = module.register_forward_pre_hook if before else module.register_forward_hook
        hooks.append(add(lambda *_: place.__setitem__(0, name.removeprefix("."))))

    for stack, blocks in tuned.anatomy.layers.items():
        if stack != stacks[0]:
            say(tuned.anatomy.stacks[stack], f"{stack}.input", before=True)
        for layer, block in enumerate(blocks):
            say(block, f"{stack}.layers.{layer}", before=True)
        say(blocks[-1], f"{stack}.output", before=False)
    if len(stacks) > 1:
        say(tuned.anatomy.stacks[stacks[-1]], "output", before=False)
    try:
        yield place
    finally:
        for hook in hooks:
            hook.remove()


# --- totals ----------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Inside, storages are followed from where an operation makes them to where they die.

    with Live() as live:
        ...
        live.bytes, live.most      now, and at any time so far

    `follow` adds tensors that were there before. Views are the storage that they show. `most`
    counts in blocks of `unit` bytes.
    """

    unit = 1

    def __init__(self):
        super().__init__()
        self.bytes = self.blocks = self.most = 0
        self.followed: dict[int, weakref.ref] = {}

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors' storages too, until they die."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.follow(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.followed:
            return
        self.followed[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.bytes += size
        self.blocks += self._in_blocks(size)
        self.most = max(self.most, self.blocks)

    def _gone(self, key: int, size: int, _: weakref.ref) -> None:
        self.followed.pop(key, None)
        self.bytes -= size
        self.blocks -= self._in_blocks(size)

    def _in_blocks(self, size: int) -> int:
        return -(-size // self.unit) * self.unit


class Counter(contextlib.AbstractContextManager):
    """The storages that a step makes, followed one by one: needs no help from the device."""

    elsewhere = 0

    def __init__(self):
        self.live = Live()

    def start(self, standing: Found) -> None:
        for piece in standing.values():
            self.live._follow(piece.reference())
        self.most()

    def see(self, tensor: Tensor) -> None:
        self.live.follow([tensor])

    def now(self) -> int:
        return self.live.bytes

    def most(self) -> int:
        most, self.live.most = self.live.most, self.live.blocks
        return most

    def __enter__(self):
        self.live.__enter__()
        return self

    def __exit__(self, *raised):
        self.live.__exit__(*raised)


class Allocator(contextlib.nullcontext):
    """Bytes on a GPU by torch's allocator, less the matrix library's own workspace between times.

    Totals are what tensors asked for; the peak is in the allocator's blocks, which are larger.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.elsewhere = device, 0

    def start(self, standing: Found) -> None:
        torch.cuda.empty_cache()
        self.elsewhere = self.now() - sum(piece.bytes for piece in standing.values())
        self.most()

    def see(self, tensor: Tensor) -> None:
        """It is allocated, so it is counted."""

    def now(self) -> int:
        torch.cuda.synchronize(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        asked = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
        return asked - self.elsewhere

    def most(self) -> int:
        most = torch.cuda.max_memory_allocated(self.device) - self.elsewhere
        _highest.update({kind: gpu_peak(kind) for kind in _highest})
        torch.cuda.reset_peak_memory_stats(self.device)
        return most


_highest = {"allocated": 0, "reserved": 0}  # a GPU's peaks before `measure` set them back


def gpu_peak(kind: str = "allocated") -> int:
    """The most bytes of the GPU that this process took at once, 0 without a GPU: by its tensors,
    or "reserved", with what the allocator held back for later ones."""
    counter = getattr(torch.cuda, f"max_memory_{kind}")
    return max(_highest[kind], counter() if torch.cuda.is_available() else 0)


def lesson_on_gpu(lesson: str) -> str:
    """What a lesson takes of a GPU: its run up to here, if that is on one, and the recorded run,
    which is of `python -m peftlab.experiments.measure_lessons --device cuda`. No line of it is
    longer than a page of 900 pixels shows."""
    path = data_path("results", "lessons_cuda.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["lessons"] if path.exists() else []
    row = next((row for row in rows if row["lesson"] == lesson), None)
    here = f"{gpu_peak() / 1e9:.2f} GB of GPU memory at the peak here;\n" if gpu_peak() else ""
    if row is None:
        return f"{here}no run of {lesson} on a GPU is recorded"
    return (
        f"{here}recorded on one {row['device']}, {row['date']}: "
        f"{row['wall seconds']:.0f} seconds,\n"
        f"{row['peak gpu bytes'] / 1e9:.2f} GB of GPU memory at the peak, of "
        f"{row['gpu gigabytes allowed']:g} GiB that it was allowed"
    )
