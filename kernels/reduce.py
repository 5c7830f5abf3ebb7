"""Sum of split partial results, in a fixed order.

Math     out[i] = sum over s of partial[s, i]
Tiles    [SPLITS_BLOCK, BLOCK] of partial in, [BLOCK] of out
Traffic  4 * splits * count read, element size * count written
Work     splits * count additions
Rounding fp32 sums, one rounding to the output's type
Order    splits in blocks of SPLITS_BLOCK, a fixed tree within a block, blocks in turn: the same bits on every run
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["splits"])
def sum_splits(
    partial_ptr,  # [splits, W + B] fp32: weights, then bias
    dw_ptr,  # [W] or None
    db_ptr,  # [B] or None
    splits,
    W: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, splits, SPLITS_BLOCK):
        s = first + tl.arange(0, SPLITS_BLOCK)
        mask = (s[:, None] < splits) & (offs[None, :] < W + B)
        rows = tl.cast(s, tl.int64)[:, None] * (W + B)
        total += tl.sum(tl.load(partial_ptr + rows + offs[None, :], mask=mask, other=0.0), axis=0)

    if dw_ptr is not None:
        tl.store(dw_ptr + offs, total.to(dw_ptr.dtype.element_ty), mask=offs < W)
    if db_ptr is not None:
        tl.store(db_ptr + (offs - W), total.to(db_ptr.dtype.element_ty), mask=(offs >= W) & (offs < W + B))
