"""A dry run: what a benchmark does on a GPU, done where there is none, with kernels that are launched into nothing.

Tensors are on the CPU, the stub driver takes the launches, and their results are whatever was in memory: nothing that
a dry run prints is a measurement, and the numeric gate cannot judge this library's results. All else is real: Triton
compiles for sm_90, rivals compute, and clocks, files and exit statuses are those of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from triton.runtime import driver as drivers

from bench.stub_driver import stub_driver
from tritonshare import plan
from tritonshare.measure.machine import Call, Machine


class DryMachine(Machine):
    dry = True

    free_bytes = 2**30  # so that a dry run of everything takes minutes

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def stream(self) -> AbstractContextManager:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def stamp(self) -> float:
        return perf_counter()

    def keep_busy(self) -> None:
        pass

    def capture(self, calls: Sequence[Call], times: int = 1) -> Call:
        return lambda: [call() for call in calls]

    def times(self, seconds: float) -> int:
        return 1

    def copies(self, nbytes: int) -> int:
        return 2

    def peak_bytes(self, call: Call) -> int:
        call()
        return 0

    def launches(self, call: Call) -> int | None:
        launches = drivers.active.launches
        before = len(launches)
        call()
        return len(launches) - before or None

    @cached_property
    def clocks(self) -> dict[str, str]:
        return dict.fromkeys(("sm_mhz", "sm_max_mhz", "memory_mhz"), "none")

    @cached_property
    def gpu(self) -> str:
        return "none (dry run)"

    driver = "none"


def compile_quickly(function: Any, *, fullgraph: bool = False, dynamic: bool | None = None, **_: Any) -> Any:
    """torch.compile without a code generator: what it traces is the same."""
    return _compile(function, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic)


_compile = torch.compile


@contextmanager
def dry_machine() -> Iterator[DryMachine]:
    torch.compile = compile_quickly
    # of a process's first square roots some had 12 bits, where they were of a tensor that threads share (torch 2.13)
    torch.ones(64).sqrt()
    try:
        with stub_driver(), plan.kernels_everywhere():
            yield DryMachine()
    finally:
        torch.compile = _compile
