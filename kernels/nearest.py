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
         would keep few SMs busy: there y is split, and `merge` finds the best of all splits' best
         backward_x: BLOCK_M rows, BLOCK_C columns at a time. backward_features: BLOCK_D columns of one piece of the
         pairs of one row of y, as in kernels/segment_sum.py, whose sum_pieces adds up pieces
Traffic  similarity.row_squares first. forward: x once per split (again for each block of y where K is more than
         BLOCK_RED), y once per BLOCK_M rows of x, from the cache; 12 COUNT M written (of half precision 4 more, w in
         fp32 for a backward), and 16 TOP M more for each of several splits. No M N. backward: g, indices, x and the
         chosen rows of y read, dx written; dy: a sort of the indices, and x read COUNT times
Work     2 B M N K forward; 2 or 3 B M COUNT K for each gradient
Counted  at the most, in what bench.counts has recorded:
         backward_features: 1.1 times Traffic, 3.1 times through L2
         backward_x: 1.1 times Traffic, 1.1 times through L2
         forward: 1.0 times Traffic, 140 times through L2, 1.0 times Work
Rounding as similarity.forward, but that near pairs' columns are added in trees of up to 32; gradients in fp32 but for
         what is loaded, one rounding on the way out
Order    which pairs are chosen depends on no order: pairs are compared exactly. Gradients add pairs in turn. No atomics
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .segment_sum import columns, piece_of, store_piece, sum_lanes
from .similarity import (
    Rows,
    any_of,
    far_pairs,
    is_near,
    load_numbers,
    load_rows,
    read_scalar,
    rows_of,
    same_rows,
    split_of_sums,
    squares,
    store_rows,
    through_factor,
    value_of,
)

MISSING = tl.constexpr(0x7FFFFFFF)  # worse than any number's integer
NAN = tl.constexpr(0x7FC00000)
ROUNDING = tl.constexpr(2.0**-22)  # of a square distance from products, per column and |x|^2 + |y|^2: a bound [model]
NOTHING = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # worse than any key with its index


# A number -> an integer, the smaller the better, and back.


@triton.jit
def nearest_first(q):
    """Of square distances, which are not negative: their bits. NaN is farther than infinity."""
    tl.static_assert(q.dtype == tl.float32, "keys are the bits of fp32")
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
    tl.static_assert(w.dtype == tl.float32, "keys are the bits of fp32")
    bits = tl.where(w == 0.0, 0.0, w).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return -1 - tl.where(w != w, 0x7FFFFFFF, rising)


@triton.jit
def largest_number(key):
    rising = -1 - key
    return tl.where(rising < 0, rising ^ 0x7FFFFFFF, rising).to(tl.float32, bitcast=True)


# Tiles.


@triton.jit
def refine(q, near, s, t, limit, x, first_y, sim: tl.constexpr):
    """Keys of q [rows of x, rows of y], which begin with the row first_y. Of near pairs, which tell too little, those
    of differences where, whatever rounding did to q, one may be no worse than `limit` [rows of x]; the others are
    MISSING."""
    tl.static_assert(sim.distance and q.dtype == tl.float32, "square distances, whose keys are the bits of fp32")
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_N: tl.constexpr = q.shape[1]
    COLUMNS: tl.constexpr = 16 if sim.K <= 16 else 32
    lane = tl.arange(0, BLOCK_N)[None, :]
    slack = (sim.K + 64) * ROUNDING * (s[:, None] + t[None, :])
    # the better end of what q may be, in whichever order keys are
    bound = tl.minimum(sim.to_key(tl.where(q > slack, q - slack, 0.0)), sim.to_key(q + slack))
    bound = tl.where(near, tl.where(q == q, bound, -MISSING), MISSING)
    keys = tl.where(near, MISSING, sim.to_key(q))
    limit = tl.minimum(limit, MISSING - 1)
    best = tl.min(bound, axis=1)
    while tl.max((best <= limit).to(tl.int32), axis=0) > 0:
        wanted = best <= limit
        place = tl.min(tl.where(bound == best[:, None], lane, BLOCK_N), axis=1)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, sim.K, COLUMNS):
            a = load_rows(Rows(x.ptr, x.index, wanted), first, sim.K, COLUMNS).to(tl.float32)
            b = load_rows(Rows(first_y.ptr, first_y.index + place, wanted), first, sim.K, COLUMNS).to(tl.float32)
            total += squares(a - b)
        key = sim.to_key(total)
        keys = tl.where((lane == place[:, None]) & wanted[:, None], key[:, None], keys)
        bound = tl.where(lane == place[:, None], MISSING, bound)
        if sim.count == 1:
            limit = tl.where(wanted, tl.minimum(limit, key), limit)
        best = tl.min(bound, axis=1)
    return keys


