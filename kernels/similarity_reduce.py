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
         matrix. What has several splits goes through memory in fp32: to reduce.sum_splits or, of a gradient
         with a factor, similarity.finish, which add them, and of a softmax to `merge`
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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .nearest import largest_first, largest_number
from .similarity import (
    Rows,
    far_pairs,
    gradients_as_multiplied,
    is_near,
    load_numbers,
    load_rows,
    multiply_gradients,
    products,
    read_scalar,
    result_rows,
    rows_of,
    same_rows,
    split_of_sums,
    store_rows,
    through_factor,
    value_of,
    with_near_pairs,
    without_near_pairs,
)
from .tile import loses_digits, multiply


@triton.jit
def largest_of(w):
    """The maximum of each row."""
    return largest_number(tl.min(largest_first(w), axis=1))


@triton.jit
def pairs(columns, s, t, x, y, number, sim: tl.constexpr, BLOCK_RED: tl.constexpr):
    """w [rows of x, rows of y], or q of distances; arguments as of far_pairs."""
    return with_near_pairs(far_pairs(columns, s, t, x, y, number, sim, BLOCK_RED), s, t, x, y, sim)


@triton.jit
def exponent_scale(temperature, sim: tl.constexpr):
    """c, of a temperature that is a number or a pointer to it."""
    return tl.div_rn(tl.full([], sim.sign, tl.float32), read_scalar(temperature))


@triton.jit
def finite_base(high):
    """What is taken off exponents: the maximum, but 0 of rows of -inf alone."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def store_mixture(o, acc, high_ptr, high, unit_ptr, total, first, D: tl.constexpr):
    """Columns of o from `first` on; and once the h and u of its rows."""
    store_rows(o, tl.div_rn(acc, tl.broadcast_to(total[:, None], acc.shape)), first, D)
    if high_ptr is not None:
        if first == 0:
            tl.store(high_ptr + o.index, high, mask=o.ok)
            tl.store(unit_ptr + o.index, tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total), mask=o.ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "number"])
def forward(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    o_ptr,  # [B, M], or fp32 [splits, B, M] where sim.partial
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    number,  # of the kind: a number, or a pointer to it
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    number = read_scalar(number)
    split, matrix, m, _first, count = split_of_sums(M, tl.cdiv(N, per_split), 1, BLOCK_M, 1)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    own = load_rows(x, 0, sim.K, BLOCK_RED)
    s = load_numbers(s_ptr, x)
    total = tl.zeros([BLOCK_M], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y = rows_of(y_ptr, start // BLOCK_N, matrix, N, BLOCK_N)
        w = value_of(pairs(own, s, load_numbers(t_ptr, y), x, y, number, sim, BLOCK_RED), number, sim)
        total += tl.sum(tl.where(y.ok[None, :], w, 0.0), axis=1)

    o = result_rows(o_ptr, x, split, count, sim)
    tl.store(o.ptr + o.index, total.to(o_ptr.dtype.element_ty), mask=o.ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "number", "temperature"])
def forward_softmax(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    v_ptr,  # [B, N, D]
    o_ptr,  # [B, M, D], or where sim.partial fp32 [splits, B, M, D], sums for `merge`
    high_ptr,  # fp32 [B, M] or None: where h is left; [splits, B, M] where sim.partial
    unit_ptr,  # fp32 [B, M] or None: where u is left; 1/u, [splits, B, M], where sim.partial
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    number,  # of the kind: a number, or a pointer to it
    temperature,  # likewise: c = sim.sign / temperature
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    tl.static_assert(sim.softmax, "there are values to mix")
    number, scale = read_scalar(number), exponent_scale(temperature, sim)
    split, matrix, m, first, count = split_of_sums(M, tl.cdiv(N, per_split), sim.D, BLOCK_M, BLOCK_C)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    own = load_rows(x, 0, sim.K, BLOCK_RED)
    s = load_numbers(s_ptr, x)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y = rows_of(y_ptr, start // BLOCK_N, matrix, N, BLOCK_N)
        w = value_of(pairs(own, s, load_numbers(t_ptr, y), x, y, number, sim, BLOCK_RED), number, sim)
        w = tl.where(y.ok[None, :], w * scale, float("-inf"))
        largest = largest_of(w)
        largest = tl.where(largest > high, largest, high)
        base = finite_base(largest)
        p = tl.exp(w - base[:, None])
        shrink = tl.exp(high - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_rows(same_rows(y, v_ptr), first, sim.D, BLOCK_C)
        acc = multiply(p, v, acc * shrink[:, None], sim)
        high = largest

    o = result_rows(o_ptr, x, split, count, sim)
    if not sim.partial:
        store_mixture(o, acc, high_ptr, high, unit_ptr, total, first, sim.D)
    else:
        store_rows(o, acc, first, sim.D)
        if first == 0:
            tl.store(high_ptr + o.index, high, mask=o.ok)
            tl.store(unit_ptr + o.index, total, mask=o.ok)


@triton.jit(do_not_specialize=["splits", "count"])
def merge(
    partial_ptr,  # fp32 [splits, rows, D]
    highs_ptr,  # fp32 [splits, rows]
    totals_ptr,  # fp32 [splits, rows]
    o_ptr,  # [rows, D]
    high_ptr,  # fp32 [rows] or None
    unit_ptr,  # fp32 [rows] or None
    splits,
    count: tl.int64,  # of rows
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The end of forward_softmax where there are several splits, whose sums are of exponents less a maximum each."""
    _, _, m, first, _ = split_of_sums(count, 1, D, BLOCK_M, BLOCK_C)
    o = rows_of(o_ptr, m, 0, count, BLOCK_M)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for split in range(splits):
        part = Rows(partial_ptr, o.index + tl.cast(split, tl.int64) * count, o.ok)
        largest = tl.load(highs_ptr + part.index, mask=o.ok, other=0.0)
        after = tl.where((largest > high) | (largest != largest), largest, high)
        base = finite_base(after)
        before, share = tl.exp(high - base), tl.exp(largest - base)
        total = total * before + share * tl.load(totals_ptr + part.index, mask=o.ok, other=1.0)
        acc = acc * before[:, None] + share[:, None] * load_rows(part, first, D, BLOCK_C)
        high = after

    store_mixture(o, acc, high_ptr, high, unit_ptr, total, first, D)


