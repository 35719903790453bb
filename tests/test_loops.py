"""`as_module` in other people's loops, and the word that is said where they leave it out."""

import copy
import pickle

import pytest
import torch
import transformers
from accelerate import Accelerator
from models import ON_PLAIN, SENSES, TAGS, adapted, letters, tiny, token_ids
from safetensors.torch import load_file
from torch.optim.optimizer import _global_optimizer_pre_hooks as asked

from peftlab import (
    AdaLoRA,
    BitFit,
    FullFineTuning,
    LayerNormTuning,
    LoRA,
    PfeifferAdapter,
    PromptTuning,
    Prune,
    QLoRA,
    attach,
    train,
)
from peftlab.sites import MaskedWeight


def batch_of(tuned, rows=4):
    """Ids, mask and labels as transformers' collators make them for this model."""
    ids = token_ids(rows, 7)
    labels = ids.clone()
    if tuned.head is not None:
        labels = ids % tuned.head.classes
        labels = labels[:, 0] if tuned.head.kind == "classification" else labels
        labels = labels[:, :2] if tuned.head.kind == "spans" else labels
    else:
        labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def rows_of(tuned, count=12):
    """The same as a data set: a list of rows."""
    whole = batch_of(tuned, count)
    return [{key: tensor[i] for key, tensor in whole.items()} for i in range(count)]


def moved(tuned, start):
    return {name for name, p in tuned.trainable.items() if not torch.equal(p, start[name])}


def start_of(tuned):
    return {name: p.detach().clone() for name, p in tuned.trainable.items()}


def quiet(tmp_path, **options):
    options = dict(per_device_train_batch_size=4, learning_rate=1e-2, report_to=[]) | options
    return dict(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, seed=3) | options


def trainer(model, tuned, tmp_path, callbacks=(), **options):
    args = transformers.TrainingArguments(**quiet(tmp_path, **{"save_strategy": "no", **options}))
    rows = rows_of(tuned)
    return transformers.Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks)
    )


@ON_PLAIN
def test_it_is_the_adapted_model(case, family):
    """Its parameters, its loss and its gradients; and its state is the adapter's alone."""
    tuned = adapted(case, family)
    module, batch = tuned.as_module(), batch_of(tuned)
    trains = {id(p) for p in module.parameters() if p.requires_grad}
    assert trains == {id(p) for p in tuned.trainable.values()}
    assert module.state_dict().keys() == (tuned.trainable | tuned.frozen).keys()
    output = module(**batch)
    assert torch.equal(output["logits"], output.logits) and torch.equal(output[0], output.loss)
    if family == "t5":
        batch["decoder_input_ids"] = tuned.model._shift_right(batch["labels"])
    alone = tuned.batch_loss(batch)
    assert torch.equal(module(**batch, with_logits=False).loss, alone)
    share = alone * module.labels_in(batch["labels"]) / 100
    given = batch | {"with_logits": False, "num_items_in_batch": 100}
    torch.testing.assert_close(module(**given).loss, share)
    given = {key: tensor for key, tensor in batch.items() if key != "labels"}
    assert torch.equal(output.loss, tuned.label_loss(tuned(**given), batch["labels"]))
    assert "loss" not in module(**{key: t for key, t in batch.items() if key != "labels"})
    output.loss.backward()
    assert all(p.grad is not None for p in tuned.trainable.values() if p.numel())
    module.train()
    assert tuned.model.training and all(m.training for m in tuned.modules.values())
    module.eval()
    assert not any(each.training for m in (tuned.model,) for each in m.modules())


@ON_PLAIN
def test_its_state_comes_back(case, family):
    tuned = adapted(case, family)
    module, ids = tuned.as_module(), batch_of(tuned)
    state = {name: t.clone() for name, t in module.state_dict().items()}
    with torch.no_grad():
        wanted = module(**ids).loss
        for parameter in tuned.trainable.values():
            parameter.add_(1.0)
        assert module.load_state_dict(state, strict=False).missing_keys == []
        assert torch.equal(module(**ids).loss, wanted)
    name = next(iter(state))
    with pytest.raises(ValueError, match="do not match"):
        module.load_state_dict({key: t for key, t in state.items() if key != name}, strict=False)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.tuned is not tuned
        torch.testing.assert_close(copied(**ids).loss, wanted)  # an LSTM's weights lie elsewhere
        assert {id(p) for p in copied.parameters() if p.requires_grad} == {
            id(p) for p in copied.tuned.trainable.values()
        }


def test_labels_alone_are_what_transformers_makes_of_them():
    """T5's and GPT-2's own loss of the same batch, where the adapter adds nothing yet."""
    for family in ("gpt2", "llama", "t5", "bert"):
        tuned = attach(tiny(family), LoRA(r=2))
        batch = batch_of(tuned)
        theirs = tuned.model(**batch).loss
        ours = tuned.as_module()(**batch, token_type_ids=torch.zeros_like(batch["labels"])).loss
        torch.testing.assert_close(ours, theirs)
        with pytest.raises(ValueError, match="token_type_ids"):
            tuned.as_module()(**batch, token_type_ids=torch.ones_like(batch["labels"]))


