"""Where the memory of a training step goes, measured: weights, gradients, optimiser, activations.

    tuned = peftlab.attach(base, LoRA())
    memory = measure(tuned, batch)
    memory.bytes("activations"), memory.total["forward"]

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
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftlab.bases.data import data_path
from peftlab.sites import MaskedWeight
from peftlab.sites.structures import SmallerModel
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


@dataclass
class Memory:
    """Bytes of one training step, after a first one that made the optimiser's states.

    `parts` has the bytes of each part by layer: "layers.3", "encoder.layers.0", "input" and
    "output" around them, "method" for tensors of no one layer. `aside` is what waits to be put
    back on `detach`: the originals under full fine-tuning. `total` is what was alive at the end
    of the forward pass, of the backward pass and of the step, `peak` the most at any time; on a
    GPU without `elsewhere`, what was there before and is no part of the step.
    """

    method: str
    device: str
    parts: dict[str, dict[str, int]]
    total: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    elsewhere: int = 0

    def bytes(self, part: str) -> int:
        """One part, all layers together."""
        return sum(self.parts[part].values())

    def sum(self, moment: str) -> int:
        """What the parts that are there at this moment add up to."""
        return sum(self.bytes(part) for part, moments in PRESENT.items() if moment in moments)


def measure(tuned: Tuned, batch: dict[str, Tensor], lr: float = 0.0) -> Memory:
    """Two training steps on one batch, the second of them measured. Dropout is off.

    AdamW as in `training.train`; with the rate 0 no weight changes, and the states are as large
    as at any other.
    """
    device, trainable = tuned.device, list(tuned.trainable.values())
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    fused = True if device.type == "cpu" else None
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=fused)
    counter = _Counter() if device.type == "cpu" else _Allocator(device)
    try:
        with tuned._evaluating():
            _step(tuned, batch, optimizer)
            optimizer.zero_grad(set_to_none=True)
            place, parts = _places_of(tuned), _standing(tuned, batch, optimizer)
            known = {at: what for part in parts.values() for at, what in part.items()}
            standing = known | _storages(_held(tuned))
            counter.start(tuned, batch, optimizer, sum(size for _, size in standing.values()))
            known |= _storages(_masks(tuned))
            memory = Memory(tuned.label, str(device), {}, elsewhere=counter.elsewhere)
            kept: dict[int, Kept] = {}
            with counter, _places(tuned) as now:

                def note(tensor: Tensor) -> Tensor:
                    counter.see(tensor)
                    return _note(tensor, known, kept, now)

                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    loss = tuned.batch_loss(batch)
                memory.total["forward"] = counter.now()
                used = {at: (where, n) for at, (where, n, alive) in kept.items() if alive()}
                loss.backward()
                del loss
                memory.total["backward"] = counter.now()
                torch.nn.utils.clip_grad_norm_(trainable, 1.0)
                optimizer.step()
                memory.total["step"] = counter.now()
            memory.peak = counter.peak()
            parts["gradients"] = _storages(
                (place(name, p), p.grad)
                for name, p in tuned.trainable.items()
                if p.grad is not None
            )
            parts["activations"] = used
            known |= used
            masks = [(place(name), mask) for name, mask in _masks(tuned)]
            aside = [(place(name), tensor) for name, tensor in _held(tuned)]
            parts["aside"] = _storages(masks) | {
                at: what for at, what in _storages(aside).items() if at not in known
            }
    finally:
        for parameter in trainable:
            parameter.grad = None
    memory.parts = {part: _summed(found.values()) for part, found in parts.items()}
    return memory


def _step(tuned: Tuned, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tuned.batch_loss(batch).backward()
    torch.nn.utils.clip_grad_norm_(tuned.trainable.values(), 1.0)
    optimizer.step()


# --- parts -----------------------------------------------------------------------------------

Found = dict[int, tuple[str, int]]  # a storage's address: the place it belongs to, its bytes
Kept = tuple[str, int, weakref.ref]  # and the storage, for what is not used dies with its graph


def _standing(tuned: Tuned, batch: dict[str, Tensor], optimizer) -> dict[str, Found]:
    """The parts that are there before, during and after a step; each storage in one of them."""
    place = _places_of(tuned)
    model = {**dict(tuned.model.named_parameters()), **dict(tuned.model.named_buffers())}
    if tuned.codes:  # where those are, the model has views of a single number
        model = {n: t for n, t in model.items() if t.untyped_storage().nbytes() >= t.nbytes}
    modules = {
        f"{name}.{key}": tensor
        for name, module in tuned.modules.items()
        for key, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    states = [
        (place(name, parameter), tensor)
        for name, parameter in tuned.trainable.items()
        for tensor in optimizer.state.get(parameter, {}).values()
        if isinstance(tensor, Tensor) and tensor.device == tuned.device
    ]
    parts = {
        "weights": _storages(
            (place(name, tensor), tensor)
            for name, tensor in {**modules, **tuned.trainable, **model, **_codes(tuned)}.items()
        ),
        "optimiser": _storages(states),
        "batch": _storages(("input", tensor) for tensor in batch.values()),
    }
    seen: set[int] = set()
    for part, found in parts.items():
        parts[part] = {at: what for at, what in found.items() if at not in seen}
        seen |= parts[part].keys()
    return parts


def _codes(tuned: Tuned) -> dict[str, Tensor]:
    """The tensors of weights that are held as codes."""
    return {
        f"{name}.{key}": tensor
        for name, codes in tuned.codes.items()
        for key, tensor in codes.tensors.items()
    }


def _masks(tuned: Tuned) -> Iterator[tuple[str, Tensor]]:
    """What holds deltas at zero, by the weight's name. Autograd keeps no second one."""
    for site in tuned._sites:
        if isinstance(site, MaskedWeight) and site.linear.mask is not None:
            yield site.name, site.linear.mask


