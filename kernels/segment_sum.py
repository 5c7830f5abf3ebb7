"""Sums of rows by segment, and their gradient.

Math     out[s, d] = sum over rows n with segments[n] = s of x[n, d];  dx[n, d] = dy[segments[n], d]
         Rows are read through `order`, the stable order of their segments; rows of segment s are
         order[starts[s] : starts[s + 1]]. A segment of more than LENGTH rows is cut into pieces of LENGTH rows, counted
         from its own start. Rows whose segment is not 0 .. count - 1 are in none: they are not summed, and dx is 0.
Tiles    forward: a program owns BLOCK_D columns of one piece; [BLOCK_M, BLOCK_D] of x in, [BLOCK_D] out
         sum_pieces: BLOCK_D columns of one segment of several pieces; backward_input: [BLOCK_M, BLOCK_D] of dx
Traffic  forward: x and 8 bytes per row for each block of columns in, out; partial sums of long segments, 4 bytes
         each, at most 2 / LENGTH of x's elements. backward_input: dy (rows again and again, from the cache) and
         8 bytes per row in, dx out
Work     forward: an addition per element of x. backward_input: none
Counted  at the most, in what bench.counts has recorded:
         backward_input: 1.0 times Traffic, 2.1 times through L2
         forward: 1.9 times Traffic, 6.2 times through L2
Rounding fp32 sums, one rounding to the output's type. backward_input copies
Order    rows of a piece in BLOCK_M lanes, lane by lane in the order of the rows; lanes by halving, lower half + upper
         half; pieces of a segment in the same way. What is summed with what depends on the segment's rows alone: not on
         other segments, nor on a tile's layout
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def sum_lanes(acc):
    """[rows, columns] -> [columns]. Two at a time, since a sum of two has one order whatever the tile's layout."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    tl.static_assert(ROWS <= 64, "rows are halved at most six times")
    for level in tl.static_range(6):
        if ROWS >> level > 1:
            acc = tl.sum(tl.reshape(acc, (2, ROWS >> (level + 1), COLUMNS)), axis=0)
    return tl.reshape(acc, (COLUMNS,))


