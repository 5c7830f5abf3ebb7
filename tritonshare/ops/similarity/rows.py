"""Problems whose tensors are rows of x and rows of y: scalars, squares, splits, and the kernels that add them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from ... import choose, launch, products
from ...heuristic import power_of_two
from ...kernels.geometry import Similarity, ceil_div
from ...plan import Plan
from .kinds import DISTANCES

SPLIT = 4096  # rows of y, at the least, of each sum over them
STEP = 256  # what a split is a multiple of: every block of a walk divides it


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

    def scalars(self, tensors: Sequence[Any]) -> list[Any]:
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
        """About two programs per SM, for results [matrices, N, columns] of tiles of 64 x 128."""
        tiles = matrices * ceil_div(self.n, 64) * ceil_div(columns, 128)
        return in_steps(m, ceil_div(2 * self.facts.sms, tiles))

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

    # Gradients of either matrix, by the kernel `backward` of the op.

    _code: ModuleType  # the op's kernels

    def launcher(self, pass_: str, sim: Similarity) -> launch.Launcher:
        """The kernel of a pass with this record."""
        raise NotImplementedError

    def rows_of_launch(self, m: int, n: int, swapped: bool) -> tuple[int, int]:
        """As the kernel `backward` takes the numbers of rows; swapped: m are rows of the caller's y."""
        return m, n

    def of_pass(self, pass_: str, partial: bool) -> launch.Launcher:
        """A pass' kernel; partial: what it leaves are sums for another kernel, in fp32."""
        key = pass_, partial
        if key not in self._of_passes:
            sim = self.sim.swapped if pass_ in ("backward_y", "backward_values") else self.sim
            self._of_passes[key] = self.launcher(pass_, replace(sim, partial=partial))
        return self._of_passes[key]

    @cached_property
    def _of_passes(self) -> dict[tuple[str, bool], launch.Launcher]:
        return {}

    def gradient(self, pass_: str, dx, x, y, s, t, scalars, *read: torch.Tensor | None) -> None:
        """The gradient of x, which is y of the call in "backward_y"; `read` is what the kernel reads beside rows and
        their squares."""
        sizes, swapped = self.plans[pass_], pass_ == "backward_y"
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
        grid = splits * matrices * ceil_div(m, sizes["BLOCK_M"]) * tiles
        numbers = (*self.rows_of_launch(m, n, swapped), rows, self.number(scalars), *scalars[2:])
        kernel, out = self.of_pass(pass_, partial is not None), dx if partial is None else partial
        kernel(grid, x, y, s, t, *read, out, *numbers)
        if partial is not None:
            self._finish(partial, dx, x, s, scalars, sim)

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        return [
            torch.empty(t.shape, dtype=t.dtype, device=self.device) if needed else None
            for t, needed in zip(tensors, needs, strict=True)
        ]

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
