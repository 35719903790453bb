"""Pre-train a base on documents about the made-up world: `python -m
peftlab.experiments.pretrain --base tiny-gpt`.

Writes the model, its tokenizer and a datasheet to `data/bases/`. `tiny-gpt` brings a byte-level
BPE tokenizer, which `tiny-llama`, `tiny-bert` and `tiny-t5` (see `architectures`) take over.
Minutes on one GPU; `--steps 20 --distinct 200000 --lr 1e-3` is a try on a CPU.
"""

import argparse
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn import functional as F

from peftlab.bases.data import data_path
from peftlab.experiments.architectures import CONTEXT, EOS, PLANS
from peftlab.experiments.documents import ATTRIBUTES, MIX, QUESTIONS, Writer, load_world

CHUNK = 10_000  # documents written by one call of a worker
TOKENIZER_CHUNKS = 20
MERGED = 5000  # vocabulary before rare pieces are dropped
VOCABULARY = 2048  # and at most after it
RARE = 25  # a piece seen less often than this in the tokenizer's sample is dropped
HELD_OUT_SEED = "held-out documents"


# -- text and tokens --------------------------------------------------------------------------


def write_chunk(seed: str) -> list[tuple[str, str]]:
    """`CHUNK` documents as (kind, text), the same for the same seed."""
    writer = Writer(seed)
    return [writer.write() for _ in range(CHUNK)]


def build_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE in which every piece is used.

    BPE keeps the stepping stones of its merges: ' Alex' stays in the vocabulary although only
    ' Alexander' occurs, and its embedding is never trained. Here rare pieces are dropped until
    none is left, and the rarest ones above the size wanted. A word that is in the vocabulary is
    looked up whole (`ignore_merges`), so it needs no stepping stones.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=MERGED, special_tokens=[EOS], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    while True:
        counts = Counter(t for e in tokenizer.encode_batch(texts) for t in e.tokens)
        state = json.loads(tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        always = {t for t in vocabulary if len(t) == 1 or t == EOS}
        room = VOCABULARY - len(always)
        longer = [t for t, n in counts.most_common() if n >= RARE and t not in always][:room]
        kept = sorted(always.union(longer), key=vocabulary.get)
        if len(kept) == len(vocabulary):
            return tokenizer
        state["model"]["vocab"] = {t: position for position, t in enumerate(kept)}
        state["model"]["merges"] = [
            [left, right]
            for left, right in state["model"]["merges"]
            if {left, right, left + right} <= state["model"]["vocab"].keys()
        ]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))


def encode_chunk(job: tuple[str, str]) -> tuple[np.ndarray, Counter, Counter]:
    """Tokens of a chunk with EOS after each document; documents and tokens by kind."""
    state, seed = job
    tokenizer = tokenizers.Tokenizer.from_str(state)
    eos = tokenizer.token_to_id(EOS)
    documents = write_chunk(seed)
    stream, number, size = [], Counter(), Counter()
    encodings = tokenizer.encode_batch([text for _, text in documents])
    for (kind, _), encoding in zip(documents, encodings, strict=True):
        stream += [*encoding.ids, eos]
        number[kind] += 1
        size[kind] += len(encoding.ids) + 1
    return np.array(stream, dtype=np.uint16), number, size


