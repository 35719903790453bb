"""A model with heads, neurons or whole blocks taken out: really smaller, and restored bit for bit.

Names say what is taken out: `layers.3` is a block and its attention, `decoder.layers.0.cross`
is T5's second attention. A key-value head goes with every query head that reads it; `queries` are
query heads alone, and each group keeps the same number of them.

    >>> from peftlab.bases import Shape
    >>> removed = Removed(heads={"layers.0": (0, 5)}, neurons={"layers.1": (7,)})
    >>> Shape.named("gpt2").parameters() - removed.smaller(Shape.named("gpt2")).parameters()
    395137
"""

from collections import Counter
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from peftlab.bases import FAMILIES, Anatomy, Linear, Shape, fused
from peftlab.bases.caches import cache_in
from peftlab.bases.plain import plain
from peftlab.bases.shapes import ATTENTION
from peftlab.sites.site import PerThread, Site

KINDS = ("heads", "queries", "neurons")  # removed by index; layers are removed by name


def blocks(shape: Shape) -> list[str]:
    """The names of all blocks."""
    first = "encoder." if shape.decoder_layers else ""
    counts = {first: shape.layers, "decoder.": shape.decoder_layers}
    return [f"{stack}layers.{i}" for stack, count in counts.items() for i in range(count)]


def attentions(shape: Shape) -> list[str]:
    """The names of all attention sublayers."""
    names = blocks(shape)
    return names + [f"{name}.cross" for name in names if name.startswith("decoder")]


@dataclass(frozen=True)
class SmallerShape(Shape):
    """A shape whose sublayers differ: (query heads, key-value heads) and neurons of each one."""

    attention: tuple[tuple[int, int], ...] = ()
    neurons: tuple[int, ...] = ()

    def matrices(self, target: str) -> list[tuple[int, int, int]]:
        """`(copies, d_in, d_out)` of a logical target, for each size that it has."""
        super().matrices(target)  # raises for a target that is not there
        widths = list(self.neurons)
        if target in ATTENTION:
            widths = [self.head_dim * pair[target in ("k", "v")] for pair in self.attention]
        back = target in ("o", "down")
        sizes = Counter((w, self.d_model) if back else (self.d_model, w) for w in widths)
        return [(copies, *size) for size, copies in sizes.items()]


