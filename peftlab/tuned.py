"""A base with methods attached: run it, count it, save it, merge it, and take everything off.

base  = peftlab.load("tiny-gpt")
tuned = peftlab.attach(base, LoRA(r=8, alpha=16))
...
tuned.detach()        # the base is bit for bit what it was
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftlab.bases import Base, LanguageModel
from peftlab.methods import Method

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Count:
    """How large an adapter is: `parameters` in closed form, and `measured`, which equals it."""

    parameters: int
    measured: int
    stored: int
    base: int

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of the base's."""
        return 100 * self.parameters / self.base

    @property
    def file_bytes(self) -> int:
        """Bytes of the stored tensors in float32."""
        return 4 * self.stored

    def __repr__(self) -> str:
        return (
            f"{self.parameters:,} trainable parameters, {self.percent:.3f}% of {self.base:,}; "
            f"{self.file_bytes:,} bytes stored in float32"
        )


class Tuned(LanguageModel):
    """A base with one or more methods attached. Make one with `peftlab.attach`."""

    def __init__(self, base: Base, methods: list[Method], seed: int = 0):
        if base.adapted_by is not None:
            raise RuntimeError(
                f"{base.name} already carries {base.adapted_by.label}: call detach() first, "
                "or attach several methods together as a list"
            )
        if not methods:
            raise ValueError("no method to attach")
        if len(methods) > 1 and any(method.exclusive for method in methods):
            alone = next(method for method in methods if method.exclusive)
            raise ValueError(f"{alone.title} trains every parameter: it composes with no other")
        self.base, self.methods = base, list(methods)
        self.name, self.model, self.tokenizer = base.name, base.model, base.tokenizer
        self.anatomy = base.anatomy
        self.base_parameters = base.anatomy.shape.parameters()
        generator = torch.Generator().manual_seed(seed)
        self.trainable: dict[str, nn.Parameter] = {}
        self.deltas: dict[str, nn.Module] = {}
        self._sites, virtual = [], 0
        with ExitStack() as stack:  # an error below undoes what was attached so far
            for method in self.methods:
                attachment = method.attach(base, generator)
                stack.push(attachment.stack)
                self._claim(attachment)
                virtual += attachment.virtual_tokens
            if not self._sites:
                raise ValueError(f"{self.label} reached no site of {base.name}")
            self._audit()
            self._stack = stack.pop_all()
        self.virtual_tokens = virtual
        base.adapted_by = self
        self.train(base.model.training)  # new modules start with dropout on

    def _claim(self, attachment) -> None:
        names = {getattr(site, "name", site) for site in attachment.sites}
        if twice := names & set(self.sites):
            raise ValueError(f"two methods want the same site, {sorted(twice)[0]}")
        self._sites += attachment.sites
        self.trainable.update(attachment.trainable)
        self.deltas.update(attachment.modules)

    def _audit(self) -> None:
        """What the model would train is exactly what the methods said, and nothing else."""
        ours = {id(parameter) for parameter in self.trainable.values()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in ours:
                raise AssertionError(f"{name} trains, but no method asked for it")

    @property
    def label(self) -> str:
        """The methods' titles, for messages and legends."""
        return " + ".join(method.title for method in self.methods)

    @property
    def sites(self) -> list[str]:
        """The names of the sites that the methods reached."""
        return [getattr(site, "name", site) for site in self._sites]

    @property
    def prompt(self) -> nn.Parameter:
        """The virtual tokens P (num_virtual_tokens, d_model)."""
        if "prompt_tuning.prompt" not in self.trainable:
            raise AttributeError(f"{self.label} has no prompt")
        return self.trainable["prompt_tuning.prompt"]

    def train(self, mode: bool = True) -> None:
        """Dropout of the base and of the deltas on or off. Never changes a weight."""
        self.model.train(mode)
        for delta in self.deltas.values():
            delta.train(mode)

    def count(self) -> Count:
        """Trainable parameters, in closed form and measured; the two are asserted equal."""
        shape = self.anatomy.shape
        closed = sum(method.parameters(shape) for method in self.methods)
        measured = sum(parameter.numel() for parameter in self.trainable.values())
        assert closed == measured, f"closed form {closed:,}, measured {measured:,}"
        stored = sum(method.stored(shape) for method in self.methods)
        return Count(closed, measured, stored, self.base_parameters)

    @property
    def merged(self) -> bool:
        """Whether the deltas are inside the weights now."""
        return any(getattr(site, "merged", False) for site in self._sites)

    def merge(self) -> None:
        """Write every delta into its weight: the same output, and no extra work in forward.

        Raises ValueError if a method has no delta to merge, RuntimeError after detach().
        """
        self._check_attached()
        for site in self._sites:
            if not hasattr(site, "merge"):
                raise ValueError(f"{getattr(site, 'name', site)} cannot be merged: it has no ΔW")
        for site in self._sites:
            site.merge()

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit."""
        for site in self._sites:
            if hasattr(site, "unmerge"):
                site.unmerge()

    def detach(self) -> Base:
        """Take everything off: the base is bit for bit what it was. Safe to call twice."""
        if self.base.adapted_by is self:
            self._stack.close()
            self.base.adapted_by = None
            self.train(False)
        return self.base

    def _check_attached(self) -> None:
        if self.base.adapted_by is not self:
            raise RuntimeError(f"{self.label} was detached from {self.name}: attach it again")

    def __enter__(self) -> Tuned:
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def state(self) -> dict[str, torch.Tensor]:
        """The trained tensors on the CPU, by name."""
        return {name: p.detach().cpu().clone().contiguous() for name, p in self.trainable.items()}

    def save(self, folder: str | Path) -> Path:
        """Write the trained tensors (safetensors) and the methods (JSON) into a folder."""
        self._check_attached()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "base": self.name,
            "base_shape": _shape_facts(self.base),
            "base_digest": self.base.digest,
            "methods": [method.to_dict() for method in self.methods],
        }
        save_file(self.state(), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, base: Base, folder: str | Path) -> Tuned:
        """Attach a saved adapter.

        Raises FileNotFoundError where there is none, and ValueError if the files are damaged or
        were trained on a base of another shape. On an error nothing stays attached.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {str(folder)!r}: no adapter was saved there")
        try:
            config = json.loads((folder / CONFIG).read_text())
            tensors = load_file(folder / WEIGHTS)
            if config["format"] != FORMAT:
                raise ValueError(f"format {config['format']}; this peftlab reads {FORMAT}")
            methods = [Method.from_dict(method) for method in config["methods"]]
            trained_on, shape, digest = (config[f"base{key}"] for key in ("", "_shape", "_digest"))
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            problem = f"{CONFIG} has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"the adapter in {str(folder)!r} is damaged: {problem}") from error
        if shape != (here := _shape_facts(base)):
            raise ValueError(
                f"this adapter was trained on {trained_on} {shape}; {base.name} is {here}"
            )
        if digest != base.digest:
            raise ValueError(
                f"this adapter was trained on other weights of {trained_on}'s shape than "
                f"those of {base.name} here: it would be noise on them"
            )
        tuned = cls(base, methods)
        try:
            tuned.load_state(tensors)
        except BaseException:
            tuned.detach()
            raise
        return tuned

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy tensors by name. All are checked before the first is copied."""
        self._check_attached()
        if missing := self.trainable.keys() ^ tensors.keys():
            raise ValueError(f"the adapter's tensors do not match: {sorted(missing)[0]}")
        for name, tensor in tensors.items():
            if (wanted := self.trainable[name].shape) != tensor.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}; {tuple(wanted)} is needed")
        for name, tensor in tensors.items():
            self.trainable[name].copy_(tensor)

    def __repr__(self) -> str:
        return f"{self.label} on {self.name}: {len(self.sites)} sites, {self.count()!r}"


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


def attach(base: Base, methods: Method | list[Method] | str | Path, seed: int = 0) -> Tuned:
    """Attach a method, a list of methods, or an adapter folder to a frozen base.

    `seed` draws the initial values. Raises RuntimeError if something is attached already, and
    ValueError if a method does not fit the base; on an error the base is untouched.
    """
    if isinstance(methods, (str, Path)):
        return Tuned.load(base, methods)
    if isinstance(methods, Method):
        methods = [methods]
    return Tuned(base, methods, seed)