LOOPS = [
    ("gpt2", [LoRA(r=2)], None),
    ("gpt2", [QLoRA(r=2, block_size=8)], None),
    ("gpt2", [PromptTuning(3)], None),
    ("llama", [FullFineTuning()], None),
    ("bert", [PfeifferAdapter(3)], TAGS),
    ("bert", [BitFit(), LoRA(r=2)], SENSES),
]
ON_LOOPS = pytest.mark.parametrize("family, methods, head", LOOPS)
QUIET = pytest.mark.filterwarnings("error:the optimiser steps without", "error:.*did not hear")


@QUIET
@ON_LOOPS
def test_trainer_trains_saves_small_and_resumes(family, methods, head, tmp_path):
    """Four steps, and two of them from the checkpoint of step 2, come to the same tensors."""
    states = {}
    for turn, resume in (("whole", None), ("resumed", str(tmp_path / "checkpoint-2"))):
        tuned = attach(tiny(family), methods, head=head)
        start, module = start_of(tuned), tuned.as_module()
        options = dict(max_steps=4, save_strategy="steps", save_steps=2)
        loop = trainer(module, tuned, tmp_path, **options)
        loop.train(resume_from_checkpoint=resume)
        assert moved(tuned, start) == start.keys()
        states[turn] = start_of(tuned)
        scores = loop.evaluate()
        assert scores["eval_loss"] == pytest.approx(
            tuned.batch_loss(batch_of(tuned, 12)).item(), rel=1e-4
        )
        assert len(loop.predict(loop.eval_dataset).predictions) == 12
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == (tuned.trainable | tuned.frozen).keys()
    for name, tensor in states["whole"].items():
        assert torch.equal(tensor, states["resumed"][name]), name


@QUIET
@ON_LOOPS
def test_accelerate_and_a_hand_written_loop(family, methods, head):
    """The same steps, once prepared by accelerate; every tensor moves, and equally."""
    ends = []
    for prepared in (False, True):
        tuned = attach(tiny(family), methods, head=head)
        start, module, batch = start_of(tuned), tuned.as_module(), batch_of(tuned)
        trains = [p for p in module.parameters() if p.requires_grad]
        optimizer, accelerator = torch.optim.AdamW(trains, lr=1e-2), Accelerator(cpu=True)
        if prepared:
            module, optimizer = accelerator.prepare(module, optimizer)
        for _ in range(3):
            loss = module(**batch).loss
            accelerator.backward(loss) if prepared else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert moved(tuned, start) == start.keys()
        ends.append(start_of(tuned))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@QUIET