@dataclass(frozen=True)
class Removed:
    """The structures to take out: indices by the name of a sublayer or block, and block names."""

    heads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    queries: dict[str, tuple[int, ...]] = field(default_factory=dict)
    neurons: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    def check(self, shape: Shape) -> None:
        """Raise ValueError unless all structures exist and the model can run without them."""
        there = blocks(shape)
        if not (self.layers or any(i for k in KINDS for i in getattr(self, k).values())):
            raise ValueError(
                f"nothing would go: of {shape.kv_heads} key-value heads, {shape.d_ff} neurons and "
                f"{len(there)} layers each fraction is less than half of one"
            )
        for name in self.layers:
            if name not in there:
                raise ValueError(f"no block {name!r}: {shape.name} has {there[0]} to {there[-1]}")
            if shape.decoder_layers and name.endswith("layers.0"):
                raise ValueError(f"{name} holds the table of positions that its stack reads")
        for stack in {name.rpartition("layers")[0] for name in there}:
            if all(name in self.layers for name in there if name.startswith(stack)):
                raise ValueError(f"every block of {shape.name} would go: at least one must stay")
        sizes = {"heads": shape.kv_heads, "queries": shape.heads, "neurons": shape.d_ff}
        for kind, size in sizes.items():
            places = there if kind == "neurons" else attentions(shape)
            for name, indices in getattr(self, kind).items():
                if name not in places or name.removesuffix(".cross") in self.layers:
                    raise ValueError(f"{kind}: no {name!r} here; allowed: {', '.join(places)}")
                if strange := [i for i in indices if i not in range(size)]:
                    raise ValueError(f"{kind} of {name}: {strange[0]} is not in 0 to {size - 1}")
                if len(set(indices)) == size:
                    raise ValueError(f"every one of the {kind} of {name} would go: keep at least 1")
        for name in self.queries:
            left = Counter(head * shape.kv_heads // shape.heads for head in self.kept(shape, name))
            groups = shape.kv_heads - len(self.heads.get(name, ()))
            if len(left) < groups or len(set(left.values())) > 1:
                raise ValueError(f"queries of {name}: each group must keep as many, at least 1")

    def kept(self, shape: Shape, name: str) -> list[int]:
        """The query heads that an attention sublayer keeps."""
        heads, queries = self.heads.get(name, ()), self.queries.get(name, ())
        group = shape.heads // shape.kv_heads
        return [i for i in range(shape.heads) if i // group not in heads and i not in queries]

    def smaller(self, shape: Shape) -> SmallerShape:
        """The shape that is left, in closed form."""
        self.check(shape)
        stay = [name for name in blocks(shape) if name not in self.layers]
        decoder = sum(name.startswith("decoder") for name in stay)
        facts = {f.name: getattr(shape, f.name) for f in fields(Shape)}
        facts |= {"layers": len(stay) - decoder, "decoder_layers": decoder}
        pairs = tuple(
            (len(self.kept(shape, name)), shape.kv_heads - len(self.heads.get(name, ())))
            for name in attentions(shape)
            if name.removesuffix(".cross") in stay
        )
        neurons = tuple(shape.d_ff - len(self.neurons.get(name, ())) for name in stay)
        return SmallerShape(**facts, attention=pairs, neurons=neurons)


class SmallerModel(Site):
    """The model without what is removed: smaller tensors in the same modules, fewer blocks.

    A smaller parameter replaces each changed one, and a smaller number each attribute with a size;
    leaving puts back the very same objects. Weights keep their names when blocks before them are
    gone. T5's table of relative positions serves all layers and stays whole; each attention reads
    the columns of its own heads.
    """

    in_the_weight = True

    def __init__(self, anatomy: Anatomy, removed: Removed):
        places = {kind: getattr(removed, kind).items() for kind in KINDS}
        names = [f"{name}.{kind}" for kind in KINDS for name, gone in places[kind] if gone]
        super().__init__("structures", [*names, *removed.layers])
        self.anatomy, self.removed, self.shape = anatomy, removed, removed.smaller(anatomy.shape)
        self.aside: list[Tensor] = []  # replaced parameters, and the tensors of blocks taken out
        self.before: list[tuple[object, str, object]] = []  # an owner, its attribute, the value

    def __enter__(self):
        self.dtype = self.anatomy.embedding.weight.dtype
        self._forget_attentions()
        if self.removed.layers:
            self._take_blocks()
        self._take_rows()
        self._set("shape", self.shape, self.anatomy)
        return self

    def __exit__(self, *_):
        super().__exit__()
        weight = self.anatomy.embedding.weight
        for tensor in self.aside:  # cast if the model was, while they were aside
            cast = weight.dtype != self.dtype and tensor.is_floating_point()
            tensor.data = tensor.data.to(weight.device, weight.dtype if cast else tensor.dtype)
        while self.before:
            owner, name, value = self.before[-1]
            setattr(owner, name, value)
            self.before.pop()
        self._forget_attentions()
        self.aside = []

    def held(self) -> list[Tensor]:
        return self.aside

    def to(self, device) -> None:
        for tensor in self.aside:
            tensor.data = tensor.data.to(device)

    def _set(self, name: str, value, owner) -> None:
        """Set an attribute to another value until the site is left."""
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _forget_attentions(self) -> None:
        """Drop the observed attentions, which have changed: the next access observes them again."""
        vars(self.anatomy).pop("attentions", None)

    def _take_blocks(self) -> None:
        anatomy, gone = self.anatomy, self.removed.layers
        layers = {stack: [] for stack in anatomy.layers}
        for stack, every in anatomy.layers.items():
            for i, block in enumerate(every):
                if f"{stack}.layers.{i}".removeprefix(".") in gone:
                    self.aside += [*block.parameters(), *block.buffers()]
                else:
                    layers[stack].append(block)
            path, _, last = FAMILIES[anatomy.family].layers.rpartition(".")
            parent = anatomy.stacks[stack].get_submodule(path)
            self._set(last, nn.ModuleList(layers[stack]), parent)
            for index, block in enumerate(layers[stack]):
                for module in block.modules():  # a cache numbers the layers without gaps
                    if getattr(module, "layer_idx", None) is not None:
                        self._set("layer_idx", index, module)
        self._set("layers", layers, anatomy)
        dropped = tuple(f"{name}." for name in gone)
        rest = {k: x for k, x in anatomy.linears.items() if not k.startswith(dropped)}
        self._set("linears", rest, anatomy)

    def _take_rows(self) -> None:
        """Heads and neurons: rows of weights that read the residual stream, columns of writers."""
        shape, removed, linears = self.anatomy.shape, self.removed, self.anatomy.linears
        rows: dict[Linear, Tensor] = {}
        columns: dict[nn.Module, Tensor] = {}
        for name in dict.fromkeys((*removed.heads, *removed.queries)):
            queries, gone = removed.kept(shape, name), removed.heads.get(name, ())
            keys = [i for i in range(shape.kv_heads) if i not in gone]
            q, kv = (_rows_of(heads, shape.head_dim) for heads in (queries, keys))
            rows |= {linears[f"{name}.q"]: q, linears[f"{name}.k"]: kv, linears[f"{name}.v"]: kv}
            columns[linears[f"{name}.o"].module] = q
            self._tell_attention(name, len(queries), len(keys))
        for name, gone in removed.neurons.items():
            stay = _rows_of([i for i in range(shape.d_ff) if i not in set(gone)])
            for target in {"up", "gate"} & {*self.anatomy.targets}:
                rows[linears[f"{name}.{target}"]] = stay
            columns[linears[f"{name}.down"].module] = stay
        for whole in fused(list(linears.values())):
            if whole.module in columns or any(part in rows for part in whole.parts):
                self._shrink(whole.module, whole.parts, rows, columns.get(whole.module))
        if shape.buckets and (removed.heads or removed.queries):
            self._share_positions()

    @torch.no_grad()
    def _shrink(self, module, roles: list[Linear], rows: dict, columns: Tensor | None) -> None:
        """Leave one module only these rows of its roles and these columns."""
        transposed = roles[0].transposed
        W = module.weight.T if transposed else module.weight
        with plain():
            every = torch.arange(len(W))
            mine = {x: every[x.index][rows.get(x, slice(None))] for x in roles}
            stay = torch.cat(list(mine.values())).sort().values
            for linear, kept in mine.items():
                new = torch.searchsorted(stay, kept)
                start, stop = new[0].item(), new[-1].item() + 1
                self._set("rows", (start, stop) if stop - start == len(new) else new, linear)
        if module.bias is not None and len(stay) < len(W):
            self._replace(module, "bias", module.bias[stay.to(W.device)])
        W = W[stay.to(W.device)]
        W = W if columns is None else W[:, columns.to(W.device)]
        self._replace(module, "weight", W.T if transposed else W)
        sizes = ("nf", "nx") if transposed else ("out_features", "in_features")
        for size, value in zip(sizes, W.shape, strict=True):
            self._set(size, value, module)

    def _replace(self, module: nn.Module, name: str, values: Tensor) -> None:
        self.aside.append(getattr(module, name))
        small = nn.Parameter(values.contiguous().clone(), requires_grad=False)
        self._set(name, small, module)

    def _attention(self, name: str) -> nn.Module:
        """The module of an attention sublayer, which has its q as a child."""
        q = self.anatomy.linears[f"{name}.q"].module
        return next(m for m in self.anatomy.model.modules() if q in m.children())

    def _tell_attention(self, name: str, heads: int, kv_heads: int) -> None:
        """Set the sizes that an attention module keeps beside its weights."""
        owner = self._attention(name)
        told = dict.fromkeys(("num_heads", "num_attention_heads", "n_heads"), heads)
        width = heads * self.anatomy.shape.head_dim
        told |= dict.fromkeys(("split_size", "all_head_size", "inner_dim"), width)
        told["num_key_value_groups"] = heads // kv_heads
        for size, value in told.items():
            if hasattr(owner, size):
                self._set(size, value, owner)

    def _share_positions(self) -> None:
        """T5: the first layer makes the bias of all heads, and each layer reads its own columns."""
        for linear in self.anatomy.select(("q",)):
            name = linear.name.removesuffix(".q")
            owner = self._attention(name)
            if name.endswith(".cross"):
                self.hooks.append(owner.register_forward_pre_hook(_one_column, with_kwargs=True))
            else:
                columns = _Columns(_rows_of(self.removed.kept(self.anatomy.shape, name)))
                take = owner.register_forward_pre_hook(columns.take, with_kwargs=True)
                self.hooks += [take, owner.register_forward_hook(columns.give_back)]


def _rows_of(structures: list[int], width: int = 1) -> Tensor:
    """The rows of these structures, `width` for each."""
    with plain():
        return (torch.tensor(structures)[:, None] * width + torch.arange(width)).flatten()


def _one_column(module, args, kwargs):
    """The bias towards the encoder is zero for every head: one column serves all heads."""
    bias = kwargs.get("position_bias")
    return args, kwargs if bias is None else {**kwargs, "position_bias": bias[:, :1]}


class _Columns:
    """The columns of some heads, taken from the position bias of all heads."""

    def __init__(self, heads: Tensor):
        self.heads, self.whole = heads, PerThread()

    def take(self, module, args, kwargs):
        bias = kwargs.get("position_bias")
        if bias is None:
            cache, length = cache_in(kwargs), args[0].shape[1]
            past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
            bias = module.compute_bias(length, past + length, args[0].device, past)
        self.whole.set(bias)
        return args, {**kwargs, "position_bias": bias[:, self.heads.to(bias.device)]}

    def give_back(self, module, args, output):
        whole = self.whole.get()
        self.whole.set(None)
        return (output[0], whole, *output[2:])
