"""Selects rows by index, with a gradient that is summed in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import segment_sum


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], differentiable as often as wanted. Its gradient is a segment_sum, with the same bits on every run;
    on a GPU the gradient of torch's indexing varies.

    rows: [N, ...]; index: [M] of integers from 0 to N - 1. Returns [M, ...].
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]  (it is documented); a file holds no function of Python's
        return rows.index_select(0, index)
    # torch.compile takes no function that has a `jvp`, and needs none
    function = _Take if torch.compiler.is_compiling() else _TakeForward
    return function.apply(rows, index.long())


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, index: Tensor) -> Tensor:
        return rows.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        rows, index = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)
        ctx.shape = rows.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return segment_sum(grads[0].flatten(1), index, ctx.shape[0]).view(ctx.shape), None


class _TakeForward(_Take):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return take_rows(tangents[0], ctx.saved_tensors[0])
