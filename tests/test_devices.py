"""Two processes learn what one learns: gloo on the CPU, launched as on two GPUs.

Why two numbers here may differ at all: the processes add the gradient up in another order. A sum
of n float64 terms of size 1 at most (the gradient is clipped) is off by at most n U64, and n, the
labels of a batch, is below 128. AdamW's step lr g / (|g| + ε) passes an error of g on with at most
lr / ε = 10⁶, which it reaches where the gradient is zero but for rounding: the biases of keys. So
after four steps a tensor may be off by 4 · 10⁶ · 128 U64 = 6e-8. The loss moves by at most the sum
of the gradient's sizes, below 100 here, times that.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import BATCH, LR, PAIRS, RESUMED, SHARDED, STEPS, name_of, sharp, trained, uneven
from models import U32, U64, tiny
from safetensors.torch import load_file

import peftlab
from peftlab.experiments import train_distributed
from peftlab.tuned.devices import shard
from peftlab.tuned.module import TunedModule

HERE = Path(__file__).parent
ALLOWED = STEPS * LR / 1e-8 * 128 * U64
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(*program, processes: list[str] | None = LAUNCH) -> subprocess.CompletedProcess:
    """What `accelerate launch` starts, on a free port, or Python alone; its output."""
    paths = os.pathsep.join([str(HERE), *sys.path[:1], os.environ.get("PYTHONPATH", "")])
    starts = [*processes, "--main_process_port", "0"] if processes else []
    command = [sys.executable, *starts, *map(str, program)]
    environment = os.environ | {"PYTHONPATH": paths}
    child = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    assert child.returncode == 0, child.stdout + child.stderr
    return child


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Where both processes left what they have at the end of every training."""
    folder = tmp_path_factory.mktemp("together")
    launch(HERE / "devices.py", folder)
    return folder


def check(out: Path, name: str, alone) -> None:
    for rank in (0, 1):
        losses = json.loads((out / f"{name}.{rank}.json").read_text())
        assert losses == pytest.approx(alone.losses, rel=0, abs=100 * ALLOWED)
        tensors = load_file(out / f"{name}.{rank}.safetensors")
        assert tensors.keys() == alone.tensors.keys()
        for key, tensor in alone.tensors.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=ALLOWED)


@pytest.mark.parametrize("family, case", PAIRS)
def test_the_curve_and_the_weights_are_those_of_one_process(family, case, out):
    """Two processes and two parts a step; one process and the whole batch."""
    check(out, name_of(family, case, "ddp"), trained(family, case))


def test_the_mean_of_means_would_be_noticed(monkeypatch):
    """What the parts would give if each counted by its rows, and not by its labels."""
    right = trained("gpt2", "lora")
    monkeypatch.setattr(TunedModule, "labels_in", lambda module, labels: torch.tensor(len(labels)))
    wrong = trained("gpt2", "lora", accumulate=2)
    gap = max(abs(a - b) for a, b in zip(wrong.losses, right.losses, strict=True))
    assert gap > 1000 * 100 * ALLOWED


def test_blocks_may_be_computed_twice(out):
    check(out, "checkpointing", trained("llama", "lora"))


@pytest.mark.parametrize("family, case", RESUMED)
def test_a_training_goes_on_from_its_last_checkpoint(family, case, out):
    """Two steps, a checkpoint, and two more; and the folder is that of the last tensors."""
    alone = trained(family, case)
    check(out, name_of(family, case, "resumed"), alone)
    saved = peftlab.attach(tiny(family, torch.float64), out / f"{family} run")
    for name, parameter in saved.trainable.items():
        torch.testing.assert_close(parameter, alone.tensors[name], rtol=2**-23, atol=ALLOWED)


def test_one_process_writes_the_folder(out):
    assert (out / "saved.0").read_text().split("\n")[:-1] == [
        f"{family} run" for family, _ in RESUMED for _ in ("first", "resumed")
    ]
    assert not (out / "saved.1").exists()


@pytest.mark.parametrize("family, case", SHARDED)
def test_a_base_in_shares_trains_as_a_whole_one(family, case, out):
    check(out, name_of(family, case, "shard"), trained(family, case))


@pytest.mark.parametrize(
    "what, told",
    [
        ("base", "ValueError: process 1 differs from process 0 in its base: load the same base"),
        ("rank", "ValueError: process 1 differs from process 0 in its sizes"),
        ("cut", "ValueError: batch_size=9: it is cut into 1 parts for 2 processes"),
        ("full", "ValueError: Full fine-tuning trains transformer.wte.weight of the base, and"),
        ("resume", "none has no checkpoint to resume from: train with save_every first"),
        ("idle", "ValueError: lora.layers.1.v.A took no part in the loss, and DDP waits"),
    ],
)
def test_what_cannot_be_done_is_said_in_every_process(what, told, out):
    for rank in (0, 1):
        assert told in json.loads((out / f"refused.{rank}.json").read_text())[what]


