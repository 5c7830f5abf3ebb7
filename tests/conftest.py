"""Lanes: groups of tests that need a process of their own kind.

    reference    CPU tensors, the plain-torch path
    interpreter  CPU tensors, the kernels through Triton's interpreter; the process has TRITON_INTERPRET=1
    codegen      the kernels compiled ahead of time for real chips, no driver
    stub         real launches into a recording driver
    emulated     real launches on an emulated GPU: the compiled kernels run (bench/emulator)
    gpu          real launches on a real GPU
    dry          the tests of lane gpu without one: all is done, launches go into the recording driver, and of what the
                 kernels then leave nothing is asserted. Only by its name

A test names its lanes by markers. `--lane NAME` runs one lane; without it, all that this process can run. More markers
say when it runs:

    long             not in `make test`, but in `make long`
    sampled(*names)  of a test's cases that agree in these parameters, or attributes of them, all but the first are long
    once             not run again with the oldest Triton
"""

import fcntl
import os
import time
from contextlib import nullcontext
from itertools import cycle
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

# Inductor finds the graphs that it keeps on disk by an operator's call, whose layouts depend on the lane's path. What
# tests start inherits this.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}

import pytest
import torch

LANES = ("reference", "interpreter", "codegen", "stub", "emulated", "gpu", "dry")


def pytest_addoption(parser):
    parser.addoption("--lane", choices=LANES, help="run the tests of one lane")


def pytest_configure(config):
    torch.set_num_threads(1)  # processes run side by side
    for lane in LANES:
        config.addinivalue_line("markers", f"{lane}: runs in the {lane} lane")
    config.addinivalue_line("markers", "once: of command lines and files, or what other tests show of a Triton, too")
    config.addinivalue_line("markers", "long: not in `make test`")
    config.addinivalue_line("markers", "sampled(*names): long, but for a case of each value of these parameters")
    lane, interpreted = config.getoption("--lane"), os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:  # a test that wants products of fp32 cut to TF32 says so; of convolutions torch's default does
        torch.backends.cudnn.allow_tf32 = False
    if lane and (lane == "interpreter") != interpreted:
        raise pytest.UsageError(f"--lane {lane} needs a process with{'out' * interpreted} TRITON_INTERPRET=1")
    if lane == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("--lane gpu needs a GPU")


def lanes_of(lane, interpreted):
    """The lanes to run."""
    if lane or interpreted:
        return {lane or "interpreter"}
    return set(LANES) - {"interpreter", "dry"} - (set() if torch.cuda.is_available() else {"gpu"})


def all_but_samples_are_long(items):
    seen = set()
    for item in items:
        if (sampled := item.get_closest_marker("sampled")) is None:
            continue
        parameters = SimpleNamespace(**item.callspec.params) if hasattr(item, "callspec") else None
        names = [name for name in sampled.args if hasattr(parameters, name.split(".")[0])]
        sample = (item.nodeid.partition("[")[0], *(repr(attrgetter(name)(parameters)) for name in names))
        if sample in seen:
            item.add_marker("long")
        seen.add(sample)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    wanted = lanes_of(config.getoption("--lane"), os.environ.get("TRITON_INTERPRET") == "1")
    kept, others = [], []
    for item in items:
        if Path(__file__).parent not in item.path.parents:  # the benchmarks, collected beside the tests
            kept.append(item)
            continue
        marks = {mark.name for mark in item.iter_markers()} & set(LANES)
        if not marks:
            raise pytest.UsageError(f"{item.nodeid} names no lane")
        (kept if marks & wanted and has_path(item, wanted) else others).append(item)
    config.hook.pytest_deselected(items=others)
    all_but_samples_are_long(kept)
    # long ones last: should the time run out, one of each kind was run
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("long") is not None)


def has_path(item, wanted):
    """Whether a test is another one on the path that `both_paths` gives it: of ops that declare one for CPU tensors."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if params.get("both_paths") is None:
        return True
    return "reference" in wanted and getattr(params.get("op"), "cpu", None) is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """After an illegal access no kernel of the process runs any more: xdist puts another worker in its place."""
    done = yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return done


@pytest.fixture(autouse=True)
def no_users_table(monkeypatch):
    """Plans that this machine's user has measured stay out of the tests."""
    from tritonshare import tables

    monkeypatch.setattr(tables, "user_file", lambda arch: None)


@pytest.fixture(params=[None, "reference"], ids=["own", "by_reference"])
def both_paths(request):
    """An op that has a way of its own for CPU tensors goes it, however few samples there are, and then that of the
    others."""
    from tritonshare.launch import triton_state
    from tritonshare.plan import using

    own = None if triton_state()[1] else "cpu"
    with using(path=request.param or own) if request.param or own else nullcontext():
        yield


@pytest.fixture
def fresh_problems():
    """Ops forget their problems before and after, so that a test's own plans and devices stay its own."""
    from tritonshare.op import REGISTRY

    for op in REGISTRY.values():
        op._problems.clear()
    yield
    for op in REGISTRY.values():
        op._problems.clear()


# Of lanes gpu and dry.

ROOMS = 2  # tests that fill the GPU's memory at a time, with at most 25 GiB each


@pytest.fixture(scope="module")
def machine(pytestconfig):
    if pytestconfig.getoption("lane") == "dry":
        from bench.dry import dry_machine

        with dry_machine() as dry:
            yield dry
    else:
        from tritonshare.measure.machine import Machine

        yield Machine(torch.device("cuda"))


@pytest.fixture
def room(machine, tmp_path_factory):
    """A place among the tests that fill the GPU's memory: processes that test side by side share it."""
    for number in cycle(range(ROOMS)):
        with (tmp_path_factory.getbasetemp().parent / f"room{number}").open("w") as place:
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            yield
            if not machine.dry:
                torch.cuda.empty_cache()
            return
