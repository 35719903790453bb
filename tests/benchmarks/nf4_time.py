"""How long codes of four bits take: to decode, to make, and in a training step of QLoRA.

    python tests/benchmarks/nf4_time.py --device cuda
    python tests/benchmarks/nf4_time.py --device cuda --quick 1      in 90 seconds
    python tests/benchmarks/nf4_time.py --pairs 5 --sizes 1024       on a CPU, the page alone

Decoding and making: square weights in bfloat16, blocks of 64, double quantisation. The ways take
turns: Triton's kernels, the page that a lesson shows, and bitsandbytes where it is installed.
Decoding is compared with a copy that reads and writes as many bytes together; each call has its own
weight, and all of them together are larger than a GPU's cache. On a GPU decoding is timed twice: as
calls from Python, and as a CUDA graph of the same calls, which leaves only the GPU's own time.

The step is one of AdamW under bfloat16 on a Llama of random weights, against bitsandbytes and PEFT
with factors of the same size. Before each comparison both must give the same numbers: bit for bit
between kernels and page, and a loss within 1% of bitsandbytes, whose scales and weights are others'
roundings. Medians and quartiles go to `data/results/nf4_time_cuda.json` or `--out`.
"""

import gc
import importlib.util
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import peft
import torch
from pairs import arguments, base_of, command, seconds

import peftlab
from peftlab.bases.data import data_path
from peftlab.sites import kernels
from peftlab.sites.quantisation import quantise

CACHE = 256 * 2**20  # bytes, more than any GPU's cache
PEER = importlib.util.find_spec("bitsandbytes") is not None
KERNELS, PAGE, BNB = "kernels", "page", "bitsandbytes"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def summary(times: list[float], calls: int = 1) -> dict[str, float]:
    """Microseconds a call: the median and the quartiles."""
    quartiles = statistics.quantiles([1e6 * t / calls for t in times], n=4)
    return dict(zip(("low", "median", "high"), (round(q, 2) for q in quartiles), strict=True))


def in_turns(ways: dict[str, Callable], args, calls: int = 1) -> dict[str, dict]:
    """Every way once a round; the first three rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(3 + args.pairs):
        for name, work in ways.items():
            taken = seconds(work, args.device)
            if turn >= 3:
                times[name].append(taken)
    return {name: summary(found, calls) for name, found in times.items()}


def by(kernel: bool, work: Callable) -> Callable:
    """The same work by the kernels, or by the page."""

    def call():
        with kernels.used(kernel):
            return work()

    return call


def as_graph(work: Callable) -> Callable:
    """The same work recorded once, so that Python takes no part in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def drawn(size: int, args) -> torch.Tensor:
    return 0.02 * torch.randn(size, size, device=args.device, dtype=torch.bfloat16)


