"""What kernels do, counted on the emulated GPU: figures that are known by hand."""

import pytest
import torch
import triton
import triton.language as tl

from bench import counts
from bench.emulator import SECTOR, GlobalMemory, emulated_gpu

pytestmark = pytest.mark.emulated


@triton.jit
def copy(x, o, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(o + i, tl.load(x + i * STRIDE))


# requests of 32 lanes with 4 bytes each, or with 16; sectors have 32 bytes
@pytest.mark.parametrize(
    ("stride", "block", "requests", "sectors"),
    [(1, 32, 1, 4), (2, 32, 1, 8), (8, 32, 1, 32), (100, 32, 1, 32), (0, 32, 1, 1), (1, 128, 1, 16), (2, 128, 4, 128)],
)
def test_sectors_of_a_load(stride, block, requests, sectors):
    x, o = torch.randn(12800), torch.empty(block)
    with emulated_gpu(90, counting=True) as gpu:
        copy[(1,)](x, o, stride, block, num_warps=1)
    load, store = (gpu.launches[0].memory[name] for name in ("ld.global", "st.global"))
    assert (load.requests, load.units) == (requests, sectors)
    assert (store.bytes, store.units, store.least) == (4 * block, block // 8, block // 8)
    different = len({i * stride * 4 // SECTOR for i in range(block)})
    assert gpu.launches[0].read_sectors == different


@triton.jit
def gather(x, index, o, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(o + i, tl.gather(tl.load(x + i), tl.load(index + i), 0))


# 1024 elements of 4 bytes are in shared memory, and lane l of a warp asks for element `of(l)`: 32 banks of 4 bytes
@pytest.mark.parametrize(
    ("of", "wavefronts"),
    [(lambda lane: lane, 1), (lambda lane: 0 * lane, 1), (lambda lane: 2 * lane, 2), (lambda lane: 32 * lane, 32)],
    ids=["neighbours", "one word", "every second", "one bank"],
)
def test_bank_conflicts_of_a_gather(of, wavefronts):
    lane = torch.arange(1024) // 4 % 32  # a thread has four neighbours
    x, index, o = torch.randn(1024), of(lane).int(), torch.empty(1024)
    with emulated_gpu(90, counting=True) as gpu:
        gather[(1,)](x, index, o, 1024, num_warps=4)
    assert torch.equal(o, x[index.long()])
    load = gpu.launches[0].memory["ld.shared"]
    assert (load.requests, load.least, load.units) == (32, 32, 32 * wavefronts)


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]))
    tl.store(c + m[:, None] * N + n[None, :], acc)


@pytest.mark.parametrize("arch", [90, 80], ids="sm_{}".format)
def test_products_of_a_matrix_instruction(arch):
    a, b, c = torch.randn(64, 32).bfloat16(), torch.randn(32, 128).bfloat16(), torch.empty(64, 128)
    with emulated_gpu(arch, counting=True) as gpu:
        product[(3,)](a, b, c, 64, 128, 32)
    assert dict(gpu.launches[0].flops) == {"bf16": 3 * 2 * 64 * 128 * 32}


# Which programs are run.


def test_how_many_programs_a_processor_holds():
    assert counts.resident(registers=32, shared=0, warps=4) == 16  # 64 warps
    assert counts.resident(registers=16, shared=0, warps=1) == 32  # programs
    assert counts.resident(registers=255, shared=0, warps=4) == 2  # of 64 Ki registers, 256 for each of 128 threads
    assert counts.resident(registers=64, shared=100_000, warps=4) == 2  # of 228 KiB


def test_programs_are_chosen_by_how_long_they_are():
    short, long = counts.WORK // 264, counts.WORK
    assert counts.chosen(grid=1000, wave=264, each=short) == ("wave", 264)
    assert counts.chosen(grid=264, wave=264, each=short) == ("all", 264)
    assert counts.chosen(grid=1000, wave=264, each=2 * short) == ("spread", counts.FEW)
    assert counts.chosen(grid=1000, wave=264, each=long) == ("spread", counts.PILOT)
    assert counts.chosen(grid=2, wave=264, each=long) == ("all", 2)


@pytest.mark.parametrize("grid", [4, 48, 1000])
def test_a_sample_is_of_different_programs_of_the_launch(grid):
    for count in range(1, min(2 * grid // 3, counts.FEW) + 1):
        found = counts.programs_of("spread", count, grid)
        assert len({*found} & {*range(grid)}) == count


def test_what_a_sample_leaves_is_spread_over_the_rest_of_a_tensor():
    written, read = torch.zeros(1003), torch.zeros(8)
    memory = GlobalMemory()
    for t in (written, read):
        memory.allow(t)
    written[8:16] = torch.arange(8.0)
    region = next(r for r in memory.regions if r.base == written.data_ptr())
    region.written[1] = True
    counts.spread_out(memory)
    assert torch.equal(written[:1000].view(125, 8), torch.arange(8.0).expand(125, 8))
    assert not written[1000:].any()  # less than a sector, which another tensor may share
    assert not read.any()


def test_a_regression_is_told():
    row = {"kernel": "k", "plan": "p", "grid": 4, "warps": {"float": 100, "integer": 100}, "products": 1000}
    row |= {"sectors": {"ld.global": [10, 1280, 40, 40]}, "wavefronts": {"ldmatrix": [5, 640, 10, 5]}}
    row |= {"read": 3200, "written": 320}
    assert counts.against_record([row], [row]) == []
    assert counts.against_record([{**row, "products": 500}], [row]) == []
    for worse, sentence in (
        ({"warps": {"float": 103, "integer": 100}}, "k: 203 warp instructions, recorded were 200"),
        ({"products": 1100}, "k: 1100 FLOP of matrix instructions, recorded were 1000"),
        ({"sectors": {"ld.global": [10, 1280, 80, 40]}}, "k: 80 sectors of global memory, recorded were 40"),
        ({"wavefronts": {"ldmatrix": [5, 640, 20, 5]}}, "k: 20 wavefronts of shared memory, recorded were 10"),
        ({"read": 6400}, "k: 6720 bytes of different sectors, recorded were 3520"),
    ):
        assert counts.against_record([{**row, **worse}], [row]) == [sentence]
    for other in ([{**row, "plan": "another"}], [row, row], []):
        (told,) = counts.against_record(other, [row])
        assert "other launches or plans than recorded" in told
