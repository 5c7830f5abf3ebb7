"""How an op chooses the plans of a problem where none was measured: the default plans, and which others would fit.

A heuristic is a pure function of the problem and the device. The tuner measures its candidates against its default
plans, and a measured plan counts only where it `fits` and takes sums in the same `order`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any

from .plan import Device, Plan

STAGES = (1, 2, 3, 4, 5)
WARPS = (4, 8, 2)  # eight and two only where a measurement, which also compares bits, has chosen them


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds n, within low .. high."""
    return min(max(1 << max(0, n - 1).bit_length(), low), high)


def with_other_stages_and_warps(plan: Plan) -> Iterator[Plan]:
    """The plan with every number of stages, then with every number of warps."""
    for stages in STAGES:
        yield replace(plan, num_stages=stages)
    for warps in WARPS:
        yield replace(plan, num_warps=warps)


def with_other_sizes(plan: Plan) -> Iterator[Plan]:
    """The plan with each of its sizes as it is, twice as large or half as large."""
    choices = ([(name, s) for s in (size, 2 * size, size // 2)] for name, size in plan.blocks)
    for sizes in product(*choices):
        yield plan.changed(dict(sizes))


class Heuristic(ABC):
    """The default plans of one problem, and what other plans it could be given.

    names: the sizes that a kernel takes, in alphabetical order, by pass and by variant of the kernel.
    values: the values that each size may have.
    """

    names: Mapping[str, Mapping[str, tuple[str, ...]]]
    values: Mapping[str, Sequence[int]]

    def __init__(self, device: Device) -> None:
        self.device = device

    # What each op declares.

    @cached_property
    @abstractmethod
    def plans(self) -> dict[str, Plan]:
        """The default plans, by pass."""

    @abstractmethod
    def takes(self, pass_: str, plan: Plan) -> bool:
        """Whether the kernel can compute this problem with these sizes, each of which has one of its `values`, and
        has the registers for it."""

    @abstractmethod
    def order(self, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
        """Everything in the plans that decides in which order sums are taken."""

    def stage_bytes(self, pass_: str, variant: str, sizes: Mapping[str, int]) -> int:
        """How much shared memory the operands of one round of a kernel's loop take."""
        return 0

    def alternatives(self, pass_: str) -> Iterable[Plan]:
        """Plans that are worth a measurement, if they fit; the order is that in which they are measured."""
        default = self.plans[pass_]
        yield from with_other_sizes(default)
        yield from with_other_stages_and_warps(default)

    # What follows from these.

    def staged(self, pass_: str, variant: str = "", *, most: int = 4, programs: int = 2, **blocks: int) -> Plan:
        """A plan with as many stages, up to `most`, as leave room for this many programs on a multiprocessor."""
        stages = min(most, self.device.shared // programs // self.stage_bytes(pass_, variant, blocks))
        return Plan.of(variant, num_stages=max(1, stages), **blocks)

    def fits(self, pass_: str, plan: Plan) -> bool:
        """Whether a kernel of this pass takes the plan, the problem allows it and the device has room for it. Any
        plan may be asked about, and any name."""
        sizes = dict(plan.blocks)
        if self.names.get(pass_, {}).get(plan.variant) != tuple(sizes):
            return False
        if any(size not in self.values[name] for name, size in sizes.items()):
            return False
        if plan.num_warps not in WARPS or plan.num_stages not in STAGES or not self.takes(pass_, plan):
            return False
        return plan.num_stages * self.stage_bytes(pass_, plan.variant, sizes) <= self.device.shared

    def candidates(self, pass_: str) -> Iterator[Plan]:
        """Plans that fit and are worth a measurement, each once, the default plan first."""
        for plan in dict.fromkeys((self.plans[pass_], *self.alternatives(pass_))):
            if self.fits(pass_, plan):
                yield plan

    def keeps_order(self, pass_: str, plan: Plan) -> bool:
        """Whether a plan takes sums in the order of the default plan."""
        return self.order({**self.plans, pass_: plan}) == self.order(self.plans)