def decoding(size: int, args) -> dict:
    """Microseconds to decode a weight, and the share of the copy's bandwidth."""
    each = size * size * 5 // 2
    copies = max(2, -(-CACHE // each)) if args.device == "cuda" else 2
    held = [quantise(drawn(size, args)) for _ in range(copies)]
    moved = held[0].bytes + 2 * size * size
    sources = [torch.empty(moved // 2, dtype=torch.uint8, device=args.device) for _ in held]
    targets = [torch.empty_like(source) for source in sources]

    def decode():
        return [q.dequantise(torch.bfloat16) for q in held]

    def copy():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    ways = {"copy": copy, PAGE: by(False, decode)}
    if args.device == "cuda":
        ways[KERNELS] = by(True, decode)
        same = zip(ways[KERNELS](), ways[PAGE](), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    if PEER:
        from bitsandbytes import functional

        theirs = [
            functional.quantize_4bit(drawn(size, args), quant_type="nf4", compress_statistics=True)
            for _ in held
        ]
        ways[BNB] = lambda: [functional.dequantize_4bit(*coded) for coded in theirs]
    found = {"size": size, "bytes": moved, "calls": in_turns(ways, args, copies)}
    if args.device == "cuda":
        graphs = {name: as_graph(work) for name, work in ways.items()}
        found["graph"] = in_turns(graphs, args, copies)
    for times in (found[key] for key in ("calls", "graph") if key in found):
        for name in ways:
            times[name]["share of copy"] = round(times["copy"]["median"] / times[name]["median"], 3)
    return found


def making(size: int, args) -> dict:
    """Microseconds to make the codes of a weight."""
    weight = drawn(size, args)
    ways = {PAGE: by(False, lambda: quantise(weight))}
    if args.device == "cuda":
        ways[KERNELS] = by(True, lambda: quantise(weight))
        ours, page = ways[KERNELS]().tensors, ways[PAGE]().tensors
        assert all(torch.equal(ours[name], page[name]) for name in page)
    if PEER:
        from bitsandbytes import functional

        options = dict(quant_type="nf4", compress_statistics=True)
        ways[BNB] = lambda: functional.quantize_4bit(weight, **options)
    return {"size": size, "calls": in_turns(ways, args)}


def coded_by_bitsandbytes(model: torch.nn.Module) -> torch.nn.Module:
    """The linear maps of the blocks as bitsandbytes' own, from the weights that are there."""
    import bitsandbytes

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name not in LINEARS:
                continue
            coded = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            coded.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data.cpu(),
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
            )
            setattr(parent, name, coded.to(linear.weight.device))
    model.is_loaded_in_4bit = True
    return model


def stepper(loss: Callable, parameters: list, args) -> Callable:
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step() -> float:
        with torch.autocast(args.device, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def stepping(args) -> dict:
    """Microseconds of a training step."""
    method = peftlab.QLoRA(r=16, alpha=32)
    base = base_of(args.base, args.device)
    base.model.bfloat16()
    tuned = peftlab.attach(base, method)
    tuned.train()
    words = len(tuned.tokenizer)
    ids = torch.randint(words, (args.batch, args.length), device=args.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ours = stepper(lambda: tuned.batch_loss(batch), list(tuned.trainable.values()), args)
    ways = {PAGE: by(False, ours)}
    if args.device == "cuda":
        ways[KERNELS] = by(True, ours)
        assert torch.equal(ways[KERNELS](), ways[PAGE]())
    if PEER and args.base != "tiny-gpt":
        model = base_of(args.base, "cpu").model.bfloat16().to(args.device)
        coded = coded_by_bitsandbytes(model)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEARS)
        model = peft.get_peft_model(coded, config)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == tuned.count().parameters
        ways[BNB] = stepper(lambda: model(**batch).loss, trained, args)
        apart = (ways[BNB]() / ways[PAGE]() - 1).abs().item()
        assert apart < 0.01, f"the losses are {apart:.1%} apart"
    found = {"base": args.base, "batch": args.batch, "length": args.length}
    return found | {"calls": in_turns(ways, args)}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return getattr(sys.modules.get(name), "__version__", None)


def told(what: str, times: dict[str, dict]) -> None:
    shown = [
        f"{name} {time['median']:,.0f} us"
        + (f" ({time['share of copy']:.2f} of copy)" if "share of copy" in time else "")
        for name, time in times.items()
    ]
    print(f"{what}: {', '.join(shown)}", flush=True)


def main() -> None:
    defaults = dict(base="llama-3.2-1b", batch=8, length=512, sizes="2048,4096,8192")
    args = arguments(__doc__.split("\n")[0], quick=0, out="", **defaults)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if args.quick:
        args.pairs = min(args.pairs, 10)
    out = Path(args.out) if args.out else data_path("results", f"nf4_time_{args.device}.json")
    gpu = args.device == "cuda"
    report = {
        "command": command("nf4_time.py", sys.argv[1:]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} core",
        "python": platform.python_version(),
        "pairs": args.pairs,
        "decode": [],
        "make": [],
    }
    parts = [("decode", decoding), ("make", making)]
    for size in map(int, args.sizes.split(",")):
        for part, measured in parts:
            found = measured(size, args)
            report[part].append(found)
            told(f"{part} {size} x {size}", found["calls"])
            if "graph" in found:
                told(f"{part} {size} x {size}, as a graph", found["graph"])
            gc.collect()
    if gpu:
        report["step"] = stepping(args)
        told(f"step of {args.base}", report["step"]["calls"])
    names = ("torch", "triton", "transformers", "peft", "bitsandbytes")
    report["versions"] = {name: installed(name) for name in names}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
