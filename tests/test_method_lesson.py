"""What lesson 14 says of the recorded contests and of the calculator's check."""

import json

import pytest

from peftlab import figures
from peftlab.bases.data import data_path
from peftlab.bench import results

CEILING = {"LoRA", "DoRA", "QLoRA", "Houlsby adapter", "Full fine-tuning", "Half pruned + LoRA"}


def told(name):
    return results.read(name).comparisons.set_index("label")


def test_what_adds_to_the_weights_learns_all_facts_and_the_rest_less_than_a_third():
    means = told("facts")["mean"]
    assert set(means[means == 1].index) == CEILING
    assert 0.7 < means["(IA)³"] < 0.8
    assert (means.drop([*CEILING, "(IA)³"]) < 1 / 3).all()


def test_the_methods_at_the_ceiling_are_not_told_apart():
    for name in ("facts", "permute"):
        rows = told(name).loc[list(CEILING)]
        assert all(CEILING.isdisjoint(others) for others in rows.better_than)


def test_a_task_with_room_above():
    count, rows = results.read("letters-double_histogram"), told("letters-double_histogram")
    means = rows["mean"]
    assert round(means["Full fine-tuning"], 2) == 0.70 and round(means["LoRA"], 3) == 0.675
    assert round(means["(IA)³"], 2) == 0.19
    assert count.difference("Full fine-tuning", "LoRA").verdict == "not told apart"
    assert set(rows.worse_than["(IA)³"]) == {"Full fine-tuning", "LoRA", "LoRA, rank 1"}
    few = results.read("facts-2").difference("Prefix tuning (P-tuning v2)", "LoRA")
    assert few.verdict == "not told apart"


def test_prefix_and_layer_norm_tuning_depend_on_the_seed():
    runs = results.read("permute").runs.groupby("label").exact
    spread = runs.max() - runs.min()
    assert set(spread[spread > 0.5].index) == {"Prefix tuning (P-tuning v2)", "LayerNorm tuning"}


@pytest.mark.parametrize("name", results.names())
def test_the_figure_shows_every_run(name):
    result = results.read(name)
    fig = figures.score_intervals(result, "title")
    seeds, means, *references = fig.data
    lines = result.references.label.nunique() if len(result.references) else 0
    assert len(references) == len(fig.layout.shapes) == lines
    assert len(seeds.x) == len(result.runs) and len(means.x) == len(result.facts["entries"])
    assert list(means.x) == sorted(means.x)


def test_the_calculator_is_near_what_a_gpu_took():
    rows = json.loads(data_path("results", "check_calculator.json").read_text("utf-8"))["rows"]
    apart = {row["name"]: abs(row["predicted"] / row["measured"] - 1) for row in rows}
    near = [row for row in rows if apart[row["name"]] < 0.1]
    assert len(near) >= 23 and max(apart.values()) < 0.13
    assert {"QLoRA", "LoRA", "Full fine-tuning"} <= {row["kind"] for row in near}
    assert any(row["checkpointing"] for row in near) and any(
        row["model"] == "llama-2-70b" for row in near
    )
