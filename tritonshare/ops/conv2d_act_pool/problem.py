"""conv2d_act_pool on a device: allocation, plans and launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from ... import choose, launch, products
from ...binding import gradients_by_reference, in_layouts_of
from ...declare import Cost
from ...kernels.geometry import ConvActPool, ceil_div
from ...plan import Plan
from .options import axes
from .plans import INPUT_BY_CELL, WEIGHT_BY_BOX, ConvHeuristic
from .reference import reference


class ConvProblem(choose.Planned):
    """conv2d_act_pool with everything fixed but the batch."""

    op = "conv2d_act_pool"

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        from ...kernels.activation import ACTIVATIONS
        from ...kernels.pooling import POOLINGS

        super().__init__(tensors, options, products.convolution)
        x, w, _ = tensors
        self.options = options
        _, _, _, groups, activation, pool, *_, count_include_pad = options
        h, width = axes(tensors, options)
        dot_type, precision = launch.operands(self.dtype, self.precision).values()
        self.geo = ConvActPool(
            C=int(x.shape[1]),
            K=int(w.shape[0]),
            groups=groups,
            h=h,
            w=width,
            pool=POOLINGS[pool],
            count_include_pad=count_include_pad,
            activation=ACTIVATIONS[activation],
            dot_type=dot_type,
            precision=precision,
            channels_last=suggest_memory_format(x) == torch.channels_last,
            weight_channels_last=suggest_memory_format(w) == torch.channels_last,
        )
        # a mean over a smooth activation would need its derivative at every unpooled element
        self.recomputes = self.geo.pool.shares and self.geo.activation.derivative_of in ("output", "input")
        self.kept = (self.geo.aux == "output", self.geo.has_code, self.geo.aux == "input")

    # Plans and launchers.

    @cached_property
    def heuristic(self) -> ConvHeuristic:
        ieee = self.dtype == torch.float32 and self.precision == "ieee"
        return ConvHeuristic(self.geo, self.dtype.itemsize, ieee, self.facts)

    @cached_property
    def passes(self) -> dict[str, tuple[int, ...]]:
        if self.recomputes:
            return {"forward": ()}
        return {"forward": (), "backward_input": (0,), "backward_weight": (1, 2)}

    @cached_property
    def notes(self) -> tuple[str, ...]:
        if self.recomputes:
            return ("backward: torch, from a recomputed map (a mean over this activation has no kernel for it)",)
        return ()

    @cached_property
    def _code(self) -> ModuleType:
        from ...kernels import conv2d_act_pool

        return conv2d_act_pool

    def _launcher(self, name: str, **constants: Any) -> launch.Launcher:
        plan = self.plans[name]
        return launch.Launcher(
            getattr(self._code, plan.variant or name), {"geo": self.geo, **constants}, plan, self.device
        )

    @cached_property
    def _forward(self) -> launch.Launcher:
        return self._launcher("forward")

    @cached_property
    def _backward_input(self) -> launch.Launcher:
        return self._launcher("backward_input")

    @cached_property
    def _backward_weight(self) -> launch.Launcher:
        return self._launcher("backward_weight")

    @cached_property
    def _backward_weight_split(self) -> launch.Launcher:
        """A launcher of its own: it writes fp32 partial sums where the other writes gradients in their dtype."""
        return self._launcher("backward_weight")

    @cached_property
    def _sum_splits(self) -> launch.Launcher:
        from ...kernels.reduce import sum_splits

        sizes = {"COLUMNS": self.geo.K * self.geo.RED + self.geo.K, "FIRST": self.geo.K * self.geo.RED}
        return launch.Launcher(sum_splits, sizes, Plan.of(BLOCK=256, SPLITS_BLOCK=16), self.device)

    # The way of the tensors.

    @cached_property
    def format(self) -> torch.memory_format:
        """Of input, output and their gradients."""
        return memory_format(self.geo.channels_last)

    @cached_property
    def weight_format(self) -> torch.memory_format:
        return memory_format(self.geo.weight_channels_last)

    @cached_property
    def _output_sizes(self) -> tuple[int, int, int]:
        return (self.geo.K, self.geo.h.pooled, self.geo.w.pooled)

    def _empty(self, batch: int, sizes: Sequence[int], dtype: torch.dtype, form: torch.memory_format) -> torch.Tensor:
        return torch.empty((batch, *sizes), dtype=dtype, device=self.device, memory_format=form)

    def allocate(self, x, w, b, *, save: bool = True) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        n, sizes, form = x.shape[0], self._output_sizes, self.format
        y = self._empty(n, sizes, self.dtype, form)
        if not save:
            return y, None, None
        code = self._empty(n * self.geo.code_planes, sizes, torch.uint8, form) if self.geo.has_code else None
        return y, code, self._empty(n, sizes, self.dtype, form) if self.kept[2] else None

    @cached_property
    def _forward_tiles(self) -> tuple[int, int, int]:
        """Programs per block of pixels, pooled pixels of a sample, pixels of a block."""
        geo, sizes = self.geo, self.plans["forward"]
        k_blocks = geo.groups * ceil_div(geo.KG, sizes["BLOCK_K"])
        return k_blocks, geo.h.pooled * geo.w.pooled, sizes["BLOCK_M"]

    def forward(self, x, w, b, *, save: bool = True) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        outs = self.allocate(x, w, b, save=save)
        self._launch_forward(x, w.contiguous(memory_format=self.weight_format), None, b, outs)
        return outs

    def _launch_forward(self, x, w, book, b, outs) -> None:
        """`w` as the kernel reads it: dense, or indices into `book`."""
        y, code, aux = outs
        n = x.shape[0]
        if n:
            k_blocks, pixels, block = self._forward_tiles
            self._forward(
                k_blocks * ceil_div(n * pixels, block),
                x.contiguous(memory_format=self.format),
                w,
                book,
                None if b is None else b.contiguous(),
                y,
                code,
                aux,
                n,
            )

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        x, w, b = tensors
        return [
            self._empty(x.shape[0], x.shape[1:], self.dtype, self.format) if needs[0] else None,
            self._empty(w.shape[0], w.shape[1:], self.dtype, self.weight_format) if needs[1] else None,
            torch.empty_like(b, memory_format=torch.contiguous_format) if needs[2] else None,
        ]

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        if self.recomputes:
            grads = gradients_by_reference(reference, grad, tensors, self.options, needs)
            return in_layouts_of(self.allocate_gradients(tensors, needs), grads)
        x, w, _ = tensors
        dx, dw, db = self.allocate_gradients(tensors, needs)
        if x.shape[0] == 0:
            for t in (dw, db):
                if t is not None:
                    t.zero_()
            return [dx, dw, db]
        read = self._read(grad, outs)
        if dx is not None:
            self._launch_backward_input(dx, read, w.contiguous(memory_format=self.weight_format), None)
        if dw is not None or db is not None:
            self._launch_backward_weight(dw, db, read, x.contiguous(memory_format=self.format))
        return [dx, dw, db]

    def _read(self, grad, outs) -> tuple[torch.Tensor | None, ...]:
        """What both gradients' kernels read of the output."""
        y, code, z = outs
        return (
            grad.contiguous(memory_format=self.format),
            code if self.geo.has_code else None,
            {"output": y, "input": z, "": None}[self.geo.aux],
        )

    def _launch_backward_input(self, dx, read, w, book) -> None:
        geo, sizes, n = self.geo, self.plans["backward_input"], dx.shape[0]
        tiles = geo.groups * ceil_div(geo.CG, sizes["BLOCK_C"])
        if sizes.variant != INPUT_BY_CELL:
            tiles *= geo.h.period * geo.w.period
        grid = tiles * ceil_div(n * geo.h.cells * geo.w.cells, sizes["BLOCK_M"])
        self._backward_input(grid, *read, w, book, dx, n)

    def _launch_backward_weight(self, dw, db, read, x) -> None:
        geo, sizes, n = self.geo, self.plans["backward_weight"], x.shape[0]
        weights, biases = geo.K * geo.RED, geo.K
        tiles = geo.groups * ceil_div(geo.KG, sizes["BLOCK_K"])
        if dw is not None:
            tiles *= ceil_div(geo.CG if sizes.variant == WEIGHT_BY_BOX else geo.RED, sizes["BLOCK_RED"])
        splits, pixels = self.splits(n)
        per_split = pixels // sizes["BLOCK_M"]
        if splits == 1:
            self._backward_weight(tiles, x, *read, dw, db, n, per_split)
            return
        partial = torch.empty(splits * (weights + biases), dtype=torch.float32, device=self.device)
        dw_part = partial if dw is not None else None
        db_part = partial[weights:] if db is not None else None
        self._backward_weight_split(tiles * splits, x, *read, dw_part, db_part, n, per_split)
        self._sum_splits(ceil_div(weights + biases, 256), partial, dw, db, splits, None)

    def splits(self, batch: int) -> tuple[int, int]:
        """How many programs share the pooled pixels in backward_weight, and how many pixels each has: about two
        programs per SM, of 128 pixels or more. The order of the sums is the geometry's: plans have no say."""
        geo = self.geo
        pixels = batch * geo.h.pooled * geo.w.pooled
        tiles = geo.groups * ceil_div(geo.KG, 64) * ceil_div(geo.RED, 64)
        wanted = max(1, min(ceil_div(2 * self.facts.sms, tiles), pixels // 128))
        each = ceil_div(ceil_div(pixels, wanted), 64) * 64
        return ceil_div(pixels, each), each

    def saved_bytes(self, batch: int) -> int:
        y = batch * self.geo.y_n
        return (y * self.geo.code_planes if self.kept[1] else 0) + (y * self.dtype.itemsize if self.kept[2] else 0)

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        geo, size = self.geo, self.dtype.itemsize
        x, w = batch * geo.x_n, geo.K * geo.RED
        y = batch * geo.y_n
        code = y * geo.code_planes if geo.has_code else 0
        aux = y * size if geo.aux else 0
        # conv outputs: those of all windows, or each of them once where windows overlap
        outputs = min(geo.h.pooled * geo.w.pooled * geo.WINDOW, geo.h.conv * geo.w.conv)
        flops = 2 * batch * outputs * geo.K * geo.RED
        saved = code + (aux if geo.aux == "input" else 0) if any(needs) else 0
        costs = {"forward": Cost((x + w + geo.K + y) * size + saved, flops)}
        if needs[0]:
            costs["backward_input"] = Cost((y + w + x) * size + code + aux, flops)
        if needs[1] or needs[2]:
            costs["backward_weight"] = Cost((y + x + w + geo.K) * size + code + aux, flops)
        return costs


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
