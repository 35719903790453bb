"""What is given and wanted of a choice."""

from __future__ import annotations

from dataclasses import dataclass

from peftlab.bases.shapes import Shape
from peftlab.memory.calculator import GPUS

TASKS = ("classification", "tagging", "generation")
SERVERS = ("peft", "vllm", "llama.cpp", "own code")
SKILLS = ("form", "knowledge")
GOALS = ("cost", "score")


@dataclass(frozen=True)
class Need:
    """What is given and wanted. `gpu` trains it; `batch` rows of `length` tokens a step.

    `together`: tasks whose requests meet in one batch. `weights_may_change`: whether the served
    model's own tensors may be touched. `no_delay`: an answer may not take longer than the base's.
    `megabytes`: a task's file at the most, in float32. `skill`: a new form, or new knowledge.
    `keep`: what the base can do must not be lost. `goal`: the least cost, or the best score at any
    cost. `four_bits`: whether the base may be rounded to four bits.
    """

    model: str = "llama-3-8b"
    task: str = "generation"
    gpu: str = "A100 80 GB"
    batch: int = 1
    length: int = 512
    together: int = 1
    weights_may_change: bool = True
    no_delay: bool = False
    megabytes: int | float | None = None
    examples: int = 1000
    skill: str = "form"
    keep: bool = False
    serve: str = "peft"
    goal: str = "cost"
    four_bits: bool = True

    def __post_init__(self):
        allowed = {"task": TASKS, "gpu": GPUS, "skill": SKILLS, "serve": SERVERS, "goal": GOALS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed is {', '.join(values)}")
        for name in ("batch", "length", "together", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: allowed is at least 1")
        Shape.named(self.model)
