"""Similarities between all rows of x and all rows of y, forward and backward. Axes and math: kernels/similarity.py.

Tiles    forward: BLOCK_M x BLOCK_N of w. backward: BLOCK_M rows x BLOCK_C columns of a gradient, over one split of the
         other rows, BLOCK_N at a time. Where a row's <x, p> needs more than one tile, or there are several splits, fp32
         sums go through memory to similarity.finish or, where no factor is left, to reduce.sum_splits
Traffic  similarity.row_squares first; a backward reads its squares again. forward: x, y and squares read, w written.
         backward: g, both matrices (and q, of distances) read, a gradient written, for each of dx and dy; through
         memory, 8 splits M K more. q of distances is written by another forward just before, in fp32, since w may be
         rounded to too little: nothing of M N is kept in between
Work     2 B M N K forward, and as much for each gradient; of distances once more. Near pairs 3 K more each, of their
         whole tile
Counted  at the most, in what bench.counts has recorded:
         forward: 1.2 times Traffic, 13 times through L2, 4.0 times Work
Rounding as in kernels/similarity.py; one rounding on the way out
Order    sums over K and over rows in blocks, in turn; splits in turn. What decides the blocks is never the number of
         rows of x for w and dx. No atomics
"""

import triton
import triton.language as tl

from .similarity import (
    gradients_as_multiplied,
    is_near,
    load_numbers,
    load_rows,
    multiply_gradients,
    of_products,
    products,
    read_scalar,
    result_rows,
    rows_of,
    split_of_sums,
    square_distances,
    store_rows,
    through_factor,
    value_of,
    with_near_pairs,
    without_near_pairs,
)
from .tile import stages_of

GROUP = tl.constexpr(8)  # rows of tiles that are computed together, so that they find each other's operands in L2


@triton.jit
def tile_of(pid, tiles_m, tiles_n):
    """The matrix and the tile of a program: GROUP rows of tiles at a time, column by column.

        0 2 4      of programs 0, 1, 2 ..., with GROUP = 2
        1 3 5
        6 7 8
    """
    tiles = tiles_m * tiles_n
    matrix = pid // tiles
    pid = pid % tiles
    first = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    pid = pid % (GROUP * tiles_n)
    return matrix, first + pid % rows, pid // rows


@triton.jit
def similarities(x, y, s_ptr, t_ptr, number, sim: tl.constexpr, BLOCK_RED: tl.constexpr):
    """w [rows of x, rows of y], fp32; s_ptr and t_ptr are to the rows' squares."""
    d = products(x, y, sim.K, sim, BLOCK_RED)
    s = load_numbers(s_ptr, x)  # behind the loop, which is short of registers
    t = load_numbers(t_ptr, y)
    q = with_near_pairs(of_products(d, s, t, number, sim), s, t, x, y, sim)
    return value_of(q, number, sim)


