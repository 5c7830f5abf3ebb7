"""Similarities between all rows of x and all rows of y, forward and backward.

Axes: B pairs of matrices (1 where there is one), M rows of x, N rows of y, K columns of both.

Math     d = <x_i, y_j>,  s = |x_i|^2,  t = |y_j|^2;  with factors f of s and h of t
         inner kinds     w = f h d: "dot" f = h = 1;  "projection" f = 1/s, h = 1;  "cosine" f = 1/max(|x|, eps), and
                         h so of y. A row of zeros has f = 0: similarities and gradients of 0
         distance kinds  q = s + t - 2 d, or sum over k of (x_ik - y_jk)^2 where that would cancel: where q is less than
                         NEAR * (s + t), or not a number. "sqeuclidean" w = q;  "euclidean" w = sqrt(q);
                         "rbf" w = exp(-gamma q)
         backward        p_i = sum over j of g_ij h_j y_j;  dx_i = f p_i + 2 f'(s) <x_i, p_i> x_i: no w is needed.
                         Distances: a_ij = 2 g dw/dq, from q;  dx_i = sum over j of a_ij (x_i - y_j), as
                         x_i sum(a) - sum(a y) where that does not cancel. dy is the same with x and y changed over
Tiles    row_squares: BLOCK_M rows of either matrix, BLOCK_C columns at a time. forward: BLOCK_M x BLOCK_N of w.
         backward: BLOCK_M rows x BLOCK_C columns of a gradient, over one split of the other rows, BLOCK_N at a time.
         Where a row's <x, p> needs more than one tile, or there are several splits, fp32 sums go through memory to
         `finish`
Traffic  row_squares: the matrices that are squared read, 4 bytes a row written, which a backward reads again. forward:
         x, y and squares read, w written. backward: g, both matrices (and q, of distances) read, a gradient written,
         for each of dx and dy; through `finish`, 8 splits M K more. q of distances is written by another forward just
         before, in fp32, since w may be rounded to too little: nothing of M N is kept in between
Work     2 B M N K forward, and as much for each gradient; of distances once more. Near pairs 3 K more each, of their
         whole tile. row_squares 2 B (M + N) K
Rounding operands in their own type (fp32 in TF32 or in three products of TF32, as told); fp32 sums and squares, IEEE
         division and root; one rounding on the way out
Order    sums over K and over rows in blocks, in turn; splits in turn. What decides the blocks is never the number of
         rows of x for w and dx. No atomics
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import as_multiplied, dot, stages_of

GROUP = tl.constexpr(8)  # rows of tiles that are computed together, so that they find each other's operands in L2
TINY = tl.constexpr(2.0**-126)


@triton.jit
def read_scalar(scalar):
    """A number, or the one that there is a pointer to, in fp32."""
    if getattr(scalar, "dtype", tl.float32).is_ptr():  # a number has no dtype in the interpreter
        scalar = tl.load(scalar).to(tl.float32)
    return scalar


# Factors f of the inner kinds, of the squares s; and the gradient f p + 2 f'(s) r x, r = <x, p>, of rows of K columns.


@triton.jit
def one(s, eps):
    return tl.full(s.shape, 1.0, tl.float32)


@triton.jit
def inverse(s, eps):
    """1/s; 0 of 0."""
    return tl.where(s == 0.0, 0.0, tl.div_rn(one(s, eps), tl.where(s < TINY, TINY, s)))


@triton.jit
def through_inverse(p, x, r, f, s, eps, K: tl.constexpr):
    return p * f + x * (-2.0 * f * (f * r))


@triton.jit
def inverse_norm(s, eps):
    """1 / max(sqrt(s), eps); 0 of 0."""
    norm = tl.sqrt_rn(s)
    return tl.where(s == 0.0, 0.0, tl.div_rn(one(s, eps), tl.where(norm < eps, eps, norm)))


@triton.jit
def through_inverse_norm(p, x, r, f, s, eps, K: tl.constexpr):
    """Of one column the norm leaves the sign alone, which has no gradient."""
    short = tl.sqrt_rn(s) < eps
    if K == 1:
        dx = tl.where(short, p * f, 0.0)
    else:
        dx = p * f + x * tl.where(short, 0.0, -f * (f * (f * r)))
    return dx


# Distance kinds: w of q; and twice g dw/dq, from w.


@triton.jit
def square(q, gamma):
    return q


@triton.jit
def square_slope(g, w, gamma):
    return 2.0 * g


@triton.jit
def root(q, gamma):
    return tl.sqrt_rn(q)


@triton.jit
def root_slope(g, w, gamma):
    return tl.where(w == 0.0, 0.0, tl.div_rn(g, tl.where(w == 0.0, 1.0, w)))


@triton.jit
def bell(q, gamma):
    return tl.exp(-gamma * q)


@triton.jit
def bell_slope(g, w, gamma):
    return -2.0 * gamma * (g * w)


# What a kind's own number does to w: dw/dgamma of q, dw/deps of w. Squares s of x and t of y broadcast against it.


@triton.jit
def by_gamma(q, s, t, gamma, eps):
    w = bell(q, gamma)
    return tl.where(w == 0.0, 0.0, -q * w)


@triton.jit
def by_eps(w, s, t, gamma, eps):
    """Through each row whose norm is less than eps: w is -1 / eps of it."""
    short = (tl.sqrt_rn(s) < eps).to(tl.float32) + (tl.sqrt_rn(t) < eps).to(tl.float32)
    return tl.where(short == 0.0, 0.0, -w * (short * tl.div_rn(tl.full([], 1.0, tl.float32), eps)))


class Kind(NamedTuple):
    """What is particular to a kind of similarity: jit functions, None where there is no such thing.

    factor_x, factor_y: of the inner kinds; through_x, through_y: gradients where a factor depends on the row.
    value, slope: of the distance kinds.
    by_number: of the kinds that have a gamma or an eps.
    """

    factor_x: Any = None
    factor_y: Any = None
    through_x: Any = None
    through_y: Any = None
    value: Any = None
    slope: Any = None
    by_number: Any = None


KINDS = {
    "projection": Kind(factor_x=inverse, through_x=through_inverse),
    "dot": Kind(),
    "cosine": Kind(inverse_norm, inverse_norm, through_inverse_norm, through_inverse_norm, by_number=by_eps),
    "euclidean": Kind(value=root, slope=root_slope),
    "sqeuclidean": Kind(value=square, slope=square_slope),
    "rbf": Kind(value=bell, slope=bell_slope, by_number=by_gamma),
}


# Tiles.


@triton.jit
def rows_of(block, matrix, COUNT, BLOCK: tl.constexpr):
    """Rows of a block, [BLOCK] int64, numbered through all matrices of COUNT rows, and which of them there are."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    return tl.cast(matrix, tl.int64) * COUNT + offs, offs < COUNT


