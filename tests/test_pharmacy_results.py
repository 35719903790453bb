"""What lesson 11 quotes: LoRA learns the names, live on a CPU and on the whole list."""

import json

from peftlab.bases.data import data_path
from peftlab.experiments import compare_real, time_pharmacy
from peftlab.tasks import load

MAIN = "drug_name_new_wordings"
POINTS = 0.40  # that LoRA has to be above the untuned model


def test_twenty_medicines_are_learned_on_a_cpu_in_three_minutes():
    made = json.loads(data_path("results", "time_pharmacy.json").read_text())
    assert made["medicines"] == time_pharmacy.MEDICINES >= 20
    assert made["method"] == time_pharmacy.METHOD.to_dict()
    assert (made["steps"], made["lr"]) == (time_pharmacy.STEPS, time_pharmacy.RATE)
    task = load("pharmacy", medicines=made["medicines"])
    assert made["questions"] == {"train": len(task.train), "test": len(task.test)}
    assert [row["seed"] for row in made["runs"]] == list(time_pharmacy.SEEDS)
    for row in made["runs"]:
        assert row["seconds"] < 180
        assert row["after"][MAIN] - made["before"][MAIN] >= POINTS


def test_lora_learns_the_names_of_the_whole_list():
    found = compare_real.recorded("pharmacy")
    names = found.runs[found.runs["label"] == "LoRA"][MAIN]
    assert len(names) == 3 and min(names) - found.report["untuned"][MAIN] >= POINTS
