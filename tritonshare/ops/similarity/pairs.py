"""Problems of chosen pairs, of each row of x the most similar rows of y. Device code: kernels/nearest.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from ... import launch
from ...declare import Cost
from ...heuristic import Heuristic, power_of_two
from ...kernels.geometry import Choice, ceil_div
from ...plan import Device, Plan
from .rows import RowsProblem, in_steps, total

BLOCKS = (16, 32, 64, 128, 256)
LENGTH = 256  # pairs of a piece
LENGTHS = (LENGTH, 512, 1024)
SIZES = {
    "forward": {"": ("BLOCK_M", "BLOCK_N", "BLOCK_RED")},
    "backward_x": {"": ("BLOCK_C", "BLOCK_M")},
    "backward_features": {"": ("BLOCK_D", "BLOCK_M", "LENGTH")},
}
VALUES = dict.fromkeys(("BLOCK_C", "BLOCK_D", "BLOCK_M", "BLOCK_N", "BLOCK_RED"), BLOCKS) | {"LENGTH": LENGTHS}
TILE = 64 * 128  # elements of a tile of pairs, which stands in registers beside its keys
GRADIENTS = 16 * 256  # elements of a tile of gradients
MERGED = 4096  # best ones of a row, of all splits, among which the best are found


class PairsHeuristic(Heuristic):
    """Block sizes: of the columns, how many are chosen and the element size, and never of the rows of x."""

    names = SIZES
    values = VALUES

    def __init__(self, n: int, k: int, itemsize: int, count: int, squares: int, device: Device) -> None:
        super().__init__(device)
        self.n, self.k, self.itemsize = n, k, itemsize
        self.count, self.squares = count, squares

    @cached_property
    def plans(self) -> dict[str, Plan]:
        wide = self.itemsize == 4
        columns = power_of_two(self.k, 16, 128)
        old, hopper = self.device.arch.startswith("sm_8"), self.device.arch.startswith("sm_9")
        # registers: a tile of pairs stands beside its keys and, of distances, beside what they may be at best
        several = self.count > 1
        few = self.squares == 2 and (old or (several and not hopper))
        blocks = {
            "BLOCK_M": 64,
            "BLOCK_N": power_of_two(self.n, 16, 32 if few else 64 if self.squares == 2 or several else 128),
            # all columns of x are held where they fit
            "BLOCK_RED": power_of_two(self.k, 16, 32 if wide else 64 if old else 128),
        }
        return {
            "forward": self.staged("forward", most=3, **blocks),
            "backward_x": Plan.of(BLOCK_M=2048 // columns, BLOCK_C=columns),
            "backward_features": Plan.of(BLOCK_M=16, BLOCK_D=columns, LENGTH=LENGTH),
        }

    def stage_bytes(self, pass_: str, variant: str, sizes: Mapping[str, int]) -> int:
        if pass_ != "forward":
            return 0
        return (sizes["BLOCK_M"] + sizes["BLOCK_N"]) * sizes["BLOCK_RED"] * self.itemsize

    def takes(self, pass_: str, plan: Plan) -> bool:
        rows = plan["BLOCK_M"]
        if pass_ == "forward":
            return rows * plan["BLOCK_N"] <= TILE * plan.num_warps // 4
        columns = plan["BLOCK_C" if pass_ == "backward_x" else "BLOCK_D"]
        few = pass_ == "backward_x" or rows <= 64  # what the kernel halves at most six times
        return few and rows * columns <= GRADIENTS * plan.num_warps // 4

    def order(self, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
        """Of a row's sums: over columns, in blocks, and over the pairs of a row of features."""
        columns = plans["backward_x"]["BLOCK_C"]
        features = plans["backward_features"]
        return plans["forward"]["BLOCK_RED"], columns, features["BLOCK_M"], features["LENGTH"]


