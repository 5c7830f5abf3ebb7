"""bench/hazards.py sees what it claims to see: a loop that Triton compiles with a race, and what mends it."""

import re
from functools import cache

import pytest
import triton
import triton.language as tl

from bench.hazards import hazards, overwritten_buffers, touched_registers
from bench.sass import compile_for

pytestmark = pytest.mark.codegen


@triton.jit
def products_and_sums(x_ptr, y_ptr, d_ptr, s_ptr, K, TWICE: tl.constexpr, SIZE: tl.constexpr):
    """x @ y, and the sums of the rows of x out of the same tiles or, TWICE, of tiles of their own."""
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    d = tl.zeros([SIZE, SIZE], tl.float32)
    s = tl.zeros([SIZE], tl.float32)
    for first in range(0, K, SIZE):
        x = tl.load(x_ptr + row * K + first + column)
        y = tl.load(y_ptr + (first + row) * SIZE + column)
        d = tl.dot(x, y, d)
        if TWICE:
            x = tl.load(x_ptr + row * K + first + column, eviction_policy="evict_last")
        s += tl.sum(x.to(tl.float32), axis=1)
    tl.store(d_ptr + row * SIZE + column, d)
    tl.store(s_ptr + tl.arange(0, SIZE), s)


@cache
def compiled(target, twice=False, stages=3):
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "d_ptr": "*fp32", "s_ptr": "*fp32", "K": "i32"}
    constants = {"TWICE": twice, "SIZE": 64}
    return compile_for(products_and_sums, signature, constants, target, aligned=[*signature], num_stages=stages)


@pytest.mark.parametrize("stages", [2, 3])
def test_a_copy_into_what_a_product_reads_is_told(stages):
    (problem,) = hazards(compiled("sm_90", stages=stages))
    assert "writes a buffer of %x" in problem


def test_tiles_of_their_own_are_clean():
    kernel = compiled("sm_90", twice=True)
    assert "isAsync = true" in kernel.asm["ttgir"]
    assert hazards(kernel) == []


def test_a_chip_without_such_instructions_is_clean():
    assert hazards(compiled("sm_80")) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pendings = 1", "pendings = 0"),  # a wait for all products
        ("memdesc<2x64x64xbf16", "memdesc<3x64x64xbf16"),  # a buffer more, with its numbers counted as far
    ],
)
def test_what_mends_the_race_is_clean(before, after):
    ttgir = compiled("sm_90").asm["ttgir"]
    assert before in ttgir
    ttgir = ttgir.replace(before, after)
    if "memdesc" in before:
        ttgir = ttgir.replace("arith.constant 2 : i32", "arith.constant 3 : i32")
    assert overwritten_buffers(ttgir) == []


LOOP = """
.visible .entry kernel()
{
$L__BB0_1:
	cvt.rn.bf16x2.f32 	%r1, %f1, %f2;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f3,%f4,%f5,%f6}, {%r1,%r2,%r3,%r4}, %rd1, %p1, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 1;
	@%p2 bra 	$L__BB0_1;
	wgmma.wait_group.sync.aligned 0;
	mov.b32 	%r2, 0;
	ret;
}
"""


def test_a_register_written_while_a_product_reads_it_is_told():
    (problem,) = touched_registers(LOOP)
    assert problem == "cvt.rn.bf16x2.f32 writes %r1, which a matrix instruction reads"
    assert touched_registers(LOOP.replace("aligned 1;", "aligned 0;")) == []
    assert touched_registers(LOOP.replace("%r1, %f1", "%r5, %f1")) == []
    assert len(touched_registers(LOOP.replace("wait_group.sync.aligned 0", "fence.sync.aligned"))) == 2


SUM = """
.visible .entry kernel()
{
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f3,%f4,%f5,%f6}, %rd1, %rd2, %p1, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f3,%f4,%f5,%f6}, %rd3, %rd4, 1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	add.f32 	%f7, %f3, %f3;
	st.global.b32 	[%rd5], %f4;
	mov.b32 	%f5, 0;
	ret;
}
"""


def test_a_sum_that_is_touched_before_the_wait_is_told():
    assert touched_registers(SUM) == []
    wait = "wgmma.wait_group.sync.aligned 0;"
    left_out = touched_registers(SUM.replace(wait, ""))
    assert [problem.partition(",")[0] for problem in left_out] == [
        "add.f32 touches %f3", "st.global.b32 touches %f4", "mov.b32 touches %f5",
    ]  # fmt: skip
    assert touched_registers(SUM.replace(wait, wait.replace("0", "1"))) == left_out
    copied = SUM.replace(wait, f"mov.b32 %f9, %f3;\n\t{wait}")
    assert touched_registers(copied) == []
    assert len(touched_registers(copied.replace(wait, "add.f32 %f7, %f9, %f9;"))) == 4  # a copy is no more settled
    chained = SUM.replace("%rd3, %rd4, 1", "{%f3,%f8,%f9,%f10}, %rd4, 1")
    assert touched_registers(chained)[0].startswith("wgmma.mma_async")


def test_a_wait_that_a_compiled_kernel_has_lost_is_told():
    ptx = compiled("sm_90", twice=True).asm["ptx"]
    assert touched_registers(ptx) == []
    assert touched_registers(re.sub(r"wgmma\.wait_group\.sync\.aligned 0;", "", ptx))
