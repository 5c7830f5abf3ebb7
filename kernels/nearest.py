"""Of all rows of y the most similar to each row of x, and the gradient of their similarities.

Axes: B pairs of matrices, M rows of x, N rows of y, K columns of both, COUNT chosen rows of y per row of x.

Math     similarities w as in kernels/similarity.py; kinds that are distances are compared by q, the square, before w is
         made of it. A number becomes an integer, which is the smaller the better: integers have NaN in their order, one
         zero, and ties, which the first row of y wins
         backward: of the chosen pairs alone. a = g h_j: dx_i = f p_i + 2 f'(s) <x_i, p_i> x_i with p_i = sum of a y_j;
         distances: a = 2 g dw/dq, dx_i = sum of a (x_i - y_j). dy likewise, from the pairs sorted by j; there
         <y_j, p_j> is (sum of g w) / h
Tiles    forward: BLOCK_M rows of x walk over y, BLOCK_N rows at a time, with the best so far in registers: one number
         and index per row; or [BLOCK_M, TOP] of both in 64 bits, in no order, into which a block's best enters for the
         worst, as long as there is a row in which it beats that. Of near pairs (see kernels/similarity.py) those are
         computed from differences, one of each row at a time, that may be no worse than what is there. Few rows of x
         would keep few processors busy: there y is split, and `merge` finds the best of all splits' best
         backward_x: BLOCK_M rows, BLOCK_C columns at a time. backward_features: BLOCK_D columns of one piece of the
         pairs of one row of y, as in kernels/segment_sum.py, whose sum_pieces adds up pieces
Traffic  similarity.row_squares first. forward: x once per split (again for each block of y where K is more than
         BLOCK_RED), y once per BLOCK_M rows of x, from the cache; 12 COUNT M written (of half precision 4 more, w in
         fp32 for a backward), and 16 TOP M more for each of several splits. No M N. backward: g, indices, x and the
         chosen rows of y read, dx written; dy: a sort of the indices, and x read COUNT times
Work     2 B M N K forward; 2 or 3 B M COUNT K for each gradient
Rounding as similarity.forward, but that near pairs' columns are added in trees of up to 32; gradients in fp32 but for
         what is loaded, one rounding on the way out
Order    which pairs are chosen depends on no order: pairs are compared exactly. Gradients add pairs in turn. No atomics
"""

import triton
import triton.language as tl

from .segment_sum import bounds, columns, sum_lanes
from .similarity import (
    any_of,
    finished,
    is_near,
    load_rows,
    load_squares,
    place_in_splits,
    products,
    read_scalar,
    rows_of,
    squares,
    store_rows,
)
from .tile import dot

MISSING = tl.constexpr(0x7FFFFFFF)  # worse than any number's integer
NAN = tl.constexpr(0x7FC00000)
ROUNDING = tl.constexpr(2.0**-22)  # of a square distance from products, per column and |x|^2 + |y|^2: a bound [model]
NOTHING = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # worse than any key with its index


# A number -> an integer, the smaller the better, and back.


@triton.jit
def nearest_first(q):
    """Of square distances, which are not negative: their bits. NaN is farther than infinity."""
    return tl.minimum(q.to(tl.int32, bitcast=True) & 0x7FFFFFFF, NAN)


@triton.jit
def nearest_number(key):
    return key.to(tl.float32, bitcast=True)


@triton.jit
def nan_nearest_first(q):
    """The same with NaN before all others: what a maximum of exp(-q) is."""
    key = nearest_first(q)
    return tl.where(key == NAN, -1, key)


@triton.jit
def nan_nearest_number(key):
    return tl.where(key < 0, NAN, key).to(tl.float32, bitcast=True)


@triton.jit
def largest_first(w):
    """NaN is the largest."""
    bits = tl.where(w == 0.0, 0.0, w).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return -1 - tl.where(w != w, 0x7FFFFFFF, rising)


@triton.jit
def largest_number(key):
    rising = -1 - key
    return tl.where(rising < 0, rising ^ 0x7FFFFFFF, rising).to(tl.float32, bitcast=True)


# Tiles.


