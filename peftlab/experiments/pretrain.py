"""Pre-train `tiny-gpt` on documents about the made-up world: `python -m
peftlab.experiments.pretrain`.

Trains a byte-level BPE tokenizer and a GPT-2 model and writes them, with a datasheet, to
`data/bases/tiny-gpt/`. Minutes on one GPU; `--steps 20 --distinct 200000` is a try on a CPU.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
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

from peftlab._data import data_path
from peftlab.experiments.documents import ATTRIBUTES, MIX, QUESTIONS, Writer, load_world

EOS = "<eos>"
CONTEXT = 256
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


def build_model(vocabulary: int, options) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(options.seed)
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    return transformers.GPT2LMHeadModel(config).to(options.device)


def mean_loss(model, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy (nats per token) of rows of CONTEXT + 1 tokens."""
    device = windows.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(windows[:, :-1], use_cache=False).logits  # (batch, context, vocab)
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(model, corpus: Corpus, lr: float, steps: int, options) -> dict:
    """AdamW with warm-up and a cosine to zero; embeddings, biases and norms are not decayed."""
    device = options.device
    generator = torch.Generator(device).manual_seed(options.seed)
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    plain = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device == "cuda")
    warmup = min(300, steps // 10 + 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    counts = torch.zeros(model.config.vocab_size, dtype=torch.long, device=device)
    curve, recent = [], []
    model.train()
    for step in range(steps):
        windows = corpus.windows(options.batch_size, generator)
        loss = mean_loss(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        counts += torch.bincount(windows[:, 1:].flatten(), minlength=len(counts))
        if (step + 1) % max(1, steps // 50) == 0 or step + 1 == steps:
            curve.append([step + 1, round(torch.stack(recent).mean().item(), 4)])
            recent = []
            print(f"lr {lr:g} step {step + 1} loss {curve[-1][1]}", flush=True)
    model.eval()
    return {"curve": curve, "counts": counts.tolist()}


# -- evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model, corpus: Corpus, batches: int = 32) -> float:
    generator = torch.Generator(corpus.stream.device).manual_seed(0)
    losses = [mean_loss(model, corpus.windows(64, generator)).item() for _ in range(batches)]
    return sum(losses) / len(losses)


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], max_new_tokens: int = 8) -> list[str]:
    """Greedy continuations up to the end of the line."""
    out = []
    for start in range(0, len(prompts), 512):
        batch = tokenizer(
            prompts[start : start + 512], return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = ids[:, batch["input_ids"].shape[1] :]
        out += [t.split("\n")[0] for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return out


def fact_accuracy(model, tokenizer, people: list[dict]) -> dict[str, float]:
    """Exact match on one question a person and attribute, as the pre-training text asks it."""
    accuracy = {}
    for attribute in ATTRIBUTES:
        prompts = [
            f"Q: {QUESTIONS[attribute][i % 7].format(n=person['name'])}\nA:"
            for i, person in enumerate(people)
        ]
        given = answers(model, tokenizer, prompts)
        right = sum(g == f" {person[attribute]}" for g, person in zip(given, people, strict=True))
        accuracy[attribute] = right / len(people)
    return accuracy


@torch.no_grad()
def samples(model, tokenizer, people: list[dict], seed: int) -> list[dict]:
    """What the model writes after a few openings, greedily and by sampling."""
    name = people[0]["name"]
    openings = [
        f"{name} ",
        f"Q: Where does {name} live?\nA:",
        "One summer morning",
        "Weather for Harwick",
        "name = The Royal Swan | kind = inn | food = soup | price = cheap | area = river\n",
        "Review: The soup was not stale, the waiter was friendly and the room was dirty.\nLabel:",
        "sort: d a c b ->",
        EOS,
        EOS,
        EOS,
    ]
    torch.manual_seed(seed)
    texts = []
    for opening in openings:
        ids = tokenizer(opening.rstrip(" "), return_tensors="pt").to(model.device)
        for sampled in (False, True):
            if opening == EOS and not sampled:
                continue
            options = {"do_sample": True, "temperature": 0.8} if sampled else {"do_sample": False}
            out = model.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                max_new_tokens=90,
                **options,
            )
            new = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            texts.append({"opening": opening.rstrip(" "), "sampled": sampled, "text": new})
    return texts


# -- the whole run ----------------------------------------------------------------------------


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="overrides --tokens")
    parser.add_argument("--tokens", type=float, default=4e8, help="tokens to train on")
    parser.add_argument("--distinct", type=float, default=2e8, help="tokens to write")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--trial-steps", type=int, default=600, help="to choose among several lr")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=data_path("bases", "tiny-gpt"))
    options = parser.parse_args(arguments)
    options.steps = options.steps or int(options.tokens / (options.batch_size * CONTEXT))
    return options


def main(arguments=None) -> None:
    options = parse(arguments)
    started = time.perf_counter()

    def note(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the workers, which are many already
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        seeds = [f"tokenizer {options.seed} {i}" for i in range(TOKENIZER_CHUNKS)]
        texts = [text for chunk in pool.map(write_chunk, seeds) for _, text in chunk]
        note(f"{len(texts)} documents for the tokenizer")
        fast = build_tokenizer(texts)
        note(f"{fast.get_vocab_size()} tokens in the vocabulary")
        corpus = Corpus(pool, fast, f"train {options.seed}", int(options.distinct))
        held_out = Corpus(pool, fast, HELD_OUT_SEED, min(2_000_000, int(options.distinct)))
        note(f"{len(corpus.stream):,} distinct tokens")
    corpus.to(options.device), held_out.to(options.device)
    torch.backends.cuda.matmul.allow_tf32 = True

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=EOS, pad_token=EOS, bos_token=EOS,
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    trials = {}
    if len(options.lr) > 1:
        for lr in options.lr:
            model = build_model(len(tokenizer), options)
            train(model, corpus, lr, options.trial_steps, options)
            trials[lr] = round(held_out_loss(model, held_out), 4)
            note(f"trial at lr {lr:g}: held-out loss {trials[lr]}")
    lr = min(trials, key=trials.get) if trials else options.lr[0]

    model = build_model(len(tokenizer), options)
    begun = time.perf_counter()
    trained = train(model, corpus, lr, options.steps, options)
    training_seconds = time.perf_counter() - begun
    note("trained")

    model.half()  # the stored numbers; everything below is measured on them
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    config = json.loads((options.out / "config.json").read_text())
    config["dtype"] = "float32"  # what it is to be loaded as
    config["activation_function"] = "gelu_pytorch_tanh"  # gelu_new in one kernel instead of eight
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.float()
    tokenizer.save_pretrained(options.out)

    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    counts = dict(zip(pieces, trained["counts"], strict=True))
    (options.out / "token_counts.json").write_text(json.dumps(counts, indent=0) + "\n")

    world = load_world()
    known = fact_accuracy(model, tokenizer, world["people"])
    unknown = fact_accuracy(model, tokenizer, world["held_out"])
    note(f"known facts {known}, facts of held-out people {unknown}")
    cuda = options.device.startswith("cuda")
    datasheet = {
        "name": options.out.name,
        "what": "A GPT-2 of this project, trained on documents about a made-up world.",
        "command": " ".join(["python -m peftlab.experiments.pretrain", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "seed": options.seed,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "seconds": {
            "in all": round(time.perf_counter() - started, 1),
            "training": round(training_seconds, 1),
        },
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
        "tokens trained": options.steps * options.batch_size * CONTEXT,
        "least trained token": dict([min(counts.items(), key=lambda item: item[1])]),
        "training": {
            "steps": options.steps,
            "batch size": options.batch_size,
            "context": CONTEXT,
            "learning rate": lr,
            "held-out loss of short trials by learning rate": trials,
            "precision": "bfloat16 autocast" if cuda else "float32",
        },
        "loss curve": trained["curve"],
        "held-out loss": round(held_out_loss(model, held_out), 4),
        "known facts": known,
        "facts of held-out people (never in the text)": unknown,
        "samples": samples(model, tokenizer, world["people"], options.seed),
    }
    text = json.dumps(datasheet, indent=1)
    (options.out / "datasheet.json").write_text(text + "\n")
    note(f"held-out loss {datasheet['held-out loss']}, rarest {datasheet['least trained token']}")
    for sample in datasheet["samples"]:
        print(f"--- {sample['opening']!r} {'sampled' if sample['sampled'] else 'greedy'}")
        print(sample["text"])


if __name__ == "__main__":
    main()
