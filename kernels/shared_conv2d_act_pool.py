"""The gradient of the codebooks of a shared-weight convolution, out of that of its weights.

A convolution's kernels decode filters as they load them: forward and backward_input are those of conv2d_act_pool.py
with a codebook. backward_weight writes the gradient of the weights, fp32 [K, C] with C the elements of a filter.

Math     dbook[j,e] = sum of dw[k,c] over the (k, c) of codebook j with index e
Tiles    BLOCK_K filters x BLOCK_C elements of one codebook
Traffic  4 * K*C + indices read; 4 * ENTRIES bytes of partial sums written per tile
Work     2 * ENTRIES * K*C, on ordinary cores: cheap to 4 bits, dear at 8
Rounding fp32 sums
Order    a fixed tree within a tile, then tiles by reduce.sum_splits' order. No atomics.
"""

import triton
import triton.language as tl

from .codebook import load_indices, store_by_index
from .tile import channels


@triton.jit
def centroids_of_weight(
    dw_ptr,  # fp32 [K, C]
    codes_ptr,  # uint8 [K, PITCH]
    sums_ptr,  # fp32 [tiles of a codebook, codebooks, ENTRIES]
    shared: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """backward_codebook's sums, of a gradient in memory."""
    c_blocks: tl.constexpr = (shared.count + BLOCK_C - 1) // BLOCK_C
    k_blocks: tl.constexpr = (shared.BOOK_ROWS + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    first = pid % c_blocks * BLOCK_C
    book, place, k_ok = channels(pid // c_blocks, shared.BOOK_ROWS, BLOCK_K)
    first_k = book * shared.BOOK_ROWS + pid // c_blocks % k_blocks * BLOCK_K
    k = book * shared.BOOK_ROWS + place
    c = first + tl.arange(0, BLOCK_C)
    ok = k_ok[:, None] & (c < shared.count)[None, :]
    dw = tl.load(dw_ptr + (k * shared.count)[:, None] + c[None, :], mask=ok, other=0.0)

    indices = tl.where(ok, load_indices(codes_ptr, first_k, first, shared, BLOCK_K, BLOCK_C), -1)
    tile = pid // c_blocks % k_blocks * c_blocks + pid % c_blocks
    line = (tl.cast(tile, tl.int64) * shared.books + book) * shared.ENTRIES
    store_by_index(dw, indices, sums_ptr + line, shared.ENTRIES)
