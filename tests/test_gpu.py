"""On a GPU every method is what it is on a CPU: attached there, moved there, trained, taken off.

Compared in float64, where no kernel takes a short cut, as far as a model has it: Llama turns by
angles, and codes are decoded, in float32. Two evaluations of one function lie within
4 E of each other, E the largest rounding error of the logits: here that of float32 on the CPU,
measured, times 2⁻²⁹, as in `properties/test_every_method.py`. E is a sample from one kind of
kernel, and another kind sums in another order: it may be twice as large.
"""

import pytest
import torch
from models import (
    CASES,
    FAMILIES,
    PAIRS,
    U32,
    U64,
    adapted,
    call,
    loss_of,
    put,
    rows_of,
    surroundings,
    tiny,
    token_ids,
)

from peftlab.training import move

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytestmark = pytest.mark.gpu


@torch.no_grad()
def real_rows(tuned) -> list[torch.Tensor]:
    ids = token_ids(3, 9).to(tuned.device)
    mask = torch.ones_like(ids)
    return [row.double().cpu() for row in rows_of(tuned, call(tuned, ids, mask), mask)]


def apart(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


@torch.no_grad()
def alike(tuned, other) -> None:
    """Every tensor that is trained or kept, as the other has it."""
    for name, parameter in tuned.trainable.items():
        parameter.copy_(other.trainable[name])
    for name, tensor in tuned.frozen.items():
        tensor.copy_(other.frozen[name])
    for site in tuned._sites:
        site.refresh()


@pytest.mark.parametrize("family, case", PAIRS)
def test_the_output_is_that_of_a_cpu(family, case):
    on_cpu = adapted(case, family, torch.float64)
    wanted = real_rows(on_cpu)
    E = apart(wanted, real_rows(adapted(case, family)))
    single = family == "llama" or on_cpu.codes
    allowed = 8 * E * (1 if single else U64 / U32)

    there = put(case, tiny(family, torch.float64).to("cuda"))
    alike(there, on_cpu)
    assert apart(real_rows(there), wanted) <= allowed
    move(on_cpu, "cuda")
    assert apart(real_rows(on_cpu), wanted) <= allowed
    if CASES[case].merges:
        there.merge()
        assert apart(real_rows(there), wanted) <= allowed


@pytest.mark.parametrize("family, case", PAIRS)
def test_it_trains_and_leaves_nothing_behind(family, case):
    base = tiny(family).to("cuda")
    before = surroundings(base)
    tuned = put(case, base)
    start = {name: p.detach().clone() for name, p in tuned.trainable.items()}
    optimizer = torch.optim.AdamW(tuned.trainable.values(), lr=1e-2)
    for step in (1, 2):  # some factors have a gradient only once the other has moved
        optimizer.zero_grad()
        loss_of(tuned, token_ids(3, 9).to("cuda")).backward()
        optimizer.step()
        tuned.after_step(step, 2)
    assert any(not torch.equal(p, start[name]) for name, p in tuned.trainable.items())
    assert all(torch.isfinite(p).all() for p in tuned.trainable.values())
    coded = bool(tuned.codes)
    tuned.detach()
    after = surroundings(base)
    if coded:  # the originals waited on the CPU, and come back to other places of the GPU
        del before["addresses"], after["addresses"]
    assert after == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_means_the_same(family):
    """What a method draws, it draws on the CPU; what it computes from W is rounded."""
    for case in (name for where, name in PAIRS if where == family and CASES[name].drawn):
        here = put(case, tiny(family))
        there = put(case, tiny(family).to("cuda"))
        for name, parameter in here.trainable.items():
            torch.testing.assert_close(parameter, there.trainable[name].cpu(), msg=f"{case} {name}")
