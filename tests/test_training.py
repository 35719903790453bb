"""The loop: reproducible, equal to a hand-written step, interruptible, strict about settings."""

import itertools
import math
import threading
import time

import pytest
import torch
from models import (
    CASES,
    DECODERS,
    FAMILIES,
    PLAIN,
    U32,
    VOCABULARY,
    adapted,
    letters,
    surroundings,
    tiny,
)
from torch.nn.functional import cross_entropy

from peftlab import (
    AdaLoRA,
    BitFit,
    FullFineTuning,
    LayerNormTuning,
    LoRA,
    PromptTuning,
    Prune,
    attach,
    train,
)
from peftlab.training import _not_finite, precision_for

ON_LETTERS = pytest.mark.parametrize("family, case", [p for p in PLAIN if not CASES[p[1]].head])


def run(tuned, task=None, steps=4, **options):
    options = {"batch_size": 4, "progress": False, "evaluate": False, **options}
    return train(tuned, task or letters(), steps=steps, **options)


def trained(case, family, seed=0, **options):
    tuned = attach(tiny(family), CASES[case].methods)
    history = run(tuned, seed=seed, **options).history
    return tuned.state(), history


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["full", "lora dropout", "prompt", "lora + prompt"])
def test_the_same_seed_gives_the_same_result(case, family):
    state, history = trained(case, family)
    torch.manual_seed(99)  # nothing outside the call matters
    again, history_again = trained(case, family)
    assert same(state, again)
    assert history["loss"].tolist() == history_again["loss"].tolist()
    other, history_other = trained(case, family, seed=1)
    assert not same(state, other)
    assert history["loss"].tolist() != history_other["loss"].tolist()


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    trained("lora dropout", "gpt2")
    assert torch.equal(torch.rand(3), wanted)


# What a constant guess costs, in nats per token: the same share for each of 11 answers and a sure
# end of text, or the same share for every token. The base is random and starts above the second.
CONSTANT_ANSWER, UNIFORM = math.log(11) / 2, math.log(VOCABULARY)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "case, lr, level",
    [("full", 0.01, CONSTANT_ANSWER), ("lora all", 0.03, UNIFORM), ("prompt", 0.3, UNIFORM)],
)
def test_it_learns_and_the_base_stays(case, lr, level, family):
    """Everything trained learns the answers by heart; a random base can be adapted only so far.

    Dropout alone moves the loss of every step. Where no level is known, the last five steps
    lie lower in the mean than any of forty steps at a rate that moves nothing.
    """
    base = tiny(family)
    before = base.fingerprint()
    tuned = attach(base, CASES[case].methods)
    record = run(tuned, steps=40, batch_size=11, lr=lr, evaluate=True)
    losses = record.history["loss"]
    if family in DECODERS:
        assert losses.iloc[0] > UNIFORM and losses.iloc[-1] < level
    else:
        still = attach(tiny(family), CASES[case].methods)
        idle = run(still, steps=40, batch_size=11, lr=1e-9).history["loss"]
        assert losses.tail(5).mean() < idle.min()
    assert (base.fingerprint() == before) == CASES[case].restored
    tuned.detach()
    assert base.fingerprint() == before
    assert set(record.before) == set(record.metrics) == {"exact"}


def test_history_and_run():
    tuned = attach(tiny("gpt2"), LoRA())
    seen = []
    record = run(
        tuned, steps=7, eval_every=3, warmup=2, lr=0.01, evaluate=True, on_step=seen.append
    )
    table = record.history
    assert list(table.columns) == ["step", "loss", "lr", "seconds", "exact"]
    assert table["step"].tolist() == list(range(1, 8))
    assert table["exact"].notna().tolist() == [False, False, True, False, False, True, True]
    assert seen == record.records
    assert (record.steps, record.interrupted, record.seed) == (7, False, 0)
    assert (record.method, record.task, record.device) == ("LoRA", "letters", "cpu")
    assert (record.precision, record.lr, record.batch_size) == ("fp32", 0.01, 4)
    assert 0 < record.seconds and table["seconds"].is_monotonic_increasing
    assert table["seconds"].iloc[-1] <= record.seconds
    # Two steps up a line, five down half a cosine: 1/2, 1, and (1 + cos(π k / 5)) / 2.
    cosine = [0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)]
    wanted = [0.01 * factor for factor in (0.5, 1.0, *cosine)]
    assert table["lr"].tolist() == pytest.approx(wanted, rel=1e-12)
    assert not tuned.model.training
    assert all(p.grad is None for p in tuned.trainable.values())


