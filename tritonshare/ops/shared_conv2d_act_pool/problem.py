"""shared_conv2d_act_pool on a device: conv2d_act_pool whose filters are decoded as they are loaded, and the gradient of
the codebook: that of the weight, in a workspace of 4 bytes per weight, summed by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from ... import launch, plan
from ...binding import gradients_by_reference, in_layouts_of
from ...declare import Cost
from ...kernels.geometry import Shared, ceil_div
from ..conv2d_act_pool.problem import ConvProblem
from ..shared_linear.problem import CENTROIDS, SUM_CENTROIDS, aligned, book_tiles, sum_centroids
from .options import reference, weight_named


class SharedConvProblem(ConvProblem):
    """shared_conv2d_act_pool with everything fixed but the batch."""

    op = "shared_conv2d_act_pool"

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        x, _, book, b = tensors
        kernel_size, *conv, bits = options[:6]
        shape = weight_named(tensors, kernel_size, conv[-1]).shape
        weight = torch.empty([int(n) for n in shape], dtype=x.dtype, device="meta")
        super().__init__((x, weight, b), (*conv, *options[6:]))
        self.options = options
        self.signature = plan.signature(tensors, options, self.precision)
        # the workspace of backward_weight has the order of the indices
        self.dense = replace(self.geo, weight_channels_last=True)
        self.geo = replace(self.dense, shared=Shared(self.geo.K, self.geo.RED, bits, int(book.shape[0])))

    @cached_property
    def passes(self) -> dict[str, tuple[int, ...]]:
        if self.recomputes:
            return {"forward": ()}
        return {"forward": (), "backward_input": (0,), "backward_weight": (2, 3)}

    @cached_property
    def _backward_weight(self) -> launch.Launcher:
        return self._launcher("backward_weight", geo=self.dense)

    @cached_property
    def _backward_weight_split(self) -> launch.Launcher:
        return self._launcher("backward_weight", geo=self.dense)

    @cached_property
    def _centroids_of_weight(self) -> launch.Launcher:
        from ...kernels.shared_conv2d_act_pool import centroids_of_weight

        return launch.Launcher(centroids_of_weight, {"shared": self.geo.shared}, CENTROIDS, self.device)

    @cached_property
    def _sum_centroids(self) -> launch.Launcher:
        return sum_centroids(self.geo.shared, self.device)

    def allocate(self, x, codes, book, b, *, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        return super().allocate(x, codes, b, save=save)

    def forward(self, x, codes, book, b, *, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        outs = self.allocate(x, codes, book, b, save=save)
        self._launch_forward(x, codes.contiguous(), book.contiguous(), b, outs)
        return outs

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        x, _, book, b = tensors
        return [
            self._empty(x.shape[0], x.shape[1:], self.dtype, self.format) if needs[0] else None,
            None,
            *(
                torch.empty(t.shape, dtype=self.dtype, device=self.device) if need else None
                for t, need in zip((book, b), needs[2:], strict=True)
            ),
        ]

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        if self.recomputes:
            grads = gradients_by_reference(reference, grad, tensors, self.options, needs)
            return in_layouts_of(self.allocate_gradients(tensors, needs), grads)
        x, codes, book, _ = tensors
        dx, _, dbook, db = grads = self.allocate_gradients(tensors, needs)
        if x.shape[0] == 0:
            for t in grads:
                if t is not None:
                    t.zero_()
            return grads
        read, codes = self._read(grad, outs), aligned(codes)
        if dx is not None:
            self._launch_backward_input(dx, read, codes, book.contiguous())
        if dbook is None and db is None:
            return grads
        dw = None
        if dbook is not None:
            dw = torch.empty(self.geo.K * self.geo.RED, dtype=torch.float32, device=self.device)
        self._launch_backward_weight(dw, db, read, x.contiguous(memory_format=self.format))
        if dbook is not None:
            shared = self.geo.shared
            tiles = book_tiles(shared, CENTROIDS)
            sums = torch.empty(tiles, shared.books, shared.ENTRIES, dtype=torch.float32, device=self.device)
            self._centroids_of_weight(tiles * shared.books, dw, codes, sums)
            self._sum_centroids(ceil_div(dbook.numel(), SUM_CENTROIDS["BLOCK"]), sums, dbook, None, tiles, None)
        return grads

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        shared, size = self.geo.shared, self.dtype.itemsize
        packed = shared.rows * shared.PITCH + shared.books * shared.ENTRIES * size
        spared = shared.rows * shared.count * size - packed
        dense = super().cost(batch, [needs[0], *needs[2:]])
        return {name: Cost(cost.bytes - spared, cost.flops) for name, cost in dense.items()}