@triton.jit
def best_of(keys, offs_n):
    """Of each row the best key, and where it is first."""
    best = tl.min(keys, axis=1)
    return best, tl.min(tl.where(keys == best[:, None], offs_n[None, :], MISSING), axis=1)


@triton.jit
def enter(top, keys, offs_n):
    """`top` [rows, TOP], key and index in 64 bits, after a block's keys [rows, BLOCK_N]."""
    tl.static_assert(top.dtype == tl.int64 and keys.dtype == tl.int32, "top has a key and an index in 64 bits")
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


class Results(NamedTuple):
    """Where the chosen pairs go."""

    w_ptr: Any  # [B, M, COUNT]
    exact_ptr: Any  # fp32 [B, M, COUNT] or None: where w is left before it is rounded
    index_ptr: Any  # int64 [B, M, COUNT] or None


@triton.jit
def store_best(results, top, rows, ok, number, sim: tl.constexpr):
    """The first `count` of `top` [rows, any], key and index in 64 bits, in their order."""
    tl.static_assert(top.dtype == tl.int64, "top has a key and an index in 64 bits")
    for c in range(0, sim.count):
        best = tl.min(top, axis=1)
        top = tl.where(top == best[:, None], NOTHING, top)
        w = value_of(sim.from_key((best >> 32).to(tl.int32)), number, sim)
        place = rows * sim.count + c
        tl.store(results.w_ptr + place, w.to(results.w_ptr.dtype.element_ty), mask=ok)
        if results.exact_ptr is not None:
            tl.store(results.exact_ptr + place, w, mask=ok)
        if results.index_ptr is not None:
            tl.store(results.index_ptr + place, best & 0xFFFFFFFF, mask=ok)