def test_evaluation_takes_no_part_in_training_or_its_clock():
    plain, _ = trained("lora dropout", "gpt2")
    watched, _ = trained("lora dropout", "gpt2", eval_every=1, evaluate=True)
    assert same(plain, watched)


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(), PromptTuning(3)])
def test_the_default_learning_rate_is_the_methods_own(method):
    tuned = attach(tiny("gpt2"), method)
    record = run(tuned, steps=1, warmup=0)
    assert record.lr == record.history["lr"].iloc[0] == type(method).learning_rate


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["lora", "prompt"])
def test_one_step_is_a_hand_written_adamw_step(case, family):
    """The whole training set is one batch: clip at norm 1, then Adam's first step.

    m = (1 − β₁) g and v = (1 − β₂) g², corrected by 1 − β₁ and 1 − β₂, leave g / (|g| + ε). The
    rows of the batch come in another order, which moves g by a relative 11 · 20 u at most (11 rows
    and about 20 roundings on the way); ε / (|g| + ε)² carries that to the step, as in the parity
    suite, and the step itself rounds in a few operations.
    """
    task, lr, eps = letters(), 0.01, 1e-8
    tuned, hand = adapted(case, family), adapted(case, family)
    for model in (tuned, hand):
        model.model.config.attn_pdrop = 0.0
        for module in model.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):  # T5's attention
                module.dropout = 0.0
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.0
    run(tuned, task, steps=1, batch_size=11, lr=lr, warmup=0)

    batch = task.batch_for(hand, task.train)
    labels = batch.pop("labels")
    logits = hand(**batch)
    if hand.kind == "decoder":
        logits, labels = logits[:, :-1], labels[:, 1:]
    cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: p.grad for name, p in hand.trainable.items()}
    norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
    for name, start in hand.state().items():
        g = gradients[name] / max(norm.item(), 1.0)
        step = lr * g / (g.abs() + eps)
        delta = 11 * 20 * U32 * g.abs().max()
        moved = lr * delta * eps / ((g.abs() - delta).clamp(min=0) + eps) ** 2
        close = moved.clamp(max=2 * lr) + 8 * U32 * (start.abs() + lr)
        assert ((tuned.trainable[name] - (start - step)).abs() <= close).all()


def failing(error, at):
    """A task whose batch raises, the at-th time."""
    task, count = letters(), itertools.count()
    whole = task.batch

    def batch(*args, **kwargs):
        if next(count) == at:
            raise error
        return whole(*args, **kwargs)

    task.batch = batch
    return task


def raising(error, at):
    def on_step(record):
        if record["step"] == at:
            raise error

    return on_step


@ON_LETTERS
def test_after_an_exception_detach_restores_the_base(case, family):
    base = tiny(family)
    before = base.fingerprint()
    for task, on_step in (
        (failing(RuntimeError("no batch"), at=2), None),
        (None, raising(RuntimeError("no step"), at=2)),
    ):
        tuned = attach(base, CASES[case].methods)
        start = tuned.state()
        with pytest.raises(RuntimeError, match="no batch|no step"):
            run(tuned, task, on_step=on_step)
        assert not same(start, tuned.state())
        assert not tuned.model.training
        tuned.detach()
        assert base.fingerprint() == before


@ON_LETTERS
def test_an_interrupt_keeps_what_was_learned(case, family):
    base = tiny(family)
    before = base.fingerprint()
    event = threading.Event()

    def press(record):
        if record["step"] == 2:
            event.set()

    for task, options in (
        (failing(KeyboardInterrupt(), at=2), {}),
        (None, {"on_step": raising(KeyboardInterrupt(), at=2)}),
        (None, {"on_step": press, "stop": event}),
    ):
        tuned = attach(base, CASES[case].methods)
        start = tuned.state()
        record = run(tuned, task, steps=30, evaluate=True, **options)
        assert record.interrupted
        assert record.steps == len(record.history) == 2
        assert set(record.metrics) == {"exact"}
        assert not same(start, tuned.state())
        tuned.detach()
        assert base.fingerprint() == before


def test_an_interrupt_during_evaluation_keeps_the_step():
    tuned, task = attach(tiny("gpt2"), LoRA()), letters()
    grade = task.grade

    def interrupted(examples, outputs):
        if examples == task.dev:
            raise KeyboardInterrupt
        return grade(examples, outputs)

    task.grade = interrupted
    record = run(tuned, task, eval_every=3, evaluate=True)
    assert record.interrupted and record.steps == len(record.history) == 3


