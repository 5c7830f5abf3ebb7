"""segment_sum in plain torch."""

from __future__ import annotations

import torch

from ...products import widened


def reference(input, segments, count):
    """Rows that belong to no segment are summed into an extra one, which is cut off. Half precision is summed in
    fp32."""
    # hidden while torch compiles; bool: torch.jit.trace compares sizes as tensors
    torch._check(bool(input.shape[1] > 0), lambda: "segment_sum: input axis 1 (D) is empty")
    inside = (segments >= 0) & (segments < count)
    wide = widened(input)
    sums = wide.new_zeros(count + 1, input.shape[1]).index_add(0, torch.where(inside, segments, count), wide)
    return sums[:count].to(input.dtype)
