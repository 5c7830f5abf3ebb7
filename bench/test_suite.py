"""Device time, call time, memory and error of every op's cases, beside its rivals. Run by `pytest bench` on a GPU."""

from __future__ import annotations

import pytest

from bench import suite
from bench.clock import clock, take


@pytest.mark.benchmark(timer=clock)
def test_row(benchmark, machine, roofs, results, row):
    take(benchmark, machine, results, row, lambda time_rounds: suite.measure(machine, roofs, row, time_rounds))
