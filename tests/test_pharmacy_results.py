"""What lesson 11 quotes: LoRA learns the names, live on a CPU and on the whole list."""

import json

import pytest

from peftlab._data import data_path
from peftlab.accounting import count
from peftlab.experiments import compare_real, time_pharmacy
from peftlab.tasks import load

MAIN = "drug_name_new_wordings"
POINTS = 0.40  # that LoRA has to be above the untuned model


def read(name: str) -> dict:
    path = data_path("results", f"{name}.json")
    if not path.exists():
        pytest.skip(f"{path.name} was not made yet")
    return json.loads(path.read_text())


def test_twenty_medicines_are_learned_on_a_cpu_in_three_minutes():
    made = read("time_pharmacy")
    assert made["medicines"] == time_pharmacy.MEDICINES >= 20
    assert made["method"] == time_pharmacy.METHOD.to_dict()
    assert (made["steps"], made["lr"]) == (time_pharmacy.STEPS, time_pharmacy.RATE)
    task = load("pharmacy", medicines=made["medicines"])
    assert made["questions"] == {"train": len(task.train), "test": len(task.test)}
    assert [row["seed"] for row in made["runs"]] == list(time_pharmacy.SEEDS)
    for row in made["runs"]:
        assert row["seconds"] < 180
        assert row["after"][MAIN] - made["before"][MAIN] >= POINTS


def test_the_whole_list_is_learned_and_every_method_ran_on_every_seed():
    made = read("real_pharmacy")
    runs = made["runs"]
    assert {row["label"] for row in runs} == set(compare_real.METHODS) - {"BitFit"}
    for row in runs:
        methods = compare_real.METHODS[row["label"]][0]
        assert row["methods"] == [method.to_dict() for method in methods]
        assert row["trained"] == sum(count(method, made["base"]) for method in methods)
    for label in {row["label"] for row in runs}:
        mine = [row for row in runs if row["label"] == label]
        assert [row["seed"] for row in mine] == made["seeds"] and len({r["lr"] for r in mine}) == 1
    names = [row[MAIN] for row in runs if row["label"] == "LoRA"]
    assert min(names) - made["untuned"][MAIN] >= POINTS