@triton.jit
def pairs(
    x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X: tl.constexpr, FACTOR_Y: tl.constexpr,
    DISTANCE: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w [BLOCK_M, BLOCK_N], of distances s + t - 2 d; x are the first BLOCK_RED columns of its rows, which a program
    keeps, s and t squares."""
    if K <= BLOCK_RED:
        y = load_rows(y_ptr, y_rows, y_ok, 0, K, BLOCK_RED)
        w = dot(x, tl.trans(y), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), DOT_TYPE, PRECISION)
    else:
        w = products(x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, K, BLOCK_M, BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION)
    if DISTANCE:
        w = s[:, None] + t[None, :] - 2.0 * w
    else:
        if FACTOR_X is not None:
            w = w * FACTOR_X(s, eps)[:, None]
        if FACTOR_Y is not None:
            w = w * FACTOR_Y(t, eps)[None, :]
    return w


@triton.jit
def refined(
    q, near, s, t, limit, x_ptr, y_ptr, x_rows, first_y, KEY: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RED: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_M, BLOCK_N] of q. Of near pairs, which tell too little, those of differences where, whatever
    rounding did to q, one may be no worse than `limit` [BLOCK_M]; the others are MISSING."""
    columns: tl.constexpr = min(BLOCK_RED, 32)
    lane = tl.arange(0, BLOCK_N)[None, :]
    slack = (K + 64) * ROUNDING * (s[:, None] + t[None, :])
    # the better end of what q may be, in whichever order keys are
    bound = tl.minimum(KEY(tl.where(q > slack, q - slack, 0.0)), KEY(q + slack))
    bound = tl.where(near, tl.where(q == q, bound, -MISSING), MISSING)
    keys = tl.where(near, MISSING, KEY(q))
    limit = tl.minimum(limit, MISSING - 1)
    best = tl.min(bound, axis=1)
    while tl.max((best <= limit).to(tl.int32), axis=0) > 0:
        wanted = best <= limit
        place = tl.min(tl.where(bound == best[:, None], lane, BLOCK_N), axis=1)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, K, columns):
            x = load_rows(x_ptr, x_rows, wanted, first, K, columns).to(tl.float32)
            y = load_rows(y_ptr, first_y + place, wanted, first, K, columns).to(tl.float32)
            total += squares(x - y)
        key = KEY(total)
        keys = tl.where((lane == place[:, None]) & wanted[:, None], key[:, None], keys)
        bound = tl.where(lane == place[:, None], MISSING, bound)
        if COUNT == 1:
            limit = tl.where(wanted, tl.minimum(limit, key), limit)
        best = tl.min(bound, axis=1)
    return keys


@triton.jit
def best_of(keys, offs_n):
    """Of each row the best key, and where it is first."""
    best = tl.min(keys, axis=1)
    return best, tl.min(tl.where(keys == best[:, None], offs_n[None, :], MISSING), axis=1)


@triton.jit
def entered(top, keys, offs_n):
    """`top` [rows, TOP], key and index in 64 bits, after a block's keys [rows, BLOCK_N]."""
    worst = tl.max(top, axis=1)
    limit = (worst >> 32).to(tl.int32)
    best = tl.min(keys, axis=1)
    while tl.max((best < limit).to(tl.int32), axis=0) > 0:
        _, place = best_of(keys, offs_n)
        new = (best.to(tl.int64) << 32) + place
        top = tl.where((top == worst[:, None]) & (best < limit)[:, None], new[:, None], top)
        keys = tl.where(offs_n[None, :] == place[:, None], MISSING, keys)
        worst = tl.max(top, axis=1)
        limit = (worst >> 32).to(tl.int32)
        best = tl.min(keys, axis=1)
    return top


@triton.jit
def number_of(key, gamma, NUMBER: tl.constexpr, VALUE: tl.constexpr):
    w = NUMBER(key)
    if VALUE is not None:
        w = VALUE(w, gamma)
    return w


@triton.jit
def store_best(
    w_ptr, exact_ptr, index_ptr, top, rows, ok, gamma, COUNT: tl.constexpr, NUMBER: tl.constexpr, VALUE: tl.constexpr
):
    """The first COUNT of `top` [rows, any], key and index in 64 bits, in their order."""
    for c in range(0, COUNT):
        best = tl.min(top, axis=1)
        top = tl.where(top == best[:, None], NOTHING, top)
        w = number_of((best >> 32).to(tl.int32), gamma, NUMBER, VALUE)
        tl.store(w_ptr + rows * COUNT + c, w.to(w_ptr.dtype.element_ty), mask=ok)
        if exact_ptr is not None:
            tl.store(exact_ptr + rows * COUNT + c, w, mask=ok)
        if index_ptr is not None:
            tl.store(index_ptr + rows * COUNT + c, best & 0xFFFFFFFF, mask=ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "gamma", "eps"])
