"""SmolLM2-135M and MiniLM themselves, where their packages are installed."""

import importlib.util

import pytest
import torch
from models import U32

import peftlab
from peftlab.accounting import count
from peftlab.bases.real import REAL
from peftlab.methods import METHODS
from peftlab.methods.heads import Classification

# BitFit finds no bias in a Llama, NF4 and pruning train nothing, and taking structures out needs
# to be told how many: what is said then is tested elsewhere.
ALONE = {"bitfit", "nf4", "prune", "prune_structures"}


def loaded(name: str, monkeypatch) -> peftlab.bases.Base:
    known = REAL[name]
    modules = [known.package.replace("-", "_"), *known.needs.split()]
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed: {known.install}")
    monkeypatch.delenv("PEFTLAB_BASES", raising=False)
    return peftlab.load(name)


@pytest.fixture(scope="module")
def smollm():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield loaded("smollm2-135m", monkeypatch)


@pytest.fixture(scope="module")
def minilm():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield loaded("minilm", monkeypatch)


def test_smollm_is_what_its_configuration_says(smollm):
    shape = smollm.anatomy.shape
    assert shape.family == "llama" and shape.tied and shape.parameters() == 134_515_008
    assert count(peftlab.LoRA(), "smollm2-135m") == peftlab.LoRA().parameters(shape)
    assert smollm.tokenizer.eos_token == smollm.tokenizer.pad_token == "<|im_end|>"


def test_smollm_answers(smollm):
    assert smollm.generate(["The capital of France is"], max_new_tokens=2) == [" Paris."]
    said = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smollm.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    [alone] = smollm.generate([prompt], max_new_tokens=12)
    assert "Paris" in alone
    # Beside a longer prompt the shorter one is padded, with the token that also ends a text.
    assert smollm.generate([prompt, f"{prompt} Well,"], max_new_tokens=12)[0] == alone


def test_smollm_predicts_better_than_its_words_shuffled(smollm):
    right, wrong = "Paris is the capital of France.", "of capital Paris France is the."
    assert smollm.loss([right]) < smollm.loss([wrong])


def test_smollm_has_room_for_the_answers_of_the_tasks(smollm):
    for name in ("facts", "slots", "letters"):
        task = peftlab.tasks.load(name)
        ids = smollm.tokenizer([e.target for e in task.test])["input_ids"]
        assert max(map(len, ids)) < task.max_new_tokens, name  # and the end of text


@pytest.mark.parametrize("name", sorted(METHODS.keys() - ALONE))
def test_every_method_takes_a_step_on_smollm(smollm, name):
    task = peftlab.tasks.load("facts")
    before = smollm.fingerprint()
    tuned = peftlab.attach(smollm, METHODS[name]())
    try:
        tuned.count()  # closed form and measured, compared
        tuned.batch_loss(task.batch_for(tuned, task.train[:1])).backward()
        gradients = [p.grad for p in tuned.trainable.values()]
        assert any(g is not None and g.abs().max() > 0 for g in gradients)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    finally:
        tuned.detach()
    assert smollm.fingerprint() == before


def test_the_facts_are_scored_on_smollm(smollm):
    """It knows neither the people nor the format."""
    task = peftlab.tasks.load("facts")
    with peftlab.attach(smollm, peftlab.PrefixTuning()) as tuned:
        scores = task.score(tuned, task.test[:2])
    assert set(scores.values()) == {0.0} and "valid_format" in scores


def test_minilm_reads_and_has_no_words_to_say(minilm):
    assert minilm.kind == "encoder" and not minilm.has_lm_head
    assert minilm.tokenizer.pad_token == "[PAD]" and minilm.context == 512
    with pytest.raises(ValueError, match="has no head of its own: attach it with one"):
        minilm(torch.tensor([[101, 102]]))
    texts = ["a cat sleeps on the sofa", "a kitten naps on the couch", "stocks fell sharply today"]
    batch = minilm.tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = minilm.anatomy.backbone(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert pooled[0] @ pooled[1] > 0.5 > pooled[0] @ pooled[2]  # what it was trained for


def test_minilm_under_its_heads(minilm):
    task = peftlab.tasks.load("entities")
    before = minilm.fingerprint()
    tuned = peftlab.attach(minilm, peftlab.LoRA(), head=task.head)
    tuned.batch_loss(task.batch_for(tuned, task.train[:4])).backward()
    assert task.score(tuned, task.test[:4]).keys() == {"f1", "accuracy"}
    tuned.detach()
    tuned = peftlab.attach(minilm, peftlab.LoRA(), head=Classification(("no", "yes")))
    ids = minilm.tokenizer(["a longer text", "short"], return_tensors="pt", padding=True)
    together = tuned(ids["input_ids"], ids["attention_mask"])
    alone = minilm.tokenizer(["short"], return_tensors="pt")["input_ids"]
    # Padding changes nothing but the order of sums, of at most 1,536 terms, in 6 layers.
    assert (together[1] - tuned(alone)[0]).abs().max() <= 6 * 1536 * U32 * together.abs().max()
    tuned.detach()
    assert minilm.fingerprint() == before
