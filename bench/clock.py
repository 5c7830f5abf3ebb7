"""A row of the benchmarks as a test: timed by the machine's stamps, or told why it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.rows import is_ours, record
from bench.suite import Failed, TimeRounds
from tritonshare.declare import Unavailable
from tritonshare.measure.machine import Machine


class Clock:
    """The timer of a row: the machine's stamps, whose difference is in seconds a call of a replay."""

    __name__ = "clock"
    machine: Machine
    calls: int

    def __call__(self) -> Share:
        return Share(self.machine.stamp(), self.calls)


class Share:
    def __init__(self, stamp, calls: int) -> None:
        self.stamp, self.calls = stamp, calls

    def __sub__(self, earlier: Share) -> float:
        return (self.stamp - earlier.stamp) / self.calls


clock = Clock()


def take(benchmark, machine: Machine, results, row, measure: Callable[[TimeRounds], Any]) -> None:
    """Record what `measure` finds of a row, or the reason that there is nothing."""
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled")
    benchmark.group, benchmark.params = row.group, record(row.subject)

    def time_rounds(replay, calls, rounds):
        clock.machine, clock.calls = machine, calls
        benchmark.pedantic(replay, setup=machine.keep_busy, rounds=rounds, warmup_rounds=1)
        return benchmark.stats.stats.data

    if results.no_time():
        results.add_not_timed(row, "no time", "the minutes given had passed")
        pytest.skip("the minutes given had passed")
    try:
        benchmark.extra_info |= record(measure(time_rounds))
    except Unavailable as reason:
        results.add_not_timed(row, "unavailable", str(reason))
        pytest.skip(str(reason))
    except Failed as reason:
        results.add_not_timed(row, "failed", str(reason))
        if is_ours(row.subject.provider):
            pytest.fail(f"the numeric gate: {reason}")
        pytest.skip(f"failed: {reason}")