@triton.jit(do_not_specialize=["M", "N", "per_split", "number"])
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
    number,  # of the kind: a number, or a pointer to it
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    number = read_scalar(number)
    TOP: tl.constexpr = sim.TOP
    split, matrix, m, _first, count = split_of_sums(M, tl.cdiv(N, per_split), 1, BLOCK_M, 1)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    own = load_rows(x, 0, sim.K, BLOCK_RED)
    s = load_numbers(s_ptr, x)
    best = tl.full([BLOCK_M], MISSING, tl.int32)
    index = tl.zeros([BLOCK_M], tl.int32)
    if sim.count > 1:
        nothing = (tl.full([BLOCK_M], MISSING, tl.int32).to(tl.int64) << 32)[:, None]
        top = nothing + tl.arange(0, TOP)[None, :]

    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N):
        y = rows_of(y_ptr, start // BLOCK_N, matrix, N, BLOCK_N)
        t = load_numbers(t_ptr, y)
        w = far_pairs(own, s, t, x, y, number, sim, BLOCK_RED)
        offs_n = start + tl.arange(0, BLOCK_N)
        keys = sim.to_key(w)
        if sim.distance:
            near = is_near(w, s, t, x, y, sim)
            if any_of(near):
                limit = best
                if sim.count > 1:
                    limit = (tl.max(top, axis=1) >> 32).to(tl.int32)
                first_y = Rows(y_ptr, tl.cast(matrix, tl.int64) * N + start, None)
                keys = refine(w, near, s, t, limit, x, first_y, sim)
        keys = tl.where(y.ok[None, :], keys, MISSING)
        if sim.count == 1:
            key, place = best_of(keys, offs_n)
            index = tl.where(key < best, place, index)
            best = tl.minimum(best, key)
        else:
            top = enter(top, keys, offs_n)

    if sim.count == 1:
        top = ((best.to(tl.int64) << 32) + index)[:, None]
    if partial_ptr is None:
        store_best(Results(w_ptr, exact_ptr, index_ptr), top, x.index, x.ok, number, sim)
    else:
        store_rows(Rows(partial_ptr, x.index + split * count, x.ok), top, 0, TOP)


@triton.jit(do_not_specialize=["splits", "number"])
def merge(
    partial_ptr,  # int64 [splits, rows, TOP]
    w_ptr,  # [rows, COUNT]
    exact_ptr,  # fp32 [rows, COUNT] or None
    index_ptr,  # int64 [rows, COUNT] or None
    splits,
    count: tl.int64,  # of rows
    number,  # of the kind: a number, or a pointer to it
    KEPT: tl.constexpr,  # a power of two, at least splits * TOP
    sim: tl.constexpr,
):
    """A row's best of all splits."""
    TOP: tl.constexpr = sim.TOP
    tl.static_assert(KEPT % TOP == 0, "a row's best of a split are held all or not at all")
    number = read_scalar(number)
    row = tl.cast(tl.program_id(0), tl.int64) + tl.arange(0, 1)
    offs = tl.arange(0, KEPT)
    place = (offs // TOP * count + row) * TOP + offs % TOP
    top = tl.load(partial_ptr + place, mask=offs < splits * TOP, other=NOTHING)
    store_best(Results(w_ptr, exact_ptr, index_ptr), top[None, :], row, row < count, number, sim)


class Chosen(NamedTuple):
    """What the gradient of x reads of its chosen pairs."""

    g_ptr: Any  # [B, M, COUNT]
    w_ptr: Any  # fp32 [B, M, COUNT], of distances; else None
    index_ptr: Any  # int64 [B, M, COUNT]
    t_ptr: Any  # fp32 [B, N] or None: squares of y


@triton.jit
def sum_chosen(own, x, first_y, chosen, first, number, sim: tl.constexpr, BLOCK_C: tl.constexpr):
    """Columns of p from `first` on, or of distances' gradient, for the columns `own` of x."""
    p = tl.zeros(own.shape, tl.float32)
    for c in range(0, sim.count):
        place = x.index * sim.count + c
        y_rows = first_y.index + tl.load(chosen.index_ptr + place, mask=x.ok, other=0)
        a = tl.load(chosen.g_ptr + place, mask=x.ok, other=0.0).to(tl.float32)
        y = Rows(first_y.ptr, y_rows, x.ok)
        b = load_rows(y, first, sim.K, BLOCK_C).to(tl.float32)
        if sim.distance:
            a = sim.slope(a, tl.load(chosen.w_ptr + place, mask=x.ok, other=1.0), number)
            p += a[:, None] * (own.to(tl.float32) - b)
        else:
            if sim.factor_y is not None:
                a = a * sim.factor_y(load_numbers(chosen.t_ptr, y), number)
            p += a[:, None] * b
    return p


@triton.jit(do_not_specialize=["M", "N", "number"])
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
    number,  # of the kind: a number, or a pointer to it
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    number = read_scalar(number)
    blocks_m = tl.cdiv(M, BLOCK_M)
    matrix = tl.program_id(0) // blocks_m
    x = rows_of(x_ptr, tl.program_id(0) % blocks_m, matrix, M, BLOCK_M)
    first_y = Rows(y_ptr, tl.cast(matrix, tl.int64) * N, None)
    chosen = Chosen(g_ptr, w_ptr, index_ptr, t_ptr)
    r = tl.zeros([BLOCK_M], tl.float32)
    s = load_numbers(s_ptr, x)
    if sim.through_x is not None and sim.K > BLOCK_C:  # <x, p> before there is a first column
        for first in range(0, sim.K, BLOCK_C):
            own = load_rows(x, first, sim.K, BLOCK_C)
            p = sum_chosen(own, x, first_y, chosen, first, number, sim, BLOCK_C)
            r += tl.sum(own.to(tl.float32) * p, axis=1)

    for first in range(0, sim.K, BLOCK_C):
        own = load_rows(x, first, sim.K, BLOCK_C)
        p = sum_chosen(own, x, first_y, chosen, first, number, sim, BLOCK_C)
        if sim.through_x is not None and sim.K <= BLOCK_C:
            r = tl.sum(own.to(tl.float32) * p, axis=1)
        p = through_factor(p, own, s, r, number, sim)

        store_rows(same_rows(x, dx_ptr), p, first, sim.K)


@triton.jit(do_not_specialize=["M", "N", "number"])
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
    number,  # of the kind: a number, or a pointer to it
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of a kind's own number: of each row the sum of g dw/dnumber over its chosen pairs."""
    tl.static_assert(sim.by_number is not None, "the kind has a number of its own")
    number = read_scalar(number)
    blocks_m = tl.cdiv(M, BLOCK_M)
    matrix = tl.program_id(0) // blocks_m
    x = rows_of(x_ptr, tl.program_id(0) % blocks_m, matrix, M, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for c in range(0, sim.count):
        place = x.index * sim.count + c
        y_rows = tl.cast(matrix, tl.int64) * N + tl.load(index_ptr + place, mask=x.ok, other=0)
        y = Rows(y_ptr, y_rows, x.ok)
        w = tl.zeros([BLOCK_M], tl.float32)
        s = tl.zeros([BLOCK_M], tl.float32)
        t = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, sim.K, BLOCK_C):
            a = load_rows(x, first, sim.K, BLOCK_C).to(tl.float32)
            b = load_rows(y, first, sim.K, BLOCK_C).to(tl.float32)
            if sim.distance:
                w += squares(a - b)
            else:
                w += tl.sum(a * b, axis=1)
        if not sim.distance:
            s, t = load_numbers(s_ptr, x), load_numbers(t_ptr, y)
            w = w * sim.factor_x(s, number) * sim.factor_y(t, number)
        g = tl.load(g_ptr + place, mask=x.ok, other=0.0).to(tl.float32)
        total += g * sim.by_number(w, s, t, number)

    tl.store(sums_ptr + x.index, total, mask=x.ok)


@triton.jit(do_not_specialize=["count", "number"])
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
    number,  # of the kind: a number, or a pointer to it
    sim: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    number = read_scalar(number)
    pid, offs_d, d_ok = columns(tl.program_id(0), sim.K, BLOCK_D)
    piece = piece_of(pid, sorted_ptr, starts_ptr, count, LENGTH)
    if piece.ok:
        rows = tl.cast(tl.minimum(piece.end - piece.place, LENGTH), tl.int32)
        y = tl.load(y_ptr + piece.segment * sim.K + offs_d, mask=d_ok, other=0.0).to(tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        through = tl.zeros([BLOCK_M, 1], tl.float32)
        for m in range(0, rows, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            ok = offs_m < rows
            pair = tl.load(order_ptr + piece.place + offs_m, mask=ok, other=0)
            x_rows = pair // sim.count
            mask = ok[:, None] & d_ok[None, :]
            x = tl.load(x_ptr + x_rows[:, None] * sim.K + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
            a = tl.load(g_ptr + pair, mask=ok, other=0.0).to(tl.float32)
            if w_ptr is not None:
                w = tl.load(w_ptr + pair, mask=ok, other=1.0)
            if sim.distance:
                acc += tl.where(ok[:, None], sim.slope(a, w, number)[:, None] * (y[None, :] - x), 0.0)
            else:
                if sim.through_y is not None:
                    through += (a * w)[:, None]
                if sim.factor_x is not None:
                    a = a * sim.factor_x(tl.load(s_ptr + x_rows, mask=ok, other=0.0), number)
                acc += a[:, None] * x
        dy = sum_lanes(acc)
        if sim.factor_y is not None:
            t = tl.load(t_ptr + piece.segment + tl.arange(0, 1))
            h = sim.factor_y(t, number)
            if sim.through_y is None:
                dy = dy * h
            else:
                r = tl.where(h == 0.0, 0.0, tl.div_rn(sum_lanes(through), tl.where(h == 0.0, 1.0, h)))
                dy = sim.through_y(dy, y, r, h, t, number, sim.K)

        store_piece(dy_ptr, partial_ptr, dy, piece, offs_d, sim.K, LENGTH)
