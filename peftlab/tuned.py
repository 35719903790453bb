"""A base with methods attached: run it, count it, save it, merge it, and take everything off.

base  = peftlab.load("tiny-gpt")
tuned = peftlab.attach(base, LoRA(r=8, alpha=16))
...
tuned.detach()        # the base is bit for bit what it was
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftlab import layouts
from peftlab.bases import Base, LanguageModel, _quiet
from peftlab.heads import Head
from peftlab.methods import NF4, Attachment, Method
from peftlab.quantisation import Quantised
from peftlab.sites import Deltas, Kept
from peftlab.soft import Source
from peftlab.structures import SmallerShape

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RECORD = "peftlab.json"  # what CONFIG says where it is not PEFT's
FORMATS = {CONFIG: 1, RECORD: 2}
# Hyper-parameters that say what tensors of one size mean.
MEANING = ("name", "placement", "shift_positions", "depth", "r", "init_r", "alpha", "use_rslora")
MEANING += ("projection_prng_key",)


@dataclass(frozen=True)
class Count:
    """How large an adapter is: `parameters` in closed form, and `measured`, which equals it.

    `stored` is what is left after training. `head` is counted apart from all of these.
    """

    parameters: int
    measured: int
    stored: int
    base: int
    head: int = 0
    method_bytes: int = 0

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of the base's."""
        return 100 * self.parameters / self.base

    @property
    def file_bytes(self) -> int:
        """Bytes of the stored tensors, trained numbers in float32, the head's included.

        In PEFT's layout of a fused module a saved file has zeros beside them.
        """
        return self.method_bytes + 4 * self.head

    def __repr__(self) -> str:
        head = f" and {self.head:,} of a head" if self.head else ""
        return (
            f"{self.parameters:,} trainable parameters, {self.percent:.3f}% of {self.base:,}"
            f"{head}; {self.file_bytes:,} bytes stored in float32"
        )


