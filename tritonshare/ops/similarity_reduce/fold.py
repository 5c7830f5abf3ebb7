"""Matrices of any number of leading axes -> the two or three axes that the kernels take."""

from __future__ import annotations

from typing import Any

import torch

from ...op import Op


def folded(op: Op, x: Any, y: Any, values: Any, *options: Any) -> Any:
    """`op` on x [..., M, K], y [..., N, K] and values [..., N, D] or None. What cannot be folded goes to the op as it
    is, whose contract says what is wrong."""
    given = [x, y] if values is None else [x, y, values]
    if not all(isinstance(t, torch.Tensor) and t.dim() >= 2 for t in given):
        return op(x, y, values, *options)
    if all(t.dim() == x.dim() <= 3 and t.shape[:-2] == x.shape[:-2] for t in given):
        return op(x, y, values, *options)
    if all(t.dim() == 2 for t in given[1:]):  # one y for all: rows of all matrices follow each other
        return op(x.flatten(0, -2), y, values, *options).unflatten(0, x.shape[:-1])
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-2] for t in given))
    except RuntimeError:
        return op(x, y, values, *options)
    given = [t.expand(*lead, *t.shape[-2:]).flatten(0, -3) for t in given]
    out = op(*given, *([None] if values is None else []), *options)
    return out.unflatten(0, lead)