def forward(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    w_ptr,  # [B, M, COUNT]
    exact_ptr,  # fp32 [B, M, COUNT] or None: where w is left before it is rounded
    index_ptr,  # int64 [B, M, COUNT] or None
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    partial_ptr,  # int64 [splits, B, M, TOP], keys and indices for `merge`, or None where there is one split
    M,
    N,
    per_split,  # rows of y, a multiple of BLOCK_N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    COUNT: tl.constexpr,
    TOP: tl.constexpr,  # COUNT, or the power of two above it
    K: tl.constexpr,
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    VALUE: tl.constexpr,
    KEY: tl.constexpr,
    NUMBER: tl.constexpr,
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
    best = tl.full([BLOCK_M], MISSING, tl.int32)
    index = tl.zeros([BLOCK_M], tl.int32)
    if COUNT > 1:
        nothing = (tl.full([BLOCK_M], MISSING, tl.int32).to(tl.int64) << 32)[:, None]
        top = nothing + tl.arange(0, TOP)[None, :]

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y_rows, y_ok = rows_of(start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_squares(t_ptr, y_rows, y_ok)
        w = pairs(
            x, s, t, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, eps, FACTOR_X, FACTOR_Y, distance, K, BLOCK_M, BLOCK_N,
            BLOCK_RED, DOT_TYPE, PRECISION,
        )  # fmt: skip
        offs_n = start + tl.arange(0, BLOCK_N)
        keys = KEY(w)
        if distance:
            near = is_near(w, s, t, x_ok, y_ok, NEAR)
            if any_of(near):
                limit = best
                if COUNT > 1:
                    limit = (tl.max(top, axis=1) >> 32).to(tl.int32)
                first_y = tl.cast(matrix, tl.int64) * N + start
                keys = refined(
                    w, near, s, t, limit, x_ptr, y_ptr, x_rows, first_y, KEY, COUNT, K, BLOCK_M, BLOCK_N, BLOCK_RED
                )
        keys = tl.where(y_ok[None, :], keys, MISSING)
        if COUNT == 1:
            key, place = best_of(keys, offs_n)
            index = tl.where(key < best, place, index)
            best = tl.minimum(best, key)
        else:
            top = entered(top, keys, offs_n)

    if COUNT == 1:
        top = ((best.to(tl.int64) << 32) + index)[:, None]
    if partial_ptr is None:
        store_best(w_ptr, exact_ptr, index_ptr, top, x_rows, x_ok, gamma, COUNT, NUMBER, VALUE)
    else:
        store_rows(partial_ptr, top, x_rows + split * count, x_ok, 0, TOP, TOP)


@triton.jit(do_not_specialize=["splits", "gamma"])
def merge(
    partial_ptr,  # int64 [splits, rows, TOP]
    w_ptr,  # [rows, COUNT]
    exact_ptr,  # fp32 [rows, COUNT] or None
    index_ptr,  # int64 [rows, COUNT] or None
    splits,
    count: tl.int64,  # of rows
    gamma,  # a number, or a pointer to it
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    KEPT: tl.constexpr,  # a power of two, at least splits * TOP
    VALUE: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """A row's best of all splits."""
    gamma = read_scalar(gamma)
    row = tl.cast(tl.program_id(0), tl.int64) + tl.arange(0, 1)
    offs = tl.arange(0, KEPT)
    place = (offs // TOP * count + row) * TOP + offs % TOP
    top = tl.load(partial_ptr + place, mask=offs < splits * TOP, other=NOTHING)
    store_best(w_ptr, exact_ptr, index_ptr, top[None, :], row, row < count, gamma, COUNT, NUMBER, VALUE)


@triton.jit
def chosen_sum(
    x, y_ptr, g_ptr, w_ptr, index_ptr, t_ptr, x_rows, x_ok, first_y, first, gamma, eps, COUNT: tl.constexpr,
    K: tl.constexpr, FACTOR_Y: tl.constexpr, SLOPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + BLOCK_C of p [BLOCK_M, BLOCK_C], or of distances' gradient."""
    p = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for c in range(0, COUNT):
        place = x_rows * COUNT + c
        y_rows = first_y + tl.load(index_ptr + place, mask=x_ok, other=0)
        a = tl.load(g_ptr + place, mask=x_ok, other=0.0).to(tl.float32)
        y = load_rows(y_ptr, y_rows, x_ok, first, K, BLOCK_C).to(tl.float32)
        if SLOPE is not None:
            a = SLOPE(a, tl.load(w_ptr + place, mask=x_ok, other=1.0), gamma)
            p += a[:, None] * (x.to(tl.float32) - y)
        else:
            if FACTOR_Y is not None:
                a = a * FACTOR_Y(tl.load(t_ptr + y_rows, mask=x_ok, other=0.0), eps)
            p += a[:, None] * y
    return p


@triton.jit(do_not_specialize=["M", "N", "gamma", "eps"])
def backward_x(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    g_ptr,  # [B, M, COUNT]
    w_ptr,  # fp32 [B, M, COUNT], of distances; else None
    index_ptr,  # int64 [B, M, COUNT]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    dx_ptr,  # [B, M, K]
    M,
    N,
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    COUNT: tl.constexpr,
    K: tl.constexpr,
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    THROUGH: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    blocks_m = tl.cdiv(M, BLOCK_M)
    matrix = tl.program_id(0) // blocks_m
    x_rows, x_ok = rows_of(tl.program_id(0) % blocks_m, matrix, M, BLOCK_M)
    first_y = tl.cast(matrix, tl.int64) * N
    r = tl.zeros([BLOCK_M], tl.float32)
    s = None
    if s_ptr is not None:
        s = tl.load(s_ptr + x_rows, mask=x_ok, other=0.0)
    if THROUGH is not None and K > BLOCK_C:  # <x, p> before there is a first column
        for first in range(0, K, BLOCK_C):
            x = load_rows(x_ptr, x_rows, x_ok, first, K, BLOCK_C)
            p = chosen_sum(
                x, y_ptr, g_ptr, w_ptr, index_ptr, t_ptr, x_rows, x_ok, first_y, first, gamma, eps, COUNT, K,
                FACTOR_Y, SLOPE, BLOCK_M, BLOCK_C,
            )  # fmt: skip
            r += tl.sum(x.to(tl.float32) * p, axis=1)

    for first in range(0, K, BLOCK_C):
        x = load_rows(x_ptr, x_rows, x_ok, first, K, BLOCK_C)
        p = chosen_sum(
            x, y_ptr, g_ptr, w_ptr, index_ptr, t_ptr, x_rows, x_ok, first_y, first, gamma, eps, COUNT, K, FACTOR_Y,
            SLOPE, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        if THROUGH is not None and K <= BLOCK_C:
            r = tl.sum(x.to(tl.float32) * p, axis=1)
        p = finished(p, x, s, eps, FACTOR_X, THROUGH, r, K)

        store_rows(dx_ptr, p, x_rows, x_ok, first, K, BLOCK_C)


@triton.jit(do_not_specialize=["M", "N", "gamma", "eps"])
def number_sums(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    g_ptr,  # [B, M, COUNT]
    index_ptr,  # int64 [B, M, COUNT]
    s_ptr,  # fp32 [B, M], of inner kinds: squares of x; else None
    t_ptr,  # fp32 [B, N], likewise of y
    sums_ptr,  # fp32 [B, M]
    M,
    N,
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    COUNT: tl.constexpr,
    K: tl.constexpr,
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    BY_NUMBER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of a kind's own number: of each row the sum of g dw/dnumber over its chosen pairs."""
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    blocks_m = tl.cdiv(M, BLOCK_M)
    matrix = tl.program_id(0) // blocks_m
    x_rows, x_ok = rows_of(tl.program_id(0) % blocks_m, matrix, M, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for c in range(0, COUNT):
        place = x_rows * COUNT + c
        y_rows = tl.cast(matrix, tl.int64) * N + tl.load(index_ptr + place, mask=x_ok, other=0)
        w = tl.zeros([BLOCK_M], tl.float32)
        s = tl.zeros([BLOCK_M], tl.float32)
        t = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, K, BLOCK_C):
            x = load_rows(x_ptr, x_rows, x_ok, first, K, BLOCK_C).to(tl.float32)
            y = load_rows(y_ptr, y_rows, x_ok, first, K, BLOCK_C).to(tl.float32)
            if FACTOR_X is None:
                w += squares(x - y)
            else:
                w += tl.sum(x * y, axis=1)
        if FACTOR_X is not None:
            s = tl.load(s_ptr + x_rows, mask=x_ok, other=0.0)
            t = tl.load(t_ptr + y_rows, mask=x_ok, other=0.0)
            w = w * FACTOR_X(s, eps) * FACTOR_Y(t, eps)
        g = tl.load(g_ptr + place, mask=x_ok, other=0.0).to(tl.float32)
        total += g * BY_NUMBER(w, s, t, gamma, eps)

    tl.store(sums_ptr + x_rows, total, mask=x_ok)


@triton.jit(do_not_specialize=["count", "gamma", "eps"])
def backward_features(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    g_ptr,  # [B, M, COUNT]
    w_ptr,  # fp32 [B, M, COUNT], of distances and cosines; else None
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    order_ptr,  # int64 [pairs]: pairs in the order of their rows of y
    sorted_ptr,  # int64 [pairs]: rows of y, numbered through all matrices, in that order
    starts_ptr,  # int64 [B N + 1]
    dy_ptr,  # [B, N, K]
    partial_ptr,  # fp32 [2 * (pairs // LENGTH), K], or None where pairs <= LENGTH
    count,  # B N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    COUNT: tl.constexpr,
    K: tl.constexpr,
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    THROUGH: tl.constexpr,
    SLOPE: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    # programs and pieces are numbered as in segment.forward
    number, offs_d, d_ok = columns(tl.program_id(0), K, BLOCK_D)
    head = number < count
    piece_k = tl.cast(tl.where(head, 0, number - count + 1), tl.int64)
    segment = tl.where(head, tl.cast(number, tl.int64), tl.load(sorted_ptr + piece_k * LENGTH))
    inside, start, end = bounds(starts_ptr, segment, count)
    piece = tl.where(head, 0, piece_k - start // LENGTH)
    place = start + piece * LENGTH
    if inside & (head | ((piece > 0) & (place < end))):
        rows = tl.cast(tl.minimum(end - place, LENGTH), tl.int32)
        y = tl.load(y_ptr + segment * K + offs_d, mask=d_ok, other=0.0).to(tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        through = tl.zeros([BLOCK_M, 1], tl.float32)
        for m in range(0, rows, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            ok = offs_m < rows
            pair = tl.load(order_ptr + place + offs_m, mask=ok, other=0)
            x_rows = pair // COUNT
            mask = ok[:, None] & d_ok[None, :]
            x = tl.load(x_ptr + x_rows[:, None] * K + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
            a = tl.load(g_ptr + pair, mask=ok, other=0.0).to(tl.float32)
            if w_ptr is not None:
                w = tl.load(w_ptr + pair, mask=ok, other=1.0)
            if SLOPE is not None:
                acc += tl.where(ok[:, None], SLOPE(a, w, gamma)[:, None] * (y[None, :] - x), 0.0)
            else:
                if THROUGH is not None:
                    through += (a * w)[:, None]
                if FACTOR_X is not None:
                    a = a * FACTOR_X(tl.load(s_ptr + x_rows, mask=ok, other=0.0), eps)
                acc += a[:, None] * x
        dy = sum_lanes(acc, BLOCK_M, BLOCK_D)
        if FACTOR_Y is not None:
            t = tl.load(t_ptr + segment + tl.arange(0, 1))
            h = FACTOR_Y(t, eps)
            if THROUGH is None:
                dy = dy * h
            else:
                r = tl.where(h == 0.0, 0.0, tl.div_rn(sum_lanes(through, BLOCK_M, 1), tl.where(h == 0.0, 1.0, h)))
                dy = THROUGH(dy, y, r, h, t, eps, K)

        if partial_ptr is None:  # noqa: SIM114 - a branch of its own: it is decided when compiling
            tl.store(dy_ptr + segment * K + offs_d, dy.to(dy_ptr.dtype.element_ty), mask=d_ok)
        elif end - start <= LENGTH:
            tl.store(dy_ptr + segment * K + offs_d, dy.to(dy_ptr.dtype.element_ty), mask=d_ok)
        else:
            slot = 2 * (start // LENGTH) + piece
            tl.store(partial_ptr + slot * K + offs_d, dy, mask=d_ok)