def _held(tuned: Tuned) -> Iterator[tuple[str, Tensor]]:
    """Tensors that the sites hold: originals that they will put back, masks. On a GPU the
    originals of coded weights are elsewhere, and not counted."""
    yield from _masks(tuned)
    for site in tuned._sites:
        if isinstance(site, SmallerModel):  # whole blocks
            blocks = nn.ModuleList(part for part in site.aside if isinstance(part, nn.Module))
            yield from (("", tensor) for tensor in (*blocks.parameters(), *blocks.buffers()))
        for leaf in tree_leaves(vars(site) if hasattr(site, "__dict__") else {}):
            if isinstance(leaf, Tensor) and leaf.device == tuned.device:
                yield getattr(site, "name", ""), leaf


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
            found.setdefault(storage.data_ptr(), (place, storage.nbytes()))
    return found


def _summed(found: Iterable[tuple[str, int]]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, size in found:
        places[place] = places.get(place, 0) + size
    return places


def _note(tensor: Tensor, known: Found, kept: dict[int, Kept], place: list[str]) -> Tensor:
    """A tensor is kept for the backward pass: count its storage, unless it is a part already."""
    storage = tensor.untyped_storage()
    at = storage.data_ptr()
    if storage.nbytes() and at not in known and not (at in kept and kept[at][2]()):
        kept[at] = place[0], storage.nbytes(), weakref.ref(storage)
    return tensor.detach()  # a node that kept its own output would never be freed


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

    `follow` adds tensors that were there before. Views are the storage that they show.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
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
        key, size = id(storage), storage.nbytes()
        if key in self.followed:
            return

        def gone(_: weakref.ref) -> None:
            self.followed.pop(key, None)
            self.bytes -= size

        self.followed[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.most = max(self.most, self.bytes)


class _Counter(Live):
    """The same for `measure`, which asks a GPU's allocator with the same words."""

    elsewhere = 0

    def start(self, tuned: Tuned, batch: dict[str, Tensor], optimizer, standing: int) -> None:
        model = (*tuned.model.parameters(), *tuned.model.buffers(), *tuned.trainable.values())
        added = (t for m in tuned.modules.values() for t in (*m.parameters(), *m.buffers()))
        states = tree_leaves([list(state.values()) for state in optimizer.state.values()])
        held = (tensor for _, tensor in _held(tuned))
        codes = _codes(tuned).values()
        every = (*model, *added, *states, *held, *codes, *batch.values())
        self.follow(tensor for tensor in every if isinstance(tensor, Tensor))

    def see(self, tensor: Tensor) -> None:
        """Count this one too, if it was made before: indices that a hook holds, once kept."""
        self._follow(tensor.untyped_storage())

    def now(self) -> int:
        return self.bytes

    def peak(self) -> int:
        return self.most


class _Allocator(contextlib.nullcontext):
    """Bytes on a GPU by torch's allocator, less the matrix library's own workspace between times.

    Totals are what tensors asked for; the peak is in the allocator's blocks, which are larger.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.elsewhere = device, 0

    def start(self, tuned: Tuned, batch: dict[str, Tensor], optimizer, standing: int) -> None:
        torch.cuda.empty_cache()
        self.elsewhere = self.now() - standing
        _highest.update({kind: gpu_peak(kind) for kind in _highest})
        torch.cuda.reset_peak_memory_stats(self.device)

    def see(self, tensor: Tensor) -> None:
        """It is allocated, so it is counted."""

    def now(self) -> int:
        torch.cuda.synchronize(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        asked = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
        return asked - self.elsewhere

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.elsewhere


_highest = {"allocated": 0, "reserved": 0}  # a GPU's peaks before `measure` set them back


def gpu_peak(kind: str = "allocated") -> int:
    """The most bytes of the GPU that this process took at once, 0 without a GPU: by its tensors,
    or "reserved", with what the allocator held back for later ones."""
    counter = getattr(torch.cuda, f"max_memory_{kind}")
    return max(_highest[kind], counter() if torch.cuda.is_available() else 0)


def lesson_on_gpu(lesson: str) -> str:
    """What a lesson takes of a GPU: its run up to here, if that is on one, and the recorded run,
    which is of `python -m peftlab.experiments.measure_lessons --device cuda`."""
    path = data_path("results", "lessons_cuda.json")
    rows = json.loads(path.read_text())["lessons"] if path.exists() else []
    row = next((row for row in rows if row["lesson"] == lesson), None)
    here = f"{gpu_peak() / 1e9:.2f} GB of GPU memory at the peak here; " if gpu_peak() else ""
    if row is None:
        return f"{here}no run of {lesson} on a GPU is recorded"
    return (
        f"{here}recorded on one {row['device']}, {row['date']}: {row['wall seconds']:.0f} seconds, "
        f"{row['peak gpu bytes'] / 1e9:.2f} GB of GPU memory at the peak, of "
        f"{row['gpu gigabytes allowed']:g} GiB that it was allowed"
    )
