"""Sums, and softmax-weighted sums of values, over the similarities of each row of x to all rows of y.

The maximum is in kernels/nearest.py: of each row of x the best row of y.

Axes: B pairs of matrices, M rows of x, N rows of y, K columns of both, D columns of values.

Math     similarities w as in kernels/similarity.py
         sum: o_i = sum over j of w_ij.  softmax: o_i = sum over j of p_ij v_j, p = u_i exp(c w - h_i), c a scale, h the
         maximum of a row's c w, 1/u the sum of its exp(c w - h); on the way, with the maximum so far. h is kept apart:
         in a logarithm of the sum it would lose the digits by which exponents differ
         backward: w again, then g_ij = do_i, or c p_ij (e_ij - delta_i) with e_ij = <do_i, v_j>, and delta_i the sum
         over j of p_ij e_ij. That has a pass of its own, over its own sum of p: where one p is nearly 1 all but rounding
         cancels, and neither <do_i, o_i> would do nor a p that is off by the rounding of another kernel's w. The
         gradients of x and y from g as in kernels/similarity.py, but that <x_i, p_i> is (sum of g w) / f where K is
         more than BLOCK_C. dv_j = sum over i of p_ij do_i
Tiles    forward: BLOCK_M rows of x (x BLOCK_C columns of values) walk over y, BLOCK_N rows at a time. backward: BLOCK_M
         rows of a gradient, BLOCK_C columns of it, walk over the rows of the other matrix
Traffic  x once (again for each block of y where K is more than BLOCK_RED), y and v once per BLOCK_M rows of x, from the
         cache; o, and 8 M bytes of h and u for a backward, written. No M N in any pass
Work     2 B M N (K + D) forward; backward: w again in each pass, once per block of columns: 2 B M N (2 K + D) for each
         of dx and dy, 2 B M N (K + D) for dv and for the sums
Rounding as in similarity, and an error of c w is one of an exponent; p is rounded to the values' type where it is
         multiplied with them; fp32 sums
Order    rows of y (of x in dy and dv) in blocks, in turn: o and dx do not depend on how many rows x has. No atomics
"""

import triton
import triton.language as tl

from .nearest import held, largest_first, largest_number, pairs
from .similarity import any_of, cut_to_tf32, finished, is_near, load_rows, near_gradients, products, rows_of
from .tile import dot


@triton.jit
def largest_of(w):
    """The maximum of each row."""
    return largest_number(tl.min(largest_first(w), axis=1))


@triton.jit
def value_of(w, gamma, VALUE: tl.constexpr):
    if VALUE is not None:
        w = VALUE(w, gamma)
    return w


