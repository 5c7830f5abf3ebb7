"""Host time: microseconds of a call with the device stubbed out, beside calls that do as little as torch allows.

Run by `pytest bench`, on any machine. Rows: "ours" is an op's public function (checked, planned, allocated, launched
into a stub); "autograd.Function" one that only allocates its output; "torch" the op's reference on tensors so small
that their arithmetic is nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from math import prod

import pytest
import torch

from bench.launches import call
from bench.rows import OURS, PASSES, HostRow, record
from bench.stub_driver import stub_driver
from tritonshare import gate, launch
from tritonshare.declare import first_of
from tritonshare.op import REGISTRY

ROUNDS = {"rounds": 200, "iterations": 100, "warmup_rounds": 20}
DRY_ROUNDS = {"rounds": 3, "iterations": 1, "warmup_rounds": 1}


def one_sample(op):
    """The op's first case, one sample of it."""
    case = next(case for case in op.cases if "tiny" in case.tags)
    return op.case_of_batch(case, 1)


def smallest(op):
    """The op's case with the fewest elements, if not none."""
    counted = [(sum(prod(shape) for shape in case.shapes if shape), case.name, case) for case in op.cases]
    return min((entry for entry in counted if 0 not in entry[2].tensors[0]), key=lambda entry: entry[:2])[2]


@contextmanager
def ours(op, monkeypatch):
    case = one_sample(op)
    monkeypatch.setattr(launch, "path_of", lambda *_: launch.Path(launch.KERNELS, "a stub driver"))
    with stub_driver() as gpu:
        gpu.recording = False
        yield case, torch.float16, lambda *tensors: call(op, tensors, case)


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(None if t is None else torch.empty_like(t) for t in ctx.saved_tensors)


@contextmanager
def bare(op, monkeypatch):
    yield one_sample(op), torch.float16, Bare.apply


@contextmanager
def in_torch(op, monkeypatch):
    case = smallest(op)
    tensors = gate.make_tensors(case, torch.float32)
    options = op.canonical(tensors, *gate.raw_options(op, case.options))
    yield case, torch.float32, lambda *tensors: op.reference(*tensors, *options)


PROVIDERS = {OURS: ours, "autograd.Function": bare, "torch": in_torch}


@pytest.mark.parametrize("pass_", [name for name in PASSES if name != "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("op", REGISTRY.values(), ids=list(REGISTRY))
def test_host(benchmark, monkeypatch, pytestconfig, op, provider, pass_):
    rounds = DRY_ROUNDS if pytestconfig.getoption("dry") else ROUNDS
    benchmark.group = f"{op.name} host {pass_}"
    with PROVIDERS[provider](op, monkeypatch) as (case, dtype, function):
        row = HostRow(op.name, case.name, str(dtype).removeprefix("torch."), pass_, provider)
        benchmark.params = record(row)  # in place of what it was parametrised by, which no JSON holds
        benchmark.extra_info |= benchmark.params
        tensors = gate.make_tensors(case, dtype)
        if pass_ == "inference":
            with torch.no_grad():
                benchmark.pedantic(function, tensors, **rounds)
            return
        leaves = gate.wanting_gradients(tensors)
        if pass_ == "training":
            benchmark.pedantic(function, leaves, **rounds)
            return
        grad = torch.empty_like(first_of(function(*leaves)))
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        benchmark.pedantic(lambda: torch.autograd.grad(first_of(function(*leaves)), wanted, grad), **rounds)
