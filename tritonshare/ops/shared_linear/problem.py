"""shared_linear on a device: plans, allocation and launches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from types import ModuleType
from typing import Any

import torch

from ... import choose, launch, products
from ...declare import Cost
from ...heuristic import STAGES, WARPS, Heuristic, power_of_two, with_other_sizes
from ...kernels.geometry import Shared, SharedLinear, ceil_div
from ...plan import Device, Plan

SIZES = {
    "forward": {"": ("BLOCK_K", "BLOCK_M", "BLOCK_MANY", "BLOCK_RED")},
    "backward_input": {"": ("BLOCK_C", "BLOCK_M", "BLOCK_RED")},
    "backward_codebook": {"": ("BLOCK_C", "BLOCK_K", "BLOCK_M")},
    "backward_bias": {"": ("BLOCK_K", "BLOCK_M")},
}
BLOCKS = (16, 32, 64, 128)
FEW = 32  # rows of the batch, for which splits have programs of their own
STEP = 128  # what a split is a multiple of: every block of a reduction divides it
CENTROIDS = Plan.of(BLOCK_K=32, BLOCK_C=64)
SUM_CENTROIDS = Plan.of(BLOCK=16, SPLITS_BLOCK=256)


def aligned(codes: torch.Tensor) -> torch.Tensor:
    """Codes as kernels read them: contiguous, from an address of whole words."""
    codes = codes.contiguous()
    return codes if codes.data_ptr() % 4 == 0 else codes.clone()


def sum_centroids(shared: Shared, device: torch.device) -> launch.Launcher:
    from ...kernels import reduce

    sizes = {"COLUMNS": shared.books * shared.ENTRIES, "FIRST": None}
    return launch.Launcher(reduce.sum_splits, sizes, SUM_CENTROIDS, device)


def book_tiles(shared: Shared, sizes: Plan) -> int:
    """Tiles of a codebook's weights: of each there is a partial sum."""
    return ceil_div(shared.BOOK_ROWS, sizes["BLOCK_K"]) * ceil_div(shared.count, sizes["BLOCK_C"])


