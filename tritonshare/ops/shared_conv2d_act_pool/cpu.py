"""shared_conv2d_act_pool on CPU tensors: conv2d_act_pool's way, of a weight that is decoded again in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import plan
from ...binding import gradients_by_reference
from ...declare import Cost
from ...packing import decode, weight_of
from ..conv2d_act_pool.cpu import CpuConvProblem
from .options import weight_named


class CpuSharedConvProblem:
    """shared_conv2d_act_pool of CPU tensors with everything fixed but the batch."""

    op = "shared_conv2d_act_pool"

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        x, *_, b = tensors
        kernel_size, *conv, self.bits = options[:6]
        self.shape = tuple(int(n) for n in weight_named(tensors, kernel_size, conv[-1]).shape)
        weight = torch.empty(self.shape, dtype=x.dtype, device="meta")
        self.dense = dense = CpuConvProblem((x, weight, b), (*conv, *options[6:]))
        self.signature = plan.signature(tensors, options, "ieee")
        self.override, self.facts, self.kept, self.notes = dense.override, dense.facts, dense.kept, dense.notes
        self.least_batch = dense.least_batch
        self.chosen, self.plans, self.passes = dense.chosen, dense.plans, dense.passes

    def _weight(self, codes, book) -> torch.Tensor:
        _, c, r, s = self.shape
        return weight_of(decode(codes, book, self.bits, c * r * s), self.shape)

    def few(self, x, codes, book, b) -> torch.Tensor:
        return self.dense.few(x, self._weight(codes, book), b)

    def allocate(self, x, codes, book, b, *, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        return self.dense.allocate(x, None, b, save=save)

    def forward(self, x, codes, book, b, *, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        return self.dense.forward(x, self._weight(codes, book), b, save=save)

    def allocate_gradients(self, tensors, needs) -> list[torch.Tensor | None]:
        x, _, book, b = tensors
        dx, _, db = self.dense.allocate_gradients((x, None, b), (needs[0], False, needs[3]))
        dbook = torch.empty_like(book, memory_format=torch.contiguous_format) if needs[2] else None
        return [dx, None, dbook, db]

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        x, codes, book, b = tensors
        weight = self._weight(codes, book)
        dx, dw, db = self.dense.backward(grad, (x, weight, b), outs, (needs[0], *needs[2:]))
        if dw is None:
            return [dx, None, None, db]
        _, dbook = gradients_by_reference(self._weight, dw, (codes, book), (), (False, True))
        return [dx, None, dbook, db]

    def saved_bytes(self, batch: int) -> int:
        return self.dense.saved_bytes(batch)

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        """Bytes are those of the decoded weight, which is what the convolution reads."""
        return self.dense.cost(batch, (needs[0], *needs[2:]))
