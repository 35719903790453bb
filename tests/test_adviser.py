"""The adviser: written scenarios, exact properties held to the package, code that PEFT runs."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers
import yaml

import peftlab
from peftlab import adviser
from peftlab.memory.adviser import FLOW, RECIPES, Need, advise, megabytes
from peftlab.memory.adviser.evidence import about, comparisons, near, unbeaten
from peftlab.memory.calculator import KINDS, MODELS
from peftlab.methods import Method

SCENARIOS = yaml.safe_load(open(__file__.replace("test_adviser.py", "adviser_scenarios.yaml")))
NAMES = [scenario["name"] for scenario in SCENARIOS]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=NAMES)
def test_a_scenario(scenario):
    advice = advise(Need(**scenario["need"]), scenario.get("rows", []))
    assert (advice.outcome, advice.method) == (scenario["outcome"], scenario.get("method", ""))
    ruled_out = {kind: why for step in advice.path for kind, why in step.out.items()}
    for kind, words in scenario.get("out", {}).items():
        assert words in ruled_out[kind], (kind, ruled_out)
    for words in scenario.get("relax", []):
        assert any(words in change for change in advice.relax), advice.relax
    assert len(scenario["because"].split()) > 4  # somebody said why
    assert not set(advice.left) & set(ruled_out)
    assert set(advice.left) | set(ruled_out) == set(RECIPES)
    assert advice.why and all(advice.why)


def test_the_scenarios_are_many_and_of_every_outcome():
    assert len(SCENARIOS) >= 25 and len(set(NAMES)) == len(NAMES)
    outcomes = [scenario["outcome"] for scenario in SCENARIOS]
    assert min(outcomes.count(outcome) for outcome in adviser.OUTCOMES) >= 5
    assert sum("contradiction" in name or "hopeless" in name for name in NAMES) >= 5
    asked = {key for scenario in SCENARIOS for key in scenario["need"]}
    assert asked == set(Need.__dataclass_fields__)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if "relax" in s], ids=str)
def test_what_is_to_be_relaxed_is_the_least(scenario):
    """One question less helps, or else no single one does."""
    advice = advise(Need(**scenario["need"]), [])
    single = [change for change in advice.relax if change.count("?") == 1]
    assert advice.relax and (single == list(advice.relax) or not single)


# --- exact properties ------------------------------------------------------------------------

FAMILY = {"BitFit": "tiny-gpt"}


def method_of(kind: str) -> Method:
    return KINDS[kind].make(min(KINDS[kind].sizes))


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_says_what_the_method_does(kind):
    """Whether it trains the model's own tensors, and whether its change can be merged."""
    recipe = RECIPES[kind]
    base = peftlab.load(FAMILY.get(kind, "tiny-llama"))
    with peftlab.attach(base, method_of(kind)) as tuned:
        assert recipe.in_the_weights == method_of(kind).in_place
        try:
            tuned.merge(requantise=kind == "QLoRA")
            merges = any(site.can_merge for site in tuned._sites)
        except ValueError:
            merges = False
        assert recipe.merges == merges
    assert recipe.defaults and all(d.reason and d.value for d in recipe.defaults)
    assert recipe.otherwise and recipe.because.startswith(kind.removesuffix(" adapter"))


def test_the_recipes_are_the_calculators_methods():
    assert set(RECIPES) == set(KINDS) - {"LoRA, q and v"}
    soft = {kind for kind, recipe in RECIPES.items() if recipe.soft}
    assert soft == {kind for kind in RECIPES if KINDS[kind].size == "virtual tokens"}


def test_the_file_is_as_large_as_said_and_shrinks_to_the_limit():
    need = Need(model="llama-3-8b")
    assert megabytes("Prompt tuning", need) == 32 * 4096 * 4 / 1e6
    assert megabytes("Prompt tuning", replace(need, megabytes=0.3)) == 16 * 4096 * 4 / 1e6
    assert megabytes("(IA)³", need) == 4 * 32 * (1024 + 1024 + 14336) / 1e6
    assert megabytes("LoRA", replace(need, megabytes=1)) == megabytes(
        "LoRA", replace(need, megabytes=45)
    )  # the least rank, whether it helps or not


# --- code to copy ----------------------------------------------------------------------------

SMALL = {
    "llama-3-8b": transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    ),
    "bert-large": transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "t5-large": transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    ),
}  # fmt: skip
LEAVES = [
    (kind, model, task)
    for kind in RECIPES
    for model, tasks in (
        ("llama-3-8b", adviser.TASKS),
        ("bert-large", ("classification", "tagging")),
        ("t5-large", ("generation",)),
    )
    for task in tasks
    if not (kind == "BitFit" and model != "bert-large")
]


