"""Lesson 14, which method: a floor of memory, what fits, what can be mixed, what evidence is."""

from __future__ import annotations

from itertools import product

from peftlab.exercises import exercise, question
from peftlab.exercises.forms import a_number
from peftlab.memory.adviser import Need, advise
from peftlab.memory.adviser.evidence import ENOUGH, unbeaten
from peftlab.memory.calculator import calculate


# --- predict first -----------------------------------------------------------------------------
@question(
    "A model of 8 billion parameters is frozen in bfloat16, and a LoRA of 42 million trains beside "
    "it. Which of these is the least GPU on which a step of 1 × 512 tokens fits, with "
    "checkpointing?",
    {
        "a": ("T4, 16 GB", "The frozen weights alone have 16 GB."),
        "b": ("L4, 24 GB", "16 GB of weights, and little beside them."),
        "c": ("A100, 40 GB", "Gradients and moments belong to the 42 million alone."),
        "d": ("A100, 80 GB", "16 bytes a parameter is what full fine-tuning takes."),
    },
)
def smallest():
    told = calculate("llama-3-8b", "LoRA", 16, 1, 512, checkpointing=True)
    fits = {"a": "T4 16 GB", "b": "L4 24 GB", "c": "A100 40 GB", "d": "A100 80 GB"}
    letter = next(letter for letter, gpu in fits.items() if told.fits(gpu))
    return letter, f"The calculator says {told.peak / 1e9:.1f} GB at the peak."


@question(
    "Fifty customers send requests that meet in one batch, and no answer may take longer than the "
    "base's. What do you take?",
    {
        "a": ("LoRA, merged", "What is merged has one customer's weights for the whole batch."),
        "b": ("LoRA, beside the weights", "It mixes fifty, and adds two products to every layer."),
        "c": ("nothing: relax one of the two", "A merge needs one task, a mix needs an addition."),
        "d": ("prompt tuning", "Its vectors are read by attention at every answer."),
    },
)
def contradiction():
    advice = advise(Need(together=50, no_delay=True, serve="vllm"), [])
    letter = "c" if advice.outcome == "nothing fits" else "b"
    return letter, "The adviser rules all of them out. " + " ".join(advice.relax)


# --- the floor of memory -----------------------------------------------------------------------
def floor_solution(parameters, trained, bits):
    return parameters * bits / 8 + trained * (4 + 4 + 8)


@exercise(
    "The floor of memory", solution=floor_solution, difficulty=1, importance=5, minutes=6,
    mistakes=(
        (lambda n, trained, bits: n * bits / 8 + 4 * trained,
         "what trains has a gradient and AdamW's two moments too"),
        (lambda n, trained, bits: n * bits / 8 + 12 * trained,
         "a trained number has four of 4 bytes: weight, gradient, two moments"),
        (lambda n, trained, bits: n * (bits / 8 + 16),
         "gradients and moments belong to what trains, not to what is frozen"),
        (lambda n, trained, bits: n * bits + 16 * trained,
         "bits are not bytes: divide by 8")),
    praise="{right:,.0f} bytes stay through the step, before any activation",
    otherwise="the floor is not {given:,.0f} bytes", again=(7_000_001, 30_011, 4),
    hints=(
        "Frozen numbers take their bits and nothing else.",
        "A trained number is in float32: its weight, its gradient, and two moments of AdamW."),
)  # fmt: skip
def floor(answer, parameters=100_003, trained=401, bits=16):
    return float(a_number(answer(parameters, trained, bits)))


# --- merged, mixed, or neither -----------------------------------------------------------------
def can_serve_solution(merges, mixes, tasks, no_delay):
    if tasks > 1:
        return mixes and not no_delay
    return merges or not no_delay


@exercise(
    "Merged, mixed, or neither", solution=can_serve_solution, difficulty=2, importance=4, minutes=8,
    mistakes=(
        (lambda merges, mixes, tasks, no_delay: (mixes or tasks == 1) and (merges or not no_delay),
         "what is merged serves one task: with several in a batch it cannot save the delay"),
        (lambda merges, mixes, tasks, no_delay: mixes if tasks > 1 else merges,
         "a single task that may take longer asks for nothing"),
        (lambda merges, mixes, tasks, no_delay: merges or not no_delay,
         "several tasks in one batch need a method that can be mixed"),
        (lambda merges, mixes, tasks, no_delay: mixes or tasks == 1,
         "no delay means that it has to be merged")),
    praise="all sixteen cases: several tasks and no delay exclude each other, whatever you take",
    otherwise="one of the sixteen cases is another: {case}",
    hints=(
        "Begin with several tasks. Can any of them be merged?",
        "One task is left: it may be merged, and then it adds no delay."),
)  # fmt: skip
def can_serve(answer):
    cases = product((True, False), (True, False), (1, 7), (True, False))
    return {str(case): bool(answer(*case)) for case in cases}


# --- what rows allow to say --------------------------------------------------------------------
ROWS = (
    {"label": "LoRA", "better_than": ["DoRA"], "worse_than": [], "n": 5},
    {"label": "(IA)³", "better_than": ["LoRA"], "worse_than": [], "n": 3},
    {"label": "Prompt tuning", "better_than": [], "worse_than": ["LoRA"], "n": 6},
    {"label": "BitFit", "better_than": [], "worse_than": ["Full fine-tuning"], "n": 8},
)
LABELS = ("LoRA", "DoRA", "(IA)³", "Prompt tuning", "BitFit")


def not_beaten_solution(rows, methods):
    beaten = set()
    for row in rows:
        if row["n"] >= 5:
            beaten |= set(row["better_than"])
            if set(row["worse_than"]) & set(methods):
                beaten.add(row["label"])
    return [method for method in methods if method not in beaten]


def _beaten(enough=5, better=True, worse=True, any_worse=False):
    def wrong(rows, methods):
        rows = [row for row in rows if row["n"] >= enough]
        out = {name for row in rows for name in row["better_than"] if better}
        for row in rows:
            if worse and (any_worse and row["worse_than"] or set(row["worse_than"]) & set(methods)):
                out.add(row["label"])
        return [method for method in methods if method not in out]

    return wrong


@exercise(
    "What the rows allow to say", solution=not_beaten_solution, difficulty=3, importance=4,
    minutes=10,
    mistakes=(
        (_beaten(enough=0), "three seeds are no verdict: leave out rows with n under 5"),
        (_beaten(better=False), "a row's better_than says who was beaten as well"),
        (_beaten(worse=False), "a row's worse_than says that its own label was beaten"),
        (_beaten(any_worse=True), "who beat it is not among the methods that you can have")),
    praise="{right}: no other of the five was better, as far as five seeds can tell",
    otherwise="these are not the ones that were not beaten: {given}",
    right=lambda: unbeaten(
        [row for row in ROWS if row["n"] >= ENOUGH and row["label"] in LABELS], list(LABELS)
    ),
    hints=(
        "Skip rows with fewer than five seeds. Then collect a set of those that were beaten.",
        "Two ways to be beaten: in another row's better_than, or by your own worse_than."),
)  # fmt: skip
def not_beaten(answer):
    return list(answer([dict(row) for row in ROWS], list(LABELS)))
