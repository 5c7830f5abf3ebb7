"""Sums, and softmax-weighted sums of values, over the similarities of each row of x to all rows of y.

The maximum is in kernels/nearest.py: of each row of x the best row of y.

Axes: B pairs of matrices, M rows of x, N rows of y, K columns of both, D columns of values.

Math     similarities w as in kernels/similarity.py
         sum: o_i = sum over j of w_ij.  softmax: o_i = sum over j of p_ij v_j, p = u_i exp(c w - h_i), c a scale, h the
         maximum of a row's c w, 1/u the sum of its exp(c w - h); on the way, with the maximum so far. h is kept apart:
         in a logarithm of the sum it would lose the digits by which exponents differ
         backward: w again, then g_ij = do_i, or c p_ij (e_ij - delta_i) with e_ij = <do_i, v_j>, delta_i the sum over j
         of p_ij e_ij. That has a pass of its own, over its own sum of p: where one p is nearly 1, all but rounding
         cancels, and neither <do_i, o_i> would do, nor a p that is off by the rounding of another kernel's w. The
         gradients of x and y come from g as in kernels/similarity.py. dv_j = sum over i of p_ij do_i
Tiles    forward: BLOCK_M rows of x (x BLOCK_C columns of values) walk over one split of y, BLOCK_N rows at a time.
         backward: BLOCK_M rows of a gradient, BLOCK_C columns of it, walk over one split of the rows of the other
         matrix. What has several splits goes through memory in fp32: to similarity.finish, which adds them, and of a
         softmax to `merge`
Traffic  similarity.row_squares before forward, and again before backward. x once per split (again for each block of y
         where K is more than BLOCK_RED), y and v once per BLOCK_M rows of x, from the cache; o, and 8 M bytes of h and
         u for a backward, written. No M N in any pass. With several splits 8 (D + 2) bytes more for each and row of x,
         and as much for columns of gradients
Work     2 B M N (K + D) forward; backward: w again in each pass, once per block of columns: 2 B M N (2 K + D) for each
         of dx and dy (of a softmax's dx, but in full fp32, 2 B M N K more), 2 B M N (K + D) for dv and for the sums of
         delta
Rounding as in similarity, and an error of c w is one of an exponent; p is rounded to the values' type where it is
         multiplied with them; a softmax's slopes are multiplied with y in two parts, rounded and the rest; fp32 sums
Order    rows of y (of x in dy and dv) in blocks, in turn, then splits in turn. How y is split does not depend on how
         many rows x has, so neither do o and dx. No atomics
"""

import triton
import triton.language as tl

from .nearest import largest_first, largest_number
from .nearest import pairs as pairs_but_near
from .similarity import (
    any_of,
    finished,
    is_near,
    load_rows,
    load_squares,
    near_gradients,
    place_in_splits,
    products,
    read_scalar,
    rows_of,
    square_distances,
    store_rows,
)
from .tile import as_multiplied, dot, loses_digits


@triton.jit
def largest_of(w):
    """The maximum of each row."""
    return largest_number(tl.min(largest_first(w), axis=1))