def test_a_stop_before_the_first_step():
    event = threading.Event()
    event.set()
    tuned = attach(tiny("gpt2"), LoRA())
    start = tuned.state()
    record = run(tuned, stop=event)
    assert record.interrupted and record.steps == 0 and record.history.empty
    assert same(start, tuned.state())


@pytest.mark.parametrize("has_bf16, wanted", [(True, "bf16"), (False, "fp16")])
def test_precision_by_chip(monkeypatch, has_bf16, wanted):
    """bf16 where the chip has it in hardware, fp16 where it is only emulated, as on a T4."""

    def supported(including_emulation=True):
        return True if including_emulation else has_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision_for("cuda") == precision_for(torch.device("cuda:1")) == wanted
    assert precision_for("cpu") == "fp32"
    for choice in ("fp32", "bf16", "fp16"):
        assert precision_for("cuda", choice) == precision_for("cpu", choice) == choice
    with pytest.raises(ValueError, match="precision='int4'.*auto, fp32, bf16, fp16"):
        precision_for("cpu", "int4")


@pytest.mark.parametrize("case", ["lora", "prompt", "full"])
def test_bf16_on_the_cpu_and_no_memory_of_it(case):
    """A run in another precision, in the same process, changes nothing in the next one."""
    base = tiny("llama")
    before = base.fingerprint()
    results = {}
    for turn, precision in enumerate(("fp32", "bf16", "fp32")):
        tuned = attach(base, CASES[case].methods)
        record = run(tuned, precision=precision)
        assert record.precision == precision
        assert all(p.dtype == torch.float32 for p in tuned.trainable.values())
        results[turn] = tuned.state()
        tuned.detach()
        assert base.fingerprint() == before
    assert same(results[0], results[2])
    assert not same(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["lora", "prompt"])
def test_a_base_in_16_bits_trains_an_adapter_in_32(case, dtype):
    base = tiny("llama", dtype)
    before = base.fingerprint()
    tuned = attach(base, CASES[case].methods)
    start = tuned.state()
    run(tuned)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in tuned.trainable.values())
    assert not same(start, tuned.state())
    tuned.detach()
    assert base.fingerprint() == before


def test_a_batch_larger_than_the_data_is_cut_to_it():
    record = run(attach(tiny("gpt2"), LoRA()), batch_size=500)
    assert record.batch_size == 11


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 0}, "steps=0: allowed is at least 1"),
        ({"steps": -3}, "steps=-3"),
        ({"batch_size": 0}, "batch_size=0: allowed is at least 1"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"eval_every": -1}, "eval_every=-1"),
        ({"warmup": -1}, "warmup=-1"),
        ({"precision": "fp8"}, "precision='fp8'"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, words):
    base = tiny("gpt2")
    before = base.fingerprint()
    tuned = attach(base, LoRA())
    start = tuned.state()
    with pytest.raises(ValueError, match=words):
        run(tuned, **options)
    assert same(start, tuned.state())
    assert not tuned.model.training
    tuned.detach()
    assert base.fingerprint() == before


def test_the_clock_stops_while_the_dev_set_is_scored():
    """Four evaluations that each take at least 0.3 s of waiting are not in the training time."""
    task, waited = letters(), []

    def score(model, examples=None):
        start = time.perf_counter()
        time.sleep(0.3)
        waited.append(time.perf_counter() - start)
        return {"exact": 0.0}

    task.score = score
    start = time.perf_counter()
    record = run(attach(tiny("gpt2"), LoRA()), task, eval_every=1)
    assert len(waited) == 4
    assert record.seconds <= time.perf_counter() - start - sum(waited)


# Not a number --------------------------------------------------------------------------------


def unlabelled(at):
    """A task of which the at-th batch has no label."""
    task, count = letters(), itertools.count()
    whole = task.batch

    def batch(*args, **kwargs):
        made = whole(*args, **kwargs)
        if next(count) == at:
            made["labels"].fill_(-100)
        return made

    task.batch = batch
    return task


def spoiled(tuned, name, value):
    """The gradient of this tensor is no number from the third step on, though the loss is one."""
    seen = itertools.count()
    tuned.trainable[name].register_hook(lambda g: g if next(seen) < 2 else g * value)
    return tuned