# Gradients.


class Softmax(NamedTuple):
    """What is known of each row of x when gradients are computed; None of sums."""

    scale: Any  # c
    high_ptr: Any  # fp32 [B, M]: h
    unit_ptr: Any  # fp32 [B, M]: u
    delta_ptr: Any  # fp32 [B, M, 2]: the sums of `deltas`


@triton.jit
def probabilities(w, x_rows, x_ok, softmax):
    """p of w, for rows of x [rows, 1] or [1, rows]."""
    high = tl.load(softmax.high_ptr + x_rows, mask=x_ok, other=0.0)
    unit = tl.load(softmax.unit_ptr + x_rows, mask=x_ok, other=0.0)
    return tl.exp(w * softmax.scale - high) * unit


@triton.jit
def softmax_gradients(w, e, x_rows, x_ok, softmax):
    total = tl.load(softmax.delta_ptr + 2 * x_rows + 1, mask=x_ok, other=1.0)
    delta = tl.div_rn(tl.load(softmax.delta_ptr + 2 * x_rows, mask=x_ok, other=0.0), total)
    return softmax.scale * (probabilities(w, x_rows, x_ok, softmax) * (e - delta))


@triton.jit
def pair_gradients(w, g_ptr, v_ptr, x, y, softmax, sim: tl.constexpr, BLOCK_RED: tl.constexpr):
    """The gradient of w [rows of x, rows of y]. g_ptr, v_ptr and softmax are the caller's: where sim.transposed, g and
    softmax are of the rows of y."""
    if sim.transposed:
        x_rows, x_ok = y.index[None, :], y.ok[None, :]
    else:
        x_rows, x_ok = x.index[:, None], x.ok[:, None]
    if not sim.softmax:
        g = tl.load(g_ptr + x_rows, mask=x_ok, other=0.0).to(tl.float32)
    else:
        if sim.transposed:
            e = products(same_rows(x, v_ptr), same_rows(y, g_ptr), sim.D, sim, BLOCK_RED)
        else:
            e = products(same_rows(x, g_ptr), same_rows(y, v_ptr), sim.D, sim, BLOCK_RED)
        g = softmax_gradients(w, e, x_rows, x_ok, softmax)
    return tl.where(x.ok[:, None] & y.ok[None, :], g, 0.0)


