"""Every op's real launches, into a driver that claims to be a GPU and records them."""

from types import SimpleNamespace

import pytest
import torch

from bench.stub_driver import stub_driver
from tests.guard import Guard
from tests.ops import call, case_of, cases, first_sample, leaves, of_batch, ops, scalars, wanting
from tritonshare import gate, launch, plan
from tritonshare.check import ArgumentError
from tritonshare.declare import differentiable

pytestmark = pytest.mark.stub


@pytest.fixture
def gpu(monkeypatch, fresh_problems):
    monkeypatch.setattr(launch, "path_of", lambda *_: launch.Path(launch.KERNELS, "a stub driver"))
    with stub_driver() as driver:
        yield driver


def halves(case):
    return leaves(case, torch.float16)


def backward(output, tensors):
    return torch.autograd.grad(output, wanting(tensors), torch.ones_like(output))


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_launches_follow_the_plans(gpu, op, case):
    tensors = halves(case)
    output = call(op, tensors, **case.options)
    before = len(gpu.launches)
    grads = backward(output, tensors)
    problem = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
    planned = [(p.variant or name, p) for name, p in problem.plans.items()]
    again = [r for r in gpu.launches[before:] if r.name == planned[0][0]]  # a backward that computes the output again
    assert len(again) <= 1
    planned[1:1] = planned[:1] * len(again)
    launched = [r for r in gpu.launches if r.name in dict(planned)]
    assert [r.name for r in launched] == [name for name, _ in planned]
    with launch.record() as expected:  # the same call once more, for the grids
        backward(call(op, tensors, **case.options), tensors)
    assert [(r.name, r.grid) for r in gpu.launches] == [(e.launcher.kernel.__name__, (e.grid, 1, 1)) for e in expected]
    for record, (_, used) in zip(launched, planned, strict=True):
        assert (record.metadata.num_warps, record.metadata.num_stages) == (used.num_warps, used.num_stages)
        assert {name: record.arguments[name] for name, _ in used.blocks} == dict(used.blocks)
    pointers = {a.data_ptr() for r in gpu.launches for a in r.arguments.values() if isinstance(a, torch.Tensor)}
    # those of scalars are sums by torch
    of_kernels = grads[: sum(differentiable(tensors[: op.tensors - op.scalars]))]
    given = [t for t in (*tensors, output, *of_kernels) if t is not None]
    assert {t.data_ptr() for t in given} - pointers <= {t.data_ptr() for t in tensors[2:] if t is not None} - pointers


@pytest.mark.parametrize("op", ops())
def test_a_repeated_call_neither_compiles_nor_binds(gpu, op):
    case = case_of(op, "tiny")
    for batch in (case.tensors[0][0], case.tensors[0][0], case.tensors[0][0] + 3):
        tensors = first_sample(op, halves(case), batch)
        work = (len(gpu.compiles), gpu.binder_runs)
        backward(call(op, tensors, **case.options), tensors)
        if gpu.launches and batch != case.tensors[0][0]:
            assert (len(gpu.compiles), gpu.binder_runs) == work
    launches = len(gpu.launches)
    backward(call(op, tensors, **case.options), tensors)
    assert (len(gpu.compiles), gpu.binder_runs) == work
    assert len(gpu.launches) > launches


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_batches_of_every_size_share_a_problem(gpu, op, case):
    """The stub refuses a launch that does not suit what was compiled for another batch."""
    for batch in (1, 200, 1, 17):
        many = first_sample(op, halves(case), batch)
        backward(call(op, many, **case.options), many)
    assert len({id(problem) for problem in op._problems.values()}) == 1


def argument_of(name):
    """What kernels call a scalar: a kind has one of its own."""
    return "number" if name in ("gamma", "eps") else name


@pytest.mark.parametrize(("op", "name"), scalars())
def test_another_number_neither_compiles_nor_binds(gpu, op, name):
    place = op.arguments.index(f"{name}_tensor")
    case = next(case for case in op.cases if case.tensors[place] is not None)
    tensors = [None if i == place else t for i, t in enumerate(halves(case))]
    for value in (0.5, 0.75, 1.0):
        work = (len(gpu.compiles), gpu.binder_runs)
        backward(call(op, tensors, **case.options, **{name: value}), tensors)
    assert (len(gpu.compiles), gpu.binder_runs) == work
    assert any(value == record.arguments.get(argument_of(name)) for record in gpu.launches)


