"""How a weight lies in memory."""

from __future__ import annotations

import torch

LONGEST_ROW = 2**30 - 1  # elements: `similarity_of` in kernels/adaptive_update.py counts them in 32 bits


def is_dense(t: torch.Tensor) -> bool:
    """Whether the elements fill their memory without a gap or an overlap: then torch keeps the strides of a copy."""
    return torch.empty_like(t, device="meta").stride() == t.stride()


def rows_of(weight: torch.Tensor) -> int | None:
    """How many rows (axis 0) lie one after the other in memory, 1 for what has no two axes or no elements; None where
    rows lie otherwise, or are longer than LONGEST_ROW."""
    if weight.dim() < 2 or not weight.numel():
        return 1
    rows = weight.shape[0]
    one_by_one = weight.stride(0) * rows == weight.numel()
    return rows if one_by_one and (rows == 1 or weight.numel() // rows <= LONGEST_ROW) else None
