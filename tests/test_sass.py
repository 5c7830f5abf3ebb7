"""bench/sass.py sees what it claims to see: each instruction class on a kernel that must, or must not, produce it."""

from dataclasses import dataclass
from functools import cache

import pytest
import triton
import triton.language as tl

from bench.sass import Code, compile_for, inspect, parse_target

pytestmark = pytest.mark.codegen

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)


@triton.jit
def dot_kernel(x_ptr, y_ptr, z_ptr, depth, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None] * BLOCK
    columns = tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(depth):
        tile = step * BLOCK * BLOCK + rows + columns
        acc = tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile), acc)
    tl.store(z_ptr + rows + columns, acc)


@dataclass(frozen=True)
class Affine:
    scale: int
    terms: int


@triton.jit
def clamp(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def affine_kernel(x_ptr, bias_ptr, y_ptr, RULE: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr = 1024):
    # An attribute of a record is a plain number: static_range wants it named as a constexpr first.
    TERMS: tl.constexpr = RULE.terms
    offs = tl.arange(0, BLOCK)
    y = CLAMP(tl.load(x_ptr + offs)) * RULE.scale
    for _ in tl.static_range(TERMS):
        y += 1.0
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs)
    tl.store(y_ptr + offs, y)


@cache
def copy_code(target: str, aligned: bool) -> Code:
    signature = {"x_ptr": "*fp16", "y_ptr": "*fp16", "n": "i32"}
    names = tuple(signature) if aligned else ()
    return inspect(compile_for(copy_kernel, signature, {"BLOCK": 1024}, target, aligned=names, enable_fp_fusion=True))


@cache
def dot_code(target: str, **options) -> Code:
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "z_ptr": "*fp32", "depth": "i32"}
    aligned = ("x_ptr", "y_ptr", "z_ptr")
    constants = {"BLOCK": options.pop("BLOCK", 64)}
    compiled = compile_for(dot_kernel, signature, constants, target, aligned=aligned, enable_fp_fusion=True, **options)
    return inspect(compiled)


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_copy_is_wide(target):
    code = copy_code(target, aligned=True)
    assert code.target == target
    assert code.wide_loads > 0
    assert code.wide_stores > 0
    assert code.narrow_loads == code.narrow_stores == 0
    assert code.tensor_core == code.shuffles == 0
    assert not code.spilled
    assert 0 < code.registers < 64
    assert code.instructions == sum(code.counts.values())


@pytest.mark.parametrize("target", TARGETS)
def test_unaligned_copy_is_narrow(target):
    code = copy_code(target, aligned=False)
    assert code.wide_loads == code.wide_stores == 0
    assert code.narrow_loads >= 4
    assert code.narrow_stores >= 4


@pytest.mark.parametrize("target", TARGETS)
def test_dot_reaches_the_tensor_cores(target):
    code = dot_code(target)
    assert code.tensor_core > 0
    assert code.wide_loads > 0
    assert code.shared_bytes > 0
    assert not code.spilled
    assert str(code.tensor_core) in str(code)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_pipelined_dot_copies_asynchronously(target):
    code = dot_code(target, num_stages=3)
    assert code.async_copies > 0
    assert code.narrow_loads == 0


def test_spill_is_seen():
    code = dot_code("sm_90", BLOCK=128, maxnreg=128)
    assert code.registers <= 128
    assert code.spill_bytes > 0
    assert code.count("LDL|STL") > 0
    assert code.spilled


def test_spill_is_seen_on_amd():
    code = dot_code("gfx942", BLOCK=128, num_warps=1)
    assert code.spill_bytes > 0
    assert code.count("scratch_store") > 0
    assert code.spilled


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_constants_of_every_kind(target):
    signature = {"x_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*fp32"}
    constants = {"RULE": Affine(scale=3, terms=2), "CLAMP": clamp}
    with_bias = inspect(
        compile_for(affine_kernel, signature, constants, target, aligned=signature, enable_fp_fusion=True)
    )
    del signature["bias_ptr"]
    constants["bias_ptr"] = None
    without = inspect(
        compile_for(affine_kernel, signature, constants, target, aligned=signature, enable_fp_fusion=True)
    )
    assert with_bias.wide_loads == 2 * without.wide_loads > 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown target 'h200'"):
        parse_target("h200")
    with pytest.raises(TypeError, match="copy_kernel takes"):
        compile_for(copy_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 64}, "sm_90", aligned=())
    with pytest.raises(TypeError, match="aligned names"):
        compile_for(
            copy_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}, {"BLOCK": 64}, "sm_90", aligned=("m",)
        )
