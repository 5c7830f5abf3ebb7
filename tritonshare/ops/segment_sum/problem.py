"""segment_sum on a device: allocation, plans and launches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from types import ModuleType
from typing import Any

import torch

from ... import choose, launch, products
from ...declare import Cost
from ...heuristic import Heuristic, with_other_stages_and_warps
from ...kernels.geometry import ceil_div
from ...plan import Device, Plan

ROWS = (16, 32, 64)  # what the kernels halve at most six times
COLUMNS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TILE = 64 * 128  # elements, 64 registers a thread at four warps
LENGTH = 256  # rows of a piece
LENGTHS = (LENGTH, 512, 1024)
SIZES = {"forward": {"": ("BLOCK_D", "BLOCK_M", "LENGTH")}, "backward_input": {"": ("BLOCK_D", "BLOCK_M")}}
VALUES = {"BLOCK_M": ROWS, "BLOCK_D": COLUMNS, "LENGTH": LENGTHS}


class SegmentHeuristic(Heuristic):
    """Block sizes: of the number of columns and the element size, and never of the rows."""

    names = SIZES
    values = VALUES

    def __init__(self, columns: int, device: Device) -> None:
        super().__init__(device)
        self.columns = columns

    @cached_property
    def plans(self) -> dict[str, Plan]:
        d = min(1 << (self.columns - 1).bit_length(), 128)
        m = min(max(2048 // d, 16), 64)
        forward = Plan.of(BLOCK_M=m, BLOCK_D=d, LENGTH=LENGTH)
        return {"forward": forward, "backward_input": Plan.of(BLOCK_M=64, BLOCK_D=d)}

    def takes(self, pass_: str, plan: Plan) -> bool:
        return plan["BLOCK_M"] * plan["BLOCK_D"] <= TILE * plan.num_warps // 4

    def alternatives(self, pass_: str) -> Iterator[Plan]:
        default = self.plans[pass_]
        for rows, columns in product(ROWS, COLUMNS):
            if columns <= 2 * self.columns:
                yield default.changed({"BLOCK_M": rows, "BLOCK_D": columns})
        yield from with_other_stages_and_warps(default)

    def order(self, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
        return plans["forward"]["BLOCK_M"], plans["forward"]["LENGTH"]


class SegmentProblem(choose.Planned):
    """segment_sum with everything fixed but the rows."""

    op = "segment_sum"
    passes: Mapping[str, tuple[int, ...]] = {"forward": (), "backward_input": (0,)}
    kept = (False,)

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        super().__init__(tensors, options, products.none, batched=(0, 1))
        (self.count,) = options
        self.columns = int(tensors[0].shape[1])

    @cached_property
    def heuristic(self) -> SegmentHeuristic:
        return SegmentHeuristic(self.columns, self.facts)

    @cached_property
    def _code(self) -> ModuleType:
        from ...kernels import segment_sum

        return segment_sum

    def _launcher(self, kernel: str, plan: Plan) -> launch.Launcher:
        return launch.Launcher(getattr(self._code, kernel), {"D": self.columns}, plan, self.device)

    @cached_property
    def _forward(self) -> launch.Launcher:
        return self._launcher("forward", self.plans["forward"])

    @cached_property
    def _sum_pieces(self) -> launch.Launcher:
        return self._launcher("sum_pieces", self.plans["forward"])

    @cached_property
    def _backward_input(self) -> launch.Launcher:
        return self._launcher("backward_input", self.plans["backward_input"])

    def allocate(self, x, segments, *, save: bool = True) -> tuple[torch.Tensor]:
        return (torch.empty((self.count, self.columns), dtype=self.dtype, device=self.device),)

    def forward(self, x, segments, *, save: bool = True) -> tuple[torch.Tensor]:
        (out,) = outs = self.allocate(x, segments)
        n = x.shape[0]
        if n == 0:
            out.zero_()
            return outs
        ids, order = torch.sort(segments.contiguous(), stable=True)
        starts = torch.searchsorted(ids, torch.arange(self.count + 1, device=ids.device))
        sizes = self.plans["forward"]
        length, blocks = sizes["LENGTH"], ceil_div(self.columns, sizes["BLOCK_D"])
        later = (n - 1) // length  # places at which pieces behind a segment's first can be
        partial = None
        if later:
            partial = torch.empty((2 * (n // length), self.columns), dtype=torch.float32, device=self.device)
        self._forward((self.count + later) * blocks, x.contiguous(), order, ids, starts, out, partial, self.count)
        if later:
            self._sum_pieces((later + 1) * blocks, partial, ids, starts, out, self.count)
        return outs

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        x, _ = tensors
        return [torch.empty(x.shape, dtype=self.dtype, device=self.device) if needs[0] else None, None]

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        dx, _ = grads = self.allocate_gradients(tensors, needs)
        if dx is not None and dx.shape[0]:
            sizes, n = self.plans["backward_input"], dx.shape[0]
            grid = ceil_div(n, sizes["BLOCK_M"]) * ceil_div(self.columns, sizes["BLOCK_D"])
            self._backward_input(grid, grad.contiguous(), tensors[1].contiguous(), dx, n, self.count)
        return grads

    def saved_bytes(self, batch: int) -> int:
        return 0

    def scratch(self, batch: int) -> int:
        return int(batch > self.plans["forward"]["LENGTH"])

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        """The least: rows and ids read once, sums written once. Sorting the ids is not counted."""
        bytes_ = (batch + self.count) * self.columns * self.dtype.itemsize + 8 * batch
        costs = {"forward": Cost(bytes_, batch * self.columns)}
        if needs[0]:
            costs["backward_input"] = Cost(bytes_, 0)
        return costs
