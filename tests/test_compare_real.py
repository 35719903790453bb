"""The comparison on real models: how runs are spread, resumed and chosen."""

import os
from concurrent.futures import Executor, Future
from multiprocessing import get_context

import pytest

from peftlab.experiments import compare_real
from peftlab.experiments.compare_real import Job, Rows, take_a_gpu


class Pool(Executor):
    """Runs nothing: notes what is asked for, and answers with a row."""

    def __init__(self):
        self.asked = []

    def submit(self, run, job: Job) -> Future:
        self.asked.append(job)
        done = Future()
        done.set_result(
            {"label": job.label, "lr": job.lr, "seed": job.seed, "steps": job.steps, "f1": job.lr}
        )
        return done


def jobs(*rates: float, seed: int = 100) -> list[Job]:
    given = dict(setting="wnut17", seed=seed, split="dev", steps=2, device="cpu")
    return [Job(label="LoRA", lr=lr, **given) for lr in rates]


@pytest.mark.parametrize("visible, seen", [(None, "0 1 0 1"), ("3,5", "3 5 3 5")])
def test_processes_take_the_gpus_in_turn(monkeypatch, visible, seen):
    turn, taken = get_context("spawn").Value("i", 0), []
    for _ in range(4):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        take_a_gpu(turn, 2)
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == seen.split()


def test_without_a_gpu_nothing_is_taken(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    take_a_gpu(get_context("spawn").Value("i", 0), 0)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_only_what_is_missing_is_run(tmp_path):
    path, pool = tmp_path / "rows.jsonl", Pool()
    first = Rows(path).of(jobs(1e-3), pool)
    again = Rows(path).of(jobs(1e-3, 3e-3), pool)  # as after an interrupt
    assert [job.lr for job in pool.asked] == [1e-3, 3e-3]
    assert again[0] == first[0] and [row["lr"] for row in again] == [1e-3, 3e-3]
    assert len(path.read_text().splitlines()) == 2
    assert Rows(path).of(jobs(1e-3, seed=0), pool)[0]["seed"] == 0  # another seed is another run


def test_every_method_gets_as_many_tries():
    grids = [grid for _, grid in compare_real.METHODS.values()]
    assert {(len(grid), len(set(grid))) for grid in grids} == {(3, 3)}


class Failing(Pool):
    """Has no memory for one of the rates."""

    def submit(self, run, job: Job) -> Future:
        if job.lr != 3e-3:
            return super().submit(run, job)
        failed = Future()
        failed.set_exception(MemoryError("no room for 0.003"))
        return failed


def test_a_run_that_fails_costs_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(MemoryError, match="no room for 0.003"):
        Rows(path).of(jobs(3e-3, 1e-3, 3e-4), Failing())
    pool = Pool()
    assert len(Rows(path).of(jobs(3e-3, 1e-3, 3e-4), pool)) == 3
    assert [job.lr for job in pool.asked] == [3e-3]
