"""What a `Tuned` consists of, as boxes with names and real sizes: what `draw` draws.

Each box is read from the tensors that are attached and from those of the base, so it cannot show
what is not there. Equal layers are folded: one box, and the layers that have it.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from peftlab.figures.places import Places, places
from peftlab.sites import Shown
from peftlab.tuned import Tuned

_LAYER = re.compile(r"(?:(encoder|decoder)\.)?layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Box:
    """One tensor, or the same tensor of several layers.

    name     its letter; `shape` its real size in one layer
    stack    "", or T5's "encoder" or "decoder"; `site` its place there: "q", "cross.k", "mlp",
             "kv", "mlp.norm", "input", "output", "network"
    how      see `sites.Shown`; "frozen" for the base's own
    method   the name of the method that brings or trains it, "" for the base's own
    tensors  the name in `Tuned.trainable` and the index of each part that trains; () if none does
    layers   the layers that have it, () outside of the blocks
    made     a network makes it: it is neither trained nor part of the base
    """

    name: str
    shape: tuple[int, ...]
    stack: str
    site: str
    how: str
    method: str = ""
    tensors: tuple[tuple[str, int | None], ...] = ()
    layers: tuple[int, ...] = ()
    made: bool = False
    many: int = 1

    @property
    def trained(self) -> bool:
        return bool(self.tensors)

    @property
    def copies(self) -> int:
        """How many tensors of this size it stands for."""
        return len(self.tensors) or len(self.layers) or self.many

    @property
    def numbers(self) -> int:
        """The numbers of all copies."""
        return math.prod(self.shape) * self.copies

    @property
    def size(self) -> str:
        """ "8 × 192", or "192" for a vector."""
        return " × ".join(f"{n:,}" for n in self.shape) or "1"


@dataclass(frozen=True)
class Arrow:
    """Numbers flow from one place of a stack to another; "stream" is the residual stream."""

    start: str
    end: str
    stack: str


@dataclass
class Drawing:
    """A `Tuned` as boxes and arrows.

    layers   how many blocks each stack has
    first    whether the norms come before their sublayers
    brief    to be drawn with names alone, without sizes; `marks` has what stands before the names
             of each method
    weights  the sizes (d_out, d_in) of each linear weight of the base, by stack and role: one,
             unless the layers differ
    """

    title: str
    model: str
    layers: dict[str, int]
    first: bool
    head_dim: int
    gated: bool
    total: int
    brief: bool = False
    marks: dict[str, str] = field(default_factory=dict)
    weights: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)
    boxes: list[Box] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)

    @property
    def trained(self) -> list[Box]:
        return [box for box in self.boxes if box.trained]

    @property
    def numbers(self) -> int:
        """How many numbers train, a head's among them."""
        return sum(box.numbers for box in self.trained)

    def at(self, stack: str, site: str) -> list[Box]:
        """The boxes of one place."""
        return [box for box in self.boxes if (box.stack, box.site) == (stack, site)]

    def sites(self, stack: str) -> set[str]:
        return {box.site for box in self.boxes if box.stack == stack}

    def words(self) -> str:
        """The drawing in words: what trains where, how large, in which layers."""
        parts, touched = [], [box for box in self.boxes if box.method]
        for box in self.trained or touched:
            where = f"{box.stack} {box.site}".strip()
            layers = f" in {spans(box.layers)}" if box.layers else ""
            parts.append(f"{box.name} ({box.size}) at {where}{layers}")
        listed = "; ".join(parts)
        if not self.trained:
            return f"{self.title}. Nothing trains. Changed: {listed or 'nothing'}."
        return f"{self.title}. Trained, in colour: {listed}. Everything else is frozen, in grey."


