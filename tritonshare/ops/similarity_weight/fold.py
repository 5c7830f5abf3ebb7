"""Matrices of any number of leading axes -> the two or three axes that the kernels take."""

from __future__ import annotations

from typing import Any

import torch

from ...op import Op


def folded(op: Op, x: Any, y: Any, *options: Any) -> Any:
    """`op` on x [..., M, K] and y [..., N, K]; outputs are [..., M, *]. What cannot be folded goes to the op as it is,
    whose contract says what is wrong."""
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)) or x.dim() < 2 or y.dim() < 2:
        return op(x, y, *options)
    if x.dim() == y.dim() <= 3 and x.shape[:-2] == y.shape[:-2]:
        return op(x, y, *options)
    if y.dim() == 2:  # one y for all: rows of all matrices follow each other
        return _unfolded(op(x.flatten(0, -2), y, *options), x.shape[:-1])
    try:
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        return op(x, y, *options)
    x, y = x.expand(*lead, *x.shape[-2:]), y.expand(*lead, *y.shape[-2:])
    return _unfolded(op(x.flatten(0, -3), y.flatten(0, -3), *options), x.shape[:-1])


def _unfolded(outs: Any, rows: torch.Size) -> Any:
    if isinstance(outs, tuple):
        return tuple(_unfolded(t, rows) for t in outs)
    return outs.reshape(*rows, outs.shape[-1])
