"""Triton's kernels for codes of four bits against the page that they stand beside, bit for bit.

Where Triton is installed they run in its interpreter on the CPU, in a process of its own, because
Triton asks for the interpreter when it is imported; and they are compiled for a GPU that need not
be there. Where there is one, they run on it as well.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import library

from peftlab.sites import kernels
from peftlab.sites.quantisation import QUANT_TYPES, Quantised, quantise, table

NO_TRITON = importlib.util.find_spec("triton") is None
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Odd numbers of rows, tiles and groups of 256 scales that are not full, blocks of any even size.
SIZES = [
    ((8, 64), 64),
    ((1, 2), 2),
    ((5, 6), 6),
    ((7, 48), 24),
    ((301, 128), 32),
    ((3, 130), 130),
    ((2, 4096), 4096),
]


def weights(size) -> torch.Tensor:
    return 0.02 * torch.randn(*size, generator=torch.Generator().manual_seed(0))


def extremes() -> torch.Tensor:
    """Blocks of 64 of zeros, of the smallest numbers, of the largest, and on ties."""
    levels = table("nf4")
    halfway = (levels[:-1] + levels[1:]) / 2
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    ties = torch.cat([levels, halfway, halfway.nextafter(up), halfway.nextafter(down)])
    ties = torch.cat([ties, torch.ones(64 - len(ties))])
    blocks = [torch.zeros(64), -torch.zeros(64), *(ties * m for m in (1.0, 0.3, 7.7))]
    blocks += [weights((64,)) * m for m in (1e-45, 1e-40, 1e-37, 1e37)]
    blocks += [torch.full((64,), 2.0**-149), torch.full((64,), 3.4e38)]
    return torch.stack(blocks)


def cases() -> list[tuple]:
    """A weight, and the options of `quantise`."""
    found = [(weights(size), dict(block_size=block)) for size, block in SIZES]
    found += [(weights((9, 64)).to(dtype), dict(block_size=64)) for dtype in DTYPES]
    found += [(weights((9, 64)), dict(block_size=64, quant_type=kind)) for kind in QUANT_TYPES]
    mixed = table("nf4")[torch.randperm(16, generator=torch.Generator().manual_seed(3))]
    twice = torch.tensor([0.5, -1.0, 0.5, 1.0])  # one level with two codes
    found += [(weights((9, 64)), dict(levels=levels)) for levels in (mixed, twice)]
    found += [(extremes(), {}), (weights((64, 9)).T, dict(block_size=6))]
    return [(w, o | {"double_quant": double}) for w, o in found for double in (False, True)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """So that −0 is not 0."""
    return tensor.reshape(-1).view(torch.uint8)


def the_same(ours: Quantised, theirs: Quantised) -> None:
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert tensor.dtype == theirs.tensors[name].dtype
        assert torch.equal(bits(tensor), bits(theirs.tensors[name])), name


def compare(weight: torch.Tensor, options: dict) -> None:
    """Made and decoded by the kernels and by the page; the tensor is where the kernels run."""
    with kernels.used(False):
        wanted = quantise(weight, **options)
        decoded = {dtype: wanted.dequantise(dtype) for dtype in DTYPES}
    with kernels.used():
        assert kernels.take(weight, wanted.block_size)
        the_same(quantise(weight, **options), wanted)
        for dtype, values in decoded.items():
            found = wanted.dequantise(dtype)
            assert found.shape == values.shape and found.dtype == dtype
            assert torch.equal(bits(found), bits(values)), (options, dtype)


@pytest.mark.skipif(NO_TRITON, reason="Triton is not installed")
def test_in_the_interpreter():
    """All cases in one process; the last line says how many there were."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == f"{len(cases())} cases"


def machine_code(kernel, types: dict[str, str], **constants):
    """The kernel for a Hopper GPU, made without one: its assembly in words."""
    import triton
    from triton.backends.compiler import GPUTarget

    given = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, given, constants)
    target = GPUTarget("cuda", 90, 32)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options).asm["ptx"]


