"""Options of conv2d_act_pool: from the form that callers write to that of the schema; and the geometry they define."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...kernels.geometry import Axis, conv_size
from ...kernels.geometry import pool_size as pooled_size


def pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return (values[0], values[-1])


def four_sides(padding: Any, taps: Sequence[int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """Padding as (top, bottom, left, right). "same" puts an odd zero at the end, as torch does."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        h, w = (d * (t - 1) for t, d in zip(taps, dilation, strict=True))
        return (h // 2, h - h // 2, w // 2, w - w // 2)
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return tuple(padding)
    h, w = pair(padding)
    return (h, h, w, w)


def canonical(
    tensors, stride, padding, dilation, groups,
    activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad,
):  # fmt: skip
    dilation = pair(dilation)
    conv = (pair(stride), four_sides(padding, tensors[1].shape[2:], dilation), dilation, groups, activation or "none")
    if pool in (None, "none"):
        return (*conv, "none", (1, 1), (1, 1), (0, 0), False, True)
    size = pair(pool_size)
    step = size if pool_stride is None else pair(pool_stride)
    return (*conv, pool, size, step, pair(pool_padding), ceil_mode, count_include_pad)


def axes(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Axis, Axis]:
    """Both spatial axes of a call with canonical options. Sizes may come out too small, which the contract checks."""
    stride, padding, dilation, _, _, _, window, pool_stride, pool_pad, ceil_mode, _ = options
    both = []
    for i in (0, 1):
        # int(): while torch traces, sizes other than the batch become constants here
        size, taps = int(tensors[0].shape[2 + i]), int(tensors[1].shape[2 + i])
        before, after = padding[2 * i], padding[2 * i + 1]
        conv = conv_size(size, taps, stride[i], before + after, dilation[i])
        pooled = pooled_size(conv, window[i], pool_stride[i], pool_pad[i], ceil_mode)
        both.append(
            Axis(size, taps, stride[i], before, dilation[i], conv, window[i], pool_stride[i], pool_pad[i], pooled)
        )
    return both[0], both[1]
