"""What kernels of similarities share: kinds, rows, and the similarities of a tile of pairs.

Axes: B pairs of matrices (1 where there is one), M rows of x, N rows of y, K columns of both. What is fixed when
compiling, the kind among it, is one record, `sim` (a geometry.Similarity); `sim.swapped` has x and y changed over, so
that one text computes the gradients of both. Rows of a matrix travel as `Rows`.

Math     d = <x_i, y_j>,  s = |x_i|^2,  t = |y_j|^2;  with factors f of s and h of t
         inner kinds     w = f h d: "dot" f = h = 1;  "projection" f = 1/s, h = 1;  "cosine" f = 1/max(|x|, eps), and
                         h so of y. A row of zeros has f = 0: similarities and gradients of 0
         distance kinds  q = s + t - 2 d, or sum over k of (x_ik - y_jk)^2 where that would cancel: where q is less than
                         near * (s + t), or not a number. "sqeuclidean" w = q;  "euclidean" w = sqrt(q);
                         "rbf" w = exp(-gamma q)
         backward        p_i = sum over j of g_ij h_j y_j;  dx_i = f p_i + 2 f'(s) <x_i, p_i> x_i: no w is needed.
                         Distances: a_ij = 2 g dw/dq, from q;  dx_i = sum over j of a_ij (x_i - y_j), as
                         x_i sum(a) - sum(a y) where that does not cancel. dy is the same with x and y changed over
Tiles    row_squares: BLOCK_M rows of either matrix, BLOCK_C columns at a time. finish: BLOCK_M rows of a gradient,
         BLOCK_C columns at a time
Traffic  row_squares: the matrices that are squared read, 4 bytes a row written. finish: 4 bytes for each element and
         split read (twice where all columns do not fit a tile), the gradient written
Work     row_squares 2 B (M + N) K. Of near pairs 3 K each, for all pairs of their tile
Rounding operands in their own type (fp32 in TF32 or in three products of TF32, as the record says); fp32 sums and
         squares, IEEE division and root
Order    sums over K in blocks, in turn; splits in turn. No atomics
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import as_multiplied, dot, multiply

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
def gaussian(q, gamma):
    return tl.exp(-gamma * q)


@triton.jit
def gaussian_slope(g, w, gamma):
    return -2.0 * gamma * (g * w)


# What a kind's own number does to w: dw/dgamma of q, dw/deps of w. Squares s of x and t of y broadcast against it.


@triton.jit
def by_gamma(q, s, t, gamma):
    w = gaussian(q, gamma)
    return tl.where(w == 0.0, 0.0, -q * w)


@triton.jit
def by_eps(w, s, t, eps):
    """Through each row whose norm is less than eps: w is -1 / eps of it."""
    short = (tl.sqrt_rn(s) < eps).to(tl.float32) + (tl.sqrt_rn(t) < eps).to(tl.float32)
    return tl.where(short == 0.0, 0.0, -w * (short * tl.div_rn(tl.full([], 1.0, tl.float32), eps)))


class Kind(NamedTuple):
    """What is particular to a kind of similarity: jit functions, None where there is no such thing.

    factor_x, factor_y: of the inner kinds; through_x, through_y: gradients where a factor depends on the row.
    of_square, slope: of the distance kinds.
    by_number: of the kinds that have a number of their own, gamma or eps, which kernels take as `number`.
    """

    factor_x: Any = None
    factor_y: Any = None
    through_x: Any = None
    through_y: Any = None
    of_square: Any = None
    slope: Any = None
    by_number: Any = None


KINDS = {
    "projection": Kind(factor_x=inverse, through_x=through_inverse),
    "dot": Kind(),
    "cosine": Kind(inverse_norm, inverse_norm, through_inverse_norm, through_inverse_norm, by_number=by_eps),
    "euclidean": Kind(of_square=root, slope=root_slope),
    "sqeuclidean": Kind(of_square=square, slope=square_slope),
    "rbf": Kind(of_square=gaussian, slope=gaussian_slope, by_number=by_gamma),
}


# Rows.


class Rows(NamedTuple):
    """Some rows of a matrix."""

    ptr: Any
    index: Any  # [BLOCK] int64: their numbers, counted through all matrices
    ok: Any  # [BLOCK]: which of them there are


@triton.jit
def rows_of(ptr, block, matrix, COUNT, BLOCK: tl.constexpr):
    """Those of a block, in matrices of COUNT rows."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    return Rows(ptr, tl.cast(matrix, tl.int64) * COUNT + offs, offs < COUNT)


@triton.jit
def same_rows(x, ptr):
    """The same rows of another matrix."""
    return Rows(ptr, x.index, x.ok)