def test_a_hand_written_loop_of_t5():
    tuned = attach(tiny("t5"), LoRA(r=2))
    start, module, batch = start_of(tuned), tuned.as_module().train(), batch_of(tuned)
    optimizer = torch.optim.AdamW(tuned.trainable.values(), lr=1e-2)
    for _ in range(2):
        module(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved(tuned, start) == start.keys()


@QUIET
@pytest.mark.parametrize("method", [LoRA(r=2), PromptTuning(3), QLoRA(r=2, block_size=8)], ids=str)
def test_sft_trainer(method, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    tuned = attach(tiny("gpt2"), method)
    start = start_of(tuned)
    rows = [{key: t.tolist() for key, t in row.items()} for row in rows_of(tuned)]
    options = dict(save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True})
    loop = trl.SFTTrainer(
        model=tuned.as_module(),
        args=trl.SFTConfig(**quiet(tmp_path, max_steps=2, **options)),
        train_dataset=datasets.Dataset(arrow.Table.from_pylist(rows), fingerprint="rows"),
        processing_class=tuned.tokenizer,
    )
    loop.train()
    assert moved(tuned, start) == start.keys()


# A word where a loop leaves out what trains --------------------------------------------------


@pytest.mark.parametrize(
    "methods",
    [
        [LoRA(r=2)],
        [QLoRA(r=2, block_size=8)],
        [PfeifferAdapter(3)],
        [PromptTuning(3)],
        [BitFit(), LoRA(r=2)],
    ],
    ids=str,
)
def test_a_loop_over_the_models_parameters_is_told(methods, tmp_path):
    tuned = attach(tiny("gpt2"), methods)
    with pytest.warns(UserWarning, match=r"steps without .*as_module\(\)"):
        trainer(tuned.model, tuned, tmp_path, max_steps=3).train()
    tuned = attach(tiny("gpt2"), methods)
    optimizer = torch.optim.AdamW(tuned.model.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="steps without") as said:
        for _ in range(4):
            tuned.model(**batch_of(tuned)).loss.backward()
            optimizer.step()
            tuned.model.zero_grad()
    assert len(said) == 1
    tuned.detach()


@QUIET
@pytest.mark.parametrize("method", [FullFineTuning(), BitFit(), LayerNormTuning()], ids=str)
def test_where_the_models_own_parameters_train_nothing_is_said(method, tmp_path):
    tuned = attach(tiny("gpt2"), method)
    start = start_of(tuned)
    trainer(tuned.model, tuned, tmp_path, max_steps=2).train()
    assert moved(tuned, start) == start.keys()


@QUIET
def test_other_optimisers_are_no_ones_business():
    """Our own loop, two optimisers for two parts, an optimiser of another model beside it."""
    tuned = attach(tiny("gpt2"), [LoRA(r=2), PromptTuning(2)])
    train(tuned, letters(), steps=2, evaluate=False, progress=False)
    parts = [[p for n, p in tuned.trainable.items() if n.startswith(k)] for k in ("lora", "prompt")]
    other = torch.nn.Linear(3, 3)
    optimizers = [torch.optim.SGD(each, lr=0.1) for each in (*parts, other.parameters())]
    for _ in range(3):
        tuned.batch_loss(batch_of(tuned)).backward()
        other(torch.ones(3)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_nothing_asks_once_it_is_detached():
    before = len(asked)
    first, second = (attach(tiny("gpt2"), LoRA(r=2)) for _ in range(2))
    assert len(asked) == max(before, 1)
    first.detach()
    with pytest.raises(ValueError):
        attach(first.base, [LoRA(r=2), LoRA(r=2)])
    assert len(asked) == max(before, 1)
    second.detach()
    assert len(asked) == before


# Methods that hear of steps ------------------------------------------------------------------


def zeros(tuned):
    held = [site.linear.weight for site in tuned._sites if isinstance(site, MaskedWeight)]
    return sum(int((W == 0).sum()) for W in held) / sum(W.numel() for W in held)


@QUIET
def test_with_the_callback_masks_hold_and_schedules_run(tmp_path):
    tuned = attach(tiny("gpt2"), [Prune(0.5), FullFineTuning()])
    module = tuned.as_module()
    trainer(module, tuned, tmp_path, [module.callback], max_steps=3).train()
    assert zeros(tuned) == 0.5
    tuned = attach(tiny("gpt2"), AdaLoRA(init_r=4, target_r=2))
    module = tuned.as_module()
    trainer(module, tuned, tmp_path, [module.callback], max_steps=5).train()
    assert sum(delta.rank for delta in tuned.deltas.values()) == 2 * len(tuned.deltas)


@pytest.mark.parametrize(
    "methods, name",
    [
        ([AdaLoRA(init_r=4, target_r=2)], "AdaLoRA"),
        ([Prune(0.5), FullFineTuning()], "Prune"),
        ([Prune(0.5, schedule="gradual"), LoRA(r=2)], "Prune"),
    ],
)
def test_without_it_they_say_so(methods, name, tmp_path):
    tuned = attach(tiny("gpt2"), methods)
    with pytest.warns(UserWarning, match=f"{name} did not hear") as said:
        trainer(tuned.as_module(), tuned, tmp_path, max_steps=3).train()
    assert len([each for each in said if "did not hear" in str(each.message)]) == 1


@QUIET
def test_gradients_may_add_up_over_several_batches():
    tuned = attach(tiny("gpt2"), AdaLoRA(init_r=4, target_r=2))
    module, batch = tuned.as_module().train(), batch_of(tuned)
    optimizer = torch.optim.AdamW(tuned.trainable.values(), lr=1e-2)
    for step in (1, 2):
        for _ in range(3):
            module(**batch).loss.backward()
        optimizer.step()
        module.after_step(step, 2)
        optimizer.zero_grad()


# Refusals ------------------------------------------------------------------------------------


def test_what_cannot_train_is_no_module():
    tuned = attach(tiny("gpt2"), LoRA(r=2))
    tuned.merge()
    with pytest.raises(ValueError, match="merged: call unmerge"):
        tuned.as_module()
    tuned.unmerge()
    tuned.keep("a")
    tuned.use("a")
    with pytest.raises(ValueError, match=r"use\(None\)"):
        tuned.as_module()
    tuned.use(None)
    tuned.detach()
    with pytest.raises(RuntimeError, match="detached"):
        tuned.as_module()
    with pytest.raises(ValueError, match="no parameter to train"):
        attach(tiny("gpt2"), Prune(0.5)).as_module()


def test_what_a_loop_writes_into_the_config_stays_there():
    tuned = attach(tiny("gpt2"), LoRA(r=2))
    before = tuned.model.config.to_dict()
    tuned.as_module().config.use_cache = not tuned.model.config.use_cache
    assert tuned.model.config.to_dict() == before


def test_label_smoothing_shifts_a_decoders_labels(tmp_path):
    """Trainer takes the labels away and shifts them by the name of the class."""
    tuned = attach(tiny("gpt2"), LoRA(r=2))
    loop = trainer(tuned.as_module(), tuned, tmp_path, label_smoothing_factor=0.1)
    batch = batch_of(tuned)
    logs = tuned(batch["input_ids"], batch["attention_mask"])[:, :-1].log_softmax(dim=-1)
    kept = batch["labels"][:, 1:] != -100
    right = logs.gather(2, batch["labels"][:, 1:, None].clamp(min=0))[..., 0][kept].mean()
    wanted = -(0.9 * right + 0.1 * logs[kept].mean())
    torch.testing.assert_close(loop.compute_loss(loop.model, dict(batch)), wanted)