class Corpus:
    """A stream of tokens, with documents that start after each EOS."""

    def __init__(self, pool, tokenizer: tokenizers.Tokenizer, seed: str, tokens: int):
        parts, self.number, self.size, index, total = [], Counter(), Counter(), 0, 0
        workers = os.cpu_count()
        while total < tokens:
            jobs = [(tokenizer.to_str(), f"{seed} {index + i}") for i in range(workers)]
            index += workers
            for part, number, size in pool.map(encode_chunk, jobs):
                if total < tokens:
                    parts.append(part)
                    total += len(part)
                    self.number += number
                    self.size += size
        self.stream = torch.from_numpy(np.concatenate(parts).astype(np.int16))
        starts = (self.stream == tokenizer.token_to_id(EOS)).nonzero().squeeze(1) + 1
        self.starts = starts[starts < len(self.stream) - CONTEXT - 1]

    def to(self, device: str) -> "Corpus":
        self.stream, self.starts = self.stream.to(device), self.starts.to(device)
        return self

    def windows(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Rows of CONTEXT + 1 tokens; half start with a document, half anywhere."""
        device = self.stream.device

        def draw(high, size):
            return torch.randint(high, (size,), generator=generator, device=device)

        half = batch_size // 2
        begin = torch.cat(
            [
                self.starts[draw(len(self.starts), half)],
                draw(len(self.stream) - CONTEXT - 1, batch_size - half),
            ]
        )
        return self.stream[begin[:, None] + torch.arange(CONTEXT + 1, device=device)].long()


# -- training ---------------------------------------------------------------------------------


def mean_loss(model, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy (nats per token) of the labels that are not to be ignored."""
    device = labels.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(**inputs).logits  # (batch, tokens, vocabulary)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """The matrices of the layers are; embeddings, biases and norms are not."""
    inside = re.search(r"\.(h|layers?|block)\.\d", name) and "relative" not in name
    return parameter.ndim == 2 and bool(inside)


def train(model, feed, lr: float, steps: int, options, seconds: float | None = None) -> dict:
    """AdamW with warm-up and a cosine to zero, for so many steps or seconds."""
    device = options.device
    generator = torch.Generator(device).manual_seed(options.seed)
    decayed = [p for n, p in model.named_parameters() if is_decayed(n, p)]
    plain = [p for n, p in model.named_parameters() if not is_decayed(n, p)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device == "cuda")
    warmup = min(300, steps // 10 + 1)
    begun = time.perf_counter()

    def done(step: int) -> float:
        """Share of the steps, or of the seconds if there is a limit and it is nearer."""
        spent = (time.perf_counter() - begun) / seconds if seconds else 0.0
        return min(1.0, max(step / steps, spent))

    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done(step)))),
    )
    counts = torch.zeros(model.config.vocab_size, dtype=torch.long, device=device)
    predicted = torch.zeros((), dtype=torch.long, device=device)
    loss_of = torch.compile(mean_loss, dynamic=False) if options.compile else mean_loss
    curve, recent = [], []
    model.train()
    for step in range(steps):
        inputs, labels, text = feed(options.batch_size, step, generator)
        loss = loss_of(model, inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        counts.scatter_add_(0, text.clamp(min=0).flatten(), (text >= 0).flatten().long())
        predicted += (labels >= 0).sum()
        stop = done(step + 1) == 1.0
        if (step + 1) % max(1, steps // 50) == 0 or stop:
            curve.append([step + 1, round(torch.stack(recent).mean().item(), 4)])
            recent = []
            print(f"lr {lr:g} step {step + 1} loss {curve[-1][1]}", flush=True)
        if stop:
            break
    model.eval()
    return {"curve": curve, "counts": counts.tolist(), "predicted": predicted.item()}


# -- evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model, feed, device: str, batches: int = 32) -> float:
    generator = torch.Generator(device).manual_seed(0)
    losses = [mean_loss(model, *feed(64, step, generator)[:2]).item() for step in range(batches)]
    return sum(losses) / len(losses)


def fact_accuracy(plan, model, tokenizer, people: list[dict]) -> dict[str, float]:
    """Exact match on one question a person and attribute, as the pre-training text asks it."""
    accuracy = {}
    for attribute in ATTRIBUTES:
        prompts = [
            f"Q: {QUESTIONS[attribute][i % 7].format(n=person['name'])}\nA:"
            for i, person in enumerate(people)
        ]
        given = plan.answers(model, tokenizer, prompts)
        right = sum(g == f" {person[attribute]}" for g, person in zip(given, people, strict=True))
        accuracy[attribute] = right / len(people)
    return accuracy


def one_token_answers(fast: tokenizers.Tokenizer, people: list[dict]) -> float:
    """Share of the answers that are one token: a single mask can hold no other."""
    texts = [f" {person[attribute]}" for person in people for attribute in ATTRIBUTES]
    encodings = fast.encode_batch(texts, add_special_tokens=False)
    return sum(len(encoding.ids) == 1 for encoding in encodings) / len(texts)


# -- the whole run ----------------------------------------------------------------------------


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", choices=PLANS, default="tiny-gpt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="overrides --tokens")
    parser.add_argument("--tokens", type=float, default=4e8, help="tokens to train on")
    parser.add_argument("--seconds", type=float, help="end the training by then")
    parser.add_argument("--distinct", type=float, default=2e8, help="tokens to write")
    parser.add_argument("--corpus", type=Path, help="documents to read, or to keep for others")
    parser.add_argument("--batch-size", type=int, default=128, help=f"rows of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--trial-steps", type=int, default=600, help="to choose among several lr")
    parser.add_argument("--layers", type=int, default=6, help="of tiny-gpt")
    parser.add_argument("--width", type=int, default=192, help="of tiny-gpt")
    parser.add_argument("--heads", type=int, default=6, help="of tiny-gpt")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, for a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.out = options.out or data_path("bases", options.base)
    options.steps = options.steps or int(options.tokens / (options.batch_size * CONTEXT))
    return options


def written(options, note) -> tuple[tokenizers.Tokenizer, Corpus, Corpus]:
    """The tokenizer, the documents to train on and the held-out ones."""
    if options.corpus and options.corpus.exists():
        state, corpus, held_out = pickle.loads(options.corpus.read_bytes())
        return tokenizers.Tokenizer.from_str(state), corpus, held_out
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the workers, which are many already
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        if options.base == "tiny-gpt":
            seeds = [f"tokenizer {options.seed} {i}" for i in range(TOKENIZER_CHUNKS)]
            texts = [text for chunk in pool.map(write_chunk, seeds) for _, text in chunk]
            note(f"{len(texts)} documents for the tokenizer")
            fast = build_tokenizer(texts)
            note(f"{fast.get_vocab_size()} tokens in the vocabulary")
        else:
            stored = data_path("bases", "tiny-gpt", "tokenizer.json")
            fast = tokenizers.Tokenizer.from_file(str(stored))
        corpus = Corpus(pool, fast, f"train {options.seed}", int(options.distinct))
        held_out = Corpus(pool, fast, HELD_OUT_SEED, min(2_000_000, int(options.distinct)))
    if options.corpus:
        part = options.corpus.with_suffix(".part")
        part.write_bytes(pickle.dumps((fast.to_str(), corpus, held_out)))
        part.rename(options.corpus)
    return fast, corpus, held_out


def try_rates(model, feeds, options, note) -> dict[float, float]:
    """Held-out losses of short runs at each learning rate; the model is as before at the end."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trials = {}
    for lr in options.lr:
        train(model, feeds[0], lr, options.trial_steps, options)
        trials[lr] = round(held_out_loss(model, feeds[1], options.device), 4)
        model.load_state_dict(before)
        note(f"trial at lr {lr:g}: held-out loss {trials[lr]}")
    return trials


def store(model, tokenizer, plan, out: Path) -> None:
    """Writes the model in 16 bits, to be loaded in 32; afterwards it holds the stored numbers."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "float32"} | plan.stored
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.float()
    tokenizer.save_pretrained(out)


def describe(plan, model, tokenizer, corpus: Corpus, counts: dict[str, int], options) -> dict:
    """The part of the datasheet that needs no run: where the base comes from and its corpus."""
    cuda = options.device.startswith("cuda")
    return {
        "name": options.out.name,
        "what": plan.what,
        "command": " ".join(["python -m peftlab.experiments.pretrain", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "seed": options.seed,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "seconds": {},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "corpus": {
            kind: {
                "documents": corpus.number[kind],
                "share of documents": round(corpus.number[kind] / corpus.number.total(), 4),
                "share of tokens": round(corpus.size[kind] / corpus.size.total(), 4),
            }
            for kind in MIX
        },
        "distinct tokens": len(corpus.stream),
        "least trained token": dict([min(counts.items(), key=lambda item: item[1])]),
    }


def main(arguments=None) -> None:
    options = parse(arguments)
    plan = PLANS[options.base]
    started = time.perf_counter()

    def note(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    fast, corpus, held_out = written(options, note)
    note(f"{len(corpus.stream):,} distinct tokens")
    corpus.to(options.device), held_out.to(options.device)
    torch.backends.cuda.matmul.allow_tf32 = True

    tokenizer = plan.tokenizer(fast)
    feeds = plan.feed(corpus, tokenizer), plan.feed(held_out, tokenizer)
    torch.manual_seed(options.seed)
    model = plan.model(tokenizer, options).to(options.device)
    trials = try_rates(model, feeds, options, note) if len(options.lr) > 1 else {}
    lr = min(trials, key=trials.get) if trials else options.lr[0]

    begun = time.perf_counter()
    left = options.seconds and options.seconds - (begun - started)
    trained = train(model, feeds[0], lr, options.steps, options, left)
    training_seconds = time.perf_counter() - begun
    note("trained")

    store(model, tokenizer, plan, options.out)  # everything below is measured on stored numbers
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    counts = dict(zip(pieces, trained["counts"], strict=True))
    (options.out / "token_counts.json").write_text(
        json.dumps(counts, indent=0) + "\n", encoding="utf-8"
    )

    world = load_world()
    known = fact_accuracy(plan, model, tokenizer, world["people"])
    unknown = fact_accuracy(plan, model, tokenizer, world["held_out"])
    note(f"known facts {known}, facts of held-out people {unknown}")
    words = {t: n for t, n in counts.items() if t not in {EOS, *tokenizer.all_special_tokens}}
    datasheet = describe(plan, model, tokenizer, corpus, words, options)
    datasheet["seconds"] = {
        "in all": round(time.perf_counter() - started, 1),
        "training": round(training_seconds, 1),
    }
    datasheet |= {
        "tokens trained": sum(trained["counts"]),
        "tokens predicted": trained["predicted"],
        "training": {
            "steps": trained["curve"][-1][0],
            "batch size": options.batch_size,
            "context": CONTEXT,
            "learning rate": lr,
            "held-out loss of short trials by learning rate": trials,
            "precision": "bfloat16 autocast" if options.device != "cpu" else "float32",
        },
        "objective": plan.objective,
        "loss curve": trained["curve"],
        "held-out loss": round(held_out_loss(model, feeds[1], options.device), 4),
        "known facts": known,
        "facts of held-out people (never in the text)": unknown,
        "answers that are one token": one_token_answers(fast, world["people"]),
        "samples": plan.samples(model, tokenizer, world["people"], options.seed),
    }
    text = json.dumps(datasheet, indent=1)
    (options.out / "datasheet.json").write_text(text + "\n", encoding="utf-8")
    note(f"held-out loss {datasheet['held-out loss']}, rarest {datasheet['least trained token']}")
    for sample in datasheet["samples"]:
        print(json.dumps(sample))


if __name__ == "__main__":
    main()