METHODS = [LoRA(r=2), PromptTuning(3), FullFineTuning(), AdaLoRA(init_r=3, target_r=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_loss_that_is_no_number_ends_the_run_before_a_weight(method, family):
    """A rate far too high, and a batch without a label; the sentence names step and cause."""
    times = r"lr=1e\+20 is .* times the default"
    for task, lr, words in ((None, 1e20, times), (unlabelled(3), None, "every label .* −100")):
        base = tiny(family)
        before, tuned = base.fingerprint(), attach(base, method)
        with pytest.warns(RuntimeWarning, match=words) as said:
            record = run(tuned, task, steps=30, lr=lr)
        assert record.interrupted and record.problem == str(said[0].message)
        assert f"ended at step {record.steps + 1}, " in record.problem
        assert len(record.history) == record.steps < 30
        assert all(math.isfinite(row["loss"]) for row in record.records)
        assert all(p.isfinite().all() and p.grad is None for p in tuned.trainable.values())
        assert not tuned.model.training
        tuned.detach()
        assert base.fingerprint() == before


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    "method, name",
    [
        (LoRA(r=2), "lora.layers.1.q.B"),
        (FullFineTuning(), "transformer.h.1.mlp.c_fc.bias"),
        (PromptTuning(3), "prompt_tuning.prompt"),
    ],
)
def test_a_gradient_that_is_no_number_is_named(method, name, value):
    tuned = attach(tiny("gpt2"), method)
    (name,) = [key for key in tuned.trainable if key.endswith(name)]
    kept = attach(tiny("gpt2"), method)
    run(kept, steps=2, batch_size=11, warmup=0, lr=1e-3)
    with pytest.warns(RuntimeWarning, match=f"step 3, where the gradient of {name} is not finite"):
        record = run(spoiled(tuned, name, value), steps=6, batch_size=11, warmup=0, lr=1e-3)
    assert record.steps == 2 and "weights of step 2 are kept" in record.problem
    assert all(p.isfinite().all() for p in tuned.trainable.values())


def test_before_the_first_step_the_rate_is_not_blamed():
    with pytest.warns(RuntimeWarning, match="no step was taken yet") as said:
        record = run(spoiled_base(tiny("gpt2")))
    assert record.steps == 0 and "lr=" not in str(said[0].message)


def spoiled_base(base):
    base.model.transformer.ln_f.bias.data[3] = math.nan
    return attach(base, LoRA(r=2))


@pytest.mark.parametrize("grow", [1.0, 1 / 2**20])
def test_a_scaler_that_skips_a_step_does_not_end_the_run(grow):
    """fp16 overflows in its first steps, the scale is halved; unless no scale is left."""
    loss, norm = 1.5, torch.tensor(math.inf)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16 * grow)
    scaler.scale(torch.ones(1))
    gradients = {"a": torch.ones(2), "b": torch.tensor([1.0, math.inf])}
    said = _not_finite(loss, norm, gradients, scaler)
    assert said == ("" if grow == 1 else "the gradient of b is not finite")
    assert _not_finite(math.nan, norm, gradients, scaler) == "the loss is nan"
    assert _not_finite(loss, torch.tensor(2.0), gradients, None) == ""
    together = {"a": torch.full((2,), 3e38)}
    assert "all tensors together" in _not_finite(loss, norm, together, None)


@pytest.mark.parametrize(
    "method", [FullFineTuning(), BitFit(), LayerNormTuning()], ids=lambda m: m.name
)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_float16_is_not_trained_in_place(method, family):
    base = tiny(family, torch.float16)
    before = surroundings(base)
    for methods in (
        [method],
        [LoRA(r=2), method] if not isinstance(method, FullFineTuning) else [],
    ):
        with pytest.raises(ValueError, match="float16.* load the base in float32 or bfloat16"):
            attach(base, methods or [Prune(0.5), method])
        assert surroundings(base) == before
    tuned = attach(tiny(family, torch.bfloat16), method)
    run(tuned)
    assert all(p.isfinite().all() for p in tuned.trainable.values())


@pytest.mark.parametrize("split, options", [("train", {}), ("dev", {"eval_every": 1})])
def test_a_split_that_is_needed_and_empty_is_named(split, options):
    for name, more in ((split, options), ("test", {"evaluate": True})):
        task = letters()
        setattr(task, name, [])
        with pytest.raises(ValueError, match=f"the task letters has no examples in {name}"):
            run(attach(tiny("gpt2"), LoRA()), task, **more)
    if split == "dev":
        run(attach(tiny("gpt2"), LoRA()), task, steps=1)  # not needed, not asked for


