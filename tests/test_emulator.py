"""The emulated GPU against torch, on kernels that are not this library's, and against PTX with a fault put in."""

import re

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.emulator import Fault, emulated_gpu

pytestmark = pytest.mark.emulated
ARCHES = (90, 80)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=ARCHES, ids="sm_{}".format)
def gpu(request):
    with emulated_gpu(request.param, counting=True, races=True) as gpu:
        yield gpu
    assert not gpu.races


# One by one.


@triton.jit
def add(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_and_their_traffic(gpu, dtype):
    x, y = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    o = torch.full_like(x, 7)
    add[(4,)](x, y, o, 1000, BLOCK=256)
    torch.testing.assert_close(o, x + y, rtol=0, atol=0)
    counted = gpu.launches[-1]
    assert counted.memory["ld.global"].bytes == 2 * x.nbytes
    assert counted.memory["st.global"].bytes == x.nbytes
    assert 0 <= counted.read_sectors * 32 - 2 * x.nbytes <= 4 * 32  # each tensor may begin within a sector


@triton.jit
def functions(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(o + i, tl.exp(a))
    tl.store(o + n + i, tl.log(b))
    tl.store(o + 2 * n + i, tl.sqrt_rn(b))
    tl.store(o + 3 * n + i, tl.div_rn(a, b))
    tl.store(o + 4 * n + i, tl.erf(a))
    tl.store(o + 5 * n + i, tl.fma(a, b, a))
    tl.store(o + 6 * n + i, tl.floor(a * 8))
    tl.store(o + 7 * n + i, tl.cos(a))
    tl.store(o + 8 * n + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(o + 9 * n + i, tl.rsqrt(b))


def test_functions_of_floats(gpu):
    x, y = torch.randn(128), torch.rand(128) + 0.1
    x[0] = float("nan")
    o = torch.empty(10, 128)
    functions[(1,)](x, y, o, 128, BLOCK=128)
    a, b = x.double(), y.double()
    exact = {2: b.sqrt(), 3: a / b, 5: a * b + a, 6: (a * 8).floor(), 8: a.maximum(b)}
    close = {0: a.exp(), 1: b.log(), 4: a.erf(), 7: a.cos(), 9: b.rsqrt()}
    for row, expected in exact.items():
        torch.testing.assert_close(o[row], expected.float(), rtol=0, atol=0, equal_nan=True)
    for row, expected in close.items():
        torch.testing.assert_close(o[row], expected.float(), rtol=1e-6, atol=1e-6, equal_nan=True)


@triton.jit
def integers(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(o + i, a // b)
    tl.store(o + n + i, a % b)
    tl.store(o + 2 * n + i, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int32))
    tl.store(o + 3 * n + i, (a >> (b & 31)) ^ (a << (b & 7)))
    tl.store(o + 4 * n + i, tl.minimum(a, b) + tl.abs(a))
    tl.store(o + 5 * n + i, a.to(tl.int8).to(tl.int32) + a.to(tl.uint8).to(tl.int32) * 3 + a.to(tl.int16).to(tl.int32))
    tl.store(o + 6 * n + i, a.to(tl.float32).to(tl.int32))
    tl.store(o + 7 * n + i, (a.to(tl.int64) * b.to(tl.int64) // 7 % 1000003).to(tl.int32))


def test_integers(gpu):
    x = torch.randint(-(2**31), 2**31 - 1, (128,), dtype=torch.int32)
    y = torch.randint(1, 1000, (128,), dtype=torch.int32) * torch.tensor([1, -1], dtype=torch.int32).repeat(64)
    o = torch.empty(8, 128, dtype=torch.int32)
    integers[(1,)](x, y, o, 128, BLOCK=128)
    a, b = x.long(), y.long()
    high = [(p & 0xFFFFFFFF) * (q & 0xFFFFFFFF) >> 32 for p, q in zip(a.tolist(), b.tolist(), strict=True)]
    truth = (
        torch.div(a, b, rounding_mode="trunc"),
        torch.fmod(a, b),
        torch.tensor(high),
        (a >> (b & 31)) ^ (a << (b & 7)),
        a.minimum(b) + a.abs(),
        a.to(torch.int8).long() + (a & 255) * 3 + a.to(torch.int16).long(),
        x.float().double().clamp(-(2**31), 2**31 - 1).long(),
        torch.fmod(torch.div(a * b, 7, rounding_mode="trunc"), 1000003),
    )
    assert torch.equal(o, torch.stack(truth).to(torch.int32))


@triton.jit
def narrow(x, half, brain, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    tl.store(half + i, a.to(tl.float16))
    tl.store(brain + i, a.to(tl.bfloat16))


def test_roundings_to_sixteen_bits(gpu):
    x = torch.randn(512) * torch.randint(-30, 20, (512,)).float().exp2()
    x[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 65520.0])
    half, brain = torch.empty(512, dtype=torch.float16), torch.empty(512, dtype=torch.bfloat16)
    narrow[(1,)](x, half, brain, BLOCK=512)
    for found in (half, brain):
        torch.testing.assert_close(found, x.to(found.dtype), rtol=0, atol=0, equal_nan=True)


# Rows, and lanes that exchange values.


@triton.jit
def rows(x, softmax, best, total, n, BLOCK: tl.constexpr):
    r, i = tl.program_id(0), tl.arange(0, BLOCK)
    a = tl.load(x + r * n + i, mask=i < n, other=-float("inf"))
    e = tl.exp(a - tl.max(a, 0))
    tl.store(softmax + r * n + i, e / tl.sum(e, 0), mask=i < n)
    tl.store(best + r, tl.argmax(a, 0))
    tl.store(total + r * n + i, tl.cumsum(tl.where(i < n, a, 0.0), 0), mask=i < n)


@pytest.mark.parametrize("warps", [1, 8])
def test_reductions_and_scans(gpu, warps):
    x = torch.randn(5, 200)
    softmax, total, best = torch.empty_like(x), torch.empty_like(x), torch.empty(5, dtype=torch.int32)
    rows[(5,)](x, softmax, best, total, 200, BLOCK=256, num_warps=warps)
    torch.testing.assert_close(softmax, x.softmax(1))
    torch.testing.assert_close(total, x.cumsum(1))
    assert torch.equal(best, x.argmax(1).int())


@triton.jit
def moves(x, index, turned, gathered, ordered, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + m * N + n)
    tl.store(turned + n * M + m, a)
    tl.store(gathered + m * N + n, tl.gather(a, tl.load(index + m * N + n), 1))
    tl.store(ordered + m * N + n, tl.sort(a, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_move_between_threads(gpu, dtype):
    x = torch.randn(16, 64).to(dtype)
    index = torch.randint(64, (16, 64), dtype=torch.int32)
    turned, gathered, ordered = x.new_empty(64, 16), torch.empty_like(x), torch.empty_like(x)
    moves[(1,)](x, index, turned, gathered, ordered, 16, 64)
    assert torch.equal(turned, x.t())
    assert torch.equal(gathered, x.gather(1, index.long()))
    assert torch.equal(ordered, x.sort(1)[0])


@triton.jit
def histogram(x, index, sums, most, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at, a = tl.load(index + i, mask=i < n, other=0), tl.load(x + i, mask=i < n, other=0.0)
    tl.atomic_add(sums + at, a, mask=i < n)
    tl.atomic_max(most + at, (a * 16).to(tl.int32), mask=i < n)


def test_atomics(gpu):
    x, index = torch.randint(-8, 9, (500,)).float(), torch.randint(10, (500,), dtype=torch.int32)
    sums, most = torch.zeros(10), torch.full((10,), -999, dtype=torch.int32)
    histogram[(4,)](x, index, sums, most, 500, BLOCK=128)
    assert torch.equal(sums, torch.zeros(10).index_add(0, index, x))
    assert torch.equal(most, torch.full((10,), -999.0).scatter_reduce(0, index.long(), x * 16, "amax").int())


@triton.jit
def loops(lengths, x, o, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    n, i = tl.load(lengths + p), tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    k = 0
    while k < n:
        if k % 3 == 1:
            acc += tl.sum(tl.load(x + k * BLOCK + i), 0)
        else:
            acc -= tl.load(x + k * BLOCK + i)
        k += 1
    tl.store(o + p * BLOCK + i, acc)


def test_programs_that_take_different_ways(gpu):
    lengths = torch.tensor([0, 5, 1, 9, 2, 2, 7], dtype=torch.int32)
    x = torch.randint(-4, 5, (9, 64)).float()
    o = torch.full((7, 64), float("nan"))
    loops[(7,)](lengths, x, o, BLOCK=64, num_warps=2)
    steps = torch.where(torch.arange(9)[:, None] % 3 == 1, x.sum(1, keepdim=True), -x)
    assert torch.equal(o, torch.stack([steps[: int(n)].sum(0) for n in lengths]))


# Products.


@triton.jit
def matmul(a, b, c, M, N, K, am, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * am + k[None, :] * ak, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + k[:, None] * bk + n[None, :] * bn, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


def assert_product(dtype, blocks, shape, precision="tf32", turned=(False, False), **options):
    """A product of integers, which is exact in any order and precision, and one of others, within its error bound."""
    M, N, K = shape
    for whole in (True, False):
        a, b = (torch.randint(-4, 5, s).to(dtype) if whole else torch.randn(s).to(dtype) for s in ((M, K), (K, N)))
        x, y = (t.t().contiguous().t() if turn else t for t, turn in zip((a, b), turned, strict=True))
        c = torch.full((M, N), float("nan"))
        grid = (-(-M // blocks[0]), -(-N // blocks[1]))
        matmul[grid](x, y, c, M, N, K, *x.stride(), *y.stride(), *blocks, precision, **options)
        truth = a.double() @ b.double()
        relative = {"tf32": 2**-9, "tf32x3": 2**-19, "ieee": 2**-20}[precision] if dtype == torch.float32 else 2**-18
        bound = 0.0 if whole else relative * (a.double().abs() @ b.double().abs())
        assert ((c - truth).abs() <= bound).all()


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
def test_products_of_fp32(gpu, precision):
    assert_product(torch.float32, (64, 32, 32), (70, 40, 96), precision)


@pytest.mark.parametrize(("warps", "stages"), [(1, 2), (2, 3), (4, 1), (4, 4), (8, 3)])
def test_products_by_warps_and_stages(gpu, warps, stages):
    assert_product(torch.bfloat16, (64, 64, 32), (70, 70, 160), num_warps=warps, num_stages=stages)


@pytest.mark.parametrize("blocks", [(16, 16, 16), (64, 32, 128), (64, 128, 64)], ids=str)
@pytest.mark.parametrize("turned", [(False, False), (True, True)], ids=["plain", "turned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_products_by_layout(gpu, dtype, blocks, turned):
    if dtype == torch.float32:
        blocks = blocks[0], blocks[1], blocks[2] // 2 if blocks[2] > 16 else 16
    assert_product(dtype, blocks, (blocks[0] + 3, blocks[1], 2 * blocks[2]), turned=turned, num_stages=3)


@triton.jit
def products_of_differences(rounds, x, y, o, SIZE: tl.constexpr):
    """o = sum of (x - 1) @ y over as many tiles as a program has rounds; the first operand is computed."""
    p, m, n = tl.program_id(0), tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for i in tl.range(0, tl.load(rounds + p), num_stages=3):
        a = tl.load(x + (i * SIZE + m) * SIZE + n) - 1.0
        acc = tl.dot(a.to(tl.bfloat16), tl.load(y + (i * SIZE + m) * SIZE + n), acc)
    tl.store(o + (p * SIZE + m) * SIZE + n, acc)


@pytest.mark.once  # 3.6 writes such an operand's registers while they are read: see bench.hazards
def test_programs_that_leave_a_loop_of_products_one_by_one(gpu):
    rounds = torch.tensor([5, 0, 2, 9], dtype=torch.int32)
    x, y = (torch.randint(-2, 3, (9, 64, 64)).bfloat16() for _ in range(2))
    o = torch.empty(4, 64, 64)
    products_of_differences[(4,)](rounds, x, y, o, 64)
    products = (x.float() - 1) @ y.float()
    assert torch.equal(o, torch.stack([products[: int(n)].sum(0) for n in rounds]))


@triton.jit
def attention(q, k, v, o, N: tl.constexpr, D: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * D + tl.arange(0, D)[None, :]
    x, y, z = tl.load(q + offs), tl.load(k + offs), tl.load(v + offs)
    s = tl.dot(x, tl.trans(y))
    s = tl.exp(s - tl.max(s, 1)[:, None])
    w = s / tl.sum(s, 1)[:, None]
    tl.store(o + offs, tl.dot(w.to(x.dtype), z))


def test_a_product_of_a_product(gpu):
    q, k, v = (torch.randn(64, 64).half() * 0.3 for _ in range(3))
    o = torch.empty(64, 64)
    attention[(1,)](q, k, v, o, 64, 64)
    truth = (q.float() @ k.float().t()).softmax(1).half().float() @ v.float()
    torch.testing.assert_close(o, truth, rtol=2e-3, atol=2e-3)


# What is wrong is noticed.


@triton.jit
def read_at(x, o, i):
    tl.store(o, tl.load(x + i))


@triton.jit
def copy_through_addresses(addresses, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(addresses).to(tl.pointer_type(tl.float32))
    o = tl.load(addresses + 1).to(tl.pointer_type(tl.float32))
    tl.store(o + i, tl.load(x + i, mask=i < n), mask=i < n)


@pytest.mark.filterwarnings("error:Accessing the data pointer")
def test_addresses_that_lie_in_memory_are_looked_up_among_living_tensors(gpu):
    with FakeTensorMode():
        fake = torch.ones(40)  # noqa: F841  tracing leaves tensors without memory behind
    x, o = torch.randn(40), torch.zeros(40)
    copy_through_addresses[(1,)](torch.tensor([x.data_ptr(), o.data_ptr()]), 40, BLOCK=64)
    torch.testing.assert_close(o, x, rtol=0, atol=0)


def test_an_access_outside_of_the_tensors_is_a_fault():
    x, o = torch.zeros(16), torch.zeros(1)
    with emulated_gpu(90):
        read_at[(1,)](x, o, 15)
        with pytest.raises(Fault, match=r"read_at, test_emulator.py:\d+:\d+: .*ld\.global.* accesses 4 bytes at 0x"):
            read_at[(1,)](x, o, 2**30)


@triton.jit
def neighbours(x, o, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + 1) + 1.0)
    tl.store(o + (i & 1), i.to(tl.float32))


def test_programs_that_race_are_reported():
    with emulated_gpu(80, races=True) as gpu:
        neighbours[(2,)](torch.zeros(65), torch.zeros(2), BLOCK=32, num_warps=1)
    seen = " ".join(gpu.races)
    assert "writes what another program of the launch has read" in seen
    assert "writes with two programs to the same bytes" in seen


@triton.jit
def squares_beside_a_product(x, y, o, s, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    acc, squares = tl.zeros((M, N), tl.float32), tl.zeros((M,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * K + k[None, :])
        acc = tl.dot(a, tl.load(y + n[None, :] * K + k[:, None]), acc)
        squares += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
    tl.store(o + m[:, None] * N + n[None, :], acc)
    tl.store(s + m, squares)


def test_an_operand_overwritten_under_a_wgmma_is_a_race():
    """Triton compiles this kernel wrongly: the tile that has two uses gets one buffer less than its waits need."""
    x, y = torch.randint(-4, 5, (64, 256)).bfloat16(), torch.randint(-4, 5, (32, 256)).bfloat16()
    o, s = torch.empty(64, 32), torch.empty(64)
    with emulated_gpu(90, races=True) as gpu:
        squares_beside_a_product[(1,)](x, y, o, s, 256, 64, 32, 32, num_stages=2)
    assert any("was not waited for when its operand was written anew" in race for race in gpu.races)


def without(pattern, number):
    """PTX less its number-th line that begins so. `edit.done` says whether there was one."""

    def edit(ptx):
        found = list(re.finditer(rf"^\s*{pattern}[^\n]*\n", ptx, re.MULTILINE))
        edit.done = number < len(found)
        return ptx[: found[number].start()] + ptx[found[number].end() :] if edit.done else ptx

    return edit


def is_noticed(arch, edit):
    """Whether a product with edited PTX ends in a fault, a race or a wrong result."""
    try:
        with emulated_gpu(arch, edit=edit, races=True) as gpu:
            assert_product(torch.float16, (64, 64, 32), (70, 80, 208), num_stages=3)
        return bool(gpu.races)
    except (Fault, AssertionError):
        return True


# Those that nothing needs: for sm_80 Triton waits twice in a row, and once more where its loop begins again; 3.6 has a
# barrier between copies to different buffers.
SPARE = {(80, r"bar\.sync"): {1}, (80, r"cp\.async\.wait_group"): {1, 2, 3}}
if triton.__version__.startswith("3.6."):
    SPARE |= {(arch, r"bar\.sync"): {0} for arch in ARCHES}


@pytest.mark.parametrize("arch", ARCHES, ids="sm_{}".format)
@pytest.mark.parametrize("pattern", [r"bar\.sync", r"cp\.async\.wait_group", r"wgmma\.wait_group"])
def test_a_wait_left_out_is_noticed(arch, pattern):
    unnoticed, number, edit = set(), 0, without(pattern, 0)
    while True:
        noticed = is_noticed(arch, edit)
        if not edit.done:
            break
        unnoticed |= set() if noticed else {number}
        number += 1
        edit = without(pattern, number)
    assert (number > 0) == (arch == 90 or "wgmma" not in pattern)
    assert unnoticed <= SPARE.get((arch, pattern), set())


def replaced(pattern, replacement):
    def edit(ptx):
        changed, edit.done = re.subn(pattern, replacement, ptx, count=1)
        return changed

    return edit


@pytest.mark.parametrize("arch", ARCHES, ids="sm_{}".format)
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        pytest.param(r"(\{ ?)(%r\d+), (%r\d+)", r"\1\3, \2", id="registers-swapped"),
        pytest.param(r"(st\.global\S* \[ ?%rd\d+ ?\+ ?)0", r"\g<1>4", id="address-off"),
        pytest.param(r"setp\.lt\.s32", "setp.ge.s32", id="mask-turned"),
    ],
)
def test_a_wrong_instruction_is_noticed(arch, pattern, replacement):
    edit = replaced(pattern, replacement)
    assert is_noticed(arch, edit)
    assert edit.done


def test_a_fence_left_out_is_noticed():
    """Of what a program stores to shared memory and multiplies from there."""
    q, k, v = (torch.randn(64, 64).half() for _ in range(3))
    edit = without(r"fence\.proxy\.async", 0)
    with emulated_gpu(90, edit=edit, races=True) as gpu:
        attention[(1,)](q, k, v, torch.empty(64, 64), 64, 64)
    assert edit.done
    assert any("no fence.proxy.async" in race for race in gpu.races)


def test_a_warp_that_does_not_wait_for_its_lanes_is_noticed():
    """Of a program of one warp: what a lane stores is read by others behind a bar.warp.sync. Another one stands between
    their reading and the next round's storing, which is not watched: hence not all are noticed."""
    noticed, number = 0, 0
    while True:
        edit = without(r"bar\.warp\.sync", number)
        with emulated_gpu(90, edit=edit, races=True) as gpu:
            assert_product(torch.float16, (32, 32, 32), (32, 32, 64), num_warps=1, num_stages=1)
        if not edit.done:
            break
        noticed += any("what another lane has written since the last bar.warp.sync" in race for race in gpu.races)
        number += 1
    assert not gpu.races  # with all of them
    assert noticed > 0
