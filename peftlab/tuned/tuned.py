"""A base with methods attached: run it, count it, merge it, and take everything off.

base  = peftlab.load("tiny-gpt")
tuned = peftlab.attach(base, LoRA(r=8, alpha=16))
...
tuned.detach()        # the base is bit for bit what it was
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Cache

from peftlab.bases import Base, LanguageModel
from peftlab.bases.caches import prefilled
from peftlab.methods import Attachment, Method, check_composition
from peftlab.methods.heads import Head
from peftlab.sites import KeysValues, Site, Source, sweep
from peftlab.sites.quantisation import Quantised
from peftlab.tuned import kept, layouts, saving
from peftlab.tuned.identity import numbers_of
from peftlab.tuned.module import TunedModule
from peftlab.tuned.seen import Seen
from peftlab.tuned.watch import unwatch, watch


@dataclass(frozen=True)
class Count:
    """The size of an adapter: `parameters` in closed form, and `measured`, which equals it.

    `stored` counts the numbers left after training. `head` is counted apart from all of these.
    `file_bytes` are the bytes of the stored tensors, with trained numbers in float32, including the
    head; in PEFT's layout of a fused module, a saved file has zeros beside them.
    """

    parameters: int
    measured: int
    stored: int
    base: int
    head: int
    file_bytes: int

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of the base's."""
        return 100 * self.parameters / self.base

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
        check_composition(methods)
        self.base, self.methods, self.head = base, list(methods), head
        self.name, self.model, self.tokenizer = base.name, base.model, base.tokenizer
        self.anatomy = base.anatomy
        self.facts = saving.shape_facts(base)  # read now, because a method may change the base
        self.numbers = numbers_of(base)
        generator = torch.Generator().manual_seed(seed)
        self.trainable: dict[str, nn.Parameter] = {}
        self.modules: dict[str, nn.Module] = {}
        self.sources: dict[str, Source] = {}
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.attachments: list[Attachment] = []
        self.linear = None
        self.attached = False
        self._before = Seen.of(base)
        base.adapted_by = self
        try:
            for method in self.methods:
                attachment = Attachment(method, base, headless=head is not None)
                self.attachments.append(attachment)
                method.reach(base, attachment, generator)
                self._claim(attachment)
            for site in self._sites:
                site.settle()
            if not self._sites and methods:
                raise ValueError(f"{self.label} reached no site of {base.name}")
            self.linear = self._build_head(generator)
            self._audit()
            self.virtual_tokens = sum(each.virtual_tokens for each in self.attachments)
            self.using: kept.Names = None  # see `use`
            self._linear_now = self.linear
            self.attached = True
            watch(base)
            self.train(base.model.training)  # new modules start with dropout on
        except BaseException as error:
            try:
                self.detach()
            except Exception as second:
                error.add_note(f"{base.name} is not yet as before ({second}): call base.detach()")
            raise

    @property
    def _sites(self) -> list[Site]:
        return [site for attachment in self.attachments for site in attachment.sites]

    def _claim(self, attachment: Attachment) -> None:
        """Add what trains of the last attachment. Raises ValueError if it shares a site."""
        earlier = [site for each in self.attachments[:-1] for site in each.sites]
        taken = {name: site for site in earlier for name in site.names}
        for site in attachment.sites:
            for name in site.names:
                if name in taken:
                    reason = taken[name].alone or site.alone
                    why = f": {reason}" if reason else ""
                    raise ValueError(f"two methods want the same site, {name}{why}")
        self.trainable |= attachment.trainable
        self.modules |= attachment.modules
        self.sources |= attachment.sources

    def _build_head(self, generator: torch.Generator) -> nn.Linear | None:
        """The layer of the head, drawn after the methods' tensors and trained with them."""
        if self.head is None:
            return None
        linear = self.head.build(self.anatomy.shape.d_model, generator)
        weight = self.anatomy.embedding.weight
        linear.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        self.trainable |= {f"head.{name}": p for name, p in linear.named_parameters()}
        return linear

    def _audit(self) -> None:
        """Raise AssertionError if the model would train a parameter that no method listed."""
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
        return [name for site in self._sites for name in site.names]

    @property
    def deltas(self) -> dict[str, nn.Module]:
        """The deltas beside linear weights, by the weight's name."""
        return {site.name: site.delta for site in self._sites if site.delta is not None}

    @property
    def codes(self) -> dict[str, Quantised]:
        """The codes, by the name of their weight; q, k and v of one module are "qkv"."""
        return {s.linear.name: s.codes for s in self._sites if s.codes is not None}

    @property
    def prompt(self) -> Tensor:
        """The virtual tokens P (num_virtual_tokens, d_model), trained directly or made now."""
        return self._made("prompt")

    @property
    def prefix(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v, (sublayers, kv_heads, num_virtual_tokens, head_dim) each."""
        return self._made("P_k"), self._made("P_v")

    def _made(self, key: str) -> Tensor:
        for source in self.sources.values():
            if key in (made := source.now()):
                return made[key]
        raise AttributeError(f"{self.label} has no {'prompt' if key == 'prompt' else 'prefix'}")

    def train(self, mode: bool = True) -> Tuned:
        """Switch the dropout of base and methods on or off. Never changes a weight."""
        for module in self._roots():
            module.train(mode)
        return self

    def _roots(self) -> list[nn.Module]:
        self._check_attached()
        return [self.model, *self.modules.values()]

    @contextmanager
    def _answering(self):
        """Inside, a network that makes a soft prompt has run, once for the whole answer."""
        with ExitStack() as stack, self._evaluating():
            for source in self.sources.values():
                stack.enter_context(source.once())
            yield

    def _cache(self) -> dict[str, Cache]:
        """See `LanguageModel`. A prefix goes into the cache, in front of the first keys."""
        for site in self._sites:
            if isinstance(site, KeysValues) and self.kind == "decoder":
                return prefilled(self.model, site.sites)
        return super()._cache()

    def _head_logits(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.head.logits(self._linear_now, hidden, mask)

    def count(self) -> Count:
        """The trainable parameters, in closed form and measured; the two must be equal."""
        shape, head = self.anatomy.shape, 0
        if self.head is not None:
            head, shape = self.head.parameters(shape.d_model), shape.without_head()
        closed = sum(method.parameters(shape) for method in self.methods)
        measured = sum(p.numel() for p in self.trainable.values()) - head
        assert closed == measured, f"closed form {closed:,}, measured {measured:,}"
        stored = sum(method.stored(shape) for method in self.methods)
        size = sum(method.file_bytes(shape) for method in self.methods) + 4 * head
        return Count(closed, measured, stored, self.facts["parameters"], head, size)

    @property
    def merged(self) -> bool:
        """Whether the deltas are inside the weights now."""
        return any(site.merged for site in self._sites)

    def mergeable(self) -> list[Site]:
        """The sites that `merge` writes into the model. Raises ValueError if one has no ΔW."""
        sites = [site for site in self._sites if site.names and not site.in_the_weight]
        for site in sites:
            if not site.can_merge:
                raise ValueError(f"{site.name} cannot be merged: it has no ΔW")
        return sites

    def merge(self, requantise: bool = False) -> None:
        """Write every delta into its weight: the same output, without extra work in forward.

        In 16 bits W + ΔW is rounded to the type of W, which moves the output a little. Masks and
        codes are in the weight already. A delta is merged into codes only with `requantise`,
        because the sum is rounded to codes again and the output changes. If one weight cannot be
        merged, none is. Raises ValueError if a method has no delta to merge, and RuntimeError after
        detach().
        """
        self._check_attached()
        sites = self.mergeable()
        if not sites and self.sites:
            raise ValueError(f"{self.sites[0]} cannot be merged: it has no ΔW")
        for site in sites:
            if site.linear.code is not None and not requantise:
                raise ValueError(
                    f"{site.name} is held as codes and cannot be merged unasked: W + ΔW is rounded "
                    "to codes again, and the output changes. merge(requantise=True) does it"
                )
        loose = [site for site in sites if not site.merged]
        try:
            for site in loose:
                site.merge()
        except BaseException:
            for site in reversed(loose):
                site.unmerge()
            raise

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        for site in reversed(self._sites):  # of two in one module, the later is undone first
            site.unmerge()

    def detach(self) -> Base:
        """Remove everything attached: the base is bit for bit as before. Safe to call twice.

        An error, such as no memory for an original, stops it where it is: call it again. It ends
        only after it has looked at the base, and raises RuntimeError for what is not as before.
        """
        if self.base.adapted_by is self:
            self.unmerge()  # before leaving: a delta may be merged into weights that train
            for site in reversed(self._sites):  # a later site changed what an earlier one holds
                site.__exit__()
            sweep(self.model)
            self.model.train(False)
            self._before.compare(self.base)
            self.attached = False
            unwatch(self.base)
            self.base.adapted_by = None
        return self.base

    def as_module(self) -> TunedModule:
        """The adapted model and its loss as one `nn.Module`, for other libraries' training loops.

        Its `forward` takes a batch of `batch_loss`, or of transformers' data collators, and returns
        `.loss` and `.logits`. Of its parameters, those that train are `trainable`; its `state_dict`
        has the adapter alone. A loop also calls `module.after_step(step, steps)` after each
        `optimizer.step()`: `Trainer(module, ..., callbacks=[module.callback])` does. Raises
        ValueError if nothing can train now, and RuntimeError after detach().
        """
        return TunedModule(self)

    def after_step(self, step: int, steps: int) -> None:
        """Tell the methods that a training step is done; the gradients are still there."""
        for attachment in self.attachments:
            attachment.method.after_step(attachment, step, steps)

    def _check_attached(self) -> None:
        if not self.attached:
            raise RuntimeError(f"{self.label} was detached from {self.name}: attach it again")

    def __enter__(self) -> Tuned:
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The tensors that are stored beside the trained ones, by name."""
        return {
            f"{attachment.method.name}.{name}": tensor
            for attachment in self.attachments
            for site in attachment.sites
            for name, tensor in site.stored().items()
        }

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """The stored tensors by name, on the CPU: the trained ones, the frozen ones that belong to
        them, and in place of a network that makes a soft prompt, the prompt it made."""
        own = self.trainable.items()
        tensors = {name: p for name, p in own if name.split(".")[0] not in self.sources}
        for name, source in self.sources.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in source.module().items()}
        tensors |= self.frozen
        return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}

    def keep(self, name: str, folder: str | Path | None = None) -> None:
        """Keep the current adapter (and head), or that of a folder, as `name`.

        Raises ValueError if a method here is neither a soft prompt nor a delta, because only those
        can be swapped, and if the folder's adapter is not of the same kind and size.
        """
        self._check_attached()
        kept.keep(self, name, folder)

    def use(self, names: kept.Names) -> None:
        """Use kept adapters: one for all rows of a batch, or a list with one for each row.

        A dict such as {"a": 0.5, "b": 0.5} uses the weighted sum of their deltas. None goes back to
        the tensors that train. Raises KeyError for a name that was not kept, and ValueError while
        deltas are merged, for different rows under a head, because one head serves the whole batch,
        and for a weighted sum of anything but deltas.
        """
        self._check_attached()
        kept.use(self, names)

    @property
    def folded(self) -> list[Method]:
        """The methods that the stored tensors belong to, with choices on this base by name."""
        return [attachment.chosen or attachment.method.folded() for attachment in self.attachments]

    def save(self, folder: str | Path) -> Path:
        """Write the stored tensors (safetensors) and the methods (JSON) into a folder.

        If PEFT has the method, the folder has PEFT's layout, and its `peftlab.json` records what
        was trained, and on which base. If PEFT does not have it, if there is a head, or if PEFT's
        tensors would lack some of ours or be many more, the tensors have our names, and the methods
        are in `adapter_config.json`. `attach(base, folder)` reads both, bit for bit. In place of a
        network that makes a soft prompt, the folder holds the prompt it made, and the method
        without the network; `trained_as` still records the method as trained.
        """
        self._check_attached()
        return saving.save(self, Path(folder))

    @classmethod
    def load(cls, base: Base, folder: str | Path) -> Tuned:
        """Attach a saved adapter, including one that PEFT wrote.

        Raises FileNotFoundError if there is none, and ValueError if the files are damaged or the
        adapter was trained on a base of another shape. On an error nothing stays attached.
        """
        config, fill = saving.read(folder, base)
        tuned = cls(base, config["methods"], head=config["head"])
        try:
            tuned.load_state(fill(tuned))
        except BaseException:
            tuned.detach()
            raise
        return tuned

    def merge_and_export(self, folder: str | Path) -> Path:
        """Write a plain transformers folder with the change in its weights, and the tokenizer.

        `transformers.AutoModel...from_pretrained(folder)` and `peftlab.load(folder)` read it. The
        methods stay attached, merged or not, as before. For a weight held as codes the folder has
        W̃ + ΔW in plain numbers, so nothing is rounded to codes again. Raises ValueError for a
        method that cannot be merged, for a head, and after structured pruning, because no
        configuration of transformers describes such a model.
        """
        self._check_attached()
        return saving.export(self, Path(folder))

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors by name. All are checked before the first is copied."""
        self._check_attached()
        places = self.trainable | self.frozen
        layouts.check_shapes(tensors, places)
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
        for site in self._sites:
            site.refresh()

    def __repr__(self) -> str:
        return f"{self.label} on {self.name}: {len(self.sites)} sites, {self.count()!r}"


def attach(
    base: Base, methods: Method | list[Method] | str | Path, seed: int = 0, head: Head | None = None
) -> Tuned:
    """Attach a method, a list of methods, or an adapter folder to a frozen base.

    `head` replaces an encoder's own language-model head and trains with the methods; with an empty
    list it trains alone. `seed` determines the initial values. Raises RuntimeError if something is
    attached already, and ValueError if a method does not fit the base; on an error the base does
    not change.
    """
    if isinstance(methods, (str, Path)):
        return Tuned.load(base, methods)
    return Tuned(base, [methods] if isinstance(methods, Method) else methods, seed, head)
