"""Optimizers: device, wall and host time, launches, memory and error of a step, beside its rivals; and host time alone.

Targets, none of which has been measured yet:
    - large states: 92% of the bandwidth of a copy. At the least AdamW moves 28 bytes a parameter in fp32, and 22 where
      weights and gradients are bf16; momentum 20, SGD 12;
    - one launch a step;
    - 25 us of host time a step, or less, for 200 tensors;
    - AdamW scaled by the built-in similarity takes 1.3 times as long as plain AdamW, or less.

Rows are run by `pytest bench` on a GPU. Host time is taken on any machine. "ours" launches into a stub. "fused" and
"foreach" are torch's Python alone, its operators for lists of tensors doing nothing: torch takes longer. "single" is
torch's loop over tensors so small that their arithmetic is nothing, its operators those of a CPU.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import cycle

import pytest
import torch

from bench import optim_suite
from bench.clock import clock, take
from bench.optim_suite import RATE, RULES
from bench.rows import OURS, HostRow, is_ours, record
from bench.stub_driver import stub_driver
from tritonshare import launch

HOST_RULE = "AdamW"
HOST_PROVIDERS = (OURS, "ours, 8-bit states", "ours, similarity row", "ours, clipped", "fused", "foreach", "single")
GRADIENTS = {"persistent": 1, "fresh": 2}  # sets of gradients, which take turns


@pytest.mark.benchmark(timer=clock)
def test_step(benchmark, machine, roofs, results, step):
    take(benchmark, machine, results, step, lambda time_rounds: optim_suite.measure(machine, roofs, step, time_rounds))


def count_steps(tensors, *more, add=torch._foreach_add_, **options):
    if not tensors[0].dim():
        add(tensors, *more, **options)


@contextmanager
def no_device(provider, monkeypatch):
    """What a provider would leave to a GPU is left out."""
    if not is_ours(provider):
        for name in dir(torch):
            if name.startswith(("_foreach_", "_fused_")):
                monkeypatch.setattr(torch, name, lambda tensors, *_, **__: tensors)
        if provider == "foreach":  # its counts of steps are on the CPU on any machine
            monkeypatch.setattr(torch, "_foreach_add_", count_steps)
        yield
        return
    monkeypatch.setattr(launch, "path_of", lambda *_: launch.Path(launch.KERNELS, "a stub driver"))
    with stub_driver() as gpu:
        gpu.recording = False
        yield


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("provider", HOST_PROVIDERS)
@pytest.mark.parametrize("count", [200, 2000])
def test_host(benchmark, monkeypatch, pytestconfig, count, provider, gradients):
    row = HostRow(HOST_RULE, f"{count} tensors", "float32", f"step, {gradients} gradients", provider)
    benchmark.group, benchmark.params = f"{HOST_RULE} host, {count} tensors, {gradients} gradients", record(row)
    benchmark.extra_info |= benchmark.params
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(count)]
    sets = [[torch.zeros_like(p) for p in parameters] for _ in range(GRADIENTS[gradients])]
    turns = cycle(sets)

    def give():
        for p, g in zip(parameters, next(turns), strict=True):
            p.grad = g

    with no_device(provider, monkeypatch):
        of = optim_suite.PROVIDERS[provider]
        ready = of.build(RULES[HOST_RULE], parameters, RATE, False)
        dry = pytestconfig.getoption("dry")
        rounds, warmup = (3, 1) if dry else (20 if provider == "single" else 100, 5)
        give()
        again = {"setup": give} if len(sets) > 1 else {"iterations": 1 if dry else 10}
        benchmark.pedantic(ready.step, **again, rounds=rounds, warmup_rounds=warmup)
