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


def test_every_method_had_the_same_number_of_tries():
    made = read("real_pharmacy")
    for row in made["tried"] + made["runs"]:
        methods = compare_real.METHODS[row["label"]][0]
        assert row["methods"] == json.loads(json.dumps([m.to_dict() for m in methods]))
        assert row["trained"] == sum(count(method, made["base"]) for method in methods)
        assert row["steps"] == made["steps"]
    rates = {label: sorted(grid) for label, grid in made["grids"].items()}
    assert len({len(grid) for grid in rates.values()}) == 1
    tried = {label: [] for label in rates}
    for row in made["tried"]:
        assert row["seed"] == made["tuning seed"] and row["split"] == "dev"
        tried[row["label"]].append(row["lr"])
    assert {label: sorted(its) for label, its in tried.items()} == rates


def test_a_run_on_test_has_the_rate_that_was_best_on_dev():
    made = read("real_pharmacy")
    for row in made["runs"]:
        assert row["seed"] in made["seeds"] and row["split"] == "test"
        its = [try_ for try_ in made["tried"] if try_["label"] == row["label"]]
        assert row["lr"] == max(its, key=lambda r: (r[MAIN], -r["last_loss"]))["lr"]


def test_lora_learns_the_names_of_the_whole_list():
    made = read("real_pharmacy")
    names = [row[MAIN] for row in made["runs"] if row["label"] == "LoRA"]
    assert names and min(names) - made["untuned"].get(MAIN, 0.0) >= POINTS
