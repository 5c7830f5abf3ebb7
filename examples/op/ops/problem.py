"""square on a device: allocation, plans and launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from ... import choose, launch, products
from ...declare import Cost
from ...heuristic import Heuristic
from ...kernels.geometry import ceil_div
from ...plan import Plan


class SquareHeuristic(Heuristic):
    """One size for all: nothing is used twice."""

    names: Mapping[str, Mapping[str, tuple[str, ...]]] = {
        "forward": {"": ("BLOCK",)},
        "backward_input": {"": ("BLOCK",)},
    }
    values: Mapping[str, Sequence[int]] = {"BLOCK": (256, 512, 1024, 2048)}

    @cached_property
    def plans(self) -> dict[str, Plan]:
        return {"forward": Plan.of(BLOCK=1024), "backward_input": Plan.of(BLOCK=1024)}

    def takes(self, pass_: str, plan: Plan) -> bool:
        return True

    def order(self, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
        return ()


class SquareProblem(choose.Planned):
    """square with everything fixed but the rows."""

    op = "square"
    passes: Mapping[str, tuple[int, ...]] = {"forward": (), "backward_input": (0,)}
    kept = (False,)  # the backward reads the input, not the output

    def __init__(self, tensors: Sequence[torch.Tensor | None], options: tuple[Any, ...]) -> None:
        super().__init__(tensors, options, products.none)
        self.columns = int(tensors[0].shape[1])

    @cached_property
    def heuristic(self) -> SquareHeuristic:
        return SquareHeuristic(self.facts)

    def _launcher(self, kernel: str) -> launch.Launcher:
        from ...kernels import square

        return launch.Launcher(getattr(square, kernel), {}, self.plans[kernel], self.device)

    @cached_property
    def _forward(self) -> launch.Launcher:
        return self._launcher("forward")

    @cached_property
    def _backward_input(self) -> launch.Launcher:
        return self._launcher("backward_input")

    def _programs(self, pass_: str, elements: int) -> int:
        return ceil_div(elements, self.plans[pass_]["BLOCK"])

    def allocate(self, x, *, save: bool = True) -> tuple[torch.Tensor]:
        return (torch.empty(x.shape, dtype=self.dtype, device=self.device),)

    def forward(self, x, *, save: bool = True) -> tuple[torch.Tensor]:
        (y,) = outs = self.allocate(x)
        if y.numel():
            self._forward(self._programs("forward", y.numel()), x.contiguous(), y, y.numel())
        return outs

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        return [torch.empty(tensors[0].shape, dtype=self.dtype, device=self.device) if needs[0] else None]

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        (dx,) = grads = self.allocate_gradients(tensors, needs)
        if dx is not None and dx.numel():
            programs = self._programs("backward_input", dx.numel())
            self._backward_input(programs, tensors[0].contiguous(), grad.contiguous(), dx, dx.numel())
        return grads

    def saved_bytes(self, batch: int) -> int:
        return 0

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        elements = batch * self.columns
        costs = {"forward": Cost(2 * elements * self.dtype.itemsize, elements)}
        if needs[0]:
            costs["backward_input"] = Cost(3 * elements * self.dtype.itemsize, 2 * elements)
        return costs
