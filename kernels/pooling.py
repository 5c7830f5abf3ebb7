"""Poolings as jit functions, over tiles [pixels, channels] of one window position at a time. Values are fp32.

Forward, what is carried from position to position is a tuple of tiles:

    start   what is carried before the first position of windows (u, v)
    take    the same after one more position: `values` are pooled, `kept` is a tuple of what the backward needs of them
    finish  the pooled values, their code, and what is kept of each: see `code_planes` of geometry.ConvActPool

Backward:

    share   what the positions of a window have of its gradient, where it is the same for all of them
    route   what of that belongs to one position

Where padding or a ceiling let windows leave the map, positions outside of it are no conv outputs and count for nothing.
NaN passes, and of equal maxima the first wins, as in torch.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Pooling(NamedTuple):
    start: Any
    take: Any
    finish: Any
    share: Any
    route: Any
    picks: bool = False  # one position has a window's whole gradient, and the code is its number i * J + j
    shares: bool = False  # every position has a share; the code has a bit of each


# Windows and the map of conv outputs.


@triton.jit
def in_map(u, v, position, geo: tl.constexpr):
    """Whether window position `position` of pooled pixels (u, v) is a conv output, and not pooling's own padding."""
    p = u * geo.h.pool_stride - geo.h.pool_pad + position // geo.w.window
    q = v * geo.w.pool_stride - geo.w.pool_pad + position % geo.w.window
    return (p >= 0) & (p < geo.h.conv) & (q >= 0) & (q < geo.w.conv)


@triton.jit
def window_extent(u, axis: tl.constexpr, count_pad: tl.constexpr):
    """Rows (or columns) that a mean over window u counts, and the first window row inside the map."""
    start = u * axis.pool_stride - axis.pool_pad
    end = tl.minimum(start + axis.window, axis.conv + axis.pool_pad)
    inside = tl.minimum(end, axis.conv) - tl.maximum(start, 0)
    return (end - start if count_pad else inside), tl.maximum(-start, 0)


@triton.jit
def mean_weight(u, v, geo: tl.constexpr):
    """1 / (elements that the mean over window (u, v) counts), fp32, shaped like u."""
    if geo.divisor != 0:
        weight = tl.full(u.shape, 1.0 / geo.divisor, tl.float32)
    else:
        h_axis: tl.constexpr = geo.h  # Triton 3.6 takes a record as an argument, but not a record's field
        w_axis: tl.constexpr = geo.w
        rows, _ = window_extent(u, h_axis, geo.count_include_pad)
        cols, _ = window_extent(v, w_axis, geo.count_include_pad)
        # windows beyond the pooled output are masked, and must not divide by zero
        weight = 1.0 / tl.cast(tl.maximum(rows * cols, 1), tl.float32)
    return weight


# No pooling: a window is one position.


@triton.jit
def start_none(u, v, COLUMNS: tl.constexpr, geo: tl.constexpr):
    tl.static_assert(geo.WINDOW == 1, "without pooling a window is one position")
    values = tl.zeros([u.shape[0], COLUMNS], tl.float32)
    kept = ()
    if geo.keeps == "input":
        kept = (values,)
    return values, kept


@triton.jit
def take_none(carried, values, kept, position, u, v, geo: tl.constexpr):
    return values, kept


@triton.jit
def finish_none(carried, u, v, geo: tl.constexpr):
    values, kept = carried
    return values, 0, kept


@triton.jit
def share_whole(dy, u, v, geo: tl.constexpr):
    return dy


@triton.jit
def route_whole(dy, code, position):
    return dy


# Maxima.


@triton.jit
def start_max(u, v, COLUMNS: tl.constexpr, geo: tl.constexpr):
    best = tl.full([u.shape[0], COLUMNS], float("-inf"), tl.float32)
    code = tl.zeros([u.shape[0], COLUMNS], tl.int32)
    if not geo.windows_inside:
        # a window of nothing but -inf keeps its first position inside the map
        h_axis: tl.constexpr = geo.h
        w_axis: tl.constexpr = geo.w
        _, i = window_extent(u, h_axis, False)
        _, j = window_extent(v, w_axis, False)
        code += (i * geo.w.window + j)[:, None]
    kept = ()
    if geo.keeps == "input":
        kept = (best,)
    return best, code, kept


@triton.jit
def take_max(carried, values, kept, position, u, v, geo: tl.constexpr):
    best, code, best_kept = carried
    better = (values > best) | (values != values)  # the first maximum, and NaN, win
    if not geo.windows_inside:
        better = better & in_map(u, v, position, geo)[:, None]
    best = tl.where(better, values, best)
    code = tl.where(better, position, code)
    chosen = ()
    for i in tl.static_range(len(kept)):
        chosen = chosen + (tl.where(better, kept[i], best_kept[i]),)
    return best, code, chosen


@triton.jit
def finish_max(carried, u, v, geo: tl.constexpr):
    return carried


@triton.jit
def route_max(dy, code, position):
    return tl.where(code == position, dy, 0.0)


# Means.


@triton.jit
def start_mean(u, v, COLUMNS: tl.constexpr, geo: tl.constexpr):
    tl.static_assert(geo.WINDOW <= 64, "a code has a bit per position")
    total = tl.zeros([u.shape[0], COLUMNS], tl.float32)
    return total, tl.zeros([u.shape[0], COLUMNS], tl.int64 if geo.WINDOW > 32 else tl.int32)


@triton.jit
def take_mean(carried, values, kept, position, u, v, geo: tl.constexpr):
    total, code = carried
    if not geo.windows_inside:
        values = tl.where(in_map(u, v, position, geo)[:, None], values, 0.0)
    total += values
    for i in tl.static_range(len(kept)):
        code |= tl.cast(kept[i], code.dtype) << position
    return total, code


@triton.jit
def finish_mean(carried, u, v, geo: tl.constexpr):
    total, code = carried
    return total * mean_weight(u, v, geo)[:, None], code, ()


@triton.jit
def share_mean(dy, u, v, geo: tl.constexpr):
    return dy.to(tl.float32) * mean_weight(u, v, geo)


POOLINGS = {
    "none": Pooling(start_none, take_none, finish_none, share_whole, route_whole),
    "max": Pooling(start_max, take_max, finish_max, share_whole, route_max, picks=True),
    "avg": Pooling(start_mean, take_mean, finish_mean, share_mean, route_whole, shares=True),
}