@triton.jit
def load_rows(x, first, K: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first .. first + BLOCK of rows, [rows, BLOCK]; 0 where there are none."""
    offs = first + tl.arange(0, BLOCK)
    mask = x.ok[:, None]
    if K % BLOCK != 0:
        mask = mask & (offs < K)[None, :]
    return tl.load(x.ptr + (x.index[:, None] * K + offs[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(x, values, first, K: tl.constexpr):
    """Where load_rows loads from."""
    offs = first + tl.arange(0, values.shape[1])
    mask = x.ok[:, None] & (offs < K)[None, :]
    tl.store(x.ptr + (x.index[:, None] * K + offs[None, :]), values.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_column(x, k, K: tl.constexpr):
    """[rows] fp32."""
    return tl.load(x.ptr + x.index * K + k, mask=x.ok, other=0.0).to(tl.float32)


@triton.jit
def load_numbers(ptr, x):
    """One for each row, [rows]; None where there are none."""
    found = None
    if ptr is not None:
        found = tl.load(ptr + x.index, mask=x.ok, other=0.0)
    return found


@triton.jit
def split_of_sums(M, splits, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
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
def result_rows(ptr, x, split, count, sim: tl.constexpr):
    """Where sums of the rows of x go: of `count` rows in each split, where splits are added by another kernel."""
    index = x.index
    if sim.partial:
        index = index + split * count
    return Rows(ptr, index, x.ok)


# Squares.


@triton.jit
def squares(x):
    x = x.to(tl.float32)
    return tl.sum(x * x, axis=1)


@triton.jit
def store_squares(ptr, squares_ptr, block, count, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    x = rows_of(ptr, block, 0, count, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_C):
        total += squares(load_rows(x, first, K, BLOCK_C))
    tl.store(squares_ptr + x.index, total, mask=x.ok)


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


# Tiles of pairs, [rows of x, rows of y].


@triton.jit
def multiply_gradients(a, b, acc, sim: tl.constexpr):
    """acc + a @ b, where a is a gradient; `multiply` is for others."""
    gradient_type: tl.constexpr = sim.gradient_type
    gradient_precision: tl.constexpr = sim.gradient_precision
    return dot(a, b, acc, gradient_type, gradient_precision)


@triton.jit
def gradients_as_multiplied(a, sim: tl.constexpr):
    """What multiply_gradients takes of a, in fp32."""
    gradient_type: tl.constexpr = sim.gradient_type
    gradient_precision: tl.constexpr = sim.gradient_precision
    return as_multiplied(a, gradient_type, gradient_precision)


@triton.jit
def products(x, y, K: tl.constexpr, sim: tl.constexpr, BLOCK_RED: tl.constexpr):
    """d, fp32, of rows of K columns."""
    # Squares do not come out of the same tiles: what is loaded for a product is for nothing else, or a round of the
    # loop may write into the shared memory that a product still reads (see bench/hazards.py).
    tl.static_assert(BLOCK_RED >= 16, "tensor cores multiply 16 columns at the least")
    d = tl.zeros([x.index.shape[0], y.index.shape[0]], tl.float32)
    for first in range(0, K, BLOCK_RED):
        a = load_rows(x, first, K, BLOCK_RED)
        b = load_rows(y, first, K, BLOCK_RED)
        d = multiply(a, tl.trans(b), d, sim)
    return d


@triton.jit
def square_distances(x, y, K: tl.constexpr):
    """q, column by column: slow, and exact for near rows."""
    q = tl.zeros([x.index.shape[0], y.index.shape[0]], tl.float32)
    for k in range(0, K):
        a, b = load_column(x, k, K), load_column(y, k, K)
        apart = a[:, None] - b[None, :]
        q += apart * apart
    return q


@triton.jit
def any_of(mask):
    # over both axes at once: a reduction of a reduction is more than Triton 3.6 can do for sm_100
    return tl.max(mask.to(tl.int32), axis=None) > 0


@triton.jit
def is_near(q, s, t, x, y, sim: tl.constexpr):
    """Pairs of which s + t - 2 d tells too little; NaN, and what comes of infinities, is among them."""
    tl.static_assert(sim.distance, "only distances cancel")
    far = q >= sim.near * (s[:, None] + t[None, :])
    return (far == 0) & x.ok[:, None] & y.ok[None, :]


@triton.jit
def of_products(d, s, t, number, sim: tl.constexpr):
    """w of the inner kinds; of distances s + t - 2 d, right where that does not cancel."""
    if sim.distance:
        d = s[:, None] + t[None, :] - 2.0 * d
    else:
        if sim.factor_x is not None:
            d = d * sim.factor_x(s, number)[:, None]
        if sim.factor_y is not None:
            d = d * sim.factor_y(t, number)[None, :]
    return d


@triton.jit
def with_near_pairs(q, s, t, x, y, sim: tl.constexpr):
    """What of_products found; of distances those of near pairs from differences."""
    if sim.distance:
        near = is_near(q, s, t, x, y, sim)
        if any_of(near):
            q = tl.where(near, square_distances(x, y, sim.K), q)
    return q


@triton.jit
def value_of(q, number, sim: tl.constexpr):
    """w of what of_products and with_near_pairs found."""
    if sim.distance:
        q = sim.of_square(q, number)
    return q


@triton.jit
def far_pairs(columns, s, t, x, y, number, sim: tl.constexpr, BLOCK_RED: tl.constexpr):
    """of_products for a program that walks along y and keeps the first BLOCK_RED columns of its rows of x."""
    tl.static_assert(columns.shape[1] == BLOCK_RED, "columns are the first BLOCK_RED of x")
    if sim.K <= BLOCK_RED:
        b = load_rows(y, 0, sim.K, BLOCK_RED)
        d = multiply(columns, tl.trans(b), tl.zeros([x.index.shape[0], y.index.shape[0]], tl.float32), sim)
    else:
        d = products(x, y, sim.K, sim, BLOCK_RED)
    return of_products(d, s, t, number, sim)


# Gradients.


@triton.jit
def near_gradients(a, x, y, first, p, K: tl.constexpr):
    """p [rows, columns from `first` on] less sum over j of a_ij (x_i - y_j), column by column."""
    BLOCK_C: tl.constexpr = p.shape[1]
    offs_c = first + tl.arange(0, BLOCK_C)
    for k in range(first, tl.minimum(first + BLOCK_C, K)):
        own, other = load_column(x, k, K), load_column(y, k, K)
        column = tl.sum(tl.where(a == 0.0, 0.0, a * (own[:, None] - other[None, :])), axis=1)
        p = tl.where((offs_c == k)[None, :], p - column[:, None], p)
    return p


@triton.jit
def without_near_pairs(a, near, x, y, first, p, K: tl.constexpr):
    """a, of distances, as it is multiplied with rows of y; and p, to which near pairs, which are not, have come."""
    if any_of(near):
        p = near_gradients(tl.where(near, a, 0.0), x, y, first, p, K)
    return tl.where(near, 0.0, a), p


@triton.jit
def through_factor(p, x, s, r, number, sim: tl.constexpr):
    """A gradient of the inner kinds from p and r = <x, p>."""
    dx = p
    if sim.factor_x is not None:
        f = sim.factor_x(s, number)
        if sim.through_x is None:
            dx = p * f[:, None]
        else:
            dx = sim.through_x(p, x.to(tl.float32), r[:, None], f[:, None], s[:, None], number, sim.K)
    return dx


@triton.jit
def sum_of_splits(p, first, splits, count, K: tl.constexpr, BLOCK_C: tl.constexpr):
    total = tl.zeros([p.index.shape[0], BLOCK_C], tl.float32)
    for split in range(splits):
        total += load_rows(Rows(p.ptr, p.index + tl.cast(split, tl.int64) * count, p.ok), first, K, BLOCK_C)
    return total


@triton.jit(do_not_specialize=["splits", "count", "number"])
def finish(
    x_ptr,  # [rows, K]
    p_ptr,  # fp32 [splits, rows, K]
    s_ptr,  # fp32 [rows]: squares of x
    dx_ptr,  # [rows, K]
    splits,
    count: tl.int64,  # of rows
    number,  # of the kind: a number, or a pointer to it
    sim: tl.constexpr,  # a kind with a factor
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of all splits and its factor: the gradient of an inner kind."""
    tl.static_assert(sim.factor_x is not None, "sums without a factor are reduce.sum_splits'")
    number = read_scalar(number)
    x = rows_of(x_ptr, tl.program_id(0), 0, count, BLOCK_M)
    s = tl.load(s_ptr + x.index, mask=x.ok, other=0.0)
    r = tl.zeros([BLOCK_M], tl.float32)
    if sim.through_x is not None:
        for first in range(0, sim.K, BLOCK_C):
            columns = load_rows(x, first, sim.K, BLOCK_C)
            p = sum_of_splits(same_rows(x, p_ptr), first, splits, count, sim.K, BLOCK_C)
            r += tl.sum(columns.to(tl.float32) * p, axis=1)
    for first in range(0, sim.K, BLOCK_C):
        columns = load_rows(x, first, sim.K, BLOCK_C)
        p = sum_of_splits(same_rows(x, p_ptr), first, splits, count, sim.K, BLOCK_C)
        store_rows(same_rows(x, dx_ptr), through_factor(p, columns, s, r, number, sim), first, sim.K)
