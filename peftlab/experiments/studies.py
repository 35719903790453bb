"""What the winner depends on: contests at several sizes of the data and at equal costs, and LoRA's
regrets.

    python -m peftlab.experiments.studies data --device cuda --workers 6       # one study
    python -m peftlab.experiments.studies data --plan                          # says what it takes
    python -m peftlab.experiments.studies rates --contests rates-facts --smoke --out /tmp/tried

    data         16, 64, 256 and all training examples, drawn by the seed
    parameters   about 60 thousand and 600 thousand trained numbers for every method
    memory       the batch that fits into the predicted peak of full fine-tuning on four rows
    time         as many steps as fit into the seconds of full fine-tuning, timed alone first
    layers       LoRA on all linear maps, on attention alone, on the MLP alone; at equal counts too
    batch        as many examples seen in batches of 8, 32, 128 and 512
    rates        seven rates, five tuning seeds each: the ratio of best rates, by rank
    capacity     random labels learned by heart: bits for each trained number
    scale        four methods on bases of five sizes (`grow` makes them) and on SmolLM2

A study is a set of contests of `peftlab.bench`, searched, seeded, judged and resumed as those of
`tournament`, with its options; only the files are called `study_<contest>`. `bench.trends` reads
what a study says: `--read` prints it and keeps it in `trend_<study>.json`, for those who have no
statistics library. SST-2 is read from where `peftlab.tasks.public` says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from peftlab import accounting, memory
from peftlab.bases import load
from peftlab.bases.shapes import Shape, names
from peftlab.bench import search, trends
from peftlab.bench.contest import SEEDS, Contest, Entry
from peftlab.bench.tournament import LADDER_SEEDS, RUNGS, Ladder, Progress
from peftlab.experiments import tournament
from peftlab.experiments.memorising import CLASSES, Memorising
from peftlab.experiments.sweep_soft import write
from peftlab.methods import (
    IA3,
    FullFineTuning,
    HoulsbyAdapter,
    LayerNormTuning,
    LoRA,
    Method,
    PfeifferAdapter,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
)
from peftlab.training import train
from peftlab.tuned import attach

MODULE = "python -m peftlab.experiments.studies"
FULL = trends.FULL
FEW = (
    *(FULL, "Prompt tuning", "Prefix tuning (P-tuning v2)", "LoRA"),
    *("Houlsby adapter", "(IA)³", "Head alone"),
)


def few(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries that every study has."""
    return tuple(entry for entry in entries if entry.label in FEW)


TASKS = {
    "pharmacy": Contest(
        "pharmacy", "pharmacy", "smollm2-135m", 400, 16, few(tournament.LLAMA), dev=120, test=420
    ),
    "sst2-smollm2": Contest(
        "sst2-smollm2", "sst2", "smollm2-135m", 300, 16, few(tournament.LLAMA), dev=500
    ),
    "sst2-minilm": Contest(
        "sst2-minilm", "sst2", "minilm", 400, 32, few(tournament.BERT), {"answer": "class"}, 1000
    ),
    "facts": Contest("facts", "facts", "tiny-gpt", 500, 16, few(tournament.SMALL)),
    "permute": Contest(
        "permute", "letters", "tiny-gpt", 400, 16, few(tournament.SMALL), {"skill": "permute"}
    ),
}
TOKENS = {"pharmacy": 96, "sst2-smollm2": 48, "sst2-minilm": 48, "facts": 32, "permute": 32}


Tasks = tuple[str, ...]  # names in TASKS


def named(prefix: str, task: str, suffix: str = "", **changes) -> Contest:
    """The contest of a task under a name of a study, with something changed."""
    name = "-".join(filter(None, (prefix, task, suffix)))
    return replace(TASKS[task], name=name, **changes)


# -- size of the training data ----------------------------------------------------------------

SIZES = (16, 64, 256, None)


def data(tasks: Tasks = ("pharmacy", "sst2-minilm", "sst2-smollm2")) -> Iterator[Contest]:
    """Every size with as many steps, so that few examples are seen more often."""
    for task in tasks:
        for size in SIZES:
            yield named("data", task, str(size or "all"), examples=size)


