"""similarity_weight on a device: allocation, plans and launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from ... import choose, launch, plan, products
from ...declare import Cost
from ...heuristic import Heuristic, power_of_two
from ...kernels.geometry import Similarity, ceil_div
from ...plan import Plan
from .reference import DISTANCES

BACKWARD = "backward"  # the kernel of both gradients
SIZES = {
    "forward": {"": ("BLOCK_M", "BLOCK_N", "BLOCK_RED")},
    "backward_x": {BACKWARD: ("BLOCK_C", "BLOCK_M", "BLOCK_N")},
    "backward_y": {BACKWARD: ("BLOCK_C", "BLOCK_M", "BLOCK_N")},
}
BLOCKS = (16, 32, 64, 128, 256)
TILE = 128 * 128  # elements of an accumulator, 128 registers a thread at four warps
SPLIT = 4096  # rows of y, at the least, of each sum over them
STEP = 256  # what a split is a multiple of: every block of a walk divides it


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


class RowsProblem(choose.Planned):
    """Rows of x compared with rows of y: what the problems of similarities have in common."""

    def __init__(self, tensors, options, kind: str, scalars: int = 2) -> None:
        """scalars: how many of the tensors, and of the options, are: the last ones."""
        from ...kernels.similarity import KINDS

        x, y = tensors[:2]
        self._rows = int(x.shape[1]) if x.dim() == 3 else None  # of x, where they are not the batch
        batched = (0,) if self._rows is None else range(len(tensors) - scalars)
        numbers = options[-scalars:]
        any_numbers = (None if number is None else "number" for number in numbers)
        super().__init__(tensors, (*options[:-scalars], *any_numbers), products.matmul, batched)
        self.kind, self.numbers = kind, numbers
        self.n, self.k = int(y.shape[-2]), int(y.shape[-1])
        self.functions = KINDS[kind]
        self.distance = kind in DISTANCES
        # whose rows' squares similarities need: of y only where of x, too
        self.squared = (self.distance or self.functions.factor_x is not None,
                        self.distance or self.functions.factor_y is not None)  # fmt: skip

    def of_numbers(self, numbers: tuple[float | None, ...]) -> RowsProblem:
        """The same problem, and what it has made already, with other numbers as scalars."""
        other = copy(self)
        other.numbers = numbers
        return other

    def scalars(self, tensors: Sequence[torch.Tensor | None]) -> list[Any]:
        """What stands for the scalars, of which these are tensors: they, or numbers; 1 for what is not used."""
        numbers = (1.0 if number is None else number for number in self.numbers)
        return [number if t is None else t for t, number in zip(tensors, numbers, strict=True)]

    @property
    def own_number(self) -> int | None:
        """Which of the scalars the kind has: gamma, eps or none."""
        return {"rbf": 0, "cosine": 1}.get(self.kind)

    def number(self, scalars: Sequence[Any]) -> Any:
        """The kind's own number, of the scalars; kernels without one leave it unread."""
        return scalars[self.own_number or 0]

    @cached_property
    def _numbers(self) -> dict[str, Any]:
        """How operands are multiplied. Three products of TF32 are as good as fp32's; distances, which cancel, always
        take them."""
        if self.dtype != torch.float32:
            return launch.operands(self.dtype, "ieee")
        exact = "ieee" if self.facts.is_hip else "tf32x3"
        return launch.operands(self.dtype, "tf32" if self.precision == "tf32" and not self.distance else exact)

    @property
    def _gradient_numbers(self) -> dict[str, Any]:
        """How gradients are multiplied with rows."""
        return self._numbers

    def record(self, of: type[Similarity] = Similarity, **fields: Any) -> Any:
        """The kind and how it is computed, as kernels take it."""
        own, gradients = self._numbers, self._gradient_numbers
        return of(
            K=self.k, near=self._near, dot_type=own["DOT_TYPE"], precision=own["PRECISION"],
            gradient_type=gradients["DOT_TYPE"], gradient_precision=gradients["PRECISION"],
            **self.functions._asdict(), **fields,
        )  # fmt: skip

    @cached_property
    def sim(self) -> Any:
        return self.record()

    @cached_property
    def _near(self) -> float:
        """The part of |x|^2 + |y|^2 below which a square distance is computed from differences: such that what
        cancels costs no more than the output's own rounding."""
        return 0.25 if self.dtype == torch.float32 else 2.0**-6

    # Sums over the other matrix' rows are split, as (splits, rows of each).

    def splits_of_y(self) -> tuple[int, int]:
        """What is computed for a row of x may not depend on how many there are."""
        return in_steps(self.n, min(32, self.n // SPLIT))

    def splits_of_x(self, matrices: int, m: int, columns: int) -> tuple[int, int]:
        """About two programs a processor, for results [matrices, N, columns] of tiles of 64 x 128."""
        tiles = matrices * ceil_div(self.n, 64) * ceil_div(columns, 128)
        return in_steps(m, ceil_div(2 * self.facts.processors, tiles))

    @cached_property
    def _row_squares(self) -> launch.Launcher:
        from ...kernels import similarity

        return launch.Launcher(similarity.row_squares, {"K": self.k}, self._flat(self.k), self.device)

    def empty_squares(self, x, y, wanted: Sequence[bool]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        s, t = (
            torch.empty(of.shape[:-1], dtype=torch.float32, device=self.device) if it else None
            for of, it in zip((x, y), wanted, strict=True)
        )
        return s, t

    def squares(self, x, y, s=None, t=None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Squares of the rows of x and y, which are contiguous, where similarities need them; in s and t if given."""
        if x.numel() == 0 or y.numel() == 0:  # none is read
            for rows in (s, t):
                if rows is not None:
                    rows.zero_()
            return s, t
        if s is None and t is None:
            s, t = self.empty_squares(x, y, self.squared)
        m, n = (0 if rows is None else rows.numel() for rows in (s, t))
        if m:
            block = self._row_squares.plan["BLOCK_M"]
            self._row_squares(ceil_div(m, block) + ceil_div(n, block), x, s, None if t is None else y, t, m, n)
        return s, t

    def scratch(self, batch: int) -> int:
        """How many tensors a call without gradients makes beside its output."""
        return sum(self.squared) if batch and self.n else 0

    @staticmethod
    def _flat(columns: int) -> Plan:
        """Sizes of a kernel that reads rows of so many columns, each on its own."""
        block = power_of_two(columns, 16, 256)
        return Plan.of(BLOCK_M=max(4, 2048 // block), BLOCK_C=block, num_stages=1)

    def _add(self, partial: torch.Tensor, out: torch.Tensor, columns: int) -> None:
        """`partial`, fp32 [splits, *out.shape], into `out`, [..., columns]."""
        from ...kernels import reduce

        key = columns, out.dtype
        if key not in self._adders:
            block = 128 if columns % 4 else 1024  # accesses of 16 bytes, or of neighbours by neighbours
            sizes = Plan.of(BLOCK=block, SPLITS_BLOCK=1, num_stages=1)
            constants = {"COLUMNS": columns, "FIRST": None}
            self._adders[key] = launch.Launcher(reduce.sum_splits, constants, sizes, self.device)
        adder, rows = self._adders[key], out.numel() // columns
        adder(ceil_div(out.numel(), adder.plan["BLOCK"]), partial, out, None, len(partial), rows)

    @cached_property
    def _adders(self) -> dict[tuple[int, torch.dtype], launch.Launcher]:
        return {}

    def _finish(self, partial: torch.Tensor, dx: torch.Tensor, x, s, scalars, sim: Similarity) -> None:
        """`partial`, fp32 [splits, *dx.shape], into the gradient dx of x, whose squares are s."""
        from ...kernels import similarity

        if sim.factor_x is None:
            self._add(partial, dx, self.k)
            return
        if sim.transposed not in self._finishers:
            sizes = self._flat(self.k)
            self._finishers[sim.transposed] = launch.Launcher(similarity.finish, {"sim": sim}, sizes, self.device)
        finisher, count = self._finishers[sim.transposed], dx.numel() // self.k
        grid = ceil_div(count, finisher.plan["BLOCK_M"])
        finisher(grid, x, partial, s, dx, len(partial), count, self.number(scalars))

    @cached_property
    def _finishers(self) -> dict[bool, launch.Launcher]:
        return {}

    def _partial(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _matrices(self, batch: int) -> tuple[int, int]:
        """How many matrices there are with a batch, and rows of x in each."""
        return (batch, self._rows) if self._rows is not None else (1, batch)


def total(sums: torch.Tensor, scalar: torch.Tensor) -> torch.Tensor:
    """The gradient of a scalar, whose parts these are. They cancel: hence fp64."""
    return sums.sum(dtype=torch.float64).to(scalar.dtype).reshape(scalar.shape)


def in_steps(rows: int, wanted: int) -> tuple[int, int]:
    """At most so many splits of rows, and the rows of each, a multiple of STEP."""
    each = ceil_div(ceil_div(rows, max(1, wanted)), STEP) * STEP
    return ceil_div(rows, each), each


class SimilarityProblem(RowsProblem):
    """similarity_weight with everything fixed but axis 0 of x."""

    op = "similarity_weight"
    passes: Mapping[str, tuple[int, ...]] = {"forward": (), "backward_x": (0,), "backward_y": (1,)}

    def __init__(self, tensors: Sequence[torch.Tensor | None], options: tuple[Any, ...]) -> None:
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

    def _launcher(self, kernel: str, plan: Plan, **constants: Any) -> launch.Launcher:
        return launch.Launcher(getattr(self._code, kernel), constants, plan, self.device)

    @cached_property
    def _forward(self) -> launch.Launcher:
        return self._launcher("forward", self.plans["forward"], UNIT=self._unit, sim=self.sim)

    @cached_property
    def _square_distances(self) -> launch.Launcher:
        """Those that a gradient reads, in fp32."""
        from ...kernels.similarity import square

        sim = replace(self.sim, of_square=square)
        return self._launcher("forward", self.plans["forward"], UNIT=self._unit, sim=sim)

    def _backward(self, name: str, partial: bool) -> launch.Launcher:
        """partial: what it leaves are sums for `_finish`, in fp32."""
        key = name, partial
        if key not in self._backwards:
            sim = self.sim.swapped if name == "backward_y" else self.sim
            sim = replace(sim, partial=partial)
            self._backwards[key] = self._launcher(BACKWARD, self.plans[name], UNIT=self._unit, sim=sim)
        return self._backwards[key]

    @cached_property
    def _backwards(self) -> dict[tuple[str, bool], launch.Launcher]:
        return {}

    @cached_property
    def _number_sums(self) -> launch.Launcher:
        """Of gamma, or of eps."""
        own = self.plans["forward"]
        # a second tile of pairs: fewer registers
        sizes = {"BLOCK_M": 32 if self.distance else 64, "BLOCK_N": power_of_two(self.n, 16, 64)}
        stages = 1 if self.distance else own.num_stages
        plan = Plan.of(num_stages=stages, **sizes, BLOCK_RED=own["BLOCK_RED"])
        return self._launcher("number_sums", plan, sim=self.sim)

    # The way of the tensors.

    def allocate(self, x, y, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        w = torch.empty((*x.shape[:-1], self.n), dtype=self.dtype, device=self.device)
        return w, *self.empty_squares(x, y, self.kept[1:] if save else (False, False))

    def forward(self, x, y, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        outs = w, s, t = self.allocate(x, y, save=save)
        x, y = x.contiguous(), y.contiguous()
        self._compare(self._forward, x, y, w, *self.squares(x, y, s, t), self.scalars(scalars))
        return outs

    def _compare(self, launcher: launch.Launcher, x, y, w, s, t, scalars) -> None:
        """Similarities of the rows, contiguous, from their squares, into w."""
        matrices, rows = x.shape[:-2].numel(), x.shape[-2]
        sizes = self.plans["forward"]
        tiles = ceil_div(rows, sizes["BLOCK_M"]) * ceil_div(self.n, sizes["BLOCK_N"])
        if matrices * tiles:
            units = self.n // self._unit
            launcher(matrices * tiles, x, y, w, s, t, rows, units, self.number(scalars))

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        return [
            torch.empty(t.shape, dtype=t.dtype, device=self.device) if needed else None
            for t, needed in zip(tensors, needs, strict=True)
        ]

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
            self._gradient("backward_x", dx, x, y, grad, q, s, t, scalars)
        if dy is not None:
            self._gradient("backward_y", dy, y, x, grad, q, t, s, scalars)
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

    def _gradient(self, name: str, dx, x, y, grad, q, s, t, scalars) -> None:
        """The gradient of x, which may be either matrix."""
        sizes, unit, swapped = self.plans[name], self._unit, name == "backward_y"
        matrices, m, n = x.shape[:-2].numel(), x.shape[-2], y.shape[-2]
        if dx.numel() == 0 or n == 0:
            dx.zero_()
            return
        sim = self.sim.swapped if swapped else self.sim
        tiles = ceil_div(self.k, sizes["BLOCK_C"])
        splits, rows = self.splits_of_x(matrices, n, self.k) if swapped else self.splits_of_y()
        partial = None
        if splits > 1 or (sim.through_x is not None and tiles > 1):
            partial = self._partial(splits, *dx.shape)
        units = (m // unit, n) if swapped else (m, n // unit)
        grid = matrices * splits * ceil_div(m, sizes["BLOCK_M"]) * tiles
        launcher, out = self._backward(name, partial is not None), dx if partial is None else partial
        launcher(grid, x, y, grad, q, s, t, out, *units, rows, self.number(scalars))
        if partial is not None:
            self._finish(partial, dx, x, s, scalars, sim)

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