@triton.jit
def pairs(
    x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X: tl.constexpr, FACTOR_Y: tl.constexpr,
    DISTANCE: tl.constexpr, NEAR: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w [BLOCK_M, BLOCK_N], or q of distances; arguments as of nearest.pairs."""
    w = pairs_but_near(
        x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, DISTANCE, K, BLOCK_M, BLOCK_N,
        BLOCK_RED, DOT_TYPE, PRECISION,
    )  # fmt: skip
    if DISTANCE:
        near = is_near(w, s, t, x_ok, y_ok, NEAR)
        if any_of(near):
            w = tl.where(near, square_distances(x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, K, BLOCK_M, BLOCK_N), w)
    return w


@triton.jit
def exponent_scale(temperature, SIGN: tl.constexpr):
    """c, of a temperature that is a number or a pointer to it."""
    return tl.div_rn(tl.full([], SIGN, tl.float32), read_scalar(temperature))


@triton.jit
def finite_base(high):
    """What is taken off exponents: the maximum, but 0 of rows of -inf alone."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def store_mixture(
    o_ptr, high_ptr, unit_ptr, acc, high, total, rows, ok, first, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    o = tl.div_rn(acc, tl.broadcast_to(total[:, None], [BLOCK_M, BLOCK_C]))
    store_rows(o_ptr, o, rows, ok, first, D, BLOCK_C)
    if high_ptr is not None:
        if first == 0:
            tl.store(high_ptr + rows, high, mask=ok)
            tl.store(unit_ptr + rows, tl.div_rn(tl.full([BLOCK_M], 1.0, tl.float32), total), mask=ok)


@triton.jit
def value_of(w, gamma, VALUE: tl.constexpr):
    if VALUE is not None:
        w = VALUE(w, gamma)
    return w


@triton.jit(do_not_specialize=["M", "N", "per_split", "gamma", "eps"])
def forward(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    o_ptr,  # [B, M]
    partial_ptr,  # fp32 [splits, B, M], or None where there is one split
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    K: tl.constexpr,
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    VALUE: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    distance: tl.constexpr = VALUE is not None
    split, matrix, m, _first, count = place_in_splits(M, tl.cdiv(N, per_split), 1, BLOCK_M, 1)
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    x = load_rows(x_ptr, x_rows, x_ok, 0, K, BLOCK_RED)
    s = load_squares(s_ptr, x_rows, x_ok)
    total = tl.zeros([BLOCK_M], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y_rows, y_ok = rows_of(start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_squares(t_ptr, y_rows, y_ok)
        w = pairs(
            x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        total += tl.sum(tl.where(y_ok[None, :], value_of(w, gamma, VALUE), 0.0), axis=1)

    if partial_ptr is None:
        tl.store(o_ptr + x_rows, total.to(o_ptr.dtype.element_ty), mask=x_ok)
    else:
        tl.store(partial_ptr + (x_rows + split * count), total, mask=x_ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "gamma", "eps", "temperature"])
def forward_softmax(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    v_ptr,  # [B, N, D]
    o_ptr,  # [B, M, D]
    high_ptr,  # fp32 [B, M] or None: where h is left
    unit_ptr,  # fp32 [B, M] or None: where u is left
    partial_ptr,  # fp32 [splits, B, M, D], sums for `merge`, or None where there is one split
    ends_ptr,  # fp32 [splits, B, M, 2], likewise: their h and 1/u
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    temperature,  # likewise: c = SIGN / temperature
    K: tl.constexpr,
    D: tl.constexpr,
    SIGN: tl.constexpr,  # -1 of distances
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    VALUE: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    scale = exponent_scale(temperature, SIGN)
    distance: tl.constexpr = VALUE is not None
    split, matrix, m, first, count = place_in_splits(M, tl.cdiv(N, per_split), D, BLOCK_M, BLOCK_C)
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    x = load_rows(x_ptr, x_rows, x_ok, 0, K, BLOCK_RED)
    s = load_squares(s_ptr, x_rows, x_ok)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y_rows, y_ok = rows_of(start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_squares(t_ptr, y_rows, y_ok)
        w = pairs(
            x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        w = tl.where(y_ok[None, :], value_of(w, gamma, VALUE) * scale, float("-inf"))
        largest = largest_of(w)
        largest = tl.where(largest > high, largest, high)
        base = finite_base(largest)
        p = tl.exp(w - base[:, None])
        shrink = tl.exp(high - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_rows(v_ptr, y_rows, y_ok, first, D, BLOCK_C)
        acc = dot(p, v, acc * shrink[:, None], DOT_TYPE, PRECISION)
        high = largest

    if partial_ptr is None:
        store_mixture(o_ptr, high_ptr, unit_ptr, acc, high, total, x_rows, x_ok, first, D, BLOCK_M, BLOCK_C)
    else:
        rows = x_rows + split * count
        store_rows(partial_ptr, acc, rows, x_ok, first, D, BLOCK_C)
        if first == 0:
            tl.store(ends_ptr + 2 * rows, high, mask=x_ok)
            tl.store(ends_ptr + 2 * rows + 1, total, mask=x_ok)


@triton.jit(do_not_specialize=["splits", "count"])
def merge(
    partial_ptr,  # fp32 [splits, rows, D]
    ends_ptr,  # fp32 [splits, rows, 2]
    o_ptr,  # [rows, D]
    high_ptr,  # fp32 [rows] or None
    unit_ptr,  # fp32 [rows] or None
    splits,
    count: tl.int64,  # of rows
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The end of forward_softmax where there are several splits."""
    _, _, m, first, _ = place_in_splits(count, 1, D, BLOCK_M, BLOCK_C)
    rows, ok = rows_of(m, 0, count, BLOCK_M)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for split in range(splits):
        others = rows + tl.cast(split, tl.int64) * count
        largest = tl.load(ends_ptr + 2 * others, mask=ok, other=0.0)
        after = tl.where((largest > high) | (largest != largest), largest, high)
        base = finite_base(after)
        before, share = tl.exp(high - base), tl.exp(largest - base)
        total = total * before + share * tl.load(ends_ptr + 2 * others + 1, mask=ok, other=1.0)
        acc = acc * before[:, None] + share[:, None] * load_rows(partial_ptr, others, ok, first, D, BLOCK_C)
        high = after

    store_mixture(o_ptr, high_ptr, unit_ptr, acc, high, total, rows, ok, first, D, BLOCK_M, BLOCK_C)


@triton.jit
def shares(w, scale, high_ptr, unit_ptr, x_rows, x_ok):
    """p of w, for rows of x [rows, 1] or [1, rows]."""
    high = tl.load(high_ptr + x_rows, mask=x_ok, other=0.0)
    unit = tl.load(unit_ptr + x_rows, mask=x_ok, other=0.0)
    return tl.exp(w * scale - high) * unit


@triton.jit
def slopes_of_softmax(w, e, scale, high_ptr, unit_ptr, delta_ptr, x_rows, x_ok):
    total = tl.load(delta_ptr + 2 * x_rows + 1, mask=x_ok, other=1.0)
    delta = tl.div_rn(tl.load(delta_ptr + 2 * x_rows, mask=x_ok, other=0.0), total)
    return scale * (shares(w, scale, high_ptr, unit_ptr, x_rows, x_ok) * (e - delta))


@triton.jit
def slopes(
    w, scale, g_ptr, v_ptr, high_ptr, unit_ptr, delta_ptr, rows, ok, others, others_ok, SWAPPED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RED: tl.constexpr, DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of w [BLOCK_M, BLOCK_N], for rows of x and others of y; SWAPPED: of y and x."""
    if SWAPPED:
        x_rows, x_ok = others[None, :], others_ok[None, :]
        first_ptr, second_ptr = v_ptr, g_ptr
    else:
        x_rows, x_ok = rows[:, None], ok[:, None]
        first_ptr, second_ptr = g_ptr, v_ptr
    if high_ptr is None:
        g = tl.load(g_ptr + x_rows, mask=x_ok, other=0.0).to(tl.float32)
    else:
        e = products(
            first_ptr, second_ptr, rows, ok, others, others_ok, D, BLOCK_M, BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION
        )
        g = slopes_of_softmax(w, e, scale, high_ptr, unit_ptr, delta_ptr, x_rows, x_ok)
    return tl.where(ok[:, None] & others_ok[None, :], g, 0.0)


@triton.jit(do_not_specialize=["M", "N", "per_split", "gamma", "eps", "temperature"])
def deltas(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    g_ptr,  # [B, M, D]
    v_ptr,  # [B, N, D]
    high_ptr,  # fp32 [B, M]
    unit_ptr,  # fp32 [B, M]
    sums_ptr,  # fp32 [splits, B, M, 2]
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    temperature,  # likewise
    K: tl.constexpr,
    D: tl.constexpr,
    SIGN: tl.constexpr,  # -1 of distances
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    VALUE: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of each row of x the sum of p_ij <do_i, v_j>, and of p_ij."""
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    scale = exponent_scale(temperature, SIGN)
    distance: tl.constexpr = VALUE is not None
    split, matrix, m, _first, count = place_in_splits(M, tl.cdiv(N, per_split), 1, BLOCK_M, 1)
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    x = load_rows(x_ptr, x_rows, x_ok, 0, K, BLOCK_RED)
    s = load_squares(s_ptr, x_rows, x_ok)
    total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y_rows, y_ok = rows_of(start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_squares(t_ptr, y_rows, y_ok)
        w = pairs(
            x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        p = shares(value_of(w, gamma, VALUE), scale, high_ptr, unit_ptr, x_rows[:, None], x_ok[:, None])
        p = tl.where(y_ok[None, :], p, 0.0)
        e = products(g_ptr, v_ptr, x_rows, x_ok, y_rows, y_ok, D, BLOCK_M, BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION)
        total += tl.sum(p, axis=1)
        delta += tl.sum(tl.where(p == 0.0, 0.0, p * e), axis=1)

    rows = x_rows + split * count
    tl.store(sums_ptr + 2 * rows, delta, mask=x_ok)
    tl.store(sums_ptr + 2 * rows + 1, total, mask=x_ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "gamma", "eps", "temperature"])
def number_sums(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    g_ptr,  # [B, M], or [B, M, D] of softmax
    v_ptr,  # [B, N, D], of softmax; else None
    high_ptr,  # fp32 [B, M], of softmax
    unit_ptr,  # fp32 [B, M], of softmax
    delta_ptr,  # fp32 [B, M, 2], of softmax
    sums_ptr,  # fp32 [splits, B, M], of softmax [splits, B, M, 6]
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    temperature,  # likewise
    K: tl.constexpr,
    D: tl.constexpr,
    SIGN: tl.constexpr,  # -1 of distances
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    VALUE: tl.constexpr,
    BY_NUMBER: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the gradients of a kind's own number and of the temperature are made of, for each row of x. With a the
    gradient of w, d = dw/dnumber and l = c w - h: sums of a d; and of softmax those of p d, a l, p l, a and p. There
    the sum of a is 0 but for rounding, which would count: (sum of a) (sum of p d) / (sum of p) takes it off that of
    a d, and likewise that of a l."""
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    scale = exponent_scale(temperature, SIGN)
    distance: tl.constexpr = VALUE is not None
    split, matrix, m, _first, count = place_in_splits(M, tl.cdiv(N, per_split), 1, BLOCK_M, 1)
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    x = load_rows(x_ptr, x_rows, x_ok, 0, K, BLOCK_RED)
    s = load_squares(s_ptr, x_rows, x_ok)
    number = tl.zeros([BLOCK_M], tl.float32)
    heat = tl.zeros([BLOCK_M], tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    number_mean = tl.zeros([BLOCK_M], tl.float32)
    heat_mean = tl.zeros([BLOCK_M], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y_rows, y_ok = rows_of(start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_squares(t_ptr, y_rows, y_ok)
        q = pairs(
            x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        w = value_of(q, gamma, VALUE)
        a = slopes(
            w, scale, g_ptr, v_ptr, high_ptr, unit_ptr, delta_ptr, x_rows, x_ok, y_rows, y_ok, False, D, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        if BY_NUMBER is not None:
            by = BY_NUMBER(q, s[:, None], t[None, :], gamma, eps)
            number += tl.sum(tl.where(a == 0.0, 0.0, a * by), axis=1)
        if high_ptr is not None:
            p = shares(w, scale, high_ptr, unit_ptr, x_rows[:, None], x_ok[:, None])
            p = tl.where(y_ok[None, :], p, 0.0)
            rest += tl.sum(a, axis=1)
            mass += tl.sum(p, axis=1)
            high = tl.load(high_ptr + x_rows, mask=x_ok, other=0.0)
            exponent = w * scale - high[:, None]
            heat += tl.sum(tl.where(a == 0.0, 0.0, a * exponent), axis=1)
            heat_mean += tl.sum(tl.where(p == 0.0, 0.0, p * exponent), axis=1)
            if BY_NUMBER is not None:
                number_mean += tl.sum(tl.where(p == 0.0, 0.0, p * by), axis=1)

    rows = x_rows + split * count
    if high_ptr is None:
        tl.store(sums_ptr + rows, number, mask=x_ok)
    else:
        tl.store(sums_ptr + 6 * rows, number, mask=x_ok)
        tl.store(sums_ptr + 6 * rows + 1, number_mean, mask=x_ok)
        tl.store(sums_ptr + 6 * rows + 2, heat, mask=x_ok)
        tl.store(sums_ptr + 6 * rows + 3, heat_mean, mask=x_ok)
        tl.store(sums_ptr + 6 * rows + 4, rest, mask=x_ok)
        tl.store(sums_ptr + 6 * rows + 5, mass, mask=x_ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "gamma", "eps", "temperature"])
def backward(
    x_ptr,  # [B, M, K]: the matrix whose gradient it is
    y_ptr,  # [B, N, K]: the other one
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    g_ptr,  # gradient of the output: [B, M], or [B, M, D] of softmax; N for M where SWAPPED
    v_ptr,  # [B, N, D], of softmax; else None; M for N where SWAPPED
    high_ptr,  # fp32 [B, M], of softmax; N where SWAPPED
    unit_ptr,  # fp32 [B, M], of softmax; N where SWAPPED
    delta_ptr,  # fp32 [B, M, 2], of softmax: the sums of `deltas`; N where SWAPPED
    dx_ptr,  # [B, M, K]
    partial_ptr,  # fp32 [splits, B, M, K], sums for `finish`; None where there is one split and nothing for it to add
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    temperature,  # likewise
    SWAPPED: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    SIGN: tl.constexpr,  # -1 of distances
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    THROUGH: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
):
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    scale = exponent_scale(temperature, SIGN)
    distance: tl.constexpr = VALUE is not None
    split, matrix, m, first, count = place_in_splits(M, tl.cdiv(N, per_split), K, BLOCK_M, BLOCK_C)
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    x = load_rows(x_ptr, x_rows, x_ok, 0, K, BLOCK_RED)
    s = load_squares(s_ptr, x_rows, x_ok)
    p = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)  # of x in a distance's gradient
    # a row's slopes of a softmax cancel, and so do their products with rows of y that are alike; factors of fp16's rows
    # may be of any magnitude, and TF32 cuts them where fp16 would round: what is taken off is multiplied, too
    softmax: tl.constexpr = high_ptr is not None and not SWAPPED
    factors: tl.constexpr = FACTOR_Y is not None and SWAPPED and GRADIENT_TYPE != DOT_TYPE
    in_two: tl.constexpr = (softmax or factors) and loses_digits(GRADIENT_TYPE, GRADIENT_PRECISION)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y_rows, y_ok = rows_of(start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_squares(t_ptr, y_rows, y_ok)
        q = pairs(
            x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        w = value_of(q, gamma, VALUE)
        a = slopes(
            w, scale, g_ptr, v_ptr, high_ptr, unit_ptr, delta_ptr, x_rows, x_ok, y_rows, y_ok, SWAPPED, D, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        if distance:
            a = SLOPE(a, w, gamma)
            near = is_near(q, s, t, x_ok, y_ok, NEAR)
            if any_of(near):
                p = near_gradients(
                    tl.where(near, a, 0.0), x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, first, p, K, BLOCK_C
                )
            a = tl.where(near, 0.0, a)
            if not in_two:
                a = as_multiplied(a, GRADIENT_TYPE, GRADIENT_PRECISION)
            weight += tl.sum(a, axis=1)
        elif FACTOR_Y is not None:
            a = a * FACTOR_Y(t, eps)[None, :]
        y = load_rows(y_ptr, y_rows, y_ok, first, K, BLOCK_C)
        p = dot(a, y, p, GRADIENT_TYPE, GRADIENT_PRECISION)
        if in_two:
            rest = a - as_multiplied(a, GRADIENT_TYPE, GRADIENT_PRECISION)
            p = dot(rest, y, p, GRADIENT_TYPE, GRADIENT_PRECISION)

    own = load_rows(x_ptr, x_rows, x_ok, first, K, BLOCK_C)
    if distance:
        p = own.to(tl.float32) * weight[:, None] - p
    elif partial_ptr is None:
        p = finished(p, own, s, eps, FACTOR_X, THROUGH, tl.sum(own.to(tl.float32) * p, axis=1), K)
    if partial_ptr is None:
        store_rows(dx_ptr, p, x_rows, x_ok, first, K, BLOCK_C)
    else:
        store_rows(partial_ptr, p, x_rows + split * count, x_ok, first, K, BLOCK_C)


@triton.jit(do_not_specialize=["M", "N", "gamma", "eps", "temperature"])
def backward_values(
    y_ptr,  # [B, N, K]
    x_ptr,  # [B, M, K]
    t_ptr,  # fp32 [B, N] or None: squares of y
    s_ptr,  # fp32 [B, M] or None: squares of x
    g_ptr,  # [B, M, D]
    high_ptr,  # fp32 [B, M]
    unit_ptr,  # fp32 [B, M]
    dv_ptr,  # [B, N, D]
    partial_ptr,  # fp32 [splits, B, N, D], or None where there is one split
    N,
    M,
    per_split,  # rows of x, a multiple of BLOCK_N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    temperature,  # likewise
    K: tl.constexpr,
    D: tl.constexpr,
    SIGN: tl.constexpr,  # -1 of distances
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    VALUE: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    scale = exponent_scale(temperature, SIGN)
    distance: tl.constexpr = VALUE is not None
    split, matrix, n, first, count = place_in_splits(N, tl.cdiv(M, per_split), D, BLOCK_M, BLOCK_C)
    y_rows, y_ok = rows_of(n, matrix, N, BLOCK_M)
    y = load_rows(y_ptr, y_rows, y_ok, 0, K, BLOCK_RED)
    t = load_squares(t_ptr, y_rows, y_ok)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, M), BLOCK_N):
        x_rows, x_ok = rows_of(start // BLOCK_N, matrix, M, BLOCK_N)
        s = load_squares(s_ptr, x_rows, x_ok)
        w = pairs(
            y, t, s, y_ptr, x_ptr, y_rows, y_ok, x_rows, x_ok, eps, FACTOR_Y, FACTOR_X, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        p = shares(value_of(w, gamma, VALUE), scale, high_ptr, unit_ptr, x_rows[None, :], x_ok[None, :])
        p = tl.where(x_ok[None, :], p, 0.0)
        g = load_rows(g_ptr, x_rows, x_ok, first, D, BLOCK_C)
        acc = dot(p, g, acc, DOT_TYPE, PRECISION)

    if partial_ptr is None:
        store_rows(dv_ptr, acc, y_rows, y_ok, first, D, BLOCK_C)
    else:
        store_rows(partial_ptr, acc, y_rows + split * count, y_ok, first, D, BLOCK_C)