# -- equal parameters -------------------------------------------------------------------------

BUDGETS = {"60k": 60_000, "600k": 600_000}
NEAR = 0.15  # of the budget: what has no size so near is left out
LONGEST = 300  # virtual tokens


def shape_of(base: str) -> Shape:
    """The shape of a base, from its name or, where it comes from outside, from the base itself."""
    return Shape.named(base) if base in names() else load(base).anatomy.shape


def sized(shape: Shape, budget: int) -> dict[str, Method]:
    """Each method in the size whose number of trained parameters is nearest to the budget.

    LoRA goes on all linear maps, or where the smallest rank is too large there on fewer. What has
    no size within a share of `NEAR`, or would need more than `LONGEST` virtual tokens, is absent.
    """

    def lora(targets) -> Callable[[int], Method]:
        return lambda r: LoRA(r=r, alpha=2 * r, target_modules=targets)

    families = {
        "Prompt tuning": [(PromptTuning, LONGEST)],
        "Prefix tuning (P-tuning v2)": [(PTuningV2, LONGEST)],
        "LoRA": [(lora("all-linear"), 512), (lora(("q", "v")), 512), (lora(("v",)), 512)],
        "Houlsby adapter": [(HoulsbyAdapter, 512)],
        "Pfeiffer adapter": [(PfeifferAdapter, 512)],
        "LoRA on q and v": [(lora(("q", "v")), 512)],
    }
    found = {}
    for label, several in families.items():
        for make, most in several:
            if make is PromptTuning:
                most = min(most, shape.context // 2)
            one, two = (accounting.count(make(n), shape) for n in (1, 2))
            n = min(max(round(1 + (budget - one) / (two - one)), 1), most)
            if abs(accounting.count(make(n), shape) - budget) <= NEAR * budget:
                found[label] = make(n)
                break
    if found.get("LoRA on q and v") == found.get("LoRA"):
        found.pop("LoRA on q and v", None)
    return found


def parameters(
    tasks: Tasks = ("pharmacy", "sst2-minilm", "facts", "permute"),
) -> Iterator[Contest]:
    """Every method in two sizes; what a head trains comes on top, the same for all."""
    for task in tasks:
        contest = TASKS[task]
        guesses = {entry.label: entry.lr for entry in contest.entries}
        guesses["LoRA on q and v"] = guesses["LoRA"]
        guesses["Pfeiffer adapter"] = guesses["Houlsby adapter"]
        for name, budget in BUDGETS.items():
            made = sized(shape_of(contest.base), budget)
            entries = tuple(Entry(label, (m,), guesses[label]) for label, m in made.items())
            yield named("parameters", task, name, entries=entries)


# -- equal peak memory, equal time ------------------------------------------------------------

ROWS = 4  # of full fine-tuning, whose peak is the limit
MOST_ROWS = 128


def fitting(contest: Contest, entry: Entry, limit: int, tokens: int) -> int:
    """The largest batch, or one near it, whose predicted peak in bytes is within the limit."""
    low, high = (peak(contest, entry, rows, tokens) for rows in (ROWS, 2 * ROWS))
    rows = ROWS + int((limit - low) / ((high - low) / ROWS))  # activations grow with the rows
    rows = min(max(rows, 1), MOST_ROWS)
    while rows > 1 and peak(contest, entry, rows, tokens) > limit:
        rows -= 1
    return rows


def peak(contest: Contest, entry: Entry, rows: int, tokens: int) -> int:
    """The predicted peak in bytes of a step of the entry on full rows, in 32 bits."""
    base, head = load(contest.base), contest.load_task().head
    return memory.predict(list(entry.methods), base, batch=rows, length=tokens, head=head).peak


def peaks(tasks: Tasks = ("pharmacy", "sst2-minilm", "permute")) -> Iterator[Contest]:
    """As many steps for all, each of as many rows as fit into one memory."""
    for task in tasks:
        contest, tokens = TASKS[task], TOKENS[task]
        limit = peak(contest, contest.entry(FULL), ROWS, tokens)
        full = replace(contest.entry(FULL), batch_size=ROWS)
        entries = tuple(
            replace(entry, batch_size=fitting(contest, entry, limit, tokens))
            for entry in contest.entries
            if entry.methods and entry.label != FULL
        )
        yield named("memory", task, entries=(full, *entries))


def step_seconds(contest: Contest, entry: Entry, device: str, steps: int = 30) -> float:
    """The seconds of one training step of `train`, alone on the device; the first third is warm-up
    and does not count."""
    task, base, seen = contest.load_task(), load(contest.base, device), []

    def tick(*_) -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        seen.append(time.perf_counter())

    given = dict(lr=1e-6, batch_size=contest.batch_size, evaluate=False, progress=False)
    with attach(base, list(entry.methods), head=task.head) as tuned:
        train(tuned, task, steps, on_step=tick, **given)
    timed = seen[len(seen) // 3 :]
    return (timed[-1] - timed[0]) / (len(timed) - 1)


def times(
    device: str,
    out: Path,
    steps: int = 30,
    tasks: Tasks = ("pharmacy", "sst2-minilm", "permute"),
) -> Iterator[Contest]:
    """As many steps for each entry as fit into the seconds of full fine-tuning. The seconds of a
    step are measured once and kept in `study_seconds_<task>.json` in the folder `out`."""
    for task in tasks:
        contest, path = TASKS[task], out / f"study_seconds_{task}.json"
        if path.exists():
            seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        else:
            entries = [entry for entry in contest.entries if entry.methods]
            seconds = {e.label: step_seconds(contest, e, device, steps) for e in entries}
            name = device if device == "cpu" else torch.cuda.get_device_name()
            kept = {"device": name, "torch": torch.__version__, "batch size": contest.batch_size}
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**kept, "seconds": seconds}, indent=1)
            path.write_text(text + "\n", encoding="utf-8")
        budget = contest.steps * seconds[FULL]
        entries = tuple(
            replace(entry, steps=max(2, round(budget / seconds[entry.label])))
            for entry in contest.entries
            if entry.label in seconds
        )
        yield named("time", task, entries=entries)


