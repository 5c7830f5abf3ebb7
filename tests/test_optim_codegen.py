"""The optimizers' kernels, compiled for real chips as a step's launches would be: accesses of 16 bytes for every dtype
of weights and states, no spills, and nothing lost against the record."""

from collections import Counter

import pytest
import torch

from bench import codegen
from bench.hazards import hazards
from bench.sass import inspect
from bench.steps import STATES, STEPS
from tests.ops import OPS
from tritonshare import plan

pytestmark = [pytest.mark.codegen, pytest.mark.sampled("step.rule", "arch")]
WIDEST = r"{}\S*\.128"


def named(steps):
    return [pytest.param(step, id=f"{step.rule}-{step.dtype}-{step.case}".replace(" ", "_")) for step in steps]


def compiled_launches(step, arch):
    launches, _ = step.launches(arch)
    assert launches
    for launch in launches:
        compiled = launch.compile(arch)
        code = inspect(compiled)
        told = f"{launch.kernel} [{launch.plan}] {code}"
        assert code.shared_bytes <= plan.DEVICES[arch].shared, told
        assert hazards(compiled) == [], told
        assert not code.spilled, told
        yield launch, code, told


@pytest.mark.parametrize("step", named(STEPS))
def test_compiles_well(step):
    before = Counter()
    for launch, code, told in compiled_launches(step, codegen.RECORDED["arch"]):
        row = {"op": step.rule, "case": step.case, "dtype": step.dtype, **codegen.compiled(launch, code)}
        assert codegen.against_record(row, before[launch.kernel]) == [], told
        before[launch.kernel] += 1
        if launch.kernel == "update" and step.aligned:
            read, written = accesses(step, launch)
            assert code.count(WIDEST.format("LDG")) >= read, told
            assert code.count(WIDEST.format("STG")) >= written, told


def accesses(step, launch):
    """A thread's loads and stores of 16 bytes, where it has its share of a whole block in nothing else."""
    optimizer = step.optimizer()
    (parameter, *_) = (p for group in optimizer.param_groups for p in group["params"])
    spec = launch.launcher.constants["spec"]
    states = [STATES[step.state].itemsize] * spec.states
    lanes = launch.plan["BLOCK"] // (32 * launch.plan.num_warps)
    read = [parameter.element_size(), parameter.grad.element_size(), *states]
    cleared = [parameter.grad.element_size()] * (spec.keep_grad == "zero")
    return sum(lanes * size // 16 for size in read), sum(lanes * size // 16 for size in [read[0], *states, *cleared])


@pytest.mark.parametrize("arch", [arch for arch in plan.DEVICES if arch != codegen.RECORDED["arch"]])
@pytest.mark.parametrize("step", named(s for s in STEPS if s.rule == "AdamW" and s.aligned))
def test_compiles_for_every_chip(step, arch):
    assert [*compiled_launches(step, arch)]


def test_rules_are_no_names_of_ops():
    assert not {*codegen.CLASSES} & {op.name for op in OPS}


def test_every_kernel_of_a_step_is_recorded():
    kernels = {launch.kernel for step in STEPS for launch in step.launches("sm_90")[0]}
    assert kernels == {"update", "cosine_pieces", "cosine_rows", "square_sums", "clip_factor"}


def test_a_step_that_is_unaligned_lies_so():
    for step in STEPS:
        optimizer = step.optimizer()
        tensors = [t for group in optimizer.param_groups for p in group["params"] for t in (p, p.grad)]
        assert all((t.storage_offset() * t.element_size() % 16 == 0) == step.aligned for t in tensors)
        assert all(t.device == torch.device("meta") for t in tensors)
