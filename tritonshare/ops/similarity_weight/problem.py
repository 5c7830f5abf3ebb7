"""similarity_weight on a device: allocation, plans and launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from ... import launch, plan
from ...declare import Cost
from ...heuristic import Heuristic, power_of_two
from ...kernels.geometry import Similarity, ceil_div
from ...plan import Plan
from ..similarity.rows import RowsProblem, total

BACKWARD = "backward"  # the kernel of both gradients
SIZES = {
    "forward": {"": ("BLOCK_M", "BLOCK_N", "BLOCK_RED")},
    "backward_x": {BACKWARD: ("BLOCK_C", "BLOCK_M", "BLOCK_N")},
    "backward_y": {BACKWARD: ("BLOCK_C", "BLOCK_M", "BLOCK_N")},
}
BLOCKS = (16, 32, 64, 128, 256)
TILE = 128 * 128  # elements of an accumulator, 128 registers a thread at four warps


class SimilarityHeuristic(Heuristic):
    """Block sizes: of the columns, the rows of y and the element size, and never of the rows of x."""

    names = SIZES
    values = dict.fromkeys(("BLOCK_C", "BLOCK_M", "BLOCK_N", "BLOCK_RED"), BLOCKS)

    def __init__(self, n: int, k: int, itemsize: int, squares: int, distance: bool, device: plan.Device) -> None:
        super().__init__(device)
        self.n, self.k, self.itemsize = n, k, itemsize
        self.squares, self.distance = squares, distance

    @cached_property
    def plans(self) -> dict[str, Plan]:
        wide = self.itemsize == 4
        deep = 32 if wide else 64
        # the gradient of a distance holds the pairs' weights, and whether they are near
        few = wide or self.device.arch.startswith("sm_10")
        columns, others = (64 if few else 128, 32) if self.distance else (128, deep)
        return {
            "forward": self.staged(
                "forward",
                BLOCK_M=64 if wide or self.device.arch.startswith("sm_8") else 128,
                # where both matrices are squared, and near pairs have a second tile, registers are short
                BLOCK_N=power_of_two(self.n, 16, 64 if self.squares == 2 else 128),
                BLOCK_RED=power_of_two(self.k, 16, deep),
            ),
            **{
                name: self.staged(name, BACKWARD, BLOCK_M=64, BLOCK_C=power_of_two(self.k, 16, columns), BLOCK_N=others)
                for name in ("backward_x", "backward_y")
            },
        }

    def stage_bytes(self, pass_: str, variant: str, sizes: Mapping[str, int]) -> int:
        if pass_ == "forward":
            return (sizes["BLOCK_M"] + sizes["BLOCK_N"]) * sizes["BLOCK_RED"] * self.itemsize
        of_pair = self.itemsize + (4 if self.distance else self.itemsize)
        return sizes["BLOCK_N"] * (of_pair * sizes["BLOCK_M"] + self.itemsize * sizes["BLOCK_C"])

    def takes(self, pass_: str, plan: Plan) -> bool:
        tile = plan["BLOCK_M"] * plan["BLOCK_N" if pass_ == "forward" else "BLOCK_C"]
        return tile <= TILE * plan.num_warps // 4

    def order(self, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
        forward, dx, dy = (plans[name] for name in SIZES)
        return (forward["BLOCK_RED"], *((p["BLOCK_N"], p["BLOCK_C"]) for p in (dx, dy)))


class SimilarityProblem(RowsProblem):
    """similarity_weight with everything fixed but axis 0 of x."""

    op = "similarity_weight"
    passes: Mapping[str, tuple[int, ...]] = {"forward": (), "backward_x": (0,), "backward_y": (1,)}

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        super().__init__(tensors, options, options[0])
        self.kept = (False, *self.squared)

    # Plans and launchers.

    @cached_property
    def heuristic(self) -> SimilarityHeuristic:
        return SimilarityHeuristic(self.n, self.k, self.dtype.itemsize, sum(self.squared), self.distance, self.facts)

    @cached_property
    def _code(self) -> ModuleType:
        from ...kernels import similarity_weight

        return similarity_weight

    @cached_property
    def _gradient_numbers(self) -> dict[str, Any]:
        """As `_numbers`; a gradient with a factor in it may leave fp16's range, but not that of TF32, which has as many
        digits."""
        if self.dtype == torch.float16 and any(self.squared):
            return launch.operands(torch.float32, "ieee" if self.facts.is_hip else "tf32")
        return self._numbers

    @cached_property
    def _unit(self) -> int:
        """The power of two, up to 16, that divides the rows of y: how far accesses to w can be wide."""
        return next(u for u in (16, 8, 4, 2, 1) if self.n % u == 0)

    def launcher(self, pass_: str, sim: Similarity) -> launch.Launcher:
        used = self.plans[pass_]
        kernel = getattr(self._code, used.variant or pass_)
        return launch.Launcher(kernel, {"UNIT": self._unit, "sim": sim}, used, self.device)

    @cached_property
    def _square_distances(self) -> launch.Launcher:
        """Those that a gradient reads, in fp32."""
        from ...kernels.similarity import square

        return self.launcher("forward", replace(self.sim, of_square=square))

    @cached_property
    def _number_sums(self) -> launch.Launcher:
        """Of gamma, or of eps."""
        own = self.plans["forward"]
        # a second tile of pairs: fewer registers
        sizes = {"BLOCK_M": 32 if self.distance else 64, "BLOCK_N": power_of_two(self.n, 16, 64)}
        stages = 1 if self.distance else own.num_stages
        plan = Plan.of(num_stages=stages, **sizes, BLOCK_RED=own["BLOCK_RED"])
        return launch.Launcher(self._code.number_sums, {"sim": self.sim}, plan, self.device)

    # The way of the tensors.

    def allocate(self, x, y, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        w = torch.empty((*x.shape[:-1], self.n), dtype=self.dtype, device=self.device)
        return w, *self.empty_squares(x, y, self.kept[1:] if save else (False, False))

    def forward(self, x, y, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        outs = w, s, t = self.allocate(x, y, save=save)
        x, y = x.contiguous(), y.contiguous()
        self._compare(self.of_pass("forward", False), x, y, w, *self.squares(x, y, s, t), self.scalars(scalars))
        return outs

    def _compare(self, launcher: launch.Launcher, x, y, w, s, t, scalars) -> None:
        """Similarities of the rows, contiguous, from their squares, into w."""
        matrices, rows = x.shape[:-2].numel(), x.shape[-2]
        sizes = self.plans["forward"]
        tiles = ceil_div(rows, sizes["BLOCK_M"]) * ceil_div(self.n, sizes["BLOCK_N"])
        if matrices * tiles:
            units = self.n // self._unit
            launcher(matrices * tiles, x, y, w, s, t, rows, units, self.number(scalars))

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        x, y = tensors[:2]
        _, s, t = outs
        dx, dy = self.allocate_gradients(tensors[:2], needs[:2])
        x, y, grad, q = x.contiguous(), y.contiguous(), grad.contiguous(), None
        scalars = self.scalars(tensors[2:])
        if self.distance and any(needs[:2]):
            # their squares are computed again, once for both gradients, so that no M x N is kept meanwhile; in fp32,
            # since of a short output a gradient would read what was rounded away
            q = torch.empty(grad.shape, dtype=torch.float32, device=self.device)
            self._compare(self._square_distances, x, y, q, s, t, scalars)
        if dx is not None:
            self.gradient("backward_x", dx, x, y, s, t, scalars, grad, q)
        if dy is not None:
            self.gradient("backward_y", dy, y, x, t, s, scalars, grad, q)
        return [dx, dy, *self._gradients_of_scalars(x, y, s, t, grad, scalars, needs[2:])]

    def _gradients_of_scalars(self, x, y, s, t, grad, scalars, needs) -> list[torch.Tensor | None]:
        """Of the scalars, as they are given to kernels."""
        found: list[torch.Tensor | None] = [None] * len(scalars)
        if any(needs):  # of the kind's own number: no other can be a tensor
            sizes, matrices, m = self._number_sums.plan, x.shape[:-2].numel(), x.shape[-2]
            tiles_n = ceil_div(self.n, sizes["BLOCK_N"])
            sums = self._partial(tiles_n, *x.shape[:-1])
            if sums.numel():
                squares = (None, None) if self.distance else (s, t)
                grid = matrices * ceil_div(m, sizes["BLOCK_M"]) * tiles_n
                self._number_sums(grid, x, y, *squares, grad, sums, m, self.n, self.number(scalars))
            found[self.own_number] = total(sums, scalars[self.own_number])
        return found

    def rows_of_launch(self, m: int, n: int, swapped: bool) -> tuple[int, int]:
        return (m // self._unit, n) if swapped else (m, n // self._unit)

    def saved_bytes(self, batch: int) -> int:
        matrices, rows = self._matrices(batch)
        return 4 * matrices * (self.squared[0] * rows + self.squared[1] * self.n)

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        matrices, m = self._matrices(batch)
        size, n, k = self.dtype.itemsize, self.n, self.k
        x, y, w = (matrices * count * size for count in (m * k, n * k, m * n))
        squares = self.saved_bytes(batch)
        flops = 2 * matrices * m * n * k
        costs = {"forward": Cost(x + y + w + (squares if any(needs) else 0), flops)}
        q = 4 * matrices * m * n * self.distance
        read = w + q + x + y + squares
        again = self.distance  # distances, before the first gradient
        for name, needed, written in (("backward_x", needs[0], x), ("backward_y", needs[1], y)):
            if needed:
                costs[name] = Cost(read + written + again * (x + y + q), flops * (1 + again))
                again = False
        return costs