@triton.jit
def load_rows(ptr, rows, ok, first, K: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first .. first + BLOCK of rows, [rows, BLOCK]; 0 where there are none."""
    offs = first + tl.arange(0, BLOCK)
    mask = ok[:, None]
    if K % BLOCK != 0:
        mask = mask & (offs < K)[None, :]
    return tl.load(ptr + (rows[:, None] * K + offs[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, values, rows, ok, first, K: tl.constexpr, BLOCK: tl.constexpr):
    """Where load_rows loads from."""
    offs = first + tl.arange(0, BLOCK)
    mask = ok[:, None] & (offs < K)[None, :]
    tl.store(ptr + (rows[:, None] * K + offs[None, :]), values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def place_in_splits(M, splits, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """What a program computes of sums [splits, matrices, M, K]: its split, matrix, block of rows and first column; and
    how many rows a split has in all matrices."""
    tiles_c: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    first = pid % tiles_c * BLOCK_C
    pid = pid // tiles_c
    m = pid % tiles_m
    pid = pid // tiles_m
    matrices = tl.num_programs(0) // (tiles_c * tiles_m * splits)
    return pid % splits, pid // splits, m, first, tl.cast(matrices, tl.int64) * M


@triton.jit
def squares(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, axis=1)


@triton.jit
def store_squares(ptr, squares_ptr, block, count, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    rows, ok = rows_of(block, 0, count, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_C):
        total += squares(load_rows(ptr, rows, ok, first, K, BLOCK_C))
    tl.store(squares_ptr + rows, total, mask=ok)


@triton.jit
def load_squares(ptr, rows, ok):
    """Of rows; None where none are kept."""
    found = None
    if ptr is not None:
        found = tl.load(ptr + rows, mask=ok, other=0.0)
    return found


@triton.jit
def products(
    x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d [BLOCK_M, BLOCK_N], fp32."""
    # Squares do not come out of the same tiles: what is loaded for a product is for nothing else, or a round of the
    # loop may write into the shared memory that a product still reads (see bench/hazards.py).
    d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_RED):
        x = load_rows(x_ptr, x_rows, x_ok, first, K, BLOCK_RED)
        y = load_rows(y_ptr, y_rows, y_ok, first, K, BLOCK_RED)
        d = dot(x, tl.trans(y), d, DOT_TYPE, PRECISION)
    return d


