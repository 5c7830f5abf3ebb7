"""Sum of split partial results, in a fixed order.

Math     out[i] = sum over s of partial[s, i]. Users: gradients of convolutions' weights, sums and gradients of
         similarities, centroids. Sums whose number of parts differs: segment_sum.sum_pieces
Tiles    [SPLITS_BLOCK, BLOCK] of partial in, [BLOCK] of out
Traffic  4 * splits * count read, element size * count written
Work     splits * count additions
Rounding fp32 sums, one rounding to the output's type
Order    splits in blocks of SPLITS_BLOCK, a fixed tree within a block, blocks in turn: the same bits on every run
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["splits", "rows"])
def sum_splits(
    partial_ptr,  # fp32 [splits, rows, COLUMNS]
    out_ptr,  # the first FIRST elements of the sums, or None where they are not wanted
    rest_ptr,  # those behind them, or None
    splits,
    rows,  # None: one, which the compiler then knows
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,  # None: all
    BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    tl.static_assert(rest_ptr is None or FIRST is not None, "the rest begins somewhere")
    if rows is None:
        pid, count = tl.program_id(0), COLUMNS
    else:
        pid, count = tl.cast(tl.program_id(0), tl.int64), tl.cast(rows, tl.int64) * COLUMNS
    offs = pid * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, splits, SPLITS_BLOCK):
        s = first + tl.arange(0, SPLITS_BLOCK)[:, None]
        mask = (s < splits) & (offs < count)
        part = tl.load(partial_ptr + tl.cast(s, tl.int64) * count + offs, mask=mask, other=0.0)
        total += tl.sum(part, axis=0, keep_dims=True)

    if out_ptr is not None:
        own = count if FIRST is None else FIRST
        tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=offs < own)
    if rest_ptr is not None:
        tl.store(rest_ptr + (offs - FIRST), total.to(rest_ptr.dtype.element_ty), mask=(offs >= FIRST) & (offs < count))
