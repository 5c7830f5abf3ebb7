"""similarity_reduce on a device: allocation, plans and launches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from ... import launch
from ...declare import Cost
from ...heuristic import Heuristic, power_of_two, with_other_stages_and_warps
from ...kernels.geometry import Reduction, ceil_div
from ...plan import Plan
from ..similarity.kinds import DISSIMILARITIES
from ..similarity.pairs import PairsProblem
from ..similarity.rows import RowsProblem, total

BACKWARD = "backward"  # the kernel of the gradients of both matrices
SOFTMAX = "forward_softmax"
SUM_SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_RED")
SIZES = ("BLOCK_C", *SUM_SIZES)
BLOCKS = (16, 32, 64, 128)
TILE = 64 * 128  # elements of a tile of pairs, or of an accumulator


def problem(tensors: Sequence[Any], options: tuple[Any, ...]) -> MaximumProblem | TotalProblem:
    return MaximumProblem(tensors, options) if options[0] == "max" else TotalProblem(tensors, options)


class MaximumProblem(PairsProblem):
    """The maximum: of each row the best pair, with everything fixed but axis 0 of x."""

    op = "similarity_reduce"
    kept: tuple[bool, ...]

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        super().__init__(tensors, options, options[1], 1, scalars=3)

    def keys(self) -> tuple[Any, Any]:
        code = self._code
        if self.kind == "rbf":
            return code.nan_nearest_first, code.nan_nearest_number
        return code.largest_first, code.largest_number

    def allocate(self, x, y, values, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        out = torch.empty(x.shape[:-1], dtype=self.dtype, device=self.device)
        indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=self.device) if save else None
        return out, indices, *self.allocate_saved(x, y, out, save)

    def forward(self, x, y, values, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        outs = self.allocate(x, y, values, save=save)
        self.choose_pairs(x, y, scalars, *outs)
        return outs

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        x, y, _, *scalars = tensors
        _, indices, s, t, _ = outs
        of_scalars = self.gradients_of_scalars(grad, x, y, scalars, indices, s, t, needs[3:])
        return [*self.gradients_of_rows(grad, x, y, scalars, *outs, needs[:2]), None, *of_scalars]


class TotalHeuristic(Heuristic):
    """Block sizes of sums and softmax: of the columns and the element size, and never of the rows of x."""

    values = dict.fromkeys(SIZES, BLOCKS)

    def __init__(
        self, n: int, k: int, d: int, itemsize: int, squares: int, distance: bool, widened: bool, device
    ) -> None:
        """widened: gradients are multiplied in a wider type than similarities."""
        super().__init__(device)
        self.n, self.k, self.d, self.itemsize = n, k, d, itemsize
        self.squares, self.distance, self.widened = squares, distance, widened
        self.names = {
            "forward": {SOFTMAX: SIZES} if d else {"": SUM_SIZES},
            "backward_x": {BACKWARD: SIZES},
            "backward_y": {BACKWARD: SIZES},
        }
        if d:
            self.names["backward_values"] = {"": SIZES}

    @cached_property
    def plans(self) -> dict[str, Plan]:
        wide = self.itemsize == 4
        old, hopper = self.device.arch.startswith("sm_8"), self.device.arch.startswith("sm_9")
        red = power_of_two(self.k, 16, 32 if wide else 64 if old else 128)
        # registers: distances have a second tile of pairs, and where both matrices have factors, both are squared
        few = (self.d and wide) or (self.distance and (self.d or wide or not hopper))
        others = power_of_two(self.n, 16, 32 if few else 64)
        if self.d and wide and self.distance:
            others = 16  # as in the backward: tiles of one size have the same bits, which exponents are sensitive to
        columns = power_of_two(self.k, 16, 64 if wide or old or self.squares == 2 else 128)
        of_values = power_of_two(self.d, 16, 64)
        fewer = (self.distance and (self.d or wide or old)) or (self.widened and (self.distance or self.d))
        backward = {"BLOCK_M": 64, "BLOCK_N": 16 if fewer else 32, "BLOCK_RED": red}
        if not self.d:
            rows = 128 if self.distance and self.device.arch.startswith("sm_10") else 64
            forward = self._staged("forward", BLOCK_M=rows, BLOCK_N=others, BLOCK_RED=red)
        else:
            forward = self._staged("forward", SOFTMAX, BLOCK_M=64, BLOCK_N=others, BLOCK_RED=red, BLOCK_C=of_values)
        gradient = self._staged("backward_x", BACKWARD, BLOCK_C=columns, **backward)
        plans = {"forward": forward, "backward_x": gradient, "backward_y": gradient}
        if self.d:
            plans["backward_values"] = self._staged("backward_values", BLOCK_C=of_values, **backward)
        return plans

    def _staged(self, pass_: str, variant: str = "", **blocks: int) -> Plan:
        return self.staged(pass_, variant, most=2, programs=1, **blocks)

    def stage_bytes(self, pass_: str, variant: str, sizes: Mapping[str, int]) -> int:
        pairs = (sizes["BLOCK_M"] + sizes["BLOCK_N"]) * sizes["BLOCK_RED"]
        return (pairs + sizes["BLOCK_N"] * sizes.get("BLOCK_C", 0)) * self.itemsize

    def takes(self, pass_: str, plan: Plan) -> bool:
        tile = plan["BLOCK_M"] * max(plan["BLOCK_N"], dict(plan.blocks).get("BLOCK_C", 0))
        return tile <= TILE * plan.num_warps // 4

    def alternatives(self, pass_: str) -> Iterator[Plan]:
        yield from super().alternatives(pass_)
        yield from with_other_stages_and_warps(self.plans[pass_].changed({"BLOCK_M": 32}))

    def order(self, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
        return tuple((p["BLOCK_N"], p["BLOCK_RED"]) for p in plans.values())


class TotalProblem(RowsProblem):
    """Sums, and softmax-weighted values, with everything fixed but axis 0 of x."""

    op = "similarity_reduce"

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        super().__init__(tensors, options, options[1], scalars=3)
        values = tensors[2]
        self.d = 0 if values is None else int(values.shape[-1])
        self.passes: Mapping[str, tuple[int, ...]] = {"forward": (), "backward_x": (0,), "backward_y": (1,)}
        if self.d:
            self.passes["backward_values"] = (2,)
        self.kept = (False, *[bool(self.d)] * 2, False, False)

    # Plans and launchers.

    @cached_property
    def heuristic(self) -> TotalHeuristic:
        sizes = self.n, self.k, self.d, self.dtype.itemsize
        return TotalHeuristic(*sizes, sum(self.squared), self.distance, self._widened, self.facts)

    @property
    def _widened(self) -> bool:
        """The gradient of similarities may leave fp16's range at either end, but not that of TF32."""
        return self.dtype == torch.float16 and (self.kind != "dot" or self.d > 0)

    @cached_property
    def _code(self) -> ModuleType:
        from ...kernels import similarity_reduce

        return similarity_reduce

    @cached_property
    def _gradient_numbers(self) -> dict[str, Any]:
        """Of products with the gradient of similarities."""
        if self._widened:
            return launch.operands(torch.float32, "ieee" if self.facts.is_hip else "tf32")
        return self._numbers

    @cached_property
    def sim(self) -> Reduction:
        return self.record(Reduction, D=self.d, sign=-1 if self.kind in DISSIMILARITIES else 1)

    def launcher(self, pass_: str, sim: Reduction) -> launch.Launcher:
        used = self.plans[pass_]
        return self._launcher(used.variant or pass_, used, sim)

    def _launcher(self, kernel: str, plan: Plan, sim: Reduction) -> launch.Launcher:
        code = getattr(self._code, kernel)
        return launch.Launcher(code, {"sim": sim}, plan, self.device, **self.facts.unspilled)

    @cached_property
    def _of_rows(self) -> Plan:
        """The plan of sums for each row of x: that of its gradient, but for its columns."""
        used = self.plans["backward_x"]
        return replace(used, blocks=tuple(b for b in used.blocks if b[0] != "BLOCK_C"))

    @cached_property
    def _deltas(self) -> launch.Launcher:
        return self._launcher("deltas", self._of_rows, self.sim)

    @cached_property
    def _number_sums(self) -> launch.Launcher:
        # what is summed up to the gradient of gamma cancels: there, all distances are computed from differences
        near = float("inf") if self.kind == "rbf" else self.sim.near
        return self._launcher("number_sums", self._of_rows, replace(self.sim, near=near))

    @cached_property
    def _merge(self) -> launch.Launcher:
        columns = power_of_two(self.d, 16, 64)
        sizes = Plan.of(BLOCK_M=2048 // columns, BLOCK_C=columns, num_stages=1)
        return launch.Launcher(self._code.merge, {"D": self.d}, sizes, self.device)

    # The way of the tensors.

    def allocate(self, x, y, values, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        shape = (*x.shape[:-1], self.d) if self.d else x.shape[:-1]
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        saved = save and self.d
        high, unit = (
            torch.empty(x.shape[:-1], dtype=torch.float32, device=self.device) if saved else None for _ in range(2)
        )
        return out, high, unit, None, None

    def forward(self, x, y, values, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        outs = out, high, unit, *_ = self.allocate(x, y, values, save=save)
        if out.numel() == 0:
            return outs
        matrices, m = x.shape[:-2].numel(), x.shape[-2]
        splits, rows = self.splits_of_y()
        partial = self._partial(splits, *out.shape) if splits > 1 else None
        forward, to = self.of_pass("forward", splits > 1), out if partial is None else partial
        scalars = self.scalars(scalars)
        grid, numbers = splits * self._grid("forward", matrices, m, self.d), (m, self.n, rows, self.number(scalars))
        x, y = x.contiguous(), y.contiguous()
        rows_given = (x, y, *self.squares(x, y))
        if not self.d:
            forward(grid, *rows_given, to, *numbers)
            if partial is not None:
                self._add(partial, out, 1)
            return outs
        ends = (high, unit) if partial is None else self._partial(2, splits, *x.shape[:-1]).unbind()
        forward(grid, *rows_given, values.contiguous(), to, *ends, *numbers, scalars[2])
        if partial is not None:
            sizes, count = self._merge.plan, matrices * m
            grid = ceil_div(count, sizes["BLOCK_M"]) * ceil_div(self.d, sizes["BLOCK_C"])
            self._merge(grid, partial, *ends, out, high, unit, splits, count)
        return outs

    def _grid(self, pass_: str, matrices: int, rows: int, columns: int) -> int:
        sizes = self.plans[pass_]
        blocks = ceil_div(columns, sizes["BLOCK_C"]) if "BLOCK_C" in dict(sizes.blocks) else 1
        return matrices * ceil_div(rows, sizes["BLOCK_M"]) * blocks

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        if grad.numel() == 0:
            return [None if t is None else t.zero_() for t in self.allocate_gradients(tensors, needs)]
        dx, dy, dv = self.allocate_gradients(tensors[:3], needs[:3])
        x, y, values = (None if t is None else t.contiguous() for t in tensors[:3])
        scalars = self.scalars(tensors[3:])
        grad = grad.contiguous()
        _, high, unit, *_ = outs
        s, t = self.squares(x, y)
        delta = None
        if self.d and any((*needs[:2], *needs[3:])):
            delta = self._delta(x, y, s, t, grad, values, high, unit, scalars)
        softmax = (grad, values, high, unit, delta)
        if dx is not None:
            self.gradient("backward_x", dx, x, y, s, t, scalars, *softmax)
        if dy is not None:
            self.gradient("backward_y", dy, y, x, t, s, scalars, *softmax)
        if dv is not None:
            matrices, m = x.shape[:-2].numel(), x.shape[-2]
            splits, rows = self.splits_of_x(matrices, m, self.d)
            partial = self._partial(splits, *dv.shape) if splits > 1 else None
            grid = splits * self._grid("backward_values", matrices, self.n, self.d)
            numbers = (self.n, m, rows, self.number(scalars), scalars[2])
            launcher, to = self.of_pass("backward_values", splits > 1), dv if partial is None else partial
            launcher(grid, y, x, t, s, grad, high, unit, to, *numbers)
            if partial is not None:
                self._add(partial, dv, self.d)
        return [dx, dy, dv, *self._gradients_of_scalars(x, y, s, t, scalars, softmax, needs[3:])]

    def _gradients_of_scalars(self, x, y, s, t, scalars, softmax, needs) -> list[torch.Tensor | None]:
        """Of the scalars, as they are given to kernels; `softmax` is what `gradient` takes."""
        if not any(needs):
            return [None] * len(needs)
        splits, rows = self.splits_of_y()
        sums = self._partial(splits, *x.shape[:-1], 6 if self.d else 1)
        grid = splits * x.shape[:-2].numel() * ceil_div(x.shape[-2], self.plans["backward_x"]["BLOCK_M"])
        numbers = (x.shape[-2], self.n, rows, self.number(scalars), scalars[2])
        self._number_sums(grid, x, y, s, t, *softmax, sums, *numbers)
        number, *of_softmax = sums.sum(0, dtype=torch.float64).unbind(-1)
        parts = [number, number]  # of gamma or eps, whichever the kind has
        if self.d:
            number_mean, heat, heat_mean, rest, mass = of_softmax
            sign = 1 if self.kind in DISSIMILARITIES else -1
            parts = [number - rest * number_mean / mass] * 2 + [(heat - rest * heat_mean / mass) * sign]
        return [total(parts[i], scalars[i]) if needed else None for i, needed in enumerate(needs)]

    def _delta(self, x, y, s, t, grad, values, high, unit, scalars) -> torch.Tensor:
        """What is taken off a softmax's gradient, as two sums [..., M, 2]: their quotient."""
        splits, rows = self.splits_of_y()
        sums = self._partial(splits, *high.shape, 2)
        grid = splits * x.shape[:-2].numel() * ceil_div(x.shape[-2], self.plans["backward_x"]["BLOCK_M"])
        numbers = (x.shape[-2], self.n, rows, self.number(scalars), scalars[2])
        self._deltas(grid, x, y, s, t, grad, values, high, unit, sums, *numbers)
        if splits == 1:
            return sums[0]
        delta = torch.empty_like(sums[0])
        self._add(sums, delta, 2)
        return delta

    def saved_bytes(self, batch: int) -> int:
        matrices, rows = self._matrices(batch)
        return 8 * matrices * rows * bool(self.d)

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        """No M N. The least: similarities once a pass, however many blocks of columns there are, and no deltas."""
        matrices, m = self._matrices(batch)
        size, n, k, d = self.dtype.itemsize, self.n, self.k, self.d
        x, y, v = (matrices * count * size for count in (m * k, n * k, n * d))
        out = matrices * m * max(1, d) * size
        saved = self.saved_bytes(batch)
        pairs = 2 * matrices * m * n
        costs = {"forward": Cost(x + y + v + out + (saved if any(needs) else 0), pairs * (k + d))}
        read = x + y + v + out + saved
        gradients = {"backward_x": (x, 2 * k + d), "backward_y": (y, 2 * k + d), "backward_values": (v, k + d)}
        for (name, (written, work)), needed in zip(gradients.items(), needs, strict=False):
            if needed and name in self.passes:
                costs[name] = Cost(read + written, pairs * work)
        return costs
