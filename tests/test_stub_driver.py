"""bench/stub_driver.py records every launch, however it is made, and refuses those that a GPU would get wrong."""

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction

from bench.stub_driver import LaunchError, stub_driver

pytestmark = pytest.mark.stub


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask) * factor, mask=mask)


def launch(x, y, n=320, **options):
    grid = (triton.cdiv(n, 128),)
    return scale_kernel[grid](x, y, n, 2.0, BLOCK=128, enable_fp_fusion=True, **options)


@pytest.fixture
def x():
    return torch.arange(320.0)


@pytest.fixture
def gpu():
    with stub_driver() as stub:
        yield stub


def test_launch_is_recorded_and_not_made(gpu, x):
    y = torch.full_like(x, 7.0)
    gpu.device, gpu.streams[1] = 1, 0xBEEF
    launch(x, y, num_warps=8)
    (record,) = gpu.launches
    assert record.name == "scale_kernel"
    assert record.grid == (3, 1, 1)
    assert record.arguments["x_ptr"] is x
    assert record.arguments["y_ptr"] is y
    assert {k: v for k, v in record.arguments.items() if not k.endswith("ptr")} == {
        "n": 320,
        "factor": 2.0,
        "BLOCK": 128,
    }
    assert (record.device, record.stream) == (1, 0xBEEF)
    assert (record.compiles, record.binder_runs) == (1, 1)
    assert record.metadata.num_warps == 8
    assert [(load.name, load.device) for load in gpu.loads] == [("scale_kernel", 1)]
    assert bool((y == 7.0).all())


def test_kernel_is_compiled_for_the_claimed_gpu(x):
    for arch in (80, 90):
        with stub_driver(arch) as gpu:
            compiled = launch(x, x)
            assert compiled.metadata.target.arch == arch
            assert f".target sm_{arch}" in compiled.asm["ptx"]
            assert len(gpu.compiles) == 1
            assert gpu.utils.get_device_properties(0)["multiprocessor_count"] == {80: 108, 90: 132}[arch]


def test_second_call_compiles_nothing(gpu, x):
    launch(x, x)
    launch(x, x)
    assert [record.compiles for record in gpu.launches] == [1, 1]
    assert [record.binder_runs for record in gpu.launches] == [1, 2]
    launch(x, x, n=319)
    assert len(gpu.compiles) == 2, "319 is not a multiple of 16, which Triton specialises on"


def test_kept_runner_passes_no_binder(gpu, x):
    compiled = launch(x, x)
    runner = compiled[(3, 1, 1)]
    y = torch.empty_like(x)
    for _ in range(3):
        runner(x, y, 320, 2.0, 128)
    assert len(gpu.launches) == 4
    assert gpu.launches[-1].arguments["y_ptr"] is y
    assert (len(gpu.compiles), len(gpu.loads), gpu.binder_runs) == (1, 1, 1)


def test_warmup_compiles_without_launching(gpu, x):
    compiled = scale_kernel.warmup(x, x, 320, 2.0, BLOCK=128, grid=(3,), enable_fp_fusion=True)
    assert isinstance(compiled, CompiledKernel)
    assert (len(gpu.compiles), len(gpu.loads), gpu.launches) == (1, 0, [])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x_ptr": torch.arange(321.0)[1:]}, "x_ptr was compiled as a multiple of 16"),
        ({"y_ptr": torch.empty(320, dtype=torch.float16)}, r"y_ptr was compiled as \*fp32"),
        ({"n": 319}, "n was compiled as a multiple of 16"),
        ({"n": 2**35}, "n was compiled as i32"),
        ({"factor": None}, "factor was compiled as fp32"),
        ({"BLOCK": 64}, "BLOCK was folded as 128, not 64"),
    ],
)
def test_argument_that_breaks_the_specialisation_is_refused(gpu, x, change, complaint):
    arguments = {"x_ptr": x, "y_ptr": torch.empty_like(x), "n": 320, "factor": 2.0, "BLOCK": 128}
    runner = launch(x, x)[(3, 1, 1)]
    runner(*arguments.values())
    arguments |= change
    with pytest.raises(LaunchError, match=complaint):
        runner(*arguments.values())


def test_folded_integer_and_missing_argument_are_refused(gpu, x):
    runner = launch(x, x, n=1)[(1, 1, 1)]
    with pytest.raises(LaunchError, match="n was folded as 1, not 2"):
        runner(x, x, 2, 2.0, 128)
    with pytest.raises(LaunchError, match="4 arguments"):
        runner(x, x, 1, 2.0)


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (2**20, 2**12, 1), (1, 65536, 1), (1, 1, 65536)])
def test_grid_that_does_not_fit_is_refused(gpu, x, grid):
    runner = launch(x, x)[grid]
    with pytest.raises(LaunchError, match="does not fit"):
        runner(x, x, 320, 2.0, 128)


def test_a_stub_leaves_no_trace(x):
    before = drivers._active, JITFunction.run, CompiledKernel._init_handles, scale_kernel.device_caches
    with stub_driver() as first:
        runner = launch(x, x)[(3, 1, 1)]
    assert (drivers._active, JITFunction.run, CompiledKernel._init_handles, scale_kernel.device_caches) == before
    with stub_driver() as second:
        runner(x, x, 320, 2.0, 128)
    assert (len(first.launches), len(first.loads)) == (1, 1)
    assert (len(second.launches), len(second.loads), second.compiles) == (1, 1, [])


def test_recording_can_be_paused(gpu, x):
    gpu.recording = False
    launch(x, x)
    assert gpu.launches == []
