"""Every kind of method on seven tasks, each at its best rate, on five seeds.

    python -m peftlab.experiments.tournament --device cuda --workers 12       # all contests
    python -m peftlab.experiments.tournament --contests facts --smoke         # a try on a CPU

Writes `data/results/bench_<contest>.json`: what was compared, the untuned base and few-shot
prompting beside it, the runs of the search on dev and those of the seeds on the test. While a
contest is not whole its rows lie in `bench_<contest>.jsonl`, and the same command goes on from
there; `--seconds` ends it in time. How a rate is found is in `peftlab.bench.search`, what a row
holds in `peftlab.bench.runs`, and what a verdict is in `peftlab.bench.verdicts`; `--judge` derives
the verdicts of the files again and runs nothing. It needs `pip install -e ".[sweep]"`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch

from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.bench.contest import SEEDS, Contest, Entry
from peftlab.bench.runs import answers, blocks, made_with, plain_texts, run_together
from peftlab.bench.tournament import Progress, Rows, play
from peftlab.bench.verdicts import comparisons, pairs
from peftlab.experiments.compare_real import take_a_gpu
from peftlab.methods import (
    IA3,
    BitFit,
    DoRA,
    FullFineTuning,
    HoulsbyAdapter,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Prune,
    PTuning,
    PTuningV2,
    QLoRA,
)
from peftlab.tasks import Task

COMMAND = "python -m peftlab.experiments.tournament"
ADAPTER = dict(r=8, alpha=16, target_modules="all-linear")
SHOTS = 4  # examples in a few-shot prompt
HEAD = Entry("Head alone", (), 0.0)


def entries(full: float, network: float, table: float, factors: float, without=()) -> tuple:
    """Every method with a first guess of its rate, by what it trains: the whole model, a network
    or matrices, a table of vectors, or factors and biases."""
    made = (
        Entry("Full fine-tuning", (FullFineTuning(),), full),
        Entry("Prompt tuning", (PromptTuning(20),), table),
        Entry("P-tuning", (PTuning(20),), network),
        Entry("Prefix tuning, MLP", (PrefixTuning(20, prefix_projection=True),), network),
        Entry("Prefix tuning (P-tuning v2)", (PTuningV2(20),), table),
        Entry("LoRA", (LoRA(**ADAPTER),), network),
        Entry("DoRA", (DoRA(**ADAPTER),), network),
        Entry("QLoRA", (QLoRA(**ADAPTER),), network),
        Entry("Houlsby adapter", (HoulsbyAdapter(64),), network),
        Entry("(IA)³", (IA3(),), factors),
        Entry("LayerNorm tuning", (LayerNormTuning(),), factors),
        Entry("BitFit", (BitFit(),), factors),
        Entry("Half pruned + LoRA", (Prune(0.5), LoRA(**ADAPTER)), network),
    )
    return tuple(entry for entry in made if entry.label not in without)


LLAMA = entries(1e-4, 1e-3, 3e-2, 1e-2, without=("BitFit",))  # SmolLM2 has no biases
BERT = (*entries(1e-4, 1e-3, 3e-2, 1e-2), HEAD)
SMALL = entries(1e-3, 3e-3, 1e-1, 3e-2)
ONE = dict(r=1, alpha=2, target_modules="all-linear")
FEW = ("Full fine-tuning", "Prompt tuning", "Prefix tuning (P-tuning v2)", "LoRA", "(IA)³")
WORLDS = (
    *(entry for entry in SMALL if entry.label in FEW),
    Entry("LoRA, rank 1", (LoRA(**ONE),), 1e-2),
)
CONTESTS = {
    contest.name: contest
    for contest in (
        Contest("pharmacy", "pharmacy", "smollm2-135m", 400, 16, LLAMA, dev=240),
        Contest("e2e", "e2e", "smollm2-135m", 300, 16, LLAMA, {"test": 400}),
        Contest("sst2-smollm2", "sst2", "smollm2-135m", 400, 32, LLAMA, dev=1000),
        Contest("sst2-minilm", "sst2", "minilm", 600, 64, BERT, {"answer": "class"}),
        Contest("wnut17", "wnut17", "minilm", 500, 32, BERT),
        Contest("facts", "facts", "tiny-gpt", 500, 16, SMALL),
        Contest("permute", "letters", "tiny-gpt", 400, 16, SMALL, {"skill": "permute"}),
        Contest("sort", "letters", "tiny-gpt", 60, 16, SMALL, {"skill": "sort"}),
        # one world each with a knob: how much is new to remember, and how new the skill is
        *(
            Contest(f"facts-{n}", "facts", "tiny-gpt", 500, 16, WORLDS, {"people": n})
            for n in (2, 10, 50)
        ),
        *(
            Contest(f"letters-{skill}", "letters", "tiny-gpt", 400, 16, WORLDS, {"skill": skill})
            for skill in ("descend", "permute", "double_histogram")
        ),
    )
}


def together(contest: Contest, entry: Entry) -> int:
    """How many runs one worker trains at a time, by what a GPU of 80 GB holds with six workers."""
    if contest.base != "smollm2-135m":
        return 6
    if any(isinstance(method, FullFineTuning) for method in entry.methods):
        return 2
    return 6 if contest.name == "pharmacy" else 4


# -- what a method is compared with beside the other methods ----------------------------------


def reference(label: str, task: Task, outputs: list[str], seed: int | None = None) -> dict:
    """A row of answers on the test that nobody was trained for."""
    graded = {name: round(value, 6) for name, value in task.grade(task.test, outputs).items()}
    return {"label": label, "seed": seed, **graded, "blocks": blocks(task, task.test, outputs)}


def few_shot(task: Task, seed: int) -> list:
    """The test with `SHOTS` training examples and their targets in front of each prompt."""
    shots = Random(seed).sample(task.train, SHOTS)
    front = "".join(f"{shot.prompt}{shot.target}\n\n" for shot in shots)
    return [replace(example, prompt=front + example.prompt) for example in task.test]


def references(contest: Contest, device: str, draws: int = len(SEEDS)) -> dict:
    """The untuned base, few-shot prompting with so many draws of its examples, and the commonest
    target of the training split."""
    task = contest.load_task()
    commonest = Counter(example.target for example in task.train).most_common(1)[0][0]
    found, plain = [], None
    if not task.head:
        found += [reference("Commonest answer", task, [commonest] * len(task.test))]
        base = load(contest.base, device)
        found += [reference("Untuned", task, answers(base, task, task.test))]
        plain = round(base.loss(plain_texts()), 5)
        if contest.base == "smollm2-135m":  # the small bases never read two examples in a row
            found += [
                reference(
                    f"{SHOTS} examples in the prompt",
                    task,
                    answers(base, task, few_shot(task, s)),
                    s,
                )
                for s in SEEDS[:draws]
            ]
    return {"references": found, "plain_loss": plain}


# -- the command ------------------------------------------------------------------------------


def facts_of(progress: Progress, options, command: str = COMMAND) -> dict:
    """What is said of a contest beside its rows."""
    contest = progress.contest
    shape = load(contest.base).anatomy.shape
    return {
        "command": f"{command} --contests {contest.name} --device {options.device} "
        f"--workers {options.workers}" + f" --draws {options.draws}" * (options.draws < len(SEEDS)),
        **made_with(options.device),
        "date": date.today().isoformat(),
        "seeds": SEEDS,
        "tuning seeds": progress.tuning,
        "rule": "the rate, then the head's rate, with the best mean score on dev over the tuning "
        "seeds; on a tie the lower loss",
        "base parameters": shape.parameters(),
        **contest.facts(),
    }


def whole(facts: dict, progress: list[Progress]) -> dict:
    """A contest that is played to the end, ready for JSON."""
    chosen = {
        each.entry.label: {
            "methods": [method.to_dict() for method in each.entry.methods],
            "lr": each.lr,
            "head_lr": each.head_lr,
            "inside": each.inside,
        }
        for each in progress
    }
    tried = [dict(row) for each in progress for row in each.tried]
    runs = [dict(each.rows.found[job.key]) for each in progress for job in each.final]
    return {**facts, **made(facts, tried + runs), "entries": chosen, "tried": tried, "runs": runs}


def made(facts: dict, rows: list[dict]) -> dict:
    """What the rows were made with, taken out of them; and, where another device wrote the file and
    answered for the references, that one's name."""
    found = {}
    for key in ("device", "precision", "torch", "transformers"):
        values = sorted({row.pop(key) for row in rows if key in row})
        if values and values != [facts.get(key)]:
            found[key] = ", ".join(values)
            found[f"references {key}"] = facts.get(key)
    return found