@triton.jit(do_not_specialize=["M", "n_units", "number"])
def forward(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    w_ptr,  # [B, M, N]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    M,
    n_units,  # N / UNIT
    number,  # of the kind: a number, or a pointer to it
    UNIT: tl.constexpr,  # a divisor of N, known to the compiler so that accesses are wide
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    number = read_scalar(number)
    N = n_units * UNIT
    matrix, m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    y = rows_of(y_ptr, n, matrix, N, BLOCK_N)

    w = similarities(x, y, s_ptr, t_ptr, number, sim, BLOCK_RED)

    offs_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = x.ok[:, None] & y.ok[None, :]
    tl.store(w_ptr + (x.index[:, None] * N + offs_n[None, :]), w.to(w_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M", "N", "number"])
def number_sums(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    s_ptr,  # fp32 [B, M], of inner kinds: squares of x; else None
    t_ptr,  # fp32 [B, N], likewise of y
    g_ptr,  # [B, M, N]
    sums_ptr,  # fp32 [tiles of N, B, M]
    M,
    N,
    number,  # of the kind: a number, or a pointer to it
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    """The gradient of the kind's own number: of each row of a tile its part of the sum of g dw/dnumber. All distances
    are computed from differences: what is summed up cancels."""
    tl.static_assert(sim.by_number is not None, "the kind has a number of its own")
    number = read_scalar(number)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    matrix, m, n = tile_of(tl.program_id(0), tiles_m, tiles_n)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    y = rows_of(y_ptr, n, matrix, N, BLOCK_N)

    if sim.distance:
        by = sim.by_number(square_distances(x, y, sim.K), None, None, number)
    else:
        w = similarities(x, y, s_ptr, t_ptr, number, sim, BLOCK_RED)
        by = sim.by_number(w, load_numbers(s_ptr, x)[:, None], load_numbers(t_ptr, y)[None, :], number)
    offs_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = x.ok[:, None] & y.ok[None, :]
    g = tl.load(g_ptr + (x.index[:, None] * N + offs_n[None, :]), mask=ok, other=0.0).to(tl.float32)
    total = tl.sum(tl.where(ok, g * by, 0.0), axis=1)

    matrices = tl.num_programs(0) // (tiles_m * tiles_n)
    tl.store(sums_ptr + (x.index + n * (tl.cast(matrices, tl.int64) * M)), total, mask=x.ok)


@triton.jit(do_not_specialize=["m_units", "n_units", "per_split", "number"])
def backward(
    x_ptr,  # [B, M, K]: the matrix whose gradient it is
    y_ptr,  # [B, N, K]: the other one
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    g_ptr,  # [B, M, N], or [B, N, M] where sim.transposed
    q_ptr,  # fp32, like g: square distances, of the distance kinds; else None
    dx_ptr,  # [B, M, K], or fp32 [splits, B, M, K] where sim.partial
    m_units,  # M, or M / UNIT where sim.transposed
    n_units,  # N / UNIT, or N where sim.transposed
    per_split,  # rows of y, a multiple of BLOCK_N
    number,  # of the kind: a number, or a pointer to it
    UNIT: tl.constexpr,  # as in the forward
    sim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    number = read_scalar(number)
    if sim.transposed:
        M, N = m_units * UNIT, n_units
    else:
        M, N = m_units, n_units * UNIT
    split, matrix, m, first, count = split_of_sums(M, tl.cdiv(N, per_split), sim.K, BLOCK_M, BLOCK_C)
    x = rows_of(x_ptr, m, matrix, M, BLOCK_M)
    s = load_numbers(s_ptr, x)
    offs_m = m * BLOCK_M + tl.arange(0, BLOCK_M)

    p = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)  # of x in a distance's gradient
    stages: tl.constexpr = stages_of(sim.factor_y is not None)
    for start in tl.range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N, num_stages=stages):
        n = start // BLOCK_N
        y = rows_of(y_ptr, n, matrix, N, BLOCK_N)
        offs_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
        if sim.transposed:
            offs = y.index[None, :] * M + offs_m[:, None]
        else:
            offs = x.index[:, None] * N + offs_n[None, :]
        ok = x.ok[:, None] & y.ok[None, :]
        a = tl.load(g_ptr + offs, mask=ok, other=0.0).to(tl.float32)
        t = load_numbers(t_ptr, y)
        if sim.factor_y is not None:
            a = a * sim.factor_y(t, number)[None, :]
        if sim.distance:
            q = tl.load(q_ptr + offs, mask=ok, other=1.0)
            a = sim.slope(a, sim.of_square(q, number), number)
            a, p = without_near_pairs(a, is_near(q, s, t, x, y, sim), x, y, first, p, sim.K)
            a = gradients_as_multiplied(a, sim)
            weight += tl.sum(a, axis=1)
        p = multiply_gradients(a, load_rows(y, first, sim.K, BLOCK_C), p, sim)

    if sim.distance:
        p = load_rows(x, first, sim.K, BLOCK_C).to(tl.float32) * weight[:, None] - p
    elif not sim.partial and sim.factor_x is not None:
        columns = load_rows(x, first, sim.K, BLOCK_C)
        p = through_factor(p, columns, s, tl.sum(columns.to(tl.float32) * p, axis=1), number, sim)
    store_rows(result_rows(dx_ptr, x, split, count, sim), p, first, sim.K)
