"""On a GPU every method is what it is on a CPU: attached there, moved there, trained, taken off.

Tolerance: that of `properties/test_every_method.py`. Two float32 evaluations of one function lie
within 4 E of each other, E the distance of the CPU's float32 from its float64.
"""

import pytest
import torch
from models import CASES, FAMILIES, PAIRS, adapted, call, loss_of, put, rows_of, tiny, token_ids

from peftlab.training import move

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytestmark = pytest.mark.gpu


@torch.no_grad()
def real_rows(tuned) -> list[torch.Tensor]:
    ids = token_ids(3, 9).to(tuned.device)
    mask = torch.ones_like(ids)
    rows = rows_of(tuned, call(tuned, ids, mask), mask)
    return [row.double().cpu() for row in rows]


def apart(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family, case", PAIRS)
def test_the_same_on_a_gpu(family, case):
    on_cpu = adapted(case, family)
    wanted, state = real_rows(on_cpu), on_cpu.state()
    allowed = 4 * apart(wanted, real_rows(adapted(case, family, torch.float64)))

    move(on_cpu, "cuda")
    assert apart(real_rows(on_cpu), wanted) <= allowed

    base = tiny(family).to("cuda")
    before = base.fingerprint()
    tuned = put(case, base)
    tuned.load_state(state)
    assert apart(real_rows(tuned), wanted) <= allowed

    start = {name: p.detach().clone() for name, p in tuned.trainable.items()}
    optimizer = torch.optim.AdamW(tuned.trainable.values(), lr=1e-2)
    for _ in range(2):  # some factors have a gradient only once the other has moved
        optimizer.zero_grad()
        loss_of(tuned, token_ids(3, 9).to("cuda")).backward()
        optimizer.step()
        tuned.after_step(1, 2)
    assert any(not torch.equal(p, start[name]) for name, p in tuned.trainable.items())
    assert all(torch.isfinite(p).all() for p in tuned.trainable.values())
    if CASES[case].merges:
        unmerged = real_rows(tuned)
        tuned.merge()
        assert apart(real_rows(tuned), unmerged) <= 10 * allowed  # two steps at 0.01 moved it
        tuned.unmerge()
    tuned.detach()
    assert base.fingerprint() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_means_the_same(family):
    """What a method draws, it draws on the CPU."""
    for case in (name for f, name in PAIRS if f == family and CASES[name].drawn):
        here = put(case, tiny(family)).state()
        there = put(case, tiny(family).to("cuda")).state()
        assert all(torch.allclose(here[k].float(), there[k].float(), atol=1e-5) for k in here), case