@pytest.mark.parametrize(("op", "name"), scalars())
def test_the_host_does_not_wait_for_a_tensors_value(gpu, op, name, monkeypatch):
    case = next(case for case in op.cases if case.tensors[op.arguments.index(f"{name}_tensor")] is not None)
    tensors = halves(case)
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "__float__", None)
    backward(call(op, tensors, **case.options), tensors)
    assert any(isinstance(record.arguments.get(argument_of(name)), torch.Tensor) for record in gpu.launches)


@pytest.mark.parametrize("op", ops())
def test_calls_with_and_without_gradients_are_kernels_of_their_own(gpu, op):
    case = case_of(op, "tiny")
    tensors = halves(case)
    for _ in range(2):
        backward(call(op, tensors, **case.options), tensors)
        with torch.no_grad():
            call(op, tensors, **case.options)
    without = gpu.launches[-1]
    with_gradients = next(r for r in gpu.launches if r.name == without.name)
    absent = [name for name, value in without.arguments.items() if value is None]
    problem = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
    spared = any(isinstance(with_gradients.arguments[name], torch.Tensor) for name in absent)
    # squares are for the similarities themselves, too
    needed = problem.saved_bytes(case.shapes[0][0]) == 0 or gpu.launches[0].name == "row_squares"
    assert spared or needed, "nothing was spared"


@pytest.mark.parametrize("op", ops())
def test_an_unaligned_view_is_compiled_once_for_itself(gpu, op):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float16)
    call(op, tensors, **case.options)
    compiled = len(gpu.compiles)
    readers = sum(any(a is tensors[0] for a in r.arguments.values()) for r in gpu.launches)
    guard = Guard.empty(tuple(tensors[0].shape), torch.float16, offset=1)
    for _ in range(2):
        call(op, [guard.tensor, *tensors[1:]], **case.options)
        assert len(gpu.compiles) == compiled + readers > compiled


@pytest.mark.parametrize("op", ops())
def test_nothing_is_launched_for_an_empty_batch_or_a_bad_argument(gpu, op):
    case = case_of(op, "tiny")
    x, *rest = tensors = halves(case)
    empty = gate.wanting_gradients(of_batch(op, tensors, slice(0)))
    grads = backward(call(op, empty, **case.options), empty)
    assert all((g == 0).all() for g in grads)
    with pytest.raises(ArgumentError):
        call(op, [x[:, :0], *rest], **case.options)
    assert gpu.launches == []


@pytest.mark.parametrize("op", ops())
def test_a_grid_that_does_not_fit_is_refused(gpu, op, monkeypatch):
    case = case_of(op, "tiny")
    monkeypatch.setattr(launch, "GRID_LIMIT", 0)
    with pytest.raises(ArgumentError, match="programs"):
        call(op, gate.make_tensors(case, torch.float16), **case.options)
    assert gpu.launches == []


@pytest.mark.parametrize("op", ops())
def test_another_current_device_is_switched_for_the_launch(gpu, op, monkeypatch):
    """A launcher for cuda:1 while cuda:0 is current."""
    current, switched = [0], []

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            switched.append(self.index)
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_device=lambda: current[-1], device=Guard))
    seen = []
    launcher = launch.Launcher.__new__(launch.Launcher)
    launcher.device = torch.device("cuda", 1)
    monkeypatch.setattr(launch.Launcher, "_launch", lambda self, grid, args: seen.append(current[-1]))
    launcher(1)
    launcher.device = torch.device("cuda", 0)
    launcher(1)
    assert (seen, switched) == ([1, 0], [1])


@pytest.mark.parametrize("op", ops())
def test_plans_are_pure_and_obey_using(gpu, op):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float16)
    options = op.canonical(tensors, *gate.raw_options(op, case.options))
    plans = op.problem(tensors, options).plans
    assert op.problem(tensors, options).plans == plans
    larger = [tensors[0].repeat(7, *[1] * (tensors[0].dim() - 1)), *tensors[1:]]
    assert op.problem(larger, options).plans == plans
    with plan.using(plan={"num_stages": 1}):
        assert all(p.num_stages == 1 for p in op.problem(tensors, options).plans.values())
    for wrong in ({"BLOCK_M": 0}, {"BLOCK_M": "64"}):
        with pytest.raises(ArgumentError), plan.using(plan=wrong):
            pass
    with pytest.raises(ArgumentError), plan.using(path="unknown"):
        pass