class LinearHeuristic(Heuristic):
    """Block sizes of each pass: of the weight, the element size and the device, and never of the batch."""

    names = SIZES
    values = dict.fromkeys(("BLOCK_C", "BLOCK_K", "BLOCK_M", "BLOCK_MANY", "BLOCK_RED"), BLOCKS)

    def __init__(self, shared: Shared, itemsize: int, ieee: bool, device: Device) -> None:
        super().__init__(device)
        self.shared, self.itemsize, self.ieee = shared, itemsize, ieee
        self.side = 32 if ieee else 64

    @cached_property
    def plans(self) -> dict[str, Plan]:
        k = power_of_two(self.shared.rows, 16, 32 if self.ieee else 128)
        red_k = power_of_two(self.shared.rows, 16, 32)
        book_k = power_of_two(self.shared.BOOK_ROWS, 16, self.side)
        c = power_of_two(self.shared.count, 16, self.side)
        red = power_of_two(self.shared.count, 16, 32 if self.ieee else 64)
        return {
            "forward": self.staged("forward", BLOCK_M=16, BLOCK_MANY=self.side, BLOCK_K=k, BLOCK_RED=red),
            "backward_input": self.staged("backward_input", BLOCK_M=self.side, BLOCK_C=c, BLOCK_RED=red_k),
            "backward_codebook": self.staged("backward_codebook", BLOCK_M=32, BLOCK_K=book_k, BLOCK_C=c),
            "backward_bias": Plan.of(BLOCK_M=32, BLOCK_K=power_of_two(self.shared.rows, 16, 32)),
        }

    def stage_bytes(self, pass_: str, variant: str, sizes: Mapping[str, int]) -> int:
        if pass_ == "forward":  # a code is a byte at most
            x = max(sizes["BLOCK_M"], sizes["BLOCK_MANY"]) * self.itemsize
            return (x + sizes["BLOCK_K"]) * sizes["BLOCK_RED"]
        if pass_ == "backward_input":
            elements = (sizes["BLOCK_M"] + sizes["BLOCK_C"]) * sizes["BLOCK_RED"]
        elif pass_ == "backward_codebook":
            elements = (sizes["BLOCK_K"] + sizes["BLOCK_C"]) * sizes["BLOCK_M"]
        else:
            elements = sizes["BLOCK_K"] * sizes["BLOCK_M"]
        return elements * self.itemsize

    def takes(self, pass_: str, plan: Plan) -> bool:
        sizes = sorted(size for _, size in plan.blocks)
        if self.ieee and sizes[-1] > 64:  # without tensor cores, whole operands are held in registers
            return False
        return sizes[-2] * sizes[-1] <= 64 * 128 * plan.num_warps // 4

    def alternatives(self, pass_: str) -> Iterator[Plan]:
        default = self.plans[pass_]
        yield from with_other_sizes(default)
        for stages, warps in product(STAGES, WARPS):
            yield default.changed({"num_stages": stages, "num_warps": warps})

    def order(self, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
        forward, dx, dbook, db = (plans[name] for name in SIZES)
        return forward["BLOCK_RED"], dx["BLOCK_RED"], dbook.blocks, db["BLOCK_M"]


class LinearProblem(choose.Planned):
    """shared_linear with everything fixed but the batch."""

    op = "shared_linear"
    kept = (False,)

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        super().__init__(tensors, options, products.matmul)
        x, codes, book, _ = tensors
        self.shared = Shared(int(codes.shape[0]), int(x.shape[1]), *options, int(book.shape[0]))
        self.passes = {"forward": (), "backward_input": (0,), "backward_codebook": (2,), "backward_bias": (3,)}

    @cached_property
    def heuristic(self) -> LinearHeuristic:
        ieee = self.dtype == torch.float32 and self.precision == "ieee"
        return LinearHeuristic(self.shared, self.dtype.itemsize, ieee, self.facts)

    @cached_property
    def layer(self) -> SharedLinear:
        """Forward's reduction is cut in splits: about two programs per SM where one block of the batch has them,
        of 512 elements or more. Plans and the batch have no say."""
        tiles = ceil_div(self.shared.rows, 128)
        wanted = max(1, min(ceil_div(2 * self.facts.sms, tiles), self.shared.count // 512))
        each = ceil_div(ceil_div(self.shared.count, wanted), STEP) * STEP
        return SharedLinear(self.shared, each, *launch.operands(self.dtype, self.precision).values())

    # Launchers.

    @cached_property
    def _code(self) -> ModuleType:
        from ...kernels import shared_linear

        return shared_linear

    def _launcher(self, name: str, **constants: Any) -> launch.Launcher:
        return launch.Launcher(getattr(self._code, name), constants, self.plans[name], self.device)

    @cached_property
    def _forward_few(self) -> launch.Launcher:
        return self._launcher("forward", layer=self.layer, MANY=0)

    @cached_property
    def _forward_many(self) -> launch.Launcher:
        return self._launcher("forward", layer=self.layer, MANY=1)

    @cached_property
    def _add_splits(self) -> launch.Launcher:
        constants = {"K": self.shared.rows, "SPLITS": self.layer.splits}
        return launch.Launcher(self._code.add_splits, constants, Plan.of(BLOCK=256, num_warps=2), self.device)

    @cached_property
    def _backward_input(self) -> launch.Launcher:
        return self._launcher("backward_input", layer=self.layer)

    @cached_property
    def _backward_codebook(self) -> launch.Launcher:
        return self._launcher("backward_codebook", layer=self.layer)

    @cached_property
    def _sum_centroids(self) -> launch.Launcher:
        return sum_centroids(self.shared, self.device)

    @cached_property
    def _backward_bias(self) -> launch.Launcher:
        return self._launcher("backward_bias", K=self.shared.rows)

    # The way of the tensors.

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def allocate(self, x, codes, book, b, *, save: bool = True) -> tuple[torch.Tensor]:
        return (self._empty(x.shape[0], self.shared.rows),)

    def forward(self, x, codes, book, b, *, save: bool = True) -> tuple[torch.Tensor]:
        (y,) = outs = self.allocate(x, codes, book, b)
        n, sizes = x.shape[0], self.plans["forward"]
        if not n:
            return outs
        given = [x.contiguous(), aligned(codes), book.contiguous(), None if b is None else b.contiguous()]
        if n > FEW:
            tall = min(sizes["BLOCK_K"], sizes["BLOCK_MANY"])
            grid = ceil_div(self.shared.rows, tall) * ceil_div(n, sizes["BLOCK_MANY"])
            self._forward_many(grid, *given, y, n)
            return outs
        splits = self.layer.splits
        grid = ceil_div(self.shared.rows, sizes["BLOCK_K"]) * splits * ceil_div(n, sizes["BLOCK_M"])
        if splits == 1:
            self._forward_few(grid, *given, y, n)
            return outs
        partial = self._empty(splits, n, self.shared.rows, dtype=torch.float32)
        self._forward_few(grid, *given, partial, n)
        self._add_splits(ceil_div(self.shared.rows, 256) * n, partial, given[3], y, n)
        return outs

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        return [
            self._empty(*t.shape) if need and i != 1 else None
            for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
        ]

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        dx, _, dbook, db = grads = self.allocate_gradients(tensors, needs)
        x, codes, book, _ = tensors
        n, shared = x.shape[0], self.shared
        if n == 0:
            for t in grads:
                if t is not None:
                    t.zero_()
            return grads
        grad, codes = grad.contiguous(), aligned(codes)
        if dx is not None:
            sizes = self.plans["backward_input"]
            grid = ceil_div(n, sizes["BLOCK_M"]) * ceil_div(shared.count, sizes["BLOCK_C"])
            self._backward_input(grid, grad, codes, book.contiguous(), dx, n)
        if dbook is not None:
            tiles = book_tiles(shared, self.plans["backward_codebook"])
            splits, each = self.batch_splits(n)
            sums = self._empty(tiles * splits, shared.books, shared.ENTRIES, dtype=torch.float32)
            self._backward_codebook(tiles * shared.books * splits, x.contiguous(), grad, codes, sums, n, splits, each)
            grid = ceil_div(dbook.numel(), SUM_CENTROIDS["BLOCK"])
            self._sum_centroids(grid, sums, dbook, None, tiles * splits, None)
        if db is not None:
            self._backward_bias(ceil_div(shared.rows, self.plans["backward_bias"]["BLOCK_K"]), grad, db, n)
        return grads

    def batch_splits(self, batch: int) -> tuple[int, int]:
        """How many programs share the batch in backward_codebook, and how many rows each has: about two programs per
        SM, of 128 rows or more. The order of the sums is the weight's: plans have no say."""
        tiles = ceil_div(self.shared.rows, 64) * ceil_div(self.shared.count, 64)
        wanted = max(1, min(ceil_div(2 * self.facts.sms, tiles), batch // 128))
        each = ceil_div(ceil_div(batch, wanted), STEP) * STEP
        return ceil_div(batch, each), each

    def saved_bytes(self, batch: int) -> int:
        return 0

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        shared, size = self.shared, self.dtype.itemsize
        codes, book = shared.rows * shared.PITCH, shared.books * shared.ENTRIES * size
        x, y = batch * shared.count * size, batch * shared.rows * size
        flops = 2 * batch * shared.rows * shared.count
        costs = {
            "forward": Cost(x + codes + book + shared.rows * size + y, flops),
            "backward_input": Cost(y + codes + book + x, flops),
            "backward_codebook": Cost(x + y + codes + book, flops),
            "backward_bias": Cost(y + shared.rows * size, batch * shared.rows),
        }
        wanted = {name for name, of in self.passes.items() if not of or any(needs[i] for i in of)}
        return {name: cost for name, cost in costs.items() if name in wanted}