def spans(layers: tuple[int, ...]) -> str:
    """ "layers 0–5", "layer 3", "layers 0, 2–3"."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
    return f"layer{'s' if len(set(layers)) > 1 else ''} {text}"


def describe(tuned: Tuned) -> Drawing:
    """What is attached to a base, and the base around it. Raises RuntimeError after detach()."""
    if not tuned.attached:
        raise RuntimeError(
            f"{tuned.label} was detached from {tuned.name}: there is nothing to draw"
        )
    plan, shape = places(tuned), tuned.anatomy.shape
    count = tuned.count()
    drawing = Drawing(
        f"{tuned.label} on {tuned.name}", tuned.name,
        {stack: len(blocks) for stack, blocks in tuned.anatomy.layers.items()},
        plan.first, shape.head_dim, shape.gated, count.base,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for source in tuned.sources.values():  # a network runs once, whatever reads it
            stack.enter_context(source.once())
        pieces = [*_attached(tuned, plan), *_frozen(tuned, plan)]
    drawing.boxes = _folded(pieces)
    for name, linear in tuned.anatomy.linears.items():
        stack, _, role = _LAYER.fullmatch(name).groups()
        known = drawing.weights.setdefault((stack or "", role), [])
        known += [size] if (size := (linear.d_out, linear.d_in)) not in known else []
    drawing.arrows = [arrow for stack in drawing.layers for arrow in _arrows(drawing, stack)]
    return drawing


def _attached(tuned: Tuned, plan: Places) -> Iterator[Box]:
    """The boxes of all that methods brought, layer by layer."""
    names = {id(tensor): name for name, tensor in tuned.trainable.items()}
    seen: set[int] = set()
    for attachment in tuned.attachments:
        shown = [(s, site) for site in attachment.sites for s in site.shown()]
        shown.sort(key=lambda pair: pair[0].how == "network")  # who reads a tensor goes first
        for each, _ in shown:
            if each.how != "network" or id(each.tensor) not in seen:
                yield _box(each, attachment.method.name, names, plan)
                seen.add(id(each.tensor))
        for module in attachment.modules.values():
            if not list(module.parameters()):  # frozen, and shared by all places
                for name, tensor in module.named_buffers():
                    yield Box(
                        name, tuple(tensor.shape), "", "shared", "shared", attachment.method.name
                    )
    if tuned.linear is not None:
        for name, tensor in tuned.linear.named_parameters():
            letter = {"weight": "W", "bias": "b"}[name]
            trains = ((names[id(tensor)], None),)
            yield Box(letter, tuple(tensor.shape), _last(tuned), "head", "own", "head", trains)


def _box(shown: Shown, method: str, names: dict[int, str], plan: Places) -> Box:
    name, place = shown.name, shown.place
    if shown.how == "own":
        place, name = plan.own[id(shown.tensor)]
    trained = names.get(id(shown.tensor))
    tensors = () if trained is None else ((trained, shown.index),)
    made = trained is None and shown.how in ("token", "key", "value")
    return _placed(name, shown.shape, place, shown.how, method, tensors, made)


def _placed(name, shape, place, how, method="", tensors=(), made=False) -> Box:
    if match := _LAYER.fullmatch(place):
        stack, layer, site = match.groups()
        return Box(name, shape, stack or "", site, how, method, tensors, (int(layer),), made)
    stack, _, site = place.rpartition(".")
    return Box(name, shape, stack, site, how, method, tensors, (), made)


def _frozen(tuned: Tuned, plan: Places) -> Iterator[Box]:
    """The base's own matrices, norms and tables that do not train."""
    trains = {id(tensor) for tensor in tuned.trainable.values()}
    for linear in tuned.anatomy.linears.values():
        if id(linear.module.weight) not in trains:
            yield _placed("W", (linear.d_out, linear.d_in), linear.name, "frozen")
    inside = {id(linear.module.weight) for linear in tuned.anatomy.linears.values()}
    for name, tensor in tuned.model.named_parameters():
        if id(tensor) in trains | inside or name.endswith("bias"):
            continue
        place, letter = plan.own[id(tensor)]
        yield _placed(letter, tuple(tensor.shape), place, "frozen")


def _last(tuned: Tuned) -> str:
    stacks = list(tuned.anatomy.stacks)
    return stacks[-1] if len(stacks) > 1 else ""


def _folded(boxes: list[Box]) -> list[Box]:
    """Equal boxes of several layers as one; of a network, equal sizes of one part as one."""
    groups: dict[tuple, list[Box]] = {}
    for box in boxes:
        stem = re.sub(r"(_l\d+)?(_reverse)?$", "", box.name) if box.site == "network" else box.name
        key = (stem, box.shape, box.stack, box.site, box.how, box.method, box.made, box.trained)
        groups.setdefault(key, []).append(box)
    found = []
    for (stem, shape, stack, site, how, method, made, _), group in groups.items():
        tensors = tuple(t for box in group for t in box.tensors)
        layers = tuple(layer for box in group for layer in box.layers)
        found.append(Box(stem, shape, stack, site, how, method, tensors, layers, made, len(group)))
    return found


def _arrows(drawing: Drawing, stack: str) -> Iterator[Arrow]:
    """How numbers flow through a block: every sublayer reads the stream and adds to it."""
    sites = drawing.sites(stack)
    for sub, where in (("attention", ""), ("cross", "cross.")):
        if f"{where}o" in sites or f"{where}qkv" in sites:
            yield from (Arrow("stream", f"{where}{t}", stack) for t in ("q", "k", "v"))
            yield from (Arrow(f"{where}{t}", f"{where}heads", stack) for t in ("q", "k", "v"))
            yield Arrow(f"{where}heads", f"{where}o", stack)
            yield Arrow(f"{where}o", f"{sub}.sum", stack)
    if "down" in sites:
        for inner in ("up", "gate") if drawing.gated else ("up",):
            yield from (Arrow("stream", inner, stack), Arrow(inner, "down", stack))
        yield Arrow("down", "mlp.sum", stack)