@triton.jit
def square_distances(
    x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """q [BLOCK_M, BLOCK_N], column by column: slow, and exact for near rows."""
    q = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K):
        x = tl.load(x_ptr + x_rows * K + k, mask=x_ok, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + y_rows * K + k, mask=y_ok, other=0.0).to(tl.float32)
        apart = x[:, None] - y[None, :]
        q += apart * apart
    return q


@triton.jit
def any_of(mask):
    # over both axes at once: a reduction of a reduction is more than Triton 3.6 can do for sm_100
    return tl.max(mask.to(tl.int32), axis=None) > 0


@triton.jit
def is_near(q, s, t, x_ok, y_ok, NEAR: tl.constexpr):
    """Pairs of which s + t - 2 d tells too little; NaN, and what comes of infinities, is among them."""
    far = q >= NEAR * (s[:, None] + t[None, :])
    return (far == 0) & x_ok[:, None] & y_ok[None, :]


@triton.jit
def similarities(
    x_ptr, y_ptr, s_ptr, t_ptr, x_rows, x_ok, y_rows, y_ok, gamma, eps, FACTOR_X: tl.constexpr, FACTOR_Y: tl.constexpr,
    VALUE: tl.constexpr, NEAR: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w [BLOCK_M, BLOCK_N] fp32 of rows."""
    d = products(x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, K, BLOCK_M, BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION)
    s = load_squares(s_ptr, x_rows, x_ok)
    t = load_squares(t_ptr, y_rows, y_ok)
    if VALUE is not None:
        w = s[:, None] + t[None, :] - 2.0 * d
        near = is_near(w, s, t, x_ok, y_ok, NEAR)
        if any_of(near):
            w = tl.where(near, square_distances(x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, K, BLOCK_M, BLOCK_N), w)
        w = VALUE(w, gamma)
    else:
        w = d
        if FACTOR_X is not None:
            w = w * FACTOR_X(s, eps)[:, None]
        if FACTOR_Y is not None:
            w = w * FACTOR_Y(t, eps)[None, :]
    return w


@triton.jit
def place_of(pid, tiles_m, tiles_n):
    """The matrix and the tile of a program: GROUP rows of tiles at a time, column by column."""
    tiles = tiles_m * tiles_n
    matrix = pid // tiles
    pid = pid % tiles
    first = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    pid = pid % (GROUP * tiles_n)
    return matrix, first + pid % rows, pid // rows


@triton.jit(do_not_specialize=["M", "N"])
def row_squares(
    x_ptr,  # [M, K]
    s_ptr,  # fp32 [M]
    y_ptr,  # [N, K] or None
    t_ptr,  # fp32 [N] or None
    M: tl.int64,  # rows in all matrices
    N: tl.int64,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Squares of the rows of x and, where there is a y, of y."""
    pid = tl.cast(tl.program_id(0), tl.int64)
    of_x = tl.cdiv(M, BLOCK_M)
    if y_ptr is None:  # noqa: SIM114 - a branch of its own: it is decided when compiling
        store_squares(x_ptr, s_ptr, pid, M, K, BLOCK_M, BLOCK_C)
    elif pid < of_x:
        store_squares(x_ptr, s_ptr, pid, M, K, BLOCK_M, BLOCK_C)
    else:
        store_squares(y_ptr, t_ptr, pid - of_x, N, K, BLOCK_M, BLOCK_C)


@triton.jit(do_not_specialize=["M", "n_units", "gamma", "eps"])
def forward(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    w_ptr,  # [B, M, N]
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    M,
    n_units,  # N / N_UNIT
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    N_UNIT: tl.constexpr,  # a divisor of N, known to the compiler so that accesses are wide
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
    N = n_units * N_UNIT
    matrix, m, n = place_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    y_rows, y_ok = rows_of(n, matrix, N, BLOCK_N)

    w = similarities(
        x_ptr, y_ptr, s_ptr, t_ptr, x_rows, x_ok, y_rows, y_ok, gamma, eps, FACTOR_X, FACTOR_Y, VALUE, NEAR, K, BLOCK_M,
        BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
    )  # fmt: skip

    offs_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = x_ok[:, None] & y_ok[None, :]
    tl.store(w_ptr + (x_rows[:, None] * N + offs_n[None, :]), w.to(w_ptr.dtype.element_ty), mask=ok)


@triton.jit
def store_number_sums(
    sums_ptr, g_ptr, by, x_rows, x_ok, y_ok, m, n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Of each row of a tile its part of the sum of g dw/dnumber, into [tiles of N, B, M]."""
    offs_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = x_ok[:, None] & y_ok[None, :]
    g = tl.load(g_ptr + (x_rows[:, None] * N + offs_n[None, :]), mask=ok, other=0.0).to(tl.float32)
    total = tl.sum(tl.where(ok, g * by, 0.0), axis=1)
    matrices = tl.num_programs(0) // (tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N))
    tl.store(sums_ptr + (x_rows + n * (tl.cast(matrices, tl.int64) * M)), total, mask=x_ok)


@triton.jit(do_not_specialize=["M", "N", "gamma"])
def gamma_sums(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    g_ptr,  # [B, M, N]
    sums_ptr,  # fp32 [tiles of N, B, M]
    M,
    N,
    gamma,  # a number, or a pointer to it
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of gamma, in parts. All distances are computed from differences: what is summed up cancels."""
    matrix, m, n = place_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    y_rows, y_ok = rows_of(n, matrix, N, BLOCK_N)

    q = square_distances(x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, K, BLOCK_M, BLOCK_N)
    by = by_gamma(q, None, None, read_scalar(gamma), None)

    store_number_sums(sums_ptr, g_ptr, by, x_rows, x_ok, y_ok, m, n, M, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "N", "eps"])
def eps_sums(
    x_ptr,  # [B, M, K]
    y_ptr,  # [B, N, K]
    s_ptr,  # fp32 [B, M]: squares of x
    t_ptr,  # fp32 [B, N]: squares of y
    g_ptr,  # [B, M, N]
    sums_ptr,  # fp32 [tiles of N, B, M]
    M,
    N,
    eps,  # a number, or a pointer to it
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of eps, in parts."""
    eps = read_scalar(eps)
    matrix, m, n = place_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    y_rows, y_ok = rows_of(n, matrix, N, BLOCK_N)

    w = similarities(
        x_ptr, y_ptr, s_ptr, t_ptr, x_rows, x_ok, y_rows, y_ok, None, eps, inverse_norm, inverse_norm, None, 0.0, K,
        BLOCK_M, BLOCK_N, BLOCK_RED, DOT_TYPE, PRECISION,
    )  # fmt: skip
    s, t = load_squares(s_ptr, x_rows, x_ok), load_squares(t_ptr, y_rows, y_ok)
    by = by_eps(w, s[:, None], t[None, :], None, eps)

    store_number_sums(sums_ptr, g_ptr, by, x_rows, x_ok, y_ok, m, n, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def near_gradients(a, x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, first, p, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """p [rows, BLOCK_C] less sum over j of a_ij (x_i - y_j), column by column."""
    offs_c = first + tl.arange(0, BLOCK_C)
    for k in range(first, tl.minimum(first + BLOCK_C, K)):
        x = tl.load(x_ptr + x_rows * K + k, mask=x_ok, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + y_rows * K + k, mask=y_ok, other=0.0).to(tl.float32)
        column = tl.sum(tl.where(a == 0.0, 0.0, a * (x[:, None] - y[None, :])), axis=1)
        p = tl.where((offs_c == k)[None, :], p - column[:, None], p)
    return p


@triton.jit
def finished(p, x, s, eps, FACTOR: tl.constexpr, THROUGH: tl.constexpr, r, K: tl.constexpr):
    """A gradient of the inner kinds from p and r = <x, p>."""
    dx = p
    if FACTOR is not None:
        f = FACTOR(s, eps)
        if THROUGH is None:
            dx = p * f[:, None]
        else:
            dx = THROUGH(p, x.to(tl.float32), r[:, None], f[:, None], s[:, None], eps, K)
    return dx


@triton.jit(do_not_specialize=["m_units", "n_units", "per_split", "gamma", "eps"])
def backward(
    x_ptr,  # [B, M, K]: the matrix whose gradient it is
    y_ptr,  # [B, N, K]: the other one
    g_ptr,  # [B, M, N], or [B, N, M] where SWAPPED
    q_ptr,  # fp32, like g: square distances, of the distance kinds; else None
    s_ptr,  # fp32 [B, M] or None: squares of x
    t_ptr,  # fp32 [B, N] or None: squares of y
    dx_ptr,  # [B, M, K]
    partial_ptr,  # fp32 [splits, B, M, K], sums for `finish`; None where there is one split and nothing for it to add
    m_units,  # M / M_UNIT
    n_units,
    per_split,  # rows of y, a multiple of BLOCK_N
    gamma,  # a number, or a pointer to it
    eps,  # likewise
    SWAPPED: tl.constexpr,
    M_UNIT: tl.constexpr,
    N_UNIT: tl.constexpr,
    K: tl.constexpr,
    FACTOR_X: tl.constexpr,
    FACTOR_Y: tl.constexpr,
    THROUGH_X: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    gamma, eps = read_scalar(gamma), read_scalar(eps)
    M = m_units * M_UNIT
    N = n_units * N_UNIT
    split, matrix, m, first, count = place_in_splits(M, tl.cdiv(N, per_split), K, BLOCK_M, BLOCK_C)
    x_rows, x_ok = rows_of(m, matrix, M, BLOCK_M)
    offs_m = m * BLOCK_M + tl.arange(0, BLOCK_M)
    if s_ptr is not None:
        s = tl.load(s_ptr + x_rows, mask=x_ok, other=0.0)

    p = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    stages: tl.constexpr = stages_of(FACTOR_Y is not None)
    for start in tl.range(split * per_split, tl.minimum((split + 1) * per_split, N), BLOCK_N, num_stages=stages):
        n = start // BLOCK_N
        y_rows, y_ok = rows_of(n, matrix, N, BLOCK_N)
        offs_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
        if SWAPPED:
            offs = y_rows[None, :] * M + offs_m[:, None]
        else:
            offs = x_rows[:, None] * N + offs_n[None, :]
        ok = x_ok[:, None] & y_ok[None, :]
        a = tl.load(g_ptr + offs, mask=ok, other=0.0).to(tl.float32)
        if t_ptr is not None:
            t = tl.load(t_ptr + y_rows, mask=y_ok, other=0.0)
        if FACTOR_Y is not None:
            a = a * FACTOR_Y(t, eps)[None, :]
        if SLOPE is not None:
            q = tl.load(q_ptr + offs, mask=ok, other=1.0)
            a = SLOPE(a, VALUE(q, gamma), gamma)
            near = is_near(q, s, t, x_ok, y_ok, NEAR)
            if any_of(near):
                p = near_gradients(
                    tl.where(near, a, 0.0), x_ptr, y_ptr, x_rows, x_ok, y_rows, y_ok, first, p, K, BLOCK_C
                )
            a = tl.where(near, 0.0, a)
            a = as_multiplied(a, DOT_TYPE, PRECISION)
            weight += tl.sum(a, axis=1)
        y = load_rows(y_ptr, y_rows, y_ok, first, K, BLOCK_C)
        p = dot(a, y, p, DOT_TYPE, PRECISION)

    if SLOPE is not None:
        x = load_rows(x_ptr, x_rows, x_ok, first, K, BLOCK_C)
        p = x.to(tl.float32) * weight[:, None] - p
    elif partial_ptr is None and FACTOR_X is not None:
        x = load_rows(x_ptr, x_rows, x_ok, first, K, BLOCK_C)
        p = finished(p, x, s, eps, FACTOR_X, THROUGH_X, tl.sum(x.to(tl.float32) * p, axis=1), K)
    if partial_ptr is None:
        store_rows(dx_ptr, p, x_rows, x_ok, first, K, BLOCK_C)
    else:
        store_rows(partial_ptr, p, x_rows + split * count, x_ok, first, K, BLOCK_C)


@triton.jit
def sum_of_splits(ptr, rows, ok, first, splits, count, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    p = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for split in range(splits):
        p += load_rows(ptr, rows + tl.cast(split, tl.int64) * count, ok, first, K, BLOCK_C)
    return p


@triton.jit(do_not_specialize=["splits", "count", "eps"])
def finish(
    x_ptr,  # [rows, K] or None: of a gradient with a factor
    p_ptr,  # fp32 [splits, rows, K]
    s_ptr,  # fp32 [rows] or None: squares of x
    dx_ptr,  # [rows, K]
    splits,
    count: tl.int64,  # of rows
    eps,  # a number, or a pointer to it
    K: tl.constexpr,
    FACTOR: tl.constexpr,
    THROUGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of all splits and, of a gradient, its factor."""
    eps = read_scalar(eps)
    rows, ok = rows_of(tl.program_id(0), 0, count, BLOCK_M)
    s = None
    if s_ptr is not None:
        s = tl.load(s_ptr + rows, mask=ok, other=0.0)
    r = tl.zeros([BLOCK_M], tl.float32)
    if THROUGH is not None:
        for first in range(0, K, BLOCK_C):
            x = load_rows(x_ptr, rows, ok, first, K, BLOCK_C)
            p = sum_of_splits(p_ptr, rows, ok, first, splits, count, K, BLOCK_M, BLOCK_C)
            r += tl.sum(x.to(tl.float32) * p, axis=1)
    for first in range(0, K, BLOCK_C):
        x = None
        if FACTOR is not None:
            x = load_rows(x_ptr, rows, ok, first, K, BLOCK_C)
        p = sum_of_splits(p_ptr, rows, ok, first, splits, count, K, BLOCK_M, BLOCK_C)
        store_rows(dx_ptr, finished(p, x, s, eps, FACTOR, THROUGH, r, K), rows, ok, first, K, BLOCK_C)