@pytest.mark.skipif(NO_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
def test_the_compiler_takes_what_the_interpreter_took(dtype, tmp_path, monkeypatch):
    """The interpreter is more lenient, and it has no sums and products to fuse."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from peftlab.sites import triton_codes as made

    shape = {"BLOCK": 24, "ROWS": 128, "WIDTH": 32}
    halves = {"halfway": "*fp32"}
    for double in (False, True):
        types = dict.fromkeys(("scale", "mean", "levels", "dynamic"), "*fp32")
        types |= {"packed": "*u8", "absmax": "*u8" if double else "*fp32", "blocks": "i32"}
        types |= {"out": f"*{dtype}"}
        code = machine_code(made.decode, types, GROUP=256, DOUBLE=double, **shape)
        assert "fma" not in code and ".ftz" not in code
    types = halves | {"flat": f"*{dtype}", "order": "*i32", "packed": "*u8"}
    types |= {"absmax": "*fp32", "blocks": "i32"}
    code = machine_code(made.encode, types, SMALLEST=made.SMALLEST, **shape)
    assert "div.rn.f32" in code and "div.full" not in code and "fma" not in code
    types = halves | {"values": "*fp32", "codes": "*u8", "scale": "*fp32", "n": "i32"}
    code = machine_code(made.encode_scales, types, SMALLEST=made.SMALLEST, GROUP=256, ROWS=16)
    assert "div.rn.f32" in code and "div.full" not in code and "fma" not in code


needs_gpu = pytest.mark.skipif(
    not kernels.can_run(), reason="no GPU of the Ampere generation or later with Triton"
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", range(len(cases())))
def test_on_a_gpu(case):
    weight, options = cases()[case]
    compare(weight.cuda(), options)


@pytest.mark.gpu
@needs_gpu
def test_a_large_weight_and_one_that_has_no_code_on_a_gpu():
    compare(weights((1024, 4096)).cuda(), {})
    for bad in (torch.inf, torch.nan):
        weight = weights((64, 64)).cuda()
        weight[3, 5] = bad
        with kernels.used(), pytest.raises(ValueError, match="infinite or not a number"):
            quantise(weight)


@pytest.mark.gpu
@needs_gpu
def test_a_compiler_sees_one_operation():
    codes = quantise(weights((64, 128)).cuda())
    x = weights((3, 128)).cuda()
    with kernels.used():
        product = torch.compile(lambda x: x @ codes.dequantise().T, fullgraph=True)
        assert torch.equal(product(x), x @ codes.dequantise().T)


# Without a GPU -----------------------------------------------------------------------------------


def test_on_a_cpu_and_unless_asked_the_page_itself_runs():
    weight = weights((4, 64))
    assert not kernels.take(weight, 64)
    with kernels.used():
        assert not kernels.take(weight, 64)


@pytest.mark.parametrize("block_size, taken", [(64, True), (2, True), (7, False), (8192, False)])
def test_which_blocks_a_kernel_takes(block_size, taken, monkeypatch):
    monkeypatch.setattr(kernels, "can_run", lambda index: True)
    with torch._subclasses.FakeTensorMode(), kernels.used():
        assert kernels.take(torch.empty(8192 * 7, device="cuda"), block_size) == taken
        with kernels.used(False):
            assert not kernels.take(torch.empty(8192 * 7, device="cuda"), block_size)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trace_sees_the_tensors_that_come_out_and_no_others(dtype, double_quant, monkeypatch):
    monkeypatch.setattr(kernels, "can_run", lambda index: True)
    wanted = quantise(weights((300, 128)), 32, double_quant=double_quant)
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is not torch.ops.prim.device.default:  # the question where a tensor is
                seen.append(str(function))
            return function(*args, **kwargs or {})

    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), kernels.used():
        held = {k: torch.empty_like(t, device="cuda") for k, t in wanted.tensors.items()}
        q = replace(wanted, **held)
        with Seen():
            values = q.dequantise(dtype)
    assert (values.shape, values.dtype, values.device.type) == ((300, 128), dtype, "cuda")
    assert seen == ["peftlab.dequantise.default"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trace_of_quantising_has_the_sizes_that_are_held(dtype):
    wanted = quantise(weights((300, 128)), 32)
    with torch._subclasses.FakeTensorMode():
        flat = torch.empty(300 * 128, dtype=dtype, device="cuda")
        packed, absmax = torch.ops.peftlab.quantise(flat, wanted.numbers, 32)
        codes, scale = torch.ops.peftlab.quantise_scales(absmax)
    assert (absmax.shape, absmax.dtype) == (wanted.absmax.shape, torch.float32)
    for made, held in ((packed, wanted.packed), (codes, wanted.absmax), (scale, wanted.scale)):
        assert (made.shape, made.dtype, made.device.type) == (held.shape, held.dtype, "cuda")


def rounded_right() -> None:
    """The interpreter cuts a float32 down to bfloat16, where a GPU rounds, and loses the smallest
    numbers on the way back. Let torch do both."""
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values, source, target, mode):
        if (source, target) == (float32, bfloat16):
            made = torch.from_numpy(np.array(values, np.float32)).bfloat16()
            return made.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (bfloat16, float32):
            held = torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
            return held.float().numpy().view(np.uint32)
        return cut(values, source, target, mode)

    interpreter._convert_float = convert


def interpreted() -> None:
    """The cases with CPU tensors, which the interpreter takes in the place of a GPU's."""
    rounded_right()
    from peftlab.sites import triton_codes

    kernels.take = lambda tensor, block_size: kernels._on
    for name in ("dequantise", "quantise", "quantise_scales"):
        library.impl(f"peftlab::{name}", "CPU")(getattr(triton_codes, name))
    for weight, options in cases():
        compare(weight, options)
    print(f"{len(cases())} cases")


if __name__ == "__main__":
    interpreted()