@triton.jit(do_not_specialize=["M", "N", "gamma", "eps"])
def forward(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    o_ptr,  # [B, M]
    M,
    N,
    gamma,
    eps,
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
    distance: tl.constexpr = VALUE is not None
    blocks_m = tl.cdiv(M, BLOCK_M)
    matrix = tl.program_id(0) // blocks_m
    x_rows, x_ok = rows_of(tl.program_id(0) % blocks_m, matrix, M, BLOCK_M)
    x, s = held(x_ptr, x_rows, x_ok, distance or FACTOR_X is not None, K, BLOCK_M, BLOCK_RED)
    total = tl.zeros([BLOCK_M], tl.float32)

    for n in range(0, tl.cdiv(N, BLOCK_N)):
        y_rows, y_ok = rows_of(n, matrix, N, BLOCK_N)
        w, _ = pairs(
            x, s, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        total += tl.sum(tl.where(y_ok[None, :], value_of(w, gamma, VALUE), 0.0), axis=1)

    tl.store(o_ptr + x_rows, total.to(o_ptr.dtype.element_ty), mask=x_ok)


@triton.jit(do_not_specialize=["M", "N", "gamma", "eps", "scale"])
def forward_softmax(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    v_ptr,  # [B, N, D]
    o_ptr,  # [B, M, D]
    high_ptr,  # fp32 [B, M] or None: where h is left
    unit_ptr,  # fp32 [B, M] or None: where u is left
    M,
    N,
    gamma,
    eps,
    scale,  # c
    K: tl.constexpr,
    D: tl.constexpr,
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
    distance: tl.constexpr = VALUE is not None
    blocks_c: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    first = tl.program_id(0) % blocks_c * BLOCK_C
    pid = tl.program_id(0) // blocks_c
    blocks_m = tl.cdiv(M, BLOCK_M)
    matrix = pid // blocks_m
    x_rows, x_ok = rows_of(pid % blocks_m, matrix, M, BLOCK_M)
    x, s = held(x_ptr, x_rows, x_ok, distance or FACTOR_X is not None, K, BLOCK_M, BLOCK_RED)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for n in range(0, tl.cdiv(N, BLOCK_N)):
        y_rows, y_ok = rows_of(n, matrix, N, BLOCK_N)
        w, _ = pairs(
            x, s, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        w = tl.where(y_ok[None, :], value_of(w, gamma, VALUE) * scale, float("-inf"))
        largest = largest_of(w)
        largest = tl.where(largest > high, largest, high)
        base = tl.where(largest == float("-inf"), 0.0, largest)  # rows of -inf alone so far
        p = tl.exp(w - base[:, None])
        shrink = tl.exp(high - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_rows(v_ptr, y_rows, y_ok, first, D, BLOCK_C)
        acc = dot(p, v, acc * shrink[:, None], DOT_TYPE, PRECISION)
        high = largest

    offs_c = first + tl.arange(0, BLOCK_C)
    o = tl.div_rn(acc, tl.broadcast_to(total[:, None], [BLOCK_M, BLOCK_C]))
    mask = x_ok[:, None] & (offs_c < D)[None, :]
    tl.store(o_ptr + (x_rows[:, None] * D + offs_c[None, :]), o.to(o_ptr.dtype.element_ty), mask=mask)
    if high_ptr is not None:
        if first == 0:
            tl.store(high_ptr + x_rows, high, mask=x_ok)
            tl.store(unit_ptr + x_rows, tl.div_rn(tl.full([BLOCK_M], 1.0, tl.float32), total), mask=x_ok)


@triton.jit
def shares(w, scale, high_ptr, unit_ptr, rows, ok):
    """p of w [rows, others]."""
    high = tl.load(high_ptr + rows, mask=ok, other=0.0)
    unit = tl.load(unit_ptr + rows, mask=ok, other=0.0)
    return tl.exp(w * scale - high[:, None]) * unit[:, None]


@triton.jit
def slopes(
    w, scale, g_ptr, v_ptr, high_ptr, unit_ptr, delta_ptr, rows, ok, others, others_ok, SWAPPED: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RED: tl.constexpr, DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of w [BLOCK_M, BLOCK_N], for rows of x and others of y; SWAPPED: of y and x."""
    if high_ptr is None:
        if SWAPPED:
            g = tl.load(g_ptr + others, mask=others_ok, other=0.0).to(tl.float32)[None, :]
        else:
            g = tl.load(g_ptr + rows, mask=ok, other=0.0).to(tl.float32)[:, None]
        g = tl.broadcast_to(g, [BLOCK_M, BLOCK_N])
    elif SWAPPED:
        g, _, _ = products(
            v_ptr, g_ptr, rows, ok, others, others_ok, False, False, D, BLOCK_M, BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION
        )
        g = g - tl.load(delta_ptr + others, mask=others_ok, other=0.0)[None, :]
        g *= scale * tl.trans(shares(tl.trans(w), scale, high_ptr, unit_ptr, others, others_ok))
    else:
        g, _, _ = products(
            g_ptr, v_ptr, rows, ok, others, others_ok, False, False, D, BLOCK_M, BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION
        )
        g = g - tl.load(delta_ptr + rows, mask=ok, other=0.0)[:, None]
        g *= scale * shares(w, scale, high_ptr, unit_ptr, rows, ok)
    return tl.where(ok[:, None] & others_ok[None, :], g, 0.0)


@triton.jit(do_not_specialize=["M", "N", "gamma", "eps", "scale"])
def deltas(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    g_ptr,  # [B, M, D]
    v_ptr,  # [B, N, D]
    high_ptr,  # fp32 [B, M]
    unit_ptr,  # fp32 [B, M]
    delta_ptr,  # fp32 [B, M]
    M,
    N,
    gamma,
    eps,
    scale,
    K: tl.constexpr,
    D: tl.constexpr,
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
    """Of each row of x the sum of p_ij <do_i, v_j>."""
    distance: tl.constexpr = VALUE is not None
    blocks_m = tl.cdiv(M, BLOCK_M)
    matrix = tl.program_id(0) // blocks_m
    x_rows, x_ok = rows_of(tl.program_id(0) % blocks_m, matrix, M, BLOCK_M)
    x, s = held(x_ptr, x_rows, x_ok, distance or FACTOR_X is not None, K, BLOCK_M, BLOCK_RED)
    total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)

    for n in range(0, tl.cdiv(N, BLOCK_N)):
        y_rows, y_ok = rows_of(n, matrix, N, BLOCK_N)
        w, _ = pairs(
            x, s, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        p = shares(value_of(w, gamma, VALUE), scale, high_ptr, unit_ptr, x_rows, x_ok)
        p = tl.where(y_ok[None, :], p, 0.0)
        e, _, _ = products(
            g_ptr, v_ptr, x_rows, x_ok, y_rows, y_ok, False, False, D, BLOCK_M, BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION
        )
        total += tl.sum(p, axis=1)
        delta += tl.sum(tl.where(p == 0.0, 0.0, p * e), axis=1)

    tl.store(delta_ptr + x_rows, tl.div_rn(delta, tl.where(x_ok, total, 1.0)), mask=x_ok)


@triton.jit(do_not_specialize=["M", "N", "gamma", "eps", "scale"])
def backward(
    x_ptr,  # [B, M, K]: the matrix whose gradient it is
    y_ptr,  # [B, N, K]: the other one
    g_ptr,  # gradient of the output: [B, M], or [B, M, D] of softmax; N for M where SWAPPED
    v_ptr,  # [B, N, D], of softmax; else None; M for N where SWAPPED
    high_ptr,  # fp32 [B, M], of softmax; N where SWAPPED
    unit_ptr,  # fp32 [B, M], of softmax; N where SWAPPED
    delta_ptr,  # fp32 [B, M], of softmax: from `deltas`; N where SWAPPED
    dx_ptr,  # [B, M, K]
    M,
    N,
    gamma,
    eps,
    scale,
    SWAPPED: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
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
    distance: tl.constexpr = VALUE is not None
    blocks_c: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    first = tl.program_id(0) % blocks_c * BLOCK_C
    pid = tl.program_id(0) // blocks_c
    blocks_m = tl.cdiv(M, BLOCK_M)
    matrix = pid // blocks_m
    x_rows, x_ok = rows_of(pid % blocks_m, matrix, M, BLOCK_M)
    x, s = held(x_ptr, x_rows, x_ok, distance or FACTOR_X is not None, K, BLOCK_M, BLOCK_RED)
    p = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)  # of x in a distance's gradient; of inner kinds the sum of g w

    for n in range(0, tl.cdiv(N, BLOCK_N)):
        y_rows, y_ok = rows_of(n, matrix, N, BLOCK_N)
        q, t = pairs(
            x, s, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, NEAR, K, BLOCK_M,
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
            if GRADIENT_PRECISION == "tf32":
                a = cut_to_tf32(a)
            weight += tl.sum(a.to(GRADIENT_TYPE).to(tl.float32), axis=1)
        else:
            if THROUGH is not None and K > BLOCK_C:
                weight += tl.sum(tl.where(a == 0.0, 0.0, a * w), axis=1)
            if FACTOR_Y is not None:
                a = a * FACTOR_Y(t, eps)[None, :]
        y = load_rows(y_ptr, y_rows, y_ok, first, K, BLOCK_C)
        p = dot(a, y, p, GRADIENT_TYPE, GRADIENT_PRECISION)

    own = load_rows(x_ptr, x_rows, x_ok, first, K, BLOCK_C)
    if distance:
        p = own.to(tl.float32) * weight[:, None] - p
    else:
        r = weight
        if THROUGH is not None and K <= BLOCK_C:
            r = tl.sum(own.to(tl.float32) * p, axis=1)
        elif THROUGH is not None:
            f = FACTOR_X(s, eps)
            r = tl.where(f == 0.0, 0.0, tl.div_rn(weight, tl.where(f == 0.0, 1.0, f)))
        p = finished(p, own, s, eps, FACTOR_X, THROUGH, r)
    offs_c = first + tl.arange(0, BLOCK_C)
    mask = x_ok[:, None] & (offs_c < K)[None, :]
    tl.store(dx_ptr + (x_rows[:, None] * K + offs_c[None, :]), p.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "gamma", "eps", "scale"])
def backward_values(
    y_ptr,  # [B, N, K]
    x_ptr,  # [B, M, K]
    g_ptr,  # [B, M, D]
    high_ptr,  # fp32 [B, M]
    unit_ptr,  # fp32 [B, M]
    dv_ptr,  # [B, N, D]
    N,
    M,
    gamma,
    eps,
    scale,
    K: tl.constexpr,
    D: tl.constexpr,
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
    distance: tl.constexpr = VALUE is not None
    blocks_c: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    first = tl.program_id(0) % blocks_c * BLOCK_C
    pid = tl.program_id(0) // blocks_c
    blocks = tl.cdiv(N, BLOCK_M)
    matrix = pid // blocks
    y_rows, y_ok = rows_of(pid % blocks, matrix, N, BLOCK_M)
    y, t = held(y_ptr, y_rows, y_ok, distance or FACTOR_Y is not None, K, BLOCK_M, BLOCK_RED)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for m in range(0, tl.cdiv(M, BLOCK_N)):
        x_rows, x_ok = rows_of(m, matrix, M, BLOCK_N)
        w, _ = pairs(
            y, t, y_ptr, x_ptr, y_rows, y_ok, x_rows, x_ok, eps, FACTOR_Y, FACTOR_X, distance, NEAR, K, BLOCK_M,
            BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        high = tl.load(high_ptr + x_rows, mask=x_ok, other=0.0)
        unit = tl.load(unit_ptr + x_rows, mask=x_ok, other=0.0)
        p = tl.where(x_ok[None, :], tl.exp(value_of(w, gamma, VALUE) * scale - high[None, :]) * unit[None, :], 0.0)
        g = load_rows(g_ptr, x_rows, x_ok, first, D, BLOCK_C)
        acc = dot(p, g, acc, DOT_TYPE, PRECISION)

    offs_c = first + tl.arange(0, BLOCK_C)
    mask = y_ok[:, None] & (offs_c < D)[None, :]
    tl.store(dv_ptr + (y_rows[:, None] * D + offs_c[None, :]), acc.to(dv_ptr.dtype.element_ty), mask=mask)
