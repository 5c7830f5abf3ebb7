"""Device time, call time, memory and error of every op's cases, beside its rivals. Run by `pytest bench` on a GPU."""

from __future__ import annotations

import pytest

from bench import suite
from bench.rows import OURS, record
from tritonshare.machine import Machine
from tritonshare.op import Unavailable


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


@pytest.mark.benchmark(timer=clock)
def test_row(benchmark, machine, roofs, results, row):
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled")
    benchmark.group, benchmark.params = row.group, record(row.subject)

    def time_rounds(replay, calls, rounds):
        clock.machine, clock.calls = machine, calls
        benchmark.pedantic(replay, setup=machine.lull, rounds=rounds, warmup_rounds=1)
        return benchmark.stats.stats.data

    if results.no_time():
        results.add_not_timed(row, "no time", "the minutes given had passed")
        pytest.skip("the minutes given had passed")
    try:
        benchmark.extra_info |= record(suite.measure(machine, roofs, row, time_rounds))
    except Unavailable as reason:
        results.add_not_timed(row, "unavailable", str(reason))
        pytest.skip(str(reason))
    except suite.Failed as reason:
        results.add_not_timed(row, "failed", str(reason))
        if row.provider == OURS:
            pytest.fail(f"the numeric gate: {reason}")
        pytest.skip(f"failed: {reason}")