# Random numbers in threads -------------------------------------------------------------------


@pytest.mark.parametrize("family, case", [("gpt2", "lora dropout"), ("bert", "p lama")])
def test_in_another_thread_it_draws_the_same_and_touches_nobodys_numbers(case, family):
    """The main thread draws while another attaches and trains: each as if it were alone."""
    wanted, history = trained(case, family)
    torch.manual_seed(5)
    alone = [torch.rand(3) for _ in range(200)]
    torch.manual_seed(5)
    found, drawn = [], []
    thread = threading.Thread(target=lambda: found.append(trained(case, family)))
    thread.start()
    while thread.is_alive() and len(drawn) < 200:
        drawn.append(torch.rand(3))
        time.sleep(0.005)
    thread.join()
    drawn += [torch.rand(3) for _ in range(200 - len(drawn))]
    assert all(torch.equal(a, b) for a, b in zip(alone, drawn, strict=True))
    ((state, again),) = found
    assert same(wanted, state) and again["loss"].tolist() == history["loss"].tolist()


def test_two_threads_train_as_one():
    """Each draws its own dropout, whatever the other does."""
    wanted = {seed: trained("lora dropout", "gpt2", seed)[0] for seed in (0, 1)}
    found = {}

    def work(seed):
        found[seed] = trained("lora dropout", "gpt2", seed)[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(wanted[seed], found[seed]) for seed in (0, 1))


# --- how long ------------------------------------------------------------------------------------


def test_epochs_pass_the_examples_and_leave_out_what_is_no_full_batch():
    task = letters()  # its number of examples is no multiple of five
    full = len(task.train) // 5
    assert len(task.train) % 5
    for epochs, steps in ((1, full), (2.5, round(2.5 * full)), (1 / full, 1)):
        record = run(attach(tiny("gpt2"), PromptTuning(2)), task, 1, batch_size=5, epochs=epochs)
        assert record.steps == steps
    seen = []
    tuned = attach(tiny("gpt2"), PromptTuning(2))
    task.batch_for, whole = (
        lambda model, rows: seen.append(rows) or whole(model, rows),
        task.batch_for,
    )
    run(tuned, task, batch_size=5, epochs=1)
    asked = [example.prompt for rows in seen[:full] for example in rows]
    assert len(asked) == len(set(asked)) == 5 * full  # each at most once


@pytest.mark.parametrize("epochs", [0, -1, 0.001, math.inf, math.nan])
def test_epochs_out_of_range(epochs):
    with pytest.raises(ValueError, match="epochs=.*allowed is at least"):
        run(attach(tiny("gpt2"), PromptTuning(2)), epochs=epochs)


SCORES = (0.2, 0.5, 0.4, 0.5, 0.3, 0.9)  # of dev, an evaluation after another


@pytest.mark.parametrize(
    "case", [case for family, case in PLAIN if family == "gpt2" and not CASES[case].head]
)
def test_patience_keeps_the_best_state(case, monkeypatch):
    """As after as many steps without patience, whatever the method trains."""
    told = iter(SCORES)
    task, methods = letters(), CASES[case].methods
    monkeypatch.setattr(task, "score", lambda tuned, examples: {task.main: next(told)})
    tuned = attach(tiny("gpt2"), methods)
    record = run(tuned, task, 12, eval_every=2, patience=3)
    assert (record.best_step, record.steps, record.interrupted) == (4, 10, False)  # not the 0.9
    other = attach(tiny("gpt2"), methods)

    def stop_after(step):
        if step["step"] == 4:
            raise KeyboardInterrupt

    run(other, letters(), 12, on_step=stop_after)
    state, wanted = tuned.state(), other.state()
    assert state.keys() == wanted.keys() and same(state, wanted)


def test_patience_needs_evaluations_and_zero_of_it_ends_nothing(monkeypatch):
    with pytest.raises(ValueError, match="set eval_every"):
        run(attach(tiny("gpt2"), PromptTuning(2)), patience=2)
    with pytest.raises(ValueError, match="patience=-1: allowed is at least 0"):
        run(attach(tiny("gpt2"), PromptTuning(2)), patience=-1)
    task = letters()
    monkeypatch.setattr(task, "score", lambda tuned, examples: {task.main: 0.5})
    record = run(attach(tiny("gpt2"), PromptTuning(2)), task, 6, eval_every=1)
    assert record.steps == 6 and record.best_step is None