# -- LoRA without regret ----------------------------------------------------------------------

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
ALPHA = 32.0  # the same for all ranks, with its factor alpha / r
RANKS = (1, 4, 16, 64)


def present(base: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the targets that the model has."""
    return tuple(target for target in targets if target in Shape.named(base).targets)


def layers(tasks: Tasks = ("facts", "permute", "pharmacy")) -> Iterator[Contest]:
    """Rank 8 on all linear maps, attention, the MLP; then the two at the count of the first."""
    for task in tasks:
        base, lr = TASKS[task].base, TASKS[task].entry("LoRA").lr
        budget = accounting.count(LoRA(r=8, target_modules="all-linear"), Shape.named(base))
        entries = [TASKS[task].entry(FULL)]
        entries += [Entry("LoRA, all linear", (LoRA(8, ALPHA, "all-linear"),), lr)]
        for where, given in (("attention", ATTENTION), ("MLP", MLP)):
            targets = present(base, given)
            one = accounting.count(LoRA(1, target_modules=targets), Shape.named(base))
            entries += [
                Entry(f"LoRA, {where}", (LoRA(8, ALPHA, targets),), lr),
                Entry(
                    f"LoRA, {where}, equal count", (LoRA(round(budget / one), ALPHA, targets),), lr
                ),
            ]
        yield named("layers", task, entries=tuple(entries))


SEEN = 8192  # examples, in batches of any size
BATCHES = (8, 32, 128, 512)


def batches(tasks: Tasks = ("facts", "permute")) -> Iterator[Contest]:
    """The same number of examples seen in batches that grow; the rate is searched for each."""
    for task in tasks:
        lr = TASKS[task].entry("LoRA").lr
        entries = (
            TASKS[task].entry(FULL),
            *(Entry(f"LoRA, r = {r}", (LoRA(r, ALPHA, "all-linear"),), lr) for r in (8, 64)),
        )
        for size in BATCHES:
            changes = dict(entries=entries, batch_size=size, steps=SEEN // size)
            yield named("batch", task, str(size), **changes)


def rates(tasks: Tasks = ("facts", "permute")) -> Iterator[Contest]:
    """Full fine-tuning and LoRA of several ranks at seven rates each; see `bench.trends.ratio`."""
    for task in tasks:
        lr = TASKS[task].entry("LoRA").lr
        entries = (
            TASKS[task].entry(FULL),
            *(Entry(f"LoRA, r = {r}", (LoRA(r, ALPHA, "all-linear"),), lr) for r in RANKS),
        )
        yield named("rates", task, entries=entries, steps=200)


NUMBERS = (256, 1024, 4096)


def capacities() -> Iterator[Contest]:
    """Ever more random labels; sizes in pairs of equal count."""
    entries = (
        Entry(FULL, (FullFineTuning(),), 1e-3),
        Entry("LoRA, r = 1", (LoRA(1, ALPHA, "all-linear"),), 1e-2),
        Entry("LoRA, r = 4", (LoRA(4, ALPHA, "all-linear"),), 1e-2),
        Entry("Prefix tuning, P = 9", (PrefixTuning(9),), 1e-1),
        Entry("Prefix tuning, P = 36", (PrefixTuning(36),), 1e-1),
        Entry("Prompt tuning, P = 108", (PromptTuning(108),), 1e-1),
        Entry("(IA)³", (IA3(),), 1e-1),
        Entry("LayerNorm tuning", (LayerNormTuning(),), 3e-2),
    )
    for number in NUMBERS:
        options = {"number": number, "classes": CLASSES}
        yield Memorising(f"capacity-{number}", "labels", "tiny-gpt", 3000, 64, entries, options)


# -- scale ------------------------------------------------------------------------------------

GROWN_TASKS = {
    "facts": ("facts", {"people": 10}),
    "sentiment": ("sentiment", {}),
    "slots": ("slots", {}),
    "descend": ("letters", {"skill": "descend"}),
}
LADDERS = {  # first guesses: of the whole model, of LoRA
    "grown-0.2m": (3e-3, 1e-2),
    "grown-0.8m": (3e-3, 1e-2),
    "grown-3m": (1e-3, 3e-3),
    "grown-13m": (3e-4, 3e-3),
    "grown-58m": (1e-4, 1e-3),
    "smollm2-135m": (1e-4, 1e-3),
}


def scale(tasks: Tasks = tuple(GROWN_TASKS)) -> Iterator[Contest]:
    """Four tasks on every size: new facts, a known judgement, known sentences, a new order."""
    for base, (full, factors) in LADDERS.items():
        for task in tasks:
            name, options = GROWN_TASKS[task]
            entries = tuple(
                replace(entry, lr={FULL: full, "LoRA": factors}.get(entry.label, 3e-2))
                for entry in tournament.SMALL
                if entry.label in FEW[:4]
            )
            label = f"scale-{base.split('-')[-1]}-{task}"
            yield Contest(label, name, base, 300, 16, entries, options)


# -- the command ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Contests that answer one question: how they are made, how their runs are chosen, what reads
    them."""

    contests: Callable[..., Iterable[Contest]]
    read: Callable
    progress: type[Progress] = Progress


STUDIES = {
    "data": Study(data, trends.levels),
    "parameters": Study(parameters, trends.against),
    "memory": Study(peaks, trends.against),
    "time": Study(times, trends.against),
    "layers": Study(layers, trends.against),
    "batch": Study(batches, trends.penalties),
    "rates": Study(rates, trends.best_rates, Ladder),
    "capacity": Study(capacities, trends.capacity),
    "scale": Study(scale, trends.growth),
}


def made(
    study: str,
    device: str = "cpu",
    out: Path = Path(),
    steps: int = 30,
    tasks: Tasks | None = None,
) -> list[Contest]:
    """The contests of a study, all or those on some of its tasks. Those of "time" are timed on the
    device first, so many steps."""
    contests = STUDIES[study].contests
    only = {"tasks": tasks} if tasks else {}
    return list(contests(device, out, steps, **only) if study == "time" else contests(**only))


def fewest(contest: Contest, kind: type[Progress] = Progress) -> int:
    """How many runs a contest takes at least: three rates of each entry, on two tuning seeds, three
    of a head, and five seeds on the test; a ladder has all its rates on five."""
    heads = 1 + bool(contest.load_task().head)
    searched = (2 * RUNGS + 1) * len(LADDER_SEEDS) if kind is Ladder else 3 * 2
    return sum(
        searched * (heads if entry.methods else heads - 1) + len(SEEDS) for entry in contest.entries
    )


def plan(contests: Iterable[Contest], kind: type[Progress]) -> Iterator[str]:
    """A line for each contest: what is compared, and how many runs of how many steps it takes."""
    for contest in contests:
        runs = fewest(contest, kind)
        rates = {entry.label: search.around(entry.lr)[1] for entry in contest.entries if entry.lr}
        costs = [
            f"{entry.label} ({entry.steps or contest.steps} × {entry.batch_size or '-'})"
            for entry in contest.entries
            if entry.steps or entry.batch_size
        ]
        yield (
            f"{contest.name}: {len(rates)} methods on {contest.base}, at least {runs} runs of "
            f"{contest.steps} steps of {contest.batch_size}"
            + (f"; {', '.join(costs)}" if costs else "")
        )


def read(study: str, folder: Path) -> pd.DataFrame:
    """What the recorded contests of a study say, kept beside them as well."""
    contests = trends.recorded(study, folder)
    table = STUDIES[study].read(contests)
    facts = {"command": f"{MODULE} {study} --read", "contests": list(contests)}
    rows = json.loads(table.to_json(orient="records", force_ascii=False, double_precision=6))
    write(folder / f"trend_{study}.json", facts, {"rows": rows})
    return table


def smoke(contest: Contest) -> Contest:
    """The contest in two steps a run on few examples, to see that everything works."""
    entries = tuple(replace(e, steps=e.steps and 2) for e in contest.entries)
    size = min(contest.batch_size, 8)
    return replace(contest, steps=2, batch_size=size, dev=4, test=10, entries=entries)


def main() -> None:
    parser = tournament.parser_of(__doc__.split("\n\n")[0], ())
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--tasks", nargs="*", help="the contests on these tasks alone")
    parser.add_argument("--plan", action="store_true", help="say what it takes, and run nothing")
    parser.add_argument("--read", action="store_true", help="say what the recorded contests show")
    for action in parser._actions:
        if action.dest == "contests":
            action.choices, action.default = None, None
            action.help = "these contests alone"
    options = parser.parse_args()
    study = STUDIES[options.study]
    if options.judge:
        for path in sorted(options.out.glob("study_*-*.json")):
            tournament.write(path, json.loads(path.read_text(encoding="utf-8")))
            print(f"{path}: judged")
        return
    if options.read:
        table = read(options.study, options.out)
        print(table.to_string(index=False))
        return
    tasks, steps = tuple(options.tasks or ()), 6 if options.smoke else 30
    contests = made(options.study, options.device, options.out, steps, tasks)
    if options.contests:
        known = {contest.name: contest for contest in contests}
        if unknown := set(options.contests) - set(known):
            parser.error(f"no contest {', '.join(sorted(unknown))}: there are {', '.join(known)}")
        contests = [known[name] for name in options.contests]
    if options.plan:
        print(*plan(contests, study.progress), sep="\n")
        return
    if options.smoke:
        contests = [smoke(contest) for contest in contests]
    command = f"{MODULE} {options.study}"
    tournament.play_all(contests, options, "study", command, study.progress)


if __name__ == "__main__":
    main()