class Tuned(LanguageModel):
    """A base with one or more methods attached. Make one with `peftlab.attach`."""

    def __init__(self, base: Base, methods: list[Method], seed: int = 0, head: Head | None = None):
        if base.adapted_by is not None:
            raise RuntimeError(
                f"{base.name} already carries {base.adapted_by.label}: call detach() first, "
                "or attach several methods together as a list"
            )
        if not methods and head is None:
            raise ValueError("no method to attach")
        if head is not None and base.kind != "encoder":
            raise ValueError(f"a head goes on an encoder; {base.name} is a {base.kind} model")
        for i, method in enumerate(methods):
            if reason := method.objection(methods[:i], methods[i + 1 :]):
                others = ", ".join(m.title for m in (*methods[:i], *methods[i + 1 :]))
                raise ValueError(f"{method.title} does not go with {others}: {reason}")
        self.base, self.methods, self.head = base, list(methods), head
        self.name, self.model, self.tokenizer = base.name, base.model, base.tokenizer
        self.anatomy = base.anatomy
        self.base_parameters = base.anatomy.shape.parameters()
        self._facts = _shape_facts(base)  # of the whole base: a method may make it smaller
        generator = torch.Generator().manual_seed(seed)
        self.trainable: dict[str, nn.Parameter] = {}
        self.modules: dict[str, nn.Module] = {}
        self.sources: dict[str, Source] = {}
        self.frozen: dict[str, Callable[[], torch.Tensor]] = {}
        self.kept: dict[str, dict[str, torch.Tensor]] = {}
        self.attachments: list[tuple[Method, Attachment]] = []
        self._sites, virtual = [], 0
        with ExitStack() as stack:  # an error below undoes what was attached so far
            for method in self.methods:
                attachment = method.attach(base, generator, headless=head is not None)
                stack.push(attachment.stack)
                self._claim(attachment)
                self.attachments.append((method, attachment))
                virtual += attachment.virtual_tokens
            for site in self._sites:
                if hasattr(site, "settle"):
                    site.settle()
            if not self._sites and methods:
                raise ValueError(f"{self.label} reached no site of {base.name}")
            self.linear = self._build_head(generator)
            self._audit()
            self.train(base.model.training)  # new modules start with dropout on
            self._stack = stack.pop_all()
        self.virtual_tokens = virtual
        self.using: str | list[str] | tuple[str, ...] | dict[str, int | float] | None = (
            None  # see `use`
        )
        self._linear_now = self.linear
        base.adapted_by = self

    def _claim(self, attachment) -> None:
        names = {name for site in attachment.sites for name in _names(site)}
        if twice := sorted(names & set(self.sites)):
            here = [s for s in (*self._sites, *attachment.sites) if twice[0] in _names(s)]
            reasons = [f": {site.alone}" for site in here if hasattr(site, "alone")]
            raise ValueError(f"two methods want the same site, {''.join([twice[0], *reasons[:1]])}")
        self._sites += attachment.sites
        self.trainable.update(attachment.trainable)
        self.modules.update(attachment.modules)
        self.sources.update(attachment.sources)
        self.frozen.update(attachment.frozen)

    def _build_head(self, generator: torch.Generator) -> nn.Linear | None:
        """The head's layer, drawn after the methods' tensors and trained with them."""
        if self.head is None:
            return None
        linear = self.head.build(self.anatomy.shape.d_model, generator)
        weight = self.anatomy.embedding.weight
        linear.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        self.trainable |= {f"head.{name}": p for name, p in linear.named_parameters()}
        return linear

    def _audit(self) -> None:
        """What the model would train is exactly what the methods said, and nothing else."""
        ours = {id(parameter) for parameter in self.trainable.values()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in ours:
                raise AssertionError(f"{name} trains, but no method asked for it")

    @property
    def label(self) -> str:
        """The methods' titles, for messages and legends."""
        return " + ".join(method.title for method in self.methods) or "Head alone"

    @property
    def sites(self) -> list[str]:
        """The names of the sites that the methods reached."""
        return [name for site in self._sites for name in _names(site)]

    @property
    def deltas(self) -> dict[str, nn.Module]:
        """The deltas beside linear weights, by the weight's name."""
        return {k: m for k, m in self.modules.items() if hasattr(m, "delta_weight")}

    @property
    def codes(self) -> dict[str, Quantised]:
        """The weights held as codes, by the weight's name; q, k and v of one module are "qkv"."""
        return {site.linear.name: site.codes for site in self._sites if hasattr(site, "codes")}

    @property
    def prompt(self) -> torch.Tensor:
        """The virtual tokens P (num_virtual_tokens, d_model): as they train, or as made now."""
        return self._made("prompt")

    @property
    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """P_k and P_v, (sublayers, kv_heads, num_virtual_tokens, head_dim) each."""
        return self._made("P_k"), self._made("P_v")

    def _made(self, key: str) -> torch.Tensor:
        for source in self.sources.values():
            made = source()
            if key in made:
                return made[key]
        raise AttributeError(f"{self.label} has no {'prompt' if key == 'prompt' else 'prefix'}")

    def train(self, mode: bool = True) -> None:
        """Dropout of the base and of what is attached, on or off. Never changes a weight."""
        self.model.train(mode)
        for module in self.modules.values():
            module.train(mode)

    @torch.no_grad()
    def generate(self, prompts: list[str], max_new_tokens: int = 32) -> list[str]:
        """As of a base; a network that makes a soft prompt is run once for the whole batch."""
        with ExitStack() as stack, self._evaluating():
            for source in self.sources.values():
                stack.enter_context(source.held())
            return super().generate(prompts, max_new_tokens)

    def _head_logits(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head.logits(self._linear_now, hidden, mask)

    def count(self) -> Count:
        """Trainable parameters, in closed form and measured; the two are asserted equal."""
        shape = self.anatomy.shape
        head = 0
        if self.head is not None:
            head, shape = self.head.parameters(shape.d_model), shape.without_head()
        closed = sum(method.parameters(shape) for method in self.methods)
        measured = sum(p.numel() for p in self.trainable.values()) - head
        assert closed == measured, f"closed form {closed:,}, measured {measured:,}"
        stored = sum(method.stored(shape) for method in self.methods)
        size = sum(method.file_bytes(shape) for method in self.methods)
        return Count(closed, measured, stored, self.base_parameters, head, size)

    @property
    def merged(self) -> bool:
        """Whether the deltas are inside the weights now."""
        return any(getattr(site, "merged", False) for site in self._sites)

    def merge(self, requantise: bool = False) -> None:
        """Write every delta into its weight: the same output, and no extra work in forward.

        A mask or a code is in the weight already. Into codes a delta is merged only with
        `requantise`, for the sum is rounded to codes again and the output changes. Raises
        ValueError if a method has no delta to merge, RuntimeError after detach().
        """
        self._check_attached()
        sites = [site for site in self._sites if not getattr(site, "in_the_weight", False)]
        for site in sites or self._sites:
            if not hasattr(site, "merge"):
                raise ValueError(f"{getattr(site, 'name', site)} cannot be merged: it has no ΔW")
            if getattr(site, "linear", None) and site.linear.code is not None and not requantise:
                raise ValueError(
                    f"{site.name} is held as codes and cannot be merged unasked: W + ΔW is rounded "
                    "to codes again, and the output changes. merge(requantise=True) does it"
                )
        for site in sites:
            site.merge()

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        for site in reversed(self._sites):  # of two in one module the later goes first
            if hasattr(site, "unmerge"):
                site.unmerge()

    def detach(self) -> Base:
        """Take everything off: the base is bit for bit what it was. Safe to call twice."""
        if self.base.adapted_by is self:
            self.unmerge()  # into what trains as well, before that is taken out
            self._stack.close()
            self.base.adapted_by = None
            self.train(False)
        return self.base

    def rate(self, name: str) -> float:
        """The learning rate of this trained tensor, as a multiple of the run's."""
        for method, attachment in self.attachments:
            if name in attachment.trainable:
                return method.rate(name)
        return 1.0

    def after_step(self, step: int, steps: int) -> None:
        """Tell the methods that a step of training is done, the gradients still in place."""
        for method, attachment in self.attachments:
            method.after_step(attachment, step, steps)

    def _check_attached(self) -> None:
        if self.base.adapted_by is not self:
            raise RuntimeError(f"{self.label} was detached from {self.name}: attach it again")

    def __enter__(self) -> Tuned:
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        """What is stored, on the CPU, by name: the trained tensors, those that are frozen but
        belong to them, and of a soft prompt that a network makes, what it made."""
        folded = {
            f"{name}.{key}": tensor
            for name, source in self.sources.items()
            for key, tensor in source.module().items()
        }
        plain = {
            name: p for name, p in self.trainable.items() if name.split(".")[0] not in self.sources
        }
        tensors = plain | folded | {name: read() for name, read in self.frozen.items()}
        return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}

    def keep(self, name: str, folder: str | Path | None = None) -> None:
        """Remember the adapter (and the head) of now, or of a folder, as `name`.

        Raises ValueError if a method here is neither a soft prompt nor a delta, for only those can
        be swapped, and if the folder's adapter is not of the same kind and size.
        """
        self._check_attached()
        for method, attachment in self.attachments:
            swapped = method.name in self.sources or all(
                hasattr(site, "instead") for site in attachment.sites
            )
            if attachment.trainable and not swapped:
                raise ValueError(
                    f"{method.title} cannot be kept and swapped: soft prompts and deltas can"
                )
        state = self.state()
        if folder is not None:
            config, fill = _read(folder, self.base)
            _check_base(config, self.base)
            _check_kind(config, self)
            saved = fill(self)
            _check_shapes(saved, state)
            state = saved
        device = self.device
        self.kept[name] = {key: tensor.to(device) for key, tensor in state.items()}

    def use(self, names: str | list[str] | tuple[str, ...] | dict[str, int | float] | None) -> None:
        """Put kept adapters in place: one for every row, or a list with one for each row.

        A dict such as {"a": 0.5, "b": 0.5} puts the weighted sum of their deltas in place. None
        goes back to what trains. Raises KeyError for a name that was not kept, and ValueError
        while deltas are merged, for different rows under a head, which is one for the whole batch,
        and for a weighted sum of anything but deltas.
        """
        self._check_attached()
        wanted = [names] if isinstance(names, str) else list(names or [])
        if unknown := [name for name in wanted if name not in self.kept]:
            raise KeyError(f"nothing was kept as {unknown[0]!r}: there are {sorted(self.kept)}")
        if self.merged:
            raise ValueError("the deltas are merged: call unmerge() before use()")
        several = not isinstance(names, str)
        if wanted and several and self.head is not None:
            raise ValueError("a head is one for the whole batch: use one name")
        weights = names if isinstance(names, dict) else None
        if weights is not None and self.sources:
            raise ValueError("soft prompts have no weighted sum: name one, or one for each row")
        for name, weight in (weights or {}).items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} is {weight!r}: a number is needed")
        self.using = names if wanted else None
        for name, source in self.sources.items():
            source.instead = None
            if wanted:
                rows = [self._kept_of(name, row) for row in wanted]
                stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
                source.instead = stacked if several else rows[0]
        rows = wanted if several and weights is None else None
        if rows is None and weights is None:
            weights = dict.fromkeys(wanted, 1.0)
        for site in self._sites:
            if hasattr(site, "instead"):
                kept = {name: self._kept_delta(site.delta, name) for name in wanted}
                site.instead = Deltas(kept, weights, rows) if wanted else None
        self._linear_now = self.linear
        if wanted and self.head is not None:
            self._linear_now = copy.deepcopy(self.linear).requires_grad_(False)
            kept = {key: self.kept[names][f"head.{key}"] for key in ("weight", "bias")}
            self._linear_now.load_state_dict(kept)

    def _kept_delta(self, delta: nn.Module, name: str) -> Kept:
        """The kept tensors that belong into this delta, by its own names for them."""
        own = {id(t): key for key, t in (*delta.named_parameters(), *delta.named_buffers())}
        places = self.trainable | {key: read() for key, read in self.frozen.items()}
        its = {key: own[id(place)] for key, place in places.items() if id(place) in own}
        return Kept(delta, {own_name: self.kept[name][key] for key, own_name in its.items()})

    def _kept_of(self, source: str, row: str) -> dict[str, torch.Tensor]:
        start = f"{source}."
        kept = self.kept[row].items()
        return {key.removeprefix(start): t for key, t in kept if key.startswith(start)}

    @property
    def folded(self) -> list[Method]:
        """The methods that the stored tensors belong to, what was chosen here said by name."""
        return [attachment.chosen or method.folded() for method, attachment in self.attachments]

    def save(self, folder: str | Path) -> Path:
        """Write what is stored (safetensors) and the methods (JSON) into a folder.

        Where PEFT knows the method the folder is PEFT's own, and `peftlab.json` in it says what
        was trained, on which base. Where it does not, and where there is a head or PEFT's tensors
        would not be all of ours or many more, the tensors stand under our names, and the methods
        in `adapter_config.json`. `attach(base, folder)` reads both, bit for bit.

        A network that makes a soft prompt is left behind: the folder holds what it made, and the
        method without it. `trained_as` still says what was trained.
        """
        self._check_attached()
        folder = Path(folder)
        try:
            layout = layouts.Layout.of(self)
        except layouts.Unknown:
            layout = None
        if layout is not None and layout.whole:
            return write_peft(self, layout, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)  # of an adapter that was here before
        save_file(self.state(), folder / WEIGHTS, metadata={"format": "pt"})
        _write(folder / CONFIG, {"format": FORMATS[CONFIG], **_record(self, self.folded)})
        return folder

    @classmethod
    def load(cls, base: Base, folder: str | Path) -> Tuned:
        """Attach a saved adapter, also one that PEFT wrote.

        Raises FileNotFoundError where there is none, and ValueError if the files are damaged or
        were trained on a base of another shape. On an error nothing stays attached.
        """
        config, fill = _read(folder, base)
        _check_base(config, base)
        tuned = cls(base, config["methods"], head=config["head"])
        try:
            tuned.load_state(fill(tuned))
        except BaseException:
            tuned.detach()
            raise
        return tuned

    def merge_and_export(self, folder: str | Path) -> Path:
        """Write a plain transformers folder, the change inside its weights, and the tokenizer.

        `transformers.AutoModel...from_pretrained(folder)` and `peftlab.load(folder)` read it. What
        is attached stays attached, and as it was: merged or not. Of weights that are held as codes
        the folder has W̃ + ΔW in plain numbers, so nothing is rounded to codes again. Raises
        ValueError for a method that cannot be merged, for a head, and where structures were taken
        out, for no configuration of transformers describes what is left.
        """
        self._check_attached()
        if self.head is not None:
            raise ValueError("a head is no part of a transformers model: it cannot be exported")
        if isinstance(self.anatomy.shape, SmallerShape):
            raise ValueError(
                f"{self.label}: the sublayers that are left differ in size, which no configuration "
                "of transformers can say: it cannot be exported"
            )
        sites = [site for site in self._sites if not getattr(site, "in_the_weight", False)]
        for site in sites:
            if not hasattr(site, "merge") or (site.linear.code and not hasattr(site, "delta")):
                on = " into codes" if hasattr(site, "merge") else ": it has no ΔW"
                raise ValueError(f"{getattr(site, 'name', site)} cannot be merged{on}")
        loose = [site for site in sites if not site.merged]
        try:
            for site in loose:
                if site.linear.code is None:
                    site.merge()
            with _quiet():
                self.model.save_pretrained(folder, state_dict=self._plain(loose))
                self.tokenizer.save_pretrained(folder)
        finally:
            for site in reversed(loose):
                site.unmerge()
        return Path(folder)

    @torch.no_grad()
    def _plain(self, loose: list) -> dict[str, torch.Tensor]:
        """The model's tensors, and where there are codes what they say plus the loose deltas."""
        state = self.model.state_dict()
        names = {module: name for name, module in self.model.named_modules()}
        for coded in (site for site in self._sites if hasattr(site, "codes")):
            weight = coded.decode().clone()
            rows = weight.T if coded.transposed else weight
            for site in loose:
                if site.linear.module is coded.module:
                    delta = site.delta if site.instead is None else site.instead
                    rows[site.linear.index] += delta.delta_weight().to(rows.dtype)
            state[f"{names[coded.module]}.weight"] = weight
        return state

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy tensors by name. All are checked before the first is copied."""
        self._check_attached()
        places = self.trainable | {name: read() for name, read in self.frozen.items()}
        _check_shapes(tensors, places)
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
        for site in self._sites:
            if hasattr(site, "refresh"):
                site.refresh()

    def __repr__(self) -> str:
        return f"{self.label} on {self.name}: {len(self.sites)} sites, {self.count()!r}"


def _names(site) -> list[str]:
    """What a site is called; a site of several places has a name for each."""
    return getattr(site, "names", None) or [getattr(site, "name", site)]


Fill = Callable[[Tuned], dict[str, torch.Tensor]]


def _record(tuned: Tuned, methods: list[Method]) -> dict:
    """What a saved adapter says of itself: these methods, on this base."""
    return {
        "base": tuned.name,
        "base_shape": tuned._facts,
        "base_digest": tuned.base.digest,
        "methods": [method.to_dict() for method in methods],
        "trained_as": [method.to_dict() for method in tuned.methods],
        "head": tuned.head.to_dict() if tuned.head else None,
    }


def _write(path: Path, config: dict) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_peft(tuned: Tuned, layout: layouts.Layout, folder: Path) -> Path:
    """Write PEFT's two files and our record beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    methods = [m if isinstance(m, NF4) else layout.method for m in tuned.folded]
    save_file(layout.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write(folder / CONFIG, layout.config)
    _write(folder / RECORD, {"format": FORMATS[RECORD], **_record(tuned, methods)})
    return folder


def _loaded(path: Path) -> dict:
    """A JSON file. Raises ValueError unless it holds an object."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def is_peft(folder: Path) -> bool:
    """Whether the adapter in this folder is in PEFT's layout."""
    try:
        return "peft_type" in _loaded(folder / CONFIG)
    except ValueError:
        return False


def _read(folder: str | Path, base: Base) -> tuple[dict, Fill]:
    """A saved adapter: its configuration, methods and head made, and what gives its tensors to a
    base with these attached."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {str(folder)!r}: {_missing(folder, name)}")
    name = RECORD if (folder / RECORD).is_file() else CONFIG
    with _damaged(folder, name):
        config, theirs = _loaded(folder / name), _loaded(folder / CONFIG)
        tensors = load_file(folder / WEIGHTS)
        if name == CONFIG and "peft_type" in config:
            config = {"head": None}
        else:
            if config["format"] != FORMATS[name]:
                raise ValueError(f"format {config['format']}; this peftlab reads {FORMATS[name]}")
            config["methods"] = [Method.from_dict(method) for method in config["methods"]]
            config["head"] = Head.from_dict(config["head"]) if config["head"] else None
            for key in ("base", "base_shape", "base_digest", "trained_as"):
                config[key]
    if name == RECORD:
        return config, lambda tuned: layouts.Layout.of(tuned).read(theirs, tensors)
    if "methods" in config:
        return config, lambda tuned: tensors
    with _damaged(folder, CONFIG, (KeyError, TypeError, AttributeError)):
        method, fill = layouts.read(base, theirs, tensors)
    return config | {"methods": [method]}, fill


def _missing(folder: Path, name: str) -> str:
    """What to do about a file that is not there."""
    if name == WEIGHTS and (folder / PICKLE).is_file():
        return (
            f"{PICKLE} there is a pickle, which can run code when it is read, so it is not read. "
            "Convert it to safetensors: PEFT's save_pretrained writes them"
        )
    return "no adapter was saved there"


@contextmanager
def _damaged(folder: Path, name: str, errors: tuple = ()):
    """Inside, whatever is wrong with the files is one kind of error."""
    errors = errors or (ValueError, KeyError, TypeError, safetensors.SafetensorError)
    try:
        yield
    except errors as error:
        problem = f"{name} has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"the adapter in {str(folder)!r} is damaged: {problem}") from error


def _check_base(config: dict, base: Base) -> None:
    """Raise ValueError unless the adapter was trained on this base."""
    if "base" not in config:  # PEFT says a name at most; sizes were compared tensor by tensor
        return
    trained_on, shape = config["base"], config["base_shape"]
    if shape != (here := _shape_facts(base)):
        raise ValueError(f"this adapter was trained on {trained_on} {shape}; {base.name} is {here}")
    if config["base_digest"] != base.digest:
        raise ValueError(
            f"this adapter was trained on other weights of {trained_on}'s shape than "
            f"those of {base.name} here: it would be noise on them"
        )


def _check_kind(config: dict, tuned: Tuned) -> None:
    """Raise ValueError unless the adapter's tensors go where this one's go, and mean the same."""
    for ours, theirs in zip_longest(tuned.methods, config["methods"]):
        for key in MEANING:
            mine, other = getattr(ours, key, None), getattr(theirs, key, None)
            if mine != other:
                raise ValueError(f"the adapter has {key}={other!r}; here it is {mine!r}")
        if hasattr(ours, "targets"):
            there = tuned.anatomy.targets
            if set(ours.targets(there)) != set(theirs.targets(there)):
                own, other = ours.target_modules, theirs.target_modules
                raise ValueError(f"the adapter has target_modules={other!r}; here it is {own!r}")
    if config["head"] != tuned.head:
        raise ValueError(f"the adapter has head={config['head']}; here it is {tuned.head}")


def _check_shapes(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless these are the wanted tensors, by name and size."""
    if missing := wanted.keys() ^ tensors.keys():
        raise ValueError(f"the adapter's tensors do not match: {sorted(missing)[0]}")
    for name, tensor in tensors.items():
        if (size := wanted[name].shape) != tensor.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; {tuple(size)} is needed")


def _shape_facts(base: Base) -> dict:
    """The numbers by which an adapter recognises its base."""
    shape = base.anatomy.shape
    return {
        "family": shape.family,
        "layers": shape.layers,
        "d_model": shape.d_model,
        "vocab": shape.vocab,
        "parameters": shape.parameters(),
    }


def attach(
    base: Base,
    methods: Method | list[Method] | str | Path,
    seed: int = 0,
    head: Head | None = None,
) -> Tuned:
    """Attach a method, a list of methods, or an adapter folder to a frozen base.

    `head` stands in place of an encoder's own language-model head and trains with the methods;
    with an empty list it trains alone. `seed` draws the initial values. Raises RuntimeError if
    something is attached already, and ValueError if a method does not fit the base; on an error
    the base is untouched.
    """
    if isinstance(methods, (str, Path)):
        return Tuned.load(base, methods)
    if isinstance(methods, Method):
        methods = [methods]
    return Tuned(base, methods, seed, head)