@triton.jit
def columns(pid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a program: which row of programs it is in, its columns [BLOCK_D], and those that there are."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    offs_d = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return pid // blocks, offs_d, offs_d < D


@triton.jit
def bounds(starts_ptr, segment, count):
    """Whether a segment is one, and the places in `order` where its rows start and end."""
    inside = (segment >= 0) & (segment < count)
    start = tl.load(starts_ptr + segment, mask=inside, other=0)
    return inside, start, tl.load(starts_ptr + segment + 1, mask=inside, other=0)


class Piece(NamedTuple):
    """At most LENGTH rows of a segment."""

    segment: Any
    start: Any  # of the segment, in `order`
    end: Any
    number: Any  # within the segment
    place: Any  # of the piece's first row, in `order`
    ok: Any  # whether there is such a piece


@triton.jit
def piece_of(number, sorted_ptr, starts_ptr, count, LENGTH: tl.constexpr):
    """The piece of row `number` of programs. Program `number` < count has the first piece of segment `number`. Those
    behind have a place k * LENGTH of the order each: piece j > 0 of a segment is done at the j-th multiple of LENGTH
    behind the segment's start.

        order of rows    | 0 to 6 |  7 . . .  11 . . .  15 . . .  19 . .  |  22 ...     LENGTH = 4, segment 1: 7 to 21
        piece                        0        1         2         3
        done by program              1     count + 1  count + 2  count + 3    since k = 2, 3, 4: places 8, 12, 16
    """
    first = number < count
    k = tl.cast(tl.where(first, 0, number - count + 1), tl.int64)
    segment = tl.where(first, tl.cast(number, tl.int64), tl.load(sorted_ptr + k * LENGTH))
    inside, start, end = bounds(starts_ptr, segment, count)
    piece = tl.where(first, 0, k - start // LENGTH)
    place = start + piece * LENGTH
    return Piece(segment, start, end, piece, place, inside & (first | ((piece > 0) & (place < end))))


@triton.jit
def store_piece(out_ptr, partial_ptr, total, piece, offs_d, D: tl.constexpr, LENGTH: tl.constexpr):
    """A piece's sum [BLOCK_D]: the segment's, or one that sum_pieces adds up. partial_ptr is None where no segment has
    several pieces."""
    d_ok = offs_d < D
    if partial_ptr is None:  # noqa: SIM114 - a branch of its own: it is decided when compiling
        tl.store(out_ptr + piece.segment * D + offs_d, total.to(out_ptr.dtype.element_ty), mask=d_ok)
    elif piece.end - piece.start <= LENGTH:
        tl.store(out_ptr + piece.segment * D + offs_d, total.to(out_ptr.dtype.element_ty), mask=d_ok)
    else:  # twice the start's multiple: pieces of the next long segment begin behind this one's
        slot = 2 * (piece.start // LENGTH) + piece.number
        tl.store(partial_ptr + slot * D + offs_d, total, mask=d_ok)


@triton.jit(do_not_specialize=["count"])
def forward(
    x_ptr,  # [N, D]
    order_ptr,  # [N] int64
    sorted_ptr,  # [N] int64: segments in that order
    starts_ptr,  # [count + 1] int64
    out_ptr,  # [count, D]
    partial_ptr,  # [2 * (N // LENGTH), D] fp32, or None where N <= LENGTH
    count,
    D: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    number, offs_d, d_ok = columns(tl.program_id(0), D, BLOCK_D)
    piece = piece_of(number, sorted_ptr, starts_ptr, count, LENGTH)
    if piece.ok:
        rows = tl.cast(tl.minimum(piece.end - piece.place, LENGTH), tl.int32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for m in range(0, rows, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            m_ok = offs_m < rows
            source = tl.load(order_ptr + piece.place + offs_m, mask=m_ok, other=0)
            x = tl.load(x_ptr + source[:, None] * D + offs_d[None, :], mask=m_ok[:, None] & d_ok[None, :], other=0.0)
            acc += x.to(tl.float32)

        store_piece(out_ptr, partial_ptr, sum_lanes(acc), piece, offs_d, D, LENGTH)


@triton.jit(do_not_specialize=["count"])
def sum_pieces(
    partial_ptr,  # [2 * (N // LENGTH), D] fp32
    sorted_ptr,  # [N] int64
    starts_ptr,  # [count + 1] int64
    out_ptr,  # [count, D]
    count,
    D: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Program k has the long segment, if any, in which k * LENGTH is the first multiple of LENGTH.
    k, offs_d, d_ok = columns(tl.program_id(0), D, BLOCK_D)
    place = tl.cast(k, tl.int64) * LENGTH
    segment = tl.load(sorted_ptr + place)
    inside, start, end = bounds(starts_ptr, segment, count)
    if inside & (end - start > LENGTH) & (place - start < LENGTH):
        pieces = tl.cast((end - start + LENGTH - 1) // LENGTH, tl.int32)
        slot = 2 * (start // LENGTH)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for m in range(0, pieces, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            offs = (slot + offs_m)[:, None] * D + offs_d[None, :]
            acc += tl.load(partial_ptr + offs, mask=(offs_m < pieces)[:, None] & d_ok[None, :], other=0.0)

        tl.store(out_ptr + segment * D + offs_d, sum_lanes(acc).to(out_ptr.dtype.element_ty), mask=d_ok)


@triton.jit(do_not_specialize=["n", "count"])
def backward_input(
    dy_ptr,  # [count, D]
    segments_ptr,  # [N] int64
    dx_ptr,  # [N, D]
    n,
    count,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_m, offs_d, d_ok = columns(tl.program_id(0), D, BLOCK_D)
    offs_m = tl.cast(pid_m, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = offs_m < n
    segment = tl.load(segments_ptr + offs_m, mask=m_ok, other=-1)
    inside = (segment >= 0) & (segment < count)
    dy = tl.load(dy_ptr + segment[:, None] * D + offs_d[None, :], mask=inside[:, None] & d_ok[None, :], other=0.0)

    tl.store(dx_ptr + offs_m[:, None] * D + offs_d[None, :], dy, mask=m_ok[:, None] & d_ok[None, :])