@triton.jit(do_not_specialize=["M", "N", "per_split", "number", "temperature"])
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
    number,  # of the kind: a number, or a pointer to it
    temperature,  # likewise
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    """Of each row of x the sum of p_ij <do_i, v_j>, and of p_ij."""
    number = read_scalar(number)
    softmax = Softmax(exponent_scale(temperature, sim), high_ptr, unit_ptr, None)
    split, matrix, m, _first, count = split_of_sums(M, tl.cdiv(N, per_split), 1, BLOCK_M, 1)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    own = load_rows(x, 0, sim.K, BLOCK_RED)
    s = load_numbers(s_ptr, x)
    total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y = rows_of(y_ptr, start // BLOCK_N, matrix, N, BLOCK_N)
        w = value_of(pairs(own, s, load_numbers(t_ptr, y), x, y, number, sim, BLOCK_RED), number, sim)
        p = tl.where(y.ok[None, :], probabilities(w, x.index[:, None], x.ok[:, None], softmax), 0.0)
        e = products(same_rows(x, g_ptr), same_rows(y, v_ptr), sim.D, sim, BLOCK_RED)
        total += tl.sum(p, axis=1)
        delta += tl.sum(tl.where(p == 0.0, 0.0, p * e), axis=1)

    rows = x.index + split * count
    tl.store(sums_ptr + 2 * rows, delta, mask=x.ok)
    tl.store(sums_ptr + 2 * rows + 1, total, mask=x.ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "number", "temperature"])
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
    number,  # of the kind: a number, or a pointer to it
    temperature,  # likewise
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    """What the gradients of a kind's own number and of the temperature are made of, for each row of x. With a the
    gradient of w, d = dw/dnumber and l = c w - h: sums of a d; and of softmax those of p d, a l, p l, a and p. There
    the sum of a is 0 but for rounding, which would count: (sum of a) (sum of p d) / (sum of p) takes it off that of
    a d, and likewise that of a l."""
    number = read_scalar(number)
    softmax = Softmax(exponent_scale(temperature, sim), high_ptr, unit_ptr, delta_ptr)
    split, matrix, m, _first, count = split_of_sums(M, tl.cdiv(N, per_split), 1, BLOCK_M, 1)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    own = load_rows(x, 0, sim.K, BLOCK_RED)
    s = load_numbers(s_ptr, x)
    by_number = tl.zeros([BLOCK_M], tl.float32)
    heat = tl.zeros([BLOCK_M], tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    by_number_mean = tl.zeros([BLOCK_M], tl.float32)
    heat_mean = tl.zeros([BLOCK_M], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y = rows_of(y_ptr, start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_numbers(t_ptr, y)
        q = pairs(own, s, t, x, y, number, sim, BLOCK_RED)
        w = value_of(q, number, sim)
        a = pair_gradients(w, g_ptr, v_ptr, x, y, softmax, sim, BLOCK_RED)
        if sim.by_number is not None:
            by = sim.by_number(q, s[:, None], t[None, :], number)
            by_number += tl.sum(tl.where(a == 0.0, 0.0, a * by), axis=1)
        if sim.softmax:
            p = tl.where(y.ok[None, :], probabilities(w, x.index[:, None], x.ok[:, None], softmax), 0.0)
            rest += tl.sum(a, axis=1)
            mass += tl.sum(p, axis=1)
            exponent = w * softmax.scale - load_numbers(high_ptr, x)[:, None]
            heat += tl.sum(tl.where(a == 0.0, 0.0, a * exponent), axis=1)
            heat_mean += tl.sum(tl.where(p == 0.0, 0.0, p * exponent), axis=1)
            if sim.by_number is not None:
                by_number_mean += tl.sum(tl.where(p == 0.0, 0.0, p * by), axis=1)

    rows = x.index + split * count
    if sim.softmax:
        tl.store(sums_ptr + 6 * rows, by_number, mask=x.ok)
        tl.store(sums_ptr + 6 * rows + 1, by_number_mean, mask=x.ok)
        tl.store(sums_ptr + 6 * rows + 2, heat, mask=x.ok)
        tl.store(sums_ptr + 6 * rows + 3, heat_mean, mask=x.ok)
        tl.store(sums_ptr + 6 * rows + 4, rest, mask=x.ok)
        tl.store(sums_ptr + 6 * rows + 5, mass, mask=x.ok)
    else:
        tl.store(sums_ptr + rows, by_number, mask=x.ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "number", "temperature"])
def backward(
    x_ptr,  # [B, M, K]: the matrix whose gradient it is
    y_ptr,  # [B, N, K]: the other one
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    g_ptr,  # gradient of the output: [B, M], or [B, M, D] of softmax; N for M where sim.transposed
    v_ptr,  # [B, N, D], of softmax; else None; M for N where sim.transposed
    high_ptr,  # fp32 [B, M], of softmax; N where sim.transposed
    unit_ptr,  # fp32 [B, M], of softmax; N where sim.transposed
    delta_ptr,  # fp32 [B, M, 2], of softmax: the sums of `deltas`; N where sim.transposed
    dx_ptr,  # [B, M, K], or fp32 [splits, B, M, K] where sim.partial
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    number,  # of the kind: a number, or a pointer to it
    temperature,  # likewise
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    number = read_scalar(number)
    softmax = Softmax(exponent_scale(temperature, sim), high_ptr, unit_ptr, delta_ptr)
    split, matrix, m, first, count = split_of_sums(M, tl.cdiv(N, per_split), sim.K, BLOCK_M, BLOCK_C)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    own = load_rows(x, 0, sim.K, BLOCK_RED)
    s = load_numbers(s_ptr, x)
    p = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)  # of x in a distance's gradient
    # a row's slopes of a softmax cancel, and so do their products with rows of y that are alike; factors of fp16's rows
    # may be of any magnitude, and TF32 cuts them where fp16 would round: what is taken off is multiplied, too
    TYPE: tl.constexpr = sim.gradient_type
    PRECISION: tl.constexpr = sim.gradient_precision
    cancels: tl.constexpr = sim.softmax and not sim.transposed
    factors: tl.constexpr = sim.factor_y is not None and sim.transposed and sim.dot_type != TYPE
    in_two: tl.constexpr = (cancels or factors) and loses_digits(TYPE, PRECISION)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y = rows_of(y_ptr, start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_numbers(t_ptr, y)
        q = pairs(own, s, t, x, y, number, sim, BLOCK_RED)
        w = value_of(q, number, sim)
        a = pair_gradients(w, g_ptr, v_ptr, x, y, softmax, sim, BLOCK_RED)
        if sim.distance:
            a = sim.slope(a, w, number)
            a, p = without_near_pairs(a, is_near(q, s, t, x, y, sim), x, y, first, p, sim.K)
            if not in_two:
                a = gradients_as_multiplied(a, sim)
            weight += tl.sum(a, axis=1)
        elif sim.factor_y is not None:
            a = a * sim.factor_y(t, number)[None, :]
        b = load_rows(y, first, sim.K, BLOCK_C)
        p = multiply_gradients(a, b, p, sim)
        if in_two:
            p = multiply_gradients(a - gradients_as_multiplied(a, sim), b, p, sim)

    columns = load_rows(x, first, sim.K, BLOCK_C)
    if sim.distance:
        p = columns.to(tl.float32) * weight[:, None] - p
    elif not sim.partial:
        p = through_factor(p, columns, s, tl.sum(columns.to(tl.float32) * p, axis=1), number, sim)
    store_rows(result_rows(dx_ptr, x, split, count, sim), p, first, sim.K)


@triton.jit(do_not_specialize=["M", "N", "per_split", "number", "temperature"])
def backward_values(
    x_ptr,  # [B, M, K]: what the caller calls y, whose rows have the values
    y_ptr,  # [B, N, K]: what the caller calls x
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    g_ptr,  # [B, N, D]
    high_ptr,  # fp32 [B, N]
    unit_ptr,  # fp32 [B, N]
    dv_ptr,  # [B, M, D], or fp32 [splits, B, M, D] where sim.partial
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    number,  # of the kind: a number, or a pointer to it
    temperature,  # likewise
    sim: tl.constexpr,  # transposed
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    tl.static_assert(sim.transposed, "rows of x are those that have values")
    number = read_scalar(number)
    softmax = Softmax(exponent_scale(temperature, sim), high_ptr, unit_ptr, None)
    split, matrix, m, first, count = split_of_sums(M, tl.cdiv(N, per_split), sim.D, BLOCK_M, BLOCK_C)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    own = load_rows(x, 0, sim.K, BLOCK_RED)
    s = load_numbers(s_ptr, x)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y = rows_of(y_ptr, start // BLOCK_N, matrix, N, BLOCK_N)
        w = value_of(pairs(own, s, load_numbers(t_ptr, y), x, y, number, sim, BLOCK_RED), number, sim)
        p = tl.where(y.ok[None, :], probabilities(w, y.index[None, :], y.ok[None, :], softmax), 0.0)
        acc = multiply(p, load_rows(same_rows(y, g_ptr), first, sim.D, BLOCK_C), acc, sim)

    store_rows(result_rows(dv_ptr, x, split, count, sim), acc, first, sim.D)