@pytest.mark.parametrize(("kind", "model", "task"), LEAVES)
def test_the_code_runs_and_trains(kind, model, task, monkeypatch):
    """As it stands, with a small model of the family in the place of the one that is loaded."""
    need = Need(model=model, task=task)
    code, asked = RECIPES[kind].code(need, KINDS[kind].usual), []

    def small(auto):
        def from_pretrained(name, dtype=None, num_labels=None, quantization_config=None):
            asked.append((name, quantization_config))
            config = SMALL[model]
            config.num_labels = num_labels or 2
            return auto.from_config(config, dtype=dtype)

        return from_pretrained

    for name in ("CausalLM", "SequenceClassification", "TokenClassification", "Seq2SeqLM"):
        auto = getattr(transformers, f"AutoModelFor{name}")
        monkeypatch.setattr(auto, "from_pretrained", small(auto))
    monkeypatch.setattr(peftlab, "load", lambda name: asked.append((name, None)) or BASE)
    here: dict = {}
    exec(code, here)
    ((name, codes),) = asked
    assert "/" in name and (codes is not None) == (kind == "QLoRA")
    if kind == "Houlsby adapter":
        here["tuned"].detach()
        return
    network = here["model"]
    names = [n for n, p in network.named_parameters() if p.requires_grad]
    assert names
    if "config" in here:
        assert isinstance(network, peft.PeftModel)
        assert here["config"].task_type == network.peft_config["default"].task_type
    ids = torch.randint(1, 64, (2, 6))
    labels = torch.zeros(2, dtype=torch.long) if task == "classification" else ids % 2
    if kind == "Prompt tuning" and task == "tagging":  # as the code says
        labels = torch.nn.functional.pad(labels, (KINDS[kind].usual, 0), value=-100)
    given = {"labels": ids if task == "generation" else labels}
    loss = network(input_ids=ids, attention_mask=torch.ones_like(ids), **given).loss
    loss.backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


BASE = peftlab.load("tiny-gpt")


# --- recorded comparisons --------------------------------------------------------------------


def row(**more) -> dict:
    found = dict(task="e2e", base="smollm2-135m", label="LoRA", better_than=[], worse_than=[])
    return found | dict(n=5, interval=[0.4, 0.5]) | more


def test_comparisons_are_read_and_bad_ones_refused(tmp_path):
    assert comparisons(tmp_path) == []
    file = tmp_path / "bench_e2e.json"
    file.write_text(json.dumps({"comparisons": [row()]}))
    assert comparisons(tmp_path) == [row()]
    file.write_text(json.dumps({"comparisons": [{"task": "e2e"}]}))
    with pytest.raises(ValueError, match="bench_e2e.json: a row without base, better_than"):
        comparisons(tmp_path)


def test_which_comparisons_decide():
    rows = [row(), row(task="wnut17"), row(label="Prune"), row(task="sst2_smollm2")]
    assert about(rows, "generation", ["LoRA"]) == [row()]
    assert about(rows, "classification", ["LoRA"]) == [row(task="sst2_smollm2")]
    assert near(row(), "smollm2-360m") and not near(row(n=4), "smollm2-360m")
    assert not near(row(), "llama-3-8b")
    assert near(row(dev=100), "smollm2-360m") and not near(row(dev=68), "smollm2-360m")
    labels = ["LoRA", "DoRA", "(IA)³"]
    assert unbeaten([row(better_than=["DoRA"])], labels) == ["LoRA", "(IA)³"]
    assert unbeaten([row(worse_than=["DoRA"])], labels) == ["DoRA", "(IA)³"]
    assert unbeaten([row(worse_than=["Prune"])], labels) == labels  # it is not to be had


def test_bad_needs_are_refused():
    for fields, words in (
        (dict(task="poetry"), "task='poetry': allowed is classification"),
        (dict(gpu="3dfx"), "gpu='3dfx'"),
        (dict(together=0), "together=0: allowed is at least 1"),
        (dict(model="gpt9"), "unknown model 'gpt9'"),
    ):
        with pytest.raises(ValueError, match=words):
            Need(**fields)
    assert all(Need(model=model).model == model for model in MODELS)


def test_every_question_can_rule_out_and_can_let_through():
    said = {key: set() for key in FLOW}
    for scenario in SCENARIOS:
        for step in advise(Need(**scenario["need"]), []).path:
            said[step.key].add(bool(step.out))
    assert all(both == {True, False} for both in said.values()), said


def test_no_recorded_contest_counts_for_eight_billion():
    """As lesson 14 says; for a base ten times SmolLM2's size its contests count."""
    rows = comparisons()
    assert not any(near(row, "llama-3-8b") for row in rows)
    assert any(near(row, "tinyllama-1.1b") for row in rows)


def test_every_recorded_contest_can_be_read_for_every_model():
    """Whatever base it was held on; MiniLM is none of the models that one can ask for."""
    rows = comparisons()
    assert {row["base"] for row in rows} >= {"minilm", "smollm2-135m", "tiny-gpt"}
    assert {near(row, model) for row in rows for model in MODELS} == {True, False}
