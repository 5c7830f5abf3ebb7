"""Host time: microseconds of a call, with the device stubbed out, beside calls that do as little as torch allows.

Run by `pytest bench`. Rows: `ours` is an op's public function (checked, planned, allocated, launched into a stub);
`function` a torch.autograd.Function that only allocates its output; `torch` is the reference's first torch call on
tensors so small that its arithmetic is nothing.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.launches import call
from tests.stub_driver import stub_driver
from tritonshare import gate, launch
from tritonshare.op import REGISTRY, Case

DTYPE = torch.float16
ROUNDS = {"rounds": 200, "iterations": 100, "warmup_rounds": 20}
WAYS = ("no_grad", "forward", "forward_backward")


@pytest.fixture
def device_stub(monkeypatch):
    monkeypatch.setattr(launch, "path_of", lambda device, dtype: launch.Path(True, "a stub driver"))
    with stub_driver() as gpu:
        yield gpu


def small(op):
    """The op's first case, one sample of it."""
    case = next(case for case in op.cases if "tiny" in case.tags)
    first, *rest = case.tensors
    return Case(case.name, case.tags, ((1, *first[1:]), *rest), case.options)


def measure(benchmark, way, function, tensors):
    if way == "no_grad":
        with torch.no_grad():
            benchmark.pedantic(function, tensors, **ROUNDS)
        return
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    if way == "forward":
        benchmark.pedantic(function, leaves, **ROUNDS)
        return
    grad = torch.empty_like(function(*leaves))
    wanted = [t for t in leaves if t is not None]
    benchmark.pedantic(lambda: torch.autograd.grad(function(*leaves), wanted, grad), **ROUNDS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", REGISTRY.values(), ids=list(REGISTRY))
def test_ours(benchmark, device_stub, op, way):
    benchmark.group = f"{op.name} {way}"
    case = small(op)
    tensors = gate.make_tensors(case, DTYPE)
    device_stub.recording = False
    measure(benchmark, way, lambda *t: call(op, t, case), tensors)


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(None if t is None else torch.empty_like(t) for t in ctx.saved_tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", REGISTRY.values(), ids=list(REGISTRY))
def test_function(benchmark, op, way):
    benchmark.group = f"{op.name} {way}"
    measure(benchmark, way, Bare.apply, gate.make_tensors(small(op), DTYPE))


@pytest.mark.parametrize("way", WAYS)
def test_torch_conv2d(benchmark, way):
    benchmark.group = f"conv2d_act_pool {way}"
    tensors = [torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1)]
    measure(benchmark, way, F.conv2d, tensors)
