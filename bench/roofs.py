"""What a GPU can do at the most, for modelled floors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.launches import NUMBERS, numbers
from tritonshare.declare import Cost
from tritonshare.measure.machine import Call, Interval, Machine


@dataclass(frozen=True)
class Roofs:
    """Rates that a long copy and a large matrix product reach."""

    name: str
    bytes_per_second: float
    flops_per_second: dict[str, float]  # by the names of launches.NUMBERS

    def floor(self, cost: Cost, name: str) -> float:
        """The least time of a pass, in microseconds: MODELLED, the larger of its bytes' and its products' time."""
        return 1e6 * max(cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second[name])


# Copy and bf16 were measured on this GPU through torch (8.6 GB copied; an 8192^3 product of random numbers); TF32 and
# fp32 are the vendor's rates scaled alike. No kernel of this library has been timed on it yet.
H200 = Roofs("H200", 4.3e12, {"bf16": 790e12, "fp16": 790e12, "tf32": 400e12, "fp32": 67e12})


def measured(machine: Machine) -> Roofs:
    """What torch reaches on this machine now: a copy of two gigabytes, and products of 8192 x 8192 matrices."""
    size, nbytes = (64, 2**20) if machine.dry else (8192, 2**31)
    with machine.stream():
        copy = 2 * nbytes / _copy_seconds(machine, nbytes)
        return Roofs(machine.gpu, copy, {name: 2 * size**3 / _product_seconds(machine, name, size) for name in NUMBERS})


def _copy_seconds(machine: Machine, nbytes: int) -> float:
    source = torch.ones(nbytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    return _seconds(machine, lambda: target.copy_(source))


def _product_seconds(machine: Machine, name: str, size: int) -> float:
    with numbers(name) as dtype:
        a, b = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return _seconds(machine, lambda: torch.mm(a, b, out=out))


def _seconds(machine: Machine, call: Call) -> float:
    call()
    return Interval.of(machine.time(machine.capture([call], 3), 10)).median / 3
