"""What Triton's axis analysis concludes of the kernels' indices is true: no access is wider, and no masks are merged
more, than what they are permits. Triton's interpreter has no such analysis."""

import pytest
import torch
import triton
import triton.language as tl

from bench.launches import RecordedLaunch, record_call
from bench.steps import STEPS
from tests.axis import false_claims
from tests.ops import cases
from tritonshare import launch
from tritonshare.plan import Plan

pytestmark = [pytest.mark.codegen, pytest.mark.sampled("op.name", "kernel")]
ARCH = "sm_90"


def layouts():
    """Cases in each layout that their tensors can have."""
    for parameters in cases("tiny", "codegen"):
        op, case = parameters.values
        images = any(len(shape or ()) == 4 for shape in case.shapes)
        for layout in ("contiguous", "channels_last")[: 1 + images]:
            yield pytest.param(op, case, layout, id=f"{parameters.id}-{layout}")


@pytest.mark.parametrize(("op", "case", "layout"), [*layouts()])
def test_conclusions_are_true(op, case, layout):
    recorded = record_call(op, case, torch.bfloat16, ARCH, channels_last=layout == "channels_last")
    assert recorded.launches
    for launched in recorded.launches:
        assert false_claims(launched, ARCH) == {}


def test_conclusions_of_an_optimizers_step_are_true():
    different = {launched.kernel: launched for step in STEPS for launched in step.launches(ARCH)[0]}
    for launched in different.values():
        assert false_claims(launched, ARCH) == {}


# What the analysis gets wrong is found.


@triton.jit
def divided_again(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes % 196 % 14))


@triton.jit
def divided(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes % 14))


@triton.jit
def taken_from_a_number(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + (1024 - lanes)))


@triton.jit
def taken_from_a_number_in_a_loop(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, 256, BLOCK):
        if first < 128:
            total += tl.load(x_ptr + (1024 - first - lanes))
    tl.store(out_ptr + lanes, total)


@triton.jit
def complemented(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + (1025 + ~lanes)))


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [(divided, 0), (divided_again, 1), (complemented, 0), (taken_from_a_number, 1), (taken_from_a_number_in_a_loop, 1)],
)
def test_what_triton_gets_wrong_is_told(kernel, wrong):
    launcher = launch.Launcher(kernel, {}, Plan.of(BLOCK=64), torch.device("meta"))
    x, out = torch.empty(2, 2048, device="meta")
    assert bool(false_claims(RecordedLaunch(launcher, 4, (x, out)), ARCH)) == wrong
