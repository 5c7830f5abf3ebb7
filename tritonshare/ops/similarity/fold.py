"""Matrices of any number of leading axes -> the two or three axes that the kernels take."""

from __future__ import annotations

from typing import Any

import torch

from ...op import Op


def folded(op: Op, matrices: tuple[Any, ...], *options: Any) -> Any:
    """`op` on x [..., M, K], y [..., N, K] and what comes with y, values [..., N, D] or None. Outputs are [..., M, *].
    What cannot be folded goes to the op as it is, whose contract says what is wrong."""
    x, *others = matrices
    given = [t for t in others if t is not None]
    if not all(isinstance(t, torch.Tensor) and t.dim() >= 2 for t in (x, *given)):
        return op(*matrices, *options)
    if all(t.dim() == x.dim() <= 3 and t.shape[:-2] == x.shape[:-2] for t in given):
        return op(*matrices, *options)
    if all(t.dim() == 2 for t in given):  # one y for all: rows of all matrices follow each other
        return _unfolded(op(x.flatten(0, -2), *others, *options), x.shape[:-1], 1)
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-2] for t in (x, *given)))
    except RuntimeError:
        return op(*matrices, *options)
    flat = (None if t is None else t.expand(*lead, *t.shape[-2:]).flatten(0, -3) for t in matrices)
    return _unfolded(op(*flat, *options), (*lead, x.shape[-2]), 2)


def _unfolded(outs: Any, rows: tuple[int, ...], folded: int) -> Any:
    """The outputs with the axes `rows` in place of the first so many."""
    if isinstance(outs, tuple):
        return tuple(_unfolded(t, rows, folded) for t in outs)
    return outs.reshape(*rows, *outs.shape[folded:])