def test_one_process_has_nothing_to_share():
    with pytest.raises(RuntimeError, match="there is one process"):
        shard(sharp("gpt2", "lora"), "cpu")


def test_a_part_without_labels_counts_for_nothing():
    tuned = sharp("gpt2", "lora")
    module, ids = tuned.as_module(), torch.tensor([[3, 5, 7]])
    loss = module(ids, labels=torch.full_like(ids, -100), num_items_in_batch=4).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in tuned.trainable.values())
    whole = module(ids, labels=ids).loss
    torch.testing.assert_close(module(ids, labels=ids, num_items_in_batch=8).loss, whole * 2 / 8)


def test_a_state_is_loaded_through_a_wrapper():
    """As DDP has it, which knows nothing of the module's own way to load."""
    first, second = sharp("gpt2", "lora"), sharp("gpt2", "lora")
    with torch.no_grad():
        for parameter in first.trainable.values():
            parameter += 1
    wrapped, other = (torch.nn.ModuleDict({"module": t.as_module()}) for t in (first, second))
    assert set(wrapped.state_dict()) == {f"module.{name}" for name in first.trainable}
    other.load_state_dict(wrapped.state_dict())
    for name, parameter in first.trainable.items():
        assert torch.equal(parameter, second.trainable[name])
    with pytest.raises(ValueError, match="lora"):
        other.load_state_dict({})


# As it is typed ------------------------------------------------------------------------------


def test_the_script(tmp_path):
    """`accelerate launch` on a task and a base that ship; the adapter goes back onto a base."""
    program = ["-m", "peftlab.experiments.train_distributed", "facts", "--steps", "3", "--cpu"]
    child = launch(*program, "--processes", "2", "--out", tmp_path / "run")
    assert child.stdout.count("3 steps in 2 processes") == 1
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["processes"] == 2 and len(record["losses"]) == 3
    assert peftlab.attach(peftlab.load("tiny-gpt"), tmp_path / "run").label == "LoRA"


def test_fewer_processes_than_wanted_are_noticed(tmp_path, capsys):
    """`accelerate launch --cpu` starts one, and says nothing."""
    with pytest.raises(SystemExit):
        train_distributed.main(["facts", "--cpu", "--processes", "2", "--out", str(tmp_path)])
    assert "1 of 2 processes started: on a CPU too, write" in capsys.readouterr().err


def test_notebook_launcher(tmp_path):
    """As a cell has it: a function, which makes everything inside the processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:  # this launcher cannot look for one
        port = free.getsockname()[1]
    program = (
        "import os; from accelerate import notebook_launcher; from pathlib import Path\n"
        "from devices import trained\n"
        "def cell(folder):\n"
        "    losses = trained('gpt2', 'lora', out=Path(folder)).losses\n"
        "    line = ' '.join(map(str, ['losses', *losses]))\n"
        "    os.write(1, f'{line}\\n'.encode())\n"  # whole: two processes share one pipe
        f"given = ({str(tmp_path / 'run')!r},)\n"
        f"notebook_launcher(cell, given, num_processes=2, use_port='{port}')\n"
    )
    child = launch("-c", program, processes=None)
    said = [line.split()[1:] for line in child.stdout.split("\n") if line.startswith("losses")]
    alone = trained("gpt2", "lora").losses
    assert len(said) == 2
    for line in said:
        assert list(map(float, line)) == pytest.approx(alone, rel=0, abs=100 * ALLOWED)


def test_uneven_rows_are_uneven():
    tuned = sharp("gpt2", "lora")
    batch = uneven().batch_for(tuned, uneven().train[:BATCH])
    counts = (batch["labels"] != -100).sum(dim=1)
    assert counts.min() < counts.max()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_hold_a_base_that_each_would_hold_alone(tmp_path):
    """Its blocks are halved on each card: the peak falls by more than a third of what they take.

    By hand: `accelerate launch --multi_gpu --num_processes 2 tests/devices.py FOLDER cards`, with
    `tests` in PYTHONPATH. The same kernels read the same numbers, so the losses agree but for the
    order in which two gradients are added.
    """
    launch(HERE / "devices.py", tmp_path, "cards")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"cards.{rank}.json").read_text())
        for method in ("lora", "qlora"):
            whole, shares = found[f"{method} False"], found[f"{method} True"]
            assert shares["losses"] == pytest.approx(whole["losses"], rel=64 * U32)
            held = whole["codes"] or found["weights"]
            assert shares["most"] < whole["most"] - held / 3
