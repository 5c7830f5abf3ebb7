"""Matrices of any number of leading axes -> the two or three axes that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...op import Op


def folded(op: Op, matrices: Sequence[Any], *options: Any) -> Any:
    """`op` on x [..., M, K], y [..., N, K] and, if it takes them, values [..., N, D] or None; outputs are [..., M, *].
    What cannot be folded goes to the op as it is, whose contract says what is wrong."""
    given = [*matrices[:2], *(t for t in matrices[2:] if t is not None)]
    x, *others = given
    if not all(isinstance(t, torch.Tensor) and t.dim() >= 2 for t in given):
        return op(*matrices, *options)
    if all(t.dim() == x.dim() <= 3 and t.shape[:-2] == x.shape[:-2] for t in others):
        return op(*matrices, *options)
    if all(t.dim() == 2 for t in others):  # one y for all: rows of all matrices follow each other
        lead, matrices = x.shape[:-2], (x.flatten(0, -2), *matrices[1:])
    else:
        try:
            lead = torch.broadcast_shapes(*(t.shape[:-2] for t in given))
        except RuntimeError:
            return op(*matrices, *options)
        matrices = [None if t is None else t.expand(*lead, *t.shape[-2:]).flatten(0, -3) for t in matrices]
    return _unfolded(op(*matrices, *options), (*lead, x.shape[-2]))


def _unfolded(outs: Any, rows: Sequence[int]) -> Any:
    if isinstance(outs, tuple):
        return tuple(_unfolded(t, rows) for t in outs)
    return outs.reshape(*rows, outs.shape[-1])