class PairsProblem(RowsProblem):
    """Chosen pairs, with everything fixed but axis 0 of x: what `nearest` and a maximum of similarities share."""

    op = ""
    passes: Mapping[str, tuple[int, ...]] = {"forward": (), "backward_x": (0,), "backward_features": (1,)}

    def __init__(self, tensors, options, kind: str, count: int, scalars: int = 2) -> None:
        super().__init__(tensors, options, kind, scalars)
        self.count = count
        self.saves = (self.functions.factor_x is not None, self.functions.factor_y is not None)
        # values are read again for slopes of distances, and in the gradient through a norm of features
        self.reads_values = self.distance or self.functions.through_y is not None
        # ... in fp32: of half precision they are kept before they are rounded
        self.keeps_exact = self.reads_values and self.dtype != torch.float32
        self.kept = (self.reads_values and not self.keeps_exact, True, *self.saves, self.keeps_exact)

    def keys(self) -> tuple[Any, Any]:
        """How numbers become integers, and back: jit functions."""
        code = self._code
        if self.distance:
            return code.nearest_first, code.nearest_number
        return code.largest_first, code.largest_number

    # Plans and launchers.

    @cached_property
    def heuristic(self) -> PairsHeuristic:
        return PairsHeuristic(self.n, self.k, self.dtype.itemsize, self.count, sum(self.squared), self.facts)

    @cached_property
    def _code(self) -> ModuleType:
        from ...kernels import nearest

        return nearest

    @cached_property
    def sim(self) -> Choice:
        to_key, from_key = self.keys()
        return self.record(Choice, count=self.count, to_key=to_key, from_key=from_key)

    def _launcher(self, kernel: str, pass_: str) -> launch.Launcher:
        code = getattr(self._code, kernel)
        return launch.Launcher(code, {"sim": self.sim}, self.plans[pass_], self.device, **self.facts.unspilled)

    @cached_property
    def _forward(self) -> launch.Launcher:
        return self._launcher("forward", "forward")

    def _merge(self, splits: int) -> launch.Launcher:
        kept = power_of_two(splits * self.sim.TOP, 1, MERGED)
        if kept not in self._merges:
            constants = {"KEPT": kept, "sim": self.sim}
            self._merges[kept] = launch.Launcher(self._code.merge, constants, Plan.of(num_stages=1), self.device)
        return self._merges[kept]

    @cached_property
    def _merges(self) -> dict[int, launch.Launcher]:
        return {}

    @cached_property
    def _backward_x(self) -> launch.Launcher:
        return self._launcher("backward_x", "backward_x")

    @cached_property
    def _backward_features(self) -> launch.Launcher:
        return self._launcher("backward_features", "backward_features")

    @cached_property
    def _number_sums(self) -> launch.Launcher:
        return self._launcher("number_sums", "backward_x")

    @cached_property
    def _sum_pieces(self) -> launch.Launcher:
        from ...kernels import segment_sum

        return launch.Launcher(segment_sum.sum_pieces, {"D": self.k}, self.plans["backward_features"], self.device)

    # The way of the tensors.

    def allocate_saved(self, x, y, values, save: bool) -> tuple[torch.Tensor | None, ...]:
        """What a backward reads beside values and indices: squares of x and y, and values in fp32."""
        squares = self.empty_squares(x, y, self.kept[2:4] if save else (False, False))
        if not (save and self.keeps_exact):
            return *squares, None
        return *squares, torch.empty(values.shape, dtype=torch.float32, device=self.device)

    def choose_pairs(self, x, y, scalars, values, indices, s, t, exact) -> None:
        matrices, m = x.shape[:-2].numel(), x.shape[-2]
        x, y = x.contiguous(), y.contiguous()
        s, t = self.squares(x, y, s, t)
        if values.numel() == 0:
            return
        programs = matrices * ceil_div(m, self.plans["forward"]["BLOCK_M"])
        splits, rows = self.splits(programs)
        partial = None
        if splits > 1:
            partial = torch.empty((splits, matrices * m, self.sim.TOP), dtype=torch.int64, device=self.device)
        number = self.number(self.scalars(scalars))
        given = (x, y, values, exact, indices, s, t, partial)
        self._forward(splits * programs, *given, m, self.n, rows, number)
        if partial is not None:
            self._merge(splits)(matrices * m, partial, values, exact, indices, splits, matrices * m, number)

    def splits(self, programs: int) -> tuple[int, int]:
        """In how many parts the rows of y are searched, and the rows of each: about two programs per SM where one
        for each block of rows of x leaves some idle. What is found does not depend on it."""
        wanted = 1
        if programs < self.facts.sms:
            wanted = min(ceil_div(2 * self.facts.sms, programs), MERGED // self.sim.TOP)
        return in_steps(self.n, wanted)

    def gradients_of_rows(self, grad, x, y, scalars, values, indices, s, t, exact, needs) -> list[torch.Tensor | None]:
        dx, dy = self.allocate_gradients((x, y), needs)
        x, y, grad = x.contiguous(), y.contiguous(), grad.contiguous()
        matrices, m = x.shape[:-2].numel(), x.shape[-2]
        read = (exact if self.keeps_exact else values) if self.reads_values else None
        number = self.number(self.scalars(scalars))
        if dx is not None and dx.numel():
            grid = matrices * ceil_div(m, self.plans["backward_x"]["BLOCK_M"])
            slopes = read if self.distance else None
            self._backward_x(grid, x, y, grad, slopes, indices, s, t, dx, m, self.n, number)
        if dy is not None and grad.numel() == 0:
            dy.zero_()
        elif dy is not None:
            self._gradient_of_features(grad, x, y, read, indices, s, t, dy, number)
        return [dx, dy]

    def gradients_of_scalars(self, grad, x, y, scalars, indices, s, t, needs) -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = [None] * len(scalars)
        if any(needs):  # of the kind's own number: no other can be a tensor
            sums, m = self._partial(*x.shape[:-1]), x.shape[-2]
            if sums.numel():
                grid = x.shape[:-2].numel() * ceil_div(m, self.plans["backward_x"]["BLOCK_M"])
                given = (x.contiguous(), y.contiguous(), grad.contiguous(), indices, s, t, sums, m, self.n)
                self._number_sums(grid, *given, self.number(self.scalars(scalars)))
            found[self.own_number] = total(sums, scalars[self.own_number])
        return found

    def _gradient_of_features(self, grad, x, y, values, indices, s, t, dy, number) -> None:
        matrices = x.shape[:-2].numel()
        count, pairs = matrices * self.n, grad.numel()
        rows = indices.reshape(matrices, -1)
        if matrices > 1:
            rows = rows + torch.arange(0, count, self.n, device=rows.device).unsqueeze(1)
        ids, order = torch.sort(rows.reshape(-1), stable=True)
        starts = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
        sizes = self.plans["backward_features"]
        length, blocks = sizes["LENGTH"], ceil_div(self.k, sizes["BLOCK_D"])
        later = (pairs - 1) // length  # places at which pieces behind a row's first can be
        partial = None
        if later:
            partial = torch.empty((2 * (pairs // length), self.k), dtype=torch.float32, device=self.device)
        given = (x, y, grad, values, s, t, order, ids, starts, dy, partial)
        self._backward_features((count + later) * blocks, *given, count, number)
        if later:
            self._sum_pieces((later + 1) * blocks, partial, ids, starts, dy, count)

    def saved_bytes(self, batch: int) -> int:
        matrices, rows = self._matrices(batch)
        of_pair = 8 + 4 * self.keeps_exact
        return matrices * (of_pair * rows * self.count + 4 * (self.saves[0] * rows + self.saves[1] * self.n))

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        """No M N. Of the gradient to features, sorting the indices is not counted."""
        matrices, m = self._matrices(batch)
        size, k = self.dtype.itemsize, self.k
        pairs = matrices * m * self.count
        x, y = matrices * m * k * size, matrices * self.n * k * size
        saved = self.saved_bytes(batch) if any(needs) else 8 * pairs
        costs = {"forward": Cost(x + y + pairs * size + saved, 2 * matrices * m * self.n * k)}
        read = pairs * (size + 4 * self.reads_values + 8)
        # no more rows of features than there are, or than are chosen
        touched = min(y, pairs * k * size)
        if needs[0]:
            costs["backward_x"] = Cost(2 * x + touched + read, 2 * pairs * k)
        if needs[1]:
            costs["backward_features"] = Cost(x + touched + y + read, 2 * pairs * k)
        return costs