def write(path: Path, contest: dict) -> None:
    """The contest with what its runs say of each entry, a row a line."""
    rows = {name: contest.pop(name) for name in ("tried", "runs")}
    judged = {"pairs": pairs, "comparisons": comparisons}
    for name in judged:
        contest.pop(name, None)
    rows = {name: judge(contest, rows["runs"]) for name, judge in judged.items()} | rows
    parts = [json.dumps(contest, indent=1, ensure_ascii=False)[:-2]]
    for name, several in rows.items():
        listed = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in several)
        parts.append(f' "{name}": [\n{listed}\n ]')
    path.write_text(",\n".join(parts) + "\n}\n", encoding="utf-8")


def parser_of(about: str, contests: Iterable[str]) -> argparse.ArgumentParser:
    """The options of whatever plays contests."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--contests", nargs="*", choices=list(contests), default=list(contests))
    parser.add_argument(
        "--methods", nargs="*", help="these entries alone; nothing is written whole"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then begin no more")
    parser.add_argument(
        "--draws", type=int, default=len(SEEDS), help="of the examples in few-shot prompts"
    )
    parser.add_argument("--smoke", action="store_true", help="two steps a run, few examples")
    parser.add_argument("--judge", action="store_true", help="the verdicts again, from the rows")
    parser.add_argument("--out", type=Path, default=data_path("results"))
    return parser


def main() -> None:
    options = parser_of(__doc__.split("\n")[0], CONTESTS).parse_args()
    if options.judge:
        for path in sorted(options.out.glob("bench_*.json")):
            write(path, json.loads(path.read_text(encoding="utf-8")))
            print(f"{path}: judged")
        return
    contests = [CONTESTS[name] for name in options.contests]
    if options.smoke:
        contests = [replace(contest, steps=2, dev=8) for contest in contests]
    play_all(contests, options)


def play_all(
    contests: list[Contest], options, kind: str = "bench", command: str = COMMAND, as_=Progress
) -> dict[str, list[Progress]]:
    """Play contests on a pool; write those that are whole. Returns how far each of them is.

    `options` are those of `parser_of`; files are called `<kind>_<contest>`; `as_` makes of a
    contest, an entry, its rows, the metric and whether there is a head what says which runs are
    needed.
    """
    until = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    progress: dict[str, list[Progress]] = {}
    for contest in contests:
        task, rows = contest.load_task(), Rows(options.out / f"{kind}_{contest.name}.jsonl")
        progress[contest.name] = [
            as_(contest, entry, rows, task.main, bool(task.head))
            for entry in contest.entries
            if not options.methods or entry.label in options.methods
        ]
    context, gpus = (
        get_context("spawn"),
        torch.cuda.device_count() if options.device == "cuda" else 0,
    )
    pool = ProcessPoolExecutor(options.workers, context, take_a_gpu, (context.Value("i", 0), gpus))
    begun = time.perf_counter()
    try:
        everyone = [each for several in progress.values() for each in several]
        problems = play(
            everyone, run_together, pool, options.device, options.workers, together,
            until,
            say=lambda text: print(f"{time.perf_counter() - begun:.0f} s: {text}", flush=True),
        )  # fmt: skip
        for name, several in progress.items():
            if (
                not options.methods
                and time.monotonic() < until
                and not any(e.needed() for e in several)
            ):
                facts = facts_of(several[0], options, command) | references(
                    several[0].contest, options.device, options.draws
                )
                write(options.out / f"{kind}_{name}.json", whole(facts, several))
                print(f"{name}: whole", flush=True)
    finally:
        if time.monotonic() >= until:  # what runs now is not waited for
            for process in list((pool._processes or {}).values()):
                process.terminate()
        pool.shutdown(cancel_futures=True)
    print(f"{len(problems)} problems", *problems, sep="\n")
    return progress


if __name__ == "__main__":
    main()
