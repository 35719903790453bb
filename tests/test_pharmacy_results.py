"""What lesson 11 quotes: LoRA learns the names, live on a CPU and on the whole list."""

import json

from peftlab._data import data_path
from peftlab.accounting import count
from peftlab.experiments import compare_real, time_pharmacy
from peftlab.tasks import load

MAIN = "drug_name_new_wordings"
POINTS = 0.40  # that LoRA has to be above the untuned model


def rows() -> list[dict]:
    """The tries and runs of the comparison, of the whole file or of what there is so far."""
    made = data_path("results", "real_pharmacy.json")
    if made.exists():
        report = json.loads(made.read_text())
        return report["tried"] + report["runs"]
    return [json.loads(line) for line in made.with_suffix(".jsonl").read_text().splitlines()]


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


def test_every_method_had_the_same_number_of_tries():
    tried = {}
    for row in rows():
        methods, grid = compare_real.METHODS[row["label"]]
        assert row["methods"] == json.loads(json.dumps([m.to_dict() for m in methods]))
        assert row["trained"] == sum(count(method, time_pharmacy.BASE) for method in methods)
        assert row["steps"] == compare_real.SETTINGS["pharmacy"].steps and row["lr"] in grid
        if row["split"] == "dev":
            assert row["seed"] == compare_real.TUNING_SEED
            tried.setdefault(row["label"], []).append(row["lr"])
    wanted = {"LoRA", "Full fine-tuning", "Prompt tuning", "P-tuning v2", "Prefix tuning", "(IA)³"}
    assert wanted <= tried.keys()
    for label, rates in tried.items():
        assert sorted(rates) == sorted(compare_real.METHODS[label][1])


def test_a_run_on_test_has_the_rate_that_was_best_on_dev():
    for row in rows():
        if row["split"] == "test":
            assert row["seed"] in compare_real.SEEDS
            its = [r for r in rows() if (r["label"], r["split"]) == (row["label"], "dev")]
            assert row["lr"] == max(its, key=lambda r: (r[MAIN], -r["last_loss"]))["lr"]


def test_lora_learns_the_names_of_the_whole_list():
    """The untuned model is at 0: it names none of the first 40 that are asked in the lesson."""
    names = [r[MAIN] for r in rows() if (r["label"], r["split"]) == ("LoRA", "test")]
    assert len(names) >= 2 and min(names) >= POINTS
